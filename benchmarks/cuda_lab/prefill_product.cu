// The prefill kernels of the backend (tq-prefill.cu, tq-prefill-wgmma.cu) by themselves.
//
//   D=../../third_party/llama.cpp/overlay/ggml/src/ggml-cuda
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -DGGML_CUDA_TQ_SM90A -I$D -o prefill_product prefill_product.cu \
//        $D/tq-prefill.cu $D/tq-prefill-wgmma.cu
//   ./prefill_product check [small|tiny]   against float64 sums of the quantised problem; poisoned y, strides, odd shapes;
//                                     "tiny": each kernel a few times, for compute-sanitizer (../h200/sanitize.sh), which
//                                     racecheck follows when compiled with -DTQ_RACECHECK (tq-wgmma.cuh)
//   ./prefill_product bench           microseconds and TOPS of every plan, and layers with the plan that is chosen
#include "lab.cuh"
#include "tq-prefill.cuh"

#include <algorithm>
#include <cstring>

// ---- a problem: tile form and records made on the card, from hashes ---------------------------------------------
enum Kind { K_RANDOM, K_MINUS, K_ZERO, K_PLUS, K_ALPHA, K_MU, K_X, N_KINDS };
static const char * KINDS[] = {"random", "all -1", "all 0", "all +1", "huge alpha", "mu > alpha", "x extreme"};

__device__ int code_of(int row, int col, int kind, uint32_t seed) {
    return kind == K_MINUS ? 0 : kind == K_ZERO ? 1 : kind == K_PLUS ? 2 : hash32(((uint64_t) row << 20 | col) * 7 + seed) % 3;
}
__device__ half2 scales_of(int row, int block, int kind, uint32_t seed) {
    const uint64_t id = ((uint64_t) row << 20 | block) * 2 + seed;
    float alpha = 0.01f + 0.05f * unit(id), mu = 0.01f * (unit(id + 1) - 0.5f);
    if (kind == K_ALPHA) alpha = 60000.0f * unit(id);
    if (kind == K_MU) mu = 4.0f * (unit(id + 1) - 0.5f);
    return __floats2half2_rn(alpha, mu);
}
__device__ float x_of(int token, int col, int kind, uint32_t seed) {
    const uint64_t id = ((uint64_t) token << 20 | col) * 5 + seed;
    float v = unit(id) + unit(id + 1) + unit(id + 2) + unit(id + 3) - 2.0f;
    if (hash32(id + 4) % 997 == 0) v *= 40.0f;
    if (kind == K_X) v = (col / QK) % 2 ? 0.0f : (hash32(id) & 1) ? 127.0f : -127.0f;
    return v;
}

// grid (tiles, nb), 32 threads. Rows beyond M get code 1 and scales 0.
__global__ void make_tiles(uint8_t * out, int M, int nb, int kind, uint32_t seed) {
    const int tile = blockIdx.x, b = blockIdx.y, g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint8_t * p = out + ((size_t) tile * nb + b) * TQ_TILE_BYTES;
    for (int h = 0; h < 2; h++)
        for (int r = 0; r < 2; r++)
            for (int i = 0; i < 4; i++) {
                int v = 0, row = tile * 16 + g + 8 * r;
                for (int k = 0; k < 4; k++) {
                    const int c = row < M ? code_of(row, b * QK + 32 * k + 8 * t + 4 * h + i, kind, seed) : 1;
                    v |= (c == 2 ? 3 : c) << (2 * k); // as many ones as its value
                }
                p[threadIdx.x * 16 + 8 * h + 4 * r + i] = v;
            }
    if (t < 2) {
        const int row = tile * 16 + g + 8 * t;
        ((half2 *) (p + TQ_TILE_SCALES))[g * 2 + t] = row < M ? scales_of(row, b, kind, seed) : __floats2half2_rn(0, 0);
    }
}

