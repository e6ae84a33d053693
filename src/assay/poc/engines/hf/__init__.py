"""The engine on transformers: the definition, and the default on CPU and CUDA."""
