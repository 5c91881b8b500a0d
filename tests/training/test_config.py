"""Settings: presets, overrides, and errors that say what to do."""

import pytest

from v2l_fast.errors import ConfigError
from v2l_fast.hypernet.config import INSTRUCTION
from v2l_fast.training.config import DataConfig, OptimConfig, TrainConfig, load_config, preset_names
from v2l_fast.training.trainer import step_options
from v2l_fast.video import FrameSampling


def test_presets_are_complete_and_valid():
    assert preset_names() == [
        "shapes",
        "shapes-captions",
        "shapes-varied",
        "smolvlm2-2.2b",
        "smolvlm2-500m",
    ]
    for name in preset_names():
        config = load_config(name)
        assert config.data.instruction == INSTRUCTION
        step_options(config)


@pytest.mark.parametrize(
    ("name", "steps", "gpus", "micro", "accumulated", "batch"),
    [("smolvlm2-500m", 9000, 4, 48, 2, 384), ("smolvlm2-2.2b", 7000, 6, 8, 5, 240)],
)
def test_paper_presets_are_table_6(name, steps, gpus, micro, accumulated, batch):
    config = load_config(name)
    optim, data = config.optim, config.data
    assert (optim.steps, optim.batch_size, optim.micro_batch_size) == (steps, batch, micro)
    assert optim.accumulation(gpus) == accumulated
    assert (optim.lr, optim.warmup_ratio, optim.weight_decay) == (1e-4, 0.03, 0.01)
    assert (data.max_frames, data.longest_edge) == (12, 384)
    assert config.model.hypernet == {"rank": 16, "latent_size": 512}


def test_the_batch_holds_for_any_number_of_processes():
    config = OptimConfig(batch_size=24, micro_batch_size=4)
    assert [config.accumulation(n) for n in (1, 2, 3, 5, 6, 24)] == [6, 3, 2, 2, 1, 1]
    with pytest.raises(ConfigError, match="24 cannot be shared by 25 processes; start at most 24"):
        config.accumulation(25)


def test_overrides_are_toml_literals(tmp_path):
    config = load_config(
        "shapes",
        [
            "optim.lr=3e-4", "optim.betas=[0.8, 0.9]", "data.chunks=[1, 2]", "run.folder=runs/a",
            "model.recompute=true", "model.hypernet.rank=4", "loss.kind_weights={qa = 2}",
            'data.manifests="a.jsonl"', "model.hypernet.chunk_position=true", "optim.clip=0",
        ],
    )  # fmt: skip
    assert (config.optim.lr, config.optim.betas, config.optim.clip) == (3e-4, (0.8, 0.9), 0.0)
    assert config.data.chunks == (1, 2) and config.data.manifests == ("a.jsonl",)
    assert config.run.folder == "runs/a" and config.model.recompute is True
    assert config.model.hypernet["rank"] == 4 and config.model.hypernet["latent_size"] == 128
    assert config.model.hypernet["chunk_position"] is True
    assert config.loss.kind_weights == {"caption": 0.5, "question": 0.5, "qa": 2}


