// Parts of a decoder block of our types, with what a backend may fuse around them. Included by
// test-backend-ops.cpp, which has the class test_case.

// A block without its attention.
struct test_tq_block : public test_case {
    const ggml_type   type;
    const int64_t     n;     // tokens
    const int64_t     k;     // width
    const ggml_glu_op glu_op;
    const bool        bias;  // as Qwen2's, after q, k, v
    const bool        other; // a matrix of another type reads the norms and the gated unit as well

    std::vector<ggml_tensor *> checked;

    test_tq_block(ggml_type type, int64_t n, int64_t k, ggml_glu_op glu_op = GGML_GLU_OP_SWIGLU, bool bias = false, bool other = false)
        : type(type), n(n), k(k), glu_op(glu_op), bias(bias), other(other) {}

    std::string vars() override {
        return VARS_TO_STR6(type, n, k, glu_op, bias, other);
    }

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "TQ_BLOCK";
    }

    bool run_whole_graph() override { return true; }

    std::vector<ggml_tensor *> fusion_test_nodes() override { return checked; }

    // three products in a row; activations may be rounded in blocks of 32 here and of 128 there
    double max_nmse_err() override { return 5e-3; }

    // Values that no backend leaves out, since several nodes read them or none can take them in.
    ggml_tensor * check(ggml_tensor * t) {
        checked.push_back(t);
        return t;
    }

    ggml_tensor * linear(ggml_context * ctx, ggml_tensor * x, int64_t rows, bool add = false) {
        ggml_tensor * w = ggml_new_tensor_2d(ctx, type, x->ne[0], rows);
        ggml_tensor * y = ggml_mul_mat(ctx, w, x);
        return add ? ggml_add(ctx, y, ggml_new_tensor_1d(ctx, GGML_TYPE_F32, rows)) : y;
    }

    ggml_tensor * norm(ggml_context * ctx, ggml_tensor * x) {
        ggml_tensor * w = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, x->ne[0]);
        return ggml_mul(ctx, ggml_rms_norm(ctx, x, 1e-5f), w);
    }

    // x, plus what a plain matrix makes of h, so that h itself is wanted
    ggml_tensor * with_other(ggml_context * ctx, ggml_tensor * x, ggml_tensor * h) {
        return other ? ggml_add(ctx, x, ggml_mul_mat(ctx, ggml_new_tensor_2d(ctx, GGML_TYPE_F16, h->ne[0], x->ne[0]), h)) : x;
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        checked.clear();
        ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k, n);
        ggml_tensor * r = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k, n);

        ggml_tensor * sum = check(ggml_add(ctx, x, r));
        ggml_tensor * h   = norm(ctx, sum);
        ggml_tensor * q   = check(linear(ctx, h, k - 48, bias));
        ggml_tensor * key = check(linear(ctx, h, 33, bias));
        ggml_tensor * v   = check(linear(ctx, h, 15, bias));
        ggml_tensor * qkv = ggml_concat(ctx, ggml_concat(ctx, q, key, 0), v, 0);
        ggml_tensor * o   = with_other(ctx, linear(ctx, qkv, k), h);

        ggml_tensor * mid = check(ggml_add(ctx, o, sum));
        ggml_tensor * h2  = norm(ctx, mid);
        ggml_tensor * up   = linear(ctx, h2, 384);
        ggml_tensor * gate = linear(ctx, h2, 384);
        ggml_tensor * act  = ggml_glu_split(ctx, gate, up, glu_op);
        ggml_tensor * down = with_other(ctx, linear(ctx, act, k), act);

        ggml_tensor * out = check(ggml_add(ctx, down, mid));
        ggml_set_name(out, "out");
        return out;
    }

    void initialize_tensors(ggml_context * ctx) override {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            init_tensor_uniform(t);
        }
    }
};

// The way of q, k and v from their matrices into a cache of 256 rows, attention over it, and the product with its output.
struct test_tq_attention : public test_case {
    const ggml_type type;
    const int64_t   n;        // tokens
    const int64_t   head;     // columns of a head
    const int64_t   heads;
    const int64_t   heads_kv;
    const int       mode;     // of ROPE
    const bool      factors;  // frequency factors, and extrapolation
    const int       output;   // 0: no product after attention, 1: one, 2: another node reads its values as well
    const int64_t   width = 256;
    const int64_t   cells = 256;

    std::vector<ggml_tensor *> checked;

    test_tq_attention(ggml_type type, int64_t n, int64_t head, int64_t heads, int64_t heads_kv, int mode, bool factors, int output = 0)
        : type(type), n(n), head(head), heads(heads), heads_kv(heads_kv), mode(mode), factors(factors), output(output) {}

