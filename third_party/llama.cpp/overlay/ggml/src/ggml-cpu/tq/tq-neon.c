// NEON paths for 64-bit ARM, without and with the dot product instructions. See tq.h and KERNELS.md.

#include "tq.h"

#if TQ_HAS_NEON

#include "ggml-impl.h"

#include <arm_neon.h>
#include <string.h>

#if defined(__linux__)
#include <sys/auxv.h>
#endif

#define TQ_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#define TQ_INLINE  static inline __attribute__((always_inline))

static bool tq_neon_supported(void) {
    return true; // part of the architecture
}

static bool tq_neon_dotprod_supported(void) {
#if defined(__ARM_FEATURE_DOTPROD)
    return true;
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) & (1ul << 20)) != 0; // HWCAP_ASIMDDP
#else
    return false;
#endif
}

static void tq_neon_quantize(const float * x, block_q8_t * y, int64_t k) {
    for (int64_t b = 0; b < k / QK_TQ; ++b) {
        const float * xb = x + b * QK_TQ;
        int32x4_t top = vdupq_n_s32(0);
        for (int i = 0; i < QK_TQ; i += 4) {
            top = vmaxq_s32(top, vandq_s32(vreinterpretq_s32_f32(vld1q_f32(xb + i)), vdupq_n_s32(0x7fffffff)));
        }
        const int32_t bits = vmaxvq_s32(top);
        float amax;
        memcpy(&amax, &bits, sizeof(amax));
        if (bits >= 0x7f800000 || amax < 1e-30f) { // as quantize_row_q8_t_ref
            y[b].d = y[b].s = bits >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
            memset(y[b].qs, 0, QK_TQ);
            continue;
        }
        const float id = 127.0f / amax;
        int32x4_t sum = vdupq_n_s32(0);
        for (int i = 0; i < QK_TQ; i += 8) {
            const int32x4_t q0 = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(xb + i), id));
            const int32x4_t q1 = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(xb + i + 4), id));
            sum = vaddq_s32(sum, vaddq_s32(q0, q1));
            vst1_s8(y[b].qs + i, vmovn_s16(vcombine_s16(vmovn_s32(q0), vmovn_s32(q1))));
        }
        y[b].d = amax / 127.0f;
        y[b].s = y[b].d * (float) vaddvq_s32(sum);
    }
}

// v mod n of every byte for v < 3n: subtracting too much wraps to a larger number
TQ_INLINE uint8x16_t tq_mod(uint8x16_t v, uint8_t n) {
    v = vminq_u8(v, vsubq_u8(v, vdupq_n_u8(n)));
    return vminq_u8(v, vsubq_u8(v, vdupq_n_u8(n)));
}

// Planes 0..3 of 16 base-3 bytes as 2-bit codes; the fifth digits go to *fifth. Multiples of 27 and 81 are
// divided by a look at their low bits: 27*h*192 = 64*h and 81*t & 3 = t, modulo 256
TQ_INLINE uint8x16_t tq1_1_unpack16(uint8x16_t v, uint8x16_t * fifth) {
    static const uint8_t three_digits[32] = {
        0, 1, 2, 4, 5, 6, 8, 9, 10, 16, 17, 18, 20, 21, 22, 24, 25, 26, 32, 33, 34, 36, 37, 38, 40, 41, 42,
    };
    const uint8x16x2_t table = { { vld1q_u8(three_digits), vld1q_u8(three_digits + 16) } };
    const uint8x16_t p = tq_mod(v, 81);
    const uint8x16_t q = tq_mod(p, 27);
    *fifth = vandq_u8(vsubq_u8(v, p), vdupq_n_u8(3));
    return vmlaq_u8(vqtbl2q_u8(table, q), vsubq_u8(p, q), vdupq_n_u8(192));
}

// sums of four neighbours weighted with 1, 4, 16, 64
TQ_INLINE uint16x4_t tq_gather4(uint8x16_t digit) {
    const uint8x16_t unit = vreinterpretq_u8_u32(vdupq_n_u32(0x40100401));
    return vmovn_u32(vpaddlq_u16(vpaddlq_u8(vmulq_u8(digit, unit))));
}

