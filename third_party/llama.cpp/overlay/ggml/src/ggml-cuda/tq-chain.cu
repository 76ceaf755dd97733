// A chain of products in one kernel (tq-chain.cuh), for 1 to 8 tokens on sm_90 and newer.

#include "tq-chain.cuh"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace {

constexpr int MAX_DEVICES = 64;
constexpr int MAX_BLOCKS  = 256; // columns / 128 of a norm
constexpr int ACT_THREADS = 128; // eight groups of TQ_ACT_LANES: one for each token
constexpr int ACT_BARRIER = 1;   // of these threads

// ---- counters between thread blocks -------------------------------------------------------------------
enum { DONE, SQUARES, READY, COUNTERS }; // of a step: product written, sums of squares left, activations written
constexpr int LINE     = 32;             // ints: each counter has a line of its own
constexpr int LEFT     = TQ_CHAIN_STEPS * COUNTERS;
constexpr int N_COUNTS = LEFT + 1;

struct chain_step {
    tq_step_kind  kind;
    const float * a, * b, * w;
    float       * sum, * out;
    int64_t       ld_a, ld_b;
    float         eps;
    bool          gelu, vec;
    tq_act        act;
    tq_bytes      weights;
    tq_cut        cut;
    int           tile_chunks;
    float       * y[TQ_MAX_SEGMENTS];
    int64_t       ld[TQ_MAX_SEGMENTS];
    int           rows[TQ_MAX_SEGMENTS];
    int           tile_end[TQ_MAX_SEGMENTS]; // tiles of this segment and those before

    // This thread block's run of chunks; none where there are fewer tiles than thread blocks.
    __device__ __forceinline__ int first() const { return (int) blockIdx.x < cut.grid ? cut.first(blockIdx.x) : 0; }
    __device__ __forceinline__ int end() const { return (int) blockIdx.x < cut.grid ? cut.first(blockIdx.x) + cut.length(blockIdx.x) : 0; }
};

struct chain_args {
    int        steps;
    uint64_t * words;   // [thread block][TQ_SHARED_WORDS], as in tq_decode_stream
    int      * counts;  // [N_COUNTS][LINE]
    float    * squares; // [token][MAX_BLOCKS]
    chain_step step[TQ_CHAIN_STEPS];
};

