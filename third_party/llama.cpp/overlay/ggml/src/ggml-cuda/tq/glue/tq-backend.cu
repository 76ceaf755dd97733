// Which tensors are in tile form, their way to and from the host, and operators that move or dequantise them.

#include "tq-backend.cuh"

#include <algorithm>
#include <cstdlib>
#include <cstring>

static constexpr size_t TQ_STAGING = 16u << 20; // bytes of a tensor on their way at once

// ---- which tensors ------------------------------------------------------------------------------------

static bool tq_is_type(const ggml_tensor * t) {
    return t->type == GGML_TYPE_TQ2_1 || t->type == GGML_TYPE_TQ1_1;
}

// GGML_CUDA_TQ=templates: llama.cpp's shared kernels, as on cards below compute capability 8.0.
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

// `rows` of `bytes`, as one copy where they follow each other on both sides.
static void tq_copy_rows(void * dst, size_t dst_stride, const void * src, size_t src_stride, size_t bytes, size_t rows, cudaMemcpyKind kind,
                         cudaStream_t stream) {
    if (rows == 1 || (dst_stride == bytes && src_stride == bytes)) {
        CUDA_CHECK(cudaMemcpyAsync(dst, src, bytes*rows, kind, stream));
    } else {
        CUDA_CHECK(cudaMemcpy2DAsync(dst, dst_stride, src, src_stride, bytes, rows, kind, stream));
    }
}

static void tq_upload(ggml_tensor * t, const void * data, const ggml_cuda_tq_pieces & p, uint8_t * staging, cudaStream_t stream) {
    tq_for_each_part(t, p, [&](const tq_pieces & part, size_t at) {
        tq_copy_rows(staging, part.bytes, (const char *) data + at, p.stride_data, part.bytes, part.count, cudaMemcpyHostToDevice, stream);
        tq_to_tiles(tq_shape_of(tq_root(t)), staging, part, tq_tiles(t), stream);
        CUDA_CHECK(cudaGetLastError());
    });
}

static void tq_download(const ggml_tensor * t, void * data, const ggml_cuda_tq_pieces & p, uint8_t * staging, cudaStream_t stream) {
    tq_for_each_part(t, p, [&](const tq_pieces & part, size_t at) {
        tq_from_tiles(tq_shape_of(tq_root(t)), tq_tiles(t), part, staging, stream);
        CUDA_CHECK(cudaGetLastError());
        tq_copy_rows((char *) data + at, p.stride_data, staging, part.bytes, part.bytes, part.count, cudaMemcpyDeviceToHost, stream);
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

static bool tq_has_whole_blocks(const ggml_tensor * t) {
    return t->nb[0] == ggml_type_size(t->type);
}

static bool tq_can_copy(const ggml_tensor * src, const ggml_tensor * dst) {
    if (!ggml_is_contiguous(dst)) {
        return false;
    }
    if (src->type == dst->type) {
        return ggml_is_contiguous(src);
    }
    tq_float f;
    return tq_is_type(src) && tq_has_whole_blocks(src) && tq_float_of(dst->type, f);
}

static bool tq_supports(int device, const ggml_tensor * op) {
    const ggml_tensor * a = op->src[0];
    const ggml_tensor * b = op->src[1];
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return true;
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return ggml_cuda_tq_form(device, a) && tq_has_whole_blocks(a) && b->type == GGML_TYPE_F32 && tq_has_whole_blocks(b) &&
                op->type == GGML_TYPE_F32 && (op->op == GGML_OP_MUL_MAT || ggml_get_op_params_i32(op, 3) != GGML_PREC_F32);
        case GGML_OP_GET_ROWS: {
            tq_float f;
            return ggml_cuda_tq_form(device, a) && tq_has_whole_blocks(a) && b->type == GGML_TYPE_I32 && tq_float_of(op->type, f);
        }
        case GGML_OP_CPY:
        case GGML_OP_DUP:
        case GGML_OP_CONT:
            return tq_can_copy(a, tq_copy_dst(op));
        default:
            return false; // whatever would move bytes or blocks about without knowing of tiles
    }
}

bool ggml_cuda_tq_decides(int device, const ggml_tensor * op, bool & supported) {
    bool tiles = ggml_cuda_tq_form(device, op);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        tiles = tiles || (op->src[i] && ggml_cuda_tq_form(device, op->src[i]));
    }
    if (tiles) {
        supported = tq_supports(device, op);
    }
    return tiles;
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

ggml_cuda_tq_f16::ggml_cuda_tq_f16(ggml_backend_cuda_context & ctx, const ggml_tensor * src) :
        data(ctx.pool(), ggml_nelements(src)), tensor(*src) {
    tensor.type      = GGML_TYPE_F16;
    tensor.op        = GGML_OP_NONE;
    tensor.view_src  = nullptr;
    tensor.view_offs = 0;
    tensor.data      = data.get();
    tensor.nb[0]     = sizeof(half);
    for (int i = 1; i < GGML_MAX_DIMS; ++i) {
        tensor.nb[i] = tensor.nb[i - 1] * tensor.ne[i - 1];
    }
    tq_dequantize_tensor(src, data.get(), TQ_F16, ctx.stream());
    CUDA_CHECK(cudaGetLastError());
}
