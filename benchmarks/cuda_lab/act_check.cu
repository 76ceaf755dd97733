// The kernels of tq-act.cu against float64 on the host, then their time in a CUDA graph.
//   nvcc -std=c++17 -O3 -use_fast_math -arch=sm_90a -cudart static -o act_check act_check.cu
//   ./act_check check [small|tiny] | bench       tiny: each kernel a few times, for compute-sanitizer (../h200/sanitize.sh)
// tq_quantize must give the CPU's bytes (Q8_T of FORMAT.md); after a norm or a gated unit, whose float sums
// depend on their order, each value must be within half a step (and 1e-4 of one) of the float64 result.

#include "../../third_party/llama.cpp/overlay/ggml/src/ggml-cuda/tq/kernels/tq-act.cu"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#define CK(x) check((x), #x)

template <typename T> struct device_array {
    T *    data = nullptr;
    size_t n;
    explicit device_array(size_t n) : n(n) { CK(cudaMalloc(&data, n * sizeof(T))); CK(cudaMemset(data, 0xA5, n * sizeof(T))); }
    explicit device_array(const std::vector<T> & v) : device_array(v.size()) { CK(cudaMemcpy(data, v.data(), n * sizeof(T), cudaMemcpyHostToDevice)); }
    device_array(const device_array &) = delete;
    ~device_array() { cudaFree(data); }
    std::vector<T> host() const { std::vector<T> v(n); CK(cudaMemcpy(v.data(), data, n * sizeof(T), cudaMemcpyDeviceToHost)); return v; }
};

struct site {
    tq_act act;
    device_array<uint8_t> q, aux;
    site(int n, int nb) : q(tq_act_q_bytes(n, nb)), aux(tq_act_aux_bytes(n, nb)) {
        act = tq_act{n <= TQ_DECODE_MAX ? TQ_ACT_DECODE : TQ_ACT_PREFILL, n, tq_act_cols(n), nb, q.data, aux.data};
    }
};

// One block of one token, read back by the formulas of tq-kernels.cuh's text.
struct block_value { float d, sum; int neg_sum; int8_t q[TQ_BLOCK]; };

struct reader {
    tq_act act;
    std::vector<uint8_t> q, aux;
    bool by_bits; // as TQ_ONE_BY_BITS has it on this device
    explicit reader(const site & s) : act(s.act), q(s.q.host()), aux(s.aux.host()) {
        int major;
        CK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
        by_bits = major < 10 && act.layout == TQ_ACT_DECODE && act.cols == 1;
    }

    block_value get(int token, int block) const {
        block_value r;
        int isum = 0;
        const int width = tq_record_width(act.n); // of a record
        for (int e = 0; e < TQ_BLOCK; e++) {
            const int p = e / 32, i32 = e % 32;
            size_t at;
            if (by_bits) {
                const int t = i32 / 8, h = i32 / 4 % 2, i = i32 % 4, place = 8 * i + 2 * p + h;
                int value = 0;
                for (int bit = 0; bit < 8; bit++) { value |= (q[(size_t) block * TQ_BLOCK + 4 * (4 * bit + t) + place / 8] >> place % 8 & 1) << bit; }
                r.q[e] = (int8_t) value;
                isum += r.q[e];
                continue;
            }
            if (act.layout == TQ_ACT_DECODE) {
                at = ((((size_t) block * 2 + p / 2) * act.cols + token) * 4 + i32 / 8) * 16 + 8 * (p % 2) + i32 % 8;
            } else {
                const int t = i32 / 8, h = i32 / 4 % 2, i = i32 % 4, k = token % 128;
                const int chunk = 4 * (p % 2) + 2 * (i / 2) + h, byte = 4 * t + 2 * (i % 2) + p / 2;
                at = ((size_t) (token / 128) * act.nb + block) * tq_record_bytes(width) + chunk * 16 * width + (k / 8) * 128 + (k % 8) * 16 + byte;
            }
            r.q[e] = (int8_t) q[at];
            isum += r.q[e];
        }
        if (act.layout == TQ_ACT_DECODE) {
            tq_act_head head;
            memcpy(&head, &aux[((size_t) block * act.cols + token) * sizeof(head)], sizeof(head));
            r.d = head.d; r.sum = head.sum; r.neg_sum = head.zero == 0 ? head.neg_sum : 1 << 30;
            if (by_bits) {
                int16_t digits[4];
                memcpy(digits, &aux[(size_t) block * sizeof(head) + 8], sizeof(digits));
                r.neg_sum = 0;
                for (int t = 0; t < 4; t++) {
                    int sum = 0;
                    for (int e = 0; e < TQ_BLOCK; e++) { sum += t == 3 ? (r.q[e] + 128) / 64 - 2 : (r.q[e] + 128) / (1 << 2 * t) % 4; }
                    r.neg_sum += digits[t] == -sum ? digits[t] * (1 << 2 * t) : 1 << 20;
                }
            }
        } else {
            const int group = token / 128, k = token % 128;
            memcpy(&r.d, &q[((size_t) group * act.nb + block) * tq_record_bytes(width) + width * TQ_BLOCK + 4 * tq_record_d(k)], 4);
            float hi, lo;
            memcpy(&hi, &aux[4 * tq_sums_at(width, group, act.nb, block, k)], 4);
            memcpy(&lo, &aux[4 * tq_sums_at(width, group, act.nb, block, k) + 8], 4);
            uint32_t bits;
            memcpy(&bits, &hi, 4);
            r.sum = (bits & 0x1fff) ? 1e30f : hi + lo; // hi must be exact in tf32
            r.neg_sum = -isum;
        }
        return r;
    }
};

