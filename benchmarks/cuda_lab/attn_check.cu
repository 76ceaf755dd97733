// tq-attn.cu against float64, then its time in a CUDA graph.
//   S=../../third_party/llama.cpp/overlay/ggml/src/ggml-cuda/tq/kernels
//   nvcc -std=c++17 -O3 -use_fast_math -arch=sm_90a -cudart static -o attn_check attn_check.cu $S/tq-act.cu
//   ./attn_check check [SECONDS | small | tiny] | bench
//     small: 15 seconds; tiny: a few launches of each kind, for compute-sanitizer (../h200/sanitize.sh)
// The floats must be within a few units of float32 of the reference, the activations must be those that
// tq_quantize makes of the floats, bit for bit, and every repeat must give the same bits.

#include "../../third_party/llama.cpp/overlay/ggml/src/ggml-cuda/tq/kernels/tq-attn.cu"

#include <chrono>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#define CK(x) attn_check((x), #x)

constexpr int MAX_HEADS = 64, MAX_TOKENS = TQ_BATCH_MAX, MAX_KEYS = 4096; // also more than the backend takes it for

static __host__ __device__ uint32_t hash32(uint64_t v) {
    v ^= v >> 33; v *= 0xff51afd7ed558ccdULL; v ^= v >> 33; v *= 0xc4ceb9fe1a85ec53ULL; v ^= v >> 33;
    return (uint32_t) v;
}
static __host__ __device__ float noise(uint64_t v) { // about normal, variance 1
    float x = 0;
    for (int j = 0; j < 4; j++) { x += hash32(4 * v + j) * (1.0f / 4294967296.0f) - 0.5f; }
    return x * 1.7320508f;
}
template <typename T> __global__ void fill_noise(T * x, size_t n, uint64_t seed, float scale) {
    for (size_t i = blockIdx.x * (size_t) blockDim.x + threadIdx.x; i < n; i += (size_t) gridDim.x * blockDim.x) {
        x[i] = (T) (scale * noise(i + (seed << 32)));
    }
}

// Grid (heads, tokens of a stream, streams), 128 threads. Also the largest sum of magnitudes that a score had: its rounding is relative to that.
static __global__ void reference(const tq_attention a, double * out, double * most_magnitude) {
    __shared__ double score[MAX_KEYS];
    __shared__ double shared[128];
    const int head = blockIdx.x, token = blockIdx.y, stream = blockIdx.z, kv = head / (a.heads / a.heads_kv);
    const size_t at = (size_t) stream * a.tokens + token;
    const float * q = (const float *) ((const char *) a.q + token * a.q_token + head * a.q_head + stream * a.q_stream);
    double top = -INFINITY, magnitude = 0;
    for (int key = threadIdx.x; key < a.keys; key += 128) {
        const half * k = (const half *) ((const char *) a.k + key * a.k_key + kv * a.k_head + stream * a.k_stream);
        double s = 0, m = 0;
        for (int i = 0; i < TQ_HEAD; i++) { const double x = (double) q[i] * (double) __half2float(k[i]); s += x; m += fabs(x); }
        const float hidden = a.mask ? __half2float(*(const half *) ((const char *) a.mask + token * a.mask_token + stream * a.mask_stream + 2 * key)) : 0.0f;
        score[key] = a.scale * s + hidden;
        top = fmax(top, score[key]);
        magnitude = fmax(magnitude, fabs(a.scale) * m + (hidden > -1e6f ? fabs((double) hidden) : 0.0));
    }
    shared[threadIdx.x] = top;
    __syncthreads();
    for (int i = 0; i < 128; i++) { top = fmax(top, shared[i]); }
    __syncthreads();
    shared[threadIdx.x] = magnitude;
    __syncthreads();
    for (int i = 0; i < 128; i++) { magnitude = fmax(magnitude, shared[i]); }
    double sum = 0, y = 0;
    const bool none = top < -1e300;
    for (int key = 0; key < a.keys && !none; key++) {
        const double p = score[key] < -1e300 ? 0.0 : exp(score[key] - top);
        sum += p;
        if (p > 0) { y += p * (double) __half2float(*((const half *) ((const char *) a.v + key * a.v_key + kv * a.v_head + stream * a.v_stream) + threadIdx.x)); }
    }
    out[(at * a.heads + head) * TQ_HEAD + threadIdx.x] = none ? 0.0 : y / sum;
    if (threadIdx.x == 0) { most_magnitude[at * a.heads + head] = magnitude; }
}

