// AVX-512 path (VNNI, VBMI and GFNI: Ice Lake, Zen 4 and later). See tq.h and KERNELS.md.

#include "tq.h"

#if TQ_HAS_X86

#include "ggml-impl.h"

#include <immintrin.h>
#include <string.h>

#define TQ_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni,avx2,fma,f16c")))
#define TQ_INLINE static inline __attribute__((always_inline)) TQ_TARGET

static bool tq_avx512_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

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
// weights
//

// Two TQ1_1 blocks in the halves of a register, their 26 base-3 bytes at byte 0 and 32, become the 2-bit
// form qs2[32] of each. The number v splits by subtraction: p = v mod 81 are planes 0..3, and v - p = 81*t
// has the fifth digit t. A table turns p into four codes. Four fifth digits make the byte t0 + 4*t1 + 16*t2 + 64*t3 of a lane >= 26: a dot product of the 81*t with what 81 times is 1, 4, 16
// and 64 modulo 256 has it in its low byte.
struct tq1_1_tables {
    __m512i low;   // of p = 0..63
    __m512i high;  // of p = 64..80, at p - 64
    __m512i fifth; // where the byte of lane 26 + g is
};

TQ_INLINE struct tq1_1_tables tq1_1_load_tables(void) {
    static const uint8_t packed[128] __attribute__((aligned(64))) = {
        // codes of p: digit 0 in bits 0-1, ... digit 3 in bits 6-7
#define D1(d3, d2, d1) (64*(d3) + 16*(d2) + 4*(d1)), (64*(d3) + 16*(d2) + 4*(d1) + 1), (64*(d3) + 16*(d2) + 4*(d1) + 2)
#define D2(d3, d2) D1(d3, d2, 0), D1(d3, d2, 1), D1(d3, d2, 2)
#define D3(d3) D2(d3, 0), D2(d3, 1), D2(d3, 2)
        D3(0), D3(1), D3(2)
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

TQ_INLINE __m512i tq1_1_unpack_pair(__m512i v, const struct tq1_1_tables * t) {
    const __m512i n81 = _mm512_set1_epi8(81);
    // unsigned minimum: subtracting too much wraps to a larger number
    const __m512i u = _mm512_min_epu8(v, _mm512_sub_epi8(v, n81));
    const __m512i p = _mm512_min_epu8(u, _mm512_sub_epi8(u, n81));

    const __m512i four  = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_sub_epi8(v, p), _mm512_set1_epi32(0x4010c4b1));
    const __m512i codes = _mm512_permutex2var_epi8(t->low, p, t->high);
    return _mm512_mask_permutexvar_epi8(codes, 0xfc000000fc000000ull, t->fifth, four);
}

// The base-3 bytes of the blocks at a and b (NULL: none) in two halves, reading nothing beside them
TQ_INLINE __m512i tq1_1_load_pair(const void * a, const void * b) {
    const __m512i lo = _mm512_maskz_loadu_epi8(0x3ffffff, (const char *) a + 4);
    // the upper half starts 32 bytes on; what lies before the block is masked, and never read
    return b ? _mm512_mask_loadu_epi8(lo, 0x3ffffffull << 32, (const char *) b + 4 - 32) : lo;
}

TQ_INLINE __m512i tq2_1_load_pair(const block_tq2_1 * a, const block_tq2_1 * b) {
    const __m512i lo = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) a->qs));
    return b ? _mm512_inserti64x4(lo, _mm256_loadu_si256((const __m256i *) b->qs), 1)
             : _mm512_inserti64x4(lo, _mm256_setzero_si256(), 1);
}

// (v >> 2*plane) & 3 of every byte: the two bits that a GFNI bit matrix lets through
TQ_INLINE __m512i tq_plane(__m512i v, int plane) {
    // row i of the matrix (byte 7 - i) makes output bit i from input bit i + 2*plane
    return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64((1ll << (56 + 2 * plane)) | (1ll << (48 + 2 * plane + 1))), 0);
}

//
// matrix times vector
//

