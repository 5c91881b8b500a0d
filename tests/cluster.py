"""A Ray cluster of this machine, however long its processes take to start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.waiting import LIMIT


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Two CPUs, no dashboard."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_gcs_server_port_wait_time_s", str(int(LIMIT)))
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            _system_config={
                "worker_register_timeout_seconds": int(LIMIT),
                # By default Ray's workers yield to everything else, and never start beside it.
                "worker_niceness": 0,
                # How long a process may be silent before it counts as dead.
                "health_check_timeout_ms": int(LIMIT * 1000),
            },
        )
        try:
            yield
        finally:
            ray.shutdown()
