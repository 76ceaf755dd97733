// Runs every function of the types TQ2_1 and TQ1_1 on random bytes in heap buffers of exactly the size that they
// may touch. Built by tests/fuzz/kernels.py with -fsanitize=address,undefined: what is wrong ends the process.
//
// usage: tq_asan SHAPES SEED    or    tq_asan short-WHAT    (a buffer one element short: must be found)

#define _GNU_SOURCE
#include "tq/tq.h"

#include "ggml-cpu-impl.h"
#include "ggml-quants.h"
#include "ggml-tq.h"
#include "ggml_stubs.h"

#include <math.h>
#include <string.h>

#define MAX_COLS 140

static uint64_t seed = 88172645463325252ull;
static uint32_t rnd(void) { // xorshift64
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t) (seed >> 32);
}
static int below(int n) { return (int) (rnd() % (uint32_t) n); }

static long calls;

static void * exact(size_t n) {
    void * p = malloc(n);
    if (!p) {
        exit(3);
    }
    return p;
}

// blocks of any content: scales of NaN and infinities, codes that no encoder writes
static char * random_bytes(size_t n) {
    uint8_t * p = exact(n);
    const int kind = below(4);
    for (size_t i = 0; i < n; ++i) {
        p[i] = kind == 0 ? 0xff : kind == 1 ? 0x00 : (uint8_t) rnd();
    }
    return (char *) p;
}

static float * random_floats(size_t n) {
    static const float odd[] = { NAN, INFINITY, -INFINITY, 3.4e38f, -3.4e38f, 1e-38f, 1e-45f, 0.0f, -0.0f, 65504.0f, 1e30f };
    float * x = exact(n * sizeof(float));
    const int kind = below(5);
    for (size_t i = 0; i < n; ++i) {
        const float v = (float) (rnd() / 4294967296.0 - 0.5);
        x[i] = kind == 0 || (kind == 1 && below(50) == 0) ? odd[below(sizeof(odd) / sizeof(odd[0]))] : kind == 2 ? 0.0f : kind == 3 ? ldexpf(v, below(250) - 125) : v;
    }
    return x;
}

// float to block and back, with importances of every kind
static void run_encoder(enum ggml_type type, int nb, int rows) {
    const int64_t k = (int64_t) nb * QK_TQ;
    const size_t row = ggml_row_size(type, k);
    float * x = random_floats((size_t) (k * rows));
    float * w = below(3) ? random_floats((size_t) k) : NULL;
    char  * y = exact(row * (size_t) rows);
    float * back = exact((size_t) k * sizeof(float));
    if (type == GGML_TYPE_TQ2_1) {
        quantize_tq2_1(x, y, rows, k, w);
        quantize_row_tq2_1_ref(x, (block_tq2_1 *) y, k);
    } else {
        quantize_tq1_1(x, y, rows, k, w);
        quantize_row_tq1_1_ref(x, (block_tq1_1 *) y, k);
    }
    for (int r = 0; r < rows; ++r) { // as GET_ROWS reads
        const char * at = y + row * (size_t) below(rows);
        if (type == GGML_TYPE_TQ2_1) {
            dequantize_row_tq2_1((const block_tq2_1 *) at, back, k);
        } else {
            dequantize_row_tq1_1((const block_tq1_1 *) at, back, k);
        }
        ++calls;
    }
    ggml_tq_validate_codes(type, y, (size_t) (nb * rows));
    calls += 3;
    free(x);
    free(w);
    free(y);
    free(back);
}

// the same of blocks that nobody has encoded
static void run_decoder(enum ggml_type type, int nb) {
    const int64_t k = (int64_t) nb * QK_TQ;
    char  * y = random_bytes(ggml_row_size(type, k));
    float * x = exact((size_t) k * sizeof(float));
    ggml_tq_validate_codes(type, y, (size_t) nb);
    if (type == GGML_TYPE_TQ2_1) {
        dequantize_row_tq2_1((const block_tq2_1 *) y, x, k);
    } else {
        dequantize_row_tq1_1((const block_tq1_1 *) y, x, k);
        uint8_t codes[32];
        ggml_tq1_1_unpack_block((const block_tq1_1 *) y, codes);
    }
    calls += 2;
    free(y);
    free(x);
}

struct short_by { size_t x, y, dst; }; // bytes that a buffer lacks

