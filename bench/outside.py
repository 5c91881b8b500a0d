"""Kernels of other projects as variants of the rows of ``bench.ladder``, where they are installed.

``bench.runs.gpu`` measures them. Each takes the same inputs as ours and passes the same comparison
with float64 before it is timed. What brings the inputs into a kernel's form counts as its time
where they change at every call (a scaled and padded context), and not where they are weights
(interleaved, transposed, registered).

Of these, PEFT alone has been run; the others follow their projects' interfaces as published. One
whose interface has changed is an entry of the table with its error.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]
# Tokens of a page of a cache in FlashMLA and FlashInfer.
PAGE = 64
# Width of the rotary part of a DeepSeek key, which our context does not have.
ROTARY = 64
LATENT = 512


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def _built(make: Callable[..., Function], *arguments: object) -> Function:
    """The variant, or one that raises what kept it from being built."""
    try:
        return make(*arguments)
    except Exception as error:
        failure = error

    def fails(*_: Tensor) -> Tensor:
        raise failure

    return fails


def perceiver_attention(query: Tensor, context: Tensor) -> dict[str, Function]:
    """MLA decoding: P heads of one query token over a latent context that is key and value."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type != "cuda" or not half or query.shape[-1] != LATENT:
        return {}
    makers = {
        "flash_mla": _flash_mla,
        "flash_attn_interface": _flash_attention_3,
        "flashinfer": _flashinfer_mla,
    }
    return {name: _built(make, query, context) for name, make in makers.items() if installed(name)}


def _pages(context: Tensor, inv_rms: Tensor, extra: int) -> Tensor:
    """The normalized context [N, S, Z] as pages [N * pages, PAGE, Z + extra], zero-filled."""
    normed = (context * inv_rms[..., None]).to(context.dtype)
    padding = -context.shape[1] % PAGE
    return F.pad(normed, (0, extra, 0, padding)).view(-1, PAGE, context.shape[2] + extra)


