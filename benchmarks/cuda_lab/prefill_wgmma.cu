// Prefill lab, second part: wgmma (sm_90a). Weights are unpacked into registers (A), activations lie in
// shared memory as the tensor cores want them (B), so nothing is read through the load pipe but scales.
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o prefill_wgmma prefill_wgmma.cu
//   ./prefill_wgmma check && ./prefill_wgmma bench
#include "decode.cuh"

constexpr int BN = 128;
constexpr int Q_BYTES = BN * QK;              // one block of 128 columns for BN tokens
constexpr int RECORD = Q_BYTES + BN * 4 * 2;  // then d[BN] (float) and MAGIC_INT - sum(q) [BN] (int)

// B for one m64nNk32: two core matrices (8 tokens x 16 bytes, 128 bytes) along K, BN / 8 along N.
__device__ __forceinline__ uint64_t b_descriptor(const void * p) {
    constexpr uint64_t along_k = (BN / 8) * 128, along_n = 128;
    return (uint64_t) ((smem_addr(p) >> 4) & 0x3fff) | ((along_k >> 4) << 16) | ((along_n >> 4) << 32);
}

#define R4(c, i) "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3])
#define R16(c, i) R4(c, i), R4(c, i + 4), R4(c, i + 8), R4(c, i + 12)
// 64 rows x 128 tokens x 32 columns. A comes from
// registers and is read once an instruction, so the widest form is taken.
__device__ __forceinline__ void wgmma_n128(int (&c)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t desc) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
        "{%64,%65,%66,%67}, %68, p;\n}"
        : R16(c, 0), R16(c, 16), R16(c, 32), R16(c, 48) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(desc));
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Keeps the compiler from moving reads or writes of these registers across this point.
template <class T, int N> __device__ __forceinline__ void hold(T (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(c[i])::"memory");
}

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// grid (row tiles of 64 * WGS, token tiles of BN, splits of K)
template <class Format, int WGS, int S>
__global__ void __launch_bounds__(WGS * 128, 1)
prefill(const uint8_t * __restrict__ weights, const uint8_t * __restrict__ x, const float * __restrict__ sums,
        float * __restrict__ y, int M, int nb, int n, int add) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ uint64_t full[S], empty[S];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int b_lo = (int) ((long) nb * blockIdx.z / gridDim.z), b_hi = (int) ((long) nb * (blockIdx.z + 1) / gridDim.z), count = b_hi - b_lo;
    int col0 = blockIdx.y * BN, tiles = (M + 15) / 16, tile = blockIdx.x * (WGS * 4) + warp;
    const uint8_t * src = x + ((size_t) blockIdx.y * nb + b_lo) * RECORD;
    auto fill = [&](int i) {
        mbar_expect(full + i % S, RECORD);
        bulk_copy(shared + (i % S) * RECORD, src + (size_t) i * RECORD, RECORD, full + i % S);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < S; i++) { mbar_init(full + i, 1); mbar_init(empty + i, WGS * 4); }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (int i = 0; i < S && i < count; i++) fill(i);
    }
    __syncthreads();
    float acc[2][8][4] = {};
    typename Format::W w;
    typename Format::Ptr ptr(weights, min(tile, tiles - 1), nb, lane, M);
    ptr.advance(b_lo);
    ptr.load(w, 0);
    for (int i = 0; i < count; i++) {
        uint32_t a[2][8];
        unpack_codes(a, w);
        Scales sc = unpack_scales(w.s);
        if (i + 1 < count) { ptr.advance(1); ptr.load(w, 0); }
        if (threadIdx.x == 0 && i >= 2 && i - 2 + S < count) {  // two behind: the others need not keep step
            mbar_wait(empty + (i - 2) % S, ((i - 2) / S) & 1);
            fill(i - 2 + S);
        }
        mbar_wait(full + i % S, (i / S) & 1);
        const uint8_t * st = shared + (i % S) * RECORD;
        const float2 * d = (const float2 *) (st + Q_BYTES) + t;
        const int2 * start = (const int2 *) (st + Q_BYTES + BN * 4) + t;
        int c[64];
#pragma unroll
        for (int j = 0; j < 16; j++) {
            int2 v = start[j * 4];
            c[4 * j] = c[4 * j + 2] = v.x;
            c[4 * j + 1] = c[4 * j + 3] = v.y;
        }
        hold(c); hold(a[0]); hold(a[1]);
        wgmma_fence();
#pragma unroll
        for (int p = 0; p < 4; p++)
            wgmma_n128(c, a[0][2 * p], a[1][2 * p], a[0][2 * p + 1], a[1][2 * p + 1], b_descriptor(st + p * 32 * BN));
        wgmma_commit();
        wgmma_wait<0>();
        hold(c);
#pragma unroll
        for (int j = 0; j < 16; j++) {
            float2 v = d[j * 4];
#pragma unroll
            for (int k = 0; k < 4; k++)
                acc[j >> 3][j & 7][k] += (sc.alpha[k >> 1] * ((k & 1) ? v.y : v.x)) * (__int_as_float(c[4 * j + k]) - MAGIC_FLOAT);
        }
        __syncwarp();
        if (lane == 0) mbar_arrive(empty + i % S);
    }
    // mu * sum(x): a product over the blocks, the sums split in two tf32 terms
    for (int b = b_lo; b < b_hi; b += 8) {
        uint32_t a[4];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            int bb = b + t + 4 * k;
            uint2 s = make_uint2(0, 0);
            if (bb < b_hi) s = *(const uint2 *) (weights + ((size_t) min(tile, tiles - 1) * nb + bb) * Format::STEP + Format::SCALES + g * 8);
            Scales v = unpack_scales(s);
            a[2 * k] = __float_as_uint(v.mu[0]); a[2 * k + 1] = __float_as_uint(v.mu[1]);
        }
