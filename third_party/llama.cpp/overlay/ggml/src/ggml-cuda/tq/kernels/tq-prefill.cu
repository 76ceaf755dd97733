// Products with more than 8 tokens: mma.sync (sm_80 and newer), and the choice between it and wgmma.
//
// A thread block of 4 x 2 warps has 4 * 16 * RT rows and N tokens: weights and activations come by cp.async, a stage for
// each block of 128 columns; a warp unpacks its weights once for all its tokens, sums integers over the block, and scales.

#include "tq-prefill.cuh"

namespace {

constexpr int WARPS = 8;

template <int RT, int N, int STAGES>
struct shape {
    static constexpr int row_tiles   = RT;                    // of 16 rows, of a warp
    static constexpr int tokens      = N;
    static constexpr int warp_cols   = N >= 32 ? 2 : 1;       // warps beside one another
    static constexpr int warp_rows   = WARPS / warp_cols;
    static constexpr int warp_tokens = N / warp_cols;
    static constexpr int tiles       = warp_rows * RT;
    static constexpr int rows        = tiles * TQ_TILE_ROWS;
    static constexpr int stages      = STAGES;
    static constexpr int weights     = tiles * TQ_TILE_BYTES;
    static constexpr int q           = N * TQ_BLOCK;
    static constexpr int stage       = weights + q + N * 4;
    static constexpr int shared      = STAGES * stage;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define TQ_MMA_CODE
#endif

#if defined(__CUDA_ARCH__) && defined(TQ_MMA_CODE)

__device__ __forceinline__ uint32_t shared_address(const void * p) {
    return (uint32_t) __cvta_generic_to_shared(p);
}
__device__ __forceinline__ void copy16(void * dst, const void * src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(dst)), "l"(src) : "memory");
}
__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Four core matrices (8 tokens x 16 bytes): the B words of two k32 steps.
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const uint8_t * p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(shared_address(p)) : "memory");
}
__device__ __forceinline__ void mma_s8(int (&c)[4], const uint32_t * a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class S> struct loader {
    const uint8_t * weights;
    const uint8_t * records;
    uint8_t       * shared;
    int             nb, tiles; // tiles that exist
    int             width;     // of a record
    int             token0;    // of the group, a multiple of 16

    __device__ __forceinline__ void copy_weights(int b) const {
        constexpr int pieces = TQ_TILE_BYTES / 16;
        uint8_t * dst = shared + b % S::stages * S::stage;
        for (int i = threadIdx.x; i < tiles * pieces; i += WARPS * 32) {
            const int tile = i / pieces, piece = i % pieces;
            copy16(dst + i * 16, weights + ((size_t) tile * nb + b) * TQ_TILE_BYTES + piece * 16);
        }
    }
    __device__ __forceinline__ void copy_activations(int b) const {
        uint8_t * dst = shared + b % S::stages * S::stage + S::weights;
        const uint8_t * src = records + (size_t) b * tq_record_bytes(width);
        for (int i = threadIdx.x; i < 8 * S::tokens; i += WARPS * 32) {
            copy16(dst + i * 16, src + (i / S::tokens * width + token0 + i % S::tokens) * 16);
        }
        for (int i = threadIdx.x; i < S::tokens / 4; i += WARPS * 32) {
            copy16(dst + S::q + i * 16, src + width * TQ_BLOCK + token0 * 4 + i * 16);
        }
    }
};

#endif

// grid: (part of a group's tokens, group, tile of rows), so that neighbours in time share weights
template <class S>
__global__ void __launch_bounds__(WARPS * 32) prefill_mma(const __grid_constant__ tq_prefill_args args) {
#if defined(__CUDA_ARCH__) && defined(TQ_MMA_CODE)
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr int NJ = S::warp_tokens / 8, RT = S::row_tiles;
    const int part = blockIdx.x, group = args.group0 + blockIdx.y;
    int tile = blockIdx.z;
    const tq_segment & seg = tq_prefill_find(args, tile);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp_row = warp % S::warp_rows, col0 = warp / S::warp_rows * S::warp_tokens; // column in the thread block
    const int nb = args.nb, token_part = part * S::tokens;

    loader<S> load;
    load.weights = seg.w + (size_t) tile * S::tiles * nb * TQ_TILE_BYTES;
    load.width   = args.width;
    load.records = args.records + (size_t) group * nb * tq_record_bytes(args.width);
    load.shared  = shared;
    load.nb      = nb;
    load.tiles   = min(S::tiles, tq_ceil(seg.rows, TQ_TILE_ROWS) - tile * S::tiles);
    load.token0  = token_part;
    const uint8_t * sums = args.sums + ((size_t) group * tq_ceil(nb, 8) * args.width + token_part + col0) * 64;

    tq_pdl_launch();
    for (int b = 0; b < S::stages - 1 && b < nb; b++) {
        load.copy_weights(b);
    }
    tq_pdl_wait();
    for (int b = 0; b < S::stages - 1; b++) {
        if (b < nb) {
            load.copy_activations(b);
        }
        copy_commit(); // the first group has all the weights
    }

    float acc[RT][NJ][4] = {};
    const uint32_t table = tq_prefill_table(lane);
    tq_prefill_mu mu[RT];
#pragma unroll
    for (int m = 0; m < RT; m++) {
        mu[m].clear();
    }
    for (int b = 0; b < nb; b++) {
        copy_wait<S::stages - 2>();
        __syncthreads(); // stage b has come for all, and all have left the stage that is filled next
        if (b + S::stages - 1 < nb) {
            load.copy_weights(b + S::stages - 1);
            load.copy_activations(b + S::stages - 1);
        }
        copy_commit();

        const uint8_t * stage = shared + b % S::stages * S::stage;
        uint32_t a[RT][16];
        float alpha[RT][2];
#pragma unroll
        for (int m = 0; m < RT; m++) {
            const uint8_t * w = stage + (warp_row * RT + m) * TQ_TILE_BYTES;
            tq_prefill_codes(a[m], *reinterpret_cast<const uint4 *>(w + lane * 16), table);
            const uint2 s = *reinterpret_cast<const uint2 *>(w + TQ_TILE_SCALES + g * 8);
            alpha[m][0] = __low2float(*reinterpret_cast<const half2 *>(&s.x));
            alpha[m][1] = __low2float(*reinterpret_cast<const half2 *>(&s.y));
            mu[m].take(s, b, t);
        }
        const uint8_t * q = stage + S::weights + (lane / 8) * (S::tokens * 16) + (col0 + lane % 8) * 16;
        const float * d = reinterpret_cast<const float *>(stage + S::weights + S::q) + col0 + t * 4;
#pragma unroll
        for (int j = 0; j < NJ; j += 2) {
            int c[2][RT][4] = {};
#pragma unroll
            for (int jj = 0; jj < 2; jj++) {
#pragma unroll
                for (int u = 0; u < 4; u += 2) {
                    uint32_t x[4];
                    load_b(x, q + u * (2 * S::tokens * 16) + (j + jj) * 128);
#pragma unroll
                    for (int m = 0; m < RT; m++) {
                        mma_s8(c[jj][m], a[m] + 4 * u, x[0], x[1]);
                    }
#pragma unroll
                    for (int m = 0; m < RT; m++) {
                        mma_s8(c[jj][m], a[m] + 4 * u + 4, x[2], x[3]);
                    }
                }
            }
            const float4 v = *reinterpret_cast<const float4 *>(d + j * 8);
#pragma unroll
            for (int m = 0; m < RT; m++) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    acc[m][j][2 * r]         += (alpha[m][r] * v.x) * (float) c[0][m][2 * r];
                    acc[m][j][2 * r + 1]     += (alpha[m][r] * v.y) * (float) c[0][m][2 * r + 1];
                    acc[m][j + 1][2 * r]     += (alpha[m][r] * v.z) * (float) c[1][m][2 * r];
                    acc[m][j + 1][2 * r + 1] += (alpha[m][r] * v.w) * (float) c[1][m][2 * r + 1];
                }
            }
        }
        if (b % 8 == 7 || b == nb - 1) {
#pragma unroll
            for (int m = 0; m < RT; m++) {
                mu[m].add(acc[m], sums + (size_t) (b / 8) * (args.width * 64), lane, nb - b / 8 * 8);
                mu[m].clear();
            }
        }
    }

    const int token0 = group * TQ_PREFILL_BN + token_part + col0 + 2 * t;
