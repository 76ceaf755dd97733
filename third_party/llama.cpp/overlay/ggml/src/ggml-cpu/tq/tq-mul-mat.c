// MUL_MAT and MUL_MAT_ID for TQ2_1 and TQ1_1: activations to Q8_T, rows shared out among the threads.
// See tq.h.

#include "tq.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

// Columns from which the matrix-matrix kernel pays (it unpacks the weights first): measured, KERNELS.md
#define TQ_GEMM_MIN_COLS 3
// Rows that a thread takes at a time, at most; a multiple of the kernels' tile of 32
#define TQ_ROW_CHUNK 64

static bool tq_is_ours(const struct ggml_tensor * src0, const struct ggml_tensor * src1) {
    return (src0->type == GGML_TYPE_TQ2_1 || src0->type == GGML_TYPE_TQ1_1) &&
           src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float) && src0->extra == NULL;
}

// Quantises columns [c0, c0 + w) of src1's matrix (i12, i13), block b, as a panel block at dst
static void tq_quantize_panel_block(const struct ggml_tq_path * path, const char * src, size_t nb1, int w, int64_t b, char * dst) {
    block_q8_t blocks[TQ_PANEL];
    const block_q8_t * col[TQ_PANEL];
    for (int c = 0; c < w; ++c) {
        path->quantize((const float *) (src + c * nb1) + b * QK_TQ, blocks + c, QK_TQ);
        col[c] = blocks + c;
    }
    ggml_tq_pack_panel(col, 0, w, dst);
}

// Rows per chunk: small enough that every thread gets several
static int64_t tq_chunk_rows(int64_t nrows, int nth, bool panels) {
    const int64_t least = panels ? 32 : 8;
    int64_t rows = TQ_ROW_CHUNK;
    while (rows > least && nrows < rows * nth * 4) {
        rows /= 2;
    }
    return rows;
}

// Activations of all matrices into wdata: as panels, or column by column. Shared out by (columns, block)
static void tq_quantize_src1(const struct ggml_compute_params * params, const struct ggml_tensor * src1, const struct ggml_tq_path * path, bool panels) {
    const int64_t ncols    = src1->ne[1];
    const int64_t nblocks  = src1->ne[0] / QK_TQ;
    const int64_t nmats    = src1->ne[2] * src1->ne[3];
    const int     width    = panels ? TQ_PANEL : 1;
    const int64_t ngroups  = (ncols + width - 1) / width;
    const int64_t nunits   = nmats * ngroups * nblocks;
    const int64_t unit_end = nunits * (params->ith + 1) / params->nth;

    for (int64_t unit = nunits * params->ith / params->nth; unit < unit_end; ++unit) {
        const int64_t b   = unit % nblocks;
        const int64_t g   = unit / nblocks % ngroups;
        const int64_t mat = unit / (nblocks * ngroups);
        const int64_t c0  = g * width;
        const int     w   = (int) MIN(width, ncols - c0);

        const char * src = (const char *) src1->data + mat % src1->ne[2] * src1->nb[2] + mat / src1->ne[2] * src1->nb[3] + c0 * src1->nb[1];
        char * dst = (char *) params->wdata + ((mat * ncols + c0) * nblocks + b * w) * sizeof(block_q8_t);
        if (panels) {
            tq_quantize_panel_block(path, src, src1->nb[1], w, b, dst);
        } else {
            path->quantize((const float *) src + b * QK_TQ, (block_q8_t *) dst, QK_TQ);
        }
    }
}

// dst[c][r0..r0+nr) for all columns of one matrix
static void tq_mul_mat_rows(const struct ggml_tq_path * path, bool panels, const struct ggml_tensor * src0, const char * x, int64_t r0, int64_t nr,
                            const char * y, int64_t ncols, char * dst, size_t nb1) {
    const int64_t k        = src0->ne[0];
    const size_t  row_size = k / QK_TQ * sizeof(block_q8_t);
    const size_t  bx       = src0->nb[1];
    const char *  rows     = x + r0 * bx;

    if (!panels) {
        for (int64_t c = 0; c < ncols; ++c) {
            path->gemv(src0->type, k, nr, rows, bx, (const block_q8_t *) (y + c * row_size), (float *) (dst + c * nb1) + r0);
        }
        return;
    }
    for (int64_t c0 = 0; c0 < ncols; c0 += TQ_MAX_COLS) {
        float * out[TQ_MAX_COLS];
        const struct ggml_tq_cols cols = { (int) MIN(TQ_MAX_COLS, ncols - c0), y + c0 * row_size, NULL };
        for (int c = 0; c < cols.n; ++c) {
            out[c] = (float *) (dst + (c0 + c) * nb1) + r0;
        }
        path->gemm(src0->type, k, nr, rows, bx, &cols, out);
    }
}

