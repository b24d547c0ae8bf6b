"""The same model and its training in JAX (Flax NNX); the extra `flax` installs what it needs (docs/flax.md)."""
