// Into the layouts of math.cuh: activations (what a quantisation kernel does before each matrix) and
// weights (what conversion at load would do).
#pragma once
#include "math.cuh"

// ---- activations: float to the layouts above; one thread per element, one thread block per (block, token)
enum ActLayout { ACT_S8, ACT_B1, ACT_TQ1, ACT_TQ1_PLAIN };  // the last: base-3 order, x only

// Where element e of a block lies for the s8 fragments: [half][token][t] 16 bytes.
__device__ __forceinline__ size_t s8_offset(int b, int n, int tok, int e) {
    int plane = e >> 5, i = e & 31, t = i >> 3;
    return (((size_t) b * 2 + (plane >> 1)) * n + tok) * 64 + t * 16 + (plane & 1) * 8 + (i & 7);
}
// Where element e lies for the base-3 fragments: columns 2 tok (x) and 2 tok + 1 (the next digit's x).
__device__ __forceinline__ size_t tq1_offset(int b, int n, int col, int t, int word, int byte) {
    return (((size_t) b * 2 + (word >> 2)) * 2 * n + col) * 64 + t * 16 + (word & 3) * 4 + byte;
}
__device__ __forceinline__ void tq1_slot(int i, int & word, int & byte) {  // i = e % 32
    if (i >= 30) { word = 7; byte = i - 28; return; }
    int j = i / 5, k = i % 5;
    if (j < 4) { word = k; byte = j; return; }
    word = 5 + k / 2; byte = (k & 1) * 2 + (j - 4);
}

template <int LAYOUT>
__global__ void __launch_bounds__(128) quantize_act(const float * __restrict__ x, uint8_t * __restrict__ out,
                                                    ActHead * __restrict__ head, int K, int n, float * zero, int zeros) {
    __shared__ float s_max[4], s_sum[4]; __shared__ int s_isum[4]; __shared__ int8_t s_q[QK];
    pdl_launch();
    pdl_wait();
    for (int i = (blockIdx.y * gridDim.x + blockIdx.x) * 128 + threadIdx.x; i < zeros; i += gridDim.x * gridDim.y * 128) zero[i] = 0.0f;
    int b = blockIdx.x, tok = blockIdx.y, e = threadIdx.x, warp = e >> 5, lane = e & 31;
    float v = x[(size_t) tok * K + b * QK + e], amax = fabsf(v), sum = v;
    for (int o = 16; o; o >>= 1) { amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, o)); sum += __shfl_xor_sync(~0u, sum, o); }
    if (lane == 0) { s_max[warp] = amax; s_sum[warp] = sum; }
    __syncthreads();
    amax = fmaxf(fmaxf(s_max[0], s_max[1]), fmaxf(s_max[2], s_max[3]));
    float inv = amax > 0 ? 127.0f / amax : 0.0f;
    int q = __float2int_rn(v * inv), isum = __reduce_add_sync(~0u, q);
    if (lane == 0) s_isum[warp] = isum;
    s_q[e] = q;
    __syncthreads();
    if (e == 0)
        head[b * n + tok] = ActHead{amax / 127.0f, s_sum[0] + s_sum[1] + s_sum[2] + s_sum[3],
                                    -(s_isum[0] + s_isum[1] + s_isum[2] + s_isum[3]), 0};
    if (LAYOUT == ACT_S8) out[s8_offset(b, n, tok, e)] = q;
    if (LAYOUT == ACT_B1) {
        for (int bit = 0; bit < 8; bit++) {
            uint32_t m = __ballot_sync(~0u, (q >> bit) & 1);
            if (lane == bit) ((uint32_t *) out)[((size_t) b * n + tok) * 32 + bit * 4 + warp] = m;
        }
    }
    if (LAYOUT == ACT_TQ1_PLAIN) {
        int word, byte;
        tq1_slot(lane, word, byte);
        out[(((size_t) b * 2 + (word >> 2)) * n + tok) * 64 + warp * 16 + (word & 3) * 4 + byte] = q;
    }
    if (LAYOUT == ACT_TQ1) {
        int word, byte;
        tq1_slot(lane, word, byte);
        out[tq1_offset(b, n, 2 * tok, warp, word, byte)] = q;
        bool has_next = lane < 30 && lane % 5 < 4;
        out[tq1_offset(b, n, 2 * tok + 1, warp, word, byte)] = has_next ? s_q[e + 1] : 0;
    }
}

