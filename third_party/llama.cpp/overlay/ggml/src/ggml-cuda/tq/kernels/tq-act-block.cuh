#pragma once

// The rounding of a block of 128 activations to int8, in the layouts of tq-kernels.cuh.
//
// A group of sixteen threads shares a block of one token, columns 4s .. 4s + 3 and 64 + 4s .. 67 + 4s for
// thread s: the block's largest magnitude and its sums are four shuffles away, and each thread has two whole
// words of the layouts of bytes.

#include "tq-kernels.cuh"

constexpr int   TQ_ACT_LANES = 16;     // threads that share a block of 128 columns
constexpr float TQ_ACT_TINY  = 1e-30f; // smaller blocks are zero, as on the CPU

// p points at the thread's first column. 16-byte accesses where pointers and strides allow them, which is nearly always.
static __device__ __forceinline__ void tq_load8(const float * p, bool vec, float (&v)[8]) {
    if (vec) {
        *reinterpret_cast<float4 *>(v + 0) = *reinterpret_cast<const float4 *>(p);
        *reinterpret_cast<float4 *>(v + 4) = *reinterpret_cast<const float4 *>(p + 64);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[i]     = p[i];
            v[i + 4] = p[i + 64];
        }
    }
}

static __device__ __forceinline__ void tq_store8(float * p, bool vec, const float (&v)[8]) {
    if (vec) {
        *reinterpret_cast<float4 *>(p)      = *reinterpret_cast<const float4 *>(v + 0);
        *reinterpret_cast<float4 *>(p + 64) = *reinterpret_cast<const float4 *>(v + 4);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            p[i]      = v[i];
            p[i + 64] = v[i + 4];
        }
    }
}

static __device__ __forceinline__ float tq_sum_lanes(float x) {
#pragma unroll
    for (int o = TQ_ACT_LANES / 2; o; o >>= 1) {
        x += __shfl_xor_sync(~0u, x, o);
    }
    return x;
}

// The lowest bytes of four words.
static __device__ __forceinline__ int tq_pack4(unsigned a, unsigned b, unsigned c, unsigned d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Writes the layout of one column by bits, from the eight values of each thread (four bytes of plane p = s / 8, four of p + 2);
// all lanes of the warp take part. Thread s = 8u + 2t + h ends with words t of bits 4u + 2h and 4u + 2h + 1.
static __device__ __forceinline__ void tq_write_bits(const tq_act & out, int block, int s, uint32_t v0, uint32_t v2, float d, float sum,
                                                     bool write) {
    constexpr uint32_t EVEN = 0x55555555, PAIRS = 0x33333333, NIBBLES = 0x0f0f0f0f;
    const bool upper = s & 8, h = s & 1;

    // Sums of digits, two in a word: at most 3 * 128 each. The highest is made 0..3 by adding 2.
    const auto digits = [](uint32_t a, uint32_t b) { return ((a & 0x03030303) + (b & 0x03030303)) * 0x01010101u >> 24; };
    const uint32_t low  = digits(v0, v2) | digits(v0 >> 2, v2 >> 2) << 16;
    const uint32_t high = digits(v0 >> 4, v2 >> 4) | digits((v0 ^ 0x80808080) >> 6, (v2 ^ 0x80808080) >> 6) << 16;
    uint32_t total = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, 8);
#pragma unroll
    for (int o = 4; o; o >>= 1) {
        total += __shfl_xor_sync(~0u, total, o);
    }

    // Bits 0..3 of all four p to the lower eight threads, bits 4..7 to the upper: a nibble of `even` has four bits of p = 0 or 2.
    const uint32_t nibbles_low  = (v0 & NIBBLES) | (v2 & NIBBLES) << 4;
    const uint32_t nibbles_high = (v0 >> 4 & NIBBLES) | (v2 & ~NIBBLES);
    const uint32_t there = __shfl_xor_sync(~0u, upper ? nibbles_low : nibbles_high, 8);
    const uint32_t even  = upper ? there : nibbles_low;
    const uint32_t odd   = upper ? nibbles_high : there;
    // Two bits of each p side by side, the first two of them (both halves) to h = 0, the others to h = 1.
    const uint32_t first  = (even & PAIRS) | (odd & PAIRS) << 2;
    const uint32_t second = (even >> 2 & PAIRS) | (odd & ~PAIRS);
    const uint32_t beside = __shfl_xor_sync(~0u, h ? first : second, 1);
    const uint32_t half0  = h ? beside : first;
    const uint32_t half1  = h ? second : beside;
    if (!write) {
        return;
    }
    uint32_t * q = reinterpret_cast<uint32_t *>(out.q) + (size_t) block * (TQ_BLOCK / 4) + (4 * upper + 2 * h) * 4 + s % 8 / 2;
    q[0] = (half0 & EVEN) | (half1 & EVEN) << 1;
    q[4] = (half0 >> 1 & EVEN) | (half1 & ~EVEN);
    uint32_t * head = reinterpret_cast<uint32_t *>(static_cast<tq_act_head *>(out.aux) + block);
    if (s == 0) {
        *reinterpret_cast<float2 *>(head) = make_float2(d, sum);
    }
    if (s % 8 == 0) {
        const uint32_t added = upper ? 2 * TQ_BLOCK : 0;
        head[2 + upper] = ((0u - total) & 0xffff) | (added - (total >> 16)) << 16;
    }
}

