"""Choice of the next token: greedy, or sampled from the truncated distribution.

Everything runs on the logits' device without waiting for it. A row's token depends only on its own
logits, parameters, seed and token index, bit for bit: probabilities become integers, whose sums
have no rounding, and the random number is a hash of (seed, token index). Neither the other rows of
a batch nor the row's index in it changes an answer.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, SupportsIndex

import torch
from torch import Tensor
from torch.nn import functional as F

from v2l_fast.errors import ConfigError

MIN_SEED, MAX_SEED = -(1 << 63), (1 << 63) - 1
# A probability of 1 as an integer. Tokens below 2^-40 are never sampled.
_ONE = 1 << 40
# Rows at a time on a CPU, so that temporaries stay in its cache: three times as fast as 32.
_ROWS_CPU = 4
# Bits of the sort key per histogram, highest first.
_DIGITS = (11, 11, 10)
# Smallest normal float32 numbers are about 1e-38: below, a device may read 0 and divide 0 by it.
_COLDEST, _HOTTEST = 1e-37, 3e38


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    ``top_p`` and ``top_k`` both apply to the full distribution, after the temperature; a token must
    satisfy both. Equally likely tokens are ordered by id.

    Attributes:
        max_new_tokens: limit of generated tokens, the stop token included.
        temperature: 0 is greedy; any finite positive number is valid.
        top_p: smallest set of tokens whose probability reaches it, at least one.
        top_k: the k most likely tokens; 0 for no limit, as any number above the vocabulary's size.
        seed: signed 64-bit integer. The same seed gives the same answer in any batch, up to the
            rounding of logits; answer i of a call uses ``seed + i``, modulo 2^64.
        n: answers to each prompt, which is computed once for all of them.
        logprobs: report the log probability of each token and of this many most likely ones, from
            the logits before temperature, truncation and constraints; None reports nothing.

    Raises:
        ConfigError: a value is out of its range or of the wrong type.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed", "n", "logprobs"):
            value = getattr(self, name)
            if name != "logprobs" or value is not None:
                object.__setattr__(self, name, _integer(name, value))
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature must be 0 (greedy) or a finite positive number, "
                f"got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be 0 (no limit) or more, got {self.top_k}")
        if not MIN_SEED <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed must be from -2^63 to 2^63 - 1, got {_excerpt(self.seed)}")
        if self.n < 1:
            raise ConfigError(f"n must be at least 1, got {self.n}")
        if self.logprobs is not None and self.logprobs < 0:
            raise ConfigError(f"logprobs must be None, 0 or more, got {self.logprobs}")

    def for_example(self, index: int) -> SamplingParams:
        """The parameters of answer ``index`` of a batch: one answer, of ``seed + index``, modulo
        2^64."""
        return replace(self, seed=(self.seed + index - MIN_SEED) % (1 << 64) + MIN_SEED, n=1)


def _integer(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} must be an integer, got {_excerpt(value)}") from None


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, numbers.Real):
            return float(value)
    except OverflowError:
        pass
    raise ConfigError(f"{name} must be a float, got {_excerpt(value)}")


def _excerpt(value: object) -> str:
    text = hex(value) if isinstance(value, int) and value.bit_length() > 256 else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class SamplingTensors:
    """Parameters of E rows on the device, [E] each; see :class:`SamplingParams`.

    Attributes:
        temperature: float64, from 1e-37 to 3e38, the range of float32.
        top_p: float64.
        top_k: int64, from 1 to the vocabulary's size.
        seed: int64.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    seed: Tensor

    @classmethod
    def of(
        cls, sampling: Sequence[SamplingParams], vocabulary: int, device: torch.device
    ) -> SamplingTensors:
        """One row per element of ``sampling``; the temperature of greedy ones is ignored."""
        return cls(
            *on_device(
                [
                    [min(max(s.temperature, _COLDEST), _HOTTEST) for s in sampling],
                    [s.top_p for s in sampling],
                ],
                torch.float64,
                device,
            ),
            *on_device(
                [
                    [min(s.top_k or vocabulary, vocabulary) for s in sampling],
                    [s.seed for s in sampling],
                ],
                torch.int64,
                device,
            ),
        )

    def rows(self, which: slice | Tensor) -> SamplingTensors:
        """Some of the rows."""
        return SamplingTensors(
            self.temperature[which], self.top_p[which], self.top_k[which], self.seed[which]
        )

    def write(self, part: slice, sampling: Sequence[SamplingParams], vocabulary: int) -> None:
        """Replace the rows of ``part``, in place."""
        other = SamplingTensors.of(sampling, vocabulary, self.seed.device)
        for name in ("temperature", "top_p", "top_k", "seed"):
            getattr(self, name)[part] = getattr(other, name)


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's natural-log probability, from the logits before sampling.

    Attributes:
        token: id of the chosen token.
        logprob: of that token.
        top: (id, log probability) of the most likely tokens, the most likely first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenConstraint(Protocol):
    """Limits the next token of one answer, for example to what a grammar allows.

    The runner calls it in its own thread and computes a pass between :meth:`accept` and
    :meth:`bitmask`; an implementation computes the mask in another thread meanwhile. An error that
    it raises ends its request alone.
    """

    def bitmask(self) -> Tensor:
        """The tokens allowed next: int32 [ceil(V / 32)] on the CPU, token t is bit t % 32 of
        element t // 32. Waits until it is known; the same until the next :meth:`accept`."""

    def accept(self, token: int) -> None:
        """The answer continues with a token, which is not a stop token."""


