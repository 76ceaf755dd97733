#pragma once

// What the sources of TQ2_1 and TQ1_1 call of the rest of ggml, so that a check links with them alone.

#include "tq/tq.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

size_t ggml_row_size(enum ggml_type type, int64_t ne) {
    return (size_t) ne / QK_TQ * (type == GGML_TYPE_TQ2_1 ? 36 : type == GGML_TYPE_TQ1_1 ? 30 : 136);
}
size_t ggml_type_size(enum ggml_type type) { return ggml_row_size(type, QK_TQ); }
const char * ggml_type_name(enum ggml_type type) { return type == GGML_TYPE_TQ2_1 ? "tq2_1" : "tq1_1"; }
int64_t ggml_nelements(const struct ggml_tensor * t) { return t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]; }
int64_t ggml_nrows(const struct ggml_tensor * t) { return t->ne[1] * t->ne[2] * t->ne[3]; }
int64_t ggml_blck_size(enum ggml_type type) { (void) type; return QK_TQ; }
bool ggml_is_contiguous(const struct ggml_tensor * t) { (void) t; return true; }
const struct ggml_type_traits_cpu * ggml_get_type_traits_cpu(enum ggml_type type) { (void) type; return NULL; }
struct ggml_threadpool;
void ggml_barrier(struct ggml_threadpool * tp) { (void) tp; }
static int tq_stub_chunk; // the checks run in one thread
void ggml_threadpool_chunk_set(struct ggml_threadpool * tp, int v) { (void) tp; tq_stub_chunk = v; }
int  ggml_threadpool_chunk_add(struct ggml_threadpool * tp, int v) { (void) tp; return (tq_stub_chunk += v) - v; }
void ggml_abort(const char * file, int line, const char * fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, fmt, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(3);
}
