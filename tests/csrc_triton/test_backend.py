"""The choice between kernels and reference, and the one line that says why it cannot be had."""

from __future__ import annotations

import pytest
import torch

from csrc_triton import backend, canary, configs

SMALL = torch.zeros(2)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("V2L_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for judged in (backend._flaw, backend._warn):
        judged.cache_clear()
    yield
    for judged in (backend._flaw, backend._warn):
        judged.cache_clear()


class OnGpu:
    """What the choice reads of a tensor; no GPU needed."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def test_default_is_auto_and_auto_is_the_reference():
    assert not backend.use_triton(SMALL)
    assert not backend.use_triton(SMALL, op="lora_linear", rows=3)
    assert not backend.use_triton(OnGpu())
    assert not backend.use_triton()


@pytest.fixture
def measured(monkeypatch):
    """A GPU for which 32 rows and more were measured faster in half precision; the self-check's
    verdicts by canary, none wrong, and which were asked for."""
    monkeypatch.setattr(backend, "capability", lambda device: (9, 0))
    rules = {"faster": {"sm_90": {"lora_linear": [{"rows": [32, None], "inputs": "half"}]}}}
    monkeypatch.setattr(configs, "table", rules.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    wrong, judged = {}, []

    def judge(name, dtype, device):
        judged.append((name, dtype))
        return wrong.get(name, 0)

    monkeypatch.setattr(canary, "wrong_elements", judge)
    return wrong, judged


def test_auto_follows_the_measurements(monkeypatch, measured):
    assert backend.use_triton(OnGpu(), None, op="lora_linear", rows=32)
    assert not backend.use_triton(OnGpu(), op="lora_linear", rows=31)
    assert not backend.use_triton(OnGpu(torch.float32), op="lora_linear", rows=32)
    assert not backend.use_triton(OnGpu(), op="rank_projection", rows=32)
    assert not backend.use_triton(OnGpu(torch.float64), op="lora_linear", rows=32)
    assert not backend.use_triton(SMALL, op="lora_linear", rows=32)
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    assert not backend.use_triton(OnGpu(), op="lora_linear", rows=32)


@pytest.mark.parametrize("wanted", ["auto", "triton"])
def test_kernels_are_judged_once_before_they_are_used(monkeypatch, measured, wanted):
    monkeypatch.setenv("V2L_BACKEND", wanted)
    names = ["lora_linear", "lora_linear decoding"]
    for dtype in (torch.bfloat16, torch.float16):
        for _ in range(2):
            assert backend.use_triton(OnGpu(dtype), op="lora_linear", rows=32)
    assert measured[1] == [(n, d) for d in (torch.bfloat16, torch.float16) for n in names]
    monkeypatch.setenv("V2L_BACKEND", "triton")
    assert backend.use_triton(OnGpu(torch.float32), op="lora_linear", rows=32)
    assert len(measured[1]) == 4


@pytest.mark.filterwarnings("error")
def test_kernels_that_fail_their_self_check(monkeypatch, measured):
    measured[0]["lora_linear decoding"] = 3
    with pytest.warns(RuntimeWarning, match=r"a GPU fail .*\(3 wrong in lora_linear decoding\)"):
        assert not backend.use_triton(OnGpu(), op="lora_linear", rows=32)
    assert not backend.use_triton(OnGpu(), op="lora_linear", rows=32)
    monkeypatch.setenv("V2L_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="^V2L_BACKEND=triton: the kernels .* fail their self"):
        backend.use_triton(OnGpu(), op="lora_linear", rows=32)
    # While a graph is captured nothing can wait for the device.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backend.use_triton(OnGpu(), op="lora_linear", rows=32)


def test_reference_is_the_reference_anywhere(monkeypatch):
    monkeypatch.setenv("V2L_BACKEND", "reference")
    assert not backend.use_triton(SMALL) and not backend.use_triton(OnGpu())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_triton_on_a_gpu(monkeypatch, dtype):
    monkeypatch.setenv("V2L_BACKEND", "triton")
    assert backend.use_triton(OnGpu(dtype), None, OnGpu(torch.int64), OnGpu(torch.bool))


def test_triton_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("V2L_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.use_triton(SMALL, SMALL.half(), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="bfloat16 wrongly"):
        backend.use_triton(SMALL, SMALL.bfloat16())


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([OnGpu(), SMALL], "is on cpu"),
        ([OnGpu(), torch.zeros(2, dtype=torch.int64)], "is on cpu"),
        ([OnGpu(torch.float64)], "torch.float64"),
        ([OnGpu(torch.float8_e4m3fn)], "torch.float8_e4m3fn"),
    ],
)
def test_triton_says_in_one_line_why_not(monkeypatch, tensors, reason):
    monkeypatch.setenv("V2L_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=f"^V2L_BACKEND=triton: .*{reason}") as error:
        backend.use_triton(*tensors)
    assert "\n" not in str(error.value)


def test_triton_without_triton(monkeypatch):
    monkeypatch.setenv("V2L_BACKEND", "triton")
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="^V2L_BACKEND=triton: triton is not installed"):
        backend.use_triton(OnGpu())


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("V2L_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="V2L_BACKEND='cuda': must be one of auto, ref"):
        backend.use_triton(SMALL)


def test_devices_without_a_capability():
    assert backend.capability(torch.device("cpu")) is None
