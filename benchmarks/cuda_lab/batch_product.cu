// The products of 9 to 64 tokens as the backend has them (overlay/ggml/src/ggml-cuda/tq/kernels/tq-batch.cu): are they right, and what does
// a layer of them cost, beside the prefill kernels that did them before?
//
//   D=../../third_party/llama.cpp/overlay/ggml/src/ggml-cuda/tq/kernels
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -DGGML_CUDA_TQ_SM90A -I$D -o batch_product batch_product.cu \
//        $D/tq-prefill.cu $D/tq-prefill-wgmma.cu $D/tq-act.cu
//   ./batch_product check [small]       against float64 sums of the quantised problem: every number of tokens, poisoned y
//   ./batch_product check tiny [GRID]   a few small launches, for compute-sanitizer; GRID: thread blocks at most (2)
//   ./batch_product bench               each product by each shape of thread block, then layers as the backend runs them
#include "tq-batch.cu" // for its shapes, which the backend does not show
#include "prefill_problem.cuh"

#include <cstring>
#include <memory>

template <class T> struct Buffer {
    T * p;
    explicit Buffer(size_t n, int fill = 0) { CK(cudaMalloc(&p, n * sizeof(T))); CK(cudaMemset(p, fill, n * sizeof(T))); }
    ~Buffer() { cudaFree(p); }
    Buffer(const Buffer &) = delete;
};

static std::string shape_name(int i) {
    const kernel & k = KERNELS[i];
    char s[60];
    snprintf(s, sizeof s, "%dx%d/%dt%dw %d,%d x%d%s", k.rows, k.tokens, k.tiles, k.warps, k.chunk, k.stages, k.min_blocks, k.wgmma ? " wgmma" : "");
    return s;
}

// ---- check ------------------------------------------------------------------------------------------------------
struct Checker {
    int runs = 0, bad = 0;
    double worst = 0;
    Buffer<uint8_t> scratch{tq_batch_scratch_bytes()};
    Buffer<Verdict> verdict{1};
    int most_blocks = INT_MAX;

    void expect(bool ok, const std::string & what) {
        runs++;
        if (!ok && bad++ < 30) printf("FAIL %s\n", what.c_str());
    }
    void expect_clear_flags() {
        std::vector<uint8_t> f(flag_bytes(device()));
        CK(cudaMemcpy(f.data(), scratch.p, f.size(), cudaMemcpyDeviceToHost));
        expect(std::all_of(f.begin(), f.end(), [](uint8_t v) { return v == 0; }), "flags are not clear");
    }
};

// Up to three matrices with the same input of 64 tokens at most, and their sums in float64.
struct Group {
    int nb, kind, count;
    tq_segment seg[3];
    double2 * ref[3];
    Activations x;
    Group(std::vector<int> rows, int nb_, int n, int kind_, uint32_t seed) : nb(nb_), kind(kind_), count(rows.size()), x(n, nb_, kind_, seed) {
        for (int s = 0; s < count; s++) {
            const int tiles = tq_ceil(rows[s], 16);
            uint8_t * w;
            seg[s].rows = rows[s]; seg[s].ld = rows[s] + 3;
            CK(cudaMalloc(&w, (size_t) tiles * nb * TQ_TILE_BYTES));
            CK(cudaMalloc(&seg[s].y, (size_t) seg[s].ld * (n + 2) * 4));
            CK(cudaMalloc(&ref[s], (size_t) rows[s] * n * sizeof(double2)));
            seg[s].w = w;
            make_tiles<<<dim3(tiles, nb), 32>>>(w, rows[s], nb, kind, 11 * seed + s);
            reference64<<<dim3(rows[s], n), 128>>>(x.q8, x.ds, ref[s], rows[s], nb, kind, 11 * seed + s);
        }
    }
    ~Group() { for (int s = 0; s < count; s++) { cudaFree((void *) seg[s].w); cudaFree(seg[s].y); cudaFree(ref[s]); } }
    void poison(int tokens) { for (int s = 0; s < count; s++) CK(cudaMemset(seg[s].y, 0xff, (size_t) seg[s].ld * tokens * 4)); }
};

