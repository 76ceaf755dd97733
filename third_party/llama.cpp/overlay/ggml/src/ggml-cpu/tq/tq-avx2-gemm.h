// The matrix-matrix kernel of the AVX2 path, included by tq-avx2.c. See tq.h and KERNELS.md.

// The 26 base-3 bytes at qs as the 2-bit form of TQ2_1. p = v mod 81 are planes 0..3; v - p81 = 81*t has t,
// the fifth digit, in its low two bits. p splits into p mod 9 and a multiple of 9, which differs from the
// other multiples in its low four bits, so that two table look-ups give the codes
TQ_INLINE __m256i tq1_1_unpack(const uint8_t * qs) {
    // two loads that stay within the block: bytes 0..15, and 10..25 moved down to 16..25
    const __m128i drop6 = _mm_setr_epi8(6, 7, 8, 9, 10, 11, 12, 13, 14, 15, -1, -1, -1, -1, -1, -1);
    const __m128i lo = _mm_loadu_si128((const __m128i *) qs);
    const __m128i hi = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *) (qs + 10)), drop6);
    const __m256i v  = _mm256_set_m128i(hi, lo);

    const __m256i p81   = tq_mod(v, 81);
    const __m256i p     = _mm256_min_epu8(p81, _mm256_sub_epi8(p81, _mm256_set1_epi8(81))); // of bytes above 242 p81 is 81 and more
    const __m256i p9    = tq_mod(tq_mod(p, 27), 9);
    const __m256i low   = TQ_HALVES(0, 1, 2, 4, 5, 6, 8, 9, 10, 0, 0, 0, 0, 0, 0, 0);
    // at 9h mod 16: 16*(h mod 3) + 64*(h / 3)
    const __m256i high  = TQ_HALVES(0, 0, 32, 0, 80, 0, (char) 128, 0, (char) 160, 16, 0, 64, 0, 96, 0, (char) 144);
    const __m256i codes = _mm256_or_si256(_mm256_shuffle_epi8(low, p9), _mm256_shuffle_epi8(high, _mm256_sub_epi8(p, p9)));

    // four fifth digits each, with weights 1, 4, 16, 64, are the bytes of lanes 26..31
    const __m256i digit = _mm256_and_si256(_mm256_sub_epi8(v, p81), _mm256_set1_epi8(3));
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
    _mm256_store_ps(offset, tq_offset(a, m));
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

// Of the next tile's bytes the b-th part of each quarter, in the order of memory: the kernel jumps from row to row
TQ_INLINE void tq_fetch_tile(const char * x, size_t bx, int64_t b, size_t block_size) {
    const size_t part = TQ_TILE / 4 * block_size;
    for (int i = 0; i < 4; ++i) {
        for (size_t at = 0; at < part; at += 64) {
            _mm_prefetch(x + i * (TQ_TILE / 4) * bx + b * part + at, _MM_HINT_T1);
        }
    }
}

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
            if (r0 + TQ_TILE < nrows) {
                tq_fetch_tile((const char *) x + (r0 + TQ_TILE) * bx, bx, b, type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1));
            }
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
