"""Model sizes by name.

LaMDA (arXiv 2201.08239, Table 27) gives layers, width and heads of 2b, 8b and 137b, and the 137b's
`d_ff = 8 d_model`, `d_head = 128`. The other sizes keep those ratios.
"""

_KEYS = ("vocab_size", "d_model", "n_layers", "n_heads", "d_head")
_SIZES = {
    "tiny": (4096, 128, 4, 4, 64),
    "110m": (32000, 640, 7, 10, 128),
    "422m": (32000, 1152, 9, 18, 128),
    "2b": (32000, 2560, 10, 40, 128),
    "8b": (32000, 4096, 16, 64, 128),
    "137b": (32000, 8192, 64, 128, 128),
}
PRESETS: dict[str, dict[str, int]] = {
    name: {**dict(zip(_KEYS, size, strict=True)), "d_ff": 8 * size[1]} for name, size in _SIZES.items()
}
