// Decode kernels (1..8 tokens) for ternary matrices on the tensor cores, and what they are measured
// against. One thread block works on 16 rows; its warps share the columns between them.
//
// Lane L of a warp has g = L / 4 and t = L % 4, as the fragments of mma.sync have it: it holds
// weights of rows g and g + 8, activations of column g, and results of columns 2t and 2t + 1.
#pragma once
#include "lab.cuh"

// ---- instructions --------------------------------------------------------------------------------
__device__ __forceinline__ void mma_u8s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_b1(int (&c)[4], const uint4 & a, uint32_t b) {
    asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%8},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b));
}
__device__ __forceinline__ int dp4a_us(uint32_t a, uint32_t b, int c) {
    int d; asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); return d;
}
__device__ __forceinline__ void pdl_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void pdl_launch() { asm volatile("griddepcontrol.launch_dependents;"); }

// Weights are read once: past L1, and first out of L2.
template <class T> __device__ __forceinline__ T ld_stream(const void * p) { return __ldcs((const T *) p); }

__device__ __forceinline__ ActHead ld_head(const ActHead * h) {
    uint4 v = __ldg((const uint4 *) h);
    return {__uint_as_float(v.x), __uint_as_float(v.y), (int) v.z, 0};
}

// An int below 2^22 added to this, read as float, is exactly 1.5 * 2^23 + int: no slow conversion.
constexpr int MAGIC_INT = 0x4B400000;
constexpr float MAGIC_FLOAT = 12582912.0f;

struct Scales { float alpha[2], mu[2]; };  // of rows g and g + 8
__device__ __forceinline__ Scales unpack_scales(uint2 s) {
    float2 a = __half22float2(*(half2 *) &s.x), b = __half22float2(*(half2 *) &s.y);
    return {{a.x, b.x}, {a.y, b.y}};
}

// ---- TQ2_1, tile layout: 16 rows interleaved for the s8 fragments ---------------------------------
// [tile][block]{ codes [32 lanes] uint4, scales [8] (alpha, mu of row g; alpha, mu of row g + 8) }
// 576 bytes for 16 rows of a block, as many as in the file. Lane (g, t) has (row g, row g+8) x (qs bytes
// 8t..8t+3, 8t+4..8t+7), bit pairs as in the file: plane p of byte i is column 32p + i.
struct Tq2Tile {
    static constexpr int BLOCK_BYTES = 36;
    struct W { uint4 c; uint2 s; };
    static constexpr int SCALES = 512;
    static constexpr int STEP = 576;  // bytes from one block to the next
    static __device__ __forceinline__ void load_shared(W & w, const uint8_t * block, int lane) {
        w.c = *(const uint4 *) (block + lane * 16);
        w.s = *(const uint2 *) (block + 512 + (lane >> 2) * 8);
    }
    struct Ptr {
        const uint8_t *c, *s;
        __device__ __forceinline__ Ptr(const uint8_t * base, int tile, int nb, int lane, int) {
            c = base + (size_t) tile * nb * STEP + lane * 16;
            s = base + (size_t) tile * nb * STEP + 512 + (lane >> 2) * 8;
        }
        __device__ __forceinline__ void advance(int blocks) { c += (size_t) blocks * STEP; s += (size_t) blocks * STEP; }
        __device__ __forceinline__ void load(W & w, int u) const {
            w.c = ld_stream<uint4>(c + u * STEP);
            w.s = ld_stream<uint2>(s + u * STEP);
        }
    };
};

// The codes 0..2 of rows g (r = 0) and g + 8 as the A words of four m16n8k32: word 2i, 2i+1 for the i-th.
__device__ __forceinline__ void unpack_codes(uint32_t (&a)[2][8], const Tq2Tile::W & w) {
#pragma unroll
    for (int p = 0; p < 4; p++) {
        a[0][2 * p] = (w.c.x >> (2 * p)) & 0x03030303; a[1][2 * p] = (w.c.y >> (2 * p)) & 0x03030303;
        a[0][2 * p + 1] = (w.c.z >> (2 * p)) & 0x03030303; a[1][2 * p + 1] = (w.c.w >> (2 * p)) & 0x03030303;
    }
}

