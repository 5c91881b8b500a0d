"""lora_linear in plain PyTorch: definition, CPU path, oracle of the tests and baseline.

Forward and backward are both written out. The adapter's products accumulate in float32 or wider,
and a float64 call is a float64 oracle.

Shapes: E examples, T tokens, n adapters, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _slots_of_examples(
    lora_a: Tensor, adapter_index: Tensor, ranks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each example's adapter [E] (0 where it has none) and the rank slots it uses [E, 1, r]."""
    adapters, rank, _ = lora_a.shape
    has_one = (adapter_index >= 0) & (adapter_index < adapters)
    index = torch.where(has_one, adapter_index, 0)
    used = has_one[:, None, None].expand(-1, 1, rank)
    if ranks is None:
        return index, used
    slots = torch.arange(rank, device=ranks.device)
    return index, used & (slots < ranks[index][:, None, None])


def _by_example(factors: Tensor, index: Tensor, used: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, r, d] -> [E, r, d], zero in unused slots, whatever those hold."""
    return torch.where(used.mT, factors[index].to(dtype), 0)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y = x W^T (+ bias) + u B_i, u = scale x A_i^T, i the adapter of each example, -1 for none.

    Returns y and u [tokens, r] of x's dtype, which the backward needs, zero in slots that are not
    used; [0, r] unless ``keep``. Waits for no device.
    """
    rank, wide = lora_a.shape[1], torch.promote_types(x.dtype, torch.float32)
    y = torch.nn.functional.linear(x, weight, bias)
    if lora_a.shape[0] == 0:
        return y, y.new_zeros(x[..., 0].numel() if keep else 0, rank)
    index, used = _slots_of_examples(lora_a, adapter_index, ranks)
    if ranks is not None:
        slots = torch.arange(rank, device=ranks.device)
        lora_b = torch.where((slots < ranks[:, None])[:, :, None], lora_b, 0)
    if lora_a.shape[0] > 1:
        # A single adapter is not gathered: for one token that costs more than the product with it.
        lora_a, lora_b = lora_a[index], lora_b[index]
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    u = torch.where(used, ((x @ a.mT).to(wide) * scale).to(x.dtype), 0)
    # Selected, not added as zeros: an example without an adapter is independent of what one holds.
    y = y + torch.where(used.any(-1, keepdim=True), u @ b, 0)
    return y, u.reshape(-1, rank) if keep else u.new_empty(0, rank)


def lora_linear_unmasked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    index: list[int],
    scale: float,
) -> Tensor:
    """y of :func:`lora_linear` where adapters use all their slots, and the index is known.

    Differs by rounding: the scale multiplies the second product, in the sum with the first term.
    All tensors are of x's dtype; r is at least 1.
    """
    y = torch.nn.functional.linear(x, weight, bias)
    if index == list(range(lora_a.shape[0])):
        return torch.baddbmm(y, torch.bmm(x, lora_a.mT), lora_b, alpha=scale)
    rows = [example for example, adapter in enumerate(index) if adapter >= 0]
    if not rows:
        return y
    everyone = len(rows) == len(index)
    if everyone and lora_a.shape[0] == 1:
        u = x.reshape(-1, x.shape[2]) @ lora_a[0].T
        return torch.addmm(y.reshape(-1, y.shape[2]), u, lora_b[0], alpha=scale).view(y.shape)
    used = torch.tensor([index[row] for row in rows])
    lora_a, lora_b = lora_a[used], lora_b[used]
    if everyone:
        return torch.baddbmm(y, torch.bmm(x, lora_a.mT), lora_b, alpha=scale)
    adapted = torch.tensor(rows)
    y[adapted] = torch.baddbmm(y[adapted], torch.bmm(x[adapted], lora_a.mT), lora_b, alpha=scale)
    return y


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
    u: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, lora_a and lora_b; the weight is frozen; ``u`` as the forward kept it."""
    if lora_a.shape[0] == 0:
        return grad @ weight, torch.zeros_like(lora_a), torch.zeros_like(lora_b)
    index, used = _slots_of_examples(lora_a, adapter_index, ranks)
    a, b = (_by_example(t, index, used, x.dtype) for t in (lora_a, lora_b))
    wide = torch.promote_types(x.dtype, torch.float32)
    d_u = (torch.bmm(grad, b.mT).to(wide) * scale).to(x.dtype)
    d_x = torch.baddbmm(grad @ weight, d_u, a)
    # A matrix product, because index_add has no fixed order on a GPU.
    owners = adapter_index == torch.arange(lora_a.shape[0], device=x.device)[:, None]

    def by_adapter(per_example: Tensor, like: Tensor) -> Tensor:
        summed = owners.to(per_example.dtype) @ per_example.flatten(1)
        return summed.view(like.shape).to(like.dtype)

    d_a = by_adapter(torch.bmm(d_u.mT, x), lora_a)
    d_b = by_adapter(torch.bmm(u.view(d_u.shape).mT, grad), lora_b)
    return d_x, d_a, d_b


def differentiable_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_index: Tensor,
    scale: float,
    ranks: Tensor | None,
) -> Tensor:
    """y of :func:`lora_linear`, every derivative of which is finite and reads used slots only."""
    y = torch.nn.functional.linear(x, weight, bias)
    if lora_a.shape[0] == 0 or adapter_index.numel() == 0:
        return y
    index, used = _slots_of_examples(lora_a, adapter_index, ranks)
    a, b = (_by_example(t, index, used, x.dtype) for t in (lora_a, lora_b))
    u = ((x @ a.mT).to(torch.promote_types(x.dtype, torch.float32)) * scale).to(x.dtype)
    return y + u @ b
