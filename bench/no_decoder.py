"""Lets the package be imported where PyAV is not installed, as on a bare GPU machine.

Importing this puts empty stand-ins in PyAV's place. The benchmarks' frames are random, so nothing
decodes; what would decode there fails.
"""

from __future__ import annotations

import importlib.util
import sys
from unittest.mock import MagicMock

MODULES = ("av", "av.container", "av.sidedata", "av.sidedata.sidedata", "av.video",
           "av.video.stream")  # fmt: skip

if "av" not in sys.modules and importlib.util.find_spec("av") is None:
    sys.modules |= {name: MagicMock() for name in MODULES}
