// ROPE of q, ROPE of k into the cache and the copy of v into the cache in one kernel: three launches a
// layer less count where a layer is a few dozen microseconds.
//
// The arithmetic is that of ggml's ROPE for the plain kinds (neighbouring pairs, or pairs half a head apart),
// with its extrapolation (YaRN) and frequency factors.

#include "tq-backend.cuh"
#include "tq-fuse.cuh"

#include <cmath>
#include <cstring>

namespace {

struct rotation {
    int     dims;        // columns of a head that turn
    bool    half_apart;  // pairs (i, i + dims/2) rather than (2i, 2i + 1)
    float   theta_scale, freq_scale, ext_factor, attn_factor;
    float   corr[2];
    const int32_t * pos;
    const float   * freq_factors; // may be null
};

// Rows of heads: x[token*ld_token + head*ld_head + column]
struct heads_in { const float * x; int64_t ld_head, ld_token; int heads; };

struct rope_args {
    rotation rot;
    int      columns;    // of a head
    heads_in q, k;
    float  * q_out; int64_t q_ld_head, q_ld_token;
    half   * k_cache; int64_t k_ld; const int64_t * k_rows; // row of the cache for each token
    const float * v; int64_t v_ld; int v_columns;           // v_columns 0: no v
    half   * v_cache; int64_t v_cache_ld; const int64_t * v_rows;
};

__device__ __forceinline__ float2 turn(const rotation & r, int pair, int token) {
    const float factor = r.freq_factors ? r.freq_factors[pair] : 1.0f;
    const float extrapolated = r.pos[token] * powf(r.theta_scale, (float) pair) / factor;
    const float interpolated = r.freq_scale * extrapolated;
    float theta = interpolated;
    float scale = r.attn_factor;
    if (r.ext_factor != 0.0f) {
        const float ramp = (pair - r.corr[0]) / fmaxf(0.001f, r.corr[1] - r.corr[0]);
        const float mix  = (1.0f - fminf(1.0f, fmaxf(0.0f, ramp))) * r.ext_factor;
        theta  = interpolated * (1.0f - mix) + extrapolated * mix;
        scale *= 1.0f + 0.1f * logf(1.0f / r.freq_scale);
    }
    return make_float2(cosf(theta) * scale, sinf(theta) * scale);
}

// Grid (heads of q, heads of k, pieces of v; tokens), columns / 2 threads: one pair each.
__global__ void rope_and_cache(const rope_args a) {
    ggml_cuda_pdl_lc();
    const int token = blockIdx.y;
    const int pair  = threadIdx.x;
    int head = blockIdx.x;
    ggml_cuda_pdl_sync();

    if (head >= a.q.heads + a.k.heads) {
        head -= a.q.heads + a.k.heads;
        const float * v = a.v + token * a.v_ld;
        half * to = a.v_cache + a.v_rows[token] * a.v_cache_ld;
        for (int column = head * a.columns + pair; column < min(a.v_columns, (head + 1) * a.columns); column += a.columns / 2) {
            to[column] = __float2half(v[column]);
        }
        return;
    }

    const bool is_q = head < a.q.heads;
    head -= is_q ? 0 : a.q.heads;
    const heads_in & in = is_q ? a.q : a.k;
    const float * x = in.x + token * in.ld_token + head * in.ld_head;

    const bool turns = pair < a.rot.dims / 2;
    const int  one   = turns && a.rot.half_apart ? pair : 2 * pair;
    const int  two   = turns && a.rot.half_apart ? pair + a.rot.dims / 2 : 2 * pair + 1;
    const float x1 = x[one];
    const float x2 = x[two];
    const float2 cs = turns ? turn(a.rot, pair, token) : make_float2(1.0f, 0.0f);
    const float y1 = x1 * cs.x - x2 * cs.y;
    const float y2 = x1 * cs.y + x2 * cs.x;
    if (is_q) { // may be x itself
        float * y = a.q_out + token * a.q_ld_token + head * a.q_ld_head;
        y[one] = y1;
        y[two] = y2;
    } else {
        half * y = a.k_cache + a.k_rows[token] * a.k_ld + head * a.columns;
        y[one] = __float2half(y1);
        y[two] = __float2half(y2);
    }
}

// ---- matching --------------------------------------------------------------------------------------------

bool read_rotation(const ggml_tensor * rope, rotation & r) {
    const int32_t * p = rope->op_params;
    const int mode = p[2];
    if ((mode != GGML_ROPE_TYPE_NORMAL && mode != GGML_ROPE_TYPE_NEOX) || p[15] != 0) {
        return false;
    }
    float freq_base, beta_fast, beta_slow;
    memcpy(&freq_base,     p +  5, sizeof(float));
    memcpy(&r.freq_scale,  p +  6, sizeof(float));
    memcpy(&r.ext_factor,  p +  7, sizeof(float));
    memcpy(&r.attn_factor, p +  8, sizeof(float));
    memcpy(&beta_fast,     p +  9, sizeof(float));
    memcpy(&beta_slow,     p + 10, sizeof(float));
    r.dims        = p[1];
    r.half_apart  = mode == GGML_ROPE_TYPE_NEOX;
    r.theta_scale = powf(freq_base, -2.0f / r.dims);
    ggml_rope_yarn_corr_dims(r.dims, p[4], freq_base, beta_fast, beta_slow, r.corr);
    r.pos          = (const int32_t *) rope->src[1]->data;
    r.freq_factors = rope->src[2] ? (const float *) rope->src[2]->data : nullptr;
    const int64_t columns = rope->ne[0];
    return r.dims > 0 && r.dims % 2 == 0 && r.dims <= columns && columns % 2 == 0 && columns <= 1024 &&
        rope->src[1]->type == GGML_TYPE_I32 && rope->src[1]->ne[0] >= rope->ne[2] &&
        (!rope->src[2] || (rope->src[2]->type == GGML_TYPE_F32 && ggml_is_contiguous(rope->src[2])));
}

bool is_heads(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && t->ne[3] == 1 && t->nb[0] == sizeof(float) && t->nb[1] % sizeof(float) == 0 && t->nb[2] % sizeof(float) == 0;
}

heads_in heads_of(const ggml_tensor * t) {
    return { (const float *) t->data, (int64_t) (t->nb[1] / sizeof(float)), (int64_t) (t->nb[2] / sizeof(float)), (int) t->ne[1] };
}

// SET_ROWS of F32 rows [columns, tokens] into F16 rows, one index a token.
bool is_cache_write(const ggml_tensor * t, int64_t tokens) {
    const ggml_tensor * rows = t->src[0];
    return t->op == GGML_OP_SET_ROWS && t->type == GGML_TYPE_F16 && t->nb[0] == sizeof(half) && t->nb[1] % sizeof(half) == 0 &&
        t->ne[2] == 1 && t->ne[3] == 1 && rows->type == GGML_TYPE_F32 && rows->nb[0] == sizeof(float) && rows->nb[1] % sizeof(float) == 0 &&
        rows->ne[1] == tokens && rows->ne[2] == 1 && rows->ne[3] == 1 && rows->ne[0] == t->ne[0] &&
        t->src[1]->type == GGML_TYPE_I64 && t->src[1]->nb[0] == sizeof(int64_t) && t->src[1]->ne[0] == tokens;
}

} // namespace

