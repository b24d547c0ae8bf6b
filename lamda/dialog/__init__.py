"""Dialogue: conversations, their encoding and conversion, and fine-tuning on them."""
