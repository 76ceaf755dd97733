#pragma once

// The kernel for 9 to 64 tokens (sm_90 and newer): one read of the weights, all tokens in the registers of a warp.
//
// A thread block has WARPS * TILES tiles of 16 rows and all tokens. One warp more brings weights and activations, a ring of chunks of
// a few blocks of 128 columns. A warp unpacks a block of its TILES tiles once and multiplies it with eight tokens after the other
// (mma.m16n8k32, s8), or a warpgroup with all of them (wgmma): the integers of a block are added up by the tensor cores and scaled once.
//
// The blocks of all groups of rows (of all matrices) lie in one row, and every thread block takes an equal run of them. Thread
// blocks that share a group: the one that has its beginning adds up and writes y, the others hand over the registers of their
// warps through memory. They begin their runs with that group, so what they hand over they have first, and it is wanted at
// the end of another's run. No deadlock: handing over waits for nobody, only thread blocks with higher numbers are waited for,
// and those of them that are not yet on the card find room when the ones that wait for nobody end. Sums have one order, so
// results repeat to the bit.

#include "tq-barrier.cuh"
#include "tq-prefill.cuh"
#include "tq-wgmma.cuh"

struct tq_batch_args {
    tq_segment      segment[TQ_MAX_SEGMENTS];
    int             group_end[TQ_MAX_SEGMENTS]; // groups of this segment and those before
    tq_cut          cut;                        // of blocks
    int             nb;
    int             n;       // tokens
    const uint8_t * records;
    const uint8_t * sums;
    uint32_t      * flags;   // [thread block][warp]: its part of a shared group is there
    float4        * parts;   // [thread block][warp][16 bytes of a lane][lane]

    __device__ __forceinline__ int begin(int segment) const { return segment ? group_end[segment - 1] : 0; }
    __device__ __forceinline__ int find(int group) const {
        int segment = 0;
        while (segment < TQ_MAX_SEGMENTS - 1 && group >= group_end[segment]) { segment++; }
        return segment;
    }
};

// N tokens (a multiple of 8). Blocks come in chunks of CHUNK (2 or 4), which do not reach over multiples of CHUNK, in a ring of
// STAGES.
template <int N, int TILES, int WARPS, int CHUNK, int STAGES, int MIN_BLOCKS, bool WGMMA = false>
struct tq_batch_shape {
    static constexpr int tokens     = N;
    static constexpr int tiles      = TILES; // of 16 rows, of a warp
    static constexpr int warps      = WARPS; // that multiply
    static constexpr bool wgmma     = WGMMA;
    static constexpr int threads    = WARPS * 32 + (WGMMA ? 128 : 32); // registers are moved between warpgroups
    static constexpr int all_tiles  = WARPS * TILES;
    static constexpr int rows       = all_tiles * TQ_TILE_ROWS;
    static constexpr int chunk      = CHUNK;
    static constexpr int stages     = STAGES;
    static constexpr int min_blocks = MIN_BLOCKS;
    static constexpr int width      = tq_record_width(N);
    static constexpr int record     = tq_record_bytes(width);
    static constexpr int sums       = width * 64; // of eight blocks
    static constexpr int nj         = N / 8;

    // A stage: records, the sums of their eight blocks, weights.
    static constexpr int tile_bytes = CHUNK * TQ_TILE_BYTES; // of a tile in a chunk
    static constexpr int at_sums    = CHUNK * record;
    static constexpr int at_weights = at_sums + sums;
    static constexpr int stage      = at_weights + all_tiles * tile_bytes;

    // Shared memory: stages, barriers (what is in a stage is there, has been used).
    static constexpr int at_barriers = STAGES * stage;
    static constexpr int shared      = at_barriers + 2 * STAGES * 8;
    static constexpr int part        = all_tiles * nj * 32; // float4 that a thread block may hand over
    static_assert(all_tiles <= 32, "a lane copies a tile");
    static_assert(!WGMMA || (TILES == 1 && WARPS % 4 == 0), "a warpgroup has 64 rows");
};

// c = a x b + `start`, of 16 rows x 8 tokens x 32 columns.
static __device__ __forceinline__ void tq_mma_s8(int (&c)[4], const uint32_t * a, uint32_t b0, uint32_t b1, const int (&start)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(start[0]), "r"(start[1]), "r"(start[2]), "r"(start[3]));
#endif
}
// Four core matrices (8 tokens x 16 bytes): B of two steps of 32 columns.
static __device__ __forceinline__ void tq_load_b(uint32_t (&b)[4], uint32_t p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(p) : "memory");
#endif
}