static bool is_nan(float x) { uint32_t b; memcpy(&b, &x, 4); return (b & 0x7fffffff) > 0x7f800000; }
static bool is_finite(float x) { uint32_t b; memcpy(&b, &x, 4); return (b & 0x7f800000) != 0x7f800000; }

static int failures = 0, cases = 0;
static void expect(bool ok, const std::string & what) {
    cases++;
    if (!ok && failures++ < 30) { printf("FAIL %s\n", what.c_str()); }
}

// Compares a site with values y[token][column]; `exact`: y are the floats that were quantised.
static void compare(const std::string & name, const site & s, const std::vector<double> & y, bool exact) {
    const reader r(s);
    const int nb = s.act.nb;
    int bad = 0;
    for (int token = 0; token < (s.act.layout == TQ_ACT_DECODE ? s.act.cols : s.act.n); token++) { // prefill: no others are written
        for (int block = 0; block < nb; block++) {
            const block_value v = r.get(token, block);
            const double * x = token < s.act.n ? &y[((size_t) token * nb + block) * TQ_BLOCK] : nullptr;
            double amax = 0, sum = 0, mag = 0;
            bool finite = true;
            for (int e = 0; x && e < TQ_BLOCK; e++) {
                finite = finite && is_finite((float) x[e]);
                amax = std::max(amax, std::fabs(x[e])); sum += x[e]; mag += std::fabs(x[e]);
            }
            int isum = 0;
            bool ok = true;
            for (int e = 0; e < TQ_BLOCK; e++) { isum += v.q[e]; }
            ok = ok && v.neg_sum == -isum;
            if (!finite) {
                ok = ok && is_nan(v.d) && is_nan(v.sum) && isum == 0;
            } else if (amax < 1e-30) {
                ok = ok && v.d == 0 && v.sum == 0 && isum == 0;
                for (int e = 0; e < TQ_BLOCK; e++) { ok = ok && v.q[e] == 0; }
            } else if (exact) {
                const float id = 127.0f / (float) amax;
                ok = ok && v.d == (float) amax / 127.0f && (mag > 1e38 || std::fabs(v.sum - sum) <= 2e-6 * mag);
                for (int e = 0; e < TQ_BLOCK; e++) { ok = ok && v.q[e] == (int) std::nearbyint((float) x[e] * id); }
            } else {
                ok = ok && std::fabs(v.d - amax / 127) <= 1e-5 * amax / 127 && std::fabs(v.sum - sum) <= 1e-5 * mag;
                for (int e = 0; e < TQ_BLOCK; e++) { ok = ok && std::fabs(v.q[e] - x[e] * 127 / amax) <= 0.5 + 2e-3; }
            }
            if (!ok && bad++ == 0) {
                printf("  token %d block %d: d %g (%g) sum %g (%g) neg_sum %d (%d) q %d %d %d %d, x %g %g\n", token, block, v.d, amax / 127, v.sum, sum,
                    v.neg_sum, -isum, v.q[0], v.q[1], v.q[2], v.q[3], x ? x[0] : 0.0, x ? x[1] : 0.0);
            }
        }
    }
    expect(bad == 0, name + ": " + std::to_string(bad) + " blocks");
}

