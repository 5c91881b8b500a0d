"""The loop in one process: what it learns, writes, says and refuses."""

import io
import json
import signal
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests import tiny
from tests.tiny import json_lines
from tests.training.broken import write_folder
from tests.training.tiny_run import TinySource, run, settings
from v2l_fast.errors import CheckpointError, ConfigError
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.training.checkpoint import RunFolder, latest_checkpoint, read_progress
from v2l_fast.training.distributed import Stopped
from v2l_fast.training.loader import Quarantine
from v2l_fast.training.step import TrainStep
from v2l_fast.training.trainer import TrainingError, train
from v2l_fast.video import FrameSampling

LEARNED = ("loss", "grad_norm", "captioning", "qa")


@pytest.fixture(scope="module")
def base():
    return tiny.backbone()


def curve(folder):
    """What a log says about learning, without times."""
    lines = json_lines(folder / "log.jsonl")
    return [{name: x.get(name) for name in ("step", "lr", "val_loss", *LEARNED)} for x in lines]


def weights(folder):
    return load_file(latest_checkpoint(folder / "checkpoints"))


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    summary = run(settings(folder), base)
    return folder, summary


def test_the_loss_falls(whole):
    losses = [line["loss"] for line in curve(whole[0]) if line["loss"] is not None]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("micro", [2, 3])
def test_the_first_step_is_the_steps_own(whole, base, tmp_path, micro):
    """Accumulated micro-batches, clipping off: the loss and gradient of one forward pass."""
    config = settings(tmp_path, "optim.clip=0", "optim.steps=1", f"optim.micro_batch_size={micro}")
    run(config, base)
    from v2l_fast.training.loader import EpochOrder
    from v2l_fast.training.trainer import make_hypernet

    network = make_hypernet(config, base)
    source = TinySource(base.prompt_builder)
    samples = [source.load(i, 0) for i in EpochOrder(13, 8, 0).batch(0)]
    result = TrainStep(network, base)(samples)
    result.loss.backward()
    line = json_lines(tmp_path / "log.jsonl")[0]
    assert line["loss"] == pytest.approx(result.loss.item(), rel=1e-6)
    norm = torch.stack([p.grad.norm() for p in network.parameters()]).norm()
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_what_a_run_leaves(whole):
    folder, summary = whole
    names = {path.name for path in folder.iterdir()}
    assert names == {".lock", "best", "checkpoints", "hypernet", "log.jsonl", "summary.json"}
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["step-00000006.safetensors", "step-00000007.safetensors"]
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["steps"] == 7 and summary["quarantined"] == 0 and summary["seconds"] > 0
    assert summary["last"]["loss"] == curve(folder)[-2]["loss"]
    assert summary["validation"]["val_loss"] == curve(folder)[-1]["val_loss"]
    assert summary["environment"]["processes"] == 1
    exported = HyperNetwork.from_pretrained(folder / "hypernet")
    saved = weights(folder)
    for name, value in exported.state_dict().items():
        assert torch.equal(value, saved[f"model.{name}"])
    assert exported.config.max_frames == 2 and exported.config.longest_edge == 32


def best_of(folder) -> tuple[dict, dict[str, torch.Tensor]]:
    """The record and the weights of the best network."""
    record = json.loads((folder / "best" / "validation.json").read_text())
    return record, HyperNetwork.from_pretrained(folder / "best").state_dict()


