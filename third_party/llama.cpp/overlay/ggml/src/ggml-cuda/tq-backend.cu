#include "tq-backend.cuh"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

static constexpr size_t TQ_STAGING = 16u << 20; // bytes of a tensor on their way at once
static constexpr int64_t TQ_EXPERT_PAIRS = 64;  // (token, slot) pairs up to which experts are read as they are stored

// ---- which tensors ------------------------------------------------------------------------------------

static bool tq_is_type(const ggml_tensor * t) {
    return t->type == GGML_TYPE_TQ2_1 || t->type == GGML_TYPE_TQ1_1;
}

static const ggml_tensor * tq_root(const ggml_tensor * t) {
    while (t->view_src != nullptr) {
        t = t->view_src;
    }
    return t;
}

// GGML_CUDA_TQ: tiles (the default) or templates.
static bool tq_wanted() {
    static const bool wanted = []() {
        const char * value = getenv("GGML_CUDA_TQ");
        if (value == nullptr || strcmp(value, "tiles") == 0) {
            return true;
        }
        if (strcmp(value, "templates") != 0) {
            GGML_ABORT("GGML_CUDA_TQ is \"%s\": tiles and templates are known", value);
        }
        return false;
    }();
    return wanted;
}

bool ggml_cuda_tq_form(int device, const ggml_tensor * tensor) {
    if (!tq_is_type(tensor)) {
        return false;
    }
    const int cc = ggml_cuda_info().devices[device].cc;
    return GGML_CUDA_CC_IS_NVIDIA(cc) && ggml_cuda_highest_compiled_arch(cc) >= GGML_CUDA_CC_AMPERE &&
        ggml_is_contiguous(tq_root(tensor)) && tq_wanted();
}

bool ggml_cuda_tq_tiles(int device, const ggml_tensor * tensor) {
    if (!ggml_cuda_tq_form(device, tensor)) {
        return false;
    }
    const ggml_tensor * root = tq_root(tensor);
    return root->buffer == nullptr || !ggml_backend_buffer_is_host(root->buffer);
}

static tq_shape tq_shape_of(const ggml_tensor * root) {
    return { root->type == GGML_TYPE_TQ1_1, root->ne[0], root->ne[1], root->ne[2]*root->ne[3] };
}

// Where a tensor begins in its root, in the file's bytes.
static int64_t tq_offset(const ggml_tensor * t) {
    return (const char *) t->data - (const char *) tq_root(t)->data;
}

static uint8_t * tq_tiles(const ggml_tensor * t) {
    return (uint8_t *) tq_root(t)->data;
}

size_t ggml_cuda_tq_alloc_size(const ggml_tensor * tensor) {
    // nothing is allocated for a view, and callers expect no less than its extent
    return tensor->view_src ? ggml_nbytes(tensor) : tq_tile_tensor_bytes(tq_shape_of(tensor));
}

// ---- to and from the host -------------------------------------------------------------------------------

void ggml_cuda_tq_init(int device, ggml_tensor * tensor) {
    if (tensor->ne[1] % TQ_TILE_ROWS != 0) {
        ggml_cuda_set_device(device);
        CUDA_CHECK(cudaMemset(tensor->data, 0, ggml_cuda_tq_alloc_size(tensor)));
    }
}

// Cuts pieces so that each part fits the staging memory; calls f(part, its distance in the caller's data).
template <typename F>
static void tq_for_each_part(const ggml_tensor * t, const ggml_cuda_tq_pieces & p, F f) {
    const size_t offset = p.offset + tq_offset(t);
    if (p.size == 0) {
        return;
    }
    if (p.size <= TQ_STAGING) {
        const size_t step = TQ_STAGING / p.size;
        for (size_t i = 0; i < p.count; i += step) {
            f(tq_pieces{ offset + i*p.stride_tensor, p.size, std::min(step, p.count - i), p.stride_tensor }, i*p.stride_data);
        }
        return;
    }
    for (size_t i = 0; i < p.count; ++i) {
        for (size_t at = 0; at < p.size; at += TQ_STAGING) {
            f(tq_pieces{ offset + i*p.stride_tensor + at, std::min(TQ_STAGING, p.size - at), 1, 0 }, i*p.stride_data + at);
        }
    }
}