// Where a run stands: chunk by chunk through blocks, groups and matrices.
template <class S> struct tq_batch_place {
    int left;                  // blocks of the run from here on
    int segment, group, block; // group: in its segment

    __device__ __forceinline__ int blocks(int nb) const { return min(min(S::chunk - block % S::chunk, nb - block), left); }
    // Whether a chunk of so many blocks from here ends eight blocks, or what the run has of this group.
    __device__ __forceinline__ bool ends_sums(int nb, int blocks) const {
        return (block + blocks) % 8 == 0 || block + blocks == nb || blocks == left;
    }
    // Whether the next chunk is of another group.
    __device__ __forceinline__ bool next(const tq_batch_args & a, int blocks) {
        left  -= blocks;
        block += blocks;
        if (block < a.nb) {
            return false;
        }
        block = 0;
        if (++group == a.group_end[segment] - a.begin(segment)) {
            group   = 0;
            segment = min(segment + 1, TQ_MAX_SEGMENTS - 1);
        }
        return true;
    }
};

// ---- the warp that copies -----------------------------------------------------------------------------------------
// A lane for each tile of rows; the first lane also brings the activations.
template <class S> struct tq_batch_producer {
    const tq_batch_args & a;
    uint8_t             * shared;
    uint64_t            * full, * empty;
    int                   lane;
    tq_batch_place<S>     at;
    const uint8_t       * from;  // of this lane's tile
    int                   tiles; // of this group

    __device__ __forceinline__ void seek() {
        const tq_segment & seg = a.segment[at.segment];
        const int first = at.group * S::all_tiles;
        tiles = min(S::all_tiles, tq_ceil(seg.rows, TQ_TILE_ROWS) - first);
        from  = seg.w + ((int64_t) (first + lane) * a.nb + at.block) * TQ_TILE_BYTES;
    }
    __device__ __forceinline__ void weights(int slot, int blocks) {
        const int bytes = blocks * TQ_TILE_BYTES;
        if (lane == 0) { tq_barrier_expect(full + slot, tiles * bytes + blocks * S::record + (at.ends_sums(a.nb, blocks) ? S::sums : 0)); }
        __syncwarp();
        if (lane < tiles) { tq_bulk_copy(shared + slot * S::stage + S::at_weights + lane * S::tile_bytes, from, bytes, full + slot, tq_evict_first()); }
        from += bytes;
    }
    __device__ __forceinline__ void records(const tq_batch_place<S> & p, int slot, int blocks) const {
        if (lane == 0) {
            uint64_t policy;
            asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy)); // every thread block reads them
            uint8_t * to = shared + slot * S::stage;
            tq_bulk_copy(to, a.records + (size_t) p.block * S::record, blocks * S::record, full + slot, policy);
            if (p.ends_sums(a.nb, blocks)) { tq_bulk_copy(to + S::at_sums, a.sums + (size_t) (p.block / 8) * S::sums, S::sums, full + slot, policy); }
        }
    }
    __device__ __forceinline__ void run() {
        seek();
        tq_batch_place<S> begin = at;
        int filled = 0;
        for (; filled < S::stages && at.left > 0; filled++) { // weights depend on no kernel before this one
            const int blocks = at.blocks(a.nb);
            weights(filled, blocks);
            if (at.next(a, blocks)) { seek(); }
        }
        tq_pdl_wait();
        for (int i = 0; i < filled; i++) {
            const int blocks = begin.blocks(a.nb);
            records(begin, i, blocks);
            begin.next(a, blocks);
        }
        for (int slot = 0, phase = 0; at.left > 0;) {
            const int blocks = at.blocks(a.nb);
            tq_barrier_wait(empty + slot, phase);
            weights(slot, blocks);
            records(at, slot, blocks);
            if (at.next(a, blocks)) { seek(); }
            if (++slot == S::stages) { slot = 0; phase ^= 1; }
        }
    }
};