// After all that this thread, and those it has met at a barrier, have written.
__device__ __forceinline__ void count_up(int * counter) {
    asm volatile("fence.acq_rel.gpu;\nred.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
// What others wrote before counting up is there after this, and after a barrier with this thread.
__device__ __forceinline__ void wait_for(const int * counter, int value) {
    int v;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
    } while (v < value);
}
__device__ __forceinline__ void act_barrier() {
    asm volatile("bar.sync %0, %1;" ::"n"(ACT_BARRIER), "n"(ACT_THREADS) : "memory");
}

// ---- shared memory --------------------------------------------------------------------------------------
template <int N, int WARPS, int UNIT, int STAGES> struct chain_shape {
    static constexpr int THREADS = WARPS * 32 + 64;
    static constexpr int CHUNK   = UNIT * TQ_TILE_BYTES;
    static constexpr int STAGE   = WARPS * CHUNK;
    static constexpr int COLUMN  = TQ_TILE_ROWS + 4; // floats from token to token: t = 0..3 fall on different banks
    static constexpr int SUMS    = N * COLUMN;       // of one warp
    static constexpr int SHARED  = STAGES * STAGE + 2 * WARPS * SUMS * (int) sizeof(float) + (2 * STAGES + 4) * 8;
};

struct chain_barriers {
    uint64_t * ready, * spent; // a stage of the ring: filled, used
    uint64_t * full, * empty;  // sums of a tile: written, added up
};

// ---- roles ------------------------------------------------------------------------------------------------
// Copies the runs of all steps, as far ahead as the ring is long. One lane.
template <class Shape, int STAGES> __device__ __forceinline__ void chain_copy(const chain_args & a, uint8_t * ring, const chain_barriers & bar) {
    const uint64_t policy = tq_evict_first();
    int slot = 0, phase = 1;
    for (int s = 0; s < a.steps; s++) {
        const chain_step & p = a.step[s];
        const int length = (p.end() - p.first()) * p.cut.chunk_bytes;
        tq_walk   source(p.weights, (int64_t) p.first() * p.cut.chunk_bytes);
        for (int copied = 0; copied < length; copied += Shape::STAGE) {
            const int now = min(Shape::STAGE, length - copied);
            tq_barrier_wait(bar.spent + slot, phase);
            tq_barrier_expect(bar.ready + slot, now);
            source.take(now, [&](const uint8_t * from, int bytes, int before) {
                tq_bulk_copy(ring + slot * Shape::STAGE + before, from, bytes, bar.ready + slot, policy);
            });
            if (++slot == STAGES) { slot = 0; phase ^= 1; }
        }
    }
}

// Adds up the sums of the other warps, tile by tile; tiles shared with a neighbour as in tq_stream_sum.
template <int N, class Shape, int WARPS>
__device__ __forceinline__ void chain_sum(const chain_args & a, const float * sums, const chain_barriers & bar, int lane) {
    constexpr int EACH = (TQ_TILE_ROWS * N + 31) / 32; // results of a lane
    int tiles = 0;
    for (int s = 0; s < a.steps; s++) {
        const chain_step & p = a.step[s];
        const int first = p.first(), end = p.end();
        int segment = 0;
        for (int tile = first / p.tile_chunks; tile * p.tile_chunks < end; tile++, tiles++) {
            const bool       begun_before = tile * p.tile_chunks < first, ends_after = (tile + 1) * p.tile_chunks > end;
            uint64_t * const words = a.words + (size_t) (blockIdx.x + ends_after) * TQ_SHARED_WORDS;
            const float    * mine  = sums + (tiles & 1) * WARPS * Shape::SUMS;
            tq_barrier_wait(bar.full + (tiles & 1), (tiles >> 1) & 1);
            while (segment < TQ_MAX_SEGMENTS - 1 && tile >= p.tile_end[segment]) { segment++; }
            const int row0 = (tile - (segment ? p.tile_end[segment - 1] : 0)) * TQ_TILE_ROWS;
#pragma unroll
            for (int k = 0; k < EACH; k++) {
                const int j = lane + 32 * k, token = j / TQ_TILE_ROWS, row = j % TQ_TILE_ROWS;
                if (j >= TQ_TILE_ROWS * N) { continue; }
                float v = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++) { v += mine[w * Shape::SUMS + token * Shape::COLUMN + row]; }
                if (begun_before) {
                    tq_word_write(words + j, (uint64_t) 1 << 32 | __float_as_uint(v));
                    continue;
                }
                if (ends_after) {
                    uint64_t other;
                    do { other = tq_word_read(words + j); } while (other >> 32 == 0);
                    tq_word_write(words + j, 0);
                    v += __uint_as_float((uint32_t) other);
                }
                if (row0 + row < p.rows[segment] && token < p.act.n) { p.y[segment][token * p.ld[segment] + row0 + row] = v; }
            }
            __syncwarp();
            if (lane == 0) { tq_barrier_arrive(bar.empty + (tiles & 1)); }
        }
        if (lane == 0 && first < end) { count_up(a.counts + (s * COUNTERS + DONE) * LINE); }
    }
}