// ---- TQ2_1, the file's layout, read as it is ------------------------------------------------------
struct Tq2File {
    static constexpr int BLOCK_BYTES = 36;
    using W = Tq2Tile::W;
    static constexpr int STEP = 36;
    struct Ptr {
        const uint32_t *p0, *p1, *s0, *s1;
        __device__ __forceinline__ Ptr(const uint8_t * base, int tile, int nb, int lane, int M) {
            int g = lane >> 2, t = lane & 3;
            s0 = (const uint32_t *) (base + (size_t) min(tile * 16 + g, M - 1) * nb * STEP);
            s1 = (const uint32_t *) (base + (size_t) min(tile * 16 + g + 8, M - 1) * nb * STEP);
            p0 = s0 + 1 + 2 * t; p1 = s1 + 1 + 2 * t;
        }
        __device__ __forceinline__ void advance(int blocks) { p0 += blocks * 9; p1 += blocks * 9; s0 += blocks * 9; s1 += blocks * 9; }
        __device__ __forceinline__ void load(W & w, int u) const {
            w.c = make_uint4(__ldg(p0 + 9 * u), __ldg(p1 + 9 * u), __ldg(p0 + 9 * u + 1), __ldg(p1 + 9 * u + 1));
            w.s = make_uint2(__ldg(s0 + 9 * u), __ldg(s1 + 9 * u));
        }
    };
};

// ---- TQ1_1, tile layout ---------------------------------------------------------------------------
// Lane (g, t) has columns 32t..32t+31 of its two rows: 6 bytes of five base-3 digits and 2 codes of
// two bits for each. [tile][block]{ a [32] (word of row g, word of row g+8), c [32] (bytes 4, 5 of
// row g in bytes 0, 2, of row g+8 in bytes 1, 3), scales [8] 8 bytes, e [32] byte } = 480 bytes.
// A byte is ceil(256 v / 243): then (byte * 3^k) >> 8 is the number of its first k digits.
struct Tq1Tile {
    static constexpr int BLOCK_BYTES = 30;
    struct W { uint2 a; uint32_t c; uint32_t e; uint2 s; };
    static constexpr int SCALES = 384;
    static constexpr int STEP = 480;
    static __device__ __forceinline__ void load_shared(W & w, const uint8_t * block, int lane) {
        w.a = *(const uint2 *) (block + lane * 8);
        w.c = *(const uint32_t *) (block + 256 + lane * 4);
        w.s = *(const uint2 *) (block + 384 + (lane >> 2) * 8);
        w.e = block[448 + lane];
    }
    struct Ptr {
        const uint8_t *a, *c, *s, *e;
        __device__ __forceinline__ Ptr(const uint8_t * base, int tile, int nb, int lane, int) {
            const uint8_t * p = base + (size_t) tile * nb * STEP;
            a = p + lane * 8; c = p + 256 + lane * 4; s = p + 384 + (lane >> 2) * 8; e = p + 448 + lane;
        }
        __device__ __forceinline__ void advance(int blocks) {
            size_t d = (size_t) blocks * STEP; a += d; c += d; s += d; e += d;
        }
        __device__ __forceinline__ void load(W & w, int u) const {
            w.a = ld_stream<uint2>(a + u * STEP);
            w.c = ld_stream<uint32_t>(c + u * STEP);
            w.s = ld_stream<uint2>(s + u * STEP);
            w.e = ld_stream<uint8_t>(e + u * STEP);
        }
    };
};

// As above. Digit k of each byte is y_k - 3 y_(k-1), and as every such difference is 0..2, one 32-bit
// multiply-add does it for four bytes at once: nothing is borrowed from the byte above.
__device__ __forceinline__ void unpack_codes(uint32_t (&a)[2][8], const Tq1Tile::W & w) {
    uint32_t e = w.e | (w.e << 6), cl = w.c & 0x00ff00ff, ch = __byte_perm(w.c, 0, 0x4341);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        uint32_t v = r ? w.a.y : w.a.x, lo = v & 0x00ff00ff, hi = __byte_perm(v, 0, 0x4341), c = r ? ch : cl;
        uint32_t y1 = __byte_perm(lo * 3, hi * 3, 0x7351), y2 = __byte_perm(lo * 9, hi * 9, 0x7351),
                 y3 = __byte_perm(lo * 27, hi * 27, 0x7351), y4 = __byte_perm(lo * 81, hi * 81, 0x7351),
                 y5 = __byte_perm(lo * 243, hi * 243, 0x7351);
        a[r][0] = y1; a[r][1] = y2 - 3 * y1; a[r][2] = y3 - 3 * y2; a[r][3] = y4 - 3 * y3; a[r][4] = y5 - 3 * y4;
        uint32_t c12 = __byte_perm(c * 3, c * 9, 0x7531), c34 = __byte_perm(c * 27, c * 81, 0x7531),
                 c5e = __byte_perm(c * 243, (e >> (4 * r)) & 0x0303, 0x5431);
        a[r][5] = c12 * (1u - 3u * 65536u);
        a[r][6] = c34 * (1u - 3u * 65536u) - 3 * (c12 >> 16);
        a[r][7] = c5e - 3 * (c34 >> 16);
    }
}

