"""Tokenization of prompts that contain untrusted text.

A prompt is a template around untrusted text: a question, a system message, a caption. In the
template a special token such as ``<image>`` is one token; in the text it is a few ordinary
characters. ``smolvlm`` holds the templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise, zip_longest

from transformers import PreTrainedTokenizerBase

from v2l_fast.errors import ConfigError

# Tokens added without the special flag that nevertheless control the model (``<think>``,
# ``[INST]``). Others without the flag, such as runs of spaces, belong to ordinary text.
_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


# Stands for a message's content while a chat template is rendered.
_PLACEHOLDER = "UntrustedContentOfMessage"


@dataclass(frozen=True)
class PromptTokenizer:
    """Encodes templates around text that never becomes a special token.

    Args:
        tokenizer: the model's own tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase

    def encode(self, *pieces: str) -> list[int]:
        """Token ids of the joined pieces, which alternate between template and untrusted text.

        The ids are those of the whole string, except that special tokens spelled out in untrusted
        text, entirely or in part, are encoded as ordinary characters. Lone surrogates, which no
        tokenizer can read, become U+FFFD.

        Args:
            pieces: number 0, 2, 4, ... are template, where special tokens spelled out are special
                tokens; number 1, 3, 5, ... are untrusted.
        """
        pieces = tuple(
            p if i % 2 == 0 else replace_lone_surrogates(p) for i, p in enumerate(pieces)
        )
        ends = list(accumulate(map(len, pieces)))
        whole = "".join(pieces)
        cuts = sorted(
            {
                cut
                for index in range(1, len(pieces), 2)
                for cut in self._cuts(whole, ends[index - 1], ends[index])
            }
        )
        ids = [i for a, b in pairwise([0, *cuts, len(whole)]) for i in self._ids(whole[a:b])]
        if not self._matches_normalized_text:
            return ids
        # Such a token may match text that only becomes its spelling through the normalizer.
        template = [self._ids(piece) for piece in pieces[::2]]
        if self._count(ids) == sum(map(self._count, template)):
            return ids
        texts = [[i for character in piece for i in self._ids(character)] for piece in pieces[1::2]]
        plain = ([i for i in text if i not in self._control_ids] for text in texts)
        return [i for part in zip_longest(template, plain, fillvalue=()) for p in part for i in p]

    def _cuts(self, whole: str, start: int, end: int) -> list[int]:
        """Positions to cut at so that no control token overlaps ``whole[start:end]``.

        A control token is cut after its first character. The pieces are encoded one by one.
        """
        if not self._control_tokens:
            return []
        reach = max(map(len, self._control_tokens)) - 1
        matches = self._pattern.finditer(whole, max(0, start - reach), end + reach)
        spans = ((match.start(), match.end(1)) for match in matches)
        return [a + 1 for a, b in spans if a < end and b > start]

    def _ids(self, piece: str) -> list[int]:
        return self.tokenizer(piece, add_special_tokens=False)["input_ids"]

    def _count(self, ids: list[int]) -> int:
        return sum(i in self._control_ids for i in ids)

    @cached_property
    def _control_tokens(self) -> dict[str, int]:
        """Spelling and id of each token that ordinary text must not produce."""
        added = {
            token.content: i
            for i, token in self.tokenizer.added_tokens_decoder.items()
            if token.special or _MARKUP.fullmatch(token.content)
        }
        named = zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True)
        # A single character cannot be cut; it counts as text.
        return {token: i for token, i in (added | dict(named)).items() if len(token) > 1}

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Ids of the control tokens, without the unknown token, which any unknown word becomes."""
        return frozenset(self._control_tokens.values()) - {self.tokenizer.unk_token_id}

    @cached_property
    def _matches_normalized_text(self) -> bool:
        added = self.tokenizer.added_tokens_decoder
        return any(i in added and added[i].normalized for i in self._control_tokens.values())

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Matches the longest control token at every position, overlapping ones too."""
        longest_first = sorted(self._control_tokens, key=len, reverse=True)
        return re.compile(f"(?=({'|'.join(map(re.escape, longest_first))}))")


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """Token ids of messages in the tokenizer's own chat template; the model's reply follows.

    The template is rendered around placeholders, so no content becomes a special token. Content is
    stripped where the template strips it.

    Raises:
        ConfigError: the template changes contents in another way.
    """

    def render(padding: str) -> list[str]:
        """Template and numbers of messages in turn."""
        marked = [
            {**message, "content": f"{padding}{_PLACEHOLDER}{number}.{padding}"}
            for number, message in enumerate(messages)
        ]
        text = tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False)
        return re.split(rf"{padding}{_PLACEHOLDER}(\d+)\.{padding}", str(text))

    pieces, strips = render(" "), False
    if len(pieces) == 1:
        pieces, strips = render(""), True
    if len(pieces) == 1 or any(_PLACEHOLDER in piece for piece in pieces):
        raise ConfigError("the tokenizer's chat template changes what messages say; use another")
    for index in range(1, len(pieces), 2):
        content = messages[int(pieces[index])]["content"]
        pieces[index] = content.strip() if strips else content
    return PromptTokenizer(tokenizer).encode(*pieces)


def replace_lone_surrogates(text: str) -> str:
    """``text`` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
