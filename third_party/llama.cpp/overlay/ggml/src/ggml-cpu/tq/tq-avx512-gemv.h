// Activations and the matrix-vector kernel of the AVX-512 paths, included by the source file of each. That file
// says first which instructions they may use, and how the path takes weights apart with them:
//
//     TQ_TARGET                         function attribute
//     tq_plane(v, p)                    (byte >> 2*p) & 3 of every byte
//     struct tq1_1_tables, tq1_1_load_tables()
//     tq1_1_digits(v, tables, c[5])     the five base-3 digits of every byte; a byte above 242 counts as the one 81 below
//     tq1_1_codes(v, tables)            26 base-3 bytes at byte 0 and 32: the 2-bit form qs2[32] of each, likewise
//
// See tq.h and KERNELS.md.

#include "ggml-impl.h"

#include <string.h>

//
// activations
//

TQ_TARGET static void tq_avx512_quantize(const float * x, block_q8_t * y, int64_t k) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int64_t b = 0; b < k / QK_TQ; ++b) {
        __m512 v[8];
        __m512i top = _mm512_setzero_si512();
        for (int i = 0; i < 8; ++i) {
            v[i] = _mm512_loadu_ps(x + b * QK_TQ + 16 * i);
            top  = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(v[i]), magnitude));
        }
        const int32_t bits = _mm512_reduce_max_epi32(top);
        float amax;
        memcpy(&amax, &bits, sizeof(amax));
        if (bits >= 0x7f800000 || amax < 1e-30f) { // as quantize_row_q8_t_ref
            const float bad = bits >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
            y[b].d = y[b].s = bad;
            memset(y[b].qs, 0, QK_TQ);
            continue;
        }
        const __m512 id = _mm512_set1_ps(127.0f / amax);
        __m512i sum = _mm512_setzero_si512();
        for (int i = 0; i < 8; ++i) {
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], id));
            sum = _mm512_add_epi32(sum, q);
            _mm_storeu_si128((__m128i *) (y[b].qs + 16 * i), _mm512_cvtepi32_epi8(q));
        }
        y[b].d = amax / 127.0f;
        y[b].s = y[b].d * (float) _mm512_reduce_add_epi32(sum);
    }
}

//
// matrix times vector
//

// Two blocks meet their activations in one register: block b in the low half, b + 1 in the high one. So the
// column is arranged in pairs of blocks first, once for many rows. A pair has TQ_PLANES registers:
//
//     TQ2_1: 4, plane p of the one block and of the other
//     TQ1_1: 5, digit p; in the places of the bytes of two blocks in memory, 30 bytes from each other, so
//            that one load brings both. Where those have alpha and mu there are zeros
#define TQ_PLANES(type) ((type) == GGML_TYPE_TQ2_1 ? 4 : 5)
// The floats come in groups of 16 blocks, with zeros behind the last one
#define TQ_GROUP 16
// Longer rows (of more than 131072) would take too much of a thread's stack: arranged pair by pair
#define TQ_MAX_ARRANGED 1024
// Fewer rows do not pay for it
#define TQ_MIN_ARRANGED_ROWS 4

struct tq_column {
    __m512i * q; // [pairs][TQ_PLANES]
    float *   d; // [groups][TQ_GROUP]
    float *   s;
};