#pragma unroll
    for (int m = 0; m < RT; m++) {
        const int row = tile * S::rows + (warp_row * RT + m) * TQ_TILE_ROWS + g;
        float * y = seg.y + (int64_t) token0 * seg.ld + row;
#pragma unroll
        for (int j = 0; j < NJ; j++) {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (token0 + 8 * j + k < args.n) {
                    float * p = y + (8 * j + k) * seg.ld;
                    if (row < seg.rows)     { p[0] = acc[m][j][k]; }
                    if (row + 8 < seg.rows) { p[8] = acc[m][j][2 + k]; }
                }
            }
        }
    }
#endif
}

template <class S>
void launch(const tq_segment * segments, int n_segments, const tq_act & act, int group0, int groups, int parts,
            cudaStream_t stream) {
    static bool ready[64], early[64]; // of each device
    int device;
    tq_prefill_check(cudaGetDevice(&device), "cudaGetDevice");
    if (device >= 64 || !ready[device]) {
        tq_prefill_check(cudaFuncSetAttribute(prefill_mma<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared),
                         "shared memory");
        if (device < 64) {
            cudaFuncAttributes code;
            tq_prefill_check(cudaFuncGetAttributes(&code, prefill_mma<S>), "attributes");
            ready[device] = true;
            early[device] = code.ptxVersion >= 90 && tq_early_start_wanted(); // code for older cards has no wait
        }
    }
    const tq_prefill_args args = tq_prefill_describe(segments, n_segments, act, S::rows, group0, 1);
    cudaLaunchConfig_t config = {};
    config.gridDim          = dim3(parts, groups, args.tile_end[TQ_MAX_SEGMENTS - 1]);
    config.blockDim         = dim3(WARPS * 32);
    config.dynamicSmemBytes = S::shared;
    config.stream           = stream;
    cudaLaunchAttribute attribute[1];
    attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[0].val.programmaticStreamSerializationAllowed = 1;
    config.attrs    = attribute;
    config.numAttrs = device < 64 && early[device] ? 1 : 0;
    tq_prefill_check(cudaLaunchKernelEx(&config, prefill_mma<S>, args), "launch");
}

