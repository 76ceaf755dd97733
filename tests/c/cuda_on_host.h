// As much of CUDA as the tile-form kernels use, one thread after the other on the CPU. The test that includes a kernel's
// source rewrites its launches to launch_on_host(). No shuffles, no barriers: a kernel that needs them is not for this.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct HostIndex {
    unsigned x;
};
inline HostIndex blockIdx, threadIdx, blockDim, gridDim;
using cudaStream_t = void *;

template <typename F> void launch_on_host(unsigned blocks, unsigned threads, size_t, cudaStream_t, F body) {
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) body();
}

inline void atomicAnd(uint32_t * p, uint32_t v) { *p &= v; }
inline void atomicOr(uint32_t * p, uint32_t v) { *p |= v; }

struct float2 {
    float x, y;
};
struct half {
    uint16_t bits;
};
struct half2 {
    half x, y;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline float host_half(half h) {
    const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
    const float v = exponent ? ldexpf(1024.0f + fraction, exponent - 25) : ldexpf((float) fraction, -24);
    return h.bits & 0x8000 ? -v : v; // infinity and NaN are not needed here
}
inline float2 __half22float2(half2 v) { return { host_half(v.x), host_half(v.y) }; }
inline half __float2half(float v) {
    int exponent;
    frexpf(v, &exponent);
    exponent = exponent < -13 ? -13 : exponent;                      // subnormal below 2^-14
    const int q = (int) nearbyintf(ldexpf(fabsf(v), 11 - exponent)); // 1024..2048, less where subnormal
    const int bits = q + ((exponent + 13) << 10);                    // q = 2048 carries into the exponent
    return { (uint16_t) (bits | (v < 0 ? 0x8000 : 0)) };
}
inline __nv_bfloat16 __float2bfloat16(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    return { (uint16_t) ((u + 0x7fff + (u >> 16 & 1)) >> 16) };
}
