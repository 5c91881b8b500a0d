"""Replays recorded dialogs with several systems, and compares the systems with a judge.

The person's turns come from the dialogs; each system sees its own replies as history, as in the
paper, or the recorded ones. A judge reads two conversations in both orders, without names; if the
two verdicts disagree, they count as a tie. Results are written to a folder as they arrive, so an
interrupted run repeats only the unit of work that it was interrupted in::

    run.json         what is compared; a folder with another comparison is refused
    replies.jsonl    one line for a system's replies to a dialog
    judgments.jsonl  one line for a judgment
    result.json, table.md
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from v2l_fast.conversation.cper import cper_turn
from v2l_fast.conversation.models import ChatModel, Message
from v2l_fast.conversation.persona import Persona, Statement
from v2l_fast.conversation.policy import CperSettings
from v2l_fast.conversation.prompts import ReplyError, correction, read_feedback, read_reply, request
from v2l_fast.conversation.schema import Schema
from v2l_fast.conversation.state import Models, State, Turn
from v2l_fast.data.dialogs import LONG, Dialog
from v2l_fast.errors import ConfigError, excerpt
from v2l_fast.evaluation.examples import token_f1
from v2l_fast.evaluation.judge import (
    CONVERSATION_VERSION,
    CRITERIA,
    InvalidReply,
    conversation_messages,
    conversation_verdict,
)
from v2l_fast.evaluation.report import interval_text, markdown_table
from v2l_fast.evaluation.statistics import Interval, ratio_interval, share
from v2l_fast.files import json_sha256, write_json, write_text
from v2l_fast.outputs import Journal, ResumableFolder
from v2l_fast.work_units import Progress, silent

Kind = Literal["cper", "slots", "plain", "selfrefine", "always", "never", "random", "shuffled",
               "oracle"]  # fmt: skip
_NO_PREFERENCE = "I have no preference."
# Turns of a conversation that a judge sees.
_JUDGED_WINDOW = 12


@dataclass(frozen=True)
class DialogSystem:
    """A system that replies to dialogs.

    Attributes:
        name: the text it was parsed from, such as "cper" or "slots candidates=3".
        kind: "cper" (the paper's loop), "slots" (the default), and the controls: "plain" (history
            only), "selfrefine" (no gap and no persona), "always" and "never" ask, "random" (a
            random slot as often), "shuffled" (the paper's loop, another turn's number is printed)
            and "oracle" (knows the annotated preferences from the start).
        settings: of the conversation.
    """

    name: str
    kind: Kind
    settings: CperSettings

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> DialogSystem:
        """Parse a kind with changed settings, such as "cper candidates=3 feedback=false".

        Raises:
            ConfigError: the kind or a setting is unknown.
        """
        kind, *changes = text.split()
        presets: dict[str, CperSettings] = {
            "cper": CperSettings.faithful(),
            "shuffled": CperSettings.faithful(),
            "always": CperSettings(policy="always", max_questions=None),
            "never": CperSettings(max_questions=0),
            "random": CperSettings(policy="random", max_questions=None),
            **dict.fromkeys(("slots", "plain", "selfrefine", "oracle"), CperSettings()),
        }
        if kind not in presets:
            raise ConfigError(f"unknown system {excerpt(kind)}; known: {', '.join(presets)}")
        fields = dict(change.partition("=")[::2] for change in changes)
        settings = replace(presets[kind].override(fields), seed=seed)
        return cls(text, cast(Kind, kind), settings)


@dataclass(frozen=True)
class Replay:
    """How dialogs are replayed.

    Attributes:
        models: reasoner and encoder, without an answerer.
        schema: the slots to know about the person; None for none.
        history: "own" replies of the system, or those "recorded" in the dialog.
        person: "recorded" turns in their order; "nearest" answers a question with the most
            similar unused turn (cosine of at least 0.4), or states no preference.
    """

    models: Models
    schema: Schema | None = None
    history: Literal["own", "recorded"] = "own"
    person: Literal["recorded", "nearest"] = "recorded"

    def play(
        self, system: DialogSystem, dialog: Dialog, printed: Sequence[float] | None = None
    ) -> list[dict[str, Any]]:
        """A system's turns of a dialog, JSON-ready.

        Args:
            printed: numbers to print in place of the gaps, one for each turn.
        """
        state = self._start(system, dialog)
        turns: list[dict[str, Any]] = []
        remaining = [user for user, _ in dialog.pairs]
        for index, (_, recorded) in enumerate(dialog.pairs):
            utterance = self._speak(remaining, turns)
            if system.kind in ("plain", "selfrefine"):
                state, turn = self._baseline(system, state, utterance)
            else:
                gap = None if printed is None else printed[index]
                state, reply = cper_turn(
                    state, utterance, self.models, system.settings, self.schema, printed_gap=gap
                )
                turn = {
                    "reply": reply.text, "action": reply.action, "gap": reply.gap.value,
                    "calls": reply.calls, "unreadable": len(reply.unreadable),
                    "tokens": reply.prompt_tokens + reply.new_tokens, "seconds": reply.seconds,
                    "facts": [fact.text for fact in reply.facts if fact.status == "active"],
                }  # fmt: skip
            turns.append({"user": utterance, **turn})
            if self.history == "recorded" and recorded:
                last = replace(state.turns[-1], reply=recorded)
                state = replace(state, turns=(*state.turns[:-1], last))
        return turns

    def _start(self, system: DialogSystem, dialog: Dialog) -> State:
        if system.kind != "oracle":
            return State()
        facts = [preference.text for preference in dialog.preferences]
        facts += [text for name, text in (dialog.metadata or {}).items() if name == "situation"]
        statements = [(Statement(f"said: {text}"), 1.0) for text in facts]
        return State(persona=Persona().update(statements, 0, None, None, 0.0)[0])

    def _speak(self, remaining: list[str], turns: Sequence[Mapping[str, Any]]) -> str:
        """Take the person's next turn out of the remaining ones."""
        if self.person == "recorded" or not turns or turns[-1]["action"] == "answer":
            return remaining.pop(0) if remaining else _NO_PREFERENCE
        if not remaining:
            return _NO_PREFERENCE
        vectors = self.models.encoder.encode([turns[-1]["reply"], *remaining])
        cosines = vectors[1:] @ vectors[0]
        best = int(cosines.argmax())
        return remaining.pop(best) if cosines[best] >= 0.4 else _NO_PREFERENCE

    def _baseline(
        self, system: DialogSystem, state: State, utterance: str
    ) -> tuple[State, dict[str, Any]]:
        """A turn without persona and gap: one reply, and for "selfrefine" its feedback and another
        reply."""
        window = system.settings.window or len(state.turns)
        history = [{"person": t.user, "assistant": t.reply} for t in state.turns[-window:]]
        cost = {"calls": 0, "tokens": 0, "unreadable": 0}

        def ask(
            name: str, data: Mapping[str, Any], read: Callable[[str], str], fallback: str
        ) -> str:
            common = {"utterance": utterance, "history": history, "facts": []}
            (reply,) = self.models.reasoner.complete(
                request(name, {**common, **data}), json=True,
                max_tokens=system.settings.max_tokens, seed=system.settings.seed,
            )  # fmt: skip
            cost["calls"] += 1
            cost["tokens"] += reply.prompt_tokens + reply.new_tokens
            try:
                return read(reply.text)
            except ReplyError:
                cost["unreadable"] += 1
                return fallback

        plain = {"draft": "", "feedback": "", "action": "answer", "target": None}
        text = ask("refine", plain, read_reply, "I see.")
        if system.kind == "selfrefine":
            gap = {"value": 0, "uncertainty": 0, "alignment": 0, "missing": {}}
            data = {"draft": text, "gap": gap, "action": "answer", "target": None}
            feedback = ask("feedback", data, lambda reply: read_feedback(reply).text, "")
            text = ask("refine", {**plain, "draft": text, "feedback": feedback}, read_reply, text)
        action = "ask" if text.rstrip().endswith("?") else "answer"
        state = replace(state, turns=(*state.turns, Turn(utterance, text, action, None)))
        return state, {"reply": text, "action": action, "gap": None, "facts": [], "seconds": None,
                       **cost}  # fmt: skip