// The 26 bytes at qs as the 2-bit form of TQ2_1, in two halves of 16 lanes
TQ_INLINE void tq1_1_unpack(const uint8_t * qs, uint8x16_t * v0, uint8x16_t * v1) {
    const uint8x16_t zero = vdupq_n_u8(0);
    // two loads that stay within the block: bytes 0..15, and 10..25 moved down to 16..25
    const uint8x16_t hi = vextq_u8(vld1q_u8(qs + 10), zero, 6);
    uint8x16_t f0, f1;
    *v0 = tq1_1_unpack16(vld1q_u8(qs), &f0);
    const uint8x16_t c1 = tq1_1_unpack16(hi, &f1);
    // lanes 26..31 are bytes 10..15 of the upper half
    const uint8x8_t last = vmovn_u16(vcombine_u16(tq_gather4(f0), tq_gather4(f1)));
    *v1 = vorrq_u8(c1, vextq_u8(zero, vcombine_u8(last, vdup_n_u8(0)), 6));
}

TQ_INLINE int8x16_t tq_plane(uint8x16_t v, int plane) {
    // a shift by a variable count, negative for right: the count is a constant after inlining
    return vreinterpretq_s8_u8(vandq_u8(vshlq_u8(v, vdupq_n_s8((int8_t) (-2 * plane))), vdupq_n_u8(3)));
}

// 4 integer sums of c*q over a block
TQ_INLINE int32x4_t tq_neon_dot(uint8x16_t v0, uint8x16_t v1, const int8_t * q) {
    // 16-bit sums of 16 products of at most 2*127 (3*127 for an invalid code): they fit
    int16x8_t s0 = vdupq_n_s16(0), s1 = vdupq_n_s16(0);
    for (int p = 0; p < 4; ++p) {
        const int8x16_t c0 = tq_plane(v0, p), q0 = vld1q_s8(q + 32 * p);
        const int8x16_t c1 = tq_plane(v1, p), q1 = vld1q_s8(q + 32 * p + 16);
        s0 = vmlal_s8(s0, vget_low_s8(c0), vget_low_s8(q0));
        s1 = vmlal_s8(s1, vget_high_s8(c0), vget_high_s8(q0));
        s0 = vmlal_s8(s0, vget_low_s8(c1), vget_low_s8(q1));
        s1 = vmlal_s8(s1, vget_high_s8(c1), vget_high_s8(q1));
    }
    return vaddq_s32(vpaddlq_s16(s0), vpaddlq_s16(s1));
}

TQ_DOTPROD static inline int32x4_t tq_neon_dotprod_dot(uint8x16_t v0, uint8x16_t v1, const int8_t * q) {
    int32x4_t s0 = vdupq_n_s32(0), s1 = vdupq_n_s32(0);
    for (int p = 0; p < 4; ++p) {
        s0 = vdotq_s32(s0, tq_plane(v0, p), vld1q_s8(q + 32 * p));
        s1 = vdotq_s32(s1, tq_plane(v1, p), vld1q_s8(q + 32 * p + 16));
    }
    return vaddq_s32(s0, s1);
}

// One body for both paths: DOT differs, and ATTR lets the compiler use the instructions
#define TQ_NEON_GEMV(name, ATTR, DOT)                                                                                       \
    ATTR static void name(enum ggml_type type, int64_t k, int64_t nrows, const void * x, size_t bx, const block_q8_t * y, float * dst) { \
        const size_t block_size = type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1);                      \
        for (int64_t r = 0; r < nrows; ++r) {                                                                               \
            const char * row = (const char *) x + r * bx;                                                                   \
            float32x4_t acc = vdupq_n_f32(0.0f);                                                                            \
            float offset = 0.0f;                                                                                            \
            for (int64_t b = 0; b < k / QK_TQ; ++b) {                                                                       \
                const uint8_t * block = (const uint8_t *) row + b * block_size;                                             \
                uint32_t am;                                                                                                \
                memcpy(&am, block, sizeof(am));                                                                             \
                const float32x4_t scales = vcvt_f32_f16(vreinterpret_f16_u32(vdup_n_u32(am)));                              \
                const float alpha = vgetq_lane_f32(scales, 0);                                                              \
                const float mu    = vgetq_lane_f32(scales, 1);                                                              \
                uint8x16_t v0, v1;                                                                                          \
                if (type == GGML_TYPE_TQ2_1) {                                                                              \
                    v0 = vld1q_u8(block + 4);                                                                               \
                    v1 = vld1q_u8(block + 20);                                                                              \
                } else {                                                                                                    \
                    tq1_1_unpack(block + 4, &v0, &v1);                                                                      \
                }                                                                                                           \
                acc = vfmaq_n_f32(acc, vcvtq_f32_s32(DOT(v0, v1, y[b].qs)), alpha * y[b].d);                                \
                offset += (mu - alpha) * y[b].s;                                                                            \
            }                                                                                                               \
            dst[r] = vaddvq_f32(acc) + offset;                                                                              \
        }                                                                                                                   \
    }
