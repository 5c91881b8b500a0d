"""Measures whether asking helps, on simulated people whose true gap is known.

Responsible for statistics, thresholds and the page; the worlds and conversations are those of
`v2l_fast.conversation.simulate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from v2l_fast.conversation.gap import knowledge_gap
from v2l_fast.conversation.models import Encoder
from v2l_fast.conversation.policy import CperSettings, Policy
from v2l_fast.conversation.prompts import Guess
from v2l_fast.conversation.schema import Schema
from v2l_fast.conversation.simulate import (
    ARMS,
    Arm,
    Conversation,
    simulate,
    simulate_shuffled,
)
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.report import interval_text, markdown_table
from v2l_fast.evaluation.statistics import auroc, mean_interval, paired_difference, share
from v2l_fast.files import write_text

TURNS = 7
# Conversations of people who change their mind or avoid questions last longer.
VARIANTS: Mapping[str, dict[str, Any]] = {
    "cooperative": {},
    "confident guesses": {"guess": "peaked"},
    "evasive, half of the questions": {"evasive": 0.5, "turns": 14},
    "changes a preference in turn 6": {"change": 5, "turns": 10},
}


def evaluate_preferences(schema: Schema, users: int, seed: int = 0) -> dict[str, Any]:
    """Simulated people with hidden preferences, in every arm and variant.

    Args:
        users: number of people; each appears in every arm.

    Returns:
        A JSON-ready record; intervals are 95% over people.
    """
    return {
        "world": "preferences",
        "schema": schema.name,
        "users": users,
        "seed": seed,
        "variants": {
            name: _variant(schema, users, seed, **options) for name, options in VARIANTS.items()
        },
        "printed gap": _shuffled(schema, users, seed),
    }


def _variant(
    schema: Schema,
    users: int,
    seed: int,
    guess: Guess = "uniform",
    turns: int = TURNS,
    evasive: float = 0.0,
    change: int | None = None,
) -> dict[str, Any]:
    talks: dict[Arm, list[Conversation]] = {arm: [] for arm in ARMS}
    for arm, talk in simulate(
        schema, users, turns=turns, guess=guess, seed=seed, evasive=evasive, change=change
    ):
        talks[arm].append(talk)
    last = {arm: [talk.true_gaps[-1] for talk in talks[arm]] for arm in ARMS}
    return {
        "turns": turns,
        "true gap by turn": {
            arm: np.mean([talk.true_gaps for talk in talks[arm]], axis=0).tolist() for arm in ARMS
        },
        "gap of slots by turn": {arm: _means(talks[arm], _slot_gap) for arm in ARMS},
        "gap of the paper by turn": {arm: _means(talks[arm], _paper_gap) for arm in ARMS},
        "true gap at the end": {arm: asdict(mean_interval(last[arm])) for arm in ARMS},
        "random minus targeted": asdict(paired_difference(last["random"], last["targeted"])),
        "off minus targeted": asdict(paired_difference(last["off"], last["targeted"])),
        "questions": {
            arm: float(np.mean([len(talk.was_missing) for talk in talks[arm]])) for arm in ARMS
        },
        "asked about something missing": share(
            [missing for talk in talks["targeted"] for missing in talk.was_missing]
        ),
        "utility": {
            arm: asdict(mean_interval([talk.utility for talk in talks[arm]])) for arm in ARMS
        },
        "regret": {arm: float(np.mean([talk.regret for talk in talks[arm]])) for arm in ARMS},
        "turns to a true gap of 0.1": {arm: _turns_to(talks[arm], 0.1) for arm in ARMS},
        "asking when nothing is missing": {arm: _over_asking(talks[arm]) for arm in ARMS},
        "facts that are true": {
            arm: float(np.mean([talk.true_facts for talk in talks[arm]])) for arm in ARMS
        },
        "auroc for something missing": {
            "gap of slots": _auroc(talks["targeted"], _slot_gap),
            "gap of the paper": _auroc(talks["targeted"], _paper_gap),
        },
        "rank correlation with the true gap": {
            "gap of slots": _spearman(talks["targeted"] + talks["off"], _slot_gap),
            "gap of the paper": _spearman(talks["targeted"] + talks["off"], _paper_gap),
        },
    }


def _shuffled(schema: Schema, users: int, seed: int) -> dict[str, Any]:
    """Utility with the gap printed to a model that obeys it, and with another turn's number."""
    record: dict[str, Any] = {}
    policies: tuple[Policy, ...] = ("model", "slots")
    for policy in policies:
        pairs = list(simulate_shuffled(schema, users, TURNS, seed, policy))
        own, shuffled = ([talk.utility for talk in talks] for talks in zip(*pairs, strict=True))
        record[policy] = {
            "utility": asdict(mean_interval(own)),
            "with shuffled numbers": asdict(mean_interval(shuffled)),
            "difference": asdict(paired_difference(own, shuffled)),
        }
    return record