def compare_on_dialogs(
    dialogs: Sequence[Dialog],
    systems: Sequence[DialogSystem],
    replay: Replay,
    judge: ChatModel | None,
    folder: Path,
    *,
    names: tuple[str, str] = ("", ""),
    baseline: str = "plain",
    judged_turns: int = 3,
    long: int = LONG,
    workers: int = 1,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Replay dialogs with every system, and let a judge compare each with the baseline.

    Args:
        judge: None measures without a judge.
        folder: folder of the results; an interrupted comparison continues in it.
        names: names of the reasoner and of the judge.
        judged_turns: number of turns that are judged in every dialog, the last one among them.
        long: number of pairs from which on a dialog is long.
        workers: number of dialogs and judgments at the same time.

    Returns:
        A JSON-ready record; intervals are 95% over dialogs.

    Raises:
        ConfigError: the folder holds another comparison, there are no dialogs, or a system that
            another one needs is missing.
        ModelError: a model does not reply; run again to continue.
    """
    if not dialogs:
        raise ConfigError("dialogs must not be empty")
    by_name = {system.name: system for system in systems}
    if judge is not None and baseline not in by_name:
        raise ConfigError(f"baseline must be one of the systems, got {baseline!r}")
    if any(s.kind == "shuffled" for s in systems) and "cper" not in by_name:
        raise ConfigError("the system shuffled needs the system cper, whose gaps it prints")
    ResumableFolder(folder, {
        "dialogs": json_sha256(*map(asdict, dialogs))[:16], "reasoner": names[0],
        "encoder": replay.models.encoder.fingerprint, "history": replay.history,
        "schema": replay.schema.name if replay.schema else None, "person": replay.person,
        "systems": {system.name: asdict(system.settings) for system in systems},
    })  # fmt: skip
    replies = Journal(folder / "replies.jsonl")
    ordered = sorted(systems, key=lambda system: system.kind == "shuffled")
    for number, system in enumerate(ordered):
        printed = _shuffled_gaps(replies, dialogs, seed) if system.kind == "shuffled" else {}
        missing = [d for d in dialogs if _key(system.name, d) not in replies]

        def play(dialog: Dialog, system=system, printed=printed) -> None:
            turns = replay.play(system, dialog, printed.get(dialog.id))
            replies.append({_key(system.name, dialog): turns})

        _each(play, missing, workers)
        progress("replaying", number + 1, len(systems))
    record: dict[str, Any] = {
        "dialogs": len(dialogs), "long dialogs": sum(len(d.pairs) >= long for d in dialogs),
        "long from": long, "reasoner": names[0], "judge": names[1] or None,
        "encoder": replay.models.encoder.fingerprint, "baseline": baseline,
        "history": replay.history, "person": replay.person,
        "systems": {s.name: _measures(replies, s, dialogs, replay) for s in systems},
        "preferences": {},
    }  # fmt: skip
    if judge is not None:
        pair_judge = PairJudge(judge, names[1], Journal(folder / "judgments.jsonl"))
        for number, system in enumerate(systems):
            if system.name != baseline:
                record["preferences"][system.name] = _preferences(
                    pair_judge, replies, system.name, baseline, dialogs, judged_turns, long, workers
                )
            progress("judging", number + 1, len(systems))
        record["same model judges"] = names[0] == names[1]
    write_json(folder / "result.json", record)
    write_text(folder / "table.md", comparison_tables(record))
    return record


def _key(system: str, dialog: Dialog) -> str:
    return f"{system}/{dialog.id}"


def _each(work: Callable[[Any], Any], items: Sequence[Any], workers: int) -> list[Any]:
    if workers == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, items))


def _shuffled_gaps(
    replies: Journal, dialogs: Sequence[Dialog], seed: int
) -> dict[str, list[float]]:
    """Dialog -> the gaps that the paper's loop measured in other turns, one for each turn."""
    own = {dialog.id: [t["gap"] for t in replies[_key("cper", dialog)]] for dialog in dialogs}
    pool = [gap for gaps in own.values() for gap in gaps]
    random.Random(seed).shuffle(pool)
    return {id_: [pool.pop() for _ in gaps] for id_, gaps in own.items()}


# --- measures without a judge ---------------------------------------------------------------------


def _measures(
    replies: Journal, system: DialogSystem, dialogs: Sequence[Dialog], replay: Replay
) -> dict[str, Any]:
    """Questions, cost, similarity to the recorded replies, and agreement with annotations."""
    by_dialog = [(dialog, replies[_key(system.name, dialog)]) for dialog in dialogs]
    turns = [turn for _, own in by_dialog for turn in own]
    seconds = [turn["seconds"] for turn in turns if turn["seconds"] is not None]
    f1, cosine, counts = [], [], []
    recalled, precise, gold, facts = [], [], [], []
    asking: dict[bool, list[bool]] = {True: [], False: []}
    for dialog, own in by_dialog:
        pairs = [(t["reply"], text) for t, (_, text) in zip(own, dialog.pairs, strict=True) if text]
        if pairs:
            vectors = replay.models.encoder.encode([text for pair in pairs for text in pair])
            cosine.append(float((vectors[::2] * vectors[1::2]).sum()))
            f1.append(sum(token_f1(*pair) for pair in pairs))
            counts.append(float(len(pairs)))
        texts = [fact for turn in own for fact in turn["facts"]]
        annotated = [preference.text for preference in dialog.preferences]
        if annotated and texts:
            matches = [[token_f1(fact, text) >= 0.5 for text in annotated] for fact in texts]
            recalled.append(float(np.any(matches, axis=0).sum()))
            precise.append(float(np.any(matches, axis=1).sum()))
        elif annotated:
            recalled.append(0.0)
            precise.append(0.0)
        if annotated:
            gold.append(float(len(annotated)))
            facts.append(float(max(len(texts), 1)))
        for turn, strategies in zip(own, dialog.strategies, strict=False):
            if strategies:
                asking["Question" in strategies].append(turn["action"] != "answer")
    return {
        "turns": len(turns),
        "asking": share([turn["action"] != "answer" for turn in turns]),
        "calls": float(np.mean([turn["calls"] for turn in turns])),
        "tokens": float(np.mean([turn["tokens"] for turn in turns])),
        "seconds": float(np.mean(seconds)) if seconds else None,
        "unreadable": sum(turn["unreadable"] for turn in turns),
        "token-F1 to the recorded reply": _ratio(f1, counts),
        "cosine to the recorded reply": _ratio(cosine, counts),
        "annotated preferences recalled": _ratio(recalled, gold),
        "facts that are annotated": _ratio(precise, facts),
        "asking where the recorded strategy is a question": share(asking[True]),
        "asking elsewhere": share(asking[False]),
    }


def _ratio(sums: Sequence[float], counts: Sequence[float]) -> dict[str, float] | None:
    return asdict(ratio_interval(sums, counts)) if counts else None


# --- the judge ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairOutcome:
    """One comparison in both orders.

    Attributes:
        preferred: 1 for the first conversation, -1 for the second, 0 for a tie.
        agreed: whether the verdicts of both orders agree.
        scores: criterion -> score of the first minus that of the second, on the judge's scale.
    """

    preferred: int
    agreed: bool
    scores: Mapping[str, float]


class PairJudge:
    """Compares two conversations, in both orders, through any chat model.

    Args:
        name: name of the model; the journal keeps judgments of different models apart.
        journal: the judgments so far.
    """

    def __init__(self, model: ChatModel, name: str, journal: Journal) -> None:
        self.model, self.name, self.journal = model, name, journal

    def compare(
        self, first: Sequence[Mapping[str, str]], second: Sequence[Mapping[str, str]]
    ) -> PairOutcome | None:
        """Compare two conversations; None if a judgment cannot be read."""
        forward, backward = self._judge(first, second), self._judge(second, first)
        if forward is None or backward is None:
            return None
        signs = {"A": 1, "B": -1, "tie": 0}
        verdict, swapped = signs[forward["preferred"]], -signs[backward["preferred"]]
        scores = {
            name: (
                forward["a"][name] - forward["b"][name] + backward["b"][name] - backward["a"][name]
            ) / 2
            for name in CRITERIA
        }  # fmt: skip
        agreed = verdict == swapped
        return PairOutcome(verdict if agreed else 0, agreed, scores)

    def _judge(
        self, a: Sequence[Mapping[str, str]], b: Sequence[Mapping[str, str]]
    ) -> dict[str, Any] | None:
        messages = conversation_messages(a, b)
        key = json_sha256(CONVERSATION_VERSION, self.name, messages)
        if key in self.journal:
            return self.journal[key]
        talk: list[Message] = list(messages)
        for _ in range(3):
            (reply,) = self.model.complete(talk, max_tokens=1024, json=True)
            try:
                verdict = conversation_verdict(reply.text)
            except InvalidReply as error:
                talk = correction(messages, reply.text, error)
            else:
                self.journal.append({key: verdict})
                return verdict
        return None


def _preferences(
    judge: PairJudge,
    replies: Journal,
    system: str,
    baseline: str,
    dialogs: Sequence[Dialog],
    judged_turns: int,
    long: int,
    workers: int,
) -> dict[str, Any]:
    units = [(dialog, end) for dialog in dialogs for end in _ends(len(dialog.pairs), judged_turns)]

    def compare(unit: tuple[Dialog, int]) -> PairOutcome | None:
        dialog, end = unit
        exchanges, other_exchanges = (
            [{"person": t["user"], "assistant": t["reply"]} for t in replies[_key(name, dialog)]]
            for name in (system, baseline)
        )
        start = max(end - _JUDGED_WINDOW, 0)
        return judge.compare(exchanges[start:end], other_exchanges[start:end])

    outcomes = _each(compare, units, workers)
    by_dialog: dict[str, list[PairOutcome]] = defaultdict(list)
    for (dialog, _), outcome in zip(units, outcomes, strict=True):
        if outcome is not None:
            by_dialog[dialog.id].append(outcome)
    if not by_dialog:
        return {"pairs": 0, "failed": len(units)}
    is_long = {dialog.id: len(dialog.pairs) >= long for dialog in dialogs}
    strata = {
        name: [own for id_, own in by_dialog.items() if is_long[id_] == value]
        for name, value in (("short", False), ("long", True))
    }
    return {
        "failed": sum(outcome is None for outcome in outcomes),
        **_outcomes(list(by_dialog.values())),
        "strata": {name: _outcomes(own) for name, own in strata.items() if own},
        "long minus short": _difference(strata["long"], strata["short"]),
    }


def _ends(pairs: int, count: int) -> list[int]:
    """Turns, counted from 1, after which a dialog is judged: the last one and others between."""
    return sorted({-(-pairs * (i + 1) // count) for i in range(count)} - {0})


def _outcomes(by_dialog: Sequence[Sequence[PairOutcome]]) -> dict[str, Any]:
    from scipy.stats import binomtest

    flat = [outcome for own in by_dialog for outcome in own]
    wins, losses = (sum(o.preferred == sign for o in flat) for sign in (1, -1))
    sums = [sum(o.preferred for o in own) for own in by_dialog]
    won, lost = sum(s > 0 for s in sums), sum(s < 0 for s in sums)
    counts = [float(len(own)) for own in by_dialog]
    return {
        "pairs": len(flat),
        "wins": wins,
        "ties": len(flat) - wins - losses,
        "losses": losses,
        "share": asdict(ratio_interval(_points(by_dialog), counts)),
        "wins for each loss": wins / losses if losses else None,
        "orders disagree": share([not o.agreed for o in flat]),
        "conversations": {
            "won": won, "tied": len(sums) - won - lost, "lost": lost,
            "p of the sign test": float(binomtest(won, won + lost).pvalue) if won + lost else None,
        },
        "scores": {
            name: asdict(
                ratio_interval(
                    [sum(o.scores[name] for o in own) for own in by_dialog], counts,
                    bounds=(-4.0, 4.0),
                )
            )
            for name in CRITERIA
        },
    }  # fmt: skip


def _points(by_dialog: Sequence[Sequence[PairOutcome]]) -> list[float]:
    """Number of wins plus half of the ties, per dialog."""
    return [sum((outcome.preferred + 1) / 2 for outcome in own) for own in by_dialog]


def _difference(
    first: Sequence[Sequence[PairOutcome]], second: Sequence[Sequence[PairOutcome]]
) -> dict[str, float] | None:
    """Share of the first minus that of the second, with dialogs resampled in each."""
    if not first or not second:
        return None
    rng = np.random.default_rng(0)
    estimates, samples = [], []
    for own in (first, second):
        points, counts = np.asarray(_points(own)), np.asarray([len(o) for o in own])
        picks = rng.integers(len(own), size=(9999, len(own)))
        estimates.append(points.sum() / counts.sum())
        samples.append(points[picks].sum(1) / counts[picks].sum(1))
    low, high = np.percentile(samples[0] - samples[1], [2.5, 97.5])
    return asdict(Interval(float(estimates[0] - estimates[1]), float(low), float(high)))


# --- tables ---------------------------------------------------------------------------------------


def comparison_tables(record: Mapping[str, Any]) -> str:
    """The record of :func:`compare_on_dialogs` as Markdown."""
    judge = record["judge"] or "no judge"
    lines = [
        f"{record['dialogs']} dialogs, {record['long dialogs']} of them with at least "
        f"{record['long from']} pairs; reasoner {record['reasoner']}, {judge}; history: "
        f"{record['history']}; the person's turns: {record['person']}.",
        markdown_table([{"system": name, **row} for name, row in record["systems"].items()]),
    ]
    rows = [
        {
            "system": name,
            "stratum": stratum,
            "pairs": part["pairs"],
            "wins / ties / losses": f"{part['wins']} / {part['ties']} / {part['losses']}",
            "share": interval_text(part["share"]),
            "wins for each loss": part["wins for each loss"],
            "orders disagree": part["orders disagree"],
        }
        for name, whole in record["preferences"].items()
        if whole["pairs"]
        for stratum, part in {"all": whole, **whole["strata"]}.items()
    ]
    if rows:
        lines.append(
            f"Against {record['baseline']}. A share counts half of the ties; 0.5 is no preference."
        )
        lines.append(markdown_table(rows))
    if record.get("same model judges"):
        lines.append("The judge is the model that wrote the replies.")
    return "\n\n".join(lines) + "\n"