    std::string vars() override {
        return VARS_TO_STR8(type, n, head, heads, heads_kv, mode, factors, output);
    }

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "TQ_ATTENTION";
    }

    bool run_whole_graph() override { return true; }

    std::vector<ggml_tensor *> fusion_test_nodes() override { return checked; }

    // with the product, as TQ_BLOCK's
    // the templates round activations by 32, the CPU by 128: up to 4e-3 behind the softmax; what is wrong is near 1
    double max_nmse_err() override { return 1e-2; }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * x    = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, width, n);
        ggml_tensor * pos  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
        ggml_tensor * rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n);
        ggml_tensor * freq = factors ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, head / 2) : nullptr;
        ggml_set_name(pos, "pos");
        ggml_set_name(rows, "rows");
        if (freq) {
            ggml_set_name(freq, "freq");
        }
        const auto matrix = [&](int64_t n_heads) {
            ggml_tensor * y = ggml_mul_mat(ctx, ggml_new_tensor_2d(ctx, type, width, head * n_heads), x);
            return ggml_reshape_3d(ctx, y, head, n_heads, n);
        };
        const auto rotated = [&](ggml_tensor * t) {
            return ggml_rope_ext(ctx, t, pos, freq, (int) head, mode, 4096, 10000.0f, factors ? 0.5f : 1.0f, factors ? 0.7f : 0.0f, 1.1f, 32.0f, 1.0f);
        };
        const auto cached = [&](ggml_tensor * t) {
            ggml_tensor * cache = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, head * heads_kv, cells);
            ggml_tensor * flat  = ggml_view_2d(ctx, t, head * heads_kv, n, t->nb[2], 0);
            ggml_tensor * all   = ggml_set_rows(ctx, cache, flat, rows);
            checked.push_back(all);
            return ggml_view_3d(ctx, all, head, cells, heads_kv, all->nb[1], head * sizeof(ggml_fp16_t), 0);
        };
        checked.clear();
        ggml_tensor * q = rotated(matrix(heads));
        checked.push_back(q);
        ggml_tensor * k = cached(rotated(matrix(heads_kv)));
        ggml_tensor * v = cached(matrix(heads_kv));
        ggml_tensor * mask = nullptr;
        if (output) {
            mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, cells, n);
            ggml_set_name(mask, "mask");
        }
        ggml_tensor * out = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), k, v, mask, 1.0f / sqrtf((float) head), 0.0f, 0.0f);
        if (output) {
            ggml_tensor * values = ggml_reshape_2d(ctx, out, head * heads, n);
            out = ggml_mul_mat(ctx, ggml_new_tensor_2d(ctx, type, head * heads, width), values);
            if (output == 2) {
                out = ggml_add(ctx, out, ggml_mul_mat(ctx, ggml_new_tensor_2d(ctx, GGML_TYPE_F16, head * heads, width), values));
            }
        }
        ggml_set_name(out, "out");
        checked.push_back(out);
        return out;
    }

    void initialize_tensors(ggml_context * ctx) override {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (strcmp(t->name, "pos") == 0) {
                std::vector<int32_t> data(n);
                for (int64_t i = 0; i < n; i++) {
                    data[i] = (int32_t) (7 + 3 * i);
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (strcmp(t->name, "rows") == 0) {
                std::vector<int64_t> data(n);
                for (int64_t i = 0; i < n; i++) {
                    data[i] = (i * 37 + 5) % cells; // each row once
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (strcmp(t->name, "mask") == 0) { // some keys hidden, and all of the last 100
                std::vector<ggml_fp16_t> data(cells * n);
                for (int64_t i = 0; i < cells * n; i++) {
                    const int64_t key = i % cells;
                    data[i] = ggml_fp32_to_fp16(key >= cells - 100 || (key + i / cells) % 3 == 1 ? -INFINITY : 0.0f);
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (strcmp(t->name, "freq") == 0) {
                init_tensor_uniform(t, 0.9f, 1.1f);
            } else {
                init_tensor_uniform(t);
            }
        }
    }
};

static void add_tq_block_cases(std::vector<std::unique_ptr<test_case>> & test_cases) {
    for (ggml_type type : { GGML_TYPE_TQ2_1, GGML_TYPE_TQ1_1 }) {
        for (int64_t n : { 1, 2, 3, 8, 9, 40, 130 }) {
            test_cases.emplace_back(new test_tq_block(type, n, 640));
            test_cases.emplace_back(new test_tq_block(type, n, 640, GGML_GLU_OP_GEGLU, true));
            test_cases.emplace_back(new test_tq_block(type, n, 256, GGML_GLU_OP_SWIGLU, true, true));
        }
        for (int64_t n : { 1, 4, 70 }) {
            for (int mode : { GGML_ROPE_TYPE_NORMAL, GGML_ROPE_TYPE_NEOX }) {
                test_cases.emplace_back(new test_tq_attention(type, n, 128, 4, 4, mode, false));
                test_cases.emplace_back(new test_tq_attention(type, n, 64, 6, 2, mode, true));
            }
        }
        for (int64_t n : { 1, 3, 8, 9 }) {
            for (int output : { 1, 2 }) {
                test_cases.emplace_back(new test_tq_attention(type, n, 128, 4, 4, GGML_ROPE_TYPE_NORMAL, false, output));
                test_cases.emplace_back(new test_tq_attention(type, n, 128, 16, 2, GGML_ROPE_TYPE_NEOX, false, output));
            }
            test_cases.emplace_back(new test_tq_attention(type, n, 64, 6, 2, GGML_ROPE_TYPE_NORMAL, false, 1)); // another head size
        }
        test_cases.emplace_back(new test_tq_block(type, 1, 4096));
        test_cases.emplace_back(new test_tq_block(type, 16, 4096));
        test_cases.emplace_back(new test_tq_block(type, 3, 256, GGML_GLU_OP_REGLU)); // not fused
    }
}
