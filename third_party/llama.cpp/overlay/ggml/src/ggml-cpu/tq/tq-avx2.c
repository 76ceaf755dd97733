// AVX2 path (Haswell, Zen and later). See tq.h and KERNELS.md.

#include "tq.h"

#if TQ_HAS_X86

#include "ggml-impl.h"

#include <immintrin.h>
#include <string.h>

#define TQ_TARGET __attribute__((target("avx2,fma,f16c")))
#define TQ_INLINE static inline __attribute__((always_inline)) TQ_TARGET

static bool tq_avx2_supported(void) {
    // every processor with AVX2 has F16C, which GCC 12 cannot ask for
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// Products of unsigned codes and signed activations, added up in 16 bits. They hold the 64 products of a
// block that fall to a lane: each is at most 2*127, and 3*127 for an invalid code
TQ_INLINE __m256i tq_dot_add(__m256i sum, __m256i codes, __m256i q) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, q));
}

// the sums of tq_dot_add as 8 in 32 bits
TQ_INLINE __m256i tq_dot_end(__m256i sum) {
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}

TQ_INLINE float tq_sum_ps(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

//
// activations
//

TQ_TARGET static void tq_avx2_quantize(const float * x, block_q8_t * y, int64_t k) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int64_t b = 0; b < k / QK_TQ; ++b) {
        const float * xb = x + b * QK_TQ;
        __m256i top = _mm256_setzero_si256();
        for (int i = 0; i < 16; ++i) {
            top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_loadu_si256((const __m256i *) (xb + 8 * i)), magnitude));
        }
        __m128i t = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
        t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
        t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1));
        const int32_t bits = _mm_cvtsi128_si32(t);
        float amax;
        memcpy(&amax, &bits, sizeof(amax));
        if (bits >= 0x7f800000 || amax < 1e-30f) { // as quantize_row_q8_t_ref
            y[b].d = y[b].s = bits >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
            memset(y[b].qs, 0, QK_TQ);
            continue;
        }
        const __m256 id = _mm256_set1_ps(127.0f / amax);
        __m256i sum = _mm256_setzero_si256();
        for (int i = 0; i < 4; ++i) {
            __m256i q[4];
            for (int j = 0; j < 4; ++j) {
                q[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(xb + 32 * i + 8 * j), id));
                sum  = _mm256_add_epi32(sum, q[j]);
            }
            const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
            // the packs work within 128 bits: put the groups of four back in order
            _mm256_storeu_si256((__m256i *) (y[b].qs + 32 * i), _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
        }
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
        y[b].d = amax / 127.0f;
        y[b].s = y[b].d * (float) _mm_cvtsi128_si32(s);
    }
}

//
// weights
//

// v mod n of every byte for v < 3n
TQ_INLINE __m256i tq_mod(__m256i v, int n) {
    // unsigned minimum: subtracting too much wraps to a larger number
    const __m256i once  = _mm256_sub_epi8(v, _mm256_set1_epi8((char) n));
    const __m256i twice = _mm256_sub_epi8(v, _mm256_set1_epi8((char) (2 * n)));
    return _mm256_min_epu8(v, _mm256_min_epu8(once, twice));
}

#define TQ_HALVES(...) _mm256_broadcastsi128_si256(_mm_setr_epi8(__VA_ARGS__))