bool ggml_tq_mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];

    if (params->use_ref || !tq_is_ours(src0, src1)) {
        return false;
    }
    GGML_ASSERT(src0->nb[0] == ggml_type_size(src0->type));
    GGML_ASSERT(dst->nb[0] == sizeof(float));
    GGML_ASSERT(params->wsize >= ggml_row_size(GGML_TYPE_Q8_T, ggml_nelements(src1)));

    const struct ggml_tq_path * path = ggml_tq_active();

    const int64_t ncols  = src1->ne[1];
    const int64_t nrows  = src0->ne[1];
    const int64_t nmats  = src1->ne[2] * src1->ne[3];
    const bool    panels = path->gemm && ncols >= TQ_GEMM_MIN_COLS;

    tq_quantize_src1(params, src1, path, panels);
    if (params->ith == 0) {
        // every thread begins with the chunk of its own number
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const int64_t r2      = src1->ne[2] / src0->ne[2]; // matrices of src1 that share one of src0
    const int64_t r3      = src1->ne[3] / src0->ne[3];
    const int64_t step    = tq_chunk_rows(nrows * nmats, params->nth, panels);
    const int64_t per_mat = (nrows + step - 1) / step;

    for (int64_t chunk = params->ith; chunk < nmats * per_mat; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t mat = chunk / per_mat;
        const int64_t r0  = chunk % per_mat * step;
        const int64_t i12 = mat % src1->ne[2];
        const int64_t i13 = mat / src1->ne[2];
        tq_mul_mat_rows(path, panels, src0,
            (const char *) src0->data + i12 / r2 * src0->nb[2] + i13 / r3 * src0->nb[3], r0, MIN(step, nrows - r0),
            (const char *) params->wdata + mat * ncols * ggml_row_size(GGML_TYPE_Q8_T, src1->ne[0]), ncols,
            (char *) dst->data + i12 * dst->nb[2] + i13 * dst->nb[3], dst->nb[1]);
    }
    return true;
}

bool ggml_tq_mul_mat_id(const struct ggml_compute_params * params, struct ggml_tensor * dst, int64_t expert, int64_t n_rows, const int32_t * rows) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];

    if (params->use_ref || !tq_is_ours(src0, src1)) {
        return false;
    }
    const struct ggml_tq_path * path = ggml_tq_active();
    if (!path->gemm || n_rows < TQ_GEMM_MIN_COLS) {
        return false;
    }

    // a fixed share of the rows for each thread, in whole tiles
    const int64_t ntiles = (src0->ne[1] + 31) / 32;
    const int64_t r0     = MIN(ntiles * params->ith / params->nth * 32, src0->ne[1]);
    const int64_t r1     = MIN(ntiles * (params->ith + 1) / params->nth * 32, src0->ne[1]);
    const int64_t nblk   = src0->ne[0] / QK_TQ;
    const char *  x      = (const char *) src0->data + expert * src0->nb[2] + r0 * src0->nb[1];

    for (int64_t c0 = 0; r0 < r1 && c0 < n_rows; c0 += TQ_MAX_COLS) {
        const block_q8_t * col[TQ_MAX_COLS];
        float * out[TQ_MAX_COLS];
        const struct ggml_tq_cols cols = { (int) MIN(TQ_MAX_COLS, n_rows - c0), NULL, col };
        for (int c = 0; c < cols.n; ++c) {
            const int32_t slot  = rows[2 * (c0 + c)];
            const int32_t token = rows[2 * (c0 + c) + 1];
            col[c] = (const block_q8_t *) params->wdata + (slot % src1->ne[1] + token * src1->ne[1]) * nblk;
            out[c] = (float *) ((char *) dst->data + slot * dst->nb[1] + token * dst->nb[2]) + r0;
        }
        path->gemm(src0->type, src0->ne[0], r1 - r0, x, src0->nb[1], &cols, out);
    }
    return true;
}
