#pragma once

// What comes before the matrices of a site, recognised in the graph: a norm, a gated unit or attention whose
// arguments a kernel of ours takes (tq-kernels.cuh, tq-attn.cuh). For tq-fuse.cu alone.

#include "../kernels/tq-attn.cuh"
#include "tq-backend.cuh"
#include "tq-fuse.cuh"

#include <cstring>

namespace {

bool is_f32(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32;
}

struct norm_match {
    const ggml_tensor * add = nullptr; // null: the norm reads `a`
    const ggml_tensor * a   = nullptr;
    const ggml_tensor * b   = nullptr; // null without add
    const ggml_tensor * rms = nullptr;
    const ggml_tensor * w   = nullptr;
    int  mul   = 0;                    // index of the MUL
    bool write_sum = false;
};

bool match_norm(const ggml_cgraph * graph, int i, norm_match & m) {
    const ggml_tensor * node = graph->nodes[i];
    int k = i;
    if (node->op == GGML_OP_ADD) {
        m.add = node;
        m.a   = node->src[0];
        m.b   = node->src[1];
        k     = tq_next_node(graph, k);
    }
    if (k >= graph->n_nodes || graph->nodes[k]->op != GGML_OP_RMS_NORM) {
        return false;
    }
    m.rms = graph->nodes[k];
    m.mul = tq_next_node(graph, k);
    if (m.mul >= graph->n_nodes || graph->nodes[m.mul]->op != GGML_OP_MUL || tq_used_elsewhere(graph, k, 1)) {
        return false;
    }
    const ggml_tensor * mul = graph->nodes[m.mul];
    if (mul->src[0] != m.rms && mul->src[1] != m.rms) {
        return false;
    }
    m.w = mul->src[0] == m.rms ? mul->src[1] : mul->src[0];
    if (m.add) {
        if (m.rms->src[0] != m.add) {
            return false;
        }
        m.write_sum = tq_used_elsewhere(graph, i, 1);
    } else {
        m.a = m.rms->src[0];
    }

    for (const ggml_tensor * t : { m.a, m.b, m.add, m.rms, mul }) {
        if (t && (!is_f32(t) || !ggml_is_contiguous(t) || !ggml_are_same_shape(t, mul))) {
            return false;
        }
    }
    const int64_t columns = mul->ne[0];
    return is_f32(m.w) && ggml_is_contiguous(m.w) && m.w->ne[0] == columns && ggml_nelements(m.w) == columns &&
        columns % TQ_BLOCK == 0 && columns / TQ_BLOCK <= TQ_NORM_MAX_BLOCKS;
}

// Whether the kernel may write what it has to; `norm`: also the product with the weight.
bool norm_memory_ok(const ggml_cgraph * graph, const norm_match & m, bool norm) {
    const ggml_tensor * mul = graph->nodes[m.mul];
    const ggml_tensor * outs[2] = { m.write_sum ? m.add : nullptr, norm ? mul : nullptr };
    for (const ggml_tensor * out : outs) {
        if (out && (!tq_apart_or_same(out, m.a) || (m.b && !tq_apart_or_same(out, m.b)) || tq_overlap(out, m.w))) {
            return false;
        }
    }
    return !outs[0] || !outs[1] || !tq_overlap(outs[0], outs[1]);
}

struct glu_match {
    const ggml_tensor * gate = nullptr;
    const ggml_tensor * up   = nullptr;
    int64_t ld_gate = 0;
    int64_t ld_up   = 0;
    int     act     = 0; // as tq_quantize_glu's
};

bool match_glu(const ggml_tensor * node, glu_match & m) {
    if (node->op != GGML_OP_GLU || !node->src[1] || ggml_get_op_params_i32(node, 1) != 0) {
        return false;
    }
    const ggml_glu_op op = ggml_get_glu_op(node);
    if (op != GGML_GLU_OP_SWIGLU && op != GGML_GLU_OP_GEGLU) {
        return false;
    }
    m.act     = op == GGML_GLU_OP_GEGLU;
    m.gate    = node->src[0];
    m.up      = node->src[1];
    if (!is_f32(node) || !is_f32(m.gate) || !is_f32(m.up) || !ggml_is_contiguous(node) || !ggml_are_same_shape(m.gate, node) ||
            !ggml_are_same_shape(m.up, node) || node->ne[0] % TQ_BLOCK != 0) {
        return false;
    }
    m.ld_gate = ggml_cuda_tq_row_distance(m.gate);
    m.ld_up   = ggml_cuda_tq_row_distance(m.up);
    return m.ld_gate > 0 && m.ld_up > 0;
}

// Attention as tq-attn.cu computes it: keys and values in F16, one mask for all heads of a stream, nothing else.
bool match_attention(const ggml_tensor * node, tq_attention & a) {
    const ggml_tensor * q    = node->src[0];
    const ggml_tensor * k    = node->src[1];
    const ggml_tensor * v    = node->src[2];
    const ggml_tensor * mask = node->src[3];
    float scale, max_bias, softcap;
    memcpy(&scale,    (const float *) node->op_params + 0, sizeof(float));
    memcpy(&max_bias, (const float *) node->op_params + 1, sizeof(float));
    memcpy(&softcap,  (const float *) node->op_params + 2, sizeof(float));
    const int32_t few_keys = ggml_get_op_params_i32(node, 4); // sparse attention
    if (node->src[4] || max_bias != 0.0f || softcap != 0.0f || few_keys != 0 || !is_f32(node) || !ggml_is_contiguous(node) || !is_f32(q) ||
            k->type != GGML_TYPE_F16 || v->type != GGML_TYPE_F16 || q->nb[0] != sizeof(float) || k->nb[0] != sizeof(half) || v->nb[0] != sizeof(half) ||
            q->ne[0] != TQ_HEAD || k->ne[0] != TQ_HEAD || v->ne[0] != TQ_HEAD || k->ne[3] != q->ne[3] || v->ne[3] != q->ne[3] ||
            v->ne[1] != k->ne[1] || v->ne[2] != k->ne[2] || q->ne[1] > TQ_DECODE_MAX || q->ne[3] > TQ_BATCH_MAX || k->ne[1] > TQ_ATTENTION_KEYS) {
        return false;
    }
    if (mask && (mask->type != GGML_TYPE_F16 || mask->nb[0] != sizeof(half) || mask->ne[0] < k->ne[1] || mask->ne[1] < q->ne[1] ||
            mask->ne[2] != 1 || mask->ne[3] != q->ne[3])) {
        return false;
    }
    a.q          = (const float *) q->data;
    a.q_token    = (int64_t) q->nb[1];
    a.q_head     = (int64_t) q->nb[2];
    a.q_stream   = (int64_t) q->nb[3];
    a.k          = (const half *) k->data;
    a.k_key      = (int64_t) k->nb[1];
    a.k_head     = (int64_t) k->nb[2];
    a.k_stream   = (int64_t) k->nb[3];
    a.v          = (const half *) v->data;
    a.v_key      = (int64_t) v->nb[1];
    a.v_head     = (int64_t) v->nb[2];
    a.v_stream   = (int64_t) v->nb[3];
    a.mask       = mask ? (const half *) mask->data : nullptr;
    a.mask_token = mask ? (int64_t) mask->nb[1] : 0;
    a.mask_stream = mask ? (int64_t) mask->nb[3] : 0;
    a.scale      = scale;
    a.tokens     = (int) q->ne[1];
    a.streams    = (int) q->ne[3];
    a.heads      = (int) q->ne[2];
    a.heads_kv   = (int) k->ne[2];
    a.keys       = (int) k->ne[1];
    a.out        = (float *) node->data;
    return tq_attention_fits(a);
}

} // namespace
