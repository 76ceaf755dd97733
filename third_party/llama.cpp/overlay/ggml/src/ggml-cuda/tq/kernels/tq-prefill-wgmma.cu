// Products with more than 8 tokens on sm_90a: wgmma with the weights unpacked into registers (A) and the activations
// in shared memory as tq-act.cu left them (B). docs/kernels/prefill.md says what bounds it.
//
// A thread block has 64 rows for each of its consumer warpgroups and N tokens. Every warp brings its own weights, four
// blocks of 16 rows at a time, and a producer warp the activations, a stage for each block of 128 columns, all by bulk
// copies. A warpgroup scales the sums of one product while the next is multiplied.
// Parts of K go to the members of a thread-block cluster, which add their sums through distributed shared memory in the
// order of their ranks, so that results repeat to the bit.

#include "tq-prefill-wgmma.cuh"

#if defined(GGML_CUDA_TQ_SM90A)

#include <algorithm>
#include <climits>

namespace {

// grid: (part of K, group of tokens, tile of rows), so that neighbours in time share weights; clusters of `split`, 1, 2 or 4.
template <class S>
__global__ void __launch_bounds__(S::threads, S::min_blocks) prefill_wgmma(const __grid_constant__ tq_prefill_args args) {
#if defined(TQ_WGMMA_CODE)
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ uint64_t storage[2 * S::stages + 4 + S::warps * S::chunks + (d_apart<S> ? S::stages : 0)];
    const barriers bar = {storage, storage + S::stages, storage + 2 * S::stages, storage + 2 * S::stages + 2,
                          storage + 2 * S::stages + 4, storage + 2 * S::stages + 4 + S::warps * S::chunks};
    const int split = args.split, rank = blockIdx.x, group = args.group0 + blockIdx.y;
    int tile = args.tile0 + blockIdx.z;
    const tq_segment & seg = tq_prefill_find(args, tile);
    const int lo = (int) ((int64_t) args.nb * rank / split), hi = (int) ((int64_t) args.nb * (rank + 1) / split);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    consumer<S> c;
    if (warp < S::warps) {
        const int row_tile = tile * S::warps + warp;
        c.stream.exists = row_tile * TQ_TILE_ROWS < seg.rows;
        c.stream.leader = lane == 0;
        c.stream.next   = seg.w + ((size_t) row_tile * args.nb + lo) * TQ_TILE_BYTES;
        c.stream.shared = shared + S::at_weights + warp * (S::chunks * S::chunk_bytes);
        c.stream.full   = bar.weights + warp * S::chunks;
        c.stream.left   = hi - lo;
        c.stream.begin();
    } else if (threadIdx.x == S::warps * 32) {
        for (int i = 0; i < S::stages; i++) {
            barrier_init(bar.full + i, 1);
            barrier_init(bar.empty + i, S::warps * WARP_ARRIVALS);
            if (d_apart<S>) {
                barrier_init(bar.full_d + i, 1);
            }
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(bar.full_sums + i, 1);
            barrier_init(bar.empty_sums + i, S::warps * WARP_ARRIVALS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp >= S::warps) {
        if constexpr (S::move_regs) {
            fewer_registers<S::consumers == 2 ? 24 : 32>();
        }
        if (threadIdx.x == S::warps * 32) {
            produce<S>(args, group, lo, hi, shared, bar);
        }
        __syncwarp();
        if (split > 1) {
            cluster_arrive();
            cluster_wait();
            cluster_arrive();
            cluster_wait();
        }
        return;
    }
    if constexpr (S::move_regs) {
        more_registers<S::consumers == 2 ? 240 : 160>();
    }
    c.shared = shared;
    c.bar    = bar;
    c.block  = lo;
    c.hi     = hi;
    c.nb     = args.nb;
    c.warp   = warp;
    c.lane   = lane;
    c.run();
    if (split > 1) {
        float4 * parts = reinterpret_cast<float4 *>(shared);
        __syncwarp();
        cluster_arrive(); // all have read all that was copied to their shared memory
        cluster_wait();
        c.share(parts, split, rank);
        __syncwarp();
        cluster_arrive();
        cluster_wait();
        c.collect(parts, split, rank);
    }
    c.store(seg, tile * S::rows, group * TQ_PREFILL_BN, args.n, split, rank);
#endif
}

// Clusters of `split` thread blocks that run at the same time on this device, and attributes set on the first call.
template <class S>
int clusters(int split) {
    constexpr int DEVICES = 64;
    static int known[DEVICES][3];
    int device;
    tq_prefill_check(cudaGetDevice(&device), "cudaGetDevice");
    int & count = known[device % DEVICES][split / 2];
    if (!count) {
        constexpr int most = std::max({S::shared_bytes(1), S::shared_bytes(2), S::shared_bytes(4)});
        tq_prefill_check(cudaFuncSetAttribute(prefill_wgmma<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
        cudaLaunchConfig_t config = {};
        config.gridDim          = dim3(split);
        config.blockDim         = dim3(S::threads);
        config.dynamicSmemBytes = S::shared_bytes(split);
        cudaLaunchAttribute attribute;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {(unsigned) split, 1, 1};
        config.attrs    = &attribute;
        config.numAttrs = 1;
        tq_prefill_check(cudaOccupancyMaxActiveClusters(&count, prefill_wgmma<S>, &config), "clusters");
        count = std::max(count, 1);
    }
    return count;
}

template <class S>
void launch(const tq_prefill_args & args, int groups, int tiles, cudaStream_t stream) {
    cudaLaunchConfig_t config = {};
    config.gridDim          = dim3(args.split, groups, tiles);
    config.blockDim         = dim3(S::threads);
    config.dynamicSmemBytes = S::shared_bytes(args.split);
    config.stream           = stream;
    cudaLaunchAttribute attribute[2];
    config.attrs = attribute;
    if (tq_early_start_wanted()) {
        attribute[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (args.split > 1) {
        attribute[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attribute[config.numAttrs++].val.clusterDim = {(unsigned) args.split, 1, 1};
    }
    tq_prefill_check(cudaLaunchKernelEx(&config, prefill_wgmma<S>, args), "launch");
}

// ---- choice ----------------------------------------------------------------------------------------------
struct variant {
    int rows, tokens;
    int step, fixed; // clocks of a block of 128 columns, and of beginning and end: fitted to what an H200 took
    int (*clusters)(int);
    void (*run)(const tq_prefill_args &, int, int, cudaStream_t);
};

template <class S> constexpr variant make_variant(int step, int fixed) {
    // 227 KB of a multiprocessor, of which every thread block's barriers and 1 KB for the system go off.
    static_assert(S::min_blocks * (S::shared_bytes(1) + 2048) <= 228 * 1024, "shared memory of one part of K");
    static_assert(S::shared_bytes(2) + 1024 <= 227 * 1024 && S::shared_bytes(4) + 1024 <= 227 * 1024, "shared memory of parts of K");
    return {S::rows, S::tokens, step, fixed, clusters<S>, launch<S>};
}

const variant VARIANTS[] = {
    make_variant<shape<2, 128, 6, 1>>(1500, 12000),
    make_variant<shape<3, 128, 6, 1>>(2050, 15000),
    make_variant<shape<2, 64, 8, 1>>(1150, 7000),
    make_variant<shape<2, 32, 8, 2>>(1000, 11000),
    make_variant<shape<2, 16, 8, 2>>(950, 8000),
};

// The tiles of rows that the first of two launches takes: as many as fill the multiprocessors whole times.
int first_tiles(const variant & v, int tiles, int groups) {
    const int slots = v.clusters(1);
    return (int) ((int64_t) tiles * groups / slots * slots / groups);
}

// The time that tiles are thought to take, in clocks.
int64_t estimate(const variant & v, int64_t tiles, int nb, int split) {
    const int64_t slots = v.clusters(split);
    return (tiles + slots - 1) / slots * ((int64_t) tq_ceil(nb, split) * v.step + v.fixed) + (split - 1) * 2000;
}

int64_t estimate(const variant & v, const tq_prefill_plan & plan, int tiles, int groups, int nb) {
    if (!plan.tail) {
        return estimate(v, (int64_t) tiles * groups, nb, plan.split);
    }
    const int64_t first = first_tiles(v, tiles, groups);
    return estimate(v, first * groups, nb, plan.split) + estimate(v, (tiles - first) * groups, nb, plan.tail);
}

void launch_groups(const tq_segment * segments, int n_segments, const tq_act & act, int group0, int groups, int tokens,
                   const tq_prefill_plan * wanted, cudaStream_t stream) {
    const variant * best = nullptr;
    tq_prefill_plan plan = {};
    int64_t best_time = INT64_MAX;
    for (const variant & v : VARIANTS) {
        if (wanted ? v.rows != wanted->rows || v.tokens != wanted->tokens : v.tokens != tokens) {
            continue;
        }
        const int tiles = tq_prefill_tiles(segments, n_segments, v.rows), most = std::min({4, act.nb, v.tokens / 8});
        for (int split = 1; split <= most; split *= 2) {
            for (int tail = 0; tail <= (split == 1 ? most : 0); tail += tail ? tail : 2) {
                const tq_prefill_plan p = {v.rows, v.tokens, split, tail, wanted ? wanted->first : 0};
                if (wanted && (wanted->split != split || wanted->tail != tail)) {
                    continue;
                }
                const int64_t time = estimate(v, p, tiles, groups, act.nb);
                if (time < best_time) {
                    best = &v;
                    plan = p;
                    best_time = time;
                }
            }
        }
    }
    if (!best) {
        fprintf(stderr, "tq_prefill: no such plan\n");
        abort();
    }
    const int tiles = tq_prefill_tiles(segments, n_segments, plan.rows);
    const int first = !plan.tail ? tiles : plan.first ? std::min(plan.first, tiles) : first_tiles(*best, tiles, groups);
    tq_prefill_args args = tq_prefill_describe(segments, n_segments, act, plan.rows, group0, plan.split);
    if (first) {
        best->run(args, groups, first, stream);
    }
    if (first < tiles) {
        args.tile0  = first;
        args.split  = plan.tail;
        args.second = first > 0;
        best->run(args, groups, tiles - first, stream);
    }
}

} // namespace

bool tq_prefill_wgmma_built() {
    return true;
}

void tq_prefill_wgmma(const tq_segment * segments, int n_segments, const tq_act & act, const tq_prefill_plan * plan,
                      cudaStream_t stream) {
    // A last group of few tokens gets a launch of its own with a narrower kernel.
    const int rest  = act.n % TQ_PREFILL_BN;
    const int width = tq_record_width(rest);
    const int whole = plan ? tq_ceil(act.n, TQ_PREFILL_BN) : act.n / TQ_PREFILL_BN + (rest && width == TQ_PREFILL_BN);
    if (whole) {
        launch_groups(segments, n_segments, act, 0, whole, TQ_PREFILL_BN, plan, stream);
    }
    if (!plan && rest && width < TQ_PREFILL_BN) {
        launch_groups(segments, n_segments, act, act.n / TQ_PREFILL_BN, 1, width, nullptr, stream);
    }
}

#else

bool tq_prefill_wgmma_built() {
    return false;
}

void tq_prefill_wgmma(const tq_segment *, int, const tq_act &, const tq_prefill_plan *, cudaStream_t) {
    fprintf(stderr, "tq_prefill: built without sm_90a\n");
    abort();
}

#endif // GGML_CUDA_TQ_SM90A