// grid (nb, tokens rounded up), 128 threads: one element each. q8, ds: plain copies for the reference.
__global__ void make_records(tq_act act, int8_t * q8, float2 * ds, int kind, uint32_t seed) {
    __shared__ float s_max[128], s_sum[128];
    const int b = blockIdx.x, token = blockIdx.y, e = threadIdx.x, group = token / TQ_PREFILL_BN, k = token % TQ_PREFILL_BN;
    const float x = token < act.n ? x_of(token, b * QK + e, kind, seed) : 0.0f;
    s_max[e] = fabsf(x); s_sum[e] = x;
    __syncthreads();
    for (int o = 64; o; o /= 2) {
        if (e < o) { s_max[e] = fmaxf(s_max[e], s_max[e + o]); s_sum[e] += s_sum[e + o]; }
        __syncthreads();
    }
    const float d = s_max[0] / 127.0f, sum = s_sum[0];
    const int q = __float2int_rn(d > 0 ? x * (127.0f / s_max[0]) : 0.0f);
    uint8_t * record = act.q + ((size_t) group * act.nb + b) * TQ_RECORD;
    record[tq_record_q(e, k)] = q;
    q8[((size_t) token * act.nb + b) * QK + e] = q;
    if (e) return;
    ((float *) (record + TQ_PREFILL_BN * TQ_BLOCK))[tq_record_d(k)] = d;
    const float hi = __uint_as_float(__float_as_uint(sum) & 0xffffe000u);
    float * s = (float *) act.aux + tq_sums_at(group, act.nb, b, k);
    s[0] = hi; s[2] = sum - hi;
    ds[(size_t) token * act.nb + b] = make_float2(d, sum);
}

// grid (rows, tokens), 128 threads: the sum and the sum of the blocks' magnitudes, in float64
__global__ void reference64(const int8_t * q8, const float2 * ds, double2 * out, int M, int nb, int kind, uint32_t seed) {
    __shared__ int part[4];
    const int row = blockIdx.x, token = blockIdx.y, e = threadIdx.x;
    double y = 0, mag = 0;
    for (int b = 0; b < nb; b++) {
        const int v = __reduce_add_sync(~0u, (code_of(row, b * QK + e, kind, seed) - 1) * q8[((size_t) token * nb + b) * QK + e]);
        if (e % 32 == 0) part[e / 32] = v;
        __syncthreads();
        const half2 s = scales_of(row, b, kind, seed);
        const float2 a = ds[(size_t) token * nb + b];
        const double dot = (double) __low2float(s) * a.x * (part[0] + part[1] + part[2] + part[3]), off = (double) __high2float(s) * a.y;
        y += dot + off; mag += fabs(dot) + fabs(off);
        __syncthreads();
    }
    if (e == 0) out[(size_t) token * M + row] = make_double2(y, mag);
}

struct Verdict { unsigned worst; int unwritten, touched; }; // worst: bits of a float
// grid (columns of y with its gaps, tokens with some beyond)
__global__ void judge(const float * y, int64_t ld, const double2 * ref, int M, int n, int tokens, Verdict * v) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (row >= ld) return;
    const unsigned bits = ((const unsigned *) y)[token * ld + row];
    if (row >= M || token >= n) { if (bits != 0xffffffffu) atomicAdd(&v->touched, 1); return; }
    const float f = __uint_as_float(bits);
    if (!(f == f)) { atomicAdd(&v->unwritten, 1); return; }
    const double2 r = ref[(size_t) token * M + row];
    atomicMax(&v->worst, __float_as_uint((float) (fabs(f - r.x) / (r.y + 1e-30))));
}

struct Activations {
    tq_act act; int8_t * q8; float2 * ds;
    Activations(int n, int nb, int kind, uint32_t seed) {
        act = {TQ_ACT_PREFILL, n, tq_act_cols(n), nb, nullptr, nullptr};
        CK(cudaMalloc(&act.q, tq_act_q_bytes(n, nb))); CK(cudaMalloc(&act.aux, tq_act_aux_bytes(n, nb)));
        CK(cudaMalloc(&q8, (size_t) act.cols * nb * QK)); CK(cudaMalloc(&ds, (size_t) act.cols * nb * sizeof(float2)));
        CK(cudaMemset(act.q, 0xff, tq_act_q_bytes(n, nb))); CK(cudaMemset(act.aux, 0xff, tq_act_aux_bytes(n, nb)));
        make_records<<<dim3(nb, act.cols), QK>>>(act, q8, ds, kind, seed);
        CK(cudaDeviceSynchronize());
    }
    ~Activations() { cudaFree(act.q); cudaFree(act.aux); cudaFree(q8); cudaFree(ds); }
    Activations(const Activations &) = delete;
};

