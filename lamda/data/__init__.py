"""Text to samples: card -> files -> lanes -> documents -> blocks -> order -> micro-batches.

Numpy only; rank and world are plain numbers here. `docs/data.md` states the guarantee.
"""