// A group by every shape that has room for n tokens (or, quick, by those of the next width), and by the backend's choice.
static void check_group(Checker & c, std::vector<int> rows, int nb, int n, int kind, bool all_widths) {
    Group g(rows, nb, n, kind, 3 + 7 * nb + n);
    int next = INT_MAX;
    for (const kernel & k : KERNELS) if (k.tokens >= n) next = std::min(next, k.tokens);
    for (int i = 0; i <= KERNEL_COUNT; i++) {
        const bool choice = i == KERNEL_COUNT;
        if (!choice && (KERNELS[i].tokens < n || (!all_widths && KERNELS[i].tokens != next) || tq_record_width(KERNELS[i].tokens) != tq_record_width(n))) continue;
        g.poison(n + 2);
        CK(cudaMemset(c.verdict.p, 0, sizeof(Verdict)));
        if (choice) tq_batch(g.seg, g.count, g.x.act, c.scratch.p, 0);
        else run(device(), i, g.seg, g.count, g.x.act, c.scratch.p, 0, c.most_blocks);
        for (int s = 0; s < g.count; s++)
            judge<<<dim3(tq_ceil((int) g.seg[s].ld, 128), n + 2), 128>>>(g.seg[s].y, g.seg[s].ld, g.ref[s], g.seg[s].rows, n, n + 2, c.verdict.p);
        Verdict v;
        CK(cudaMemcpy(&v, c.verdict.p, sizeof v, cudaMemcpyDeviceToHost));
        float e; memcpy(&e, &v.worst, 4);
        c.worst = std::max(c.worst, (double) e);
        char what[200];
        snprintf(what, sizeof what, "%s n=%d rows %d (%d matrices) blocks %d %s: error %.2e, %d not written, %d written outside",
                 choice ? "choice" : shape_name(i).c_str(), n, rows[0], g.count, nb, KINDS[kind], e, v.unwritten, v.touched);
        c.expect(e < 2e-6 && !v.unwritten && !v.touched, what);
    }
    c.expect_clear_flags();
}

// Products of two groups in turns, on the same scratch, in a graph with dependent launch: every replay must give the bits of one
// by one.
static void check_repeats(Checker & c, int n, int launches, int replays) {
    Group big({4090, 1000, 37}, 44, n, K_RANDOM, 5), small({500, 33}, 6, n, K_RANDOM, 6);
    const size_t each = (size_t) (4090 + 1000 + 37) * n;
    Buffer<float> out(each * launches, 0xff);
    std::vector<float> first(each * launches), now(each * launches);
    for (int shape = 0; shape <= KERNEL_COUNT; shape++) {
        const bool choice = shape == KERNEL_COUNT;
        if (!choice && (KERNELS[shape].tokens < n || tq_record_width(KERNELS[shape].tokens) != tq_record_width(n))) continue;
        auto call = [&](int i, cudaStream_t st) {
            Group & g = i % 3 == 2 ? small : big;
            tq_segment s[3];
            float * to = out.p + each * i;
            for (int k = 0; k < g.count; k++) { s[k] = {g.seg[k].w, to, g.seg[k].rows, g.seg[k].rows}; to += (size_t) g.seg[k].rows * n; }
            if (choice) tq_batch(s, g.count, g.x.act, c.scratch.p, st);
            else run(device(), shape, s, g.count, g.x.act, c.scratch.p, st);
        };
        CK(cudaMemset(out.p, 0xff, each * launches * 4));
        for (int i = 0; i < launches; i++) { call(i, 0); CK(cudaDeviceSynchronize()); }
        CK(cudaMemcpy(first.data(), out.p, first.size() * 4, cudaMemcpyDeviceToHost));
        cudaStream_t st; cudaGraph_t graph; cudaGraphExec_t exec;
        CK(cudaStreamCreate(&st));
        CK(cudaStreamBeginCapture(st, cudaStreamCaptureModeGlobal));
        for (int i = 0; i < launches; i++) call(i, st);
        CK(cudaStreamEndCapture(st, &graph));
        CK(cudaGraphInstantiate(&exec, graph, 0));
        for (int r = 0; r < replays; r++) {
            CK(cudaMemsetAsync(out.p, 0xff, each * launches * 4, st));
            CK(cudaGraphLaunch(exec, st));
            CK(cudaGraphLaunch(exec, st));
            CK(cudaStreamSynchronize(st));
            CK(cudaMemcpy(now.data(), out.p, now.size() * 4, cudaMemcpyDeviceToHost));
            size_t other = 0, at = 0;
            for (size_t i = 0; i < now.size(); i++) { if (memcmp(&now[i], &first[i], 4)) { if (!other++) at = i; } }
            char what[120];
            snprintf(what, sizeof what, " n=%d: %zu values of a replay differ, the first in launch %zu at %zu: %g for %g", n, other, at / each, at % each, now[at], first[at]);
            c.expect(other == 0, (choice ? "choice" : shape_name(shape)) + what);
        }
        CK(cudaGraphExecDestroy(exec)); CK(cudaGraphDestroy(graph)); CK(cudaStreamDestroy(st));
    }
    c.expect_clear_flags();
}