def _flash_mla(query: Tensor, context: Tensor) -> Function:
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    slices, tokens, _ = context.shape
    rows = query.shape[1]
    integers = {"dtype": torch.int32, "device": query.device}
    lengths = torch.full((slices,), tokens, **integers)
    pages = -(-tokens // PAGE)
    table = torch.arange(slices * pages, **integers).view(slices, pages)

    def call(query: Tensor, context: Tensor, inv_rms: Tensor) -> tuple[Tensor, Tensor]:
        metadata, splits = get_mla_metadata(lengths, rows, 1)
        out, lse = flash_mla_with_kvcache(
            F.pad(query, (0, ROTARY))[:, None],
            _pages(context, inv_rms, ROTARY)[:, :, None],
            table, lengths, LATENT, metadata, splits, softmax_scale=1.0, causal=False,
        )  # fmt: skip
        return out[:, 0], lse[:, :, 0]

    return call


def _flash_attention_3(query: Tensor, context: Tensor) -> Function:
    """FlashAttention 3's MLA decoding, on Hopper: the latent part of a query is ``qv``."""
    from flash_attn_interface import flash_attn_with_kvcache

    slices, tokens, _ = context.shape
    lengths = torch.full((slices,), tokens, dtype=torch.int32, device=query.device)
    rotary = query.new_zeros(slices, 1, query.shape[1], ROTARY)
    rotary_keys = query.new_zeros(slices, tokens, 1, ROTARY)

    def call(query: Tensor, context: Tensor, inv_rms: Tensor) -> tuple[Tensor, Tensor]:
        normed = (context * inv_rms[..., None]).to(context.dtype)[:, :, None]
        out, lse, *_ = flash_attn_with_kvcache(
            rotary, rotary_keys, normed, qv=query[:, None], cache_seqlens=lengths,
            softmax_scale=1.0, causal=False, return_softmax_lse=True,
        )  # fmt: skip
        return out[:, 0], lse[:, :, 0]

    return call


def _flashinfer_mla(query: Tensor, context: Tensor) -> Function:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    slices, tokens, _ = context.shape
    rows, dtype = query.shape[1], query.dtype
    pages = -(-tokens // PAGE)
    integers = {"dtype": torch.int32, "device": query.device}
    wrapper = BatchMLAPagedAttentionWrapper(
        torch.empty(128 << 20, dtype=torch.int8, device=query.device)
    )
    wrapper.plan(
        torch.arange(slices + 1, **integers),
        torch.arange(slices + 1, **integers) * pages,
        torch.arange(slices * pages, **integers),
        torch.full((slices,), tokens, **integers),
        rows, LATENT, ROTARY, PAGE, False, 1.0, dtype, dtype,
    )  # fmt: skip
    rotary = query.new_zeros(slices, rows, ROTARY)
    rotary_pages = query.new_zeros(slices * pages, PAGE, ROTARY)

    def call(query: Tensor, context: Tensor, inv_rms: Tensor) -> tuple[Tensor, Tensor]:
        pages = _pages(context, inv_rms, 0)
        out, lse = wrapper.run(query, rotary, pages, rotary_pages, return_lse=True)
        # In base 2.
        return out, lse * math.log(2)

    return call


def gated_projection(gate: Tensor, up: Tensor) -> dict[str, Function]:
    """Liger's and FLA's fused activation, and QuACK's product with it in its epilogue."""
    if gate.device.type != "cuda":
        return {}
    makers = {"liger_kernel": _liger, "fla": _fla, "quack": _quack}
    if gate.dtype == torch.float32:
        del makers["quack"]
    return {name: _built(make, gate, up) for name, make in makers.items() if installed(name)}


def _liger(gate: Tensor, up: Tensor) -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def call(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(LigerSiLUMulFunction.apply(F.linear(x, gate), F.linear(x, up)), down)

    return call


def _fla(gate: Tensor, up: Tensor) -> Function:
    from fla.modules.activations import swiglu_linear

    def call(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return swiglu_linear(F.linear(x, gate), F.linear(x, up), down, None)

    return call


def _quack(gate: Tensor, up: Tensor) -> Function:
    from quack.gemm_interface import gemm_gated

    # Columns of gate and up take turns.
    weight = torch.stack([gate, up], 1).flatten(0, 1).T

    def call(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        _, hidden = gemm_gated(x, weight, activation="swiglu", store_preact=False)
        return F.linear(hidden, down)

    return call


def lora_linear(
    weight: Tensor, a: Tensor, b: Tensor, index: Tensor, tokens: int, scale: float
) -> dict[str, Function]:
    """One adapter for each example: vLLM's and Punica's kernels, and PEFT's mixed batch.

    Args:
        index: [E], the adapter of each example; all have one.
        tokens: of each example.
    """
    if weight.device.type == "meta":
        return {}
    makers: dict[str, tuple[Callable[..., Function], tuple]] = {
        "peft": (_peft, (weight, a, b, index, scale))
    }
    if weight.device.type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16):
        makers |= {name: (make, (a, b, index, tokens, scale))
                   for name, make in (("vllm", _vllm), ("punica", _punica))}  # fmt: skip
    return {name: _built(make, *args) for name, (make, args) in makers.items() if installed(name)}


def _vllm(a: Tensor, b: Tensor, index: Tensor, tokens: int, scale: float) -> Function:
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    rows = len(index) * tokens
    metadata = LoRAKernelMeta.make(len(a), rows, a.device)
    metadata.prepare_tensors(index.repeat_interleave(tokens).to(torch.int32))
    wide = b.mT.contiguous()

    def call(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        y = F.linear(flat, weight)
        shrunk = torch.empty(1, rows, a.shape[1], dtype=torch.float32, device=x.device)
        arguments = metadata.meta_args(rows, False)
        lora_shrink(flat, [a], shrunk, *arguments, scale)
        lora_expand(shrunk, [wide], y, *arguments, offset_start=0, add_inputs=True)
        return y.view(*x.shape[:2], -1)

    return call


def _punica(a: Tensor, b: Tensor, index: Tensor, tokens: int, scale: float) -> Function:
    from punica.ops import add_lora_bgmv

    # [n, layers, r, d_in] and [n, layers, d_out, r].
    shrink, expand = a[:, None].contiguous(), b.mT[:, None].contiguous()
    owners = index.repeat_interleave(tokens)

    def call(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        y = F.linear(flat, weight)
        add_lora_bgmv(y, flat, shrink, expand, owners, 0, scale)
        return y.view(*x.shape[:2], -1)

    return call


def _peft(weight: Tensor, a: Tensor, b: Tensor, index: Tensor, scale: float) -> Function:
    from peft import LoraConfig, get_peft_model

    class Holder(nn.Module):
        """A model of one linear layer."""

        def __init__(self) -> None:
            super().__init__()
            with torch.device("meta"):
                self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            self.linear.weight = nn.Parameter(weight.detach(), requires_grad=False)

    rank = a.shape[1]
    config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=["linear"])
    model = get_peft_model(Holder(), config, adapter_name="0", autocast_adapter_dtype=False)
    for number in range(1, len(a)):
        model.add_adapter(str(number), config, autocast_adapter_dtype=False)
    layer = model.base_model.model.linear.to(weight.device, weight.dtype).eval()
    for number in range(len(a)):
        for side, factor in ((layer.lora_A, a[number]), (layer.lora_B, b[number].T)):
            side[str(number)].weight = nn.Parameter(factor.detach(), requires_grad=False)
    names = [str(number) for number in index.tolist()]

    def call(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return layer(x, adapter_names=names)

    return call
