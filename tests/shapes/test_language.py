"""Captions state the scene, answers are true, and captions parse back."""

import random

import pytest

from v2l_fast.shapes.language import (
    CAPTION_PROMPTS,
    DETAIL_PROMPTS,
    NONE,
    PLACE_KINDS,
    QUESTION_KINDS,
    ask,
    ask_absent,
    ask_bound,
    ask_further,
    ask_reworded,
    ask_several,
    attribute_hits,
    attributes,
    caption,
    describe,
    parse_caption,
    plain,
    question_kinds,
    statement_hits,
    true_statements,
)
from v2l_fast.shapes.vlm import ADDED_WORDS, build_tokenizer
from v2l_fast.shapes.world import (
    COLORS,
    SIZES,
    Scene,
    SceneObject,
    sample_scenes,
    sample_varied_scenes,
)


def two() -> Scene:
    first = SceneObject("large", "red", "disc", "up", 0.17, (0.5, 0.5), 0.5)
    second = SceneObject("small", "cyan", "pillar", "still", 0.1, (0.5, 0.5), 0.5)
    return Scene("white", (first, second))


def test_wording():
    scene = two()
    assert caption(scene) == (
        "first a large red disc moves up, then a small cyan pillar stays still, "
        "on a white background."
    )
    assert caption(Scene("gray", scene.objects[:1])) == (
        "a large red disc moves up on a gray background."
    )


def test_captions_parse_back():
    for scene in sample_scenes("train", 400, 5):
        assert parse_caption(caption(scene)) == attributes(scene)
        assert attribute_hits(caption(scene), scene) == (2 + 4 * len(scene.objects),) * 2


def test_parsing_tolerates_other_text():
    assert parse_caption("nothing here") == {}
    assert parse_caption("A  LARGE red\nring moves Left") == {
        "count": "1",
        "size0": "large",
        "color0": "red",
        "shape0": "ring",
        "motion0": "left",
    }
    hits, total = attribute_hits("a large red ring moves up on a white background.", two())
    # Background, size, color and motion of the first are right; count, shape, the second are not.
    assert (hits, total) == (4, 10)


def test_answers_are_true():
    scene = two()
    rng = random.Random(0)
    expected = {
        "How many objects are there?": "two",
        "What color is the background?": "white",
        "What color is the first object?": "red",
        "What size is the second object?": "small",
        "How does the second object move?": "still",
        "What color is the pillar?": "cyan",
        "How does the disc move?": "up",
        "Which comes first, the disc or the pillar?": "disc",
        "Which comes first, the pillar or the disc?": "disc",
        "Where does the first object start?": "bottom center",
        "Where does the first object end?": "top center",
    }
    heard = {}
    for _ in range(40):
        for kind in (*QUESTION_KINDS, *PLACE_KINDS):
            turn = ask(scene, kind, rng)
            heard[turn.question] = turn.answer
    assert {q: heard[q] for q in expected} == expected
    assert ask(scene, "caption", rng).question in CAPTION_PROMPTS


def test_only_askable_kinds():
    disc, pillar = two().objects
    assert "order" not in question_kinds(Scene("black", (disc,)))
    assert "binding" in question_kinds(Scene("black", (disc,)))
    same = Scene("black", (disc, disc))
    assert not {"order", "binding"} & set(question_kinds(same))
    with pytest.raises(ValueError, match="unknown kind"):
        ask(same, "weather", random.Random(0))


def test_several_questions_differ_in_kind():
    turns = ask_several(two(), 8, random.Random(1))
    assert sorted(turn.kind for turn in turns) == sorted(QUESTION_KINDS)
    assert len(ask_several(two(), 11, random.Random(1))) == 11


def test_plain_ignores_case_and_punctuation():
    assert plain(" Top  left. ") == plain("top left")


def test_weights_of_the_attributes_that_are_asked_about():
    rng = random.Random(0)
    for scene in sample_scenes("train", 50, 1):
        bound = ask_bound(scene, rng, weights={"color": 1e9, "size": 1e5})
        if bound is not None:
            by_color = set(COLORS) & set(plain(bound.question).split())
            assert bound.answer in (SIZES if by_color else COLORS)


def test_questions_by_name_and_about_absent_objects_have_right_answers(tokenizer):
    rng = random.Random(0)
    words = build_tokenizer(ADDED_WORDS)
    for scene in sample_scenes("train", 200, 1):
        for _ in range(3):
            absent = ask_absent(scene, rng, held_out=True)
            assert absent.answer == NONE
            for item in scene.objects:
                named = plain(absent.question).split()
                assert item.shape not in named and item.color not in named
            bound = ask_bound(scene, rng, held_out=True)
            if bound is not None:
                (item,) = [
                    item
                    for item in scene.objects
                    if {item.shape, item.color} & set(plain(bound.question).split())
                ]
                assert bound.answer in item.attributes
            for pair in (absent, ask_reworded(scene, rng), bound or absent):
                ids = words(f"{pair.question} {pair.answer}")["input_ids"]
                assert words.unk_token_id not in ids
    assert len(words) == len(tokenizer) + len(ADDED_WORDS)


def test_descriptions_state_what_is_so():
    for number, scene in enumerate(sample_varied_scenes("val", 100, 0)):
        pair = describe(scene, random.Random(number))
        assert pair.kind == "details" and pair.question in DETAIL_PROMPTS
        statements = pair.answer.removesuffix(".").split(". ")
        assert len(statements) == 5
        assert statement_hits(pair.answer, scene) == (5, 5)


def test_statements_that_are_not_so_do_not_count():
    scene = sample_varied_scenes("val", 1, 0, objects=(2,))[0]
    first, second = scene.objects
    text = f"there are two objects. the color of the second object is {second.color}. a ring. "
    assert statement_hits(text, scene) == (2, 3)
    wrong = "red" if first.color != "red" else "blue"
    assert statement_hits(f"the color of the first object is {wrong}.", scene) == (0, 1)
    assert statement_hits("", scene) == (0, 1)


def test_a_sentence_that_only_repeats_a_name_is_no_statement():
    true = true_statements(two())
    assert {"the color of the disc is red.", "the shape of the red object is disc."} <= true
    assert not {"the shape of the disc is disc.", "the color of the red object is red."} & true


def test_further_questions_have_right_answers_and_every_kind():
    first, second = two().objects
    seen = set()
    for seed in range(100):
        pair = ask_further(two(), random.Random(seed))
        seen.add(pair.kind)
        if pair.kind == "background":
            assert pair.answer == two().background and "background" in pair.question
        elif pair.kind == "last":
            assert pair.answer == second.shape and "second" in pair.question
        else:
            item = first if "first" in pair.question else second
            assert pair.answer == " ".join(item.place(0.0 if pair.kind == "start" else 1.0))
    assert seen == {*PLACE_KINDS, "last", "background"}


def test_an_absent_object_may_be_the_next_one():
    for scene in sample_varied_scenes("val", 60, 1):
        ordinals = ("first", "second", "third")
        questions = [ask_absent(scene, random.Random(i), False, 3).question for i in range(12)]
        named = {word for text in questions for word in ordinals if f"the {word} object" in text}
        count = len(scene.objects)
        assert named <= {ordinals[count]} if count < 3 else not named
