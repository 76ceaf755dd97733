// Shared parts of the CUDA lab: weights made on the card, packers, float64 references, timing.
//
// A ternary matrix of M rows and K columns is  W[m][k] = alpha * (c - 1) + mu,  c in {0, 1, 2}, with
// one (alpha, mu) for each row and block of 128 columns. The lab keeps c unpacked (one byte each) as
// the truth, packs it into the layouts under test, and compares every kernel with a float64 sum.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CK(x)                                                                                      \
    do {                                                                                           \
        cudaError_t e_ = (x);                                                                      \
        if (e_ != cudaSuccess) {                                                                   \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e_));             \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

constexpr int QK = 128;        // columns in a block
constexpr int TILE_ROWS = 16;  // rows that one tensor-core instruction takes

// What one block of 128 activations of one token carries beside its int8 values.
struct alignas(16) ActHead {
    float d;        // x ~ d * q
    float sum;      // sum of x over the block (not of d * q: the mu term then has no rounding of x)
    int neg_isum;   // -sum(q): turns sum(c * q) into sum((c - 1) * q)
    int pad;
};

// The kinds of data that a kernel must survive.
enum Data { RANDOM, ALL_MINUS, ALL_PLUS, ALL_ZERO, HUGE_ALPHA, BIG_MU, X_ZERO_BLOCKS, X_EXTREME, N_DATA };
inline const char * data_name(int d) {
    static const char * names[] = {"random", "all -1", "all +1", "all 0", "huge alpha", "mu > alpha",
                                   "x zero blocks", "x extreme"};
    return names[d];
}

__host__ __device__ inline uint32_t hash32(uint64_t v) {
    v ^= v >> 33; v *= 0xff51afd7ed558ccdULL; v ^= v >> 33; v *= 0xc4ceb9fe1a85ec53ULL; v ^= v >> 33;
    return (uint32_t) v;
}
__host__ __device__ inline float unit(uint64_t v) { return hash32(v) * (1.0f / 4294967296.0f); }

__global__ void make_codes(uint8_t * c, size_t n, uint32_t seed, int data) {
    for (size_t i = blockIdx.x * (size_t) blockDim.x + threadIdx.x; i < n; i += (size_t) gridDim.x * blockDim.x) {
        uint32_t v = hash32(i * 2654435761ULL + seed) % 3;
        c[i] = data == ALL_MINUS ? 0 : data == ALL_PLUS ? 2 : data == ALL_ZERO ? 1 : v;
    }
}
__global__ void make_scales(half2 * s, size_t n, uint32_t seed, int data) {
    for (size_t i = blockIdx.x * (size_t) blockDim.x + threadIdx.x; i < n; i += (size_t) gridDim.x * blockDim.x) {
        float a = 0.01f + 0.05f * unit(i * 2 + seed), m = 0.01f * (unit(i * 2 + 1 + seed) - 0.5f);
        if (data == HUGE_ALPHA) a = 30000.0f * unit(i * 2 + seed);
        if (data == BIG_MU) m = (unit(i * 2 + 1 + seed) - 0.5f) * 4.0f;
        if (data == ALL_ZERO) a = 0.0f;
        s[i] = __floats2half2_rn(a, m);
    }
}
__global__ void make_x(float * x, size_t n, uint32_t seed, int data) {
    for (size_t i = blockIdx.x * (size_t) blockDim.x + threadIdx.x; i < n; i += (size_t) gridDim.x * blockDim.x) {
        float v = 0;
        for (int j = 0; j < 4; j++) v += unit(i * 4 + j + (uint64_t) seed * 7919) - 0.5f;
        if (hash32(i + seed) % 997 == 0) v *= 40.0f;  // outliers, as activations have them
        if (data == X_ZERO_BLOCKS && (i / QK) % 2) v = 0;
        if (data == X_EXTREME) v = (hash32(i) & 1) ? 127.0f : -127.0f;
        x[i] = v;
    }
}

