"""Language of the shapes world: captions, questions with answers, and scores of captions.

Responsible for wording and for the attributes that a caption states. Attribute accuracy complements
token-F1 because captions share most of their words: the caption of another video still reaches a
token-F1 near 0.6.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from v2l_fast.shapes.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, Scene, SceneObject

CAPTION_PROMPTS = (
    "Describe the video.",
    "What happens in the video?",
    "Caption this video.",
    "What happens?",
)
DETAIL_PROMPTS = ("What is in the video?", "What is in this video?")
QUESTION_KINDS = (
    "background",
    "count",
    "color",
    "shape",
    "size",
    "motion",
    "order",
    "binding",
)
PLACE_KINDS = ("start", "end")

_NUMBERS = ("zero", "one", "two", "three")
ORDINALS = ("first", "second", "third")
_OBJECT = re.compile(
    rf"\ba ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) "
    rf"(?:moves|stays) ({'|'.join(MOTIONS)})\b"
)
_BACKGROUND = re.compile(rf"\bon a ({'|'.join(BACKGROUNDS)}) background\b")


@dataclass(frozen=True)
class QAPair:
    """One question and its answer; `kind` is "caption", "details", one of QUESTION_KINDS or
    PLACE_KINDS."""

    kind: str
    question: str
    answer: str


def _phrase(item: SceneObject) -> str:
    verb = "stays" if item.motion == "still" else "moves"
    return f"a {item.size} {item.color} {item.shape} {verb} {item.motion}"


def caption(scene: Scene) -> str:
    """The reference caption of a scene."""
    phrases = [_phrase(item) for item in scene.objects]
    ground = f"on a {scene.background} background."
    if len(phrases) == 1:
        return f"{phrases[0]} {ground}"
    return ", ".join([f"first {phrases[0]}", *(f"then {text}" for text in phrases[1:]), ground])


def attributes(scene: Scene) -> dict[str, str]:
    """Everything that a caption states, by slot: background, count, and four names per object."""
    slots = {"background": scene.background, "count": str(len(scene.objects))}
    for index, item in enumerate(scene.objects):
        for name, value in zip(("size", "color", "shape", "motion"), item.attributes, strict=True):
            slots[f"{name}{index}"] = value
    return slots


def parse_caption(text: str) -> dict[str, str]:
    """The attributes that a text states, in the slots of :func:`attributes`."""
    text = " ".join(text.lower().split())
    slots: dict[str, str] = {}
    if ground := _BACKGROUND.search(text):
        slots["background"] = ground.group(1)
    objects = _OBJECT.findall(text)
    if objects:
        slots["count"] = str(len(objects))
    for index, names in enumerate(objects):
        for name, value in zip(("size", "color", "shape", "motion"), names, strict=True):
            slots[f"{name}{index}"] = value
    return slots


def _refer(scene: Scene, index: int) -> str:
    return "object" if len(scene.objects) == 1 else f"{ORDINALS[index]} object"


def _is_unique(scene: Scene, item: SceneObject, name: str) -> bool:
    """Whether no other object of the scene shares this attribute."""
    return sum(getattr(other, name) == getattr(item, name) for other in scene.objects) == 1


def _only_with(scene: Scene, name: str) -> bool:
    values = [getattr(item, name) for item in scene.objects]
    return len(set(values)) == len(values)


def question_kinds(scene: Scene) -> tuple[str, ...]:
    """The kinds of questions that apply; order and binding need objects of different shapes."""
    kinds = list(QUESTION_KINDS)
    if len(scene.objects) == 1 or not _only_with(scene, "shape"):
        kinds.remove("order")
    if not _only_with(scene, "shape"):
        kinds.remove("binding")
    return tuple(kinds)


def ask(scene: Scene, kind: str, rng: random.Random) -> QAPair:
    """A question of one kind about the scene, with its correct answer; `rng` selects the object."""
    index = rng.randrange(len(scene.objects))
    item = scene.objects[index]
    name = _refer(scene, index)
    match kind:
        case "caption":
            return QAPair(kind, rng.choice(CAPTION_PROMPTS), caption(scene))
        case "background":
            return QAPair(kind, "What color is the background?", scene.background)
        case "count":
            return QAPair(kind, "How many objects are there?", _NUMBERS[len(scene.objects)])
        case "color" | "shape" | "size":
            return QAPair(kind, f"What {kind} is the {name}?", getattr(item, kind))
        case "motion":
            return QAPair(kind, f"How does the {name} move?", item.motion)
        case "order":
            shapes = tuple(x.shape for x in scene.objects)
            one, other = rng.sample(shapes, 2)
            first = min(one, other, key=shapes.index)
            return QAPair(kind, f"Which comes first, the {one} or the {other}?", first)
        case "binding":
            attribute = rng.choice(("color", "size", "motion"))
            if attribute == "motion":
                return QAPair(kind, f"How does the {item.shape} move?", item.motion)
            return QAPair(kind, f"What {attribute} is the {item.shape}?", getattr(item, attribute))
        case "start" | "end":
            place = item.place(0.0 if kind == "start" else 1.0)
            return QAPair(kind, f"Where does the {name} {kind}?", " ".join(place))
    raise ValueError(f"unknown kind of question {kind!r}")


def ask_several(scene: Scene, count: int, rng: random.Random) -> list[QAPair]:
    """`count` questions of different kinds, as far as possible; order and binding are twice as
    likely as the others."""
    kinds = question_kinds(scene)
    weights = {kind: 2.0 if kind in ("order", "binding") else 1.0 for kind in kinds}
    pairs = []
    for _ in range(count):
        if not weights:
            weights = dict.fromkeys(kinds, 1.0)
        (kind,) = rng.choices(tuple(weights), tuple(weights.values()))
        del weights[kind]
        pairs.append(ask(scene, kind, rng))
    return pairs


# --- questions of the second stages ---------------------------------------------------------------

NONE = "none"
# Questions by attribute; {x} is the object. No hypernetwork is asked about an object with the last.
_ATTRIBUTE = ("What {k} is the {x}?", "Which {k} is the {x}?", "What is the {k} of the {x}?")
_MOTION = ("How does the {x} move?", "Where does the {x} move?", "What is the motion of the {x}?")
_SLOTS = ("size", "color", "shape", "motion")


def _about(
    kind: str, asked: str, name: str, answer: str, held_out: bool, rng: random.Random
) -> QAPair:
    wordings = _MOTION if asked == "motion" else _ATTRIBUTE
    text = rng.choice(wordings if held_out else wordings[:-1])
    return QAPair(kind, text.format(k=asked, x=name), answer)


def ask_bound(
    scene: Scene,
    rng: random.Random,
    held_out: bool = False,
    weights: Mapping[str, float] = MappingProxyType({}),
) -> QAPair | None:
    """A question about the only object of a shape or a color, or None if there is none.

    Args:
        held_out: also draw the wording that only the base model is trained on.
        weights: how often an attribute is asked about, relative to the others (default: 1).
    """
    options = [
        (name, item)
        for name in ("shape", "color")
        for item in scene.objects
        if _is_unique(scene, item, name)
    ]
    if not options:
        return None
    states, item = rng.choice(options)
    name = item.shape if states == "shape" else f"{item.color} object"
    # The motion is the hardest to learn: it is in no single frame.
    weights = {slot: 1.0 for slot in _SLOTS} | {"motion": 2.0} | weights
    slots = [slot for slot in _SLOTS if slot != states]
    (asked,) = rng.choices(slots, [weights[slot] for slot in slots])
    return _about("binding", asked, name, getattr(item, asked), held_out, rng)


def ask_absent(
    scene: Scene, rng: random.Random, held_out: bool = False, max_objects: int = 2
) -> QAPair:
    """A question about an object that the scene does not have; the answer is "none".

    Args:
        max_objects: the most objects of a scene; a question may name the next one of fewer.
    """
    fewer = len(scene.objects) < max_objects
    states = rng.choice(("shape", "color", "order")[: 3 if fewer else 2])
    if states == "shape":
        there = {item.shape for item in scene.objects}
        name = rng.choice([shape for shape in SHAPES if shape not in there])
    elif states == "color":
        there = {item.color for item in scene.objects}
        name = f"{rng.choice([color for color in COLORS if color not in there])} object"
    else:
        name = f"{ORDINALS[len(scene.objects)]} object"
    asked = rng.choice([slot for slot in _SLOTS if slot != states])
    return _about("absent", asked, name, NONE, held_out, rng)


def ask_last(scene: Scene, rng: random.Random) -> QAPair | None:
    """Which of two shapes comes second; None unless there are two objects, of different shapes."""
    if len(scene.objects) != 2 or not _only_with(scene, "shape"):
        return None
    one, other = rng.sample([item.shape for item in scene.objects], 2)
    question = f"Which comes second, the {one} or the {other}?"
    return QAPair("last", question, scene.objects[1].shape)


def ask_further(scene: Scene, rng: random.Random) -> QAPair:
    """Where an object starts or ends, which of two comes second, or the background's color in any
    wording: what the base model answers too, but no other function asks of a hypernetwork in
    training."""
    kind = rng.choice((*PLACE_KINDS, *PLACE_KINDS, "last", "background"))
    if kind == "background":
        return _about(kind, "color", "background", scene.background, True, rng)
    last = ask_last(scene, rng) if kind == "last" else None
    return last or ask(scene, kind if kind in PLACE_KINDS else "start", rng)


def ask_ordinal(scene: Scene, rng: random.Random) -> QAPair:
    """An attribute of the first, second or only object, in any wording."""
    index = rng.randrange(len(scene.objects))
    item, asked = scene.objects[index], rng.choice(_SLOTS)
    return _about(asked, asked, _refer(scene, index), getattr(item, asked), True, rng)


def ask_reworded(scene: Scene, rng: random.Random) -> QAPair:
    """As :func:`ask_ordinal`, in the wording that no hypernetwork is trained on."""
    index = rng.randrange(len(scene.objects))
    item, asked = scene.objects[index], rng.choice(_SLOTS)
    wording = (_MOTION if asked == "motion" else _ATTRIBUTE)[-1]
    question = wording.format(k=asked, x=_refer(scene, index))
    return QAPair(asked, question, getattr(item, asked))


# --- detailed descriptions ------------------------------------------------------------------------

_FACTS = 5


def describe(scene: Scene, rng: random.Random) -> QAPair:
    """A detailed description: random statements about the scene, in random order.

    A caption states neither the number of objects nor where they are and what is absent; a long
    description by a large model does.
    """
    statements = (
        _count_statement,
        _background_statement,
        _order_statement,
        _place_statement,
        _absence_statement,
        *(_attribute_statement,) * 5,
    )
    chosen = rng.sample(statements, _FACTS)
    return QAPair("details", rng.choice(DETAIL_PROMPTS), " ".join(s(scene, rng) for s in chosen))


def true_statements(scene: Scene) -> set[str]:
    """Every statement that a correct description of the scene may contain."""
    rng = random.Random(0)
    statements = {_count_statement(scene, rng), _background_statement(scene, rng)}
    for index, item in enumerate(scene.objects):
        statements.add(f"the {item.shape} comes {ORDINALS[index]}.")
        for kind, progress in (("start", 0.0), ("end", 1.0)):
            place = " ".join(item.place(progress))
            statements.add(f"the {kind} of the {_refer(scene, index)} is {place}.")
        for (states, name), about in itertools.product(_names(scene, index).items(), _SLOTS):
            if about != states:
                statements.add(f"the {about} of the {name} is {getattr(item, about)}.")
    absent = [shape for shape in SHAPES if shape not in {item.shape for item in scene.objects}]
    for shape, about in itertools.product(absent, ("color", "size", "motion")):
        statements.add(f"the {about} of the {shape} is {NONE}.")
    return statements


def statement_hits(text: str, scene: Scene) -> tuple[int, int]:
    """(number of true statements, number of statements) of a detailed description."""
    stated = [f"{part.strip()}." for part in text.lower().split(".") if part.strip()]
    true = true_statements(scene)
    return sum(statement in true for statement in stated), max(1, len(stated))


def _names(scene: Scene, index: int) -> dict[str, str]:
    """The names of an object by the attribute that each states: "" for its place in the order, and
    its shape and color if no other object has them."""
    item = scene.objects[index]
    named = {"shape": item.shape, "color": f"{item.color} object"}
    unique = {states: name for states, name in named.items() if _is_unique(scene, item, states)}
    return {"": _refer(scene, index), **unique}


def _count_statement(scene: Scene, rng: random.Random) -> str:
    count = len(scene.objects)
    return f"there are {_NUMBERS[count]} objects." if count > 1 else "there is one object."


def _background_statement(scene: Scene, rng: random.Random) -> str:
    return f"the background is {scene.background}."


def _order_statement(scene: Scene, rng: random.Random) -> str:
    index = rng.randrange(len(scene.objects))
    return f"the {scene.objects[index].shape} comes {ORDINALS[index]}."


def _place_statement(scene: Scene, rng: random.Random) -> str:
    index, kind = rng.randrange(len(scene.objects)), rng.choice(PLACE_KINDS)
    place = " ".join(scene.objects[index].place(0.0 if kind == "start" else 1.0))
    return f"the {kind} of the {_refer(scene, index)} is {place}."


def _absence_statement(scene: Scene, rng: random.Random) -> str:
    there = {item.shape for item in scene.objects}
    shape = rng.choice([shape for shape in SHAPES if shape not in there])
    return f"the {rng.choice(('color', 'size', 'motion'))} of the {shape} is {NONE}."


def _attribute_statement(scene: Scene, rng: random.Random) -> str:
    """About an object by any of its names."""
    index = rng.randrange(len(scene.objects))
    item, names = scene.objects[index], _names(scene, index)
    states = rng.choice(tuple(names))
    about = rng.choice([slot for slot in _SLOTS if slot != states])
    return f"the {about} of the {names[states]} is {getattr(item, about)}."


# --- scoring --------------------------------------------------------------------------------------


def attribute_hits(text: str, scene: Scene) -> tuple[int, int]:
    """(number of the scene's attributes that the caption states correctly, number of all)."""
    expected, stated = attributes(scene), parse_caption(text)
    return sum(stated.get(slot) == value for slot, value in expected.items()), len(expected)


def plain(text: str) -> str:
    """Lower-case words without punctuation, for exact matches."""
    cleaned = "".join(c if c.isalnum() or c.isspace() else " " for c in text.lower())
    return " ".join(cleaned.split())
