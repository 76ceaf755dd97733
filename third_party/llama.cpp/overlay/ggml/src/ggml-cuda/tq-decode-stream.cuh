#pragma once

// Decode on sm_90 and newer: one stream of bulk copies for each thread block.
//
// The blocks of all tiles of all matrices lie in one row, and every thread block takes an equal run of them,
// also across the ends of tiles and matrices. A producer warp keeps STAGES stages of WARPS chunks (UNIT
// blocks each) in flight, one bulk copy a stage, WARPS warps take a chunk each, and a last warp adds their
// sums up tile by tile.
//
// Tiles that two thread blocks share. A run is at least a tile long (tq_cut), so no more than two share one. The one that
// has the end of the tile begins its run with it; it sends its sums as {value, 1} words of 64 bits, which a
// reader sees whole or not at all, to the one before, whose last tile it is and which writes y and
// clears the words for the next launch. So y needs no zeros, no atomics, and is summed in one order.
// Nobody waits for long: the words are sent at the beginning of a run and wanted at the end of another.
// No deadlock: sending waits for nobody, and the grid is no larger than what the device holds at once. Where other
// kernels hold part of it, thread blocks start in order, and the only one here that can be waiting for one not
// yet started is the last one started: all others come to their end and make room.
//
// DRAM is kept busy where one product ends and the next begins: the producer fetches into L2 what its run
// takes `ahead` bytes later, and past the end of its run the beginning of the next product's.

#include "tq-math.cuh"