// ---- arithmetic: s8 tensor cores on two-bit codes -------------------------------------------------
// The codes are masked where they lie, not shifted: plane p then counts 4^p fold, and one chain of
// multiply-adds puts the four sums together once per block.
template <int N> struct MathS8 {
    static constexpr int NA = N == 1 ? 1 : 2;      // results a lane keeps for each of its two rows
    static constexpr bool SUM_T = false;           // whether the four lanes of a row are to be added
    static constexpr int X_BYTES = 128;            // activations of one token and block
    static constexpr int TOKENS = N;
    static __device__ __forceinline__ int column(int t, int i) { return N == 1 ? t : 2 * t + i; }
    struct X { uint4 x0, x1; ActHead h[NA]; };
    static __device__ __forceinline__ void load_x(X & v, const uint4 * x, const ActHead * head, int lane) {
        int g = lane >> 2, t = lane & 3;
        const uint4 * xb = x + min(g, N - 1) * 4 + t;
        v.x0 = __ldg(xb); v.x1 = __ldg(xb + N * 4);
#pragma unroll
        for (int i = 0; i < NA; i++) v.h[i] = ld_head(head + min(2 * t + i, N - 1));
    }
    template <class W> static __device__ __forceinline__ void block(float (&acc)[2][NA], const W & w, const X & v_, int) {
        const uint4 &x0 = v_.x0, &x1 = v_.x1;
        const ActHead (&h)[NA] = v_.h;
        int c0[4] = {}, c1[4] = {}, c2[4] = {}, c3[4] = {};
        mma_u8s8(c0, w.c.x & 0x03030303, w.c.y & 0x03030303, w.c.z & 0x03030303, w.c.w & 0x03030303, x0.x, x0.y);
        mma_u8s8(c1, w.c.x & 0x0c0c0c0c, w.c.y & 0x0c0c0c0c, w.c.z & 0x0c0c0c0c, w.c.w & 0x0c0c0c0c, x0.z, x0.w);
        mma_u8s8(c2, w.c.x & 0x30303030, w.c.y & 0x30303030, w.c.z & 0x30303030, w.c.w & 0x30303030, x1.x, x1.y);
        mma_u8s8(c3, w.c.x & 0xc0c0c0c0, w.c.y & 0xc0c0c0c0, w.c.z & 0xc0c0c0c0, w.c.w & 0xc0c0c0c0, x1.z, x1.w);
        Scales s = unpack_scales(w.s);
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < NA; i++) {
                int j = r * 2 + i;
                int v = c3[j] + 4 * c2[j] + 16 * c1[j] + 64 * (c0[j] + h[i].neg_isum) + MAGIC_INT;
                float f = __int_as_float(v) - MAGIC_FLOAT;
                acc[r][i] += (s.alpha[r] * (h[i].d * 0.015625f)) * f;
                acc[r][i] += s.mu[r] * h[i].sum;
            }
    }
};

