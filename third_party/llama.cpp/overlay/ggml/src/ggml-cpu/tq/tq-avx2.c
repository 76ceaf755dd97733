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

// v mod n of every byte for v < 3n: subtracting too much wraps to a larger number
TQ_INLINE __m256i tq_mod(__m256i v, int n) {
    const __m256i nn = _mm256_set1_epi8((char) n);
    v = _mm256_min_epu8(v, _mm256_sub_epi8(v, nn));
    return _mm256_min_epu8(v, _mm256_sub_epi8(v, nn));
}

// The 26 base-3 bytes at qs as the 2-bit form of TQ2_1. p = v mod 81 are planes 0..3; v - p = 81*t has t,
// the fifth digit, in its low two bits. p splits into p mod 9 and a multiple of 9, which differs from the
// other multiples in its low four bits, so that two table look-ups give the codes
TQ_INLINE __m256i tq1_1_unpack(const uint8_t * qs) {
    // two loads that stay within the block: bytes 0..15, and 10..25 moved down to 16..25
    const __m128i drop6 = _mm_setr_epi8(6, 7, 8, 9, 10, 11, 12, 13, 14, 15, -1, -1, -1, -1, -1, -1);
    const __m128i lo = _mm_loadu_si128((const __m128i *) qs);
    const __m128i hi = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *) (qs + 10)), drop6);
    const __m256i v  = _mm256_set_m128i(hi, lo);

    const __m256i p     = tq_mod(v, 81);
    const __m256i p9    = tq_mod(tq_mod(p, 27), 9);
    const __m256i low   = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 0, 0, 0, 0, 0, 0, 0));
    // at 9h mod 16: 16*(h mod 3) + 64*(h / 3)
    const __m256i high  = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 32, 0, 80, 0, (char) 128, 0, (char) 160, 16, 0, 64, 0, 96, 0, (char) 144));
    const __m256i codes = _mm256_or_si256(_mm256_shuffle_epi8(low, p9), _mm256_shuffle_epi8(high, _mm256_sub_epi8(p, p9)));

    // four fifth digits each, with weights 1, 4, 16, 64, are the bytes of lanes 26..31
    const __m256i digit = _mm256_and_si256(_mm256_sub_epi8(v, p), _mm256_set1_epi8(3));
    const __m256i pairs = _mm256_maddubs_epi16(digit, _mm256_set1_epi32(0x40100401));
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    __m128i f = _mm_packus_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    f = _mm_slli_si128(_mm_packus_epi16(f, f), 10);
    return _mm256_or_si256(codes, _mm256_inserti128_si256(_mm256_setzero_si256(), f, 1));
}

TQ_INLINE __m256i tq_codes(enum ggml_type type, const char * block) {
    return type == GGML_TYPE_TQ2_1 ? _mm256_loadu_si256((const __m256i *) ((const block_tq2_1 *) block)->qs)
                                   : tq1_1_unpack(((const block_tq1_1 *) block)->qs);
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

//
// matrix times vector
//

// 8 integer sums of c*q over a block
TQ_INLINE __m256i tq_avx2_dot(__m256i v, const int8_t * q) {
    __m256i sum = _mm256_setzero_si256();
    for (int p = 0; p < 4; ++p) {
        sum = tq_dot_add(sum, tq_plane(v, p), _mm256_loadu_si256((const __m256i *) (q + 32 * p)));
    }
    return tq_dot_end(sum);
}

TQ_INLINE float tq_avx2_gemv_row(enum ggml_type type, int64_t nb, const char * x, size_t bx, const block_q8_t * y) {
    const size_t block_size = type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1);
    __m256 acc = _mm256_setzero_ps(), offsets = _mm256_setzero_ps();

    for (int64_t b0 = 0; b0 < nb; b0 += 8) {
        const int n = (int) (nb - b0 < 8 ? nb - b0 : 8);
        // the scales of 8 blocks at once
        uint32_t am[8] = { 0 };
        float d[8] = { 0 }, s[8] = { 0 }, scale[8];
        for (int i = 0; i < n; ++i) {
            memcpy(&am[i], x + (b0 + i) * block_size, 4);
            d[i] = y[b0 + i].d;
            s[i] = y[b0 + i].s;
        }
        __m256 alpha, mu;
        tq_scales(_mm256_loadu_si256((const __m256i *) am), &alpha, &mu);
        _mm256_storeu_ps(scale, _mm256_mul_ps(alpha, _mm256_loadu_ps(d)));
        offsets = _mm256_fmadd_ps(_mm256_sub_ps(mu, alpha), _mm256_loadu_ps(s), offsets);

        for (int i = 0; i < n; ++i) {
            _mm_prefetch(x + TQ_PREFETCH_ROWS * bx + (b0 + i) * block_size, _MM_HINT_T0);
            const __m256i dot = tq_avx2_dot(tq_codes(type, x + (b0 + i) * block_size), y[b0 + i].qs);
            acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(scale[i]), acc);
        }
    }
    return tq_sum_ps(_mm256_add_ps(acc, offsets));
}

