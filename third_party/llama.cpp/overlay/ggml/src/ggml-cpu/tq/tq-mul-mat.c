// MUL_MAT and MUL_MAT_ID for TQ2_1 and TQ1_1: activations to Q8_T, rows shared out among the threads.
// See tq.h.

#include "tq.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

// Columns from which the matrix-matrix kernel pays (it unpacks the weights first): measured, KERNELS.md
#define TQ_GEMM_MIN_COLS 3
// Rows that a thread takes at a time, at most; a multiple of the kernels' tile of 32
#define TQ_ROW_CHUNK 64

// Columns up to which reading the weights takes a good part of the time
#define TQ_FEW_COLS 32
// Bytes of weights that are still in the second-level cache when the next column meets them
#define TQ_CACHED_BYTES (1 << 20)

// Rows that each thread takes for sure. With few columns it wants them in one piece, since a stream of memory reads
// takes a while to start; the rest, in chunks, evens out threads that are held up
static int64_t tq_own_rows(int64_t rows, int nth, int64_t ncols) {
    const int64_t unit = ncols < TQ_GEMM_MIN_COLS ? 4 : 32; // streams, or a tile
    return ncols > TQ_FEW_COLS ? 0 : nth == 1 ? rows : rows * 3 / 4 / nth / unit * unit;
}

// Rows per chunk of the rest: small enough that every thread gets several
static int64_t tq_chunk_rows(int64_t rest, int nth, int64_t ncols) {
    const int64_t least = ncols < TQ_GEMM_MIN_COLS ? 16 : 32;
    int64_t rows = TQ_ROW_CHUNK;
    while (rows > least && rest < rows * nth * 4) {
        rows /= 2;
    }
    return rows;
}

void ggml_tq_share_rows(const struct ggml_compute_params * params, int64_t rows, int64_t ncols, ggml_tq_rows_fn take, const void * context) {
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, 0);
    }
    ggml_barrier(params->threadpool);

    const int64_t own  = tq_own_rows(rows, params->nth, ncols);
    const int64_t rest = own * params->nth; // where it begins
    const int64_t step = tq_chunk_rows(rows - rest, params->nth, ncols);

    take(context, own * params->ith, own * (params->ith + 1));
    for (;;) {
        const int64_t begin = rest + ggml_threadpool_chunk_add(params->threadpool, 1) * step;
        if (begin >= rows) {
            return;
        }
        take(context, begin, MIN(begin + step, rows));
    }
}

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

// A product as it is shared out: its rows, those of all matrices in one sequence
struct tq_job {
    const struct ggml_tq_path * path;
    const struct ggml_tensor *  dst;
    const char *                y;      // the activations: params->wdata
    bool                        panels;
};

// dst[c][r0..r0+nr) for all columns of matrix `mat` of dst
static void tq_mul_mat_rows(const struct tq_job * job, int64_t mat, int64_t r0, int64_t nr) {
    const struct ggml_tensor * dst  = job->dst;
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];

    const int64_t ncols    = src1->ne[1];
    const int64_t i2       = mat % src1->ne[2];
    const int64_t i3       = mat / src1->ne[2];
    const int64_t r2       = src1->ne[2] / src0->ne[2]; // matrices of src1 that share one of src0
    const int64_t r3       = src1->ne[3] / src0->ne[3];
    const size_t  row_size = ggml_row_size(GGML_TYPE_Q8_T, src1->ne[0]);
    const size_t  bx       = src0->nb[1];
    const char *  x        = (const char *) src0->data + i2 / r2 * src0->nb[2] + i3 / r3 * src0->nb[3] + r0 * bx;
    const char *  y        = job->y + mat * ncols * row_size;
    char *        out      = (char *) dst->data + i2 * dst->nb[2] + i3 * dst->nb[3] + r0 * sizeof(float);

    if (!job->panels) {
        const int64_t piece = ncols == 1 ? nr : MAX(64, (int64_t) (TQ_CACHED_BYTES / bx));
        for (int64_t r = 0; r < nr; r += piece) {
            for (int64_t c = 0; c < ncols; ++c) {
                job->path->gemv(src0->type, src0->ne[0], MIN(piece, nr - r), x + r * bx, bx, (const block_q8_t *) (y + c * row_size),
                    (float *) (out + c * dst->nb[1]) + r);
            }
        }
        return;
    }
    for (int64_t c0 = 0; c0 < ncols; c0 += TQ_MAX_COLS) {
        float * columns[TQ_MAX_COLS];
        const struct ggml_tq_cols cols = { (int) MIN(TQ_MAX_COLS, ncols - c0), y + c0 * row_size, NULL };
        for (int c = 0; c < cols.n; ++c) {
            columns[c] = (float *) (out + (c0 + c) * dst->nb[1]);
        }
        job->path->gemm(src0->type, src0->ne[0], nr, x, bx, &cols, columns);
    }
}

// Rows [begin, end) of the sequence
static void tq_mul_mat_range(const void * context, int64_t begin, int64_t end) {
    const struct tq_job * job = context;
    const int64_t nrows = job->dst->src[0]->ne[1];
    while (begin < end) {
        const int64_t r0 = begin % nrows;
        const int64_t nr = MIN(nrows - r0, end - begin);
        tq_mul_mat_rows(job, begin / nrows, r0, nr);
        begin += nr;
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
    const struct tq_job job = { path, dst, params->wdata, path->gemm && src1->ne[1] >= TQ_GEMM_MIN_COLS };

    tq_quantize_src1(params, src1, path, job.panels);
    ggml_tq_share_rows(params, src0->ne[1] * src1->ne[2] * src1->ne[3], src1->ne[1], tq_mul_mat_range, &job);
    return true;
}

bool ggml_tq_mul_mat_id(const struct ggml_compute_params * params, struct ggml_tensor * dst, int64_t expert, int64_t n_rows, const int32_t * rows) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];

    if (params->use_ref || !tq_is_ours(src0, src1)) {
        return false;
    }
    const struct ggml_tq_path * path = ggml_tq_active();
    const bool gemm = path->gemm && n_rows >= TQ_GEMM_MIN_COLS;

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
        if (gemm) {
            path->gemm(src0->type, src0->ne[0], r1 - r0, x, src0->nb[1], &cols, out);
            continue;
        }
        for (int c = 0; c < cols.n; ++c) {
            path->gemv(src0->type, src0->ne[0], r1 - r0, x, src0->nb[1], col[c], out[c]);
        }
    }
    return true;
}
