"""lora_linear against one matrix product after another, example by example."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bench import released
from csrc_triton import lora_linear
from tests.csrc_triton import checks
from tests.csrc_triton.checks import random
from tests.golden import load, relative

SCALE = 0.7


def oracle_of(weight, bias, index, ranks=None):
    def oracle(x, lora_a, lora_b):
        rows = []
        for example, i in zip(x, index, strict=True):
            y = F.linear(example, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            if i >= 0:
                r = lora_a.shape[1] if ranks is None else ranks[i]
                y = y + SCALE * (example @ lora_a[i, :r].T) @ lora_b[i, :r]
            rows.append(y)
        return torch.stack(rows)

    return oracle


def op_of(weight, bias, index, ranks=None):
    def op(x, lora_a, lora_b):
        return lora_linear(
            x,
            weight.to(x.dtype),
            None if bias is None else bias.to(x.dtype),
            lora_a,
            lora_b,
            torch.tensor(index, dtype=torch.long),
            SCALE,
            ranks=None if ranks is None else torch.tensor(ranks),
        )

    return op


def inputs(e=3, t=5, n=2, r=4, d_in=7, d_out=6) -> list[torch.Tensor]:
    return [
        random(e, t, d_in, seed=0),
        random(n, r, d_in, seed=1) / d_in**0.5,
        random(n, r, d_out, seed=2),
    ]


def frozen(d_in=7, d_out=6) -> tuple[torch.Tensor, torch.Tensor]:
    return random(d_out, d_in, seed=8) / d_in**0.5, random(d_out, seed=9)


def packed(x: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``lengths[i]`` tokens of each example behind each other, and their offsets."""
    rows = torch.cat([example[:length] for example, length in zip(x, lengths, strict=True)])
    return rows, F.pad(torch.tensor(lengths).cumsum(0), (1, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [1, 8, 16, 32, 48])
def test_ranks(r, dtype):
    index = [1, 0, 1]
    checks.assert_equals_oracle(
        op_of(*frozen(), index), oracle_of(*frozen(), index), inputs(r=r), dtype
    )


@pytest.mark.parametrize("tokens", [0, 1, 5, 17, 129])
@pytest.mark.parametrize("index", [[0, 0, 0], [1, -1, 0], [-1, -1, -1]])
def test_tokens_and_sharing(tokens, index):
    weight, _ = frozen()
    args = op_of(weight, None, index), oracle_of(weight, None, index), inputs(t=tokens)
    if tokens:
        checks.assert_equals_oracle(*args, torch.float32)
    else:
        found = checks.values_and_gradients(args[0], args[2])
        assert found[0].shape == (3, 0, 6) and not any(g.any() for g in found[1:])


def test_odd_widths():
    index = [2, 0]
    checks.assert_equals_oracle(
        op_of(*frozen(2049, 31), index),
        oracle_of(*frozen(2049, 31), index),
        inputs(e=2, n=3, d_in=2049, d_out=31),
        torch.float32,
    )


def test_without_adapter_it_is_the_plain_linear_bit_for_bit():
    x, lora_a, lora_b = (t.float() for t in inputs())
    weight, bias = (t.float() for t in frozen())
    y = lora_linear(x, weight, bias, lora_a, lora_b, torch.tensor([0, -1, 1]), SCALE)
    plain = F.linear(x, weight, bias)
    assert torch.equal(y[1], plain[1])
    assert not torch.isclose(y[0], plain[0]).all() and not torch.isclose(y[2], plain[2]).all()


def test_unused_adapter_gets_zero_gradients():
    op = op_of(*frozen(), [0, 0, 2])
    _, _, d_a, d_b = checks.values_and_gradients(op, inputs(n=4))
    for grad in (d_a, d_b):
        assert not grad[1].any() and not grad[3].any()
        assert grad[0].any() and grad[2].any()


def test_unused_slots_are_never_read():
    ranks = [3, 0, 4]
    x, lora_a, lora_b = inputs(n=3)
    for i, rank in enumerate(ranks):
        lora_a[i, rank:], lora_b[i, rank:] = float("nan"), float("inf")
    index = [0, 1, 2]
    checks.assert_equals_oracle(
        op_of(*frozen(), index, ranks),
        oracle_of(*frozen(), index, ranks),
        [x, lora_a, lora_b],
        torch.float64,
    )


@pytest.mark.parametrize("lengths", [[5, 3, 4], [0, 1, 5], [0, 0, 0]])
def test_packed_examples_equal_dense_ones(lengths):
    x, lora_a, lora_b = inputs()
    weight, bias = frozen()
    index = torch.tensor([1, -1, 1])
    rows, offsets = packed(x, lengths)

    def dense(x, lora_a, lora_b):
        return packed(lora_linear(x, weight, bias, lora_a, lora_b, index, SCALE), lengths)[0]

    def ragged(x, lora_a, lora_b):
        rows, _ = packed(x, lengths)
        return lora_linear(rows, weight, bias, lora_a, lora_b, index, SCALE, offsets=offsets)

    assert rows.shape[0] == sum(lengths)
    for f, e in zip(
        checks.values_and_gradients(ragged, [x, lora_a, lora_b]),
        checks.values_and_gradients(dense, [x, lora_a, lora_b]),
        strict=True,
    ):
        torch.testing.assert_close(f, e)


def test_weight_is_frozen():
    x, lora_a, lora_b = inputs()
    weight, bias = (t.requires_grad_() for t in frozen())
    lora_linear(
        x, weight, bias, lora_a.requires_grad_(), lora_b, torch.tensor([0, 1, 0]), SCALE
    ).sum().backward()
    assert weight.grad is None and bias.grad is None and lora_a.grad is not None


def test_wide_adapters_over_half_precision():
    x, lora_a, lora_b = inputs()
    weight, _ = frozen()
    found = checks.values_and_gradients(
        op_of(weight, None, [0, 1, 0]), [x.bfloat16(), lora_a.float(), lora_b.float()]
    )
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, *[torch.float32] * 2]


