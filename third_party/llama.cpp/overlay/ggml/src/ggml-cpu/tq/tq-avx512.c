// AVX-512 path with VNNI, VBMI and GFNI (Ice Lake, Zen 4 and later). See tq.h and KERNELS.md.

#include "tq.h"

#if TQ_HAS_X86

#include <immintrin.h>

#define TQ_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni,avx2,fma,f16c")))
#define TQ_INLINE static inline __attribute__((always_inline)) TQ_TARGET

static bool tq_avx512_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// A GFNI bit matrix does a shift and a mask at once, on one port only; the mask alone can take two
TQ_INLINE __m512i tq_plane(__m512i v, int plane) {
    if (plane == 0) {
        return _mm512_and_si512(v, _mm512_set1_epi8(3));
    }
    // row i of the matrix (byte 7 - i) makes output bit i from input bit i + 2*plane
    return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64((1ll << (56 + 2 * plane)) | (1ll << (48 + 2 * plane + 1))), 0);
}

// A base-3 byte v splits by subtraction: p = v mod 81 has digits 0..3, and v - p = 81*t the fifth digit t. Of a byte above
// 242, which counts as the one 81 below, p is 81 to 93 and t is 2.
// A table turns p into four 2-bit codes
struct tq1_1_tables {
    __m512i low;   // of p = 0..63
    __m512i high;  // of p = 64..93, at p - 64
    __m512i fifth; // where the byte of lane 26 + g is: tq1_1_codes
};

TQ_INLINE struct tq1_1_tables tq1_1_load_tables(void) {
    static const uint8_t packed[128] __attribute__((aligned(64))) = {
        // codes of p: digit 0 in bits 0-1, ... digit 3 in bits 6-7
#define D1(d3, d2, d1) (64*(d3) + 16*(d2) + 4*(d1)), (64*(d3) + 16*(d2) + 4*(d1) + 1), (64*(d3) + 16*(d2) + 4*(d1) + 2)
#define D2(d3, d2) D1(d3, d2, 0), D1(d3, d2, 1), D1(d3, d2, 2)
#define D3(d3) D2(d3, 0), D2(d3, 1), D2(d3, 2)
        D3(0), D3(1), D3(2),
        // and of 81..93, what is left of the bytes above 242: digits of 0..12
        D2(0, 0), D1(0, 1, 0), D1(0, 1, 1)
#undef D1
#undef D2
#undef D3
    };
    uint8_t fifth[64];
    for (int i = 0; i < 64; ++i) {
        const int lane = i % 32;
        fifth[i] = (uint8_t) ((i & 32) + (lane < 26 ? 0 : 4 * (lane - 26)));
    }
    const struct tq1_1_tables t = { _mm512_load_si512(packed), _mm512_load_si512(packed + 64), _mm512_loadu_si512(fifth) };
    return t;
}

// p of every byte, 0..93
TQ_INLINE __m512i tq1_1_mod81(__m512i v) {
    // unsigned minimum: subtracting too much wraps to a larger number
    const __m512i once  = _mm512_sub_epi8(v, _mm512_set1_epi8(81));
    const __m512i twice = _mm512_sub_epi8(v, _mm512_set1_epi8((char) 162));
    return _mm512_min_epu8(v, _mm512_min_epu8(once, twice));
}

TQ_INLINE void tq1_1_digits(__m512i v, const struct tq1_1_tables * t, __m512i * c) {
    const __m512i p     = tq1_1_mod81(v);
    const __m512i codes = _mm512_permutex2var_epi8(t->low, p, t->high);
    for (int i = 0; i < 4; ++i) {
        c[i] = tq_plane(codes, i);
    }
    c[4] = _mm512_and_si512(_mm512_sub_epi8(v, p), _mm512_set1_epi8(3)); // 81*t & 3 = t
}

// Four fifth digits make the byte t0 + 4*t1 + 16*t2 + 64*t3 of a lane >= 26: a dot product of the 81*t with what
// 81 times is 1, 4, 16 and 64 modulo 256 has it in its low byte
TQ_INLINE __m512i tq1_1_codes(__m512i v, const struct tq1_1_tables * t) {
    const __m512i p     = tq1_1_mod81(v);
    const __m512i four  = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_sub_epi8(v, p), _mm512_set1_epi32(0x4010c4b1));
    const __m512i codes = _mm512_permutex2var_epi8(t->low, p, t->high);
    return _mm512_mask_permutexvar_epi8(codes, 0xfc000000fc000000ull, t->fifth, four);
}

#include "tq-avx512-gemv.h"
#include "tq-avx512-gemm.h"

const struct ggml_tq_path ggml_tq_path_avx512 = {
    /* .name      = */ "avx512",
    /* .supported = */ tq_avx512_supported,
    /* .quantize  = */ tq_avx512_quantize,
    /* .gemv      = */ tq_avx512_gemv,
    /* .gemm      = */ tq_avx512_gemm,
};

#else
typedef int tq_avx512_is_empty_here; // ISO C wants a declaration
#endif
