"""Frozen VLMs: everything that differs between families, behind one interface."""

from v2l_fast.vlm.base import Backbone, Prompt, PromptBuilder, VideoChunk, iter_views
from v2l_fast.vlm.loading import load_backbone

__all__ = ["Backbone", "Prompt", "PromptBuilder", "VideoChunk", "iter_views", "load_backbone"]
