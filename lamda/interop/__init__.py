"""Interoperability with other tools: Hugging Face transformers, lm-eval."""
