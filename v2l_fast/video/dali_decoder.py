"""DALI's video decoder as a call: encoded files and frame numbers in, frames on the device out.

Responsible for the pipeline, for putting calls of several threads into one batch and for keeping
one file's failure from the others of its batch. What is safe to hand to it, colors and orientation
are `dali_source`'s.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

# Files in a batch at most: as many as an H100 or H200 has video engines, and a few to queue.
BATCH = 8
# Threads that demux (and, on the CPU, decode) the files of a batch.
_THREADS = 4


class DaliError(Exception):
    """DALI could not decode one file, or not start; the message is its own reason, in one line."""


@dataclass(frozen=True, eq=False)
class Request:
    """Frames of one file.

    encoded: uint8 [bytes], the file. indices: int32 [F], frames in presentation order, all of them
    in the file: DALI gives black frames for others.
    """

    encoded: np.ndarray
    indices: np.ndarray
    result: Future[torch.Tensor] = field(default_factory=Future)


class DaliDecoder:
    """One pipeline on one device: NVDEC ("mixed" operator) on a GPU, its own FFmpeg on the CPU.

    Raises DaliError when DALI cannot be started here.
    """

    def __init__(self, device: torch.device, batch: int = BATCH) -> None:
        self.device = device
        self.batch = batch
        self.batches = 0  # run so far
        self._lock = threading.Lock()
        self._waiting: deque[Request] = deque()
        self._pipeline = self._build()

    def __call__(self, encoded: np.ndarray, indices: np.ndarray) -> torch.Tensor:
        """uint8 [F, H, W, 3] on the device, as coded. Threads that call at once share batches.

        Raises DaliError.
        """
        request = Request(encoded, indices)
        self._waiting.append(request)
        with self._lock:
            # Whoever comes first decodes for those who wait behind it.
            while not request.result.done():
                count = min(self.batch, len(self._waiting))
                taken = [self._waiting.popleft() for _ in range(count)]
                try:
                    self._decode(taken)
                except BaseException as error:
                    # Interrupted: nobody may wait for what is never decoded.
                    for left in taken:
                        if not left.result.done():
                            left.result.set_exception(error)
                    raise
        return request.result.result()

    def _decode(self, requests: Sequence[Request]) -> None:
        """Give each request its frames or its error."""
        try:
            frames = self._run(requests)
        except RuntimeError as error:
            # A pipeline that failed is no longer valid, and the error does not say whose it is.
            self._pipeline = self._build()
            if len(requests) > 1:
                for request in requests:
                    self._decode([request])
            else:
                requests[0].result.set_exception(DaliError(_reason(error)))
            return
        for request, found in zip(requests, frames, strict=True):
            request.result.set_result(found)

    def _run(self, requests: Sequence[Request]) -> list[torch.Tensor]:
        self.batches += 1
        (out,) = self._pipeline.run(
            encoded=[request.encoded for request in requests],
            indices=[request.indices for request in requests],
        )
        # With the dynamic executor outputs are never overwritten: nothing is copied.
        return [torch.from_dlpack(out[i]) for i in range(len(requests))]

    def _build(self):
        try:
            from nvidia.dali import fn, pipeline_def, types
        except (ImportError, OSError) as error:
            raise DaliError(
                f'cannot be imported, {_first_line(error)}; pip install "v2l_fast[dali]"'
            ) from None
        on_gpu = self.device.type == "cuda"

        # Depth 1: frames are asked for one batch at a time, and the caller reads ahead.
        @pipeline_def(exec_dynamic=True, prefetch_queue_depth=1)
        def pipeline():
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            indices = fn.external_source(name="indices", dtype=types.INT32, ndim=1)
            return fn.decoders.video(encoded, frames=indices, device="mixed" if on_gpu else "cpu")

        index = self.device.index
        if on_gpu and index is None:
            index = torch.cuda.current_device()
        built = pipeline(
            batch_size=self.batch,
            num_threads=min(_THREADS, os.cpu_count() or 1),
            device_id=index if on_gpu else None,
        )
        try:
            built.build()
        except RuntimeError as error:
            raise DaliError(_reason(error)) from None
        return built


def shared_decoder(device: torch.device) -> DaliDecoder:
    """The process's decoder of a device: pipelines hold memory and take a while to start."""
    return _decoder_of(device, os.getpid())


@cache
def _decoder_of(device: torch.device, process: int) -> DaliDecoder:
    """By process, for threads do not survive a fork. A data worker makes its own and keeps its
    parent's untouched: taking that apart there breaks both."""
    return DaliDecoder(device)


def _reason(error: RuntimeError) -> str:
    """The one line of a DALI error that says what happened."""
    _, _, after = str(error).rpartition("encountered:")
    return _first_line(RuntimeError(after.strip()))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
