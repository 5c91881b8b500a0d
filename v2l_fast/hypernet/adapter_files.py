"""Adapter files: the header is checked before any factor is read.

One safetensors file: ``<module>.lora_A`` [L, r, d_in], ``<module>.lora_B`` [L, r, d_out], and a
JSON record of scale, bias and provenance in the header. This module decides which files
are adapters; whether an adapter fits a model is checked by the model.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, TypedDict, TypeGuard

import torch
from torch import Tensor

from v2l_fast.errors import AdapterError, excerpt
from v2l_fast.files import open_regular, parse_json
from v2l_fast.tensor_files import TensorHeader, parse_header, read_tensors, save_tensors

FORMAT = "v2l_adapter"
FORMAT_VERSION = 1
# Far beyond any decoder and any composition; without bounds, empty factors could claim 2 ** 60
# layers in a file of 200 bytes.
MAX_FILE_BYTES = 8 * 2**30
_MAX_TENSORS = 1024
_MAX_LAYERS, _MAX_RANK, _MAX_WIDTH = 1024, 2**16, 2**20
_MAX_FRAMES, _MAX_EDGE = 2**20, 2**16

_REMEDY = "make one with v2l internalize"

Factors = Mapping[str, Tensor]


class VideoSource(TypedDict, total=False):
    """The frames of one chunk.

    Attributes:
        name: file name without its folder; None for frames in memory.
        sha256: of the file's bytes, or of the frames in memory.
        frame_indices, timestamps: of the sampled frames; seconds.
        fps, duration, num_frames: of the whole video; duration in seconds.
        place: start and end of the chunk as fractions of the video.
    """

    name: str | None
    sha256: str
    frame_indices: list[int]
    timestamps: list[float]
    fps: float
    duration: float
    num_frames: int
    place: list[float]


class PreprocessingRecord(TypedDict, total=False):
    """How the frames became a context.

    Attributes:
        version: of the preprocessing of this model family.
        longest_edge: pixels.
        exact_frames: whether sampling took exactly the maximum number of frames.
        instruction: text that follows the video.
        span: start and end in seconds, where a manifest selects a part of the file.
    """

    version: str
    longest_edge: int
    exact_frames: bool
    instruction: str
    span: list[float]


class Provenance(TypedDict, total=False):
    """The record of one adapter.

    Attributes:
        source, preprocessing: of an adapter of one chunk.
        hypernetwork: fingerprint of the network that generated it.
        base_model: name of the frozen VLM.
        chunks: records of the chunks of a composed adapter, in the order of time.
        pruned: arguments (keep, by, seed) of :meth:`~v2l_fast.hypernet.adapter.Adapter.prune`.
        without_layers: layers whose update was removed.
    """

    source: VideoSource
    preprocessing: PreprocessingRecord
    hypernetwork: str
    base_model: str
    chunks: list[Provenance]
    pruned: list[int | str]
    without_layers: list[int]


@dataclass(frozen=True)
class AdapterRecord:
    """Everything in an adapter file but its factors; ``rank`` is the generated rank."""

    scale: float
    bias_id: str | None
    provenance: Provenance
    rank: int


def write_adapter(
    path: str | os.PathLike,
    A: Factors,
    B: Factors,
    scale: float,
    bias_id: str | None,
    provenance: Provenance,
) -> None:
    """Write an adapter file, atomically.

    Raises:
        AdapterError: a factor is not finite, or the provenance could not be read again.
        V2LError: the folder does not exist.
    """
    tensors = {f"{module}.lora_A": factor for module, factor in A.items()}
    tensors |= {f"{module}.lora_B": factor for module, factor in B.items()}
    for name, factor in tensors.items():
        if not torch.isfinite(factor).all():
            raise AdapterError(f"{path}: not written, {name} holds NaN or infinity")
    record = json.dumps(
        {
            "version": FORMAT_VERSION,
            "scale": scale,
            "bias_id": bias_id,
            "provenance": dict(provenance),
        }
    )
    parse_json(record, f"{path}: not written, its record", AdapterError, allow_nan=True)
    save_tensors(tensors, path, {FORMAT: record})


def read_adapter(
    handle: BinaryIO, path: str | os.PathLike
) -> tuple[dict[str, Tensor], dict[str, Tensor], AdapterRecord]:
    """(A, B, record) of an open adapter file, on the CPU and independent of the file.

    Args:
        path: of the file, for errors.

    Raises:
        AdapterError: not a whole adapter file, or a factor is not finite.
    """
    records: list[AdapterRecord] = []
    size = os.fstat(handle.fileno()).st_size
    if size > MAX_FILE_BYTES:
        raise AdapterError(
            f"{path}: has {size:,} bytes, an adapter at most {MAX_FILE_BYTES:,}; {_REMEDY}"
        )
    tensors, _ = read_tensors(
        handle,
        path,
        AdapterError,
        judge=lambda header: records.append(_judge(header, path)),
        max_tensors=_MAX_TENSORS,
        remedy=_REMEDY,
    )
    factors: dict[str, dict[str, Tensor]] = {"lora_A": {}, "lora_B": {}}
    for key, tensor in tensors.items():
        module, _, factor = key.rpartition(".")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {excerpt(module)} is not finite; internalize again")
        factors[factor][module] = tensor
    return factors["lora_A"], factors["lora_B"], records[0]


def read_record(path: str | os.PathLike, *, follow: bool = True) -> AdapterRecord:
    """The record of an adapter file; its factors are not read.

    Raises:
        AdapterError: as :func:`read_adapter`.
    """
    with open_regular(path, AdapterError, follow=follow) as handle:
        _, header = parse_header(
            handle, path, AdapterError, max_tensors=_MAX_TENSORS, remedy=_REMEDY
        )
    return _judge(header, path)


def is_adapter_file(path: str | os.PathLike) -> bool:
    """Whether a file's header is an adapter's, whatever its name; False for what cannot be read."""
    try:
        with open_regular(path, AdapterError) as handle:
            _, header = parse_header(handle, path, AdapterError, max_tensors=_MAX_TENSORS)
    except AdapterError:
        return False
    return FORMAT in header.metadata


def check_provenance(provenance: Any) -> str:
    """The first problem in the provenance fields that the package reads; "" if there is none."""
    waiting = [provenance]
    for record in waiting:
        if not isinstance(record, dict):
            return f"provenance must be an object, got {excerpt(record)}"
        for section, fields in _FIELDS.items():
            values = record.get(section, {}) if section else record
            if not isinstance(values, dict):
                return f"{section} must be an object, got {excerpt(values)}"
            for name, (is_sound, words) in fields.items():
                if values.get(name) is not None and not is_sound(values[name]):
                    where = f"{section}.{name}" if section else name
                    return f"{where} must be {words}, got {excerpt(values[name])}"
        chunks = record.get("chunks", [])
        if not isinstance(chunks, list):
            return f"chunks must be a list, got {excerpt(chunks)}"
        waiting += chunks
    return ""


def _judge(header: TensorHeader, path: str | os.PathLike) -> AdapterRecord:
    """The record of a file whose header is an adapter's."""

    def refused(what: str) -> AdapterError:
        return AdapterError(f"{path}: not an adapter file ({what}); {_REMEDY}")

    if FORMAT not in header.metadata:
        raise refused(f"no {FORMAT} metadata")
    where = f"{path}: {FORMAT} metadata"
    record = parse_json(
        header.metadata[FORMAT], where, AdapterError, remedy=_REMEDY, allow_nan=True
    )
    if not isinstance(record, dict):
        raise refused(f"{FORMAT} metadata must be an object, got {excerpt(record)}")
    version = record.get("version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise AdapterError(
            f"{path}: adapter format {excerpt(version)}, this version reads {FORMAT_VERSION}; "
            "internalize the video again"
        )
    scale, bias_id = record.get("scale"), record.get("bias_id")
    if not _is_number(scale):
        raise refused(f"the scale must be a finite number, got {excerpt(scale)}")
    if bias_id is not None and not _is_text(bias_id):
        raise refused(f"bias_id must be text or null, got {excerpt(bias_id)}")
    if problem := check_provenance(record.get("provenance")):
        raise refused(problem)
    rank = _judge_factors(header, path)
    return AdapterRecord(float(scale), bias_id, record["provenance"], rank)


