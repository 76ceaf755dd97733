// The head's matrix-vector product: a good part of what a decoded token reads, and not ternary. llama.cpp's own dot
// product serves, row by row; only the order of the rows and the fetching are ours. See tq.h and KERNELS.md.

#include "tq.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#if TQ_HAS_X86 // measured nowhere else

#define TQ_HEAD_STREAMS   4
// These rows' arithmetic is shorter than that of ternary ones, so that the first-level fetch starts earlier
#define TQ_HEAD_FAR       2048
#define TQ_HEAD_NEAR      1152

// Types that pt2-export writes heads (and embeddings that serve as heads) in
static bool tq_is_head_type(enum ggml_type type) {
    return type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q5_K || type == GGML_TYPE_Q6_K || type == GGML_TYPE_Q8_0;
}

struct tq_head {
    ggml_vec_dot_t dot;
    int            k;
    size_t         row_size; // bytes from row to row
    const char *   x;
    const char *   y;
    float *        dst;
};

static void tq_head_rows(const void * context, int64_t begin, int64_t end) {
    const struct tq_head * h = context;
    const int64_t per_stream = (end - begin + TQ_HEAD_STREAMS - 1) / TQ_HEAD_STREAMS;
    for (int64_t i = 0; i < per_stream; ++i) {
        for (int64_t r = begin + i; r < end; r += per_stream) {
            const char * row = h->x + r * h->row_size;
            for (size_t at = 0; at < h->row_size; at += 64) {
                __builtin_prefetch(row + TQ_HEAD_FAR + at, 0, 2);
                __builtin_prefetch(row + TQ_HEAD_NEAR + at, 0, 3);
            }
            h->dot(h->k, h->dst + r, 0, row, 0, h->y, 0, 1);
        }
    }
}

bool ggml_tq_mul_mat_head(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];

    if (params->use_ref || !tq_is_head_type(src0->type) || src0->extra || src1->type != GGML_TYPE_F32 || ggml_nrows(src1) != 1 ||
        ggml_nrows(src0) != src0->ne[1] || !ggml_is_contiguous(src0) || !ggml_is_contiguous(src1)) {
        return false;
    }
    const struct ggml_type_traits_cpu * weights = ggml_get_type_traits_cpu(src0->type);
    const enum ggml_type                y_type  = weights->vec_dot_type;
    const int64_t                       block   = ggml_blck_size(y_type);
    const int64_t                       nblocks = src0->ne[0] / block;
    GGML_ASSERT(params->wsize >= ggml_row_size(y_type, src0->ne[0]));

    // activations, shared out by blocks, as the stock code does
    const int64_t b0 = nblocks * params->ith / params->nth;
    const int64_t b1 = nblocks * (params->ith + 1) / params->nth;
    char *        y  = params->wdata;
    if (b0 < b1) {
        ggml_get_type_traits_cpu(y_type)->from_float((const float *) src1->data + b0 * block, y + b0 * ggml_type_size(y_type), (b1 - b0) * block);
    }
    const struct tq_head head = { weights->vec_dot, (int) src0->ne[0], src0->nb[1], src0->data, y, dst->data };
    ggml_tq_share_rows(params, src0->ne[1], 1, tq_head_rows, &head);
    return true;
}

#else

bool ggml_tq_mul_mat_head(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    (void) params;
    (void) dst;
    return false;
}

#endif
