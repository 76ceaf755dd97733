// Prefill lab: 128..512 tokens, s8 tensor cores (mma.sync), integers summed over a whole block of 128
// before one floating-point step, activations brought to shared memory by bulk copies.
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -o prefill prefill.cu && ./prefill check && ./prefill bench
#include "decode.cuh"

constexpr int BM = 128, BN = 128, CONSUMERS = 8;

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A stage holds one block of 128 columns for BN tokens: int8 values in two halves, then the heads.
constexpr int STAGE_BYTES = BN * QK + BN * (int) sizeof(ActHead);

// grid (row tiles of 128, token tiles of 128, splits of K). MU_MMA: the sum of mu * sum(x) over the
// blocks is a small matrix product of its own (two tf32 terms) instead of one FFMA per result and block.
template <class Format, int STAGES, bool MU_MMA, int JJ>
__global__ void __launch_bounds__(CONSUMERS * 32, 1)
prefill(const uint8_t * __restrict__ weights, const uint8_t * __restrict__ x, const ActHead * __restrict__ head,
        float * __restrict__ y, int M, int nb, int n, int add) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ uint64_t full[STAGES];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int b_lo = (int) ((long) nb * blockIdx.z / gridDim.z), b_hi = (int) ((long) nb * (blockIdx.z + 1) / gridDim.z);
    int col0 = blockIdx.y * BN;
    auto issue = [&](int b, int s) {
        mbar_expect(full + s, STAGE_BYTES);
        uint8_t * dst = shared + s * STAGE_BYTES;
        for (int h = 0; h < 2; h++)
            bulk_copy(dst + h * BN * 64, x + (((size_t) b * 2 + h) * n + col0) * 64, BN * 64, full + s);
        bulk_copy(dst + BN * QK, head + (size_t) b * n + col0, BN * sizeof(ActHead), full + s);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) mbar_init(full + i, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (int i = 0; i < STAGES - 1; i++)
            if (b_lo + i < b_hi) issue(b_lo + i, i);
    }
    __syncthreads();
    int wm = warp & 3, wn = warp >> 2, tile0 = blockIdx.x * (BM / 16) + wm * 2;  // 32 rows x 64 tokens
    int tiles = (M + 15) / 16;
    float acc[2][8][4] = {};
    typename Format::W w[2];
    typename Format::Ptr p0(weights, min(tile0, tiles - 1), nb, lane, M), p1(weights, min(tile0 + 1, tiles - 1), nb, lane, M);
    p0.advance(b_lo); p1.advance(b_lo);
    p0.load(w[0], 0); p1.load(w[1], 0);
    for (int b = b_lo, i = 0; b < b_hi; b++, i++) {
        int s = i % STAGES;
        uint32_t a[2][2][8];
        Scales sc[2];
#pragma unroll
        for (int m = 0; m < 2; m++) { unpack_codes(a[m], w[m]); sc[m] = unpack_scales(w[m].s); }
        if (b + 1 < b_hi) { p0.advance(1); p1.advance(1); p0.load(w[0], 0); p1.load(w[1], 0); }
        mbar_wait(full + s, (i / STAGES) & 1);
        __syncthreads();  // everybody has left the stage that is filled next
        if (threadIdx.x == 0 && b + STAGES - 1 < b_hi) issue(b + STAGES - 1, (i + STAGES - 1) % STAGES);
        const uint8_t * st = shared + s * STAGE_BYTES;
        const uint4 * hd = (const uint4 *) (st + BN * QK);
        // JJ x 2 results at a time, so that the tensor cores always have independent work
#pragma unroll
        for (int j0 = 0; j0 < 8; j0 += JJ) {
            uint4 x0[JJ], x1[JJ], h[JJ][2];
            int c[JJ][2][4];
#pragma unroll
            for (int j = 0; j < JJ; j++) {
                int col = wn * 64 + (j0 + j) * 8;
                x0[j] = *(const uint4 *) (st + (col + g) * 64 + t * 16);
                x1[j] = *(const uint4 *) (st + BN * 64 + (col + g) * 64 + t * 16);
                h[j][0] = hd[col + 2 * t]; h[j][1] = hd[col + 2 * t + 1];
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    c[j][m][0] = c[j][m][2] = (int) h[j][0].z + MAGIC_INT;
                    c[j][m][1] = c[j][m][3] = (int) h[j][1].z + MAGIC_INT;
                }
            }
#pragma unroll
            for (int p = 0; p < 4; p++)
#pragma unroll
                for (int j = 0; j < JJ; j++)
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        const uint4 & v = p < 2 ? x0[j] : x1[j];
                        mma_u8s8(c[j][m], a[m][0][2 * p], a[m][1][2 * p], a[m][0][2 * p + 1], a[m][1][2 * p + 1],
                                 (p & 1) ? v.z : v.x, (p & 1) ? v.w : v.y);
                    }
