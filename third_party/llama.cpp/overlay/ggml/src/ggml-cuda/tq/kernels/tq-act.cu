// Activations on their way into a product: the residual sum, the norm and the gate where the graph has
// them, and the rounding to int8 in the layouts of tq-kernels.cuh, in one kernel.
//
// Sixteen threads share a block of 128 columns of one token (tq-act-block.cuh). A warp holds two blocks of a token,
// or one block of two neighbouring tokens, whose 16-byte pieces of the prefill layout then fill whole sectors.

#include "tq-act-block.cuh"

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int LANES      = TQ_ACT_LANES;
constexpr int MAX_RANKS  = 8;    // thread blocks of a cluster, the most that every card takes
constexpr int MAX_UNITS  = 64;   // groups of LANES threads in a thread block
constexpr int MAX_REPEAT = 4;    // blocks that a thread of the norm keeps in registers
constexpr int FEW_UNITS  = 4;    // decode: small thread blocks, so that a short row still meets many processors
constexpr int SOME_UNITS = 8;    // decode of more than FEW_GROUPS groups
constexpr int FEW_GROUPS = 1024;
constexpr int MANY_UNITS = 16;   // prefill
static_assert(MAX_UNITS * MAX_REPEAT >= TQ_NORM_MAX_BLOCKS, "a row of the norm must fit one thread block's registers");

void check(cudaError_t err, const char * what) {
    if (err != cudaSuccess) {
        fprintf(stderr, "tq-act: %s: %s\n", what, cudaGetErrorString(err));
        abort();
    }
}

// ---- elementwise sources -----------------------------------------------------------------------------

struct plain_source {
    const float * x;
    int64_t       ld;
    bool          vec;

    __device__ __forceinline__ void load(int token, int column, float (&v)[8]) const {
        tq_load8(x + token * ld + column, vec, v);
    }
};

template <bool GELU> struct glu_source {
    const float * gate;
    const float * up;
    int64_t       ld_gate;
    int64_t       ld_up;
    float       * product; // may be gate or up itself: a thread writes only what it has read
    int64_t       columns;
    bool          vec;

    __device__ __forceinline__ void load(int token, int column, float (&v)[8]) const {
        float u[8];
        tq_load8(gate + token * ld_gate + column, vec, v);
        tq_load8(up + token * ld_up + column, vec, u);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[i] = (GELU ? tq_gelu(v[i]) : tq_silu(v[i])) * u[i];
        }
        if (product) {
            tq_store8(product + token * columns + column, vec, v);
        }
    }
};

// Thread blocks of `units` groups. Decode: grid (blocks / units, columns of the layout). Prefill: grid (blocks, tokens / units),
// tokens past the last are left as they are.
template <bool PREFILL, typename Source>
__global__ void __launch_bounds__(MANY_UNITS * LANES) quantize_kernel(Source source, tq_act out) {
    tq_pdl_launch();
    const int unit  = threadIdx.x / LANES;
    const int s     = threadIdx.x % LANES;
    const int units = blockDim.x / LANES;
    const int block = PREFILL ? blockIdx.x : blockIdx.x * units + unit;
    const int token = PREFILL ? blockIdx.y * units + unit : blockIdx.y;
    const bool write = block < out.nb;

    tq_pdl_wait();
    float v[8] = {};
    if (write && token < out.n) {
        source.load(token, block * TQ_BLOCK + 4 * s, v);
    }
    tq_write_block<PREFILL>(out, token, block, s, v, write);
}

// ---- norm ----------------------------------------------------------------------------------------------

// The thread blocks of a cluster (gridDim.x of them) share a row, or two neighbouring ones (TOKENS = 2, prefill only:
// whole sectors, but half as many thread blocks); every group of LANES threads leaves its sum of squares with all of
// them. A row stays in registers between the sum and the scaling, so outputs may lie on top of inputs.
template <bool PREFILL, int TOKENS, int REPEAT>
__global__ void __launch_bounds__(MAX_UNITS * LANES) norm_kernel(const float * a, const float * b, const float * w, float eps,
        float * sum, float * norm, tq_act out, bool vec) {
    __shared__ float squares[TOKENS][MAX_RANKS * MAX_UNITS / TOKENS];
    tq_pdl_launch();

    const int ranks  = gridDim.x;
    const int rank   = blockIdx.x;
    const int unit   = threadIdx.x / LANES;
    const int s      = threadIdx.x % LANES;
    const int which  = unit % TOKENS;
    const int token  = TOKENS * blockIdx.y + which;
    const int slot   = unit / TOKENS;
    const int slots  = blockDim.x / LANES / TOKENS;
    const bool real  = token < out.n;
    const int64_t row = (int64_t) token * out.nb * TQ_BLOCK;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (ranks > 1) {
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); // "I run": others may write to my shared memory
    }
