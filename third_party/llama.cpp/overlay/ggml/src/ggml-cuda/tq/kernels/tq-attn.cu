// Attention of decode in one kernel, all the way to quantised activations (tq-attn.cuh).
//
// Up to eight queries (tokens, and heads that share keys) of one head of k and v are the work of a cluster of thread
// blocks, which share the keys. A warp takes sixteen keys at a time, all of their bytes with 16-byte loads
// straight to registers, and multiplies with mma.m16n8k16:
//
//   S[query][key]   = A: queries    x B: keys.    Rows 0..7 of A are the queries rounded to f16, rows 8..15 what the rounding
//                     left, so the half of the instruction that eight queries would waste gives S to 22 bits.
//   O^T[dim][query] = A: values^T   x B: S after the exponential, which lies in the registers just as B wants it, again
//                     as f16 and what that leaves.
//
// Which dimension is which row or column of an instruction is free, as long as both sides agree. So a lane's
// 16 bytes (8 dimensions of a key) are what two instructions want for k, and for v one PRMT makes a word of two keys'.
// At the few hundred keys of most conversations latency is what counts. The keys of the first step are fetched into L2 while
// the kernel before still runs: that is where both kernels see the same bytes, so a row of the cache that is only being
// written does no harm. All loads of a step are in flight before any is waited for, those of the next step go to L2 a step
// ahead and to registers as soon as these are free, and the mask, read two steps ahead, keeps warps from
// reading keys that nobody sees (the end of a padded cache).

#include "tq-act-block.cuh"
#include "tq-attn-warp.cuh"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int   WARPS     = 4;
constexpr int   THREADS   = WARPS * 32;
constexpr int   QUERIES   = 8;   // of a cluster: columns of an instruction
constexpr int   MAX_RANKS = 8;   // thread blocks of a cluster, the most that every card takes
constexpr int   BLOCKS_SM = 3;   // thread blocks that a multiprocessor holds at once
constexpr int   PART      = TQ_HEAD + 4; // floats of a partial result: sums, then the maximum and the sum of weights
constexpr float LOWEST    = -1e30f;      // maximum of no keys; finite, so that differences are
constexpr float LOG2E     = 1.44269504f;
static_assert(THREADS == QUERIES * TQ_ACT_LANES, "a group of lanes for each query");

void attn_check(cudaError_t err, const char * what) {
    if (err != cudaSuccess) {
        fprintf(stderr, "tq-attn: %s: %s\n", what, cudaGetErrorString(err));
        abort();
    }
}

// Grid (thread blocks of a cluster; heads of k; streams x `groups` of QUERIES queries). Query x of a head of k is token x / ratio of
// its stream, head x % ratio of those that share it. Streams that do not exist are those of missing tokens.
template <bool PREFILL> __global__ void __launch_bounds__(THREADS, BLOCKS_SM) attention_kernel(const tq_attention a, const tq_act act, const int groups, const int columns) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    extern __shared__ __align__(16) float shared[];
    tq_pdl_launch();
    const int ranks   = gridDim.x;
    const int rank    = blockIdx.x;
    const int rank_bits = 31 - __clz(ranks);
    const int kv_head = blockIdx.y;
    const int ratio   = a.heads / a.heads_kv;
    const int stream  = blockIdx.z / groups;
    const int first   = blockIdx.z % groups * QUERIES;
    const int queries = min(QUERIES, columns * ratio - first);
    const int slots   = (queries + ranks - 1) >> rank_bits; // queries that a thread block finishes: rank, rank + ranks ..
    const int warp    = threadIdx.x / 32;
    const int lane    = threadIdx.x % 32;
    const int g       = lane / 4;
    const int t       = lane % 4;

    float * const mine = shared;                          // [warp][query][PART], of this thread block
    float * const all  = shared + WARPS * queries * PART; // [rank][slot][PART], written by the others

    const int  token = (first + g) / ratio;
    const int  head  = kv_head * ratio + (first + g) % ratio;
    const bool query = g < queries && token < a.tokens && stream < a.streams;
    const uint8_t * const k    = reinterpret_cast<const uint8_t *>(a.k) + kv_head * a.k_head + stream * a.k_stream;
    const uint8_t * const v    = reinterpret_cast<const uint8_t *>(a.v) + kv_head * a.v_head + stream * a.v_stream;
    const uint8_t * const q    = reinterpret_cast<const uint8_t *>(a.q) + (query ? token * a.q_token + head * a.q_head + stream * a.q_stream : 0) + 32 * t;
    const half    * const mask = a.mask ? reinterpret_cast<const half *>(reinterpret_cast<const uint8_t *>(a.mask) + (query ? token * a.mask_token + stream * a.mask_stream : 0)) : nullptr;
    const int  end   = first / ratio < a.tokens && stream < a.streams ? a.keys : 0; // nobody asks: no keys
    const int  step  = ranks * WARPS * KEYS;
    int  at   = (rank * WARPS + warp) * KEYS;
    bool here = at < end;
    if (here) {
        fetch_ahead(a, k, v, at, lane);
    }
    const uint8_t * from_k = k + offset(at + g, a.k_key) + 16 * t;
    const uint8_t * from_v = v + offset(at + 2 * t, a.v_key) + 16 * g;
    asm volatile("" : "+l"(from_k), "+l"(from_v)); // now, not when waiting is over

