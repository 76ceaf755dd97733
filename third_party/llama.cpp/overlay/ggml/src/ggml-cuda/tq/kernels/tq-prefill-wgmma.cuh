#pragma once

// A thread block of tq-prefill-wgmma.cu: its shape, the warp that brings activations, and a warp that multiplies.

#include "tq-prefill.cuh"
#include "tq-wgmma.cuh"

#if defined(GGML_CUDA_TQ_SM90A)

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
    const int width = S::tokens == TQ_PREFILL_BN ? S::tokens : args.width; // of a record
    const uint8_t * record = args.records + ((size_t) group * args.nb + lo) * tq_record_bytes(width);
    const uint8_t * sums   = args.sums + ((size_t) group * tq_ceil(args.nb, 8) + lo / 8) * (width * 64);
    ring<S::stages> at;
    ring<2> at_sums;
    // Weights do not depend on the kernel before, activations do. The next launch may begin when they are there: where it is
    // the second of the same product, it reads them without waiting for this one.
    if (!args.second) {
        tq_pdl_wait();
    }
    tq_pdl_launch();
    for (int block = lo; block < hi; block++, record += tq_record_bytes(width)) {
        if (block == lo || block % 8 == 0) {
            barrier_wait(bar.empty_sums + at_sums.slot, at_sums.phase ^ 1);
            barrier_expect(bar.full_sums + at_sums.slot, S::sums);
            bulk_copy(shared + S::at_sums + at_sums.slot * S::sums, sums, S::sums, bar.full_sums + at_sums.slot);
            sums += width * 64;
            at_sums.next();
        }
        barrier_wait(bar.empty + at.slot, at.phase ^ 1);
        barrier_expect(bar.full + at.slot, d_apart<S> ? S::q : S::record);
        uint8_t * dst = shared + at.slot * S::record;
        if (width == S::tokens && !d_apart<S>) {
            bulk_copy(dst, record, S::record, bar.full + at.slot);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                bulk_copy(dst + i * (S::tokens * 16), record + i * (width * 16), S::tokens * 16, bar.full + at.slot);
            }
            if (d_apart<S>) {
                barrier_expect(bar.full_d + at.slot, S::tokens * 4);
            }
            bulk_copy(dst + S::q, record + width * TQ_BLOCK, S::tokens * 4, (d_apart<S> ? bar.full_d : bar.full) + at.slot);
        }
        at.next();
    }
    if (args.second) {
        tq_pdl_wait(); // whoever waits for this launch waits for the first as well
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
    uint32_t        table; // of codes

    __device__ __forceinline__ void load(operand & o) {
        uint4 w;
        stream.read(w, o.scales, lane);
        tq_prefill_codes(o.a, w, table);
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
        table = tq_prefill_table(lane);
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

} // namespace

#endif // GGML_CUDA_TQ_SM90A
