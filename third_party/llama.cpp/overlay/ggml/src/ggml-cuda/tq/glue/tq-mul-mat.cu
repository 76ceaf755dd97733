// MUL_MAT and MUL_MAT_ID from tile form, and what a context keeps for them.

#include "tq-backend.cuh"

#include <algorithm>
#include <memory>
#include <mutex>
#include <unordered_map>

// (token, slot) pairs up to which an expert is read once for each of them: so many, or the experts' number times the factor.
// Beyond, sorting by expert (which waits for the ids to reach the host) and a product for each expert read less.
static constexpr int64_t TQ_EXPERT_PAIRS  = 64;
static constexpr int64_t TQ_EXPERT_FACTOR = 2;

// ---- a context's state ----------------------------------------------------------------------------------

static std::mutex tq_states_mutex;
static std::unordered_map<const ggml_backend_cuda_context *, std::unique_ptr<ggml_cuda_tq_state>> tq_states;

ggml_cuda_tq_state & ggml_cuda_tq_get(ggml_backend_cuda_context & ctx) {
    std::lock_guard<std::mutex> lock(tq_states_mutex);
    std::unique_ptr<ggml_cuda_tq_state> & state = tq_states[&ctx];
    if (!state) {
        state = std::make_unique<ggml_cuda_tq_state>();
        state->device = ctx.device;
    }
    return *state;
}

void ggml_cuda_tq_free(ggml_backend_cuda_context * ctx) {
    std::lock_guard<std::mutex> lock(tq_states_mutex);
    auto it = tq_states.find(ctx);
    if (it == tq_states.end()) {
        return;
    }
    ggml_cuda_set_device(it->second->device);
    for (void * memory : it->second->owned) {
        CUDA_CHECK(cudaFree(memory));
    }
    tq_states.erase(it);
}

static void * tq_allocate(ggml_cuda_tq_state & state, size_t size) {
    void * data = nullptr;
    ggml_cuda_set_device(state.device);
    CUDA_CHECK(cudaMalloc(&data, size));
    state.owned.push_back(data);
    return data;
}

static size_t tq_aligned(size_t bytes) {
    return GGML_PAD(bytes, 128);
}

// tq_decode's, of the current stream, and behind it tq_batch's: each leaves its own as it found it, but for what it handed over.
struct tq_scratch_memory { uint8_t * decode, * batch; };
static tq_scratch_memory tq_scratch(ggml_backend_cuda_context & ctx) {
    ggml_cuda_tq_state & state = ggml_cuda_tq_get(ctx);
    void *& scratch = state.scratch[ctx.curr_stream_no];
    const size_t decode = tq_aligned(tq_decode_scratch_bytes());
    if (scratch == nullptr) {
        const size_t size = std::max(decode + tq_batch_scratch_bytes(), (size_t) 1);
        scratch = tq_allocate(state, size);
        // not on the context's stream: a graph that is being recorded there would zero it again whenever it runs
        CUDA_CHECK(cudaMemsetAsync(scratch, 0, size, cudaStreamPerThread));
        CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
    }
    return { (uint8_t *) scratch, (uint8_t *) scratch + decode };
}

static size_t tq_act_bytes(int n, int nb) {
    return tq_aligned(tq_act_q_bytes(n, nb)) + tq_act_aux_bytes(n, nb);
}

static tq_act tq_make_act(int n, int nb, uint8_t * memory) {
    tq_act act = {};
    act.layout = n <= TQ_DECODE_MAX ? TQ_ACT_DECODE : TQ_ACT_PREFILL;
    act.n      = n;
    act.cols   = tq_act_cols(n);
    act.nb     = nb;
    act.q      = memory;
    act.aux    = memory + tq_aligned(tq_act_q_bytes(n, nb));
    return act;
}

tq_act ggml_cuda_tq_new_act(ggml_backend_cuda_context & ctx, int n, int nb) {
    ggml_cuda_tq_state & state = ggml_cuda_tq_get(ctx);
    const int stream = ctx.curr_stream_no;
    ggml_cuda_tq_state::memory & memory = state.acts[stream][state.next_act[stream]];
    state.next_act[stream] = (state.next_act[stream] + 1) % GGML_CUDA_TQ_ACTS;
    const size_t size = tq_act_bytes(n, nb);
    if (memory.size < size) {
        memory.size = std::max(size, 2*memory.size); // what it had stays, so doubling bounds the sum
        memory.data = tq_allocate(state, memory.size);
    }
    return tq_make_act(n, nb, (uint8_t *) memory.data);
}

// ---- products -------------------------------------------------------------------------------------------

int64_t ggml_cuda_tq_row_distance(const ggml_tensor * t) {
    const bool regular = t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->nb[1] % sizeof(float) == 0 &&
        (t->ne[2] == 1 || t->nb[2] == t->nb[1]*t->ne[1]) && (t->ne[3] == 1 || t->nb[3] == t->nb[1]*t->ne[1]*t->ne[2]);
    return regular ? (int64_t) (t->nb[1] / sizeof(float)) : 0;
}

