// Decode kernels (1..8 tokens) for ternary matrices: how the weights get to the warps. `decode` loads
// them into registers, `decode_stream` keeps bulk copies in flight; math.cuh has the arithmetic.
#pragma once
#include "math.cuh"
#include "layouts.cuh"

// ---- the kernel: 16 rows per thread block, columns shared among NW warps, U blocks loaded ahead ------
template <class Format, class Math, int NW, int U, int MIN_CTAS>
__global__ void __launch_bounds__(NW * 32, MIN_CTAS)
decode(const uint8_t * __restrict__ weights, const uint4 * __restrict__ x, const ActHead * __restrict__ head,
       float * __restrict__ y, int M, int nb) {
    constexpr int NA = Math::NA, n = Math::TOKENS, XS = n * Math::X_BYTES / 16;
    __shared__ float part[NW][16][n + (n % 2 == 0)];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, tile = blockIdx.x, g = lane >> 2, t = lane & 3;
    int left = nb - warp * U;  // blocks from this warp's first to the end of the row
    typename Format::W w[U];
    typename Format::Ptr ptr(weights, tile, nb, lane, M);
    float acc[2][NA] = {};
    auto fetch = [&](typename Format::W (&dst)[U]) {
#pragma unroll
        for (int u = 0; u < U; u++)
            if (u < left) ptr.load(dst[u], u);
    };
    ptr.advance(warp * U);
    fetch(w);
    x += (size_t) warp * U * XS;
    head += warp * U * n;
    pdl_launch();
    pdl_wait();  // weights do not depend on the kernel before this one; activations do
    while (left > 0) {
        typename Format::W next[U];
        int now = left;
        left -= NW * U;
        ptr.advance(NW * U);
        fetch(next);
#pragma unroll
        for (int u = 0; u < U; u++)
            if (u < now) {
                typename Math::X v;
                Math::load_x(v, x + u * XS, head + u * n, lane);
                Math::block(acc, w[u], v, lane);
            }
        x += NW * U * XS;
        head += NW * U * n;
#pragma unroll
        for (int u = 0; u < U; u++) w[u] = next[u];
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < NA; i++) {
            float v = acc[r][i];
            if (Math::SUM_T) { v += __shfl_xor_sync(~0u, v, 1); v += __shfl_xor_sync(~0u, v, 2); }
            int col = Math::column(t, i);
            if (col < n && (!Math::SUM_T || t == 0)) part[warp][g + 8 * r][col] = v;
        }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * n; i += NW * 32) {
        int row = i & 15, col = i >> 4;
        float v = 0;
#pragma unroll
        for (int k = 0; k < NW; k++) v += part[k][row][col];
        if (tile * 16 + row < M) y[(size_t) col * M + tile * 16 + row] = v;
    }
}

// ---- barriers and bulk copies -----------------------------------------------------------------------
__device__ __forceinline__ uint32_t smem_addr(const void * p) { return (uint32_t) __cvta_generic_to_shared(p); }
__device__ __forceinline__ void mbar_init(uint64_t * b, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(b)), "r"(count));
}
__device__ __forceinline__ void mbar_expect(uint64_t * b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbar_arrive(uint64_t * b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(b)) : "memory");
}
__device__ __forceinline__ void mbar_wait(uint64_t * b, int parity) {
    asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}"
                 ::"r"(smem_addr(b)), "r"(parity) : "memory");
}
__device__ __forceinline__ void bulk_copy(void * dst, const void * src, int bytes, uint64_t * b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(smem_addr(dst)), "l"(src), "r"(bytes), "r"(smem_addr(b)) : "memory");
}

// ---- one stream for each thread block, cut evenly -------------------------------------------------
// The blocks of all tiles lie in one row in memory; each thread block takes an equal run of them, also
// across tile ends. A producer warp keeps S stages of NW chunks in flight with one bulk copy each, NW
// warps take a chunk (U blocks, nb % U == 0) each, and a last warp adds their sums up tile by tile. A
// tile that two thread blocks share is added to y with atomics: y must be zero there (two addends, so
// the result does not depend on their order as long as each run is at least one tile long).
template <class Format, class Math, int NW, int U, int S>
struct Stream {
    static constexpr int STAGE = NW * U * Format::STEP, N = Math::TOKENS, PART = NW * 16 * N;
    static constexpr int SHARED = S * STAGE + 2 * PART * 4 + (2 * S + 4) * 8;
};

