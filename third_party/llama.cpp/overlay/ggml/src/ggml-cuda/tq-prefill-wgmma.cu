// Products with more than 8 tokens on sm_90a: wgmma with the weights unpacked into registers (A) and the activations
// in shared memory as tq-act.cu left them (B). KERNELS.md says what bounds it.
//
// A thread block has 64 rows for each of its consumer warpgroups and N tokens. Every warp brings its own weights, four
// blocks of 16 rows at a time, and a producer warp the activations, a stage for each block of 128 columns, all by bulk
// copies. A warpgroup scales the sums of one product while the next is multiplied.
// Parts of K go to the members of a thread-block cluster, which add their sums through distributed shared memory in the
// order of their ranks, so that results repeat to the bit.

#include "tq-prefill.cuh"
#include "tq-wgmma.cuh"

#if defined(GGML_CUDA_TQ_SM90A)

#include <algorithm>
#include <climits>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TQ_WGMMA_CODE
#endif

namespace {

// Shape of a thread block.
template <int WGS, int N, int STAGES, int MIN_BLOCKS>
struct shape {
    static constexpr int consumers   = WGS;
    static constexpr int warps       = WGS * 4; // that multiply, each of them 16 rows
    static constexpr int tokens      = N;
    static constexpr int rows        = WGS * 64;
    static constexpr int stages      = STAGES;
    static constexpr int min_blocks  = MIN_BLOCKS;
    // Wide shapes need more registers than an even share; setmaxnreg moves them, by warpgroups.
    static constexpr bool move_regs  = N >= 64;
    static constexpr int threads     = WGS * 128 + (move_regs ? 128 : 32);

    // A warp's ring of weights.
    static constexpr int chunk       = 4; // blocks of 128 columns that one copy brings
    static constexpr int chunks      = 3;
    static constexpr int chunk_bytes = chunk * TQ_TILE_BYTES;
    static constexpr int weights     = warps * chunks * chunk_bytes;

    static constexpr int q           = N * TQ_BLOCK;
    static constexpr int record      = q + N * 4; // the first N tokens of one, q then d
    static constexpr int sums        = N * 64; // of eight blocks
    static constexpr int at_sums     = STAGES * record; // in shared memory: records, two sums, weights
    static constexpr int at_weights  = at_sums + 2 * sums;
    static constexpr int pipeline    = at_weights + weights;

    // What a member of a cluster gets from the others, in the same place: 16 bytes for each of their threads and 8 tokens.
    static constexpr int part_bytes(int split) { return N / 8 / split * (split - 1) * WGS * 128 * 16; }
    static constexpr int shared_bytes(int split) { return part_bytes(split) > pipeline ? part_bytes(split) : pipeline; }

