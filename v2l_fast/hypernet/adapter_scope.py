"""Which value is in force where a model runs: block, thread, task, generator or recomputation.

A :class:`Scope` holds a value from the start to the end of a ``with`` block. It is in force:

- in the thread of the block, in its asyncio tasks, in threads started inside the block and in
  tasks submitted to a ``ThreadPoolExecutor`` inside it, as with ``thread_inherit_context`` of
  Python 3.14. For this, ``Thread.start`` and ``ThreadPoolExecutor.submit`` are wrapped once;
- where activation checkpointing repeats a forward pass that ran inside the block, whenever and in
  whatever thread that is;
- in a generator that opened the block, but not in its caller between two of its items.

Where the value is not known, :meth:`Scope.current` raises instead of taking a guess. Nothing here
knows what the values are.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import thread as executors
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType, MappingProxyType
from typing import Any

import torch
from torch.utils import checkpoint

from v2l_fast.errors import AdapterError


class _Unresolved:
    """In place of a value that a compiled graph cannot know; the call leaves the graph."""


UNRESOLVED = _Unresolved()
# Values for compiled graphs: Dynamo guards attributes of a threading.local, not a ContextVar.
LOCAL = threading.local()


@dataclass(frozen=True, eq=False)
class _Block:
    """An open block.

    Attributes:
        value: the value in force.
        owner: frame that opened it, when it is a generator's; the block then ends with the frame's
            turn, unless ``lent``.
        lent: a context manager or fixture opened the block for its caller.
        outer: the block in force where this one was opened, of a caller of its own.
        thread: the thread that opened it.
        opener: the object whose :meth:`Scope.leave` ends the block.
    """

    value: Any
    owner: FrameType | None = None
    lent: bool = False
    outer: _Block | None = None
    thread: threading.Thread = field(default_factory=threading.current_thread)
    opener: object = None


# Open blocks of every scope, in the order of their opening.
_BLOCKS: ContextVar[Mapping[Scope, tuple[_Block, ...]]] = ContextVar(
    "adapters in force", default=MappingProxyType({})
)
_STARTED_BY: weakref.WeakKeyDictionary[threading.Thread, weakref.ref[threading.Thread]] = (
    weakref.WeakKeyDictionary()
)
_NAMES = itertools.count()


class Scope:
    """A value that is in force from :meth:`enter` to :meth:`leave`.

    A copy (``copy.deepcopy``, pickle) is another scope, in which nothing is in force.
    """

    def __init__(self) -> None:
        _wrap_threads()
        self.name = f"scope_{next(_NAMES)}"
        self.used = False
        # Threads with open blocks, and how many each has.
        self.open: Counter[threading.Thread] = Counter()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return Scope, ()

    def enter(self, opener: object, value: Any, frame: FrameType) -> None:
        """``value`` is in force from here on.

        Args:
            opener: pass the same object to :meth:`leave`.
            frame: of the ``with`` statement.
        """
        block = self._block(value, frame, opener)
        self.used = True
        self._count(block.thread, 1)
        _set(self, (*_blocks(self), block))

    def leave(self, opener: object) -> None:
        """End the latest block of ``opener``, whether or not others were opened after it."""
        block = next((b for b in reversed(_blocks(self)) if b.opener is opener), None)
        if block is not None:
            self._count(block.thread, -1)
            _set(self, tuple(b for b in _blocks(self) if b is not block))

    def current(self) -> Any:
        """The value in force here, or None.

        Raises:
            AdapterError: it is not known which one is.
        """
        repeating = False
        regions: list[Any] = []
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward or (_blocks(self) and not torch.is_inference_mode_enabled()):
            repeating, regions = _checkpoints()
        if repeating:
            value = _recorded(regions.pop(), self)
        else:
            value = self._by_block()
            if in_backward and self.used and not _blocks(self):
                raise AdapterError(
                    "a backward pass runs the model again, and it is not known with which "
                    "adapters: call backward() inside the block of use() in which the forward "
                    "pass ran, or in use([None, ...]) if it ran without adapters"
                )
        for region in regions:
            _record(region, self, value)
        return value

    def local(self) -> Any:
        """As :meth:`current` inside a compiled graph; UNRESOLVED when that must be left."""
        return getattr(LOCAL, self.name, None)

    def _by_block(self) -> Any:
        blocks = _blocks(self)
        if not blocks:
            self._check_thread()
            return None
        block = _in_force(blocks, sys._getframe(1))
        if block is None:
            raise AdapterError(
                "a suspended generator holds a use() block open around the code that runs the "
                "model now: let it end first, or enter use() where the model runs "
                "(use([None, ...]) for no adapters)"
            )
        return block.value

    def _check_thread(self) -> None:
        if not self.open:
            return
        thread = threading.current_thread()
        known = thread is threading.main_thread() or _is_executors(thread)
        if known or self.open[thread]:
            return
        starter = _STARTED_BY[thread]() if thread in _STARTED_BY else thread
        if starter is thread or (starter is not None and self.open[starter]):
            raise AdapterError(
                "the model runs in a thread that was started before use() was entered in another "
                "one: enter use() in this thread too (use([None, ...]) for no adapters)"
            )

    def _block(self, value: Any, frame: FrameType, opener: object) -> _Block:
        while _module(frame) == "contextlib" and frame.f_back is not None:
            frame = frame.f_back
        lent = _flags(frame) & _GENERATES != 0 and _is_lent(frame)
        outer = _on_stack(_blocks(self), frame)
        return _Block(value, frame, lent, outer, opener=opener)

    def _count(self, thread: threading.Thread, change: int) -> None:
        with self._lock:
            self.open[thread] += change
            self.open = +self.open


def _blocks(scope: Scope) -> tuple[_Block, ...]:
    return _BLOCKS.get().get(scope, ())


def _set(scope: Scope, blocks: tuple[_Block, ...]) -> None:
    others = {s: b for s, b in _BLOCKS.get().items() if s is not scope}
    _BLOCKS.set(MappingProxyType({**others, scope: blocks} if blocks else others))
    _set_local(scope, blocks)


def _set_local(scope: Scope, blocks: tuple[_Block, ...]) -> None:
    if not blocks:
        # Where another task of this thread may hold a block, graphs are left.
        if scope.open[threading.current_thread()]:
            setattr(LOCAL, scope.name, UNRESOLVED)
        elif hasattr(LOCAL, scope.name):
            delattr(LOCAL, scope.name)
        return
    simple = not any(_flags(block.owner) & (_GENERATES | inspect.CO_COROUTINE) for block in blocks)
    setattr(LOCAL, scope.name, blocks[-1].value if simple else UNRESOLVED)


_GENERATES = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def _flags(frame: FrameType | None) -> int:
    return 0 if frame is None else frame.f_code.co_flags


def _module(frame: FrameType | None) -> str:
    return "" if frame is None else frame.f_globals.get("__name__", "")


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _on_stack(blocks: tuple[_Block, ...], frame: FrameType | None) -> _Block | None:
    """The latest block of the innermost frame that has one."""
    owners = {block.owner: block for block in blocks if block.owner is not None}
    return next((owners[f] for f in _frames(frame) if f in owners), None) if owners else None


def _in_force(blocks: tuple[_Block, ...], frame: FrameType) -> _Block | None:
    """Which of the open blocks surrounds a frame; None when a generator's might or might not."""
    latest = blocks[-1]
    if not any(_flags(block.owner) & _GENERATES for block in blocks):
        return latest
    nearest = _on_stack(blocks, frame)
    if nearest is None:
        return None if _flags(latest.owner) & _GENERATES and not latest.lent else latest
    inner: _Block | None = latest
    while inner is not None and inner is not nearest:
        inner = inner.outer
    # Opened inside of the nearest one, by a context manager; else by another generator.
    return latest if inner is nearest else nearest


