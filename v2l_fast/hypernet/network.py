"""The hypernetwork: hidden states entering each decoder layer to a LoRA adapter for that layer.

Layers share all weights but the head. A layer's adapter can be generated as soon as its input
exists, and consecutive layers can be generated together, which reads the shared weights once:
:meth:`HyperNetwork.group` takes any number of them, and the whole-batch call is a loop over groups.
State-dict names are those of the released checkpoints. The file knows nothing about VLMs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from csrc_triton import rank_projection
from v2l_fast.device import compiled
from v2l_fast.errors import CheckpointError, ConfigError
from v2l_fast.hypernet.adapter import Adapter, AdapterBatch, BiasAdapter, LayerFactors
from v2l_fast.hypernet.config import WEIGHTS_NAME, HypernetConfig
from v2l_fast.hypernet.perceiver import (
    Perceiver,
    attention_dtype,
    latent_dtype,
    latents_features_dtype,
)
from v2l_fast.tensor_files import TensorInfo, load_tensors, save_tensors
from v2l_fast.work_units import layers_per_group, tokens_per_group

SMALL_PARAMETER = 65536


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype from itself or its name; None for None and "auto".

    Raises:
        ConfigError: it is none of these.
    """
    if dtype is None or dtype == "auto":
        return None
    resolved = (
        getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    )
    if isinstance(resolved, torch.dtype) and resolved.is_floating_point and resolved.itemsize >= 2:
        return resolved
    raise ConfigError(
        f"dtype must be 'bfloat16', 'float16', 'float32' or 'auto', or a torch.dtype, got {dtype!r}"
    )


class PreHeadBlock(nn.Module):
    """x + LayerNorm(Linear(silu(Linear(LayerNorm(x))))), Z -> 4Z -> Z, LayerNorm eps 1e-5.

    Indices 1 and 4 of ``mlp``, dropout in the released module, do nothing.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(size),
            nn.Identity(),
            nn.Linear(size, 4 * size),
            nn.SiLU(),
            nn.Identity(),
            nn.Linear(4 * size, size),
            nn.LayerNorm(size),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., Z] -> [..., Z], computed in x's dtype."""
        hidden = x
        for module in self.mlp:
            if isinstance(module, nn.LayerNorm):
                hidden = F.layer_norm(hidden, module.normalized_shape, *_cast(module, x.dtype))
            elif isinstance(module, nn.Linear):
                hidden = F.linear(hidden, *_cast(module, x.dtype))
            else:
                hidden = module(hidden)
        return x + hidden


