"""What serving was set out to reach on a GPU, beside what a record of it reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Seconds and bytes at most, shares at least; by part of the GPU's name, then by shape.
_BOTH = {"weight_floor_share": 0.5, "internalize_12_seconds": 0.1}
TARGETS: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "H200": {
        "500M": {"time_to_first_token": 3e-3, "internalize_1024_bytes": 24e9, **_BOTH},
        "2.2B": {"time_to_first_token": 5e-3, **_BOTH},
    }
}


def judged(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Target -> limit, reached, met: those of the record's GPU and shape that it measured."""
    reached = {}
    adapter = record.get("ways", {}).get("adapter", {})
    for name in ("time_to_first_token", "weight_floor_share"):
        reached[name] = adapter.get(name)
    for row in record.get("rows", []):
        reached[f"internalize_{row['frames']}_seconds"] = row.get("internalize_seconds")
        reached[f"internalize_{row['frames']}_bytes"] = row.get("device_bytes")
    limits = next((shapes for gpu, shapes in TARGETS.items() if gpu in record["device"]), {})
    found = {}
    for name, limit in limits.get(record["shape"], {}).items():
        value = reached.get(name)
        if value is not None:
            met = value >= limit if name.endswith("_share") else value <= limit
            found[name] = {"limit": limit, "reached": value, "met": met}
    return found
