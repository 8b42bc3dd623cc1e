"""Sampling groups of answers: `sampling.py` draws a token, `engine.py` decodes groups."""
