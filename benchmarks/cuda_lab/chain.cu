// The chain of products as the backend has it (overlay/ggml/src/ggml-cuda/tq-chain.cu): is it right, and what does a
// layer cost with it and with a kernel for each part?
//
//   OVERLAY=../../third_party/llama.cpp/overlay/ggml/src/ggml-cuda
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I $OVERLAY -o chain chain.cu $OVERLAY/tq-{chain,act,decode}.cu
//   ./chain check [small]    against the kernels for each part, which product.cu and act_check.cu hold against float64
//   ./chain bench            layers of LLaMA's shapes in a CUDA graph
#include "lab.cuh"
#include "tq-chain.cuh"
#include <cstring>

template <class T> struct Buffer {
    T * p;
    size_t n;
    explicit Buffer(size_t n, int fill = 0) : n(n) { CK(cudaMalloc(&p, n * sizeof(T) + 16)); CK(cudaMemset(p, fill, n * sizeof(T))); }
    Buffer(Buffer && b) : p(b.p), n(b.n) { b.p = nullptr; }
    ~Buffer() { cudaFree(p); }
    std::vector<T> host() const { std::vector<T> v(n); CK(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost)); return v; }
};

// Tiles with random codes 0..2 and scales of a real matrix's size.
__global__ void random_tiles(uint8_t * w, size_t tiles, uint32_t seed) {
    for (size_t i = blockIdx.x * (size_t) blockDim.x + threadIdx.x; i < tiles * TQ_TILE_BYTES; i += (size_t) gridDim.x * blockDim.x) {
        int at = i % TQ_TILE_BYTES, v = 0;
        for (int k = 0; k < 4; k++) v |= (hash32(i * 4 + k + seed * 0x9e3779b9ULL) % 3) << (2 * k);
        if (at < TQ_TILE_SCALES) w[i] = v;
        else if (at % 2 == 0) {
            float u = unit(i + seed * 77ULL);
            *(half *) (w + i) = __float2half(at % 4 == 0 ? (0.5f + u) * 0.02f : (u - 0.5f) * 0.01f);
        }
    }
}

struct Matrix {
    int rows, nb;
    Buffer<uint8_t> w;
    Matrix(int rows, int columns, uint32_t seed) : rows(rows), nb(columns / 128), w((size_t) (rows + 15) / 16 * (columns / 128) * TQ_TILE_BYTES) {
        random_tiles<<<1024, 256>>>(w.p, w.n / TQ_TILE_BYTES, seed);
    }
    size_t bytes() const { return w.n; }
};

struct Act {
    Buffer<uint8_t> q, aux;
    tq_act act;
    Act(int n, int nb) : q(tq_act_q_bytes(n, nb), 0x55), aux(tq_act_aux_bytes(n, nb), 0x55), act{TQ_ACT_DECODE, n, tq_act_cols(n), nb, q.p, aux.p} {}
};

// A layer, from the attention's output x to the next layer's q, k and v. All buffers apart.
struct Layer {
    int n, hidden, ffn;
    Matrix o, gate, up, down, q, k, v;
    Layer(int n, int hidden, int ffn, int kv, uint32_t seed) : n(n), hidden(hidden), ffn(ffn), o(hidden, hidden, seed), gate(ffn, hidden, seed + 1),
        up(ffn, hidden, seed + 2), down(hidden, ffn, seed + 3), q(hidden, hidden, seed + 4), k(kv, hidden, seed + 5), v(kv, hidden, seed + 6) {}
    size_t bytes() const { return o.bytes() + gate.bytes() + up.bytes() + down.bytes() + q.bytes() + k.bytes() + v.bytes(); }
};

