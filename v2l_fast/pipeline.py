"""The path from videos to adapters: clips, contexts, visual features, layer inputs, LoRA factors.

A :class:`Context` is the forward pass whose hidden states become an adapter: the prompt's token ids
with the chunk's pixels or visual features. Inference, training, analysis and benchmarks take the
same steps: :func:`iter_context` prepares a clip, :func:`iter_features` runs the vision tower over
several contexts, :func:`context_batches` embeds and pads those of similar length, and
:func:`iter_factors` generates the factors of a batch, by groups of layers. Long steps are
generators of work units (see :mod:`v2l_fast.work_units`). Nothing here waits for the device except
the check of :class:`VideoInternalizer` for finite factors.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from v2l_fast.device import send
from v2l_fast.errors import ConfigError, VideoError
from v2l_fast.hypernet.adapter import Adapter, LayerFactors
from v2l_fast.hypernet.adapter_files import Provenance
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.video import Clip, FrameSampling
from v2l_fast.video.clip import split_clip
from v2l_fast.video.preprocess import frame_views
from v2l_fast.video.reader import Backend, load_spans
from v2l_fast.vlm import Backbone, PromptBuilder, VideoChunk, iter_views
from v2l_fast.work_units import (
    WorkUnit,
    label_units,
    layers_per_group,
    run_to_completion,
    token_chunks,
    tokens_per_group,
    tokens_per_unit,
)

Video = str | os.PathLike[str] | Clip

# Context tokens computed together; a longer context is computed alone. Eight videos of twelve
# frames have 7,000. At the widest decoder (MLP of 8,192) a layer then needs 2 GB in bfloat16.
BATCH_TOKENS = 32768
# Share of a batch that may be padding: prompts of equally many frames differ by a few words.
MAX_PADDING = 0.1


@dataclass(frozen=True)
class Context:
    """The forward pass that internalizes one chunk of a video.

    Attributes:
        ids: int64 [S] on the CPU, the prompt of video and instruction, image tokens included.
        pixels: uint8 [V, 3, M, M] views of the vision tower, or None; or, where `longest_edge` is
            set, the frames [F, 3, H, W] that the model's device turns into views.
        features: [V, t, D] connector outputs of those views; exactly one of the two is not None.
        chunk_span: start and end of the chunk as fractions of the whole video.
        longest_edge: of the frames' views, None where `pixels` are views.
        views_per_frame: views that a row of `pixels` becomes, 1 where it is one.
    """

    ids: Tensor
    pixels: Tensor | None = None
    features: Tensor | None = None
    chunk_span: tuple[float, float] = (0.0, 1.0)
    longest_edge: int | None = None
    views_per_frame: int = 1

    def __post_init__(self) -> None:
        if (self.pixels is None) == (self.features is None):
            raise ValueError("a context has either pixels or features")

    @classmethod
    def build(
        cls,
        prompt_builder: PromptBuilder,
        chunk: VideoChunk,
        instruction: str,
        chunk_span: tuple[float, float] = (0.0, 1.0),
    ) -> Context:
        """The context of a chunk of views or of visual features."""
        ids = torch.tensor(prompt_builder.video_prompt(*chunk.layout, instruction, False))
        is_pixels = chunk.visual.dtype == torch.uint8
        return cls(
            ids,
            chunk.visual if is_pixels else None,
            None if is_pixels else chunk.visual,
            chunk_span,
            chunk.longest_edge,
            1 if chunk.longest_edge is None else chunk.rows * chunk.cols + 1,
        )

    @property
    def num_views(self) -> int:
        """Views that the vision tower encodes; 0 where features are stored."""
        return 0 if self.pixels is None else len(self.pixels) * self.views_per_frame

    def pin_memory(self) -> Context:
        """The same in page-locked memory, from where copies to a GPU do not wait."""
        pixels, features = (
            t if t is None or t.is_cuda else t.pin_memory() for t in (self.pixels, self.features)
        )
        return replace(self, ids=self.ids.pin_memory(), pixels=pixels, features=features)


@dataclass(frozen=True)
class ContextBatch:
    """Embedded contexts of similar length, right-padded.

    Attributes:
        members: index of each among the contexts it was built from, [n].
        embeddings: [n, S, D].
        mask: bool [n, S], True where a token is; None when all have length S.
        chunk_spans: float32 [n, 2].
    """

    members: list[int]
    embeddings: Tensor
    mask: Tensor | None
    chunk_spans: Tensor


def chunk_spans(count: int) -> list[tuple[float, float]]:
    """Start and end of each of ``count`` equal chunks, as fractions of the video."""
    return [(i / count, (i + 1) / count) for i in range(count)]


def iter_context(
    prompt_builder: PromptBuilder,
    clip: Clip,
    instruction: str,
    longest_edge: int,
    chunk_span: tuple[float, float] = (0.0, 1.0),
) -> Generator[WorkUnit, None, Context]:
    """A clip's context; large frames are resized in "decode" units, on the frames' device."""
    chunk = yield from iter_views(clip, longest_edge, prompt_builder.tile_size)
    return Context.build(prompt_builder, chunk, instruction, chunk_span)


@torch.no_grad()
def iter_features(
    backbone: Backbone, contexts: Sequence[Context]
) -> Generator[WorkUnit, None, list[Tensor]]:
    """Visual features [V, t, D] of each context, on the model's device and in its dtype.

    The vision tower takes the views of all contexts together, in "encode frames" units of
    ``backbone.views_per_unit`` views.
    """
    device, dtype = backbone.decoder.device, backbone.decoder.dtype
    counts = [context.num_views for context in contexts if context.pixels is not None]
    encoded: list[Tensor] = []
    total, done = sum(counts), 0
    for views in _chunks_across(_views(backbone, contexts), backbone.views_per_unit):
        yield "encode frames", done, total
        sent = [send(part, device) for part in views]
        encoded.append(backbone.encode_views(sent[0] if len(sent) == 1 else torch.cat(sent)))
        done += len(encoded[-1])
    own = iter(torch.cat(encoded).split(counts) if encoded else ())
    return [
        next(own) if context.features is None else send(context.features, device, dtype)
        for context in contexts
    ]


def _views(backbone: Backbone, contexts: Sequence[Context]) -> Iterator[Tensor]:
    """The views of each context that has pixels; those made of frames are on the model's device.

    The resize has the same bits on every device.
    """
    tile = backbone.prompt_builder.tile_size
    for context in contexts:
        if context.pixels is None:
            continue
        if context.longest_edge is None:
            yield context.pixels
        else:
            frames = send(context.pixels, backbone.decoder.device)
            yield frame_views(frames, context.longest_edge, tile).views


def visual_features(backbone: Backbone, contexts: Sequence[Context]) -> list[Tensor]:
    """:func:`iter_features` in one go."""
    return run_to_completion(iter_features(backbone, contexts))


def length_buckets(lengths: Sequence[int], max_padding: float, max_tokens: int) -> list[list[int]]:
    """Indices grouped by length, shortest first.

    Padded to its longest member, a group is at most the share `max_padding` padding. A group of
    more than one sequence holds at most `max_tokens` tokens, padding included.
    """
    groups: list[list[int]] = []
    filled = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        area = length * (len(groups[-1]) + 1) if groups else 0
        if groups and area <= max_tokens and filled + length >= (1 - max_padding) * area:
            groups[-1].append(index)
            filled += length
        else:
            groups.append([index])
            filled = length
    return groups


def pad_right(rows: Sequence[Tensor], value: float = 0) -> tuple[Tensor, Tensor | None]:
    """Rows [T_i, ...] as one tensor [n, T, ...], padded with `value`, and their mask.

    The mask is bool [n, T] on the rows' device, True where a token is, or None if all rows have
    length T.
    """
    lengths = [len(row) for row in rows]
    padded = pad_sequence(list(rows), batch_first=True, padding_value=value)
    if min(lengths) == max(lengths):
        return padded, None
    ends = torch.tensor(lengths, device=padded.device)[:, None]
    return padded, torch.arange(max(lengths), device=padded.device) < ends


def context_batches(
    backbone: Backbone,
    contexts: Sequence[Context],
    features: Sequence[Tensor],
    max_padding: float = MAX_PADDING,
    max_tokens: int = BATCH_TOKENS,
) -> Iterator[ContextBatch]:
    """Contexts embedded in batches of similar length, as :func:`length_buckets` groups them.

    Args:
        features: of each context, as from :func:`iter_features`.

    Raises:
        ConfigError: a prompt's image tokens and its features differ in number.
    """
    device = backbone.decoder.device
    pad_id = backbone.tokenizer.pad_token_id or 0
    for members in length_buckets([len(c.ids) for c in contexts], max_padding, max_tokens):
        ids, mask = pad_right([contexts[i].ids for i in members], pad_id)
        spans = torch.tensor([contexts[i].chunk_span for i in members], dtype=torch.float32)
        yield ContextBatch(
            members,
            backbone.embed(ids, [features[i] for i in members]),
            None if mask is None else send(mask, device),
            send(spans, device),
        )


def iter_factors(
    backbone: Backbone,
    hypernet: HyperNetwork,
    batch: ContextBatch,
    unit: int | None = None,
    heads: Sequence[Tensor] | None = None,
    recompute: bool = False,
    widen: bool = True,
) -> Generator[WorkUnit, None, list[LayerFactors]]:
    """The factors of a batch of contexts, one "generate adapter" unit per layer.

    The decoder computes the inputs of as many layers as a group has tokens for, then the
    hypernetwork generates the factors of these layers together. The last decoder layer and the LM
    head are never computed.

    Args:
        unit: tokens of a chunk, without gradients only; longer contexts take several units per
            layer, and each layer is a group of its own. None computes whole contexts.
        heads: :meth:`~v2l_fast.hypernet.network.Head.slices`, for gradients.
        recompute, widen: see :meth:`~v2l_fast.hypernet.network.HyperNetwork.group`.

    Returns:
        The factors of each layer, one row per context in the batch's order.
    """
    decoder = backbone.decoder
    count, length = batch.embeddings.shape[:2]
    whole = unit is None or length <= unit
    metadata = decoder.prefill_metadata(count, length) if whole else None
    total = hypernet.config.num_layers
    budget = tokens_per_group(decoder.device, unit is None, batch.embeddings.dtype)
    size = layers_per_group(count * length, total, budget)
    unit = length if unit is None else unit
    chunks = list(token_chunks(length, unit))
    hidden = batch.embeddings
    per_layer: list[LayerFactors] = []
    inputs: list[Tensor] = []
    for index in range(total):
        label = "generate adapter", index, total
        yield label
        if whole:
            inputs.append(hidden)
            if len(inputs) == size or index + 1 == total:
                first = index + 1 - len(inputs)
                own = None if heads is None else heads[first : index + 1]
                per_layer += hypernet.group(
                    first, inputs, batch.mask, batch.chunk_spans, own, recompute, widen
                )
                inputs = []
        else:
            units = hypernet.iter_layer(index, hidden, batch.mask, batch.chunk_spans, chunks)
            per_layer.append((yield from label_units(units, label)))
        if index + 1 < total:
            if metadata is not None:
                hidden = decoder.layer(index, hidden, metadata)
            else:
                hidden = yield from label_units(decoder.iter_layer(index, hidden, unit), label)
    yield "generate adapter", total, total
    return per_layer


@torch.no_grad()
def iter_adapters(
    backbone: Backbone, hypernet: HyperNetwork, contexts: Sequence[Context], max_tokens: int
) -> Generator[WorkUnit, None, list[Adapter | None]]:
    """One adapter per context, without gradients; None where a factor is NaN or infinite.

    Batching changes results only by floating-point rounding.
    """
    features = yield from iter_features(backbone, contexts)
    members: list[int] = []
    adapters: list[Adapter] = []
    unit = tokens_per_unit(backbone.decoder.device)
    for batch in context_batches(backbone, contexts, features, MAX_PADDING, max_tokens):
        factors = yield from iter_factors(backbone, hypernet, batch, unit)
        members += batch.members
        adapters += hypernet.adapters(factors)
    # One wait for the device, after everything is enqueued.
    flags = torch.stack([_finite(adapter) for adapter in adapters]).tolist() if adapters else []
    by_context = dict(zip(members, zip(adapters, flags, strict=True), strict=True))
    return [a if fine else None for a, fine in (by_context[i] for i in range(len(contexts)))]


@dataclass(frozen=True)
class ChunkReader:
    """How a video becomes clips.

    Attributes:
        sampling: frames and size of each chunk.
        chunks: number of chunks of equal duration, at most one per frame.
        decoder, device: ``backend`` of :func:`~v2l_fast.video.load_video`, and where frames go.

    Raises:
        ConfigError: ``chunks`` is less than 1.
    """

    sampling: FrameSampling
    chunks: int = 1
    decoder: Backend = "auto"
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise ConfigError(f"chunks must be at least 1, got {self.chunks}")

    def read(self, video: Video) -> list[Clip]:
        """The video's chunks in the order of time; a clip's own frames are divided among them.

        Raises:
            VideoError: the file cannot be read, or the clip was read without its hash.
        """
        if isinstance(video, Clip):
            if video.sha256 is None:
                raise VideoError(
                    f"{video.path}: an adapter's provenance needs the file's hash, and this clip "
                    "has none; read it with hash_file=True"
                )
            return [video] if self.chunks == 1 else split_clip(video, self.chunks)
        return load_spans(
            video,
            self.sampling,
            chunks=self.chunks,
            backend=self.decoder,
            device=self.device,
        )


class VideoInternalizer:
    """A frozen VLM and a hypernetwork whose weights no longer change.

    Attributes:
        bias: the bias adapter that all adapters share.
        fingerprint: of the hypernetwork.
    """

    def __init__(self, backbone: Backbone, hypernet: HyperNetwork) -> None:
        self._backbone, self._hypernet = backbone, hypernet
        self.bias = hypernet.bias_adapter()
        self.fingerprint = hypernet.fingerprint

    def iter_internalize(
        self,
        videos: Sequence[Video | VideoError],
        reader: ChunkReader,
        max_tokens: int = BATCH_TOKENS,
    ) -> Generator[WorkUnit, None, list[Adapter | VideoError]]:
        """The adapter of each video, composed of its chunks' adapters, or the error that names it.

        Args:
            videos: files, clips, or the error of a video that could not be read.
            max_tokens: context tokens computed together; 0 computes each chunk alone.
        """
        clips: list[Clip] = []
        spans: list[tuple[float, float]] = []
        owners: list[int] = []
        errors: dict[int, VideoError] = {}
        for number, video in enumerate(videos):
            if isinstance(video, VideoError):
                errors[number] = video
                continue
            yield "decode", number, len(videos)
            try:
                own = reader.read(video)
            except VideoError as error:
                errors[number] = error
                continue
            clips += own
            spans += chunk_spans(len(own))
            owners += [number] * len(own)
        adapters: list[Adapter | None] = []
        while len(adapters) < len(clips):
            start = len(adapters)
            contexts = yield from self._next_contexts(
                clips[start:], spans[start:], reader.sampling.longest_edge, max_tokens
            )
            adapters += yield from iter_adapters(
                self._backbone, self._hypernet, contexts, max_tokens
            )
        chunks: list[list[Adapter]] = [[] for _ in videos]
        for number, clip, span, adapter in zip(owners, clips, spans, adapters, strict=True):
            if adapter is None:
                errors[number] = VideoError(
                    f"{clip.path or 'frames in memory'}: the context gives NaN or infinite "
                    "factors; are the base model's weights and dtype sound? float16 overflows: "
                    "use bfloat16 or float32"
                )
                continue
            provenance = self._provenance(clip, span, reader.sampling)
            chunks[number].append(replace(adapter, bias=self.bias, provenance=provenance))
        return [
            errors[number] if number in errors else _composed(own)
            for number, own in enumerate(chunks)
        ]

    def _next_contexts(
        self,
        clips: Sequence[Clip],
        spans: Sequence[tuple[float, float]],
        longest_edge: int,
        max_tokens: int,
    ) -> Generator[WorkUnit, None, list[Context]]:
        """The first clips, up to and with the one that reaches ``max_tokens`` visual tokens."""
        builder, instruction = self._backbone.prompt_builder, self._hypernet.config.instruction
        contexts: list[Context] = []
        tokens = 0
        for clip, span in zip(clips, spans, strict=True):
            context = yield from iter_context(builder, clip, instruction, longest_edge, span)
            contexts.append(context)
            assert context.pixels is not None
            tokens += len(context.pixels) * builder.tokens_per_view
            if tokens >= max_tokens:
                break
        return contexts

    def _provenance(
        self, clip: Clip, span: tuple[float, float], sampling: FrameSampling
    ) -> Provenance:
        config = self._hypernet.config
        assert clip.sha256 is not None  # ChunkReader checked it.
        return {
            "source": {
                "name": None if clip.path is None else Path(clip.path).name,
                "sha256": clip.sha256,
                "frame_indices": [int(i) for i in clip.indices],
                "timestamps": [round(t, 6) for t in clip.timestamps],
                "fps": clip.fps,
                "duration": clip.duration,
                "num_frames": clip.num_frames,
                "place": list(span),
            },
            "preprocessing": {
                "version": self._backbone.preprocessing,
                "longest_edge": sampling.longest_edge,
                "exact_frames": sampling.exact_frames,
                "instruction": config.instruction,
            },
            "hypernetwork": self.fingerprint,
            "base_model": config.base_model_name_or_path or self._backbone.name_or_path,
        }


def _composed(chunks: list[Adapter]) -> Adapter:
    return chunks[0] if len(chunks) == 1 else Adapter.compose(chunks)


def _chunks_across(tensors: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """The rows of all tensors in chunks of ``size``, each as slices of the tensors it spans."""
    chunk: list[Tensor] = []
    room = size
    for tensor in tensors:
        start = 0
        while start < len(tensor):
            part = tensor[start : start + room]
            chunk.append(part)
            start += len(part)
            room -= len(part)
            if not room:
                yield chunk
                chunk, room = [], size
    if chunk:
        yield chunk


def _finite(adapter: Adapter) -> Tensor:
    """Whether all generated factors are finite, a bool scalar."""
    factors = *adapter.A.values(), *adapter.B.values()
    return torch.stack([factor.sum(dtype=torch.float32) for factor in factors]).isfinite().all()
