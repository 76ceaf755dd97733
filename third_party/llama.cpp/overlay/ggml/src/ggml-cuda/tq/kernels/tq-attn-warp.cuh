#pragma once

// What a warp of tq-attn.cu does by itself: its step of sixteen keys on their way to registers, and the instructions.

#include "tq-attn.cuh"

namespace {

constexpr int KEYS = 16; // of a warp's step
constexpr unsigned short HIDDEN = 0xfc00; // -infinity

// exp2; 0 for -infinity
__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ unsigned shared_address(const void * p) { return (unsigned) __cvta_generic_to_shared(p); }

// A plain load: the memory may have been written while this kernel already ran.
__device__ __forceinline__ void load16(const uint8_t * p, unsigned (&w)[4]) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p) : "memory");
}

// Two floats as f16, and as f16 what that leaves of them.
__device__ __forceinline__ void split(float x, float y, unsigned & high, unsigned & low) {
    const half2  h    = __floats2half2_rn(x, y);
    const float2 back = __half22float2(h);
    const half2  l    = __floats2half2_rn(x - back.x, y - back.y);
    high = *reinterpret_cast<const unsigned *>(&h);
    low  = *reinterpret_cast<const unsigned *>(&l);
}

__device__ __forceinline__ void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// What a lane (g, t) = (lane / 4, lane % 4) holds of a warp's sixteen keys.
struct key_words   { unsigned w[2][4][4]; }; // keys g and 8 + g: dimensions 32j + 8t .. + 7
struct value_words { unsigned w[4][2][4]; }; // keys 2t, 2t + 1, 2t + 8, 2t + 9: dimensions 64h + 8g .. + 7
struct mask_words  { unsigned short w[4]; }; // of query g for these four keys

__device__ __forceinline__ int value_key(int t, int i) { return 2 * t + i % 2 + i / 2 * 8; }

// p: where lane (g, t) begins to read, key first + g, dimension 8t.
__device__ __forceinline__ void load_keys(const tq_attention & a, const uint8_t * p, int first, int g, key_words & to) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const bool there = first + 8 * i + g < a.keys;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (there) {
                load16(p + (unsigned) (8 * i * (int) a.k_key) + 64 * j, to.w[i][j]);
            } else {
                to.w[i][j][0] = to.w[i][j][1] = to.w[i][j][2] = to.w[i][j][3] = 0;
            }
        }
    }
}

// p: key first + 2t, dimension 8g.
__device__ __forceinline__ void load_values(const tq_attention & a, const uint8_t * p, int first, int t, value_words & to) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const bool there = first + value_key(t, i) < a.keys;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (there) {
                load16(p + (unsigned) (value_key(0, i) * (int) a.v_key) + 128 * h, to.w[i][h]);
            } else {
                to.w[i][h][0] = to.w[i][h][1] = to.w[i][h][2] = to.w[i][h][3] = 0;
            }
        }
    }
}

// 32 bits are enough: tq_attention_fits.
__device__ __forceinline__ unsigned offset(int key, int64_t stride) { return (unsigned) key * (unsigned) stride; }

// Into L2: each lane a line of 128 bytes of a key and one of a value.
__device__ __forceinline__ void fetch_ahead(const tq_attention & a, const uint8_t * k, const uint8_t * v, int first, int lane) {
    const int key = first + lane / 2;
    if (key < a.keys) {
        asm volatile("prefetch.global.L2 [%0];" :: "l"(k + offset(key, a.k_key) + lane % 2 * 128));
        asm volatile("prefetch.global.L2 [%0];" :: "l"(v + offset(key, a.v_key) + lane % 2 * 128));
    }
}

// `mask` is null where there is none; no key is seen without a query.
__device__ __forceinline__ void load_mask(const tq_attention & a, const half * mask, bool query, int first, int t, mask_words & to) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int key = first + value_key(t, i);
        to.w[i] = query && key < a.keys ? 0 : HIDDEN;
        if (mask && to.w[i] == 0) {
            to.w[i] = *reinterpret_cast<const volatile unsigned short *>(mask + key);
        }
    }
}

__device__ __forceinline__ bool seen(const mask_words & m) {
    return m.w[0] != HIDDEN || m.w[1] != HIDDEN || m.w[2] != HIDDEN || m.w[3] != HIDDEN;
}

} // namespace
