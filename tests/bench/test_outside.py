"""Kernels of other projects: PEFT itself, and the others by fakes of their interfaces.

The fakes show that the inputs are handed over in the form that the interfaces describe. The kernels
themselves have not run.
"""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from bench import ladder, outside


def test_peft_computes_the_same():
    row = ladder._Maker("cpu", torch.float32).linear("tiny", 6, 2, 3, 8, 24, 16, False)
    assert row.outside == {"peft"}
    assert ladder.row_error(row, row.functions["peft"]) <= row.allowed_error
    record = ladder.measure(row, "cpu", 0.0, False)
    assert record["passed"] and record["speedups"]["peft"] > 0


def test_a_wrong_variant_gets_no_time(monkeypatch):
    monkeypatch.setattr(outside, "installed", lambda name: name == "peft")
    right = outside._peft

    def wrong(*arguments):
        call = right(*arguments)
        return lambda *inputs: 1.1 * call(*inputs)

    monkeypatch.setattr(outside, "_peft", wrong)
    row = ladder._Maker("cpu", torch.float32).linear("tiny", 6, 2, 3, 8, 24, 16, False)
    record = ladder.measure(row, "cpu", 0.0, False)
    assert "relative error" in record["failures"]["peft"] and "peft" not in record["seconds"]
    assert record["passed"] and "ours" in record["seconds"]


def test_a_variant_that_cannot_be_built_is_an_entry(monkeypatch):
    monkeypatch.setattr(outside, "installed", lambda name: True)
    monkeypatch.setitem(sys.modules, "peft", SimpleNamespace())
    row = ladder._Maker("cpu", torch.float32).linear("tiny", 2, 1, 2, 8, 24, 16, False)
    record = ladder.measure(row, "cpu", 0.0, False)
    assert record["passed"] and "ImportError" in record["failures"]["peft"]


# --- fakes ----------------------------------------------------------------------------------------


def attend(query, keys, width, tokens):
    """[N, P, D] over keys [N, S', D] up to ``tokens``: out [N, P, width], natural log-sum-exp."""
    scores = (query.float() @ keys.float().mT)[..., :tokens]
    out = scores.softmax(-1) @ keys[:, :tokens, :width].float()
    return out.to(query.dtype), scores.logsumexp(-1)


def flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, head_dim_v, metadata, splits,
                           softmax_scale, causal):  # fmt: skip
    assert q.shape[-1] == k_cache.shape[-1] == 576 and k_cache.shape[1:3] == (64, 1)
    keys = k_cache[block_table.long(), :, 0].flatten(1, 2)
    out, lse = attend(q[:, 0], keys, head_dim_v, int(cache_seqlens[0]))
    return out[:, None], lse[..., None]


def flash_attn_with_kvcache(q, k_cache, v_cache, qv, cache_seqlens, softmax_scale, causal,
                            return_softmax_lse):  # fmt: skip
    assert q.shape[-1] == k_cache.shape[-1] == 64 and softmax_scale == 1.0 and not causal
    assert q.shape[:3] == qv.shape[:3] and k_cache.shape[:3] == v_cache.shape[:3]
    query, keys = torch.cat([q, qv], -1)[:, 0], torch.cat([k_cache, v_cache], -1)[:, :, 0]
    scores = (query.float() @ keys.float().mT)[..., : int(cache_seqlens[0])]
    out = scores.softmax(-1) @ v_cache[:, : int(cache_seqlens[0]), 0].float()
    return out.to(q.dtype)[:, None], scores.logsumexp(-1)[..., None]


class Wrapper:
    def __init__(self, workspace):
        pass

    def plan(self, qo, kv, indices, lengths, heads, ckv, kpe, page, causal, scale, q, k):
        assert (ckv, kpe, page, scale) == (512, 64, 64, 1.0)
        self.pages, self.tokens = int(kv[1]), int(lengths[0])

    def run(self, query, rotary, pages, rotary_pages, return_lse):
        keys = pages.view(len(query), -1, pages.shape[-1])
        out, lse = attend(query, keys, 512, self.tokens)
        return out, lse / math.log(2)


def gemm_gated(a, b, activation, store_preact):
    gated = a @ b
    return None, F.silu(gated[:, ::2]) * gated[:, 1::2]


class LoRAKernelMeta:
    @classmethod
    def make(cls, loras, tokens, device):
        return cls()

    def prepare_tensors(self, mapping):
        self.mapping = mapping

    def meta_args(self, tokens, specialize):
        return (self.mapping.long(),)


