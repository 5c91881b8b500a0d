"""Shards computed by the workers of a Ray cluster, through Ray Data.

Responsible for spreading shards over workers. A worker runs the same function over the same items
as a single machine does, and writes each shard itself, whole or not at all: a worker that dies
costs the shard it had begun, which Ray gives to another. The folder must be one that all nodes see.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from v2l_fast.data.shards import Progress, ShardError, Shards, ShardWork
from v2l_fast.errors import V2LError


class _Worker:
    """One process: makes the work (and with it the model) once, then does shards."""

    def __init__(
        self, shards: Shards, make: Callable[..., ShardWork], arguments: tuple[Any, ...]
    ) -> None:
        self.shards = shards
        self.make = partial(make, *arguments)
        self.work: ShardWork | None = None

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        """The shard, and an error's message: Ray would try again what cannot succeed."""
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
    """Do the missing shards on the cluster this process belongs to, or that RAY_ADDRESS names;
    on a cluster of this machine alone when there is none.

    Args:
        make, arguments: what a worker calls once to get its work; sent to it.
        workers: processes.
        gpus: of each; None is 1 where the cluster has GPUs.

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
    # A block for each shard: the unit that is scheduled, and done again when its worker dies.
    rows = ray.data.from_items([{"shard": s} for s in missing], override_num_blocks=len(missing))
    results = rows.map(
        _Worker,
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
