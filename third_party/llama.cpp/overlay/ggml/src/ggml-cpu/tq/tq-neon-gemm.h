// The matrix-matrix kernels of the NEON paths with dot product and with matrix instructions, included by tq-neon.c.
// See tq.h and KERNELS.md.

#define TQ_TILE 16 // rows: two times 8

// Elements that one instruction multiplies: a dot product takes 4 of a row and a column, a matrix product 8 of two
// rows and two columns
#define TQ_DOT_ELEMENTS  4
#define TQ_I8MM_ELEMENTS 8

// Block b of 8 rows: codes as bytes at w[128 / elements][8][elements] (k-group, row, element), alpha and mu - alpha
// as floats. Rows from nr on are zero
TQ_INLINE void tq_neon_unpack8(enum ggml_type type, int elements, int nr, const char * x, size_t bx, int64_t b, int8_t * w, float * alpha, float * offset) {
    const size_t block_size = type == GGML_TYPE_TQ2_1 ? sizeof(block_tq2_1) : sizeof(block_tq1_1);
    const int    groups     = 32 / elements; // of lanes
    uint8_t codes[8 * 32]; // [group][row][element], four 2-bit codes in each
    memset(codes, 0, sizeof(codes));
    for (int r = 0; r < 8; ++r) {
        alpha[r] = offset[r] = 0.0f;
        if (r >= nr) {
            continue;
        }
        const uint8_t * block = (const uint8_t *) x + r * bx + b * block_size;
        uint32_t am;
        memcpy(&am, block, sizeof(am));
        const float32x4_t scales = vcvt_f32_f16(vreinterpret_f16_u32(vdup_n_u32(am)));
        alpha[r]  = vgetq_lane_f32(scales, 0);
        offset[r] = ggml_tq_offset(alpha[r], vgetq_lane_f32(scales, 1));
        uint8_t qs2[32];
        if (type == GGML_TYPE_TQ2_1) {
            memcpy(qs2, block + 4, sizeof(qs2));
        } else {
            uint8x16_t v0, v1;
            tq1_1_unpack(block + 4, &v0, &v1);
            vst1q_u8(qs2, v0);
            vst1q_u8(qs2 + 16, v1);
        }
        for (int g = 0; g < groups; ++g) {
            memcpy(codes + (8 * g + r) * elements, qs2 + g * elements, elements);
        }
    }
    for (int at = 0; at < 8 * 32; at += 16) {
        const uint8x16_t v = vld1q_u8(codes + at);
        for (int p = 0; p < 4; ++p) {
            vst1q_s8(w + 8 * 32 * p + at, tq_plane(v, p));
        }
    }
}

// sums[c][8 of the tile's rows] += a block's integer sums, acc[c][h] those of rows 4h..4h+3; d: the panel's floats
TQ_INLINE void tq_neon_add_block(int W, int32x4_t (*acc)[2], const float * alpha, const float * offset, const float * d, float * sums) {
    for (int h = 0; h < 2; ++h) {
        const float32x4_t al = vld1q_f32(alpha + 4 * h);
        const float32x4_t of = vld1q_f32(offset + 4 * h);
        for (int c = 0; c < W; ++c) {
            float * sum = sums + c * TQ_TILE + 4 * h;
            float32x4_t t = vfmaq_n_f32(vld1q_f32(sum), of, d[W + c]);
            t = vfmaq_f32(t, vcvtq_f32_s32(acc[c][h]), vmulq_n_f32(al, d[c]));
            vst1q_f32(sum, t);
        }
    }
}

// acc[c][h] += products of 4 elements: rows 4h..4h+3 with columns c..c+3 (those below W)
#define TQ_DOT_COLUMN(c, q, lane)                                       \
    if ((c) + (lane) < W) {                                             \
        acc[(c) + (lane)][0] = vdotq_laneq_s32(acc[(c) + (lane)][0], w0, q, lane); \
        acc[(c) + (lane)][1] = vdotq_laneq_s32(acc[(c) + (lane)][1], w1, q, lane); \
    }
