"""A corpus internalized by two workers of a cluster: the adapters of one machine, each once."""

from __future__ import annotations

import json

import pytest

from tests.cluster import cluster
from tests.training.broken import write_folder
from v2l_fast.data.internalize import CorpusSettings, internalize_corpus
from v2l_fast.store.adapter_store import AdapterStore

SETTINGS = CorpusSettings("shapes", device="cpu", videos_per_shard=1, threads=1)


@pytest.mark.slow
def test_a_cluster_makes_the_adapters_of_one_machine(tmp_path):
    manifest, _ = write_folder(tmp_path / "videos", 4, ("text",))
    alone = internalize_corpus(manifest, tmp_path / "alone", SETTINGS)
    seen = []
    options = {"engine": "ray", "workers": 2, "progress": lambda *at: seen.append(at)}
    with cluster():
        together = internalize_corpus(manifest, tmp_path / "together", SETTINGS, **options)
    assert seen[0] == (0, 4) and seen[-1] == (4, 4)
    assert together.listing.read_text() == alone.listing.read_text()
    assert together.failures == alone.failures and len(alone.failures) == 1
    listed = {json.loads(line)["adapter"] for line in together.listing.read_text().splitlines()}
    assert len(listed) == 3
    # What the workers were promised is on the disk, and nothing of theirs is left half-written.
    store = AdapterStore(tmp_path / "together")
    assert {record.id for record in store.list()} == listed
    assert all(store.get(one).rank for one in listed)
    # Another run finds all shards done, on whichever engine.
    again = internalize_corpus(manifest, tmp_path / "together", SETTINGS)
    assert again == together
