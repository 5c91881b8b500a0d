"""What comes with the package: small, complete, and right about videos it never saw."""

import json
import random

import pytest

from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.evaluate import encoded_clips
from v2l_fast.shapes.language import ask, attribute_hits, plain
from v2l_fast.shapes.probes import binding_probes, sampled_clips
from v2l_fast.shapes.vlm import ASSETS, BASE_FOLDER
from v2l_fast.shapes.world import SHAPES, sample_scenes

VIDEOS = 24


@pytest.fixture(scope="module")
def model():
    return Video2LoRA.from_pretrained("shapes", device="cpu")


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes("test", VIDEOS, 11)


@pytest.fixture(scope="module")
def clips(scenes):
    return encoded_clips(scenes)


@pytest.fixture(scope="module")
def adapters(model, clips):
    return model.internalize(clips)


def attribute_share(texts, scenes):
    hits = [attribute_hits(text, scene) for text, scene in zip(texts, scenes, strict=True)]
    return sum(h for h, _ in hits) / sum(n for _, n in hits)


def test_the_pair_for_any_duration_reads_slow_clips(scenes):
    pair = Video2LoRA.from_pretrained("shapes-any", device="cpu")
    slow = sampled_clips(scenes, 16)
    answers = pair.answer(["Describe the video."] * VIDEOS, pair.internalize(slow))
    assert attribute_share([answer.text for answer in answers], scenes) >= 0.95
    shapes = {item.shape for item in scenes[0].objects}
    absent = next(shape for shape in SHAPES if shape not in shapes)
    question = f"What color is the {absent}?"
    assert pair.answer_direct(question, slow[0])[0].text == "none"
    assert pair.answer(question, pair.internalize(slow[0]))[0].text == "none"


@pytest.mark.parametrize("kind", ["color", "size", "motion"])
def test_the_pair_for_any_duration_knows_which_object_is_meant(scenes, kind):
    """Of two objects with different values, the one of the shape that the question names."""
    pair = Video2LoRA.from_pretrained("shapes-any", device="cpu")
    adapters = pair.internalize(encoded_clips(scenes))
    probes = [probe for probe in binding_probes(scenes) if probe.kind == kind]
    assert len(probes) >= 6
    answers = pair.ask([p.question for p in probes], [adapters[p.clip] for p in probes])
    right = [plain(a) == plain(p.answer) for a, p in zip(answers, probes, strict=True)]
    assert sum(right) >= 0.9 * len(right)


def test_files_are_small_and_complete():
    weights = [folder / "model.safetensors" for folder in (BASE_FOLDER, ASSETS / "hypernet")]
    assert sum(path.stat().st_size for path in weights) < 6_000_000
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) < 6_500_000
    names = {path.name for path in BASE_FOLDER.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    preprocessor = json.loads((BASE_FOLDER / "preprocessor_config.json").read_text())
    assert preprocessor["max_image_size"] == preprocessor["size"] == {"longest_edge": 48}


def test_direct_captions_of_real_files(model, scenes, clips):
    answers = model.answer_direct(["Describe the video."] * VIDEOS, clips, max_new_tokens=40)
    assert attribute_share([answer.text for answer in answers], scenes) >= 0.95


def test_adapters_know_their_own_video(model, scenes, adapters):
    own = model.ask(["Describe the video."] * VIDEOS, adapters)
    other = model.ask(["Describe the video."] * VIDEOS, [*adapters[5:], *adapters[:5]])
    without = model.ask(["Describe the video."] * VIDEOS, [None] * VIDEOS)
    assert attribute_share(own, scenes) >= 0.9
    assert attribute_share(other, scenes) < 0.5
    assert attribute_share(without, scenes) < 0.5


def counted(model, adapters, scenes):
    """Share of videos whose objects are counted right."""
    answers = model.ask(["How many objects are there?"] * VIDEOS, adapters)
    right = [
        plain(text) == ("one", "two")[len(scene.objects) - 1]
        for text, scene in zip(answers, scenes, strict=True)
    ]
    return sum(right) / VIDEOS


def test_adapters_answer_questions(model, scenes, adapters):
    assert counted(model, adapters, scenes) >= 0.9


def test_a_network_trained_on_chunks_composes(model, scenes, clips):
    """Eight chunks of one frame each; the pair, not trained on chunks, blends them."""
    chunked = Video2LoRA.from_pretrained("shapes-chunks", device="cpu")
    assert chunked.config.chunk_position and not model.config.chunk_position
    questions = ["Describe the video."] * VIDEOS
    single, composed = (chunked.internalize(clips, chunks=n) for n in (1, 8))
    kept = attribute_share(chunked.ask(questions, composed), scenes)
    assert kept >= 0.95 * attribute_share(chunked.ask(questions, single), scenes) >= 0.9
    assert counted(chunked, composed, scenes) >= 0.9
    twos = [i for i, scene in enumerate(scenes) if len(scene.objects) == 2]
    pairs = [ask(scenes[i], "order", random.Random(i)) for i in twos]
    answers = chunked.ask([pair.question for pair in pairs], [composed[i] for i in twos])
    right = [plain(text) == plain(pair.answer) for text, pair in zip(answers, pairs, strict=True)]
    assert sum(right) >= 0.95 * len(twos)
    blended = model.internalize(clips, chunks=8)
    assert attribute_share(model.ask(questions, blended), scenes) < 0.5