// The activations of step s, by the first ACT_THREADS of the warps that multiply: thread block b has the columns b * 128 ..
// of all tokens, for the product of everybody. Returns when all columns are there.
template <int N> __device__ __forceinline__ void chain_act(const chain_args & a, int s, int thread) {
    const chain_step & p = a.step[s];
    const int   token = thread / TQ_ACT_LANES, lane = thread % TQ_ACT_LANES;
    int * const counts = a.counts + s * COUNTERS * LINE;
    const int   nb = p.act.nb, blocks = gridDim.x;
    if ((int) blockIdx.x < nb) {
        if (s > 0) {
            if (thread == 0) { wait_for(counts - (COUNTERS - DONE) * LINE, a.step[s - 1].cut.grid); }
            act_barrier();
        }
        for (int block = blockIdx.x; block < nb; block += blocks) {
            const int  column = block * TQ_BLOCK + 4 * lane;
            const bool real   = token < p.act.n;
            float v[8] = {}, u[8] = {};
            if (real) { tq_load8(p.a + token * p.ld_a + column, p.vec, v); }
            if (real && p.b) { tq_load8(p.b + token * p.ld_b + column, p.vec, u); }
            if (p.kind == TQ_STEP_GLU) {
#pragma unroll
                for (int i = 0; i < 8; i++) { v[i] = (p.gelu ? tq_gelu(v[i]) : tq_silu(v[i])) * u[i]; }
            }
            if (p.kind == TQ_STEP_NORM) {
                float w[8], square = 0;
                tq_load8(p.w + column, p.vec, w);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    v[i] += u[i];
                    square += v[i] * v[i];
                }
                if (real && p.sum) { tq_store8(p.sum + (int64_t) token * nb * TQ_BLOCK + column, p.vec, v); }
                square = tq_sum_lanes(square);
                if (lane == 0 && token < N) { a.squares[token * MAX_BLOCKS + block] = square; }
                act_barrier();
                if (thread == 0) {
                    count_up(counts + SQUARES * LINE);
                    wait_for(counts + SQUARES * LINE, nb); // tq_chain_fits: one block a thread block
                }
                act_barrier();
                float total = 0;
                if (token < N) {
                    for (int k = lane; k < nb; k += TQ_ACT_LANES) { total += a.squares[token * MAX_BLOCKS + k]; }
                }
                const float scale = rsqrtf(tq_sum_lanes(total) / (nb * TQ_BLOCK) + p.eps);
#pragma unroll
                for (int i = 0; i < 8; i++) { v[i] = real ? v[i] * scale * w[i] : 0.0f; }
            }
            if (real && p.out) { tq_store8(p.out + (int64_t) token * nb * TQ_BLOCK + column, p.vec, v); }
            tq_write_block<false>(p.act, token, block, lane, v, token < N);
        }
        act_barrier();
        if (thread == 0) { count_up(counts + READY * LINE); }
    }
    if (thread == 0) { wait_for(counts + READY * LINE, min(nb, blocks)); }
}

template <int N, class Shape, int WARPS, int UNIT, int STAGES>
__device__ __forceinline__ void chain_multiply(const chain_args & a, const uint8_t * ring, float * sums, const chain_barriers & bar, int warp, int lane) {
    using Math = tq_math<N>;
    const int       g = lane >> 2, t = lane & 3;
    const uint8_t * mine = ring + warp * Shape::CHUNK;
    int slot = 0, phase = 0, tiles = 0;
    tq_pdl_wait(); // inputs, and the counters, are the kernels' before
    const auto stage_used = [&]() {
        __syncwarp();
        if (lane == 0) { tq_barrier_arrive(bar.spent + slot); }
        if (++slot == STAGES) { slot = 0; phase ^= 1; }
    };
    for (int s = 0; s < a.steps; s++) {
        const chain_step  & p    = a.step[s];
        const uint4       * x    = (const uint4 *) p.act.q;
        const tq_act_head * head = (const tq_act_head *) p.act.aux;
        const int first = p.first(), end = p.end(), chunks = p.tile_chunks;
        int left = (end - first + WARPS - 1) / WARPS; // stages of this step
        int tile = first / chunks, q = first + warp, c = q - tile * chunks; // c: q in its tile
        if (warp < ACT_THREADS / 32) { chain_act<N>(a, s, threadIdx.x); }
        asm volatile("bar.sync 2, %0;" ::"n"(WARPS * 32) : "memory"); // among the warps that multiply
        for (; tile * chunks < end; tile++, tiles++, c -= chunks) {
            float acc[2][Math::RESULTS] = {};
            for (; c < chunks && q < end; c += WARPS, q += WARPS, left--) {
                typename Math::lane_activations v[UNIT];
                const uint4                   * xp = x + c * (UNIT * Math::X_STEP);
                const tq_act_head             * hp = head + c * (UNIT * N);
#pragma unroll
                for (int u = 0; u < UNIT; u++) { v[u].load(xp + u * Math::X_STEP, hp + u * N, lane); }
                tq_barrier_wait(bar.ready + slot, phase);
                tq_lane_weights w[UNIT];
#pragma unroll
                for (int u = 0; u < UNIT; u++) { w[u].load(mine + slot * Shape::STAGE + u * TQ_TILE_BYTES, lane); }
#pragma unroll
                for (int u = 0; u < UNIT; u++) { Math::block(acc, w[u], v[u]); }
                stage_used();
            }
            if (tiles >= 2) { tq_barrier_wait(bar.empty + (tiles & 1), ((tiles >> 1) - 1) & 1); }
            float * to = sums + ((tiles & 1) * WARPS + warp) * Shape::SUMS;
#pragma unroll
            for (int j = 0; j < Math::RESULTS; j++) {
                const int token = Math::token(t, j);
                if (token < N) {
                    to[token * Shape::COLUMN + g]     = acc[0][j];
                    to[token * Shape::COLUMN + g + 8] = acc[1][j];
                }
            }
            __syncwarp();
            if (lane == 0) { tq_barrier_arrive(bar.full + (tiles & 1)); }
        }
        for (; left > 0; left--) { // the last stage had nothing for this warp
            tq_barrier_wait(bar.ready + slot, phase);
            stage_used();
        }
    }
}

