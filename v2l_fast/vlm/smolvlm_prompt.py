"""SmolVLM2's prompts: the text around a video (counts in words, timestamps, image tokens, chat
turns) and its token ids.

The strings equal those that transformers 4.51.3 builds for one conversation with one video (the
released checkpoints were trained with it). Its batched call prints the last video's duration for
every conversation; here a prompt depends on its own video alone. Nothing here needs weights, so
data workers build prompts without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from v2l_fast.errors import ConfigError
from v2l_fast.vlm.base import Question, conversation
from v2l_fast.vlm.tokenization import PromptTokenizer

FAKE_TOKEN = "<fake_token_around_image>"
GLOBAL_TOKEN = "<global-img>"
IMAGE_TOKEN = "<image>"
END_OF_UTTERANCE = "<end_of_utterance>"
CHAT_START = "<|im_start|>"
# Start of a prompt with the user's turn.
TURN_START = f"{CHAT_START}User: "
# Between a video's last special token and the user's text.
AFTER_VIDEO = "\n\n"

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def spell_number(n: int) -> str:
    """English words of `n` in 0..9999, as `num2words(n)` writes them ("one hundred and one").

    Raises ConfigError outside that range.
    """
    if not 0 <= n <= 9999:
        raise ConfigError(f"cannot spell {n}: a prompt names 0 to 9999 frames; sample fewer frames")
    if n < 20:
        return _ONES[n]
    if n < 100:
        tens, ones = divmod(n, 10)
        return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    if n < 1000:
        hundreds, rest = divmod(n, 100)
        return f"{_ONES[hundreds]} hundred" + (f" and {spell_number(rest)}" if rest else "")
    thousands, rest = divmod(n, 1000)
    head = f"{_ONES[thousands]} thousand"
    if not rest:
        return head
    # A remainder below one hundred is joined by "and", a larger one (which has its own) by a comma.
    return f"{head} and {spell_number(rest)}" if rest < 100 else f"{head}, {spell_number(rest)}"


def row_col_token(row: int, col: int) -> str:
    """Special token before the tile at 1-based (row, col)."""
    return f"<row_{row}_col_{col}>"


def frame_text(rows: int, cols: int, tokens_per_view: int) -> str:
    """Tokens of one frame: rows x cols tiles row-major, then the global view; 0 x 0 is untiled."""
    patches = IMAGE_TOKEN * tokens_per_view
    view = f"{FAKE_TOKEN}{GLOBAL_TOKEN}{patches}{FAKE_TOKEN}"
    if rows == 0 and cols == 0:
        return view
    tiles = "".join(
        "".join(f"{FAKE_TOKEN}{row_col_token(r, c)}{patches}" for c in range(1, cols + 1)) + "\n"
        for r in range(1, rows + 1)
    )
    return f"{tiles}\n{view}"


def video_text(
    num_frames: int,
    timestamps: Sequence[float],
    duration: float,
    rows: int,
    cols: int,
    tokens_per_view: int,
) -> str:
    """The text of a video in the user's turn; the user's own text follows it directly.

    timestamps: seconds, one per frame (index / fps), printed as MM:SS, minutes not wrapped at 60.
    duration: seconds of the whole source, truncated to whole seconds as H:MM:SS.
    rows, cols: tiles of a frame, 0 and 0 when it is not split.
    Raises ConfigError when the number of timestamps is not `num_frames`.
    """
    if len(timestamps) != num_frames:
        raise ConfigError(f"{len(timestamps)} timestamps for {num_frames} frames: pass one each")
    length = timedelta(seconds=int(duration))
    intro = (
        f"You are provided the following series of {spell_number(num_frames)} frames "
        f"from a {length} [H:MM:SS] video.\n"
    )
    views = frame_text(rows, cols, tokens_per_view)
    frames = (f"\nFrame from {int(t // 60):02d}:{int(t % 60):02d}:{views}" for t in timestamps)
    return intro + "".join(frames) + AFTER_VIDEO


def turn_end(add_generation_prompt: bool) -> str:
    """The end of a user's turn, and the start of the assistant's if an answer follows."""
    return f"{END_OF_UTTERANCE}\n" + ("Assistant:" if add_generation_prompt else "")


def chat(text: str, add_generation_prompt: bool) -> str:
    """A user's turn with `text`, and the start of the assistant's if an answer follows."""
    return TURN_START + text + turn_end(add_generation_prompt)


def chat_pieces(question: Question, video: str, answer_follows: bool) -> list[str]:
    """Template and untrusted text in turn, as :meth:`PromptTokenizer.encode` takes them.

    Args:
        video: text of the video, in the user's first turn; may be empty.
    """
    template, pieces = CHAT_START, []
    for role, text in conversation(question):
        template += f"{role.capitalize()}: "
        if role == "user":
            template, video = template + video, ""
        pieces += [template, text]
        template = turn_end(False)
    return [*pieces, turn_end(answer_follows)]


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
        """Token ids of trusted text, in which spelled-out special tokens are special tokens."""
        return self._prompt_tokenizer.encode(template)

    def question(self, question: Question) -> list[int]:
        """A question or conversation without a video; the model's answer follows."""
        return self._prompt_tokenizer.encode(*chat_pieces(question, "", True))

    def answer(self, text: str, finished: bool = True) -> list[int]:
        """The model's turn; ends with the stop token if ``finished``."""
        return self._prompt_tokenizer.encode(" ", text, END_OF_UTTERANCE if finished else "")

    def video_prompt(
        self,
        timestamps: Sequence[float],
        duration: float,
        rows: int,
        cols: int,
        question: Question,
        answer_follows: bool,
    ) -> list[int]:
        """A user's turn of video and text, with one image token per feature of each view.

        In a conversation, the video is in the user's first turn.
        """
        video = video_text(len(timestamps), timestamps, duration, rows, cols, self.tokens_per_view)
        return self._prompt_tokenizer.encode(*chat_pieces(question, video, answer_follows))

    def question_suffix(self, text: str) -> list[int]:
        """The part of a video prompt after the video's last special token, with an answer to
        follow. Tokenizers split at special tokens, so the ids equal those in the whole prompt."""
        return self._prompt_tokenizer.encode(AFTER_VIDEO, text, turn_end(True))

    def text_prefix(self) -> list[int]:
        """The ids that every :meth:`question` starts with."""
        return self.ids(TURN_START.rstrip())

    def text_prefix_with_video(
        self, timestamps: Sequence[float], duration: float, rows: int, cols: int
    ) -> list[int]:
        """Replaces :meth:`text_prefix` where the video is in context."""
        ids = self.video_prompt(timestamps, duration, rows, cols, "", answer_follows=False)
        return ids[: -len(self.ids(turn_end(False)))]
