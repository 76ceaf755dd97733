// TQ2_1 and TQ1_1 between the file's bytes and tile form, and from tile form to floats (tq-kernels.cuh).

#include "tq-kernels.cuh"

#include <cuda_bf16.h>

static constexpr int TQ_FILE_SCALES = 4;  // bytes of alpha and mu, first in a block of the file
static constexpr int TQ1_BASE3      = 26; // bytes of base-3 numbers in a block of TQ1_1
static constexpr int TQ1_FIFTHS     = 24; // of which these have a fifth digit
static constexpr int TQ_THREADS     = 256;
static constexpr int TQ_ROW_THREADS = 512;
static constexpr int TQ_MAX_GRID    = 1 << 20; // thread blocks; they take turns beyond

static constexpr __host__ __device__ int tq_file_block_bytes(const bool one1) {
    return one1 ? TQ_FILE_SCALES + TQ1_BASE3 : TQ_FILE_SCALES + TQ_BLOCK / 4;
}

// What a kernel needs of a shape.
struct tq_grid {
    int64_t blocks;  // of a row
    int64_t rows;    // of a matrix
    int64_t tiles16; // rows of tiles of a matrix
};

static tq_grid tq_grid_of(const tq_shape & s) {
    return { s.columns / TQ_BLOCK, s.rows, (s.rows + TQ_TILE_ROWS - 1) / TQ_TILE_ROWS };
}

size_t tq_tile_tensor_bytes(const tq_shape & s) {
    const tq_grid g = tq_grid_of(s);
    return (size_t) s.matrices * g.tiles16 * g.blocks * TQ_TILE_BYTES;
}

// Where the block with this number in the file (of the whole tensor) lies: its tile, and its row there.
struct tq_place {
    int64_t tile;
    int     row;
};

static __device__ __forceinline__ tq_place tq_find(const tq_grid & s, const int64_t block) {
    const int64_t row    = block / s.blocks;
    const int64_t matrix = row / s.rows;
    const int64_t inside = row - matrix * s.rows;
    return { (matrix * s.tiles16 + inside / TQ_TILE_ROWS) * s.blocks + (block - row * s.blocks), (int) (inside % TQ_TILE_ROWS) };
}

// Byte of lane l (0..31) of a row within its tile; lanes l & ~3 .. l | 3 are one aligned word.
static __device__ __forceinline__ int tq_lane_byte(const int row, const int l) {
    return 16*(4*(row % 8) + l/8) + 8*(l/4 % 2) + 4*(row/8) + l % 4;
}

// Byte of alpha (and mu, 2 further) of a row within its tile.
static __device__ __forceinline__ int tq_scale_byte(const int row) {
    return TQ_TILE_SCALES + 8*(row % 8) + 4*(row/8);
}

// Bits of a word that this thread alone writes; the word's other bits belong to other threads.
static __device__ __forceinline__ void tq_set_bits(uint8_t * byte, const uint32_t mask, const uint32_t bits) {
    const int shift = 8 * (int) ((uintptr_t) byte % 4);
    uint32_t * word = (uint32_t *) (byte - shift / 8);
    atomicAnd(word, ~((mask & ~bits) << shift));
    atomicOr(word, bits << shift);
}

// A byte of TQ1_1's base-3 numbers owns the four codes of its lane, and one code of lanes 26 to 31. One above 242 counts as
// the one 81 below, as on the CPU.
static __device__ __forceinline__ void tq1_put(uint8_t * tile, const int row, const int i, int v) {
    uint32_t codes = 0;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        codes |= (uint32_t) (v % 3) << (2*p);
        v /= 3;
    }
    codes = tq_tile_codes(codes);
    uint8_t * own = tile + tq_lane_byte(row, i);
    if (i < TQ1_FIFTHS) {
        *own = (uint8_t) codes;
        const int lane  = TQ1_BASE3 + i / 4;
        const int plane = i % 4;
        tq_set_bits(tile + tq_lane_byte(row, lane), 3u << (2*plane), tq_tile_codes((uint32_t) (v < 3 ? v : 2)) << (2*plane));
    } else {
        tq_set_bits(own, 0xff, codes); // shares its word with lanes 26 and 27
    }
}

