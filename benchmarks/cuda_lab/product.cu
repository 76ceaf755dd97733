// The decode products as the backend has them (overlay/ggml/src/ggml-cuda/tq/kernels/tq-decode.cu): are they right,
// and what does a layer of them cost?
//
//   OVERLAY=../../third_party/llama.cpp/overlay/ggml/src/ggml-cuda/tq/kernels
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I $OVERLAY -o product product.cu $OVERLAY/tq-act.cu
//   ./product check [small]       against float64
//   ./product check tiny [GRID]   a few small launches, for compute-sanitizer (../h200/sanitize.sh), which racecheck follows
//                                 when compiled with -DTQ_RACECHECK (tq-decode-stream.cuh). GRID: thread blocks, 2 if left out;
//                                 from 2 on they exchange sums, so all of them must be on the card at once
//   ./product bench [quick|one]   layers of LLaMA's shapes in a CUDA graph, with dependent launch
#include "tq-decode.cu" // for its shapes, which the backend does not show
#include "layouts.cuh"
#include <cstring>
#include <memory>

// ---- activations in the layout of tq-kernels.cuh ------------------------------------------------------
__global__ void __launch_bounds__(128) quantize_decode(const float * x, int64_t ld, int n, uint8_t * q, tq_act_head * head) {
    __shared__ float s_max[4], s_sum[4];
    __shared__ int   s_isum[4], s_digits[4][4];
    __shared__ int8_t s_q[QK];
    pdl_launch();
    pdl_wait();
    int b = blockIdx.x, token = blockIdx.y, cols = gridDim.y, e = threadIdx.x, warp = e >> 5, lane = e & 31;
    float v = token < n ? x[token * ld + b * QK + e] : 0.0f, amax = fabsf(v), sum = v;
    for (int o = 16; o; o >>= 1) { amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, o)); sum += __shfl_xor_sync(~0u, sum, o); }
    if (lane == 0) { s_max[warp] = amax; s_sum[warp] = sum; }
    __syncthreads();
    amax = fmaxf(fmaxf(s_max[0], s_max[1]), fmaxf(s_max[2], s_max[3]));
    int i = __float2int_rn(v * (amax > 0 ? 127.0f / amax : 0.0f)), isum = __reduce_add_sync(~0u, i);
    if (lane == 0) s_isum[warp] = isum;
    if (TQ_ONE_BY_BITS && cols == 1) {
        for (int t = 0; t < 4; t++) {
            int sum = __reduce_add_sync(~0u, tq_digit(i, t));
            if (lane == 0) s_digits[t][warp] = sum;
        }
        s_q[e] = i;
        __syncthreads();
        if (e < 32) {
            int bit = e / 4, t = e % 4;
            uint32_t word = 0;
            for (int at = 0; at < 32; at++) {
                int k = at / 8, p = at % 8 / 2, h = at % 2;
                word |= (uint32_t) (s_q[32 * p + 8 * t + 4 * h + k] >> bit & 1) << at;
            }
            ((uint32_t *) q)[b * 32 + e] = word;
        }
        if (e == 0) {
            int16_t minus[4];
            for (int t = 0; t < 4; t++) minus[t] = -(s_digits[t][0] + s_digits[t][1] + s_digits[t][2] + s_digits[t][3]);
            head[b] = {amax / 127.0f, s_sum[0] + s_sum[1] + s_sum[2] + s_sum[3], (uint16_t) minus[0] | minus[1] * 65536, (uint16_t) minus[2] | minus[3] * 65536};
        }
        return;
    }
    __syncthreads();
    q[s8_offset(b, cols, token, e)] = i;
    if (e == 0)
        head[b * cols + token] = {amax / 127.0f, s_sum[0] + s_sum[1] + s_sum[2] + s_sum[3], -(s_isum[0] + s_isum[1] + s_isum[2] + s_isum[3]), 0};
}