// ---- barriers and bulk copies -----------------------------------------------------------------------
static __device__ __forceinline__ uint32_t tq_shared(const void * p) { return (uint32_t) __cvta_generic_to_shared(p); }
static __device__ __forceinline__ void tq_barrier_init(uint64_t * b, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(tq_shared(b)), "r"(count) : "memory");
}
static __device__ __forceinline__ void tq_barrier_expect(uint64_t * b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(tq_shared(b)), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void tq_barrier_arrive(uint64_t * b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(tq_shared(b)) : "memory");
}
static __device__ __forceinline__ void tq_barrier_wait(uint64_t * b, int parity) {
    asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}"
                 ::"r"(tq_shared(b)), "r"(parity) : "memory");
}
// Weights are read once, so what was copied is the first to leave L2: what was fetched ahead stays.
static __device__ __forceinline__ uint64_t tq_evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
static __device__ __forceinline__ void tq_bulk_copy(void * to, const void * from, int bytes, uint64_t * b, uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(tq_shared(to)), "l"(from), "r"(bytes), "r"(tq_shared(b)), "l"(policy) : "memory");
}
static __device__ __forceinline__ void tq_fetch_l2(const void * from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// ---- words between thread blocks ------------------------------------------------------------------
static __device__ __forceinline__ void tq_word_write(uint64_t * p, uint64_t v) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
static __device__ __forceinline__ uint64_t tq_word_read(const uint64_t * p) {
    uint64_t v;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

// ---- what a launch takes ----------------------------------------------------------------------------
constexpr int TQ_SHARED_WORDS = TQ_TILE_ROWS * TQ_DECODE_MAX; // of scratch for each thread block

// The bytes of up to TQ_MAX_SEGMENTS matrices, one after the other.
struct tq_bytes {
    const uint8_t * w[TQ_MAX_SEGMENTS];
    int64_t         size[TQ_MAX_SEGMENTS]; // unused ones: 0
};

// How a stream of `grid` runs is cut: the first `longer` are of run + 1 chunks, the others of run.
struct tq_cut {
    int grid, run, longer, chunk_bytes;

    __host__ __device__ int first(int b) const { return b * run + (b < longer ? b : longer); }
    __host__ __device__ int length(int b) const { return run + (b < longer); }
};

struct tq_stream_args {
    tq_bytes            weights;
    tq_cut              cut;
    int                 tile_chunks; // of one tile: nb / UNIT
    const uint4       * x;
    const tq_act_head * head;
    uint64_t          * scratch; // [grid][TQ_SHARED_WORDS]
    float             * y[TQ_MAX_SEGMENTS];
    int64_t             ld[TQ_MAX_SEGMENTS];
    int                 rows[TQ_MAX_SEGMENTS];
    int                 tile_end[TQ_MAX_SEGMENTS]; // tiles of this segment and those before
    int                 tokens;                    // to be written, at most N
    int                 ahead;                     // bytes that L2 is ahead of the copies, in the run of this thread block
    tq_bytes            next;
    tq_cut              next_cut;   // grid 0: no next product
    int                 next_ahead; // bytes of each of its runs to fetch
};

// A place in the bytes of several matrices.
struct tq_walk {
    const tq_bytes & bytes;
    int              i = 0;
    int64_t          at;

    __device__ __forceinline__ tq_walk(const tq_bytes & b, int64_t start) : bytes(b), at(start) { settle(); }
    __device__ __forceinline__ void settle() {
        while (i < TQ_MAX_SEGMENTS - 1 && at >= bytes.size[i]) { at -= bytes.size[i++]; }
    }
    // Calls piece(address, bytes, bytes before) for the next `count` bytes, which must be there.
    template <class F> __device__ __forceinline__ void take(int count, F && piece) {
        for (int done = 0; done < count;) {
            const int64_t left = bytes.size[i] - at;
            const int     now  = left < count - done ? (int) left : count - done;
            piece(bytes.w[i] + at, now, done);
            done += now;
            at += now;
            settle();
        }
    }
};

// ---- the kernel -------------------------------------------------------------------------------------
template <int N, int WARPS, int UNIT, int STAGES> struct tq_stream_shape {
    static constexpr int THREADS = WARPS * 32 + 64;
    static constexpr int CHUNK   = UNIT * TQ_TILE_BYTES;
    static constexpr int STAGE   = WARPS * CHUNK;
    static constexpr int COLUMN  = TQ_TILE_ROWS + 4; // floats from token to token: t = 0..3 fall on different banks
    static constexpr int SUMS    = N * COLUMN;       // of one warp
    static constexpr int SHARED  = STAGES * STAGE + 2 * WARPS * SUMS * (int) sizeof(float) + (2 * STAGES + 4) * 8;
};

// The warp that copies: one lane. Weights depend on no kernel before this one, so it never waits for one.
template <class Shape, int STAGES> struct tq_producer {
    const tq_stream_args & a;
    uint8_t              * ring;
    uint64_t             * ready, * spent;
    const int              length; // bytes of this run
    int                    copied = 0, fetched, next_fetched = 0, next_length = 0, slot = 0, phase = 1;
    tq_walk                source, ahead, next;
    const uint64_t         policy = tq_evict_first();

    __device__ __forceinline__ tq_producer(const tq_stream_args & a, uint8_t * ring, uint64_t * ready, uint64_t * spent) :
        a(a), ring(ring), ready(ready), spent(spent), length(a.cut.length(blockIdx.x) * a.cut.chunk_bytes),
        fetched(min(length, STAGES * Shape::STAGE)), source(a.weights, offset(a.cut, blockIdx.x)),
        ahead(a.weights, offset(a.cut, blockIdx.x) + fetched), next(a.next, offset(a.next_cut, blockIdx.x)) {
        next_length = to_fetch(blockIdx.x);
    }
    static __device__ __forceinline__ int64_t offset(const tq_cut & c, int run) { return (int64_t) c.first(run) * c.chunk_bytes; }
    // How much of a run of the next product is to be fetched.
    __device__ __forceinline__ int to_fetch(int run) const {
        return run < a.next_cut.grid ? min(a.next_ahead, a.next_cut.length(run) * a.next_cut.chunk_bytes) : 0;
    }

    __device__ __forceinline__ void copy() {
        const int now = min(Shape::STAGE, length - copied);
        tq_barrier_expect(ready + slot, now);
        source.take(now, [&](const uint8_t * from, int bytes, int before) {
            tq_bulk_copy(ring + slot * Shape::STAGE + before, from, bytes, ready + slot, policy);
        });
        copied += now;
        if (++slot == STAGES) { slot = 0; phase ^= 1; }
    }
    static __device__ __forceinline__ void fetch(tq_walk & w, int & done, int to) {
        while (done < to) {
            const int now = min(Shape::STAGE, to - done);
            w.take(now, [](const uint8_t * p, int bytes, int) { tq_fetch_l2(p, bytes); });
            done += now;
        }
    }
    __device__ __forceinline__ void look_ahead() {
        if (a.ahead == 0) { return; }
        fetch(ahead, fetched, min(length, copied + a.ahead));
        fetch(next, next_fetched, min(next_length, copied + a.ahead - length));
    }

    __device__ __forceinline__ void fill() {
        for (int i = 0; i < STAGES && copied < length; i++) { copy(); }
    }
    __device__ __forceinline__ void run() {
        look_ahead();
        while (copied < length) {
            tq_barrier_wait(spent + slot, phase);
            copy();
            look_ahead();
        }
        fetch(next, next_fetched, next_length);
        for (int b = blockIdx.x + gridDim.x; b < a.next_cut.grid; b += gridDim.x) { // its grid is larger than this one
            tq_walk more(a.next, offset(a.next_cut, b));
            int     done = 0;
            fetch(more, done, to_fetch(b));
        }
    }
};

// The warp that adds up: sums of the others tile by tile, and those of the thread block after this one.
template <int N, class Shape, int WARPS>
static __device__ __forceinline__ void tq_stream_sum(const tq_stream_args & a, const float * sums, uint64_t * full, uint64_t * empty,
                                                     int tile, int first, int end, int lane) {
    constexpr int EACH = (TQ_TILE_ROWS * N + 31) / 32; // results of a lane
    int segment = 0;
    for (int i = 0; tile * a.tile_chunks < end; tile++, i++) {
        const bool       begun_before = tile * a.tile_chunks < first, ends_after = (tile + 1) * a.tile_chunks > end;
        uint64_t * const words = a.scratch + (size_t) (blockIdx.x + ends_after) * TQ_SHARED_WORDS;
        uint64_t         other[EACH];
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int j = lane + 32 * k;
            other[k]    = 0; // and 0.0f
            if (ends_after && j < TQ_TILE_ROWS * N) { other[k] = tq_word_read(words + j); }
        }
        const float * s = sums + (i & 1) * WARPS * Shape::SUMS;
        tq_barrier_wait(full + (i & 1), (i >> 1) & 1);
        while (segment < TQ_MAX_SEGMENTS - 1 && tile >= a.tile_end[segment]) { segment++; }
        const int row0 = (tile - (segment ? a.tile_end[segment - 1] : 0)) * TQ_TILE_ROWS;
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int j = lane + 32 * k, token = j / TQ_TILE_ROWS, row = j % TQ_TILE_ROWS;
            if (j >= TQ_TILE_ROWS * N) { continue; }
            float v = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) { v += s[w * Shape::SUMS + token * Shape::COLUMN + row]; }
            if (begun_before) {
                tq_word_write(words + j, (uint64_t) 1 << 32 | __float_as_uint(v));
                continue;
            }
            if (ends_after) {
                while (other[k] >> 32 == 0) { other[k] = tq_word_read(words + j); }
                tq_word_write(words + j, 0);
                v += __uint_as_float((uint32_t) other[k]);
            }
            if (row0 + row < a.rows[segment] && token < a.tokens) { a.y[segment][token * a.ld[segment] + row0 + row] = v; }
        }
        __syncwarp();
        if (lane == 0) { tq_barrier_arrive(empty + (i & 1)); }
    }
}