#if __CUDA_ARCH__ >= 900
    __shared__ __align__(8) uint64_t arrived; // bytes of `all`
    if (ranks > 1) {
        if (threadIdx.x == 0) {
            const int finished = rank < queries ? (queries - rank - 1) / ranks + 1 : 0;
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(&arrived)) : "memory");
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(&arrived)), "r"(finished * ranks * (TQ_HEAD + 2) * 4) : "memory");
        }
        __syncwarp();
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); // "I run": others may write to my shared memory
    }
#endif
    tq_pdl_wait();

    mask_words  hidden, hidden_next;
    key_words   kw;
    value_words vw;
    load_mask(a, mask, query, at,        t, hidden);
    load_mask(a, mask, query, at + step, t, hidden_next);
    unsigned qw[8][4]; // floats 32j + 8t + 4i ..
#pragma unroll
    for (int i = 0; i < 8; i++) {
        load16(q + i / 2 * 128 + i % 2 * 16, qw[i]);
    }
    if (here) {
        load_keys  (a, from_k, at, g, kw);
        load_values(a, from_v, at, t, vw);
    }

    unsigned high[8][2], low[8][2];
    const float scale = query ? a.scale * LOG2E : 0.0f; // of lanes without a query, q is some other's
#pragma unroll
    for (int i = 0; i < 8; i++) {
        split(__uint_as_float(qw[i][0]) * scale, __uint_as_float(qw[i][1]) * scale, high[i][0], low[i][0]);
        split(__uint_as_float(qw[i][2]) * scale, __uint_as_float(qw[i][3]) * scale, high[i][1], low[i][1]);
    }

    float top = LOWEST; // of query g
    float sum = 0.0f;   // of query g, of this lane's keys
    float out[8][4];    // dimensions 8g + i and 64 + 8g + i of queries 2t and 2t + 1: [i][2 * (dimension / 64) + query % 2]
#pragma unroll
    for (int i = 0; i < 8; i++) {
        out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
    }

    while (at < end) {
        const int  next      = at + step;
        const bool here_next = next < end && __any_sync(~0u, seen(hidden_next));
        if (here_next) {
            fetch_ahead(a, k, v, next, lane);
        }
        float s[4];
        if (here) {
            float part[2][2][4] = {}; // [key / 8][i % 2]: two chains of instructions each
#pragma unroll
            for (int i = 0; i < 8; i++) {
#pragma unroll
                for (int half_of = 0; half_of < 2; half_of++) {
                    const unsigned * w = kw.w[half_of][i / 2] + i % 2 * 2;
                    mma(part[half_of][i % 2], high[i][0], low[i][0], high[i][1], low[i][1], w[0], w[1]);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float (&p)[2][4] = part[i / 2];
                s[i] = (p[0][i % 2] + p[1][i % 2]) + (p[0][2 + i % 2] + p[1][2 + i % 2]) + __half2float(__ushort_as_half(hidden.w[i])) * LOG2E;
            }
        }
        if (here_next) {
            load_keys(a, k + offset(next + g, a.k_key) + 16 * t, next, g, kw);
        }
        hidden = hidden_next;
        load_mask(a, mask, query, next + step, t, hidden_next);
        if (here) {
            float most = fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3]));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            most = fmaxf(most, top);
            const float shrink = power_of_2(top - most);
            top = most;
            float p[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[i] = power_of_2(s[i] - top);
            }
            sum = sum * shrink + ((p[0] + p[1]) + (p[2] + p[3]));
            unsigned ph[2], pl[2];
            split(p[0], p[1], ph[0], pl[0]);
            split(p[2], p[3], ph[1], pl[1]);
            const float shrink0 = __shfl_sync(~0u, shrink, 8 * t);     // of query 2t: g = 2t
            const float shrink1 = __shfl_sync(~0u, shrink, 8 * t + 4);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                out[i][0] *= shrink0;
                out[i][1] *= shrink1;
                out[i][2] *= shrink0;
                out[i][3] *= shrink1;
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const unsigned pick = i % 2 ? 0x7632 : 0x5410;
                unsigned w[4]; // [h + 2 * (key / 8)]
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    w[j] = __byte_perm(vw.w[j / 2 * 2][j % 2][i / 2], vw.w[j / 2 * 2 + 1][j % 2][i / 2], pick);
                }
                mma(out[i], w[0], w[1], w[2], w[3], ph[0], ph[1]);
                mma(out[i], w[0], w[1], w[2], w[3], pl[0], pl[1]);
            }
        }
        if (here_next) {
            load_values(a, v + offset(next + 2 * t, a.v_key) + 16 * g, next, t, vw);
        }
        here = here_next;
        at   = next;
    }

    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (t == 0 && g < queries) {
        float * p = mine + (warp * queries + g) * PART + TQ_HEAD;
        p[0] = top;
        p[1] = sum;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) { // query 2t + i % 2, dimensions 64 * (i / 2) + 8g ..
        if (2 * t + i % 2 < queries) {
            float4 * p = reinterpret_cast<float4 *>(mine + (warp * queries + 2 * t + i % 2) * PART + 64 * (i / 2) + 8 * g);
            p[0] = make_float4(out[0][i], out[1][i], out[2][i], out[3][i]);
            p[1] = make_float4(out[4][i], out[5][i], out[6][i], out[7][i]);
        }
    }
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    if (ranks > 1) {
        asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    }
