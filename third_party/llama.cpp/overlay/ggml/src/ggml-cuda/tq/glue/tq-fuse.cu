// Sites of a graph for TQ2_1 and TQ1_1: the matrices that read one tensor, and what makes that tensor.
//
//   [ADD] + RMS_NORM + MUL   -> one kernel that ends in quantised activations -> q, k, v in one launch
//   SWIGLU or GEGLU (split)  -> the same                                      -> down
//   FLASH_ATTN_EXT, decode   -> the same (tq-attn.cu)                         -> o
//   anything else            -> quantised once                                -> all matrices that read it
//   ROPE of q and k, SET_ROWS of k and v -> one kernel (tq-rope.cu)
//
// Before memory is given out, the matrices of a site are moved next to each other (ggml_cuda_tq_optimize).
// Nodes are matched when the backend comes to them (ggml_cuda_tq_node), so that whatever upstream fused
// before is behind us. A matrix that stands later in the graph is computed early only if no node in
// between touches the memory it writes to. GGML_CUDA_TQ_FUSE=0 leaves every node to itself;
// GGML_CUDA_TQ_DEBUG=1 prints a line a graph.

#include "../kernels/tq-attn.cuh"
#include "tq-backend.cuh"
#include "tq-fuse.cuh"
#include "tq-match.cuh"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

constexpr int WINDOW      = 32; // nodes in which the other matrices of a site are looked for

bool env_is(const char * name, int value) {
    const char * env = getenv(name);
    return env != nullptr && atoi(env) == value;
}

// ---- the matrices of a site -----------------------------------------------------------------------------

using nodes_t = std::vector<const ggml_tensor *>;

bool contains(const nodes_t & nodes, const ggml_tensor * node) {
    return std::find(nodes.begin(), nodes.end(), node) != nodes.end();
}

// Whether node `to` can be computed right after node `from`: nothing in between, but for the members of the same site,
// touches what it writes or changes what it reads.
bool can_come_early(const ggml_cgraph * graph, int from, int to, const nodes_t & site) {
    const ggml_tensor * dst = graph->nodes[to];
    const ggml_tensor * src = dst->src[1];
    for (int k = from + 1; k < to; k++) {
        const ggml_tensor * between = graph->nodes[k];
        if (!tq_computes(between)) {
            continue;
        }
        if (contains(site, between)) {
            if (tq_overlap(dst, between)) {
                return false;
            }
            continue;
        }
        if (tq_overlap(dst, between) || tq_overlap(src, between)) {
            return false;
        }
        for (const ggml_tensor * s : between->src) {
            if (s && s->data && tq_overlap(dst, s)) {
                return false;
            }
        }
    }
    return true;
}

// The products that read `src` and can be computed right after node `from`, in the order of the graph.
nodes_t products_of(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int from, const ggml_tensor * src,
        const std::unordered_set<const ggml_tensor *> & done) {
    nodes_t site;
    const int end = std::min(graph->n_nodes, from + 1 + WINDOW);
    for (int k = from + 1; k < end; k++) {
        const ggml_tensor * node = graph->nodes[k];
        if (node->op == GGML_OP_MUL_MAT && node->src[1] == src && tq_computes(node) && !done.count(node) &&
                ggml_cuda_tq_is_product(ctx, node) && can_come_early(graph, from, k, site)) {
            site.push_back(node);
        }
    }
    return site;
}

// Whether a tool may look at the inputs of these products: with an evaluation callback, a graph ends with the node asked for.
bool may_be_looked_at(const ggml_cgraph * graph, const nodes_t & site) {
    for (int i = graph->n_nodes - 1; i >= 0; i--) {
        if (tq_computes(graph->nodes[i])) {
            return contains(site, graph->nodes[i]);
        }
    }
    return false;
}

// ---- sites ------------------------------------------------------------------------------------------------

struct counters {
    int norm = 0, glu = 0, attention = 0, grouped = 0, single = 0, rope = 0;
    std::string other; // names of ternary products that are not ours
};

enum step_kind { STEP_PLAIN, STEP_NORM, STEP_GLU, STEP_ATTENTION };