template <class T> struct Buffer {
    T * p;
    explicit Buffer(size_t n, int fill = 0) { CK(cudaMalloc(&p, n * sizeof(T))); CK(cudaMemset(p, fill, n * sizeof(T))); }
    ~Buffer() { cudaFree(p); }
    Buffer(const Buffer &) = delete;
};

struct Activations {
    Buffer<uint8_t> q;
    Buffer<tq_act_head> head;
    tq_act act;
    Activations(int n, int nb) : q((size_t) tq_act_cols(n) * nb * QK, 0x55), head((size_t) tq_act_cols(n) * nb, 0x55),
        act{TQ_ACT_DECODE, n, tq_act_cols(n), nb, q.p, head.p} {}
    void quantize(const float * x, int64_t ld, cudaStream_t st, bool pdl = true) {
        launch(pdl, quantize_decode, dim3(act.nb, act.cols), 128, 0, st, x, ld, act.n, q.p, head.p);
    }
};

static uint8_t * tiles(const Problem & p) {
    uint8_t * w;
    CK(cudaMalloc(&w, (size_t) p.tiles * p.nb * TQ_TILE_BYTES));
    pack<W_TILE><<<dim3(p.tiles, p.nb), 32>>>(p.codes, p.scales, w, p.M, p.K);
    CK(cudaGetLastError());
    return w;
}

// ---- check --------------------------------------------------------------------------------------------
struct Checker {
    int failures = 0, runs = 0;
    Buffer<uint64_t> scratch{tq_decode_scratch_bytes() / 8};

    void expect(bool ok, const std::string & what) {
        runs++;
        if (ok) return;
        if (failures++ < 20) printf("FAIL %s\n", what.c_str());
    }
    void expect_clear_scratch(const std::string & what) {
        std::vector<uint64_t> s(tq_decode_scratch_bytes() / 8);
        CK(cudaMemcpy(s.data(), scratch.p, s.size() * 8, cudaMemcpyDeviceToHost));
        expect(std::all_of(s.begin(), s.end(), [](uint64_t v) { return v == 0; }), what + ": scratch is not clear");
    }
};

// One to three matrices of `rows` rows with the same input, packed, with float64 results.
struct Group {
    std::vector<std::unique_ptr<Problem>> parts;
    std::vector<uint8_t *> w;
    std::vector<std::vector<double>> truth;
    int nb;
    Group(std::vector<int> rows, int nb_, int data) : nb(nb_) {
        for (size_t i = 0; i < rows.size(); i++) {
            parts.emplace_back(new Problem(rows[i], nb * QK, 8, data, 1234 + 100 * i + data, 77 + data));
            w.push_back(tiles(*parts[i]));
            truth.emplace_back((size_t) 8 * rows[i]);
            CK(cudaMemcpy(truth[i].data(), parts[i]->y_quant, truth[i].size() * 8, cudaMemcpyDeviceToHost));
        }
    }
    ~Group() { for (auto p : w) cudaFree(p); }
    std::string name(int n, const char * kernel) const {
        std::string s = std::string(kernel) + " n=" + std::to_string(n) + " blocks " + std::to_string(nb) + " rows";
        for (auto & p : parts) s += " " + std::to_string(p->M);
        return s;
    }
};

constexpr int GAP = 3; // rows of poison after each column of y

