// What one warp does with 16 rows x 128 columns: the layouts of the weights, and the arithmetic on them.
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
