"""Typed, frozen configuration; never imports torch."""

from lamda.config.schema import Config, ModelConfig

__all__ = ["Config", "ModelConfig"]