_LENDERS = ("contextlib", "_pytest", "pytest_asyncio", "anyio")


def _is_lent(frame: FrameType) -> bool:
    """Whether a generator is the body of a context manager or a pytest fixture."""
    return _module(frame.f_back).partition(".")[0] in _LENDERS


# --- threads -----------------------------------------------------------------------------------


def _snapshot() -> dict[Scope, _Block]:
    """The values in force here, as blocks for another thread."""
    blocks = {s: _in_force(b, sys._getframe(1)) for s, b in _BLOCKS.get().items()}
    return {s: _Block(b.value) for s, b in blocks.items() if b is not None}


def _run_within(inherited: dict[Scope, _Block], function: Callable, *args, **kwargs) -> Any:
    """Run a function with another thread's snapshot in force."""
    token = _BLOCKS.set(MappingProxyType({s: (b,) for s, b in inherited.items()}))
    for scope, block in inherited.items():
        _set_local(scope, (block,))
    try:
        return function(*args, **kwargs)
    finally:
        _BLOCKS.reset(token)
        for scope in inherited:
            _set_local(scope, _blocks(scope))


def _is_executors(thread: threading.Thread) -> bool:
    """Whether a thread serves a ThreadPoolExecutor, whose tasks bring their own snapshot."""
    return getattr(thread, "_target", None) is executors._worker


