#pragma once

// The kernels for TQ2_1 and TQ1_1 of our own: what they take and who provides it. Nothing here needs
// ggml's headers, so that the kernels can be compiled and checked by themselves
// (benchmarks/cuda_lab). docs/kernels says why they look as they do.
//
// Weights on a card of compute capability 8.0 or more are kept in tile form, whatever their type in the file. On older
// cards, or with GGML_CUDA_TQ=templates, the file's bytes are kept and the templates shared by all types (tq.cuh) used.
//
// Tile form: 16 rows x 128 columns are 576 bytes (so TQ1_1 takes the room of TQ2_1), tiles of a matrix
// [row / 16][column / 128], every matrix of a 3D or 4D tensor padded to a multiple of 16 rows.
// With g = row % 8, r = row / 8 % 2, and qs[32], alpha, mu the bytes that TQ2_1 has for the row
// (FORMAT.md), but that a code has as many bits as its value, so 00, 01, 11 for c = 0, 1, 2:
//   bytes 16*(4g + t) + 8h + 4r + i   qs[8t + 4h + i], t = 0..3, h = 0..1, i = 0..3
//   bytes 512 + 8g + 4r               alpha, mu (half)
// so lane (g, t) of a warp reads 16 bytes, and has for rows g and g + 8 what the fragments of
// mma.m16n8k32 want: plane p of its byte i of half h is column 32p + 8t + 4h + i. Its four words are at the same time the A
// fragment of an mma.m16n8k256 of bits, which counts (code AND bit of the activation).

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Whether kernels may be set up while those before them still run (programmatic dependent launch): GGML_CUDA_PDL=0 says
// no, as everywhere in this backend.
static inline bool tq_early_start_wanted() {
    static const bool wanted = []() {
        const char * env = getenv("GGML_CUDA_PDL");
        return env == nullptr || atoi(env) != 0;
    }();
    return wanted;
}

// Programmatic dependent launch: the next kernel may be set up from the first call on, and nothing that the
// kernels before have written may be read, nor anything that they read be written, before the second.
static __device__ __forceinline__ void tq_pdl_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
static __device__ __forceinline__ void tq_pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

constexpr int TQ_BLOCK      = 128; // weights of a row that share alpha and mu
constexpr int TQ_TILE_ROWS  = 16;
constexpr int TQ_TILE_BYTES = 576; // of 16 rows x 128 columns
constexpr int TQ_TILE_SCALES = 512; // where alpha and mu begin

// Four codes of a byte of the file, or sixteen of a word, as tile form has them, and back. 3, which is no code, becomes 2.
__host__ __device__ constexpr uint32_t tq_tile_codes(uint32_t values) { return values | (values >> 1 & 0x55555555); }
__host__ __device__ constexpr uint32_t tq_tile_values(uint32_t codes) { return codes & ~(codes >> 1 & 0x55555555); }

constexpr int TQ_DECODE_MAX = 8;    // tokens that the decode kernels take at once
constexpr int TQ_BATCH_MAX  = 64;   // tokens up to which sm_90 and newer take the batch kernels
constexpr int TQ_PREFILL_BN = 128;  // tokens of a group of prefill activations
constexpr int TQ_MAX_SEGMENTS = 3;  // matrices that share one input (q, k, v)

// ---- activations --------------------------------------------------------------------------------
// x ~ d * q, q int8, one d for 128 columns of a token, rounded to nearest even, d = max|x| / 127.

// Of one block and token, for the decode kernels.
struct alignas(16) tq_act_head {
    float d;
    float sum;     // of the x themselves
    int   neg_sum; // -(sum of q); of one column by bits this and the next are something else (see below)
    int   zero;
};
// Digit t = 0..3 of q in base 4: q is the sum of digit * 4^t. The highest has the sign, -2..1, the others are 0..3.
__host__ __device__ constexpr int tq_digit(int q, int t) { return t == 3 ? q >> 6 : (q >> 2 * t) & 3; }

