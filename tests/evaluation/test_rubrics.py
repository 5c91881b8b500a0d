"""The judge's instructions and the parsing of its replies."""

import hashlib
import json

import pytest

from v2l_fast.evaluation.judge import (
    CORRECTION,
    CRITERIA,
    VERSION,
    InvalidReply,
    JudgeTask,
    conversation_verdict,
    pair_messages,
    pair_verdict,
    rescaled,
    single_messages,
    single_verdict,
)

CAPTION = JudgeTask("Describe the video.", "A red disc moves left.", is_caption=True)
QUESTION = JudgeTask("What color is the disc?", "red", is_caption=False)


@pytest.mark.parametrize(
    "reply",
    [
        '{"rationale": "fine", "score": 4}',
        '```json\n{"rationale": "fine", "score": 4}\n```',
        'Here you are:\n{"rationale": "a {brace} in text", "score": 4} I hope it helps.',
        '<think>{"score": 1} would be harsh</think>{"score": 4}',
        'the format is {"score": N}, so</think>\n{"score": 4.0}',
        '{"covered": ["a", "b",], "score": 4,}',
        "{'rationale': 'it\\'s fine', 'score': 4, 'contradictions': None}",
        '{"score": "4"}',
        '{"score": "4/5"}',
        '{"covered": [{"fact": "a"}], "score": 4}',
        '{"score": 4, "rationale": "cut off in the mid',
        '{"extracted_answer": "red", "score": 4,\n "rationale": "cut',
    ],
)
def test_repaired(reply):
    assert single_verdict(reply)["score"] == 4


@pytest.mark.parametrize(
    "reply",
    [
        "", "4", "Score: 4", "[4]", '{"rationale": "no score"}', '{"score": null}',
        '{"score": true}', '{"score": "good"}', '{"score": [4]}', '{"score": 4', "{", "}{",
        '{"rationale": "the score is 4", "sco', '<think>{"score": 4} would be kind, but',
    ],
)  # fmt: skip
def test_malformed(reply):
    with pytest.raises(InvalidReply) as caught:
        single_verdict(reply)
    assert caught.value.kind == "malformed"


@pytest.mark.parametrize("score", ["0", "6", "-1", "4.5", "100", "1e400", "NaN", '"0"'])
def test_out_of_range(score):
    with pytest.raises(InvalidReply) as caught:
        single_verdict(f'{{"score": {score}}}')
    assert caught.value.kind == "out of range"


@pytest.mark.parametrize("unit", ['{"a":', "[", "{", "("])
def test_nonsense_of_any_depth_is_malformed(unit):
    with pytest.raises(InvalidReply) as caught:
        single_verdict("{" + unit * 2000)
    assert caught.value.kind == "malformed"


def test_scale():
    assert [rescaled(score) for score in range(1, 6)] == [0, 0.25, 0.5, 0.75, 1]


def test_pairs():
    result = pair_verdict('{"rationale": "", "score_a": 5, "score_b": 2, "preferred": "a"}')
    assert (result["score_a"], result["score_b"], result["preferred"]) == (5, 2, "A")
    assert pair_verdict('{"score_a":1,"score_b":1,"preferred":"Tie"}')["preferred"] == "tie"
    with pytest.raises(InvalidReply):
        pair_verdict('{"score_a": 5, "score_b": 2, "preferred": "the first"}')
    with pytest.raises(InvalidReply):
        pair_verdict('{"score_a": 5, "score_b": 9, "preferred": "A"}')


def test_the_judge_gets_the_task_and_no_names():
    for task, word in ((CAPTION, "description"), (QUESTION, "question")):
        system, user = single_messages(task, "a ring")
        assert word in system["content"]
        assert all(part in user["content"] for part in (task.prompt, task.reference, "a ring"))
        for text in (system["content"], *(m["content"] for m in pair_messages(task, "a", "b"))):
            for name in ("baseline", "adapter", "direct", "V2L", "LoRA", "model"):
                assert name.lower() not in text.lower()


def test_cached_judgments_belong_to_the_wording():
    """VERSION is part of the cache keys: increase it, and this digest, with any new wording."""
    wording = [CORRECTION]
    for task in (CAPTION, QUESTION):
        wording += single_messages(task, "x") + pair_messages(task, "x", "y")
    digest = hashlib.sha256(json.dumps(wording).encode()).hexdigest()
    assert (VERSION, digest[:16]) == (1, "ce8aa061e74e570d")


def test_a_verdict_about_two_conversations_needs_every_criterion():
    scores = dict.fromkeys(CRITERIA, "4/5")
    reply = json.dumps({"a": scores, "b": scores, "preferred": "Tie"})
    verdict = conversation_verdict(f"<think>A</think>```json\n{reply}\n```")
    assert verdict["preferred"] == "tie" and set(verdict["a"].values()) == {4}
    for broken in ({"a": scores, "preferred": "A"}, {"a": scores, "b": {}, "preferred": "B"},
                   {"a": scores, "b": scores, "preferred": "C"}):  # fmt: skip
        with pytest.raises(InvalidReply):
            conversation_verdict(json.dumps(broken))
