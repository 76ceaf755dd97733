"""The model in PyTorch: one block at a time, or whole with latent weights."""
