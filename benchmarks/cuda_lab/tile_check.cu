// Checks tile form (overlay's tq-tile.cu) against a reference on the host that is written from the comments of
// tq-kernels.cuh and from FORMAT.md: uploads and downloads in pieces that begin and end at any byte, uploads in 2D, and
// rows to floats, contiguous, strided, permuted and by index. Memory is poisoned, so what should stay must stay.
//
//   SRC=../../third_party/llama.cpp/overlay/ggml/src/ggml-cuda/tq/kernels
//   nvcc -std=c++17 -O2 -arch=sm_90 -cudart static -I$SRC tile_check.cu $SRC/tq-tile.cu -o tile_check
//   ./tile_check [check small|tiny]   # checks, then the rate of an upload's conversion; "small": checks alone, "tiny": one
//                                     # shape, for compute-sanitizer (../h200/sanitize.sh)
#include "tq-kernels.cuh"

#include <cuda_bf16.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

static void cuda(cudaError_t e, int line) {
    if (e != cudaSuccess) {
        printf("line %d: %s\n", line, cudaGetErrorString(e));
        exit(1);
    }
}
#define CUDA(call) cuda(call, __LINE__)

using Bytes = std::vector<uint8_t>;

static unsigned rnd() {
    static unsigned s = 12345;
    s = s * 1664525u + 1013904223u;
    return s >> 8;
}

template <typename T> struct Device {
    T * p = nullptr;
    size_t n;
    explicit Device(size_t n_) : n(n_) { CUDA(cudaMalloc((void **) &p, std::max<size_t>(n, 1) * sizeof(T))); }
    ~Device() { cudaFree(p); }
    void put(const std::vector<T> & v) { CUDA(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice)); }
    void fill(int byte) { CUDA(cudaMemset(p, byte, n * sizeof(T))); }
    std::vector<T> get() const {
        std::vector<T> v(n);
        CUDA(cudaDeviceSynchronize());
        CUDA(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }
};

static int64_t blocks_of(const tq_shape & s) { return s.columns / 128; }
static int64_t block_bytes(const tq_shape & s) { return s.one1 ? 30 : 36; }
static int64_t file_bytes(const tq_shape & s) { return blocks_of(s) * s.rows * s.matrices * block_bytes(s); }

// A random file, code by code.
static Bytes make_file(const tq_shape & s) {
    Bytes f(file_bytes(s));
    for (int64_t b = 0; b < (int64_t) f.size() / block_bytes(s); b++) {
        uint8_t * p = &f[b * block_bytes(s)];
        const half a = __float2half((rnd() % 2000) * 1e-3f), m = __float2half((int) (rnd() % 2000) * 1e-3f - 1.0f);
        memcpy(p, &a, 2);
        memcpy(p + 2, &m, 2);
        int c[128];
        for (int e = 0; e < 128; e++) {
            c[e] = b % 7 == 3 ? 2 : rnd() % 3; // some blocks have the largest bytes that can be
        }
        if (!s.one1) {
            for (int l = 0; l < 32; l++) p[4 + l] = c[l] | c[32 + l] << 2 | c[64 + l] << 4 | c[96 + l] << 6;
        } else {
            for (int i = 0; i < 26; i++) {
                p[4 + i] = c[i] + 3 * c[32 + i] + 9 * c[64 + i] + 27 * c[96 + i] + 81 * (i < 24 ? c[(i % 4) * 32 + 26 + i / 4] : 0);
            }
        }
    }
    return f;
}
// Code of element e of a block of the file.
static int code(const tq_shape & s, const uint8_t * p, int e) {
    const int lane = e % 32, plane = e / 32;
    if (!s.one1) return p[4 + lane] >> (2 * plane) & 3;
    if (lane >= 26) return p[4 + 4 * (lane - 26) + plane] / 81;
    int v = p[4 + lane];
    for (int i = 0; i < plane; i++) v /= 3;
    return v % 3;
}
static uint8_t * tile_of(const tq_shape & s, uint8_t * tiles, int64_t matrix, int64_t row, int64_t block) {
    const int64_t tile_rows = (s.rows + 15) / 16;
    return tiles + ((matrix * tile_rows + row / 16) * blocks_of(s) + block) * 576;
}
constexpr int BITS[3] = { 0, 1, 3 }; // of a code in tile form: as many ones as its value
// Tile form of a file, over what `tiles` holds.
static void make_tiles(const tq_shape & s, const Bytes & file, Bytes & tiles) {
    for (int64_t m = 0; m < s.matrices; m++)
        for (int64_t row = 0; row < s.rows; row++)
            for (int64_t b = 0; b < blocks_of(s); b++) {
                const uint8_t * p = &file[((m * s.rows + row) * blocks_of(s) + b) * block_bytes(s)];
                uint8_t * t = tile_of(s, tiles.data(), m, row, b);
                const int g = row % 8, r = row / 8 % 2;
                memcpy(t + 512 + 8 * g + 4 * r, p, 4);
                for (int e = 0; e < 128; e++) {
                    // plane p of byte i of half h of lane (g, t) is column 32p + 8t + 4h + i
                    const int plane = e / 32, lane = e % 32 / 8, h = e % 8 / 4, i = e % 4;
                    uint8_t & byte = t[16 * (4 * g + lane) + 8 * h + 4 * r + i];
                    byte = (byte & ~(3 << (2 * plane))) | BITS[code(s, p, e)] << (2 * plane);
                }
            }
}

