"""Adapters of a batch, packed for the linear layers that apply them.

:class:`AdapterBank` holds the distinct adapters of a batch and which example uses which; a decoder
passes it along and every adapted layer reads its factors. :class:`LayerAdapters` holds one layer's
factors, for training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csrc_triton import lora_linear
from v2l_fast.device import send
from v2l_fast.errors import AdapterError
from v2l_fast.hypernet.adapter import Adapter, AdapterBatch


def common_rank(factors: Mapping[str, Tensor]) -> int:
    """Rank of an adapter's A or B {module: [L, r, d]}.

    Raises:
        AdapterError: the modules differ in rank, which a bank cannot hold.
    """
    ranks = {factor.shape[1] for factor in factors.values()}
    if len(ranks) > 1:
        sizes = ", ".join(f"{m} {factor.shape[1]}" for m, factor in factors.items())
        raise AdapterError(f"an adapter must have one rank for all modules, got {sizes}")
    return ranks.pop()


@dataclass(frozen=True, eq=False)
class AdapterBank:
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
    ) -> AdapterBank | None:
        """Pack one adapter (or None) per example; an object that repeats takes one slot.

        Raises:
            AdapterError: adapters of different models or scales, or one without its bias.
        """
        slots: dict[int, int] = {}
        distinct: list[Adapter] = []
        for adapter in adapters:
            if adapter is not None and id(adapter) not in slots:
                slots[id(adapter)] = len(distinct)
                distinct.append(adapter)
        if not distinct:
            return None
        device = torch.device(device)
        first = distinct[0]
        if any(set(a.A) != set(first.A) or a.scale != first.scale for a in distinct):
            raise AdapterError("adapters of different models or scales cannot share a batch")
        merged = [adapter.merged() for adapter in distinct]
        ranks = [common_rank(a) for a, _ in merged]

        def packed(side: int) -> dict[str, Tensor]:
            factors = {}
            for module, like in merged[0][side].items():
                shape = like.shape[0], len(merged), max(ranks), like.shape[2]
                wide = torch.zeros(shape, device=device, dtype=dtype)
                for slot, rank in enumerate(ranks):
                    wide[:, slot, :rank] = send(merged[slot][side][module], device)
                factors[module] = wide
            return factors

        index = torch.tensor([slots.get(id(adapter), -1) for adapter in adapters])
        ragged = send(torch.tensor(ranks), device) if len(set(ranks)) > 1 else None
        return cls(packed(0), packed(1), send(index, device), first.scale, ragged)

    def apply(self, module: str, layer: int, linear: nn.Linear, x: Tensor) -> Tensor:
        """``linear`` with each example's adapter: [E, T, d_in] -> [E, T, d_out].

        Raises:
            AdapterError: the batch does not have E examples.
        """
        self._check_batch(x)
        a, b = self.factors(module, layer)
        return lora_linear(
            x, linear.weight, linear.bias, a, b, self.index, self.scale, ranks=self.ranks
        )

    def update(self, module: str, layer: int, x: Tensor, y: Tensor) -> Tensor:
        """The update of a layer's output for its input [E, ..., d_in]: scale · (x A_iᵀ) B_i.

        Plain torch operations, because this runs inside of models that are not ours: compiled,
        under autocast, and on several devices.

        Args:
            y: the output [E, ..., d_out]; the update is of its dtype and device.

        Raises:
            AdapterError: the batch does not have E examples.
        """
        self._check_batch(x)
        a, b = (t.to(y.device, y.dtype) for t in self.factors(module, layer))
        index = self.index.to(y.device)
        if a.shape[0] > 1:
            # Examples without an adapter compute with slot 0; their update is dropped below.
            a, b = a[index.clamp_min(0)], b[index.clamp_min(0)]
        wide = torch.promote_types(y.dtype, torch.float32)
        u = ((x.to(y.device, y.dtype).flatten(1, -2) @ a.mT).to(wide) * self.scale).to(y.dtype)
        update = torch.where((index >= 0)[:, None, None], u @ b, 0)
        return update.to(y.dtype).view(y.shape)

    def _check_batch(self, x: Tensor) -> None:
        examples = self.index.shape[0]
        if x.dim() < 3:
            raise AdapterError(
                f"a layer gets {list(x.shape)}, in which examples cannot be told apart: adapters "
                "need a batch [E, T, d]"
            )
        if x.shape[0] != examples:
            raise AdapterError(
                f"a batch of {x.shape[0]} runs with adapters chosen for {examples} examples; give "
                "one adapter (or None) for each row, with num_beams or num_return_sequences k "
                "each of them k times in a row: [a for a in adapters for _ in range(k)]"
            )

    def factors(self, module: str, layer: int) -> tuple[Tensor, Tensor]:
        """A [n, r, d_in] and B [n, r, d_out] of a layer."""
        return self.A[module].select(0, layer), self.B[module].select(0, layer)


class LayerAdapters(AdapterBank):
    """One layer's adapters, A and B [n, r, d], for training.

    Selecting a layer from the factors of all layers would give a gradient as large as all of them.
    """

    @classmethod
    def of_batch(cls, batch: AdapterBatch) -> list[LayerAdapters]:
        """Layers of generated and composed adapters, differentiable; example i uses adapter i.

        Other examples: ``dataclasses.replace(slots, index=...)``.
        """
        like = next(iter(batch.A.values()))
        index = torch.arange(len(batch), device=like.device)
        a, b = (
            {m: t.transpose(0, 1).unbind(0) for m, t in factors.items()}
            for factors in (batch.A, batch.B)
        )
        return [
            cls(
                {m: t[layer] for m, t in a.items()},
                {m: t[layer] for m, t in b.items()},
                index,
                batch.scale,
            )
            for layer in range(like.shape[1])
        ]

    def factors(self, module: str, layer: int) -> tuple[Tensor, Tensor]:
        """The only ones it has."""
        return self.A[module], self.B[module]