TQ_TARGET static void tq_avx2_gemv(enum ggml_type type, int64_t k, int64_t nrows, const void * x, size_t bx, const block_q8_t * y, float * dst) {
    for (int64_t r = 0; r < nrows; ++r) {
        const char * row = (const char *) x + r * bx;
        dst[r] = type == GGML_TYPE_TQ2_1 ? tq_avx2_gemv_row(GGML_TYPE_TQ2_1, k / QK_TQ, row, bx, y)
                                         : tq_avx2_gemv_row(GGML_TYPE_TQ1_1, k / QK_TQ, row, bx, y);
    }
}

//
// matrix times matrix
//

#define TQ_TILE 16 // rows: two registers of 8

// Block b of 8 rows: codes as u8 at w[32][8][4] (k-group, row, element), alpha and mu - alpha as floats.
// Rows from nr on are zero
TQ_INLINE void tq_avx2_unpack8(enum ggml_type type, int nr, const char * x, size_t bx, int64_t b, uint8_t * w, float * alpha, float * offset) {
    const size_t block_size = type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1);
    int32_t qs2[8][8] __attribute__((aligned(32)));
    uint32_t am[8] = { 0 };
    memset(qs2, 0, sizeof(qs2));
    for (int r = 0; r < nr; ++r) {
        const char * xb = x + r * bx + b * block_size;
        memcpy(&am[r], xb, 4);
        _mm256_store_si256((__m256i *) qs2[r], tq_codes(type, xb));
    }
    for (int j = 0; j < 8; ++j) {
        const __m256i v = _mm256_setr_epi32(qs2[0][j], qs2[1][j], qs2[2][j], qs2[3][j], qs2[4][j], qs2[5][j], qs2[6][j], qs2[7][j]);
        for (int p = 0; p < 4; ++p) {
            _mm256_store_si256((__m256i *) (w + 32 * (8 * p + j)), tq_plane(v, p));
        }
    }
    __m256 a, m;
    tq_scales(_mm256_loadu_si256((const __m256i *) am), &a, &m);
    _mm256_store_ps(alpha, a);
    _mm256_store_ps(offset, _mm256_sub_ps(m, a));
}

// sums[c][16 rows] += one block of the N columns from c0 of a panel of width W
TQ_INLINE void tq_avx2_block(int W, int c0, int N, const uint8_t * w, const float * alpha, const float * offset, const char * panel, float * sums) {
    __m256i acc[4][2];
    for (int c = 0; c < N; ++c) {
        acc[c][0] = acc[c][1] = _mm256_setzero_si256();
    }
    for (int j = 0; j < QK_TQ / 4; ++j) {
        const __m256i w0 = _mm256_load_si256((const __m256i *) (w + 32 * j));
        const __m256i w1 = _mm256_load_si256((const __m256i *) (w + 32 * (j + QK_TQ / 4)));
        for (int c = 0; c < N; ++c) {
            int32_t q;
            memcpy(&q, panel + 4 * (j * W + c0 + c), 4);
            const __m256i a = _mm256_set1_epi32(q);
            acc[c][0] = tq_dot_add(acc[c][0], w0, a);
            acc[c][1] = tq_dot_add(acc[c][1], w1, a);
        }
    }
    const float * d = (const float *) (panel + W * QK_TQ) + c0;
    for (int h = 0; h < 2; ++h) {
        const __m256 al = _mm256_load_ps(alpha + 8 * h);
        const __m256 of = _mm256_load_ps(offset + 8 * h);
        for (int c = 0; c < N; ++c) {
            float * sum = sums + (c0 + c) * TQ_TILE + 8 * h;
            const __m256i dot = tq_dot_end(acc[c][h]);
            __m256 t = _mm256_fmadd_ps(of, _mm256_set1_ps(d[W + c]), _mm256_load_ps(sum));
            t = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(al, _mm256_set1_ps(d[c])), t);
            _mm256_store_ps(sum, t);
        }
    }
}