// ---- the kernel ---------------------------------------------------------------------------------------------
template <int N, int WARPS, int UNIT, int STAGES, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32 + 64, BLOCKS) chain_kernel(const __grid_constant__ chain_args a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    using Shape = chain_shape<N, WARPS, UNIT, STAGES>;
    extern __shared__ __align__(128) uint8_t ring[];
    float * sums = (float *) (ring + STAGES * Shape::STAGE); // [2][WARPS][token][row]
    chain_barriers bar;
    bar.ready = (uint64_t *) (sums + 2 * WARPS * Shape::SUMS);
    bar.spent = bar.ready + STAGES;
    bar.full  = bar.spent + STAGES;
    bar.empty = bar.full + 2;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            tq_barrier_init(bar.ready + i, 1);
            tq_barrier_init(bar.spent + i, WARPS);
        }
        for (int i = 0; i < 2; i++) {
            tq_barrier_init(bar.full + i, WARPS);
            tq_barrier_init(bar.empty + i, 1);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    tq_pdl_launch();
    if (warp < WARPS) {
        chain_multiply<N, Shape, WARPS, UNIT, STAGES>(a, ring, sums, bar, warp, lane);
    } else if (warp == WARPS) {
        if (lane == 0) { chain_copy<Shape, STAGES>(a, ring, bar); }
    } else {
        tq_pdl_wait();
        chain_sum<N, Shape, WARPS>(a, sums, bar, lane);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int before;
        asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(a.counts + LEFT * LINE) : "memory");
        if (before == (int) gridDim.x - 1) {
            for (int i = 0; i < N_COUNTS; i++) { a.counts[i * LINE] = 0; }
        }
    }
#endif
}

// ---- the host's side ------------------------------------------------------------------------------------
#define TQ_CHECK(call) check(call, #call)
void check(cudaError_t error, const char * call) {
    if (error != cudaSuccess) {
        fprintf(stderr, "tq-chain: %s: %s\n", call, cudaGetErrorString(error));
        abort();
    }
}

