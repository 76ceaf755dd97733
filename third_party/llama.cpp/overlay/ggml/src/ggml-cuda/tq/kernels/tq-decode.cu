// Products with 1 to 8 tokens: which kernel, and how it is cut. See docs/kernels/decode.md.

#include "tq-decode-registers.cuh"
#include "tq-decode-stream.cuh"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace {

#define TQ_CHECK(call) tq_check(call, #call, __FILE__, __LINE__)
void tq_check(cudaError_t error, const char * call, const char * file, int line) {
    if (error != cudaSuccess) {
        fprintf(stderr, "%s:%d: %s: %s\n", file, line, call, cudaGetErrorString(error));
        abort();
    }
}

constexpr int MAX_DEVICES = 64;
constexpr int MAX_BLOCKS  = 2; // thread blocks of a multiprocessor

// ---- the shapes of thread blocks ----------------------------------------------------------------------
struct stream_kernel {
    void (*run)(tq_stream_args);
    const char * name;
    int threads, unit, tiles;
    int stages, shared; // shared: bytes
};

// KIB: of shared memory for a thread block. What is left of the multiprocessor's 256 is its L1 cache, and has the activations.
template <int N, int UNIT, int TILES, int KIB> stream_kernel make_stream(const char * name) {
    constexpr int WARPS = 8;
    using Shape = tq_stream_shape<N, WARPS, UNIT, TILES>;
    constexpr int ROOM = (KIB * 1024 - Shape::RING_AT) / Shape::STAGE, STAGES = ROOM < TQ_MAX_STAGES ? ROOM : TQ_MAX_STAGES;
    static_assert(STAGES >= 2, "a ring needs two stages");
    return {tq_decode_stream<N, WARPS, UNIT, TILES, MAX_BLOCKS>, name, Shape::THREADS, UNIT, TILES, STAGES,
            Shape::RING_AT + STAGES * Shape::STAGE};
}

// Two thread blocks of 8 warps for each multiprocessor; larger, fewer or deeper ones were slower (docs/kernels/lab-book.md).
enum stream_shape { ONE_BY_4, TWO_BY_2, TWO_BY_1, STREAM_SHAPES };

template <int N> stream_kernel stream_by_shape(int shape) {
    switch (shape) {
        case ONE_BY_4: return make_stream<N, 4, 1, 48>("1 tile x 4");
        case TWO_BY_2: return make_stream<N, 2, 2, 80>("2 tiles x 2");
        default:       return make_stream<N, 1, 2, 80>("2 tiles x 1");
    }
}
stream_kernel stream_of(int cols, int shape) {
    return cols == 1 ? stream_by_shape<1>(shape) : cols == 2 ? stream_by_shape<2>(shape) :
           cols == 4 ? stream_by_shape<4>(shape) : stream_by_shape<8>(shape);
}
// `tiles`: of all matrices; `slots`: thread blocks that the device holds at once. At 8 tokens the activations are the limit,
// which two tiles share, and at one token what is done for each of its blocks counts. From 2 to 4 it is the weights, and many
// chunks to cut evenly count for more, but for long runs over short rows, and where a run is a tile and a bit (fitted to an H200:
// benchmarks/cuda_lab/results/product5.txt, product6.txt).
int choose_shape(int cols, int nb, int tiles, int slots) {
    const bool quads = nb % 4 == 0;
    if (cols > 4 || cols == 1) { return nb % 2 == 0 ? TWO_BY_2 : TWO_BY_1; }
    const bool pairs = nb <= 64 && (tiles >= 6 * slots || (nb > 32 && tiles > slots && 4 * tiles < 7 * slots));
    return quads && !pairs ? ONE_BY_4 : nb % 2 == 0 ? TWO_BY_2 : TWO_BY_1;
}
int token_index(int cols) { return cols == 1 ? 0 : cols == 2 ? 1 : cols == 4 ? 2 : 3; }

// ---- the device -----------------------------------------------------------------------------------------
struct device_info {
    int  multiprocessors = 0; // 0: not asked yet
    bool dependent = false;   // programmatic dependent launch
    bool streams = false;     // the code for bulk copies was compiled, and the device has them
    int  slots[4][STREAM_SHAPES] = {}; // thread blocks that it holds at once; 0: not asked yet
};

// Of the current device.
device_info & device() {
    static device_info devices[MAX_DEVICES];
    int id;
    TQ_CHECK(cudaGetDevice(&id));
    device_info & d = devices[id];
    if (d.multiprocessors == 0) {
        int major;
        cudaFuncAttributes code;
        TQ_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id));
        TQ_CHECK(cudaFuncGetAttributes(&code, (const void *) stream_of(1, ONE_BY_4).run));
        // code for older cards has no wait: an early start would be a race
        d.streams   = major >= 9 && code.ptxVersion >= 90;
        d.dependent = d.streams && tq_early_start_wanted();
        TQ_CHECK(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, id));
    }
    return d;
}
std::mutex device_mutex; // device() and slots() fill their tables on first use