// The tiles of the matrix of t that begins `offset` bytes after t; null if it does not begin with a tile, or its rows are
// not whole rows of the root.
static const uint8_t * tq_matrix(const ggml_tensor * t, int64_t offset) {
    const tq_shape s = tq_shape_of(tq_root(t));
    const int64_t row_bytes = (int64_t) ggml_row_size(t->type, s.columns);
    offset += tq_offset(t);
    if (t->ne[0] != s.columns || (int64_t) t->nb[1] != row_bytes || offset % row_bytes != 0) {
        return nullptr;
    }
    const int64_t row    = offset / row_bytes;
    const int64_t matrix = row / s.rows;
    const int64_t inside = row % s.rows;
    // a view of several matrices as one is a matrix only where nothing pads them
    if (inside % TQ_TILE_ROWS != 0 || (inside + t->ne[1] > s.rows && s.rows % TQ_TILE_ROWS != 0)) {
        return nullptr;
    }
    const int64_t tile_rows = (s.rows + TQ_TILE_ROWS - 1) / TQ_TILE_ROWS;
    return tq_tiles(t) + (matrix*tile_rows + inside / TQ_TILE_ROWS) * (s.columns / TQ_BLOCK) * TQ_TILE_BYTES;
}

static void tq_product(ggml_backend_cuda_context & ctx, const tq_segment * segments, int n_segments, const tq_act & act) {
    if (act.layout == TQ_ACT_DECODE) {
        tq_decode(segments, n_segments, act, tq_scratch(ctx).decode, ctx.stream());
    } else if (act.n <= TQ_BATCH_MAX && tq_batch_scratch_bytes() > 0) {
        tq_batch(segments, n_segments, act, tq_scratch(ctx).batch, ctx.stream());
    } else {
        const auto & device = ggml_cuda_info().devices[ctx.device];
        tq_prefill(segments, n_segments, act, device.cc, device.nsm, ctx.stream());
    }
    CUDA_CHECK(cudaGetLastError());
    ggml_cuda_tq_ends_early(ctx.stream());
}

// One matrix and n rows of x.
static void tq_mul_mat_rows(ggml_backend_cuda_context & ctx, const tq_segment & segment, const float * x, int64_t ld, int64_t n, int nb) {
    ggml_cuda_pool_alloc<uint8_t> memory(ctx.pool(), tq_act_bytes((int) n, nb));
    const tq_act act = tq_make_act((int) n, nb, memory.get());
    tq_quantize(x, ld, act, ctx.stream());
    CUDA_CHECK(cudaGetLastError());
    tq_product(ctx, &segment, 1, act);
}

bool ggml_cuda_tq_is_product(ggml_backend_cuda_context & ctx, const ggml_tensor * node) {
    if (node->op != GGML_OP_MUL_MAT || !ggml_cuda_tq_tiles(ctx.device, node->src[0])) {
        return false;
    }
    const ggml_tensor * w = node->src[0];
    return w->ne[2]*w->ne[3] == 1 && tq_matrix(w, 0) != nullptr && ggml_cuda_tq_row_distance(node->src[1]) != 0 && ggml_cuda_tq_row_distance(node) != 0;
}

int64_t ggml_cuda_tq_tokens(const ggml_tensor * node) {
    return ggml_nrows(node->src[1]);
}

int64_t ggml_cuda_tq_ld(const ggml_tensor * node) {
    return ggml_cuda_tq_row_distance(node->src[1]);
}

void ggml_cuda_tq_product(ggml_backend_cuda_context & ctx, const ggml_tensor * const * nodes, int n_nodes, const tq_act & act) {
    GGML_ASSERT(n_nodes > 0 && n_nodes <= TQ_MAX_SEGMENTS);
    tq_segment segments[TQ_MAX_SEGMENTS];
    for (int i = 0; i < n_nodes; ++i) {
        const ggml_tensor * w = nodes[i]->src[0];
        segments[i] = { tq_matrix(w, 0), (float *) nodes[i]->data, ggml_cuda_tq_row_distance(nodes[i]), (int) w->ne[1] };
    }
    tq_product(ctx, segments, n_nodes, act);
}