def test_gradcheck():
    checks.assert_gradcheck(op_of(*frozen(), [1, -1, 1], ranks=[4, 3]), inputs())


def test_layouts_do_not_matter():
    checks.assert_layouts_do_not_matter(op_of(*frozen(), [0, -1, 1]), inputs())
    x, lora_a, lora_b = inputs(e=5, t=5)
    index = torch.tensor([0, 1, -1, 1, 0])
    weight, bias = frozen()
    turned = lora_linear(x.transpose(0, 1), weight, bias, lora_a, lora_b, index, SCALE)
    straight = lora_linear(
        x.transpose(0, 1).contiguous(), weight, bias, lora_a, lora_b, index, SCALE
    )
    torch.testing.assert_close(turned, straight, rtol=1e-12, atol=1e-12)
    shared = lora_linear(
        x[:1].expand(5, -1, -1), weight.T.contiguous().T, bias, lora_a, lora_b, index, SCALE
    )
    torch.testing.assert_close(
        shared, lora_linear(x[:1].repeat(5, 1, 1), weight, bias, lora_a, lora_b, index, SCALE)
    )


def test_same_bits_twice():
    checks.assert_same_bits_twice(
        op_of(*frozen(64, 48), [0, 1, 0, -1]),
        [t.float() for t in inputs(e=4, t=129, r=16, d_in=64, d_out=48)],
    )