template <class Format, class Math, int NW, int U, int S, int MIN_CTAS>
__global__ void __launch_bounds__(NW * 32 + 64, MIN_CTAS)
decode_stream(const uint8_t * __restrict__ weights, const uint4 * __restrict__ x, const ActHead * __restrict__ head,
              float * __restrict__ y, int M, int nb, int run, int longer) {
    // run = chunks / thread blocks, longer = how many thread blocks have one more (the host divides)
    using R = Stream<Format, Math, NW, U, S>;
    constexpr int NA = Math::NA, n = Math::TOKENS, XS = n * Math::X_BYTES / 16;
    extern __shared__ __align__(128) uint8_t shared[];
    float * part = (float *) (shared + S * R::STAGE);
    uint64_t * ready = (uint64_t *) (part + 2 * R::PART), *spent = ready + S, *full = spent + S, *empty = full + 2;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    int cpt = nb / U, b_ = blockIdx.x;  // cpt: chunks of a tile
    int lo = b_ * run + min(b_, longer), hi = lo + run + (b_ < longer);
    if (warp == NW) {  // the producer fills the ring before anybody else is up
        if (lane == 0) {
            for (int i = 0; i < S; i++) { mbar_init(ready + i, 1); mbar_init(spent + i, NW); }
            for (int i = 0; i < 2; i++) { mbar_init(full + i, NW); mbar_init(empty + i, 1); }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        int slot = 0, phase = 1, q = lo;
        const uint8_t * src = weights + (size_t) lo * (U * Format::STEP);
        auto fill = [&]() {
            int bytes = min(NW, hi - q) * U * Format::STEP;
            mbar_expect(ready + slot, bytes);
            bulk_copy(shared + slot * R::STAGE, src, bytes, ready + slot);
            src += R::STAGE;
            q += NW;
            if (++slot == S) { slot = 0; phase ^= 1; }
        };
        if (lane == 0)
            for (int i = 0; i < S && q < hi; i++) fill();
        __syncthreads();
        pdl_launch();
        if (lane == 0)
            while (q < hi) { mbar_wait(spent + slot, phase); fill(); }
        return;
    }
    __syncthreads();
    pdl_launch();
    int tile = lo / cpt, tile_end = (hi - 1) / cpt;
    if (warp == NW + 1) {
        pdl_wait();  // y may still be read by the kernel before
        for (int i = 0; tile <= tile_end; tile++, i++) {
            float * p = part + (i & 1) * R::PART;
            bool whole = tile * cpt >= lo && (tile + 1) * cpt <= hi;
            mbar_wait(full + (i & 1), (i >> 1) & 1);
            for (int j = lane; j < 16 * n; j += 32) {
                float v = 0;
#pragma unroll
                for (int k = 0; k < NW; k++) v += p[k * 16 * n + j];
                int row = tile * 16 + (j & 15);
                float * dst = y + (size_t) (j >> 4) * M + row;
                if (row < M) { if (whole) *dst = v; else atomicAdd(dst, v); }
            }
            __syncwarp();
            if (lane == 0) mbar_arrive(empty + (i & 1));
        }
        return;
    }
    pdl_wait();
    int slot = 0, phase = 0, q = lo + warp, c = q - tile * cpt;
    const uint8_t * mine = shared + warp * U * Format::STEP;
    for (int i = 0; tile <= tile_end; tile++, i++, c -= cpt) {
        float acc[2][NA] = {};
        for (; c < cpt && q < hi; c += NW, q += NW) {
            typename Math::X v[U];
            const uint4 * xp = x + c * (U * XS);
            const ActHead * hp = head + c * (U * n);
#pragma unroll
            for (int u = 0; u < U; u++) Math::load_x(v[u], xp + u * XS, hp + u * n, lane);
            mbar_wait(ready + slot, phase);
            typename Format::W w[U];
#pragma unroll
            for (int u = 0; u < U; u++) Format::load_shared(w[u], mine + slot * R::STAGE + u * Format::STEP, lane);
#pragma unroll
            for (int u = 0; u < U; u++) Math::block(acc, w[u], v[u], lane);
            __syncwarp();
            if (lane == 0) mbar_arrive(spent + slot);
            if (++slot == S) { slot = 0; phase ^= 1; }
        }
        if (i >= 2) mbar_wait(empty + (i & 1), ((i >> 1) - 1) & 1);
        float * p = part + (i & 1) * R::PART + warp * 16 * n;
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int j = 0; j < NA; j++) {
                float a = acc[k][j];
                if (Math::SUM_T) { a += __shfl_xor_sync(~0u, a, 1); a += __shfl_xor_sync(~0u, a, 2); }
                int col = Math::column(t, j);
                if (col < n && (!Math::SUM_T || t == 0)) p[col * 16 + g + 8 * k] = a;
            }
        __syncwarp();
        if (lane == 0) mbar_arrive(full + (i & 1));
    }
}