// Runs a group once with n tokens, in every way that there is, and compares.
static void check_group(Checker & c, const Group & g, int n, const char * data) {
    Activations a(n, g.nb);
    a.quantize(g.parts[0]->x, g.nb * QK, 0);
    std::vector<std::unique_ptr<Buffer<float>>> y;
    for (int shape = 0; shape <= STREAM_SHAPES; shape++) { // the last: registers
        bool registers = shape == STREAM_SHAPES;
        if (!registers && (!device().streams || g.nb % stream_of(1, shape).unit != 0)) continue;
        std::vector<tq_segment> s;
        y.clear();
        for (size_t i = 0; i < g.parts.size(); i++) {
            int rows = g.parts[i]->M;
            y.emplace_back(new Buffer<float>((size_t) n * (rows + GAP), 0xff));
            s.push_back({g.w[i], y[i]->p, rows + GAP, rows});
        }
        if (registers) run_registers(device(), s.data(), s.size(), a.act, 0);
        else run_stream(device(), shape, s.data(), s.size(), a.act, c.scratch.p, 0);
        CK(cudaDeviceSynchronize());
        std::string name = g.name(n, registers ? "registers" : stream_of(1, shape).name) + ", " + data;
        for (size_t i = 0; i < g.parts.size(); i++) {
            int rows = g.parts[i]->M;
            std::vector<float> h((size_t) n * (rows + GAP));
            CK(cudaMemcpy(h.data(), y[i]->p, h.size() * 4, cudaMemcpyDeviceToHost));
            double err = 0, norm = 1e-300;
            bool unwritten = false, spilled = false;
            for (double v : g.truth[i]) norm += v * v * n / 8; // of all eight tokens: one alone may cancel
            for (int t = 0; t < n; t++)
                for (int r = 0; r < rows + GAP; r++) {
                    float v = h[(size_t) t * (rows + GAP) + r];
                    if (r >= rows) { spilled |= v == v; continue; }
                    unwritten |= v != v;
                    double d = v - g.truth[i][(size_t) t * rows + r];
                    err += d * d;
                }
            char what[64];
            snprintf(what, sizeof what, " matrix %zu: error %.1e%s%s", i, std::sqrt(err / norm), unwritten ? " UNWRITTEN" : "", spilled ? " SPILLED" : "");
            c.expect(!unwritten && !spilled && std::sqrt(err / norm) < 1e-5, name + what);
        }
    }
    c.expect_clear_scratch(g.name(n, "all") + data);
}

// Products of different grids one after the other in a graph, on the same scratch and activation buffers, activations
// changing from one to the next: every replay must give the same bits, and the right ones.
static void check_repeats(Checker & c, int launches, int replays) {
    if (!device().streams) return;
    Group groups[2] = {Group({4090, 1000, 37}, 44, RANDOM), Group({500, 33}, 6, RANDOM)};
    for (int shape = 0; shape < STREAM_SHAPES; shape++)
    for (int n : {1, 3, 8}) {
        Activations a(n, 44);
        std::vector<std::unique_ptr<Buffer<float>>> y;
        auto call = [&](int i, cudaStream_t st, float * out) {
            const Group & g = groups[i % 3 == 2];
            tq_act act = a.act;
            act.nb = g.nb;
            launch(true, quantize_decode, dim3(g.nb, act.cols), 128, 0, st, (const float *) g.parts[0]->x + (i % 4) * QK, (int64_t) g.nb * QK / 2, n, a.q.p, a.head.p);
            std::vector<tq_segment> s;
            int64_t at = 0;
            for (size_t k = 0; k < g.parts.size(); k++) {
                int rows = g.parts[k]->M;
                s.push_back({g.w[k], out + at, rows, rows});
                at += (int64_t) rows * n;
            }
            run_stream(device(), g.nb % stream_of(1, shape).unit ? choose_shape(device(), s.data(), s.size(), act) : shape, s.data(), s.size(), act, c.scratch.p, st);
        };
        size_t most = (size_t) (4090 + 1000 + 37) * n;
        Buffer<float> out(most * launches, 0xff);
        std::vector<float> first, now(most * launches);
        // one by one, with everything at rest in between
        for (int i = 0; i < launches; i++) { call(i, 0, out.p + most * i); CK(cudaDeviceSynchronize()); }
        CK(cudaMemcpy(now.data(), out.p, now.size() * 4, cudaMemcpyDeviceToHost));
        first = now;
        cudaStream_t st; cudaGraph_t graph; cudaGraphExec_t exec;
        CK(cudaStreamCreate(&st));
        CK(cudaStreamBeginCapture(st, cudaStreamCaptureModeGlobal));
        for (int i = 0; i < launches; i++) call(i, st, out.p + most * i);
        CK(cudaStreamEndCapture(st, &graph));
        CK(cudaGraphInstantiate(&exec, graph, 0));
        for (int r = 0; r < replays; r++) {
            CK(cudaMemsetAsync(out.p, 0xff, most * launches * 4, st));
            CK(cudaGraphLaunch(exec, st));
            CK(cudaGraphLaunch(exec, st));
            CK(cudaStreamSynchronize(st));
            CK(cudaMemcpy(now.data(), out.p, now.size() * 4, cudaMemcpyDeviceToHost));
            c.expect(memcmp(now.data(), first.data(), now.size() * 4) == 0, std::string("graph replay, ") + stream_of(1, shape).name + ", n=" + std::to_string(n) + ": other bits than one by one");
        }
        CK(cudaGraphExecDestroy(exec)); CK(cudaGraphDestroy(graph)); CK(cudaStreamDestroy(st));
        c.expect_clear_scratch("graph replays");
    }
}