    // What registers allow: a block's product is made in `parts` of `width` tokens, so that one can be scaled while the other
    // is multiplied; or the next block's is (`overlap`), and `ahead`: its codes are unpacked before the last one's are done with.
    static constexpr bool overlap    = WGS < 3;
    static constexpr int parts       = N == 128 && overlap ? 2 : 1;
    static constexpr int width       = N / parts;
    static constexpr bool ahead      = N >= 64 && overlap;
};

#if defined(TQ_WGMMA_CODE)

// A place in a ring.
template <int SIZE> struct ring {
    int slot = 0, phase = 0;
    __device__ __forceinline__ void next() {
        if (++slot == SIZE) {
            slot = 0;
            phase ^= 1;
        }
    }
};

// ---- the producer --------------------------------------------------------------------------------------
struct barriers {
    uint64_t * full;       // [stages] of records
    uint64_t * empty;      // [stages]
    uint64_t * full_sums;  // [2]
    uint64_t * empty_sums; // [2]
    uint64_t * weights;    // [warps][chunks]
    uint64_t * full_d;     // [stages] of d alone, where it has barriers of its own
};

// Whether d has barriers of its own: of what comes by several copies it alone is read by lanes, the rest by wgmma.
template <class S> constexpr bool d_apart = RACECHECK && S::tokens < TQ_PREFILL_BN;

// One thread: records of blocks lo .. hi - 1, and before the first of each eight blocks their sums, in a ring of two.
template <class S>
__device__ __forceinline__ void produce(const tq_prefill_args & args, int group, int lo, int hi, uint8_t * shared,
                                        const barriers & bar) {
    const uint8_t * record = args.records + ((size_t) group * args.nb + lo) * TQ_RECORD;
    const uint8_t * sums   = args.sums + ((size_t) group * tq_ceil(args.nb, 8) + lo / 8) * (TQ_PREFILL_BN * 64);
    ring<S::stages> at;
    ring<2> at_sums;
    // Weights do not depend on the kernel before, activations do. The next launch may begin when they are there: where it is
    // the second of the same product, it reads them without waiting for this one.
    if (!args.second) {
        asm volatile("griddepcontrol.wait;" ::: "memory");
    }
    asm volatile("griddepcontrol.launch_dependents;");
    for (int block = lo; block < hi; block++, record += TQ_RECORD) {
        if (block == lo || block % 8 == 0) {
            barrier_wait(bar.empty_sums + at_sums.slot, at_sums.phase ^ 1);
            barrier_expect(bar.full_sums + at_sums.slot, S::sums);
            bulk_copy(shared + S::at_sums + at_sums.slot * S::sums, sums, S::sums, bar.full_sums + at_sums.slot);
            sums += TQ_PREFILL_BN * 64;
            at_sums.next();
        }
        barrier_wait(bar.empty + at.slot, at.phase ^ 1);
        barrier_expect(bar.full + at.slot, d_apart<S> ? S::q : S::record);
        uint8_t * dst = shared + at.slot * S::record;
        if (S::tokens == TQ_PREFILL_BN) {
            bulk_copy(dst, record, TQ_RECORD, bar.full + at.slot);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                bulk_copy(dst + i * (S::tokens * 16), record + i * (TQ_PREFILL_BN * 16), S::tokens * 16, bar.full + at.slot);
            }
            if (d_apart<S>) {
                barrier_expect(bar.full_d + at.slot, S::tokens * 4);
            }
            bulk_copy(dst + S::q, record + TQ_PREFILL_BN * TQ_BLOCK, S::tokens * 4, (d_apart<S> ? bar.full_d : bar.full) + at.slot);
        }
        at.next();
    }
    if (args.second) {
        asm volatile("griddepcontrol.wait;" ::: "memory"); // whoever waits for this launch waits for the first as well
    }
}