struct chain_variant {
    void (*run)(chain_args);
    int threads, shared, unit, blocks; // blocks: for each multiprocessor
};
template <int N, int WARPS, int UNIT, int STAGES, int BLOCKS> chain_variant make_variant() {
    using Shape = chain_shape<N, WARPS, UNIT, STAGES>;
    return {chain_kernel<N, WARPS, UNIT, STAGES, BLOCKS>, Shape::THREADS, Shape::SHARED, UNIT, BLOCKS};
}
int env_shape() { static const int s = getenv("TQ_CHAIN_SHAPE") ? atoi(getenv("TQ_CHAIN_SHAPE")) : 0; return s; }
int env_attr() { static const int s = getenv("TQ_CHAIN_ATTR") ? atoi(getenv("TQ_CHAIN_ATTR")) : 3; return s; }
template <int N> chain_variant by_unit(int unit) {
    if (env_shape() == 1) { return unit == 4 ? make_variant<N, 16, 4, N <= 2 ? 6 : 5, 1>() : make_variant<N, 16, 2, N <= 2 ? 12 : 10, 1>(); }
    if (env_shape() == 2) { return unit == 4 ? make_variant<N, 8, 4, 3, 2>() : make_variant<N, 8, 2, 6, 2>(); }
    return unit == 4 ? make_variant<N, 8, 4, N <= 2 ? 6 : 5, 2>() : make_variant<N, 8, 2, N <= 2 ? 12 : 10, 2>();
}
chain_variant variant(int cols, int unit) {
    return cols == 1 ? by_unit<1>(unit) : cols == 2 ? by_unit<2>(unit) : cols == 4 ? by_unit<4>(unit) : by_unit<8>(unit);
}

struct device_info {
    int  multiprocessors = 0; // 0: not asked yet
    bool usable = false;      // compiled for it, and thread blocks can be on the card together
    int  fits[9][5] = {};     // [cols][unit]: 0 not asked yet, 1 yes, -1 no
};
std::mutex device_mutex;

device_info & device() {
    static device_info devices[MAX_DEVICES];
    int id;
    TQ_CHECK(cudaGetDevice(&id));
    device_info & d = devices[id];
    if (d.multiprocessors == 0) {
        int major, cooperative;
        cudaFuncAttributes code;
        TQ_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id));
        TQ_CHECK(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, id));
        TQ_CHECK(cudaFuncGetAttributes(&code, (const void *) variant(1, 4).run));
        TQ_CHECK(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, id));
        d.usable = major >= 9 && code.ptxVersion >= 90 && cooperative;
    }
    return d;
}

bool variant_fits(device_info & d, int cols, int unit) {
    int & known = d.fits[cols][unit];
    if (known == 0) {
        const chain_variant v = variant(cols, unit);
        int blocks = 0;
        if (cudaFuncSetAttribute((const void *) v.run, cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared) == cudaSuccess) {
            TQ_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, (const void *) v.run, v.threads, v.shared));
        }
        (void) cudaGetLastError(); // of a card with less shared memory
        known = blocks >= v.blocks ? 1 : -1;
    }
    return known > 0;
}

int unit_of(const tq_step * steps, int n_steps) {
    int unit = 4;
    for (int s = 0; s < n_steps; s++) {
        while (steps[s].act.nb % unit != 0) { unit /= 2; }
    }
    return unit;
}

bool aligned(const void * p) { return (uintptr_t) p % 16 == 0; }

// `blocks`: thread blocks of the launch.
chain_step make_step(int blocks, const tq_step & step, int unit) {
    chain_step p = {};
    p.kind = step.kind;
    p.a = step.a; p.b = step.b; p.w = step.w; p.sum = step.sum; p.out = step.out;
    p.eps  = step.eps;
    p.gelu = step.gelu != 0;
    p.act  = step.act;
    p.ld_a = step.kind == TQ_STEP_NORM ? (int64_t) step.act.nb * TQ_BLOCK : step.ld_a;
    p.ld_b = step.kind == TQ_STEP_NORM ? (int64_t) step.act.nb * TQ_BLOCK : step.ld_b;
    p.vec  = aligned(p.a) && aligned(p.b) && aligned(p.w) && aligned(p.sum) && aligned(p.out) && p.ld_a % 4 == 0 && p.ld_b % 4 == 0;
    int tiles = 0;
    for (int i = 0; i < TQ_MAX_SEGMENTS; i++) {
        const tq_segment m = i < step.n_segments ? step.segments[i] : tq_segment{};
        const int here = (m.rows + TQ_TILE_ROWS - 1) / TQ_TILE_ROWS;
        tiles += here;
        p.weights.w[i]    = m.w;
        p.weights.size[i] = (int64_t) here * step.act.nb * TQ_TILE_BYTES;
        p.y[i] = m.y; p.ld[i] = m.ld; p.rows[i] = m.rows; p.tile_end[i] = tiles;
    }
    // a run is at least one tile long: then no tile has more than two of them
    const int grid = std::min(blocks, tiles), chunks = tiles * (step.act.nb / unit);
    p.cut = {grid, chunks / grid, chunks % grid, unit * TQ_TILE_BYTES};
    p.tile_chunks = step.act.nb / unit;
    return p;
}