static int check(const std::string & how, int grid) {
    if (!device().there) { printf("no code for this device\n"); return 1; }
    Checker c;
    if (how == "tiny") {
        c.most_blocks = grid;
        for (int n : {9, 24, 40, 64}) check_group(c, {300, 33}, 13, n, K_RANDOM, true);
    } else {
        const bool small = how == "small";
        for (int n = TQ_DECODE_MAX + 1; n <= TQ_BATCH_MAX; n++) { // every number of tokens
            check_group(c, {4096, 1000}, 32, n, K_RANDOM, false);
            check_group(c, {17}, 5, n, n % N_KINDS, false);
        }
        for (int n : {9, 16, 17, 24, 31, 33, 48, 50, 64}) {
            if (small && n % 16) continue;
            for (int nb : {1, 2, 3, 7, 8, 9, 33, 86})
                for (auto rows : std::vector<std::vector<int>>{{1}, {16}, {100, 33}, {300, 1, 513}, {4096, 1024, 1024}}) {
                    if (small && (nb % 3 || rows[0] == 4096)) continue;
                    check_group(c, rows, nb, n, (n + nb + (int) rows.size()) % N_KINDS, true);
                }
            check_group(c, {44032}, 3, n, K_RANDOM, true);
            check_repeats(c, n, small ? 6 : 24, 2);
        }
    }
    printf("check: %d of %d failed, worst error %.2e of the magnitudes\n", c.bad, c.runs, c.worst);
    return c.bad != 0;
}

// ---- bench ------------------------------------------------------------------------------------------------------
// Before each product: the kernels that make its activations in a layer.
struct Layers {
    const Model & m;
    int n;
    uint8_t * pool; size_t pool_tiles;
    float * x, * y, * norm;
    void * scratch;
    std::vector<std::unique_ptr<Activations>> act;
    size_t at = 0;

    Layers(const Model & m_, int n_, uint8_t * pool_, size_t tiles_, float * x_, float * y_, float * norm_, void * scratch_)
        : m(m_), n(n_), pool(pool_), pool_tiles(tiles_), x(x_), y(y_), norm(norm_), scratch(scratch_) {
        for (const Shape & s : m.shape) act.emplace_back(new Activations(n, s.cols / QK, K_RANDOM, 5));
    }
    int segments(int i, tq_segment * seg) {
        const Shape & s = m.shape[i];
        int count = 0;
        float * out = y;
        for (int k = 0; k < 3 && s.rows[k]; k++, count++) {
            const size_t tiles = (size_t) s.rows[k] / 16 * (s.cols / QK);
            if (at + tiles > pool_tiles) at = 0;
            seg[k] = {pool + at * TQ_TILE_BYTES, out, s.rows[k], s.rows[k]};
            at += tiles;
            out += (size_t) s.rows[k] * n;
        }
        return count;
    }
    // shape: of KERNELS; -1: the backend's choice; -2: wgmma as before
    void product(int i, int shape, bool quantise, cudaStream_t st) {
        const Shape & s = m.shape[i];
        tq_act & a = act[i]->act;
        if (quantise) {
            if (i % 2 == 0) tq_quantize_norm(x, x + (size_t) s.cols * n, x, 1e-5f, norm, nullptr, a, st); // any numbers will do
            else if (i == 1) tq_quantize(x, s.cols, a, st);
            else tq_quantize_glu(x, x, s.cols, s.cols, 0, nullptr, a, st);
        }
        tq_segment seg[3];
        const int count = segments(i, seg);
        if (shape >= 0) run(device(), shape, seg, count, a, scratch, st);
        else if (shape == -1) tq_batch(seg, count, a, scratch, st);
        else tq_prefill_wgmma(seg, count, a, nullptr, st);
    }
    size_t bytes() const {
        size_t sum = 0;
        for (const Shape & s : m.shape) for (int r : s.rows) sum += (size_t) r / 16 * (s.cols / QK) * TQ_TILE_BYTES;
        return sum;
    }
};