#endif
    tq_pdl_wait();

    constexpr bool EARLY = REPEAT <= 2; // registers for the weights before the sum is known
    float v[REPEAT][8];
    float early[EARLY ? REPEAT : 1][8];
    float square = 0.0f;
#pragma unroll
    for (int r = 0; r < REPEAT; r++) {
        const int block  = (r * ranks + rank) * slots + slot;
        const int column = block * TQ_BLOCK + 4 * s;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[r][i] = 0.0f;
        }
        if (real && block < out.nb) {
            tq_load8(a + row + column, vec, v[r]);
            if (b) {
                float x[8];
                tq_load8(b + row + column, vec, x);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    v[r][i] += x[i];
                }
            }
            if constexpr (EARLY) {
                tq_load8(w + column, vec, early[r]);
            }
            if (sum) {
                tq_store8(sum + row + column, vec, v[r]);
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            square += v[r][i] * v[r][i];
        }
    }
    square = tq_sum_lanes(square);

    float * mine = &squares[which][rank * slots + slot];
    if (ranks == 1) {
        if (s == 0) {
            *mine = square;
        }
        __syncthreads();
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    else {
        asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
        if (s < ranks) {
            unsigned there;
            asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"((unsigned) __cvta_generic_to_shared(mine)), "r"(s));
            asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(there), "f"(square) : "memory");
        }
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
#endif

    float total = 0.0f;
    for (int i = s; i < ranks * slots; i += LANES) {
        total += squares[which][i];
    }
    total = tq_sum_lanes(total);
    const float scale = rsqrtf(total / (float) (out.nb * TQ_BLOCK) + eps);

#pragma unroll
    for (int r = 0; r < REPEAT; r++) {
        const int block  = (r * ranks + rank) * slots + slot;
        const int column = block * TQ_BLOCK + 4 * s;
        if (real && block < out.nb) {
            if constexpr (!EARLY) {
                tq_load8(w + column, vec, early[0]);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                v[r][i] = v[r][i] * scale * early[EARLY ? r : 0][i];
            }
            if (norm) {
                tq_store8(norm + row + column, vec, v[r]);
            }
        }
        tq_write_block<PREFILL>(out, token, block, s, v[r], block < out.nb);
    }
}

// ---- launches ------------------------------------------------------------------------------------------

