"""PEFT directories where vLLM's filesystem resolver finds them.

vLLM looks up an unknown model name in that folder, so nothing is registered and any number of
replicas share one folder.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from v2l_fast.errors import AdapterError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.interop.peft import TEXT_LAYERS, VLLM_RANKS, VLM_LAYERS, save_peft


class VllmFolder:
    """A folder of PEFT directories for replicas of one base model.

    Args:
        folder: value of the replicas' ``VLLM_LORA_RESOLVER_CACHE_DIR``.
        base: exact name under which the replicas serve the base: the resolver compares strings.
        text_only: whether the base is the exported text decoder.
    """

    def __init__(self, folder: str | os.PathLike, base: str, text_only: bool = False) -> None:
        self.folder = Path(folder)
        self._base = base
        self._text_only = text_only

    def write(self, name: str, adapter: Adapter) -> Path:
        """Write an adapter, atomically, to be asked for as ``model=name``; its directory.

        Raises:
            AdapterError: its bias is not attached, or the folder cannot be written.
        """
        layers = TEXT_LAYERS if self._text_only else VLM_LAYERS
        save_peft(adapter, self.folder / name, self._base, layers=layers)
        return self.folder / name

    def remove(self, name: str) -> None:
        """Remove an adapter if it is there. Replicas that have loaded it keep it for now."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def command(self, rank: int) -> str:
        """The shell command that starts a replica.

        Args:
            rank: largest rank of the adapters, including the bias adapter's.

        Raises:
            AdapterError: vLLM does not serve this rank.
        """
        max_rank = next((r for r in VLLM_RANKS if r >= rank), None)
        if max_rank is None:
            raise AdapterError(
                f"rank {rank} exceeds vLLM's limit of {VLLM_RANKS[-1]}; prune the adapter or "
                "compose fewer chunks"
            )
        words = [
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
            "VLLM_PLUGINS=lora_filesystem_resolver",
            f"VLLM_LORA_RESOLVER_CACHE_DIR={shlex.quote(str(self.folder.resolve()))}",
            f"vllm serve {shlex.quote(self._base)} --enable-lora --max-lora-rank {max_rank}",
        ]
        if not self._text_only:
            # Questions have no pixels, so the vision tower need not take memory.
            words.append("--language-model-only")
        return " ".join(words)
