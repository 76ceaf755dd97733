#pragma once

// What the two prefill kernels share: how a launch is described, and the arithmetic on one block that both have.

#include "tq-kernels.cuh"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

// How a product is cut: thread blocks of `rows` x `tokens`, K in `split` parts; what does not fill the multiprocessors
// once more goes to a second launch with K in `tail` parts (0: all in one).
struct tq_prefill_plan {
    int rows;
    int tokens;
    int split;
    int tail;
    int first; // tiles of rows in the first of two launches (0: as many as fill the multiprocessors)
};

// One launch, as the kernels take it.
struct tq_prefill_args {
    tq_segment      segment[TQ_MAX_SEGMENTS];
    int             tile_end[TQ_MAX_SEGMENTS]; // thread-block tiles of the segments up to and with this one
    const uint8_t * records;
    const uint8_t * sums;
    int             nb;
    int             n;      // tokens in all
    int             width;  // of a record
    int             group0; // first group of this launch
    int             tile0;  // first tile of this launch
    bool            second; // the launch before is the first part of the same product
    int             split;
};

// tq-prefill-wgmma.cu. Whether its kernels were compiled in (sm_90a), and the launch; `plan` null: choose.
bool tq_prefill_wgmma_built();
void tq_prefill_wgmma(const tq_segment * segments, int n_segments, const tq_act & act, const tq_prefill_plan * plan,
                      cudaStream_t stream);
// tq-prefill.cu: mma.sync; split is always 1.
void tq_prefill_mma(const tq_segment * segments, int n_segments, const tq_act & act, int sms,
                    const tq_prefill_plan * plan, cudaStream_t stream);

static inline void tq_prefill_check(cudaError_t error, const char * what) {
    if (error != cudaSuccess) {
        fprintf(stderr, "tq_prefill: %s: %s\n", what, cudaGetErrorString(error));
        abort();
    }
}

__host__ __device__ constexpr int tq_ceil(int a, int b) {
    return (a + b - 1) / b;
}

// Thread-block tiles of `rows` rows that the segments have (no tile belongs to two).
static inline int tq_prefill_tiles(const tq_segment * segments, int n_segments, int rows) {
    int tiles = 0;
    for (int i = 0; i < n_segments; i++) {
        tiles += tq_ceil(segments[i].rows, rows);
    }
    return tiles;
}

static inline tq_prefill_args tq_prefill_describe(const tq_segment * segments, int n_segments, const tq_act & act, int rows,
                                                  int group0, int split) {
    tq_prefill_args args = {};
    int tiles = 0;
    for (int i = 0; i < TQ_MAX_SEGMENTS; i++) {
        if (i < n_segments) {
            args.segment[i] = segments[i];
            tiles += tq_ceil(segments[i].rows, rows);
        }
        args.tile_end[i] = tiles;
    }
    args.records = act.q;
    args.sums    = static_cast<const uint8_t *>(act.aux);
    args.nb      = act.nb;
    args.n       = act.n;
    args.width   = std::min(act.cols, TQ_PREFILL_BN);
    args.group0  = group0;
    args.split   = split;
    return args;
}

#ifdef __CUDACC__

// The segment of a tile, which becomes the tile's number inside it.
__device__ __forceinline__ const tq_segment & tq_prefill_find(const tq_prefill_args & args, int & tile) {
    if (tile < args.tile_end[0]) {
        return args.segment[0];
    }
    if (tile < args.tile_end[1]) {
        tile -= args.tile_end[0];
        return args.segment[1];
    }
    tile -= args.tile_end[1];
    return args.segment[2];
}

// A constant in a register of its own: a shuffle hides it from the compiler, which would move it there before every use.
__device__ __forceinline__ uint32_t tq_prefill_constant(uint32_t value, int lane, int from = 0) {
    return __shfl_sync(~0u, lane == from ? value : 0, from);
}
// The bytes (-1, 0, 0, 1) that a code (0, 1 or 3) picks from.
__device__ __forceinline__ uint32_t tq_prefill_table(int lane) {
    return tq_prefill_constant(0x010000ff, lane);
}

// Sixteen bytes of a lane in tile form to the A words of four m..k32, as int8 -1, 0, 1: a[4u + v] is register v of step u.
// A nibble holds two codes, of which one is masked, and PRMT takes four nibbles as indices into the table.
__device__ __forceinline__ void tq_prefill_codes(uint32_t (&a)[16], const uint4 & w, uint32_t table) {
    const uint32_t word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int v = 0; v < 4; v++) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) { // planes 0 and 2, then 1 and 3
            const uint32_t index = (word[v] >> (2 * odd)) & 0x33333333;
            asm("prmt.b32 %0, %1, %2, %3;" : "=r"(a[4 * (2 * odd) + v]) : "r"(table), "n"(0), "r"(index));
            asm("prmt.b32 %0, %1, %2, %3;" : "=r"(a[4 * (2 * odd + 1) + v]) : "r"(table), "n"(0), "r"(index >> 16));
        }
    }
}

__device__ __forceinline__ void tq_mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The scales of eight blocks, kept until their mu is multiplied with the sums of x: lane t has blocks t and t + 4.
struct tq_prefill_mu {
    uint32_t s[2][2]; // [block / 4 % 2][row g, row g + 8], (alpha, mu) as in the tile

    __device__ __forceinline__ void clear() {
        s[0][0] = s[0][1] = s[1][0] = s[1][1] = 0;
    }
    __device__ __forceinline__ void take(uint2 scales, int block, int t) {
        const bool mine = t == (block & 3), upper = block & 4;
        if (mine && !upper) {
            s[0][0] = scales.x;
            s[0][1] = scales.y;
        }
        if (mine && upper) {
            s[1][0] = scales.x;
            s[1][1] = scales.y;
        }
    }
    // acc[j] += mu * sums of 8 tokens; sums: 64 bytes for each token, as tq_sums_at says.
    // `blocks`: how many of the eight exist; the sums of others may be anything.
    template <int NJ>
    __device__ __forceinline__ void add(float (&acc)[NJ][4], const uint8_t * sums, int lane, int blocks) const {
        if (blocks >= 8) {
            add_all<false>(acc, sums, lane, 8);
        } else {
            add_all<true>(acc, sums, lane, blocks);
        }
    }
    template <bool MASK, int NJ>
    __device__ __forceinline__ void add_all(float (&acc)[NJ][4], const uint8_t * sums, int lane, int blocks) const {
        const int t = lane & 3;
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a[i] = __float_as_uint(__high2float(*reinterpret_cast<const half2 *>(&s[i >> 1][i & 1])));
        }
#pragma unroll
        for (int j = 0; j < NJ; j++) {
            uint4 v = *reinterpret_cast<const uint4 *>(sums + (8 * j + (lane >> 2)) * 64 + t * 16);
            if (MASK) {
                v.x = t < blocks ? v.x : 0;
                v.z = t < blocks ? v.z : 0;
                v.y = t + 4 < blocks ? v.y : 0;
                v.w = t + 4 < blocks ? v.w : 0;
            }
            tq_mma_tf32(acc[j], a, v.x, v.y);
            tq_mma_tf32(acc[j], a, v.z, v.w);
        }
    }
};

#endif // __CUDACC__
