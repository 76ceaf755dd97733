// Reference implementation of TQ2_1, TQ1_1 and Q8_T; see ggml-tq.h and FORMAT.md.
//
// The quantiser is the asymmetric ternary one of PT2-LLM (init: eq. 4-5, iterative ternary fitting:
// eq. 9-10), block by block, with the sums weighted by the importance matrix when there is one. All of
// it is done in double with a fixed order of summation, and this file is compiled without contraction
// of products and sums, so that gguf-py's NumPy twin (quants_tq.py) gives the same bytes.

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-quants.h"
#include "ggml-impl.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define TQ_LANES      32
#define TQ_MAX_STEPS  50   // ITF steps, as in the paper
#define TQ_DET_MIN    1e-7 // a relative determinant below this is a block of one level

// The ternary fit of one block
struct tq_fit {
    ggml_half alpha;
    ggml_half mu;
    int8_t    t[QK_TQ]; // -1, 0, 1
};

// Sum of 128 doubles by halving, the order that NumPy's vectorised form repeats. Destroys v
static double tq_tree_sum(double * v) {
    for (int n = QK_TQ / 2; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) {
            v[i] = v[i] + v[i + n];
        }
    }
    return v[0];
}

// T for the grid mu + alpha*{-1, 0, 1} (eq. 10); the midpoint goes to 0. Returns whether t changed
static bool tq_round(const float * x, double mu, double half_step, int8_t * t) {
    bool changed = false;
    for (int i = 0; i < QK_TQ; ++i) {
        const double r = (double) x[i] - mu;
        const int8_t v = r > half_step ? 1 : r < -half_step ? -1 : 0;
        changed |= v != t[i];
        t[i] = v;
    }
    return changed;
}

// Initial T (eq. 4-5): centred on the mean, threshold 0.75 times the mean magnitude
static void tq_init(const float * x, const double * w, double sum_w, double mean, int8_t * t) {
    double v[QK_TQ];
    for (int i = 0; i < QK_TQ; ++i) {
        v[i] = w[i] * fabs((double) x[i] - mean);
    }
    const double delta = 0.75 * (tq_tree_sum(v) / sum_w);
    tq_round(x, mean, delta, t);
}

// Least-squares alpha and mu for a fixed T (eq. 9). Returns false if T is all one value
static bool tq_solve(const double * w, const double * wx, double sum_w, double sum_wx, const int8_t * t, double * alpha, double * mu) {
    double v_t[QK_TQ], v_tt[QK_TQ], v_xt[QK_TQ];
    for (int i = 0; i < QK_TQ; ++i) {
        v_t[i]  = w[i] * t[i];
        v_tt[i] = w[i] * (t[i] * t[i]);
        v_xt[i] = wx[i] * t[i];
    }
    const double s_t  = tq_tree_sum(v_t);
    const double s_tt = tq_tree_sum(v_tt);
    const double s_xt = tq_tree_sum(v_xt);

    const double det = sum_w * s_tt - s_t * s_t;
    if (!(det > TQ_DET_MIN * (sum_w * s_tt))) {
        return false;
    }
    *alpha = (sum_w * s_xt - s_t * sum_wx) / det;
    *mu    = (s_tt * sum_wx - s_t * s_xt) / det;
    return true;
}

// Fits one block. imatrix: 128 importances or NULL; all-zero importances count as none.
// A NaN or infinity in x ends up in mu (or alpha), where ggml_validate_row_data finds it
static void tq_fit_block(const float * x, const float * imatrix, struct tq_fit * fit) {
    double w[QK_TQ], wx[QK_TQ], v[QK_TQ];
    for (int i = 0; i < QK_TQ; ++i) {
        v[i] = w[i] = imatrix ? (double) imatrix[i] : 1.0;
    }
    double sum_w = tq_tree_sum(v);
    if (!(sum_w > 0.0)) {
        for (int i = 0; i < QK_TQ; ++i) {
            w[i] = 1.0;
        }
        sum_w = QK_TQ;
    }
    for (int i = 0; i < QK_TQ; ++i) {
        v[i] = wx[i] = w[i] * (double) x[i];
    }
    const double sum_wx = tq_tree_sum(v);
    const double mean   = sum_wx / sum_w;

    double alpha = 0.0;
    double mu    = mean;

    tq_init(x, w, sum_w, mean, fit->t);
    for (int step = 0; step < TQ_MAX_STEPS; ++step) {
        if (!tq_solve(w, wx, sum_w, sum_wx, fit->t, &alpha, &mu)) {
            alpha = 0.0;
            break;
        }
        if (!tq_round(x, mu, 0.5 * alpha, fit->t)) {
            break;
        }
    }

    fit->alpha = GGML_FP32_TO_FP16((float) alpha);
    fit->mu    = GGML_FP32_TO_FP16((float) mu);
    const double alpha_h = GGML_FP16_TO_FP32(fit->alpha);
    if (alpha_h == 0.0) {
        // one level is left: it should be the mean
        fit->alpha = 0;
        fit->mu    = GGML_FP32_TO_FP16((float) mean);
        memset(fit->t, 0, sizeof(fit->t));
        return;
    }
    // T once more, against the scales as they are stored
    tq_round(x, GGML_FP16_TO_FP32(fit->mu), 0.5 * alpha_h, fit->t);
}

