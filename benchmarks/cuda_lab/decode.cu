// Decode lab: which kernel streams a ternary matrix fastest for 1..8 tokens?
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -o decode decode.cu && ./decode check && ./decode bench
//
// Prints, per shape and kernel: microseconds in a CUDA-graph replay over rotating copies (more than
// L2 holds), GB/s of weights, the share of the streaming rate measured in the same run (large), and
// the share of a plain read of the same number of bytes launched the same way (same).
#include "decode.cuh"
#include <cstring>

struct Variant {
    std::string name;
    WeightLayout weights;
    ActLayout act;
    int n;
    std::function<void(bool pdl, cudaStream_t, const uint8_t * w, const uint4 * x, const ActHead * h, float * y, int M, int nb)> run;
    int multiple = 1;  // nb must be a multiple of this
    double bytes(int M, int K) const { return (double) M * (K / QK) * (weights == W_TILE1 ? 30 : 36); }
};

template <class F, class Math, int NW, int U, int MC>
Variant variant(const char * name, WeightLayout wl, ActLayout al) {
    return {std::string(name) + " w" + std::to_string(NW) + "u" + std::to_string(U), wl, al, Math::TOKENS,
            [](bool pdl, cudaStream_t st, const uint8_t * w, const uint4 * x, const ActHead * h, float * y, int M, int nb) {
                launch(pdl, decode<F, Math, NW, U, MC>, dim3((M + 15) / 16), dim3(NW * 32), 0, st, w, x, h, y, M, nb);
            }};
}

template <class F, class Math, int NW, int U, int S, int CTAS, int MC>
Variant stream(const char * name, WeightLayout wl, ActLayout al) {
    constexpr int shared = Stream<F, Math, NW, U, S>::SHARED;
    std::string full = std::string(name) + " strm w" + std::to_string(NW) + "u" + std::to_string(U) + "s" + std::to_string(S) + "x" + std::to_string(CTAS) + "/" + std::to_string(MC);
    Variant v{full, wl, al, Math::TOKENS,
            [](bool pdl, cudaStream_t st, const uint8_t * w, const uint4 * x, const ActHead * h, float * y, int M, int nb) {
                static bool done = false;
                auto f = decode_stream<F, Math, NW, U, S, MC>;
                if (!done) { CK(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)); done = true; }
                int tiles = (M + 15) / 16, grid = std::min(tiles, 132 * CTAS), chunks = tiles * (nb / U);
                launch(pdl, f, dim3(grid), dim3(NW * 32 + 64), shared, st, w, x, h, y, M, nb, chunks / grid, chunks % grid);
            }};
    v.multiple = U;
    return v;
}

