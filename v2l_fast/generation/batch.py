"""A running batch over a static cache: answers join, take a step together, and leave.

Used by a batch asked at once and by the serving engine alike, so that both give the same answers.
Rows of the cache in use are always the first ones: what leaves is replaced by the last row, and a
step computes nothing for empty rows. What a row's text is, who reads it and when it is cancelled is
left to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from v2l_fast.adapted import AdapterSlots
from v2l_fast.backbones.decoder import Decoder
from v2l_fast.generation.sampling import Drawer, Sampling, choose


@dataclass(eq=False)
class Row:
    """One answer in the making.

    Attributes:
        sampling: how its tokens are chosen, and how many at most.
        slot: its adapter's slot, -1 for none.
        tokens: its token ids so far, without the stop token.
        finished: why it has ended: "stop", "length" or the caller's own reason; None while it runs.
        length: tokens it has in the cache.
    """

    sampling: Sampling
    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    finished: str | None = None
    length: int = 0

    def __post_init__(self) -> None:
        self.drawer = Drawer(self.sampling) if self.sampling.temperature > 0 else None


class Batch:
    """Up to ``size`` answers that are made together.

    Args:
        decoder: what makes them.
        size: rows of the cache.
        context: tokens a row can hold; the caller sees to it that prompt and answer fit.
        stop_ids: token ids that end an answer.

    Attributes:
        rows: the answers in the making, in the order of the cache's rows.
    """

    def __init__(
        self, decoder: Decoder, size: int, context: int, stop_ids: Sequence[int]
    ) -> None:
        self.decoder = decoder
        self.size = size
        self.stop_ids = frozenset(stop_ids)
        self.cache = decoder.new_cache(size, context)
        self.rows: list[Row] = []
        # Of every row: the token chosen last, its position, and the adapter's slot.
        self._tokens, self._positions, self._slots = (
            torch.zeros(size, dtype=torch.long, device=decoder.device) for _ in range(3)
        )

    @property
    def free(self) -> int:
        """Rows that can join."""
        return self.size - len(self.rows)

    def join(
        self, rows: Sequence[Row], prompts: Sequence[Tensor], adapters: AdapterSlots | None = None
    ) -> None:
        """Prefill new rows together and choose their first tokens.

        Args:
            rows: at most :attr:`free`.
            prompts: of each, [T, D] embedded; lengths may differ.
            adapters: what the rows' slots are of; its own ``index`` is not looked at.
        """
        first = len(self.rows)
        part = slice(first, first + len(rows))
        for row, prompt in zip(rows, prompts, strict=True):
            row.length = len(prompt)
        places = [[row.length for row in rows], [row.slot for row in rows]]
        lengths, slots = torch.tensor(places, device=self.decoder.device)
        self._positions[part], self._slots[part] = lengths, slots
        self.rows.extend(rows)
        embeddings = pad_sequence(list(prompts), batch_first=True)
        places = torch.arange(first, len(self.rows), device=self.decoder.device)
        self._choose(part, self._prefill(embeddings, places, lengths - 1, adapters))

    def step(self, adapters: AdapterSlots | None = None) -> None:
        """One more token for every row; see :meth:`join`."""
        limit = max(row.length for row in self.rows) + 1
        logits = self._decode(len(self.rows), limit, adapters)
        part = slice(0, len(self.rows))
        self._positions[part] += 1
        for row in self.rows:
            row.length += 1
        self._choose(part, logits)

    def drop_finished(self) -> int:
        """Take finished rows out; how many are left."""
        for place in reversed(range(len(self.rows))):
            if self.rows[place].finished is not None:
                last = self.rows.pop()
                if place < len(self.rows):
                    self.rows[place] = last
                    self._move(len(self.rows), place, last.length)
        return len(self.rows)

    # --- what a subclass may run in another way -----------------------------------------------

    def _prefill(
        self, embeddings: Tensor, rows: Tensor, last: Tensor, adapters: AdapterSlots | None
    ) -> Tensor:
        """Prompts [E, T, D] into ``rows`` [E] of the cache -> logits [E, V] of tokens ``last``."""
        count, longest = embeddings.shape[:2]
        span = self.decoder.prefill_span(count, longest)
        slots = self._in_use(adapters, rows)
        hidden = self.decoder.forward(embeddings, span, replace(self.cache, rows=rows), slots)
        return self.decoder.logits(hidden[torch.arange(count, device=hidden.device), last])

    def _decode(self, count: int, limit: int, adapters: AdapterSlots | None) -> Tensor:
        """Last tokens of ``count`` rows, at positions below ``limit`` -> logits [count, V]."""
        part = slice(0, count)
        span = self.decoder.step_span(self._positions[part], limit)
        embeddings = self.decoder.embed(self._tokens[part, None])
        slots = self._in_use(adapters, part)
        return self.decoder.logits(
            self.decoder.forward(embeddings, span, self.cache, slots)[:, 0]
        )

    def _in_use(
        self, adapters: AdapterSlots | None, part: slice | Tensor
    ) -> AdapterSlots | None:
        return None if adapters is None else replace(adapters, index=self._slots[part])

    # --- bookkeeping ------------------------------------------------------------------------------

    def _choose(self, part: slice, logits: Tensor) -> None:
        rows = self.rows[part]
        chosen = choose(logits, [row.drawer for row in rows])
        self._tokens[part] = chosen
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if token in self.stop_ids:
                row.finished = "stop"
                continue
            row.tokens.append(token)
            if len(row.tokens) == row.sampling.max_new_tokens:
                row.finished = "length"

    def _move(self, source: int, target: int, length: int) -> None:
        for side in (self.cache.keys, self.cache.values):
            side[:, target, :, :length] = side[:, source, :, :length]
        for vector in (self._tokens, self._positions, self._slots):
            vector[target] = vector[source]