template <typename T> struct device_array {
    T *    data = nullptr;
    size_t n;
    explicit device_array(size_t n) : n(n) { CK(cudaMalloc(&data, n * sizeof(T))); poison(n); }
    device_array(const device_array &) = delete;
    ~device_array() { cudaFree(data); }
    void poison(size_t count) { CK(cudaMemset(data, 0xFF, count * sizeof(T))); } // NaN
    void set(const std::vector<T> & v) { CK(cudaMemcpy(data, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice)); }
    std::vector<T> host(size_t count) const { std::vector<T> v(count); CK(cudaMemcpy(v.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost)); return v; }
};

struct site {
    device_array<uint8_t> q, aux;
    tq_act act;
    site() : q(tq_act_q_bytes(MAX_TOKENS, MAX_HEADS)), aux(tq_act_aux_bytes(MAX_TOKENS, MAX_HEADS)) {}
    tq_act & shape(int n, int nb) {
        q.poison(q.n); aux.poison(aux.n);
        return act = tq_act{n <= TQ_DECODE_MAX ? TQ_ACT_DECODE : TQ_ACT_PREFILL, n, tq_act_cols(n), nb, q.data, aux.data};
    }
    std::vector<uint8_t> bytes() const {
        std::vector<uint8_t> v = q.host(tq_act_q_bytes(act.n, act.nb)), w = aux.host(tq_act_aux_bytes(act.n, act.nb));
        if (act.layout == TQ_ACT_PREFILL) { // missing tokens may hold anything
            const int width = act.cols;
            for (int b = 0; b < act.nb; b++) {
                for (int k = act.n; k < width; k++) {
                    for (int e = 0; e < TQ_BLOCK; e++) { v[(size_t) b * tq_record_bytes(width) + tq_record_q(width, e, k)] = 0; }
                    memset(&v[(size_t) b * tq_record_bytes(width) + width * TQ_BLOCK + 4 * tq_record_d(k)], 0, 4);
                    for (int i : {0, 2}) { memset(&w[4 * (tq_sums_at(width, 0, act.nb, b, k) + i)], 0, 4); }
                }
            }
        }
        v.insert(v.end(), w.begin(), w.end());
        return v;
    }
};

enum mask_kind { NO_MASK, CAUSAL, HOLES, NOTHING_SEEN, BIASED, MASKS };
enum data_kind { ORDINARY, LARGE_SCORES, ONE_KEY, DATA };

static float mask_value(int kind, int token, int tokens, int key, int keys) {
    switch (kind) {
        case CAUSAL:       return key <= std::max(0, keys * 3 / 5 - tokens + token) ? 0.0f : -INFINITY;
        case HOLES:        return hash32(key / 5 + 977 * token) % 3 == 0 || key / 64 % 2 ? -INFINITY : 0.0f;
        case NOTHING_SEEN: return token % 2 == 0 ? -INFINITY : 0.0f;
        case BIASED:       return hash32(key) % 7 == 0 ? -INFINITY : -0.01f * (hash32(key + token) % 500);
        default:           return 0.0f;
    }
}

struct memory {
    device_array<float>  q{(size_t) MAX_TOKENS * MAX_HEADS * TQ_HEAD * 2};
    device_array<half>   k{(size_t) MAX_KEYS * MAX_HEADS * TQ_HEAD}, v{(size_t) MAX_KEYS * MAX_HEADS * TQ_HEAD}, mask{(size_t) MAX_TOKENS * (MAX_KEYS + 8)};
    device_array<float>  out{(size_t) MAX_TOKENS * MAX_HEADS * TQ_HEAD + 64};
    device_array<double> want{(size_t) MAX_TOKENS * MAX_HEADS * TQ_HEAD}, magnitude{(size_t) MAX_TOKENS * MAX_HEADS};
    site fused, apart;
};

static int failures = 0, cases = 0;
static void expect(bool ok, const std::string & what) {
    cases++;
    if (!ok && failures++ < 30) { printf("FAIL %s\n", what.c_str()); }
}

static double worst_error = 0;