def test_equals_released_op_order():
    x, lora_a, lora_b = inputs(e=6, n=3)
    weight, _ = frozen()
    questions = torch.tensor([2, 0, 4])
    index = torch.arange(3).repeat_interleave(questions)
    torch.testing.assert_close(
        lora_linear(x, weight, None, lora_a, lora_b, index, SCALE),
        released.lora_linear(x, weight, lora_a, lora_b, questions, SCALE),
    )


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_golden(layer):
    golden = load("a/lora_layer")
    weight, scale = golden["base.down_proj.weight"][layer], golden["scaling"].item()
    case = {k.removeprefix("n1.down_proj."): v for k, v in golden.items() if k.startswith("n1.")}
    index = torch.arange(3).repeat_interleave(golden["n1.n_qs"])
    x = case["x"].requires_grad_()
    lora_a, lora_b = (case[k][:, layer].clone().requires_grad_() for k in "AB")
    y = lora_linear(x, weight, None, lora_a, lora_b, index, scale)
    assert relative(y, case["y"][layer]) <= 3e-6
    (y * case["cotangent_y"][layer]).sum().backward()
    assert relative(lora_a.grad, case["grad_A"][:, layer]) <= 1e-5
    assert relative(lora_b.grad, case["grad_B"][:, layer]) <= 1e-5


def test_golden_input_gradient():
    golden = load("a/lora_layer")
    case = {k.removeprefix("n1.down_proj."): v for k, v in golden.items() if k.startswith("n1.")}
    index = torch.arange(3).repeat_interleave(golden["n1.n_qs"])
    x = case["x"].requires_grad_()
    for layer, weight in enumerate(golden["base.down_proj.weight"]):
        lora_a, lora_b = case["A"][:, layer], case["B"][:, layer]
        y = lora_linear(x, weight, None, lora_a, lora_b, index, golden["scaling"].item())
        (y * case["cotangent_y"][layer]).sum().backward()
    assert relative(x.grad, case["grad_x"]) <= 1e-5


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_golden_packed(layer):
    golden = load("a/lora_layer")
    offsets = F.pad(golden["packed.seq_lens"].cumsum(0), (1, 0))
    y = lora_linear(
        golden["packed.x"][0],
        golden["base.down_proj.weight"][layer],
        None,
        golden["packed.A"][:, layer],
        golden["packed.B"][:, layer],
        torch.arange(2).repeat_interleave(golden["packed.n_qs"]),
        golden["scaling"].item(),
        offsets=offsets,
    )
    assert relative(y, golden["packed.y"][layer, 0]) <= 3e-6


@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(ragged):
    x, lora_a, lora_b = (t.float().requires_grad_() for t in inputs())
    weight, bias = (t.float() for t in frozen())
    ranks = torch.tensor([4, 3]) if ragged else None
    offsets = None
    if ragged:
        rows, offsets = packed(x.detach(), [2, 0, 5])
        x = rows.requires_grad_()
    index = torch.tensor([1, -1, 0])
    torch.library.opcheck(
        torch.ops.v2l.lora_linear.default,
        (x, weight, bias, lora_a, lora_b, index, SCALE, ranks, offsets, True),
    )
    grad, u = random(*x.shape[:-1], 6).float(), random(x.numel() // 7, 4, seed=1).float()
    checks.opcheck_backward(
        torch.ops.v2l.lora_linear_backward.default,
        (grad, x, weight, lora_a, lora_b, index, SCALE, ranks, offsets, u),
    )


def test_compiles():
    weight, bias = (t.float() for t in frozen())
    index = torch.tensor([1, -1, 0])

    def op(x, lora_a, lora_b):
        return lora_linear(x, weight, bias, lora_a, lora_b, index, SCALE)

    short, longer = ([t.float() for t in inputs(t=tokens)] for tokens in (5, 9))
    checks.assert_compiles(op, short, longer, "aot_eager")


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_without_any_adapter(packed):
    x = torch.randn(6, 16, requires_grad=True)
    weight, a, b = torch.randn(8, 16), torch.randn(0, 4, 16), torch.randn(0, 4, 8)
    offsets = torch.tensor([0, 3, 6]) if packed else None
    rows = x if packed else x.view(2, 3, 16)
    y = lora_linear(rows, weight, None, a, b, torch.tensor([-1, -1]), 0.5, offsets=offsets)
    torch.testing.assert_close(y.reshape(6, 8), x @ weight.T)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(6, 16))
