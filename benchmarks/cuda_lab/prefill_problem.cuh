// A product of more than 8 tokens for the lab: tile form and records made on the card from hashes, float64 sums, and the shapes
// of LLaMA's layers.
#pragma once
#include "lab.cuh"
#include "tq-prefill.cuh"

// ---- a problem: tile form and records made on the card, from hashes ---------------------------------------------
enum Kind { K_RANDOM, K_MINUS, K_ZERO, K_PLUS, K_ALPHA, K_MU, K_X, N_KINDS };
static const char * KINDS[] = {"random", "all -1", "all 0", "all +1", "huge alpha", "mu > alpha", "x extreme"};

__device__ int code_of(int row, int col, int kind, uint32_t seed) {
    return kind == K_MINUS ? 0 : kind == K_ZERO ? 1 : kind == K_PLUS ? 2 : hash32(((uint64_t) row << 20 | col) * 7 + seed) % 3;
}
__device__ half2 scales_of(int row, int block, int kind, uint32_t seed) {
    const uint64_t id = ((uint64_t) row << 20 | block) * 2 + seed;
    float alpha = 0.01f + 0.05f * unit(id), mu = 0.01f * (unit(id + 1) - 0.5f);
    if (kind == K_ALPHA) alpha = 60000.0f * unit(id);
    if (kind == K_MU) mu = 4.0f * (unit(id + 1) - 0.5f);
    return __floats2half2_rn(alpha, mu);
}
__device__ float x_of(int token, int col, int kind, uint32_t seed) {
    const uint64_t id = ((uint64_t) token << 20 | col) * 5 + seed;
    float v = unit(id) + unit(id + 1) + unit(id + 2) + unit(id + 3) - 2.0f;
    if (hash32(id + 4) % 997 == 0) v *= 40.0f;
    if (kind == K_X) v = (col / QK) % 2 ? 0.0f : (hash32(id) & 1) ? 127.0f : -127.0f;
    return v;
}

// grid (tiles, nb), 32 threads. Rows beyond M get code 1 and scales 0.
__global__ void make_tiles(uint8_t * out, int M, int nb, int kind, uint32_t seed) {
    const int tile = blockIdx.x, b = blockIdx.y, g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint8_t * p = out + ((size_t) tile * nb + b) * TQ_TILE_BYTES;
    for (int h = 0; h < 2; h++)
        for (int r = 0; r < 2; r++)
            for (int i = 0; i < 4; i++) {
                int v = 0, row = tile * 16 + g + 8 * r;
                for (int k = 0; k < 4; k++) {
                    const int c = row < M ? code_of(row, b * QK + 32 * k + 8 * t + 4 * h + i, kind, seed) : 1;
                    v |= (c == 2 ? 3 : c) << (2 * k); // as many ones as its value
                }
                p[threadIdx.x * 16 + 8 * h + 4 * r + i] = v;
            }
    if (t < 2) {
        const int row = tile * 16 + g + 8 * t;
        ((half2 *) (p + TQ_TILE_SCALES))[g * 2 + t] = row < M ? scales_of(row, b, kind, seed) : __floats2half2_rn(0, 0);
    }
}

// grid (nb, tokens rounded up), 128 threads: one element each. q8, ds: plain copies for the reference.
__global__ void make_records(tq_act act, int8_t * q8, float2 * ds, int kind, uint32_t seed) {
    __shared__ float s_max[128], s_sum[128];
    const int b = blockIdx.x, token = blockIdx.y, e = threadIdx.x, group = token / TQ_PREFILL_BN, k = token % TQ_PREFILL_BN;
    const float x = token < act.n ? x_of(token, b * QK + e, kind, seed) : 0.0f;
    s_max[e] = fabsf(x); s_sum[e] = x;
    __syncthreads();
    for (int o = 64; o; o /= 2) {
        if (e < o) { s_max[e] = fmaxf(s_max[e], s_max[e + o]); s_sum[e] += s_sum[e + o]; }
        __syncthreads();
    }
    const float d = s_max[0] / 127.0f, sum = s_sum[0];
    const int q = __float2int_rn(d > 0 ? x * (127.0f / s_max[0]) : 0.0f);
    const int width = min(act.cols, TQ_PREFILL_BN);
    uint8_t * record = act.q + ((size_t) group * act.nb + b) * tq_record_bytes(width);
    record[tq_record_q(width, e, k)] = q;
    q8[((size_t) token * act.nb + b) * QK + e] = q;
    if (e) return;
    ((float *) (record + width * TQ_BLOCK))[tq_record_d(k)] = d;
    const float hi = __uint_as_float(__float_as_uint(sum) & 0xffffe000u);
    float * s = (float *) act.aux + tq_sums_at(width, group, act.nb, b, k);
    s[0] = hi; s[2] = sum - hi;
    ds[(size_t) token * act.nb + b] = make_float2(d, sum);
}

