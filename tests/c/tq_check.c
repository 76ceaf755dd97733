// Checks every CPU path of the types TQ2_1 and TQ1_1 that this build and processor have, against sums in
// double over values that this file computes from the format's definition itself.
//
// Built by tests/test_c_kernels.py together with ggml-tq.c and ggml-cpu/tq/*.c, natively and for 64-bit
// ARM. Prints "PATH ok CASES" or "PATH skipped" for each path; on a failure says where, and exits with 1.

#define _GNU_SOURCE
#include "tq/tq.h"

#include "ggml-quants.h"
#include "ggml_stubs.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_ROWS 67
#define MAX_COLS 128
#define MAX_NB   44
#define TOO_WIDE_NB 1025 // one more than the x86 paths arrange a column for

static uint64_t seed = 88172645463325252ull;
static uint32_t rnd(void) { // xorshift64
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t) (seed >> 32);
}
static double uniform(void) { return rnd() / 4294967296.0; }

// memory of n bytes between pages that cannot be touched: at the start or the end of its pages
static char * fenced(size_t n, bool at_end) {
    const size_t page = (size_t) sysconf(_SC_PAGESIZE);
    const size_t size = (n + page - 1) / page * page;
    char * p = mmap(NULL, size + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p, page, PROT_NONE) || mprotect(p + page + size, page, PROT_NONE)) {
        fprintf(stderr, "no fenced memory\n");
        exit(3);
    }
    return p + page + (at_end ? size - n : 0);
}
static void unfence(char * p, size_t n) {
    const size_t page = (size_t) sysconf(_SC_PAGESIZE);
    char * base = (char *) ((uintptr_t) p / page * page) - page;
    munmap(base, (n + page - 1) / page * page + 2 * page);
}

//
// blocks from the definition
//

static double half_value(uint16_t h) {
    const int e = h >> 10 & 31, m = h & 1023;
    const double v = e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
    return h & 0x8000 ? -v : v;
}

enum kind { RANDOM, ALL_ZERO, ALL_EQUAL, HUGE_SCALE, OFFSET_ABOVE_SCALE, NEGATIVE_ZERO, SUBNORMAL, ANY_BYTES, NOT_FINITE, N_KINDS };

static void scales_of(enum kind kind, uint16_t * alpha, uint16_t * mu) {
    *alpha = (uint16_t) (0x1c00 + rnd() % 0x0c00); // 2^-8 .. 2^-5
    *mu    = (uint16_t) ((rnd() & 1) << 15 | (0x1000 + rnd() % 0x0c00));
    switch (kind) {
        case ALL_ZERO:           *alpha = *mu = 0; break;
        case HUGE_SCALE:         *alpha = 0x7bff; *mu = rnd() & 1 ? 0xfbff : 0x7bff; break; // 65504
        case OFFSET_ABOVE_SCALE: *mu = (uint16_t) (*alpha + 0x0800); break;
        case NEGATIVE_ZERO:      *alpha = *mu = 0x8000; break;
        case SUBNORMAL:          *alpha = 1 + rnd() % 1023; *mu = (uint16_t) (0x8000 | (1 + rnd() % 1023)); break;
        case NOT_FINITE: // NaN or infinity, in one block of eight
            if (rnd() % 8 == 0) {
                *(rnd() & 1 ? alpha : mu) = (uint16_t) ((rnd() & 1) << 15 | 0x7c00 | (rnd() & 1));
                if (rnd() % 4 == 0) {
                    *mu = *alpha;
                }
            }
            break;
        default: break;
    }
}

// the codes of any bytes, as FORMAT.md has them
static void codes_of(enum ggml_type type, const uint8_t * qs, int * c) {
    for (int i = 0; i < (type == GGML_TYPE_TQ2_1 ? 32 : 26); ++i) {
        if (type == GGML_TYPE_TQ2_1) {
            for (int p = 0; p < 4; ++p) {
                c[32 * p + i] = qs[i] >> (2 * p) & 3;
            }
            continue;
        }
        int v = qs[i] > 242 ? qs[i] - 81 : qs[i];
        for (int p = 0; p < 4; ++p, v /= 3) {
            c[32 * p + i] = v % 3;
        }
        if (i < 24) {
            c[32 * (i % 4) + 26 + i / 4] = v;
        }
    }
}

