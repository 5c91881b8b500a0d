"""Adapters as immutable data: composition, pruning, norms and files.

An :class:`Adapter` holds the generated LoRA factors of one video (or of several chunks composed in
rank); the learned bias adapter is shared by all videos of a hypernetwork and kept by reference.
Nothing here knows a model: applying an adapter is ``csrc_triton.lora_linear``.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, cast

import torch
from torch import Tensor

from v2l_fast.errors import AdapterError, WriteError
from v2l_fast.files import open_regular
from v2l_fast.hypernet.adapter_files import (
    Factors,
    Provenance,
    is_adapter_file,
    read_adapter,
    write_adapter,
)

# Of one decoder layer: A {module: [B, R, d_in]} and B {module: [B, R, d_out]}.
LayerFactors = tuple[Factors, Factors]


@dataclass(frozen=True, eq=False)
class BiasAdapter:
    """The learned adapter that all videos of a hypernetwork share (A and B: [L, R, d]).

    Equal to another of the same id.

    Attributes:
        aliases: hashes of values that were cast to another dtype -> hash of the original ones.
    """

    A: Factors
    B: Factors
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BiasAdapter):
            return NotImplemented
        return self is other or self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"BiasAdapter({_contents(self.A, self.B)}, id {self.id})"

    @cached_property
    def id(self) -> str:
        """Hash of the values in bfloat16, the same whatever dtype the model is loaded in."""
        return self.aliases.get(self.value_hash, self.value_hash)

    @cached_property
    def value_hash(self) -> str:
        """Hash of the values as they are now, rounded to bfloat16."""
        digest = hashlib.sha256()
        for module in sorted(self.A):
            for factor in (self.A[module], self.B[module]):
                digest.update(f"{module}{list(factor.shape)}".encode())
                rounded = factor.detach().to("cpu", torch.bfloat16).float().contiguous()
                digest.update(rounded.numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Adapter:
    """The LoRA adapter of one video.

    Equal to another that makes the same update to the bit: factors (wherever they are, in the same
    dtype), scale and bias; provenance does not count.

    Attributes:
        A: module -> [L, r, d_in], the generated factors; r = chunks x R.
        B: module -> [L, r, d_out].
        scale: s of paper Eq. 7, used unchanged: not divided by r.
        bias: the shared adapter applied with it, or None.
        detached_bias_id: id of the bias that belongs to it when it is not attached (a loaded file).
        provenance: what it was generated from; read-only, ready for JSON.
    """

    A: Factors
    B: Factors
    scale: float
    bias: BiasAdapter | None = None
    detached_bias_id: str | None = None
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        if not self.A or set(self.A) != set(self.B):
            raise AdapterError(
                f"A and B must have the same modules, got {sorted(self.A)} and {sorted(self.B)}"
            )
        if not math.isfinite(self.scale):
            raise AdapterError(f"scale must be a finite number, got {self.scale}")
        for module, a in self.A.items():
            b = self.B[module]
            if a.dim() != 3 or b.dim() != 3 or a.shape[:2] != b.shape[:2]:
                raise AdapterError(
                    f"{module}: A must be [L, r, d_in] and B [L, r, d_out], "
                    f"got {list(a.shape)} and {list(b.shape)}"
                )
            if a.shape[0] != self.num_layers:
                raise AdapterError(
                    f"{module} has {a.shape[0]} layers, another module {self.num_layers}"
                )
        for name in ("A", "B", "provenance"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        if self is other:
            return True
        if (_signature(self), self.scale) != (_signature(other), other.scale):
            return False
        pairs = [(self.A[m], other.A[m]) for m in self.A]
        pairs += [(self.B[m], other.B[m]) for m in self.B]
        same = (x.dtype == y.dtype and torch.equal(x, y.to(x.device)) for x, y in pairs)
        return self.rank == other.rank and all(same) and self.bias_id == other.bias_id

    def __hash__(self) -> int:
        return hash((tuple(_signature(self).items()), self.rank, self.scale))

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of what the update depends on: factors and their dtype, scale and bias."""
        digest = hashlib.sha256(f"{self.scale!r} {self.bias_id}".encode())
        for module in sorted(self.A):
            for factor in (self.A[module], self.B[module]):
                digest.update(f"{module} {factor.dtype} {list(factor.shape)}".encode())
                values = factor.detach().to("cpu").contiguous()
                digest.update(values.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __repr__(self) -> str:
        source = self.provenance.get("source")
        name = source.get("name") if isinstance(source, Mapping) else None
        parts = [_contents(self.A, self.B), f"scale {self.scale:g}"]
        parts += [f"bias {self.bias_id}"] if self.bias_id else []
        parts += [f"of {name}"] if name else []
        return f"Adapter({', '.join(parts)})"

    def __reduce__(self) -> tuple:
        # Read-only views do not pickle.
        a, b, record = dict(self.A), dict(self.B), dict(self.provenance)
        return Adapter, (a, b, self.scale, self.bias, self.detached_bias_id, record)

    @classmethod
    def of_layers(
        cls,
        per_layer: Sequence[LayerFactors],
        row: int,
        scale: float,
        bias: BiasAdapter | None = None,
    ) -> Adapter:
        """One row of the factors of layers 0 to L - 1, copied once; without a gradient.

        Args:
            per_layer: A [B, R, d_in] and B [B, R, d_out] per module, of each layer.
            row: which of the B adapters.

        Returns:
            The adapter, with A [L, R, d_in] and B [L, R, d_out].
        """
        a, b = (
            {m: torch.stack([layer[side][m][row].detach() for layer in per_layer]) for m in modules}
            for side, modules in enumerate(per_layer[0])
        )
        return cls(a, b, scale, bias)

    @property
    def bias_id(self) -> str | None:
        """Which bias adapter belongs with this one, attached or not."""
        return self.detached_bias_id if self.bias is None else self.bias.id

    @property
    def _made_by(self) -> str | None:
        return self.provenance.get("hypernetwork")

    @property
    def num_layers(self) -> int:
        return next(iter(self.A.values())).shape[0]

    @property
    def rank(self) -> int:
        """Generated rank, without the bias."""
        return next(iter(self.A.values())).shape[1]

    def merged(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A {module: [L, r + R, d_in]} and B likewise: generated ranks, then the bias once.

        Raises:
            AdapterError: the adapter belongs with a bias that is not attached.
        """
        if self.bias is None:
            if self.bias_id is not None:
                raise AdapterError(
                    f"this adapter needs the bias adapter {self.bias_id} of its hypernetwork: "
                    "load it with Video2LoRA.load_adapter, or attach one with with_bias"
                )
            return dict(self.A), dict(self.B)
        return (
            {m: torch.cat([a, self.bias.A[m].detach().to(a)], 1) for m, a in self.A.items()},
            {m: torch.cat([b, self.bias.B[m].detach().to(b)], 1) for m, b in self.B.items()},
        )

    def with_bias(self, bias: BiasAdapter | None) -> Adapter:
        """The same adapter with its shared bias attached.

        Raises:
            AdapterError: ``bias`` is not the one this adapter was generated with.
        """
        model_bias = None if bias is None else bias.id
        if self.bias_id != model_bias:
            raise AdapterError(
                f"this adapter was generated with bias adapter {self.bias_id}, the model has "
                f"{model_bias}: it comes from another hypernetwork; internalize the video again"
            )
        return replace(self, bias=bias)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Adapter:
        """The same adapter on another device or in another dtype; the bias stays where it is."""
        a, b = (
            {m: t.to(device=device, dtype=dtype) for m, t in factors.items()}
            for factors in (self.A, self.B)
        )
        return replace(self, A=a, B=b)

    # --- composition and ablation -------------------------------------------------------------

    @staticmethod
    def compose(adapters: Sequence[Adapter]) -> Adapter:
        """Adapters of consecutive chunks as one: concatenated in rank, the bias once (Section 5.6).

        On the GPU that one of them is on, else on the CPU.

        Raises:
            AdapterError: no adapters, or adapters of different models.
        """
        adapters = list(adapters)
        if not adapters:
            raise AdapterError("compose needs at least one adapter")
        first = adapters[0]
        for index, other in enumerate(adapters[1:], 1):
            for what, mine, theirs in (
                ("modules and layers", _signature(first), _signature(other)),
                ("scale", first.scale, other.scale),
                ("bias adapter", first.bias_id, other.bias_id),
                ("hypernetwork", first._made_by, other._made_by),
            ):
                if mine != theirs:
                    raise AdapterError(
                        f"adapter {index} has another {what} than adapter 0 ({theirs} against "
                        f"{mine}): only adapters of one hypernetwork compose"
                    )
        devices = [next(iter(x.A.values())).device for x in adapters]
        device = next((d for d in devices if d.type != "cpu"), devices[0])
        a, b = (
            {m: torch.cat([getattr(x, name)[m].to(device) for x in adapters], 1) for m in first.A}
            for name in ("A", "B")
        )
        bias = next((x.bias for x in adapters if x.bias is not None), None)
        # Chunks of a composed adapter join the list, so that no number of compositions nests.
        chunks = [
            chunk
            for x in adapters
            for chunk in (
                x.provenance["chunks"]
                if x.provenance.keys() == {"hypernetwork", "chunks"}
                else [cast(Provenance, dict(x.provenance))]
            )
        ]
        record = cast(Provenance, {"hypernetwork": first._made_by, "chunks": chunks})
        return Adapter(a, b, first.scale, bias, first.bias_id, record)

    def prune(self, keep: int, by: str = "norm", seed: int = 0) -> Adapter:
        """Keep ``keep`` generated ranks of every layer; the bias is untouched (Appendix C).

        Args:
            keep: ranks to keep, 0 to ``rank``.
            by: "norm" keeps the largest products ‖A_r‖·‖B_r‖, "bottom" the smallest, "random" a
                seeded choice per layer and module.

        Raises:
            AdapterError: ``keep`` or ``by`` is out of range.
        """
        if not 0 <= keep <= self.rank:
            raise AdapterError(f"keep must be from 0 to {self.rank} ranks, got {keep}")
        if by not in ("norm", "bottom", "random"):
            raise AdapterError(f"by must be norm, bottom or random, got {by!r}")
        generator = torch.Generator().manual_seed(seed)
        a, b = {}, {}
        for module, norms in self.norms()["rank"].items():
            if by == "random":
                order = torch.rand(norms.shape, generator=generator).to(norms.device)
            else:
                order = norms if by == "norm" else -norms
            # Kept ranks stay in their order, so keeping all of them changes no bit.
            kept = order.topk(keep, dim=1).indices.sort(dim=1).values[..., None]
            a[module] = self.A[module].take_along_dim(kept, 1)
            b[module] = self.B[module].take_along_dim(kept, 1)
        record: Provenance = {**self.provenance, "pruned": [keep, by, seed]}
        return replace(self, A=a, B=b, provenance=record)

    def without_layers(self, layers: Sequence[int], include_bias: bool = False) -> Adapter:
        """The update of some decoder layers removed (Appendix D).

        Args:
            layers: decoder layers, 0 to L - 1.
            include_bias: also remove the shared bias adapter there.

        Raises:
            AdapterError: a layer is out of range.
        """
        for layer in layers:
            if not 0 <= layer < self.num_layers:
                raise AdapterError(f"layers must be from 0 to {self.num_layers - 1}, got {layer}")
        index = torch.tensor(list(layers), dtype=torch.long)

        def cleared(factors: Factors) -> dict[str, Tensor]:
            return {m: t.detach().index_fill(0, index.to(t.device), 0) for m, t in factors.items()}

        bias = self.bias
        if include_bias and bias is not None:
            bias = BiasAdapter(cleared(bias.A), cleared(bias.B))
        record: Provenance = {**self.provenance, "without_layers": sorted(layers)}
        return replace(self, A=cleared(self.A), B=cleared(self.B), bias=bias, provenance=record)

    def norms(self) -> dict[str, dict[str, Tensor]]:
        """Size of the generated update.

        Returns:
            "rank": module -> [L, r] products ‖A_r‖·‖B_r‖ (Appendix C); "layer": module -> [L]
            Frobenius norms of s·Bᵀ A (Appendix D). float32, the bias not counted.
        """
        rank, layer = {}, {}
        for module, a in self.A.items():
            a, b = a.float(), self.B[module].float()
            rank[module] = a.norm(dim=-1) * b.norm(dim=-1)
            # ‖Bᵀ A‖² = tr(A Aᵀ B Bᵀ): two r x r Gram matrices instead of d_out x d_in.
            squared = ((a @ a.mT) * (b @ b.mT)).sum((-2, -1))
            layer[module] = abs(self.scale) * squared.clamp_min(0).sqrt()
        return {"rank": rank, "layer": layer}

    # --- files --------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write one safetensors file, atomically: the generated factors and the provenance.

        The shared bias is named, not stored. A symbolic link is written through; a device or pipe
        is written into.

        Args:
            overwrite: replace a file that is no adapter, such as a video, too.

        Raises:
            AdapterError: a factor is not finite, or the provenance could not be read again.
            WriteError: the path is a folder or holds another kind of file, or cannot be written.
        """
        path = Path(path)
        if not overwrite and path.is_file() and path.stat().st_size and not is_adapter_file(path):
            raise WriteError(
                f"{path}: holds something other than an adapter; name another file, or pass "
                "overwrite=True"
            )
        write_adapter(path, self.A, self.B, self.scale, self.bias_id, self.provenance)

    @classmethod
    def load(cls, path: str | os.PathLike, bias: BiasAdapter | None = None) -> Adapter:
        """Read what :meth:`save` wrote; attach ``bias`` unless it is None.

        Raises:
            AdapterError: the file is missing, corrupt, not an adapter, not finite, or belongs with
                another bias.
        """
        with open_regular(path, AdapterError, missing="make one with v2l internalize") as handle:
            return cls.read(handle, path, bias)

    @classmethod
    def read(
        cls, handle: BinaryIO, path: str | os.PathLike, bias: BiasAdapter | None = None
    ) -> Adapter:
        """As :meth:`load`, from a file open for reading; errors name it by ``path``."""
        a, b, record = read_adapter(handle, path)
        try:
            adapter = cls(a, b, record.scale, None, record.bias_id, record.provenance)
            return adapter if bias is None else adapter.with_bias(bias)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from None

    def save_peft(self, directory: str | os.PathLike, base: str) -> None:
        """Deprecated: use :func:`v2l_fast.interop.save_peft`."""
        from v2l_fast.interop import save_peft

        warnings.warn(
            "Adapter.save_peft is deprecated: use v2l_fast.interop.save_peft(adapter, ...)",
            DeprecationWarning,
            stacklevel=2,
        )
        save_peft(self, directory, base)


def _signature(adapter: Adapter) -> dict[str, tuple[int, int, int]]:
    return {
        module: (a.shape[0], a.shape[2], adapter.B[module].shape[2])
        for module, a in sorted(adapter.A.items())
    }


def _contents(a: Factors, b: Factors) -> str:
    """Shapes, dtype and device of factors, in one line."""
    first = next(iter(a.values()))
    modules = [f"{m}: A {list(a[m].shape)}, B {list(b[m].shape)}" for m in list(a)[:4]]
    modules += [f"{len(a) - 4} more modules"] if len(a) > 4 else []
    dtype = str(first.dtype).removeprefix("torch.")
    return f"{'; '.join(modules)}, {dtype} on {first.device}"


@dataclass(frozen=True, eq=False)
class AdapterBatch:
    """What the hypernetwork generates for B videos or chunks, differentiable.

    Attributes:
        A: module -> [B, L, R, d_in], before the bias.
        B: module -> [B, L, R, d_out].
        scale: s of paper Eq. 7.
        bias: the shared bias adapter, or None.
    """

    A: Factors
    B: Factors
    scale: float
    bias: BiasAdapter | None = None

    def __repr__(self) -> str:
        return f"AdapterBatch({_contents(self.A, self.B)}, scale {self.scale:g})"

    def __len__(self) -> int:
        return next(iter(self.A.values())).shape[0]

    def __iter__(self) -> Iterator[Adapter]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Adapter:
        """One video's :class:`Adapter`, detached from the graph and from the batch's memory."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} in a batch of {len(self)} adapters")
        a, b = ({m: t[index].detach().clone() for m, t in f.items()} for f in (self.A, self.B))
        return Adapter(a, b, self.scale, self.bias)

    def composed(self, n_chunks: Sequence[int] | Tensor | None = None) -> AdapterBatch:
        """Chunks of each video side by side in rank, then the bias once, then zeros.

        Args:
            n_chunks: how many consecutive rows belong to each of the G videos, at least 1 each;
                one row each when None.

        Returns:
            A [G, L, (max n + 1)·R, d_in] and B likewise, without a separate bias (max n · R wide
            when there is no bias adapter), as :func:`compose_factors` writes each.

        Raises:
            ValueError: ``n_chunks`` does not add up to the batch.
        """
        counts = [1] * len(self) if n_chunks is None else [int(n) for n in n_chunks]

        def joined(side: str) -> dict[str, Tensor]:
            # In memory layer by layer, as a decoder reads it.
            shared = None if self.bias is None else getattr(self.bias, side)
            return {
                module: compose_factors(
                    [factor.transpose(0, 1)],
                    range(len(self)),
                    counts,
                    None if shared is None else shared[module],
                ).transpose(0, 1)
                for module, factor in getattr(self, side).items()
            }

        return AdapterBatch(joined("A"), joined("B"), self.scale)


def compose_factors(
    parts: Sequence[Tensor], order: Sequence[int], n_chunks: Sequence[int], bias: Tensor | None
) -> Tensor:
    """Chunks of each video side by side in rank, then the bias, then zeros, in one copy.

    Args:
        parts: [..., n, R, d] for each batch of chunks; the leading dimensions are none for one
            decoder layer, [L] for all.
        order: which row of the parts, counted through all of them, each chunk is.
        n_chunks: how many chunks in ``order`` belong to each of the G videos, at least 1 each.
        bias: [..., R, d], or None.

    Returns:
        [..., G, (max n + 1)·R, d], max n · R wide without a bias. It shares the memory of the part
        where nothing has to be joined: no bias, and rows in order, equally many of each video.

    Raises:
        ValueError: ``n_chunks`` does not add up to the chunks.
    """
    if sum(n_chunks) != len(order) or min(n_chunks, default=0) < 1:
        raise ValueError(
            f"n_chunks must be positive and add up to {len(order)}, got {list(n_chunks)}"
        )
    like, videos, most = parts[0], len(n_chunks), max(n_chunks)
    *leading, rows, rank, width = like.shape
    shared = None
    if bias is not None:
        # Expanded before the cast, so that the gradient of the bias is one sum, in its own dtype.
        shared = bias.unsqueeze(-3).expand(*leading, videos, -1, -1).to(like)
    joined = len(parts) == 1 and list(order) == list(range(rows)) and min(n_chunks) == most
    if joined and like.is_contiguous():
        side_by_side = like.view(*leading, videos, most * rank, width)
        return side_by_side if shared is None else torch.cat([side_by_side, shared], -2)
    chunks = [row for part in parts for row in part.unbind(-3)]
    ordered = iter([chunks[index] for index in order])
    biases = [[]] * videos if shared is None else [[block] for block in shared.unbind(-3)]
    empty = [like.new_zeros(*leading, rank, width)] if min(n_chunks) < most else []
    blocks: list[Tensor] = []
    for count, own in zip(n_chunks, biases, strict=True):
        blocks += [*itertools.islice(ordered, count), *own, *empty * (most - count)]
    return torch.cat(blocks, -2).unflatten(-2, (videos, -1))