def constrained(logits: Tensor, bitmasks: Sequence[Tensor | None]) -> Tensor:
    """Logits [E, V] with -inf for the tokens that a row's bitmask excludes.

    Args:
        bitmasks: one per row, as :meth:`TokenConstraint.bitmask` returns it; None allows all.
    """
    rows = [row for row, mask in enumerate(bitmasks) if mask is not None]
    if not rows:
        return logits
    words = torch.stack([mask for mask in bitmasks if mask is not None])
    bits = torch.arange(32, device=logits.device, dtype=torch.int32)
    allowed = (words.to(logits.device)[:, :, None] >> bits & 1).flatten(1).bool()
    missing = logits.shape[1] - allowed.shape[1]
    # Tokens that the mask does not know, such as padding of the vocabulary, are excluded.
    allowed = F.pad(allowed, (0, missing)) if missing > 0 else allowed[:, : logits.shape[1]]
    index = on_device(rows, torch.long, logits.device)
    logits = logits.clone()
    logits[index] = logits[index].masked_fill(~allowed, -math.inf)
    return logits


def token_logprobs(
    logits: Tensor, chosen: Tensor, counts: Sequence[int]
) -> Iterator[TokenLogprobs]:
    """:class:`TokenLogprobs` of each row.

    Args:
        logits: [E, V] float32.
        chosen: [E] int64 token ids.
        counts: most likely tokens to report for each row.
    """
    logprobs = torch.log_softmax(logits, -1)
    top, ids = logprobs.topk(min(max(counts), logits.shape[1]), -1)
    values = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    rows = zip(chosen.tolist(), values, ids.tolist(), top.tolist(), counts, strict=True)
    for token, value, likely, likely_values, count in rows:
        pairs = zip(likely[:count], likely_values[:count], strict=True)
        yield TokenLogprobs(token, value, tuple(pairs))


