"""Ops of Video2LoRA, usable alone: torch in, torch out, differentiable and compilable.

Each op has one plain definition in :mod:`csrc_triton.reference` and one file of its own with its
signature, its roofline and its registration. Importing this needs torch only and no GPU.
"""

from csrc_triton.gated_projection import gated_projection
from csrc_triton.lora_linear import lora_linear
from csrc_triton.perceiver_attention import perceiver_attention
from csrc_triton.rank_projection import rank_projection

__all__ = ["gated_projection", "lora_linear", "perceiver_attention", "rank_projection"]
