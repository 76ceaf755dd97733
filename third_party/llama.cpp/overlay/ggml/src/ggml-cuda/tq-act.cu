// Activations on their way into a product: the residual sum, the norm and the gate where the graph has
// them, and the rounding to int8 in the layouts of tq-kernels.cuh, in one kernel.
//
// A group of sixteen threads shares a block of 128 columns of one token, columns 4s .. 4s + 3 and 64 + 4s .. 67 + 4s for
// thread s: the block's largest magnitude and its sums are four shuffles away, and each thread has two whole
// words of both layouts. A warp holds two blocks of a token for the decode layout, and one block of two
// neighbouring tokens for the prefill layout, whose 16-byte pieces then fill whole sectors.

#include "tq-kernels.cuh"

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int LANES      = 16;   // threads that share a block of 128 columns
constexpr int MAX_RANKS  = 8;    // thread blocks of a cluster, the most that every card takes
constexpr int MAX_UNITS  = 64;   // groups of LANES threads in a thread block
constexpr int MAX_REPEAT = 4;    // blocks that a thread of the norm keeps in registers
constexpr int FEW_UNITS  = 4;    // decode: small thread blocks, so that a short row still meets many processors
constexpr int SOME_UNITS = 8;    // decode of more than FEW_GROUPS groups
constexpr int FEW_GROUPS = 1024;
constexpr int MANY_UNITS = 16;   // prefill
static_assert(MAX_UNITS * MAX_REPEAT >= TQ_NORM_MAX_BLOCKS, "a row of the norm must fit one thread block's registers");
constexpr float TINY     = 1e-30f; // smaller blocks are zero, as on the CPU

void check(cudaError_t err, const char * what) {
    if (err != cudaSuccess) {
        fprintf(stderr, "tq-act: %s: %s\n", what, cudaGetErrorString(err));
        abort();
    }
}

// ---- programmatic dependent launch ----------------------------------------------------------------

__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- a block of 128 columns ------------------------------------------------------------------------

// p points at the thread's first column. 16-byte accesses where pointers and strides allow them, which is nearly always.
__device__ __forceinline__ void load8(const float * p, bool vec, float (&v)[8]) {
    if (vec) {
        *reinterpret_cast<float4 *>(v + 0) = *reinterpret_cast<const float4 *>(p);
        *reinterpret_cast<float4 *>(v + 4) = *reinterpret_cast<const float4 *>(p + 64);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[i]     = p[i];
            v[i + 4] = p[i + 64];
        }
    }
}

__device__ __forceinline__ void store8(float * p, bool vec, const float (&v)[8]) {
    if (vec) {
        *reinterpret_cast<float4 *>(p)      = *reinterpret_cast<const float4 *>(v + 0);
        *reinterpret_cast<float4 *>(p + 64) = *reinterpret_cast<const float4 *>(v + 4);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            p[i]      = v[i];
            p[i + 64] = v[i + 4];
        }
    }
}

__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (int o = LANES / 2; o; o >>= 1) {
        x += __shfl_xor_sync(~0u, x, o);
    }
    return x;
}