static size_t tq_staging_bytes(const ggml_cuda_tq_pieces & p) {
    return p.size <= TQ_STAGING ? p.size * std::min(p.count, std::max(TQ_STAGING / std::max(p.size, (size_t) 1), (size_t) 1)) : TQ_STAGING;
}

static void tq_upload(ggml_tensor * t, const void * data, const ggml_cuda_tq_pieces & p, uint8_t * staging, cudaStream_t stream) {
    tq_for_each_part(t, p, [&](const tq_pieces & part, size_t at) {
        CUDA_CHECK(cudaMemcpy2DAsync(staging, part.bytes, (const char *) data + at, part.count == 1 ? part.bytes : p.stride_data,
                                     part.bytes, part.count, cudaMemcpyHostToDevice, stream));
        tq_to_tiles(tq_shape_of(tq_root(t)), staging, part, tq_tiles(t), stream);
        CUDA_CHECK(cudaGetLastError());
    });
}

static void tq_download(const ggml_tensor * t, void * data, const ggml_cuda_tq_pieces & p, uint8_t * staging, cudaStream_t stream) {
    tq_for_each_part(t, p, [&](const tq_pieces & part, size_t at) {
        tq_from_tiles(tq_shape_of(tq_root(t)), tq_tiles(t), part, staging, stream);
        CUDA_CHECK(cudaGetLastError());
        CUDA_CHECK(cudaMemcpy2DAsync((char *) data + at, part.count == 1 ? part.bytes : p.stride_data, staging, part.bytes,
                                     part.bytes, part.count, cudaMemcpyDeviceToHost, stream));
    });
}

// Device memory for one call; freeing it waits until the work is done.
struct tq_staging {
    uint8_t * data = nullptr;
    tq_staging(int device, size_t size) {
        ggml_cuda_set_device(device);
        CUDA_CHECK(cudaMalloc((void **) &data, std::max(size, (size_t) 1)));
    }
    ~tq_staging() { CUDA_CHECK(cudaFree(data)); }
    tq_staging(const tq_staging &) = delete;
    tq_staging & operator=(const tq_staging &) = delete;
};

void ggml_cuda_tq_set_tensor(int device, ggml_tensor * tensor, const void * data, const ggml_cuda_tq_pieces & p) {
    tq_staging staging(device, tq_staging_bytes(p));
    tq_upload(tensor, data, p, staging.data, cudaStreamPerThread);
    CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
}

void ggml_cuda_tq_get_tensor(int device, const ggml_tensor * tensor, void * data, const ggml_cuda_tq_pieces & p) {
    tq_staging staging(device, tq_staging_bytes(p));
    tq_download(tensor, data, p, staging.data, cudaStreamPerThread);
    CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
}

void ggml_cuda_tq_memset(int device, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    const ggml_cuda_tq_pieces p = { offset, size };
    tq_staging staging(device, tq_staging_bytes(p));
    CUDA_CHECK(cudaMemsetAsync(staging.data, value, tq_staging_bytes(p), cudaStreamPerThread));
    tq_for_each_part(tensor, p, [&](const tq_pieces & part, size_t) {
        tq_to_tiles(tq_shape_of(tq_root(tensor)), staging.data, part, tq_tiles(tensor), cudaStreamPerThread);
        CUDA_CHECK(cudaGetLastError());
    });
    CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
}

// Memory of the pool serves one stream, in order, so it may be given back before the work on it is done.
void ggml_cuda_tq_set_tensor_async(ggml_backend_cuda_context & ctx, ggml_tensor * tensor, const void * data, const ggml_cuda_tq_pieces & p) {
    ggml_cuda_set_device(ctx.device);
    ggml_cuda_pool_alloc<uint8_t> staging(ctx.pool(), tq_staging_bytes(p));
    tq_upload(tensor, data, p, staging.get(), ctx.stream());
}

void ggml_cuda_tq_get_tensor_async(ggml_backend_cuda_context & ctx, const ggml_tensor * tensor, void * data, const ggml_cuda_tq_pieces & p) {
    ggml_cuda_set_device(ctx.device);
    ggml_cuda_pool_alloc<uint8_t> staging(ctx.pool(), tq_staging_bytes(p));
    tq_download(tensor, data, p, staging.get(), ctx.stream());
}