// ---- a warp's results -------------------------------------------------------------------------------------------
template <class S> struct tq_batch_sums {
    float acc[S::tiles][S::nj][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < S::tiles; m++)
#pragma unroll
            for (int j = 0; j < S::nj; j++) { acc[m][j][0] = acc[m][j][1] = acc[m][j][2] = acc[m][j][3] = 0.0f; }
    }
    // To the thread block that has the beginning of this group.
    __device__ __forceinline__ void hand_over(const tq_batch_args & a, int warp, int lane) const {
        float4 * p = a.parts + (size_t) blockIdx.x * S::part + warp * (S::tiles * S::nj * 32) + lane;
#pragma unroll
        for (int m = 0; m < S::tiles; m++)
#pragma unroll
            for (int j = 0; j < S::nj; j++) {
                __stcg(p + (m * S::nj + j) * 32, make_float4(acc[m][j][0], acc[m][j][1], acc[m][j][2], acc[m][j][3]));
            }
        __syncwarp();
        if (lane == 0) {
            asm volatile("fence.acq_rel.gpu;\nst.relaxed.gpu.global.u32 [%0], 1;" ::"l"(a.flags + blockIdx.x * S::warps + warp) : "memory");
        }
    }
    // Adds what thread blocks first .. last hand over, and clears their flags for the next launch.
    __device__ __forceinline__ void collect(const tq_batch_args & a, int first, int last, int warp, int lane) {
        for (int other = first + lane; other <= last; other += 32) { // all at once
            uint32_t * flag = a.flags + other * S::warps + warp, there = 0;
            while (there == 0) { asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(flag) : "memory"); }
            asm volatile("st.relaxed.gpu.global.u32 [%0], 0;" ::"l"(flag) : "memory");
        }
        __syncwarp();
        const float4 * p = a.parts + (size_t) first * S::part + warp * (S::tiles * S::nj * 32) + lane;
        for (int other = first; other <= last; other++, p += S::part) {
#pragma unroll
            for (int m = 0; m < S::tiles; m++)
#pragma unroll
                for (int j = 0; j < S::nj; j++) {
                    const float4 v = __ldcg(p + (m * S::nj + j) * 32);
                    acc[m][j][0] += v.x;
                    acc[m][j][1] += v.y;
                    acc[m][j][2] += v.z;
                    acc[m][j][3] += v.w;
                }
        }
    }
    // Every store of a warp fills four sectors of 8 rows. `group`: in its segment.
    __device__ __forceinline__ void store(const tq_segment & seg, int group, int n, int warp, int lane) const {
#pragma unroll
        for (int m = 0; m < S::tiles; m++) {
            const int row = ((group * S::warps + warp) * S::tiles + m) * TQ_TILE_ROWS + (lane >> 2), token = 2 * (lane & 3);
            float * y = seg.y + (int64_t) token * seg.ld + row;
            const bool lower = row < seg.rows, upper = row + 8 < seg.rows;
#pragma unroll
            for (int j = 0; j < S::nj; j++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    if (token + 8 * j + k < n) {
                        float * p = y + (8 * j + k) * seg.ld;
                        if (lower) { p[0] = acc[m][j][k]; }
                        if (upper) { p[8] = acc[m][j][2 + k]; }
                    }
                }
        }
    }
};

// ---- a block of a warp ----------------------------------------------------------------------------------------------
// The weights of a lane in one block of a warp's tiles, on their way from shared memory.
template <class S> struct tq_batch_codes {
    uint4 codes[S::tiles];
    uint2 scales[S::tiles];

    __device__ __forceinline__ void load(const uint8_t * tile, int lane) {
#pragma unroll
        for (int m = 0; m < S::tiles; m++) {
            codes[m]  = *reinterpret_cast<const uint4 *>(tile + m * S::tile_bytes + lane * 16);
            scales[m] = *reinterpret_cast<const uint2 *>(tile + m * S::tile_bytes + TQ_TILE_SCALES + (lane >> 2) * 8);
        }
    }
};

// What a warp keeps in registers.
struct tq_batch_constants {
    uint32_t table;
    int      start[4]; // a sum of a block is below 2^15: added to this and read as float it is 1.5 * 2^23 + the sum

    __device__ __forceinline__ void make(int lane) {
        table = tq_prefill_table(lane);
#pragma unroll
        for (int i = 0; i < 4; i++) { start[i] = tq_prefill_constant(0x4B400000, lane, i); }
    }
};

