"""pt2-eval: Hugging Face models, artifacts and GGUF files measured alike, in one table."""
