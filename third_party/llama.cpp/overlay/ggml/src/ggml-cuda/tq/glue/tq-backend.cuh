#pragma once

// TQ2_1 and TQ1_1 in this backend, on cards that keep them in tile form (tq-kernels.cuh): which tensors
// those are, how they come and go, and which kernels their operators take. The rest of the backend calls
// in here by the edits of edits-cuda.yaml. A tensor not in tile form is the templates' (tq.cuh).
//
// Addresses: a tensor's strides, and the data pointers of views, count the file's bytes, also in tile form
// (the file's bytes are never more than the tiles'). So a view's place is its distance from its root.

#include "../../common.cuh"
#include "../kernels/tq-kernels.cuh"

#include <unordered_set>
#include <vector>

// ---- which tensors ------------------------------------------------------------------------------------
// Whether `device` keeps this tensor in tile form, wherever the tensor is now: one of the two types, compute
// capability 8.0 or more, and contiguous at its root. Not with GGML_CUDA_TQ=templates.
bool ggml_cuda_tq_form(int device, const ggml_tensor * tensor);
// The same for a tensor that is allocated: memory of the host, which some devices read as it is, is not in tile form.
bool ggml_cuda_tq_tiles(int device, const ggml_tensor * tensor);
// Bytes to allocate for a tensor in tile form.
size_t ggml_cuda_tq_alloc_size(const ggml_tensor * tensor);

// The tensor that memory was allocated for.
static inline const ggml_tensor * tq_root(const ggml_tensor * t) {
    while (t->view_src != nullptr) {
        t = t->view_src;
    }
    return t;
}
static inline tq_shape tq_shape_of(const ggml_tensor * root) {
    return { root->type == GGML_TYPE_TQ1_1, root->ne[0], root->ne[1], root->ne[2]*root->ne[3] };
}
static inline uint8_t * tq_tiles(const ggml_tensor * t) {
    return (uint8_t *) tq_root(t)->data;
}
// Where a tensor begins in its root, in the file's bytes.
static inline int64_t tq_offset(const ggml_tensor * t) {
    return (const char *) t->data - (const char *) tq_root(t)->data;
}

// ---- to and from the host -------------------------------------------------------------------------------
// `count` pieces of `size` bytes: in the tensor from `offset`, `stride_tensor` bytes apart, in `data` `stride_data` apart.
struct ggml_cuda_tq_pieces {
    size_t offset, size, count = 1, stride_tensor = 0, stride_data = 0;
};
// Zeroes the rows that pad a new tensor.
void ggml_cuda_tq_init(int device, ggml_tensor * tensor);
// These return when it is done, whatever the stream of the context.
void ggml_cuda_tq_set_tensor(int device, ggml_tensor * tensor, const void * data, const ggml_cuda_tq_pieces & p);
void ggml_cuda_tq_get_tensor(int device, const ggml_tensor * tensor, void * data, const ggml_cuda_tq_pieces & p);
void ggml_cuda_tq_memset(int device, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size);
// These are queued on the context's stream.
void ggml_cuda_tq_set_tensor_async(ggml_backend_cuda_context & ctx, ggml_tensor * tensor, const void * data, const ggml_cuda_tq_pieces & p);
void ggml_cuda_tq_get_tensor_async(ggml_backend_cuda_context & ctx, const ggml_tensor * tensor, void * data, const ggml_cuda_tq_pieces & p);
// `size`: bytes that a copy of a tensor of any type takes from device to device. False: it must take the file's form on its
// way, because the devices' forms differ or one of the two is a part of a tensor in tile form.
bool ggml_cuda_tq_copy_size(int src_device, const ggml_tensor * src, int dst_device, const ggml_tensor * dst, size_t & size);