// Rounds the thread's columns of a block and writes them; all lanes of the warp take part, those with !write in the
// shuffles only.
template <bool PREFILL>
static __device__ __forceinline__ void tq_write_block(const tq_act & out, int token, int block, int s, const float (&v)[8], bool write) {
    // as integers, magnitudes order like floats, with infinity and NaN on top (and no fast-math surprises)
    unsigned top = 0;
    float    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        top = max(top, __float_as_uint(v[i]) & 0x7fffffffu);
        sum += v[i];
    }
#pragma unroll
    for (int o = TQ_ACT_LANES / 2; o; o >>= 1) {
        top = max(top, __shfl_xor_sync(~0u, top, o));
    }
    sum = tq_sum_lanes(sum);

    const bool  bad  = top >= 0x7f800000u;
    const float amax = __uint_as_float(top);
    const bool  none = bad || amax < TQ_ACT_TINY;
    const float nan  = __uint_as_float(0x7fffffffu);
    const float inv  = none ? 0.0f : __fdiv_rn(127.0f, amax);
    const float d    = bad ? nan : none ? 0.0f : __fdiv_rn(amax, 127.0f);
    sum              = bad ? nan : none ? 0.0f : sum;

    // 1.5 * 2^23 added to a small float leaves it rounded to nearest even in the lowest bits; unlike a conversion this is
    // an ordinary addition, and the bytes need no masks
    constexpr unsigned MAGIC = 0x4b400000;
    unsigned q[8];
    unsigned total = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        q[i] = __float_as_uint(__fadd_rn(__fmul_rn(v[i], inv), __uint_as_float(MAGIC)));
        total += q[i];
    }
    const int words[2] = { // what is not finite must not leave traces
        bad ? 0 : PREFILL ? tq_pack4(q[0], q[4], q[1], q[5]) : tq_pack4(q[0], q[1], q[2], q[3]),
        bad ? 0 : PREFILL ? tq_pack4(q[2], q[6], q[3], q[7]) : tq_pack4(q[4], q[5], q[6], q[7]),
    };
    if constexpr (!PREFILL) {
        if (TQ_ONE_BY_BITS && out.cols == 1) {
            tq_write_bits(out, block, s, words[0], words[1], d, sum, write);
            return;
        }
#pragma unroll
        for (int o = TQ_ACT_LANES / 2; o; o >>= 1) {
            total += __shfl_xor_sync(~0u, total, o);
        }
    }
    if (!write) {
        return;
    }

    if constexpr (PREFILL) {
        const int width = min(out.cols, TQ_PREFILL_BN);
        const int group = token / TQ_PREFILL_BN;
        const int k     = token % TQ_PREFILL_BN;
        uint8_t * record = out.q + ((size_t) group * out.nb + block) * tq_record_bytes(width);
        *reinterpret_cast<int *>(record + tq_record_q(width, 4 * s + 0, k)) = words[0];
        *reinterpret_cast<int *>(record + tq_record_q(width, 4 * s + 2, k)) = words[1];
        if (s == 0) {
            reinterpret_cast<float *>(record + width * TQ_BLOCK)[tq_record_d(k)] = d;
            const unsigned high = __float_as_uint(sum) & ~0x1fffu;
            float * sums = static_cast<float *>(out.aux) + tq_sums_at(width, group, out.nb, block, k);
            sums[0] = __uint_as_float(high);
            sums[2] = (high & 0x7f800000u) == 0x7f800000u ? 0.0f : sum - __uint_as_float(high);
        }
    } else {
        const int plane = s / 8; // and plane + 2
        uint8_t * dst = out.q + ((size_t) block * 2 * out.cols + token) * 64 + s % 8 / 2 * 16 + 8 * plane + s % 2 * 4;
        *reinterpret_cast<int *>(dst)                 = words[0];
        *reinterpret_cast<int *>(dst + out.cols * 64) = words[1];
        if (s == 0) {
            const tq_act_head head{d, sum, bad ? 0 : (int) (TQ_BLOCK * MAGIC - total), 0}; // modulo 2^32
            *reinterpret_cast<int4 *>(static_cast<tq_act_head *>(out.aux) + (size_t) block * out.cols + token) =
                *reinterpret_cast<const int4 *>(&head);
        }
    }
}

static __device__ __forceinline__ float tq_silu(float x) {
    return x / (1.0f + expf(-x));
}

static __device__ __forceinline__ float tq_gelu(float x) {
    constexpr float SQRT_2_OVER_PI = 0.79788456080286535588f;
    return 0.5f * x * (1.0f + tanhf(SQRT_2_OVER_PI * x * (1.0f + 0.044715f * x * x)));
}

