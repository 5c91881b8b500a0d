"""The hub is asked once, and only what a request can fail with counts as no answer."""

from __future__ import annotations

import socket

import huggingface_hub
import pytest
from huggingface_hub import constants

from v2l_fast import loading


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    loading.hub_answers.cache_clear()
    yield
    loading.hub_answers.cache_clear()


def test_nobody_listens(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert not loading.hub_answers()
        with loading.brief_hub():
            assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    assert "does not answer" in loading.hub_reason(OSError("no"))


@pytest.mark.parametrize("endpoint", ["http://[", "nothing", "http://\x00"])
def test_an_address_that_is_none(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert not loading.hub_answers()


def test_a_fault_of_ours_is_not_taken_for_silence(monkeypatch):
    class Broken:
        def head(self, *arguments, **options):
            raise TypeError("a bug")

    monkeypatch.setattr(huggingface_hub, "get_session", Broken)
    with pytest.raises(TypeError, match="a bug"):
        loading.hub_answers()
