"""The ops of v2l_fast, usable alone: torch in, torch out, differentiable and compilable.

Each op is a folder: ``op.py`` has its signature, roofline, registration and what its kernels must
compute exactly, ``reference.py`` its definition in plain PyTorch, ``kernels.py`` its Triton
kernels, and ``configs.json`` their tile sizes. ``gated_projection`` has no kernel and is one file.
Importing this package needs torch only and no GPU.
"""

from csrc_triton.gated_projection import gated_projection
from csrc_triton.lora_linear.op import lora_linear
from csrc_triton.perceiver_attention.op import perceiver_attention
from csrc_triton.rank_projection.op import rank_projection

__all__ = ["gated_projection", "lora_linear", "perceiver_attention", "rank_projection"]