// The lowest bytes of four words.
__device__ __forceinline__ int pack4(unsigned a, unsigned b, unsigned c, unsigned d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Rounds the thread's columns of a block and writes them; all lanes of the warp take part, those with !write in the
// shuffles only.
template <bool PREFILL>
__device__ __forceinline__ void write_block(const tq_act & out, int token, int block, int s, const float (&v)[8], bool write) {
    // as integers, magnitudes order like floats, with infinity and NaN on top (and no fast-math surprises)
    unsigned top = 0;
    float    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        top = max(top, __float_as_uint(v[i]) & 0x7fffffffu);
        sum += v[i];
    }
#pragma unroll
    for (int o = LANES / 2; o; o >>= 1) {
        top = max(top, __shfl_xor_sync(~0u, top, o));
    }
    sum = sum_lanes(sum);

    const bool  bad  = top >= 0x7f800000u;
    const float amax = __uint_as_float(top);
    const bool  none = bad || amax < TINY;
    const float nan  = __uint_as_float(0x7fffffffu);
    const float inv  = none ? 0.0f : __fdiv_rn(127.0f, amax);
    const float d    = bad ? nan : none ? 0.0f : __fdiv_rn(amax, 127.0f);
    sum              = bad ? nan : none ? 0.0f : sum;

    // 1.5 * 2^23 added to a small float leaves it rounded to nearest even in the lowest bits; unlike a conversion this is
    // an ordinary addition, and the bytes need no masks
    constexpr unsigned MAGIC = 0x4b400000;
    unsigned q[8];
    unsigned total = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        q[i] = __float_as_uint(__fadd_rn(__fmul_rn(v[i], inv), __uint_as_float(MAGIC)));
        total += q[i];
    }
    const int words[2] = { // what is not finite must not leave traces
        bad ? 0 : PREFILL ? pack4(q[0], q[4], q[1], q[5]) : pack4(q[0], q[1], q[2], q[3]),
        bad ? 0 : PREFILL ? pack4(q[2], q[6], q[3], q[7]) : pack4(q[4], q[5], q[6], q[7]),
    };
    if constexpr (!PREFILL) {
#pragma unroll
        for (int o = LANES / 2; o; o >>= 1) {
            total += __shfl_xor_sync(~0u, total, o);
        }
    }
    if (!write) {
        return;
    }

    if constexpr (PREFILL) {
        const int group = token / TQ_PREFILL_BN;
        const int k     = token % TQ_PREFILL_BN;
        uint8_t * record = out.q + ((size_t) group * out.nb + block) * TQ_RECORD;
        *reinterpret_cast<int *>(record + tq_record_q(4 * s + 0, k)) = words[0];
        *reinterpret_cast<int *>(record + tq_record_q(4 * s + 2, k)) = words[1];
        if (s == 0) {
            reinterpret_cast<float *>(record + TQ_PREFILL_BN * TQ_BLOCK)[tq_record_d(k)] = d;
            const unsigned high = __float_as_uint(sum) & ~0x1fffu;
            float * sums = static_cast<float *>(out.aux) + tq_sums_at(group, out.nb, block, k);
            sums[0] = __uint_as_float(high);
            sums[2] = (high & 0x7f800000u) == 0x7f800000u ? 0.0f : sum - __uint_as_float(high);
        }
    } else {
        const int plane = s / 8; // and plane + 2
        uint8_t * dst = out.q + ((size_t) block * 2 * out.cols + token) * 64 + s % 8 / 2 * 16 + 8 * plane + s % 2 * 4;
        *reinterpret_cast<int *>(dst)                 = words[0];
        *reinterpret_cast<int *>(dst + out.cols * 64) = words[1];
        if (s == 0) {
            const tq_act_head head{d, sum, bad ? 0 : (int) (TQ_BLOCK * MAGIC - total), 0}; // modulo 2^32
            *reinterpret_cast<int4 *>(static_cast<tq_act_head *>(out.aux) + (size_t) block * out.cols + token) =
                *reinterpret_cast<const int4 *>(&head);
        }
    }
}

// ---- elementwise sources -----------------------------------------------------------------------------

struct plain_source {
    const float * x;
    int64_t       ld;
    bool          vec;

    __device__ __forceinline__ void load(int token, int column, float (&v)[8]) const {
        load8(x + token * ld + column, vec, v);
    }
};

__device__ __forceinline__ float silu(float x) {
    return x / (1.0f + expf(-x));
}

__device__ __forceinline__ float gelu(float x) {
    constexpr float SQRT_2_OVER_PI = 0.79788456080286535588f;
    return 0.5f * x * (1.0f + tanhf(SQRT_2_OVER_PI * x * (1.0f + 0.044715f * x * x)));
}

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
        load8(gate + token * ld_gate + column, vec, v);
        load8(up + token * ld_up + column, vec, u);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[i] = (GELU ? gelu(v[i]) : silu(v[i])) * u[i];
        }
        if (product) {
            store8(product + token * columns + column, vec, v);
        }
    }
};