// Pair b, b + 1 of a column (only b if !two) at q
TQ_INLINE void tq_arrange_pair(enum ggml_type type, const block_q8_t * y, bool two, __m512i * q) {
    if (type == GGML_TYPE_TQ2_1) {
        for (int p = 0; p < 4; ++p) {
            const __m256i other = two ? _mm256_loadu_si256((const __m256i *) (y[1].qs + 32 * p)) : _mm256_setzero_si256();
            q[p] = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) (y->qs + 32 * p)));
            q[p] = _mm512_inserti64x4(q[p], other, 1);
        }
        return;
    }
    // loads that bring the bytes to their places; what is masked is not read
    int8_t fifth[2][32];
    for (int h = 0; h < (two ? 2 : 1); ++h) {
        // digit 4 of byte i is plane i % 4 of lane 26 + i / 4: planes interleaved, from lane 24 on
        __m128i t[4];
        for (int p = 0; p < 4; ++p) {
            t[p] = _mm_loadl_epi64((const __m128i *) (y[h].qs + 32 * p + 24));
        }
        const __m128i t01 = _mm_unpacklo_epi8(t[0], t[1]), t23 = _mm_unpacklo_epi8(t[2], t[3]);
        _mm_storeu_si128((__m128i *) fifth[h], _mm_unpacklo_epi16(t01, t23));
        _mm_storeu_si128((__m128i *) (fifth[h] + 16), _mm_unpackhi_epi16(t01, t23));
    }
    const int at[2] = { 4, 4 + sizeof(block_tq1_1) };
    for (int p = 0; p < 5; ++p) {
        const __mmask64 m = p < 4 ? (1ull << TQ1_1_NQS) - 1 : (1ull << 24) - 1;
        q[p] = _mm512_maskz_loadu_epi8(m << at[0], (p < 4 ? y[0].qs + 32 * p : fifth[0] + 8) - at[0]);
        if (two) {
            q[p] = _mm512_mask_loadu_epi8(q[p], m << at[1], (p < 4 ? y[1].qs + 32 * p : fifth[1] + 8) - at[1]);
        }
    }
}

TQ_INLINE void tq_arrange_column(enum ggml_type type, int64_t nb, const block_q8_t * y, const struct tq_column * col) {
    for (int64_t b = 0; b < (nb + TQ_GROUP - 1) / TQ_GROUP * TQ_GROUP; ++b) {
        col->d[b] = b < nb ? y[b].d : 0.0f;
        col->s[b] = b < nb ? y[b].s : 0.0f;
    }
    for (int64_t b = 0; b < nb; b += 2) {
        tq_arrange_pair(type, y + b, b + 1 < nb, col->q + b / 2 * TQ_PLANES(type));
    }
}

// Weights of a pair, as they lie in memory. `inside`: there is a block behind them in this row, so that a
// load may reach into it
TQ_INLINE __m512i tq_load_pair(enum ggml_type type, bool two, bool inside, const char * x) {
    if (type == GGML_TYPE_TQ2_1) {
        const __m512i v = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) (x + 4)));
        const __m256i other = two ? _mm256_loadu_si256((const __m256i *) (x + 4 + sizeof(block_tq2_1))) : _mm256_setzero_si256();
        return _mm512_inserti64x4(v, other, 1);
    }
    return inside ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi8(two ? 0xfffffffffffffffull : 0x3fffffffull, x);
}

// 16 integer sums of c*q: those of the first block in the low 8
TQ_INLINE __m512i tq_dot_pair(enum ggml_type type, __m512i v, const __m512i * q, const struct tq1_1_tables * tables) {
    __m512i c[5];
    if (type == GGML_TYPE_TQ2_1) {
        for (int p = 0; p < 4; ++p) {
            c[p] = tq_plane(v, p);
        }
    } else {
        tq1_1_digits(v, tables, c);
    }
    __m512i dot = _mm512_setzero_si512();
    for (int p = 0; p < TQ_PLANES(type); ++p) {
        dot = _mm512_dpbusd_epi32(dot, c[p], _mm512_loadu_si512(q + p));
    }
    return dot;
}

// ggml_tq_offset
TQ_INLINE __m512 tq_offset(__m512 alpha, __m512 mu) {
    return _mm512_fmadd_ps(_mm512_setzero_ps(), _mm512_mul_ps(alpha, mu), _mm512_sub_ps(mu, alpha));
}