#define STREAM(F, MATH, N, NW, U, S, CTAS, MC, name, wl, al) stream<F, MATH<N>, NW, U, S, CTAS, MC>(name, wl, al)
#define TQ2(F, MATH, N, NW, U, MC, name, wl, al) variant<F, MATH<N>, NW, U, MC>(name, wl, al)
static std::vector<Variant> variants() {
    return {
        TQ2(Tq2Tile, MathDp4a, 1, 8, 2, 4, "tq2 dp4a", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathS8, 1, 12, 2, 4, 2, 2, "tq2 s8", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathS8, 1, 8, 4, 2, 2, 2, "tq2 s8", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathS8, 1, 8, 2, 4, 2, 3, "tq2 s8", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathS8, 1, 8, 2, 4, 3, 3, "tq2 s8", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathS8, 1, 8, 2, 3, 3, 3, "tq2 s8", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathS8, 1, 12, 2, 6, 1, 2, "tq2 s8", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathDp4a, 1, 12, 2, 4, 2, 2, "tq2 dp4a", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathDp4a, 1, 8, 2, 4, 2, 3, "tq2 dp4a", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathDp4a, 1, 8, 2, 4, 3, 3, "tq2 dp4a", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathB1, 1, 12, 2, 4, 2, 2, "tq2 b1", W_PLANES, ACT_B1),
        STREAM(Tq2Tile, MathB1, 1, 12, 2, 2, 2, 3, "tq2 b1", W_PLANES, ACT_B1),
        STREAM(Tq2Tile, MathB1, 1, 8, 4, 2, 2, 3, "tq2 b1", W_PLANES, ACT_B1),
        STREAM(Tq2Tile, MathB1, 1, 8, 2, 4, 2, 4, "tq2 b1", W_PLANES, ACT_B1),
        STREAM(Tq2Tile, MathB1, 1, 8, 2, 4, 3, 4, "tq2 b1", W_PLANES, ACT_B1),
        STREAM(Tq2Tile, MathB1, 1, 8, 2, 4, 4, 4, "tq2 b1", W_PLANES, ACT_B1),
        TQ2(Tq2Tile, MathB1, 1, 8, 2, 4, "tq2 b1", W_PLANES, ACT_B1),
        TQ2(Tq2Tile, MathB1, 1, 16, 2, 2, "tq2 b1", W_PLANES, ACT_B1),
        TQ2(Tq2Tile, MathS8, 8, 8, 2, 4, "tq2 s8", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathB1, 2, 12, 2, 3, 2, 2, "tq2 b1", W_PLANES, ACT_B1),
        STREAM(Tq2Tile, MathS8, 2, 12, 2, 3, 2, 2, "tq2 s8", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathS8, 3, 12, 2, 3, 2, 2, "tq2 s8", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathS8, 4, 12, 2, 3, 2, 2, "tq2 s8", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathS8, 4, 8, 2, 3, 3, 3, "tq2 s8", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathS8, 8, 8, 4, 3, 2, 2, "tq2 s8", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathS8, 8, 12, 2, 3, 2, 2, "tq2 s8", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathS8, 8, 12, 2, 2, 2, 2, "tq2 s8", W_TILE2, ACT_S8),
        STREAM(Tq2Tile, MathS8, 8, 8, 2, 3, 3, 3, "tq2 s8", W_TILE2, ACT_S8),
        TQ2(Tq1Tile, MathTq1, 1, 8, 2, 4, "tq1 s8", W_TILE1, ACT_TQ1),
        TQ2(Tq1Tile, MathTq1, 1, 16, 2, 2, "tq1 s8", W_TILE1, ACT_TQ1),
        STREAM(Tq1Tile, MathTq1, 1, 8, 4, 4, 2, 2, "tq1 s8", W_TILE1, ACT_TQ1),
        STREAM(Tq1Tile, MathTq1, 1, 8, 4, 2, 2, 2, "tq1 s8", W_TILE1, ACT_TQ1),
        STREAM(Tq1Tile, MathTq1, 1, 8, 2, 4, 3, 3, "tq1 s8", W_TILE1, ACT_TQ1),
        STREAM(Tq1Tile, MathTq1, 1, 12, 2, 4, 2, 2, "tq1 s8", W_TILE1, ACT_TQ1),
        STREAM(Tq1Tile, MathTq1, 4, 8, 4, 3, 2, 2, "tq1 s8", W_TILE1, ACT_TQ1),
        STREAM(Tq1Tile, MathCodes, 8, 8, 4, 3, 2, 2, "tq1 digits", W_TILE1, ACT_TQ1_PLAIN),
    };
}

static void pack_weights(WeightLayout l, const Problem & p, uint8_t * out) {
    dim3 grid(l == W_FILE2 ? p.M : p.tiles, p.nb);
    if (l == W_FILE2) pack<W_FILE2><<<grid, 32>>>(p.codes, p.scales, out, p.M, p.K);
    if (l == W_TILE2) pack<W_TILE2><<<grid, 32>>>(p.codes, p.scales, out, p.M, p.K);
    if (l == W_PLANES) pack<W_PLANES><<<grid, 32>>>(p.codes, p.scales, out, p.M, p.K);
    if (l == W_TILE1) pack<W_TILE1><<<grid, 32>>>(p.codes, p.scales, out, p.M, p.K);
    CK(cudaGetLastError());
}
static void pack_act(bool pdl, ActLayout l, cudaStream_t st, const float * x, uint8_t * out, ActHead * h, int K, int n, float * zero = nullptr, int zeros = 0) {
    dim3 grid(K / QK, n);
    if (l == ACT_S8) launch(pdl, quantize_act<ACT_S8>, grid, 128, 0, st, x, out, h, K, n, zero, zeros);
    if (l == ACT_B1) launch(pdl, quantize_act<ACT_B1>, grid, 128, 0, st, x, out, h, K, n, zero, zeros);
    if (l == ACT_TQ1_PLAIN) launch(pdl, quantize_act<ACT_TQ1_PLAIN>, grid, 128, 0, st, x, out, h, K, n, zero, zeros);
    if (l == ACT_TQ1) launch(pdl, quantize_act<ACT_TQ1>, grid, 128, 0, st, x, out, h, K, n, zero, zeros);
}
static size_t weight_bytes(WeightLayout l, const Problem & p) {
    return (size_t) p.tiles * 16 * p.nb * (l == W_TILE1 ? 30 : 36);
}

