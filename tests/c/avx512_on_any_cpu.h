// AVX-512 by portable C, so that tests/test_c_kernels.py checks those kernels on processors without it. Included before
// tq-avx512.c and tq-avx512-vnni.c, whose own <immintrin.h> is an empty file then. SIMDe (package libsimde-dev) has most of
// the instructions, here are the others. What the kernels compute is checked, not what the compiler makes of them.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#include <simde/x86/gfni.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint64_t __mmask64;
typedef uint16_t __mmask16;

#define target(x) unused       // of __attribute__: the compiler must not use the instructions
#define always_inline unused   // the portable forms are long, inlined they take minutes to compile
#define __builtin_cpu_supports(x) 1
#define __asm__(...) (acc = simde_mm512_dpbusd_epi32(acc, codes, q)) // the one instruction that is written as such

static inline float any_half(uint16_t h) {
    _Float16 v;
    memcpy(&v, &h, sizeof(v));
    return (float) v;
}
#define _cvtsh_ss any_half

// Lanes of a vector as an array: from it and back
#define ANY_IN(T, n, v, from) T v[n]; memcpy(v, &(from), sizeof(v))
#define ANY_OUT(V, v) V out; memset(&out, 0, sizeof(out)); memcpy(&out, v, sizeof(v)); return out

#define _mm512_cvtepi32_epi16 any_cvtepi32_epi16
static inline simde__m256i any_cvtepi32_epi16(simde__m512i a) {
    ANY_IN(int32_t, 16, v, a);
    int16_t r[16];
    for (int i = 0; i < 16; ++i) { r[i] = (int16_t) v[i]; }
    ANY_OUT(simde__m256i, r);
}
#define _mm512_cvtepi32_epi8 any_cvtepi32_epi8
static inline simde__m128i any_cvtepi32_epi8(simde__m512i a) {
    ANY_IN(int32_t, 16, v, a);
    int8_t r[16];
    for (int i = 0; i < 16; ++i) { r[i] = (int8_t) v[i]; }
    ANY_OUT(simde__m128i, r);
}
#define _mm512_cvtepi32_ps any_cvtepi32_ps
static inline simde__m512 any_cvtepi32_ps(simde__m512i a) {
    ANY_IN(int32_t, 16, v, a);
    float r[16];
    for (int i = 0; i < 16; ++i) { r[i] = (float) v[i]; }
    ANY_OUT(simde__m512, r);
}
#define _mm512_cvtps_epi32 any_cvtps_epi32
static inline simde__m512i any_cvtps_epi32(simde__m512 a) {
    ANY_IN(float, 16, v, a);
    int32_t r[16];
    for (int i = 0; i < 16; ++i) { r[i] = (int32_t) nearbyintf(v[i]); }
    ANY_OUT(simde__m512i, r);
}
#define _mm512_cvtph_ps any_cvtph_ps
static inline simde__m512 any_cvtph_ps(simde__m256i a) {
    ANY_IN(uint16_t, 16, v, a);
    float r[16];
    for (int i = 0; i < 16; ++i) { r[i] = any_half(v[i]); }
    ANY_OUT(simde__m512, r);
}
#define _mm512_permute_ps any_permute_ps
static inline simde__m512 any_permute_ps(simde__m512 a, int imm) {
    ANY_IN(float, 16, v, a);
    float r[16];
    for (int i = 0; i < 16; ++i) { r[i] = v[i / 4 * 4 + (imm >> (2 * (i % 4)) & 3)]; }
    ANY_OUT(simde__m512, r);
}
#define _mm512_shuffle_f32x4 any_shuffle_f32x4
static inline simde__m512 any_shuffle_f32x4(simde__m512 a, simde__m512 b, int imm) {
    ANY_IN(float, 16, v, a);
    ANY_IN(float, 16, w, b);
    float r[16];
    for (int i = 0; i < 16; ++i) { r[i] = (i < 8 ? v : w)[4 * (imm >> (2 * (i / 4)) & 3) + i % 4]; }
    ANY_OUT(simde__m512, r);
}
// What is masked is not read
#define _mm512_mask_loadu_epi8 any_mask_loadu_epi8
static inline simde__m512i any_mask_loadu_epi8(simde__m512i a, uint64_t mask, const void * p) {
    ANY_IN(uint8_t, 64, v, a);
    for (int i = 0; i < 64; ++i) {
        if (mask >> i & 1) { v[i] = ((const uint8_t *) p)[i]; }
    }
    ANY_OUT(simde__m512i, v);
}
#define _mm512_maskz_loadu_epi8(mask, p) any_mask_loadu_epi8(simde_mm512_setzero_si512(), mask, p)
#define _mm512_mask_i32gather_epi32 any_mask_i32gather_epi32
static inline simde__m512i any_mask_i32gather_epi32(simde__m512i a, uint16_t mask, simde__m512i index, const void * p, int scale) {
    ANY_IN(int32_t, 16, v, a);
    ANY_IN(int32_t, 16, at, index);
    for (int i = 0; i < 16; ++i) {
        if (mask >> i & 1) { memcpy(v + i, (const char *) p + (int64_t) at[i] * scale, 4); }
    }
    ANY_OUT(simde__m512i, v);
}
#define _mm512_reduce_add_ps any_reduce_add_ps
static inline float any_reduce_add_ps(simde__m512 a) {
    ANY_IN(float, 16, v, a);
    for (int n = 8; n; n /= 2) {
        for (int i = 0; i < n; ++i) { v[i] += v[i + n]; }
    }
    return v[0];
}
#define _mm512_reduce_add_epi32 any_reduce_add_epi32
static inline int32_t any_reduce_add_epi32(simde__m512i a) {
    ANY_IN(int32_t, 16, v, a);
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) { sum += v[i]; }
    return sum;
}
#define _mm512_reduce_max_epi32 any_reduce_max_epi32
static inline int32_t any_reduce_max_epi32(simde__m512i a) {
    ANY_IN(int32_t, 16, v, a);
    int32_t most = v[0];
    for (int i = 1; i < 16; ++i) { most = v[i] > most ? v[i] : most; }
    return most;
}