#pragma unroll
        for (int j = 0; j < 16; j++) {
            uint32_t hi[2], lo[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                int bb = b + t + 4 * k;
                float v = bb < b_hi ? sums[(size_t) bb * n + col0 + j * 8 + g] : 0.0f;
                hi[k] = __float_as_uint(v) & 0xffffe000u;
                lo[k] = __float_as_uint(v - __uint_as_float(hi[k]));
            }
            mma_tf32(acc[j >> 3][j & 7], a, hi[0], hi[1]);
            mma_tf32(acc[j >> 3][j & 7], a, lo[0], lo[1]);
        }
    }
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int row = tile * 16 + g + 8 * (k >> 1), col = col0 + j * 8 + 2 * t + (k & 1);
            if (row >= M) continue;
            float v = acc[j >> 3][j & 7][k];
            if (add) atomicAdd(y + (size_t) col * M + row, v);
            else y[(size_t) col * M + row] = v;
        }
}

// One warp for each (block, token): lane l has elements 4l..4l+3. grid (nb, n / 8), 8 warps.
template <bool BASE3>
__global__ void __launch_bounds__(256) quantize_wgmma(const float * __restrict__ x, uint8_t * __restrict__ out,
                                                      float * __restrict__ sums, int K, int n) {
    int b = blockIdx.x, tok = blockIdx.y * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31, nb = K / QK;
    float4 v = *(const float4 *) (x + (size_t) tok * K + b * QK + lane * 4);
    float amax = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))), sum = v.x + v.y + v.z + v.w;
    for (int o = 16; o; o >>= 1) { amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, o)); sum += __shfl_xor_sync(~0u, sum, o); }
    float inv = amax > 0 ? 127.0f / amax : 0.0f;
    int q[4] = {__float2int_rn(v.x * inv), __float2int_rn(v.y * inv), __float2int_rn(v.z * inv), __float2int_rn(v.w * inv)};
    int isum = __reduce_add_sync(~0u, q[0] + q[1] + q[2] + q[3]), c = tok % BN;
    uint8_t * rec = out + ((size_t) (tok / BN) * nb + b) * RECORD;
    auto at = [&](int chunk, int byte) { return rec + chunk * (16 * BN) + (c / 8) * 128 + (c % 8) * 16 + byte; };
    if (!BASE3) {
        // elements 32p + 8t + r: chunk 2p + (r / 4), byte 4t + r % 4
        int p = lane >> 3, t = (lane & 7) >> 1;
        *(uint32_t *) at(2 * p + (lane & 1), 4 * t) = (q[0] & 255) | (q[1] & 255) << 8 | (q[2] & 255) << 16 | (uint32_t) (q[3] & 255) << 24;
    } else {
        for (int i = 0; i < 4; i++) {
            int e = lane * 4 + i, word, byte;
            tq1_slot(e & 31, word, byte);
            *at(word, 4 * (e >> 5) + byte) = q[i];
        }
    }
    if (lane == 0) {
        ((float *) (rec + Q_BYTES))[c] = amax / 127.0f;
        ((int *) (rec + Q_BYTES + BN * 4))[c] = MAGIC_INT - isum;
        sums[(size_t) b * n + tok] = sum;
    }
}

template <class Format, int WGS, int S>
void run_prefill(cudaStream_t st, const uint8_t * w, const uint8_t * x, const float * sums, float * y, int M, int nb, int n, int split) {
    static bool done = false;
    auto f = prefill<Format, WGS, S>;
    if (!done) { CK(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, S * RECORD)); done = true; }
    if (split > 1) CK(cudaMemsetAsync(y, 0, (size_t) M * n * 4, st));
    launch(false, f, dim3((M + 64 * WGS - 1) / (64 * WGS), n / BN, split), dim3(WGS * 128), S * RECORD, st, w, x, sums, y, M, nb, n, (int) (split > 1));
}