// Blocks x[0..n) of a row with their part of the column, added to *sum: alpha*d * sum of c*q in the lanes of each
// pair, (mu - alpha)*s in the lane of each block. `last`: the row ends there
TQ_INLINE void tq_gemv_group(enum ggml_type type, int n, bool last, const char * x, const __m512i * q, const float * d, const float * s,
                             const struct tq1_1_tables * tables, __m512 * sum) {
    const int     block_size = type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1);
    const __m512i lanes  = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i offset = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(block_size));
    // words: alphas to the low half, mus to the high one
    const __m512i twice  = _mm512_add_epi32(lanes, lanes);
    const __m512i split  = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(twice)),
        _mm512_cvtepi32_epi16(_mm512_add_epi32(twice, _mm512_set1_epi32(1))), 1);
    __m512i am = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), (__mmask16) ((1u << n) - 1), offset, x, 1);
    am = _mm512_permutexvar_epi16(split, am);
    const __m512 alpha = _mm512_cvtph_ps(_mm512_castsi512_si256(am));
    const __m512 mu    = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(am, 1));
    const __m512 scale = _mm512_mul_ps(alpha, _mm512_loadu_ps(d));
    __m512 t = _mm512_fmadd_ps(tq_offset(alpha, mu), _mm512_loadu_ps(s), *sum);

    const __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
#pragma GCC unroll 8
    for (int i = 0; i < n; i += 2) {
        const __m512i v   = tq_load_pair(type, i + 1 < n, !last || i + 2 < n, x + i * block_size);
        const __m512i dot = tq_dot_pair(type, v, q + i / 2 * TQ_PLANES(type), tables);
        const __m512  f   = _mm512_permutexvar_ps(_mm512_add_epi32(half, _mm512_set1_epi32(i)), scale);
        t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), f, t);
    }
    *sum = t;
}

// Four sums of 16 lanes each, to 4 floats
TQ_INLINE __m128 tq_sum4(const __m512 * v) {
    // halves of two rows meet, then quarters, then neighbours
    const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
    const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
    const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); // row i in quarter i
    const __m512 e = _mm512_add_ps(c, _mm512_permute_ps(c, 0x4e));
    const __m512 f = _mm512_add_ps(e, _mm512_permute_ps(e, 0xb1));
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), f));
}

// NR rows, step bytes apart, to sums[NR]. The rows are far from each other, and each group of blocks of one fetches
// what comes later in the same row and the next: KERNELS.md
TQ_INLINE void tq_gemv_rows(enum ggml_type type, int NR, int64_t nb, const char * x, size_t step, const struct tq_column * col,
                            const struct tq1_1_tables * tables, __m512 * sums) {
    const int block_size = type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1);
    for (int r = 0; r < NR; ++r) {
        sums[r] = _mm512_setzero_ps();
    }
    for (int64_t b = 0; b < nb; b += TQ_GROUP) {
        const __m512i * q = col->q + b / 2 * TQ_PLANES(type);
        for (int r = 0; r < NR; ++r) {
            const char * xb = x + r * step + b * block_size;
            for (int at = 0; at < TQ_GROUP * block_size; at += 64) {
                _mm_prefetch(xb + TQ_FETCH_FAR + at, _MM_HINT_T1);
                _mm_prefetch(xb + TQ_FETCH_NEAR + at, _MM_HINT_T0);
            }
            if (b + TQ_GROUP < nb) {
                tq_gemv_group(type, TQ_GROUP, false, xb, q, col->d + b, col->s + b, tables, sums + r);
            } else if (b + TQ_GROUP == nb) {
                tq_gemv_group(type, TQ_GROUP, true, xb, q, col->d + b, col->s + b, tables, sums + r);
            } else {
                tq_gemv_group(type, (int) (nb - b), true, xb, q, col->d + b, col->s + b, tables, sums + r);
            }
        }
    }
}