// The five base-3 digits of every byte. v / 27 has the upper two: v*19 >> 9, for even and odd bytes apart. Tables have the
// digits of 0..8, and of 9 what the bytes above 242 count as; 9 and 18 differ in their low four bits
TQ_INLINE void tq1_1_digits(__m256i v, __m256i * c) {
    const __m256i unit   = TQ_HALVES(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0);
    const __m256i three  = TQ_HALVES(0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0);
    const __m256i nines  = TQ_HALVES(0, 0, 2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0);
    const __m256i times  = TQ_HALVES(0, 27, 54, 81, 108, (char) 135, (char) 162, (char) 189, (char) 216, (char) 243, 0, 0, 0, 0, 0, 0);
    const __m256i even   = _mm256_srli_epi16(_mm256_maddubs_epi16(v, _mm256_set1_epi16(19)), 9);
    const __m256i odd    = _mm256_srli_epi16(_mm256_maddubs_epi16(v, _mm256_set1_epi16(19 << 8)), 1);
    const __m256i upper  = _mm256_or_si256(even, _mm256_and_si256(odd, _mm256_set1_epi16((short) 0xff00)));
    const __m256i p27    = _mm256_sub_epi8(v, _mm256_shuffle_epi8(times, upper)); // v mod 27
    const __m256i p9     = tq_mod(p27, 9);
    c[0] = _mm256_shuffle_epi8(unit, p9);
    c[1] = _mm256_shuffle_epi8(three, p9);
    c[2] = _mm256_shuffle_epi8(nines, _mm256_sub_epi8(p27, p9));
    c[3] = _mm256_shuffle_epi8(unit, upper);
    c[4] = _mm256_shuffle_epi8(three, upper);
}

// (v >> 2*plane) & 3 of every byte
TQ_INLINE __m256i tq_plane(__m256i v, int plane) {
    return _mm256_and_si256(_mm256_srli_epi16(v, 2 * plane), _mm256_set1_epi8(3));
}

// alpha and mu of the 8 (alpha, mu) pairs in am
TQ_INLINE void tq_scales(__m256i am, __m256 * alpha, __m256 * mu) {
    const __m256i a = _mm256_and_si256(am, _mm256_set1_epi32(0xffff));
    const __m256i m = _mm256_srli_epi32(am, 16);
    *alpha = _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
    *mu    = _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1)));
}

// ggml_tq_offset
TQ_INLINE __m256 tq_offset(__m256 alpha, __m256 mu) {
    return _mm256_fmadd_ps(_mm256_setzero_ps(), _mm256_mul_ps(alpha, mu), _mm256_sub_ps(mu, alpha));
}

//
// matrix times vector
//

// The column is arranged first, once for many rows. A block has TQ_PLANES registers:
//
//     TQ2_1: 4, plane p
//     TQ1_1: 5, digit p, in the places of the bytes of a block in memory, so that one load brings those. Where it
//            has alpha and mu there are zeros
#define TQ_PLANES(type) ((type) == GGML_TYPE_TQ2_1 ? 4 : 5)
// The floats come in groups of 8 blocks, with zeros behind the last one
#define TQ_GROUP 8
// Longer rows (of more than 131072) would take too much of a thread's stack: arranged block by block
#define TQ_MAX_ARRANGED 1024
// Fewer rows do not pay for it
#define TQ_MIN_ARRANGED_ROWS 4

struct tq_column {
    __m256i * q; // [blocks][TQ_PLANES]
    float *   d; // [groups][TQ_GROUP]
    float *   s;
};

TQ_INLINE void tq_arrange_block(enum ggml_type type, const block_q8_t * y, __m256i * q) {
    if (type == GGML_TYPE_TQ2_1) {
        memcpy(q, y->qs, QK_TQ);
        return;
    }
    int8_t bytes[5][32] __attribute__((aligned(32)));
    memset(bytes, 0, sizeof(bytes));
    __m128i t[4];
    for (int p = 0; p < 4; ++p) {
        memcpy(bytes[p] + 4, y->qs + 32 * p, TQ1_1_NQS);
        t[p] = _mm_loadl_epi64((const __m128i *) (y->qs + 32 * p + 24));
    }
    // digit 4 of byte i is plane i % 4 of lane 26 + i / 4: planes interleaved, from lane 24 on
    int8_t fifth[32];
    const __m128i t01 = _mm_unpacklo_epi8(t[0], t[1]), t23 = _mm_unpacklo_epi8(t[2], t[3]);
    _mm_storeu_si128((__m128i *) fifth, _mm_unpacklo_epi16(t01, t23));
    _mm_storeu_si128((__m128i *) (fifth + 16), _mm_unpackhi_epi16(t01, t23));
    memcpy(bytes[4] + 4, fifth + 8, 24);
    memcpy(q, bytes, sizeof(bytes));
}

