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
from v2l_fast.hypernet.adapter import Adapter, BiasAdapter, LayerFactors, compose_factors


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

    Factors of all layers in one tensor would be copied once more, and so would their gradients.
    """

    @classmethod
    def compose(
        cls,
        parts: Sequence[Sequence[LayerFactors]],
        order: Sequence[int],
        n_chunks: Sequence[int],
        scale: float,
        bias: BiasAdapter | None,
    ) -> list[LayerAdapters]:
        """All layers of generated chunks, differentiable; example i uses video i.

        Other examples: ``dataclasses.replace(layer, index=...)``.

        Args:
            parts: the factors of every layer, for each batch of chunks.
            order, n_chunks: as in :func:`~v2l_fast.hypernet.adapter.compose_factors`.
        """
        like = next(iter(parts[0][0][0].values()))
        index = torch.arange(len(n_chunks), device=like.device)

        def composed(side: int, module: str) -> list[Tensor]:
            shared: Sequence[Tensor | None] = [None] * len(parts[0])
            if bias is not None:
                # Unbound, so that the gradients of the layers' biases are stacked once.
                shared = (bias.A, bias.B)[side][module].unbind(0)
            factors = [[layer[side][module] for layer in part] for part in parts]
            return [
                compose_factors(layer, order, n_chunks, own)
                for *layer, own in zip(*factors, shared, strict=True)
            ]

        a, b = ({m: composed(side, m) for m in parts[0][0][side]} for side in (0, 1))
        return [
            cls(
                {m: t[layer] for m, t in a.items()},
                {m: t[layer] for m, t in b.items()},
                index,
                scale,
            )
            for layer in range(len(parts[0]))
        ]

    def factors(self, module: str, layer: int) -> tuple[Tensor, Tensor]:
        """The only ones it has."""
        return self.A[module], self.B[module]
