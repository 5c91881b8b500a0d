"""Short runs of every stage: losses fall, and a stopped run continues exactly."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from v2l_fast.errors import CheckpointError
from v2l_fast.shapes.render import augment
from v2l_fast.shapes.train import (
    LanguageSettings,
    VisionStage,
    cache_visual_tokens,
    pretrain_vision,
    random_frames,
    train_decoder,
    video_qa_pairs,
)
from v2l_fast.shapes.vlm import (
    ADDED_WORDS,
    Prompts,
    build_tokenizer,
    load_base,
    new_base,
    pixel_values,
    save_base,
    visual_tokens,
)
from v2l_fast.shapes.widen import (
    ImitationSettings,
    VaryingSettings,
    WideningSettings,
    _frame_pairs,
    add_words,
    imitate_plain,
    vary_base,
    widen_base,
)
from v2l_fast.shapes.world import sample_scenes
from v2l_fast.training.checkpoint import read_progress


def test_frames_for_the_tower_are_seeded_and_labeled():
    first, labels = random_frames(8, torch.Generator().manual_seed(0))
    again, _ = random_frames(8, torch.Generator().manual_seed(0))
    assert torch.equal(first, again)
    assert first.shape == (8, 3, 48, 48) and first.min() >= 0 and first.max() <= 255
    assert labels["center"].shape == (8, 2) and set(labels) == {
        "background",
        "size",
        "color",
        "shape",
        "center",
    }


def test_augmentation_is_small():
    frames = torch.full((4, 3, 48, 48), 128.0)
    changed = augment(frames, torch.Generator().manual_seed(1))
    assert not torch.equal(frames, changed)
    assert (changed - frames).abs().mean() < 15


def test_vision_loss_falls():
    model, _ = new_base(0)
    losses = []
    pretrain_vision(
        model,
        0,
        batch=48,
        schedule=(VisionStage(50, "concat", 2e-3, 4.0), VisionStage(50, "mean", 2e-3, 4.0)),
        report=lambda step, scores: losses.append(scores["loss"]),
    )
    assert losses[-1] < losses[0] < 6


@pytest.mark.parametrize("stop", [3, 7])
def test_vision_training_resumes_to_the_last_bit(stop, tmp_path):
    """In either stage, whose heads draw from one generator."""
    schedule = (VisionStage(5, "concat", 2e-3, 4.0), VisionStage(5, "mean", 2e-3, 4.0))

    def run(path, interrupt=None):
        model, _ = new_base(0)
        # A step's frames come from the generator: an interruption is an error in drawing them.
        with pytest.MonkeyPatch.context() as patch:
            if interrupt is not None:
                steps = iter(range(interrupt))
                patch.setattr(
                    "v2l_fast.shapes.train.random_frames",
                    lambda *args: next(steps, None) is not None and random_frames(*args),
                )  # fmt: skip
            pretrain_vision(model, 0, 8, schedule, checkpoint=path, checkpoint_every=1)
        return model.state_dict()

    path = tmp_path / "checkpoint.safetensors"
    whole = run(None)
    with pytest.raises(TypeError):
        run(path, stop)
    assert read_progress(path)["step"] == stop
    resumed = run(path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(CheckpointError, match="seed"):
        pretrain_vision(new_base(1)[0], 1, 8, schedule, checkpoint=path)


def test_language_training_learns_and_resumes(tmp_path, prompts):
    settings = LanguageSettings(
        batch=4, questions=1, warmup=5, min_flat=9, max_flat=9, decay=6, checkpoint_every=5
    )
    scenes = sample_scenes("train", 16, 0)
    seen = {}

    def run(path, stop=None):
        model, _ = new_base(0)
        visual = cache_visual_tokens(model, scenes, 0)

        def report(step, running):
            seen[step] = running["loss"]
            if step == stop:
                raise KeyboardInterrupt

        try:
            trained = train_decoder(
                model, prompts, scenes, visual, settings, "0", lambda _: prompts.video_prefix,
                partial(video_qa_pairs, questions=1), path, report,
            )  # fmt: skip
        except KeyboardInterrupt:
            return None
        assert trained["step"] == 15
        return model.state_dict()

    whole = run(tmp_path / "whole.safetensors")
    assert seen[15] < seen[1]
    run(tmp_path / "parts.safetensors", stop=12)
    parts = run(tmp_path / "parts.safetensors")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_rate_is_flat_then_falls():
    settings = LanguageSettings(lr=1.0, final_lr=0.1, warmup=4, decay=10)
    assert settings.rate(1, None) == 0.5
    assert settings.rate(500, None) == 1.0
    assert abs(settings.rate(105, 100) - 0.55) < 1e-12
    assert settings.rate(110, 100) == 0.1


def test_saved_base_is_the_same_model(tmp_path, prompts):
    model, tokenizer = new_base(0)
    save_base(model, tokenizer, tmp_path)
    assert model.dtype == torch.float32
    backbone = load_base(tmp_path)
    assert Prompts(backbone.tokenizer).context == prompts.context
    loaded = backbone.model
    for name, value in model.state_dict().items():
        assert torch.equal(value.to(torch.bfloat16).float(), loaded.state_dict()[name])
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "preprocessor_config.json"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_the_second_stage_resumes_exactly_and_adds_its_words(tmp_path):
    model, tokenizer = new_base(0)
    save_base(model, tokenizer, tmp_path / "start")
    settings = WideningSettings(videos=32, steps=4, decay=2, batch=4, checkpoint_every=2)
    losses = []

    class Interrupted(Exception):
        pass

    def stop(step, running):
        losses.append(running["loss"])
        if step == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        widen_base(
            tmp_path / "start", tmp_path / "run", tmp_path / "r.json", 0, settings, report=stop
        )
    widen_base(tmp_path / "start", tmp_path / "run", tmp_path / "r.json", 0, settings)
    whole = widen_base(tmp_path / "start", tmp_path / "whole", tmp_path / "w.json", 0, settings)
    resumed, once = (load_base(tmp_path / name / "base") for name in ("run", "whole"))
    for one, other in zip(resumed.model.parameters(), once.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(resumed.tokenizer) == len(tokenizer) + len(ADDED_WORDS)
    assert whole["training"]["loss"] < losses[0]
    with pytest.raises(CheckpointError, match="lr"):
        widen_base(
            tmp_path / "start", tmp_path / "run", tmp_path / "r.json", 0, replace(settings, lr=1.0)
        )


def test_the_third_stage_resumes_exactly_and_keeps_the_tower(tmp_path):
    model, _ = new_base(0)
    add_words(model, ADDED_WORDS, 0)
    save_base(model, build_tokenizer(ADDED_WORDS), tmp_path / "start")
    settings = VaryingSettings(videos=32, steps=4, decay=2, batch=4, checkpoint_every=2)
    imitation = ImitationSettings(steps=6, batch=16, warmup=2)

    class Interrupted(Exception):
        pass

    def stop(step, running):
        if step == 3:
            raise Interrupted

    def vary(name, report=None, imitation=imitation):
        return vary_base(
            tmp_path / "start", tmp_path / name, tmp_path / f"{name}.json", 0, settings, imitation,
            report=report,
        )  # fmt: skip

    with pytest.raises(Interrupted):
        vary("run", stop)
    resumed, whole = vary("run"), vary("whole")
    assert resumed["training"] == whole["training"]
    assert resumed["imitation"] == whole["imitation"]
    one, other = (load_base(tmp_path / name / "base") for name in ("run", "whole"))
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(one.tokenizer) == len(build_tokenizer(ADDED_WORDS)) + 1
    with pytest.raises(CheckpointError, match="tower.safetensors"):
        vary("run", imitation=replace(imitation, lr=1.0))


def test_the_tower_learns_to_see_the_plain_frame():
    model = load_base().model.requires_grad_(True)
    settings = ImitationSettings(steps=50, batch=48, warmup=5)
    frames = _frame_pairs(random.Random(1), replace(settings, batch=160))

    def error():
        with torch.no_grad():
            seen, plain = (visual_tokens(model, pixel_values(part)) for part in frames)
        return ((seen - expected).square().mean() / expected.var()).item(), plain

    with torch.no_grad():
        expected = visual_tokens(model, pixel_values(frames[1]))
    before, _ = error()
    imitate_plain(model, 0, settings)
    after, plain = error()
    assert after < 0.8 * before
    assert (plain - expected).square().mean() < 0.1 * expected.var(), "plain frames stay as seen"