size_t words_bytes(const device_info & d) { return (size_t) (2 * d.multiprocessors + 1) * TQ_SHARED_WORDS * sizeof(uint64_t); }
constexpr size_t COUNTS_BYTES = sizeof(int) * LINE * N_COUNTS, SQUARES_BYTES = sizeof(float) * TQ_DECODE_MAX * MAX_BLOCKS;

// Whether the driver takes dependent launch beside the cooperative one is asked by the first launch, unless a graph is
// being recorded, which an error would end.
void launch(const device_info & d, const chain_variant & v, const chain_args & args, cudaStream_t stream) {
    static int dependent = -1; // not known
    cudaStreamCaptureStatus recording = cudaStreamCaptureStatusNone;
    TQ_CHECK(cudaStreamIsCapturing(stream, &recording));
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim          = dim3(d.multiprocessors * v.blocks);
    config.blockDim         = dim3(v.threads);
    config.dynamicSmemBytes = v.shared;
    config.stream           = stream;
    config.attrs            = attributes;
    if (env_attr() == 1) { dependent = 0; }
    if (env_attr() == 2) { config.attrs = attributes + 1; config.numAttrs = 1; TQ_CHECK(cudaLaunchKernelEx(&config, v.run, args)); return; }
    if (dependent == -1 && recording == cudaStreamCaptureStatusNone) {
        config.numAttrs = 2;
        dependent = cudaLaunchKernelEx(&config, v.run, args) == cudaSuccess; if (getenv("TQ_CHAIN_ATTR")) fprintf(stderr, "dependent %d\n", dependent);
        if (dependent) { return; }
        (void) cudaGetLastError();
    }
    config.numAttrs = dependent == 1 ? 2 : 1;
    TQ_CHECK(cudaLaunchKernelEx(&config, v.run, args));
}

} // namespace

size_t tq_chain_scratch_bytes() {
    std::lock_guard<std::mutex> lock(device_mutex);
    return words_bytes(device()) + COUNTS_BYTES + SQUARES_BYTES;
}

bool tq_chain_fits(const tq_step * steps, int n_steps) {
    std::lock_guard<std::mutex> lock(device_mutex);
    device_info & d = device();
    const int unit = unit_of(steps, n_steps);
    if (!d.usable || n_steps < 1 || n_steps > TQ_CHAIN_STEPS || unit < 2) { return false; }
    for (int s = 0; s < n_steps; s++) {
        const tq_act & act = steps[s].act;
        if (act.layout != TQ_ACT_DECODE || act.n != steps[0].act.n || steps[s].n_segments < 1) { return false; }
        if (steps[s].kind == TQ_STEP_NORM && act.nb > std::min(d.multiprocessors, MAX_BLOCKS)) { return false; }
    }
    return variant_fits(d, steps[0].act.cols, unit);
}

void tq_chain(const tq_step * steps, int n_steps, void * scratch, cudaStream_t stream) {
    std::lock_guard<std::mutex> lock(device_mutex);
    device_info & d = device();
    const int unit = unit_of(steps, n_steps);
    chain_args a = {};
    a.steps   = n_steps;
    a.words   = (uint64_t *) scratch;
    a.counts  = (int *) ((char *) scratch + words_bytes(d));
    a.squares = (float *) ((char *) a.counts + COUNTS_BYTES);
    const chain_variant v = variant(steps[0].act.cols, unit);
    for (int s = 0; s < n_steps; s++) { a.step[s] = make_step(d.multiprocessors * v.blocks, steps[s], unit); }
    launch(d, v, a, stream);
}
