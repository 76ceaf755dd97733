// Products with 9 to 64 tokens on sm_90 and newer: which shape of thread block, and the launch. See docs/kernels/batches.md.

#include "tq-batch.cuh"

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace {

constexpr int MAX_DEVICES = 64;

void check(cudaError_t error, const char * what) {
    if (error != cudaSuccess) {
        fprintf(stderr, "tq_batch: %s: %s\n", what, cudaGetErrorString(error));
        abort();
    }
}

// ---- the shapes of thread blocks ----------------------------------------------------------------------------
struct kernel {
    void (*run)(tq_batch_args);
    int tokens, tiles, warps, threads, rows, min_blocks, shared, part;
    int stages, chunk;
    bool wgmma;
};

template <class S> constexpr kernel make() {
    static_assert(S::stages >= 3, "a stage is used again two chunks behind");
    static_assert(S::min_blocks * (S::shared + 1024) <= 228 * 1024 && S::shared <= 227 * 1024, "shared memory");
    return {tq_batch_kernel<S>, S::tokens, S::tiles, S::warps, S::threads, S::rows, S::min_blocks, S::shared, S::part, S::stages, S::chunk, S::wgmma};
}

template <int N, int TILES, int WARPS, int CHUNK, int STAGES, bool WGMMA = false> constexpr kernel K() {
    return make<tq_batch_shape<N, TILES, WARPS, CHUNK, STAGES, 1, WGMMA>>();
}
// By the number of tokens, one or two for each: the first where `large` blocks of 16 rows x 128 columns (or more) are to be
// multiplied (fitted to an H200: benchmarks/cuda_lab/results/batch7.txt).
const kernel KERNELS[] = {
    K<16, 2, 11, 4, 3>(), K<16, 1, 15, 4, 4>(),
    K<24, 1, 15, 4, 3>(),
    K<32, 1, 15, 4, 3>(),
    K<40, 1, 15, 2, 5>(),
#if defined(GGML_CUDA_TQ_SM90A)
    K<48, 1, 12, 2, 5, true>(),
    K<64, 1, 16, 4, 3, true>(), K<64, 1, 12, 2, 5, true>(),
#endif
    K<48, 1, 15, 2, 5>(), // behind those by wgmma, which only run on 9.0
    K<64, 1, 15, 2, 5>(),
};
int64_t large(const kernel & k) { return k.tokens == 16 ? 90000 : 40000; }

// ---- the device -----------------------------------------------------------------------------------------
constexpr int KERNEL_COUNT = sizeof(KERNELS) / sizeof(KERNELS[0]);
constexpr int MAX_WARPS = 16, MAX_BLOCKS = 4; // of a thread block; of a multiprocessor
constexpr int MIN_RUN = 2;                    // blocks of 128 columns that a thread block takes at least

struct device_info {
    int  multiprocessors = 0; // 0: not asked yet
    bool there     = false;   // the code was compiled, and the device has what it needs
    bool wgmma     = false;
    bool dependent = false;   // programmatic dependent launch
    int  slots[KERNEL_COUNT] = {}; // thread blocks that it holds at once; 0: not asked yet
};

// Of the current device.
device_info & device() {
    static device_info devices[MAX_DEVICES];
    int id;
    check(cudaGetDevice(&id), "cudaGetDevice");
    if (id >= MAX_DEVICES) {
        fprintf(stderr, "tq_batch: device %d: no more than %d are provided for\n", id, MAX_DEVICES);
        abort();
    }
    device_info & d = devices[id];
    if (d.multiprocessors == 0) {
        int major;
        cudaFuncAttributes code;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id), "capability");
        check(cudaFuncGetAttributes(&code, (const void *) KERNELS[0].run), "attributes");
        d.there     = major >= 9 && code.ptxVersion >= 90; // code for older cards is empty
        int minor;
        check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id), "capability");
        d.wgmma     = major == 9 && minor == 0; // those kernels are empty elsewhere
        d.dependent = d.there && tq_early_start_wanted();
        check(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, id), "multiprocessors");
    }
    return d;
}
std::mutex device_mutex; // device() and slots() fill their tables on first use