//
// packing
//

static void tq2_1_pack(const int8_t * t, uint8_t * qs) {
    for (int l = 0; l < TQ_LANES; ++l) {
        int byte = 0;
        for (int p = 0; p < 4; ++p) {
            byte |= (t[p * TQ_LANES + l] + 1) << (2 * p);
        }
        qs[l] = (uint8_t) byte;
    }
}

static void tq1_1_pack(const int8_t * t, uint8_t * qs) {
    for (int i = 0; i < TQ1_1_NQS; ++i) {
        int byte = 0;
        int unit = 1;
        for (int p = 0; p < 4; ++p) {
            byte += unit * (t[p * TQ_LANES + i] + 1);
            unit *= 3;
        }
        if (i < 24) {
            byte += unit * (t[(i % 4) * TQ_LANES + TQ1_1_NQS + i / 4] + 1);
        }
        qs[i] = (uint8_t) byte;
    }
}

// the four lowest base-3 digits of 0..80 as 2-bit codes
static const uint8_t tq1_1_codes[81] = {
#define D1(d3, d2, d1) 64*(d3) + 16*(d2) + 4*(d1), 64*(d3) + 16*(d2) + 4*(d1) + 1, 64*(d3) + 16*(d2) + 4*(d1) + 2
#define D2(d3, d2) D1(d3, d2, 0), D1(d3, d2, 1), D1(d3, d2, 2)
#define D3(d3) D2(d3, 0), D2(d3, 1), D2(d3, 2)
    D3(0), D3(1), D3(2)
#undef D1
#undef D2
#undef D3
};

// the fifth digit. A byte above 242 is none that an encoder writes: it counts as the one 81 below, on every path
static int tq1_1_fifth(uint8_t v) {
    return v < 162 ? v / 81 : 2;
}

void ggml_tq1_1_unpack_block(const block_tq1_1 * GGML_RESTRICT x, uint8_t * GGML_RESTRICT qs2) {
    for (int i = 0; i < TQ1_1_NQS; ++i) {
        qs2[i] = tq1_1_codes[x->qs[i] % 81];
    }
    for (int g = 0; g < TQ_LANES - TQ1_1_NQS; ++g) {
        const uint8_t * v = x->qs + 4 * g;
        qs2[TQ1_1_NQS + g] = (uint8_t) (tq1_1_fifth(v[0]) | tq1_1_fifth(v[1]) << 2 | tq1_1_fifth(v[2]) << 4 | tq1_1_fifth(v[3]) << 6);
    }
}

//
// rows
//

static void tq_quantize_row(enum ggml_type type, const float * x, void * y, int64_t k, const float * imatrix) {
    assert(k % QK_TQ == 0);
    struct tq_fit fit;
    for (int64_t b = 0; b < k / QK_TQ; ++b) {
        tq_fit_block(x + b * QK_TQ, imatrix ? imatrix + b * QK_TQ : NULL, &fit);
        if (type == GGML_TYPE_TQ2_1) {
            block_tq2_1 * yb = (block_tq2_1 *) y + b;
            yb->alpha = fit.alpha;
            yb->mu    = fit.mu;
            tq2_1_pack(fit.t, yb->qs);
        } else {
            block_tq1_1 * yb = (block_tq1_1 *) y + b;
            yb->alpha = fit.alpha;
            yb->mu    = fit.mu;
            tq1_1_pack(fit.t, yb->qs);
        }
    }
}

void quantize_row_tq2_1_ref(const float * GGML_RESTRICT x, block_tq2_1 * GGML_RESTRICT y, int64_t k) {
    tq_quantize_row(GGML_TYPE_TQ2_1, x, y, k, NULL);
}