// NR rows at once share the activations. Two blocks a step: block b in the low half, b + 1 in the high
// one, with its own alpha*d in the same half
TQ_INLINE void tq_avx512_gemv_rows(enum ggml_type type, int NR, int64_t nb, const char * x, size_t bx, const block_q8_t * y, float * dst) {
    const size_t block_size = type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1);
    const __m512i lanes    = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i x_offset = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int) block_size));
    const __m512i y_offset = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(sizeof(block_q8_t)));

    struct tq1_1_tables tables;
    if (type == GGML_TYPE_TQ1_1) {
        tables = tq1_1_load_tables();
    }

    __m512 acc[4], offsets[4];
    for (int r = 0; r < NR; ++r) {
        acc[r] = offsets[r] = _mm512_setzero_ps();
    }
    for (int64_t b0 = 0; b0 < nb; b0 += 16) {
        const int n = (int) (nb - b0 < 16 ? nb - b0 : 16);
        const __mmask16 m = (__mmask16) ((1u << n) - 1);

        // scales of up to 16 blocks at once: alpha*d for below, (mu - alpha)*s is finished here
        float scale[4][16] __attribute__((aligned(64)));
        const __m512 d = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, y_offset, &y[b0].d, 1);
        const __m512 s = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, y_offset, &y[b0].s, 1);
        for (int r = 0; r < NR; ++r) {
            const __m512i am    = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), m, x_offset, x + r * bx + b0 * block_size, 1);
            const __m512  alpha = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(am));
            const __m512  mu    = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(am, 16)));
            _mm512_store_ps(scale[r], _mm512_mul_ps(alpha, d));
            offsets[r] = _mm512_fmadd_ps(_mm512_sub_ps(mu, alpha), s, offsets[r]);
        }

        for (int i = 0; i < n; i += 2) {
            const bool two = i + 1 < n;
            const block_q8_t * y0 = y + b0 + i;
            // four short rows at once are no stream that the processor would follow by itself
            for (size_t at = 0; at < 2 * NR * block_size; at += 64) {
                _mm_prefetch(x + TQ_PREFETCH_ROWS * bx + (b0 + i) * NR * block_size + at, _MM_HINT_T0);
            }
            __m512i a[4];
            for (int p = 0; p < 4; ++p) {
                a[p] = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) (y0->qs + 32 * p)));
                a[p] = _mm512_inserti64x4(a[p], two ? _mm256_loadu_si256((const __m256i *) (y0[1].qs + 32 * p)) : _mm256_setzero_si256(), 1);
            }
            for (int r = 0; r < NR; ++r) {
                const char * xb = x + r * bx + (b0 + i) * block_size;
                __m512i v;
                if (type == GGML_TYPE_TQ2_1) {
                    v = tq2_1_load_pair((const block_tq2_1 *) xb, two ? (const block_tq2_1 *) xb + 1 : NULL);
                } else {
                    v = tq1_1_unpack_pair(tq1_1_load_pair(xb, two ? xb + block_size : NULL), &tables);
                }
                __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), tq_plane(v, 0), a[0]);
                dot = _mm512_dpbusd_epi32(dot, tq_plane(v, 1), a[1]);
                dot = _mm512_dpbusd_epi32(dot, tq_plane(v, 2), a[2]);
                dot = _mm512_dpbusd_epi32(dot, tq_plane(v, 3), a[3]);
                __m512 f = _mm512_set1_ps(scale[r][i]);
                f = _mm512_mask_broadcastss_ps(f, 0xff00, _mm_load_ss(&scale[r][i + 1 < 16 ? i + 1 : i]));
                acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), f, acc[r]);
            }
        }
    }
    for (int r = 0; r < NR; ++r) {
        dst[r] = _mm512_reduce_add_ps(_mm512_add_ps(acc[r], offsets[r]));
    }
}