int slots(device_info & d, int cols, int shape) {
    int & n = d.slots[token_index(cols)][shape];
    if (n == 0) {
        const stream_kernel k = stream_of(cols, shape);
        int each;
        TQ_CHECK(cudaFuncSetAttribute((const void *) k.run, cudaFuncAttributeMaxDynamicSharedMemorySize, k.shared));
        TQ_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, (const void *) k.run, k.threads, k.shared));
        if (each == 0) { fprintf(stderr, "tq_decode: a thread block of shape %s does not fit on this device\n", k.name); abort(); }
        n = std::min(each, MAX_BLOCKS) * d.multiprocessors;
    }
    return n;
}

template <class Args>
void launch(const device_info & d, void (*kernel)(Args), dim3 grid, int threads, int shared, const Args & args, cudaStream_t stream) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim          = grid;
    config.blockDim         = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream           = stream;
    config.attrs            = &attribute;
    config.numAttrs         = d.dependent ? 1 : 0;
    TQ_CHECK(cudaLaunchKernelEx(&config, kernel, args));
}

// ---- launches -----------------------------------------------------------------------------------------
int tiles_of(int rows) { return (rows + TQ_TILE_ROWS - 1) / TQ_TILE_ROWS; }

int choose_shape(const device_info & d, const tq_segment * segments, int n_segments, const tq_act & act) {
    int tiles = 0;
    for (int i = 0; i < n_segments; i++) { tiles += tiles_of(segments[i].rows); }
    return choose_shape(act.cols, act.nb, tiles, MAX_BLOCKS * d.multiprocessors);
}

void run_stream(device_info & d, int shape, const tq_segment * segments, int n_segments, const tq_act & act, void * scratch,
                cudaStream_t stream) {
    const stream_kernel k = stream_of(act.cols, shape);
    tq_stream_args a = {};
    int groups = 0;
    for (int i = 0; i < TQ_MAX_SEGMENTS; i++) {
        const tq_segment s = i < n_segments ? segments[i] : tq_segment{};
        groups += (tiles_of(s.rows) + k.tiles - 1) / k.tiles;
        a.w[i] = s.w; a.y[i] = s.y; a.ld[i] = s.ld; a.rows[i] = s.rows; a.group_end[i] = groups;
    }
    a.group_chunks = act.nb / k.unit;
    a.stages       = k.stages;
    a.tokens       = act.n;
    a.x            = (const uint4 *) act.q;
    a.head         = (const tq_act_head *) act.aux;
    a.scratch      = (uint64_t *) scratch;
    // a run is at least one group long: then no group has more than two of them
    const int grid = std::min(slots(d, act.cols, shape), groups), chunks = groups * a.group_chunks;
    a.cut = {grid, chunks / grid, chunks % grid};
    launch(d, k.run, dim3(grid), k.threads, k.shared, a, stream);
}

template <int N> void run_registers(const device_info & d, const tq_registers_args & a, int tiles, cudaStream_t stream) {
    if (a.nb <= 8) {
        launch(d, tq_decode_registers<N, 4, 1, 4>, dim3(tiles), 4 * 32, 0, a, stream);
    } else {
        launch(d, tq_decode_registers<N, 8, 2, 3>, dim3(tiles), 8 * 32, 0, a, stream);
    }
}

void run_registers(const device_info & d, const tq_segment * segments, int n_segments, const tq_act & act, cudaStream_t stream) {
    tq_registers_args a = {};
    int tiles = 0;
    for (int i = 0; i < TQ_MAX_SEGMENTS; i++) {
        const tq_segment s = i < n_segments ? segments[i] : tq_segment{};
        tiles += tiles_of(s.rows);
        a.w[i] = s.w; a.y[i] = s.y; a.ld[i] = s.ld; a.rows[i] = s.rows; a.tile_end[i] = tiles;
    }
    a.x      = (const uint4 *) act.q;
    a.head   = (const tq_act_head *) act.aux;
    a.nb     = act.nb;
    a.tokens = act.n;
    switch (act.cols) {
        case 1:  run_registers<1>(d, a, tiles, stream); break;
        case 2:  run_registers<2>(d, a, tiles, stream); break;
        case 4:  run_registers<4>(d, a, tiles, stream); break;
        default: run_registers<8>(d, a, tiles, stream); break;
    }
}

} // namespace

// ---- the contract (tq-kernels.cuh) --------------------------------------------------------------------
size_t tq_decode_scratch_bytes() {
    std::lock_guard<std::mutex> lock(device_mutex);
    return (size_t) device().multiprocessors * MAX_BLOCKS * TQ_SHARED_WORDS * sizeof(uint64_t);
}

void tq_decode(const tq_segment * segments, int n_segments, const tq_act & act, void * scratch, cudaStream_t stream) {
    std::lock_guard<std::mutex> lock(device_mutex);
    device_info & d = device();
    if (d.streams) {
        run_stream(d, choose_shape(d, segments, n_segments, act), segments, n_segments, act, scratch, stream);
    } else {
        run_registers(d, segments, n_segments, act, stream);
    }
}

void tq_decode_experts(const tq_experts & e, cudaStream_t stream) {
    std::lock_guard<std::mutex> lock(device_mutex);
    const device_info & d = device();
    const dim3 grid(tiles_of(e.rows), e.used * e.tokens);
    if (e.nb <= 8) {
        launch(d, tq_decode_experts_kernel<4, 1>, grid, 4 * 32, 0, e, stream);
    } else {
        launch(d, tq_decode_experts_kernel<8, 2>, grid, 8 * 32, 0, e, stream);
    }
}