def test_the_best_network_is_that_of_the_lowest_validation_cross_entropy(base, tmp_path):
    """A rate so high that the loss rises again: neither the first nor the last is the best."""
    changes = (
        "run.val_every=1", "optim.lr=0.05", "optim.clip=0", "optim.steps=4",
        'optim.schedule="trapezoid"', "optim.decay_ratio=0",
    )  # fmt: skip
    run(settings(tmp_path / "whole", *changes), base)
    lines = json_lines(tmp_path / "whole" / "log.jsonl")
    passes = {line["step"]: line["val_ce"] for line in lines if "val_ce" in line}
    lowest = min(passes, key=passes.get)
    record, best = best_of(tmp_path / "whole")
    assert len(passes) == 4 and 1 < lowest < 4
    assert (record["step"], record["val_ce"]) == (lowest, passes[lowest])
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["best"] == record
    # The network of that step, from a run that ends there.
    short = settings(tmp_path / "short", *changes)
    with pytest.raises(Stopped):
        run(short, base, events={lowest - 1: signal.SIGTERM})
    saved = weights(tmp_path / "short")
    assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in best.items())
    # Continued, it ends with the same best.
    run(short, base)
    again, actual = best_of(tmp_path / "short")
    assert again == record and same(actual, best)
    # Another run in the same folder does not inherit it.
    once = settings(tmp_path / "short", *changes, "optim.steps=1")
    sources = TinySource(base.prompt_builder), TinySource(base.prompt_builder, videos=4)
    train(once, resume=False, backbone=base, sources=sources)
    assert best_of(tmp_path / "short")[0]["step"] == 1