bool ggml_cuda_tq_copy_size(int src_device, const ggml_tensor * src, int dst_device, const ggml_tensor * dst, size_t & size) {
    size = ggml_nbytes(src);
    const bool src_form = ggml_cuda_tq_form(src_device, src);
    if (src_form != ggml_cuda_tq_form(dst_device, dst)) {
        return false;
    }
    if (src_form) {
        size = ggml_cuda_tq_alloc_size(src);
        return src->view_src == nullptr && dst->view_src == nullptr;
    }
    return true;
}

// ---- operators ------------------------------------------------------------------------------------------

static bool tq_is_copy(const ggml_tensor * op) {
    return op->op == GGML_OP_CPY || op->op == GGML_OP_DUP || op->op == GGML_OP_CONT;
}

static const ggml_tensor * tq_copy_dst(const ggml_tensor * op) {
    return op->op == GGML_OP_CPY ? op->src[1] : op;
}

static bool tq_float_of(ggml_type type, tq_float & f) {
    switch (type) {
        case GGML_TYPE_F32:  f = TQ_F32;  return true;
        case GGML_TYPE_F16:  f = TQ_F16;  return true;
        case GGML_TYPE_BF16: f = TQ_BF16; return true;
        default: return false;
    }
}

static bool tq_can_copy(const ggml_tensor * src, const ggml_tensor * dst) {
    if (!ggml_is_contiguous(dst)) {
        return false;
    }
    if (src->type == dst->type) {
        return ggml_is_contiguous(src);
    }
    tq_float f;
    return tq_is_type(src) && src->nb[0] == ggml_type_size(src->type) && tq_float_of(dst->type, f);
}

bool ggml_cuda_tq_supports_op(int device, const ggml_tensor * op) {
    bool tiles = ggml_cuda_tq_form(device, op);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        tiles = tiles || (op->src[i] && ggml_cuda_tq_form(device, op->src[i]));
    }
    if (!tiles) {
        return true;
    }
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return true;
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return op->src[1]->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 && op->src[0]->nb[0] == ggml_type_size(op->src[0]->type);
        case GGML_OP_GET_ROWS: {
            tq_float f;
            return op->src[0]->nb[0] == ggml_type_size(op->src[0]->type) && op->src[1]->type == GGML_TYPE_I32 && tq_float_of(op->type, f);
        }
        case GGML_OP_CPY:
        case GGML_OP_DUP:
        case GGML_OP_CONT:
            return tq_can_copy(op->src[0], tq_copy_dst(op));
        default:
            return false; // whatever would move bytes or blocks about without knowing of tiles
    }
}

static void tq_dequantize_tensor(const ggml_tensor * src, void * y, tq_float type, cudaStream_t stream) {
    tq_rows r = {};
    r.columns = src->ne[0];
    r.offset  = tq_offset(src);
    int64_t distance = src->ne[0];
    for (int i = 0; i < 3; ++i) {
        r.n[i]        = src->ne[i + 1];
        r.stride[i]   = (int64_t) src->nb[i + 1];
        r.y_stride[i] = distance;
        distance *= r.n[i];
    }
    tq_dequantize(tq_shape_of(tq_root(src)), tq_tiles(src), r, y, type, stream);
}

static void tq_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    const ggml_tensor * ids = dst->src[1];
    GGML_ASSERT(ids->type == GGML_TYPE_I32 && ids->ne[3] == 1);
    tq_float type;
    GGML_ASSERT(tq_float_of(dst->type, type));

    tq_rows r = {};
    r.columns = src->ne[0];
    r.offset  = tq_offset(src);
    r.ids     = (const int32_t *) ids->data;
    for (int i = 0; i < 3; ++i) {
        r.n[i]          = ids->ne[i];
        r.stride[i]     = (int64_t) src->nb[i + 1];
        r.ids_stride[i] = (int64_t) (ids->nb[i] / sizeof(int32_t));
        r.y_stride[i]   = (int64_t) (dst->nb[i + 1] / ggml_type_size(dst->type));
    }
    tq_dequantize(tq_shape_of(tq_root(src)), tq_tiles(src), r, dst->data, type, ctx.stream());
}

