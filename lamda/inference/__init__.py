"""Using a trained model; knows nothing of training."""