TQ_NEON_GEMV(tq_neon_gemv, , tq_neon_dot)
TQ_NEON_GEMV(tq_neon_dotprod_gemv, TQ_DOTPROD, tq_neon_dotprod_dot)

//
// matrix times matrix, with dot products
//

#define TQ_TILE 16 // rows: two times two registers of 4

// Block b of 8 rows: codes as bytes at w[32][8][4] (k-group, row, element), alpha and mu - alpha as floats.
// Rows from nr on are zero
TQ_INLINE void tq_neon_unpack8(enum ggml_type type, int nr, const char * x, size_t bx, int64_t b, int8_t * w, float * alpha, float * offset) {
    const size_t block_size = type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1);
    uint32_t groups[8][8] = { { 0 } }; // [lanes 4j..4j+3][row], 2-bit codes
    for (int r = 0; r < 8; ++r) {
        alpha[r] = offset[r] = 0.0f;
        if (r >= nr) {
            continue;
        }
        const uint8_t * block = (const uint8_t *) x + r * bx + b * block_size;
        uint32_t am;
        memcpy(&am, block, sizeof(am));
        const float32x4_t scales = vcvt_f32_f16(vreinterpret_f16_u32(vdup_n_u32(am)));
        alpha[r]  = vgetq_lane_f32(scales, 0);
        offset[r] = vgetq_lane_f32(scales, 1) - alpha[r];
        uint8_t qs2[32];
        if (type == GGML_TYPE_TQ2_1) {
            memcpy(qs2, block + 4, sizeof(qs2));
        } else {
            uint8x16_t v0, v1;
            tq1_1_unpack(block + 4, &v0, &v1);
            vst1q_u8(qs2, v0);
            vst1q_u8(qs2 + 16, v1);
        }
        for (int j = 0; j < 8; ++j) {
            memcpy(&groups[j][r], qs2 + 4 * j, 4);
        }
    }
    for (int j = 0; j < 8; ++j) {
        const uint8x16_t v0 = vreinterpretq_u8_u32(vld1q_u32(groups[j]));
        const uint8x16_t v1 = vreinterpretq_u8_u32(vld1q_u32(groups[j] + 4));
        for (int p = 0; p < 4; ++p) {
            vst1q_s8(w + 32 * (8 * p + j), tq_plane(v0, p));
            vst1q_s8(w + 32 * (8 * p + j) + 16, tq_plane(v1, p));
        }
    }
}

// acc[c][h] += products of 4 elements: rows 4h..4h+3 with columns c..c+3 (those below W)
#define TQ_DOT_COLUMN(c, q, lane)                                       \
    if ((c) + (lane) < W) {                                             \
        acc[(c) + (lane)][0] = vdotq_laneq_s32(acc[(c) + (lane)][0], w0, q, lane); \
        acc[(c) + (lane)][1] = vdotq_laneq_s32(acc[(c) + (lane)][1], w1, q, lane); \
    }
#define TQ_DOT_COLUMNS(c, q) TQ_DOT_COLUMN(c, q, 0) TQ_DOT_COLUMN(c, q, 1) TQ_DOT_COLUMN(c, q, 2) TQ_DOT_COLUMN(c, q, 3)

// sums[c][8 of the tile's rows] += one block of W columns of a panel
TQ_DOTPROD static inline __attribute__((always_inline)) void tq_neon_block8(int W, const int8_t * w, const float * alpha, const float * offset, const char * panel, float * sums) {
    int32x4_t acc[TQ_PANEL][2];
    for (int c = 0; c < W; ++c) {
        acc[c][0] = acc[c][1] = vdupq_n_s32(0);
    }
    for (int j = 0; j < QK_TQ / 4; ++j) {
        const int8x16_t w0 = vld1q_s8(w + 32 * j);
        const int8x16_t w1 = vld1q_s8(w + 32 * j + 16);
        int8_t q[4 * TQ_PANEL]; // a narrow panel has fewer bytes than the registers
        memcpy(q, panel + 4 * j * W, 4 * W);
        const int8x16_t q0 = vld1q_s8(q);
        TQ_DOT_COLUMNS(0, q0)
        if (W > 4) {
            const int8x16_t q1 = vld1q_s8(q + 16);
            TQ_DOT_COLUMNS(4, q1)
        }
    }
    const float * d = (const float *) (panel + W * QK_TQ);
    for (int h = 0; h < 2; ++h) {
        const float32x4_t al = vld1q_f32(alpha + 4 * h);
        const float32x4_t of = vld1q_f32(offset + 4 * h);
        for (int c = 0; c < W; ++c) {
            float * sum = sums + c * TQ_TILE + 4 * h;
            float32x4_t t = vfmaq_n_f32(vld1q_f32(sum), of, d[W + c]);
            t = vfmaq_f32(t, vcvtq_f32_s32(acc[c][h]), vmulq_n_f32(al, d[c]));
            vst1q_f32(sum, t);
        }
    }
}

