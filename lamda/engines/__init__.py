"""Engines: one optimizer step, scores and checkpoints on a framework; `protocol` is what training sees of one."""
