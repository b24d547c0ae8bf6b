"""The training loop and what belongs to it, for any engine and any task."""