// tokens: of each stream
static void check_one(memory & m, int tokens, int heads, int ratio, int keys, int mask, int data, bool apart_heads, int ranks, int streams = 1) {
    const int all = tokens * streams;
    const std::string name = "tokens " + std::to_string(tokens) + " x " + std::to_string(streams) + " heads " + std::to_string(heads) + "/" + std::to_string(ratio) + " keys " + std::to_string(keys) +
        " mask " + std::to_string(mask) + " data " + std::to_string(data) + " ranks " + std::to_string(ranks);
    const int    kv   = heads / ratio;
    const size_t size = (size_t) all * heads * TQ_HEAD;
    tq_attention a = {};
    a.tokens = tokens; a.streams = streams; a.heads = heads; a.heads_kv = kv; a.keys = keys;
    a.scale  = data == LARGE_SCORES ? 3.0f : data == ONE_KEY ? 20.0f : 0.08838835f;
    a.q = m.q.data;
    a.q_head  = apart_heads ? (int64_t) tokens * TQ_HEAD * 4 : TQ_HEAD * 4; // two orders of heads and tokens
    a.q_token = apart_heads ? TQ_HEAD * 4 : (int64_t) (heads + 2) * TQ_HEAD * 4;
    a.k = m.k.data; a.v = m.v.data;
    a.k_head = a.v_head = TQ_HEAD * 2;
    a.k_key  = a.v_key  = (int64_t) kv * TQ_HEAD * 2;
    if (kv == 1) { a.v_key = 256 + 16; } // another distance
    a.q_stream = a.q_token * tokens;
    if (apart_heads) { a.q_stream = (int64_t) heads * tokens * TQ_HEAD * 4; }
    a.k_stream = a.k_key * keys; a.v_stream = a.v_key * keys;
    std::vector<half> mask_host;
    if (mask != NO_MASK) {
        const int ld = keys + (keys % 2 ? 0 : 8);
        for (int t = 0; t < all; t++) { for (int i = 0; i < ld; i++) { mask_host.push_back(__float2half(i < keys ? mask_value(mask, t, all, i, keys) : 1.0f)); } }
        m.mask.set(mask_host);
        a.mask = m.mask.data;
        a.mask_token = 2 * ld; a.mask_stream = a.mask_token * tokens;
    }
    a.out = m.out.data;
    expect(tq_attention_fits(a) == (keys <= TQ_ATTENTION_KEYS), name + ": taken or declined wrongly");
    m.out.poison(size + 64);
    reference<<<dim3(heads, tokens, streams), 128>>>(a, m.want.data, m.magnitude.data);
    CK(cudaGetLastError());
    launch_attention(a, m.fused.shape(all, heads), ranks, 0);
    CK(cudaGetLastError());
    tq_quantize(m.out.data, (int64_t) heads * TQ_HEAD, m.apart.shape(all, heads), 0);
    const std::vector<float>  got  = m.out.host(size + 64);
    const std::vector<double> want = m.want.host(size), magnitude = m.magnitude.host((size_t) all * heads);
    size_t bad = 0, first = 0;
    for (size_t i = 0; i < size; i++) {
        const double error = std::fabs(got[i] - want[i]) / (1e-6 * (4 + 2 * magnitude[i / TQ_HEAD]) * 4); // 4: the largest |v|
        worst_error = std::isfinite(error) ? std::max(worst_error, error) : worst_error;
        if (!(error <= 1)) { if (bad++ == 0) { first = i; } }
    }
    if (bad) { printf("  [%zu] %g instead of %g, magnitude %g\n", first, got[first], want[first], magnitude[first / TQ_HEAD]); }
    expect(bad == 0, name + ": " + std::to_string(bad) + " of " + std::to_string(size) + " floats");
    uint32_t after[64];
    memcpy(after, &got[size], sizeof(after));
    bool kept = true;
    for (uint32_t x : after) { kept = kept && x == 0xffffffffu; }
    expect(kept, name + ": wrote beyond the output");
    const std::vector<uint8_t> with = m.fused.bytes();
    expect(with == m.apart.bytes(), name + ": activations");
    a.out = nullptr;
    launch_attention(a, m.fused.shape(all, heads), ranks, 0);
    expect(m.fused.bytes() == with, name + ": activations without floats, or a repeat");
}