// ---- a consumer ----------------------------------------------------------------------------------------
// The weights of a warp's 16 rows, in its own ring.
template <class S> struct weight_stream {
    const uint8_t * next; // what is copied next
    uint8_t       * shared;
    uint64_t      * full;
    int             left;  // blocks that have not been copied
    int             index; // in the chunk
    bool            exists, leader;
    ring<S::chunks> at;

    __device__ __forceinline__ void copy(int slot) {
        const int blocks = min(S::chunk, left);
        if (leader && exists && blocks > 0) {
            barrier_expect(full + slot, blocks * TQ_TILE_BYTES);
            bulk_copy(shared + slot * S::chunk_bytes, next, blocks * TQ_TILE_BYTES, full + slot);
        }
        left -= S::chunk;
        next += S::chunk_bytes;
    }
    __device__ __forceinline__ void begin() {
        if (leader) {
            for (int i = 0; i < S::chunks; i++) {
                barrier_init(full + i, 1);
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncwarp();
        index = 0;
        for (int i = 0; i < S::chunks; i++) {
            copy(i);
        }
    }
    // The 16 bytes of codes and 8 of scales of a lane, in the next block.
    __device__ __forceinline__ void read(uint4 & codes, uint2 & scales, int lane) {
        if (index == S::chunk) { // what was in the chunk is in registers
            __syncwarp();
            copy(at.slot);
            at.next();
            index = 0;
        }
        if (index == 0 && exists) {
            barrier_wait(full + at.slot, at.phase);
        }
        const uint8_t * tile = shared + at.slot * S::chunk_bytes + index * TQ_TILE_BYTES;
        codes  = *reinterpret_cast<const uint4 *>(tile + lane * 16);
        scales = *reinterpret_cast<const uint2 *>(tile + TQ_TILE_SCALES + (lane >> 2) * 8);
        index++;
    }
};

// A block's weights, as long as its products and sums need them.
struct operand {
    uint32_t a[16];
    uint2    scales;
};

template <class S> struct consumer {
    static constexpr int NJ = S::tokens / 8, W = S::width, WJ = W / 8;

    uint8_t       * shared;
    barriers        bar;
    weight_stream<S> stream;
    int             block, hi, nb, warp, lane; // block: the one that is being scaled
    ring<S::stages> begun, done;
    ring<2>         sums;
    float           acc[NJ][4];
    tq_prefill_mu   mu;

    __device__ __forceinline__ void load(operand & o) {
        uint4 w;
        stream.read(w, o.scales, lane);
        tq_prefill_codes(o.a, w);
        hold(o.a);
    }

    // Starts a part of a block's product; the first part waits for the activations.
    template <int PART> __device__ __forceinline__ void start(int (&c)[W / 2], const operand & o) {
        if (PART == 0) {
            barrier_wait(bar.full + begun.slot, begun.phase);
            if (d_apart<S>) {
                barrier_wait(bar.full_d + begun.slot, begun.phase);
            }
        }
        const uint64_t b = b_descriptor<S::tokens>(shared + begun.slot * S::record + PART * W * 16);
        hold(c);
        wgmma_fence();
        wgmma<0>(c, o.a, b);
        wgmma<1>(c, o.a + 4, b + 2 * S::tokens);
        wgmma<1>(c, o.a + 8, b + 4 * S::tokens);
        wgmma<1>(c, o.a + 12, b + 6 * S::tokens);
        wgmma_commit();
        if (PART == S::parts - 1) {
            begun.next();
        }
    }

    // acc += alpha * d * the sums of a part, which have come.
    template <int PART> __device__ __forceinline__ void finish(int (&c)[W / 2], const operand & o) {
        hold(c);
        const float * d = reinterpret_cast<const float *>(shared + done.slot * S::record + S::q) + PART * W + (lane & 3) * 4;
        const float alpha[2] = {__low2float(*reinterpret_cast<const half2 *>(&o.scales.x)),
                                __low2float(*reinterpret_cast<const half2 *>(&o.scales.y))};
#pragma unroll
        for (int j = 0; j < WJ; j += 2) {
            const float4 v = *reinterpret_cast<const float4 *>(d + j * 8);
            float (&lower)[4] = acc[PART * WJ + j], (&upper)[4] = acc[PART * WJ + j + 1];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                lower[2 * r]     += (alpha[r] * v.x) * (float) c[4 * j + 2 * r];
                lower[2 * r + 1] += (alpha[r] * v.y) * (float) c[4 * j + 2 * r + 1];
                upper[2 * r]     += (alpha[r] * v.z) * (float) c[4 * j + 4 + 2 * r];
                upper[2 * r + 1] += (alpha[r] * v.w) * (float) c[4 * j + 5 + 2 * r];
            }
        }
        if (PART == S::parts - 1) {
            end_block(o);
        }
    }

    // All of a block has been added: its stage is free, and after eight blocks mu * sum(x) follows.
    __device__ __forceinline__ void end_block(const operand & o) {
        mu.take(o.scales, block, lane & 3);
        barrier_arrive_warp(bar.empty + done.slot, lane);
        done.next();
        block++;
        if (block % 8 == 0 || block == hi) {
            barrier_wait(bar.full_sums + sums.slot, sums.phase);
            mu.add(acc, shared + S::at_sums + sums.slot * S::sums, lane, nb - (block - 1) / 8 * 8);
            mu.clear();
            barrier_arrive_warp(bar.empty_sums + sums.slot, lane);
            sums.next();
        }
    }

    // The current block's product (its first part) is in flight, in c0. Scales it with the next one underway (MORE). Which
    // products are in flight must not depend on a branch, or ptxas lets none be.
    template <bool MORE> __device__ __forceinline__ void step(int (&c0)[W / 2], int (&c1)[W / 2], operand & now, operand & next) {
        if constexpr (S::parts == 2) {
            start<1>(c1, now);
            wgmma_wait<1>();
            finish<0>(c0, now);
            if constexpr (MORE) {
                load(next);
                start<0>(c0, next);
            }
            wgmma_wait<MORE ? 1 : 0>();
            hold(now.a); // the products read them until now
            finish<1>(c1, now);
        } else if constexpr (S::overlap) {
            if constexpr (MORE && S::ahead) {
                load(next);
                start<0>(c1, next);
            }
            wgmma_wait<MORE && S::ahead ? 1 : 0>();
            hold(now.a);
            if constexpr (MORE && !S::ahead) {
                load(next);
                start<0>(c1, next);
            }
            finish<0>(c0, now);
        } else {
            wgmma_wait<0>();
            hold(now.a);
            finish<0>(c0, now);
            if constexpr (MORE) {
                load(next);
                start<0>(c0, next);
            }
        }
    }

    __device__ __forceinline__ void run() {
#pragma unroll
        for (int j = 0; j < NJ; j++) {
            acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.0f;
        }
        mu.clear();
        int c0[W / 2], c1[W / 2];
        operand o0;
        load(o0);
        start<0>(c0, o0);
        if constexpr (!S::overlap) {
            while (block + 1 < hi) {
                step<true>(c0, c1, o0, o0);
            }
            step<false>(c0, c1, o0, o0);
        } else {
            operand o1;
            int (&d0)[W / 2] = S::parts == 2 ? c0 : c1, (&d1)[W / 2] = S::parts == 2 ? c1 : c0;
            while (block + 2 < hi) {
                step<true>(c0, c1, o0, o1);
                step<true>(d0, d1, o1, o0);
            }
            if (block + 1 < hi) {
                step<true>(c0, c1, o0, o1);
                step<false>(d0, d1, o1, o0);
            } else {
                step<false>(c0, c1, o0, o1);
            }
        }
    }

    // Parts of K: the member of rank r collects the r-th share of the token columns j, `width` of them.
    __device__ __forceinline__ void share(const float4 * parts, int split, int rank) const {
        const int width = NJ / split;
        const float4 * mine = parts + warp * 32 + lane;
#pragma unroll
        for (int j = 0; j < NJ; j++) {
            const int owner = j >> (__ffs(width) - 1);
            if (owner != rank) {
                const int slot = rank - (rank > owner);
                cluster_store(cluster_map(mine + (slot * width + (j & (width - 1))) * (S::consumers * 128), owner), acc[j]);
            }
        }
    }
    __device__ __forceinline__ void collect(const float4 * parts, int split, int rank) {
        const int width = NJ / split;
        const float4 * mine = parts + warp * 32 + lane;
#pragma unroll
        for (int j = 0; j < NJ; j++) {
            if (j >> (__ffs(width) - 1) == rank) {
                const float4 * p = mine + (j & (width - 1)) * (S::consumers * 128);
#pragma unroll 1
                for (int slot = 0; slot < split - 1; slot++, p += width * (S::consumers * 128)) {
                    acc[j][0] += p->x;
                    acc[j][1] += p->y;
                    acc[j][2] += p->z;
                    acc[j][3] += p->w;
                }
            }
        }
    }

    // Every store of a warp fills four sectors of 8 rows.
    __device__ __forceinline__ void store(const tq_segment & seg, int row0, int token0, int n, int split, int rank) const {
        const int row = row0 + warp * 16 + (lane >> 2), token = token0 + 2 * (lane & 3);
        float * y = seg.y + (int64_t) token * seg.ld + row;
        const bool lower = row < seg.rows, upper = row + 8 < seg.rows;
#pragma unroll
        for (int j = 0; j < NJ; j++) {
            if (j >> (__ffs(NJ / split) - 1) != rank) {
                continue;
            }
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (token + 8 * j + k < n) {
                    float * p = y + (8 * j + k) * seg.ld;
                    if (lower) { p[0] = acc[j][k]; }
                    if (upper) { p[8] = acc[j][2 + k]; }
                }
            }
        }
    }
};

#endif // TQ_WGMMA_CODE

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
    const int width = tq_prefill_width(rest);
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
