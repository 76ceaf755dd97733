// Products with 1 to 8 tokens: which kernel, how it is cut, what comes next. See KERNELS.md ("CUDA: decode").

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
constexpr int MAX_BLOCKS  = 4; // thread blocks of a multiprocessor that any shape asks for

// ---- the shapes of thread blocks ----------------------------------------------------------------------
struct stream_kernel {
    void (*run)(tq_stream_args);
    const char * name;
    int  threads, warps, unit, tiles;
    int  blocks;   // for each multiprocessor
    int  budget;   // bytes of shared memory of one
    int  stage;    // bytes of a stage
    int  rest;     // shared memory beside stages and activations
    bool x_shared; // activations in shared memory
};

template <int N, int WARPS, int UNIT, int TILES, bool X_SHARED, int BLOCKS, int BUDGET_KIB, int BOUND, int MIN_BLOCKS>
stream_kernel make_stream(const char * name) {
    using Shape = tq_stream_shape<N, WARPS, UNIT, TILES>;
    static_assert(BLOCKS <= MAX_BLOCKS, "scratch is too small");
    return {tq_decode_stream<N, WARPS, UNIT, TILES, X_SHARED, BOUND, MIN_BLOCKS>, name, Shape::THREADS, WARPS, UNIT, TILES, BLOCKS,
            BUDGET_KIB * 1024, Shape::STAGE, Shape::RING_AT, X_SHARED};
}

enum stream_shape { W8U4, W8U4D, P8U2, P8U2D, P8U1, P8U4, A10U2, B10U4, STREAM_SHAPES };

template <int N> stream_kernel stream_by_shape(int shape) {
    switch (shape) {
        case W8U4:  return make_stream<N, 8, 4, 1, false, 2, 48, 320, 2>("w8u4");
        case W8U4D: return make_stream<N, 8, 4, 1, false, 2, 100, 320, 2>("w8u4d");
        case P8U2:  return make_stream<N, 8, 2, 2, false, 2, 80, 320, 2>("p8u2");
        case P8U2D: return make_stream<N, 8, 2, 2, false, 2, 110, 320, 2>("p8u2d");
        case P8U1:  return make_stream<N, 8, 1, 2, false, 2, 80, 320, 2>("p8u1");
        case P8U4:  return make_stream<N, 8, 4, 2, false, 2, 110, 320, 2>("p8u4");
        case A10U2: return make_stream<N, 10, 2, 1, true, 1, 120, 640, 2>("a10u2");
        default:    return make_stream<N, 10, 4, 1, false, 1, 100, 448, 1>("b10u4");
    }
}
stream_kernel stream_of(int cols, int shape) {
    return cols == 1 ? stream_by_shape<1>(shape) : cols == 2 ? stream_by_shape<2>(shape) :
           cols == 4 ? stream_by_shape<4>(shape) : stream_by_shape<8>(shape);
}
int x_bytes(const stream_kernel & k, int cols, int nb) { return k.x_shared ? nb * cols * (TQ_BLOCK + (int) sizeof(tq_act_head)) : 0; }
// As many stages as there is room for; fewer than two: this shape cannot take it.
int stages_of(const stream_kernel & k, int cols, int nb) {
    return nb % k.unit ? 0 : std::min(TQ_MAX_STAGES, (k.budget - k.rest - x_bytes(k, cols, nb)) / k.stage);
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
        TQ_CHECK(cudaFuncGetAttributes(&code, (const void *) stream_of(1, W8U4).run));
        d.dependent = major >= 9;
        d.streams   = major >= 9 && code.ptxVersion >= 90;
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
        TQ_CHECK(cudaFuncSetAttribute((const void *) k.run, cudaFuncAttributeMaxDynamicSharedMemorySize, k.budget));
        TQ_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, (const void *) k.run, k.threads, k.budget));
        if (each == 0) { fprintf(stderr, "tq_decode: a thread block of shape %s does not fit on this device\n", k.name); abort(); }
        n = std::min(each, k.blocks) * d.multiprocessors;
    }
    return n;
}

template <class Args> void launch(const device_info & d, void (*kernel)(Args), dim3 grid, int threads, int shared, const Args & args, cudaStream_t stream) {
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

// ---- the cut ------------------------------------------------------------------------------------------
// What the lab may choose; tq_decode takes what the table gives.
struct decode_policy {
    int shape = -1, fallback = -1; // of thread blocks, and where the first cannot take the row; -1: by the table
};

int choose_shape(const decode_policy & policy, int cols, int nb) {
    for (int shape : {policy.shape, policy.fallback, (int) W8U4, (int) P8U2}) {
        if (shape >= 0 && stages_of(stream_of(cols, shape), cols, nb) >= 2) { return shape; }
    }
    return P8U1;
}

// ---- launches -----------------------------------------------------------------------------------------
int tiles_of(int rows) { return (rows + TQ_TILE_ROWS - 1) / TQ_TILE_ROWS; }

void run_stream(device_info & d, const decode_policy & policy, const tq_segment * segments, int n_segments, const tq_act & act,
                void * scratch, cudaStream_t stream) {
    const int           shape = choose_shape(policy, act.cols, act.nb);
    const stream_kernel k     = stream_of(act.cols, shape);
    tq_stream_args a = {};
    int groups = 0;
    for (int i = 0; i < TQ_MAX_SEGMENTS; i++) {
        const tq_segment s = i < n_segments ? segments[i] : tq_segment{};
        groups += (tiles_of(s.rows) + k.tiles - 1) / k.tiles;
        a.w[i] = s.w; a.y[i] = s.y; a.ld[i] = s.ld; a.rows[i] = s.rows; a.group_end[i] = groups;
    }
    a.group_chunks = act.nb / k.unit;
    a.stages       = stages_of(k, act.cols, act.nb);
    a.tokens       = act.n;
    a.x            = (const uint4 *) act.q;
    a.head         = (const tq_act_head *) act.aux;
    a.scratch      = (uint64_t *) scratch;
    // a run is at least one group long: then no group has more than two of them
    const int grid = std::min(slots(d, act.cols, shape), groups), chunks = groups * a.group_chunks;
    a.cut = {grid, chunks / grid, chunks % grid, k.stage / k.warps};
    launch(d, k.run, dim3(grid), k.threads, k.rest + a.stages * k.stage + x_bytes(k, act.cols, act.nb), a, stream);
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

void tq_decode(const tq_segment * segments, int n_segments, const tq_act & act, void * scratch, const tq_next *,
               cudaStream_t stream) {
    std::lock_guard<std::mutex> lock(device_mutex);
    device_info & d = device();
    if (d.streams) {
        run_stream(d, decode_policy{}, segments, n_segments, act, scratch, stream);
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