// ---- arithmetic: dp4a on the same registers -------------------------------------------------------
template <int N> struct MathDp4a {
    static constexpr int NA = N;
    static constexpr bool SUM_T = true;
    static constexpr int X_BYTES = 128;
    static constexpr int TOKENS = N;
    static __device__ __forceinline__ int column(int, int i) { return i; }
    struct X { uint4 x0[N], x1[N]; ActHead h[N]; };
    static __device__ __forceinline__ void load_x(X & v, const uint4 * x, const ActHead * head, int lane) {
        int t = lane & 3;
#pragma unroll
        for (int i = 0; i < N; i++) {
            v.x0[i] = __ldg(x + i * 4 + t); v.x1[i] = __ldg(x + (N + i) * 4 + t);
            v.h[i] = ld_head(head + i);
        }
    }
    template <class W> static __device__ __forceinline__ void block(float (&acc)[2][NA], const W & w, const X & v_, int lane) {
        int t = lane & 3;
        Scales s = unpack_scales(w.s);
#pragma unroll
        for (int i = 0; i < NA; i++) {
            const uint4 &x0 = v_.x0[i], &x1 = v_.x1[i];
            const ActHead & h = v_.h[i];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                uint32_t lo = r ? w.c.y : w.c.x, hi = r ? w.c.w : w.c.z;
                int s0 = dp4a_us(lo & 0x03030303, x0.x, dp4a_us(hi & 0x03030303, x0.y, t ? 0 : h.neg_isum));
                int s1 = dp4a_us(lo & 0x0c0c0c0c, x0.z, dp4a_us(hi & 0x0c0c0c0c, x0.w, 0));
                int s2 = dp4a_us(lo & 0x30303030, x1.x, dp4a_us(hi & 0x30303030, x1.y, 0));
                int s3 = dp4a_us(lo & 0xc0c0c0c0, x1.z, dp4a_us(hi & 0xc0c0c0c0, x1.w, MAGIC_INT));
                float f = __int_as_float(s3 + 4 * s2 + 16 * s1 + 64 * s0) - MAGIC_FLOAT;
                acc[r][i] += (s.alpha[r] * (h.d * 0.015625f)) * f;
                acc[r][i] += s.mu[r] * (t ? 0.0f : h.sum);
            }
        }
    }
};

// ---- arithmetic: b1 tensor cores, weights as two bit planes with c = u + v --------------------------
// One instruction is 16 rows x 128 columns x the 8 bits of one token's activations.
template <int N> struct MathB1 {
    static constexpr int NA = N;
    static constexpr bool SUM_T = true;
    static constexpr int X_BYTES = 128;
    static constexpr int TOKENS = N;
    static __device__ __forceinline__ int column(int, int i) { return i; }
    struct X { uint32_t x[N]; ActHead h[N]; };
    static __device__ __forceinline__ void load_x(X & v, const uint4 * x, const ActHead * head, int lane) {
#pragma unroll
        for (int i = 0; i < N; i++) { v.x[i] = __ldg((const uint32_t *) x + i * 32 + lane); v.h[i] = ld_head(head + i); }
    }
    template <class W> static __device__ __forceinline__ void block(float (&acc)[2][NA], const W & w, const X & v_, int lane) {
        int t = lane & 3;
        int w0 = 1 << (2 * t), w1 = t == 3 ? -128 : 2 << (2 * t);
        Scales s = unpack_scales(w.s);
#pragma unroll
        for (int i = 0; i < NA; i++) {
            uint32_t xb = v_.x[i];
            const ActHead & h = v_.h[i];
            int c[4] = {};
            mma_b1(c, w.c, xb);
            int start = MAGIC_INT + (t ? 0 : h.neg_isum);
            float sum = t ? 0.0f : h.sum;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float f = __int_as_float(c[2 * r] * w0 + (c[2 * r + 1] * w1 + start)) - MAGIC_FLOAT;
                acc[r][i] += (s.alpha[r] * h.d) * f;
                acc[r][i] += s.mu[r] * sum;
            }
        }
    }
};

