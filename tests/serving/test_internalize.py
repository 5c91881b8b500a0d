"""The interleaver ends every task when it closes, or a thread would wait forever."""

from __future__ import annotations

import threading

from tests.waiting import LIMIT, wait_until
from v2l_fast.errors import V2LError
from v2l_fast.serving.internalize import TaskInterleaver


def test_closing_while_a_unit_runs_ends_its_task():
    interleaver, reason, ended = TaskInterleaver(lambda: None), V2LError("closing"), []

    def units():
        yield "decode", 1, 1
        yield "encode frames", 0, 2
        interleaver.close(reason)
        yield "encode frames", 1, 2

    def wait() -> None:
        try:
            interleaver.run(units())
        except V2LError as error:
            ended.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    wait_until(interleaver.run_unit)
    thread.join(LIMIT)
    assert ended == [reason] and not interleaver.run_unit()