struct Work {
    int n;
    Buffer<float> x, residual, w1, w2, yo, s1, n1, yg, yu, product, yd, s2, n2, yq, yk, yv;
    Act a0, a1, a2, a3;
    Work(const Layer & l) : n(l.n), x((size_t) n * l.hidden), residual((size_t) n * l.hidden), w1(l.hidden), w2(l.hidden), yo((size_t) n * l.hidden, 0xff),
        s1((size_t) n * l.hidden, 0xff), n1((size_t) n * l.hidden, 0xff), yg((size_t) n * l.ffn, 0xff), yu((size_t) n * l.ffn, 0xff), product((size_t) n * l.ffn, 0xff),
        yd((size_t) n * l.hidden, 0xff), s2((size_t) n * l.hidden, 0xff), n2((size_t) n * l.hidden, 0xff), yq((size_t) n * l.q.rows, 0xff), yk((size_t) n * l.k.rows, 0xff),
        yv((size_t) n * l.v.rows, 0xff), a0(n, l.hidden / 128), a1(n, l.hidden / 128), a2(n, l.ffn / 128), a3(n, l.hidden / 128) {
        make_x<<<256, 256>>>(x.p, x.n, 1, RANDOM); make_x<<<256, 256>>>(residual.p, residual.n, 2, RANDOM);
        make_x<<<256, 256>>>(w1.p, w1.n, 3, RANDOM); make_x<<<256, 256>>>(w2.p, w2.n, 4, RANDOM);
        CK(cudaDeviceSynchronize());
    }
};

static tq_segment segment(const Matrix & m, float * y) { return {m.w.p, y, m.rows, m.rows}; }

static std::vector<tq_step> steps(const Layer & l, Work & w, int gelu, bool write) {
    std::vector<tq_step> s(4);
    for (auto & t : s) memset(&t, 0, sizeof(t));
    s[0].kind = TQ_STEP_PLAIN; s[0].a = w.x.p; s[0].ld_a = l.hidden; s[0].act = w.a0.act; s[0].segments[0] = segment(l.o, w.yo.p); s[0].n_segments = 1;
    s[1].kind = TQ_STEP_NORM; s[1].a = w.yo.p; s[1].b = w.residual.p; s[1].w = w.w1.p; s[1].eps = 1e-5f; s[1].sum = w.s1.p; s[1].out = write ? w.n1.p : nullptr;
    s[1].act = w.a1.act; s[1].segments[0] = segment(l.gate, w.yg.p); s[1].segments[1] = segment(l.up, w.yu.p); s[1].n_segments = 2;
    s[2].kind = TQ_STEP_GLU; s[2].a = w.yg.p; s[2].b = w.yu.p; s[2].ld_a = s[2].ld_b = l.ffn; s[2].gelu = gelu; s[2].out = write ? w.product.p : nullptr;
    s[2].act = w.a2.act; s[2].segments[0] = segment(l.down, w.yd.p); s[2].n_segments = 1;
    s[3].kind = TQ_STEP_NORM; s[3].a = w.yd.p; s[3].b = w.s1.p; s[3].w = w.w2.p; s[3].eps = 1e-5f; s[3].sum = w.s2.p; s[3].out = write ? w.n2.p : nullptr;
    s[3].act = w.a3.act; s[3].segments[0] = segment(l.q, w.yq.p); s[3].segments[1] = segment(l.k, w.yk.p); s[3].segments[2] = segment(l.v, w.yv.p); s[3].n_segments = 3;
    return s;
}

// One step by the kernels for each part.
static void apart(const tq_step & s, const tq_act & act, void * scratch, cudaStream_t st, bool activations = true, bool product = true) {
    if (activations) {
        if (s.kind == TQ_STEP_PLAIN) tq_quantize(s.a, s.ld_a, act, st);
        if (s.kind == TQ_STEP_NORM) tq_quantize_norm(s.a, s.b, s.w, s.eps, s.sum, s.out, act, st);
        if (s.kind == TQ_STEP_GLU) tq_quantize_glu(s.a, s.b, s.ld_a, s.ld_b, s.gelu, s.out, act, st);
    }
    if (product) tq_decode(s.segments, s.n_segments, act, scratch, nullptr, st);
}

// ---- check --------------------------------------------------------------------------------------------------
static int failures = 0, checks = 0;
static void expect(bool ok, const char * what, int n, int hidden, int ffn, double value) {
    checks++;
    if (!ok && failures++ < 30) printf("FAIL %s: n %d, %d x %d: %g\n", what, n, hidden, ffn, value);
}
static double difference(const std::vector<float> & a, const std::vector<float> & b) { // largest, of the root mean square
    double top = 0, square = 1e-60;
    for (size_t i = 0; i < a.size(); i++) {
        if (!(a[i] == a[i]) || !(b[i] == b[i])) return 1e9;
        top = std::max(top, std::fabs((double) a[i] - b[i]));
        square += (double) b[i] * b[i];
    }
    return top / std::sqrt(square / a.size());
}