static __device__ __forceinline__ uint8_t tq1_get(const uint8_t * tile, const int row, const int i) {
    const int codes = (int) tq_tile_values(tile[tq_lane_byte(row, i)]);
    int v = (codes & 3) + 3*(codes >> 2 & 3) + 9*(codes >> 4 & 3) + 27*(codes >> 6);
    if (i < TQ1_FIFTHS) {
        v += 81 * (int) (tq_tile_values(tile[tq_lane_byte(row, TQ1_BASE3 + i / 4)]) >> (2*(i % 4)) & 3);
    }
    return (uint8_t) v;
}

// One thread for each byte of the file.
template <bool one1, bool to_tiles>
static __global__ void __launch_bounds__(TQ_THREADS) tq_move(const tq_grid s, const tq_pieces p, uint8_t * __restrict__ file,
                                                             uint8_t * __restrict__ tiles) {
    constexpr int block_bytes = tq_file_block_bytes(one1);
    const size_t total = p.bytes * p.count;
    for (size_t at = (size_t) blockIdx.x * TQ_THREADS + threadIdx.x; at < total; at += (size_t) gridDim.x * TQ_THREADS) {
        const size_t piece = p.count == 1 ? 0 : at / p.bytes;
        const size_t byte  = p.offset + piece * p.stride + (at - piece * p.bytes);
        const int64_t block = (int64_t) (byte / block_bytes);
        const int     i     = (int) (byte - (size_t) block * block_bytes);
        const tq_place place = tq_find(s, block);
        uint8_t * tile = tiles + place.tile * TQ_TILE_BYTES;

        if (one1 && i >= TQ_FILE_SCALES) {
            if (to_tiles) {
                tq1_put(tile, place.row, i - TQ_FILE_SCALES, file[at]);
            } else {
                file[at] = tq1_get(tile, place.row, i - TQ_FILE_SCALES);
            }
            continue;
        }
        const bool scale = i < TQ_FILE_SCALES;
        uint8_t * there = tile + (scale ? tq_scale_byte(place.row) + i : tq_lane_byte(place.row, i - TQ_FILE_SCALES));
        if (to_tiles) {
            *there = scale ? file[at] : (uint8_t) tq_tile_codes(file[at]);
        } else {
            file[at] = scale ? *there : (uint8_t) tq_tile_values(*there);
        }
    }
}

static unsigned int tq_thread_blocks(const size_t threads) {
    const size_t blocks = (threads + TQ_THREADS - 1) / TQ_THREADS;
    return (unsigned int) (blocks < TQ_MAX_GRID ? blocks : TQ_MAX_GRID);
}

template <bool to_tiles>
static void tq_move_cuda(const tq_shape & s, const tq_pieces & p, uint8_t * file, uint8_t * tiles, cudaStream_t stream) {
    const size_t total = p.bytes * p.count;
    if (total == 0) {
        return;
    }
    if (s.one1) {
        tq_move<true, to_tiles><<<tq_thread_blocks(total), TQ_THREADS, 0, stream>>>(tq_grid_of(s), p, file, tiles);
    } else {
        tq_move<false, to_tiles><<<tq_thread_blocks(total), TQ_THREADS, 0, stream>>>(tq_grid_of(s), p, file, tiles);
    }
}

void tq_to_tiles(const tq_shape & s, const uint8_t * file, const tq_pieces & p, uint8_t * tiles, cudaStream_t stream) {
    tq_move_cuda<true>(s, p, const_cast<uint8_t *>(file), tiles, stream); // only read
}

void tq_from_tiles(const tq_shape & s, const uint8_t * tiles, const tq_pieces & p, uint8_t * file, cudaStream_t stream) {
    tq_move_cuda<false>(s, p, file, const_cast<uint8_t *>(tiles), stream); // only read
}