void quantize_row_tq1_1_ref(const float * GGML_RESTRICT x, block_tq1_1 * GGML_RESTRICT y, int64_t k) {
    tq_quantize_row(GGML_TYPE_TQ1_1, x, y, k, NULL);
}

static size_t tq_quantize_rows(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    const size_t row_size = ggml_row_size(type, n_per_row);
    for (int64_t r = 0; r < nrows; ++r) {
        tq_quantize_row(type, src + r * n_per_row, (char *) dst + r * row_size, n_per_row, imatrix);
    }
    return nrows * row_size;
}

size_t quantize_tq2_1(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    return tq_quantize_rows(GGML_TYPE_TQ2_1, src, dst, nrows, n_per_row, imatrix);
}

size_t quantize_tq1_1(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    return tq_quantize_rows(GGML_TYPE_TQ1_1, src, dst, nrows, n_per_row, imatrix);
}

static void tq_dequantize_codes(ggml_half alpha_h, ggml_half mu_h, const uint8_t * qs2, float * y) {
    const float alpha = GGML_FP16_TO_FP32(alpha_h);
    const float mu    = GGML_FP16_TO_FP32(mu_h);
    const bool  sound = isfinite(alpha) && isfinite(mu); // or all of the block's weights are NaN, in products as well
    for (int e = 0; e < QK_TQ; ++e) {
        const int c = (qs2[e % TQ_LANES] >> (2 * (e / TQ_LANES))) & 3;
        y[e] = sound ? alpha * (float) (c - 1) + mu : NAN;
    }
}

void dequantize_row_tq2_1(const block_tq2_1 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_TQ == 0);
    for (int64_t b = 0; b < k / QK_TQ; ++b) {
        tq_dequantize_codes(x[b].alpha, x[b].mu, x[b].qs, y + b * QK_TQ);
    }
}

void dequantize_row_tq1_1(const block_tq1_1 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_TQ == 0);
    uint8_t qs2[TQ_LANES];
    for (int64_t b = 0; b < k / QK_TQ; ++b) {
        ggml_tq1_1_unpack_block(x + b, qs2);
        tq_dequantize_codes(x[b].alpha, x[b].mu, qs2, y + b * QK_TQ);
    }
}

// Rounds to nearest even. A block with a NaN or an infinity becomes d = s = NaN, so that it reaches
// the result; one whose largest magnitude is below 1e-30 becomes zero (127/amax would overflow)
void quantize_row_q8_t_ref(const float * GGML_RESTRICT x, block_q8_t * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_TQ == 0);
    for (int64_t b = 0; b < k / QK_TQ; ++b) {
        const float * xb = x + b * QK_TQ;
        // as integers, magnitudes order like floats, with infinity and NaN on top
        int32_t top = 0;
        for (int i = 0; i < QK_TQ; ++i) {
            int32_t bits;
            memcpy(&bits, xb + i, sizeof(bits));
            bits &= 0x7fffffff;
            top = bits > top ? bits : top;
        }
        float amax;
        memcpy(&amax, &top, sizeof(amax));
        if (top >= 0x7f800000 || amax < 1e-30f) {
            y[b].d = y[b].s = top >= 0x7f800000 ? NAN : 0.0f;
            memset(y[b].qs, 0, QK_TQ);
            continue;
        }
        const float id = 127.0f / amax;
        int32_t sum = 0;
        for (int i = 0; i < QK_TQ; ++i) {
            const int32_t q = (int32_t) nearbyintf(xb[i] * id);
            y[b].qs[i] = (int8_t) q;
            sum += q;
        }
        y[b].d = amax / 127.0f;
        y[b].s = y[b].d * (float) sum;
    }
}

void dequantize_row_q8_t(const block_q8_t * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_TQ == 0);
    for (int64_t i = 0; i < k; ++i) {
        y[i] = x[i / QK_TQ].d * x[i / QK_TQ].qs[i % QK_TQ];
    }
}

bool ggml_tq_validate_codes(enum ggml_type type, const void * data, size_t nblocks) {
    if (type == GGML_TYPE_TQ2_1) {
        return true; // every byte is four codes: code 3 is the fourth level
    }
    for (size_t b = 0; b < nblocks; ++b) {
        const block_tq1_1 * x = (const block_tq1_1 *) data + b;
        bool bad = false;
        for (int i = 0; i < TQ1_1_NQS; ++i) {
            bad |= x->qs[i] >= (i < 24 ? 243 : 81);
        }
        if (bad) {
            fprintf(stderr, "ggml_validate_row_data: found invalid %s codes at block %zu\n", ggml_type_name(type), b);
            return false;
        }
    }
    return true;
}