static void check(int n, int hidden, int ffn, int kv, int gelu, bool write, int repeats) {
    Layer l(n, hidden, ffn, kv, 11);
    Work w(l);
    Buffer<uint8_t> scratch(tq_chain_scratch_bytes()), other(tq_decode_scratch_bytes());
    auto s = steps(l, w, gelu, write);
    if (!tq_chain_fits(s.data(), 4)) { expect(false, "does not fit", n, hidden, ffn, 0); return; }
    tq_chain(s.data(), 4, scratch.p, 0);
    CK(cudaDeviceSynchronize());
    for (int i = 0; i < 4; i++) { // every step from the chain's own inputs, so that errors do not add up
        tq_step t = s[i];
        const size_t values = (size_t) n * t.act.nb * 128;
        Buffer<float> sum(values, 0xff), out(values, 0xff);
        Act act(n, t.act.nb);
        if (t.sum) t.sum = sum.p;
        if (t.out) t.out = out.p;
        apart(t, act.act, other.p, 0, true, false);
        Buffer<uint8_t> mine(act.q.n), head(act.aux.n);
        CK(cudaMemcpy(mine.p, s[i].act.q, act.q.n, cudaMemcpyDeviceToDevice));
        CK(cudaMemcpy(head.p, s[i].act.aux, act.aux.n, cudaMemcpyDeviceToDevice));
        auto q0 = mine.host(), q1 = act.q.host();
        int off = 0, far = 0;
        for (size_t j = 0; j < q0.size(); j++) { int d = std::abs((int) (int8_t) q0[j] - (int) (int8_t) q1[j]); off += d != 0; far += d > 1; }
        expect(far == 0 && off <= (s[i].kind == TQ_STEP_NORM ? 1 + (int) q0.size() / 500 : 0), "activations", n, hidden, i, off);
        auto h0 = head.host(), h1 = act.aux.host();
        for (size_t j = 0; j < h0.size(); j += sizeof(tq_act_head)) {
            tq_act_head a, b; memcpy(&a, &h0[j], sizeof(a)); memcpy(&b, &h1[j], sizeof(b));
            expect(std::fabs(a.d - b.d) <= 2e-6f * b.d && std::fabs(a.sum - b.sum) <= 1e-4f * (std::fabs(b.sum) + b.d * 127), "heads", n, hidden, i, a.sum - b.sum);
        }
        if (s[i].sum) { Buffer<float> m(values); CK(cudaMemcpy(m.p, s[i].sum, values * 4, cudaMemcpyDeviceToDevice)); double d = difference(m.host(), sum.host()); expect(d < 1e-6, "sum", n, hidden, i, d); }
        if (s[i].out) { Buffer<float> m(values); CK(cudaMemcpy(m.p, s[i].out, values * 4, cudaMemcpyDeviceToDevice)); double d = difference(m.host(), out.host()); expect(d < 2e-5, "out", n, hidden, i, d); }
        for (int k = 0; k < t.n_segments; k++) {
            Buffer<float> m((size_t) n * t.segments[k].rows), y((size_t) n * t.segments[k].rows, 0xff);
            CK(cudaMemcpy(m.p, t.segments[k].y, m.n * 4, cudaMemcpyDeviceToDevice));
            tq_segment one = t.segments[k];
            one.y = y.p;
            tq_decode(&one, 1, s[i].act, other.p, nullptr, 0); // the chain's own activations
            double d = difference(m.host(), y.host());
            expect(d < 2e-5, "product", n, hidden, 10 * i + k, d);
        }
    }
    // the same bits every time, launched back to back from a graph, counters and words clear afterwards
    std::vector<float> first = w.yq.host(), first_v = w.yv.host();
    cudaStream_t st; CK(cudaStreamCreate(&st));
    cudaGraph_t g; cudaGraphExec_t ge;
    CK(cudaStreamBeginCapture(st, cudaStreamCaptureModeGlobal));
    for (int r = 0; r < 5; r++) { tq_chain(s.data(), 4, scratch.p, st); tq_quantize(w.yq.p, hidden, w.a0.act, st); }
    CK(cudaStreamEndCapture(st, &g)); CK(cudaGraphInstantiate(&ge, g, 0));
    for (int r = 0; r < repeats; r++) {
        CK(cudaMemsetAsync(w.yq.p, 0xff, w.yq.n * 4, st)); CK(cudaMemsetAsync(w.yv.p, 0xff, w.yv.n * 4, st));
        CK(cudaGraphLaunch(ge, st));
        CK(cudaStreamSynchronize(st));
        expect(w.yq.host() == first && w.yv.host() == first_v, "repeats", n, hidden, ffn, r);
    }
    auto words = scratch.host();
    size_t squares = sizeof(float) * TQ_DECODE_MAX * 256;
    expect(std::all_of(words.begin(), words.end() - squares, [](uint8_t b) { return b == 0; }), "scratch is not clear", n, hidden, ffn, 0);
    cudaGraphExecDestroy(ge); cudaGraphDestroy(g); cudaStreamDestroy(st);
}