bool ggml_cuda_tq_mul_mat(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst) {
    const bool floats = src1->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float);
    for (int i = 1; i < GGML_MAX_DIMS; ++i) {
        if (!floats || src1->nb[i] % sizeof(float) != 0 || dst->nb[i] % sizeof(float) != 0) {
            return false;
        }
    }
    const int nb   = (int) (src0->ne[0] / TQ_BLOCK);
    const int rows = (int) src0->ne[1];

    const int64_t ld_x = ggml_cuda_tq_row_distance(src1);
    const int64_t ld_y = ggml_cuda_tq_row_distance(dst);
    if (src0->ne[2]*src0->ne[3] == 1 && ld_x != 0 && ld_y != 0) {
        const uint8_t * w = tq_matrix(src0, 0);
        if (w == nullptr) {
            return false;
        }
        tq_mul_mat_rows(ctx, { w, (float *) dst->data, ld_y, rows }, (const float *) src1->data, ld_x, ggml_nrows(src1), nb);
        return true;
    }

    for (int64_t i3 = 0; i3 < src0->ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < src0->ne[2]; ++i2) {
            if (tq_matrix(src0, i2*src0->nb[2] + i3*src0->nb[3]) == nullptr) {
                return false;
            }
        }
    }
    for (int64_t i3 = 0; i3 < src1->ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < src1->ne[2]; ++i2) {
            const uint8_t * w = tq_matrix(src0, i2 / (src1->ne[2] / src0->ne[2]) * src0->nb[2] + i3 / (src1->ne[3] / src0->ne[3]) * src0->nb[3]);
            const float * x23 = (const float *) ((const char *) src1->data + i2*src1->nb[2] + i3*src1->nb[3]);
            float       * y23 = (float *) ((char *) dst->data + i2*dst->nb[2] + i3*dst->nb[3]);
            tq_mul_mat_rows(ctx, { w, y23, (int64_t) (dst->nb[1] / sizeof(float)), rows }, x23, (int64_t) (src1->nb[1] / sizeof(float)), src1->ne[1], nb);
        }
    }
    return true;
}

bool ggml_cuda_tq_can_mul_mat_id(const ggml_tensor * dst) {
    const ggml_tensor * w   = dst->src[0];
    const ggml_tensor * x   = dst->src[1];
    const ggml_tensor * ids = dst->src[2];
    const ggml_tensor * root = tq_root(w);
    return ids->ne[0]*ids->ne[1] <= std::max(TQ_EXPERT_PAIRS, TQ_EXPERT_FACTOR*w->ne[2]) && w->ne[3] == 1 &&
        // whole experts, as they follow each other
        tq_matrix(w, 0) != nullptr && w->ne[1] == root->ne[1] && w->nb[2] == w->nb[1]*w->ne[1] && tq_offset(w) % w->nb[2] == 0 &&
        (x->ne[1] == 1 || x->ne[1] == ids->ne[0]) && x->ne[2] == ids->ne[1] && x->ne[3] == 1 &&
        x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && x->nb[1] % sizeof(float) == 0 && x->nb[2] % sizeof(float) == 0 &&
        dst->type == GGML_TYPE_F32 && dst->nb[0] == sizeof(float) && dst->nb[1] % sizeof(float) == 0 && dst->nb[2] % sizeof(float) == 0;
}

bool ggml_cuda_tq_mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!ggml_cuda_tq_can_mul_mat_id(dst)) {
        return false;
    }
    const ggml_tensor * w   = dst->src[0];
    const ggml_tensor * x   = dst->src[1];
    const ggml_tensor * ids = dst->src[2];
    const int nb = (int) (w->ne[0] / TQ_BLOCK);

    // Each token by itself has the layout of one column, and one token after the other that of one long token.
    const int64_t tokens = x->ne[1]*x->ne[2];
    ggml_cuda_pool_alloc<uint8_t>     q(ctx.pool(), (size_t) tokens*nb*TQ_BLOCK);
    ggml_cuda_pool_alloc<tq_act_head> head(ctx.pool(), (size_t) tokens*nb);
    const bool    one  = ggml_is_contiguous(x);
    const int64_t step = one ? tokens : 1;
    for (int64_t i = 0; i < tokens; i += step) {
        const float * row = (const float *) ((const char *) x->data + i % x->ne[1] * x->nb[1] + i / x->ne[1] * x->nb[2]);
        tq_act act = {};
        act.layout = TQ_ACT_DECODE;
        act.n      = 1;
        act.cols   = 1;
        act.nb     = (int) step*nb;
        act.q      = q.get() + i*nb*TQ_BLOCK;
        act.aux    = head.get() + i*nb;
        tq_quantize(row, (int64_t) act.nb*TQ_BLOCK, act, ctx.stream());
        CUDA_CHECK(cudaGetLastError());
    }

    tq_experts e = {};
    e.w            = tq_matrix(w, 0);
    e.expert_bytes = tq_tile_tensor_bytes({ w->type == GGML_TYPE_TQ1_1, w->ne[0], w->ne[1], 1 });
    e.rows         = (int) w->ne[1];
    e.nb           = nb;
    e.ids          = (const int32_t *) ids->data;
    e.ids_slot     = (int64_t) (ids->nb[0] / sizeof(int32_t));
    e.ids_token    = (int64_t) (ids->nb[1] / sizeof(int32_t));
    e.used         = (int) ids->ne[0];
    e.tokens       = (int) ids->ne[1];
    e.q            = q.get();
    e.head         = head.get();
    e.shared       = x->ne[1] == 1;
    e.y            = (float *) dst->data;
    e.ld_slot      = (int64_t) (dst->nb[1] / sizeof(float));
    e.ld_token     = (int64_t) (dst->nb[2] / sizeof(float));
    tq_decode_experts(e, ctx.stream());
    CUDA_CHECK(cudaGetLastError());
    ggml_cuda_tq_ends_early(ctx.stream());
    return true;
}
