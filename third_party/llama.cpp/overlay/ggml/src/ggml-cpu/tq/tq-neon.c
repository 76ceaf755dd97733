// NEON paths for 64-bit ARM: plain, with dot product and with matrix instructions. See tq.h and KERNELS.md.

#include "tq.h"

#if TQ_HAS_NEON

#include "ggml-impl.h"

#include <arm_neon.h>
#include <string.h>

#if defined(__linux__)
#include <sys/auxv.h>
#endif

#define TQ_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#define TQ_I8MM    __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
// compilers that know the matrix instructions by attribute
#if (defined(__clang__) && __clang_major__ >= 16) || (!defined(__clang__) && __GNUC__ >= 10)
#define TQ_HAS_I8MM 1
#else
#define TQ_HAS_I8MM 0
#endif
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

static bool tq_neon_i8mm_supported(void) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return true;
#elif defined(__linux__) && TQ_HAS_I8MM
    return (getauxval(AT_HWCAP2) & (1ul << 13)) != 0; // HWCAP2_I8MM
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
    const uint8x16_t p81 = tq_mod(v, 81);
    const uint8x16_t p = vminq_u8(p81, vsubq_u8(p81, vdupq_n_u8(81))); // of bytes above 242 p81 is 81 and more
    const uint8x16_t q = tq_mod(p, 27);
    *fifth = vandq_u8(vsubq_u8(v, p81), vdupq_n_u8(3));
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

// (v >> 2*plane) & 3 of every byte: the lowest plane needs no shift, the highest no mask
TQ_INLINE int8x16_t tq_plane(uint8x16_t v, int plane) {
    const uint8x16_t three = vdupq_n_u8(3);
    switch (plane) {
        case 0:  return vreinterpretq_s8_u8(vandq_u8(v, three));
        case 1:  return vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(v, 2), three));
        case 2:  return vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(v, 4), three));
        default: return vreinterpretq_s8_u8(vshrq_n_u8(v, 6));
    }
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
                offset += ggml_tq_offset(alpha, mu) * y[b].s;                                                               \
            }                                                                                                               \
            dst[r] = vaddvq_f32(acc) + offset;                                                                              \
        }                                                                                                                   \
    }
TQ_NEON_GEMV(tq_neon_gemv, , tq_neon_dot)
TQ_NEON_GEMV(tq_neon_dotprod_gemv, TQ_DOTPROD, tq_neon_dotprod_dot)

#include "tq-neon-gemm.h"

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

const struct ggml_tq_path ggml_tq_path_neon_i8mm = {
    /* .name      = */ "neon-i8mm",
    /* .supported = */ tq_neon_i8mm_supported,
    /* .quantize  = */ tq_neon_quantize,
    /* .gemv      = */ tq_neon_dotprod_gemv,
    /* .gemm      = */ tq_neon_i8mm_gemm,
};

#else
typedef int tq_neon_is_empty_here; // ISO C wants a declaration
#endif
