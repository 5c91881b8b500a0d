"""Does asking help? Tables of simulated people, for whom the true gap is known.

Worlds and conversations are `v2l_fast.conversation.simulate`'s; here are statistics and the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from v2l_fast.conversation.gap import knowledge_gap
from v2l_fast.conversation.prompts import Guess
from v2l_fast.conversation.schema import Schema
from v2l_fast.conversation.simulate import ARMS, Arm, Conversation, simulate
from v2l_fast.evaluation.report import interval_text, markdown_table
from v2l_fast.evaluation.statistics import mean_interval, paired_difference
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
        "asked about something missing": _share(
            [missing for talk in talks["targeted"] for missing in talk.was_missing]
        ),
        "rank correlation with the true gap": {
            "gap of slots": _spearman(talks["targeted"] + talks["off"], _slot_gap),
            "gap of the paper": _spearman(talks["targeted"] + talks["off"], _paper_gap),
        },
    }


def _slot_gap(talk: Conversation) -> list[float]:
    return [gap.value for gap in talk.gaps]


def _paper_gap(talk: Conversation) -> list[float]:
    return [knowledge_gap(gap.uncertainty, gap.alignment) for gap in talk.gaps]


def _means(talks: Sequence[Conversation], values: Any) -> list[float]:
    return np.mean([values(talk) for talk in talks], axis=0).tolist()


def _share(outcomes: Sequence[bool]) -> float | None:
    return float(np.mean(outcomes)) if outcomes else None


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

`v2l cper report` writes the page from `runs/cper-*.json`; `v2l cper simulate` makes the records.
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

`v2l cper simulate --world shapes`: {record["videos"]} videos of two objects with the shipped pair,
answers from the adapter alone. A viewer means one of the objects and asks four questions that name
neither ("What color is the object?").

{_table(["the system", "first question right", "three later ones right", "questions asked"], rows)}

Asking minus guessing: {first} on the first question,
{later} on the later ones. The uncertainty of the sampled answers
tells videos of two objects from those of one with an AUROC of
{record["auroc of the uncertainty"]:.3f} ({record["one-object videos"]} videos of one). It does so
for the question about color alone: asked how the object moves, what shape or what size it has, the
adapter names one of the two with confidence, and the ambiguity stays unnoticed.
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

**The paper's gap is no measure of what is missing.** It falls when nothing is asked and nothing is
learned, since a person who adds nothing agrees with what is known. The gap of slots counts what was
stated, and stays.

{_table(["by turn, cooperative people", *turns], by_turn)}

Rank correlation of a gap with the true gap, over all turns of people who are asked targeted
questions or none:

{_table(["people", "the paper's gap", "gap of slots"], validity)}
"""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table([dict(zip(heads, row, strict=True)) for row in rows])
