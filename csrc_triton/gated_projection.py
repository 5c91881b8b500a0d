"""SwiGLU projection of the context (the hypernetwork's modality projection), chunked over tokens.

Roofline, per token and layer: 6·D·4D + 2·4D·Z FLOPs is 18.7 MFLOP at the 500M shape (D = 960,
Z = 512) against 2·(D + Z) = 2.9 KB in bf16: compute bound. Floor 60 ns on an A100 (312 TFLOP/s),
24 ns at 788 TFLOP/s. Keeping gate, up and their product for the backward pass takes 23 KB a token
and layer, so both passes run in chunks of tokens and the backward recomputes; a caller with memory
to spare keeps gate and up (15 KB), which saves two of the six products of a frozen context.

No Triton kernel. The products are plain GEMMs and belong to cuBLAS; fusing the elementwise part
into a GEMM of ours saves what it moves, 22.5 KB a token (5.4 ns of 29 at the 500M shape and
4.3 TB/s), and so pays only if that GEMM reaches 78% of cuBLAS on an H200, 82% on an A100, 88% and
91% at the 2.2B shape. On a GPU torch.compile can make that part one pass instead: with
``V2L_BACKEND=triton``, and with ``auto`` where ``faster.json`` marks the number of tokens.
None of it was timed yet.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from csrc_triton import dispatch
from csrc_triton.dispatch import Arguments
from csrc_triton.transforms import (
    differentiable_backward,
    refuse_forward_mode,
    register_autocast,
    run_plain,
    transformed,
)

# 4 x 1,024 tokens x 3,840 x 4 B is 63 MB of transients at the 500M shape, and larger chunks are no
# faster on a CPU. A GPU wants GEMMs that fill it: 8,192 x 3,840 outputs are 960 tiles of 128 x 256,
# for 132 multiprocessors, and 0.4 GB of transients in a bf16 backward pass.
CHUNK_TOKENS = {"cpu": 1024, "cuda": 8192}
# oneDNN is as fast with few rows, and their transients take half the memory.
ONEDNN_CHUNK_TOKENS = 512


def reference(x: Tensor, visible: Tensor | None, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) in plain PyTorch: the op's definition and CPU path."""
    if visible is not None:
        x = torch.where(visible[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    hidden = F.silu(x @ gate.T) * (x @ up.T)
    return hidden @ down.T


def reference_backward(
    grad: Tensor,
    x: Tensor,
    visible: Tensor | None,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    needs_x: bool = True,
    products: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients for x (zero at masked rows, None if not needed), gate, up and down.

    products: gate(x) and up(x) [T, H] of the forward pass; they are recomputed if omitted. Frozen
    features need no gradient, which saves two of the eight products.
    """
    if visible is not None:
        x = torch.where(visible[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    gated, raised = products or (x @ gate.T, x @ up.T)
    silu = F.silu(gated)
    d_hidden = grad @ down
    d_gated = torch.ops.aten.silu_backward(d_hidden * raised, gated)
    hidden, d_raised = silu * raised, d_hidden.mul_(silu)
    d_x = None
    if needs_x:
        d_x = d_gated @ gate + d_raised @ up
        d_x = d_x if visible is None else d_x * visible.reshape(-1, 1)
    return d_x, d_gated.T @ x, d_raised.T @ x, grad.T @ hidden


def _hidden(gated: Tensor, raised: Tensor) -> Tensor:
    """silu(gated) * raised, computed in float32 or wider."""
    wide = torch.promote_types(gated.dtype, torch.float32)
    return (F.silu(gated.to(wide)) * raised.to(wide)).to(gated.dtype)


def _hidden_backward(
    d_hidden: Tensor, gated: Tensor, raised: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gated) * raised again, and the gradients for gated and raised."""
    dtype = gated.dtype
    wide = torch.promote_types(dtype, torch.float32)
    d_hidden, gated, raised = d_hidden.to(wide), gated.to(wide), raised.to(wide)
    sigmoid = torch.sigmoid(gated)
    silu = gated * sigmoid
    d_gated = d_hidden * raised * (sigmoid + silu * (1 - sigmoid))
    return (silu * raised).to(dtype), d_gated.to(dtype), (d_hidden * silu).to(dtype)


@functools.cache
def _compiled(function: Callable) -> Callable:
    """Compiled at the first call and not at import, which would load the compiler."""
    return torch.compile(function, dynamic=True)


@contextlib.contextmanager
def _one_kind_of_tensor() -> Iterator[None]:
    """Tensors created inside look the same to the compiler in training and inference."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def fused_hidden(gated: Tensor, raised: Tensor) -> Tensor:
    """silu(gated) * raised in one compiled pass."""
    with _one_kind_of_tensor():
        return _compiled(_hidden)(gated, raised)


def fused(x: Tensor, visible: Tensor | None, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """:func:`reference` of rows [T, D] with one elementwise pass.

    Rows do not mix, so masked rows are computed from whatever they hold and zeroed afterwards.
    """
    with _one_kind_of_tensor():
        out = _compiled(_hidden)(x @ gate.T, x @ up.T) @ down.T
        return out if visible is None else out.masked_fill_(~visible[:, None], 0.0)


def fused_backward(
    grad: Tensor,
    x: Tensor,
    visible: Tensor | None,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    needs_x: bool,
    products: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """:func:`reference_backward` of rows [T, D] with one elementwise pass."""
    with _one_kind_of_tensor():
        if visible is not None:
            x = torch.where(visible[:, None], x, 0.0)
        gated, raised = products or (x @ gate.T, x @ up.T)
        hidden, d_gated, d_raised = _compiled(_hidden_backward)(grad @ down, gated, raised)
        # A row of zeros gets a gradient of zeros here, as long as ``grad`` is finite.
        d_x = torch.addmm(d_gated @ gate, d_raised, up) if needs_x else None
        return d_x, d_gated.T @ x, d_raised.T @ x, grad.T @ hidden


def _fuses(x: Tensor) -> bool:
    """Whether the elementwise part is compiled: never on a CPU."""
    if x.device.type != "cuda" or dispatch.requested_backend() == "reference":
        return False
    tokens = x.numel() // max(1, x.shape[-1])
    return dispatch.requested_backend() == "triton" or dispatch.prefers_fused(
        "gated_projection", x, tokens=tokens
    )


def _check(x: Tensor, visible: Tensor | None, gate: Tensor, up: Tensor, down: Tensor) -> None:
    check = Arguments("gated_projection")
    check.require(x.dim() > 0, "x", "[..., D]", list(x.shape))
    check.floating(x=x)
    check.shape("gate", gate, "H", x.shape[-1])
    check.shape("up", up, *gate.shape)
    check.shape("down", down, "Z", gate.shape[0])
    check.shape("visible", visible, *x.shape[:-1])
    check.dtype(x.dtype, gate=gate, up=up, down=down)
    check.dtype(torch.bool, visible=visible)
    check.device(x.device, gate=gate, up=up, down=down, visible=visible)


def _chunks(rows: Tensor, size: int | None = None) -> list[slice]:
    size = size or CHUNK_TOKENS.get(rows.device.type, CHUNK_TOKENS["cpu"])
    return [slice(start, start + size) for start in range(0, rows.shape[0], size)]


def _seen_rows(rows: Tensor, visible: Tensor | None) -> Tensor:
    """Zeros in place of masked rows: the backward pass uses their products."""
    return rows if visible is None else torch.where(visible[:, None], rows, 0.0)


@torch.library.custom_op("v2l::gated_projection", mutates_args=())
def _forward(
    x: Tensor,
    visible: Tensor | None,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    keep: bool = False,
    inference: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The projection, and gate(x) and up(x) [T, H], which are empty unless they are kept.

    inference: no gradients are recorded, so that the products need not have the bits of those that
        the backward pass computes again.
    """
    refuse_forward_mode("gated_projection", x, gate, up, down)
    _check(x, visible, gate, up, down)
    rows = x.reshape(-1, x.shape[-1])
    seen = None if visible is None else visible.reshape(-1)
    out = rows.new_empty(rows.shape[0], down.shape[0])
    products = [rows.new_empty(rows.shape[0] if keep else 0, len(gate)) for _ in range(2)]
    if inference and not keep and dispatch.prefers_onednn(rows):
        for part in _chunks(rows, ONEDNN_CHUNK_TOKENS):
            own = _seen_rows(rows[part], None if seen is None else seen[part])
            hidden = F.silu(dispatch.onednn_linear(own, gate), inplace=True)
            hidden.mul_(dispatch.onednn_linear(own, up))
            out[part] = dispatch.onednn_linear(hidden, down)
        return out.view(*x.shape[:-1], down.shape[0]), products[0], products[1]
    chunks, fuses = _chunks(rows), _fuses(x)
    # On a CPU, new pages for every chunk's transients would cost as much as the elementwise part.
    size = 0 if keep or fuses or not chunks else min(chunks[0].stop, rows.shape[0])
    transients = [rows.new_empty(size, len(gate)) for _ in range(2)]
    for part in chunks:
        mask = None if seen is None else seen[part]
        if fuses and not keep:
            out[part] = fused(rows[part], mask, gate, up, down)
            continue
        own = _seen_rows(rows[part], mask)
        where, buffers = (part, products) if keep else (slice(len(own)), transients)
        gated, raised = (buffer[where] for buffer in buffers)
        torch.mm(own, gate.T, out=gated)
        torch.mm(own, up.T, out=raised)
        if fuses:
            hidden = fused_hidden(gated, raised)
        else:
            hidden = F.silu(gated, inplace=not keep).mul_(raised)
        torch.mm(hidden, down.T, out=out[part])
    return out.view(*x.shape[:-1], down.shape[0]), products[0], products[1]


@_forward.register_fake
def _(x, visible, gate, up, down, keep=False, inference=False):
    rows = x.numel() // max(1, x.shape[-1]) if keep else 0
    products = (x.new_empty(rows, gate.shape[0]) for _ in range(2))
    return x.new_empty(*x.shape[:-1], down.shape[0]), *products


@torch.library.custom_op("v2l::gated_projection_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    visible: Tensor | None,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    needs_x: bool = True,
    gated: Tensor | None = None,
    raised: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x (empty when not needed), gate, up and down.

    gated, raised: gate(x) and up(x) if the forward pass kept them.
    """
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    seen = None if visible is None else visible.reshape(-1)
    d_x = torch.empty(x.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
    wide = torch.promote_types(x.dtype, torch.float32)
    d_weights = [torch.zeros(w.shape, dtype=wide, device=w.device) for w in (gate, up, down)]
    backward = fused_backward if _fuses(x) else reference_backward
    for part in _chunks(rows):
        mask = None if seen is None else seen[part]
        kept = None if gated is None or raised is None else (gated[part], raised[part])
        d_rows, *d_parts = backward(grads[part], rows[part], mask, gate, up, down, needs_x, kept)
        if needs_x and d_rows is not None:
            d_x.view(rows.shape)[part] = d_rows
        for total, d_part in zip(d_weights, d_parts, strict=True):
            total += d_part
    d_gate, d_up, d_down = (d.to(gate.dtype) for d in d_weights)
    return d_x, d_gate, d_up, d_down


@_backward.register_fake
def _(grad, x, visible, gate, up, down, needs_x=True, gated=None, raised=None):
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        gate.new_empty(gate.shape),
        up.new_empty(up.shape),
        down.new_empty(down.shape),
    )


# All arguments, as by F.linear.
_CAST = 5
register_autocast("gated_projection", _CAST)
register_autocast("gated_projection_backward", 0)


def _plain(x: Tensor, visible: Tensor | None, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The op in plain PyTorch operations, whose derivatives PyTorch knows."""
    _check(x, visible, gate, up, down)
    return reference(x, visible, gate, up, down)


def _setup(ctx, inputs, output) -> None:
    *tensors, keep, _ = inputs
    ctx.save_for_backward(*tensors, *(output[1:] if keep else (None, None)))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    *inputs, gated, raised = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None, None, None
    if torch.is_grad_enabled():
        # create_graph=True: these gradients will be differentiated again.
        return *differentiable_backward(reference, inputs, (grad,)), None, None
    needs_x = ctx.needs_input_grad[0]
    d_x, *d_weights = _backward(grad.contiguous(), *inputs, needs_x, gated, raised)
    return d_x if needs_x else None, None, *d_weights, None, None


_forward.register_autograd(_autograd, setup_context=_setup)


def gated_projection(
    x: Tensor,
    visible: Tensor | None,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    keep: bool = False,
) -> Tensor:
    """down(silu(gate(x)) * up(x)), no biases; masked rows are read as zeros.

    On a GPU the elementwise part may be compiled at the first call, which takes some seconds;
    ``V2L_BACKEND=reference`` uses plain PyTorch.

    Args:
        x: [..., D] features.
        visible: [...] bool, or None when every row is visible. What the other rows hold, even NaN,
            affects neither the result nor a gradient.
        gate, up: [H, D]; down: [Z, H]; all of x's dtype.
        keep: save gate(x) and up(x), 2·H numbers a row, for the backward pass, which otherwise
            computes these two products again. The gradients have the same bits.

    Returns:
        [..., Z] of x's dtype. Differentiable in x and the weights any number of times, in reverse
        and forward mode; only the inputs are saved unless ``keep``. Higher derivatives, forward
        mode and the transforms of ``torch.func`` run in plain PyTorch operations. Under autocast,
        the arguments are cast as by ``F.linear``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    args = x, visible, gate, up, down
    if transformed():
        return run_plain(_plain, args, _CAST)
    recorded = torch.is_grad_enabled()
    return _forward(*args, keep and recorded, not recorded)[0]
