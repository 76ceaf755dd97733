#pragma once

// Decode on sm_90 and newer: one stream of bulk copies for each thread block.
//
// The blocks of all tiles of all matrices lie in one row, and every thread block takes an equal run of them,
// also across the ends of tiles and matrices. A producer warp keeps some stages of WARPS chunks in flight by
// bulk copies, WARPS warps take a chunk each, and a last warp adds their sums up. A chunk is UNIT
// columns of blocks of a group: one tile, or two that share the activations in registers.
//
// Groups that two thread blocks share. A run is at least a group long (run_stream), so no more than two share one. The
// one that has the end of the group begins its run with it; it sends its sums as {value, 1} words of 64 bits, which a
// reader sees whole or not at all, to the one before, whose last group it is and which writes y and
// clears the words for the next launch. So y needs no zeros, no atomics, and is summed in one order.
// Nobody waits for long: the words are sent at the beginning of a run and wanted at the end of another.
// No deadlock: sending waits for nobody, and the grid is no larger than what the device holds at once. Where other
// kernels hold part of it, thread blocks start in order, and the only one here that can be waiting for one not
// yet started is the last one started: all others come to their end and make room.

#include "tq-barrier.cuh"
#include "tq-math.cuh"

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
#ifdef TQ_RACECHECK
constexpr int TQ_MAX_STAGES   = 2; // so that a product of a few blocks fills the ring more than once
#else
constexpr int TQ_MAX_STAGES   = 12;
#endif
constexpr int TQ_SHARED_WORDS = 2 * TQ_TILE_ROWS * TQ_DECODE_MAX; // that a thread block may send to the one before

struct tq_stream_args {
    const uint8_t     * w[TQ_MAX_SEGMENTS];
    float             * y[TQ_MAX_SEGMENTS];
    int64_t             ld[TQ_MAX_SEGMENTS];
    int                 rows[TQ_MAX_SEGMENTS];
    int                 group_end[TQ_MAX_SEGMENTS]; // groups of this segment and those before
    tq_cut              cut;
    int                 group_chunks; // nb / UNIT
    int                 stages;
    int                 tokens;       // to be written, at most N
    const uint4       * x;
    const tq_act_head * head;
    uint64_t          * scratch;      // [grid][TQ_SHARED_WORDS]

    // Segment of a group, and the first group of a segment.
    __device__ __forceinline__ int segment(int group, int from = 0) const {
        while (from < TQ_MAX_SEGMENTS - 1 && group >= group_end[from]) { from++; }
        return from;
    }
    __device__ __forceinline__ int begin(int segment) const { return segment ? group_end[segment - 1] : 0; }
};

// ---- the kernel -------------------------------------------------------------------------------------
template <int N, int WARPS, int UNIT, int TILES> struct tq_stream_shape {
    static constexpr int THREADS = WARPS * 32 + 64;
    static constexpr int CHUNK   = UNIT * TQ_TILE_BYTES; // of one tile
    static constexpr int LAYER   = WARPS * CHUNK;        // a stage: the chunks of the first tile, then those of the second
    static constexpr int STAGE   = LAYER * TILES;
    static constexpr int ROWS    = TILES * TQ_TILE_ROWS;
    static constexpr int COLUMN  = ROWS + 4;   // floats from token to token: t = 0..3 fall on different banks
    static constexpr int SUMS    = N * COLUMN; // of one warp

    // Shared memory: barriers, sums [2][WARPS][token][row], the ring.
    static constexpr int BARRIERS = 2 * TQ_MAX_STAGES + 4; // stages filled, stages used; sums written, sums added up
    static constexpr int SUMS_AT  = BARRIERS * 8;
    static constexpr int RING_AT  = (SUMS_AT + 2 * WARPS * SUMS * 4 + 127) / 128 * 128;
};