#define TQ_GEMV(name, type)                                                                                             \
    TQ_TARGET static void name(int64_t nb, int64_t nrows, const char * x, size_t bx, const block_q8_t * y, float * dst) { \
        int64_t r = 0;                                                                                                  \
        for (; r + 4 <= nrows; r += 4) {                                                                                \
            tq_avx512_gemv_rows(type, 4, nb, x + r * bx, bx, y, dst + r);                                               \
        }                                                                                                               \
        for (; r < nrows; ++r) {                                                                                        \
            tq_avx512_gemv_rows(type, 1, nb, x + r * bx, bx, y, dst + r);                                               \
        }                                                                                                               \
    }
TQ_GEMV(tq_avx512_gemv_tq2_1, GGML_TYPE_TQ2_1)
TQ_GEMV(tq_avx512_gemv_tq1_1, GGML_TYPE_TQ1_1)

static void tq_avx512_gemv(enum ggml_type type, int64_t k, int64_t nrows, const void * x, size_t bx, const block_q8_t * y, float * dst) {
    (type == GGML_TYPE_TQ2_1 ? tq_avx512_gemv_tq2_1 : tq_avx512_gemv_tq1_1)(k / QK_TQ, nrows, x, bx, y, dst);
}

//
// matrix times matrix
//

#define TQ_TILE 32 // rows: two registers of 16

// Block b of 16 rows: codes as u8 at w[32][16][4] (k-group, row, element), alpha and mu - alpha as
// floats. Rows from nr on are zero
TQ_INLINE void tq_avx512_unpack16(enum ggml_type type, int nr, const char * x, size_t bx, int64_t b, const struct tq1_1_tables * tables,
                                  uint8_t * w, float * alpha, float * offset) {
    uint8_t qs2[16][32] __attribute__((aligned(64)));
    uint32_t am[16] __attribute__((aligned(64)));
    memset(am, 0, sizeof(am));
    if (type == GGML_TYPE_TQ2_1) {
        for (int r = 0; r < nr; ++r) {
            const block_tq2_1 * xb = (const block_tq2_1 *) (x + r * bx) + b;
            memcpy(&am[r], xb, 4);
            _mm256_store_si256((__m256i *) qs2[r], _mm256_loadu_si256((const __m256i *) xb->qs));
        }
    } else {
        for (int r = 0; r < nr; r += 2) {
            const char * x0 = x + r * bx + b * sizeof(block_tq1_1);
            const char * x1 = r + 1 < nr ? x0 + bx : NULL;
            memcpy(&am[r], x0, 4);
            if (x1) {
                memcpy(&am[r + 1], x1, 4);
            }
            _mm512_store_si512(qs2[r], tq1_1_unpack_pair(tq1_1_load_pair(x0, x1), tables));
        }
    }
    for (int r = nr; r < 16; ++r) {
        memset(qs2[r], 0, 32);
    }
    const __m512i stride = _mm512_setr_epi32(0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448, 480);
    for (int j = 0; j < 8; ++j) {
        const __m512i v = _mm512_i32gather_epi32(stride, &qs2[0][4 * j], 1);
        for (int p = 0; p < 4; ++p) {
            _mm512_store_si512(w + 64 * (8 * p + j), tq_plane(v, p));
        }
    }
    const __m512i both = _mm512_load_si512(am);
    const __m512  a    = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
    _mm512_storeu_ps(alpha, a);
    _mm512_storeu_ps(offset, _mm512_sub_ps(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16))), a));
}

// acc + codes * q, four products a lane. With the intrinsic GCC 12 copies every accumulator, twice, on every
// turn of the loop below
TQ_INLINE __m512i tq_dpbusd(__m512i acc, __m512i codes, __m512i q) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(q));
    return acc;
}