// What makes some activations (arguments as of tq_quantize, tq_quantize_norm, tq_quantize_glu), and the products that take
// them.
struct site_t {
    step_kind     kind = STEP_PLAIN;
    const float * a    = nullptr; // x, a or gate
    const float * b    = nullptr; // b or up
    const float * w    = nullptr;
    float       * sum  = nullptr;
    float       * out  = nullptr; // the values that are quantised, where somebody else wants them
    int64_t       ld_a = 0;
    int64_t       ld_b = 0;
    float         eps  = 0.0f;
    int           gelu = 0;
    tq_attention  attention = {};

    nodes_t products;
    int     last   = 0;      // index of the last node that makes the activations; of the product, where nothing does
    int64_t tokens = 0;
    int     nb     = 0;
};

using done_t = std::unordered_set<const ggml_tensor *>;

bool plan_norm(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i, const done_t & done, site_t & site) {
    norm_match m;
    if (!match_norm(graph, i, m)) {
        return false;
    }
    const ggml_tensor * mul = graph->nodes[m.mul];
    site.products = products_of(ctx, graph, m.mul, mul, done);
    if (site.products.empty()) {
        return false;
    }
    const bool write_norm = tq_used_elsewhere(graph, m.mul, (int) site.products.size()) || may_be_looked_at(graph, site.products);
    if (!norm_memory_ok(graph, m, write_norm)) {
        return false;
    }
    site.kind = STEP_NORM;
    site.a    = (const float *) m.a->data;
    site.b    = m.b ? (const float *) m.b->data : nullptr;
    site.w    = (const float *) m.w->data;
    site.sum  = m.write_sum ? (float *) m.add->data : nullptr;
    site.out  = write_norm ? (float *) mul->data : nullptr;
    memcpy(&site.eps, m.rms->op_params, sizeof(site.eps));
    site.last   = m.mul;
    site.tokens = ggml_nrows(mul);
    site.nb     = (int) (mul->ne[0] / TQ_BLOCK);
    return true;
}

bool plan_glu(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i, const done_t & done, site_t & site) {
    const ggml_tensor * node = graph->nodes[i];
    glu_match m;
    if (!match_glu(node, m)) {
        return false;
    }
    site.products = products_of(ctx, graph, i, node, done);
    if (site.products.empty()) {
        return false;
    }
    const bool write = tq_used_elsewhere(graph, i, (int) site.products.size()) || may_be_looked_at(graph, site.products);
    if (write && (!tq_apart_or_same(node, m.gate) || !tq_apart_or_same(node, m.up))) {
        return false;
    }
    site.kind = STEP_GLU;
    site.a    = (const float *) m.gate->data;
    site.b    = (const float *) m.up->data;
    site.ld_a = m.ld_gate;
    site.ld_b = m.ld_up;
    site.gelu = m.act;
    site.out  = write ? (float *) node->data : nullptr;
    site.last   = i;
    site.tokens = ggml_nrows(node);
    site.nb     = (int) (node->ne[0] / TQ_BLOCK);
    return true;
}

bool plan_attention(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i, const done_t & done, site_t & site) {
    const ggml_tensor * node = graph->nodes[i];
    if (!match_attention(node, site.attention)) {
        return false;
    }
    // the products read a view that has the heads of a token as one row
    int k = i + 1;
    while (k < graph->n_nodes && !tq_computes(graph->nodes[k]) && graph->nodes[k]->src[0] != node) {
        k++;
    }
    const ggml_tensor * rows = k < graph->n_nodes ? graph->nodes[k] : nullptr;
    if (!rows || (rows->op != GGML_OP_RESHAPE && rows->op != GGML_OP_VIEW) || rows->src[0] != node || rows->data != node->data ||
            !ggml_is_contiguous(rows) || rows->ne[0] != node->ne[0] * node->ne[1] || ggml_nelements(rows) != ggml_nelements(node)) {
        return false;
    }
    site.products = products_of(ctx, graph, i, rows, done);
    if (site.products.empty()) {
        return false;
    }
    const bool write = tq_used_elsewhere(graph, i, 1) || ggml_node_get_use_count(graph, k) != (int) site.products.size() ||
        (rows->flags & GGML_TENSOR_FLAG_OUTPUT) || may_be_looked_at(graph, site.products);
    if (!write) {
        site.attention.out = nullptr;
    } else {
        for (const ggml_tensor * s : node->src) {
            if (s && tq_overlap(node, s)) {
                return false;
            }
        }
    }
    site.kind   = STEP_ATTENTION;
    site.last   = i;
    site.tokens = (int64_t) site.attention.tokens * site.attention.streams;
    site.nb     = site.attention.heads;
    return true;
}