def _judge_factors(header: TensorHeader, path: str | os.PathLike) -> int:
    """The rank of a file whose tensors are an adapter's."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {"lora_A": {}, "lora_B": {}}
    for key, info in header.tensors.items():
        module, _, factor = key.rpartition(".")
        if not module or factor not in shapes or not info.dtype.is_floating_point:
            raise AdapterError(
                f"{path}: unexpected tensor {excerpt(key)} ({info.dtype}); {_REMEDY}"
            )
        shapes[factor][module] = info.shape
    a, b = shapes["lora_A"], shapes["lora_B"]
    if not a or a.keys() != b.keys():
        raise AdapterError(
            f"{path}: A has the modules {excerpt(sorted(a))}, B has {excerpt(sorted(b))}; {_REMEDY}"
        )
    layers = set()
    for module in a:
        sizes = a[module], b[module]
        if any(len(shape) != 3 for shape in sizes) or sizes[0][:2] != sizes[1][:2]:
            raise AdapterError(
                f"{path}: {excerpt(module)}: A must be [L, r, d_in] and B [L, r, d_out], "
                f"got {list(sizes[0])} and {list(sizes[1])}; {_REMEDY}"
            )
        for (num_layers, rank, width), name in zip(sizes, "AB", strict=True):
            sound = 1 <= num_layers <= _MAX_LAYERS and rank <= _MAX_RANK and 1 <= width
            if not sound or width > _MAX_WIDTH:
                raise AdapterError(
                    f"{path}: {excerpt(module)}: no {name} has shape "
                    f"{[num_layers, rank, width]}; {_REMEDY}"
                )
        layers.add(sizes[0][0])
    if len(layers) > 1:
        raise AdapterError(
            f"{path}: its modules have {' and '.join(map(str, sorted(layers)))} layers; {_REMEDY}"
        )
    return next(iter(a.values()))[1]


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096


def _is_hash(value: Any) -> bool:
    # Videos without a file have a word for a hash, such as the blank video of the controls.
    return isinstance(value, str) and re.fullmatch("[0-9A-Za-z]{1,128}", value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_frames(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_FRAMES and all(map(_is_count, value))


_TEXT = (_is_text, "text of at most 4,096 characters")
_SECONDS = (lambda value: _is_number(value) and value >= 0, "a number of at least 0")
# Section ("" is the record itself) -> field -> (test, expected value). Other fields are free.
_FIELDS: dict[str, dict[str, tuple[Any, str]]] = {
    "": {"hypernetwork": _TEXT, "base_model": _TEXT},
    "source": {
        "name": _TEXT,
        "sha256": (_is_hash, "1 to 128 letters and digits"),
        "frame_indices": (_are_frames, "a list of frame numbers"),
        "num_frames": (_is_count, "an integer of at least 0"),
        "fps": _SECONDS,
        "duration": _SECONDS,
    },
    "preprocessing": {
        "version": _TEXT,
        "instruction": (lambda value: isinstance(value, str), "text"),
        "longest_edge": (
            lambda value: type(value) is int and 1 <= value <= _MAX_EDGE,
            f"an integer of 1 to {_MAX_EDGE:,}",
        ),
        "exact_frames": (lambda value: isinstance(value, bool), "true or false"),
    },
}