def _cast(module: nn.LayerNorm | nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return module.weight.to(dtype), module.bias.to(dtype)


class Head(nn.Module):
    """Projection of each rank latent to the columns of A and B.

    ``weight`` is [L, Z, W], [L, M, Z, W] with M > 1 modules, or [Z, W] / [M, Z, W] when one head
    serves all layers.
    """

    def __init__(self, config: HypernetConfig) -> None:
        super().__init__()
        shape = [] if config.shared_head else [config.num_layers]
        if len(config.target_modules) > 1:
            shape.append(len(config.target_modules))
        shape += [config.latent_size, config.head_width]
        self.weight = nn.Parameter(torch.empty(shape))
        self.shared, self.num_layers = config.shared_head, config.num_layers

    def of(self, layer: int) -> Tensor:
        """Weight [M, Z, W] of one layer."""
        # select, not [layer], which would compile a graph of its own for every layer.
        return self._by_module(self.weight if self.shared else self.weight.select(0, layer))

    def slices(self) -> list[Tensor]:
        """Weights [M, Z, W] of all layers, for gradients: theirs are stacked once.

        The gradient of :meth:`of` is as large as the whole head, and L of them would be added.
        """
        each = [self.weight] * self.num_layers if self.shared else self.weight.unbind(0)
        return [self._by_module(weight) for weight in each]

    def _by_module(self, weight: Tensor) -> Tensor:
        return weight if weight.dim() == 3 else weight[None]


class HyperNetwork(nn.Module):
    """Generates LoRA adapters from per-layer context features (paper Section 3.3).

    Master weights may be float32 while features are bfloat16: matrix products run in the features'
    dtype, latents one step of precision above it.

    Args:
        config: architecture; a fresh network is initialized as the released code does.
    """

    def __init__(self, config: HypernetConfig) -> None:
        super().__init__()
        self.config = config
        layers, rank, modules = config.num_layers, config.rank, config.target_modules
        self.aggregator = nn.ModuleDict(
            {
                "perceiver": Perceiver(
                    config.hidden_size,
                    config.latent_size,
                    (
                        config.num_latents,
                        config.num_blocks,
                        config.num_self_attn_per_block,
                        config.shared_weights,
                    ),
                    len(modules) * rank,
                    (config.num_heads, config.num_kv_heads, config.head_dim),
                    config.chunk_position,
                )
            }
        )
        self.layers = nn.Sequential(
            *(PreHeadBlock(config.latent_size) for _ in range(config.num_pre_head_layers))
        )
        if config.bias_adapter:
            self.bias_A = nn.ParameterDict()
            self.bias_B = nn.ParameterDict()
        self.scaler_A = nn.ParameterDict()
        self.scaler_B = nn.ParameterDict()
        for module, (d_in, d_out) in modules.items():
            if config.bias_adapter:
                std = 0.2 / (d_in * rank) ** 0.5
                self.bias_A[module] = nn.Parameter(torch.randn(layers, rank, d_in) * std)
                self.bias_B[module] = nn.Parameter(torch.zeros(layers, rank, d_out))
            self.scaler_A[module] = nn.Parameter(torch.ones(1, layers, rank, 1))
            self.scaler_B[module] = nn.Parameter(torch.zeros(1, layers, rank, 1))
        self.head = Head(config)
        std = 0.5 / (config.latent_size + config.head_width * rank) ** 0.5
        nn.init.normal_(self.head.weight, std=std)
        self._run_latents = HyperNetwork._latents
        # Hashes of values cast to another dtype -> those of the values that were cast.
        self._aliases: dict[str, str] = {}

    @property
    def _perceiver(self) -> Perceiver:
        return cast(Perceiver, self.aggregator["perceiver"])

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compute the latents of :meth:`group` in one compiled graph, for every length and size.

        The projection, which is one op, and the head, one op per layer, stay outside: the head
        would be compiled again for every group size. The first call (with and without gradients)
        then takes seconds.
        """
        self._run_latents = compiled(HyperNetwork._latents, backend)

    def forward(
        self, features: Tensor, mask: Tensor | None = None, chunk_span: Tensor | None = None
    ) -> AdapterBatch:
        """Adapters of B videos or chunks.

        Args:
            features: [B, L, S, D] hidden states entering each decoder layer.
            mask: [B, S], 1 where a token is visible; None: all are. Values at other tokens, NaN
                too, affect neither the result nor a gradient.
            chunk_span: [B, 2], see :meth:`layer`.

        Returns:
            :class:`AdapterBatch` with A [B, L, R, d_in] and B [B, L, R, d_out] per module, of the
            features' dtype. Each group's activations are recomputed in the backward pass, but for
            the projected context.

        Raises:
            ValueError: shapes that do not fit the config.
        """
        expected = (self.config.num_layers, self.config.hidden_size)
        if features.dim() != 4 or (features.shape[1], features.shape[3]) != expected:
            raise ValueError(
                f"features must be [B, {expected[0]}, S, {expected[1]}], got {list(features.shape)}"
            )
        batch, layers, length, _ = features.shape
        budget = tokens_per_group(features.device, torch.is_grad_enabled(), features.dtype)
        size = layers_per_group(batch * length, layers, budget)
        heads = self.head.slices()
        per_layer: list[LayerFactors] = []
        for first in range(0, layers, size):
            part = slice(first, first + size)
            inputs = features[:, part].unbind(1)
            per_layer += self.group(first, inputs, mask, chunk_span, heads[part], recompute=True)
        return self.assemble(per_layer)

    def layer(
        self,
        index: int,
        hidden: Tensor,
        mask: Tensor | None = None,
        chunk_span: Tensor | None = None,
        head: Tensor | None = None,
    ) -> LayerFactors:
        """Adapters of one decoder layer: :meth:`group` with one member.

        Args:
            index: the decoder layer, 0 to L - 1.
            hidden: [B, S, D] its input.
            mask: [B, S], 1 where visible, or None.
            chunk_span: [B, 2] float32, start and end of the context as fractions of its video; None
                for whole videos. Only a network with ``chunk_position`` reads it.
            head: this layer's slice from :meth:`Head.slices`; pass it when training so gradients
                are stacked once. None selects the same weight here.

        Returns:
            A {module: [B, R, d_in]} and B {module: [B, R, d_out]} of hidden's dtype.
        """
        heads = None if head is None else [head]
        return self.group(index, [hidden], mask, chunk_span, heads)[0]

    def group(
        self,
        first: int,
        hiddens: Sequence[Tensor],
        mask: Tensor | None = None,
        chunk_span: Tensor | None = None,
        heads: Sequence[Tensor] | None = None,
        recompute: bool = False,
        widen: bool = True,
    ) -> list[LayerFactors]:
        """Adapters of consecutive decoder layers in one pass.

        Grouping changes results only by floating-point rounding. The activations are those of all
        layers; :func:`~v2l_fast.work_units.layers_per_group` chooses a size that bounds them.

        Args:
            first: the first of the decoder layers.
            hiddens: [B, S, D] input of each layer.
            mask, chunk_span: as in :meth:`layer`, the same for all layers.
            heads: slice of each layer from :meth:`Head.slices`, or None.
            recompute: keep the inputs, the projected context and the latents alone, and recompute
                all other activations in the backward pass. The gradients have the same bits.
            widen: latents and attention are float64 over float32 features while gradients are
                recorded; False computes them in float32.

        Returns:
            A {module: [B, R, d_in]} and B {module: [B, R, d_out]} of each layer.

        Raises:
            ValueError: ``mask`` or ``chunk_span`` does not fit the inputs.
        """
        chunk_span = self._checked(hiddens[0], mask, chunk_span)
        visible = None if mask is None else mask == 1
        hidden, count = hiddens[0], len(hiddens)
        if count > 1:
            hidden = torch.cat(list(hiddens))
            visible = None if visible is None else visible.repeat(count, 1)
            chunk_span = None if chunk_span is None else chunk_span.repeat(count, 1)
        # The dtypes of each step are chosen here; autocast would mix in its own.
        with torch.autocast(hidden.device.type, enabled=False):
            context = self._perceiver.project(hidden, visible, not recompute)
            arguments = self, context, visible, chunk_span, latent_dtype(hidden.dtype, widen)
            if recompute and torch.is_grad_enabled():
                latents = checkpoint(
                    self._run_latents, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                latents = self._run_latents(*arguments)
            return [
                self._factors(first + i, rows, hidden.dtype, heads[i] if heads else None)
                for i, rows in enumerate(latents.unflatten(0, (count, -1)).unbind(0))
            ]

    def _checked(
        self, hidden: Tensor, mask: Tensor | None, chunk_span: Tensor | None
    ) -> Tensor | None:
        """Check shapes; return the span that the network reads, None if it reads none."""
        if mask is not None and mask.shape != hidden.shape[:2]:
            raise ValueError(f"mask must be {list(hidden.shape[:2])}, got {list(mask.shape)}")
        if not self.config.chunk_position:
            return None
        if chunk_span is None:
            return torch.arange(2.0, device=hidden.device).expand(len(hidden), 2)
        if chunk_span.shape != (len(hidden), 2):
            raise ValueError(f"chunk_span must be {[len(hidden), 2]}, got {list(chunk_span.shape)}")
        return chunk_span

    @torch.no_grad()
    def iter_layer(
        self,
        index: int,
        hidden: Tensor,
        mask: Tensor | None,
        chunk_span: Tensor | None,
        chunks: Sequence[slice],
    ) -> Generator[None, None, LayerFactors]:
        """:meth:`layer` over a context in chunks of tokens; yields between them.

        The result is the same, to rounding; to the bit where there is one chunk.
        """
        if len(chunks) == 1:
            return self.layer(index, hidden, mask, chunk_span)
        chunk_span = self._checked(hidden, mask, chunk_span)
        visible = None if mask is None else mask == 1
        latents = yield from self._perceiver.iter_forward(hidden, visible, chunk_span, chunks)
        return self._factors(index, self.layers(latents), hidden.dtype, None)

    def _latents(
        self,
        context: Tensor,
        visible: Tensor | None,
        chunk_span: Tensor | None,
        wide: torch.dtype,
    ) -> Tensor:
        """Rank latents [N, M * R, Z] of contexts [N, S, Z], each of any layer; compiled."""
        return self.layers(self._perceiver(context, visible, chunk_span, wide))

    def _factors(
        self, index: int, latents: Tensor, dtype: torch.dtype, head: Tensor | None
    ) -> LayerFactors:
        """A layer's A and B from its rank latents [B, M * R, Z]."""
        rank, behind = self.config.rank, latents_features_dtype(dtype, latents.device)
        compute = attention_dtype(behind, latents.dtype)
        factors_a, factors_b = {}, {}
        weights = (self.head.of(index) if head is None else head).unbind(0)
        for number, (module, (d_in, d_out)) in enumerate(self.config.target_modules.items()):
            rows = latents[:, number * rank : (number + 1) * rank]
            a, b = rank_projection(
                rows.to(compute),
                weights[number].to(compute),
                self.scaler_A[module][0].select(0, index)[:, 0],
                self.scaler_B[module][0].select(0, index)[:, 0],
                d_in=d_in,
                d_out=d_out,
            )
            factors_a[module] = a.to(dtype)
            factors_b[module] = b.to(dtype)
        return factors_a, factors_b

    def assemble(self, per_layer: Sequence[LayerFactors]) -> AdapterBatch:
        """Stack the results of :meth:`group` for layers 0 to L - 1 into one batch.

        For adapters on their own, :meth:`adapters` copies each factor once less.
        """
        a, b = (
            {
                # In memory layer by layer: each layer's factors are copied as a whole.
                m: torch.stack([layer[side][m] for layer in per_layer]).transpose(0, 1)
                for m in modules
            }
            for side, modules in enumerate(per_layer[0])
        )
        return AdapterBatch(a, b, cast(float, self.config.scale), self.bias_adapter())

    def adapters(self, per_layer: Sequence[LayerFactors]) -> list[Adapter]:
        """The adapter of each row of the results of :meth:`group` for layers 0 to L - 1."""
        scale, bias = cast(float, self.config.scale), self.bias_adapter()
        rows = len(next(iter(per_layer[0][0].values())))
        return [Adapter.of_layers(per_layer, row, scale, bias) for row in range(rows)]

    def bias_adapter(self) -> BiasAdapter | None:
        """The learned adapter shared by all videos (by reference), or None."""
        if not self.config.bias_adapter:
            return None
        return BiasAdapter(dict(self.bias_A.items()), dict(self.bias_B.items()), self._aliases)

    @property
    def fingerprint(self) -> str:
        """Hash of the config and of the small parameters (all that one training step changes).

        The same in every dtype the network is loaded in or converted to.
        """
        return self._aliases.get(self._value_hash(), self._value_hash())

    def _value_hash(self) -> str:
        """Of the values as they are now, rounded to bfloat16."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name, value in sorted(self.named_parameters()):
            if value.numel() <= SMALL_PARAMETER:
                digest.update(name.encode())
                digest.update(value.detach().to("cpu", torch.bfloat16).float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _apply(self, fn: Callable, recurse: bool = True) -> HyperNetwork:
        # What every conversion (.to, .half, .cuda, ..) goes through. Values rounded twice, to
        # float16 and then for the hash, have another hash: it is known by that of the originals.
        if any(parameter.is_meta for parameter in self.parameters()):
            return super()._apply(fn, recurse)
        fingerprint, bias = self.fingerprint, self.bias_adapter()
        bias_id = None if bias is None else bias.id
        super()._apply(fn, recurse)
        aliases = {self._value_hash(): fingerprint}
        converted = self.bias_adapter()
        if bias_id is not None and converted is not None:
            aliases[converted.value_hash] = bias_id
        self._aliases = {**self._aliases, **{k: v for k, v in aliases.items() if k != v}}
        return self

    def for_inference(self, device: torch.device | str, dtype: torch.dtype) -> HyperNetwork:
        """This network on a device, with weights in the dtypes that features of ``dtype`` need.

        All are of ``dtype``, except on a CPU in half precision: there only the modality projection,
        which has most of the FLOPs, computes in ``dtype``. CPUs with AVX512-BF16 or AMX are faster
        in bfloat16, and adapters stay within 5e-3 of the float32 ones
        (``bench.runs.hypernet_streaming``).
        """
        if torch.device(device).type != "cpu" or dtype.itemsize >= 4:
            return self.to(device=device, dtype=dtype)
        self.to(device=device, dtype=torch.float32)
        fingerprint = self.fingerprint
        self._perceiver.modality_projection.to(dtype)
        self._aliases = {**self._aliases, self._value_hash(): fingerprint}
        return self

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write ``config.json`` and ``model.safetensors``, each atomically."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_tensors(dict(self.state_dict()), directory / WEIGHTS_NAME)
        self.config.save(directory)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
    ) -> HyperNetwork:
        """Load what :meth:`save_pretrained` wrote.

        Args:
            dtype: of the parameters, as in :func:`as_dtype`; float32 when omitted.

        Raises:
            ConfigError: config.json is missing or wrong.
            CheckpointError: the weights are missing, corrupt or do not fit the config.
        """
        config = HypernetConfig.load(directory)
        path = Path(directory) / WEIGHTS_NAME
        with torch.device("meta"):
            network = cls(config)
        state, _ = load_tensors(
            path, CheckpointError, judge=lambda header: network._check_layout(header.tensors, path)
        )
        network.load_checked(state, path)
        return network.to(device=device, dtype=as_dtype(dtype) or torch.float32).eval()

    def load_checked(self, state: dict[str, Tensor], source: str | os.PathLike) -> None:
        """Adopt a state dict after checking every key, shape, dtype and value.

        Raises:
            CheckpointError: naming ``source`` and the first key at fault.
        """
        self._check_layout(state, source)
        for key, value in state.items():
            if not torch.isfinite(value).all():
                raise CheckpointError(f"{source}: {key} holds NaN or infinity")
        self.load_state_dict(state, assign=True)

    def _check_layout(
        self, state: Mapping[str, Tensor | TensorInfo], source: str | os.PathLike
    ) -> None:
        """Check every key, shape and dtype; raises CheckpointError naming the first at fault."""
        expected = self.state_dict()
        for problem, keys in (
            ("lacks", sorted(set(expected) - set(state))),
            ("has unexpected", sorted(set(state) - set(expected))),
        ):
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise CheckpointError(f"{source}: {problem} {keys[0][:120]!r}{more}")
        for key, value in state.items():
            if tuple(value.shape) != tuple(expected[key].shape):
                raise CheckpointError(
                    f"{source}: {key} is {list(value.shape)}, the config says "
                    f"{list(expected[key].shape)}"
                )
            if not value.dtype.is_floating_point:
                raise CheckpointError(f"{source}: {key} is {value.dtype}, not floating point")