// acc += alpha * d * the integer sums of one block, whose weights are in w; then those at `next` are on their way there (not
// where it is null). d, record_b: where the lane reads d and B of the block's activations.
template <class S>
static __device__ __forceinline__ void tq_batch_block(float (&acc)[S::tiles][S::nj][4], tq_batch_codes<S> & w, const uint8_t * next, int lane,
                                                      const tq_batch_constants & k, const float4 * d, uint32_t record_b) {
    uint32_t a[S::tiles][16];
    float alpha[S::tiles][2];
#pragma unroll
    for (int m = 0; m < S::tiles; m++) {
        tq_prefill_codes(a[m], w.codes[m], k.table);
        alpha[m][0] = __low2float(*reinterpret_cast<const half2 *>(&w.scales[m].x));
        alpha[m][1] = __low2float(*reinterpret_cast<const half2 *>(&w.scales[m].y));
    }
    if (next) { w.load(next, lane); }
#pragma unroll
    for (int j = 0; j < S::nj; j += 2) {
        const float4 v = d[2 * j]; // of tokens 8j + 2t, + 1 and, eight on, the same
        const float dj[2][2] = {{v.x, v.y}, {v.z, v.w}};
#pragma unroll
        for (int jj = 0; jj < 2; jj++) {
            if (j + jj >= S::nj) { continue; }
            int c[S::tiles][4];
#pragma unroll
            for (int u = 0; u < 4; u += 2) {
                uint32_t x[4];
                tq_load_b(x, record_b + u * (2 * S::width * 16) + (j + jj) * 128);
#pragma unroll
                for (int m = 0; m < S::tiles; m++) {
                    if (u == 0) {
                        tq_mma_s8(c[m], a[m], x[0], x[1], k.start);
                    } else {
                        tq_mma_s8(c[m], a[m] + 4 * u, x[0], x[1], c[m]);
                    }
                }
#pragma unroll
                for (int m = 0; m < S::tiles; m++) { tq_mma_s8(c[m], a[m] + 4 * u + 4, x[2], x[3], c[m]); }
            }
#pragma unroll
            for (int m = 0; m < S::tiles; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    acc[m][j + jj][i] += (alpha[m][i / 2] * dj[jj][i % 2]) * (__int_as_float(c[m][i]) - 12582912.0f);
                }
        }
    }
}

// The same by a product of the warpgroup.
template <class S>
static __device__ __forceinline__ void tq_batch_block_wgmma(float (&acc)[1][S::nj][4], tq_batch_codes<S> & w, const uint8_t * next, int lane,
                                                            uint32_t table, const float4 * d, const uint8_t * record) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    uint32_t a[16];
    tq_prefill_codes(a, w.codes[0], table);
    const float alpha[2] = {__low2float(*reinterpret_cast<const half2 *>(&w.scales[0].x)), __low2float(*reinterpret_cast<const half2 *>(&w.scales[0].y))};
    const uint64_t b = b_descriptor<S::width>(record);
    int c[S::tokens / 2];
    hold(a);
    hold(c);
    wgmma_fence();
    wgmma<0>(c, a, b);
    wgmma<1>(c, a + 4, b + 2 * S::width);
    wgmma<1>(c, a + 8, b + 4 * S::width);
    wgmma<1>(c, a + 12, b + 6 * S::width);
    wgmma_commit();
    w.load(next, lane);
    wgmma_wait<0>();
    hold(c);
#pragma unroll
    for (int j = 0; j < S::nj; j += 2) {
        const float4 v = d[2 * j];
        const float dj[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (j + i / 4 < S::nj) { acc[0][j + i / 4][i % 4] += (alpha[i % 4 / 2] * dj[i / 4 * 2 + i % 2]) * (float) c[4 * j + i]; }
        }
    }
#endif
}

