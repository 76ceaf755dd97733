// Opens the GGUF files named on stdin as llama.cpp does (header only) and asks for everything in it.
// Built by tests/fuzz/kernels.py: gguf.cpp with sanitizers, the rest of ggml from the build.

#include "ggml.h"
#include "gguf.h"

#include <cstdio>
#include <cstring>
#include <iostream>
#include <string>

static size_t used;

int main() {
    long opened = 0, refused = 0;
    for (std::string path; std::getline(std::cin, path);) {
        ggml_context * meta = nullptr;
        const gguf_init_params params = { /*no_alloc*/ true, /*ctx*/ &meta };
        gguf_context * ctx = gguf_init_from_file(path.c_str(), params);
        if (!ctx) {
            ++refused;
            continue;
        }
        ++opened;
        for (int64_t i = 0; i < gguf_get_n_kv(ctx); ++i) {
            used += strlen(gguf_get_key(ctx, i));
            if (gguf_get_kv_type(ctx, i) == GGUF_TYPE_STRING) {
                used += strlen(gguf_get_val_str(ctx, i));
            } else if (gguf_get_kv_type(ctx, i) == GGUF_TYPE_ARRAY) {
                for (size_t j = 0; j < gguf_get_arr_n(ctx, i); ++j) {
                    used += gguf_get_arr_type(ctx, i) == GGUF_TYPE_STRING ? strlen(gguf_get_arr_str(ctx, i, j)) : 1;
                }
            }
        }
        for (int64_t i = 0; i < gguf_get_n_tensors(ctx); ++i) {
            used += gguf_get_tensor_size(ctx, i) + gguf_get_tensor_offset(ctx, i) + strlen(gguf_get_tensor_name(ctx, i));
        }
        gguf_free(ctx);
        ggml_free(meta);
    }
    printf("ok %ld opened, %ld refused\n", opened, refused);
    return used == 1; // so that nothing is left out
}
