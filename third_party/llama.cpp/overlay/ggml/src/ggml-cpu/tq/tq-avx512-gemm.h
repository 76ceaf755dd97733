// The matrix-matrix kernel of the AVX-512 paths, included by their source files after tq-avx512-gemv.h, which
// says what they define before. See tq.h and KERNELS.md.

#define TQ_TILE 32 // rows: two registers of 16

// 2-bit codes of the blocks at a and b in two halves; NULL is a block of code 0. Reads nothing beside them
TQ_INLINE __m512i tq_load_codes(enum ggml_type type, const char * a, const char * b, const struct tq1_1_tables * tables) {
    if (type == GGML_TYPE_TQ2_1) {
        const __m256i lo = a ? _mm256_loadu_si256((const __m256i *) (a + 4)) : _mm256_setzero_si256();
        const __m256i hi = b ? _mm256_loadu_si256((const __m256i *) (b + 4)) : _mm256_setzero_si256();
        return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
    }
    __m512i v = a ? _mm512_maskz_loadu_epi8(0x3ffffff, a + 4) : _mm512_setzero_si512();
    // the upper half starts 32 bytes on; what lies before the block is masked, and never read
    v = b ? _mm512_mask_loadu_epi8(v, 0x3ffffffull << 32, b + 4 - 32) : v;
    return tq1_1_codes(v, tables);
}

// Dwords of 16 rows: v[i] = row i and row i + 8, 8 dwords each, becomes v[j] = dword j of rows 0..15
TQ_INLINE void tq_transpose(__m512i * v) {
    const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    const __m512i odd  = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    __m512i t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i]     = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) { // u[i + j]: dwords j and j + 4 of rows i..i+3
        u[i]     = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        v[j]     = _mm512_permutex2var_epi64(u[j], even, u[j + 4]);
        v[j + 4] = _mm512_permutex2var_epi64(u[j], odd,  u[j + 4]);
    }
}

// Block b of 16 rows: codes as u8 at w[32][16][4] (k-group, row, element), alpha and mu - alpha as
// floats. Rows from nr on are zero
TQ_INLINE void tq_avx512_unpack16(enum ggml_type type, int nr, const char * x, size_t bx, int64_t b, const struct tq1_1_tables * tables,
                                  uint8_t * w, float * alpha, float * offset) {
    const char * block = x + b * (type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1));
    uint32_t am[16] __attribute__((aligned(64))) = { 0 };
    for (int r = 0; r < nr; ++r) {
        memcpy(&am[r], block + r * bx, 4);
    }
    __m512i v[8];
    for (int i = 0; i < 8; ++i) {
        v[i] = tq_load_codes(type, i < nr ? block + i * bx : NULL, i + 8 < nr ? block + (i + 8) * bx : NULL, tables);
    }
    tq_transpose(v);
    for (int j = 0; j < 8; ++j) {
        for (int p = 0; p < 4; ++p) {
            _mm512_store_si512(w + 64 * (8 * p + j), tq_plane(v[j], p));
        }
    }
    const __m512i both = _mm512_load_si512(am);
    const __m512  a    = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
    _mm512_storeu_ps(alpha, a);
    _mm512_storeu_ps(offset, tq_offset(a, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)))));
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

// Of the next tile's bytes the b-th part of each quarter, in the order of memory: the kernel jumps from row to row
TQ_INLINE void tq_fetch_tile(const char * x, size_t bx, int64_t b, size_t block_size) {
    const size_t part = TQ_TILE / 4 * block_size;
    for (int i = 0; i < 4; ++i) {
        for (size_t at = 0; at < part; at += 64) {
            _mm_prefetch(x + i * (TQ_TILE / 4) * bx + b * part + at, _MM_HINT_T1);
        }
    }
}

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
            if (r0 + TQ_TILE < nrows) {
                tq_fetch_tile((const char *) x + (r0 + TQ_TILE) * bx, bx, b, type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1));
            }
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