def lora_shrink(x, weights, out, mapping, scale):
    out[0] = torch.einsum("td,trd->tr", x.float(), weights[0][mapping].float()) * scale


def lora_expand(shrunk, weights, y, mapping, offset_start, add_inputs):
    y += torch.einsum("tr,tdr->td", shrunk[0], weights[0][mapping].float()).to(y.dtype)


def add_lora_bgmv(y, x, a, b, owners, layer, scale):
    u = torch.einsum("td,trd->tr", x.float(), a[owners, layer].float()) * scale
    y += torch.einsum("tr,tdr->td", u, b[owners, layer].float()).to(y.dtype)


FAKES = {
    "flash_mla": SimpleNamespace(
        flash_mla_with_kvcache=flash_mla_with_kvcache, get_mla_metadata=lambda *_: (None, None)
    ),
    "flash_attn_interface": SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache),
    "flashinfer.mla": SimpleNamespace(BatchMLAPagedAttentionWrapper=Wrapper),
    "liger_kernel.ops.swiglu": SimpleNamespace(
        LigerSiLUMulFunction=SimpleNamespace(apply=lambda gate, up: F.silu(gate) * up)
    ),
    "fla.modules.activations": SimpleNamespace(
        swiglu_linear=lambda gate, up, weight, bias: F.linear(F.silu(gate) * up, weight, bias)
    ),
    "quack.gemm_interface": SimpleNamespace(gemm_gated=gemm_gated),
    "vllm.lora.ops.triton_ops": SimpleNamespace(
        LoRAKernelMeta=LoRAKernelMeta, lora_shrink=lora_shrink, lora_expand=lora_expand
    ),
    "punica.ops": SimpleNamespace(add_lora_bgmv=add_lora_bgmv),
}


@pytest.fixture
def fakes(monkeypatch):
    for name, module in FAKES.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), SimpleNamespace(__path__=[]))
        monkeypatch.setitem(sys.modules, name, module)


def check(row: ladder.Row, function: outside.Function) -> None:
    # A rounding to bfloat16 more than ours.
    assert ladder.row_error(row, function) <= 2 * row.allowed_error


@pytest.mark.parametrize("tokens", [64, 100])
@pytest.mark.parametrize(
    "make", [outside._flash_mla, outside._flash_attention_3, outside._flashinfer_mla]
)
def test_attention_is_handed_over_as_the_interfaces_describe(fakes, make, tokens):
    row = ladder._Maker("cpu", torch.bfloat16).attention("tiny", 2, tokens, 16, 512, False)
    check(row, make(*row.inputs[:2]))


@pytest.mark.parametrize("make", [outside._liger, outside._fla, outside._quack])
def test_gated_projection_is_handed_over_as_the_interfaces_describe(fakes, make):
    row = ladder._Maker("cpu", torch.bfloat16).gated("tiny", 33, 16, 8)
    check(row, make(*row.inputs[1:3]))


@pytest.mark.parametrize("make", [outside._vllm, outside._punica])
def test_adapters_are_handed_over_as_the_interfaces_describe(fakes, make):
    row = ladder._Maker("cpu", torch.bfloat16).linear("tiny", 6, 2, 3, 8, 24, 16, False)
    check(row, make(*row.inputs[2:], torch.arange(6) * 3 // 6, 2, 128.0))


def test_a_row_appears_where_its_package_is_installed(monkeypatch):
    """By the table that a GPU reads; the tensors here are on none."""
    half, wide = (torch.empty(1, device="meta", dtype=d) for d in (torch.bfloat16, torch.float32))
    assert outside.gated_projection(half, half) == {}

    class OnGpu(SimpleNamespace):
        device = SimpleNamespace(type="cuda")

    query = OnGpu(dtype=half.dtype, shape=(2, 128, 512))
    monkeypatch.setattr(outside, "_built", lambda make, *_: make)
    for package, make in (
        ("flash_mla", outside._flash_mla),
        ("flash_attn_interface", outside._flash_attention_3),
        ("flashinfer", outside._flashinfer_mla),
    ):
        monkeypatch.setattr(outside, "installed", lambda name, p=package: name == p)
        assert outside.perceiver_attention(query, query) == {package: make}
    monkeypatch.setattr(outside, "installed", lambda name: name in ("fla", "quack"))
    assert set(outside.gated_projection(OnGpu(dtype=half.dtype), half)) == {"fla", "quack"}
    assert set(outside.gated_projection(OnGpu(dtype=wide.dtype), wide)) == {"fla"}
