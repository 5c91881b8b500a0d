"""From text and what is known about a video to the token ids SmolVLM2 reads: no weights involved.

Picklable and cheap, so that data workers build prompts without holding a model. The wording is
`smolvlm_prompt`'s, pixels are `v2l_fast.video.preprocess`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from v2l_fast.vlm.smolvlm_prompt import (
    AFTER_VIDEO,
    END_OF_UTTERANCE,
    TURN_START,
    turn_end,
    video_text,
)
from v2l_fast.vlm.tokenization import PromptTokenizer


@dataclass(frozen=True)
class SmolVLMPromptBuilder:
    """Prompts as ids (see :class:`~v2l_fast.vlm.base.PromptBuilder`)."""

    tokenizer: PreTrainedTokenizerBase
    tile_size: int
    tokens_per_view: int

    @cached_property
    def _prompt_tokenizer(self) -> PromptTokenizer:
        return PromptTokenizer(self.tokenizer)

    def ids(self, template: str) -> list[int]:
        """Token ids of trusted text, in which special tokens are spelled out."""
        return self._prompt_tokenizer.encode(template)

    def question(self, text: str) -> list[int]:
        """A question without a video; the model's answer follows."""
        return self._prompt_tokenizer.encode(TURN_START, text, turn_end(True))

    def answer(self, text: str, finished: bool = True) -> list[int]:
        """What the model says after a question; the stop token last when it is `finished`."""
        return self._prompt_tokenizer.encode(" ", text, END_OF_UTTERANCE if finished else "")

    def video_prompt(
        self,
        timestamps: Sequence[float],
        duration: float,
        rows: int,
        cols: int,
        text: str,
        answer_follows: bool,
    ) -> list[int]:
        """Video and text in the user's turn, one image token for each feature of each view.

        timestamps, duration: seconds, of the clip. rows, cols: tiles of a frame, 0 when not split.
        """
        video = video_text(len(timestamps), timestamps, duration, rows, cols, self.tokens_per_view)
        return self._prompt_tokenizer.encode(TURN_START + video, text, turn_end(answer_follows))

    def question_suffix(self, text: str) -> list[int]:
        """What follows a video's last special token when `text` is asked about it and an answer is
        to follow. Tokenizers split at special tokens, so its ids are those it has in the whole
        prompt."""
        return self._prompt_tokenizer.encode(AFTER_VIDEO, text, turn_end(True))

    def text_prefix(self) -> list[int]:
        """What :meth:`question` begins with, whatever is asked."""
        return self.ids(TURN_START.rstrip())

    def text_prefix_with_video(
        self, timestamps: Sequence[float], duration: float, rows: int, cols: int
    ) -> list[int]:
        """What stands in place of :meth:`text_prefix` where the video is in context."""
        ids = self.video_prompt(timestamps, duration, rows, cols, "", answer_follows=False)
        return ids[: -len(self.ids(turn_end(False)))]