int slots(device_info & d, int index) {
    int & n = d.slots[index];
    if (n == 0) {
        const kernel & k = KERNELS[index];
        int each;
        check(cudaFuncSetAttribute((const void *) k.run, cudaFuncAttributeMaxDynamicSharedMemorySize, k.shared), "shared memory");
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, (const void *) k.run, k.threads, k.shared), "occupancy");
        if (each == 0) {
            fprintf(stderr, "tq_batch: a thread block of %d rows does not fit on this device\n", k.rows);
            abort();
        }
        n = std::min(each, k.min_blocks) * d.multiprocessors;
    }
    return n;
}

// ---- launches -----------------------------------------------------------------------------------------
size_t flag_bytes(const device_info & d) {
    return (size_t) d.multiprocessors * MAX_BLOCKS * MAX_WARPS * sizeof(uint32_t);
}

void run(device_info & d, int index, const tq_segment * segments, int n_segments, const tq_act & act, void * scratch, cudaStream_t stream,
         int most_blocks = INT_MAX) {
    const kernel & k = KERNELS[index];
    tq_batch_args a = {};
    int groups = 0;
    for (int i = 0; i < TQ_MAX_SEGMENTS; i++) {
        if (i < n_segments) {
            a.segment[i] = segments[i];
            groups += tq_ceil(segments[i].rows, k.rows);
        }
        a.group_end[i] = groups;
    }
    a.nb      = act.nb;
    a.n       = act.n;
    a.records = act.q;
    a.sums    = static_cast<const uint8_t *>(act.aux);
    a.flags   = static_cast<uint32_t *>(scratch);
    a.parts   = reinterpret_cast<float4 *>(static_cast<uint8_t *>(scratch) + flag_bytes(d));
    const int blocks = groups * act.nb, grid = std::min({slots(d, index), most_blocks, std::max(blocks / MIN_RUN, 1)});
    a.cut = {grid, blocks / grid, blocks % grid};

    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim          = dim3(grid);
    config.blockDim         = dim3(k.threads);
    config.dynamicSmemBytes = k.shared;
    config.stream           = stream;
    config.attrs            = &attribute;
    config.numAttrs         = d.dependent ? 1 : 0;
    check(cudaLaunchKernelEx(&config, k.run, a), "launch");
}

// Index of the kernel for these tokens.
int choose(const device_info & d, const tq_segment * segments, int n_segments, const tq_act & act) {
    int64_t tiles = 0;
    for (int i = 0; i < n_segments; i++) { tiles += tq_ceil(segments[i].rows, TQ_TILE_ROWS); }
    for (int i = 0; i < KERNEL_COUNT; i++) {
        const kernel & k = KERNELS[i];
        if (k.tokens < act.n || (k.wgmma && !d.wgmma)) {
            continue;
        }
        const bool other = i + 1 < KERNEL_COUNT && KERNELS[i + 1].tokens == k.tokens && KERNELS[i + 1].wgmma == k.wgmma;
        return other && tiles * act.nb < large(k) ? i + 1 : i;
    }
    fprintf(stderr, "tq_batch: %d tokens\n", act.n);
    abort();
}

} // namespace

// ---- the contract (tq-kernels.cuh) --------------------------------------------------------------------
size_t tq_batch_scratch_bytes() {
    std::lock_guard<std::mutex> lock(device_mutex);
    const device_info & d = device();
    size_t most = 0;
    for (const kernel & k : KERNELS) { most = std::max(most, (size_t) k.min_blocks * k.part * sizeof(float4)); }
    return d.there ? flag_bytes(d) + (size_t) d.multiprocessors * most : 0;
}

void tq_batch(const tq_segment * segments, int n_segments, const tq_act & act, void * scratch, cudaStream_t stream) {
    std::lock_guard<std::mutex> lock(device_mutex);
    device_info & d = device();
    run(d, choose(d, segments, n_segments, act), segments, n_segments, act, scratch, stream);
}
