// AVX-512 path with VNNI alone (Cascade Lake, Cooper Lake). See tq.h and KERNELS.md.

#include "tq.h"

#if TQ_HAS_X86

#include <immintrin.h>

#define TQ_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define TQ_INLINE static inline __attribute__((always_inline)) TQ_TARGET

static bool tq_avx512_vnni_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("fma");
}

TQ_INLINE __m512i tq_plane(__m512i v, int plane) {
    return _mm512_and_si512(_mm512_srli_epi16(v, 2 * plane), _mm512_set1_epi8(3));
}

// Tables of 16 bytes, the same in every quarter: what a register can be looked up in without VBMI. Multiples of 9 below
// 81 differ in their low four bits
struct tq1_1_tables {
    __m512i unit, three; // digits of 0..8, and of 9 what bytes above 242 count as
    __m512i nines;       // the digit of 0, 9, 18
    __m512i times;       // 27 times 0..9
    __m512i low, high;   // 2-bit codes of 0..8; of 0, 9, 18, .. 72: tq1_1_codes
    __m512i fifth;       // where the byte of lane 26 + g comes from
};

TQ_INLINE struct tq1_1_tables tq1_1_load_tables(void) {
#define QUARTERS(...) _mm512_broadcast_i32x4(_mm_setr_epi8(__VA_ARGS__))
    const struct tq1_1_tables t = {
        QUARTERS(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0),
        QUARTERS(0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0),
        QUARTERS(0, 0, 2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0),
        QUARTERS(0, 27, 54, 81, 108, (char) 135, (char) 162, (char) 189, (char) 216, (char) 243, 0, 0, 0, 0, 0, 0),
        QUARTERS(0, 1, 2, 4, 5, 6, 8, 9, 10, 0, 0, 0, 0, 0, 0, 0),
        QUARTERS(0, 0, 32, 0, 80, 0, (char) 128, 0, (char) 160, 16, 0, 64, 0, 96, 0, (char) 144),
        _mm512_inserti32x4(_mm512_inserti32x4(_mm512_set1_epi8(-1),
            _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1, 2, 3, 4, 5), 1),
            _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 8, 9, 10, 11, 12, 13), 3),
    };
#undef QUARTERS
    return t;
}

// v mod n of every byte for v < 3n
TQ_INLINE __m512i tq_mod(__m512i v, int n) {
    // unsigned minimum: subtracting too much wraps to a larger number
    const __m512i once  = _mm512_sub_epi8(v, _mm512_set1_epi8((char) n));
    const __m512i twice = _mm512_sub_epi8(v, _mm512_set1_epi8((char) (2 * n)));
    return _mm512_min_epu8(v, _mm512_min_epu8(once, twice));
}

// v / 27 has the upper two digits: v*19 >> 9, for even and odd bytes apart
TQ_INLINE void tq1_1_digits(__m512i v, const struct tq1_1_tables * t, __m512i * c) {
    const __m512i even  = _mm512_srli_epi16(_mm512_maddubs_epi16(v, _mm512_set1_epi16(19)), 9);
    const __m512i odd   = _mm512_srli_epi16(_mm512_maddubs_epi16(v, _mm512_set1_epi16(19 << 8)), 1);
    const __m512i upper = _mm512_mask_mov_epi8(even, 0xaaaaaaaaaaaaaaaaull, odd);
    const __m512i p27   = _mm512_sub_epi8(v, _mm512_shuffle_epi8(t->times, upper)); // v mod 27
    const __m512i p9    = tq_mod(p27, 9);
    c[0] = _mm512_shuffle_epi8(t->unit, p9);
    c[1] = _mm512_shuffle_epi8(t->three, p9);
    c[2] = _mm512_shuffle_epi8(t->nines, _mm512_sub_epi8(p27, p9));
    c[3] = _mm512_shuffle_epi8(t->unit, upper);
    c[4] = _mm512_shuffle_epi8(t->three, upper);
}

TQ_INLINE __m512i tq1_1_codes(__m512i v, const struct tq1_1_tables * t) {
    const __m512i p81   = tq_mod(v, 81);
    const __m512i p     = _mm512_min_epu8(p81, _mm512_sub_epi8(p81, _mm512_set1_epi8(81))); // of bytes above 242 p81 is 81 and more
    const __m512i p9    = tq_mod(tq_mod(p, 27), 9);
    const __m512i codes = _mm512_or_si512(_mm512_shuffle_epi8(t->low, p9), _mm512_shuffle_epi8(t->high, _mm512_sub_epi8(p, p9)));
    // Four fifth digits make the byte t0 + 4*t1 + 16*t2 + 64*t3 of a lane >= 26: a dot product of the 81*t with
    // what 81 times is 1, 4, 16 and 64 modulo 256 has it in its low byte
    const __m512i four  = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_sub_epi8(v, p81), _mm512_set1_epi32(0x4010c4b1));
    const __m512i bytes = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(four));
    return _mm512_or_si512(codes, _mm512_shuffle_epi8(bytes, t->fifth));
}

#include "tq-avx512-gemv.h"
#include "tq-avx512-gemm.h"

const struct ggml_tq_path ggml_tq_path_avx512_vnni = {
    /* .name      = */ "avx512-vnni",
    /* .supported = */ tq_avx512_vnni_supported,
    /* .quantize  = */ tq_avx512_quantize,
    /* .gemv      = */ tq_avx512_gemv,
    /* .gemm      = */ tq_avx512_gemm,
};

#else
typedef int tq_avx512_vnni_is_empty_here; // ISO C wants a declaration
#endif