struct Variant {
    const char * name; bool one;
    void (*run)(cudaStream_t, const uint8_t *, const uint8_t *, const float *, float *, int, int, int, int);
};
static const Variant VARIANTS[] = {
    {"tq2 wgmma 128 rows", false, run_prefill<Tq2Tile, 2, 6>},
    {"tq2 wgmma 192 rows", false, run_prefill<Tq2Tile, 3, 6>},
    {"tq1 wgmma 128 rows", true, run_prefill<Tq1Tile, 2, 6>},
    {"tq1 wgmma 192 rows", true, run_prefill<Tq1Tile, 3, 6>},
};

int main(int argc, char ** argv) {
    bool bench = argc > 1 && std::string(argv[1]) == "bench", profile = argc > 1 && std::string(argv[1]) == "profile";  // profile: for ncu
    int bad = 0;
    std::vector<std::vector<int>> shapes = bench
        ? std::vector<std::vector<int>>{{4096, 4096}, {11008, 4096}, {4096, 11008}, {8192, 8192}, {22016, 8192}, {8192, 22016}, {44032, 8192}}
        : profile ? std::vector<std::vector<int>>{{22016, 8192}}
        : std::vector<std::vector<int>>{{128, 128}, {200, 1152}, {1000, 640}};
    printf("%-13s %-28s %4s %5s %9s %8s %9s\n", "rows x cols", "kernel", "n", "split", "us", "TOPS", "error");
    for (auto & sh : shapes)
        for (int n : {128, 512})
            for (int data = 0; data < (bench || profile ? 1 : (int) N_DATA); data++) {
                Problem p(sh[0], sh[1], n, data, 5 + data);
                uint8_t *w2, *w1, *x2, *x1; float *y, *sums;
                CK(cudaMalloc(&w2, (size_t) p.tiles * p.nb * 576)); CK(cudaMalloc(&w1, (size_t) p.tiles * p.nb * 480));
                size_t xb = (size_t) (n / BN) * p.nb * RECORD;
                CK(cudaMalloc(&x2, xb)); CK(cudaMalloc(&x1, xb));
                CK(cudaMalloc(&y, (size_t) p.M * n * 4)); CK(cudaMalloc(&sums, (size_t) p.nb * n * 4));
                pack<W_TILE2><<<dim3(p.tiles, p.nb), 32>>>(p.codes, p.scales, w2, p.M, p.K);
                pack<W_TILE1><<<dim3(p.tiles, p.nb), 32>>>(p.codes, p.scales, w1, p.M, p.K);
                quantize_wgmma<false><<<dim3(p.nb, n / 8), 256>>>(p.x, x2, sums, p.K, n);
                quantize_wgmma<true><<<dim3(p.nb, n / 8), 256>>>(p.x, x1, sums, p.K, n);
                CK(cudaDeviceSynchronize());
                for (auto & v : VARIANTS)
                    for (int split : {1, 2, 3, 4, 6}) {
                        if (split > p.nb || (profile && split != (n == 128 ? 3 : 1))) continue;
                        CK(cudaMemset(y, 0xff, (size_t) p.M * n * 4));
                        const uint8_t *w = v.one ? w1 : w2, *x = v.one ? x1 : x2;
                        v.run(0, w, x, sums, y, p.M, p.nb, n, split);
                        CK(cudaDeviceSynchronize());
                        Errors e = compare(y, p, n);
                        bool ok = !e.unwritten && e.vs_quant < 2e-6;
                        bad += !ok;
                        if (!ok) printf("FAIL %s %dx%d n=%d split %d %s: %.2e%s\n", v.name, p.M, p.K, n, split, data_name(data), e.vs_quant, e.unwritten ? " UNWRITTEN" : "");
                        if (!bench) continue;
                        double us = time_graph(10, [&](int, cudaStream_t st) { v.run(st, w, x, sums, y, p.M, p.nb, n, split); }, 5);
                        printf("%5dx%-7d %-28s %4d %5d %9.2f %8.1f %9.1e\n", p.M, p.K, v.name, n, split, us, 2.0 * p.M * p.K * n / us / 1e6, e.vs_quant);
                    }
                if (bench) {
                    double us = time_graph(10, [&](int, cudaStream_t st) { launch(false, quantize_wgmma<false>, dim3(p.nb, n / 8), 256, 0, st, p.x, x2, sums, p.K, n); }, 5);
                    printf("%5dx%-7d %-28s %4d %5s %9.2f\n", p.M, p.K, "quantize activations", n, "", us);
                }
                cudaFree(w2); cudaFree(w1); cudaFree(x2); cudaFree(x1); cudaFree(y); cudaFree(sums);
            }
    printf("%d failures\n", bad);
    return bad != 0;
}
