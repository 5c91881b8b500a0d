"""Systems on recorded dialogs: replays, a judge in both orders, strata, and resuming."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.evaluation.judge_stub import Reply, StubJudge
from v2l_fast.conversation import CperSettings, LexiconModel, Models, Schema
from v2l_fast.conversation.models import ModelReply, NgramEncoder
from v2l_fast.data.dialogs import AnnotatedPreference, Dialog
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.judge import CRITERIA
from v2l_fast.evaluation.preference import DialogSystem, PairJudge, Replay, compare_on_dialogs
from v2l_fast.outputs import Journal

MOVIES = Schema.load("movies")
SAID = ("A drama, please.", "For mood, dark.", "Alone.", "With subtitles.", "A classic.", "Short.")


def dialogs(count: int = 4) -> list[Dialog]:
    """Short ones of 3 pairs and, every other one, long ones of 12."""
    return [
        Dialog(
            str(i), "", tuple((SAID[(i + j) % len(SAID)], f"I see {j}.") for j in range(n)),
            (AnnotatedPreference("a drama", "MOVIE_GENRE_OR_CATEGORY", 0),),
            strategies=(("Question",), *((),) * (n - 1)),
        )
        for i in range(count)
        for n in [12 if i % 2 else 3]
    ]  # fmt: skip


def replay(**options) -> Replay:
    return Replay(Models(LexiconModel("uniform"), NgramEncoder()), MOVIES, **options)


def systems(*names: str) -> list[DialogSystem]:
    return [DialogSystem.parse(name) for name in names]


class ScriptedJudge:
    """Prefers the conversation that ``choose(a, b)`` names."""

    def __init__(self, choose):
        self.choose, self.seen = choose, []

    def complete(self, messages, **options):
        data = json.loads(messages[1]["content"])
        a, b = data["conversation_a"], data["conversation_b"]
        self.seen.append(messages)
        scores = [dict.fromkeys(CRITERIA, 4 if side else 2) for side in (True, False)]
        return [ModelReply(json.dumps({"a": scores[0], "b": scores[1],
                                       "preferred": self.choose(a, b)}))]  # fmt: skip


def asks(talk) -> bool:
    return talk[-1]["assistant"].endswith("?")


def prefers_questions(a, b) -> str:
    return "tie" if asks(a) == asks(b) else "A" if asks(a) else "B"


def test_every_system_replays_every_dialog(tmp_path):
    names = ("cper", "slots", "plain", "selfrefine", "always", "never", "random", "shuffled",
             "oracle", "slots candidates=2 selection=false")  # fmt: skip
    record = compare_on_dialogs(dialogs(2), systems(*names), replay(), None, tmp_path)
    assert set(record["systems"]) == set(names) and record["preferences"] == {}
    own = record["systems"]
    assert {measures["turns"] for measures in own.values()} == {15}
    assert own["never"]["asking"] == own["plain"]["asking"] == 0 and own["always"]["asking"] == 1
    assert own["plain"]["calls"] == 1 and own["selfrefine"]["calls"] == 3
    assert 5 < own["cper"]["calls"] <= 8 and own["slots candidates=2 selection=false"]["calls"] <= 4
    assert own["slots"]["annotated preferences recalled"] is not None
    assert own["slots"]["asking where the recorded strategy is a question"] == 1
    assert "selfrefine" in (tmp_path / "table.md").read_text()
    replies = Journal(tmp_path / "replies.jsonl")
    cper, shuffled = ([t["gap"] for t in replies[f"{name}/1"]] for name in ("cper", "shuffled"))
    assert len(cper) == len(shuffled) == 12


def test_a_recorded_history_replaces_the_systems_own(tmp_path):
    seen = []

    class Spy(LexiconModel):
        def complete(self, messages, **options):
            seen.append(json.loads(messages[1]["content"]))
            return super().complete(messages, **options)

    own = Replay(Models(Spy(), NgramEncoder()), MOVIES, history="recorded")
    own.play(systems("slots")[0], dialogs(1)[0])
    assert seen[-1]["history"][0]["assistant"] == "I see 0."


def test_the_nearest_unused_turn_answers_a_question():
    talk = Dialog("d", "", (("Hello.", "x"), ("I am alone.", "y"),
                            ("Which genre, a drama.", "z")))  # fmt: skip
    turns = replay(person="nearest").play(systems("slots")[0], talk)
    assert turns[0]["reply"] == MOVIES.slots["genre"].question
    assert turns[1]["user"] == "Which genre, a drama."


def test_the_judge_reads_both_orders_and_a_preference_counts_in_both(tmp_path):
    judge = ScriptedJudge(prefers_questions)
    record = compare_on_dialogs(
        dialogs(), systems("always", "plain"), replay(), judge, tmp_path, names=("r", "j"),
        judged_turns=2,
    )  # fmt: skip
    result = record["preferences"]["always"]
    assert (result["pairs"], result["wins"], result["losses"]) == (8, 8, 0)
    assert result["share"]["estimate"] == 1.0 and result["share"]["low"] < 1
    assert result["orders disagree"] == 0 and len(judge.seen) == 16
    assert result["conversations"]["won"] == 4
    assert {name: part["pairs"] for name, part in result["strata"].items()} == {
        "short": 4, "long": 4,
    }  # fmt: skip
    assert result["long minus short"]["estimate"] == 0
    # The judge gives A more, whichever it is: in both orders that is nothing.
    assert all(interval["estimate"] == 0 for interval in result["scores"].values())
    texts = "".join(json.dumps(messages) for messages in judge.seen)
    assert "always" not in texts.replace("always (", "") and '"plain"' not in texts


def test_a_judge_that_prefers_a_place_gives_ties_and_is_reported(tmp_path):
    record = compare_on_dialogs(
        dialogs(), systems("always", "plain"), replay(), ScriptedJudge(lambda a, b: "A"), tmp_path
    )
    result = record["preferences"]["always"]
    assert result["ties"] == result["pairs"] and result["orders disagree"] == 1
    assert result["share"]["estimate"] == 0.5 and result["wins for each loss"] is None


def test_a_reply_that_cannot_be_read_is_corrected_and_then_counted_as_failed(tmp_path):
    class Broken:
        calls = 0

        def complete(self, messages, **options):
            self.calls += 1
            return [ModelReply("no")]

    judge = PairJudge(Broken(), "j", Journal())
    assert judge.compare([], []) is None and judge.model.calls == 6


def test_an_interrupted_comparison_judges_no_pair_again(tmp_path):
    judge = ScriptedJudge(prefers_questions)

    class Interrupted(ScriptedJudge):
        def complete(self, messages, **options):
            if len(self.seen) == 5:
                raise KeyboardInterrupt
            return super().complete(messages, **options)

    arguments = (dialogs(), systems("always", "plain"), replay())
    first = Interrupted(prefers_questions)
    with pytest.raises(KeyboardInterrupt):
        compare_on_dialogs(*arguments, first, tmp_path)
    # A crash may cut the last line short.
    path = tmp_path / "judgments.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    compare_on_dialogs(*arguments, judge, tmp_path)
    seen = [json.dumps(messages) for messages in [*first.seen[:-1], *judge.seen]]
    assert len(seen) == len(set(seen)) == 2 * 4 * 3
    again = ScriptedJudge(prefers_questions)
    compare_on_dialogs(*arguments, again, tmp_path)
    assert again.seen == []


def test_another_comparison_in_the_same_folder_is_refused(tmp_path):
    compare_on_dialogs(dialogs(1), systems("plain"), replay(), None, tmp_path)
    with pytest.raises(ConfigError, match="history"):
        compare_on_dialogs(dialogs(1), systems("plain"), replay(history="recorded"), None, tmp_path)


@pytest.mark.parametrize(
    ("names", "judge", "match"),
    [(("shuffled",), None, "needs the system cper"), (("cper",), object(), "baseline")],
)
def test_a_system_that_needs_another_says_so(tmp_path, names, judge, match):
    with pytest.raises(ConfigError, match=match):
        compare_on_dialogs(dialogs(1), systems(*names), replay(), judge, tmp_path)


@pytest.mark.parametrize("text", ["best", "cper n=3", "cper candidates=x", "slots feedback=3"])
def test_unknown_systems_and_settings_are_refused(text):
    with pytest.raises(ConfigError):
        DialogSystem.parse(text)


def test_settings_are_read_from_text():
    system = DialogSystem.parse("cper candidates=3 beta=0 feedback=false window=4")
    assert system.settings == CperSettings.faithful(
        candidates=3, beta=0.0, feedback=False, window=4
    )


@pytest.mark.slow
def test_a_killed_comparison_sends_no_judgment_twice(tmp_path):
    """The command itself, killed with SIGKILL while it judges, and repeated."""
    scores = dict.fromkeys(CRITERIA, 3)
    verdict = json.dumps({"a": scores, "b": scores, "preferred": "tie"})

    def behave(request, attempt):
        data = json.loads(request["messages"][1]["content"])
        if "conversation_a" in data:
            return Reply(verdict, delay=0.05)
        return Reply(json.dumps({"text": f"Hm {len(data['history'])}.", "action": "answer"}))

    stub = StubJudge(behave)
    turns = [{"user_input": f"Hi {i}", "response": "Hello."} for i in range(6)]
    path = tmp_path / "dialogs.json"
    path.write_text(json.dumps([{"conversation_id": i, "turns": turns[i:]} for i in range(4)]))
    command = [
        sys.executable, "-m", "v2l_fast", "cper", "evaluate", str(path), "--reasoner", stub.url,
        "--reasoner-model", "r", "--judge", stub.url, "--judge-model", "j", "--encoder", "ngrams",
        "--systems", "plain,selfrefine", "--out", str(tmp_path / "out"),
    ]  # fmt: skip

    def judged() -> list[str]:
        texts = [r["messages"][1]["content"] for r in stub.requests]
        return [text for text in texts if "conversation_a" in text]

    try:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(judged()) < 7 and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        replayed = len(stub.requests) - len(judged())
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        texts = judged()
        # One judgment was under way when the process was killed.
        assert len(texts) - len(set(texts)) <= 1
        assert len(stub.requests) - len(texts) == replayed
    finally:
        stub.close()
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["preferences"]["selfrefine"]["pairs"] == 4 * 3
