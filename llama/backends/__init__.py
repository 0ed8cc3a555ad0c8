"""Ways to run a model: CPU kernels, torch.compile, quantized, offloaded."""