def on_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor on ``device``, without waiting for it."""
    waits = device.type != "cuda"
    tensor = torch.tensor(values, dtype=dtype, pin_memory=not waits)
    return tensor.to(device, non_blocking=not waits)


def sample(
    logits: Tensor,
    parameters: SamplingTensors,
    index: Tensor,
    by_mass: bool = True,
    by_count: bool = True,
) -> Tensor:
    """Sample a token for each row.

    Args:
        logits: [E, V] float32, finite or -inf.
        parameters: of the rows.
        index: [E] int64, how many tokens of the answer precede this one.
        by_mass: False skips ``top_p``, if no row has one below 1.
        by_count: False skips ``top_k``, if no row has one.

    Returns:
        Token ids [E] int64. A row with NaN gets some id.
    """
    count = _ROWS_CPU if logits.device.type == "cpu" else max(1, len(logits))
    return torch.cat(
        [
            _sample(logits[part], parameters.rows(part), index[part], by_mass, by_count)
            for part in (slice(i, i + count) for i in range(0, len(logits), count))
        ]
    )


def _sample(
    logits: Tensor, parameters: SamplingTensors, index: Tensor, by_mass: bool, by_count: bool
) -> Tensor:
    shifted = logits - logits.amax(-1, keepdim=True)
    temperature = parameters.temperature[:, None].to(logits.dtype)
    probs = torch.softmax(shifted / temperature, dim=-1)
    weights = (probs * _ONE).to(torch.int64)
    if by_mass or by_count:
        weights = _truncated(logits, weights, parameters, by_mass, by_count)
    total = weights.cumsum(-1)
    mass = total[:, -1:]
    # A product, not a remainder: a rounding error in the logits must not change the sample much.
    drawn = (uniform(parameters.seed, index)[:, None] * mass).to(torch.int64).minimum(mass - 1)
    # The first token whose cumulative weight exceeds the draw has a weight above 0.
    return torch.searchsorted(total, drawn, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


def uniform(seed: Tensor, index: Tensor) -> Tensor:
    """A float64 in [0, 1) of 53 random bits for each (seed, index), both int64 of one shape."""
    return _shifted(_mixed(_mixed(seed + 1) + index + 1), 11).to(torch.float64) * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64 of int64, whose products wrap."""
    # 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB, as signed integers.
    x = x * -0x61C8864680B583EB
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, count: int) -> Tensor:
    """Logical shift to the right; torch's keeps the sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def _truncated(
    logits: Tensor, weights: Tensor, parameters: SamplingTensors, by_mass: bool, by_count: bool
) -> Tensor:
    """Weights [E, V] with 0 for tokens outside ``top_p`` or ``top_k``.

    Both keep the first tokens in descending order, ties by id: all above some key, and the first of
    those equal to it. Histograms find the key; sorting takes several times as long.
    """
    bits = (logits + 0.0).view(torch.int32)
    # Integers in the order of the floats; + 0.0 has made -0 the 0 it equals.
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) + (1 << 31)
    last, ties = torch.zeros_like(key[:, :1]), torch.full_like(key[:, :1], key.shape[1])
    if by_mass:
        mass = weights.sum(-1, keepdim=True)
        # At least one token, however small top_p is.
        target = (parameters.top_p[:, None] * mass).ceil().to(torch.int64).clamp_min(1)
        last, missing = _prefix(key, weights, target.minimum(mass))
        # Equal keys have equal weights.
        weight = torch.where(key == last, weights, 0).amax(-1, keepdim=True).clamp_min(1)
        ties = (missing + weight - 1) // weight
    if by_count:
        nth, needed = _prefix(key, torch.ones_like(weights), parameters.top_k[:, None])
        # The shorter one of the two.
        ties = torch.where(nth == last, ties.minimum(needed), torch.where(nth > last, needed, ties))
        last = last.maximum(nth)
    equal = key == last
    kept = (key > last) | (equal & (equal.cumsum(-1) <= ties))
    return torch.where(kept, weights, 0)


def _prefix(key: Tensor, units: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sum of ``units`` [E, V], in descending order of ``key``, reaches ``target`` [E, 1].

    Returns:
        The key [E, 1] where it does, and how much of ``target`` [E, 1] that key's units must add,
        at least 1.
    """
    reached, shift = torch.zeros_like(target), sum(_DIGITS)
    for digits in _DIGITS:
        shift -= digits
        prefix = key >> shift
        count = 1 << digits
        histogram = units.new_zeros(len(units), count).scatter_add_(1, prefix & (count - 1), units)
        up_to = histogram.cumsum(-1)
        total = up_to[:, -1:]
        # The sum from digit d on is total - up_to[d - 1]: the last d where it is the target.
        digit = torch.searchsorted(up_to, total - target, right=True).clamp_max(count - 1)
        target = target - (total - up_to.gather(1, digit))
        reached = (reached << digits) | digit
        units = torch.where(prefix == reached, units, 0)
    return reached, target