static void bench(bool quick) {
    const size_t pool_tiles = 1 << 20; // of 16 x 128: 604 MB
    Buffer<uint8_t> pool(pool_tiles * TQ_TILE_BYTES), scratch(tq_batch_scratch_bytes());
    Buffer<float> x((size_t) 2 * 64 * 22016), y((size_t) 3 * 22016 * 64), norm((size_t) 64 * 8192);
    make_tiles<<<dim3(1 << 15, 32), 32>>>(pool.p, 1 << 19, 32, K_RANDOM, 1);
    CK(cudaDeviceSynchronize());
    const auto layers = [&](const Model & m, int n) { return Layers(m, n, pool.p, pool_tiles, x.p, y.p, norm.p, scratch.p); };
    for (const Model & m : MODELS) {
        if (std::string(m.name) == "13B") continue;
        for (int n : {16, 24, 32, 48, 64}) {
            std::vector<int> shapes;
            for (int i = 0; i < KERNEL_COUNT; i++) if (KERNELS[i].tokens == n) shapes.push_back(i);
            shapes.push_back(-2);
            std::vector<double> best(4, 1e9);
            for (int shape : shapes) {
                printf("%-4s n=%-2d %-18s", m.name, n, shape < 0 ? "wgmma" : shape_name(shape).c_str());
                double sum = 0;
                for (int i = 0; i < 4; i++) {
                    Layers l = layers(m, n);
                    const double us = time_graph(12, [&](int, cudaStream_t st) { l.product(i, shape, false, st); }, 3);
                    sum += us;
                    if (shape >= 0) best[i] = std::min(best[i], us);
                    printf(" %s %7.2f", m.shape[i].name, us);
                }
                printf("  sum %7.2f us\n", sum);
            }
            printf("%-4s n=%-2d best sum %.2f us\n", m.name, n, best[0] + best[1] + best[2] + best[3]);
            fflush(stdout);
        }
    }
    printf("layers, with the kernels that make activations: us, and GB/s of weights\n");
    for (const Model & m : MODELS)
        for (int n : {9, 12, 16, 17, 24, 32, 33, 40, 48, 56, 64}) {
            if (quick && n % 16) continue;
            double us[2];
            for (int shape : {-1, -2}) {
                Layers l = layers(m, n);
                us[-1 - shape] = time_graph(6, [&](int, cudaStream_t st) { for (int i = 0; i < 4; i++) l.product(i, shape, true, st); }, 5);
            }
            printf("%-4s layer n=%-2d batch %7.2f us (%5.0f GB/s), wgmma %7.2f us\n", m.name, n, us[0], layers(m, n).bytes() / us[0] / 1e3, us[1]);
            fflush(stdout);
        }
}

// One launch for a profiler: the i-th product of a model, by a shape.
static void profile(const std::string & model, int n, int i, int shape) {
    const size_t pool_tiles = 1 << 20;
    Buffer<uint8_t> pool(pool_tiles * TQ_TILE_BYTES), scratch(tq_batch_scratch_bytes());
    Buffer<float> x((size_t) 2 * 64 * 22016), y((size_t) 3 * 22016 * 64), norm((size_t) 64 * 8192);
    make_tiles<<<dim3(1 << 15, 32), 32>>>(pool.p, 1 << 19, 32, K_RANDOM, 1);
    for (const Model & m : MODELS) {
        if (model != m.name) continue;
        Layers l(m, n, pool.p, pool_tiles, x.p, y.p, norm.p, scratch.p);
        printf("%s\n", shape < 0 ? "backend's" : shape_name(shape).c_str());
        l.product(i, shape, false, 0);
        CK(cudaDeviceSynchronize());
    }
}

int main(int argc, char ** argv) {
    const std::string what = argc > 1 ? argv[1] : "check", how = argc > 2 ? argv[2] : "";
    cudaDeviceProp prop;
    CK(cudaGetDeviceProperties(&prop, 0));
    printf("%s, %d multiprocessors\n", prop.name, prop.multiProcessorCount);
    if (what == "check") return check(how, argc > 3 ? std::max(1, atoi(argv[3])) : 2);
    if (what == "profile" && argc == 6) { profile(how, atoi(argv[3]), atoi(argv[4]), atoi(argv[5])); return 0; }
    if (what == "repeats") {
        Checker c;
        for (int i = 0; i < 5; i++) for (int n : {16, 64}) check_repeats(c, n, 24, 4);
        printf("repeats: %d of %d failed\n", c.bad, c.runs);
        return c.bad != 0;
    }
    bench(how == "quick");
    return 0;
}
