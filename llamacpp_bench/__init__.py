"""Speed, size, perplexity and placement of GGUF models on llama.cpp, against its own types."""

from llamacpp_bench.pipeline import Config, bench
from llamacpp_bench.results import Results, load_results

__all__ = ["Config", "Results", "bench", "load_results"]
