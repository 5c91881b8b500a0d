"""What differs between VLM families, behind one interface; nothing outside this names one."""

from v2l_fast.vlm.base import Backbone, Prompt
from v2l_fast.vlm.loading import load_backbone

__all__ = ["Backbone", "Prompt", "load_backbone"]