// A block as it lies in memory; `inside`: there is one behind it in this row, so that a load may reach into it
TQ_INLINE __m256i tq_load_block(enum ggml_type type, bool inside, const char * x) {
    if (type == GGML_TYPE_TQ2_1) {
        return _mm256_loadu_si256((const __m256i *) (x + 4));
    }
    if (inside) {
        return _mm256_loadu_si256((const __m256i *) x);
    }
    return _mm256_set_m128i(_mm_srli_si128(_mm_loadu_si128((const __m128i *) (x + 14)), 2), _mm_loadu_si128((const __m128i *) x));
}

// 8 integer sums of c*q over a block, as floats
TQ_INLINE __m256 tq_avx2_dot(enum ggml_type type, __m256i v, const __m256i * q) {
    __m256i c[5];
    if (type == GGML_TYPE_TQ2_1) {
        for (int p = 0; p < 4; ++p) {
            c[p] = tq_plane(v, p);
        }
    } else {
        tq1_1_digits(v, c);
    }
    __m256i sum = _mm256_maddubs_epi16(c[0], _mm256_loadu_si256(q));
    for (int p = 1; p < TQ_PLANES(type); ++p) {
        sum = tq_dot_add(sum, c[p], _mm256_loadu_si256(q + p));
    }
    return _mm256_cvtepi32_ps(tq_dot_end(sum));
}

// Blocks x[0..n) of a row with their part of the column, added to *sum. `last`: the row ends there
TQ_INLINE void tq_gemv_group(enum ggml_type type, int n, bool last, const char * x, const __m256i * q, const float * d, const float * s, __m256 * sum) {
    const size_t block_size = type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1);
    uint32_t am[TQ_GROUP] = { 0 };
    for (int i = 0; i < n; ++i) {
        memcpy(&am[i], x + i * block_size, 4);
    }
    float scale[TQ_GROUP];
    __m256 alpha, mu;
    tq_scales(_mm256_loadu_si256((const __m256i *) am), &alpha, &mu);
    _mm256_storeu_ps(scale, _mm256_mul_ps(alpha, _mm256_loadu_ps(d)));
    __m256 t = _mm256_fmadd_ps(tq_offset(alpha, mu), _mm256_loadu_ps(s), *sum);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
        const __m256i v = tq_load_block(type, !last || i + 1 < n, x + i * block_size);
        t = _mm256_fmadd_ps(tq_avx2_dot(type, v, q + i * TQ_PLANES(type)), _mm256_set1_ps(scale[i]), t);
    }
    *sum = t;
}

// NR rows, step bytes apart, to dst[NR]. The rows are far from each other, and each group of blocks of one fetches
// what comes later in the same row and the next: KERNELS.md
TQ_INLINE void tq_gemv_rows(enum ggml_type type, int NR, int64_t nb, const char * x, size_t step, const struct tq_column * col, float * dst, int64_t dst_step) {
    const int block_size = type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1);
    __m256 sums[4];
    for (int r = 0; r < NR; ++r) {
        sums[r] = _mm256_setzero_ps();
    }
    for (int64_t b = 0; b < nb; b += TQ_GROUP) {
        const __m256i * q = col->q + b * TQ_PLANES(type);
        for (int r = 0; r < NR; ++r) {
            const char * xb = x + r * step + b * block_size;
            for (int at = 0; at < TQ_GROUP * block_size; at += 64) {
                _mm_prefetch(xb + TQ_FETCH_FAR + at, _MM_HINT_T1);
                _mm_prefetch(xb + TQ_FETCH_NEAR + at, _MM_HINT_T0);
            }
            if (b + TQ_GROUP < nb) {
                tq_gemv_group(type, TQ_GROUP, false, xb, q, col->d + b, col->s + b, sums + r);
            } else {
                tq_gemv_group(type, (int) (nb - b), true, xb, q, col->d + b, col->s + b, sums + r);
            }
        }
    }
    for (int r = 0; r < NR; ++r) {
        dst[r * dst_step] = tq_sum_ps(sums[r]);
    }
}