// ---- the kernel -------------------------------------------------------------------------------------------------
template <class S> static __global__ void __launch_bounds__(S::threads, S::min_blocks) tq_batch_kernel(const __grid_constant__ tq_batch_args a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) uint8_t shared[];
    uint64_t * const full = (uint64_t *) (shared + S::at_barriers), * const empty = full + S::stages;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = lane & 3;
    tq_batch_place<S> now;
    {
        const int first = a.cut.first(blockIdx.x);
        now.left    = a.cut.length(blockIdx.x);
        now.group   = first / a.nb;
        now.block   = first - now.group * a.nb;
        now.segment = a.find(now.group);
        now.group  -= a.begin(now.segment);
    }
    if (warp == S::warps && lane == 0) {
        for (int i = 0; i < S::stages; i++) {
            tq_barrier_init(full + i, 1);
            tq_barrier_init(empty + i, S::warps * TQ_WARP_ARRIVALS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    tq_pdl_launch();
    if (warp >= S::warps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
        if constexpr (S::wgmma) { fewer_registers<24>(); }
#endif
        if (warp > S::warps) { return; }
        tq_batch_producer<S> producer = {a, shared, full, empty, lane, now, nullptr, 0};
        producer.run();
        return;
    }
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if constexpr (S::wgmma) { more_registers<S::warps == 16 ? 112 : S::warps == 12 ? 152 : 232>(); }
#endif
    tq_pdl_wait(); // the kernel before may still read y, and parts and flags are its too

    tq_batch_constants constants;
    constants.make(lane);
    tq_batch_sums<S> sums;
    tq_prefill_mu    mu[S::tiles];
    sums.clear();
#pragma unroll
    for (int m = 0; m < S::tiles; m++) { mu[m].clear(); }
    const uint32_t lane_b = tq_shared(shared) + (lane >> 3) * (S::width * 16) + (lane & 7) * 16;
    const uint8_t * const lane_d = shared + S::width * TQ_BLOCK + t * 16;
    const uint8_t * const mine   = shared + S::at_weights + warp * (S::tiles * S::tile_bytes);
    bool begun_before = now.block > 0;
    int  slot = 0, phase = 0, last = -1;
    while (now.left > 0) {
        const int blocks = now.blocks(a.nb);
        tq_barrier_wait(full + slot, phase);
        // What the chunk before held has been used: behind this wait no read of it can still be on its way.
        if (last >= 0) { tq_barrier_arrive_warp(empty + last, lane); }
        const uint8_t * tile = mine + slot * S::stage;
        const uint8_t * d    = lane_d + slot * S::stage;
        uint32_t        b    = lane_b + slot * S::stage;
        tq_batch_codes<S> w;
        w.load(tile, lane);
        const unsigned own = t - now.block % 4; // lane t keeps mu of blocks t and t + 4 of eight
        if (own < (unsigned) blocks) {
#pragma unroll
            for (int m = 0; m < S::tiles; m++) {
                const uint2 s = *reinterpret_cast<const uint2 *>(tile + m * S::tile_bytes + own * TQ_TILE_BYTES + TQ_TILE_SCALES + (lane >> 2) * 8);
                if (now.block & 4) {
                    mu[m].s[1][0] = s.x;
                    mu[m].s[1][1] = s.y;
                } else {
                    mu[m].s[0][0] = s.x;
                    mu[m].s[0][1] = s.y;
                }
            }
        }
#pragma unroll 1
        for (int i = blocks; i > 0; i--) {
            tile += TQ_TILE_BYTES;
            if constexpr (S::wgmma) {
                tq_batch_block_wgmma<S>(sums.acc, w, i > 1 ? tile : tile - TQ_TILE_BYTES, lane, constants.table, reinterpret_cast<const float4 *>(d), shared + (b - lane_b));
            } else {
                tq_batch_block<S>(sums.acc, w, i > 1 ? tile : nullptr, lane, constants, reinterpret_cast<const float4 *>(d), b);
            }
            d += S::record;
            b += S::record;
        }
        if (now.ends_sums(a.nb, blocks)) {
#pragma unroll
            for (int m = 0; m < S::tiles; m++) {
                mu[m].add(sums.acc[m], shared + slot * S::stage + S::at_sums, lane, a.nb - now.block / 8 * 8);
                mu[m].clear();
            }
        }
        last = slot;
        if (++slot == S::stages) { slot = 0; phase ^= 1; }

        const bool whole = now.block + blocks == a.nb; // the end of the group
        if (whole || blocks == now.left) {
            if (begun_before) {
                sums.hand_over(a, warp, lane);
            } else {
                if (!whole) {
                    const int end = (a.begin(now.segment) + now.group + 1) * a.nb;
                    int other = blockIdx.x + 1;
                    while (a.cut.first(other + 1) < end) { other++; }
                    sums.collect(a, blockIdx.x + 1, other, warp, lane);
                }
                sums.store(a.segment[now.segment], now.group, a.n, warp, lane);
            }
            sums.clear();
            begun_before = false;
        }
        now.next(a, blocks);
    }
#endif
}
