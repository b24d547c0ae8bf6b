"""A trained LaMDA among other people's tools: Hugging Face, evaluation harnesses."""
