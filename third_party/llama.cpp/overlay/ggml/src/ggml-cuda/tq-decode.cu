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
    int threads, unit, shared, blocks; // blocks: for each multiprocessor
};

template <int N, int WARPS, int UNIT, int STAGES, int BLOCKS> stream_kernel make_stream() {
    using Shape = tq_stream_shape<N, WARPS, UNIT, STAGES>;
    static_assert(BLOCKS <= MAX_BLOCKS, "scratch is too small");
    return {tq_decode_stream<N, WARPS, UNIT, STAGES, BLOCKS>, Shape::THREADS, UNIT, Shape::SHARED, BLOCKS};
}

// Chunks of 4 blocks where a row has a multiple of 4: fewest instructions beside the arithmetic. Few warps and stages are
// enough, and leave room for the thread blocks of the next kernel.
enum stream_shape { W8U4S2, W12U2S4, W8U2S3, W8U1S4, STREAM_SHAPES };
const char * const stream_names[STREAM_SHAPES] = {"w8u4s2x2", "w12u2s4x2", "w8u2s3x3", "w8u1s4x3"};

template <int N> stream_kernel stream_by_shape(int shape) {
    switch (shape) {
        case W8U4S2:  return make_stream<N, 8, 4, 2, 2>();
        case W12U2S4: return make_stream<N, 12, 2, 4, 2>();
        case W8U2S3:  return make_stream<N, 8, 2, 3, 3>();
        default:      return make_stream<N, 8, 1, 4, 3>();
    }
}
stream_kernel stream_of(int cols, int shape) {
    return cols == 1 ? stream_by_shape<1>(shape) : cols == 2 ? stream_by_shape<2>(shape) :
           cols == 4 ? stream_by_shape<4>(shape) : stream_by_shape<8>(shape);
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
        TQ_CHECK(cudaFuncGetAttributes(&code, (const void *) stream_of(1, W8U4S2).run));
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
        TQ_CHECK(cudaFuncSetAttribute((const void *) k.run, cudaFuncAttributeMaxDynamicSharedMemorySize, k.shared));
        TQ_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, (const void *) k.run, k.threads, k.shared));
        if (each == 0) { fprintf(stderr, "tq_decode: a thread block of shape %s does not fit on this device\n", stream_names[shape]); abort(); }
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
// What one may choose; the tables below choose for tq_decode, the lab tries others.
struct decode_policy {
    int    shape = -1;      // of thread blocks; -1: by the table
    size_t ahead = 0;       // bytes of the whole grid that L2 is to be ahead of the copies
    size_t next_ahead = 16 << 20; // bytes of the next product to fetch before its time
};

int tiles_of(const int * rows, int n) {
    int tiles = 0;
    for (int i = 0; i < n; i++) { tiles += (rows[i] + TQ_TILE_ROWS - 1) / TQ_TILE_ROWS; }
    return tiles;
}

int choose_shape(const decode_policy & policy, int cols, int nb) {
    if (policy.shape >= 0 && nb % stream_of(cols, policy.shape).unit == 0) { return policy.shape; }
    return nb % 4 == 0 ? W8U4S2 : nb % 2 == 0 ? W8U2S3 : W8U1S4;
}

// A run is at least one tile long: then no tile has more than two of them.
tq_cut make_cut(device_info & d, int cols, int shape, int nb, int tiles) {
    const int unit = stream_of(cols, shape).unit, grid = std::min(slots(d, cols, shape), tiles), chunks = tiles * (nb / unit);
    return {grid, chunks / grid, chunks % grid, unit * TQ_TILE_BYTES};
}

// Where the matrices of a stream lie and end.
tq_bytes make_bytes(const uint8_t * const * w, const int * rows, int n, int nb) {
    tq_bytes bytes = {};
    for (int i = 0; i < n; i++) {
        bytes.w[i]    = w[i];
        bytes.size[i] = (int64_t) tiles_of(rows + i, 1) * nb * TQ_TILE_BYTES;
    }
    return bytes;
}

// ---- launches -----------------------------------------------------------------------------------------
void run_stream(device_info & d, const decode_policy & policy, const tq_segment * segments, int n_segments, const tq_act & act,
                void * scratch, const tq_next * next, cudaStream_t stream) {
    tq_stream_args a = {};
    const uint8_t * w[TQ_MAX_SEGMENTS] = {};
    for (int i = 0, end = 0; i < TQ_MAX_SEGMENTS; i++) {
        const tq_segment s = i < n_segments ? segments[i] : tq_segment{};
        end += tiles_of(&s.rows, 1);
        w[i] = s.w; a.y[i] = s.y; a.ld[i] = s.ld; a.rows[i] = s.rows; a.tile_end[i] = end;
    }
    const int shape = choose_shape(policy, act.cols, act.nb);
    const stream_kernel k = stream_of(act.cols, shape);
    a.weights     = make_bytes(w, a.rows, n_segments, act.nb);
    a.cut         = make_cut(d, act.cols, shape, act.nb, a.tile_end[TQ_MAX_SEGMENTS - 1]);
    a.tile_chunks = act.nb / k.unit;
    a.x           = (const uint4 *) act.q;
    a.head        = (const tq_act_head *) act.aux;
    a.scratch     = (uint64_t *) scratch;
    a.tokens      = act.n;
    a.ahead       = (int) (policy.ahead / a.cut.grid) / 16 * 16;
    if (next && next->segments > 0 && next->cols <= TQ_DECODE_MAX) {
        const int next_shape = choose_shape(policy, next->cols, next->nb);
        a.next       = make_bytes(next->w, next->rows, next->segments, next->nb);
        a.next_cut   = make_cut(d, next->cols, next_shape, next->nb, tiles_of(next->rows, next->segments));
        a.next_ahead = (int) (policy.next_ahead / a.next_cut.grid) / 16 * 16;
    }
    launch(d, k.run, dim3(a.cut.grid), k.threads, k.shared, a, stream);
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
        tiles += tiles_of(&s.rows, 1);
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

void tq_decode(const tq_segment * segments, int n_segments, const tq_act & act, void * scratch, const tq_next * next,
               cudaStream_t stream) {
    std::lock_guard<std::mutex> lock(device_mutex);
    device_info & d = device();
    if (d.streams) {
        run_stream(d, decode_policy{}, segments, n_segments, act, scratch, next, stream);
    } else {
        run_registers(d, segments, n_segments, act, stream);
    }
}

void tq_decode_experts(const tq_experts & e, cudaStream_t stream) {
    std::lock_guard<std::mutex> lock(device_mutex);
    const device_info & d = device();
    const dim3 grid(tiles_of(&e.rows, 1), e.used * e.tokens);
    if (e.nb <= 8) {
        launch(d, tq_decode_experts_kernel<4, 1>, grid, 4 * 32, 0, e, stream);
    } else {
        launch(d, tq_decode_experts_kernel<8, 2>, grid, 8 * 32, 0, e, stream);
    }
}