// The warp that copies: one lane. Weights depend on no kernel before this one, so it never waits for one.
template <class Shape, int WARPS, int TILES> struct tq_producer {
    const tq_stream_args & a;
    uint8_t              * ring;
    uint64_t             * ready, * spent;
    int                    left, slot = 0, phase = 1; // left: chunks of this run
    int                    segment, group;            // where the next stage begins; group: in its segment
    int                    limit;                     // chunks from there on that lie one after the other
    const uint8_t        * from;                      // the first of them

    __device__ __forceinline__ tq_producer(const tq_stream_args & a, uint8_t * ring, uint64_t * ready, uint64_t * spent) :
        a(a), ring(ring), ready(ready), spent(spent), left(a.cut.length(blockIdx.x)) {
        const int first = a.cut.first(blockIdx.x), all = first / a.group_chunks;
        segment = a.segment(all);
        group   = all - a.begin(segment);
        seek(first - all * a.group_chunks);
    }
    // With one tile a group the next group follows on this one, with two it lies behind the second tile.
    __device__ __forceinline__ void seek(int chunk) {
        const int groups = TILES > 1 ? 1 : a.group_end[segment] - a.begin(segment) - group;
        limit = groups * a.group_chunks - chunk;
        from  = a.w[segment] + ((int64_t) group * TILES * a.group_chunks + chunk) * Shape::CHUNK;
    }
    __device__ __forceinline__ void seek_next() {
        group += TILES > 1 ? 1 : a.group_end[segment];
        if (group >= a.group_end[segment] - a.begin(segment)) {
            group = 0;
            segment = min(segment + 1, TQ_MAX_SEGMENTS - 1);
        }
        seek(0);
    }
    // The last group of a matrix may have but one tile.
    __device__ __forceinline__ int tiles() const {
        return TILES > 1 && (group * TILES + 1) * TQ_TILE_ROWS >= a.rows[segment] ? 1 : TILES;
    }
    __device__ __forceinline__ void piece(int n, int before, int tiles, uint64_t policy) {
#pragma unroll
        for (int k = 0; k < TILES; k++) {
            if (k < tiles) {
                tq_bulk_copy(ring + slot * Shape::STAGE + k * Shape::LAYER + before * Shape::CHUNK,
                             from + (int64_t) k * a.group_chunks * Shape::CHUNK, n * Shape::CHUNK, ready + slot, policy);
            }
        }
        from += n * Shape::CHUNK;
        limit -= n;
        left -= n;
        if (limit == 0 && left > 0) { seek_next(); }
    }
    // The next stage: WARPS chunks, one copy for each tile, more where they do not lie one after the other.
    __device__ __forceinline__ void copy() {
        const uint64_t policy = tq_evict_first();
        const int      count  = min(WARPS, left);
        if (count <= limit) {
            const int t = tiles();
            tq_barrier_expect(ready + slot, count * t * Shape::CHUNK);
            piece(count, 0, t, policy);
        } else {
            for (int done = 0; done < count;) {
                const int n = min(count - done, limit), t = tiles();
                tq_barrier_expect_more(ready + slot, n * t * Shape::CHUNK);
                piece(n, done, t, policy);
                done += n;
            }
            tq_barrier_arrive(ready + slot);
        }
        if (++slot == a.stages) { slot = 0; phase ^= 1; }
    }
    __device__ __forceinline__ void fill() {
        for (int i = 0; i < a.stages && left > 0; i++) { copy(); }
    }
    __device__ __forceinline__ void run() {
        while (left > 0) {
            tq_barrier_wait(spent + slot, phase);
            copy();
        }
    }
};

// The warp that adds up: sums of the others group by group, and those of the thread block after this one.
template <int N, class Shape, int WARPS>
static __device__ __forceinline__ void tq_stream_sum(const tq_stream_args & a, const float * sums, uint64_t * full, uint64_t * empty,
                                                     int group, int first, int end, int lane) {
    constexpr int RESULTS = Shape::ROWS * N, EACH = (RESULTS + 31) / 32; // of all lanes, of one
    int segment = 0;
    for (int i = 0; group * a.group_chunks < end; group++, i++) {
        const bool       begun_before = group * a.group_chunks < first, ends_after = (group + 1) * a.group_chunks > end;
        uint64_t * const words = a.scratch + (size_t) (blockIdx.x + ends_after) * TQ_SHARED_WORDS;
        uint64_t         other[EACH];
#pragma unroll
        for (int k = 0; k < EACH; k++) { // asked for before the last of our own have come
            const int j = lane + 32 * k;
            other[k]    = 0;
            if (ends_after && j < RESULTS) { other[k] = tq_word_read(words + j); }
        }
        segment = a.segment(group, segment);
        const float * s    = sums + (i & 1) * WARPS * Shape::SUMS;
        const int     row0 = (group - a.begin(segment)) * Shape::ROWS;
        tq_barrier_wait(full + (i & 1), (i >> 1) & 1);
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int j = lane + 32 * k, token = j / Shape::ROWS, row = j % Shape::ROWS;
            if (j >= RESULTS) { continue; }
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
        tq_barrier_arrive_warp(empty + (i & 1), lane);
    }
}

