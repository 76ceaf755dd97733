// tq-tile.cu on the CPU, for tests/test_cuda_tiles.py. TQ_TILE_SOURCE: the source with its launches rewritten.
#include "cuda_on_host.h"

#include TQ_TILE_SOURCE

// shape: TQ1_1 (0 or 1), columns, rows, matrices
static tq_shape shape_of(const int64_t * s) { return { s[0] != 0, s[1], s[2], s[3] }; }

extern "C" size_t tile_bytes(const int64_t * shape) { return tq_tile_tensor_bytes(shape_of(shape)); }
extern "C" void to_tiles(const int64_t * shape, const uint8_t * file, const size_t * p, uint8_t * tiles) {
    tq_to_tiles(shape_of(shape), file, { p[0], p[1], p[2], p[3] }, tiles, nullptr);
}
extern "C" void from_tiles(const int64_t * shape, const uint8_t * tiles, const size_t * p, uint8_t * file) {
    tq_from_tiles(shape_of(shape), tiles, { p[0], p[1], p[2], p[3] }, file, nullptr);
}
// r: columns, n[3], offset, stride[3], ids_stride[3], y_stride[3]
extern "C" void dequantize(const int64_t * shape, const uint8_t * tiles, const int64_t * r, const int32_t * ids, void * y, int type) {
    tq_rows rows = { r[0], { r[1], r[2], r[3] }, r[4], { r[5], r[6], r[7] }, ids, { r[8], r[9], r[10] }, { r[11], r[12], r[13] } };
    tq_dequantize(shape_of(shape), tiles, rows, y, (tq_float) type, nullptr);
}
