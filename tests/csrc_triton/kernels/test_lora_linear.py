"""The kernels of lora_linear in Triton's interpreter, against the oracle of the op's own tests."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from csrc_triton import lora_linear
from csrc_triton.lora_linear import kernels, reference
from csrc_triton.lora_linear.op import _check
from tests.csrc_triton import checks
from tests.csrc_triton.checks import random
from tests.csrc_triton.test_lora_linear import SCALE, frozen, inputs, op_of, oracle_of, packed

DTYPES = [torch.float32, torch.float16]
WARPS = {"num_warps": 4, "num_stages": 2}
# Small tiles make small shapes take several of each; 12 programs make the tokens split.
TILES = {
    "shrink": {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_K": 16, **WARPS},
    "expand": {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_N": 32, **WARPS},
    "reduce": {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_N": 32, "programs": 12, **WARPS},
    "epilogue": {"BLOCK_T": 16, "BLOCK_N": 32, "BLOCK_K": 16, "BLOCK_R": 16, **WARPS},
    "recompute": {"BLOCK_T": 16, "BLOCK_N": 32, "BLOCK_K": 16, "BLOCK_R": 32, **WARPS},
    "prefill": {"form": "expand"},
    "decode_shrink": {"BLOCK_R": 16, "BLOCK_K": 16, "programs": 24, **WARPS},
    "decode_linear": {"BLOCK_E": 16, "BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_R": 8, **WARPS},
}


def of_form(form: str) -> dict[str, dict[str, int | str]]:
    return {**TILES, "prefill": {"form": form}}


@pytest.fixture(autouse=True)
def kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2L_BACKEND", "triton")
    for name in ("lora_linear", "lora_linear_backward"):
        monkeypatch.delattr(reference, name)


def tiled(weight, bias, index, ranks=None, offsets=None, tiles=TILES):
    """The launches with given tiles as a differentiable function of x, lora_a and lora_b."""
    index = torch.tensor(index)
    ranks = None if ranks is None else torch.tensor(ranks)

    class Tiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, lora_a, lora_b):
            base = (weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            args = lora_a, lora_b, index, SCALE
            y, u = kernels.lora_linear(x, *base, *args, ranks, offsets, True, tiles)
            ctx.save_for_backward(x, lora_a, lora_b, u)
            return y

        @staticmethod
        def backward(ctx, grad):
            x, lora_a, lora_b, u = ctx.saved_tensors
            args = weight.to(x.dtype), lora_a, lora_b, index, SCALE
            return kernels.lora_linear_backward(grad, x, *args, ranks, offsets, u, tiles)

    return Tiled.apply


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 8, 16, 32, 48, 272, 512])
def test_ranks(r, dtype):
    index = [1, 0, 1]
    checks.assert_equals_oracle(
        op_of(*frozen(), index), oracle_of(*frozen(), index), inputs(r=r), dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 17, 129])
@pytest.mark.parametrize("index", [[0, 0, 0], [1, -1, 0], [-1, -1, -1]])
def test_tokens_and_sharing(tokens, index, dtype):
    checks.assert_equals_oracle(
        op_of(*frozen(), index), oracle_of(*frozen(), index), inputs(t=tokens), dtype
    )


def test_no_tokens():
    found = checks.values_and_gradients(
        op_of(*frozen(), [1, -1, 0]), [t.float() for t in inputs(t=0)]
    )
    assert found[0].shape == (3, 0, 6) and not any(g.any() for g in found[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 33])
def test_many_tiles_of_everything(tokens, dtype):
    sizes = {"d_in": 70, "d_out": 41}
    index, ranks = [2, -1, 0, 2], [20, 0, 7]
    checks.assert_equals_oracle(
        tiled(*frozen(**sizes), index, ranks),
        oracle_of(*frozen(**sizes), index, ranks),
        inputs(e=4, t=tokens, n=3, r=20, **sizes),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_odd_widths(tokens, dtype):
    index = [2, 0]
    checks.assert_equals_oracle(
        op_of(*frozen(2049, 31), index),
        oracle_of(*frozen(2049, 31), index),
        inputs(e=2, t=tokens, n=3, d_in=2049, d_out=31),
        dtype,
    )


@pytest.mark.parametrize("examples", [64, 65])
def test_one_token_each_of_many_examples(examples):
    index = [(7 * i) % 34 - 1 for i in range(examples)]
    ranks = [i % 9 for i in range(33)]
    checks.assert_equals_oracle(
        op_of(*frozen(), index, ranks),
        oracle_of(*frozen(), index, ranks),
        inputs(e=examples, t=1, n=33, r=8),
        torch.float32,
    )


@pytest.mark.parametrize("tokens", [1, 5])
def test_unused_slots_are_never_read(tokens):
    ranks = [3, 0, 17]
    x, lora_a, lora_b = inputs(n=3, r=20, t=tokens)
    for i, rank in enumerate(ranks):
        lora_a[i, rank:], lora_b[i, rank:] = float("nan"), float("inf")
    checks.assert_equals_oracle(
        op_of(*frozen(), [0, 1, 2], ranks),
        oracle_of(*frozen(), [0, 1, 2], ranks),
        [x, lora_a, lora_b],
        torch.float32,
    )


def test_unused_adapter_gets_zero_gradients():
    _, _, d_a, d_b = checks.values_and_gradients(
        op_of(*frozen(), [0, 0, 2]), [t.float() for t in inputs(n=4)]
    )
    for grad in (d_a, d_b):
        assert not grad[1].any() and not grad[3].any()
        assert grad[0].any() and grad[2].any()


def test_examples_without_adapter_are_the_plain_linear_bit_for_bit():
    x, lora_a, lora_b = (t.float() for t in inputs())
    weight, bias = (t.float() for t in frozen())
    y = lora_linear(x, weight, bias, lora_a, lora_b, torch.tensor([0, -1, 1]), SCALE)
    plain = F.linear(x, weight, bias)
    assert torch.equal(y[1], plain[1])
    assert not torch.isclose(y[0], plain[0]).all() and not torch.isclose(y[2], plain[2]).all()


@pytest.mark.parametrize("tokens", [1, 5])
def test_index_out_of_range_reads_nothing(tokens):
    x, lora_a, lora_b = (t.float() for t in inputs(t=tokens))
    weight, bias = (t.float() for t in frozen())
    args = weight, bias, lora_a, lora_b
    wrong, none = (torch.tensor(index) for index in ([7, 0, -3], [-1, 0, -1]))
    for form in kernels.FORMS:
        (y, u), (plain, _) = (
            kernels.lora_linear(x, *args, index, SCALE, None, None, True, of_form(form))
            for index in (wrong, none)
        )
        assert torch.equal(y, plain) and not u.view(3, tokens, -1)[[0, 2]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths", [[5, 3, 4], [0, 1, 5], [0, 0, 0], [33, 0, 16], [1, 1, 1], [129, 17, 0]]
)
def test_packed_examples(lengths, dtype):
    weight, bias = frozen()
    index = [1, -1, 1]
    x, lora_a, lora_b = inputs(t=max(5, *lengths))
    rows, offsets = packed(x, lengths)
    dense = oracle_of(weight, bias, index)

    def oracle(rows, lora_a, lora_b):
        parts = rows.split(lengths)
        widest = max(len(part) for part in parts)
        padded = torch.stack([F.pad(part, (0, 0, 0, widest - len(part))) for part in parts])
        return packed(dense(padded, lora_a, lora_b), lengths)[0]

    args = oracle, [rows, lora_a, lora_b], dtype
    if sum(lengths):
        checks.assert_equals_oracle(tiled(weight, bias, index, offsets=offsets), *args)
        short = offsets.to(torch.int32)
        checks.assert_equals_oracle(tiled(weight, bias, index, offsets=short), *args)
    else:
        found = checks.values_and_gradients(
            tiled(weight, bias, index, offsets=offsets), [rows, lora_a, lora_b]
        )
        assert found[0].shape == (0, 6) and not any(g.any() for g in found[2:])


def test_more_packed_examples_than_are_counted_at_once():
    lengths = [(3 * i) % 4 for i in range(300)]
    x, lora_a, lora_b = (t.float() for t in inputs(e=300, t=3))
    weight, bias = (t.float() for t in frozen())
    index = torch.arange(300) % 3 - 1
    rows, offsets = packed(x, lengths)
    args = weight, bias, lora_a, lora_b
    found = lora_linear(rows, *args, index, SCALE, offsets=offsets)
    y, u = kernels.lora_linear(x, *args, index, SCALE, None, None, False)
    assert u.shape == (0, 4)
    expected, _ = packed(y, lengths)
    torch.testing.assert_close(found, expected)


def test_wide_adapters_over_half_precision():
    x, lora_a, lora_b = inputs()
    weight, _ = frozen()
    found = checks.values_and_gradients(
        op_of(weight, None, [0, 1, 0]), [x.half(), lora_a.float(), lora_b.float()]
    )
    assert [t.dtype for t in found] == [*[torch.float16] * 2, *[torch.float32] * 2]
    rounded = [x.half().double(), lora_a.half().double(), lora_b.half().double()]
    exact = checks.values_and_gradients(oracle_of(weight.half(), None, [0, 1, 0]), rounded)
    for f, e in zip(found, exact, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=4e-3, atol=4e-3 * e.abs().max().item())


@pytest.mark.parametrize("tokens", [1, 5])
def test_layouts_do_not_matter(tokens):
    index = [0, -1, 1]
    weight, bias = (t.float() for t in frozen())
    weight = weight.T.contiguous().T
    x, lora_a, lora_b = (t.float() for t in inputs(t=tokens))
    factors = [t.mT.contiguous().mT for t in (lora_a, lora_b)]
    op = op_of(weight, bias, index)
    for turned in (
        x.mT.contiguous().mT,
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([x, -x], -1).flatten(-2)[..., ::2],
        x[:1].expand(3, -1, -1),
    ):
        assert op(turned, *factors).is_contiguous()
        checks.assert_equals_oracle(
            op, oracle_of(weight, bias, index), [turned, *factors], torch.float32
        )


def test_expanded_gradient():
    x, lora_a, lora_b = (t.float() for t in inputs())
    weight, _ = (t.float() for t in frozen())
    u = random(15, 4, seed=5).float()
    args = x, weight, lora_a, lora_b, torch.tensor([1, -1, 0]), SCALE, None, None, u
    ones = torch.ones(()).expand(3, 5, 6)
    for f, e in zip(
        kernels.lora_linear_backward(ones, *args),
        kernels.lora_linear_backward(ones.contiguous(), *args),
        strict=True,
    ):
        assert f.is_contiguous()
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("tokens", [1, 129])
def test_same_bits_twice(tokens):
    sizes = {"d_in": 64, "d_out": 48}
    checks.assert_same_bits_twice(
        tiled(*frozen(**sizes), [0, 1, 0, -1]),
        [t.float() for t in inputs(e=4, t=tokens, r=16, **sizes)],
    )


def test_number_of_splits_does_not_matter():
    sizes = {"d_in": 70, "d_out": 41}
    weight, bias = frozen(**sizes)
    for tokens in (1, 33):
        arguments = [t.float() for t in inputs(e=4, t=tokens, **sizes)]
        results = []
        for programs in (1, 7, 1000):
            tiles = {name: dict(tile) for name, tile in TILES.items()}
            for name in ("reduce", "decode_shrink"):
                tiles[name]["programs"] = programs
            op = tiled(weight, bias, [0, 1, 1, -1], tiles=tiles)
            results.append(checks.values_and_gradients(op, arguments))
        for other in results[1:]:
            for f, e in zip(other, results[0], strict=True):
                torch.testing.assert_close(f, e)


def test_gradient_of_integers_is_exact():
    """Sums of small integers have one right answer, whatever the order: a canary for splits."""
    x, lora_a, lora_b = (t.sign() * (t.abs() * 2).floor().clamp(max=3) for t in inputs(t=129))
    weight = torch.ones(6, 7)
    index = torch.tensor([1, 1, 0])
    u = torch.einsum("etd,erd->etr", x, lora_a[index])
    args = weight, lora_a.float(), lora_b.float(), index, 1.0, None, None, u.flatten(0, 1).float()
    grad = random(3, 129, 6, seed=3).sign().float()
    found = kernels.lora_linear_backward(grad, x.float(), *args, config=TILES)
    d_u = torch.einsum("eto,ero->etr", grad.double(), lora_b[index])
    d_a, d_b = torch.zeros_like(lora_a), torch.zeros_like(lora_b)
    d_a.index_add_(0, index, torch.einsum("etr,etd->erd", d_u, x))
    d_b.index_add_(0, index, torch.einsum("etr,eto->ero", u, grad.double()))
    assert torch.equal(found[1].double(), d_a) and torch.equal(found[2].double(), d_b)


@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(ragged):
    x, lora_a, lora_b = (t.float() for t in inputs())
    weight, bias = (t.float() for t in frozen())
    ranks = offsets = None
    if ragged:
        ranks = torch.tensor([4, 3])
        x, offsets = packed(x, [2, 0, 5])
    index = torch.tensor([1, -1, 0])
    args = lora_a, lora_b, index, SCALE, ranks, offsets
    for keep in (False, True):
        checks.opcheck_backward(torch.ops.v2l.lora_linear.default, (x, weight, bias, *args, keep))
    grad, u = random(*x.shape[:-1], 6).float(), random(x.numel() // 7, 4, seed=1).float()
    checks.opcheck_backward(torch.ops.v2l.lora_linear_backward.default, (grad, x, weight, *args, u))


def arguments() -> dict[str, object]:
    x, lora_a, lora_b = (t.float() for t in inputs())
    weight, bias = (t.float() for t in frozen())
    index = torch.tensor([1, -1, 0])
    names = "x", "weight", "bias", "lora_a", "lora_b", "adapter_index", "scale"
    return dict(zip(names, (x, weight, bias, lora_a, lora_b, index, SCALE), strict=True))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", torch.zeros(3, 7), r"x must be \[T, d_in\] packed, else .* not \[3, 7\]"),
        ("weight", torch.zeros(6, 8), r"weight must be \[d_out, 7\], not \[6, 8\]"),
        ("weight", torch.zeros(6, 7).half(), "weight must be of x's dtype torch.float32"),
        ("bias", torch.zeros(7), r"bias must be \[6\], not \[7\]"),
        ("lora_a", torch.zeros(2, 4, 6), r"lora_a must be \[n, r, 7\]"),
        ("lora_b", torch.zeros(2, 3, 6), r"lora_b must be \[2, 4, 6\], not \[2, 3, 6\]"),
        ("adapter_index", torch.tensor([0, 1]), r"adapter_index must be \[3\], not \[2\]"),
        ("adapter_index", torch.tensor([0, 2, 0]), r"adapter_index must be in \[-1, 1\]"),
        ("adapter_index", torch.tensor([0, -2, 0]), r"in \[-1, 1\], not in \[-2, 0\]"),
        ("adapter_index", torch.zeros(3), "adapter_index must be int32 or int64"),
        ("scale", float("nan"), "scale must be finite, not nan"),
        ("scale", float("-inf"), "scale must be finite, not -inf"),
        ("x", torch.zeros(3, 5, 7, dtype=torch.long), "x must be floating point"),
        ("weight", torch.zeros(6, 7).half(), "weight must be of x's dtype torch.float32"),
        ("bias", torch.zeros(6).half(), "bias must be of x's dtype torch.float32"),
        ("lora_a", torch.zeros(2, 4, 7).long(), "lora_a must be floating point"),
        ("lora_b", torch.zeros(2, 4, 6).long(), "lora_b must be floating point"),
        ("ranks", torch.tensor([4]), r"ranks must be \[2\], not \[1\]"),
        ("ranks", torch.tensor([4, 5]), r"ranks must be in \[0, 4\], not in \[4, 5\]"),
    ],
)
def test_bad_input_names_the_argument(name, wrong, message):
    with pytest.raises(ValueError, match=f"lora_linear: .*{message}"):
        lora_linear(**{**arguments(), name: wrong})


def test_every_tensor_on_one_device():
    given = {**arguments(), "ranks": torch.tensor([4, 4]), "offsets": torch.tensor([0, 5, 9, 15])}
    given["x"] = given["x"].flatten(0, 1)
    for name in given.keys() - {"x", "scale"}:
        with pytest.raises(ValueError, match=f"lora_linear: {name} must be on cpu, not meta"):
            _check(**{**given, name: given[name].to("meta")})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([0, 5, 15], r"offsets must be \[4\], not \[3\]"),
        ([1, 5, 10, 15], "offsets must be rising from 0 to at most 15"),
        ([0, 10, 5, 15], "offsets must be rising"),
        ([0, 5, 10, 16], "offsets must be rising"),
    ],
)
def test_bad_offsets(wrong, message):
    given = arguments()
    given["x"] = given["x"].flatten(0, 1)
    with pytest.raises(ValueError, match=message):
        lora_linear(**given, offsets=torch.tensor(wrong))