static int failures = 0;
static void report(const char * what, const tq_shape & s, size_t wrong, size_t of) {
    if (wrong) {
        failures++;
    }
    printf("%-34s tq%d_1 %5lld x %4lld x %lld: %zu of %zu wrong\n", what, s.one1 ? 1 : 2, (long long) s.columns, (long long) s.rows,
           (long long) s.matrices, wrong, of);
}
template <typename T> static size_t different(const std::vector<T> & a, const std::vector<T> & b) {
    size_t n = a.size() != b.size();
    for (size_t i = 0; i < std::min(a.size(), b.size()); i++) n += memcmp(&a[i], &b[i], sizeof(T)) != 0;
    return n;
}

// In pieces of growing, odd lengths, so that pieces begin and end at every byte of a block; in any order.
static void check_pieces(const tq_shape & s) {
    const Bytes file = make_file(s);
    Device<uint8_t> tiles(tq_tile_tensor_bytes(s)), staging(file.size());
    for (int poison : { 0x00, 0xff, 0x5a }) {
        Bytes want(tiles.n, poison);
        make_tiles(s, file, want);
        tiles.fill(poison);
        std::vector<std::pair<size_t, size_t>> pieces;
        for (size_t at = 0, n = 1; at < file.size(); at += n, n = n % 97 + 1) pieces.push_back({ at, std::min(n, file.size() - at) });
        for (size_t i = pieces.size(); i > 1; i--) std::swap(pieces[i - 1], pieces[rnd() % i]);
        staging.put(file);
        for (auto [at, n] : pieces) tq_to_tiles(s, staging.p + at, { at, n, 1, 0 }, tiles.p, 0);
        CUDA(cudaGetLastError());
        report("to tiles, in pieces", s, different(tiles.get(), want), want.size());

        Bytes back(file.size(), 0xee);
        Device<uint8_t> out(file.size());
        out.put(back);
        for (auto [at, n] : pieces) tq_from_tiles(s, tiles.p, { at, n, 1, 0 }, out.p + at, 0);
        CUDA(cudaGetLastError());
        report("from tiles, in pieces", s, different(out.get(), file), file.size());
    }
    // at once, and over something else
    Bytes want(tiles.n, 0xff);
    make_tiles(s, file, want);
    tiles.fill(0xff);
    staging.put(file);
    tq_to_tiles(s, staging.p, { 0, file.size(), 1, 0 }, tiles.p, 0);
    report("to tiles, at once", s, different(tiles.get(), want), want.size());
    // the middle third of every row: the rest must stay
    const size_t row = blocks_of(s) * block_bytes(s), rows = s.rows * s.matrices, from = row / 3, n = row / 3 + 1;
    const Bytes other = make_file(s);
    Bytes both = file, packed;
    for (size_t i = 0; i < rows; i++) {
        std::copy_n(&other[i * row + from], n, &both[i * row + from]);
        packed.insert(packed.end(), &other[i * row + from], &other[i * row + from] + n);
    }
    Device<uint8_t> part(packed.size());
    part.put(packed);
    tq_to_tiles(s, part.p, { from, n, rows, row }, tiles.p, 0);
    make_tiles(s, both, want);
    report("to tiles, 2D", s, different(tiles.get(), want), want.size());
    part.fill(0xee);
    tq_from_tiles(s, tiles.p, { from, n, rows, row }, part.p, 0);
    report("from tiles, 2D", s, different(part.get(), packed), packed.size());
}