// ---- operators ------------------------------------------------------------------------------------------
// Whether a tensor of this operator is in tile form, and then, whether this backend can compute it.
bool ggml_cuda_tq_decides(int device, const ggml_tensor * op, bool & supported);
// Products by a tensor in tile form. False, and nothing is done: for MUL_MAT, dequantise (ggml_cuda_tq_f16) and take
// upstream's way; for MUL_MAT_ID, upstream's way that sorts tokens by expert and calls MUL_MAT for each.
bool ggml_cuda_tq_mul_mat(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst);
bool ggml_cuda_tq_mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
// What ggml_cuda_tq_mul_mat_id will say.
bool ggml_cuda_tq_can_mul_mat_id(const ggml_tensor * dst);
// GET_ROWS, CPY, CONT and DUP from or to tile form. False: the node is none of these, and nothing is done.
bool ggml_cuda_tq_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// A tensor dequantised to F16 in memory of the pool, as long as this object lives.
struct ggml_cuda_tq_f16 {
    ggml_cuda_pool_alloc<half> data;
    ggml_tensor tensor;
    ggml_cuda_tq_f16(ggml_backend_cuda_context & ctx, const ggml_tensor * src);
};

// ---- a context's state ----------------------------------------------------------------------------------
// Recorded CUDA graphs hold addresses of what is in here, so nothing is freed before the context is.
constexpr int GGML_CUDA_TQ_ACTS = 4; // activations alive at once on a stream

struct ggml_cuda_tq_state {
    int device = 0;
    void * scratch[GGML_CUDA_MAX_STREAMS] = {};     // tq_decode's
    struct memory { void * data = nullptr; size_t size = 0; };
    memory acts[GGML_CUDA_MAX_STREAMS][GGML_CUDA_TQ_ACTS];
    int next_act[GGML_CUDA_MAX_STREAMS] = {};
    std::vector<void *> owned;                      // all device memory above, and what it grew out of

    // tq-fuse.cu's, reset by ggml_cuda_tq_begin: products that were computed with an earlier node
    std::unordered_set<const ggml_tensor *> done;
};

ggml_cuda_tq_state & ggml_cuda_tq_get(ggml_backend_cuda_context & ctx);
void ggml_cuda_tq_free(ggml_backend_cuda_context * ctx);
// Room for n tokens of nb blocks on the current stream; overwritten by the GGML_CUDA_TQ_ACTS-th call after this one.
tq_act ggml_cuda_tq_new_act(ggml_backend_cuda_context & ctx, int n, int nb);

// Distance of the rows of t in elements, all of its dimensions taken together; 0 where it is not one distance, or t is not F32.
int64_t ggml_cuda_tq_row_distance(const ggml_tensor * t);
// Whether ggml_cuda_tq_product can compute this node: MUL_MAT by one matrix in tile form whose first row is a multiple
// of 16, src1 and dst in F32 with rows (all of their dimensions taken together) at one distance.
bool ggml_cuda_tq_is_product(ggml_backend_cuda_context & ctx, const ggml_tensor * node);
// Tokens, row distance (elements) of src1 of such a node.
int64_t ggml_cuda_tq_tokens(const ggml_tensor * node);
int64_t ggml_cuda_tq_ld(const ggml_tensor * node);
// Up to TQ_MAX_SEGMENTS such nodes of the same src1 values, which `act` holds.
void ggml_cuda_tq_product(ggml_backend_cuda_context & ctx, const ggml_tensor * const * nodes, int n_nodes, const tq_act & act);

// tq-fuse.cu. When the graph's order may still be changed: products of one input follow each other, so that memory is given
// out for that order.
void ggml_cuda_tq_optimize(ggml_backend_cuda_context & ctx, ggml_cgraph * cgraph);
// Before the first node of a graph (its order is final by then).
void ggml_cuda_tq_begin(ggml_backend_cuda_context & ctx, ggml_cgraph * cgraph);
// Before node i is looked at in any other way; not called for graphs that run on several streams. True: node i was computed,
// now or with an earlier one; i is moved to the last node consumed.
bool ggml_cuda_tq_node(ggml_backend_cuda_context & ctx, ggml_cgraph * cgraph, int & i);
// tq-rope.cu: the same for a ROPE that begins q, k and the cache's rows.
bool ggml_cuda_tq_rope(ggml_backend_cuda_context & ctx, ggml_cgraph * cgraph, int & i);
