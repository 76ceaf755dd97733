// Block layouts of the asymmetric ternary types TQ2_1 and TQ1_1, and of Q8_T, the form that
// activations take in their dot products. Included by ggml-common.h, whose macros it uses.
//
// A weight is alpha*t + mu with t in {-1, 0, 1}, one (alpha, mu) per 128 weights of a row; codes are
// c = t + 1. Element e of a block lies in lane e % 32 of plane e / 32. FORMAT.md has every byte.

#define QK_TQ 128 // weights per block, of both types

#if defined(GGML_COMMON_DECL_CUDA) || defined(GGML_COMMON_DECL_HIP) || defined(GGML_COMMON_DECL_SYCL)
// QR = weights per stored unit, QI = 32-bit integers of the activation block that one step covers
#define QR2_1_T 4
#define QI2_1_T (QK_TQ / (4 * QR2_1_T))

#define QR1_1_T 4
#define QI1_1_T (QK_TQ / (4 * QR1_1_T))
#endif

// 2.25 bpw: qs[lane] holds the codes of planes 0..3 in bit pairs 0..3
typedef struct {
    GGML_EXTENSION union {
        struct {
            ggml_half alpha; // scale
            ggml_half mu;    // offset
        } GGML_COMMON_AGGR_S;
        ggml_half2 am;
    } GGML_COMMON_AGGR_U;
    uint8_t qs[QK_TQ / 4];
} block_tq2_1;
static_assert(sizeof(block_tq2_1) == 2 * sizeof(ggml_half) + QK_TQ / 4, "wrong tq2_1 block size/padding");

// 1.875 bpw: base-3 numbers, lowest digit first. Digits 0..3 of qs[i] are planes 0..3 of lane i;
// digit 4 of qs[i], i < 24, is plane i % 4 of lane 26 + i / 4
#define TQ1_1_NQS 26
typedef struct {
    ggml_half alpha; // scale (no half2 beside it: blocks are aligned to 2 bytes only)
    ggml_half mu;    // offset
    uint8_t qs[TQ1_1_NQS];
} block_tq1_1;
static_assert(sizeof(block_tq1_1) == 2 * sizeof(ggml_half) + TQ1_1_NQS, "wrong tq1_1 block size/padding");

// activations: x ~ d * qs, and s = d * sum(qs), which meets the weights' offset. Never in a file
typedef struct {
    float  d;
    float  s;
    int8_t qs[QK_TQ];
} block_q8_t;
static_assert(sizeof(block_q8_t) == 2 * sizeof(float) + QK_TQ, "wrong q8_t block size/padding");
