"""Batches ahead of the step: which videos, read by workers while the model computes.

The batch of a step is a function of (seed, step) alone, so a checkpoint needs no state of the
order. A video that cannot be read is listed in the quarantine and left out; its batch goes on.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from v2l_fast.data.readers import Failure, Sample, Source, read_ahead
from v2l_fast.errors import ConfigError
from v2l_fast.files import append_jsonl, read_jsonl
from v2l_fast.training.config import DataConfig

T = TypeVar("T")


class EpochOrder:
    """Batches of video indices as a function of (seed, step) alone.

    Each epoch is a permutation that depends on (seed, epoch). The last, short batch of an epoch is
    filled from the next one, so every batch has the same size.
    """

    def __init__(self, videos: int, batch_size: int, seed: int) -> None:
        self.videos, self.batch_size, self.seed = videos, batch_size, seed
        self._epoch = -1
        self._order: list[int] = []

    def batch(self, step: int) -> list[int]:
        """Indices of the batch of 0-based `step`."""
        indices: list[int] = []
        position = step * self.batch_size
        while len(indices) < self.batch_size:
            epoch, start = divmod(position, self.videos)
            part = self._permutation(epoch)[start : start + self.batch_size - len(indices)]
            indices += part
            position += len(part)
        return indices

    def share(self, step: int, rank: int, processes: int) -> list[int]:
        """One process's part of the batch; in order of rank, the parts are the batch."""
        return even_part(self.batch(step), rank, processes)

    def _permutation(self, epoch: int) -> list[int]:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.videos, generator=generator).tolist()
            self._epoch, self._order = epoch, order
        return self._order


def even_part(items: list[T], index: int, parts: int) -> list[T]:
    """Part `index` of `parts` consecutive parts whose lengths differ by at most one."""
    return items[len(items) * index // parts : len(items) * (index + 1) // parts]


class Quarantine:
    """The videos of a source that could not be read; they are not tried again.

    The processes of a run share the list through its file.

    Args:
        path: JSON lines of video, reason, step (whose read failed; workers read ahead of each
            other) and index.
        videos: number of videos of the source.

    Attributes:
        broken: bool [videos], in memory that worker processes share.
    """

    def __init__(self, path: Path, videos: int) -> None:
        self.path = path
        self.broken = torch.zeros(videos, dtype=torch.bool).share_memory_()
        self._size = 0
        self._listed: set[int] = set()

    def __len__(self) -> int:
        self.refresh()
        return len(self._listed)

    def refresh(self) -> None:
        """Read what other processes have added; where nothing is new, this costs one `stat`."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != self._size:
            self._size = size
            self._listed = {row["index"] for _, row in read_jsonl(self.path, torn=True)}
            self.broken[sorted(self._listed)] = True

    def add(self, index: int, failure: Failure, step: int) -> None:
        """Add a video that failed in `step`, unless it is listed already."""
        self.broken[index] = True
        self.refresh()
        if index not in self._listed:
            reason = failure.reason.splitlines()[0] if failure.reason else "unknown"
            line = {"video": failure.video, "reason": reason, "step": step, "index": index}
            append_jsonl(self.path, [line])
            self.refresh()


# 0-based step and index of a video.
Key = tuple[int, int]
# Step, index, and what was read; None for a video known to be broken.
Read = tuple[int, int, Sample | Failure | None]


@dataclass(frozen=True)
class StepBatch:
    """One process's part of a step: micro-batches, and the seconds it waited for them."""

    step: int
    micro_batches: list[list[Sample]]
    waited: float

    @property
    def samples(self) -> list[Sample]:
        return [sample for micro in self.micro_batches for sample in micro]


class _SampleDataset(Dataset):
    """A source's samples by (step, index)."""

    def __init__(self, source: Source, broken: Tensor) -> None:
        self.source, self.broken = source, broken

    def __getitem__(self, key: Key) -> Read:
        step, index = key
        if self.broken[index]:
            return step, index, None
        sample = self.source.load(index, step)
        if isinstance(sample, Failure):
            self.broken[index] = True
        return step, index, sample


def read_batches(
    source: Source,
    batches: Iterable[list[Key]],
    config: DataConfig,
    quarantine: Quarantine,
    pinned: bool = False,
) -> Iterator[list[Sample]]:
    """Samples of each batch of keys, in order; a video that fails is quarantined and left out.

    pinned: in page-locked memory, for a GPU.
    """
    dataset = _SampleDataset(source, quarantine.broken)
    loader: Iterable[list[Read]]
    if config.workers and getattr(source, "on_gpu", False):
        loader = _in_threads(dataset, batches, config)
    else:
        loader = _in_processes(dataset, batches, config, pinned)
    for batch in loader:
        samples = []
        for step, index, sample in batch:
            if isinstance(sample, Failure):
                quarantine.add(index, sample, step + 1)
            elif sample is not None:
                samples.append(sample)
        yield samples


def _in_processes(
    dataset: _SampleDataset, batches: Iterable[list[Key]], config: DataConfig, pinned: bool
) -> Iterable[list[Read]]:
    """Read in data workers, or in this process if there are none."""
    if config.workers:
        _allow_many_files()
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=list,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        worker_init_fn=_start_worker,
        pin_memory=pinned,
    )


