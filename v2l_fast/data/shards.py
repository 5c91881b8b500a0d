"""Long work over many items in shards; each shard's file is either complete or absent.

The work is one function from item numbers to JSON lines, the same in this process and on the
workers of a Ray cluster, so a shard does not depend on who computed it, nor when.

Layout of the folder::

    run.json                  what is being computed; a run with other settings is refused
    shards/00000.jsonl        the lines of one shard
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from v2l_fast.errors import V2LError
from v2l_fast.files import read_jsonl, write_jsonl
from v2l_fast.outputs import ResumableFolder

Line = Mapping[str, Any]
# Item numbers of one shard -> its lines.
ShardWork = Callable[[Sequence[int]], list[Line]]
# (items done, items in all)
Progress = Callable[[int, int], None]


class ShardError(V2LError):
    """A folder of shards cannot be used, or shards are missing at the end."""


@dataclass(frozen=True)
class Shards:
    """`items` items in shards of `size`, one file each under `folder`. Picklable."""

    folder: Path
    items: int
    size: int

    @classmethod
    def open(
        cls, folder: str | os.PathLike, fingerprint: Mapping[str, Any], items: int, size: int
    ) -> Shards:
        """Begin or continue in a folder.

        Args:
            fingerprint: JSON values of everything the result depends on.

        Raises:
            ShardError: the folder holds shards of another run, or cannot be written.
        """
        folder = Path(folder).resolve()
        record = {**fingerprint, "items": items, "shard_size": size}
        ResumableFolder(folder, record, ShardError, shared=True)
        try:
            (folder / "shards").mkdir(exist_ok=True)
        except OSError as error:
            raise ShardError(f"{folder}: cannot be used ({error.strerror})") from None
        return cls(folder, items, size)

    def __len__(self) -> int:
        return -(-self.items // self.size)

    def path(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:05d}.jsonl"

    def numbers(self, shard: int) -> range:
        """Items of a shard."""
        return range(shard * self.size, min(self.items, (shard + 1) * self.size))

    def missing(self) -> list[int]:
        """Shards that are not done."""
        return [shard for shard in range(len(self)) if not self.path(shard).exists()]

    def items_done(self) -> int:
        """Items of the shards that are done."""
        return self.items - sum(len(self.numbers(shard)) for shard in self.missing())

    def compute(self, shard: int, work: ShardWork) -> None:
        """Compute one shard unless it is done."""
        if not self.path(shard).exists():
            write_jsonl(self.path(shard), map(dict, work(self.numbers(shard))))

    def run(self, work: ShardWork, progress: Progress) -> None:
        """Compute the missing shards one after the other, in this process."""
        done = self.items_done()
        progress(done, self.items)
        for shard in self.missing():
            self.compute(shard, work)
            done += len(self.numbers(shard))
            progress(done, self.items)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every line of every shard, in the order of the items.

        Raises:
            ShardError: a shard is missing.
        """
        if missing := self.missing():
            raise ShardError(
                f"{self.folder}: {len(missing)} of {len(self)} shards are not done; run it again"
            )
        for shard in range(len(self)):
            for _, line in read_jsonl(
                self.path(shard), ShardError, remedy="delete the file and run it again"
            ):
                yield line


class _Worker:
    """One process of a cluster: creates the work (and its model) once, then computes shards."""

    def __init__(
        self, shards: Shards, make: Callable[..., ShardWork], arguments: tuple[Any, ...]
    ) -> None:
        self.shards = shards
        self.make = partial(make, *arguments)
        self.work: ShardWork | None = None

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        """The shard, and the message of an error, which Ray would otherwise retry."""
        try:
            self.work = self.work or self.make()
            self.shards.compute(row["shard"], self.work)
            return {"shard": row["shard"], "error": ""}
        except V2LError as error:
            return {"shard": row["shard"], "error": str(error)}


def run_on_ray(
    shards: Shards,
    make: Callable[..., ShardWork],
    arguments: tuple[Any, ...],
    workers: int,
    gpus: float | None,
    progress: Progress,
) -> None:
    """Compute the missing shards on a Ray cluster, through Ray Data.

    A worker writes each shard itself, so the death of one costs only the shard it was computing,
    which Ray gives to another. All nodes must see the folder. The cluster is the one that this
    process belongs to or RAY_ADDRESS names, else one of this machine alone.

    Args:
        make, arguments: each worker calls ``make(*arguments)`` once to create its work.
        workers: number of processes.
        gpus: GPUs per process; None is 1 where the cluster has GPUs.

    Raises:
        ShardError: Ray is not installed, the work failed, or shards are missing at the end.
    """
    try:
        import ray
        from ray.data import ActorPoolStrategy, DataContext
    except ImportError:
        raise ShardError('ray is not installed: pip install "v2l_fast[ray]"') from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    missing = shards.missing()
    done = shards.items_done()
    progress(done, shards.items)
    if not missing:
        return
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    DataContext.get_current().enable_progress_bars = False
    # One block per shard: the unit that Ray schedules, and repeats when a worker dies.
    rows = ray.data.from_items([{"shard": s} for s in missing], override_num_blocks=len(missing))
    results = rows.map(
        cast(Any, _Worker),
        fn_constructor_args=(shards, make, arguments),
        compute=ActorPoolStrategy(size=min(workers, len(missing))),
        num_gpus=gpus or None,
    )
    try:
        for row in results.iter_rows():
            if row["error"]:
                raise ShardError(row["error"])
            done += len(shards.numbers(row["shard"]))
            progress(done, shards.items)
    except ray.exceptions.RayError as error:
        raise ShardError(f"Ray: {str(error).strip().splitlines()[-1]}") from error
    if missing := shards.missing():
        raise ShardError(
            f"{shards.folder}: Ray ended with {len(missing)} shards not done; is the folder one "
            "that all nodes see?"
        )
