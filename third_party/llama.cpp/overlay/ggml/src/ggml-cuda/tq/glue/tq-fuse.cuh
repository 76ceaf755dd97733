#pragma once

// What the matchers of tq-fuse.cu and tq-rope.cu ask about nodes of a graph and their memory.

#include "ggml-impl.h"

static inline bool tq_computes(const ggml_tensor * t) {
    switch (t->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_TRANSPOSE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
            return false;
        default:
            return !ggml_is_empty(t) && (t->flags & GGML_TENSOR_FLAG_COMPUTE) != 0;
    }
}

// The first node after i that computes something, n_nodes if there is none.
static inline int tq_next_node(const ggml_cgraph * graph, int i) {
    do {
        i++;
    } while (i < graph->n_nodes && !tq_computes(graph->nodes[i]));
    return i;
}

static inline bool tq_overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * pa = (const char *) a->data;
    const char * pb = (const char *) b->data;
    return pa < pb + ggml_nbytes(b) && pb < pa + ggml_nbytes(a);
}

// Kernels that keep what they have read until they write may write onto an input of the same rows, but not beside it.
static inline bool tq_apart_or_same(const ggml_tensor * out, const ggml_tensor * in) {
    return out->data == in->data ? ggml_are_same_shape(out, in) && ggml_are_same_stride(out, in) : !tq_overlap(out, in);
}

// Whether something but the given number of consumers may want the values of node i.
static inline bool tq_used_elsewhere(const ggml_cgraph * graph, int i, int consumers) {
    return !ggml_node_has_n_uses(graph, i, consumers);
}