static int check() {
    int bad = 0, shapes[][2] = {{16, 128}, {37, 128}, {1, 384}, {100, 640}, {4096, 4096}, {1000, 11008}};
    for (auto & sh : shapes)
        for (int data = 0; data < N_DATA; data++) {
            if (sh[0] > 100 && data > 1) continue;
            Problem p(sh[0], sh[1], 8, data, 1234 + data);
            float * y; uint8_t *w[4], *x; ActHead * h;
            CK(cudaMalloc(&y, (size_t) p.M * 8 * 4)); CK(cudaMalloc(&x, (size_t) p.K * 8 * 2)); CK(cudaMalloc(&h, p.nb * 8 * sizeof(ActHead)));
            for (int l = 0; l < 4; l++) {
                CK(cudaMalloc(&w[l], weight_bytes((WeightLayout) l, p)));
                pack_weights((WeightLayout) l, p, w[l]);
            }
            for (auto & v : variants())
                {
                    int n = v.n;
                    if (p.nb % v.multiple) continue;
                    CK(cudaMemset(y, 0xff, (size_t) p.M * 8 * 4));
                    CK(cudaMemset(x, 0x55, (size_t) p.K * 8 * 2));
                    pack_act(true, v.act, 0, p.x, x, h, p.K, n, y, p.M * n);
                    v.run(true, 0, w[v.weights], (const uint4 *) x, h, y, p.M, p.nb);
                    CK(cudaDeviceSynchronize());
                    Errors e = compare(y, p, n);
                    bool ok = !e.unwritten && e.vs_quant < 1e-5;
                    bad += !ok;
                    if (!ok || (data == RANDOM && p.M == 4096))
                        printf("%s %-28s n=%d %dx%d %-13s vs int8 ref %.1e, vs float ref %.1e%s\n", ok ? "ok  " : "FAIL",
                               v.name.c_str(), n, p.M, p.K, data_name(data), e.vs_quant, e.vs_true, e.unwritten ? " UNWRITTEN" : "");
                }
            for (auto & q : w) cudaFree(q);
            cudaFree(y); cudaFree(x); cudaFree(h);
        }
    printf("check: %d failures\n", bad);
    return bad;
}

