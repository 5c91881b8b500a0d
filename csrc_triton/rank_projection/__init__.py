"""Rank latents to LoRA factors: unit norm, per-layer head, scalers, split."""
