#pragma once

// What kernels that stream weights through shared memory have in common (sm_90 and newer): barriers, bulk copies, words
// between thread blocks, and places in the bytes of several matrices.

#include "tq-math.cuh"

// ---- barriers and bulk copies -----------------------------------------------------------------------
static __device__ __forceinline__ uint32_t tq_shared(const void * p) { return (uint32_t) __cvta_generic_to_shared(p); }
static __device__ __forceinline__ void tq_barrier_init(uint64_t * b, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(tq_shared(b)), "r"(count) : "memory");
}
// Bytes that are to come in this phase: with the one arrival that it needs, or without (then tq_barrier_arrive follows).
static __device__ __forceinline__ void tq_barrier_expect(uint64_t * b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(tq_shared(b)), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void tq_barrier_expect_more(uint64_t * b, int bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(tq_shared(b)), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void tq_barrier_arrive(uint64_t * b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(tq_shared(b)) : "memory");
}
static __device__ __forceinline__ void tq_barrier_wait(uint64_t * b, int parity) {
    asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}"
                 ::"r"(tq_shared(b)), "r"(parity) : "memory");
}
// A warp arrives as one, by its first lane. compute-sanitizer's racecheck does not see that the others are ordered by
// __syncwarp: for it each lane arrives by itself (TQ_RACECHECK).
#ifdef TQ_RACECHECK
constexpr int TQ_WARP_ARRIVALS = 32;
#else
constexpr int TQ_WARP_ARRIVALS = 1;
#endif
static __device__ __forceinline__ void tq_barrier_arrive_warp(uint64_t * b, int lane) {
    __syncwarp();
    if (lane < TQ_WARP_ARRIVALS) { tq_barrier_arrive(b); }
}
// Weights are read once, so what was copied is the first to leave L2: what was fetched ahead stays.
static __device__ __forceinline__ uint64_t tq_evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
static __device__ __forceinline__ void tq_bulk_copy(void * to, const void * from, int bytes, uint64_t * b, uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(tq_shared(to)), "l"(from), "r"(bytes), "r"(tq_shared(b)), "l"(policy) : "memory");
}
// ---- words between thread blocks ------------------------------------------------------------------
static __device__ __forceinline__ void tq_word_write(uint64_t * p, uint64_t v) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
static __device__ __forceinline__ uint64_t tq_word_read(const uint64_t * p) {
    uint64_t v;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

// ---- a stream of several matrices, cut ----------------------------------------------------------------
constexpr int TQ_SHARED_WORDS = 2 * TQ_TILE_ROWS * TQ_DECODE_MAX; // 64-bit words that a thread block sends to the one before

// The bytes of up to TQ_MAX_SEGMENTS matrices, one after the other.
struct tq_bytes {
    const uint8_t * w[TQ_MAX_SEGMENTS];
    int64_t         size[TQ_MAX_SEGMENTS]; // unused ones: 0
};

// How a stream of `grid` runs is cut: the first `longer` are of run + 1 chunks, the others of run.
struct tq_cut {
    int grid, run, longer, chunk_bytes;

    __host__ __device__ int first(int b) const { return b * run + (b < longer ? b : longer); }
    __host__ __device__ int length(int b) const { return run + (b < longer); }
};

// A place in the bytes of several matrices.
struct tq_walk {
    const tq_bytes & bytes;
    int              i = 0;
    int64_t          at;

    __device__ __forceinline__ tq_walk(const tq_bytes & b, int64_t start) : bytes(b), at(start) { settle(); }
    __device__ __forceinline__ void settle() {
        while (i < TQ_MAX_SEGMENTS - 1 && at >= bytes.size[i]) { at -= bytes.size[i++]; }
    }
    // Calls piece(address, bytes, bytes before) for the next `count` bytes, which must be there.
    template <class F> __device__ __forceinline__ void take(int count, F && piece) {
        for (int done = 0; done < count;) {
            const int64_t left = bytes.size[i] - at;
            const int     now  = left < count - done ? (int) left : count - done;
            piece(bytes.w[i] + at, now, done);
            done += now;
            at += now;
            settle();
        }
    }
};
