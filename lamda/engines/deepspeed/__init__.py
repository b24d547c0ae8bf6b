"""PyTorch under DeepSpeed ZeRO."""