__global__ void gap(float * p) { p[blockIdx.x * blockDim.x + threadIdx.x] += 1.0f; } // one of the small kernels around the attention

// ---- bench --------------------------------------------------------------------------------------------------
static void bench(const char * name, int hidden, int ffn, int n) {
    std::vector<Layer> layers;
    const size_t each = ((size_t) 4 * hidden * hidden + (size_t) 3 * hidden * ffn) / 128 * 36;
    const int count = std::max<int>(4, std::min<size_t>(12, (size_t) 900e6 / each));
    layers.reserve(count);
    for (int i = 0; i < count; i++) layers.emplace_back(n, hidden, ffn, hidden, 100 + 10 * i);
    Work w(layers[0]);
    Buffer<uint8_t> scratch(tq_chain_scratch_bytes()), other(tq_decode_scratch_bytes());
    { auto s = steps(layers[0], w, 0, false); tq_chain_fits(s.data(), 4); tq_chain(s.data(), 4, scratch.p, 0); CK(cudaDeviceSynchronize()); }
    double us[2];
    for (int way = 0; way < 2; way++)
        us[way] = time_graph(2 * count, [&](int i, cudaStream_t st) {
            auto s = steps(layers[i % count], w, 0, false);
            for (int k = 0; k < (getenv("GAP") ? 3 : 0); k++) gap<<<64, 128, 0, st>>>(w.x.p);
            if (way == 0) tq_chain(s.data(), 4, scratch.p, st);
            else for (int k = 0; k < 4; k++) apart(s[k], s[k].act, other.p, st);
        }, 7);
    printf("%-4s n %d: chain %6.1f us a layer (%4.0f GB/s), kernels for each part %6.1f us (%4.0f GB/s)\n", name, n, us[0],
           layers[0].bytes() / us[0] / 1e3, us[1], layers[0].bytes() / us[1] / 1e3);
}

int main(int argc, char ** argv) {
    const std::string mode = argc > 1 ? argv[1] : "", size = argc > 2 ? argv[2] : "";
    if (mode == "check") {
        if (size == "small") {
            check(1, 512, 1280, 128, 0, true, 2);
            check(3, 512, 1280, 100, 1, false, 2);
        } else {
            for (int n = 1; n <= 8; n++) {
                check(n, 256, 768, 17, 0, true, 10);
                check(n, 512, 1280, 100, 1, true, 10);
                check(n, 4096, 11008, 1024, 0, n % 2, 20);
                check(n, 8192, 22016, 8192, 0, false, 10);
                check(n, 2048, 5632, 256, 1, true, 20);
            }
        }
        printf("check: %d of %d failed\n", failures, checks);
        return failures != 0;
    }
    if (getenv("PREFER")) CK(cudaDeviceSetCacheConfig(cudaFuncCachePreferShared));
    struct { const char * name; int hidden, ffn; } models[] = {{"7B", 4096, 11008}, {"13B", 5120, 13824}, {"30B", 6656, 17920}, {"65B", 8192, 22016}};
    for (auto & m : models)
        for (int n : {1, 2, 4, 8})
            if (size != "quick" || ((m.hidden == 4096 || m.hidden == 8192) && (n == 1 || n == 8))) bench(m.name, m.hidden, m.ffn, n);
    return 0;
}
