"""Sizes and lengths of the stages that make the pair with real words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths of all stages."""

    seed: int = 0
    vision_steps: int = 1000
    vision_batch: int = 128
    vision_lr: float = 1.5e-3
    language_steps: int = 230
    language_batch: int = 4
    language_questions: int = 4
    language_lr: float = 1e-3
    layers: int = 4
    hypernet_videos: int = 1280
    hypernet_steps: int = 800
    hypernet_batch: int = 16
    hypernet_questions: int = 4
    hypernet_lr: float = 1e-3
    rank: int = 8
    latent_size: int = 128
    num_latents: int = 8
    test_videos: int = 256
    test_questions: int = 2
