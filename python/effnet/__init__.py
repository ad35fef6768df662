"""The EfficientNet family in plain PyTorch, on the layers of ``effnet_kernels``."""
