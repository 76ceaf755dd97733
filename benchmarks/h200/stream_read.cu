// How fast can this GPU's memory be read? Decode at batch 1 is held against this rate.
//
//   nvcc -O3 -cudart static -arch=sm_90 -o stream_read stream_read.cu && ./stream_read
//
// Reads a buffer of 4 GiB (or of as many GiB as the first argument says), which no cache holds, with
// 16-byte loads, four in flight a thread, and does nothing else; for several sizes of the grid, since the
// best differs between cards. The buffer is written first, each word with another value. The best of the
// passes counts: whatever disturbs only makes it slower. The last line is for `pt2-bench
// --bandwidth-program`.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>

#define CHECK(call)                                                                                 \
    do {                                                                                            \
        cudaError_t error = (call);                                                                 \
        if (error != cudaSuccess) {                                                                 \
            fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error));                          \
            exit(1);                                                                                \
        }                                                                                           \
    } while (0)

constexpr int THREADS = 512;
constexpr int PASSES  = 8;

__global__ void fill(uint4 * data, size_t n) {
    size_t step = (size_t) gridDim.x * blockDim.x;
    for (size_t i = blockIdx.x * (size_t) blockDim.x + threadIdx.x; i < n; i += step) {
        uint32_t v = (uint32_t) i * 2654435761u;
        data[i] = make_uint4(v, v ^ 0x9e3779b9u, v + 0x85ebca6bu, ~v);
    }
}

__device__ uint32_t mix(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }

__global__ void __launch_bounds__(THREADS) read(const uint4 * data, size_t n, uint32_t * sink) {
    size_t step = (size_t) gridDim.x * blockDim.x;
    size_t i = blockIdx.x * (size_t) blockDim.x + threadIdx.x;
    uint32_t sum = 0;
    for (; i + 3 * step < n; i += 4 * step) {
        uint4 a = __ldcs(data + i), b = __ldcs(data + i + step);
        uint4 c = __ldcs(data + i + 2 * step), d = __ldcs(data + i + 3 * step);
        sum ^= mix(a) ^ mix(b) ^ mix(c) ^ mix(d);
    }
    for (; i < n; i += step) sum ^= mix(__ldcs(data + i));
    if (sum == 0x12345678u) *sink = sum;  // so that the loads are not left out
}

int main(int argc, char ** argv) {
    double gib = argc > 1 ? atof(argv[1]) : 4;
    if (!(gib > 0)) {
        fprintf(stderr, "usage: %s [GiB to read]\n", argv[0]);
        return 2;
    }
    size_t n = (size_t) (gib * (1 << 30)) / sizeof(uint4);
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    uint4 * data;
    uint32_t * sink;
    CHECK(cudaMalloc(&data, n * sizeof(uint4)));
    CHECK(cudaMalloc(&sink, sizeof(uint32_t)));
    fill<<<device.multiProcessorCount * 4, THREADS>>>(data, n);
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
    cudaEvent_t start, stop;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    double best = 0;
    for (int per_sm = 1; per_sm <= 4; per_sm *= 2) {
        for (int pass = 0; pass <= PASSES; pass++) {
            CHECK(cudaEventRecord(start));
            read<<<device.multiProcessorCount * per_sm, THREADS>>>(data, n, sink);
            CHECK(cudaGetLastError());
            CHECK(cudaEventRecord(stop));
            CHECK(cudaEventSynchronize(stop));
            float ms;
            CHECK(cudaEventElapsedTime(&ms, start, stop));
            double rate = n * sizeof(uint4) / (ms * 1e-3);
            if (pass > 0 && rate > best) best = rate;  // the first pass warms up
        }
    }
    printf("{\"bytes_per_second\": %.0f, \"method\": \"stream_read.cu over %zu MiB on %s, best of %d passes\"}\n",
           best, n * sizeof(uint4) >> 20, device.name, 3 * PASSES);
    return 0;
}