bool plan_plain(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i, const done_t & done, site_t & site) {
    const ggml_tensor * node = graph->nodes[i];
    if (node->op != GGML_OP_MUL_MAT || !ggml_cuda_tq_is_product(ctx, node)) {
        return false;
    }
    const ggml_tensor * src = node->src[1];
    site.products  = products_of(ctx, graph, i - 1, src, done);
    site.kind = STEP_PLAIN;
    site.a    = (const float *) src->data;
    site.ld_a = ggml_cuda_tq_ld(node);
    site.last   = i;
    site.tokens = ggml_cuda_tq_tokens(node);
    site.nb     = (int) (src->ne[0] / TQ_BLOCK);
    return true;
}

bool plan(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i, const done_t & done, site_t & site) {
    switch (graph->nodes[i]->op) {
        case GGML_OP_ADD:
        case GGML_OP_RMS_NORM: return plan_norm (ctx, graph, i, done, site);
        case GGML_OP_GLU:      return plan_glu  (ctx, graph, i, done, site);
        case GGML_OP_FLASH_ATTN_EXT: return plan_attention(ctx, graph, i, done, site);
        case GGML_OP_MUL_MAT:  return plan_plain(ctx, graph, i, done, site);
        default:               return false;
    }
}

void count_site(counters & count, const site_t & site) {
    switch (site.kind) {
        case STEP_NORM:  count.norm++; break;
        case STEP_GLU:   count.glu++;  break;
        case STEP_ATTENTION: count.attention++; break;
        case STEP_PLAIN: (site.products.size() > 1 ? count.grouped : count.single)++; break;
    }
}

// One kernel for the activations, one for up to TQ_MAX_SEGMENTS products.
void run_site(ggml_backend_cuda_context & ctx, const site_t & s) {
    const tq_act act = ggml_cuda_tq_new_act(ctx, (int) s.tokens, s.nb);
    switch (s.kind) {
        case STEP_NORM:  tq_quantize_norm(s.a, s.b, s.w, s.eps, s.sum, s.out, act, ctx.stream()); break;
        case STEP_GLU:   tq_quantize_glu(s.a, s.b, s.ld_a, s.ld_b, s.gelu, s.out, act, ctx.stream()); break;
        case STEP_ATTENTION: tq_quantize_attention(s.attention, act, ctx.stream()); break;
        case STEP_PLAIN: tq_quantize(s.a, s.ld_a, act, ctx.stream()); break;
    }
    const size_t n = s.products.size();
    for (size_t first = 0; first < n; first += TQ_MAX_SEGMENTS) {
        ggml_cuda_tq_product(ctx, s.products.data() + first, (int) std::min<size_t>(TQ_MAX_SEGMENTS, n - first), act);
    }
}

bool plan_and_run(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int & i, counters & count) {
    ggml_cuda_tq_state & state = ggml_cuda_tq_get(ctx);
    site_t site;
    if (!plan(ctx, graph, i, state.done, site)) {
        return false;
    }
    run_site(ctx, site);
    state.done.insert(site.products.begin(), site.products.end());
    count_site(count, site);
    i = site.last;
    return true;
}

// ---- what was done with a graph ----------------------------------------------------------------------------

bool is_ternary_product(const ggml_tensor * node) {
    return (node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID) && tq_computes(node) &&
        (node->src[0]->type == GGML_TYPE_TQ2_1 || node->src[0]->type == GGML_TYPE_TQ1_1);
}