def test_sigterm_finishes_the_step_saves_and_continues(whole, base, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        run(settings(tmp_path), base, events={3: signal.SIGTERM})
    assert stopped.value.code == 143 and stopped.value.step == 4
    assert read_progress(latest_checkpoint(tmp_path / "checkpoints"))["step"] == 4
    assert signal.getsignal(signal.SIGTERM) == before
    run(settings(tmp_path), base)
    assert curve(tmp_path) == curve(whole[0])
    assert same(weights(tmp_path), weights(whole[0]))


def test_an_interrupt_saves_too(base, tmp_path):
    with pytest.raises(Stopped) as stopped:
        run(settings(tmp_path), base, events={0: signal.SIGINT})
    assert stopped.value.code == 130
    assert read_progress(latest_checkpoint(tmp_path / "checkpoints"))["step"] == 1


def test_a_crash_between_checkpoints_changes_nothing(whole, base, tmp_path):
    class Crashing(TinySource):
        def load(self, index, step):
            if step == 5:
                raise RuntimeError("out of luck")
            return super().load(index, step)

    with pytest.raises(RuntimeError, match="out of luck"):
        sources = Crashing(base.prompt_builder), TinySource(base.prompt_builder, videos=4)
        train(settings(tmp_path), backbone=base, sources=sources)
    # Later lines than the checkpoint's, and a file that was being written.
    assert curve(tmp_path)[-1]["step"] == 4
    (tmp_path / "checkpoints" / ".step-00000006.safetensors.1.part").write_bytes(b"half")
    run(settings(tmp_path), base)
    assert curve(tmp_path) == curve(whole[0])
    assert same(weights(tmp_path), weights(whole[0]))
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_workers_give_the_same_run(whole, base, tmp_path):
    run(settings(tmp_path, "data.workers=2"), base)
    assert curve(tmp_path) == curve(whole[0])
    assert same(weights(tmp_path), weights(whole[0]))


@pytest.mark.parametrize(("wanted", "compiled"), [("auto", 0), ("off", 0), ("on", 1)])
def test_layers_are_compiled_if_configured(base, tmp_path, monkeypatch, wanted, compiled):
    """On a CPU only then; what is compiled computes is another test's."""
    calls = []
    monkeypatch.setattr(type(base), "compile", lambda self: calls.append("backbone"))
    monkeypatch.setattr(HyperNetwork, "compile_layers", lambda self: calls.append("hypernet"))
    run(settings(tmp_path, "optim.steps=1", f"run.compile={wanted}"), base)
    assert calls == ["backbone", "hypernet"] * compiled


def test_a_finished_run_stays_as_it_is(whole, base):
    folder, _ = whole

    def written():
        # The lock says who has the folder now.
        files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
        return {p: p.stat().st_mtime_ns for p in files}

    before = written()
    run(settings(folder), base)
    assert written() == before


def test_other_settings_are_refused_and_fresh_starts_over(base, tmp_path):
    run(settings(tmp_path, "optim.steps=3"), base)
    first = weights(tmp_path)
    with pytest.raises(CheckpointError, match="optim.lr=0.01, now it is 0.02"):
        run(settings(tmp_path, "optim.steps=3", "optim.lr=2e-2"), base)
    sources = TinySource(base.prompt_builder), None
    other = settings(tmp_path, "optim.steps=3", "optim.lr=2e-2")
    train(other, resume=False, backbone=base, sources=sources)
    assert not same(weights(tmp_path), first)
    assert [line["step"] for line in curve(tmp_path)] == [2, 3]
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        train(settings(tmp_path / "new"), resume=True, backbone=base, sources=sources)


def test_one_run_at_a_time_writes_a_folder(base, tmp_path):
    folder = RunFolder(tmp_path)
    folder.open(None)
    with pytest.raises(CheckpointError, match="another run is writing here"):
        run(settings(tmp_path), base)
    folder.close()
    run(settings(tmp_path, "optim.steps=1"), base)


def test_another_machines_folder_is_refused(tmp_path):
    first, alike, other = (RunFolder(tmp_path / name) for name in ("a", "a", "b"))
    first.open(None)
    seen = []

    def gather(value):
        seen.append(value)
        return [seen[0], value]

    first.refuse_another(gather)
    alike.refuse_another(gather)
    with pytest.raises(CheckpointError, match="b: on .* not the folder that the main process"):
        other.refuse_another(gather)
    other.open(None)
    with pytest.raises(CheckpointError, match="all machines of the run share"):
        other.refuse_another(gather)
    first.close()
    other.close()


def test_broken_videos_are_quarantined_once_and_not_tried_again(base, tmp_path):
    source = TinySource(base.prompt_builder, broken=frozenset({2, 5}))
    train(settings(tmp_path), backbone=base, sources=(source, None))
    lines = json_lines(tmp_path / "quarantine.jsonl")
    assert sorted((line["video"], line["reason"]) for line in lines) == [
        ("video 2", "cannot be read"), ("video 5", "cannot be read"),
    ]  # fmt: skip
    tries = [index for _, index in source.loaded]
    assert tries.count(2) == tries.count(5) == 1 < tries.count(3)
    steps = {line["video"]: line["step"] for line in lines}
    assert steps == {f"video {i}": step + 1 for step, i in source.loaded if i in (2, 5)}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["quarantined"] == 2


def test_a_resumed_run_knows_the_broken_videos_of_its_past(base, tmp_path):
    broken = frozenset(range(13)) - {1, 3, 4}
    run(settings(tmp_path / "whole"), base, broken=broken)
    with pytest.raises(Stopped):
        run(settings(tmp_path / "parts"), base, broken=broken, events={2: signal.SIGTERM})
    known = {line["index"] for line in json_lines(tmp_path / "parts" / "quarantine.jsonl")}
    source = TinySource(base.prompt_builder, broken=broken)
    sources = source, TinySource(base.prompt_builder, videos=4)
    train(settings(tmp_path / "parts"), backbone=base, sources=sources)
    assert known and not known & {index for _, index in source.loaded}
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_run_of_only_broken_videos_ends(base, tmp_path):
    run(settings(tmp_path, "optim.steps=2"), base, broken=frozenset(range(13)))
    assert len(Quarantine(tmp_path / "quarantine.jsonl", 13)) == 13
    assert curve(tmp_path)[0]["loss"] == 0.0


def test_a_loss_that_is_not_finite_stops_before_saving(base, tmp_path):
    class Poisoned(TinySource):
        def load(self, index, step):
            sample = super().load(index, step)
            if step >= 4:
                sample.chunks[0].features.fill_(float("nan"))
            return sample

    with pytest.raises(TrainingError, match="not finite in step 5"):
        train(settings(tmp_path), backbone=base, sources=(Poisoned(base.prompt_builder), None))
    assert read_progress(latest_checkpoint(tmp_path / "checkpoints"))["step"] == 3


def test_progress_without_a_terminal_is_lines(base, tmp_path):
    said = io.StringIO()
    config = settings(tmp_path, "run.sample_every=4", "run.val_every=4")
    sources = TinySource(base.prompt_builder), TinySource(base.prompt_builder, videos=4)
    train(config, backbone=base, sources=sources, console=Console(file=said))
    text = said.getvalue()
    assert "\x1b" not in text
    assert "starting in" in text and "7 steps of 8 videos (processes: 1," in text
    for part in ("step 2/7", "loss", "videos/s", "frames/s", "wait", "MFU n/a", "GB", "left"):
        assert part in text
    assert "step 4 · val_captioning" in text and "done:" in text
    rows = json_lines(tmp_path / "samples.jsonl")
    assert len(rows) == 3 and all(row["step"] == 4 and row["reference"] for row in rows)


def test_tensorboard_gets_the_numbers(base, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(tmp_path, 'run.trackers=["tensorboard"]', "optim.steps=4")
    run(config, base)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "v2l_fast"))
    events.Reload()
    actual = [(event.step, event.value) for event in events.Scalars("loss")]
    logged = [(line["step"], line["loss"]) for line in curve(tmp_path) if line["loss"]]
    assert actual == [(step, pytest.approx(value)) for step, value in logged]
    assert events.Scalars("val_loss")