struct graph {
    cudaStream_t stream; cudaGraphExec_t exec;
    template <typename F> graph(int calls, F && f) {
        cudaGraph_t g;
        CK(cudaStreamCreate(&stream)); CK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
        for (int i = 0; i < calls; i++) { f(i, stream); }
        CK(cudaStreamEndCapture(stream, &g)); CK(cudaGraphInstantiate(&exec, g, nullptr, nullptr, 0)); CK(cudaGraphDestroy(g));
    }
    graph(const graph &) = delete;
    ~graph() { cudaGraphExecDestroy(exec); cudaStreamDestroy(stream); }
    void run() { CK(cudaGraphLaunch(exec, stream)); CK(cudaStreamSynchronize(stream)); }
};

// Each attention reads what the one before wrote (through its output as q): a kernel that starts too early would show.
static void check_repeats(memory & m, int tokens, int heads, int ratio, int keys) {
    tq_attention a = {};
    a.tokens = tokens; a.streams = 1; a.heads = heads; a.heads_kv = heads / ratio; a.keys = keys; a.scale = 4.0f;
    a.q = m.q.data; a.q_head = TQ_HEAD * 4; a.q_token = heads * TQ_HEAD * 4;
    a.k = m.k.data; a.v = m.v.data; a.k_head = a.v_head = 256; a.k_key = a.v_key = (int64_t) a.heads_kv * 256;
    a.out = m.out.data;
    const tq_act act = m.fused.shape(tokens, heads), other = m.apart.shape(tokens, heads);
    const size_t size = (size_t) tokens * heads * TQ_HEAD;
    device_array<float> second(size);
    std::vector<std::vector<float>> runs;
    const auto chain = [&](int i, cudaStream_t stream) {
        tq_attention b = a;
        if (i > 0) { b.q = i % 2 ? m.out.data : second.data; }
        b.out = i % 2 ? second.data : m.out.data;
        tq_quantize_attention(b, act, stream);
        tq_quantize(b.out, (int64_t) heads * TQ_HEAD, other, stream);
    };
    for (int i = 0; i < 12; i++) { chain(i, 0); CK(cudaDeviceSynchronize()); } // one by one
    const std::vector<float>   want  = second.host(size);
    const std::vector<uint8_t> bytes = m.fused.bytes();
    graph g(12, chain);
    bool same = true;
    for (int i = 0; i < 20; i++) {
        m.out.poison(size); second.poison(size); m.fused.shape(tokens, heads); m.apart.shape(tokens, heads);
        CK(cudaDeviceSynchronize());
        g.run();
        same = same && memcmp(second.host(size).data(), want.data(), size * 4) == 0 && m.fused.bytes() == bytes && m.apart.bytes() == bytes;
    }
    expect(same, "repeats in a graph: tokens " + std::to_string(tokens) + " heads " + std::to_string(heads) + " keys " + std::to_string(keys));
}

// One thread block and clusters of 2, 4 and 8; a group of queries and two, whole and not; keys for one step and for several.
static void check_few(memory & m) {
    int done = 0;
    for (int ranks : {1, 2, 4, 8}) {
        for (int tokens : {1, 3, 8}) {
            for (int ratio : {1, 4}) { done++; check_one(m, tokens, 4, ratio, done % 2 ? 100 : 300, done % MASKS, done % DATA, done % 2, ranks); }
        }
    }
    for (int streams : {3, 9, 33}) { done++; check_one(m, 1, 4, streams == 9 ? 4 : 1, 100, done % MASKS, ORDINARY, done % 2, 0, streams); }
    check_repeats(m, 3, 2, 1, 64);
    CK(cudaDeviceSynchronize());
    printf("%s: %d shapes, %d checks, %d failures; worst error %.3f of what is allowed\n", failures ? "FAILED" : "ok", done, cases, failures, worst_error);
}