static void run_products(const char * path, enum ggml_type type, int nb, int rows, int cols, struct short_by lack) {
    const int64_t k = (int64_t) nb * QK_TQ;
    const size_t bx = ggml_row_size(type, k), by = ggml_row_size(GGML_TYPE_Q8_T, k);
    const size_t ny = by * (size_t) cols, nx = bx * (size_t) rows;
    float * a = random_floats((size_t) (k * cols));
    char  * x = random_bytes(nx - lack.x);
    char  * y = exact(ny - lack.y);
    float * dst = exact(sizeof(float) * (size_t) (rows * cols) - lack.dst);
    if (below(8) == 0 && !lack.y) { // activations that no path makes
        memset(y, 0xff, ny);
    } else {
        for (int c = 0; c < cols; ++c) {
            ggml_tq_test_quantize(path, a + c * k, y + (size_t) c * by, k);
        }
    }
    ggml_tq_test_gemv(path, type, k, rows, x, bx, y, dst);
    ggml_tq_test_gemm(path, type, k, rows, x, bx, cols < TQ_MAX_COLS ? cols : TQ_MAX_COLS, y, dst, true);
    ggml_tq_test_gemm(path, type, k, rows, x, bx, cols < TQ_MAX_COLS ? cols : TQ_MAX_COLS, y, dst, false);
    calls += cols + 3;
    free(a);
    free(x);
    free(y);
    free(dst);
}

// MUL_MAT as ggml calls it, with the work buffer that ggml gives, and the dot product of its table
static void run_mul_mat(enum ggml_type type, int nb, int rows, int cols) {
    const int64_t k = (int64_t) nb * QK_TQ;
    struct ggml_tensor w = { 0 }, x = { 0 }, out = { 0 };
    const size_t bx = ggml_row_size(type, k);
    w.type = type;
    x.type = out.type = GGML_TYPE_F32;
    w.ne[0] = x.ne[0] = k;
    w.ne[1] = out.ne[0] = rows;
    x.ne[1] = out.ne[1] = cols;
    for (int i = 2; i < GGML_MAX_DIMS; ++i) {
        w.ne[i] = x.ne[i] = out.ne[i] = 1;
    }
    w.nb[0] = ggml_type_size(type);
    w.nb[1] = bx;
    w.nb[2] = w.nb[3] = bx * (size_t) rows;
    x.nb[0] = out.nb[0] = sizeof(float);
    x.nb[1] = (size_t) k * sizeof(float);
    x.nb[2] = x.nb[3] = x.nb[1] * (size_t) cols;
    out.nb[1] = (size_t) rows * sizeof(float);
    out.nb[2] = out.nb[3] = out.nb[1] * (size_t) cols;
    w.data = random_bytes(w.nb[2]);
    x.data = random_floats((size_t) (k * cols));
    out.data = exact(out.nb[2]);
    out.src[0] = &w;
    out.src[1] = &x;
    const size_t work = ggml_row_size(GGML_TYPE_Q8_T, k) * (size_t) cols;
    struct ggml_compute_params params = { .ith = 0, .nth = 1, .wsize = work, .wdata = exact(work), .threadpool = NULL };
    if (!ggml_tq_mul_mat(&params, &out)) {
        printf("MUL_MAT was not done\n");
        exit(1);
    }
    float dot;
    if (type == GGML_TYPE_TQ2_1) {
        ggml_tq_quantize_row_q8_t(x.data, params.wdata, k);
        ggml_vec_dot_tq2_1_q8_t((int) k, &dot, 0, w.data, 0, params.wdata, 0, 1);
    } else {
        ggml_tq_quantize_row_q8_t(x.data, params.wdata, k);
        ggml_vec_dot_tq1_1_q8_t((int) k, &dot, 0, w.data, 0, params.wdata, 0, 1);
    }
    calls += 3;
    free(w.data);
    free(x.data);
    free(out.data);
    free(params.wdata);
}

int main(int argc, char ** argv) {
    if (argc == 2) {
        const struct short_by lack = { !strcmp(argv[1], "short-weights"), !strcmp(argv[1], "short-activations"), !strcmp(argv[1], "short-result") };
        run_products("generic", GGML_TYPE_TQ1_1, 3, 5, 1, lack);
        return 0; // only without a sanitizer
    }
    if (argc != 3) {
        return 2;
    }
    const long shapes = atol(argv[1]);
    seed += (uint64_t) atoll(argv[2]) * 0x9e3779b97f4a7c15ull;
    for (long i = 0; i < shapes; ++i) {
        const enum ggml_type type = below(2) ? GGML_TYPE_TQ2_1 : GGML_TYPE_TQ1_1;
        const int nb = 1 + below(below(4) ? 5 : 40), rows = 1 + below(70), cols = 1 + below(below(4) ? 12 : MAX_COLS);
        run_encoder(type, 1 + below(4), 1 + below(3));
        run_decoder(type, nb);
        for (const char * const * name = ggml_tq_path_names(); *name; ++name) {
            if (ggml_tq_test_supported(*name)) {
                run_products(*name, type, nb, rows, cols, (struct short_by) { 0, 0, 0 });
            }
        }
        run_mul_mat(type, nb, rows, cols);
    }
    printf("ok %ld shapes, %ld calls\n", shapes, calls);
    return 0;
}
