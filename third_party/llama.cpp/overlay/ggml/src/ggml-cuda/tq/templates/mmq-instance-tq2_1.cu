// One type a file, as the generated ones in template-instances/, so that they compile side by side.

#include "../../mmq.cuh"

#ifdef GGML_CUDA_TQ // from tq.cuh, which mmq.cuh includes once edits-cuda.yaml is applied
DECL_MMQ_CASE(GGML_TYPE_TQ2_1);
#endif