static void check_all(memory & m, double seconds) {
    const auto start = std::chrono::steady_clock::now();
    int done = 0, left_out = 0;
    for (int streams = 2; streams <= TQ_BATCH_MAX; streams++) { // several sequences, all numbers of them
        for (int tokens : {1, 2, 3, 8}) {
            for (int heads : {2, 8, 40}) {
                const int keys = (streams + tokens) % 3 == 0 ? 32 : (streams + tokens) % 3 == 1 ? 256 : 61;
                if (tokens * streams > TQ_BATCH_MAX || streams * keys * heads > MAX_KEYS * MAX_HEADS) { continue; }
                done++;
                check_one(m, tokens, heads, heads == 2 ? 1 : heads == 8 ? 4 : 8, keys, done % MASKS, done / MASKS % DATA, done % 2, 0, streams);
            }
        }
    }
    for (int keys : {1, 7, 32, 100, 256, 257, 1000, 4096}) {
        for (int tokens = 1; tokens <= TQ_DECODE_MAX; tokens++) {
            for (int heads : {1, 2, 8, 32, 40, 64}) {
                for (int ratio : {1, 2, 4, 8}) {
                    if (heads % ratio != 0) { continue; }
                    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds) { left_out++; continue; }
                    done++;
                    check_one(m, tokens, heads, ratio, keys, done % MASKS, done / MASKS % DATA, done % 2, 0);
                    if (heads == 8 && keys != 4096) {
                        for (int ranks : {1, 2, 4, 8}) { check_one(m, tokens, heads, ratio, keys, (done + ranks) % MASKS, ORDINARY, false, ranks); }
                    }
                }
            }
        }
    }
    for (int tokens : {1, 3, 8}) { check_repeats(m, tokens, 32, 1, 512); check_repeats(m, tokens, 64, 8, 300); check_repeats(m, tokens, 2, 1, 64); }
    CK(cudaDeviceSynchronize());
    printf("%s: %d shapes, %d checks, %d failures, %d shapes left out for time; worst error %.3f of what is allowed\n", failures ? "FAILED" : "ok", done, cases, failures, left_out, worst_error);
}

// ---- time --------------------------------------------------------------------------------------------------

static double time_us(int calls, graph & g) {
    cudaEvent_t start, stop;
    CK(cudaEventCreate(&start)); CK(cudaEventCreate(&stop));
    std::vector<float> times;
    for (int i = 0; i < 9; i++) {
        float ms;
        CK(cudaEventRecord(start, g.stream)); CK(cudaGraphLaunch(g.exec, g.stream)); CK(cudaEventRecord(stop, g.stream)); CK(cudaEventSynchronize(stop));
        CK(cudaEventElapsedTime(&ms, start, stop));
        if (i >= 2) { times.push_back(ms); }
    }
    CK(cudaEventDestroy(start)); CK(cudaEventDestroy(stop));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1e3 / calls;
}

// Sequences at once: each has `keys` in its cache, of which it sees some.
static void bench_streams(half * pool, size_t pool_size, const float * q) {
    constexpr int CALLS = 16;
    device_array<half> mask((size_t) MAX_TOKENS * MAX_KEYS);
    site s;
    for (int ratio : {1, 8}) {
        for (int heads : {32, 64}) {
            for (int streams : {2, 4, 8, 9, 16, 32, 64}) {
                for (int seen : {48, 80, 256}) {
                    const int    keys   = 256;
                    const size_t one    = (size_t) streams * keys * heads / ratio * TQ_HEAD;
                    const int    layers = (int) std::min<size_t>(CALLS, pool_size / (2 * one));
                    std::vector<half> h((size_t) streams * keys);
                    for (size_t i = 0; i < h.size(); i++) { h[i] = __float2half((int) (i % keys) < seen ? 0.0f : -INFINITY); }
                    mask.set(h);
                    tq_attention a = {};
                    a.tokens = 1; a.streams = streams; a.heads = heads; a.heads_kv = heads / ratio; a.keys = keys; a.scale = 0.0884f;
                    a.q = q; a.q_head = TQ_HEAD * 4; a.q_token = a.q_stream = heads * TQ_HEAD * 4;
                    a.k_head = a.v_head = 256; a.k_key = a.v_key = (int64_t) a.heads_kv * 256; a.k_stream = a.v_stream = a.k_key * keys;
                    a.mask = mask.data; a.mask_token = a.mask_stream = 2 * keys;
                    const tq_act act = s.shape(streams, heads);
                    graph g(CALLS, [&](int i, cudaStream_t stream) {
                        tq_attention b = a;
                        b.k = pool + i % layers * 2 * one;
                        b.v = b.k + one;
                        launch_attention(b, act, 0, stream);
                    });
                    const double us = time_us(CALLS, g);
                    printf("heads %d/%d, %2d sequences, %3d keys of %d: %6.2f us (%4.0f GB/s of keys and values seen)\n", heads, ratio, streams, seen, keys, us, 4e-3 * one * seen / keys / us);
                }
            }
        }
    }
}