#define TQ_BLOCK(W) \
    TQ_DOTPROD static void tq_neon_block_##W(const int8_t * w, const float * alpha, const float * offset, const char * panel, float * sums) { \
        tq_neon_block8(W, w, alpha, offset, panel, sums); \
        tq_neon_block8(W, w + 8 * QK_TQ, alpha + 8, offset + 8, panel, sums + 8); \
    }
TQ_BLOCK(1) TQ_BLOCK(2) TQ_BLOCK(3) TQ_BLOCK(4) TQ_BLOCK(5) TQ_BLOCK(6) TQ_BLOCK(7) TQ_BLOCK(8)

typedef void (*tq_block_fn)(const int8_t *, const float *, const float *, const char *, float *);
static const tq_block_fn tq_neon_blocks[TQ_PANEL + 1] = {
    NULL, tq_neon_block_1, tq_neon_block_2, tq_neon_block_3, tq_neon_block_4,
    tq_neon_block_5, tq_neon_block_6, tq_neon_block_7, tq_neon_block_8,
};

static void tq_neon_dotprod_gemm(enum ggml_type type, int64_t k, int64_t nrows, const void * x, size_t bx, const struct ggml_tq_cols * cols, float * const * dst) {
    const int64_t nb = k / QK_TQ;

    float  sums[TQ_MAX_COLS * TQ_TILE];
    int8_t w[TQ_TILE * QK_TQ];
    float  alpha[TQ_TILE], offset[TQ_TILE];
    float  packed[TQ_PANEL * sizeof(block_q8_t) / sizeof(float)];

    for (int64_t r0 = 0; r0 < nrows; r0 += TQ_TILE) {
        const int nr = (int) MIN(TQ_TILE, nrows - r0);
        memset(sums, 0, cols->n * TQ_TILE * sizeof(float));

        for (int64_t b = 0; b < nb; ++b) {
            for (int h = 0; h < 2; ++h) {
                tq_neon_unpack8(type, nr - 8 * h, (const char *) x + (r0 + 8 * h) * bx, bx, b, w + 8 * QK_TQ * h, alpha + 8 * h, offset + 8 * h);
            }
            for (int c = 0; c < cols->n; c += TQ_PANEL) {
                const int width = MIN(TQ_PANEL, cols->n - c);
                const char * panel = (const char *) packed;
                if (cols->panels) {
                    panel = cols->panels + (c * nb + b * width) * sizeof(block_q8_t);
                } else {
                    ggml_tq_pack_panel(cols->col + c, b, width, (char *) packed);
                }
                tq_neon_blocks[width](w, alpha, offset, panel, sums + c * TQ_TILE);
            }
        }
        for (int c = 0; c < cols->n; ++c) {
            memcpy(dst[c] + r0, sums + c * TQ_TILE, nr * sizeof(float));
        }
    }
}

const struct ggml_tq_path ggml_tq_path_neon = {
    /* .name      = */ "neon",
    /* .supported = */ tq_neon_supported,
    /* .quantize  = */ tq_neon_quantize,
    /* .gemv      = */ tq_neon_gemv,
    /* .gemm      = */ NULL,
};

const struct ggml_tq_path ggml_tq_path_neon_dotprod = {
    /* .name      = */ "neon-dotprod",
    /* .supported = */ tq_neon_dotprod_supported,
    /* .quantize  = */ tq_neon_quantize,
    /* .gemv      = */ tq_neon_dotprod_gemv,
    /* .gemm      = */ tq_neon_dotprod_gemm,
};

#else
typedef int tq_neon_is_empty_here; // ISO C wants a declaration
#endif