template <int N, int WARPS, int UNIT, int TILES, int MIN_BLOCKS>
static __global__ void __launch_bounds__(WARPS * 32 + 64, MIN_BLOCKS) tq_decode_stream(const __grid_constant__ tq_stream_args a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    using Shape = tq_stream_shape<N, WARPS, UNIT, TILES>;
    using Math  = tq_math<N>;
    static_assert(Shape::ROWS * N <= TQ_SHARED_WORDS, "scratch is too small");
    extern __shared__ __align__(128) uint8_t shared[];
    uint64_t * const ready = (uint64_t *) shared, * const spent = ready + TQ_MAX_STAGES;
    uint64_t * const full = spent + TQ_MAX_STAGES, * const empty = full + 2;
    float    * const sums = (float *) (shared + Shape::SUMS_AT);
    uint8_t  * const ring = shared + Shape::RING_AT;
    const int        lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

    if (warp == WARPS) {
        tq_producer<Shape, WARPS, TILES> producer(a, ring, ready, spent);
        if (lane == 0) {
            for (int i = 0; i < a.stages; i++) {
                tq_barrier_init(ready + i, 1);
                tq_barrier_init(spent + i, WARPS * TQ_WARP_ARRIVALS);
            }
            for (int i = 0; i < 2; i++) {
                tq_barrier_init(full + i, WARPS * TQ_WARP_ARRIVALS);
                tq_barrier_init(empty + i, TQ_WARP_ARRIVALS);
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
    int       group = first / a.group_chunks;
    __syncthreads();
    tq_pdl_launch();
    tq_pdl_wait(); // the kernel before may still write activations and read y; the scratch is its too
    if (warp == WARPS + 1) {
        tq_stream_sum<N, Shape, WARPS>(a, sums, full, empty, group, first, end, lane);
        return;
    }

    const int       g = lane >> 2, t = lane & 3;
    const uint8_t * mine = ring + warp * Shape::CHUNK;
    int             slot = 0, phase = 0, q = first + warp, c = q - group * a.group_chunks; // c: q in its group
    for (int i = 0; group * a.group_chunks < end; group++, i++, c -= a.group_chunks) {
        float acc[TILES][2][Math::RESULTS] = {};
        for (; c < a.group_chunks && q < end; c += WARPS, q += WARPS) {
            const uint4       * xp = a.x + c * (UNIT * Math::X_STEP);
            const tq_act_head * hp = a.head + c * (UNIT * N);
            const uint8_t     * wp = mine + slot * Shape::STAGE;
            typename Math::lane_activations v[UNIT];
#pragma unroll
            for (int u = 0; u < UNIT; u++) { v[u].load(xp + u * Math::X_STEP, hp + u * N, lane); } // far away, so before the wait
            tq_barrier_wait(ready + slot, phase);
#pragma unroll
            for (int u = 0; u < UNIT; u++) {
#pragma unroll
                for (int k = 0; k < TILES; k++) {
                    tq_lane_weights w;
                    w.load(wp + k * Shape::LAYER + u * TQ_TILE_BYTES, lane);
                    Math::block(acc[k], w, v[u]);
                }
            }
            tq_barrier_arrive_warp(spent + slot, lane);
            if (++slot == a.stages) { slot = 0; phase ^= 1; }
        }
#pragma unroll
        for (int k = 0; k < TILES; k++) { Math::finish(acc[k], lane); }
        if (i >= 2) { tq_barrier_wait(empty + (i & 1), ((i >> 1) - 1) & 1); }
        float * s = sums + ((i & 1) * WARPS + warp) * Shape::SUMS;
#pragma unroll
        for (int k = 0; k < TILES; k++)
#pragma unroll
            for (int j = 0; j < Math::RESULTS; j++) {
                const int token = Math::token(t, j);
                if (token < N) {
                    s[token * Shape::COLUMN + k * TQ_TILE_ROWS + g]     = acc[k][0][j];
                    s[token * Shape::COLUMN + k * TQ_TILE_ROWS + g + 8] = acc[k][1][j];
                }
            }
        tq_barrier_arrive_warp(full + (i & 1), lane);
    }
#endif
}
