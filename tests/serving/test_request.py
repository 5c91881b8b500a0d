"""Streamed pieces equal the decoded answer, with word- and byte-level tokenizers."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from v2l_fast.serving.request import TextStream


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """A token for each byte, and some words: characters and spaces arrive in pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate(["<end>", *alphabet, "Ġa", "ab", "Ġab"])}
    core = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("a", "b"), ("Ġa", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


TOKENIZERS = {"words": functools.cache(tiny.tokenizer), "bytes": byte_level}


def stream(decode, tokens: list[int], stop: tuple[str, ...]) -> tuple[list[str], bool]:
    """The pieces of an answer that grows by one token at a time, and whether it was stopped."""
    made = TextStream(decode, stop)
    pieces = []
    for length in range(1, len(tokens) + 1):
        pieces.append(made.push(tokens[:length]))
        if made.stopped:
            return pieces, True
    return [*pieces, made.finish(tokens)], made.stopped


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first stop string, without outer white space."""
    places = [place for s in stop if (place := text.find(s)) >= 0]
    return text[: min(places)].rstrip() if places else text


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60)
@given(st.data())
def test_pieces_add_up_to_the_whole(kind, data):
    tokenizer = TOKENIZERS[kind]()
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=25))
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    pieces, stopped = stream(decode, tokens, ())
    assert "".join(pieces) == decode(tokens).strip() and not stopped


@pytest.mark.parametrize("text", ["a naïve café, 東京 and 🎬!", "  ab ab\n\n ab  ", "ab ab ab"])
@settings(max_examples=40)
@given(stop=st.lists(st.text("ab 京\n!é", min_size=1, max_size=4), max_size=3))
def test_stop_strings(text, stop):
    tokenizer = byte_level()
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    pieces, stopped = stream(decode, tokenizer(text)["input_ids"], tuple(stop))
    whole = text.strip()
    # White space at the end is not part of an answer, but can be of a stop string.
    expected = cut(text.lstrip(), tuple(stop)).rstrip()
    assert "".join(pieces) == expected
    assert stopped == any(s in text.lstrip() for s in stop)
    assert whole.startswith(expected)


def test_a_possible_stop_string_is_held_back():
    ids = [ord(letter) for letter in "one two three"]
    made = TextStream(lambda some: "".join(map(chr, some)), ("two four",))
    lengths = (3, 4, 6, 8, 9, 10)
    assert [made.push(ids[:n]) for n in lengths] == ["one", "", "", "", " two", " th"]
    assert made.finish(ids) == "ree"


def test_half_a_character_is_held_back():
    tokenizer = byte_level()
    ids = tokenizer("é!")["input_ids"]
    assert len(ids) == 3
    made = TextStream(tokenizer.decode, ())
    assert [made.push(ids[:n]) for n in (1, 2, 3)] == ["", "é", "!"]
