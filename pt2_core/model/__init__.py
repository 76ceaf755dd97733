"""A model's folder as its files have it: settings, tensors, tokenizer, card. Free of torch."""