static void bench(bool quick) {
    int * o; CK(cudaMalloc(&o, 4));
    size_t big = (size_t) 4 << 30, pool = (size_t) 768 << 20;
    uint4 * buf; CK(cudaMalloc(&buf, big)); make_codes<<<4096, 256>>>((uint8_t *) buf, big, 7, RANDOM);
    auto stream_us = [&](size_t bytes, int count, bool pdl) {
        size_t step = bytes / 16;
        int grid = (int) std::min<size_t>(132 * 4, (step + 511) / 512);
        return time_graph(count, [&](int i, cudaStream_t st) { launch(pdl, stream_read, grid, 512, 0, st, buf + (size_t) i * step, step, o); });
    };
    double rate = (double) big / stream_us(big, 1, false) / 1e3;  // GB/s
    printf("streaming read of 4 GiB: %.0f GB/s; again %.0f GB/s\n", rate, (double) big / stream_us(big, 1, false) / 1e3);
    int shapes[][2] = {{4096, 4096}, {11008, 4096}, {4096, 11008}, {8192, 8192}, {22016, 8192}, {8192, 22016}, {12288, 4096}, {44032, 8192}};
    printf("%-12s %-28s %2s %4s %9s %8s %6s %6s %7s\n", "rows x cols", "kernel", "n", "pdl", "us", "GB/s", "large", "same", "TOPS");
    for (auto & sh : shapes) {
        Problem p(sh[0], sh[1], 8, RANDOM, 99);
        size_t unit_b = weight_bytes(W_TILE2, p);
        int copies = std::max(4, (int) (pool / unit_b));
        double same = stream_us(unit_b, std::min(copies, (int) (big / unit_b)), false);
        printf("%5dx%-6d %-28s %2s %4s %9.2f %8.0f %6.2f\n", p.M, p.K, "plain read, same bytes", "", "", same, unit_b / same / 1e3, unit_b / same / 1e3 / rate);
        uint8_t *w, *x, *x2; float * y; ActHead * h;
        CK(cudaMalloc(&w, unit_b * copies)); CK(cudaMalloc(&x, (size_t) p.K * 16)); CK(cudaMalloc(&x2, (size_t) p.K * 16));
        CK(cudaMalloc(&y, (size_t) p.M * 8 * 4)); CK(cudaMalloc(&h, p.nb * 8 * sizeof(ActHead)));
        int last = -1;
        for (int l = 0; l < 4; l++)
            for (auto & v : variants()) {
                if (v.weights != l) continue;
                size_t wb = weight_bytes(v.weights, p);
                if (last != l) {
                    pack_weights(v.weights, p, w);
                    for (int i = 1; i < copies; i++) CK(cudaMemcpy(w + wb * i, w, wb, cudaMemcpyDeviceToDevice));
                    last = l;
                }
                {
                    int n = v.n;
                    if (p.nb % v.multiple) continue;
                    pack_act(false, v.act, 0, p.x, x, h, p.K, n);
                    CK(cudaDeviceSynchronize());
                    for (int pdl = 0; pdl < (quick ? 1 : 2); pdl++) {
                        double us = time_graph(copies, [&](int i, cudaStream_t st) { v.run(pdl, st, w + wb * i, (const uint4 *) x, h, y, p.M, p.nb); });
                        double gbs = v.bytes(p.M, p.K) / us / 1e3;
                        printf("%5dx%-6d %-28s %2d %4d %9.2f %8.0f %6.3f %6.3f %7.1f\n", p.M, p.K, v.name.c_str(), n, pdl, us, gbs,
                               gbs / rate, gbs / (unit_b / same / 1e3), 2.0 * p.M * p.K * n / us / 1e6);
                    }
                }
            }
        // the chain that a decoder runs: quantise the activations, then the matrix
        for (auto & v : variants()) {
            if (v.weights != W_TILE2 || v.n != 1 || p.nb % v.multiple) continue;
            pack_weights(v.weights, p, w);
            for (int i = 1; i < copies; i++) CK(cudaMemcpy(w + unit_b * i, w, unit_b, cudaMemcpyDeviceToDevice));
            for (int pdl = 0; pdl < 2; pdl++) {
                double us = time_graph(copies, [&](int i, cudaStream_t st) {
                    pack_act(pdl, v.act, st, p.x, (i & 1) ? x2 : x, h, p.K, 1, y, p.M);
                    v.run(pdl, st, w + unit_b * i, (const uint4 *) ((i & 1) ? x2 : x), h, y, p.M, p.nb);
                });
                printf("%5dx%-6d %-28s %2d %4d %9.2f %8.0f %6.3f\n", p.M, p.K, (v.name + "+quant").c_str(), 1, pdl, us, unit_b / us / 1e3, unit_b / us / 1e3 / rate);
            }
        }
        cudaFree(w); cudaFree(x); cudaFree(x2); cudaFree(y); cudaFree(h);
    }
}

