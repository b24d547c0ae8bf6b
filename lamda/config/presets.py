"""Model sizes by name.

LaMDA (arXiv 2201.08239, Table 27) gives layers, width and heads of 2b, 8b and 137b, and the 137b's
`d_ff = 8 d_model`, `d_head = 128`. The other sizes keep those ratios.
"""


def _shape(*, vocab_size: int = 32000, d_model: int, n_layers: int, n_heads: int, d_head: int = 128) -> dict[str, int]:
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "d_head": d_head,
        "d_ff": 8 * d_model,
    }


PRESETS: dict[str, dict[str, int]] = {
    "tiny": _shape(vocab_size=4096, d_model=192, n_layers=4, n_heads=6, d_head=64),
    "110m": _shape(d_model=640, n_layers=7, n_heads=10),
    "422m": _shape(d_model=1152, n_layers=9, n_heads=18),
    "2b": _shape(d_model=2560, n_layers=10, n_heads=40),
    "8b": _shape(d_model=4096, n_layers=16, n_heads=64),
    "137b": _shape(d_model=8192, n_layers=64, n_heads=128),
}