static void compare_floats(const std::string & name, const std::vector<float> & got, const std::vector<double> & want) {
    size_t bad = 0;
    for (size_t i = 0; i < want.size(); i++) {
        const bool same = is_finite((float) want[i]) ? std::fabs(got[i] - want[i]) <= 1e-5 * std::fabs(want[i]) + 1e-36 : !is_finite(got[i]);
        bad += !same;
    }
    expect(bad == 0, name + ": " + std::to_string(bad) + " floats");
}

// Random rows; `hard`: blocks of zeros, one NaN, one infinity, 3e38, 1e-31, 1e-29, one huge column among small ones.
static std::vector<float> make_rows(int n, int64_t ld, int columns, bool hard, unsigned seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x((size_t) n * ld, 1e20f); // the gaps between rows
    for (int t = 0; t < n; t++) {
        for (int c = 0; c < columns; c++) {
            float & v = x[(size_t) t * ld + c];
            v = normal(rng);
            if (hard) {
                switch ((c / TQ_BLOCK + t) % 8) {
                    case 0: v = 0; break;
                    case 1: if (c % TQ_BLOCK == 77) { v = NAN; } break;
                    case 2: if (c % TQ_BLOCK == 5) { v = -INFINITY; } break;
                    case 3: v = v > 0 ? 3e38f : -3e38f; break;
                    case 4: v = v > 0 ? 9e-31f : -9e-31f; break;
                    case 5: v *= 1e-29f; break;
                    case 6: if (c % TQ_BLOCK == 127) { v = 1e6f; } break;
                    default: v = 0.5f * (c % 5 - 2); break; // halves: round to even
                }
            }
        }
    }
    return x;
}

static void check_quantize(int n, int columns, int64_t ld, int shift, bool hard) {
    const std::vector<float> x = make_rows(n, ld, columns, hard, 1 + n + columns);
    std::vector<float> moved(x.size() + shift);
    std::copy(x.begin(), x.end(), moved.begin() + shift);
    device_array<float> dx(moved);
    site s(n, columns / TQ_BLOCK);
    tq_quantize(dx.data + shift, ld, s.act, 0);
    std::vector<double> y((size_t) n * columns);
    for (int t = 0; t < n; t++) { for (int c = 0; c < columns; c++) { y[(size_t) t * columns + c] = x[(size_t) t * ld + c]; } }
    compare("quantize n " + std::to_string(n) + " columns " + std::to_string(columns) + " ld " + std::to_string(ld) + " shift " + std::to_string(shift) +
        (hard ? " hard" : ""), s, y, true);
}

// alias: 0 none, 1 sum onto a and norm onto b, 2 no outputs but the quantised ones, 3 no b, norm onto a
static void check_norm(int n, int columns, int alias, bool hard, int ranks, int tokens = 1) {
    const size_t size = (size_t) n * columns;
    std::vector<float> a = make_rows(n, columns, columns, false, 3 + n), b = make_rows(n, columns, columns, false, 5 + n), w = make_rows(1, columns, columns, false, 7);
    if (hard) {
        std::fill(a.begin(), a.begin() + columns, 0.0f); // a row of zeros
        std::fill(b.begin(), b.begin() + columns, 0.0f);
        if (n > 1) { a[columns + columns / 2] = NAN; }
        if (n > 2) { for (int c = 0; c < columns; c++) { a[2 * columns + c] *= 1e-12f; b[2 * columns + c] *= 1e-12f; } }
        if (n > 3) { for (int c = 0; c < columns; c++) { a[3 * columns + c] *= 1e15f; } }
    }
    const float eps = 1e-5f;
    device_array<float> da(a), db(b), dw(w), dsum(size), dnorm(size);
    float * sum  = alias == 0 ? dsum.data : alias == 1 ? da.data : nullptr;
    float * norm = alias == 0 ? dnorm.data : alias == 1 ? db.data : alias == 3 ? da.data : nullptr;
    const float * pb = alias == 3 ? nullptr : db.data;
    site s(n, columns / TQ_BLOCK);
    if (ranks == 0) {
        tq_quantize_norm(da.data, pb, dw.data, eps, sum, norm, s.act, 0);
    } else {
        for (int repeat = 1; repeat <= MAX_REPEAT; repeat *= 2) {
            const norm_shape shape = norm_shape_of(s.act, tokens, ranks, repeat);
            if (norm_shape_fits(shape)) {
                launch_norm(shape, da.data, pb, dw.data, eps, sum, norm, s.act, 0);
            }
        }
    }
    std::vector<double> vs(size), vy(size);
    for (int t = 0; t < n; t++) {
        double squares = 0;
        for (int c = 0; c < columns; c++) {
            const size_t i = (size_t) t * columns + c;
            vs[i] = pb ? (float) ((double) a[i] + b[i]) : a[i];
            squares += vs[i] * vs[i];
        }
        for (int c = 0; c < columns; c++) { vy[(size_t) t * columns + c] = vs[(size_t) t * columns + c] / std::sqrt(squares / columns + eps) * w[c]; }
    }
    const std::string name = "norm n " + std::to_string(n) + " columns " + std::to_string(columns) + " alias " + std::to_string(alias) + " ranks " + std::to_string(ranks) + " tokens " + std::to_string(tokens) + (hard ? " hard" : "");
    compare(name, s, vy, false);
    if (sum) { std::vector<float> got(size); CK(cudaMemcpy(got.data(), sum, size * 4, cudaMemcpyDeviceToHost)); compare_floats(name + " sum", got, vs); }
    if (norm) { std::vector<float> got(size); CK(cudaMemcpy(got.data(), norm, size * 4, cudaMemcpyDeviceToHost)); compare_floats(name + " y", got, vy); }
}

