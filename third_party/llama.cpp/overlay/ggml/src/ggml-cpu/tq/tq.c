// Choice of the path, and what ggml's tables and the tests call. See tq.h.

#include "tq.h"

#include "ggml-impl.h"
#include "ggml-quants.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// best first
static const struct ggml_tq_path * const tq_paths[] = {
#if TQ_HAS_X86
    &ggml_tq_path_avx512,
    &ggml_tq_path_avx512_vnni,
    &ggml_tq_path_avx2,
#endif
#if TQ_HAS_NEON
    &ggml_tq_path_neon_i8mm,
    &ggml_tq_path_neon_dotprod,
    &ggml_tq_path_neon,
#endif
    &ggml_tq_path_generic,
};

#define TQ_N_PATHS ((int) (sizeof(tq_paths) / sizeof(tq_paths[0])))

static const struct ggml_tq_path * tq_find(const char * name) {
    for (int i = 0; i < TQ_N_PATHS; ++i) {
        if (strcmp(tq_paths[i]->name, name) == 0) {
            return tq_paths[i];
        }
    }
    return NULL;
}

static const struct ggml_tq_path * tq_choose(void) {
    const char * name = getenv("GGML_TQ_CPU");
    if (name && *name) {
        const struct ggml_tq_path * path = tq_find(name);
        if (!path || !path->supported()) {
            // asked for by name: neither a quiet fallback nor a backtrace would help
            fprintf(stderr, "GGML_TQ_CPU=%s: %s; unset it or set it to generic\n", name,
                path ? "this processor cannot run that path" : "this build has no such path");
            exit(1);
        }
        return path;
    }
    int i = 0;
    while (!tq_paths[i]->supported()) {
        ++i; // ends at generic
    }
    return tq_paths[i];
}

const struct ggml_tq_path * ggml_tq_active(void) {
    // threads that come here at the same time find the same path, so a plain pointer does
    static const struct ggml_tq_path * volatile active = NULL;
    if (!active) {
        active = tq_choose();
    }
    return active;
}

//
// ggml_type_traits_cpu
//

void ggml_tq_quantize_row_tq2_1(const float * x, void * y, int64_t k) {
    quantize_row_tq2_1_ref(x, y, k);
}

void ggml_tq_quantize_row_tq1_1(const float * x, void * y, int64_t k) {
    quantize_row_tq1_1_ref(x, y, k);
}

void ggml_tq_quantize_row_q8_t(const float * x, void * y, int64_t k) {
    ggml_tq_active()->quantize(x, y, k);
}

void ggml_vec_dot_tq2_1_q8_t(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
    assert(nrc == 1);
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
    ggml_tq_active()->gemv(GGML_TYPE_TQ2_1, n, 1, vx, 0, vy, s);
}

void ggml_vec_dot_tq1_1_q8_t(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
    assert(nrc == 1);
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
    ggml_tq_active()->gemv(GGML_TYPE_TQ1_1, n, 1, vx, 0, vy, s);
}

//
// tests and benchmarks
//

const char * const * ggml_tq_path_names(void) {
    static const char * names[TQ_N_PATHS + 1];
    for (int i = 0; i < TQ_N_PATHS; ++i) {
        names[i] = tq_paths[i]->name;
    }
    return names;
}

const char * ggml_tq_active_name(void) {
    return ggml_tq_active()->name;
}

static const struct ggml_tq_path * tq_find_supported(const char * name) {
    const struct ggml_tq_path * path = tq_find(name);
    return path && path->supported() ? path : NULL;
}

bool ggml_tq_test_supported(const char * path) {
    return tq_find_supported(path) != NULL;
}

bool ggml_tq_test_quantize(const char * path, const float * x, void * y, int64_t k) {
    const struct ggml_tq_path * p = tq_find_supported(path);
    if (p) {
        p->quantize(x, y, k);
    }
    return p != NULL;
}

bool ggml_tq_test_gemv(const char * path, int type, int64_t k, int64_t nrows, const void * x, size_t bx, const void * y, float * dst) {
    const struct ggml_tq_path * p = tq_find_supported(path);
    if (p) {
        p->gemv((enum ggml_type) type, k, nrows, x, bx, y, dst);
    }
    return p != NULL;
}

bool ggml_tq_test_gemm(const char * path, int type, int64_t k, int64_t nrows, const void * x, size_t bx, int ncols, const void * y, float * dst, bool panels) {
    const struct ggml_tq_path * p = tq_find_supported(path);
    if (!p || !p->gemm || ncols < 1 || ncols > TQ_MAX_COLS) {
        return false;
    }
    const int64_t nb = k / QK_TQ;
    const block_q8_t * col[TQ_MAX_COLS];
    float * out[TQ_MAX_COLS];
    for (int c = 0; c < ncols; ++c) {
        col[c] = (const block_q8_t *) y + c * nb;
        out[c] = dst + c * nrows;
    }
    char * packed = NULL;
    if (panels) {
        packed = malloc(ncols * nb * sizeof(block_q8_t));
        GGML_ASSERT(packed);
        char * at = packed;
        for (int c = 0; c < ncols; c += TQ_PANEL) {
            const int w = MIN(TQ_PANEL, ncols - c);
            for (int64_t b = 0; b < nb; ++b, at += w * sizeof(block_q8_t)) {
                ggml_tq_pack_panel(col + c, b, w, at);
            }
        }
    }
    const struct ggml_tq_cols cols = { ncols, packed, panels ? NULL : col };
    p->gemm((enum ggml_type) type, k, nrows, x, bx, &cols, out);
    free(packed);
    return true;
}