// Thread blocks of `units` groups. Decode: grid (blocks / units, columns of the layout). Prefill: grid (blocks, tokens / units).
template <bool PREFILL, typename Source>
__global__ void __launch_bounds__(MANY_UNITS * LANES) quantize_kernel(Source source, tq_act out) {
    let_next_start();
    const int unit  = threadIdx.x / LANES;
    const int s     = threadIdx.x % LANES;
    const int units = blockDim.x / LANES;
    const int block = PREFILL ? blockIdx.x : blockIdx.x * units + unit;
    const int token = PREFILL ? blockIdx.y * units + unit : blockIdx.y;
    const bool write = block < out.nb;

    wait_for_inputs();
    float v[8] = {};
    if (write && token < out.n) {
        source.load(token, block * TQ_BLOCK + 4 * s, v);
    }
    write_block<PREFILL>(out, token, block, s, v, write);
}

// ---- norm ----------------------------------------------------------------------------------------------

// The thread blocks of a cluster (gridDim.x of them) share a row, or two neighbouring ones (TOKENS = 2, prefill only:
// whole sectors, but half as many thread blocks); every group of LANES threads leaves its sum of squares with all of
// them. A row stays in registers between the sum and the scaling, so outputs may lie on top of inputs.
template <bool PREFILL, int TOKENS, int REPEAT>
__global__ void __launch_bounds__(MAX_UNITS * LANES) norm_kernel(const float * a, const float * b, const float * w, float eps,
        float * sum, float * norm, tq_act out, bool vec) {
    __shared__ float squares[TOKENS][MAX_RANKS * MAX_UNITS / TOKENS];
    let_next_start();

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
    wait_for_inputs();

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
            load8(a + row + column, vec, v[r]);
            if (b) {
                float x[8];
                load8(b + row + column, vec, x);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    v[r][i] += x[i];
                }
            }
            if constexpr (EARLY) {
                load8(w + column, vec, early[r]);
            }
            if (sum) {
                store8(sum + row + column, vec, v[r]);
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            square += v[r][i] * v[r][i];
        }
    }
    square = sum_lanes(square);

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
    total = sum_lanes(total);
    const float scale = rsqrtf(total / (float) (out.nb * TQ_BLOCK) + eps);

#pragma unroll
    for (int r = 0; r < REPEAT; r++) {
        const int block  = (r * ranks + rank) * slots + slot;
        const int column = block * TQ_BLOCK + 4 * s;
        if (real && block < out.nb) {
            if constexpr (!EARLY) {
                load8(w + column, vec, early[0]);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                v[r][i] = v[r][i] * scale * early[EARLY ? r : 0][i];
            }
            if (norm) {
                store8(norm + row + column, vec, v[r]);
            }
        }
        write_block<PREFILL>(out, token, block, s, v[r], block < out.nb);
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

bool early_start_wanted() {
    static const bool wanted = [] {
        const char * env = getenv("GGML_CUDA_PDL");
        return env == nullptr || atoi(env) != 0;
    }();
    return wanted;
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, int ranks, cudaStream_t stream, Args... args) {
    cudaLaunchAttribute attrs[2] = {};
    cudaLaunchConfig_t  config   = {};
    config.gridDim  = grid;
    config.blockDim = dim3(threads);
    config.stream   = stream;
    config.attrs    = attrs;
    if (has_sm90_code() && early_start_wanted()) {
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
        launch(quantize_kernel<true, Source>, dim3(out.nb, out.cols / units), units * LANES, 1, stream, source, out);
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
    int ranks = 1;
    if (has_sm90_code()) {
        while (ranks < MAX_RANKS && out.cols * ranks < 128 && ranks * 2 < out.nb) {
            ranks *= 2;
        }
    }
    for (int repeat = 1; ; repeat *= 2) {
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
    launch(kernel, dim3(shape.ranks, out.cols / TOKENS), shape.slots * TOKENS * LANES, shape.ranks, stream, a, b, w, eps, sum, norm, out, vec);
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
