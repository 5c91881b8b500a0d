"""Work beside answering ends whenever it is closed, or its thread would wait for ever."""

from __future__ import annotations

import threading

from tests.waiting import LIMIT, wait_until
from v2l_fast.errors import V2LError
from v2l_fast.serving.background import Background


def test_closing_while_a_unit_runs_ends_its_task():
    background, reason, ended = Background(lambda: None), V2LError("closing"), []

    def steps():
        yield "decode", 1, 1
        yield "encode frames", 0, 2
        background.close(reason)
        yield "encode frames", 1, 2

    def wait() -> None:
        try:
            background.run(steps())
        except V2LError as error:
            ended.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    wait_until(background.step)
    thread.join(LIMIT)
    assert ended == [reason] and not background.step()