counters & debug_counters(const ggml_cuda_tq_state & state) {
    static thread_local std::unordered_map<const ggml_cuda_tq_state *, counters> all;
    return all[&state];
}

void debug_print(const ggml_cgraph * graph, int i, counters & count, bool ours) {
    if (!ours && is_ternary_product(graph->nodes[i])) {
        count.other += std::string(" ") + graph->nodes[i]->src[0]->name;
    }
    for (int k = i + 1; k < graph->n_nodes; k++) {
        if (is_ternary_product(graph->nodes[k])) {
            return;
        }
    }
    if (is_ternary_product(graph->nodes[i])) { // the last one
        fprintf(stderr, "tq-fuse: %d nodes; sites after a norm %d, after a gated unit %d, after attention %d, of several matrices %d, of one %d; rotations with the cache %d; other ternary products:%s\n",
            graph->n_nodes, count.norm, count.glu, count.attention, count.grouped, count.single, count.rope, count.other.empty() ? " none" : count.other.c_str());
    }
}

bool switched_off() {
    static const bool off = env_is("GGML_CUDA_TQ_FUSE", 0) || (getenv("GGML_CUDA_DISABLE_FUSION") && !env_is("GGML_CUDA_DISABLE_FUSION", 0));
    return off;
}

const ggml_tensor * root_of(const ggml_tensor * t) {
    while (t->view_src) {
        t = t->view_src;
    }
    return t;
}

} // namespace

void ggml_cuda_tq_optimize(ggml_backend_cuda_context & ctx, ggml_cgraph * cgraph) {
    if (switched_off()) {
        return;
    }
    const auto movable = [&](const ggml_tensor * t) {
        return t->op == GGML_OP_MUL_MAT && t->src[0]->op == GGML_OP_NONE && ggml_cuda_tq_form(ctx.device, t->src[0]);
    };
    for (int i = 0; i < cgraph->n_nodes; i++) {
        if (!movable(cgraph->nodes[i])) {
            continue;
        }
        const ggml_tensor * src = cgraph->nodes[i]->src[1];
        int last = i; // of the site's products that follow each other
        const int end = std::min(cgraph->n_nodes, i + 1 + WINDOW);
        for (int k = i + 1; k < end; k++) {
            ggml_tensor * node = cgraph->nodes[k];
            if (movable(node) && node->src[1] == src) {
                std::rotate(cgraph->nodes + last + 1, cgraph->nodes + k, cgraph->nodes + k + 1);
                last++;
            } else if (root_of(node) == root_of(src) && tq_computes(node)) {
                break; // changes what the others would read
            }
        }
        i = last;
    }
}

void ggml_cuda_tq_begin(ggml_backend_cuda_context & ctx, ggml_cgraph * cgraph) {
    ggml_cuda_tq_state & state = ggml_cuda_tq_get(ctx);
    state.done.clear();
    debug_counters(state) = {};
    GGML_UNUSED(cgraph);
}

bool ggml_cuda_tq_node(ggml_backend_cuda_context & ctx, ggml_cgraph * cgraph, int & i) {
    static const bool debug = env_is("GGML_CUDA_TQ_DEBUG", 1);

    const ggml_tensor * node = cgraph->nodes[i];
    // with several streams at work, what is between two nodes of the graph is not between them in time
    if (switched_off() || !tq_computes(node) || ctx.curr_stream_no != 0 || !ctx.stream_context().concurrent_events.empty()) {
        return false;
    }
    ggml_cuda_tq_state & state = ggml_cuda_tq_get(ctx);
    counters & count = debug_counters(state);
    const int at = i;
    bool ours = state.done.count(node) != 0;
    if (!ours) {
        switch (node->op) {
            case GGML_OP_ROPE: ours = !state.done.empty() && ggml_cuda_tq_rope(ctx, cgraph, i); count.rope += ours; break;
            default:           ours = plan_and_run(ctx, cgraph, i, count); break;
        }
    }
    if (debug) {
        debug_print(cgraph, at, count, ours);
    }
    return ours;
}
