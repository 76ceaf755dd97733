// The portable path, and the packing of panels that all paths share. See tq.h.

#include "tq.h"

#include "ggml-impl.h"
#include "ggml-quants.h"

#include <string.h>

static bool tq_generic_supported(void) {
    return true;
}

static void tq_generic_quantize(const float * x, block_q8_t * y, int64_t k) {
    quantize_row_q8_t_ref(x, y, k);
}

// sum of c*q over a block, c the 2-bit codes in qs2[32]
static int32_t tq_generic_dot_block(const uint8_t * qs2, const int8_t * q) {
    int32_t sum = 0;
    for (int p = 0; p < 4; ++p) {
        for (int l = 0; l < 32; ++l) {
            sum += ((qs2[l] >> (2 * p)) & 3) * q[32 * p + l];
        }
    }
    return sum;
}

static void tq_generic_gemv(enum ggml_type type, int64_t k, int64_t nrows, const void * x, size_t bx, const block_q8_t * y, float * dst) {
    const int64_t nb = k / QK_TQ;
    for (int64_t r = 0; r < nrows; ++r) {
        const char * row = (const char *) x + r * bx;
        float sum = 0.0f;
        for (int64_t b = 0; b < nb; ++b) {
            uint8_t unpacked[32];
            const uint8_t * qs2;
            float alpha, mu;
            if (type == GGML_TYPE_TQ2_1) {
                const block_tq2_1 * xb = (const block_tq2_1 *) row + b;
                alpha = GGML_FP16_TO_FP32(xb->alpha);
                mu    = GGML_FP16_TO_FP32(xb->mu);
                qs2   = xb->qs;
            } else {
                const block_tq1_1 * xb = (const block_tq1_1 *) row + b;
                alpha = GGML_FP16_TO_FP32(xb->alpha);
                mu    = GGML_FP16_TO_FP32(xb->mu);
                ggml_tq1_1_unpack_block(xb, unpacked);
                qs2   = unpacked;
            }
            sum += alpha * y[b].d * (float) tq_generic_dot_block(qs2, y[b].qs) + ggml_tq_offset(alpha, mu) * y[b].s;
        }
        dst[r] = sum;
    }
}

const struct ggml_tq_path ggml_tq_path_generic = {
    /* .name      = */ "generic",
    /* .supported = */ tq_generic_supported,
    /* .quantize  = */ tq_generic_quantize,
    /* .gemv      = */ tq_generic_gemv,
    /* .gemm      = */ NULL,
};

void ggml_tq_pack_panel(const block_q8_t * const * col, int64_t b, int w, char * dst) {
    float * d = (float *) (dst + w * QK_TQ);
    for (int c = 0; c < w; ++c) {
        const block_q8_t * y = col[c] + b;
        for (int j = 0; j < QK_TQ / 4; ++j) {
            memcpy(dst + (j * w + c) * 4, y->qs + 4 * j, 4);
        }
        d[c]     = y->d;
        d[w + c] = y->s;
    }
}