// sums[c][32 rows] += one block of W columns of a panel
TQ_INLINE void tq_avx512_block(int W, const uint8_t * w, const float * alpha, const float * offset, const char * panel, float * sums) {
    __m512i acc[TQ_PANEL][2];
    for (int c = 0; c < W; ++c) {
        acc[c][0] = acc[c][1] = _mm512_setzero_si512();
    }
    for (int j = 0; j < QK_TQ / 4; ++j) {
        const __m512i w0 = _mm512_load_si512(w + 64 * j);
        const __m512i w1 = _mm512_load_si512(w + 64 * (j + QK_TQ / 4));
        for (int c = 0; c < W; ++c) {
            int32_t q;
            memcpy(&q, panel + 4 * (j * W + c), 4);
            const __m512i a = _mm512_set1_epi32(q);
            acc[c][0] = tq_dpbusd(acc[c][0], w0, a);
            acc[c][1] = tq_dpbusd(acc[c][1], w1, a);
        }
    }
    const float * d = (const float *) (panel + W * QK_TQ);
    for (int h = 0; h < 2; ++h) {
        const __m512 al = _mm512_load_ps(alpha + 16 * h);
        const __m512 of = _mm512_load_ps(offset + 16 * h);
        for (int c = 0; c < W; ++c) {
            float * sum = sums + c * TQ_TILE + 16 * h;
            __m512 t = _mm512_fmadd_ps(of, _mm512_set1_ps(d[W + c]), _mm512_load_ps(sum));
            t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[c][h]), _mm512_mul_ps(al, _mm512_set1_ps(d[c])), t);
            _mm512_store_ps(sum, t);
        }
    }
}

#define TQ_BLOCK(W) \
    TQ_TARGET static void tq_avx512_block_##W(const uint8_t * w, const float * alpha, const float * offset, const char * panel, float * sums) { \
        tq_avx512_block(W, w, alpha, offset, panel, sums); \
    }
TQ_BLOCK(1) TQ_BLOCK(2) TQ_BLOCK(3) TQ_BLOCK(4) TQ_BLOCK(5) TQ_BLOCK(6) TQ_BLOCK(7) TQ_BLOCK(8)

typedef void (*tq_block_fn)(const uint8_t *, const float *, const float *, const char *, float *);
static const tq_block_fn tq_avx512_blocks[TQ_PANEL + 1] = {
    NULL, tq_avx512_block_1, tq_avx512_block_2, tq_avx512_block_3, tq_avx512_block_4,
    tq_avx512_block_5, tq_avx512_block_6, tq_avx512_block_7, tq_avx512_block_8,
};

TQ_TARGET static void tq_avx512_gemm(enum ggml_type type, int64_t k, int64_t nrows, const void * x, size_t bx, const struct ggml_tq_cols * cols, float * const * dst) {
    const int64_t nb = k / QK_TQ;
    const struct tq1_1_tables tables = tq1_1_load_tables();

    float   sums[TQ_MAX_COLS * TQ_TILE] __attribute__((aligned(64)));
    uint8_t w[TQ_TILE * QK_TQ] __attribute__((aligned(64)));
    float   alpha[TQ_TILE] __attribute__((aligned(64)));
    float   offset[TQ_TILE] __attribute__((aligned(64)));
    char    packed[TQ_PANEL * sizeof(block_q8_t)] __attribute__((aligned(64)));

    for (int64_t r0 = 0; r0 < nrows; r0 += TQ_TILE) {
        const int nr = (int) (nrows - r0 < TQ_TILE ? nrows - r0 : TQ_TILE);
        memset(sums, 0, cols->n * TQ_TILE * sizeof(float));

        for (int64_t b = 0; b < nb; ++b) {
            for (int h = 0; h < 2; ++h) {
                const int n16 = nr - 16 * h < 0 ? 0 : nr - 16 * h < 16 ? nr - 16 * h : 16;
                const char * xr = (const char *) x + (r0 + 16 * h) * bx;
                if (type == GGML_TYPE_TQ2_1) {
                    tq_avx512_unpack16(GGML_TYPE_TQ2_1, n16, xr, bx, b, &tables, w + 16 * QK_TQ * h, alpha + 16 * h, offset + 16 * h);
                } else {
                    tq_avx512_unpack16(GGML_TYPE_TQ1_1, n16, xr, bx, b, &tables, w + 16 * QK_TQ * h, alpha + 16 * h, offset + 16 * h);
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
                tq_avx512_blocks[width](w, alpha, offset, panel, sums + c * TQ_TILE);
            }
        }
        for (int c = 0; c < cols->n; ++c) {
            memcpy(dst[c] + r0, sums + c * TQ_TILE, nr * sizeof(float));
        }
    }
}

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