// ---- plans -----------------------------------------------------------------------------------------------------
struct Plan { bool wgmma, automatic; tq_prefill_plan plan; std::string name; };
static int g_sms;

static std::vector<Plan> plans_for(int n, bool with_auto) {
    std::vector<Plan> out;
    const int width = tq_prefill_width(std::min(n, TQ_PREFILL_BN));
    auto add = [&](bool wg, int rows, int split, int tail = 0) {
        out.push_back({wg, false, {rows, width, split, tail, 0}, std::string(wg ? "wgmma " : "mma ") + std::to_string(rows) + "x" + std::to_string(width) +
                       (wg ? "/" + std::to_string(split) : "") + (tail ? "+" + std::to_string(tail) : "")});
    };
    if (with_auto) { out.push_back({true, true, {}, "wgmma auto"}); out.push_back({false, true, {}, "mma auto"}); }
    for (int rows : {128, 192})
        if (rows == 128 || width == 128)
            for (int split : {1, 2, 4})
                if (split <= width / 8) add(true, rows, split);
    for (int tail : {2, 4})
        if (tail <= width / 8) { add(true, 128, 1, tail); if (width == 128) add(true, 192, 1, tail); }
    if (width == 128) { add(false, 64, 1); add(false, 128, 1); }
    if (width == 64) add(false, 64, 1);
    if (width == 32) add(false, 64, 1);
    if (width == 16) add(false, 128, 1);
    return out;
}
// few: a second launch even where one would do
static void launch_plan(const Plan & p, const tq_segment * seg, int segs, const tq_act & act, cudaStream_t st, bool few = false) {
    tq_prefill_plan plan = p.plan;
    plan.first = few && plan.tail ? 2 : 0;
    if (p.wgmma) tq_prefill_wgmma(seg, segs, act, p.automatic ? nullptr : &plan, st);
    else tq_prefill_mma(seg, segs, act, g_sms, p.automatic ? nullptr : &plan, st);
}

// ---- check -----------------------------------------------------------------------------------------------------
static int check(const std::string & how) {
    std::vector<int> ns = {9, 16, 17, 31, 64, 65, 100, 128, 129, 200, 512}, Ms = {1, 17, 100, 192, 1000}, nbs = {1, 2, 3, 9, 33};
    int most_segments = 3;
    if (how == "small") { ns = {9, 17, 64, 129}; Ms = {17, 200}; nbs = {1, 9}; }
    // every kernel and plan once: enough blocks to fill every ring anew, enough rows for a second launch, of which some warps have none
    const bool tiny = how == "tiny";
    if (tiny) { ns = {9, 17, 64, 128}; Ms = {300}; nbs = {18}; most_segments = 1; }
    int cases = 0, bad = 0, runs = 0;
    double worst = 0;
    Verdict * verdict; CK(cudaMalloc(&verdict, sizeof *verdict));
    for (int n : ns)
        for (int nb : nbs)
            for (int M : Ms)
                for (int segs = 1; segs <= most_segments; segs++, cases++) {
                    const int kind = cases % N_KINDS;
                    Activations x(n, nb, kind, 3 + cases);
                    tq_segment seg[3];
                    double2 * ref[3];
                    const int tokens = n + 3;
                    for (int s = 0; s < segs; s++) {
                        const int rows = s == 0 ? M : s == 1 ? M / 2 + 1 : 3 * M + 5;
                        uint8_t * w;
                        const int tiles = tq_ceil(rows, 16);
                        seg[s].rows = rows; seg[s].ld = rows + (cases % 3) * 7;
                        CK(cudaMalloc(&w, (size_t) tiles * nb * TQ_TILE_BYTES));
                        CK(cudaMalloc(&seg[s].y, (size_t) seg[s].ld * tokens * 4));
                        CK(cudaMalloc(&ref[s], (size_t) rows * n * sizeof(double2)));
                        seg[s].w = w;
                        make_tiles<<<dim3(tiles, nb), 32>>>(w, rows, nb, kind, 11 * cases + s);
                        reference64<<<dim3(rows, n), 128>>>(x.q8, x.ds, ref[s], rows, nb, kind, 11 * cases + s);
                    }
                    for (const Plan & p : plans_for(n, !tiny)) {
                        if (std::max(p.plan.split, p.plan.tail) > nb) continue;
                        for (int s = 0; s < segs; s++) CK(cudaMemset(seg[s].y, 0xff, (size_t) seg[s].ld * tokens * 4));
                        CK(cudaMemset(verdict, 0, sizeof *verdict));
                        launch_plan(p, seg, segs, x.act, 0, true);
                        for (int s = 0; s < segs; s++)
                            judge<<<dim3(tq_ceil((int) seg[s].ld, 128), tokens), 128>>>(seg[s].y, seg[s].ld, ref[s], seg[s].rows, n, tokens, verdict);
                        Verdict v;
                        CK(cudaMemcpy(&v, verdict, sizeof v, cudaMemcpyDeviceToHost));
                        float e; memcpy(&e, &v.worst, 4);
                        worst = std::max(worst, (double) e);
                        runs++;
                        if (!(e < 2e-6) || v.unwritten || v.touched) {
                            if (bad++ < 30)
                                printf("FAIL %s n=%d M=%d nb=%d segments=%d %s: error %.2e, %d not written, %d written outside\n", p.name.c_str(), n, M, nb, segs, KINDS[kind], e, v.unwritten, v.touched);
                        }
                    }
                    for (int s = 0; s < segs; s++) { cudaFree((void *) seg[s].w); cudaFree(seg[s].y); cudaFree(ref[s]); }
                }
    printf("check: %d problems, %d runs, %d failures, worst error %.2e of the magnitudes\n", cases, runs, bad, worst);
    return bad != 0;
}

