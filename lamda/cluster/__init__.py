"""Runs on machines: what they need and where they go."""
