"""Networks that know which part of its video a chunk is, and videos internalized in chunks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.golden import relative
from tests.video.clips import encode
from v2l_fast.errors import ConfigError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.model import Video2LoRA
from v2l_fast.video import Clip
from v2l_fast.video.clip import split_clip

CONFIG = replace(tiny.CONFIG, chunk_position=True)
WHOLE, FIRST, SECOND = (torch.tensor([span]) for span in ([0.0, 1.0], [0.0, 0.5], [0.5, 1.0]))


@pytest.fixture(scope="module")
def network() -> HyperNetwork:
    return tiny.hypernetwork(CONFIG)


def hidden(batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 6, CONFIG.hidden_size, generator=generator)


@torch.no_grad()
def factors(network: HyperNetwork, span: torch.Tensor | None) -> torch.Tensor:
    return torch.cat([f["down_proj"] for f in network.layer(1, hidden(), None, span)], -1)


def test_each_span_gives_another_adapter(network):
    spans = (WHOLE, FIRST, SECOND, torch.tensor([[0.25, 0.5]]))
    adapters = [factors(network, span) for span in spans]
    for i, one in enumerate(adapters):
        assert all(relative(other, one) > 1e-2 for other in adapters[:i])


def test_no_span_is_the_whole_video(network):
    assert torch.equal(factors(network, None), factors(network, WHOLE))


def test_the_batch_call_takes_spans(network):
    features = torch.stack([hidden(2)] * CONFIG.num_layers, 1)
    spans = torch.cat([FIRST, SECOND])
    with torch.no_grad():
        together = network(features, None, spans)
        for index in range(2):
            alone = network(features[index : index + 1], None, spans[index : index + 1])
            assert relative(together.A["down_proj"][index], alone.A["down_proj"][0]) < 1e-6


def test_other_networks_ignore_the_span():
    plain = tiny.hypernetwork()
    assert set(tiny.hypernetwork(CONFIG).state_dict()) - set(plain.state_dict()) == {
        f"aggregator.perceiver.place.{name}" for name in ("encoder", "decoder")
    }
    assert "chunk_position" not in plain.config.to_dict()
    assert torch.equal(factors(plain, FIRST), factors(plain, None))


def test_adding_it_to_a_trained_network_changes_nothing():
    plain = tiny.hypernetwork()
    grown = HyperNetwork(CONFIG)
    grown.load_state_dict({**grown.state_dict(), **plain.state_dict()})
    for span in (FIRST, SECOND):
        assert relative(factors(grown, span), factors(plain, None)) < 1e-6


def test_config_and_weights_are_stored(network, tmp_path):
    network.save_pretrained(tmp_path)
    again = HyperNetwork.from_pretrained(tmp_path)
    assert again.config == CONFIG == HypernetConfig.from_dict(CONFIG.to_dict())
    assert torch.equal(factors(again, SECOND), factors(network, SECOND))
    with pytest.raises(ConfigError, match="chunk_position must be true or false"):
        replace(CONFIG, chunk_position=1)


# --- videos in chunks -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knowing(backbone, network) -> Video2LoRA:
    return Video2LoRA(backbone, network)


def test_chunks_are_internalized_with_their_spans_and_composed(knowing):
    clip = tiny.clip(4, 0)
    adapter = knowing.internalize(clip, chunks=2)
    rank = CONFIG.rank
    assert adapter.rank == 2 * rank
    parts = split_clip(clip, 2)
    for index, (part, span) in enumerate(zip(parts, (FIRST, SECOND), strict=True)):
        prompt = knowing.backbone.video_prompt(
            knowing.backbone.encode(part, CONFIG.longest_edge),
            CONFIG.instruction,
            answer_follows=False,
        )
        with torch.no_grad():
            for layer, hidden in enumerate(
                knowing.backbone.decoder.layer_inputs(prompt.embeddings[None])
            ):
                a, b = knowing.hypernet.layer(layer, hidden, None, span)
                ranks = slice(index * rank, (index + 1) * rank)
                assert relative(adapter.A["down_proj"][layer, ranks], a["down_proj"][0]) < 1e-6
                assert relative(adapter.B["down_proj"][layer, ranks], b["down_proj"][0]) < 1e-6
    chunks = adapter.provenance["chunks"]
    assert [chunk["source"]["place"] for chunk in chunks] == [[0.0, 0.5], [0.5, 1.0]]
    assert [chunk["source"]["frame_indices"] for chunk in chunks] == [[0, 1], [2, 3]]
    assert isinstance(knowing.ask("what happens?", adapter, max_new_tokens=2), str)


def test_one_chunk_is_the_whole_video(knowing):
    clip = tiny.clip(3, 1)
    one, same = knowing.internalize(clip, chunks=1), knowing.internalize(clip)
    assert isinstance(one, Adapter) and one.rank == CONFIG.rank
    assert torch.equal(one.A["down_proj"], same.A["down_proj"])
    assert one.provenance["source"]["place"] == [0.0, 1.0]


def test_a_file_in_chunks(knowing, tmp_path: Path):
    path = encode(tmp_path / "clip.mp4", 8, fps=2)
    adapter = knowing.internalize(path, chunks=2, max_frames=2)
    sources = [chunk["source"] for chunk in adapter.provenance["chunks"]]
    assert [source["frame_indices"] for source in sources] == [[0, 3], [4, 7]]
    assert [source["duration"] for source in sources] == [2.0, 2.0]
    assert adapter.rank == 2 * CONFIG.rank


def test_no_chunks_are_refused(knowing):
    with pytest.raises(ConfigError, match="chunks must be at least 1, got 0"):
        knowing.internalize(tiny.clip(2, 0), chunks=0)


def test_split_clips_are_clips_of_their_own():
    clip = Clip.from_frames(tiny.clip(7, 0).frames, fps=2.0)
    parts = split_clip(clip, 3)
    assert [len(part.frames) for part in parts] == [3, 2, 2]
    assert torch.equal(torch.cat([part.frames for part in parts]), clip.frames)
    assert np.concatenate([part.indices for part in parts]).tolist() == list(range(7))
    for number, part in enumerate(parts):
        assert part.duration == pytest.approx(3.5 / 3)
        assert part.num_frames == 2
        assert min(part.timestamps) >= 0
        start = number * part.duration
        assert part.timestamps[-1] + start == pytest.approx(part.indices[-1] / 2)
        assert len(part.presentation_times) == len(part.frames)
    assert len(split_clip(clip, 20)) == 7
