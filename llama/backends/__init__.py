"""How a loaded network computes: CPU kernels, torch.compile, quantized, offloaded."""