struct variant {
    int rows, tokens;
    int step, fixed; // estimated clocks of a block of 128 columns; of beginning and end
    void (*run)(const tq_segment *, int, const tq_act &, int, int, int, cudaStream_t);
};

template <class S> constexpr variant make_variant(int step, int fixed) {
    return {S::rows, S::tokens, step, fixed, launch<S>};
}

// At most 99 KB of shared memory, which sm_86 and sm_89 have.
const variant VARIANTS[] = {
    make_variant<shape<2, 128, 4>>(2000, 3000),
    make_variant<shape<1, 128, 4>>(1300, 3000),
    make_variant<shape<1, 64, 4>>(800, 3000),
    make_variant<shape<1, 32, 6>>(600, 3000),
    make_variant<shape<1, 16, 6>>(600, 3000),
};

void launch_groups(const tq_segment * segments, int n_segments, const tq_act & act, int group0, int groups, int tokens, int sms,
                   const tq_prefill_plan * plan, cudaStream_t stream) {
    const variant * best = nullptr;
    int64_t best_time = 0;
    for (const variant & v : VARIANTS) {
        if (plan ? v.rows != plan->rows || v.tokens != plan->tokens : v.tokens > tokens || (tokens < TQ_PREFILL_BN && v.tokens != tokens)) {
            continue;
        }
        const int parts = tq_ceil(tokens, v.tokens);
        const int64_t blocks = (int64_t) tq_prefill_tiles(segments, n_segments, v.rows) * groups * parts;
        const int64_t time = (blocks + sms - 1) / sms * ((int64_t) act.nb * v.step + v.fixed);
        if (!best || time < best_time) {
            best = &v;
            best_time = time;
        }
    }
    if (!best) {
        fprintf(stderr, "tq_prefill: no such plan\n");
        abort();
    }
    best->run(segments, n_segments, act, group0, groups, tq_ceil(tokens, best->tokens), stream);
}

} // namespace

void tq_prefill_mma(const tq_segment * segments, int n_segments, const tq_act & act, int sms, const tq_prefill_plan * plan,
                    cudaStream_t stream) {
    // A last group of few tokens gets a launch of its own with a narrower kernel.
    const int rest  = act.n % TQ_PREFILL_BN;
    const int width = tq_record_width(rest);
    const int whole = act.n / TQ_PREFILL_BN + (rest && (plan || width == TQ_PREFILL_BN));
    if (whole) {
        launch_groups(segments, n_segments, act, 0, whole, plan ? tq_record_width(act.n) : TQ_PREFILL_BN, sms, plan, stream);
    }
    if (!plan && rest && width < TQ_PREFILL_BN) {
        launch_groups(segments, n_segments, act, act.n / TQ_PREFILL_BN, 1, width, sms, nullptr, stream);
    }
}

const char * tq_prefill(const tq_segment * segments, int n_segments, const tq_act & act, int cc, int sms, cudaStream_t stream) {
    // Code for sm_90a runs on 9.0 and on nothing else.
    if (cc == 900 && tq_prefill_wgmma_built()) {
        tq_prefill_wgmma(segments, n_segments, act, nullptr, stream);
        return "wgmma";
    }
    tq_prefill_mma(segments, n_segments, act, sms, nullptr, stream);
    return "mma.sync";
}