#define TQ_DOT_COLUMNS(c, q) TQ_DOT_COLUMN(c, q, 0) TQ_DOT_COLUMN(c, q, 1) TQ_DOT_COLUMN(c, q, 2) TQ_DOT_COLUMN(c, q, 3)

// One block of 8 rows with W columns of a panel
TQ_DOTPROD TQ_INLINE void tq_neon_dotprod_block8(int W, const int8_t * w, const float * alpha, const float * offset, const char * panel, float * sums) {
    int32x4_t acc[TQ_PANEL][2];
    for (int c = 0; c < W; ++c) {
        acc[c][0] = acc[c][1] = vdupq_n_s32(0);
    }
    for (int j = 0; j < QK_TQ / 4; ++j) {
        const int8x16_t w0 = vld1q_s8(w + 32 * j);
        const int8x16_t w1 = vld1q_s8(w + 32 * j + 16);
        int8_t q[4 * TQ_PANEL]; // a narrow panel has fewer bytes than the registers
        memcpy(q, panel + 4 * j * W, 4 * W);
        const int8x16_t q0 = vld1q_s8(q);
        TQ_DOT_COLUMNS(0, q0)
        if (W > 4) {
            const int8x16_t q1 = vld1q_s8(q + 16);
            TQ_DOT_COLUMNS(4, q1)
        }
    }
    tq_neon_add_block(W, acc, alpha, offset, (const float *) (panel + W * QK_TQ), sums);
}

#if TQ_HAS_I8MM
// The same: pair[i][j] = rows 2i, 2i + 1 times columns 2j, 2j + 1
TQ_I8MM TQ_INLINE void tq_neon_i8mm_block8(int W, const int8_t * w, const float * alpha, const float * offset, const char * panel, float * sums) {
    const int n = (W + 1) / 2;
    int32x4_t pair[4][TQ_PANEL / 2];
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < n; ++j) {
            pair[i][j] = vdupq_n_s32(0);
        }
    }
    for (int g = 0; g < QK_TQ / 8; ++g) {
        int8_t q[2][4 * TQ_PANEL]; // 4 elements and the next 4, of all columns
        memset(q, 0, W < TQ_PANEL ? sizeof(q) : 0);
        memcpy(q[0], panel + 8 * g * W, 4 * W);
        memcpy(q[1], panel + 8 * g * W + 4 * W, 4 * W);
        int8x16_t columns[TQ_PANEL / 2]; // two columns of 8 elements each
        for (int h = 0; h < (W > 4 ? 2 : 1); ++h) {
            const int32x4_t lo = vreinterpretq_s32_s8(vld1q_s8(q[0] + 16 * h));
            const int32x4_t hi = vreinterpretq_s32_s8(vld1q_s8(q[1] + 16 * h));
            columns[2 * h]     = vreinterpretq_s8_s32(vzip1q_s32(lo, hi));
            columns[2 * h + 1] = vreinterpretq_s8_s32(vzip2q_s32(lo, hi));
        }
        for (int i = 0; i < 4; ++i) {
            const int8x16_t rows = vld1q_s8(w + 64 * g + 16 * i);
            for (int j = 0; j < n; ++j) {
                pair[i][j] = vmmlaq_s32(pair[i][j], rows, columns[j]);
            }
        }
    }
    int32x4_t acc[TQ_PANEL][2];
    for (int c = 0; c < W; ++c) {
        for (int h = 0; h < 2; ++h) {
            acc[c][h] = c % 2 ? vuzp2q_s32(pair[2 * h][c / 2], pair[2 * h + 1][c / 2]) : vuzp1q_s32(pair[2 * h][c / 2], pair[2 * h + 1][c / 2]);
        }
    }
    tq_neon_add_block(W, acc, alpha, offset, (const float *) (panel + W * QK_TQ), sums);
}
#endif

typedef void (*tq_block_fn)(const int8_t *, const float *, const float *, const char *, float *);