#pragma unroll
            for (int j = 0; j < JJ; j++)
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        float f = __int_as_float(c[j][m][k]) - MAGIC_FLOAT;
                        acc[m][j0 + j][k] += (sc[m].alpha[k >> 1] * __uint_as_float(h[j][k & 1].x)) * f;
                        if (!MU_MMA) acc[m][j0 + j][k] += sc[m].mu[k >> 1] * __uint_as_float(h[j][k & 1].y);
                    }
        }
    }
    if (MU_MMA) {
        for (int b = b_lo; b < b_hi; b += 8) {
            uint32_t a[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    int bb = b + t + 4 * k;
                    uint2 s = make_uint2(0, 0);
                    if (bb < b_hi) s = *(const uint2 *) (weights + ((size_t) min(tile0 + m, tiles - 1) * nb + bb) * Format::STEP + Format::SCALES + g * 8);
                    Scales v = unpack_scales(s);
                    a[m][2 * k] = __float_as_uint(v.mu[0]); a[m][2 * k + 1] = __float_as_uint(v.mu[1]);
                }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                uint32_t hi[2], lo[2];
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    int bb = b + t + 4 * k;
                    float v = bb < b_hi ? head[(size_t) bb * n + col0 + wn * 64 + j * 8 + g].sum : 0.0f;
                    hi[k] = __float_as_uint(v) & 0xffffe000u;
                    lo[k] = __float_as_uint(v - __uint_as_float(hi[k]));
                }
#pragma unroll
                for (int m = 0; m < 2; m++) { mma_tf32(acc[m][j], a[m], hi[0], hi[1]); mma_tf32(acc[m][j], a[m], lo[0], lo[1]); }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int row = (tile0 + m) * 16 + g + 8 * (k >> 1), col = col0 + wn * 64 + j * 8 + 2 * t + (k & 1);
                if (row >= M) continue;
                if (add) atomicAdd(y + (size_t) col * M + row, acc[m][j][k]);
                else y[(size_t) col * M + row] = acc[m][j][k];
            }
}

template <class Format, int STAGES, bool MU, int JJ>
void run_prefill(cudaStream_t st, const uint8_t * w, const uint8_t * x, const ActHead * h, float * y, int M, int nb, int n, int split) {
    static bool done = false;
    auto f = prefill<Format, STAGES, MU, JJ>;
    if (!done) { CK(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, STAGES * STAGE_BYTES)); done = true; }
    if (split > 1) CK(cudaMemsetAsync(y, 0, (size_t) M * n * 4, st));
    launch(false, f, dim3((M + BM - 1) / BM, n / BN, split), dim3(CONSUMERS * 32), STAGES * STAGE_BYTES, st, w, x, h, y, M, nb, n, (int) (split > 1));
}

struct Variant {
    const char * name; bool one;
    void (*run)(cudaStream_t, const uint8_t *, const uint8_t *, const ActHead *, float *, int, int, int, int);
};
static const Variant VARIANTS[] = {
    {"tq2 mma.sync, FFMA, jj2", false, run_prefill<Tq2Tile, 4, false, 2>},
    {"tq2 mma.sync, tf32, jj2", false, run_prefill<Tq2Tile, 4, true, 2>},
    {"tq2 mma.sync, tf32, jj4", false, run_prefill<Tq2Tile, 4, true, 4>},
    {"tq1 mma.sync, tf32, jj2", true, run_prefill<Tq1Tile, 4, true, 2>},
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
                uint8_t *w2, *w1, *x2, *x1; float * y; ActHead * h;
                CK(cudaMalloc(&w2, (size_t) p.tiles * p.nb * 576)); CK(cudaMalloc(&w1, (size_t) p.tiles * p.nb * 480));
                CK(cudaMalloc(&x2, (size_t) p.K * n)); CK(cudaMalloc(&x1, (size_t) p.K * n));
                CK(cudaMalloc(&y, (size_t) p.M * n * 4)); CK(cudaMalloc(&h, (size_t) p.nb * n * sizeof(ActHead)));
                pack<W_TILE2><<<dim3(p.tiles, p.nb), 32>>>(p.codes, p.scales, w2, p.M, p.K);
                pack<W_TILE1><<<dim3(p.tiles, p.nb), 32>>>(p.codes, p.scales, w1, p.M, p.K);
                quantize_act<ACT_S8><<<dim3(p.nb, n), 128>>>(p.x, x2, h, p.K, n, (float *) nullptr, 0);
                quantize_act<ACT_TQ1_PLAIN><<<dim3(p.nb, n), 128>>>(p.x, x1, h, p.K, n, (float *) nullptr, 0);
                CK(cudaDeviceSynchronize());
                for (auto & v : VARIANTS)
                    for (int split : {1, 2, 3, 4, 6}) {
                        if (split > p.nb || (profile && split != (n == 128 ? 3 : 1))) continue;
                        CK(cudaMemset(y, 0xff, (size_t) p.M * n * 4));
                        const uint8_t *w = v.one ? w1 : w2, *x = v.one ? x1 : x2;
                        v.run(0, w, x, h, y, p.M, p.nb, n, split);
                        CK(cudaDeviceSynchronize());
                        Errors e = compare(y, p, n);
                        bool ok = !e.unwritten && e.vs_quant < 2e-6;
                        bad += !ok;
                        if (!ok) printf("FAIL %s %dx%d n=%d split %d %s: %.2e%s\n", v.name, p.M, p.K, n, split, data_name(data), e.vs_quant, e.unwritten ? " UNWRITTEN" : "");
                        if (!bench) continue;
                        double us = time_graph(10, [&](int, cudaStream_t st) { v.run(st, w, x, h, y, p.M, p.nb, n, split); }, 5);
                        printf("%5dx%-7d %-28s %4d %5d %9.2f %8.1f %9.1e\n", p.M, p.K, v.name, n, split, us, 2.0 * p.M * p.K * n / us / 1e6, e.vs_quant);
                    }
                if (bench) {
                    double us = time_graph(10, [&](int, cudaStream_t st) { launch(false, quantize_act<ACT_S8>, dim3(p.nb, n), 128, 0, st, p.x, x2, h, p.K, n, (float *) nullptr, 0); }, 5);
                    printf("%5dx%-7d %-28s %4d %5s %9.2f\n", p.M, p.K, "quantize activations", n, "", us);
                }
                cudaFree(w2); cudaFree(w1); cudaFree(x2); cudaFree(x1); cudaFree(y); cudaFree(h);
            }
    printf("%d failures\n", bad);
    return bad != 0;
}
