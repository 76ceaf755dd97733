#pragma once

// Tile loader of TQ2_1 and TQ1_1 for the matrix-matrix products (MMQ): codes - 1 as int8 with
// (alpha, mu) for each 32 weights, the shared-memory layout that Q8_1 weights have. Needs the
// tensor-core layout (Turing or later); ggml_cuda_should_use_mmq keeps other cards away.

#include "tq.cuh"

template <typename block, ggml_type type, int J, bool fallback>
static __device__ __forceinline__ void ggml_cuda_mmq_load_tiles_tq(
        const char * __restrict__ x, int * __restrict__ x_tile, const int kbx0, const int i_max, const int stride) {
#if defined(TURING_MMA_AVAILABLE)
    constexpr int warp_size   = ggml_cuda_get_physical_warp_size();
    constexpr int nwarps      = ggml_cuda_mmq_get_nthreads(type, J, fallback) / warp_size;
    constexpr int I           = ggml_cuda_mmq_get_I(type, J, fallback);
    constexpr int sram_stride = ggml_cuda_mmq_get_sram_stride(type, J, fallback);

    int   * x_qs = (int   *)  x_tile;
    half2 * x_dm = (half2 *) (x_qs + 2*MMQ_TILE_NE_K);

    constexpr int words           = QK_TQ/16;                     // of a block
    constexpr int threads_per_row = (MMQ_ITER_K/QK_TQ) * words;   // a thread takes one word
    constexpr int nrows           = warp_size / threads_per_row;
    const int kbx = (threadIdx.x % threads_per_row) / words;
    const int j   =  threadIdx.x % words;

#pragma unroll
    for (int i0 = 0; i0 < I; i0 += nrows*nwarps) {
        int i = i0 + threadIdx.y*nrows + threadIdx.x/threads_per_row;
        if (fallback) {
            i = min(i, i_max);
        }
        const block * b = (const block *) x + kbx0 + i*stride + kbx;
        const uint32_t codes = tq_codes(b, j);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            x_qs[i*sram_stride + kbx*(QK_TQ/4) + p*(QK8_1/4) + j] = __vsub4((codes >> (2*p)) & 0x03030303, 0x01010101);
        }
    }

    constexpr int scales_per_row = MMQ_ITER_K / QK8_1;
    constexpr int rows_per_warp  = warp_size / scales_per_row;
    const int k = threadIdx.x % scales_per_row;

#pragma unroll
    for (int i0 = 0; i0 < I; i0 += nwarps*rows_per_warp) {
        int i = i0 + threadIdx.y*rows_per_warp + threadIdx.x/scales_per_row;
        if (fallback) {
            i = min(i, i_max);
        }
        const block * b = (const block *) x + kbx0 + i*stride + k/(QK_TQ/QK8_1);
        x_dm[i*sram_stride + k] = tq_scales(b);
    }
#else
    GGML_UNUSED_VARS(x, x_tile, kbx0, i_max, stride);
    NO_DEVICE_CODE;
#endif // defined(TURING_MMA_AVAILABLE)
}

template <ggml_type type, int J, bool fallback> static __device__ __forceinline__ void ggml_cuda_mmq_load_tiles_tq2_1(
        const char * __restrict__ x, int * __restrict__ x_tile, const int kbx0, const int i_max, const int stride) {
    ggml_cuda_mmq_load_tiles_tq<block_tq2_1, type, J, fallback>(x, x_tile, kbx0, i_max, stride);
}

template <ggml_type type, int J, bool fallback> static __device__ __forceinline__ void ggml_cuda_mmq_load_tiles_tq1_1(
        const char * __restrict__ x, int * __restrict__ x_tile, const int kbx0, const int i_max, const int stride) {
    ggml_cuda_mmq_load_tiles_tq<block_tq1_1, type, J, fallback>(x, x_tile, kbx0, i_max, stride);
}
