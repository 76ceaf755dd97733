// Checks the device functions of the CUDA backend (overlay's tq.cuh: dequantise, MMVQ dot products) on
// blocks packed here byte by byte as FORMAT.md says, against float64. Needs a patched llama.cpp tree:
//
//   nvcc -std=c++17 -O2 -arch=sm_90 --expt-relaxed-constexpr -extended-lambda -DGGML_CUDA_NO_VMM \
//        -I$TREE/ggml/include -I$TREE/ggml/src -I$TREE/ggml/src/ggml-cuda/tq/templates backend_check.cu -o backend_check
#include "tq.cuh"

#include <cmath>
#include <cstdio>
#include <vector>

constexpr int BLOCKS = 4096;

template <typename block> __global__ void dequantise(const block * b, float * y) {
    float2 v;
    dequantize_tq<block>(b, blockIdx.x, 2 * threadIdx.x, v);
    y[blockIdx.x * QK_TQ + 2 * threadIdx.x] = v.x;
    y[blockIdx.x * QK_TQ + 2 * threadIdx.x + 1] = v.y;
}
template <typename block> __global__ void dot(const block * b, const block_q8_1 * x, float * y) {
    int kbx = blockIdx.x;
    float v = vec_dot_tq_q8_1<block>(b, x + 4 * kbx, kbx, VDR_TQ_Q8_1_MMVQ * threadIdx.x);
    atomicAdd(y + kbx, v);
}

static void pack(block_tq2_1 & b, const int * c) {
    for (int l = 0; l < 32; l++) b.qs[l] = c[l] | c[32 + l] << 2 | c[64 + l] << 4 | c[96 + l] << 6;
}
static void pack(block_tq1_1 & b, const int * c) {
    for (int i = 0; i < 26; i++) {
        int fifth = i < 24 ? c[(i % 4) * 32 + 26 + i / 4] : 0;
        b.qs[i] = c[i] + 3 * c[32 + i] + 9 * c[64 + i] + 27 * c[96 + i] + 81 * fifth;
    }
}
static void scales(block_tq2_1 & b, float a, float m) { b.am = __floats2half2_rn(a, m); }
static void scales(block_tq1_1 & b, float a, float m) { b.alpha = __float2half(a); b.mu = __float2half(m); }
static float2 get(const block_tq2_1 & b) { return __half22float2(b.am); }
static float2 get(const block_tq1_1 & b) { return make_float2(__half2float(b.alpha), __half2float(b.mu)); }

template <typename block> static int check(const char * name) {
    std::vector<block> w(BLOCKS);
    std::vector<block_q8_1> x(4 * BLOCKS);
    std::vector<int> c(QK_TQ * BLOCKS);
    unsigned s = 1;
    auto rnd = [&]() { s = s * 1664525u + 1013904223u; return s >> 8; };
    for (int b = 0; b < BLOCKS; b++) {
        for (int e = 0; e < QK_TQ; e++) c[b * QK_TQ + e] = b < 3 ? b : rnd() % 3;
        pack(w[b], &c[b * QK_TQ]);
        scales(w[b], b == 3 ? 0.0f : (rnd() % 1000) * 1e-4f, ((int) (rnd() % 1000) - 500) * 1e-4f);
        for (int p = 0; p < 4; p++) {
            float d = (rnd() % 1000) * 1e-3f, sum = 0;
            for (int i = 0; i < 32; i++) { x[4 * b + p].qs[i] = b == 4 ? -127 : (int) (rnd() % 255) - 127; sum += x[4 * b + p].qs[i]; }
            d = __half2float(__float2half(d));
            x[4 * b + p].ds = __floats2half2_rn(d, d * sum);
        }
    }
    block * dw; block_q8_1 * dx; float *dy, *dd;
    cudaMalloc(&dw, sizeof(block) * BLOCKS); cudaMalloc(&dx, sizeof(block_q8_1) * 4 * BLOCKS);
    cudaMalloc(&dy, 4 * QK_TQ * BLOCKS); cudaMalloc(&dd, 4 * BLOCKS);
    cudaMemcpy(dw, w.data(), sizeof(block) * BLOCKS, cudaMemcpyHostToDevice);
    cudaMemcpy(dx, x.data(), sizeof(block_q8_1) * 4 * BLOCKS, cudaMemcpyHostToDevice);
    cudaMemset(dy, 0xff, 4 * QK_TQ * BLOCKS); cudaMemset(dd, 0, 4 * BLOCKS);
    dequantise<block><<<BLOCKS, 64>>>(dw, dy);
    dot<block><<<BLOCKS, QK_TQ / 16 / VDR_TQ_Q8_1_MMVQ>>>(dw, dx, dd);
    std::vector<float> y(QK_TQ * BLOCKS), d(BLOCKS);
    if (cudaMemcpy(y.data(), dy, 4 * QK_TQ * BLOCKS, cudaMemcpyDeviceToHost) != cudaSuccess ||
        cudaMemcpy(d.data(), dd, 4 * BLOCKS, cudaMemcpyDeviceToHost) != cudaSuccess) { printf("%s: CUDA error\n", name); return 1; }
    int wrong = 0;
    double worst = 0;
    for (int b = 0; b < BLOCKS; b++) {
        float2 am = get(w[b]);
        double ref = 0, norm = 0;
        for (int e = 0; e < QK_TQ; e++) {
            int t = c[b * QK_TQ + e] - 1;
            wrong += !(y[b * QK_TQ + e] == fmaf(t, am.x, am.y));
            float2 ds = __half22float2(x[4 * b + e / 32].ds);
            double v = (double) am.x * t * ds.x * x[4 * b + e / 32].qs[e % 32];
            ref += v; norm += fabs(v);
        }
        for (int p = 0; p < 4; p++) {
            float2 ds = __half22float2(x[4 * b + p].ds);
            // the templates see c, so -alpha meets the rounded sum where t meets the exact one
            double exact = 0;
            for (int i = 0; i < 32; i++) exact += x[4 * b + p].qs[i];
            ref += (double) am.y * ds.y - (double) am.x * (ds.y - ds.x * exact);
            norm += fabs((double) am.y * ds.y);
        }
        worst = fmax(worst, fabs(d[b] - ref) / (norm + 1e-30));
    }
    printf("%s: %d of %d weights wrong, worst dot error %.1e\n", name, wrong, QK_TQ * BLOCKS, worst);
    return wrong || !(worst < 1e-5);
}
int main() { return check<block_tq2_1>("tq2_1") + check<block_tq1_1>("tq1_1"); }
