// The prefill kernels of the backend (tq-prefill.cu, tq-prefill-wgmma.cu) by themselves.
//
//   D=../../third_party/llama.cpp/overlay/ggml/src/ggml-cuda/tq/kernels
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -DGGML_CUDA_TQ_SM90A -I$D -o prefill_product prefill_product.cu \
//        $D/tq-prefill.cu $D/tq-prefill-wgmma.cu
//   ./prefill_product check [small|tiny]   against float64 sums of the quantised problem; poisoned y, strides, odd shapes;
//                                     "tiny": each kernel a few times, for compute-sanitizer (../h200/sanitize.sh), which
//                                     racecheck follows when compiled with -DTQ_RACECHECK (tq-wgmma.cuh)
//   ./prefill_product bench           microseconds and TOPS of every plan, and layers with the plan that is chosen
#include "prefill_problem.cuh"

#include <algorithm>
#include <cstring>

// ---- plans -----------------------------------------------------------------------------------------------------
struct Plan { bool wgmma, automatic; tq_prefill_plan plan; std::string name; };
static int g_sms;

static std::vector<Plan> plans_for(int n, bool with_auto) {
    std::vector<Plan> out;
    const int width = tq_record_width(std::min(n, TQ_PREFILL_BN));
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
