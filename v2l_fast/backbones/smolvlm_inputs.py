"""From text and what is known about a video to the token ids SmolVLM2 reads: no weights involved.

Picklable and cheap, so that data workers build prompts without holding a model. The wording is
`smolvlm_prompt`'s, pixels are `v2l_fast.video.preprocess`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from v2l_fast.backbones.smolvlm_prompt import END_OF_UTTERANCE, chat, video_text


@dataclass(frozen=True)
class SmolVLMInputs:
    """Prompts as ids (see :class:`~v2l_fast.backbones.base.PromptInputs`)."""

    tokenizer: PreTrainedTokenizerBase
    tile_size: int
    tokens_per_view: int

    def ids(self, text: str) -> list[int]:
        """Text with special tokens spelled out -> ids."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def question(self, text: str) -> list[int]:
        """A question without a video; the model's answer follows."""
        return self.ids(chat(text, add_generation_prompt=True))

    def answer(self, text: str, finished: bool = True) -> list[int]:
        """What the model says after a question; the stop token last when it is `finished`."""
        return self.ids(f" {text}{END_OF_UTTERANCE if finished else ''}")

    def about(
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
        shown = video_text(
            len(timestamps), timestamps, duration, rows, cols, self.tokens_per_view
        )
        return self.ids(chat(shown + text, answer_follows))

    def turn_opening(self) -> list[int]:
        """What :meth:`question` begins with, whatever is asked."""
        return self.ids(chat("", False).split(END_OF_UTTERANCE)[0].rstrip())

    def video_opening(
        self, timestamps: Sequence[float], duration: float, rows: int, cols: int
    ) -> list[int]:
        """What stands in place of :meth:`turn_opening` where the video is in context."""
        ids = self.about(timestamps, duration, rows, cols, "", answer_follows=False)
        return ids[: -len(self.ids(f"{END_OF_UTTERANCE}\n"))]
