"""Batches ahead of the step: worker processes read videos while the model computes.

Responsible for the order of loading, for failures (a micro-batch goes on without the video) and
for the time the step had to wait. What a video becomes is the source's business.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from v2l_fast.data.readers import read_ahead
from v2l_fast.data.samples import Failure, Sample, Source
from v2l_fast.training.config import DataConfig
from v2l_fast.training.quarantine import Quarantine
from v2l_fast.training.sampler import EpochOrder, even_part

# 0-based step and index of a video.
Key = tuple[int, int]
# Its step, its index, and the sample, a failure, or None if known as broken.
Found = tuple[int, int, Sample | Failure | None]


@dataclass(frozen=True)
class StepBatch:
    """One process's part of a step: its micro-batches and the seconds waited for them."""

    step: int
    micro_batches: list[list[Sample]]
    waited: float

    @property
    def samples(self) -> list[Sample]:
        return [sample for micro in self.micro_batches for sample in micro]


class _Reads(Dataset):
    """Reads by key."""

    def __init__(self, source: Source, broken: Tensor) -> None:
        self.source, self.broken = source, broken

    def __getitem__(self, key: Key) -> Found:
        step, index = key
        if self.broken[index]:
            return step, index, None
        found = self.source.load(index, step)
        if isinstance(found, Failure):
            self.broken[index] = True
        return step, index, found


def read(
    source: Source,
    batches: Iterable[list[Key]],
    config: DataConfig,
    quarantine: Quarantine,
    pinned: bool = False,
) -> Iterator[list[Sample]]:
    """Samples of each batch of keys, in order; what fails is quarantined and left out.

    pinned: in page-locked memory, for a GPU.
    """
    reads = _Reads(source, quarantine.broken)
    if config.workers and getattr(source, "on_gpu", False):
        loader = _in_threads(reads, batches, config)
    else:
        loader = _in_processes(reads, batches, config, pinned)
    for batch in loader:
        samples = []
        for step, index, found in batch:
            if isinstance(found, Failure):
                quarantine.add(index, found, step + 1)
            elif found is not None:
                samples.append(found)
        yield samples


def _in_processes(
    reads: _Reads, batches: Iterable[list[Key]], config: DataConfig, pinned: bool
) -> Iterable[list[Found]]:
    """Data workers; without any, the caller reads."""
    if config.workers:
        _allow_many_files()
    return DataLoader(
        reads,
        batch_sampler=batches,
        collate_fn=list,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        worker_init_fn=_start_worker,
        pin_memory=pinned,
    )


def _in_threads(
    reads: _Reads, batches: Iterable[list[Key]], config: DataConfig
) -> Iterator[list[Found]]:
    """Threads of this process, for what a GPU decodes; videos read at once share its batches."""
    ahead = config.prefetch * config.workers
    return read_ahead(lambda keys: [reads[key] for key in keys], batches, config.workers, ahead)


def step_batches(
    source: Source,
    order: EpochOrder,
    steps: range,
    config: DataConfig,
    quarantine: Quarantine,
    *,
    rank: int = 0,
    processes: int = 1,
    accumulation: int = 1,
    pinned: bool = False,
) -> Iterator[StepBatch]:
    """The batches of `steps` for one of several processes."""

    def keys() -> Iterator[list[Key]]:
        for step in steps:
            share = order.share(step, rank, processes)
            for place in range(accumulation):
                yield [(step, index) for index in even_part(share, place, accumulation)]

    samples = read(source, keys(), config, quarantine, pinned)
    for step in steps:
        start = time.perf_counter()
        micro_batches = [next(samples) for _ in range(accumulation)]
        yield StepBatch(step, micro_batches, time.perf_counter() - start)


def _start_worker(worker: int) -> None:
    # A signal to the whole process group must not kill the readers of the step being finished.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Tokenizers warn of it otherwise; a worker is one thread anyway.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _allow_many_files() -> None:
    """Every tensor on its way from a worker is an open file: allow as many as the system does."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
