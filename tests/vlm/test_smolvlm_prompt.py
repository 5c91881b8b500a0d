"""Prompt strings: numbers against num2words, the video text and chat turn spelled out."""

from __future__ import annotations

import pytest
from num2words import num2words

from v2l_fast.errors import ConfigError
from v2l_fast.vlm.smolvlm import chat, frame_text, spell_number, video_text


def test_numbers_are_spelled_as_num2words_does():
    assert [spell_number(n) for n in range(10_000)] == [num2words(n) for n in range(10_000)]


@pytest.mark.parametrize("n", [-1, 10_000])
def test_numbers_out_of_range(n):
    with pytest.raises(ConfigError, match=str(n)):
        spell_number(n)


def test_video_text():
    view = "<fake_token_around_image><global-img><image><image><image><fake_token_around_image>"
    assert video_text(3, (0.0, 59.99, 3725.5), 3730.9, 0, 0, 3) == (
        "You are provided the following series of three frames from a 1:02:10 [H:MM:SS] video.\n"
        f"\nFrame from 00:00:{view}\nFrame from 00:59:{view}\nFrame from 62:05:{view}\n\n"
    )


def test_long_videos_count_days():
    assert "from a 1 day, 1:00:01 [H:MM:SS]" in video_text(1, (0.0,), 90001.0, 0, 0, 1)


def test_tiled_frame():
    fake = "<fake_token_around_image>"
    assert frame_text(2, 2, 2) == (
        f"{fake}<row_1_col_1><image><image>{fake}<row_1_col_2><image><image>\n"
        f"{fake}<row_2_col_1><image><image>{fake}<row_2_col_2><image><image>\n"
        f"\n{fake}<global-img><image><image>{fake}"
    )


def test_a_timestamp_for_each_frame():
    with pytest.raises(ConfigError, match="1 timestamps for 2 frames"):
        video_text(2, (0.0,), 1.0, 0, 0, 1)


def test_chat():
    turn = "<|im_start|>User: Hi<end_of_utterance>\n"
    assert chat("Hi", add_generation_prompt=False) == turn
    assert chat("Hi", add_generation_prompt=True) == turn + "Assistant:"
