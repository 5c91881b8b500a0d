"""Runs the tests of an op on every implementation that this machine has.

A test that takes the fixture ``device`` runs once on the plain PyTorch reference and once on the
Triton kernels: natively where there is a GPU (``cuda``), else in Triton's interpreter on the CPU
(``interpreter``). ``kernel_device`` runs on the kernels alone. A test that takes ``dtype`` next to
either runs in every dtype that the implementation serves. With a GPU, ``pytest tests/csrc_triton``
is therefore the GPU's test suite.

A module that sets ``HAS_KERNELS = False`` is not interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.csrc_triton.interpreter import interpreted

KERNELS = "cuda" if torch.cuda.is_available() else "interpreter"
DTYPES = {
    "reference": (torch.float64, torch.float32, torch.bfloat16),
    # Triton's interpreter computes bfloat16 wrongly.
    "interpreter": (torch.float32, torch.float16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    fixture = next((f for f in ("device", "kernel_device") if f in metafunc.fixturenames), None)
    if fixture is None:
        return
    names = [KERNELS] if fixture == "kernel_device" else ["reference", KERNELS]
    if not getattr(metafunc.module, "HAS_KERNELS", True):
        names = [name for name in names if name != "interpreter"]
    if "dtype" in metafunc.fixturenames:
        cases = [(name, dtype) for name in names for dtype in DTYPES[name]]
        ids = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in cases]
        metafunc.parametrize((fixture, "dtype"), cases, indirect=[fixture], ids=ids)
    else:
        metafunc.parametrize(fixture, names, indirect=True)


@pytest.fixture
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """Where the tensors of the implementation under test live; V2L_BACKEND selects it."""
    name = request.param
    monkeypatch.setenv("V2L_BACKEND", "reference" if name == "reference" else "triton")
    if name == "interpreter":
        with interpreted():
            yield torch.device("cpu")
    else:
        yield torch.device("cuda" if name == "cuda" else "cpu")


kernel_device = device