// Experts: three of five used by each of four tokens, activations shared by a token's slots or one for each.
static void check_experts(Checker & c, int rows, int nb) {
    const int experts = 5, used = 3, tokens = 4;
    std::vector<std::unique_ptr<Problem>> p;
    size_t bytes = (size_t) (rows + 15) / 16 * nb * TQ_TILE_BYTES;
    Buffer<uint8_t> w(bytes * experts);
    for (int e = 0; e < experts; e++) {
        p.emplace_back(new Problem(rows, nb * QK, used * tokens, RANDOM, 500 + e, 9));
        uint8_t * one = tiles(*p[e]);
        CK(cudaMemcpy(w.p + bytes * e, one, bytes, cudaMemcpyDeviceToDevice));
        cudaFree(one);
    }
    Buffer<uint8_t> q((size_t) used * tokens * nb * QK);
    Buffer<tq_act_head> head((size_t) used * tokens * nb);
    for (int i = 0; i < used * tokens; i++)
        launch(false, quantize_decode, dim3(nb, 1), 128, 0, 0, (const float *) p[0]->x + (size_t) i * nb * QK, (int64_t) nb * QK, 1, q.p + (size_t) i * nb * QK, head.p + (size_t) i * nb);
    std::vector<int32_t> ids(tokens * 4); // stride 4: one more than used
    for (size_t i = 0; i < ids.size(); i++) ids[i] = (i * 7 + i / 4) % experts;
    Buffer<int32_t> d_ids(ids.size());
    CK(cudaMemcpy(d_ids.p, ids.data(), ids.size() * 4, cudaMemcpyHostToDevice));
    for (int shared = 0; shared < 2; shared++) {
        Buffer<float> y((size_t) used * tokens * (rows + GAP), 0xff);
        tq_decode_experts({w.p, bytes, rows, nb, d_ids.p, 1, 4, used, tokens, q.p, head.p, shared != 0, y.p, rows + GAP, (int64_t) used * (rows + GAP)}, 0);
        std::vector<float> h((size_t) used * tokens * (rows + GAP));
        CK(cudaMemcpy(h.data(), y.p, h.size() * 4, cudaMemcpyDeviceToHost));
        double err = 0, norm = 1e-300;
        bool spilled = false;
        std::vector<std::vector<double>> truth(experts, std::vector<double>((size_t) used * tokens * rows));
        for (int e = 0; e < experts; e++) CK(cudaMemcpy(truth[e].data(), p[e]->y_quant, truth[e].size() * 8, cudaMemcpyDeviceToHost));
        for (int pair = 0; pair < used * tokens; pair++)
            for (int r = 0; r < rows + GAP; r++) {
                int slot = pair % used, token = pair / used;
                float v = h[(size_t) pair * (rows + GAP) + r];
                if (r >= rows) { spilled |= v == v; continue; }
                double t = truth[ids[slot + token * 4]][(size_t) (shared ? token : pair) * rows + r];
                err += v == v ? (v - t) * (v - t) : 1e300; norm += t * t;
            }
        c.expect(!spilled && std::sqrt(err / norm) < 1e-5, "experts, rows " + std::to_string(rows) + " blocks " + std::to_string(nb) + (shared ? " shared" : ""));
    }
}

