#pragma once

// Barriers in shared memory and bulk copies (sm_90 and newer), as the decode and batch kernels use them, and how a stream is cut.

#include <cstdint>

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

// ---- runs ---------------------------------------------------------------------------------------------
// How a stream of chunks is cut into `grid` runs: the first `longer` have run + 1, the others `run`.
struct tq_cut {
    int grid, run, longer;

    __host__ __device__ int first(int b) const { return b * run + (b < longer ? b : longer); }
    __host__ __device__ int length(int b) const { return run + (b < longer); }
};