#define TQ_BLOCK(ATTR, path, W) \
    ATTR static void tq_neon_##path##_block_##W(const int8_t * w, const float * alpha, const float * offset, const char * panel, float * sums) { \
        tq_neon_##path##_block8(W, w, alpha, offset, panel, sums); \
        tq_neon_##path##_block8(W, w + 8 * QK_TQ, alpha + 8, offset + 8, panel, sums + 8); \
    }
#define TQ_BLOCKS(ATTR, path)                                                                               \
    TQ_BLOCK(ATTR, path, 1) TQ_BLOCK(ATTR, path, 2) TQ_BLOCK(ATTR, path, 3) TQ_BLOCK(ATTR, path, 4)         \
    TQ_BLOCK(ATTR, path, 5) TQ_BLOCK(ATTR, path, 6) TQ_BLOCK(ATTR, path, 7) TQ_BLOCK(ATTR, path, 8)         \
    static const tq_block_fn tq_neon_##path##_blocks[TQ_PANEL + 1] = {                                      \
        NULL, tq_neon_##path##_block_1, tq_neon_##path##_block_2, tq_neon_##path##_block_3, tq_neon_##path##_block_4, \
        tq_neon_##path##_block_5, tq_neon_##path##_block_6, tq_neon_##path##_block_7, tq_neon_##path##_block_8,       \
    };
TQ_BLOCKS(TQ_DOTPROD, dotprod)
#if TQ_HAS_I8MM
TQ_BLOCKS(TQ_I8MM, i8mm)
#endif

TQ_INLINE void tq_neon_gemm(const tq_block_fn * blocks, int elements, enum ggml_type type, int64_t k, int64_t nrows, const void * x, size_t bx,
                            const struct ggml_tq_cols * cols, float * const * dst) {
    const int64_t nb = k / QK_TQ;

    float  sums[TQ_MAX_COLS * TQ_TILE];
    int8_t w[TQ_TILE * QK_TQ];
    float  alpha[TQ_TILE], offset[TQ_TILE];
    float  packed[TQ_PANEL * sizeof(block_q8_t) / sizeof(float)];

    for (int64_t r0 = 0; r0 < nrows; r0 += TQ_TILE) {
        const int nr = (int) MIN(TQ_TILE, nrows - r0);
        memset(sums, 0, cols->n * TQ_TILE * sizeof(float));

        for (int64_t b = 0; b < nb; ++b) {
            for (int h = 0; h < 2; ++h) {
                tq_neon_unpack8(type, elements, nr - 8 * h, (const char *) x + (r0 + 8 * h) * bx, bx, b, w + 8 * QK_TQ * h, alpha + 8 * h, offset + 8 * h);
            }
            for (int c = 0; c < cols->n; c += TQ_PANEL) {
                const int width = MIN(TQ_PANEL, cols->n - c);
                const char * panel = (const char *) packed;
                if (cols->panels) {
                    panel = cols->panels + (c * nb + b * width) * sizeof(block_q8_t);
                } else {
                    ggml_tq_pack_panel(cols->col + c, b, width, (char *) packed);
                }
                blocks[width](w, alpha, offset, panel, sums + c * TQ_TILE);
            }
        }
        for (int c = 0; c < cols->n; ++c) {
            memcpy(dst[c] + r0, sums + c * TQ_TILE, nr * sizeof(float));
        }
    }
}

static void tq_neon_dotprod_gemm(enum ggml_type type, int64_t k, int64_t nrows, const void * x, size_t bx, const struct ggml_tq_cols * cols, float * const * dst) {
    tq_neon_gemm(tq_neon_dotprod_blocks, TQ_DOT_ELEMENTS, type, k, nrows, x, bx, cols, dst);
}

#if TQ_HAS_I8MM
static void tq_neon_i8mm_gemm(enum ggml_type type, int64_t k, int64_t nrows, const void * x, size_t bx, const struct ggml_tq_cols * cols, float * const * dst) {
    tq_neon_gemm(tq_neon_i8mm_blocks, TQ_I8MM_ELEMENTS, type, k, nrows, x, bx, cols, dst);
}
#else
#define tq_neon_i8mm_gemm NULL
#endif