// grid (rows, tokens), 128 threads: the sum and the sum of the blocks' magnitudes, in float64
__global__ void reference64(const int8_t * q8, const float2 * ds, double2 * out, int M, int nb, int kind, uint32_t seed) {
    __shared__ int part[4];
    const int row = blockIdx.x, token = blockIdx.y, e = threadIdx.x;
    double y = 0, mag = 0;
    for (int b = 0; b < nb; b++) {
        const int v = __reduce_add_sync(~0u, (code_of(row, b * QK + e, kind, seed) - 1) * q8[((size_t) token * nb + b) * QK + e]);
        if (e % 32 == 0) part[e / 32] = v;
        __syncthreads();
        const half2 s = scales_of(row, b, kind, seed);
        const float2 a = ds[(size_t) token * nb + b];
        const double dot = (double) __low2float(s) * a.x * (part[0] + part[1] + part[2] + part[3]), off = (double) __high2float(s) * a.y;
        y += dot + off; mag += fabs(dot) + fabs(off);
        __syncthreads();
    }
    if (e == 0) out[(size_t) token * M + row] = make_double2(y, mag);
}

struct Verdict { unsigned worst; int unwritten, touched; }; // worst: bits of a float
// grid (columns of y with its gaps, tokens with some beyond)
__global__ void judge(const float * y, int64_t ld, const double2 * ref, int M, int n, int tokens, Verdict * v) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (row >= ld) return;
    const unsigned bits = ((const unsigned *) y)[token * ld + row];
    if (row >= M || token >= n) { if (bits != 0xffffffffu) atomicAdd(&v->touched, 1); return; }
    const float f = __uint_as_float(bits);
    if (!(f == f)) { atomicAdd(&v->unwritten, 1); return; }
    const double2 r = ref[(size_t) token * M + row];
    atomicMax(&v->worst, __float_as_uint((float) (fabs(f - r.x) / (r.y + 1e-30))));
}

struct Activations {
    tq_act act; int8_t * q8; float2 * ds;
    Activations(int n, int nb, int kind, uint32_t seed) {
        act = {TQ_ACT_PREFILL, n, tq_act_cols(n), nb, nullptr, nullptr};
        CK(cudaMalloc(&act.q, tq_act_q_bytes(n, nb))); CK(cudaMalloc(&act.aux, tq_act_aux_bytes(n, nb)));
        CK(cudaMalloc(&q8, (size_t) act.cols * nb * QK)); CK(cudaMalloc(&ds, (size_t) act.cols * nb * sizeof(float2)));
        CK(cudaMemset(act.q, 0xff, tq_act_q_bytes(n, nb))); CK(cudaMemset(act.aux, 0xff, tq_act_aux_bytes(n, nb)));
        make_records<<<dim3(nb, act.cols), QK>>>(act, q8, ds, kind, seed);
        CK(cudaDeviceSynchronize());
    }
    ~Activations() { cudaFree(act.q); cudaFree(act.aux); cudaFree(q8); cudaFree(ds); }
    Activations(const Activations &) = delete;
};

// ---- layers -----------------------------------------------------------------------------------------------------
struct Shape { const char * name; int rows[3]; int cols; };
struct Model { const char * name; Shape shape[4]; };
static const Model MODELS[] = {
    {"65B", {{"qkv", {8192, 8192, 8192}, 8192}, {"o", {8192}, 8192}, {"gate+up", {22016, 22016}, 8192}, {"down", {8192}, 22016}}},
    {"13B", {{"qkv", {5120, 5120, 5120}, 5120}, {"o", {5120}, 5120}, {"gate+up", {13824, 13824}, 5120}, {"down", {5120}, 13824}}},
    {"7B", {{"qkv", {4096, 4096, 4096}, 4096}, {"o", {4096}, 4096}, {"gate+up", {11008, 11008}, 4096}, {"down", {4096}, 11008}}},
};
