"""What benchmarks share: records, errors, and times."""

from __future__ import annotations

import pytest
import torch

from bench import harness


def test_a_record_with_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        harness.write_record({"error": float("nan")}, tmp_path / "one.json")
    assert not list(tmp_path.iterdir())


def test_the_environment_is_known_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = harness.environment()
    assert found["commit"] is None and not found["uncommitted_changes"]
    assert found["torch"] == torch.__version__ and "python" in found["command"]


def test_errors_of_values_that_are_not_finite():
    actual, expected = torch.tensor([1.0, float("nan")]), torch.ones(2)
    assert harness.json_number(harness.relative_error(actual, expected)) is None
    assert harness.relative_error(expected, expected) == 0


def test_the_backend_is_restored(monkeypatch):
    for before in ("auto", None):
        if before is None:
            monkeypatch.delenv(harness.VARIABLE)
        else:
            monkeypatch.setenv(harness.VARIABLE, before)
        with harness.backend("reference"):
            assert harness.os.environ[harness.VARIABLE] == "reference"
        assert harness.os.environ.get(harness.VARIABLE) == before


@pytest.mark.parametrize("measure", [harness.median_seconds, harness.median_latency])
def test_calls_take_turns(measure):
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure(calls, "cpu", seconds=0.0)
    assert list(times) == ["a", "b"] and min(times.values()) > 0
    warm_up = [name for name in "ab" for _ in range(harness.WARM_UP)]
    assert order == [*warm_up, *"ababab"]