def _turns_to(talks: Sequence[Conversation], gap: float) -> float | None:
    """Mean number of turns until the true gap is at most ``gap``, if it becomes so."""
    reached = [
        next((turn + 1 for turn, value in enumerate(talk.true_gaps) if value <= gap), None)
        for talk in talks
    ]
    turns = [turn for turn in reached if turn is not None]
    return float(np.mean(turns)) if turns else None


def _over_asking(talks: Sequence[Conversation]) -> float | None:
    """Share of the turns without a true gap that ask nevertheless."""
    return share(
        [
            target is not None
            for talk in talks
            for gap, target in zip(talk.true_gaps, talk.targets, strict=True)
            if gap == 0.0
        ]
    )


def _auroc(talks: Sequence[Conversation], values: Any) -> float | None:
    """AUROC of a measured gap for turns with a true gap against turns without."""
    pairs = [pair for talk in talks for pair in zip(values(talk), talk.true_gaps, strict=True)]
    area = auroc([v for v, gap in pairs if gap > 0], [v for v, gap in pairs if gap == 0])
    return None if np.isnan(area) else area


# --- thresholds -----------------------------------------------------------------------------------


def calibrate(
    schema: Schema,
    encoder: Encoder,
    settings: CperSettings,
    *,
    ask_rate: float | None = None,
    question_cost: float | None = None,
    error_rate: float | None = None,
    users: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Determine a threshold on the gap from simulated people.

    Pass exactly one of the rules ``ask_rate``, ``question_cost`` and ``error_rate``.

    Args:
        settings: its ``gap`` is measured; None stands for "cper".
        ask_rate: share of the turns in which to ask; the threshold is a quantile of the gap.
        question_cost: maximize the utility minus this cost for every question.
        error_rate: maximum probability that a turn which needs no question exceeds the threshold
            (conformal).

    Returns:
        A JSON-ready record with "threshold" and what it belongs to; see
        :meth:`CperSettings.with_threshold`.

    Raises:
        ConfigError: not exactly one rule is passed, its value is out of range, or there are too few
            people for ``error_rate``.
    """
    rules = {"ask_rate": ask_rate, "question_cost": question_cost, "error_rate": error_rate}
    passed = {name: value for name, value in rules.items() if value is not None}
    if len(passed) != 1:
        raise ConfigError(f"name exactly one of {', '.join(rules)}, got {len(passed)}")
    ((rule, value),) = passed.items()
    if not 0 < value < 1:
        raise ConfigError(f"{rule} must be between 0 and 1, got {value}")
    settings = replace(settings, gap=settings.gap or "cper", max_questions=None)
    talks = [
        talk
        for _, talk in simulate(
            schema, users, ("targeted",), TURNS, settings, seed=seed, encoder=encoder,
            volunteers=None,
        )
    ]  # fmt: skip
    gaps = [gap.value for talk in talks for gap in talk.gaps]
    if ask_rate is not None:
        threshold = float(np.quantile(gaps, 1 - ask_rate))
    elif error_rate is not None:
        threshold = _conformal(talks, error_rate)
    else:
        candidates = np.quantile(gaps, np.linspace(0.05, 0.95, 10))
        assert question_cost is not None
        threshold = max(
            (float(c) for c in candidates),
            key=lambda c: _net_utility(schema, encoder, settings, c, question_cost, users, seed),
        )
    return {
        "threshold": threshold, "rule": rule, rule: value, "gap": settings.gap,
        "encoder": encoder.fingerprint, **settings.calibrated_by(),
        "schema": schema.name, "users": users, "turns": len(gaps), "seed": seed,
    }  # fmt: skip


def _conformal(talks: Sequence[Conversation], error_rate: float) -> float:
    settled = sorted(
        gap.value
        for talk in talks
        for gap, true in zip(talk.gaps, talk.true_gaps, strict=True)
        if true == 0.0
    )
    rank = math.ceil((len(settled) + 1) * (1 - error_rate))
    if rank > len(settled):
        raise ConfigError(
            f"error_rate={error_rate} needs more turns in which nothing is missing than "
            f"{len(settled)}; simulate more people"
        )
    return settled[rank - 1]


def _net_utility(
    schema: Schema,
    encoder: Encoder,
    settings: CperSettings,
    threshold: float,
    cost: float,
    users: int,
    seed: int,
) -> float:
    settings = replace(settings, policy="threshold", threshold=threshold)
    talks = simulate(
        schema, users, ("targeted",), TURNS, settings, seed=seed, encoder=encoder, volunteers=None
    )
    return float(np.mean([talk.utility - cost * len(talk.was_missing) for _, talk in talks]))


def _slot_gap(talk: Conversation) -> list[float]:
    return [gap.value for gap in talk.gaps]


def _paper_gap(talk: Conversation) -> list[float]:
    return [knowledge_gap(gap.uncertainty, gap.alignment) for gap in talk.gaps]


def _means(talks: Sequence[Conversation], values: Any) -> list[float]:
    return np.mean([values(talk) for talk in talks], axis=0).tolist()


def _spearman(talks: Sequence[Conversation], values: Any) -> float:
    from scipy.stats import spearmanr

    measured = [value for talk in talks for value in values(talk)]
    true = [value for talk in talks for value in talk.true_gaps]
    return float(spearmanr(measured, true).statistic)


# --- the page -------------------------------------------------------------------------------------

_INTRODUCTION = """# Conversations that ask

CPER finds what it does not know about the person it talks to, asks, and answers for that person.
This page measures it on simulated people, whose preferences are hidden from the system and known
to the measurement. No language model takes part: a reasoner without weights reads the words of the
schema. So the page shows whether gap, policy and memory work, and nothing about a language model's
skill.

`make report` writes the page from `runs/cper-*.json`; `make simulate` makes the records anew.
Brackets are 95% intervals over people or videos.
"""


def write_page(folder: Path, preferences: Mapping[str, Any], viewers: Mapping[str, Any]) -> Path:
    """Write ``README.md`` into a folder from the records of both worlds.

    Raises:
        WriteError: the file cannot be written.
    """
    parts = [_INTRODUCTION, _viewers_section(viewers), _preferences_section(preferences)]
    path = folder / "README.md"
    write_text(path, "\n".join(parts))
    return path


def _viewers_section(record: Mapping[str, Any]) -> str:
    names = {
        "other video": "asks, with another video's adapter",
        "guess": "guesses",
        "ask": "asks when its answers differ",
        "persona": "knows the viewer from before",
    }
    rows = [
        [
            title,
            interval_text(record["arms"][arm]["first question"]),
            interval_text(record["arms"][arm]["later questions"]),
            f"{record['arms'][arm]['questions asked']:.2f}",
        ]
        for arm, title in names.items()
    ]
    difference = record["ask minus guess"]
    first = interval_text(difference["first question"])
    later = interval_text(difference["later questions"])
    return f"""## Viewers of a video

`v2l cper simulate --world shapes`: {record["videos"]} videos of two objects with the default pair,
answers from the adapter alone. A viewer means one of the objects and asks four questions that name
neither ("What color is the object?").

{_table(["the system", "first question right", "three later ones right", "questions asked"], rows)}

Asking minus guessing: {first} on the first question,
{later} on the later ones.

{_referent_section(record)}"""


def _referent_section(record: Mapping[str, Any]) -> str:
    """Whether the uncertainty shows the ambiguity; a record of an earlier version has one number,
    of the first question."""
    areas = record["auroc of the uncertainty"]
    if not isinstance(areas, Mapping):
        areas = {"color": areas}
    persona = ""
    if "persona minus guess" in record:
        difference = record["persona minus guess"]
        persona = f"""With the persona of an earlier conversation, minus guessing:
{interval_text(difference["first question"])} and {interval_text(difference["later questions"])},
without a question.

"""
    return f"""{persona}Does the uncertainty of the sampled answers show that a question names no
object? AUROC for videos of two objects against {record["one-object videos"]} videos of one:

{_table(list(areas), [[f"{area:.3f}" for area in areas.values()]])}

Where it is near 0.5 the adapter names one of the two with confidence, and the ambiguity stays
unnoticed.
"""


def _preferences_section(record: Mapping[str, Any]) -> str:
    rows, validity = [], []
    for name, variant in record["variants"].items():
        ends = variant["true gap at the end"]
        rows.append(
            [
                name,
                str(variant["turns"]),
                *(interval_text(ends[arm]) for arm in ("off", "random", "targeted")),
                interval_text(variant["random minus targeted"]),
                f"{variant['questions']['targeted']:.1f}",
                f"{variant['asked about something missing']:.3f}",
            ]
        )
        correlation = variant["rank correlation with the true gap"]
        validity.append(
            [name, *(f"{correlation[kind]:.2f}" for kind in ("gap of the paper", "gap of slots"))]
        )
    first = record["variants"]["cooperative"]
    by_turn = [
        [title, *(f"{value:.2f}" for value in first[kind][arm])]
        for title, kind, arm in (
            ("true gap, nothing asked", "true gap by turn", "off"),
            ("the paper's gap, nothing asked", "gap of the paper by turn", "off"),
            ("gap of slots, nothing asked", "gap of slots by turn", "off"),
            ("true gap, targeted questions", "true gap by turn", "targeted"),
            ("the paper's gap, targeted questions", "gap of the paper by turn", "targeted"),
            ("gap of slots, targeted questions", "gap of slots by turn", "targeted"),
        )
    ]
    heads = ["people", "turns", "nothing asked", "random slots", "targeted",
             "random minus targeted", "questions", "about something missing"]  # fmt: skip
    turns = [str(turn + 1) for turn in range(first["turns"])]
    return f"""## People with hidden preferences

`v2l cper simulate --world preferences`: {record["users"]} people, schema `{record["schema"]}`, each
in every arm. The true gap is the weight of the preferences that the system does not know at the
end.

{_table(heads, rows)}

{_worth_section(record)}
**The paper's gap is no measure of what is missing.** It falls when nothing is asked and nothing is
learned, since a person who adds nothing agrees with what is known. The gap of slots counts what was
stated, and stays.

{_table(["by turn, cooperative people", *turns], by_turn)}

Rank correlation of a gap with the true gap, over all turns of people who are asked targeted
questions or none:

{_table(["people", "the paper's gap", "gap of slots"], validity)}
"""


def _worth_section(record: Mapping[str, Any]) -> str:
    """The section about utility; empty for a record of an earlier version."""
    if "printed gap" not in record:
        return ""
    worth = [
        [
            name,
            *(interval_text(variant["utility"][arm]) for arm in ("off", "random", "targeted")),
            *(f"{variant['questions'][arm]:.1f}" for arm in ("targeted", "always")),
            *(
                f"{variant['asking when nothing is missing'][arm] or 0:.2f}"
                for arm in ("targeted", "always")
            ),
        ]
        for name, variant in record["variants"].items()
    ]
    printed = [
        [title, *(interval_text(record["printed gap"][policy][kind])
                  for kind in ("utility", "with shuffled numbers", "difference"))]
        for title, policy in (
            ("a model that obeys the number", "model"),
            ("the policy of slots", "slots"),
        )
    ]  # fmt: skip
    return f"""What the answers are worth: at the end one of 200 movies is recommended. The utility
is the weighted share of the person's wishes that it has. Needless is the share of the turns without
a true gap in which a question is asked.

{
        _table(
            [
                "people",
                "nothing asked",
                "random slots",
                "targeted",
                "questions: targeted",
                "questions: always",
                "needless: targeted",
                "needless: always",
            ],
            worth,
        )
    }

Does the number drive anything? Each conversation again, with another turn's gap printed in place of
its own:

{_table(["decides", "utility", "with shuffled numbers", "difference"], printed)}
"""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table([dict(zip(heads, row, strict=True)) for row in rows])