def _in_threads(
    dataset: _SampleDataset, batches: Iterable[list[Key]], config: DataConfig
) -> Iterator[list[Read]]:
    """Read in threads of this process: videos read at once share the GPU decoder's batches."""
    ahead = config.prefetch * config.workers
    return read_ahead(lambda keys: [dataset[key] for key in keys], batches, config.workers, ahead)


def check_shared_memory(
    config: DataConfig, micro_batch: int, video_bytes: int, folder: Path = Path("/dev/shm")
) -> None:
    """Raise before the first step if the batches that workers read ahead do not fit.

    Workers pass tensors through shared memory; a worker that finds it full dies of a bus error.

    Args:
        micro_batch: videos of one batch.
        video_bytes: of one video's tensors.
        folder: where the system keeps shared memory; systems without it have no such limit.

    Raises:
        ConfigError: names the size, the need and the remedies.
    """
    if not config.workers or not folder.is_dir():
        return
    # Every process of this machine has workers of its own; one more batch is in the step.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    batches = processes * (config.workers * config.prefetch + 1)
    need, size = batches * micro_batch * video_bytes, shutil.disk_usage(folder).free
    if need > size:
        gib = 2**30
        raise ConfigError(
            f"{folder} has {size / gib:.2f} GiB free, and the workers need {need / gib:.2f} GiB: "
            f"{batches} batches of {micro_batch} videos of {video_bytes / 2**20:.1f} MiB; enlarge "
            f"it (docker run --shm-size={math.ceil(need / gib)}g, or --ipc=host), or lower "
            "data.workers, data.prefetch or optim.micro_batch_size, or fill a feature cache "
            "(v2l cache)"
        )


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
    """The batches of `steps` for the process `rank` of `processes`."""

    def keys() -> Iterator[list[Key]]:
        for step in steps:
            share = order.share(step, rank, processes)
            for number in range(accumulation):
                yield [(step, index) for index in even_part(share, number, accumulation)]

    samples = read_batches(source, keys(), config, quarantine, pinned)
    for step in steps:
        start = time.perf_counter()
        micro_batches = [next(samples) for _ in range(accumulation)]
        yield StepBatch(step, micro_batches, time.perf_counter() - start)


def _start_worker(worker: int) -> None:
    # A signal to the whole process group must not kill the readers of the step in progress.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Avoids the tokenizers' warning about forks; a worker is a single thread anyway.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _allow_many_files() -> None:
    """Raise the limit of open files: every tensor in transit from a worker is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
