"""Tile choices as data: one JSON file an op, chosen by GPU architecture and the nearest shape.

A file ``<op>.json`` holds a list of entries under ``sm_80``, ``sm_90`` and ``default`` (sm_86,
sm_89 and whatever is unknown; at most 99 KB of shared memory a block)::

    {"sm_90": [{"where": {"kernel": "shrink", "rank": 32, "width": 2560},
                "config": {"BLOCK_T": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}}]}

``where`` says what the entry was chosen for: words must be equal, numbers may be near. A key it
does not name does not matter to it. ``config`` goes to the launch as it is; under the kernel
"prefill" it is ``{"form": ...}``, which of lora_linear's forms to take.

``faster.json`` lists, by architecture and op, where the fused path is taken instead of the
reference: ``{"sm_90": {"perceiver_attention": [{"slices": [32, 4096]}]}}`` gives the inclusive
range of each number, null for an open end, or the word it must equal. No GPU has timed an op yet:
the rules that ship follow from the roofline at the head of each op's file. ``bench/tune.py`` writes
all of these files anew from what it measures on a GPU.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

Capability = tuple[int, int] | None


def architecture(capability: Capability) -> str:
    """The section of the files that serves a compute capability."""
    return {(8, 0): "sm_80", (9, 0): "sm_90"}.get(capability, "default")


@functools.cache
def table(name: str) -> dict[str, Any]:
    """A whole file, parsed once; to be read, not changed."""
    return json.loads(resources.files(__name__).joinpath(f"{name}.json").read_text())


def _distance(where: Mapping[str, Any], key: Mapping[str, float | str]) -> float:
    """Squared distance in log space over the numbers both name; inf when a word differs."""
    total = 0.0
    for name, wanted in where.items():
        found = key.get(name)
        if isinstance(wanted, str) or isinstance(found, str):
            if found != wanted:
                return math.inf
        elif found is not None:
            total += math.log(max(wanted, 1) / max(found, 1)) ** 2
    return total


# An op asks at every call, from a handful of shapes while it decodes.
@functools.lru_cache(maxsize=4096)
def _nearest(
    op: str, capability: Capability, key: tuple[tuple[str, float | str], ...]
) -> Mapping[str, int | str]:
    entries, wanted = table(op), dict(key)
    for section in dict.fromkeys((architecture(capability), "default")):
        ranked = [(_distance(entry["where"], wanted), entry) for entry in entries.get(section, ())]
        distance, nearest = min(ranked, key=lambda pair: pair[0], default=(math.inf, None))
        if nearest is not None and distance < math.inf:
            return nearest["config"]
    raise KeyError(f"configs/{op}.json has no entry for {wanted} on {architecture(capability)}")


def lookup(op: str, capability: Capability, **key: float | str) -> dict[str, int | str]:
    """The launch configuration nearest to a shape; the first of equally near ones.

    Args:
        op: name of the file.
        capability: of the device; None (CPU, interpreter) gets the defaults.
        key: numbers (compared by ratio) and words (compared exactly).

    Returns:
        A fresh dict: block sizes, num_warps, num_stages.

    Raises:
        KeyError: no entry fits the words of the key.
    """
    return dict(_nearest(op, capability, tuple(key.items())))


def forget() -> None:
    """Reads the files again at the next call: they were written anew."""
    table.cache_clear()
    _nearest.cache_clear()


def _within(wanted: str | list[float | None], found: float | str | None) -> bool:
    if found is None or isinstance(wanted, str):
        return found == wanted
    low, high = wanted
    return (low is None or low <= found) and (high is None or found <= high)


def prefers_fused(op: str, capability: Capability, **shape: float | str) -> bool:
    """Whether ``faster.json`` sends the op to its kernels at this shape."""
    rules = table("faster").get(architecture(capability), {}).get(op, ())
    return any(
        all(_within(wanted, shape.get(name)) for name, wanted in rule.items()) for rule in rules
    )
