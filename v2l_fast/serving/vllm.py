"""Adapters where vLLM's filesystem resolver finds them: a folder of PEFT directories.

vLLM asks that folder for a model it does not know by name, so nothing is registered and any number
of replicas share one folder. Internalizing stays here: the hypernetwork is not in vLLM.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from v2l_fast.errors import AdapterError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.store.adapter_store import AdapterStore, content_id


class VllmFolder:
    """PEFT directories for replicas of one base model.

    Args:
        folder: what ``VLLM_LORA_RESOLVER_CACHE_DIR`` names.
        base: exactly the name the replicas serve the base under: the resolver compares strings.
        text_only: the base is the exported text decoder alone.
    """

    def __init__(self, folder: str | os.PathLike, base: str, text_only: bool = False) -> None:
        self.folder = Path(folder)
        self._base = base
        self._text_only = text_only

    def write(self, name: str, adapter: Adapter) -> Path:
        """Make an adapter askable as ``model=name``; whole, or not there.

        Raises:
            AdapterError: its bias is not attached, or the folder cannot be written.
        """
        from v2l_fast.interop.peft import TEXT_LAYERS, VLM_LAYERS, save_peft

        layers = TEXT_LAYERS if self._text_only else VLM_LAYERS
        save_peft(adapter, self.folder / name, self._base, layers=layers)
        return self.folder / name

    def remove(self, name: str) -> None:
        """The opposite, if it is there; replicas that have it loaded keep it until they drop it."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def command(self, rank: int) -> str:
        """The command that starts a replica.

        Args:
            rank: the largest rank it must serve, the bias adapter's included.

        Raises:
            AdapterError: vLLM serves no rank that large.
        """
        from v2l_fast.interop.peft import VLLM_RANKS

        allowed = next((r for r in VLLM_RANKS if r >= rank), None)
        if allowed is None:
            raise AdapterError(
                f"rank {rank} is more than vLLM's {VLLM_RANKS[-1]}; prune the adapter or compose "
                "fewer chunks"
            )
        words = [
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
            "VLLM_PLUGINS=lora_filesystem_resolver",
            f"VLLM_LORA_RESOLVER_CACHE_DIR={shlex.quote(str(self.folder.resolve()))}",
            f"vllm serve {shlex.quote(self._base)} --enable-lora --max-lora-rank {allowed}",
        ]
        if not self._text_only:
            # Questions bring no pixels; the vision tower need not take memory.
            words.append("--language-model-only")
        return " ".join(words)


class PublishingStore(AdapterStore):
    """A store whose adapters are published to a :class:`VllmFolder`, too.

    Published first: an adapter that is stored is askable everywhere.
    """

    def __init__(self, folder: str | os.PathLike, published: VllmFolder) -> None:
        super().__init__(folder)
        self._published = published

    def put(self, adapter: Adapter) -> str:
        """As :meth:`AdapterStore.put`; the adapter's bias must be attached."""
        self._published.write(content_id(adapter), adapter)
        return super().put(adapter)

    def delete(self, adapter_id: str) -> None:
        """As :meth:`AdapterStore.delete`."""
        super().delete(adapter_id)
        self._published.remove(adapter_id)
