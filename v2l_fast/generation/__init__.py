"""Token generation: requests with adapters of their own, in batches over one frozen decoder.

:func:`answer_prompts` answers questions in batches and is what `ask`, the training log, the teacher
and evaluation call. :func:`generate` runs one batch of embedded prompts. Both, and the server, run
on :class:`ModelRunner`.
"""

from functools import partial

from v2l_fast._deprecated import renamed
from v2l_fast.generation.answers import (
    MAX_BATCH,
    Answer,
    Effect,
    GenerationOutput,
    answer_prompts,
    generate,
    measure_effect,
)
from v2l_fast.generation.prefix_cache import CacheKey, PrefixCache
from v2l_fast.generation.runner import ModelRunner, Request
from v2l_fast.generation.sampling import SamplingParams, TokenConstraint, TokenLogprobs

__all__ = [
    "MAX_BATCH",
    "Answer",
    "CacheKey",
    "Effect",
    "GenerationOutput",
    "ModelRunner",
    "PrefixCache",
    "Request",
    "SamplingParams",
    "TokenConstraint",
    "TokenLogprobs",
    "answer_prompts",
    "generate",
    "measure_effect",
]

__getattr__ = partial(renamed, __name__)