// The same bytes of the file at another place, which may mean other tiles, or no tiles.
static void tq_copy_bytes(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst) {
    const ggml_cuda_tq_pieces all = { 0, ggml_nbytes(src) };
    GGML_ASSERT(ggml_nbytes(dst) == all.size);
    cudaStream_t stream = ctx.stream();
    ggml_cuda_pool_alloc<uint8_t> staging(ctx.pool(), tq_staging_bytes(all));
    const bool src_tiles = ggml_cuda_tq_tiles(ctx.device, src);
    const bool dst_tiles = ggml_cuda_tq_tiles(ctx.device, dst);
    for (size_t at = 0; at < all.size; at += TQ_STAGING) {
        const size_t size = std::min(TQ_STAGING, all.size - at);
        if (src_tiles) {
            tq_from_tiles(tq_shape_of(tq_root(src)), tq_tiles(src), { tq_offset(src) + at, size, 1, 0 }, staging.get(), stream);
        } else {
            CUDA_CHECK(cudaMemcpyAsync(staging.get(), (const char *) src->data + at, size, cudaMemcpyDeviceToDevice, stream));
        }
        if (dst_tiles) {
            tq_to_tiles(tq_shape_of(tq_root(dst)), staging.get(), { tq_offset(dst) + at, size, 1, 0 }, tq_tiles(dst), stream);
        } else {
            CUDA_CHECK(cudaMemcpyAsync((char *) dst->data + at, staging.get(), size, cudaMemcpyDeviceToDevice, stream));
        }
    }
}

bool ggml_cuda_tq_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (dst->op == GGML_OP_GET_ROWS && ggml_cuda_tq_tiles(ctx.device, dst->src[0])) {
        tq_get_rows(ctx, dst);
    } else if (tq_is_copy(dst)) {
        const ggml_tensor * src = dst->src[0];
        ggml_tensor * to = dst->op == GGML_OP_CPY ? dst->src[1] : dst;
        if (!ggml_cuda_tq_tiles(ctx.device, src) && !ggml_cuda_tq_tiles(ctx.device, to)) {
            return false;
        }
        GGML_ASSERT(tq_can_copy(src, to));
        tq_float type;
        if (tq_float_of(to->type, type)) {
            tq_dequantize_tensor(src, to->data, type, ctx.stream());
        } else {
            tq_copy_bytes(ctx, src, to);
        }
    } else {
        return false;
    }
    CUDA_CHECK(cudaGetLastError());
    return true;
}

ggml_tensor ggml_cuda_tq_f16_like(const ggml_tensor * tensor) {
    ggml_tensor t = *tensor;
    t.type      = GGML_TYPE_F16;
    t.op        = GGML_OP_NONE;
    t.view_src  = nullptr;
    t.view_offs = 0;
    t.data      = nullptr;
    t.nb[0] = sizeof(half);
    for (int i = 1; i < GGML_MAX_DIMS; ++i) {
        t.nb[i] = t.nb[i - 1] * t.ne[i - 1];
    }
    return t;
}

ggml_cuda_tq_f16::ggml_cuda_tq_f16(ggml_backend_cuda_context & ctx, const ggml_tensor * src) :
        data(ctx.pool(), ggml_nelements(src)), tensor(ggml_cuda_tq_f16_like(src)) {
    tensor.data = data.get();
    tq_dequantize_tensor(src, data.get(), TQ_F16, ctx.stream());
    CUDA_CHECK(cudaGetLastError());
}

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

static void * tq_scratch(ggml_backend_cuda_context & ctx) {
    ggml_cuda_tq_state & state = ggml_cuda_tq_get(ctx);
    void *& scratch = state.scratch[ctx.curr_stream_no];
    if (scratch == nullptr) {
        const size_t size = std::max(tq_decode_scratch_bytes(), (size_t) 1);
        scratch = tq_allocate(state, size);
        // not on the context's stream: a graph that is being recorded there would zero it again whenever it runs
        CUDA_CHECK(cudaMemsetAsync(scratch, 0, size, cudaStreamPerThread));
        CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
    }
    return scratch;
}

