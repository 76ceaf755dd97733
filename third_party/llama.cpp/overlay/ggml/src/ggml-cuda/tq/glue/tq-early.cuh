#pragma once

// Our kernels let their successor be set up long before they end (griddepcontrol.launch_dependents at their start): right
// for successors that read nothing that a kernel has written before their own wait. Ours do not
// (benchmarks/cuda_lab/early_reads.py looks at the machine code). Some of upstream's do: nvcc 13.0 moves the loads of Q
// in flash_attn_ext_vec and flash_attn_tile up, past the wait in their source. So a kernel of upstream that follows one of
// ours is launched without dependent launch: ggml_cuda_kernel_launch asks here.

#include <unordered_set>

inline std::unordered_set<cudaStream_t> & ggml_cuda_tq_early_streams() {
    static thread_local std::unordered_set<cudaStream_t> streams;
    return streams;
}

// After a kernel of ours that upstream's may follow.
inline void ggml_cuda_tq_ends_early(cudaStream_t stream) {
    ggml_cuda_tq_early_streams().insert(stream);
}

// Whether such a kernel is the last one on the stream that we know of; asked once for each.
inline bool ggml_cuda_tq_follows(cudaStream_t stream) {
    return ggml_cuda_tq_early_streams().erase(stream) != 0;
}