#endif

    // the warps' results in one, to the thread block that finishes the query
    for (int x = warp; x < queries; x += WARPS) {
        float  most = LOWEST;
        float  weights = 0.0f;
        float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            most = fmaxf(most, mine[(w * queries + x) * PART + TQ_HEAD]);
        }
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float * p = mine + (w * queries + x) * PART;
            const float   f = power_of_2(p[TQ_HEAD] - most);
            const float4  y = reinterpret_cast<const float4 *>(p)[lane];
            weights += f * p[TQ_HEAD + 1];
            o.x += f * y.x;
            o.y += f * y.y;
            o.z += f * y.z;
            o.w += f * y.w;
        }
        float * to = all + (rank * slots + (x >> rank_bits)) * PART;
        if (ranks == 1) {
            reinterpret_cast<float4 *>(to)[lane] = o;
            if (lane == 0) {
                *reinterpret_cast<float2 *>(to + TQ_HEAD) = make_float2(most, weights);
            }
        }
#if __CUDA_ARCH__ >= 900
        else {
            // stores that count their bytes at the barrier beside them need no fence and no barrier of the whole cluster
            unsigned there, barrier;
            asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(x & (ranks - 1)));
            asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(shared_address(&arrived)), "r"(x & (ranks - 1)));
            asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                         :: "r"(there + 16 * lane), "f"(o.x), "f"(o.y), "f"(o.z), "f"(o.w), "r"(barrier) : "memory");
            if (lane == 0) {
                asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
                             :: "r"(there + 4 * TQ_HEAD), "f"(most), "f"(weights), "r"(barrier) : "memory");
            }
        }
#endif
    }
    if (ranks == 1) {
        __syncthreads();
    }

    if (2 * warp * ranks + rank >= queries) { // for neither of the warp's two groups
        return;
    }
    const int  slot     = threadIdx.x / TQ_ACT_LANES;
    const int  lane_of  = threadIdx.x % TQ_ACT_LANES;
    const int  x        = slot * ranks + rank;
    const bool write    = x < queries;
    const int  in_stream = (first + x) / ratio;
    const int  to_token = stream * a.tokens + in_stream;
    const int  to_head  = kv_head * ratio + (first + x) % ratio;
#if __CUDA_ARCH__ >= 900
    if (ranks > 1) {
        asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0;\n@!p bra again;\n}"
                     :: "r"(shared_address(&arrived)) : "memory");
    }
#endif
    float y[8] = {};
    if (write) {
        float  most    = LOWEST;
        float  weights = 0.0f;
        float2 scales[MAX_RANKS]; // maximum, sum of weights
        float  z[MAX_RANKS][8];
#pragma unroll
        for (int r = 0; r < MAX_RANKS; r++) { // all loads at once
            if (r < ranks) {
                const float * p = all + (r * slots + slot) * PART;
                scales[r] = *reinterpret_cast<const float2 *>(p + TQ_HEAD);
                tq_load8(p + 4 * lane_of, true, z[r]);
                most = fmaxf(most, scales[r].x);
            }
        }
#pragma unroll
        for (int r = 0; r < MAX_RANKS; r++) {
            if (r < ranks) {
                const float f = power_of_2(scales[r].x - most);
                weights += f * scales[r].y;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    y[i] += f * z[r][i];
                }
            }
        }
        const float by = weights > 0.0f ? __fdiv_rn(1.0f, weights) : 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            y[i] *= by;
        }
    }
    if (write && a.out && in_stream < a.tokens && stream < a.streams) {
        tq_store8(a.out + ((int64_t) to_token * a.heads + to_head) * TQ_HEAD + 4 * lane_of, true, y);
    }
    tq_write_block<PREFILL>(act, to_token, to_head, lane_of, y, write && to_token < (PREFILL ? act.n : act.cols));
