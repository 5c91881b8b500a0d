"""Continuous batching over a static KV cache: requests are prefilled, decoded together and retired.

Used for one batch (:func:`~v2l_fast.generation.generate`) and by the serving engine alike, so that
both give the same answers, up to rounding. The requests of a runner always use the first rows of
its cache: the last row moves into the place of one that is retired, and a decode step computes
nothing for free rows. Text, readers and cancellation are the caller's.

An error belongs to the request that causes it. A pass changes no request until its tokens are
known, so a pass that fails is repeated in halves, down to the request that fails alone. A request
whose logits are NaN or infinite fails without affecting the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from v2l_fast.errors import AdapterError, V2LError
from v2l_fast.generation.prefix_cache import CacheKey, Prefix, PrefixCache
from v2l_fast.generation.sampling import (
    SamplingParams,
    SamplingTensors,
    TokenConstraint,
    TokenLogprobs,
    constrained,
    on_device,
    sample,
    token_logprobs,
)
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.vlm.decoder import Decoder, StaticKVCache

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Request:
    """One answer while it is generated.

    Attributes:
        sampling: how tokens are chosen, and how many at most.
        slot: index of its adapter in the bank, -1 for the plain model.
        constraint: limits each token; None allows all.
        cache_key: of its prompt, to reuse and keep keys and values; None does neither.
        prefix: computed tokens before those of its prompt's embeddings, leased by the caller.
        reused: prompt tokens whose keys and values were not computed again.
        tokens: token ids so far, without the stop token.
        logprobs: of ``tokens``, if the sampling parameters ask for them.
        finish_reason: "stop", "length", "error" or the caller's own; None while it runs.
        error: the exception behind "error".
        cached: its tokens in the KV cache.
    """

    sampling: SamplingParams
    slot: int = -1
    constraint: TokenConstraint | None = None
    cache_key: CacheKey | None = None
    prefix: Prefix | None = None
    reused: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    cached: int = 0

    def fail(self, error: Exception) -> None:
        """End the request with an error."""
        self.finish_reason, self.error = "error", error


class ModelRunner:
    """Prefill and decode passes for up to ``size`` requests at a time.

    Args:
        decoder: the frozen text decoder.
        size: rows of the KV cache.
        context: tokens of one row; the caller checks that prompt and answer fit.
        stop_ids: token ids that end an answer.
        cache: of that size; allocated by default.
        prefix_cache: keys and values of earlier prompts and answers, read and extended for the
            requests that have a ``cache_key``.

    Attributes:
        requests: the running requests, in the order of the cache's rows.
    """

    def __init__(
        self,
        decoder: Decoder,
        size: int,
        context: int,
        stop_ids: Sequence[int],
        cache: StaticKVCache | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.decoder = decoder
        self.size = size
        self.stop_ids = frozenset(stop_ids)
        self.cache = cache or decoder.new_cache(size, context)
        self.prefix_cache = prefix_cache
        self.requests: list[Request] = []
        # Of every row: the last token, its position, the adapter's slot, the prompt's length and
        # the sampling parameters.
        self._integers = torch.zeros(6, size, dtype=torch.long, device=decoder.device)
        self._floats = torch.zeros(2, size, dtype=torch.float64, device=decoder.device)
        self._tokens, self._positions, self._slots, self._prompts = self._integers[:4]
        self._sampling = SamplingTensors(*self._floats, *self._integers[4:])

    @property
    def free(self) -> int:
        """Rows without a request."""
        return self.size - len(self.requests)

    def prefill(
        self,
        requests: Sequence[Request],
        prompts: Sequence[Tensor],
        adapters: AdapterBank | None = None,
    ) -> None:
        """Compute the prompts of new requests together and choose their first tokens.

        Requests with the same prompt (the same object) and slot share one computation.

        Args:
            requests: at most :attr:`free`.
            prompts: embedded, [T, D] each; lengths may differ. Of a request with a ``prefix``, the
                tokens after it.
            adapters: the bank that the requests' slots refer to; its ``index`` is ignored.
        """
        first = len(self.requests)
        part = slice(first, first + len(requests))
        # Each request's source: the first one of its prompt and slot.
        known: dict[tuple[int, int], int] = {}
        keys = [(id(p), r.slot) for p, r in zip(prompts, requests, strict=True)]
        sources = [known.setdefault(key, i) for i, key in enumerate(keys)]
        acquired = {i: self._acquire(requests[i]) for i in known.values()}
        prefixes = {i: requests[i].prefix or acquired[i] for i in known.values()}
        lengths_before = {i: 0 if p is None else p.length for i, p in prefixes.items()}
        starts = [lengths_before[source] for source in sources]
        rest = list(prompts)
        for i, request in enumerate(requests):
            if acquired[sources[i]] is not None:
                rest[i] = prompts[i][starts[i] :]
            request.reused, request.cached = starts[i], starts[i] + len(rest[i])
        columns = [
            [request.cached for request in requests],
            [request.slot for request in requests],
            starts,
        ]
        lengths, slots, offsets = on_device(columns, torch.long, self.decoder.device)
        self._positions[part], self._prompts[part], self._slots[part] = lengths, lengths, slots
        if any(request.sampling.temperature > 0 for request in requests):
            self._sampling.write(part, [r.sampling for r in requests], self._vocabulary)
        self.requests.extend(requests)

        def compute(chosen: list[int]) -> Tensor:
            """Logits of requests that all have, or all lack, a computed prefix."""
            embeddings = pad_sequence([rest[i] for i in chosen], batch_first=True)
            index = on_device(chosen, torch.long, self.decoder.device)
            last = lengths[index] - offsets[index] - 1
            if not starts[chosen[0]]:
                return self.run_prefill(embeddings, first + index, last, adapters)
            for i in chosen:
                prefix = prefixes[sources[i]]
                if prefix is not None:
                    prefix.copy_to(self.cache, first + i)
            limit = max(starts[i] for i in chosen) + embeddings.shape[1]
            return self.run_continuation(
                embeddings, first + index, offsets[index], last, limit, adapters
            )

        def run(part: slice) -> Tensor:
            own = range(part.start - first, part.stop - first)
            leader: dict[int, int] = {}
            for i in own:
                leader.setdefault(sources[i], i)
            chosen = list(leader.values())
            groups = [[i for i in chosen if bool(starts[i]) is kind] for kind in (False, True)]
            logits = torch.cat([compute(group) for group in groups if group])
            order = [i for group in groups for i in group]
            if order != list(own):
                pairs = [(first + i, first + leader[sources[i]]) for i in own]
                self._copy_rows([pair for pair in pairs if pair[0] != pair[1]])
                index = [order.index(leader[sources[i]]) for i in own]
                logits = logits[on_device(index, torch.long, self.decoder.device)]
            return logits

        try:
            self._advance(part, run, 0)
        finally:
            for prefix in acquired.values():
                if prefix is not None and self.prefix_cache is not None:
                    self.prefix_cache.release(prefix)

    def _acquire(self, request: Request) -> Prefix | None:
        if self.prefix_cache is None or request.cache_key is None or request.prefix is not None:
            return None
        return self.prefix_cache.acquire(self.scoped(request.cache_key))

    def scoped(self, key: CacheKey) -> CacheKey:
        """A key of the prefix cache, which may serve several models."""
        return CacheKey(key.tokens, (self.decoder, key.scope))

    def decode(self, adapters: AdapterBank | None = None) -> None:
        """One more token for every request; ``adapters`` as in :meth:`prefill`."""
        limit = max(request.cached for request in self.requests) + 1
        whole = slice(0, len(self.requests))

        def run(part: slice) -> Tensor:
            if part == whole:
                return self.run_decode(part.stop, limit, adapters)
            return self._decode_rows(part, limit, adapters)

        self._advance(whole, run, 1)

    def retire_finished(self) -> int:
        """Free the rows of finished requests; returns how many requests are left."""
        for row in reversed(range(len(self.requests))):
            request = self.requests[row]
            if request.finish_reason is not None:
                if request.error is not None:
                    # Attention reads masked slots with weight 0, and 0 * NaN is NaN.
                    self.cache.keys[:, row].zero_()
                    self.cache.values[:, row].zero_()
                else:
                    self._keep(request, row)
                last = self.requests.pop()
                if row < len(self.requests):
                    self.requests[row] = last
                    self._move(len(self.requests), row, last.cached)
        return len(self.requests)

    def _keep(self, request: Request, row: int) -> None:
        """Extend the prefix cache by the prompt and answer of a request."""
        if self.prefix_cache is None or request.cache_key is None:
            return
        count = request.cached
        tokens = [*request.cache_key.tokens, *request.tokens][:count]
        self.prefix_cache.insert(
            self.scoped(replace(request.cache_key, tokens=tokens)),
            self.cache.keys[:, row, :, :count],
            self.cache.values[:, row, :, :count],
        )

    def clear(self) -> None:
        """Drop all requests, whatever state an error has left them in."""
        self.requests.clear()
        self.cache.keys.zero_()
        self.cache.values.zero_()

    # --- passes, which a subclass may run in another way ------------------------------------------

    def run_prefill(
        self, embeddings: Tensor, rows: Tensor, last: Tensor, adapters: AdapterBank | None
    ) -> Tensor:
        """Prompts [E, T, D] into ``rows`` [E] of the cache -> logits [E, V] of tokens ``last``."""
        count, longest = embeddings.shape[:2]
        metadata = self.decoder.prefill_metadata(count, longest)
        bank = self._indexed(adapters, rows)
        hidden = self.decoder.forward(embeddings, metadata, replace(self.cache, rows=rows), bank)
        return self.decoder.logits(hidden[torch.arange(count, device=hidden.device), last])

    def run_continuation(
        self,
        embeddings: Tensor,
        rows: Tensor,
        starts: Tensor,
        last: Tensor,
        limit: int,
        adapters: AdapterBank | None,
    ) -> Tensor:
        """Tokens [E, T, D] behind the first ``starts`` [E] ones of ``rows`` [E] of the cache ->
        logits [E, V] of tokens ``last`` [E].

        Args:
            limit: no token of the pass is at a position from here on, except for padding.
        """
        count, longest = embeddings.shape[:2]
        device = self.decoder.device
        positions = starts[:, None] + torch.arange(longest, device=device)
        # Padding may reach past the row. Its last slot is free: the last token is never cached.
        positions = positions.clamp_max(self.cache.capacity - 1)
        slots = torch.arange(min(limit, self.cache.capacity), device=device)
        mask = (slots <= positions[:, :, None])[:, None]
        metadata = self.decoder.attention_metadata(positions, mask)
        bank = self._indexed(adapters, rows)
        hidden = self.decoder.forward(embeddings, metadata, replace(self.cache, rows=rows), bank)
        return self.decoder.logits(hidden[torch.arange(count, device=device), last])

    def run_decode(self, count: int, limit: int, adapters: AdapterBank | None) -> Tensor:
        """Last tokens of the first ``count`` rows, at positions below ``limit`` -> logits
        [count, V]."""
        return self._decode_rows(slice(0, count), limit, adapters)

    def _decode_rows(self, part: slice, limit: int, adapters: AdapterBank | None) -> Tensor:
        """:meth:`run_decode` of some rows."""
        cache = self.cache
        if part.start:
            rows = torch.arange(part.start, part.stop, device=self.decoder.device)
            cache = replace(cache, rows=rows)
        metadata = self.decoder.decode_metadata(self._positions[part], limit)
        embeddings = self.decoder.embed(self._tokens[part, None])
        bank = self._indexed(adapters, part)
        return self.decoder.logits(self.decoder.forward(embeddings, metadata, cache, bank)[:, 0])

    def _indexed(self, adapters: AdapterBank | None, part: slice | Tensor) -> AdapterBank | None:
        """The bank with the slots of some rows as its index."""
        return None if adapters is None else replace(adapters, index=self._slots[part])

    # --- bookkeeping ------------------------------------------------------------------------------

    @property
    def _vocabulary(self) -> int:
        return self.decoder.lm_head.weight.shape[0]

    def _advance(self, part: slice, run: Callable[[slice], Tensor], cached: int) -> None:
        """Append a token to the requests of ``part``; ``run`` gives their logits.

        Args:
            cached: tokens per row that the pass adds to the KV cache.
        """
        try:
            logits = run(part)
            chosen = self._choose(part, logits, cached)
            # The wait for the device; errors of the pass are raised here.
            tokens = chosen.tolist()
            logprobs = self._logprobs(part, logits, chosen)
        except Exception as error:
            if part.stop - part.start == 1:
                self.requests[part.start].fail(error)
                return
            log.warning("a pass over %d requests failed; repeating it in halves",
                        part.stop - part.start, exc_info=error)  # fmt: skip
            middle = (part.start + part.stop) // 2
            for half in (slice(part.start, middle), slice(middle, part.stop)):
                self._advance(half, run, cached)
            return
        self._tokens[part] = chosen.clamp_min(0)
        self._positions[part] += cached
        for request, token in zip(self.requests[part], tokens, strict=True):
            request.cached += cached
            if token < 0:
                request.fail(_not_finite(request))
            elif token in self.stop_ids:
                request.finish_reason = "stop"
            else:
                request.tokens.append(token)
                if request in logprobs:
                    request.logprobs.append(logprobs[request])
                if len(request.tokens) == request.sampling.max_new_tokens:
                    request.finish_reason = "length"
                elif request.constraint is not None:
                    try:
                        request.constraint.accept(token)
                    except Exception as error:
                        request.fail(error)

    def _choose(self, part: slice, logits: Tensor, cached: int) -> Tensor:
        """Logits [E, V] to token ids [E] on their device; -1 where logits are NaN or infinite."""
        constraints = [request.constraint for request in self.requests[part]]
        logits = constrained(logits, [None if c is None else c.bitmask() for c in constraints])
        chosen = logits.argmax(-1, keepdim=True)
        # argmax treats NaN as the largest value.
        finite = logits.gather(1, chosen)[:, 0].isfinite()
        chosen = chosen[:, 0]
        sampling = [request.sampling for request in self.requests[part]]
        sampled = [row for row, params in enumerate(sampling) if params.temperature > 0]
        if sampled:
            rows: slice | Tensor = slice(None)
            if len(sampled) < len(sampling):
                rows = on_device(sampled, torch.long, logits.device)
            index = self._positions[part] - self._prompts[part] + cached
            chosen[rows] = sample(
                logits[rows],
                self._sampling.rows(part).rows(rows),
                index[rows],
                by_mass=any(sampling[row].top_p < 1 for row in sampled),
                by_count=any(sampling[row].top_k for row in sampled),
            )
        return torch.where(finite, chosen, -1)

    def _logprobs(
        self, part: slice, logits: Tensor, chosen: Tensor
    ) -> dict[Request, TokenLogprobs]:
        """Of the requests that ask for them."""
        requests = self.requests[part]
        asking = [row for row, one in enumerate(requests) if one.sampling.logprobs is not None]
        if not asking:
            return {}
        index = on_device(asking, torch.long, logits.device)
        counts = [requests[row].sampling.logprobs or 0 for row in asking]
        values = token_logprobs(logits[index], chosen[index].clamp_min(0), counts)
        return {requests[row]: one for row, one in zip(asking, values, strict=True)}

    def _copy_rows(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy keys and values for each pair (target, source)."""
        for target, source in pairs:
            length = self.requests[source].cached
            for side in (self.cache.keys, self.cache.values):
                side[:, target, :, :length] = side[:, source, :, :length]

    def _move(self, source: int, target: int, length: int) -> None:
        for side in (self.cache.keys, self.cache.values):
            side[:, target, :, :length] = side[:, source, :, :length]
        for vectors in (self._integers, self._floats):
            vectors[:, target] = vectors[:, source]


def _not_finite(request: Request) -> V2LError:
    if request.constraint is not None and not request.constraint.bitmask().any():
        return V2LError("the constraint of the answer allows no further token")
    if request.slot >= 0:
        return AdapterError(
            "the logits are NaN or infinite with this adapter: its factors are too large for this "
            "model; internalize the video again"
        )
    return V2LError(
        "the logits are NaN or infinite: check the base model's weights and dtype; float16 "
        "overflows, use bfloat16 or float32"
    )
