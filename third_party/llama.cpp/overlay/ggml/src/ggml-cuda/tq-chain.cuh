#pragma once

// A chain of products for 1 to 8 tokens in one kernel, for sm_90 and newer: from the output of the attention to
// the q, k and v of the next layer there is nothing that other kernels must do, so nothing has to end in between.
//
//   step 0  quantise the attention's output           -> product with o
//   step 1  add the residual, norm, quantise          -> gate and up
//   step 2  gated unit, quantise                      -> down
//   step 3  add the residual, norm, quantise          -> q, k, v
//
// Between two kernels the memory idles for 3 to 4 us (KERNELS.md), while the last results are written, the next
// activations made and passed on. Here the warp that copies weights knows all steps: it has the beginning of the
// next product in shared memory (up to 180 KB on every multiprocessor, 24 MB in all) before the last
// one has ended, so the memory never stops.
//
// Thread blocks meet through counters in global memory, for each step: how many are done with the step's product,
// how many have left their sums of squares, how many have quantised. All of them must be on the card at once, so the launch is
// cooperative. The last one to leave sets the counters back to zero for the next launch (a recorded graph cannot
// pass a new number). Order of reads and writes is that of the nodes of the graph, so memory may be
// shared among them as ggml does.

#include "tq-act-block.cuh"
#include "tq-stream.cuh"

constexpr int TQ_CHAIN_STEPS = 4;

enum tq_step_kind { TQ_STEP_PLAIN, TQ_STEP_NORM, TQ_STEP_GLU };

// What makes the activations of a step: arguments as of tq_quantize, tq_quantize_norm and tq_quantize_glu.
struct tq_step {
    tq_step_kind  kind;
    const float * a;    // x, a or gate
    const float * b;    // -, b (may be null) or up
    int64_t       ld_a; // of x or gate; the norm's rows are contiguous
    int64_t       ld_b;
    const float * w;    // norm
    float         eps;
    int           gelu; // gated unit: 0 silu, 1 gelu
    float       * sum;  // norm: a + b, where not null
    float       * out;  // the values that are quantised, where not null
    tq_act        act;
    tq_segment    segments[TQ_MAX_SEGMENTS];
    int           n_segments;
};

// tq-chain.cu. `scratch`: tq_chain_scratch_bytes() of device memory, zero before its first use, of this stream alone.
size_t tq_chain_scratch_bytes();
// Whether the current device can run these steps as one kernel.
bool tq_chain_fits(const tq_step * steps, int n_steps);
void tq_chain(const tq_step * steps, int n_steps, void * scratch, cudaStream_t stream);