static float to_float(float v) { return v; }
static float to_float(half v) { return __half2float(v); }
static float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
static tq_float type_of(float) { return TQ_F32; }
static tq_float type_of(half) { return TQ_F16; }
static tq_float type_of(__nv_bfloat16) { return TQ_BF16; }

// Runs and compares to half a unit in the last place of T; y beyond the rows asked for must keep its poison.
template <typename T>
static void check_rows(const char * what, const tq_shape & s, const Bytes & file, const uint8_t * tiles, tq_rows r,
                       const std::vector<int32_t> & ids) {
    const int64_t size = r.y_stride[2] * r.n[2];
    Device<T> y(size);
    y.fill(0x7f);
    Device<int32_t> d_ids(ids.size());
    d_ids.put(ids);
    r.ids = ids.empty() ? nullptr : d_ids.p;
    tq_dequantize(s, tiles, r, y.p, type_of(T()), 0);
    CUDA(cudaGetLastError());
    const std::vector<T> got = y.get();
    std::vector<bool> expected(size, false);
    size_t wrong = 0;
    for (int64_t c = 0; c < r.n[2]; c++)
        for (int64_t b = 0; b < r.n[1]; b++)
            for (int64_t a = 0; a < r.n[0]; a++) {
                const int64_t row = ids.empty() ? a : ids[a * r.ids_stride[0] + b * r.ids_stride[1] + c * r.ids_stride[2]];
                const uint8_t * p = &file[r.offset + row * r.stride[0] + b * r.stride[1] + c * r.stride[2]];
                for (int64_t e = 0; e < r.columns; e++) {
                    const uint8_t * block = p + e / 128 * block_bytes(s);
                    half am[2];
                    memcpy(am, block, 4);
                    const double want = (code(s, block, e % 128) - 1) * (double) __half2float(am[0]) + __half2float(am[1]);
                    const int64_t at = a * r.y_stride[0] + b * r.y_stride[1] + c * r.y_stride[2] + e;
                    expected[at] = true;
                    const double unit = sizeof(T) == 4 ? 6e-8 : type_of(T()) == TQ_F16 ? 4.9e-4 : 3.95e-3;
                    wrong += !(fabs(to_float(got[at]) - want) <= unit * fabs(want) + 6e-8);
                }
            }
    T poison;
    memset((void *) &poison, 0x7f, sizeof(T));
    for (int64_t i = 0; i < size; i++) wrong += !expected[i] && memcmp(&got[i], &poison, sizeof(T)) != 0;
    report(what, s, wrong, size);
}

