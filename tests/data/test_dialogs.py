"""Five forms of dialogs become pairs of turns; broken files are named. The dialogs are our own."""

import json

import pytest

from v2l_fast.data.dialogs import AnnotatedPreference, read_dialogs
from v2l_fast.errors import ConfigError

CCPE = {
    "conversationId": "CCPE-00001",
    "utterances": [
        {"index": 0, "speaker": "ASSISTANT", "text": "Which films do you like?"},
        {
            "index": 1,
            "speaker": "USER",
            "text": "I like slow films.",
            "segments": [
                {
                    "startIndex": 7,
                    "endIndex": 17,
                    "text": "slow films",
                    "annotations": [
                        {
                            "annotationType": "ENTITY_PREFERENCE",
                            "entityType": "MOVIE_GENRE_OR_CATEGORY",
                        }
                    ],
                }
            ],
        },
        {"index": 2, "speaker": "USER", "text": "And old ones."},
        {"index": 3, "speaker": "ASSISTANT", "text": "Why?"},
        {"index": 4, "speaker": "USER", "text": "They are calm."},
    ],
}
ESCONV = {
    "emotion_type": "anxiety",
    "survey_score": {"seeker": {"empathy": "5"}},
    "dialog": [
        {"speaker": "seeker", "annotation": {}, "content": "I am worried.\n"},
        {"speaker": "supporter", "annotation": {"strategy": "Question"}, "content": "Why?\n"},
    ],
}
FAILED = {
    "dialog": [
        {"speaker": "listener", "content": "Hello\n"},
        {"speaker": "speaker", "content": "Hi\n"},
        {"speaker": "speaker", "content": "I lost my keys.\n"},
        {"speaker": "listener", "content": "Oh no.\n"},
    ]
}
HUB = {"dialog": [{"text": "Hi", "speaker": "usr"}, {"text": "Yes?", "speaker": "sys"}]}
AUTHORS = {"conversation_id": 7, "turns": [{"user_input": "Hi", "response": "Hello."}]}


def read(tmp_path, *entries):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(list(entries)))
    return read_dialogs(path)


def test_ccpe_drops_the_opening_joins_utterances_and_keeps_preferences(tmp_path):
    (dialog,) = read(tmp_path, CCPE)
    assert dialog.id == "CCPE-00001" and dialog.opening == "Which films do you like?"
    assert dialog.pairs == (("I like slow films.\nAnd old ones.", "Why?"), ("They are calm.", ""))
    assert dialog.preferences == (AnnotatedPreference("slow films", "MOVIE_GENRE_OR_CATEGORY", 0),)


def test_esconv_keeps_scores_as_strings(tmp_path):
    (dialog,) = read(tmp_path, ESCONV)
    assert dialog.pairs == (("I am worried.", "Why?"),)
    assert dialog.strategies == (("Question",),) and dialog.form == "esconv"
    assert dialog.metadata == {"emotion_type": "anxiety", "survey_score.seeker.empathy": "5"}


def test_failed_esconv_has_other_names_of_the_speakers(tmp_path):
    (dialog,) = read(tmp_path, FAILED)
    assert dialog.opening == "Hello" and dialog.pairs == (("Hi\nI lost my keys.", "Oh no."),)


def test_the_authors_form(tmp_path):
    (dialog,) = read(tmp_path, AUTHORS)
    assert (dialog.id, dialog.pairs) == ("7", (("Hi", "Hello."),))


def test_the_hubs_form_has_one_dialog_a_line(tmp_path):
    path = tmp_path / "test.txt"
    path.write_text(f"{json.dumps(HUB)}\n{json.dumps(HUB)}\n")
    assert [dialog.pairs for dialog in read_dialogs(path)] == [(("Hi", "Yes?"),)] * 2


def test_dialogs_of_twelve_pairs_are_long(tmp_path):
    turns = AUTHORS["turns"]
    short, long = read(tmp_path, {"turns": turns * 11}, {"turns": turns * 12})
    assert not short.is_long and long.is_long


@pytest.mark.parametrize(
    "entry",
    [{}, {"dialog": [{"speaker": "judge", "content": ""}]}, {"dialog": [{}]}, {"turns": [{}]},
     {"utterances": None}, 3, "x", {"dialog": [{"speaker": 3, "content": "x"}]}],
)  # fmt: skip
def test_an_unknown_form_names_file_and_dialog(tmp_path, entry):
    with pytest.raises(ConfigError, match="data.json: dialog 2"):
        read(tmp_path, ESCONV, entry)


def test_a_cut_file_names_its_line(tmp_path):
    path = tmp_path / "test.txt"
    path.write_text(f"{json.dumps(HUB)}\n{json.dumps(HUB)[:20]}")
    with pytest.raises(ConfigError, match="test.txt: line 2"):
        read_dialogs(path)
