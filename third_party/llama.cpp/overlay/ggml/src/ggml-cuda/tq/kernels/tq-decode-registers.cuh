#pragma once

// Decode where there are no bulk copies (sm_80 to 89), and of experts: a thread block a tile, its
// columns shared among the warps, weights loaded straight into registers one round ahead.

#include "tq-math.cuh"

struct tq_registers_args {
    const uint8_t     * w[TQ_MAX_SEGMENTS];
    float             * y[TQ_MAX_SEGMENTS];
    int64_t             ld[TQ_MAX_SEGMENTS];
    int                 rows[TQ_MAX_SEGMENTS];
    int                 tile_end[TQ_MAX_SEGMENTS]; // tiles of this segment and those before
    const uint4       * x;
    const tq_act_head * head;
    int                 nb, tokens;
};

// 16 rows x nb blocks at w times the activations; ready() is called when weights are on their way and
// activations are wanted; write(token, row, sum) once for each of the N x 16 sums.
template <int N, int WARPS, int UNIT, class Ready, class Write>
static __device__ __forceinline__ void tq_tile_product(const uint8_t * w, const uint4 * x, const tq_act_head * head, int nb,
                                                       Ready && ready, Write && write) {
    using Math = tq_math<N>;
    constexpr int COLUMN = TQ_TILE_ROWS + 4;
    __shared__ float sums[WARPS][N * COLUMN];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;

    int left = nb - warp * UNIT; // blocks from this warp's first to the end of the row
    tq_lane_weights now[UNIT], next[UNIT];
    auto fetch = [&](tq_lane_weights (&to)[UNIT]) {
#pragma unroll
        for (int u = 0; u < UNIT; u++) {
            if (u < left) { to[u].stream(w + u * TQ_TILE_BYTES, lane); }
        }
    };
    w += (size_t) warp * UNIT * TQ_TILE_BYTES;
    x += (size_t) warp * UNIT * Math::X_STEP;
    head += warp * UNIT * N;
    fetch(now);
    ready();
    float acc[2][Math::RESULTS] = {};
    while (left > 0) {
        const int here = left;
        left -= WARPS * UNIT;
        w += (size_t) WARPS * UNIT * TQ_TILE_BYTES;
        fetch(next);
#pragma unroll
        for (int u = 0; u < UNIT; u++) {
            if (u < here) {
                typename Math::lane_activations v;
                v.load(x + u * Math::X_STEP, head + u * N, lane);
                Math::block(acc, now[u], v);
            }
        }
        x += WARPS * UNIT * Math::X_STEP;
        head += WARPS * UNIT * N;
#pragma unroll
        for (int u = 0; u < UNIT; u++) { now[u] = next[u]; }
    }
    Math::finish(acc, lane);
#pragma unroll
    for (int j = 0; j < Math::RESULTS; j++) {
        const int token = Math::token(t, j);
        if (token < N) {
            sums[warp][token * COLUMN + g]     = acc[0][j];
            sums[warp][token * COLUMN + g + 8] = acc[1][j];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TQ_TILE_ROWS * N; i += WARPS * 32) {
        const int token = i / TQ_TILE_ROWS, row = i % TQ_TILE_ROWS;
        float     v = 0;
#pragma unroll
        for (int k = 0; k < WARPS; k++) { v += sums[k][token * COLUMN + row]; }
        write(token, row, v);
    }
}

template <int N, int WARPS, int UNIT, int MIN_BLOCKS>
static __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) tq_decode_registers(const __grid_constant__ tq_registers_args a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    int segment = 0;
    while (segment < TQ_MAX_SEGMENTS - 1 && (int) blockIdx.x >= a.tile_end[segment]) { segment++; }
    const int tile = blockIdx.x - (segment ? a.tile_end[segment - 1] : 0), row0 = tile * TQ_TILE_ROWS;
    tq_tile_product<N, WARPS, UNIT>(
        a.w[segment] + (size_t) tile * a.nb * TQ_TILE_BYTES, a.x, a.head, a.nb,
        [] { tq_pdl_launch(); tq_pdl_wait(); },
        [&](int token, int row, float v) {
            if (row0 + row < a.rows[segment] && token < a.tokens) { a.y[segment][token * a.ld[segment] + row0 + row] = v; }
        });
#endif
}

// grid (tiles of one expert, pairs); the weights are known only when the kernel before has chosen the experts.
template <int WARPS, int UNIT>
static __global__ void __launch_bounds__(WARPS * 32) tq_decode_experts_kernel(const __grid_constant__ tq_experts e) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    tq_pdl_launch();
    tq_pdl_wait();
    const int       pair = blockIdx.y, slot = pair % e.used, token = pair / e.used, column = e.shared ? token : pair;
    const int       row0 = blockIdx.x * TQ_TILE_ROWS;
    const int64_t   expert = e.ids[slot * e.ids_slot + token * e.ids_token];
    const uint8_t * w = e.w + expert * e.expert_bytes + (size_t) blockIdx.x * e.nb * TQ_TILE_BYTES;
    float         * y = e.y + token * e.ld_token + slot * e.ld_slot + row0;
    tq_tile_product<1, WARPS, UNIT>(
        w, (const uint4 *) (e.q + (size_t) column * e.nb * TQ_BLOCK), e.head + (size_t) column * e.nb, e.nb, [] {},
        [&](int, int row, float v) {
            if (row0 + row < e.rows) { y[row] = v; }
        });
#endif
}
