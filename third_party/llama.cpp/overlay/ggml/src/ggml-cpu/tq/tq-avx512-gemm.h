// The matrix-matrix kernel of the AVX-512 paths, included by their source files after tq-avx512-gemv.h, which
// says what they define before. See tq.h and KERNELS.md.

#define TQ_TILE 32 // rows: two registers of 16

// The base-3 bytes of the blocks at a and b (NULL: none) in two halves, reading nothing beside them
TQ_INLINE __m512i tq1_1_load_codes(const void * a, const void * b) {
    const __m512i lo = _mm512_maskz_loadu_epi8(0x3ffffff, (const char *) a + 4);
    // the upper half starts 32 bytes on; what lies before the block is masked, and never read
    return b ? _mm512_mask_loadu_epi8(lo, 0x3ffffffull << 32, (const char *) b + 4 - 32) : lo;
}

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
            _mm512_store_si512(qs2[r], tq1_1_codes(tq1_1_load_codes(x0, x1), tables));
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
