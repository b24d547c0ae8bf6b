"""An open LaMDA: pre-train, fine-tune, serve (arXiv 2201.08239)."""

__version__ = "0.1.0"