// No more than so many thread blocks in each grid: then small matrices have long runs and shared tiles.
static void limit_grid(int most) {
    if (!device().streams) return;
    for (int cols : {1, 2, 4, 8})
        for (int shape = 0; shape < STREAM_SHAPES; shape++) {
            slots(device(), cols, shape); // what it does on first use must be done
            device().slots[token_index(cols)][shape] = most;
        }
}

// grid: thread blocks of "tiny"
static int check(const std::string & how, int grid) {
    Checker c;
    auto all = [&](std::vector<int> rows, int nb, int data, std::vector<int> tokens) {
        Group g(rows, nb, data);
        for (int n : tokens) check_group(c, g, n, data_name(data));
    };
    std::vector<int> some = {1, 3, 8}, every = {1, 2, 3, 4, 5, 6, 7, 8};
    if (how == "tiny") {
        limit_grid(grid);
        all({100, 33}, 24, RANDOM, {1, 8}); // every shape, runs of more stages than TQ_RACECHECK's rings have
        all({17}, 5, RANDOM, {3});
        check_experts(c, 17, 2);
        check_experts(c, 17, 10);
    } else if (how == "small") {
        all({100, 16, 33}, 8, RANDOM, some);
        all({17}, 5, RANDOM, some);
        all({4400}, 4, RANDOM, {1, 8}); // more tiles than thread blocks: some are shared
        check_repeats(c, 6, 1);
        check_experts(c, 37, 12);
    } else {
        for (int nb : {1, 2, 3, 4, 5, 6, 7, 16, 32, 43, 172})
            for (int rows : {1, 15, 16, 17, 100, 4096}) all({rows}, nb, RANDOM, rows * nb > 40000 ? some : every);
        for (int nb : {1, 2, 5, 32, 86})
            for (auto rows : std::vector<std::vector<int>>{{16, 16}, {1, 17, 15}, {100, 33}, {4096, 1024, 1024}, {3, 5000, 700}}) all(rows, nb, RANDOM, some);
        for (int data = 1; data < N_DATA; data++) {
            all({100, 33}, 12, data, {1, 3, 8});
            all({5000}, 7, data, {1, 2});
        }
        check_repeats(c, 50, 3);
        for (int nb : {1, 7, 8, 16, 56}) { check_experts(c, 37, nb); check_experts(c, 768, nb); }
    }
    printf("check: %d of %d failed\n", c.failures, c.runs);
    return c.failures != 0;
}

// ---- bench --------------------------------------------------------------------------------------------
// Stands for attention and the like: one thread block that takes a while.
__global__ void spin(int64_t cycles, int * out) {
    int64_t start = clock64();
    while (clock64() - start < cycles) {}
    if (cycles < 0) *out = 1;
}

struct Model { const char * name; int layers, copies; int hidden, ffn; };

// The matrices of a site, one after the other in memory.
struct Site {
    int n;
    const uint8_t * w[TQ_MAX_SEGMENTS];
    int rows[TQ_MAX_SEGMENTS], columns;
};

