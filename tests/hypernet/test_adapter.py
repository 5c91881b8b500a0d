"""Adapters as data: files, composition, ablations, norms."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from v2l_fast.errors import AdapterError
from v2l_fast.hypernet.adapter import Adapter, AdapterBatch, BiasAdapter

SIZES = {"down_proj": (7, 5), "up_proj": (5, 7)}
LAYERS, RANK = 3, 4


def factors(rank: int, seed: int, modules=SIZES) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        {m: torch.randn(LAYERS, rank, d[i], generator=generator) for m, d in modules.items()}
        for i in (0, 1)
    )


BIAS = BiasAdapter(*factors(RANK, 100))


def adapter(seed: int = 0, rank: int = RANK, bias: BiasAdapter | None = BIAS, **kwargs) -> Adapter:
    return Adapter(*factors(rank, seed), 2.5, bias, provenance={"seed": seed}, **kwargs)


def update(adapter: Adapter, module: str) -> torch.Tensor:
    """Dense [L, d_out, d_in] update s·Bᵀ A, the bias included."""
    a, b = (side[module].double() for side in adapter.merged())
    return adapter.scale * b.mT @ a


def assert_same(first: Adapter, second: Adapter) -> None:
    for one, two in ((first.A, second.A), (first.B, second.B)):
        assert one.keys() == two.keys()
        for module in one:
            assert one[module].dtype == two[module].dtype
            assert torch.equal(one[module], two[module])
    assert first.scale == second.scale and first.bias_id == second.bias_id
    assert dict(first.provenance) == dict(second.provenance)


# --- data -----------------------------------------------------------------------------------------


def test_fields_cannot_be_set():
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter().scale = 1.0


def test_mappings_cannot_be_changed():
    original = adapter()
    for mapping in (original.A, original.B, original.provenance):
        with pytest.raises(TypeError):
            mapping["down_proj"] = None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_duplicates(duplicate):
    assert_same(duplicate(adapter()), adapter())


def test_methods_leave_the_adapter_as_it_was():
    original, same = adapter(), adapter()
    original.prune(1)
    original.prune(2, by="random")
    original.without_layers([0], include_bias=True)
    Adapter.compose([original, adapter(1)])
    original.merged()
    original.norms()
    original.to(dtype=torch.bfloat16)
    assert_same(original, same)
    assert torch.equal(BIAS.A["down_proj"], factors(RANK, 100)[0]["down_proj"])


def test_the_bias_is_shared_not_copied():
    first, second = adapter(0), adapter(1)
    kept = Adapter.compose([first, second]).prune(3).to(dtype=torch.float64).without_layers([1])
    assert kept.bias is first.bias is second.bias


def test_merged_puts_the_bias_behind_the_generated_ranks():
    a, b = adapter().merged()
    for side, own, bias in ((a, adapter().A, BIAS.A), (b, adapter().B, BIAS.B)):
        for module in SIZES:
            assert torch.equal(side[module][:, :RANK], own[module])
            assert torch.equal(side[module][:, RANK:], bias[module])
    a, _ = adapter(bias=None).merged()
    assert torch.equal(a["up_proj"], adapter().A["up_proj"])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({}, {}),
        ({"m": torch.zeros(1, 1, 1)}, {"n": torch.zeros(1, 1, 1)}),
        ({"m": torch.zeros(1, 1)}, {"m": torch.zeros(1, 1)}),
        ({"m": torch.zeros(2, 3, 1)}, {"m": torch.zeros(2, 4, 1)}),
        ({"m": torch.zeros(2, 3, 1)}, {"m": torch.zeros(1, 3, 1)}),
    ],
)
def test_factors_that_do_not_fit(a, b):
    with pytest.raises(AdapterError):
        Adapter(a, b, 1.0)


def test_modules_must_agree_in_layers():
    a = {"m": torch.zeros(2, 3, 4), "n": torch.zeros(1, 3, 4)}
    with pytest.raises(AdapterError, match="n has 1 layers"):
        Adapter(a, a, 1.0)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [BIAS, None])
def test_round_trip_is_bit_exact(bias, dtype, tmp_path):
    original = adapter(bias=bias).to(dtype=dtype)
    original.save(tmp_path / "clip.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["clip.safetensors"]
    detached = Adapter.load(tmp_path / "clip.safetensors")
    assert_same(detached, original)
    assert_same(Adapter.load(tmp_path / "clip.safetensors", bias), original)
    if bias is not None:
        with pytest.raises(AdapterError, match="needs the bias adapter"):
            detached.merged()
        assert_same(detached.with_bias(bias), original)
        assert torch.equal(update(detached.with_bias(bias), "up_proj"), update(original, "up_proj"))


def test_the_bias_is_named_by_value_in_any_dtype():
    wide = BiasAdapter(
        {m: t.bfloat16().double() for m, t in BIAS.A.items()},
        {m: t.bfloat16().double() for m, t in BIAS.B.items()},
    )
    assert wide.id == BIAS.id
    assert BiasAdapter(*factors(RANK, 101)).id != BIAS.id
    swapped = BiasAdapter({m: -t for m, t in BIAS.A.items()}, {m: -t for m, t in BIAS.B.items()})
    assert swapped.id != BIAS.id


@pytest.mark.parametrize("made_with", [BIAS, None])
def test_another_bias_is_refused(made_with, tmp_path):
    adapter(bias=made_with).save(tmp_path / "clip.safetensors")
    other = BiasAdapter(*factors(RANK, 101))
    with pytest.raises(AdapterError, match="another hypernetwork") as caught:
        Adapter.load(tmp_path / "clip.safetensors", other)
    assert "clip.safetensors" in str(caught.value)


def test_an_altered_value_is_not_the_same_file(tmp_path):
    path = tmp_path / "clip.safetensors"
    adapter().save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    actual = Adapter.load(path)
    assert not all(torch.equal(actual.B[m], adapter().B[m]) for m in SIZES) or not all(
        torch.equal(actual.A[m], adapter().A[m]) for m in SIZES
    )


def write(path, tensors: dict, record: object) -> None:
    save_file(tensors, path, metadata={"v2l_adapter": json.dumps(record)})


GOOD = {"version": 1, "scale": 2.0, "bias_id": None, "provenance": {}}
TENSORS = {"m.lora_A": torch.ones(2, 3, 4), "m.lora_B": torch.ones(2, 3, 5)}


@pytest.mark.parametrize(
    ("tensors", "record", "words"),
    [
        (TENSORS, {**GOOD, "version": 99}, "format 99"),
        (TENSORS, {k: v for k, v in GOOD.items() if k != "scale"}, "not an adapter"),
        (TENSORS, {**GOOD, "scale": "wide"}, "not an adapter"),
        (TENSORS, {**GOOD, "scale": float("nan")}, "scale"),
        (TENSORS, {**GOOD, "provenance": 3}, "not an adapter"),
        (TENSORS, [1, 2], "not an adapter"),
        (TENSORS, None, "not an adapter"),
        ({}, GOOD, "modules"),
        ({"m.lora_A": TENSORS["m.lora_A"]}, GOOD, "modules"),
        ({**TENSORS, "extra": torch.ones(1)}, GOOD, "unexpected tensor .?extra"),
        ({**TENSORS, "m.lora_B": torch.ones(2, 3, 5, dtype=torch.int32)}, GOOD, "int32"),
        ({**TENSORS, "m.lora_B": torch.ones(2, 4, 5)}, GOOD, "must be"),
        ({**TENSORS, "m.lora_B": torch.full((2, 3, 5), float("nan"))}, GOOD, "m.*not finite"),
        ({**TENSORS, "m.lora_A": torch.full((2, 3, 4), float("inf"))}, GOOD, "m.*not finite"),
    ],
)
def test_files_that_are_not_adapters(tensors, record, words, tmp_path):
    path = tmp_path / "clip.safetensors"
    write(path, tensors, record)
    with pytest.raises(AdapterError, match=words) as caught:
        Adapter.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_safetensors_files(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    with pytest.raises(AdapterError, match="not an adapter file"):
        Adapter.load(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(AdapterError, match="not a whole"):
        Adapter.load(path)
    with pytest.raises(AdapterError, match="no such file"):
        Adapter.load(tmp_path / "missing.safetensors")


# --- composition and ablation ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_compose_adds_updates_and_counts_the_bias_once(count):
    parts = [adapter(seed) for seed in range(count)]
    composed = Adapter.compose(parts)
    assert composed.rank == count * RANK
    bias = adapter().scale * BIAS.B["up_proj"].double().mT @ BIAS.A["up_proj"].double()
    total = sum(update(part, "up_proj") for part in parts) - (count - 1) * bias
    torch.testing.assert_close(update(composed, "up_proj"), total)
    assert composed.provenance["chunks"] == [{"seed": i} for i in range(count)]


def test_compose_of_composed_and_pruned():
    nested = Adapter.compose([Adapter.compose([adapter(0), adapter(1)]), adapter(2).prune(1)])
    assert nested.rank == 2 * RANK + 1
    flat = Adapter.compose([adapter(0), adapter(1), adapter(2).prune(1)])
    torch.testing.assert_close(update(nested, "down_proj"), update(flat, "down_proj"))


def test_compose_of_loaded_and_attached(tmp_path):
    adapter(1).save(tmp_path / "clip.safetensors")
    loaded = Adapter.load(tmp_path / "clip.safetensors")
    for parts in ([adapter(0), loaded], [loaded, adapter(0)]):
        composed = Adapter.compose(parts)
        assert composed.bias is BIAS and composed.bias_id == BIAS.id
    detached = Adapter.compose([loaded, loaded])
    assert detached.bias is None and detached.bias_id == BIAS.id


def test_compose_of_nothing_and_of_strangers():
    with pytest.raises(AdapterError, match="at least one"):
        Adapter.compose([])
    small = {m: SIZES[m] for m in ("down_proj",)}
    strangers = {
        "modules and layers": Adapter(*factors(RANK, 1, small), 2.5, BIAS),
        "scale": dataclasses.replace(adapter(1), scale=1.0),
        "bias adapter": adapter(1, bias=BiasAdapter(*factors(RANK, 7))),
    }
    strangers["bias adapter "] = adapter(1, bias=None)
    for what, stranger in strangers.items():
        with pytest.raises(AdapterError, match=f"adapter 1 has another {what.strip()}"):
            Adapter.compose([adapter(0), stranger])


@pytest.mark.parametrize("by", ["norm", "bottom", "random"])
def test_keeping_all_ranks_keeps_all_bits(by):
    pruned = adapter().prune(RANK, by)
    for module in SIZES:
        assert torch.equal(pruned.A[module], adapter().A[module])
        assert torch.equal(pruned.B[module], adapter().B[module])


@pytest.mark.parametrize("by", ["norm", "bottom", "random"])
def test_keeping_no_rank_leaves_the_bias_alone(by):
    pruned = adapter().prune(0, by)
    assert pruned.rank == 0
    bias = adapter().scale * BIAS.B["up_proj"].double().mT @ BIAS.A["up_proj"].double()
    assert torch.equal(update(pruned, "up_proj"), bias)


def test_pruning_keeps_the_largest_or_the_smallest_products():
    original = adapter()
    norms = original.norms()["rank"]["up_proj"]
    for by, best in (("norm", norms.topk(2).values), ("bottom", (-norms).topk(2).values.neg())):
        kept = original.prune(2, by).norms()["rank"]["up_proj"]
        torch.testing.assert_close(kept.sort(dim=1).values, best.sort(dim=1).values)
    top, rest = original.prune(1), original.prune(RANK - 1, "bottom")
    bias = update(original.prune(0), "up_proj")
    parts = update(top, "up_proj") + update(rest, "up_proj") - bias
    torch.testing.assert_close(parts, update(original, "up_proj"))


def test_random_pruning_is_reproducible_and_depends_on_the_seed():
    original = adapter(rank=16)
    first, again, other = (original.prune(8, "random", seed) for seed in (0, 0, 1))
    assert_same(first, again)
    assert not torch.equal(first.A["up_proj"], other.A["up_proj"])


@pytest.mark.parametrize(("keep", "by"), [(-1, "norm"), (RANK + 1, "norm"), (1, "best")])
def test_pruning_out_of_range(keep, by):
    with pytest.raises(AdapterError):
        adapter().prune(keep, by)


def test_without_layers():
    original = adapter()
    bias = update(original.prune(0), "up_proj")
    actual = original.without_layers([0, 2])
    for layer, expected in enumerate((bias[0], update(original, "up_proj")[1], bias[2])):
        assert torch.equal(update(actual, "up_proj")[layer], expected)
    cleared = original.without_layers([0, 2], include_bias=True)
    assert not update(cleared, "up_proj")[[0, 2]].any()
    assert torch.equal(update(cleared, "up_proj")[1], update(original, "up_proj")[1])
    assert actual.provenance["without_layers"] == [0, 2]
    assert_same(
        dataclasses.replace(original.without_layers([]), provenance=original.provenance), original
    )


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_layers_out_of_range(layer):
    with pytest.raises(AdapterError, match="layer"):
        adapter().without_layers([layer])


def test_norms_against_dense_updates():
    original = adapter(bias=None)
    norms = original.norms()
    for module in SIZES:
        dense = torch.linalg.matrix_norm(update(original, module))
        torch.testing.assert_close(norms["layer"][module], dense.float())
        for rank in range(RANK):
            one = original.B[module][:, rank, :, None] * original.A[module][:, rank, None]
            torch.testing.assert_close(
                norms["rank"][module][:, rank], torch.linalg.matrix_norm(one)
            )
    assert all(torch.equal(adapter().norms()["layer"][m], norms["layer"][m]) for m in SIZES)


def test_equal_adapters_and_hashes(tmp_path):
    first = adapter()
    first.save(tmp_path / "a.safetensors")
    loaded = Adapter.load(tmp_path / "a.safetensors", BIAS)
    assert loaded == first and hash(loaded) == hash(first) and loaded is not first
    assert loaded in [first] and len({first, loaded}) == 1
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert copied == first and copied.provenance == first.provenance
    a, b = dict(first.A), dict(first.B)
    changed = {m: t + 1e-3 for m, t in b.items()}
    for other in (
        Adapter(a, changed, first.scale, first.bias),
        Adapter(a, b, first.scale + 1, first.bias),
        Adapter(a, b, first.scale),
        first.to(dtype=torch.float64),
        first.prune(1),
        "clip.safetensors",
        None,
    ):
        assert first != other and other not in [first]


def test_repr_is_one_short_line():
    first = adapter()
    sides = ({m: t[None] for m, t in f.items()} for f in (first.A, first.B))
    batch = AdapterBatch(*sides, 1.0)
    many = {f"module_{i}": torch.zeros(3, 4, 5) for i in range(300)}
    for value in (first, first.bias, batch, Adapter(many, many, 1.0)):
        assert "\n" not in repr(value) and len(repr(value)) < 400
    assert "float32 on cpu, scale 2.5" in repr(first)
