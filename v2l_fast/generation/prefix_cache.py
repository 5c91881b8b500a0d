"""Keys and values of earlier prompts and answers, for prompts that begin the same way.

A radix tree for each scope: a node holds the tokens of one segment and their keys and values, and
sequences that begin alike share the nodes of their beginning. An entry is reached by content alone
(the model, the adapter's values, the video's pixels and the token ids), so it is never stale. The
least recently used leaves are evicted; a prefix that is leased is not.

Reuse changes answers by rounding alone, as batching does: keys and values were computed in passes
of other sizes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from v2l_fast.errors import ConfigError
from v2l_fast.vlm.decoder import StaticKVCache

# Shorter matches are computed again: a pass that continues a prefix costs more per token.
MIN_PREFIX = 16
# Limit on nodes, each of which holds some host memory.
MAX_SEGMENTS = 4096


@dataclass(frozen=True)
class CacheKey:
    """What the keys and values of a prompt depend on, apart from the model.

    Attributes:
        tokens: ids of the prompt.
        scope: content of the adapter and of the video in context, in any hashable form.
    """

    tokens: Sequence[int]
    scope: Hashable = None


@dataclass(eq=False)
class _Segment:
    """Tokens [T] after those of ``parent``, with keys and values [L, kv heads, T, head_dim]."""

    tokens: np.ndarray
    keys: Tensor
    values: Tensor
    parent: _Segment | None = None
    children: dict[int, _Segment] = field(default_factory=dict)
    leases: int = 0

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()


@dataclass(frozen=True, eq=False)
class Prefix:
    """Computed tokens at the beginning of a prompt, leased until they are released.

    Attributes:
        length: number of tokens.
    """

    length: int
    _parts: tuple[tuple[Tensor, Tensor], ...]
    _segments: tuple[_Segment, ...]

    def copy_to(self, cache: StaticKVCache, row: int) -> None:
        """Write keys and values to the first slots of a cache row."""
        start = 0
        for keys, values in self._parts:
            stop = start + keys.shape[2]
            cache.keys[:, row, :, start:stop] = keys
            cache.values[:, row, :, start:stop] = values
            start = stop


class PrefixCache:
    """Keys and values of at most ``max_bytes``; safe to use from several threads.

    Args:
        max_bytes: of keys and values, on the device of the model.

    Attributes:
        bytes: of the keys and values held now.
        reused: tokens that were not computed again, so far.

    Raises:
        ConfigError: ``max_bytes`` is negative.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ConfigError(f"max_bytes must be at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self.bytes = self.reused = 0
        self._lock = threading.Lock()
        self._roots: dict[Hashable, dict[int, _Segment]] = {}
        # Least recently used first; a segment always precedes its parent.
        self._order: OrderedDict[_Segment, Hashable] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def acquire(self, key: CacheKey, minimum: int = MIN_PREFIX) -> Prefix | None:
        """Lease the longest computed prefix of a prompt, without its last token.

        Args:
            minimum: shorter prefixes count as none.
        """
        tokens = np.asarray(key.tokens[:-1], dtype=np.int64)
        with self._lock:
            path, length = self._walk(key.scope, tokens)
            if length < max(minimum, 1):
                return None
            parts, start = [], 0
            for segment in path:
                count = min(len(segment.tokens), length - start)
                parts.append((segment.keys[:, :, :count], segment.values[:, :, :count]))
                segment.leases += 1
                start += count
            self._touch(path)
            return Prefix(length, tuple(parts), tuple(path))

    def retain(self, prefix: Prefix) -> Prefix:
        """Lease a leased prefix once more."""
        with self._lock:
            for segment in prefix._segments:
                segment.leases += 1
        return prefix

    def release(self, prefix: Prefix) -> None:
        """End a lease."""
        with self._lock:
            for segment in prefix._segments:
                segment.leases -= 1

    def insert(self, key: CacheKey, keys: Tensor, values: Tensor) -> None:
        """Keep a copy of the keys and values [L, kv heads, T, head_dim] of ``key.tokens`` [T].

        What is known already is not copied. Nothing is kept where leased prefixes leave no room.
        """
        tokens = np.asarray(key.tokens, dtype=np.int64)
        with self._lock:
            path, length = self._walk(key.scope, tokens)
            known = sum(len(segment.tokens) for segment in path)
            self._touch(path)
            rest = tokens[length:]
            size = 2 * keys[:, :, length:].numel() * keys.element_size()
            if not len(rest):
                return
            # Its beginning is not evicted for its end.
            for segment in path:
                segment.leases += 1
            fits = self._evict(self.max_bytes - size, MAX_SEGMENTS - 2)
            for segment in path:
                segment.leases -= 1
            if not fits:
                return
            if known > length:
                path[-1] = self._split(path[-1], len(path[-1].tokens) - (known - length), key.scope)
            parent = path[-1] if path else None
            # A view would keep the whole cache row alive, and change with it.
            leaf = _Segment(
                rest, keys[:, :, length:].clone(), values[:, :, length:].clone(), parent
            )
            self._children(parent, key.scope)[int(rest[0])] = leaf
            self.bytes += leaf.bytes
            self._order[leaf] = key.scope
            self._touch([*path, leaf])

    def clear(self) -> None:
        """Drop everything; leased prefixes stay valid."""
        with self._lock:
            self._roots.clear()
            self._order.clear()
            self.bytes = 0

    # --- with the lock held -----------------------------------------------------------------------

    def _children(self, parent: _Segment | None, scope: Hashable) -> dict[int, _Segment]:
        return self._roots.setdefault(scope, {}) if parent is None else parent.children

    def _walk(self, scope: Hashable, tokens: np.ndarray) -> tuple[list[_Segment], int]:
        """The segments that begin ``tokens``, and how many tokens they match; the last segment may
        match in part."""
        path: list[_Segment] = []
        children, length = self._roots.get(scope, {}), 0
        while length < len(tokens):
            segment = children.get(int(tokens[length]))
            if segment is None:
                break
            count = min(len(segment.tokens), len(tokens) - length)
            different = np.flatnonzero(segment.tokens[:count] != tokens[length : length + count])
            matched = int(different[0]) if len(different) else count
            path.append(segment)
            length += matched
            if matched < len(segment.tokens):
                break
            children = segment.children
        return path, length

    def _touch(self, path: list[_Segment]) -> None:
        for segment in reversed(path):
            self._order.move_to_end(segment)

    def _split(self, segment: _Segment, at: int, scope: Hashable) -> _Segment:
        """Cut a segment in two, and return the first part."""
        first = _Segment(
            segment.tokens[:at],
            segment.keys[:, :, :at].clone(),
            segment.values[:, :, :at].clone(),
            segment.parent,
            {int(segment.tokens[at]): segment},
        )
        self._children(segment.parent, scope)[int(first.tokens[0])] = first
        # Copies, so that evicting one part frees its memory.
        segment.tokens = segment.tokens[at:]
        segment.keys = segment.keys[:, :, at:].clone()
        segment.values = segment.values[:, :, at:].clone()
        segment.parent = first
        self._order[first] = scope
        return first

    def _evict(self, max_bytes: int, max_segments: int) -> bool:
        """Drop leaves until the limits hold; False if leased ones prevent it."""
        if max_bytes < 0:
            return False
        while self.bytes > max_bytes or len(self._order) > max_segments:
            oldest = next((s for s in self._order if not s.leases and not s.children), None)
            if oldest is None:
                return False
            scope = self._order.pop(oldest)
            siblings = self._children(oldest.parent, scope)
            del siblings[int(oldest.tokens[0])]
            if oldest.parent is None and not siblings:
                del self._roots[scope]
            self.bytes -= oldest.bytes
        return True
