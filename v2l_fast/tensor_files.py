"""Safetensors files: headers are validated before anything is loaded, and writes are atomic.

Every file is checked for too many tensors, unknown dtypes and bytes that belong to no tensor.
Errors name the file, the tensor and the remedy. Which tensors a kind of file must hold is checked
by its own reader.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from v2l_fast.errors import V2LError, WriteError, excerpt
from v2l_fast.files import open_regular, parse_json, replacing

# A hundred times the largest adapter or checkpoint of this package.
HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 100_000
MAX_DIMS = 8
# No file of this package uses others (float8, complex, unsigned).
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Safetensors reports the operating system's errors as text.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorHeader:
    """The header of a safetensors file.

    Attributes:
        tensors: name -> dtype and shape, in the order of their bytes.
        metadata: strings by name.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


Judge = Callable[[TensorHeader], Any]


def parse_header(
    handle: BinaryIO,
    name: str | os.PathLike,
    error: type[V2LError] = V2LError,
    *,
    max_tensors: int = MAX_TENSORS,
    remedy: str = "make it again",
) -> tuple[bytes, TensorHeader]:
    """Parse the header of a file that is open at its start.

    Args:
        name: name of the file, for errors.

    Returns:
        The bytes before the tensors' bytes, and the header.

    Raises:
        error: the file is not a whole safetensors file, or exceeds the limits above.
    """

    def invalid(problem: str) -> V2LError:
        return error(f"{name}: {problem}; {remedy}")

    try:
        size = os.fstat(handle.fileno()).st_size
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise invalid("not a whole safetensors file (it ends within its header)")
        if length > HEADER_BYTES:
            raise invalid(f"its header has {length:,} bytes, at most {HEADER_BYTES:,} are read")
        data = handle.read(length)
    except OSError as cause:
        raise error(f"{name}: cannot be read ({cause.strerror}); try again") from None
    # Counted before parsing, which takes seconds for a million tensors.
    if (count := data.count(b'"data_offsets"')) > max_tensors:
        raise invalid(f"holds {count:,} tensors, at most {max_tensors:,} are read")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise invalid("not a safetensors file (its header is not UTF-8 text)") from None
    entries = parse_json(text, f"{name}: header", error, remedy=remedy)
    if not isinstance(entries, dict):
        raise invalid("not a safetensors file (its header is not an object)")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise invalid(f"its metadata must map names to text, got {excerpt(metadata)}")
    spans, tensors = [], {}
    for key, entry in entries.items():
        problem, span = _check_entry(entry)
        if problem:
            raise invalid(f"tensor {excerpt(key)}: {problem}")
        spans.append((span, key))
    end = 0
    for (begin, stop), key in sorted(spans):
        if begin != end:
            raise invalid(f"tensor {excerpt(key)}: its bytes begin at {begin}, expected {end}")
        end = stop
        tensors[key] = TensorInfo(_DTYPES[entries[key]["dtype"]], tuple(entries[key]["shape"]))
    if end != size - 8 - length:
        raise invalid(
            "not a whole safetensors file "
            f"(its tensors take {end:,} bytes, it has {size - 8 - length:,} for them)"
        )
    return prefix + data, TensorHeader(tensors, metadata)


def read_header(
    path: str | os.PathLike,
    error: type[V2LError] = V2LError,
    *,
    remedy: str = "make it again",
) -> TensorHeader:
    """Read the header of a safetensors file.

    Raises:
        error: the file is missing, is not a whole safetensors file, or exceeds the limits above.
    """
    with open_regular(path, error) as handle:
        return parse_header(handle, path, error, remedy=remedy)[1]


def load_tensors(
    path: str | os.PathLike,
    error: type[V2LError] = V2LError,
    *,
    judge: Judge | None = None,
    remedy: str = "make it again",
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load the tensors (on the CPU, memory-mapped) and metadata of a safetensors file.

    Args:
        judge: called with the header before anything is loaded; raises if it rejects the file.

    Raises:
        error: as :func:`read_header`.
    """
    path = Path(path)
    header = read_header(path, error, remedy=remedy)
    if judge is not None:
        judge(header)
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in header.tensors}, dict(header.metadata)
    except (SafetensorError, OSError) as cause:
        raise error(f"{path}: not a whole safetensors file ({cause}); {remedy}") from None


def read_tensors(
    handle: BinaryIO,
    name: str | os.PathLike,
    error: type[V2LError] = V2LError,
    *,
    judge: Judge | None = None,
    max_tensors: int = MAX_TENSORS,
    remedy: str = "make it again",
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As :func:`load_tensors`, from a file that is open at its start, into memory.

    The tensors belong to the header that was judged and do not change if the file does.

    Args:
        name: name of the file, for errors.
    """
    start, header = parse_header(handle, name, error, max_tensors=max_tensors, remedy=remedy)
    if judge is not None:
        judge(header)
    size = os.fstat(handle.fileno()).st_size
    try:
        data = b"".join([start, handle.read(size - len(start))])
        return safetensors.torch.load(data), dict(header.metadata)
    except (SafetensorError, OSError) as cause:
        raise error(f"{name}: not a whole safetensors file ({cause}); {remedy}") from None


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, such that ``path`` is either the old file or the whole new one.

    Raises:
        WriteError: the folder does not exist or is not writable, or the disk is full.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise WriteError(f"{path}: the folder {path.parent} does not exist; create it first")
    # Copies, because safetensors refuses views and tensors that share storage (tied weights).
    ready = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with replacing(path) as part:
        # save_file creates a private file; adapters and weights follow the user's umask.
        part.touch()
        mode = part.stat().st_mode
        try:
            save_file(ready, part, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            code = _OS_ERROR.search(str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from None
        os.chmod(part, mode)


def _check_entry(entry: Any) -> tuple[str, tuple[int, int]]:
    """The problem with a header's entry ("" if valid), and the span of its bytes."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return f"needs dtype, shape and data_offsets, got {excerpt(entry)}", (0, 0)
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None:
        return f"dtype {excerpt(dtype)} is not supported", (0, 0)
    if not _sizes(shape) or len(shape) > MAX_DIMS:
        return f"the shape {excerpt(shape)} is not a list of at most {MAX_DIMS} sizes", (0, 0)
    if not _sizes(span) or len(span) != 2 or span[0] > span[1]:
        return f"data_offsets {excerpt(span)} is not [begin, end]", (0, 0)
    expected = math.prod(shape) * known.itemsize
    if expected != span[1] - span[0]:
        return f"{dtype} {shape} takes {expected:,} bytes, not {span[1] - span[0]:,}", (0, 0)
    return "", (span[0], span[1])


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)