// ---- arithmetic: s8 tensor cores on base-3 bytes ---------------------------------------------------
// y_k = (byte * 3^k) >> 8 is the number of the first k digits, so digit k is y_k - 3 y_(k-1) and
//   sum_k d_k x_k = sum_k y_k x_k - 3 sum_k y_k x_(k+1).
// The second sum is one more column of B: no digit is ever taken out.
template <int N> struct MathTq1 {
    static constexpr int NG = N > 4 ? 2 : 1;       // column groups of four tokens
    static constexpr int NA = NG;
    static constexpr bool SUM_T = false;
    static constexpr int X_BYTES = 256;
    static constexpr int TOKENS = N;
    static __device__ __forceinline__ int column(int t, int i) { return t + 4 * i; }
    struct X { uint4 x0[NG], x1[NG]; ActHead h[NG]; };
    static __device__ __forceinline__ void load_x(X & v, const uint4 * x, const ActHead * head, int lane) {
        int g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int i = 0; i < NG; i++) {
            const uint4 * xb = x + min(g + 8 * i, 2 * N - 1) * 4 + t;
            v.x0[i] = __ldg(xb); v.x1[i] = __ldg(xb + 2 * N * 4);
            v.h[i] = ld_head(head + min(t + 4 * i, N - 1));
        }
    }
    template <class W> static __device__ __forceinline__ void block(float (&acc)[2][NA], const W & w, const X & v_, int) {
        int c[NG][4];
        const ActHead (&h)[NG] = v_.h;
        const uint4 (&x0)[NG] = v_.x0, (&x1)[NG] = v_.x1;
#pragma unroll
        for (int i = 0; i < NG; i++) {
            c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0;
        }
        uint32_t al = w.a.x & 0x00ff00ff, ah = __byte_perm(w.a.x, 0, 0x4341);
        uint32_t bl = w.a.y & 0x00ff00ff, bh = __byte_perm(w.a.y, 0, 0x4341);
        uint32_t cl = w.c & 0x00ff00ff, ch = __byte_perm(w.c, 0, 0x4341);
        auto ya = [&](int p) { return __byte_perm(al * p, ah * p, 0x7351); };
        auto yb = [&](int p) { return __byte_perm(bl * p, bh * p, 0x7351); };
        auto go = [&](uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, bool second, bool upper) {
#pragma unroll
            for (int i = 0; i < NG; i++) {
                const uint4 & v = second ? x1[i] : x0[i];
                mma_u8s8(c[i], a0, a1, a2, a3, upper ? v.z : v.x, upper ? v.w : v.y);
            }
        };
        go(ya(3), yb(3), ya(9), yb(9), false, false);
        go(ya(27), yb(27), ya(81), yb(81), false, true);
        go(ya(243), yb(243), __byte_perm(cl * 3, cl * 9, 0x7531), __byte_perm(ch * 3, ch * 9, 0x7531), true, false);
        // e: bits 0-1, 2-3 are the two codes of row g, bits 4-5, 6-7 those of row g + 8
        uint32_t e = w.e | (w.e << 6);                  // codes at bits 0-1 and 8-9 (row g), 4-5 and 12-13
        uint32_t e0 = e & 0x0303, e1 = (e >> 4) & 0x0303;
        go(__byte_perm(cl * 27, cl * 81, 0x7531), __byte_perm(ch * 27, ch * 81, 0x7531),
           __byte_perm(cl * 243, e0, 0x5431), __byte_perm(ch * 243, e1, 0x5431), true, true);
        Scales s = unpack_scales(w.s);
#pragma unroll
        for (int i = 0; i < NG; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float f = __int_as_float(c[i][2 * r] - 3 * c[i][2 * r + 1] + (h[i].neg_isum + MAGIC_INT)) - MAGIC_FLOAT;
                acc[r][i] += (s.alpha[r] * h[i].d) * f;
                acc[r][i] += s.mu[r] * h[i].sum;
            }
    }
};

// ---- arithmetic: s8 tensor cores on codes taken out one by one (either type) ------------------------
template <int N> struct MathCodes : MathS8<N> {
    using Base = MathS8<N>;
    using typename Base::X;
    static constexpr int NA = Base::NA;
    template <class W> static __device__ __forceinline__ void block(float (&acc)[2][NA], const W & w, const X & v, int) {
        uint32_t a[2][8];
        unpack_codes(a, w);
        int c[4] = {};
        mma_u8s8(c, a[0][0], a[1][0], a[0][1], a[1][1], v.x0.x, v.x0.y);
        mma_u8s8(c, a[0][2], a[1][2], a[0][3], a[1][3], v.x0.z, v.x0.w);
        mma_u8s8(c, a[0][4], a[1][4], a[0][5], a[1][5], v.x1.x, v.x1.y);
        mma_u8s8(c, a[0][6], a[1][6], a[0][7], a[1][7], v.x1.z, v.x1.w);
        Scales s = unpack_scales(w.s);
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < NA; i++) {
                float f = __int_as_float(c[r * 2 + i] + (v.h[i].neg_isum + MAGIC_INT)) - MAGIC_FLOAT;
                acc[r][i] += (s.alpha[r] * v.h[i].d) * f;
                acc[r][i] += s.mu[r] * v.h[i].sum;
            }
    }
};

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

