"""The tokenizer reads the real prompt text without a loss and writes readable answers."""

import random

import pytest
from transformers import AutoTokenizer

from v2l_fast.hypernet.config import INSTRUCTION
from v2l_fast.shapes.language import PLACE_KINDS, QUESTION_KINDS, ask, question_kinds
from v2l_fast.shapes.vlm import shapes_video_text, vocabulary
from v2l_fast.shapes.world import sample_scenes
from v2l_fast.vlm.smolvlm import chat, video_text


def turns():
    rng = random.Random(0)
    for scene in sample_scenes("val", 60, 1):
        for kind in ("caption", *QUESTION_KINDS, *PLACE_KINDS):
            if kind not in QUESTION_KINDS or kind in question_kinds(scene):
                yield ask(scene, kind, rng)


def test_vocabulary_has_no_doubles():
    assert len(set(vocabulary())) == len(vocabulary())


def test_every_question_and_answer_is_known(prompts, tokenizer):
    for turn in turns():
        assert tokenizer.unk_token_id not in prompts.question(turn.question)
        ids = prompts.answer(turn.answer)
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == turn.answer


def test_video_prompt_tokens(prompts, tokenizer):
    names = tokenizer.convert_ids_to_tokens(prompts.context)
    assert names[:7] == [
        "<|im_start|>",
        "user:",
        "you are provided the following series of",
        "eight",
        "frames from a",
        "0:00:08",
        "[h:mm:ss] video.\n",
    ]
    assert names[7:15] == [
        "\nframe from 00:00:",
        "<fake_token_around_image>",
        "<global-img>",
        *["<image>"] * 4,
        "<fake_token_around_image>",
    ]
    assert names[63] == "\nframe from 00:07:"
    assert names[71:] == ["\n\n", INSTRUCTION.lower(), "<end_of_utterance>", "\n"]


def test_pieces_equal_the_whole_text(prompts, tokenizer):
    for turn in turns():
        for video, prefix in (
            (shapes_video_text(), prompts.video_prefix),
            ("", prompts.text_prefix),
        ):
            text = chat(video + turn.question, True) + f" {turn.answer}<end_of_utterance>"
            pieces = prefix + prompts.question(turn.question) + prompts.answer(turn.answer)
            assert tokenizer(text)["input_ids"] == pieces
    text = chat(shapes_video_text() + INSTRUCTION, False)
    assert tokenizer(text)["input_ids"] == prompts.context


def test_chat_template_equals_the_prompt_builder(tokenizer):
    message = {"role": "user", "content": [{"type": "text", "text": "What happens?"}]}
    for generate in (True, False):
        result = tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=generate
        )
        assert result == chat("What happens?", generate)


def test_other_clips_are_known_too(tokenizer):
    text = video_text(64, [i * 119 / 64 for i in range(64)], 119.0, 2, 3, 4)
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What color is the ring?", "what color is the ring ?"),
        ("a bar moves up, then", "a  bar moves up , then"),
    ],
)
def test_spaces_before_punctuation_do_not_matter(tokenizer, first, second):
    assert tokenizer(first)["input_ids"] == tokenizer(second)["input_ids"]


def test_unknown_words_become_unk(tokenizer):
    names = tokenizer.convert_ids_to_tokens(tokenizer("what elephant?")["input_ids"])
    assert names == ["what", "<unk>", "?"]


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = chat(shapes_video_text() + "What color is the ring?", True)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.pad_token, loaded.eos_token) == ("<pad>", "<end_of_utterance>")