// ---- to floats ----------------------------------------------------------------------------------

template <typename T> static __device__ __forceinline__ T tq_to(const float v);
template <> __device__ __forceinline__ float         tq_to<float>(const float v)         { return v; }
template <> __device__ __forceinline__ half          tq_to<half>(const float v)          { return __float2half(v); }
template <> __device__ __forceinline__ __nv_bfloat16 tq_to<__nv_bfloat16>(const float v) { return __float2bfloat16(v); }

// One thread block for each row, one warp for each block of 128, one lane for each byte of codes.
template <typename T>
static __global__ void __launch_bounds__(TQ_ROW_THREADS) tq_dequantize_rows(const tq_grid s, const int file_block_bytes, const tq_rows r,
                                                                            const uint8_t * __restrict__ tiles, T * __restrict__ y) {
    const int lane   = threadIdx.x % 32;
    const int blocks = (int) (r.columns / TQ_BLOCK);
    for (int64_t at = blockIdx.x; at < r.n[0]*r.n[1]*r.n[2]; at += gridDim.x) {
        const int64_t bc = at / r.n[0];
        const int64_t a = at - bc * r.n[0];
        const int64_t c = bc / r.n[1];
        const int64_t b = bc - c * r.n[1];

        const int64_t row   = r.ids ? r.ids[a*r.ids_stride[0] + b*r.ids_stride[1] + c*r.ids_stride[2]] : a;
        const int64_t first = (r.offset + row*r.stride[0] + b*r.stride[1] + c*r.stride[2]) / file_block_bytes;
        const tq_place start = tq_find(s, first);
        const int64_t  left  = s.blocks - first % s.blocks; // blocks to the end of this row of the tensor
        T * out = y + a*r.y_stride[0] + b*r.y_stride[1] + c*r.y_stride[2] + lane;

        for (int j = threadIdx.x / 32; j < blocks; j += blockDim.x / 32) {
            // rows of a reshaped tensor may go on in its next row
            const tq_place place = j < left ? tq_place{ start.tile + j, start.row } : tq_find(s, first + j);
            const uint8_t * tile = tiles + place.tile * TQ_TILE_BYTES;
            const float2 scale = __half22float2(*(const half2 *) (tile + tq_scale_byte(place.row)));
            const int    codes = (int) tq_tile_values(tile[tq_lane_byte(place.row, lane)]);
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                out[j*TQ_BLOCK + 32*p] = tq_to<T>(((codes >> (2*p) & 3) - 1)*scale.x + scale.y);
            }
        }
    }
}

template <typename T>
static void tq_dequantize_cuda(const tq_shape & s, const uint8_t * tiles, const tq_rows & r, void * y, cudaStream_t stream) {
    const int64_t blocks = r.columns / TQ_BLOCK;
    const int64_t rows   = r.n[0]*r.n[1]*r.n[2];
    if (rows*blocks == 0) {
        return;
    }
    const int threads = (int) (32*blocks < TQ_ROW_THREADS ? 32*blocks : TQ_ROW_THREADS);
    const unsigned int grid = (unsigned int) (rows < TQ_MAX_GRID ? rows : TQ_MAX_GRID);
    tq_dequantize_rows<<<grid, threads, 0, stream>>>(tq_grid_of(s), tq_file_block_bytes(s.one1), r, tiles, (T *) y);
}

void tq_dequantize(const tq_shape & s, const uint8_t * tiles, const tq_rows & rows, void * y, tq_float type, cudaStream_t stream) {
    switch (type) {
        case TQ_F32:  return tq_dequantize_cuda<float>(s, tiles, rows, y, stream);
        case TQ_F16:  return tq_dequantize_cuda<half>(s, tiles, rows, y, stream);
        case TQ_BF16: return tq_dequantize_cuda<__nv_bfloat16>(s, tiles, rows, y, stream);
    }
}
