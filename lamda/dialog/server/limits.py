"""All limits of the server; `docs/serving.md` lists them in one table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one request and of all together.

    tokens: of a prompt's text and of each generated choice. candidates: of a request, and prompts times choices.
    bytes: of a body. requests: active together. total_tokens: of keys and values that all active requests may hold.
    cached_tokens: of keys and values kept of earlier prompts. key_requests, key_tokens: of one API key, if limited.
    total_bytes: of the bodies over `SMALL_BODY` that are being read. connections: open together.
    head_seconds: for the head of a request, and between two requests. body_seconds: for its body. seconds: for its
    work, waiting included. delivery_seconds: within which a client that falls behind must read some bytes.
    """

    tokens: int = 2048
    candidates: int = 64
    bytes: int = 1_000_000
    requests: int = 64
    total_tokens: int = 262_144
    cached_tokens: int = 32_768
    key_requests: int | None = None
    key_tokens: int | None = None
    total_bytes: int = 64_000_000
    connections: int = 1024
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    seconds: float = 120.0
    delivery_seconds: float = 30.0


SMALL_BODY = 65_536
"""Bodies up to this many bytes do not count in `total_bytes`: a few large ones do not keep ordinary requests out."""

STRUCTURE = 50_000
"""Commas and opening brackets of a body, counted before parsing."""

KEYS = 100
"""Keys of a JSON object, more than any of OpenAI's has."""

PARTS, STOPS = 1000, 4
"""Parts of a message, stop strings of a request. A conversation may have as many messages as its body holds."""

PROBLEMS = 20
"""Problems of a request listed in an error message, which counts the others."""