// ---- packers (what conversion at load would do; here from the unpacked codes) ------------------------
enum WeightLayout { W_FILE2, W_TILE2, W_TILE, W_PLANES, W_TILE1 }; // W_TILE: W_TILE2 with 2 as 11, the tile form of the backend

__device__ inline int code_at(const uint8_t * c, int M, int K, int row, int col) {
    return row < M ? c[(size_t) row * K + col] : 1;
}
// One warp per (tile or row, block).
template <int LAYOUT>
__global__ void pack(const uint8_t * c, const half2 * s, uint8_t * out, int M, int K) {
    int nb = K / QK, b = blockIdx.y, lane = threadIdx.x, g = lane >> 2, t = lane & 3;
    if (LAYOUT == W_FILE2) {
        int row = blockIdx.x; uint8_t * p = out + ((size_t) row * nb + b) * 36;
        if (lane == 0) *(half2 *) p = s[(size_t) row * nb + b];
        int v = 0;
        for (int k = 0; k < 4; k++) v |= code_at(c, M, K, row, b * QK + 32 * k + lane) << (2 * k);
        p[4 + lane] = v;
        return;
    }
    int tile = blockIdx.x, stride = LAYOUT == W_TILE1 ? 480 : 576;
    uint8_t * p = out + (size_t) tile * nb * stride;
    int rows[2] = {tile * 16 + g, tile * 16 + g + 8};
    p += (size_t) b * stride;
    int sc = LAYOUT == W_TILE1 ? 384 : 512;
    if (t < 2) {
        half2 z = rows[t] < M ? s[(size_t) rows[t] * nb + b] : __floats2half2_rn(0, 0);
        *(half2 *) (p + sc + g * 8 + t * 4) = z;
    }
    if (LAYOUT == W_TILE2 || LAYOUT == W_TILE)
        for (int half_ = 0; half_ < 2; half_++)
            for (int r = 0; r < 2; r++)
                for (int i = 0; i < 4; i++) {
                    int v = 0;
                    for (int k = 0; k < 4; k++) v |= code_at(c, M, K, rows[r], b * QK + 32 * k + 8 * t + 4 * half_ + i) << (2 * k);
                    p[lane * 16 + half_ * 8 + r * 4 + i] = LAYOUT == W_TILE ? v | (v >> 1 & 0x55) : v;
                }
    if (LAYOUT == W_PLANES)
        for (int r = 0; r < 2; r++) {
            uint32_t u = 0, v = 0;
            for (int i = 0; i < 32; i++) {
                int k = code_at(c, M, K, rows[r], b * QK + 32 * t + i);
                u |= (uint32_t) (k > 0) << i; v |= (uint32_t) (k > 1) << i;
            }
            uint32_t * w = (uint32_t *) (p + lane * 16);
            w[r] = u; w[2 + r] = v;
        }
    if (LAYOUT == W_TILE1) {
        int e = 0;
        for (int r = 0; r < 2; r++) {
            for (int j = 0; j < 6; j++) {
                int v = 0;
                for (int k = 0; k < 5; k++) v = v * 3 + code_at(c, M, K, rows[r], b * QK + 32 * t + 5 * j + k);
                v = (v * 256 + 242) / 243;
                if (j < 4) p[lane * 8 + r * 4 + j] = v;
                else p[256 + lane * 4 + (j - 4) * 2 + r] = v;
            }
            for (int i = 0; i < 2; i++) e |= code_at(c, M, K, rows[r], b * QK + 32 * t + 30 + i) << (4 * r + 2 * i);
        }
        p[448 + lane] = e;
    }
}