static void check_glu(int n, int columns, int act, bool packed, bool product) {
    const int64_t ld = packed ? 2 * columns : columns; // gate and up side by side, as a fused matrix would give them
    std::vector<float> gate = make_rows(n, columns, columns, false, 11 + n), up = make_rows(n, columns, columns, false, 13 + n);
    for (size_t i = 0; i < gate.size(); i++) { gate[i] *= i % 7 == 0 ? 30.0f : 2.0f; }
    std::vector<float> both((size_t) n * 2 * columns);
    for (int t = 0; t < n; t++) {
        for (int c = 0; c < columns; c++) {
            const size_t i = (size_t) t * columns + c;
            both[packed ? t * ld + c : i] = gate[i];
            both[packed ? t * ld + columns + c : (size_t) n * columns + i] = up[i];
        }
    }
    device_array<float> d(both), dy((size_t) n * columns);
    site s(n, columns / TQ_BLOCK);
    tq_quantize_glu(d.data, d.data + (packed ? columns : (size_t) n * columns), ld, ld, act, product ? dy.data : nullptr, s.act, 0);
    std::vector<double> y(gate.size());
    for (size_t i = 0; i < y.size(); i++) {
        const double g = gate[i];
        y[i] = up[i] * (act ? 0.5 * g * (1 + std::tanh(0.79788456080286535588 * g * (1 + 0.044715 * g * g))) : g / (1 + std::exp(-g)));
    }
    // the device's expf and tanhf under -use_fast_math are good to about 1e-5 of the larger of |g| and 1
    const reader r(s);
    const std::vector<float> got = product ? dy.host() : std::vector<float>();
    int bad = 0;
    for (int t = 0; t < (s.act.layout == TQ_ACT_DECODE ? s.act.cols : n); t++) {
        for (int b = 0; b < s.act.nb; b++) {
            const block_value v = r.get(t, b);
            double amax = 0, mag = 0, sum = 0;
            for (int e = 0; t < n && e < TQ_BLOCK; e++) { const double x = y[((size_t) t * s.act.nb + b) * TQ_BLOCK + e]; amax = std::max(amax, std::fabs(x)); mag += std::fabs(x); sum += x; }
            bool ok = t < n ? std::fabs(v.d - amax / 127) <= 2e-4 * amax / 127 && std::fabs(v.sum - sum) <= 2e-4 * mag : v.d == 0 && v.sum == 0;
            for (int e = 0; e < TQ_BLOCK; e++) {
                const size_t i = ((size_t) t * s.act.nb + b) * TQ_BLOCK + e;
                ok = ok && (t < n ? std::fabs(v.q[e] - y[i] * 127 / amax) <= 0.5 + 0.05 : v.q[e] == 0);
                if (product && t < n) { ok = ok && std::fabs(got[i] - y[i]) <= 3e-5 * (std::fabs(gate[i]) + 1) * std::fabs(up[i]) + 1e-6; }
            }
            bad += !ok;
        }
    }
    expect(bad == 0, "glu n " + std::to_string(n) + " columns " + std::to_string(columns) + " act " + std::to_string(act) + (packed ? " packed" : "") + ": " + std::to_string(bad) + " blocks");
}