struct Layers {
    const Model & m;
    int n;
    int shape;           // of thread blocks; -1: what the backend takes
    int64_t spin_cycles; // between the first product and the second; 0: no kernel
    bool backend;        // what comes before each product: tq-act.cu's norms and gated unit, or only our quantisation
    uint8_t * w; float * x, * y; int * out;
    uint64_t * scratch;
    Activations hidden, ffn;
    Buffer<float> norm{8 * 8192};
    Layers(const Model & m_, int n_, int shape_, int64_t spin_, bool backend_, uint8_t * w_, float * x_, float * y_, int * out_, uint64_t * s) :
        m(m_), n(n_), shape(shape_), spin_cycles(spin_), backend(backend_), w(w_), x(x_), y(y_), out(out_), scratch(s), hidden(n_, m_.hidden / QK), ffn(n_, m_.ffn / QK) {}
    static size_t size(int rows, int columns) { return (size_t) rows / 16 * (columns / QK) * TQ_TILE_BYTES; }
    size_t bytes() const { return size(4 * m.hidden, m.hidden) + size(2 * m.ffn, m.hidden) + size(m.hidden, m.ffn); }
    // The k-th product of a layer.
    Site site(int layer, int k) const {
        const Site sites[4] = {{3, {}, {m.hidden, m.hidden, m.hidden}, m.hidden}, {1, {}, {m.hidden}, m.hidden}, {2, {}, {m.ffn, m.ffn}, m.hidden}, {1, {}, {m.hidden}, m.ffn}};
        size_t at = bytes() * (layer % m.copies);
        for (int i = 0; i < k; i++) for (int j = 0; j < sites[i].n; j++) at += size(sites[i].rows[j], sites[i].columns);
        Site s = sites[k];
        for (int j = 0; j < s.n; j++) { s.w[j] = w + at; at += size(s.rows[j], s.columns); }
        return s;
    }
    void product(int layer, int k, bool activations, cudaStream_t st) {
        Site site_ = site(layer, k);
        tq_segment s[TQ_MAX_SEGMENTS];
        float * to = y;
        for (int j = 0; j < site_.n; j++) { s[j] = {site_.w[j], to, site_.rows[j], site_.rows[j]}; to += (size_t) site_.rows[j] * n; }
        Activations & a = k == 3 ? ffn : hidden;
        if (!activations) {}
        else if (!backend) a.quantize(x, site_.columns, st);
        else if (k % 2 == 0) tq_quantize_norm(x, x + m.hidden * n, x, 1e-5f, norm.p, nullptr, a.act, st); // any numbers will do
        else if (k == 1) tq_quantize(x, m.hidden, a.act, st);
        else tq_quantize_glu(x, x, m.ffn, m.ffn, 0, nullptr, a.act, st);
        bool fits = shape >= 0 && a.act.nb % stream_of(1, shape).unit == 0;
        run_stream(device(), fits ? shape : choose_shape(device(), s, site_.n, a.act), s, site_.n, a.act, scratch, st);
    }
    void layer(int i, cudaStream_t st) {
        for (int k = 0; k < 4; k++) {
            if (k == 1 && spin_cycles) spin<<<1, 32, 0, st>>>(spin_cycles, out);
            product(i, k, true, st);
        }
    }
};

// Each product of a layer by itself, many times in a row: what a launch costs without the others, and (the same weights
// again and again, as far as they fit into L2) what the multiprocessors could do. Without the quantisation L2 keeps the
// activations: a lower bound.
static void bench_products(Layers & l, double rate) {
    for (int k = 0; k < 4; k++) {
        auto run = [&](bool quantise, bool same) {
            return time_graph(l.m.copies * 4, [&](int i, cudaStream_t st) { l.product(same ? 0 : i, k, quantise, st); }, 7);
        };
        Site s = l.site(0, k);
        double bytes = (double) s.n * Layers::size(s.rows[0], s.columns), us = run(false, false);
        printf("%-4s %dx %6dx%-6d  %2d %-12s %10.2f %10.2f %10.2f %6.2f\n", l.m.name, s.n, s.rows[0], s.columns,
               l.n, l.shape < 0 ? "backend's" : stream_of(1, l.shape).name, run(true, false), us, run(false, true), bytes / us / 1e3 / rate);
    }
}