// All rows: four at once, one from each quarter, so that memory is read in four streams
TQ_INLINE void tq_gemv_arranged(enum ggml_type type, int64_t nb, int64_t nrows, const char * x, size_t bx, const struct tq_column * col, float * dst) {
    const struct tq1_1_tables tables = tq1_1_load_tables();
    const int64_t quarter = nrows / 4;
    __m512 sums[4];
    for (int64_t r = 0; r < quarter; ++r) {
        tq_gemv_rows(type, 4, nb, x + r * bx, quarter * bx, col, &tables, sums);
        float four[4];
        _mm_storeu_ps(four, tq_sum4(sums));
        for (int i = 0; i < 4; ++i) {
            dst[r + i * quarter] = four[i];
        }
    }
    for (int64_t r = 4 * quarter; r < nrows; ++r) {
        tq_gemv_rows(type, 1, nb, x + r * bx, 0, col, &tables, sums);
        dst[r] = _mm512_reduce_add_ps(sums[0]);
    }
}

// One row, the column as it is
TQ_INLINE float tq_avx512_dot_row(enum ggml_type type, int64_t nb, const char * x, const block_q8_t * y, const struct tq1_1_tables * tables) {
    const size_t block_size = type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1);
    __m512 sum = _mm512_setzero_ps();
    float offset = 0.0f;
    for (int64_t b = 0; b < nb; b += 2) {
        const bool two = b + 1 < nb;
        const char * xb = x + b * block_size;
        __m512i q[5];
        tq_arrange_pair(type, y + b, two, q);
        const __m512i dot = tq_dot_pair(type, tq_load_pair(type, two, false, xb), q, tables);
        float scale[2] = { 0.0f, 0.0f };
        for (int h = 0; h < (two ? 2 : 1); ++h) {
            uint16_t am[2];
            memcpy(am, xb + h * block_size, sizeof(am));
            const float alpha = _cvtsh_ss(am[0]);
            scale[h] = alpha * y[b + h].d;
            offset += ggml_tq_offset(alpha, _cvtsh_ss(am[1])) * y[b + h].s;
        }
        const __m512 f = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scale[0]), _mm512_set1_ps(scale[1]));
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), f, sum);
    }
    return _mm512_reduce_add_ps(sum) + offset;
}

TQ_INLINE void tq_avx512_gemv_type(enum ggml_type type, int64_t nb, int64_t nrows, const char * x, size_t bx, const block_q8_t * y, float * dst) {
    if (nrows < TQ_MIN_ARRANGED_ROWS || nb > TQ_MAX_ARRANGED) {
        const struct tq1_1_tables tables = tq1_1_load_tables();
        for (int64_t r = 0; r < nrows; ++r) {
            dst[r] = tq_avx512_dot_row(type, nb, x + r * bx, y, &tables);
        }
        return;
    }
    const int64_t padded = (nb + TQ_GROUP - 1) / TQ_GROUP * TQ_GROUP;
    __m512i q[(nb + 1) / 2 * TQ_PLANES(type)];
    float   floats[2 * padded];
    const struct tq_column col = { q, floats, floats + padded };
    tq_arrange_column(type, nb, y, &col);
    tq_gemv_arranged(type, nb, nrows, x, bx, &col, dst);
}

TQ_TARGET static void tq_avx512_gemv_tq2_1(int64_t nb, int64_t nrows, const char * x, size_t bx, const block_q8_t * y, float * dst) {
    tq_avx512_gemv_type(GGML_TYPE_TQ2_1, nb, nrows, x, bx, y, dst);
}
TQ_TARGET static void tq_avx512_gemv_tq1_1(int64_t nb, int64_t nrows, const char * x, size_t bx, const block_q8_t * y, float * dst) {
    tq_avx512_gemv_type(GGML_TYPE_TQ1_1, nb, nrows, x, bx, y, dst);
}

static void tq_avx512_gemv(enum ggml_type type, int64_t k, int64_t nrows, const void * x, size_t bx, const block_q8_t * y, float * dst) {
    (type == GGML_TYPE_TQ2_1 ? tq_avx512_gemv_tq2_1 : tq_avx512_gemv_tq1_1)(k / QK_TQ, nrows, x, bx, y, dst);
}