static size_t tq_aligned(size_t bytes) {
    return GGML_PAD(bytes, 128);
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

// Rows of floats, and the distance from one to the next in elements. ld = 0: there is none.
struct tq_float_rows {
    int64_t n;
    int64_t ld;
};

// All rows of a tensor, if they are at one distance from each other.
static tq_float_rows tq_flat_rows(const ggml_tensor * t) {
    const bool flat = t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->nb[1] % sizeof(float) == 0 &&
        (t->ne[2] == 1 || t->nb[2] == t->nb[1]*t->ne[1]) && (t->ne[3] == 1 || t->nb[3] == t->nb[1]*t->ne[1]*t->ne[2]);
    return { ggml_nrows(t), flat ? (int64_t) (t->nb[1] / sizeof(float)) : 0 };
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

static void tq_product(ggml_backend_cuda_context & ctx, const tq_segment * segments, int n_segments, const tq_act & act, const tq_next * next) {
    if (act.layout == TQ_ACT_DECODE) {
        tq_decode(segments, n_segments, act, tq_scratch(ctx), next, ctx.stream());
    } else {
        const auto & device = ggml_cuda_info().devices[ctx.device];
        tq_prefill(segments, n_segments, act, device.cc, device.nsm, ctx.stream());
    }
    CUDA_CHECK(cudaGetLastError());
}

// One matrix and n rows of x.
static void tq_mul_mat_rows(ggml_backend_cuda_context & ctx, const tq_segment & segment, const float * x, int64_t ld, int64_t n, int nb) {
    ggml_cuda_pool_alloc<uint8_t> memory(ctx.pool(), tq_act_bytes((int) n, nb));
    const tq_act act = tq_make_act((int) n, nb, memory.get());
    tq_quantize(x, ld, act, ctx.stream());
    CUDA_CHECK(cudaGetLastError());
    tq_product(ctx, &segment, 1, act, nullptr);
}

bool ggml_cuda_tq_is_product(ggml_backend_cuda_context & ctx, const ggml_tensor * node) {
    if (node->op != GGML_OP_MUL_MAT || !ggml_cuda_tq_tiles(ctx.device, node->src[0])) {
        return false;
    }
    const ggml_tensor * w = node->src[0];
    return w->ne[2]*w->ne[3] == 1 && tq_matrix(w, 0) != nullptr && tq_flat_rows(node->src[1]).ld != 0 && tq_flat_rows(node).ld != 0;
}

int64_t ggml_cuda_tq_tokens(const ggml_tensor * node) {
    return tq_flat_rows(node->src[1]).n;
}

int64_t ggml_cuda_tq_ld(const ggml_tensor * node) {
    return tq_flat_rows(node->src[1]).ld;
}

void ggml_cuda_tq_product(ggml_backend_cuda_context & ctx, const ggml_tensor * const * nodes, int n_nodes, const tq_act & act,
                          const tq_next * next) {
    GGML_ASSERT(n_nodes > 0 && n_nodes <= TQ_MAX_SEGMENTS);
    tq_segment segments[TQ_MAX_SEGMENTS];
    for (int i = 0; i < n_nodes; ++i) {
        const ggml_tensor * w = nodes[i]->src[0];
        segments[i] = { tq_matrix(w, 0), (float *) nodes[i]->data, tq_flat_rows(nodes[i]).ld, (int) w->ne[1] };
    }
    tq_product(ctx, segments, n_nodes, act, next);
}

tq_next ggml_cuda_tq_describe(const ggml_tensor * const * nodes, int n_nodes) {
    GGML_ASSERT(n_nodes > 0 && n_nodes <= TQ_MAX_SEGMENTS);
    tq_next next = {};
    next.segments = n_nodes;
    next.nb       = (int) (nodes[0]->src[0]->ne[0] / TQ_BLOCK);
    next.cols     = tq_act_cols((int) ggml_cuda_tq_tokens(nodes[0]));
    for (int i = 0; i < n_nodes; ++i) {
        next.w[i]    = tq_matrix(nodes[i]->src[0], 0);
        next.rows[i] = (int) nodes[i]->src[0]->ne[1];
    }
    return next;
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

    const tq_float_rows x = tq_flat_rows(src1);
    const tq_float_rows y = tq_flat_rows(dst);
    if (src0->ne[2]*src0->ne[3] == 1 && x.ld != 0 && y.ld != 0) {
        const uint8_t * w = tq_matrix(src0, 0);
        if (w == nullptr) {
            return false;
        }
        tq_mul_mat_rows(ctx, { w, (float *) dst->data, y.ld, rows }, (const float *) src1->data, x.ld, x.n, nb);
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
    return ids->ne[0]*ids->ne[1] <= TQ_EXPERT_PAIRS && w->ne[3] == 1 &&
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
    return true;
}