// One row, the column as it is
TQ_INLINE float tq_avx2_dot_row(enum ggml_type type, int64_t nb, const char * x, const block_q8_t * y) {
    const size_t block_size = type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1);
    __m256 sum = _mm256_setzero_ps();
    float offset = 0.0f;
    for (int64_t b = 0; b < nb; ++b) {
        const char * xb = x + b * block_size;
        uint16_t am[2];
        memcpy(am, xb, sizeof(am));
        const float alpha = _cvtsh_ss(am[0]);
        __m256i q[5];
        tq_arrange_block(type, y + b, q);
        sum = _mm256_fmadd_ps(tq_avx2_dot(type, tq_load_block(type, false, xb), q), _mm256_set1_ps(alpha * y[b].d), sum);
        offset += ggml_tq_offset(alpha, _cvtsh_ss(am[1])) * y[b].s;
    }
    return tq_sum_ps(sum) + offset;
}

TQ_INLINE void tq_avx2_gemv_type(enum ggml_type type, int64_t nb, int64_t nrows, const char * x, size_t bx, const block_q8_t * y, float * dst) {
    if (nrows < TQ_MIN_ARRANGED_ROWS || nb > TQ_MAX_ARRANGED) {
        for (int64_t r = 0; r < nrows; ++r) {
            dst[r] = tq_avx2_dot_row(type, nb, x + r * bx, y);
        }
        return;
    }
    const int64_t padded = (nb + TQ_GROUP - 1) / TQ_GROUP * TQ_GROUP;
    __m256i q[nb * TQ_PLANES(type)];
    float   d[padded], s[padded];
    for (int64_t b = 0; b < padded; ++b) {
        d[b] = b < nb ? y[b].d : 0.0f;
        s[b] = b < nb ? y[b].s : 0.0f;
    }
    for (int64_t b = 0; b < nb; ++b) {
        tq_arrange_block(type, y + b, q + b * TQ_PLANES(type));
    }
    const struct tq_column col = { q, d, s };

    // four rows at once, one from each quarter, so that memory is read in four streams
    const int64_t quarter = nrows / 4;
    for (int64_t r = 0; r < quarter; ++r) {
        tq_gemv_rows(type, 4, nb, x + r * bx, quarter * bx, &col, dst + r, quarter);
    }
    for (int64_t r = 4 * quarter; r < nrows; ++r) {
        tq_gemv_rows(type, 1, nb, x + r * bx, 0, &col, dst + r, 0);
    }
}

TQ_TARGET static void tq_avx2_gemv_tq2_1(int64_t nb, int64_t nrows, const char * x, size_t bx, const block_q8_t * y, float * dst) {
    tq_avx2_gemv_type(GGML_TYPE_TQ2_1, nb, nrows, x, bx, y, dst);
}
TQ_TARGET static void tq_avx2_gemv_tq1_1(int64_t nb, int64_t nrows, const char * x, size_t bx, const block_q8_t * y, float * dst) {
    tq_avx2_gemv_type(GGML_TYPE_TQ1_1, nb, nrows, x, bx, y, dst);
}

static void tq_avx2_gemv(enum ggml_type type, int64_t k, int64_t nrows, const void * x, size_t bx, const block_q8_t * y, float * dst) {
    (type == GGML_TYPE_TQ2_1 ? tq_avx2_gemv_tq2_1 : tq_avx2_gemv_tq1_1)(k / QK_TQ, nrows, x, bx, y, dst);
}

#include "tq-avx2-gemm.h"

const struct ggml_tq_path ggml_tq_path_avx2 = {
    /* .name      = */ "avx2",
    /* .supported = */ tq_avx2_supported,
    /* .quantize  = */ tq_avx2_quantize,
    /* .gemv      = */ tq_avx2_gemv,
    /* .gemm      = */ tq_avx2_gemm,
};

#else
typedef int tq_avx2_is_empty_here; // ISO C wants a declaration
#endif
