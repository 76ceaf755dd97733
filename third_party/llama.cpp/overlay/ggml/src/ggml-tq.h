#pragma once

// Reference implementation of the types TQ2_1, TQ1_1 (weights) and Q8_T (activations): what the
// bytes mean, and how a float row becomes them. Included by ggml-quants.h.
//
// k, n_per_row: number of weights, a multiple of QK_TQ (128). Rows are contiguous floats.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

GGML_API void quantize_row_tq2_1_ref(const float * GGML_RESTRICT x, block_tq2_1 * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_tq1_1_ref(const float * GGML_RESTRICT x, block_tq1_1 * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_q8_t_ref (const float * GGML_RESTRICT x, block_q8_t  * GGML_RESTRICT y, int64_t k);

GGML_API void dequantize_row_tq2_1(const block_tq2_1 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_tq1_1(const block_tq1_1 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_q8_t (const block_q8_t  * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

// imatrix: NULL, or n_per_row importances >= 0, the same for every row. Returns the bytes written
GGML_API size_t quantize_tq2_1(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_tq1_1(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

// the 2-bit form of a TQ1_1 block: qs2[lane] as in block_tq2_1
GGML_API void ggml_tq1_1_unpack_block(const block_tq1_1 * GGML_RESTRICT x, uint8_t * GGML_RESTRICT qs2);

// false, with a message on stderr, if a block's bytes are none that a quantiser can have written
// (code 3 in TQ2_1, a byte above 242 or a spare digit in TQ1_1); scales are checked by the caller
GGML_API bool ggml_tq_validate_codes(enum ggml_type type, const void * data, size_t nblocks);

#ifdef __cplusplus
}
#endif