// ---- the same with bulk copies: every warp keeps a ring of its own in shared memory -----------------
// Thread blocks stay for the whole kernel; each takes a run of row groups (RT tiles of 16 rows), its
// warps take the chunks of U blocks in turn, and one more warp adds the warps' sums up, so that the
// streaming never stops at the end of a row.
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

template <class Format, class Math, int NW, int U, int S, int RT>
struct Ring {
    static constexpr int STAGE = RT * U * Format::STEP, N = Math::TOKENS;
    static constexpr int PART = NW * RT * 16 * N;  // floats
    static constexpr int SHARED = NW * S * STAGE + 2 * PART * 4 + (NW * S + 4) * 8;
};

template <class Format, class Math, int NW, int U, int S, int RT, int MIN_CTAS>
__global__ void __launch_bounds__(NW * 32 + 32, MIN_CTAS)
decode_ring(const uint8_t * __restrict__ weights, const uint4 * __restrict__ x, const ActHead * __restrict__ head,
            float * __restrict__ y, int M, int nb) {
    using R = Ring<Format, Math, NW, U, S, RT>;
    constexpr int NA = Math::NA, n = Math::TOKENS, XS = n * Math::X_BYTES / 16;
    extern __shared__ __align__(128) uint8_t shared[];
    float * part = (float *) (shared + NW * S * R::STAGE);
    uint64_t * bars = (uint64_t *) (part + 2 * R::PART), *full = bars + NW * S, *empty = full + 2;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    int tiles = (M + 15) / 16, groups = (tiles + RT - 1) / RT;
    int first = (int) ((long) groups * blockIdx.x / gridDim.x), count = (int) ((long) groups * (blockIdx.x + 1) / gridDim.x) - first;
    int chunks = (nb + U - 1) / U, total = count * chunks;
    if (threadIdx.x == 0) {
        for (int i = 0; i < NW * S; i++) mbar_init(bars + i, 1);
        for (int i = 0; i < 2; i++) { mbar_init(full + i, NW); mbar_init(empty + i, 1); }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    pdl_launch();
    if (warp == NW) {  // adds up the warps' sums of each group
        for (int i = 0; i < count; i++) {
            float * p = part + (i & 1) * R::PART;
            mbar_wait(full + (i & 1), (i >> 1) & 1);
            for (int j = lane; j < RT * 16 * n; j += 32) {
                float v = 0;
#pragma unroll
                for (int k = 0; k < NW; k++) v += p[k * RT * 16 * n + j];
                int row = (first + i) * RT * 16 + j % (RT * 16);
                if (row < M) y[(size_t) (j / (RT * 16)) * M + row] = v;
            }
            __syncwarp();
            if (lane == 0) mbar_arrive(empty + (i & 1));
        }
        return;
    }
    uint8_t * ring = shared + warp * S * R::STAGE;
    uint64_t * ready = bars + warp * S;
    auto issue = [&](int q, int slot) {  // lane 0 only
        int gi = q / chunks, c = q % chunks, blocks = min(U, nb - c * U), tile0 = (first + gi) * RT;
        int live = min(RT, tiles - tile0);
        mbar_expect(ready + slot, live * blocks * Format::STEP);
        for (int r = 0; r < live; r++)
            bulk_copy(ring + slot * R::STAGE + r * U * Format::STEP,
                      weights + ((size_t) (tile0 + r) * nb + c * U) * Format::STEP, blocks * Format::STEP, ready + slot);
    };
    if (lane == 0)
        for (int s = 0; s < S; s++)
            if (warp + s * NW < total) issue(warp + s * NW, s);
    pdl_wait();
    int q = warp, slot = 0, phase = 0;
    for (int gi = 0; gi < count; gi++) {
        float acc[RT][2][NA] = {};
        for (; q < (gi + 1) * chunks; q += NW) {
            int c = q - gi * chunks, blocks = nb - c * U;
            typename Math::X v[U];
#pragma unroll
            for (int u = 0; u < U; u++)
                if (u < blocks) Math::load_x(v[u], x + (size_t) (c * U + u) * XS, head + (c * U + u) * n, lane);
            mbar_wait(ready + slot, phase);
#pragma unroll
            for (int u = 0; u < U; u++)
                if (u < blocks)
#pragma unroll
                    for (int r = 0; r < RT; r++) {
                        typename Format::W w;
                        Format::load_shared(w, ring + slot * R::STAGE + (r * U + u) * Format::STEP, lane);
                        Math::block(acc[r], w, v[u], lane);
                    }
            __syncwarp();
            if (lane == 0 && q + S * NW < total) issue(q + S * NW, slot);
            if (++slot == S) { slot = 0; phase ^= 1; }
        }
        if (gi >= 2) mbar_wait(empty + (gi & 1), ((gi >> 1) - 1) & 1);
        float * p = part + (gi & 1) * R::PART + warp * RT * 16 * n;
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
            for (int k = 0; k < 2; k++)
#pragma unroll
                for (int i = 0; i < NA; i++) {
                    float a = acc[r][k][i];
                    if (Math::SUM_T) { a += __shfl_xor_sync(~0u, a, 1); a += __shfl_xor_sync(~0u, a, 2); }
                    int col = Math::column(t, i);
                    if (col < n && (!Math::SUM_T || t == 0)) p[col * RT * 16 + r * 16 + g + 8 * k] = a;
                }
        __syncwarp();
        if (lane == 0) mbar_arrive(full + (gi & 1));
    }
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

// ---- activations: float to the layouts above; one thread per element, one thread block per (block, token)
enum ActLayout { ACT_S8, ACT_B1, ACT_TQ1, ACT_TQ1_PLAIN };  // the last: base-3 order, x only

// Where element e of a block lies for the s8 fragments: [half][token][t] 16 bytes.
__device__ __forceinline__ size_t s8_offset(int b, int n, int tok, int e) {
    int plane = e >> 5, i = e & 31, t = i >> 3;
    return (((size_t) b * 2 + (plane >> 1)) * n + tok) * 64 + t * 16 + (plane & 1) * 8 + (i & 7);
}
// Where element e lies for the base-3 fragments: columns 2 tok (x) and 2 tok + 1 (the next digit's x).
__device__ __forceinline__ size_t tq1_offset(int b, int n, int col, int t, int word, int byte) {
    return (((size_t) b * 2 + (word >> 2)) * 2 * n + col) * 64 + t * 16 + (word & 3) * 4 + byte;
}
__device__ __forceinline__ void tq1_slot(int i, int & word, int & byte) {  // i = e % 32
    if (i >= 30) { word = 7; byte = i - 28; return; }
    int j = i / 5, k = i % 5;
    if (j < 4) { word = k; byte = j; return; }
    word = 5 + k / 2; byte = (k & 1) * 2 + (j - 4);
}

template <int LAYOUT>
__global__ void __launch_bounds__(128) quantize_act(const float * __restrict__ x, uint8_t * __restrict__ out,
                                                    ActHead * __restrict__ head, int K, int n, float * zero, int zeros) {
    __shared__ float s_max[4], s_sum[4]; __shared__ int s_isum[4]; __shared__ int8_t s_q[QK];
    pdl_launch();
    pdl_wait();
    for (int i = (blockIdx.y * gridDim.x + blockIdx.x) * 128 + threadIdx.x; i < zeros; i += gridDim.x * gridDim.y * 128) zero[i] = 0.0f;
    int b = blockIdx.x, tok = blockIdx.y, e = threadIdx.x, warp = e >> 5, lane = e & 31;
    float v = x[(size_t) tok * K + b * QK + e], amax = fabsf(v), sum = v;
    for (int o = 16; o; o >>= 1) { amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, o)); sum += __shfl_xor_sync(~0u, sum, o); }
    if (lane == 0) { s_max[warp] = amax; s_sum[warp] = sum; }
    __syncthreads();
    amax = fmaxf(fmaxf(s_max[0], s_max[1]), fmaxf(s_max[2], s_max[3]));
    float inv = amax > 0 ? 127.0f / amax : 0.0f;
    int q = __float2int_rn(v * inv), isum = __reduce_add_sync(~0u, q);
    if (lane == 0) s_isum[warp] = isum;
    s_q[e] = q;
    __syncthreads();
    if (e == 0)
        head[b * n + tok] = ActHead{amax / 127.0f, s_sum[0] + s_sum[1] + s_sum[2] + s_sum[3],
                                    -(s_isum[0] + s_isum[1] + s_isum[2] + s_isum[3]), 0};
    if (LAYOUT == ACT_S8) out[s8_offset(b, n, tok, e)] = q;
    if (LAYOUT == ACT_B1) {
        for (int bit = 0; bit < 8; bit++) {
            uint32_t m = __ballot_sync(~0u, (q >> bit) & 1);
            if (lane == bit) ((uint32_t *) out)[((size_t) b * n + tok) * 32 + bit * 4 + warp] = m;
        }
    }
    if (LAYOUT == ACT_TQ1_PLAIN) {
        int word, byte;
        tq1_slot(lane, word, byte);
        out[(((size_t) b * 2 + (word >> 2)) * n + tok) * 64 + warp * 16 + (word & 3) * 4 + byte] = q;
    }
    if (LAYOUT == ACT_TQ1) {
        int word, byte;
        tq1_slot(lane, word, byte);
        out[tq1_offset(b, n, 2 * tok, warp, word, byte)] = q;
        bool has_next = lane < 30 && lane % 5 < 4;
        out[tq1_offset(b, n, 2 * tok + 1, warp, word, byte)] = has_next ? s_q[e + 1] : 0;
    }
}

