"""Adapters of a batch, packed for the linear layers they adapt.

:class:`AdapterSlots` holds the distinct adapters of a batch and which example uses which; a decoder
passes it along and every adapted layer asks it. :func:`adapted_linear` does the same for a model
whose forward is not ours, through a context variable, so threads do not see each other's adapters.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csrc_triton import lora_linear
from v2l_fast.adapter import Adapter, AdapterBatch
from v2l_fast.errors import AdapterError


def one_rank(factors: Mapping[str, Tensor]) -> int:
    """Rank of an adapter's A or B {module: [L, r, d]}.

    Raises:
        AdapterError: its modules have different ones, which slots cannot hold.
    """
    ranks = {factor.shape[1] for factor in factors.values()}
    if len(ranks) > 1:
        sizes = ", ".join(f"{m} {factor.shape[1]}" for m, factor in factors.items())
        raise AdapterError(f"an adapter needs one rank for all modules, not {sizes}")
    return ranks.pop()


@dataclass(frozen=True)
class AdapterSlots:
    """Distinct adapters of a batch.

    Attributes:
        A: module -> [L, n, r, d_in]; r is the largest rank, shorter adapters are zero-filled.
        B: module -> [L, n, r, d_out].
        index: [E] int64, the slot of each example, -1 for none.
        scale: s, the same for all.
        ranks: [n] int64 used ranks, or None when all are r.
    """

    A: Mapping[str, Tensor]
    B: Mapping[str, Tensor]
    index: Tensor
    scale: float
    ranks: Tensor | None = None

    @classmethod
    def pack(
        cls,
        adapters: Sequence[Adapter | None],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> AdapterSlots | None:
        """One adapter (or None) an example; the same object given twice takes one slot.

        Raises:
            AdapterError: adapters of different models or scales, or one without its bias.
        """
        distinct: list[Adapter] = []
        index = []
        for adapter in adapters:
            if adapter is not None and not any(adapter is known for known in distinct):
                distinct.append(adapter)
            index.append(next((i for i, a in enumerate(distinct) if a is adapter), -1))
        if not distinct:
            return None
        first = distinct[0]
        if any(set(a.A) != set(first.A) or a.scale != first.scale for a in distinct):
            raise AdapterError("adapters of different models or scales cannot share a batch")
        merged = [adapter.merged() for adapter in distinct]
        ranks = [one_rank(a) for a, _ in merged]
        packed = []
        for side in (0, 1):
            factors = {}
            for module in first.A:
                rows = [m[side][module].to(device=device, dtype=dtype) for m in merged]
                wide = rows[0].new_zeros(
                    rows[0].shape[0], len(rows), max(ranks), rows[0].shape[2]
                )
                for slot, row in enumerate(rows):
                    wide[:, slot, : row.shape[1]] = row
                factors[module] = wide
            packed.append(factors)
        ragged = None
        if len(set(ranks)) > 1:
            ragged = torch.tensor(ranks, device=device)
        return cls(*packed, torch.tensor(index, device=device), first.scale, ragged)

    def apply(self, module: str, layer: int, linear: nn.Linear, x: Tensor) -> Tensor:
        """``linear`` with each example's adapter: [E, T, d_in] -> [E, T, d_out].

        Raises:
            AdapterError: the batch is not of E examples.
        """
        if x.shape[0] != self.index.shape[0]:
            raise AdapterError(
                f"a batch of {x.shape[0]} runs with adapters chosen for {self.index.shape[0]} "
                "examples; give one adapter (or None) for each"
            )
        a, b = self.factors(module, layer)
        return lora_linear(
            x, linear.weight, linear.bias, a, b, self.index, self.scale, ranks=self.ranks
        )

    def factors(self, module: str, layer: int) -> tuple[Tensor, Tensor]:
        """A [n, r, d_in] and B [n, r, d_out] of a layer."""
        return self.A[module].select(0, layer), self.B[module].select(0, layer)


class LayerSlots(AdapterSlots):
    """One layer's adapters, A and B [n, r, d]: the slots to train with, one for each layer.

    The gradient of a selection from all layers' factors is of the size of all of them.
    """

    @classmethod
    def of_batch(cls, batch: AdapterBatch) -> list[LayerSlots]:
        """Generated and composed adapters, differentiable, layer by layer; example i has the i-th.

        Other examples: ``dataclasses.replace(slots, index=...)``.
        """
        like = next(iter(batch.A.values()))
        index = torch.arange(len(batch), device=like.device)
        sides = [{m: t.unbind(1) for m, t in f.items()} for f in (batch.A, batch.B)]
        return [
            cls(*({m: t[layer] for m, t in side.items()} for side in sides), index, batch.scale)
            for layer in range(like.shape[1])
        ]

    def factors(self, module: str, layer: int) -> tuple[Tensor, Tensor]:
        """The only ones it has."""
        return self.A[module], self.B[module]


class AdaptedLinear(nn.Linear):
    """A linear layer that applies the adapters in force where it is called; shares its weight."""

    def __init__(
        self, linear: nn.Linear, module: str, layer: int, active: ContextVar[AdapterSlots | None]
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.module, self.layer, self.active = module, layer, active

    def forward(self, x: Tensor) -> Tensor:
        slots = self.active.get()
        if slots is None or self.module not in slots.A:
            return super().forward(x)
        return slots.apply(self.module, self.layer, self, x)


class AdaptedModel:
    """Handle of a model made adaptable by :func:`adapted_linear`."""

    def __init__(self, model: nn.Module, active: ContextVar[AdapterSlots | None]) -> None:
        self.model = model
        self._active = active

    @contextlib.contextmanager
    def use(self, adapters: Sequence[Adapter | None]) -> Iterator[nn.Module]:
        """Within the block, example i of every batch runs with ``adapters[i]`` (None: without).

        Other threads are not affected, and nothing is left behind.
        """
        weight = next(self.model.parameters())
        token = self._active.set(AdapterSlots.pack(adapters, weight.device, weight.dtype))
        try:
            yield self.model
        finally:
            self._active.reset(token)


def adapted_linear(model: nn.Module, suffix: str) -> AdaptedModel:
    """Make any decoder accept a LoRA adapter for each example of a batch.

    Every ``nn.Linear`` whose name ends in ``.{layer}.{suffix}`` is replaced in place by one that
    shares its weight; parameters, names and results without adapters stay as they were. The
    adapters' module name is the last part of ``suffix``, e.g. "mlp.down_proj".

    Returns:
        A handle; ``with handle.use([adapter_a, None]): model(...)`` runs a batch of two.

    Raises:
        AdapterError: no layer matches, or the numbering has gaps.
    """
    pattern = re.compile(rf"(?:^|\.)(\d+)\.{re.escape(suffix)}$")
    sites = {}
    for name, module in model.named_modules():
        found = pattern.search(name)
        if found and isinstance(module, nn.Linear):
            sites[int(found[1])] = name
    if not sites or sorted(sites) != list(range(len(sites))):
        raise AdapterError(
            f"no complete stack of linear layers named *.<layer>.{suffix} in "
            f"{type(model).__name__}: found layers {sorted(sites)}"
        )
    active: ContextVar[AdapterSlots | None] = ContextVar("adapters", default=None)
    for layer, name in sites.items():
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        wrapped = AdaptedLinear(linear, suffix.rpartition(".")[2], layer, active)
        setattr(model.get_submodule(parent), child, wrapped)
    return AdaptedModel(model, active)
