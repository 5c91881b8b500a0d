"""A running batch over a static cache: answers join, take a step together, and leave.

Used by a batch asked at once and by the serving engine alike, so that both give the same answers.
Rows of the cache in use are always the first ones: what leaves is replaced by the last row, and a
step computes nothing for empty rows. What a row's text is, who reads it and when it is cancelled is
left to the caller.

A failure belongs to the row that causes it. A pass changes nothing until its tokens are known, so
one that fails is repeated in halves, down to the row that fails alone; a row whose logits are NaN
or infinite fails without harm to the others. A failed row ends with an error, the others go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from v2l_fast.errors import AdapterError, V2LError
from v2l_fast.generation.sampling import SamplingParams, SamplingTensors, on_device, sample
from v2l_fast.hypernet.adapted_linear import AdapterBank
from v2l_fast.vlm.decoder import Decoder

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Row:
    """One answer in the making.

    Attributes:
        sampling: how its tokens are chosen, and how many at most.
        slot: its adapter's slot, -1 for none.
        tokens: its token ids so far, without the stop token.
        finished: why it has ended: "stop", "length", "error" or the caller's own reason; None while
            it runs.
        error: what ended it with "error".
        length: tokens it has in the cache.
    """

    sampling: SamplingParams
    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    finished: str | None = None
    error: Exception | None = None
    length: int = 0

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self.finished, self.error = "error", error


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

    def __init__(self, decoder: Decoder, size: int, context: int, stop_ids: Sequence[int]) -> None:
        self.decoder = decoder
        self.size = size
        self.stop_ids = frozenset(stop_ids)
        self.cache = decoder.new_cache(size, context)
        self.rows: list[Row] = []
        # Of every row: the token chosen last, its position, the adapter's slot, the prompt's length
        # and how its tokens are drawn.
        self._integers = torch.zeros(6, size, dtype=torch.long, device=decoder.device)
        self._floats = torch.zeros(2, size, dtype=torch.float64, device=decoder.device)
        self._tokens, self._positions, self._slots, self._prompts = self._integers[:4]
        self._sampling = SamplingTensors(*self._floats, *self._integers[4:])

    @property
    def free(self) -> int:
        """Rows that can join."""
        return self.size - len(self.rows)

    def join(
        self, rows: Sequence[Row], prompts: Sequence[Tensor], adapters: AdapterBank | None = None
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
        columns = [[row.length for row in rows], [row.slot for row in rows]]
        lengths, slots = on_device(columns, torch.long, self.decoder.device)
        self._positions[part], self._prompts[part], self._slots[part] = lengths, lengths, slots
        if any(row.sampling.temperature > 0 for row in rows):
            self._sampling.write(part, [row.sampling for row in rows], self._vocabulary)
        self.rows.extend(rows)

        def prefill(part: slice) -> Tensor:
            own = slice(part.start - first, part.stop - first)
            embeddings = pad_sequence(list(prompts[own]), batch_first=True)
            places = torch.arange(part.start, part.stop, device=self.decoder.device)
            return self._prefill(embeddings, places, lengths[own] - 1, adapters)

        self._advance(part, prefill, 0)

    def step(self, adapters: AdapterBank | None = None) -> None:
        """One more token for every row; see :meth:`join`."""
        limit = max(row.length for row in self.rows) + 1

        def decode(part: slice) -> Tensor:
            if part == whole:
                return self._decode(part.stop, limit, adapters)
            return self._decode_rows(part, limit, adapters)

        whole = slice(0, len(self.rows))
        self._advance(whole, decode, 1)

    def drop_finished(self) -> int:
        """Take finished rows out; how many are left."""
        for place in reversed(range(len(self.rows))):
            row = self.rows[place]
            if row.finished is not None:
                if row.error is not None:
                    # Attention reads what it masks, with weight 0, and 0 * NaN is NaN.
                    self.cache.keys[:, place].zero_()
                    self.cache.values[:, place].zero_()
                last = self.rows.pop()
                if place < len(self.rows):
                    self.rows[place] = last
                    self._move(len(self.rows), place, last.length)
        return len(self.rows)

    def clear(self) -> None:
        """Take all rows out, whatever state an error has left them in."""
        self.rows.clear()
        self.cache.keys.zero_()
        self.cache.values.zero_()

    # --- what a subclass may run in another way -----------------------------------------------

    def _prefill(
        self, embeddings: Tensor, rows: Tensor, last: Tensor, adapters: AdapterBank | None
    ) -> Tensor:
        """Prompts [E, T, D] into ``rows`` [E] of the cache -> logits [E, V] of tokens ``last``."""
        count, longest = embeddings.shape[:2]
        span = self.decoder.prefill_metadata(count, longest)
        slots = self._in_use(adapters, rows)
        hidden = self.decoder.forward(embeddings, span, replace(self.cache, rows=rows), slots)
        return self.decoder.logits(hidden[torch.arange(count, device=hidden.device), last])

    def _decode(self, count: int, limit: int, adapters: AdapterBank | None) -> Tensor:
        """Last tokens of ``count`` rows, at positions below ``limit`` -> logits [count, V]."""
        return self._decode_rows(slice(0, count), limit, adapters)

    def _decode_rows(self, part: slice, limit: int, adapters: AdapterBank | None) -> Tensor:
        """:meth:`_decode` of some rows."""
        cache = self.cache
        if part.start:
            rows = torch.arange(part.start, part.stop, device=self.decoder.device)
            cache = replace(cache, rows=rows)
        span = self.decoder.decode_metadata(self._positions[part], limit)
        embeddings = self.decoder.embed(self._tokens[part, None])
        slots = self._in_use(adapters, part)
        return self.decoder.logits(self.decoder.forward(embeddings, span, cache, slots)[:, 0])

    def _in_use(self, adapters: AdapterBank | None, part: slice | Tensor) -> AdapterBank | None:
        return None if adapters is None else replace(adapters, index=self._slots[part])

    # --- bookkeeping ------------------------------------------------------------------------------

    @property
    def _vocabulary(self) -> int:
        return self.decoder.lm_head.weight.shape[0]

    def _advance(self, part: slice, compute: Callable[[slice], Tensor], cached: int) -> None:
        """Choose a token for the rows of ``part``, whose logits ``compute`` gives.

        Args:
            cached: tokens of each row that the pass adds to those it had in the cache.
        """
        try:
            chosen = self._chosen(part, compute(part), cached)
            # The one wait for the device; what has failed there is raised here.
            tokens = chosen.tolist()
        except Exception as error:
            if part.stop - part.start == 1:
                self.rows[part.start].fail(error)
                return
            log.warning("a pass over %d answers failed; repeating it in halves",
                        part.stop - part.start, exc_info=error)  # fmt: skip
            middle = (part.start + part.stop) // 2
            for half in (slice(part.start, middle), slice(middle, part.stop)):
                self._advance(half, compute, cached)
            return
        self._tokens[part] = chosen.clamp_min(0)
        self._positions[part] += cached
        for row, token in zip(self.rows[part], tokens, strict=True):
            row.length += cached
            if token < 0:
                row.fail(_not_finite(row))
                continue
            if token in self.stop_ids:
                row.finished = "stop"
                continue
            row.tokens.append(token)
            if len(row.tokens) == row.sampling.max_new_tokens:
                row.finished = "length"

    def _chosen(self, part: slice, logits: Tensor, cached: int) -> Tensor:
        """Logits [E, V] to token ids [E] on their device; -1 where they are NaN or infinite."""
        chosen = logits.argmax(-1, keepdim=True)
        # NaN is the largest.
        sound = logits.gather(1, chosen)[:, 0].isfinite()
        chosen = chosen[:, 0]
        sampling = [row.sampling for row in self.rows[part]]
        drawn = [place for place, one in enumerate(sampling) if one.temperature > 0]
        if drawn:
            places: slice | Tensor = slice(None)
            if len(drawn) < len(sampling):
                places = on_device(drawn, torch.long, logits.device)
            index = self._positions[part] - self._prompts[part] + cached
            chosen[places] = sample(
                logits[places],
                self._sampling.rows(part).rows(places),
                index[places],
                by_mass=any(sampling[place].top_p < 1 for place in drawn),
                by_count=any(sampling[place].top_k for place in drawn),
            )
        return torch.where(sound, chosen, -1)

    def _move(self, source: int, target: int, length: int) -> None:
        for side in (self.cache.keys, self.cache.values):
            side[:, target, :, :length] = side[:, source, :, :length]
        for vectors in (self._integers, self._floats):
            vectors[:, target] = vectors[:, source]


def _not_finite(row: Row) -> V2LError:
    if row.slot >= 0:
        return AdapterError(
            "the logits are NaN or infinite with this adapter: its factors are too large for this "
            "model; internalize the video again"
        )
    return V2LError(
        "the logits are NaN or infinite: check the base model's weights and dtype; float16 "
        "overflows, use bfloat16 or float32"
    )