static void bench(const std::string & how) {
    const bool quick = how == "quick", one = how == "one";
    const std::vector<int> tokens = one ? std::vector<int>{1} : std::vector<int>{1, 2, 4, 8};
    const std::vector<Model> models = {{"7B", 32, 12, 4096, 11008}, {"13B", 40, 8, 5120, 13824}, {"30B", 60, 5, 6656, 17920}, {"65B", 80, 4, 8192, 22016}};
    const size_t pool = (size_t) 1 << 30;
    Buffer<uint8_t> w(pool + (1 << 20));
    Buffer<float> x(8 * 22016), y(8 * 2 * 22016);
    Buffer<int> out(1);
    Buffer<uint64_t> scratch(tq_decode_scratch_bytes() / 8);
    make_codes<<<4096, 256>>>(w.p, pool, 3, RANDOM); // speed does not depend on the values
    make_x<<<64, 256>>>(x.p, 8 * 22016, 1, RANDOM);
    auto streaming = [&] {
        return pool / 1e3 / time_graph(1, [&](int, cudaStream_t st) { launch(false, stream_read, 132 * 4, 512, 0, st, (uint4 *) w.p, pool / 16, out.p); });
    };
    int khz;
    CK(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, 0));
    double rate = streaming();
    printf("streaming read of 1 GiB: %.0f GB/s, clock %d MHz\n", rate, khz / 1000);
    printf("%-22s %2s %-12s %10s %10s %10s %6s\n", "one product", "n", "shape", "quantised", "us", "same w", "share");
    for (auto & m : models)
        for (int n : tokens)
            for (int shape = one ? -1 : quick ? STREAM_SHAPES : 0; shape < (one ? 0 : STREAM_SHAPES); shape++) {
                Layers l(m, n, shape, 0, false, w.p, x.p, y.p, out.p, scratch.p);
                bench_products(l, rate);
            }
    printf("layers: gap, microseconds of a kernel between the first product and the second, in the layer's time;\n"
           "before: what comes before each product, our quantisation alone or the backend's kernels (norm, gated unit)\n");
    printf("%-4s %2s %-8s %-12s %4s %9s %7s %6s %16s\n", "", "n", "before", "shape", "gap", "us/layer", "GB/s", "share", "linears, tok/s");
    for (auto & m : models)
        for (int n : tokens)
            for (int shape = -1; shape < STREAM_SHAPES; shape++)
                for (bool backend : {true, false})
                    for (int gap : {0, 10}) {
                        if ((gap || !backend || shape >= 0) && (n > 1 || shape >= 0) && quick) continue;
                        if ((gap || !backend) && one) continue;
                        Layers l(m, n, shape, (int64_t) gap * khz / 1000, backend, w.p, x.p, y.p, out.p, scratch.p);
                        double us = time_graph(m.copies * 2, [&](int i, cudaStream_t st) { l.layer(i, st); }, 7);
                        printf("%-4s %2d %-8s %-12s %4d %9.1f %7.0f %6.2f %16.0f\n", m.name, n, backend ? "backend" : "quantise",
                               shape < 0 ? "backend's" : stream_of(1, shape).name, gap, us, l.bytes() / us / 1e3, l.bytes() / us / 1e3 / rate,
                               n * 1e6 / us / m.layers);
                    }
    printf("streaming read again: %.0f GB/s\n", streaming());
}

int main(int argc, char ** argv) {
    std::string command = argc > 1 ? argv[1] : "check", how = argc > 2 ? argv[2] : "";
    cudaDeviceProp prop;
    CK(cudaGetDeviceProperties(&prop, 0));
    printf("%s, %d multiprocessors, L2 %d MB\n", prop.name, prop.multiProcessorCount, prop.l2CacheSize >> 20);
    if (command == "check") return check(how, argc > 3 ? std::max(1, atoi(argv[3])) : 2);
    bench(how);
    return 0;
}
