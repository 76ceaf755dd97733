#pragma once

// How many levels TQ2_1 has in this process: 3, or 4 once a model's metadata has said so. The loader sets it, the
// validation of codes and the CUDA backend read it.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

GGML_API void ggml_tq_set_levels(int levels); // never falls
GGML_API int  ggml_tq_levels(void);

#ifdef __cplusplus
}
#endif