// one block at dst, its values in double at w. Returns alpha + |mu|
static double make_block(enum ggml_type type, enum kind kind, uint8_t * dst, double * w) {
    uint16_t alpha, mu;
    scales_of(kind, &alpha, &mu);
    const int equal = (int) (rnd() % 3);
    int c[QK_TQ];
    for (int e = 0; e < QK_TQ; ++e) {
        c[e] = kind == ALL_EQUAL ? equal : kind == ALL_ZERO ? 1 : (int) (rnd() % 3);
    }
    memcpy(dst, &alpha, 2);
    memcpy(dst + 2, &mu, 2);
    uint8_t * qs = dst + 4;
    for (int i = 0; i < (type == GGML_TYPE_TQ2_1 ? 32 : 26); ++i) {
        const int c0 = c[i], c1 = c[32 + i], c2 = c[64 + i], c3 = c[96 + i];
        if (type == GGML_TYPE_TQ2_1) {
            qs[i] = (uint8_t) (c0 | c1 << 2 | c2 << 4 | c3 << 6);
        } else {
            qs[i] = (uint8_t) (c0 + 3 * c1 + 9 * c2 + 27 * c3 + (i < 24 ? 81 * c[32 * (i % 4) + 26 + i / 4] : 0));
        }
    }
    if (kind == ANY_BYTES) {
        for (int i = 0; i < (type == GGML_TYPE_TQ2_1 ? 32 : 26); ++i) {
            qs[i] = (uint8_t) (rnd() % 3 ? 230 + rnd() % 26 : rnd());
        }
        codes_of(type, qs, c);
    }
    const bool finite = (alpha & 0x7c00) != 0x7c00 && (mu & 0x7c00) != 0x7c00;
    for (int e = 0; e < QK_TQ; ++e) {
        w[e] = finite ? half_value(alpha) * (c[e] - 1) + half_value(mu) : (double) NAN;
    }
    return (kind == ANY_BYTES ? 2 : 1) * half_value(alpha) + fabs(half_value(mu));
}

struct problem {
    enum ggml_type type;
    enum kind      kind;
    int            nb, rows, cols;
    size_t         row_size, x_size, y_size;
    char *         x; // weights, fenced
    char *         y; // activations, fenced
    double *       w; // rows x k
    double *       a; // cols x k
    double *       m; // rows x nb: alpha + |mu|
};

static struct problem make_problem(enum ggml_type type, enum kind kind, int nb, int rows, int cols, bool at_end) {
    struct problem p = { type, kind, nb, rows, cols, 0, 0, 0, NULL, NULL, NULL, NULL, NULL };
    const int k = nb * QK_TQ;
    p.row_size = ggml_row_size(type, k);
    p.x_size   = p.row_size * (size_t) rows;
    p.y_size   = ggml_row_size(GGML_TYPE_Q8_T, k) * (size_t) cols;
    p.x = fenced(p.x_size, at_end);
    p.y = fenced(p.y_size, at_end);
    p.w = malloc(sizeof(double) * (size_t) (rows * k));
    p.a = malloc(sizeof(double) * (size_t) (cols * k));
    p.m = malloc(sizeof(double) * (size_t) (rows * nb));
    for (int i = 0; i < rows * nb; ++i) {
        p.m[i] = make_block(type, kind, (uint8_t *) p.x + (size_t) i * ggml_type_size(type), p.w + i * QK_TQ);
    }
    for (int i = 0; i < cols * nb; ++i) {
        block_q8_t b;
        const bool extreme = rnd() % 4 == 0; // all at the ends of the range
        int sum = 0;
        b.d = (float) ldexp(1 + uniform(), (int) (rnd() % 12) - 10);
        for (int e = 0; e < QK_TQ; ++e) {
            b.qs[e] = (int8_t) (extreme ? 127 : (int) (rnd() % 255) - 127);
            sum += b.qs[e];
        }
        b.s = b.d * (float) sum;
        for (int e = 0; e < QK_TQ; ++e) {
            p.a[i * QK_TQ + e] = (double) b.d * b.qs[e];
        }
        memcpy(p.y + (size_t) i * sizeof(b), &b, sizeof(b));
    }
    return p;
}

static void free_problem(struct problem * p) {
    unfence(p->x, p->x_size);
    unfence(p->y, p->y_size);
    free(p->w);
    free(p->a);
    free(p->m);
}

static const char * path;
static long cases;

static void check(const struct problem * p, const char * what, int r, int c, float got) {
    double want = 0, scale = 0;
    const int k = p->nb * QK_TQ;
    for (int i = 0; i < k; ++i) {
        want  += p->w[r * k + i] * p->a[c * k + i];
        scale += p->m[r * p->nb + i / QK_TQ] * fabs(p->a[c * k + i]);
    }
    ++cases;
    // roundings of float sums, relative to what is added up (alpha and mu may cancel in the result)
    if (isnan(want) ? !isnan(got) : !(fabs(got - want) <= 1e-6 * scale)) {
        printf("%s %s %s FAILED: kind %d, %d blocks, %d rows, %d columns, at row %d, column %d: %.9g, not %.9g\n",
            path, ggml_type_name(p->type), what, p->kind, p->nb, p->rows, p->cols, r, c, got, want);
        exit(1);
    }
}

static void check_gemv(const struct problem * p) {
    float dst[MAX_ROWS + 1];
    for (int r = 0; r <= p->rows; ++r) {
        dst[r] = NAN;
    }
    ggml_tq_test_gemv(path, p->type, p->nb * QK_TQ, p->rows, p->x, p->row_size, p->y, dst);
    for (int r = 0; r < p->rows; ++r) {
        check(p, "gemv", r, 0, dst[r]);
    }
    if (!isnan(dst[p->rows])) {
        printf("%s wrote behind its rows\n", path);
        exit(1);
    }
}