template <int N, int WARPS, int UNIT, int STAGES, int MIN_BLOCKS>
static __global__ void __launch_bounds__(WARPS * 32 + 64, MIN_BLOCKS) tq_decode_stream(const __grid_constant__ tq_stream_args a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    using Shape = tq_stream_shape<N, WARPS, UNIT, STAGES>;
    using Math  = tq_math<N>;
    extern __shared__ __align__(128) uint8_t ring[];
    float    * sums  = (float *) (ring + STAGES * Shape::STAGE); // [2][WARPS][token][row]
    uint64_t * ready = (uint64_t *) (sums + 2 * WARPS * Shape::SUMS), * spent = ready + STAGES; // a stage: filled, used
    uint64_t * full  = spent + STAGES, * empty = full + 2;                                      // sums: written, added up
    const int  lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

    if (warp == WARPS) {
        tq_producer<Shape, STAGES> producer(a, ring, ready, spent);
        if (lane == 0) {
            for (int i = 0; i < STAGES; i++) {
                tq_barrier_init(ready + i, 1);
                tq_barrier_init(spent + i, WARPS);
            }
            for (int i = 0; i < 2; i++) {
                tq_barrier_init(full + i, WARPS);
                tq_barrier_init(empty + i, 1);
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            producer.fill(); // before anybody else is up
        }
        __syncthreads();
        tq_pdl_launch();
        if (lane == 0) { producer.run(); }
        return;
    }
    const int first = a.cut.first(blockIdx.x), end = first + a.cut.length(blockIdx.x);
    int       tile  = first / a.tile_chunks;
    __syncthreads();
    tq_pdl_launch();
    tq_pdl_wait(); // the kernel before may still write activations and read y; the scratch is its too
    if (warp == WARPS + 1) {
        tq_stream_sum<N, Shape, WARPS>(a, sums, full, empty, tile, first, end, lane);
        return;
    }

    const int       g = lane >> 2, t = lane & 3;
    const uint8_t * mine = ring + warp * Shape::CHUNK;
    int             slot = 0, phase = 0, q = first + warp, c = q - tile * a.tile_chunks; // c: q in its tile
    for (int i = 0; tile * a.tile_chunks < end; tile++, i++, c -= a.tile_chunks) {
        float acc[2][Math::RESULTS] = {};
        for (; c < a.tile_chunks && q < end; c += WARPS, q += WARPS) {
            typename Math::lane_activations x[UNIT];
            const uint4                   * xp = a.x + c * (UNIT * Math::X_STEP);
            const tq_act_head             * hp = a.head + c * (UNIT * N);
#pragma unroll
            for (int u = 0; u < UNIT; u++) { x[u].load(xp + u * Math::X_STEP, hp + u * N, lane); }
            tq_barrier_wait(ready + slot, phase);
            tq_lane_weights w[UNIT];
#pragma unroll
            for (int u = 0; u < UNIT; u++) { w[u].load(mine + slot * Shape::STAGE + u * TQ_TILE_BYTES, lane); }
#pragma unroll
            for (int u = 0; u < UNIT; u++) { Math::block(acc, w[u], x[u]); }
            __syncwarp();
            if (lane == 0) { tq_barrier_arrive(spent + slot); }
            if (++slot == STAGES) { slot = 0; phase ^= 1; }
        }
        if (i >= 2) { tq_barrier_wait(empty + (i & 1), ((i >> 1) - 1) & 1); }
        float * s = sums + ((i & 1) * WARPS + warp) * Shape::SUMS;
#pragma unroll
        for (int j = 0; j < Math::RESULTS; j++) {
            const int token = Math::token(t, j);
            if (token < N) {
                s[token * Shape::COLUMN + g]     = acc[0][j];
                s[token * Shape::COLUMN + g + 8] = acc[1][j];
            }
        }
        __syncwarp();
        if (lane == 0) { tq_barrier_arrive(full + (i & 1)); }
    }
#endif
}
