"""Training under DeepSpeed: engine, optimiser, checkpoints, metrics, evaluation and the loop."""