// Decode layout for one column, by bits (TQ_ONE_BY_BITS):
//   q:    [block][bit 0..7][t 0..3] words of 32 bits; bit 8i + 2p + h of a word is that bit of (two's complement) element
//         32p + 8t + 4h + i of the block, i, p, t = 0..3, h = 0..1
//   head: [block]; in place of neg_sum and zero four int16, t = 0..3, with -(sum of tq_digit(q, t))
// Decode layout for n = 1, 2, 4 or 8 columns (missing tokens are zero):
//   q:    [block][half 0..1][token][t 0..3] 16 bytes; element e of the block, with plane p = e / 32 and
//         i = e % 32, is in half p / 2, t = i / 8, byte 8*(p % 2) + i % 8
//   head: [block][token]
// Prefill layout, tokens in groups of TQ_PREFILL_BN (missing tokens may hold anything). A record has room for `width` tokens:
// up to 64 tokens are one group of 16, 32 or 64, so that a record is one copy; more are groups of 128. Token k of its group:
//   records [group][block] of tq_record_bytes(width): q as wgmma wants it (core matrices of 8 tokens x 16 bytes), then d.
//     Element e = 32p + 8t + 4h + i of the block (p, t, i = 0..3, h = 0..1) is byte
//       chunk*16*width + (k/8)*128 + (k%8)*16 + byte,  chunk = 4*(p%2) + 2*(i/2) + h,  byte = 4t + 2*(i%2) + p/2
//     (tq_record_q below): the order in which one PRMT for each four weights leaves the codes as -1, 0, 1.
//     d of token k is float tq_record_d(k) after the width*TQ_BLOCK bytes of q.
//   sums: the sum of the x of each block and token, as the B fragments of mma.m16n8k8 in two tf32 terms:
//     hi = the sum with its lowest 13 bits cleared, lo = sum - hi (exact), at floats tq_sums_at(...) and
//     tq_sums_at(...) + 2. Blocks beyond the last (nb % 8 != 0) need not be written.
__host__ __device__ constexpr int tq_record_width(int n) { return n <= 16 ? 16 : n <= 32 ? 32 : n <= 64 ? 64 : TQ_PREFILL_BN; }
__host__ __device__ constexpr int tq_record_bytes(int width) { return width * (TQ_BLOCK + 4); }

// Byte of a record where element e of token k (in its group) lies. Elements e, e + 1, e + 64, e + 65 (e even, e % 64 < 32)
// are bytes 0, 2, 1, 3 of one word. With lane s = 4p + t of 16 holding elements 32p + 8t .. + 7 packed in lo (h = 0) and hi
// (h = 1): other = shfl_xor(p < 2 ? hi : lo, 8), x = p < 2 ? lo : other, z = p < 2 ? other : hi, h = p / 2, then
// byte_perm(x, z, 0x5140) is the word of chunk 4*(p%2) + h and byte_perm(x, z, 0x7362) that of chunk 4*(p%2) + 2 + h, at 4t.
__host__ __device__ constexpr int tq_record_q(int width, int e, int k) {
    int p = e / 32, t = e % 32 / 8, h = e % 8 / 4, i = e % 4;
    return (4 * (p % 2) + 2 * (i / 2) + h) * 16 * width + k * 16 + 4 * t + 2 * (i % 2) + p / 2;
}
__host__ __device__ constexpr int tq_record_d(int k) { return k / 16 * 16 + k % 8 / 2 * 4 + k / 8 % 2 * 2 + k % 2; }
__host__ __device__ constexpr size_t tq_sums_at(int width, int group, int nb, int block, int k) {
    return (((size_t) group * ((nb + 7) / 8) + block / 8) * width + k) * 16 + block % 4 * 4 + block % 8 / 4;
}

// Whether one column is kept as bits: where tensor cores take these. From sm_100 on they are emulated, and one column has the
// layout of more. Only device code knows, which writes and reads them.
#ifndef TQ_ONE_BY_BITS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
#define TQ_ONE_BY_BITS 1
#else
#define TQ_ONE_BY_BITS 0
#endif
#endif

enum tq_act_layout { TQ_ACT_DECODE, TQ_ACT_PREFILL };

// Quantised activations of one site, in device memory.
struct tq_act {
    tq_act_layout layout;
    int       n;     // tokens
    int       cols;  // decode: columns of the layout (1, 2, 4, 8); prefill: tokens that the records have room for
    int       nb;    // blocks of a token: columns / 128
    uint8_t * q;     // decode: q; prefill: records
    void    * aux;   // decode: tq_act_head; prefill: sums (16-byte aligned)
};

static inline int tq_act_cols(int n) {
    const int width = tq_record_width(n);
    return n <= 2 ? n : n <= 4 ? 4 : n <= 8 ? 8 : (n + width - 1) / width * width;
}
static inline size_t tq_act_q_bytes(int n, int nb) {
    const int width = tq_record_width(n);
    return n <= TQ_DECODE_MAX ? (size_t) tq_act_cols(n) * nb * TQ_BLOCK : (size_t) (tq_act_cols(n) / width) * nb * tq_record_bytes(width);
}
static inline size_t tq_act_aux_bytes(int n, int nb) {
    return n <= TQ_DECODE_MAX ? (size_t) tq_act_cols(n) * nb * sizeof(tq_act_head) : (size_t) tq_act_cols(n) * ((nb + 7) / 8) * 64;
}

// tq-act.cu. What comes before the matrices of a site, all the way to quantised activations. Strides are in
// elements; every kernel takes part in programmatic dependent launch (waits before it touches memory).
// x[token*ld + column]
void tq_quantize(const float * x, int64_t ld, const tq_act & out, cudaStream_t stream);
// s = a + b (b may be null: s = a), y = s * rsqrt(mean(s^2) + eps) * w; s goes to `sum` and y to `norm` where these
// are not null, and y is quantised. All rows contiguous, of at most TQ_NORM_MAX_BLOCKS blocks. `sum` and `norm` may be
// a or b themselves.
constexpr int TQ_NORM_MAX_BLOCKS = 128;
void tq_quantize_norm(const float * a, const float * b, const float * w, float eps, float * sum, float * norm,
                      const tq_act & out, cudaStream_t stream);
