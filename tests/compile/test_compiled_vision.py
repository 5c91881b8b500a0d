"""Vision tower and connector compile to one graph for every number of views."""

from __future__ import annotations

from tests.compile.graphs import assert_one_graph, ramp


def test_encode_pixels(backbone):
    side = backbone.tile_size
    cases = [(ramp(views, 3, side, side),) for views in (2, 3, 7, 5)]
    assert_one_graph(backbone.encode_pixels, cases)
