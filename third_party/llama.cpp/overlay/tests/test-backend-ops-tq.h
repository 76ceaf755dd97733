// A decoder block without its attention, of our types: what a backend may fuse around them, at once and
// in its places. Included by test-backend-ops.cpp, which has the class test_case.

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

    double max_nmse_err() override { return 5e-4; }

    ggml_tensor * check(ggml_tensor * t) {
        checked.push_back(t);
        return t;
    }

    ggml_tensor * linear(ggml_context * ctx, ggml_tensor * x, int64_t rows, bool add = false, ggml_type w_type = GGML_TYPE_COUNT) {
        ggml_tensor * w = ggml_new_tensor_2d(ctx, w_type == GGML_TYPE_COUNT ? type : w_type, x->ne[0], rows);
        ggml_tensor * y = ggml_mul_mat(ctx, w, x);
        return check(add ? ggml_add(ctx, y, ggml_new_tensor_1d(ctx, GGML_TYPE_F32, rows)) : y);
    }

    ggml_tensor * norm(ggml_context * ctx, ggml_tensor * x) {
        ggml_tensor * w = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, x->ne[0]);
        return ggml_mul(ctx, ggml_rms_norm(ctx, x, 1e-5f), w);
    }

    // x, plus what a plain matrix makes of h, so that h itself is wanted
    ggml_tensor * with_other(ggml_context * ctx, ggml_tensor * x, ggml_tensor * h) {
        return other ? check(ggml_add(ctx, x, linear(ctx, h, x->ne[0], false, GGML_TYPE_F16))) : x;
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        checked.clear();
        ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k, n);
        ggml_tensor * r = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k, n);

        ggml_tensor * sum = check(ggml_add(ctx, x, r));
        ggml_tensor * h   = norm(ctx, sum);
        ggml_tensor * q   = linear(ctx, h, k - 48, bias);
        ggml_tensor * key = linear(ctx, h, 33, bias);
        ggml_tensor * v   = linear(ctx, h, 15, bias);
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

static void add_tq_block_cases(std::vector<std::unique_ptr<test_case>> & test_cases) {
    for (ggml_type type : { GGML_TYPE_TQ2_1, GGML_TYPE_TQ1_1 }) {
        for (int64_t n : { 1, 2, 3, 8, 9, 40, 130 }) {
            test_cases.emplace_back(new test_tq_block(type, n, 640));
            test_cases.emplace_back(new test_tq_block(type, n, 640, GGML_GLU_OP_GEGLU, true));
            test_cases.emplace_back(new test_tq_block(type, n, 256, GGML_GLU_OP_SWIGLU, true, true));
        }
        test_cases.emplace_back(new test_tq_block(type, 1, 4096));
        test_cases.emplace_back(new test_tq_block(type, 16, 4096));
        test_cases.emplace_back(new test_tq_block(type, 3, 256, GGML_GLU_OP_REGLU)); // not fused
    }
}