bool ggml_cuda_tq_rope(ggml_backend_cuda_context & ctx, ggml_cgraph * cgraph, int & i) {
    const auto & done = ggml_cuda_tq_get(ctx).done;
    const auto next = [&](int at) {
        do {
            at = tq_next_node(cgraph, at);
        } while (at < cgraph->n_nodes && done.count(cgraph->nodes[at]));
        return at;
    };
    const ggml_tensor * q = cgraph->nodes[i];
    const int ik = next(i);
    const int is = ik < cgraph->n_nodes ? next(ik) : cgraph->n_nodes;
    if (is >= cgraph->n_nodes) {
        return false;
    }
    const ggml_tensor * k     = cgraph->nodes[ik];
    const ggml_tensor * store = cgraph->nodes[is];
    const int64_t tokens = q->ne[2];

    rope_args a = {};
    if (q->op != GGML_OP_ROPE || k->op != GGML_OP_ROPE || q->src[1] != k->src[1] || q->src[2] != k->src[2] ||
            memcmp(q->op_params, k->op_params, sizeof(q->op_params)) != 0 || !read_rotation(q, a.rot) ||
            q->ne[0] != k->ne[0] || k->ne[2] != tokens || k->ne[3] != 1 || tokens > 65535 || // the grid's y
            !is_heads(q) || !is_heads(q->src[0]) || !is_heads(k->src[0]) || k->type != GGML_TYPE_F32) {
        return false;
    }
    // k itself is not written: all that may read it is the flat view that goes into the cache
    if (!is_cache_write(store, tokens)) {
        return false;
    }
    const ggml_tensor * flat = store->src[0];
    if (flat->op != GGML_OP_VIEW || flat->view_src != k || flat->view_offs != 0 || flat->ne[0] != k->ne[0] * k->ne[1] ||
            !ggml_is_contiguous(k) || !ggml_is_contiguous(flat) || tq_used_elsewhere(cgraph, ik, 1)) {
        return false;
    }
    for (int j = ik + 1; j < is; j++) { // the view: for nobody else, either
        if (cgraph->nodes[j] == flat && (ggml_node_get_use_count(cgraph, j) != 1 || (flat->flags & GGML_TENSOR_FLAG_OUTPUT))) {
            return false;
        }
    }

    a.columns    = (int) q->ne[0];
    a.q          = heads_of(q->src[0]);
    a.k          = heads_of(k->src[0]);
    a.q_out      = (float *) q->data;
    a.q_ld_head  = q->nb[1] / sizeof(float);
    a.q_ld_token = q->nb[2] / sizeof(float);
    a.k_cache    = (half *) store->data;
    a.k_ld       = store->nb[1] / sizeof(half);
    a.k_rows     = (const int64_t *) store->src[1]->data;

    int last = is;
    const int iv = next(is);
    const ggml_tensor * store_v = iv < cgraph->n_nodes ? cgraph->nodes[iv] : nullptr;
    // v must have been computed before, not from what is computed here
    if (store_v && is_cache_write(store_v, tokens) && !tq_overlap(store_v->src[0], q) && !tq_overlap(store_v, store)) {
        a.v          = (const float *) store_v->src[0]->data;
        a.v_ld       = store_v->src[0]->nb[1] / sizeof(float);
        a.v_columns  = (int) store_v->src[0]->ne[0];
        a.v_cache    = (half *) store_v->data;
        a.v_cache_ld = store_v->nb[1] / sizeof(half);
        a.v_rows     = (const int64_t *) store_v->src[1]->data;
        last = iv;
    }

    // everything happens at once: q may take its input's place, and nothing else may meet
    if (!tq_apart_or_same(q, q->src[0]) || tq_overlap(q, k->src[0]) || tq_overlap(q, q->src[1]) || (q->src[2] && tq_overlap(q, q->src[2])) ||
            tq_overlap(q, store->src[1])) {
        return false;
    }

    const int pieces = (a.v_columns + a.columns - 1) / a.columns;
    const dim3 grid(a.q.heads + a.k.heads + pieces, tokens);
    (void) ggml_cuda_tq_follows(ctx.stream()); // and may be started early: it waits before it reads
    ggml_cuda_kernel_launch(rope_and_cache, ggml_cuda_kernel_launch_params{grid, dim3(a.columns / 2), 0, ctx.stream()}, a);
    ggml_cuda_tq_ends_early(ctx.stream());
    i = last;
    return true;
}
