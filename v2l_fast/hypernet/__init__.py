"""The hypernetwork, the adapters it generates, and linear layers that apply them.

Knows nothing about videos or any VLM: it reads hidden states and writes LoRA factors.
"""

from functools import partial

from v2l_fast._deprecated import renamed
from v2l_fast.hypernet.adapter import Adapter, AdapterBatch
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork

__all__ = ["Adapter", "AdapterBatch", "HyperNetwork", "HypernetConfig"]

__getattr__ = partial(renamed, __name__)