// y[n][m] in float64: from x itself (y_true) and from the int8 activations that the kernels see.
__global__ void reference(const uint8_t * c, const half2 * s, const float * x, const int8_t * q, const ActHead * head,
                          int M, int K, double * y_true, double * y_quant) {
    int m = blockIdx.x, n = blockIdx.y, nb = K / QK;
    __shared__ double sh[2][128];
    double t = 0, u = 0;
    for (int b = 0; b < nb; b++) {
        int k = b * QK + threadIdx.x;
        double a = __low2float(s[(size_t) m * nb + b]), mu = __high2float(s[(size_t) m * nb + b]);
        int tern = (int) c[(size_t) m * K + k] - 1;
        t += (a * tern + mu) * x[(size_t) n * K + k];
        u += a * tern * ((double) head[n * nb + b].d * q[(size_t) n * K + k]);
        if (threadIdx.x == 0) u += mu * head[n * nb + b].sum;
    }
    sh[0][threadIdx.x] = t; sh[1][threadIdx.x] = u;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < 128; i++) { t += sh[0][i]; u += sh[1][i]; }
        y_true[(size_t) n * M + m] = t; y_quant[(size_t) n * M + m] = u;
    }
}

// One warp per (token, block): plain int8 values [n][K] and heads [n][nb].
__global__ void quantize_plain(const float * x, int8_t * q, ActHead * head, int K) {
    int b = blockIdx.x, n = blockIdx.y, nb = K / QK, lane = threadIdx.x;
    const float * p = x + (size_t) n * K + b * QK;
    float v[4], amax = 0, sum = 0;
    for (int i = 0; i < 4; i++) { v[i] = p[lane + 32 * i]; amax = fmaxf(amax, fabsf(v[i])); sum += v[i]; }
    for (int o = 16; o; o >>= 1) { amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, o)); sum += __shfl_xor_sync(~0u, sum, o); }
    float d = amax / 127.0f, inv = amax > 0 ? 127.0f / amax : 0.0f;
    int isum = 0;
    for (int i = 0; i < 4; i++) {
        int r = __float2int_rn(v[i] * inv);
        q[(size_t) n * K + b * QK + lane + 32 * i] = r; isum += r;
    }
    for (int o = 16; o; o >>= 1) isum += __shfl_xor_sync(~0u, isum, o);
    if (lane == 0) head[n * nb + b] = ActHead{d, sum, -isum, 0};
}

struct Problem {
    int M, K, N, nb, tiles;
    uint8_t * codes; half2 * scales; float * x; int8_t * q; ActHead * head; double *y_true, *y_quant;
    // x_seed: for matrices that share their input; else it follows from `seed`
    Problem(int M_, int K_, int N_, int data, uint32_t seed, uint32_t x_seed = 0) : M(M_), K(K_), N(N_), nb(K_ / QK), tiles((M_ + 15) / 16) {
        CK(cudaMalloc(&codes, (size_t) M * K)); CK(cudaMalloc(&scales, (size_t) M * nb * sizeof(half2)));
        CK(cudaMalloc(&x, (size_t) N * K * 4)); CK(cudaMalloc(&q, (size_t) N * K));
        CK(cudaMalloc(&head, (size_t) N * nb * sizeof(ActHead)));
        CK(cudaMalloc(&y_true, (size_t) N * M * 8)); CK(cudaMalloc(&y_quant, (size_t) N * M * 8));
        make_codes<<<1024, 256>>>(codes, (size_t) M * K, seed, data);
        make_scales<<<1024, 256>>>(scales, (size_t) M * nb, seed + 1, data);
        make_x<<<256, 256>>>(x, (size_t) N * K, x_seed ? x_seed : seed + 2, data);
        quantize_plain<<<dim3(nb, N), 32>>>(x, q, head, K);
        reference<<<dim3(M, N), 128>>>(codes, scales, x, q, head, M, K, y_true, y_quant);
        CK(cudaDeviceSynchronize());
    }
    ~Problem() { cudaFree(codes); cudaFree(scales); cudaFree(x); cudaFree(q); cudaFree(head); cudaFree(y_true); cudaFree(y_quant); }
};