#define TQ_BLOCK(W) \
    TQ_TARGET static void tq_avx2_block_##W(const uint8_t * w, const float * alpha, const float * offset, const char * panel, float * sums) { \
        tq_avx2_block(W, 0, W < 4 ? W : 4, w, alpha, offset, panel, sums); \
        if (W > 4) { \
            tq_avx2_block(W, 4, W - 4, w, alpha, offset, panel, sums); \
        } \
    }
TQ_BLOCK(1) TQ_BLOCK(2) TQ_BLOCK(3) TQ_BLOCK(4) TQ_BLOCK(5) TQ_BLOCK(6) TQ_BLOCK(7) TQ_BLOCK(8)

typedef void (*tq_block_fn)(const uint8_t *, const float *, const float *, const char *, float *);
static const tq_block_fn tq_avx2_blocks[TQ_PANEL + 1] = {
    NULL, tq_avx2_block_1, tq_avx2_block_2, tq_avx2_block_3, tq_avx2_block_4,
    tq_avx2_block_5, tq_avx2_block_6, tq_avx2_block_7, tq_avx2_block_8,
};

TQ_TARGET static void tq_avx2_gemm(enum ggml_type type, int64_t k, int64_t nrows, const void * x, size_t bx, const struct ggml_tq_cols * cols, float * const * dst) {
    const int64_t nb = k / QK_TQ;

    float   sums[TQ_MAX_COLS * TQ_TILE] __attribute__((aligned(32)));
    uint8_t w[TQ_TILE * QK_TQ] __attribute__((aligned(32)));
    float   alpha[TQ_TILE] __attribute__((aligned(32)));
    float   offset[TQ_TILE] __attribute__((aligned(32)));
    char    packed[TQ_PANEL * sizeof(block_q8_t)] __attribute__((aligned(32)));

    for (int64_t r0 = 0; r0 < nrows; r0 += TQ_TILE) {
        const int nr = (int) (nrows - r0 < TQ_TILE ? nrows - r0 : TQ_TILE);
        memset(sums, 0, cols->n * TQ_TILE * sizeof(float));

        for (int64_t b = 0; b < nb; ++b) {
            for (int h = 0; h < 2; ++h) {
                const int n8 = nr - 8 * h < 0 ? 0 : nr - 8 * h < 8 ? nr - 8 * h : 8;
                const char * xr = (const char *) x + (r0 + 8 * h) * bx;
                if (type == GGML_TYPE_TQ2_1) {
                    tq_avx2_unpack8(GGML_TYPE_TQ2_1, n8, xr, bx, b, w + 8 * QK_TQ * h, alpha + 8 * h, offset + 8 * h);
                } else {
                    tq_avx2_unpack8(GGML_TYPE_TQ1_1, n8, xr, bx, b, w + 8 * QK_TQ * h, alpha + 8 * h, offset + 8 * h);
                }
            }
            for (int c = 0; c < cols->n; c += TQ_PANEL) {
                const int width = cols->n - c < TQ_PANEL ? cols->n - c : TQ_PANEL;
                const char * panel = packed;
                if (cols->panels) {
                    panel = cols->panels + (c * nb + b * width) * sizeof(block_q8_t);
                } else {
                    ggml_tq_pack_panel(cols->col + c, b, width, packed);
                }
                tq_avx2_blocks[width](w, alpha, offset, panel, sums + c * TQ_TILE);
            }
        }
        for (int c = 0; c < cols->n; ++c) {
            memcpy(dst[c] + r0, sums + c * TQ_TILE, nr * sizeof(float));
        }
    }
}

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