// Dependent launches in a graph: the sum grows in place 40 times, and y is quantised again by the next kernel.
static void check_chain(int n, int columns) {
    const size_t size = (size_t) n * columns;
    std::vector<float> a(size), b(size), w(columns, 1.0f);
    for (size_t i = 0; i < size; i++) { a[i] = (float) (i % 13) - 6; b[i] = (float) (i % 5) - 2; } // sums are exact
    device_array<float> da(a), db(b), dw(w), dnorm(size);
    site first(n, columns / TQ_BLOCK), second(n, columns / TQ_BLOCK);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CK(cudaStreamCreate(&stream)); CK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    for (int i = 0; i < 40; i++) {
        tq_quantize_norm(da.data, db.data, dw.data, 1e-5f, da.data, dnorm.data, first.act, stream);
        tq_quantize(dnorm.data, columns, second.act, stream);
    }
    CK(cudaStreamEndCapture(stream, &graph)); CK(cudaGraphInstantiate(&exec, graph, nullptr, nullptr, 0));
    CK(cudaGraphLaunch(exec, stream)); CK(cudaStreamSynchronize(stream));
    std::vector<double> want(size);
    for (size_t i = 0; i < size; i++) { want[i] = a[i] + 40.0 * b[i]; }
    const std::string name = "chain n " + std::to_string(n) + " columns " + std::to_string(columns);
    compare_floats(name + " sum", da.host(), want);
    const reader one(first), two(second);
    bool same = true;
    for (int t = 0; t < n; t++) {
        for (int k = 0; k < first.act.nb; k++) {
            const block_value x = one.get(t, k), y = two.get(t, k);
            same = same && x.d == y.d && x.neg_sum == y.neg_sum && memcmp(x.q, y.q, TQ_BLOCK) == 0;
        }
    }
    expect(same, name + ": quantised twice, differs");
    cudaGraphExecDestroy(exec); cudaGraphDestroy(graph); cudaStreamDestroy(stream);
}

static void check_all(const std::string & how) {
    std::vector<int> tokens = {1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 128, 130}, columns = {128, 384, 768, 2048, 4096};
    if (how.empty()) { tokens.push_back(512); columns.insert(columns.end(), {5120, 8192, 11008, 22016}); }
    if (how == "tiny") { tokens = {1, 3, 9}; columns = {128, 768}; }
    for (int n : tokens) {
        for (int k : columns) {
            if ((long) n * k > 1200 * 1000) { continue; }
            for (bool hard : {false, true}) { check_quantize(n, k, k, 0, hard); }
            check_quantize(n, k, k + 128, 0, false);
            check_quantize(n, k, k + 3, 1, false);
            for (int act : {0, 1}) { check_glu(n, k, act, false, true); check_glu(n, k, act, true, false); }
            if (k / TQ_BLOCK <= TQ_NORM_MAX_BLOCKS) {
                for (int alias : {0, 1, 2, 3}) { check_norm(n, k, alias, false, 0); }
                check_norm(n, k, 0, true, 0);
                for (int ranks : {1, 2, 4, 8}) {
                    for (int rows = 1; rows <= (n > TQ_DECODE_MAX ? 2 : 1); rows++) { check_norm(n, k, 0, false, ranks, rows); }
                }
            }
        }
    }
    for (int n : how == "tiny" ? std::vector<int>{3} : std::vector<int>{1, 5, 8, 16, 128}) {
        for (int k : how == "tiny" ? std::vector<int>{768} : std::vector<int>{4096, 8192}) { check_chain(n, k); }
    }
    CK(cudaDeviceSynchronize());
    printf("%s: %d cases, %d failures\n", failures ? "FAILED" : "ok", cases, failures);
}

// ---- time --------------------------------------------------------------------------------------------------

