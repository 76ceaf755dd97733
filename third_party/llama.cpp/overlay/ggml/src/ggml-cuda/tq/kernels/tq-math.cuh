#pragma once

// What one warp does with 16 rows x 128 columns in tile form and 1 to 8 tokens, and the few instructions
// that the decode kernels need by name.
//
// Lane L of a warp has g = L / 4 and t = L % 4, as the fragments of mma.sync have it: it holds weights of
// rows g and g + 8, activations of column g, and results of columns 2t and 2t + 1. Eight tokens are these eight
// columns; up to four are the even ones, so that a lane has one result for each of its rows and not two. One token is the
// eight columns by itself where bits can be multiplied: the bits of its activations.

#include "tq-kernels.cuh"

#include <type_traits>

// ---- instructions -------------------------------------------------------------------------------
static __device__ __forceinline__ void tq_mma_u8s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                   uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// c += the bits that both A and B have, of 16 rows x 256 bits and 8 columns x 256 bits.
static __device__ __forceinline__ void tq_mma_b1(int (&c)[4], const uint4 & a, uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#endif
}

// ---- the weights of a lane ------------------------------------------------------------------------
struct tq_lane_weights {
    uint4 codes;  // rows g, g + 8 in .x, .y (half 0) and .z, .w (half 1)
    uint2 scales; // alpha, mu (half) of row g and of row g + 8

    // From shared memory.
    __device__ __forceinline__ void load(const uint8_t * block, int lane) {
        codes  = *(const uint4 *) (block + lane * 16);
        scales = *(const uint2 *) (block + TQ_TILE_SCALES + (lane >> 2) * 8);
    }
    // From global memory. Weights are read once: first out of the caches.
    __device__ __forceinline__ void stream(const uint8_t * block, int lane) {
        codes  = __ldcs((const uint4 *) (block + lane * 16));
        scales = __ldcs((const uint2 *) (block + TQ_TILE_SCALES + (lane >> 2) * 8));
    }
};

// ---- the product ----------------------------------------------------------------------------------
constexpr int TQ_FLOAT_START = 0x4B400000; // an int below 2^22 added to this, read as float, is 1.5 * 2^23 + int

// By int8. The codes are masked where they lie, not shifted: plane p then counts 4^p fold, and a chain of
// multiply-adds puts the four sums together once per block.
template <int N> struct tq_math_bytes {
    static constexpr int RESULTS = N <= 4 ? 1 : 2;               // tokens whose results a lane keeps, for each of its two rows
    static constexpr int X_STEP  = N * TQ_BLOCK / sizeof(uint4); // uint4 of activations of one block

    static __device__ __forceinline__ int token(int t, int i) { return N <= 4 ? t : 2 * t + i; }

    struct lane_activations {
        uint4 lo, hi;
        tq_act_head head[RESULTS];

        // Plain loads, not ld.global.nc: with dependent launch these bytes may be written while this kernel is
        // already on the card.
        __device__ __forceinline__ void load(const uint4 * x, const tq_act_head * h, int lane) {
            const int     g = lane >> 2, t = lane & 3;
            const uint4 * p = x + min(N <= 4 ? g / 2 : g, N - 1) * 4 + t;
            lo = p[0];
            hi = p[N * 4];
#pragma unroll
            for (int i = 0; i < RESULTS; i++) {
                const uint4 v = *(const uint4 *) (h + min(token(t, i), N - 1));
                head[i]       = {__uint_as_float(v.x), __uint_as_float(v.y), (int) v.z, 0};
            }
        }
    };

    static __device__ __forceinline__ void block(float (&acc)[2][RESULTS], const tq_lane_weights & w, const lane_activations & v) {
        int c0[4] = {}, c1[4] = {}, c2[4] = {}, c3[4] = {};
        const uint4 c = {tq_tile_values(w.codes.x), tq_tile_values(w.codes.y), tq_tile_values(w.codes.z), tq_tile_values(w.codes.w)};
        tq_mma_u8s8(c0, c.x & 0x03030303, c.y & 0x03030303, c.z & 0x03030303, c.w & 0x03030303, v.lo.x, v.lo.y);
        tq_mma_u8s8(c1, c.x & 0x0c0c0c0c, c.y & 0x0c0c0c0c, c.z & 0x0c0c0c0c, c.w & 0x0c0c0c0c, v.lo.z, v.lo.w);
        tq_mma_u8s8(c2, c.x & 0x30303030, c.y & 0x30303030, c.z & 0x30303030, c.w & 0x30303030, v.hi.x, v.hi.y);
        tq_mma_u8s8(c3, c.x & 0xc0c0c0c0, c.y & 0xc0c0c0c0, c.z & 0xc0c0c0c0, c.w & 0xc0c0c0c0, v.hi.z, v.hi.w);
        const float2 s[2] = {__half22float2(*(const half2 *) &w.scales.x), __half22float2(*(const half2 *) &w.scales.y)};
#pragma unroll
        for (int i = 0; i < RESULTS; i++) {
            // |64 * sum((c - 1) * q)| <= 64 * 128 * 127 < 2^22: added to TQ_FLOAT_START and read as float it is exact, which
            // saves the slow conversion
            const int   start = v.head[i].neg_sum * 64 + TQ_FLOAT_START;
            const float d     = v.head[i].d * 0.015625f;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int   k = r * 2 + i;
                const float f = __int_as_float(c3[k] + 4 * c2[k] + 16 * c1[k] + 64 * c0[k] + start) - 12582912.0f;
                acc[r][i] += s[r].x * d * f;
                acc[r][i] += s[r].y * v.head[i].sum;
            }
        }
    }

    // What is left to do when a run of blocks has been added up.
    static __device__ __forceinline__ void finish(float (&)[2][RESULTS], int) {}
};