// Every kernel once on one large matrix, for ncu.
static void profile() {
    Problem p(22016, 8192, 8, RANDOM, 99);
    uint8_t *w, *x; float * y; ActHead * h;
    CK(cudaMalloc(&w, weight_bytes(W_TILE2, p))); CK(cudaMalloc(&x, (size_t) p.K * 16));
    CK(cudaMalloc(&y, (size_t) p.M * 8 * 4)); CK(cudaMalloc(&h, p.nb * 8 * sizeof(ActHead)));
    for (auto & v : variants()) {
        pack_weights(v.weights, p, w);
        pack_act(false, v.act, 0, p.x, x, h, p.K, v.n);
        v.run(false, 0, w, (const uint4 *) x, h, y, p.M, p.nb);
    }
    CK(cudaDeviceSynchronize());
}

// The matrices of a decoder layer one after the other, with the quantisation of their activations
// (random bytes as weights: speed does not depend on them). `copies` layers, so that L2 cannot help.
static void chain() {
    struct Model { const char * name; int layers, copies; std::vector<std::pair<int, int>> shapes; };
    std::vector<Model> models = {
        {"7B", 32, 12, {{12288, 4096}, {4096, 4096}, {22016, 4096}, {4096, 11008}}},
        {"13B", 40, 8, {{15360, 5120}, {5120, 5120}, {27648, 5120}, {5120, 13824}}},
        {"30B", 60, 5, {{19968, 6656}, {6656, 6656}, {35840, 6656}, {6656, 17920}}},
        {"65B", 80, 4, {{24576, 8192}, {8192, 8192}, {44032, 8192}, {8192, 22016}}},
    };
    int * o; CK(cudaMalloc(&o, 4));
    size_t pool = (size_t) 1 << 30;
    uint8_t * w; CK(cudaMalloc(&w, pool + (1 << 20)));
    make_codes<<<4096, 256>>>(w, pool, 3, RANDOM);
    double read = time_graph(1, [&](int, cudaStream_t st) { launch(false, stream_read, 132 * 4, 512, 0, st, (uint4 *) w, pool / 16, o); });
    printf("streaming read of 1 GiB: %.0f GB/s\n", pool / read / 1e3);
    float *x, *y; uint8_t * q; ActHead * h;
    CK(cudaMalloc(&x, 8 * 22016 * 4)); CK(cudaMalloc(&y, 8 * 44032 * 4)); CK(cudaMalloc(&q, 22016 * 16)); CK(cudaMalloc(&h, 172 * 8 * sizeof(ActHead)));
    make_x<<<64, 256>>>(x, 8 * 22016, 1, RANDOM);
    for (auto & mo : models)
        for (auto & v : variants()) {
            bool fits = true;
            size_t bytes = 0;
            for (auto & s : mo.shapes) { fits &= s.second / QK % v.multiple == 0; bytes += (size_t) v.bytes(s.first, s.second); }
            if (!fits || bytes * mo.copies > pool) continue;
            for (int pdl = 0; pdl < 2; pdl++) {
                double us = time_graph(mo.copies, [&](int i, cudaStream_t st) {
                    const uint8_t * p = w + bytes * i;
                    for (auto & s : mo.shapes) {
                        pack_act(pdl, v.act, st, x, q, h, s.second, v.n, y, s.first * v.n);
                        v.run(pdl, st, p, (const uint4 *) q, h, y, s.first, s.second / QK);
                        p += (size_t) v.bytes(s.first, s.second);
                    }
                });
                printf("%-4s %-30s n=%d pdl %d: %7.1f us a layer, %6.0f GB/s, %4.2f of streaming; linears alone %7.1f tokens/s\n", mo.name,
                       v.name.c_str(), v.n, pdl, us, bytes / us / 1e3, bytes / us / (pool / read), v.n * 1e6 / us / mo.layers);
            }
        }
}

int main(int argc, char ** argv) {
    std::string cmd = argc > 1 ? argv[1] : "check";
    cudaDeviceProp prop; CK(cudaGetDeviceProperties(&prop, 0));
    printf("%s, %d multiprocessors, L2 %d MB\n", prop.name, prop.multiProcessorCount, prop.l2CacheSize >> 20);
    if (cmd == "check") return check() != 0;
    if (cmd == "chain") { chain(); return 0; }
    if (cmd == "profile") { profile(); return 0; }
    bench(argc > 2 && !strcmp(argv[2], "quick"));
    return 0;
}
