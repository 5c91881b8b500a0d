"""Exchange with other projects: released checkpoints in, PEFT adapters and a Llama decoder out.

``llama`` is imported by its own name: it needs transformers' model classes, a second of start-up.
"""

from v2l_fast.interop.frames2lora import convert, load
from v2l_fast.interop.peft import load_peft, save_peft, validate_peft

__all__ = [
    "convert",
    "load",
    "load_peft",
    "save_peft",
    "validate_peft",
]
