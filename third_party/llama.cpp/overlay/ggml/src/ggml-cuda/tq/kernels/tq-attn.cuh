#pragma once

// Attention for a few tokens that ends in quantised activations: at a head size of 128, what one head gives one
// token is exactly one block of the product that follows. Like tq-kernels.cuh, this needs none of ggml's headers.

#include "tq-kernels.cuh"

constexpr int TQ_HEAD = TQ_BLOCK; // columns of a head
// Keys up to which this kernel is taken. Beyond, the rate at which they are read is all that counts, and this kernel's is not
// the best there is (docs/kernels/fusion.md).
constexpr int TQ_ATTENTION_KEYS = 2048;

// out = softmax(scale * q k^T + mask) v for every token and head; head h reads head h / (heads / heads_kv) of k and v. Each of
// `streams` (sequences with keys of their own) has `tokens` tokens; token i of stream s is token s * tokens + i of `out`.
// Strides are in bytes and multiples of 16, as the addresses are, but for those of the mask.
struct tq_attention {
    const float * q;    int64_t q_token, q_head, q_stream;
    const half  * k;    int64_t k_key, k_head, k_stream;
    const half  * v;    int64_t v_key, v_head, v_stream;
    const half  * mask; int64_t mask_token, mask_stream; // mask[key] of a token; null: no mask. -infinity hides a key
    float         scale;
    int           tokens, streams, heads, heads_kv, keys;
    float       * out;  // [token][head][TQ_HEAD], or null: only the activations are wanted
};

// Whether the kernel takes this: 1 to 8 tokens of a stream, at most 64 in all, up to TQ_ATTENTION_KEYS keys less than 1 MiB apart, strides and addresses as above.
bool tq_attention_fits(const tq_attention & a);

// tq-attn.cu, for sm_80 and newer. `act`: of all tokens and a.heads blocks (columns of missing tokens of the decode layout
// become zero). A token that sees no key gets zeros. The sums have one order, so results repeat to the bit.
void tq_quantize_attention(const tq_attention & a, const tq_act & act, cudaStream_t stream);