static void check_floats(const tq_shape & s) {
    const Bytes file = make_file(s);
    Bytes host(tq_tile_tensor_bytes(s), 0xff); // NaN in the rows that pad
    make_tiles(s, file, host);
    Device<uint8_t> tiles(host.size());
    tiles.put(host);
    const int64_t row = blocks_of(s) * block_bytes(s), K = s.columns;

    tq_rows all = { K, { s.rows, s.matrices, 1 }, 0, { row, row * s.rows, 0 }, nullptr, {}, { K, K * s.rows, K * s.rows * s.matrices } };
    check_rows<float>("all rows, f32", s, file, tiles.p, all, {});
    check_rows<half>("all rows, f16", s, file, tiles.p, all, {});
    check_rows<__nv_bfloat16>("all rows, bf16", s, file, tiles.p, all, {});

    tq_rows swapped = { K, { s.matrices, s.rows, 1 }, 0, { row * s.rows, row, 0 }, nullptr, {}, { K, K * s.matrices, K * s.matrices * s.rows } };
    check_rows<float>("rows and matrices swapped, f32", s, file, tiles.p, swapped, {});

    const int64_t part = (blocks_of(s) + 1) / 2 * 128;
    tq_rows view = { part, { (s.rows + 1) / 2, s.matrices, 1 }, (blocks_of(s) - part / 128) * block_bytes(s), { 2 * row, row * s.rows, 0 },
                     nullptr, {}, { part + 5, (part + 5) * s.rows, (part + 5) * s.rows * s.matrices } };
    check_rows<half>("every other row, last columns, f16", s, file, tiles.p, view, {});

    if (blocks_of(s) % 2 == 0) { // as rows of half the length
        tq_rows half_rows = { K / 2, { 2 * s.rows * s.matrices, 1, 1 }, 0, { row / 2, 0, 0 }, nullptr, {}, { K / 2, K * s.rows * s.matrices, K * s.rows * s.matrices } };
        check_rows<float>("as rows of half the length, f32", s, file, tiles.p, half_rows, {});
    }

    // ids [7][matrices], some rows twice, with a gap between the lists
    std::vector<int32_t> ids(9 * s.matrices, -1);
    for (int64_t m = 0; m < s.matrices; m++)
        for (int i = 0; i < 7; i++) ids[9 * m + i] = i == 0 ? (int32_t) s.rows - 1 : rnd() % s.rows;
    tq_rows some = { K, { 7, s.matrices, 1 }, 0, { row, row * s.rows, 0 }, nullptr, { 1, 9, 0 }, { K + 3, 7 * (K + 3), 7 * (K + 3) * s.matrices } };
    check_rows<float>("by index, f32", s, file, tiles.p, some, ids);
    check_rows<__nv_bfloat16>("by index, bf16", s, file, tiles.p, some, ids);
}

static void rate(bool one1) {
    const tq_shape s = { one1, 8192, 22016, 1 };
    const size_t bytes = file_bytes(s);
    Device<uint8_t> file(bytes), tiles(tq_tile_tensor_bytes(s));
    Device<half> y(s.columns * s.rows);
    file.fill(0x15); // 21: a byte that both types may hold
    const tq_rows all = { s.columns, { s.rows, 1, 1 }, 0, { (int64_t) bytes / s.rows, 0, 0 }, nullptr, {}, { s.columns, 0, 0 } };
    auto time = [&](auto f) {
        for (int i = 0; i < 50; i++) f(); // clocks rise
        CUDA(cudaDeviceSynchronize());
        const auto t = std::chrono::steady_clock::now();
        for (int i = 0; i < 10; i++) f();
        CUDA(cudaDeviceSynchronize());
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count() / 10;
    };
    const double in = time([&]() { tq_to_tiles(s, file.p, { 0, bytes, 1, 0 }, tiles.p, 0); });
    const double out = time([&]() { tq_from_tiles(s, tiles.p, { 0, bytes, 1, 0 }, file.p, 0); });
    const double f16 = time([&]() { tq_dequantize(s, tiles.p, all, y.p, TQ_F16, 0); });
    printf("tq%d_1 8192 x 22016: to tiles %.0f GB/s of the file, from tiles %.0f, to f16 %.0f us (%.0f GB/s written)\n", one1 ? 1 : 2,
           bytes / in * 1e-9, bytes / out * 1e-9, f16 * 1e6, s.columns * s.rows * 2 / f16 * 1e-9);
}

int main(int argc, char ** argv) {
    const std::string how = argc > 2 ? argv[2] : "";
    for (bool one1 : { false, true }) {
        std::vector<tq_shape> shapes = { { one1, 256, 17, 3 } };
        if (how != "tiny") {
            shapes.insert(shapes.end(), { { one1, 128, 1, 1 }, { one1, 128, 16, 1 }, { one1, 384, 37, 1 }, { one1, 128, 33, 5 }, { one1, 640, 64, 2 } });
        }
        for (const tq_shape & s : shapes) {
            check_pieces(s);
            check_floats(s);
        }
    }
    printf("%s\n", failures ? "FAILED" : "all right");
    if (!failures && how.empty()) {
        rate(false);
        rate(true);
    }
    return failures != 0;
}
