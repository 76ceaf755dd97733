#pragma once

// TQ2_1 and TQ1_1 on CUDA through the templates that all quantised types share: dequantising, get_rows
// and the matrix-vector products (MMVQ). These are right on every card, and what faster kernels are
// measured against. FORMAT.md has the bytes.

#include "../../common.cuh"

#define GGML_CUDA_TQ // this tree has the edits of edits-cuda.yaml

#include <cstring>

template <>
struct ggml_cuda_type_traits<GGML_TYPE_TQ2_1> {
    static constexpr int qk = QK_TQ;
    static constexpr int qr = QR2_1_T;
    static constexpr int qi = QI2_1_T;
    static constexpr int bs = sizeof(block_tq2_1);
};

template <>
struct ggml_cuda_type_traits<GGML_TYPE_TQ1_1> {
    static constexpr int qk = QK_TQ;
    static constexpr int qr = QR1_1_T;
    static constexpr int qi = QI1_1_T;
    static constexpr int bs = sizeof(block_tq1_1);
};

// (alpha, mu) of a block
static __device__ __forceinline__ half2 tq_scales(const block_tq2_1 * b) {
    return b->am;
}

static __device__ __forceinline__ half2 tq_scales(const block_tq1_1 * b) {
    return __halves2half2(b->alpha, b->mu);
}

// Word j (0..7) of a block in the form of TQ2_1: the codes of lanes 4j..4j+3, one lane a byte, plane p
// in bits 2p and 2p+1.
static __device__ __forceinline__ uint32_t tq_codes(const block_tq2_1 * b, const int j) {
    return ((const uint32_t *) b->qs)[j];
}

// Four bytes of TQ1_1 lose their lowest digit (returned) at once. Two bytes share a register, 16 bits
// each, so that v * 171 >> 9 = v / 3 (exact up to 511) has room.
static __device__ __forceinline__ uint32_t tq1_1_pop_digit(uint32_t & even, uint32_t & odd) {
    const uint32_t qe = ((even * 171) >> 9) & 0x007F007F;
    const uint32_t qo = ((odd  * 171) >> 9) & 0x007F007F;
    const uint32_t digits = (even - 3*qe) | ((odd - 3*qo) << 8);
    even = qe;
    odd  = qo;
    return digits;
}

// The fifth digit of a byte; one above 242 counts as the one 81 below.
static __device__ __forceinline__ int tq1_1_fifth(const int v) {
    return v < 162 ? v / 81 : 2;
}

static __device__ __forceinline__ uint32_t tq_codes(const block_tq1_1 * b, const int j) {
    const uint16_t * q16 = (const uint16_t *) b->qs; // blocks are aligned to 2 bytes only
    uint32_t codes = 0;
    if (4*j < TQ1_1_NQS) {
        // word 6 has two bytes of its own, its other two lanes lie in the fifth digits
        uint32_t v = q16[2*j];
        if (4*j + 2 < TQ1_1_NQS) {
            v |= (uint32_t) q16[2*j + 1] << 16;
        }
        uint32_t even = v & 0x00FF00FF;
        uint32_t odd  = (v >> 8) & 0x00FF00FF;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            codes |= tq1_1_pop_digit(even, odd) << (2*p);
        }
    }
    if (4*j + 3 >= TQ1_1_NQS) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int lane = 4*j + k;
            if (lane >= TQ1_1_NQS) {
#pragma unroll
                for (int p = 0; p < 4; ++p) {
                    codes |= (uint32_t) tq1_1_fifth(b->qs[4*(lane - TQ1_1_NQS) + p]) << (8*k + 2*p);
                }
            }
        }
    }
    return codes;
}

// One code, for element e of a block.
static __device__ __forceinline__ int tq_code(const block_tq2_1 * b, const int e) {
    return (b->qs[e % 32] >> (2*(e/32))) & 3;
}

static __device__ __forceinline__ int tq_code(const block_tq1_1 * b, const int e) {
    const int lane  = e % 32;
    const int plane = e / 32;
    if (lane >= TQ1_1_NQS) {
        return tq1_1_fifth(b->qs[4*(lane - TQ1_1_NQS) + plane]);
    }
    const int div = plane == 0 ? 1 : plane == 1 ? 3 : plane == 2 ? 9 : 27;
    return b->qs[lane] / div % 3;
}

// Elements iqs and iqs + 1 of block ib (the templates are used with qr = 1).
template <typename block>
static __device__ __forceinline__ void dequantize_tq(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    const block * b = (const block *) vx + ib;
    const float2 s = __half22float2(tq_scales(b));
    v.x = (tq_code(b, iqs + 0) - 1)*s.x + s.y;
    v.y = (tq_code(b, iqs + 1) - 1)*s.x + s.y;
}

static __device__ __forceinline__ void dequantize_tq2_1(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    dequantize_tq<block_tq2_1>(vx, ib, iqs, v);
}

static __device__ __forceinline__ void dequantize_tq1_1(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    dequantize_tq<block_tq1_1>(vx, ib, iqs, v);
}

// Words that one thread takes in a matrix-vector product.
#define VDR_TQ_Q8_1_MMVQ 2

// Part of the dot product of weight block kbx with its four blocks of activations: words iqs and
// iqs + 1. Every thread of the block adds its share of the offset's term.
template <typename block>
static __device__ __forceinline__ float vec_dot_tq_q8_1(
        const void * __restrict__ vbq, const block_q8_1 * __restrict__ bq8_1, const int & kbx, const int & iqs) {
    const block * b = (const block *) vbq + kbx;
    constexpr int threads = QK_TQ/16 / VDR_TQ_Q8_1_MMVQ;

    int sumi[4] = {0};
#pragma unroll
    for (int l = 0; l < VDR_TQ_Q8_1_MMVQ; ++l) {
        const uint32_t codes = tq_codes(b, iqs + l);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const int u = ((const int *) bq8_1[p].qs)[iqs + l];
            sumi[p] = ggml_cuda_dp4a((codes >> (2*p)) & 0x03030303, u, sumi[p]);
        }
    }

    float dot = 0.0f; // sum of code * activation
    float sum = 0.0f; // sum of activations
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        const float2 ds = __half22float2(bq8_1[p].ds);
        dot += ds.x*sumi[p];
        sum += ds.y;
    }
    const float2 s = __half22float2(tq_scales(b));
    return s.x*dot + (s.y - s.x)*sum/threads;
}

static __device__ __forceinline__ float vec_dot_tq2_1_q8_1(
        const void * __restrict__ vbq, const block_q8_1 * __restrict__ bq8_1, const int & kbx, const int & iqs) {
    return vec_dot_tq_q8_1<block_tq2_1>(vbq, bq8_1, kbx, iqs);
}

static __device__ __forceinline__ float vec_dot_tq1_1_q8_1(
        const void * __restrict__ vbq, const block_q8_1 * __restrict__ bq8_1, const int & kbx, const int & iqs) {
    return vec_dot_tq_q8_1<block_tq1_1>(vbq, bq8_1, kbx, iqs);
}