// y = act(gate) * up; act 0: silu, 1: gelu (tanh form, as ggml's). y to `product` (contiguous) where not null.
void tq_quantize_glu(const float * gate, const float * up, int64_t ld_gate, int64_t ld_up, int act, float * product,
                     const tq_act & out, cudaStream_t stream);

// ---- products -----------------------------------------------------------------------------------
struct tq_segment {
    const uint8_t * w;    // tile form
    float         * y;    // y[token*ld + row]
    int64_t         ld;
    int             rows;
};

// tq-decode.cu: 1 to 8 tokens, up to 3 matrices with the same input, one launch. `scratch` is device memory of
// tq_decode_scratch_bytes(), zero before its first use, not shared by streams. sm_90 and newer stream through shared
// memory, sm_80 to 89 load to registers; y is written by one thread in one order, so results repeat to the bit.
size_t tq_decode_scratch_bytes();
void tq_decode(const tq_segment * segments, int n_segments, const tq_act & act, void * scratch, cudaStream_t stream);
// Experts, chosen on the device. Pair p (0 .. used*tokens - 1) is slot p % used of token p / used: expert
// ids[slot*ids_slot + token*ids_token] of `w`, experts `expert_bytes` apart; activations of one token in decode layout,
// those of the token (shared) or of the pair, nb*TQ_BLOCK bytes of q and nb heads apart; y[token*ld_token + slot*ld_slot + row].
struct tq_experts {
    const uint8_t * w; size_t expert_bytes; int rows; int nb;
    const int32_t * ids; int64_t ids_slot, ids_token; int used, tokens;
    const uint8_t * q; const tq_act_head * head; bool shared;
    float * y; int64_t ld_slot, ld_token;
};
void tq_decode_experts(const tq_experts & e, cudaStream_t stream);

// tq-batch.cu: 9 to 64 tokens, up to 3 matrices with the same input, one launch; sm_90 and newer. `scratch`: as above, of
// tq_batch_scratch_bytes(), which is 0 where the device or the build does not have these kernels. Results repeat to the bit.
size_t tq_batch_scratch_bytes();
void tq_batch(const tq_segment * segments, int n_segments, const tq_act & act, void * scratch, cudaStream_t stream);

// tq-prefill.cu (mma.sync, sm_80 and newer) and tq-prefill-wgmma.cu (sm_90a): more than 8 tokens, any number; where there is
// tq_batch, more than 64.
// `sms`: multiprocessors. tq_prefill chooses between the two; returns what it chose.
const char * tq_prefill(const tq_segment * segments, int n_segments, const tq_act & act, int cc, int sms, cudaStream_t stream);

// ---- tile form ----------------------------------------------------------------------------------
// tq-tile.cu. `offset`s and strides are in the file's bytes of the whole tensor (any alignment, so that uploads in
// pieces work). The rows that pad a matrix are not written, and may hold anything.
struct tq_shape { bool one1; int64_t columns, rows, matrices; }; // one1: TQ1_1 (30-byte blocks), not TQ2_1 (36); rows of one matrix
// `count` pieces of `bytes`, `stride` apart in the tensor, without gaps in the buffer they are moved to or from.
struct tq_pieces { size_t offset, bytes, count, stride; };
size_t tq_tile_tensor_bytes(const tq_shape & s);
// Pieces must not overlap. A byte that no TQ1_1 block may hold (FORMAT.md) can come back another.
void tq_to_tiles(const tq_shape & s, const uint8_t * file, const tq_pieces & p, uint8_t * tiles, cudaStream_t stream);
void tq_from_tiles(const tq_shape & s, const uint8_t * tiles, const tq_pieces & p, uint8_t * file, cudaStream_t stream);

enum tq_float { TQ_F32, TQ_F16, TQ_BF16 };
// Rows (a, b, c), a < n[0], b < n[1], c < n[2], of `columns` (a multiple of 128) weights from byte
// offset + row*stride[0] + b*stride[1] + c*stride[2], where row is a, or ids[a*ids_stride[0] + b*ids_stride[1] + c*ids_stride[2]].
// They go to y + a*y_stride[0] + b*y_stride[1] + c*y_stride[2], strides of y and of ids in elements.
struct tq_rows {
    int64_t columns, n[3], offset, stride[3];
    const int32_t * ids; // may be null
    int64_t ids_stride[3], y_stride[3];
};
void tq_dequantize(const tq_shape & s, const uint8_t * tiles, const tq_rows & rows, void * y, tq_float type, cudaStream_t stream);
