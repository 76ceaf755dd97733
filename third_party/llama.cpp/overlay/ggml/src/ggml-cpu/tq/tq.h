#pragma once

// CPU kernels of the asymmetric ternary types TQ2_1 and TQ1_1.
//
// Several implementations ("paths") are compiled into every build and one is chosen at run time by
// what the processor can do; GGML_TQ_CPU=<name> forces one. Activations are quantised to Q8_T, one
// scale per 128, the weights' own block, so that a block is one integer dot product and two floats:
//
//     sum_j (alpha*(c_j - 1) + mu) * d*q_j  =  alpha*d * sum_j c_j*q_j  +  (mu - alpha) * s
//
// KERNELS.md says what bounds each kernel and what was tried.

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Paths of this build. They need function attributes for other instruction sets than the command line's,
// so other compilers than GCC and Clang get the portable path alone
#if defined(__x86_64__) && defined(__GNUC__)
#define TQ_HAS_X86 1
#else
#define TQ_HAS_X86 0
#endif
#if defined(__aarch64__) && defined(__ARM_NEON) && defined(__GNUC__)
#define TQ_HAS_NEON 1
#else
#define TQ_HAS_NEON 0
#endif

struct ggml_compute_params;

// Columns of activations in a panel: the register tile of the matrix-matrix kernels
#define TQ_PANEL 8
// Columns that one call of a matrix-matrix kernel takes: its float sums fit the first-level cache
#define TQ_MAX_COLS 128

// How far ahead the matrix-vector kernels of x86 fetch, in bytes of each of four streams: KERNELS.md
#define TQ_FETCH_FAR  2048 // to the second-level cache
#define TQ_FETCH_NEAR 576  // from there to the first

// A panel block holds block b of w <= TQ_PANEL columns as the kernels read them:
//     int8 q[32][w][4]  (q[j][c] = elements 4j..4j+3 of column c), float d[w], float s[w]
// and is as large as w blocks of Q8_T. A column range is its panels one after the other, each with its
// blocks in order; only the last panel may be narrower than TQ_PANEL.

// The columns of one matrix product: panels, or NULL and col[i] = the blocks of column i
struct ggml_tq_cols {
    int                        n; // 1..TQ_MAX_COLS
    const char *               panels;
    const block_q8_t * const * col;
};

struct ggml_tq_path {
    const char * name;

    bool (*supported)(void);

    // x: k floats; y: k/128 blocks
    void (*quantize)(const float * x, block_q8_t * y, int64_t k);

    // dst[r] = dot product of row r (bx bytes apart) with the column y, for r < nrows
    void (*gemv)(enum ggml_type type, int64_t k, int64_t nrows, const void * x, size_t bx, const block_q8_t * y, float * dst);

    // dst[c][r] for all columns; NULL where the path has none (gemv serves)
    void (*gemm)(enum ggml_type type, int64_t k, int64_t nrows, const void * x, size_t bx, const struct ggml_tq_cols * cols, float * const * dst);
};

extern const struct ggml_tq_path ggml_tq_path_generic;
extern const struct ggml_tq_path ggml_tq_path_avx2;
extern const struct ggml_tq_path ggml_tq_path_avx512;
extern const struct ggml_tq_path ggml_tq_path_avx512_vnni;
extern const struct ggml_tq_path ggml_tq_path_neon;
extern const struct ggml_tq_path ggml_tq_path_neon_dotprod;
extern const struct ggml_tq_path ggml_tq_path_neon_i8mm;

// The path in use: GGML_TQ_CPU if set (ends the process with a message if
// that is unknown or cannot run here), else the best
const struct ggml_tq_path * ggml_tq_active(void);

// mu - alpha of a block, what a sum of activations is multiplied by; NaN where either is NaN or infinite, so that the
// result is NaN whatever the codes and activations are. The vector kernels compute just this
static inline float ggml_tq_offset(float alpha, float mu) {
    return 0.0f * (alpha * mu) + (mu - alpha);
}

// Block b of w columns as a panel block at dst
void ggml_tq_pack_panel(const block_q8_t * const * col, int64_t b, int w, char * dst);

// MUL_MAT as a whole, called by every thread. False: not ours (then nothing was done)
bool ggml_tq_mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// MUL_MAT_ID: the n_rows (slot, token) pairs at `rows` that expert `expert` serves; the activations are
// in params->wdata as Q8_T. Called by every thread. False: not ours
bool ggml_tq_mul_mat_id(const struct ggml_compute_params * params, struct ggml_tensor * dst, int64_t expert, int64_t n_rows, const int32_t * rows);

// MUL_MAT with one column, of the types that the head of a ternary file has: llama.cpp's dot products, in streams.
// Called by every thread. False: not done here (then nothing was done)
bool ggml_tq_mul_mat_head(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Shares the rows of a product with ncols columns out, after a barrier: take(context, begin, end). Called by every thread
typedef void (*ggml_tq_rows_fn)(const void * context, int64_t begin, int64_t end);
void ggml_tq_share_rows(const struct ggml_compute_params * params, int64_t rows, int64_t ncols, ggml_tq_rows_fn take, const void * context);

// ggml_type_traits_cpu
void ggml_tq_quantize_row_tq2_1(const float * x, void * y, int64_t k);
void ggml_tq_quantize_row_tq1_1(const float * x, void * y, int64_t k);
void ggml_tq_quantize_row_q8_t (const float * x, void * y, int64_t k);
void ggml_vec_dot_tq2_1_q8_t(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
void ggml_vec_dot_tq1_1_q8_t(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);

// For tests and benchmarks: every path of this build by name. NULL-terminated
GGML_BACKEND_API const char * const * ggml_tq_path_names(void);
GGML_BACKEND_API const char * ggml_tq_active_name(void);
// The functions below return false if the path is unknown, not supported here, or has no such kernel
GGML_BACKEND_API bool ggml_tq_test_supported(const char * path);
GGML_BACKEND_API bool ggml_tq_test_quantize(const char * path, const float * x, void * y, int64_t k);
GGML_BACKEND_API bool ggml_tq_test_gemv(const char * path, int type, int64_t k, int64_t nrows, const void * x, size_t bx, const void * y, float * dst);
// y: ncols rows of Q8_T; dst: ncols x nrows floats; panels: pack first, as MUL_MAT does
GGML_BACKEND_API bool ggml_tq_test_gemm(const char * path, int type, int64_t k, int64_t nrows, const void * x, size_t bx, int ncols, const void * y, float * dst, bool panels);

#ifdef __cplusplus
}
#endif