struct Errors { double vs_quant, vs_true; bool unwritten; };

// ||y - ref|| / ||ref|| over n tokens; NaN (the poison) anywhere counts as unwritten.
inline Errors compare(const float * y_dev, const Problem & p, int n) {
    size_t cnt = (size_t) n * p.M;
    std::vector<float> y(cnt); std::vector<double> a(cnt), b(cnt);
    CK(cudaMemcpy(y.data(), y_dev, cnt * 4, cudaMemcpyDeviceToHost));
    CK(cudaMemcpy(a.data(), p.y_quant, cnt * 8, cudaMemcpyDeviceToHost));
    CK(cudaMemcpy(b.data(), p.y_true, cnt * 8, cudaMemcpyDeviceToHost));
    double eq = 0, et = 0, nq = 1e-300, nt = 1e-300; bool bad = false;
    for (size_t i = 0; i < cnt; i++) {
        bad |= !(y[i] == y[i]);
        eq += (y[i] - a[i]) * (y[i] - a[i]); nq += a[i] * a[i];
        et += (y[i] - b[i]) * (y[i] - b[i]); nt += b[i] * b[i];
    }
    return {std::sqrt(eq / nq), std::sqrt(et / nt), bad};
}

// Microseconds of one call, calls replayed `count` to a CUDA graph: median of `reps` replays.
inline double time_graph(int count, const std::function<void(int, cudaStream_t)> & call, int reps = 9) {
    cudaStream_t st; CK(cudaStreamCreate(&st));
    cudaGraph_t g; cudaGraphExec_t ge;
    CK(cudaStreamBeginCapture(st, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < count; i++) call(i, st);
    CK(cudaStreamEndCapture(st, &g));
    CK(cudaGraphInstantiate(&ge, g, 0));
    cudaEvent_t e0, e1; cudaEventCreate(&e0); cudaEventCreate(&e1);
    std::vector<float> t;
    for (int r = 0; r < reps + 2; r++) {
        CK(cudaEventRecord(e0, st)); CK(cudaGraphLaunch(ge, st)); CK(cudaEventRecord(e1, st));
        CK(cudaStreamSynchronize(st));
        float ms; cudaEventElapsedTime(&ms, e0, e1);
        if (r >= 2) t.push_back(ms);
    }
    std::sort(t.begin(), t.end());
    cudaGraphExecDestroy(ge); cudaGraphDestroy(g); cudaStreamDestroy(st); cudaEventDestroy(e0); cudaEventDestroy(e1);
    return t[t.size() / 2] * 1e3 / count;
}

// Launch with or without programmatic dependent launch (the next kernel may start before this ends).
template <class... P, class... A>
void launch(bool pdl, void (*f)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t st, A... args) {
    cudaLaunchConfig_t cfg = {};
    cfg.gridDim = grid; cfg.blockDim = block; cfg.dynamicSmemBytes = shared; cfg.stream = st;
    cudaLaunchAttribute at[1];
    at[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    at[0].val.programmaticStreamSerializationAllowed = 1;
    cfg.attrs = at; cfg.numAttrs = pdl ? 1 : 0;
    CK(cudaLaunchKernelEx(&cfg, f, P(args)...));
}

__global__ void __launch_bounds__(512) stream_read(const uint4 * p, size_t n, int * o) {
    size_t i = blockIdx.x * (size_t) blockDim.x + threadIdx.x, s = (size_t) gridDim.x * blockDim.x;
    uint32_t x = 0;
    for (; i + 3 * s < n; i += 4 * s) {
        uint4 a = __ldcs(p + i), b = __ldcs(p + i + s), c = __ldcs(p + i + 2 * s), d = __ldcs(p + i + 3 * s);
        x ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; i < n; i += s) { uint4 a = __ldcs(p + i); x ^= a.x ^ a.y ^ a.z ^ a.w; }
    if (x == 0x12345) o[0] = x;
}