static void bench() {
    constexpr size_t POOL = (size_t) 1 << 29; // halves: 1 GiB, so that keys and values come from memory as in a model
    constexpr int CALLS = 64;
    device_array<half> pool(POOL);
    fill_noise<<<2048, 256>>>(pool.data, POOL, 7, 1.0f);
    device_array<float> q((size_t) MAX_TOKENS * MAX_HEADS * TQ_HEAD);
    fill_noise<<<256, 256>>>(q.data, q.n, 8, 1.0f);
    device_array<half> mask((size_t) MAX_TOKENS * MAX_KEYS);
    site s, other;
    CK(cudaDeviceSynchronize());
    bench_streams(pool.data, POOL, q.data);
    printf("us a call, in a graph of %d with dependent launch; keys and values from memory (another layer's each call); by thread blocks a cluster\n", CALLS);
    for (int ratio : {1, 8}) {
        for (int heads : {32, 40, 52, 64}) {
            if (heads % ratio) { continue; }
            for (int tokens : {1, 2, 4, 8}) {
                for (int keys : {256, 512, 1024, 4096}) {
                    if ((tokens == 2 || tokens == 4) && (keys != 512 || heads % 32)) { continue; }
                    const size_t one   = (size_t) keys * heads / ratio * TQ_HEAD;
                    const int   layers = (int) std::min<size_t>(CALLS, POOL / (2 * one));
                    tq_attention a = {};
                    a.tokens = tokens; a.streams = 1; a.heads = heads; a.heads_kv = heads / ratio; a.keys = keys; a.scale = 0.0884f;
                    a.q = q.data; a.q_head = TQ_HEAD * 4; a.q_token = heads * TQ_HEAD * 4;
                    a.k_head = a.v_head = 256; a.k_key = a.v_key = (int64_t) a.heads_kv * 256;
                    a.mask = mask.data; a.mask_token = 2 * keys;
                    const tq_act act = s.shape(tokens, heads);
                    const tq_act before = other.shape(tokens, heads);
                    const auto timed = [&](int ranks, bool pair = false) {
                        graph g(CALLS, [&](int i, cudaStream_t stream) {
                            if (pair) { tq_quantize(q.data, (int64_t) heads * TQ_HEAD, before, stream); }
                            tq_attention b = a;
                            b.k = pool.data + i % layers * 2 * one;
                            b.v = b.k + one;
                            launch_attention(b, act, ranks, stream);
                        });
                        return time_us(CALLS, g);
                    };
                    CK(cudaMemset(mask.data, 0, mask.n * 2));
                    const double own = timed(0);
                    const int groups = (act.cols * ratio + QUERIES - 1) / QUERIES;
                    printf("heads %d/%d tokens %d keys %4d: %6.2f (%4.0f GB/s, ranks %d) |", heads, ratio, tokens, keys, own, 4e-3 * one / own, ranks_for(facts(), a.heads_kv * groups, keys));
                    for (int ranks : {1, 2, 4, 8}) { printf(" %d: %6.2f", ranks, timed(ranks)); }
                    printf(" | with a small kernel before each: %6.2f", timed(0, true));
                    if (keys <= 512) { // 60 of a hundred keys are there, the rest is padding
                        std::vector<half> h((size_t) tokens * keys);
                        for (size_t i = 0; i < h.size(); i++) { h[i] = __float2half((int) (i % keys) < keys * 3 / 5 ? 0.0f : -INFINITY); }
                        mask.set(h);
                        printf(" | 60%% of the keys: %6.2f", timed(0));
                    }
                    printf("\n");
                }
            }
        }
    }
}

int main(int argc, char ** argv) {
    const std::string mode = argc > 1 ? argv[1] : "check";
    if (mode == "check") {
        const std::string how = argc > 2 ? argv[2] : "";
        memory m;
        fill_noise<<<256, 256>>>(m.q.data, m.q.n, 1, 1.0f);
        fill_noise<<<1024, 256>>>(m.k.data, m.k.n, 2, 1.0f);
        fill_noise<<<1024, 256>>>(m.v.data, m.v.n, 3, 1.0f);
        CK(cudaDeviceSynchronize());
        if (how == "tiny") { check_few(m); }
        else { check_all(m, how == "small" ? 15 : how.empty() ? 600 : atof(how.c_str())); }
    }
    else if (mode == "bench") { bench(); }
    else { fprintf(stderr, "usage: attn_check check [SECONDS | small | tiny] | bench\n"); return 2; }
    return failures != 0;
}
