// One type a file, as the generated instances beside this one, so that they compile side by side.

#include "../mmq.cuh"

DECL_MMQ_CASE(GGML_TYPE_TQ1_1);