// ---- the same bits again and again -------------------------------------------------------------------------------
static int repeat() {
    const int n = 128, nb = 33, M = 4096;
    int bad = 0;
    Activations x(n, nb, K_RANDOM, 1);
    uint8_t * w; float * y;
    CK(cudaMalloc(&w, (size_t) M / 16 * nb * TQ_TILE_BYTES)); CK(cudaMalloc(&y, (size_t) M * n * 4));
    make_tiles<<<dim3(M / 16, nb), 32>>>(w, M, nb, K_RANDOM, 2);
    tq_segment seg = {w, y, M, M};
    for (const Plan & p : plans_for(n, false)) {
        std::vector<float> first, again((size_t) M * n);
        for (int i = 0; i < 20; i++) {
            CK(cudaMemset(y, 0xff, (size_t) M * n * 4));
            launch_plan(p, &seg, 1, x.act, 0);
            CK(cudaMemcpy(again.data(), y, again.size() * 4, cudaMemcpyDeviceToHost));
            if (i == 0) first = again;
            if (memcmp(first.data(), again.data(), again.size() * 4)) { bad++; printf("FAIL %s: run %d differs\n", p.name.c_str(), i); }
        }
    }
    printf("repeat: %d differences\n", bad);
    cudaFree(w); cudaFree(y);
    return bad != 0;
}

// ---- bench -----------------------------------------------------------------------------------------------------
struct Shape { const char * name; int rows[3]; int cols; };
struct Model { const char * name; Shape shape[4]; };
static const Model MODELS[] = {
    {"65B", {{"qkv", {8192, 8192, 8192}, 8192}, {"o", {8192}, 8192}, {"gate+up", {22016, 22016}, 8192}, {"down", {8192}, 22016}}},
    {"13B", {{"qkv", {5120, 5120, 5120}, 5120}, {"o", {5120}, 5120}, {"gate+up", {13824, 13824}, 5120}, {"down", {5120}, 13824}}},
    {"7B", {{"qkv", {4096, 4096, 4096}, 4096}, {"o", {4096}, 4096}, {"gate+up", {11008, 11008}, 4096}, {"down", {4096}, 11008}}},
};