// One token, by bits. A code has as many bits as its value, so codes and one bit of each activation (at both bits of
// its code) give the sum of code * bit by counting: 16 rows x 128 columns x 8 bits in one product, with codes as they lie.
// Lane t has bits 2t and 2t + 1, together digit t of q in base 4, and leaves the digit's 4^t for the end of the run. The
// correction for codes being c and not c - 1 is made digit by digit: what the lanes add up then has no large part that
// cancels between them.
struct tq_math_bits {
    static constexpr int RESULTS = 1;
    static constexpr int X_STEP  = TQ_BLOCK / sizeof(uint4);

    static __device__ __forceinline__ int token(int t, int) { return t; } // the first lane writes

    struct lane_activations {
        uint32_t bits;   // bit g of the columns of t: in even places those of half 0, in odd places those of half 1
        uint32_t low, high; // -(sum of digit t), t = 0..3, 16 bits each
        float    d, sum;
        int      t;

        // Plain loads, as above.
        __device__ __forceinline__ void load(const uint4 * x, const tq_act_head * h, int lane) {
            bits = ((const uint32_t *) x)[lane];
            const uint4 v = *(const uint4 *) h;
            d    = __uint_as_float(v.x);
            sum  = __uint_as_float(v.y);
            low  = v.z;
            high = v.w;
            t    = lane & 3;
        }
    };

    static __device__ __forceinline__ void block(float (&acc)[2][RESULTS], const tq_lane_weights & w, const lane_activations & v) {
        constexpr uint32_t EVEN = 0x55555555;
        const uint32_t half0 = (v.bits & EVEN) | ((v.bits << 1) & ~EVEN), half1 = ((v.bits >> 1) & EVEN) | (v.bits & ~EVEN);
        // the 16 bits of digit t with their sign: PRMT repeats the sign of a byte whose index has 8 added
        uint32_t correction;
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(correction) : "r"(v.low), "r"(v.high), "r"(0x9910 + 0x2222 * v.t));
        // at most 3 * 256 and 3 * 128 from zero, so exact as the lowest bits of a float
        const int   start = (int) correction + TQ_FLOAT_START, second = v.t == 3 ? -2 : 2;
        const float sum   = v.t == 0 ? v.sum : 0.0f;
        int c[4] = {start, 0, start, 0};
        tq_mma_b1(c, w.codes, half0, half1);
        const float2 s[2] = {__half22float2(*(const half2 *) &w.scales.x), __half22float2(*(const half2 *) &w.scales.y)};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float f = __int_as_float(c[2 * r] + second * c[2 * r + 1]) - 12582912.0f;
            acc[r][0] += s[r].x * v.d * f;
            acc[r][0] += s[r].y * sum;
        }
    }

    // The lanes of a row together; all of a warp take part, and all have the sum.
    static __device__ __forceinline__ void finish(float (&acc)[2][RESULTS], int lane) {
        const float weight = (float) (1 << 2 * (lane & 3));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float v = acc[r][0] * weight;
            v += __shfl_xor_sync(~0u, v, 1);
            v += __shfl_xor_sync(~0u, v, 2);
            acc[r][0] = v;
        }
    }
};

template <int N> using tq_math = std::conditional_t<N == 1 && TQ_ONE_BY_BITS, tq_math_bits, tq_math_bytes<N>>;