#endif
}

// ---- launch --------------------------------------------------------------------------------------------

struct device_facts { bool sm90 = false; int multiprocessors = 0; };

// sm90: the device code that runs here has the instructions of sm_90: clusters, and the wait without which an
// early start would be a race.
const device_facts & facts() {
    static std::atomic<bool> known[64] = {};
    static device_facts      all[64];
    int device = 0;
    attn_check(cudaGetDevice(&device), "cudaGetDevice");
    if (device >= 64) {
        fprintf(stderr, "tq-attn: device %d: no more than 64 are provided for\n", device);
        abort();
    }
    if (!known[device]) {
        cudaFuncAttributes attr = {};
        attn_check(cudaFuncGetAttributes(&attr, attention_kernel<false>), "cudaFuncGetAttributes");
        all[device].sm90 = attr.ptxVersion >= 90;
        attn_check(cudaDeviceGetAttribute(&all[device].multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
        known[device] = true;
    }
    return all[device];
}

// Thread blocks of a cluster: more as long as all of them are on the card at once and each warp has keys.
int ranks_for(const device_facts & d, int clusters, int keys) {
    int ranks = 1;
    while (d.sm90 && ranks < MAX_RANKS && clusters * ranks * 2 <= d.multiprocessors * BLOCKS_SM && ranks * WARPS * KEYS < keys) {
        ranks *= 2;
    }
    return ranks;
}

// `forced`: ranks, where not 0 (the lab)
void launch_attention(const tq_attention & a, const tq_act & act, int forced, cudaStream_t stream) {
    const device_facts & d = facts();
    const bool prefill     = act.layout == TQ_ACT_PREFILL;
    // of a stream; one alone also has the columns of missing tokens, of several these are streams that do not exist
    const int columns      = a.streams == 1 && !prefill ? act.cols : a.tokens;
    const int streams      = a.streams == 1 || prefill ? a.streams : (act.cols + a.tokens - 1) / a.tokens;
    const int all_queries  = columns * (a.heads / a.heads_kv);
    const int queries      = std::min(all_queries, QUERIES);
    const int groups       = (all_queries + QUERIES - 1) / QUERIES;
    const int ranks        = forced && d.sm90 ? forced : ranks_for(d, a.heads_kv * groups * streams, a.keys);
    const int slots        = (queries + ranks - 1) / ranks;

    cudaLaunchAttribute attrs[2] = {};
    cudaLaunchConfig_t  config   = {};
    config.gridDim          = dim3(ranks, a.heads_kv, groups * streams);
    config.blockDim         = dim3(THREADS);
    config.dynamicSmemBytes = (WARPS * queries + ranks * slots) * PART * sizeof(float);
    config.stream           = stream;
    config.attrs            = attrs;
    if (d.sm90 && tq_early_start_wanted()) {
        attrs[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attrs[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (ranks > 1) {
        attrs[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attrs[config.numAttrs].val.clusterDim.x = ranks;
        attrs[config.numAttrs].val.clusterDim.y = 1;
        attrs[config.numAttrs++].val.clusterDim.z = 1;
    }
    attn_check(cudaLaunchKernelEx(&config, prefill ? attention_kernel<true> : attention_kernel<false>, a, act, groups, columns), "launch");
}

} // namespace

bool tq_attention_fits(const tq_attention & a) {
    const auto aligned = [](const void * p, int64_t stride, int64_t other) { return ((uintptr_t) p | (uintptr_t) stride | (uintptr_t) other) % 16 == 0; };
    const int64_t most = (int64_t) 1 << 31; // bytes of k and v that a head reaches over
    return a.tokens >= 1 && a.tokens <= TQ_DECODE_MAX && a.streams >= 1 && a.tokens * a.streams <= TQ_BATCH_MAX && a.keys >= 1 && a.keys <= TQ_ATTENTION_KEYS &&
        a.k_key > 0 && a.v_key > 0 && a.k_key < most / TQ_ATTENTION_KEYS && a.v_key < most / TQ_ATTENTION_KEYS &&
        a.heads_kv >= 1 && a.heads_kv <= 65535 && a.heads % a.heads_kv == 0 && a.mask_token % (int64_t) sizeof(half) == 0 &&
        a.mask_stream % (int64_t) sizeof(half) == 0 &&
        aligned(a.q, a.q_token, a.q_head) && aligned(a.k, a.k_key, a.k_head) && aligned(a.v, a.v_key, a.v_head) &&
        aligned(nullptr, a.q_stream, a.k_stream | a.v_stream) && aligned(a.out, 0, 0);
}

void tq_quantize_attention(const tq_attention & a, const tq_act & act, cudaStream_t stream) {
    launch_attention(a, act, 0, stream);
}