// Whether the device code that runs here has the instructions of sm_90: without its wait, an early start would be a race.
bool has_sm90_code() {
    static std::atomic<signed char> known[64] = {}; // 0: not asked, 1: no, 2: yes
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    if (device >= 64) {
        return false;
    }
    if (known[device] == 0) {
        cudaFuncAttributes attr = {};
        check(cudaFuncGetAttributes(&attr, norm_kernel<false, 1, 1>), "cudaFuncGetAttributes");
        known[device] = attr.ptxVersion >= 90 ? 2 : 1;
    }
    return known[device] == 2;
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, int ranks, cudaStream_t stream, Args... args) {
    cudaLaunchAttribute attrs[2] = {};
    cudaLaunchConfig_t  config   = {};
    config.gridDim  = grid;
    config.blockDim = dim3(threads);
    config.stream   = stream;
    config.attrs    = attrs;
    if (has_sm90_code() && tq_early_start_wanted()) {
        attrs[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attrs[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (ranks > 1) {
        attrs[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attrs[config.numAttrs].val.clusterDim.x = ranks;
        attrs[config.numAttrs].val.clusterDim.y = 1;
        attrs[config.numAttrs++].val.clusterDim.z = 1;
    }
    check(cudaLaunchKernelEx(&config, kernel, Params(args)...), "launch");
}

bool aligned16(const void * p, int64_t ld = 0) {
    return ((uintptr_t) p | (uintptr_t) (ld * (int64_t) sizeof(float))) % 16 == 0;
}

template <typename Source>
void launch_quantize(const Source & source, const tq_act & out, cudaStream_t stream, int units) {
    if (out.layout == TQ_ACT_PREFILL) {
        launch(quantize_kernel<true, Source>, dim3(out.nb, (out.n + units - 1) / units), units * LANES, 1, stream, source, out);
    } else {
        launch(quantize_kernel<false, Source>, dim3((out.nb + units - 1) / units, out.cols), units * LANES, 1, stream, source, out);
    }
}

template <typename Source>
void launch_quantize(const Source & source, const tq_act & out, cudaStream_t stream) {
    launch_quantize(source, out, stream, out.layout == TQ_ACT_PREFILL ? MANY_UNITS : out.cols * out.nb > FEW_GROUPS ? SOME_UNITS : FEW_UNITS);
}

// How rows are shared out: `ranks` thread blocks of `slots` groups for each of `tokens` rows, `repeat` blocks for a group.
struct norm_shape { int tokens, ranks, slots, repeat; };

norm_shape norm_shape_of(const tq_act & out, int tokens, int ranks, int repeat) {
    const int each  = (out.nb + ranks - 1) / ranks;
    const int slots = (each + repeat - 1) / repeat;
    return { tokens, ranks, tokens == 1 ? slots + slots % 2 : slots, repeat }; // whole warps
}

bool norm_shape_fits(const norm_shape & s) {
    return s.slots * s.tokens <= MAX_UNITS;
}

norm_shape norm_shape_for(const tq_act & out) {
    // Measured on an H200 (benchmarks/cuda_lab/act_check.cu): eight thread blocks a row where there are few rows, one for up
    // to 48 rows; else some 512 thread blocks in all, half as many where the rows are long.
    const int  rows   = out.layout == TQ_ACT_DECODE ? out.cols : out.n;
    const bool few    = rows <= 16;
    const int  enough = rows <= 16 ? 128 : rows <= 48 ? 0 : out.nb <= 40 ? 512 : 256;
    int ranks = 1;
    while (has_sm90_code() && ranks < (few ? MAX_RANKS : 4) && rows * ranks < enough && ranks * 2 < out.nb) {
        ranks *= 2;
    }
    for (int repeat = few ? 1 : 2; ; repeat *= 2) {
        const norm_shape shape = norm_shape_of(out, 1, ranks, repeat);
        if (norm_shape_fits(shape) || repeat == MAX_REPEAT) {
            return shape;
        }
    }
}

template <bool PREFILL, int TOKENS>
void launch_norm(const norm_shape & shape, const float * a, const float * b, const float * w, float eps, float * sum, float * norm,
        const tq_act & out, bool vec, cudaStream_t stream) {
    const auto kernel = shape.repeat == 1 ? norm_kernel<PREFILL, TOKENS, 1> : shape.repeat == 2 ? norm_kernel<PREFILL, TOKENS, 2> : norm_kernel<PREFILL, TOKENS, 4>;
    launch(kernel, dim3(shape.ranks, PREFILL ? (out.n + TOKENS - 1) / TOKENS : out.cols), shape.slots * TOKENS * LANES, shape.ranks, stream, a, b, w, eps, sum, norm, out, vec);
}

void launch_norm(const norm_shape & shape, const float * a, const float * b, const float * w, float eps, float * sum, float * norm,
        const tq_act & out, cudaStream_t stream) {
    if (!norm_shape_fits(shape)) { // the caller asks TQ_NORM_MAX_BLOCKS first
        fprintf(stderr, "tq-act: rows of %d blocks are too long for the norm\n", out.nb);
        abort();
    }
    const bool vec = aligned16(a) && aligned16(b) && aligned16(w) && aligned16(sum) && aligned16(norm);
    const auto go  = out.layout == TQ_ACT_DECODE ? launch_norm<false, 1> : shape.tokens == 1 ? launch_norm<true, 1> : launch_norm<true, 2>;
    go(shape, a, b, w, eps, sum, norm, out, vec, stream);
}

} // namespace

void tq_quantize(const float * x, int64_t ld, const tq_act & out, cudaStream_t stream) {
    launch_quantize(plain_source{x, ld, aligned16(x, ld)}, out, stream);
}

void tq_quantize_norm(const float * a, const float * b, const float * w, float eps, float * sum, float * norm, const tq_act & out,
        cudaStream_t stream) {
    launch_norm(norm_shape_for(out), a, b, w, eps, sum, norm, out, stream);
}

void tq_quantize_glu(const float * gate, const float * up, int64_t ld_gate, int64_t ld_up, int act, float * product, const tq_act & out,
        cudaStream_t stream) {
    const bool    vec     = aligned16(gate, ld_gate) && aligned16(up, ld_up) && aligned16(product);
    const int64_t columns = (int64_t) out.nb * TQ_BLOCK;
    if (act == 1) {
        launch_quantize(glu_source<true>{gate, up, ld_gate, ld_up, product, columns, vec}, out, stream);
    } else {
        launch_quantize(glu_source<false>{gate, up, ld_gate, ld_up, product, columns, vec}, out, stream);
    }
}
