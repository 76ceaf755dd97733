"""Speed, size, perplexity and placement of GGUF models on llama.cpp, against its own types."""

from llamacpp_bench.bench_files import bench
from llamacpp_bench.config import Config
from llamacpp_bench.results import Results, load_results

__all__ = ["Config", "Results", "bench", "load_results"]