// Microseconds of one call in a graph of many.
template <typename F> static double time_us(F && f) {
    constexpr int CALLS = 100;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t start, stop;
    CK(cudaStreamCreate(&stream)); CK(cudaEventCreate(&start)); CK(cudaEventCreate(&stop));
    CK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    for (int i = 0; i < CALLS; i++) { f(stream); }
    CK(cudaStreamEndCapture(stream, &graph));
    CK(cudaGraphInstantiate(&exec, graph, nullptr, nullptr, 0));
    double best = 1e30;
    for (int i = 0; i < 12; i++) {
        CK(cudaEventRecord(start, stream)); CK(cudaGraphLaunch(exec, stream)); CK(cudaEventRecord(stop, stream)); CK(cudaEventSynchronize(stop));
        float ms; CK(cudaEventElapsedTime(&ms, start, stop));
        if (i >= 2) { best = std::min(best, ms * 1e3 / CALLS); }
    }
    cudaGraphExecDestroy(exec); cudaGraphDestroy(graph); cudaStreamDestroy(stream); cudaEventDestroy(start); cudaEventDestroy(stop);
    return best;
}

__global__ void nothing_kernel(int) { tq_pdl_launch(); tq_pdl_wait(); }

static void bench() {
    printf("us a call, in a graph of 100, dependent launch\n");
    printf("empty kernel: 1 thread block %.2f, 132 %.2f; cluster of 8 %.2f\n",
        time_us([](cudaStream_t s) { launch(nothing_kernel, dim3(1), 128, 1, s, 0); }), time_us([](cudaStream_t s) { launch(nothing_kernel, dim3(132), 128, 1, s, 0); }),
        time_us([](cudaStream_t s) { launch(nothing_kernel, dim3(8), 128, 8, s, 0); }));
    for (int n : {1, 2, 4, 8, 16, 32, 64, 128, 512}) {
        for (int k : {4096, 5120, 8192, 11008, 22016}) {
            const size_t size = (size_t) n * k;
            std::vector<float> ones(size, 1.0f);
            device_array<float> a(ones), b(ones), w(ones), sum(size), norm(size);
            site s(n, k / TQ_BLOCK);
            const plain_source plain{a.data, k, true};
            const glu_source<false> glu{a.data, b.data, k, k, nullptr, k, true};
            printf("n %3d columns %5d: quantize %.2f, glu %.2f", n, k, time_us([&](cudaStream_t st) { tq_quantize(a.data, k, s.act, st); }),
                time_us([&](cudaStream_t st) { tq_quantize_glu(a.data, b.data, k, k, 0, nullptr, s.act, st); }));
            printf(" | by groups a thread block:");
            for (int units : {2, 4, 8, 16}) {
                printf(" %d: %.2f %.2f", units, time_us([&](cudaStream_t st) { launch_quantize(plain, s.act, st, units); }), time_us([&](cudaStream_t st) { launch_quantize(glu, s.act, st, units); }));
            }
            if (s.act.nb <= TQ_NORM_MAX_BLOCKS) {
                const norm_shape own = norm_shape_for(s.act);
                printf(" | norm (sum written) %.2f, with y %.2f [%d x %d x %d], by rows x ranks x repeat:", time_us([&](cudaStream_t st) { tq_quantize_norm(a.data, b.data, w.data, 1e-5f, sum.data, nullptr, s.act, st); }),
                    time_us([&](cudaStream_t st) { tq_quantize_norm(a.data, b.data, w.data, 1e-5f, sum.data, norm.data, s.act, st); }), own.ranks, own.slots, own.repeat);
                for (int rows = 1; rows <= (n > TQ_DECODE_MAX ? 2 : 1); rows++) {
                    for (int ranks : {1, 2, 4, 8}) {
                        for (int repeat : {1, 2, 4}) {
                            const norm_shape shape = norm_shape_of(s.act, rows, ranks, repeat);
                            if (!norm_shape_fits(shape) || (repeat > 1 && shape.slots < 4)) { continue; }
                            printf(" %dx%dx%d: %.2f", rows, ranks, repeat, time_us([&](cudaStream_t st) { launch_norm(shape, a.data, b.data, w.data, 1e-5f, sum.data, nullptr, s.act, st); }));
                        }
                    }
                }
            }
            printf("\n");
        }
    }
}

int main(int argc, char ** argv) {
    const std::string mode = argc > 1 ? argv[1] : "check";
    if (mode == "check") { check_all(argc > 2 ? argv[2] : ""); }
    else if (mode == "bench") { bench(); }
    else { fprintf(stderr, "usage: act_check check [small|tiny] | bench\n"); return 2; }
    return failures != 0;
}