// ---- packers (what conversion at load would do; here from the unpacked codes) ------------------------
enum WeightLayout { W_FILE2, W_TILE2, W_PLANES, W_TILE1 };

__device__ inline int code_at(const uint8_t * c, int M, int K, int row, int col) {
    return row < M ? c[(size_t) row * K + col] : 1;
}
// One warp per (tile or row, block).
template <int LAYOUT>
__global__ void pack(const uint8_t * c, const half2 * s, uint8_t * out, int M, int K) {
    int nb = K / QK, b = blockIdx.y, lane = threadIdx.x, g = lane >> 2, t = lane & 3;
    if (LAYOUT == W_FILE2) {
        int row = blockIdx.x; uint8_t * p = out + ((size_t) row * nb + b) * 36;
        if (lane == 0) *(half2 *) p = s[(size_t) row * nb + b];
        int v = 0;
        for (int k = 0; k < 4; k++) v |= code_at(c, M, K, row, b * QK + 32 * k + lane) << (2 * k);
        p[4 + lane] = v;
        return;
    }
    int tile = blockIdx.x, stride = LAYOUT == W_TILE1 ? 480 : 576;
    uint8_t * p = out + (size_t) tile * nb * stride;
    int rows[2] = {tile * 16 + g, tile * 16 + g + 8};
    p += (size_t) b * stride;
    int sc = LAYOUT == W_TILE1 ? 384 : 512;
    if (t < 2) {
        half2 z = rows[t] < M ? s[(size_t) rows[t] * nb + b] : __floats2half2_rn(0, 0);
        *(half2 *) (p + sc + g * 8 + t * 4) = z;
    }
    if (LAYOUT == W_TILE2)
        for (int half_ = 0; half_ < 2; half_++)
            for (int r = 0; r < 2; r++)
                for (int i = 0; i < 4; i++) {
                    int v = 0;
                    for (int k = 0; k < 4; k++) v |= code_at(c, M, K, rows[r], b * QK + 32 * k + 8 * t + 4 * half_ + i) << (2 * k);
                    p[lane * 16 + half_ * 8 + r * 4 + i] = v;
                }
    if (LAYOUT == W_PLANES)
        for (int r = 0; r < 2; r++) {
            uint32_t u = 0, v = 0;
            for (int i = 0; i < 32; i++) {
                int k = code_at(c, M, K, rows[r], b * QK + 32 * t + i);
                u |= (uint32_t) (k > 0) << i; v |= (uint32_t) (k > 1) << i;
            }
            uint32_t * w = (uint32_t *) (p + lane * 16);
            w[r] = u; w[2 + r] = v;
        }
    if (LAYOUT == W_TILE1) {
        int e = 0;
        for (int r = 0; r < 2; r++) {
            for (int j = 0; j < 6; j++) {
                int v = 0;
                for (int k = 0; k < 5; k++) v = v * 3 + code_at(c, M, K, rows[r], b * QK + 32 * t + 5 * j + k);
                v = (v * 256 + 242) / 243;
                if (j < 4) p[lane * 8 + r * 4 + j] = v;
                else p[256 + lane * 4 + (j - 4) * 2 + r] = v;
            }
            for (int i = 0; i < 2; i++) e |= code_at(c, M, K, rows[r], b * QK + 32 * t + 30 + i) << (4 * r + 2 * i);
        }
        p[448 + lane] = e;
    }
}