static void bench(bool quick) {
    // A pool of tiles larger than L2: every launch takes other weights.
    const size_t pool_tiles = 1 << 20; // of 16 x 128: 604 MB
    uint8_t * pool; float * y;
    CK(cudaMalloc(&pool, pool_tiles * TQ_TILE_BYTES)); CK(cudaMalloc(&y, (size_t) 3 * 22016 * 512 * 4));
    make_tiles<<<dim3(1 << 15, 32), 32>>>(pool, 1 << 19, 32, K_RANDOM, 1);
    CK(cudaDeviceSynchronize());
    auto segments = [&](const Shape & s, int n, size_t & at, tq_segment * seg) {
        int count = 0;
        float * out = y;
        for (int i = 0; i < 3 && s.rows[i]; i++, count++) {
            const size_t tiles = (size_t) s.rows[i] / 16 * (s.cols / QK);
            if (at + tiles > pool_tiles) at = 0;
            seg[i] = {pool + at * TQ_TILE_BYTES, out, s.rows[i], s.rows[i]};
            at += tiles;
            out += (size_t) s.rows[i] * n;
        }
        return count;
    };
    for (int n : {128, 512, 16, 32, 64}) {
        if (quick && n != 128 && n != 16) continue;
        for (const Model & m : MODELS) {
            std::vector<Activations *> x;
            for (const Shape & s : m.shape) x.push_back(new Activations(n, s.cols / QK, K_RANDOM, 5));
            for (int i = 0; i < 4; i++) {
                const Shape & s = m.shape[i];
                const double ops = 2.0 * n * s.cols * ((double) s.rows[0] + s.rows[1] + s.rows[2]);
                for (const Plan & p : plans_for(n, false)) {
                    size_t at = 0;
                    const double us = time_graph(12, [&](int, cudaStream_t st) {
                        tq_segment seg[3];
                        const int count = segments(s, n, at, seg);
                        launch_plan(p, seg, count, x[i]->act, st);
                    }, 3);
                    printf("%-4s %-8s n=%-4d %-16s %9.2f us %8.1f TOPS %7.2f TB/s\n", m.name, s.name, n, p.name.c_str(), us, ops / us / 1e6, ops / n / 256 * 36 / us / 1e6);
                }
            }
            for (bool wgmma : {true, false}) {
                size_t at = 0;
                const double us = time_graph(4, [&](int, cudaStream_t st) {
                    for (int i = 0; i < 4; i++) {
                        tq_segment seg[3];
                        const int count = segments(m.shape[i], n, at, seg);
                        launch_plan({wgmma, true, {}, ""}, seg, count, x[i]->act, st);
                    }
                }, 5);
                printf("%-4s layer    n=%-4d %-16s %9.2f us\n", m.name, n, wgmma ? "wgmma auto" : "mma auto", us);
            }
            for (Activations * a : x) delete a;
        }
        fflush(stdout);
    }
}

// One launch of a plan on 65B's o, for a profiler.
static int profile(const std::string & name, int n) {
    const int M = 8192, nb = 64;
    Activations x(n, nb, K_RANDOM, 5);
    uint8_t * w; float * y;
    CK(cudaMalloc(&w, (size_t) M / 16 * nb * TQ_TILE_BYTES)); CK(cudaMalloc(&y, (size_t) M * n * 4));
    make_tiles<<<dim3(M / 16, nb), 32>>>(w, M, nb, K_RANDOM, 1);
    const tq_segment seg = {w, y, M, M};
    for (const Plan & p : plans_for(n, false))
        if (p.name == name) {
            launch_plan(p, &seg, 1, x.act, 0);
            CK(cudaDeviceSynchronize());
            return 0;
        }
    fprintf(stderr, "no plan %s for %d tokens\n", name.c_str(), n);
    return 2;
}

int main(int argc, char ** argv) {
    const std::string what = argc > 1 ? argv[1] : "", more = argc > 2 ? argv[2] : "";
    cudaDeviceProp prop;
    CK(cudaGetDeviceProperties(&prop, 0));
    g_sms = prop.multiProcessorCount;
    printf("%s, %d multiprocessors, wgmma %s\n", prop.name, g_sms, tq_prefill_wgmma_built() ? "built" : "not built");
    if (what == "check") return check(more) | (more.empty() ? repeat() : 0);
    if (what == "bench") { bench(more == "quick"); return 0; }
    if (what == "profile" && argc == 4) return profile(more, atoi(argv[3]));
    fprintf(stderr, "usage: prefill_product check [small|tiny] | bench [quick] | profile PLAN TOKENS\n");
    return 2;
}
