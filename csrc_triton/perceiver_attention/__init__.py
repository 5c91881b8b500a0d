"""Absorbed Perceiver cross-attention over an RMS-normalized context."""