def test_a_missing_tracker_is_named(base, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    for name, package in (("tensorboard", r'"v2l_fast\[train\]"'), ("wandb", "wandb")):
        named = f"names {name}, which is not installed: pip install {package},"
        with pytest.raises(ConfigError, match=named):
            train(settings(tmp_path / "run", f'run.trackers=["{name}"]'), backbone=base)
    # Before anything is read or written.
    assert not list(tmp_path.iterdir())


def test_a_run_can_start_from_a_trained_network(whole, base, tmp_path):
    folder, _ = whole
    start = f'model.init="{folder / "hypernet"}"'
    config = settings(
        tmp_path, start, "optim.steps=1", "model.hypernet.chunk_position=true", "optim.lr=0"
    )
    run(config, base)
    before = HyperNetwork.from_pretrained(folder / "hypernet").state_dict()
    after = HyperNetwork.from_pretrained(tmp_path / "hypernet")
    assert after.config.chunk_position
    assert all(torch.equal(after.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(ConfigError, match="does not fit model.hypernet"):
        run(settings(tmp_path / "b", start, "model.hypernet.latent_size=32"), base)


def left_open(config):
    """The settings without frames and resolution."""
    data = replace(config.data, max_frames=None, longest_edge=None, target_fps=None)
    return replace(config, data=data)


def test_frames_and_resolution_are_those_of_the_base(tmp_path):
    manifest, _ = write_folder(tmp_path / "videos", 1)
    config = settings(
        tmp_path / "run", "model.base=shapes", f'data.manifests=["{manifest}"]',
        "data.val_share=0.0", "optim.steps=1", "optim.batch_size=1",
    )  # fmt: skip
    summary = train(left_open(config))
    assert (summary["config"]["data"]["max_frames"], summary["steps"]) == (8, 1)
    assert HypernetConfig.load(tmp_path / "run/hypernet").sampling == FrameSampling(8, 48)


def test_frames_and_resolution_are_those_of_the_network_it_starts_from(whole, base, tmp_path):
    config = settings(tmp_path, f'model.init="{whole[0] / "hypernet"}"', "optim.steps=1")
    run(left_open(config), backbone=base)
    assert HypernetConfig.load(tmp_path / "hypernet").sampling == FrameSampling(2, 32)
