#pragma once

// Instructions of sm_90a that tq-prefill-wgmma.cu is made of: barriers in shared memory, bulk copies, clusters, wgmma.

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ uint32_t shared_address(const void * p) {
    return (uint32_t) __cvta_generic_to_shared(p);
}
__device__ __forceinline__ void barrier_init(uint64_t * b, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t * b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t * b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// A warp arrives as one, by its first lane, which __syncwarp has put behind the others. In a build for compute-sanitizer's
// racecheck (TQ_RACECHECK) each lane arrives by itself, and every phase that lanes wait for has one copy.
#ifdef TQ_RACECHECK
constexpr bool RACECHECK = true;
#else
constexpr bool RACECHECK = false;
#endif
constexpr int WARP_ARRIVALS = RACECHECK ? 32 : 1;
__device__ __forceinline__ void barrier_arrive_warp(uint64_t * b, int lane) {
    __syncwarp();
    if (RACECHECK || lane == 0) {
        barrier_arrive(b);
    }
}
__device__ __forceinline__ void barrier_wait(uint64_t * b, int parity) {
    asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}"
                 ::"r"(shared_address(b)), "r"(parity) : "memory");
}
__device__ __forceinline__ void bulk_copy(void * dst, const void * src, int bytes, uint64_t * b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(dst)), "l"(src), "r"(bytes), "r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address of this thread block's p in the shared memory of another member.
__device__ __forceinline__ uint32_t cluster_map(const void * p, int rank) {
    uint32_t r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(shared_address(p)), "r"(rank));
    return r;
}
__device__ __forceinline__ void cluster_store(uint32_t address, const float (&v)[4]) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}
template <int REGS> __device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGS));
}
template <int REGS> __device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGS));
}
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Neither reads nor writes of these registers move across.
template <class T, int N> __device__ __forceinline__ void hold(T (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+r"(c[i])::"memory");
    }
}

// B of some tokens x 32 columns in a record of N: core matrices of 8 tokens x 16 bytes, 128 bytes apart along the tokens.
template <int N> __device__ __forceinline__ uint64_t b_descriptor(const void * p) {
    constexpr uint64_t along_k = N * 16, along_n = 128;
    return (uint64_t) ((shared_address(p) >> 4) & 0x3fff) | (along_k >> 4) << 16 | (along_n >> 4) << 32;
}

#define TQ_C4(i)  "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3])
#define TQ_C8(i)  TQ_C4(i), TQ_C4(i + 4)
#define TQ_C16(i) TQ_C8(i), TQ_C8(i + 8)
#define TQ_C32(i) TQ_C16(i), TQ_C16(i + 16)
#define TQ_WGMMA(width, regs, a0, a1, a2, a3, desc, sum, ...)                                                      \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " sum ", 0;\n"                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" width "k32.s32.s8.s8 {" regs "}, {" a0 "," a1 "," a2 "," a3   \
                 "}, " desc ", p;\n}"                                                                              \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(SUM))
#define TQ_R8   "%0,%1,%2,%3,%4,%5,%6,%7"
#define TQ_R16  TQ_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define TQ_R24  TQ_R16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define TQ_R32  TQ_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define TQ_R64  TQ_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
                "%56,%57,%58,%59,%60,%61,%62,%63"

// c (+)= 64 rows x N tokens x 32 columns; SUM 0: c is only written.
template <int SUM> __device__ __forceinline__ void wgmma(int (&c)[8], const uint32_t * a, uint64_t b) {
    TQ_WGMMA("16", TQ_R8, "%8", "%9", "%10", "%11", "%12", "%13", TQ_C8(0));
}
template <int SUM> __device__ __forceinline__ void wgmma(int (&c)[16], const uint32_t * a, uint64_t b) {
    TQ_WGMMA("32", TQ_R16, "%16", "%17", "%18", "%19", "%20", "%21", TQ_C16(0));
}
template <int SUM> __device__ __forceinline__ void wgmma(int (&c)[24], const uint32_t * a, uint64_t b) {
    TQ_WGMMA("48", TQ_R24, "%24", "%25", "%26", "%27", "%28", "%29", TQ_C16(0), TQ_C8(16));
}
template <int SUM> __device__ __forceinline__ void wgmma(int (&c)[32], const uint32_t * a, uint64_t b) {
    TQ_WGMMA("64", TQ_R32, "%32", "%33", "%34", "%35", "%36", "%37", TQ_C32(0));
}
template <int SUM> __device__ __forceinline__ void wgmma(int (&c)[64], const uint32_t * a, uint64_t b) {
    TQ_WGMMA("128", TQ_R64, "%64", "%65", "%66", "%67", "%68", "%69", TQ_C32(0), TQ_C32(32));
}

#undef TQ_C4
#undef TQ_C8
#undef TQ_C16
#undef TQ_C32
#undef TQ_R8
#undef TQ_R16
#undef TQ_R24
#undef TQ_R32
#undef TQ_R64
#undef TQ_WGMMA

#endif // __CUDA_ARCH_FEAT_SM90_ALL