static void check_gemm(const struct problem * p, bool panels) {
    static float dst[MAX_ROWS * MAX_COLS + 1];
    const int n = p->rows * p->cols;
    for (int i = 0; i <= n; ++i) {
        dst[i] = NAN;
    }
    if (!ggml_tq_test_gemm(path, p->type, p->nb * QK_TQ, p->rows, p->x, p->row_size, p->cols, p->y, dst, panels)) {
        return; // no such kernel in this path
    }
    for (int i = 0; i < n; ++i) {
        check(p, panels ? "gemm" : "gemm without panels", i % p->rows, i / p->rows, dst[i]);
    }
    if (!isnan(dst[n])) {
        printf("%s wrote behind its result\n", path);
        exit(1);
    }
}

static void check_products(void) {
    static const int nbs[]  = { 1, 2, 3, 5, 15, 16, 17, MAX_NB };
    static const int rows[] = { 1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, MAX_ROWS };
    static const int cols[] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, MAX_COLS };
    for (int type = GGML_TYPE_TQ2_1; type <= GGML_TYPE_TQ1_1; ++type) {
        for (size_t i = 0; i < sizeof(nbs) / sizeof(nbs[0]); ++i) {
            for (int kind = 0; kind < N_KINDS; ++kind) {
                struct problem p = make_problem(type, kind, nbs[i], 1 + (int) (rnd() % 9), 1, kind & 1);
                check_gemv(&p);
                free_problem(&p);
            }
        }
        for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); ++i) { // shared out among streams, and left over
            struct problem p = make_problem(type, (int) (i % N_KINDS), 1 + (int) (rnd() % 19), rows[i], 1, i & 1);
            check_gemv(&p);
            free_problem(&p);
        }
        struct problem wide = make_problem(type, RANDOM, TOO_WIDE_NB, 5, 1, true);
        check_gemv(&wide);
        free_problem(&wide);
        for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); ++i) {
            for (size_t j = 0; j < sizeof(cols) / sizeof(cols[0]); ++j) {
                const int nb = rows[i] * cols[j] > 1000 ? 1 : 1 + (int) (rnd() % 3);
                struct problem p = make_problem(type, (int) ((i + j) % N_KINDS), nb, rows[i], cols[j], j & 1);
                check_gemm(&p, true);
                check_gemm(&p, false);
                free_problem(&p);
            }
        }
    }
}

static void check_quantize(void) {
    enum { NB = 12, K = NB * QK_TQ };
    float * x = (float *) fenced(K * sizeof(float), true);
    char  * y = fenced(NB * sizeof(block_q8_t), true);
    block_q8_t want[NB];
    for (int round = 0; round < 50; ++round) {
        for (int i = 0; i < K; ++i) {
            const int b = i / QK_TQ;
            const float v = (float) ((uniform() - 0.5) * ldexp(1, (int) (rnd() % 20) - 10));
            x[i] = b == 1 ? 0.0f : b == 2 ? -0.0f : b == 3 ? 1e-35f * v : b == 4 ? 3e38f * (v > 0 ? 1 : -1) : b == 5 ? 1.0f : v;
        }
        x[6 * QK_TQ + (int) (rnd() % QK_TQ)] = NAN;
        x[7 * QK_TQ + (int) (rnd() % QK_TQ)] = -INFINITY;
        x[8 * QK_TQ] = 127.0f; // with this the halves below are ties
        for (int i = 1; i < QK_TQ; ++i) {
            x[8 * QK_TQ + i] = (float) (i - 64) + 0.5f;
        }
        quantize_row_q8_t_ref(x, want, K);
        ggml_tq_test_quantize(path, x, y, K);
        for (int b = 0; b < NB; ++b) {
            block_q8_t got;
            memcpy(&got, y + (size_t) b * sizeof(got), sizeof(got));
            const bool same = (b == 6 || b == 7) ? isnan(got.d) && isnan(got.s) && isnan(want[b].d) : memcmp(&got, &want[b], sizeof(got)) == 0;
            ++cases;
            if (!same) {
                printf("%s quantize FAILED: block %d: d %g s %g, not d %g s %g\n", path, b, got.d, got.s, want[b].d, want[b].s);
                exit(1);
            }
        }
    }
    unfence((char *) x, K * sizeof(float));
    unfence(y, NB * sizeof(block_q8_t));
}

int main(void) {
    for (const char * const * name = ggml_tq_path_names(); *name; ++name) {
        path = *name;
        if (!ggml_tq_test_supported(path)) {
            printf("%s skipped\n", path);
            continue;
        }
        cases = 0;
        check_quantize();
        check_products();
        printf("%s ok %ld\n", path, cases);
    }
    printf("active %s\n", ggml_tq_active_name());
    return 0;
}