@functools.cache
def _wrap_threads() -> None:
    start: Callable = threading.Thread.start
    submit: Callable = ThreadPoolExecutor.submit

    @functools.wraps(start)
    def starting(self: threading.Thread) -> None:
        if not _is_executors(self):
            _STARTED_BY[self] = weakref.ref(threading.current_thread())
            if inherited := _snapshot():
                vars(self)["run"] = functools.partial(_run_within, inherited, self.run)
        start(self)

    @functools.wraps(submit)
    def submitting(self: ThreadPoolExecutor, fn: Callable, /, *args, **kwargs):
        if inherited := _snapshot():
            return submit(self, _run_within, inherited, fn, *args, **kwargs)
        return submit(self, fn, *args, **kwargs)

    threading.Thread.start = starting  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = submitting  # type: ignore[method-assign, assignment]


# --- activation checkpointing ------------------------------------------------------------------


def _non_reentrant(names: Mapping[str, Any]) -> Any:
    """The region of a frame that waits for the forward pass with use_reentrant=False."""
    return names["gen"].gi_frame.f_locals.get("new_frame") if names.get("gen") else None


# Each checkpointed region is an object of PyTorch's that lives as long as its graph; both the
# forward pass and its repetition have it in a frame of torch.utils.checkpoint.
_FORWARD = {
    "forward": lambda names: names.get("ctx"),
    "checkpoint": _non_reentrant,
    "_checkpoint_impl": _non_reentrant,  # from torch 2.15 on
}
_REPEATED = {
    "backward": lambda names: names.get("ctx"),
    "unpack_hook": lambda names: names.get("frame"),
}
_FIELD = "v2l_adapters_in_force"


def _checkpoints() -> tuple[bool, list[Any]]:
    """The checkpointed regions around here, inner ones first.

    Returns:
        Whether the outermost of them is being repeated, and the regions up to that one.
    """
    regions: list[Any] = []
    for frame in _frames(sys._getframe(1)):
        if frame.f_code.co_filename != checkpoint.__file__:
            continue
        name = frame.f_code.co_name
        if name in _REPEATED and (region := _REPEATED[name](frame.f_locals)) is not None:
            return True, [*regions, region]
        if name in _FORWARD and (region := _FORWARD[name](frame.f_locals)) is not None:
            regions.append(region)
    return False, regions


def _record(region: Any, scope: Scope, value: Any) -> None:
    if value is not None or hasattr(region, _FIELD):
        setattr(region, _FIELD, {**getattr(region, _FIELD, {}), scope: value})


def _recorded(region: Any, scope: Scope) -> Any:
    return getattr(region, _FIELD, {}).get(scope)