def test_a_file_builds_on_a_preset(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('preset = "smolvlm2-500m"\n[optim]\nlr = 3e-4\n')
    config = load_config(path, ["optim.steps=5"])
    assert (config.optim.lr, config.optim.steps, config.optim.batch_size) == (3e-4, 5, 384)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", "unknown key optim.learning_rate on the command line"),
        ("optim.warmup_step=1", "did you mean optim.warmup_steps"),
        ("optm.lr=1", "did you mean optim.lr"),
        ("optim.lr.x=1", "optim.lr on the command line must be a valid number, got {'x': 1}"),
        ("optim=1", "unknown key optim on"),
        ("optim.lr=fast", "optim.lr on the command line must be a valid number, got 'fast'"),
        ("optim.steps=1.5", "must be a valid integer, got 1.5"),
        ("optim.steps=true", "must be a valid integer, got True"),
        ("model.recompute=1", "must be true or false, got 1"),
        ("optim.steps=0", "optim.steps on the command line must be at least 1, got 0"),
        ("optim.lr=nan", "optim.lr on the command line must be a finite number, got nan"),
        (
            "optim.betas=[0.9]",
            "must have at least 2 items, got [0.9]",
        ),
        ("data.chunks=[]", "data.chunks on the command line must have at least 1 item, got []"),
        ("data.chunks=[1, 0]", "data.chunks on the command line must be at least 1, got 0"),
        ("data.val_share=0.9", "data.val_share on the command line must be at most 0.5, got 0.9"),
        ('run.trackers=["mlflow"]', "must be 'tensorboard' or 'wandb', got 'mlflow'"),
        (
            "data.source=shape",
            "must be 'manifest', 'shapes', 'shapes-varied' or 'shapes-captions', got 'shape'",
        ),
        ("optim.schedule=linear", "must be 'cosine' or 'trapezoid', got 'linear'"),
        (
            "loss.kind_weights.qa=heavy",
            "loss.kind_weights.qa on the command line must be a",
        ),
        (
            "loss.kind_weights=1",
            "loss.kind_weights on the command line must be a",
        ),
        ("loss.kl_temperature=0", "must be greater than 0, got 0"),
        ("run.folder=' '", "run.folder on the command line must have at least 1 character"),
        (f"optim.lr={'9' * 5000}", "must be a valid number, got '999"),
        ("loss.kl_weight=0.5", "loss.kl_weight=0.5 needs a teacher that sees each video in one"),
        ("model.hypernet.rnk=1", "model.hypernet.rnk on the command line is unknown; did you mean"),
        ("model.hypernet.max_frames=1", "is set by data.max_frames"),
        ("model.hypernet.num_layers=1", "is set by the base"),
        ("optim.lr", "is not section.key=value"),
    ],
)
def test_wrong_settings_are_refused(override, message):
    with pytest.raises(ConfigError) as error:
        load_config("shapes", [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_errors_name_the_file_a_value_comes_from(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('preset = "shapes"\n[run]\nkeep = 0\n[loss.kind_weights]\nqa = -1\n')
    with pytest.raises(ConfigError, match=f"kind_weights.qa in {path} must be at least 0, got -1"):
        load_config(path, ["run.keep=2"])
    with pytest.raises(ConfigError, match=f"run.keep in {path} must be at least 1, got 0"):
        load_config(path, ["loss.kind_weights={}"])


def test_sampling_left_open_is_filled_in():
    open_ = TrainConfig(data=DataConfig(max_frames=6))
    with pytest.raises(ConfigError, match="longest_edge"):
        open_.data.sampling  # noqa: B018
    assert open_.with_sampling(FrameSampling(8, 48)).data.sampling == FrameSampling(6, 48)
    explicit = load_config("shapes")
    assert explicit.with_sampling(FrameSampling(3, 100, 2.0)) == explicit


def test_a_teacher_sees_a_video_in_one_piece():
    kl = ["data.source=manifest", "loss.kl_weight=0.5"]
    assert load_config("shapes", kl).loss.kl_weight == 0.5
    with pytest.raises(ConfigError, match=r"data.chunks=\[1\]; or set it to 0"):
        load_config("shapes", [*kl, "data.chunks=[1, 2]"])


def test_wrong_files_are_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[optim]\nlearn = 1\n")
    with pytest.raises(ConfigError, match=f"unknown key optim.learn in {path}"):
        load_config(path)
    path.write_text("[optim\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(path)
    path.write_text('preset = "smolvlm2-500"\n')
    with pytest.raises(ConfigError, match="did you mean smolvlm2-500m"):
        load_config(path)
    for missing in ("shaps", str(tmp_path)):
        with pytest.raises(ConfigError, match="no such config file or preset"):
            load_config(missing)


def test_the_fingerprint_ignores_settings_without_effect_on_the_result():
    plain = load_config("shapes").fingerprint()
    same = load_config(
        "shapes", ["optim.micro_batch_size=12", "data.workers=2", "run.folder=x", "run.keep=9"]
    )
    assert same.fingerprint() == plain
    assert load_config("shapes", ["optim.lr=1"]).fingerprint() != plain
    assert load_config("shapes", ["run.seed=1"]).fingerprint() != plain
    assert TrainConfig().fingerprint()["optim.steps"] == 1000
