"""lora_linear against one matrix product after another, example by example."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench import released
from csrc_triton import device as configs
from csrc_triton import lora_linear
from csrc_triton.lora_linear import kernels
from csrc_triton.lora_linear import op as op_module
from csrc_triton.lora_linear.op import _check
from tests.csrc_triton import checks
from tests.csrc_triton.checks import random
from tests.golden import load, relative

SCALE = 0.7
WARPS = {"num_warps": 4, "num_stages": 2}
# Small tiles make small shapes take several of each; 12 programs make the tokens split.
SMALL_TILES = {
    "shrink": {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_K": 16, **WARPS},
    "expand": {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_N": 32, **WARPS},
    "reduce": {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_N": 32, "programs": 12, **WARPS},
    "decode_shrink": {"BLOCK_R": 16, "BLOCK_K": 16, "programs": 24, **WARPS},
    "decode_expand": {"BLOCK_R": 16, "BLOCK_N": 32, **WARPS},
}


def use_small_tiles(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    def lookup(op, capability, *, kernel, **shape):
        tile = SMALL_TILES[kernel]
        return {**tile, **{k: v for k, v in changes.items() if k in tile}}

    monkeypatch.setattr(configs, "lookup", lookup)


def oracle_of(weight, bias, index, ranks=None):
    def oracle(x, lora_a, lora_b):
        rows = []
        for example, i in zip(x, index, strict=True):
            y = F.linear(example, weight.to(x), None if bias is None else bias.to(x))
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
            weight.to(x),
            None if bias is None else bias.to(x),
            lora_a,
            lora_b,
            torch.tensor(index, dtype=torch.long, device=x.device),
            SCALE,
            ranks=None if ranks is None else torch.tensor(ranks, device=x.device),
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


def assert_equals_oracle(tensors, index, dtype, device, ranks=None, bias=True) -> None:
    weight, vector = frozen(tensors[0].shape[-1], tensors[2].shape[-1])
    args = weight, vector if bias else None, index, ranks
    checks.assert_equals_oracle(op_of(*args), oracle_of(*args), tensors, dtype, device)


@pytest.mark.parametrize("r", [1, 16, 48, 272])
def test_ranks(r, device, dtype):
    assert_equals_oracle(inputs(r=r), [1, 0, 1], dtype, device)


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("index", [[0, 0, 0], [1, -1, 0], [-1, -1, -1]])
def test_tokens_and_sharing(tokens, index, device, dtype):
    assert_equals_oracle(inputs(t=tokens), index, dtype, device, bias=False)


@pytest.mark.parametrize("index", [[0, 1], [-1, 1], [-1, -1]])
def test_decoding(index, kernel_device, dtype, monkeypatch):
    """One token an example, without gradients: kernels of its own. The product with the weight is
    PyTorch's bit for bit."""
    use_small_tiles(monkeypatch)
    x, lora_a, lora_b = (
        t.to(kernel_device, dtype) for t in inputs(e=2, t=1, r=20, d_in=70, d_out=41)
    )
    weight, bias = (t.to(x) for t in frozen(70, 41))
    with torch.no_grad():
        y = op_of(weight, bias, index, [20, 7])(x, lora_a, lora_b)
    exact = oracle_of(weight, bias, index, [20, 7])(*(t.double() for t in (x, lora_a, lora_b)))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=8 * eps, atol=8 * eps * exact.abs().max())
    plain = F.linear(x, weight, bias)
    assert [torch.equal(a, b) for a, b in zip(y, plain, strict=True)] == [i < 0 for i in index]


@pytest.mark.parametrize("tokens", [1, 33])
def test_many_tiles_of_everything(tokens, kernel_device, dtype, monkeypatch):
    use_small_tiles(monkeypatch)
    tensors = inputs(e=4, t=tokens, n=3, r=20, d_in=70, d_out=41)
    assert_equals_oracle(tensors, [2, -1, 0, 2], dtype, kernel_device, ranks=[20, 0, 7])


@pytest.mark.parametrize("tokens", [1, 3])
def test_odd_widths(tokens, device):
    tensors = inputs(e=2, t=tokens, n=3, d_in=2049, d_out=31)
    assert_equals_oracle(tensors, [2, 0], torch.float32, device)


@pytest.mark.parametrize("examples", [16, 65])
def test_one_token_each_of_many_examples(examples, device):
    index = [(7 * i) % 34 - 1 for i in range(examples)]
    tensors = inputs(e=examples, t=1, n=33, r=8)
    assert_equals_oracle(tensors, index, torch.float32, device, ranks=[i % 9 for i in range(33)])


def test_no_tokens(device):
    tensors = [t.float().to(device) for t in inputs(t=0)]
    y, *grads = checks.values_and_gradients(op_of(*frozen(), [1, -1, 0]), tensors)
    assert y.shape == (3, 0, 6) and not any(g.any() for g in grads)


def test_no_adapters(device):
    x, weight = random(2, 3, 16).float().to(device), random(8, 16).float().to(device)
    a, b = x.new_empty(0, 4, 16), x.new_empty(0, 4, 8)
    index = torch.tensor([-1, -1], device=device)
    y, d_x = checks.values_and_gradients(
        lambda x: lora_linear(x, weight, None, a, b, index, 0.5), [x], [x.new_ones(2, 3, 8)]
    )
    torch.testing.assert_close(y, x @ weight.T)
    torch.testing.assert_close(d_x, weight.sum(0).expand(2, 3, 16))


def test_without_adapter_it_is_the_plain_linear_bit_for_bit(device):
    tensors = [t.float().to(device) for t in inputs()]
    y = op_of(*frozen(), [0, -1, 1])(*tensors)
    plain = F.linear(tensors[0], *(t.to(tensors[0]) for t in frozen()))
    assert torch.equal(y[1], plain[1])
    assert not torch.isclose(y[0], plain[0]).all() and not torch.isclose(y[2], plain[2]).all()


def test_unused_adapter_gets_zero_gradients(device):
    tensors = [t.float().to(device) for t in inputs(n=4)]
    _, _, d_a, d_b = checks.values_and_gradients(op_of(*frozen(), [0, 0, 2]), tensors)
    for grad in (d_a, d_b):
        assert not grad[1].any() and not grad[3].any()
        assert grad[0].any() and grad[2].any()


@pytest.mark.parametrize("tokens", [1, 5])
def test_unused_slots_are_never_read(tokens, device):
    ranks = [3, 0, 17]
    x, lora_a, lora_b = inputs(n=3, r=20, t=tokens)
    for i, rank in enumerate(ranks):
        lora_a[i, rank:], lora_b[i, rank:] = float("nan"), float("inf")
    assert_equals_oracle([x, lora_a, lora_b], [0, 1, 2], torch.float32, device, ranks)


@pytest.mark.parametrize("tokens", [1, 5])
def test_index_out_of_range_reads_nothing(tokens, kernel_device):
    x, lora_a, lora_b = (t.float().to(kernel_device) for t in inputs(t=tokens))
    weight, bias = (t.to(x) for t in frozen())
    (y, u), (plain, _) = (
        kernels.lora_linear(
            x, weight, bias, lora_a, lora_b, torch.tensor(i, device=kernel_device), 1.0, None, True
        )
        for i in ([7, 0, -3], [-1, 0, -1])
    )
    assert torch.equal(y, plain) and not u.view(3, tokens, -1)[[0, 2]].any()


def test_wide_adapters_over_half_precision(device):
    x, lora_a, lora_b = (t.to(device) for t in inputs())
    weight = frozen()[0].half()
    results = checks.values_and_gradients(
        op_of(weight, None, [0, 1, 0]), [x.half(), lora_a.float(), lora_b.float()]
    )
    assert [t.dtype for t in results] == [torch.float16] * 2 + [torch.float32] * 2
    rounded = [t.half().double() for t in (x, lora_a, lora_b)]
    exact = checks.values_and_gradients(oracle_of(weight, None, [0, 1, 0]), rounded)
    for r, e in zip(results, exact, strict=True):
        torch.testing.assert_close(r.double(), e, rtol=4e-3, atol=4e-3 * e.abs().max().item())


@pytest.mark.parametrize("tokens", [1, 5])
def test_layouts_do_not_matter(tokens, device):
    index = [0, -1, 1]
    checks.assert_layouts_do_not_matter(op_of(*frozen(), index), inputs(t=tokens), device)
    weight, bias = frozen()
    args = weight.T.contiguous().T, bias, index
    x, *factors = inputs(t=tokens)
    for strided in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([x, -x], -1).flatten(-2)[..., ::2],
        x[:1].expand(3, -1, -1),
    ):
        checks.assert_equals_oracle(
            op_of(*args), oracle_of(*args), [strided, *factors], torch.float32, device
        )


@pytest.mark.parametrize("tokens", [1, 33])
def test_same_bits_twice(tokens, device, monkeypatch):
    use_small_tiles(monkeypatch)
    tensors = inputs(e=4, t=tokens, r=16, d_in=64, d_out=48)
    checks.assert_same_bits_twice(
        op_of(*frozen(64, 48), [0, 1, 0, -1]), [t.float().to(device) for t in tensors]
    )


@pytest.mark.parametrize("programs", [1, 7, 1000])
@pytest.mark.parametrize("tokens", [1, 33])
def test_sums_of_integers_are_exact_however_they_are_split(
    tokens, programs, kernel_device, monkeypatch
):
    use_small_tiles(monkeypatch, programs=programs)
    index = torch.tensor([1, 1, 0, -1], device=kernel_device)
    x, lora_a, lora_b = (
        (t.sign() * (t.abs() * 2).floor().clamp(max=3)).float().to(kernel_device)
        for t in inputs(e=4, t=tokens, d_in=70, d_out=41)
    )
    results = checks.values_and_gradients(
        lambda *t: lora_linear(t[0], t[0].new_ones(41, 70), None, *t[1:], index, 1.0),
        [x, lora_a, lora_b],
        [random(4, tokens, 41, seed=3).sign().to(x)],
    )
    expected = checks.values_and_gradients(
        lambda x, a, b: (
            x.sum(-1, keepdim=True)
            + torch.where(index[:, None, None] < 0, 0, x @ a[index].mT @ b[index])
        ),
        [t.double() for t in (x, lora_a, lora_b)],
        [random(4, tokens, 41, seed=3).sign().to(x).double()],
    )
    for r, e in zip(results, expected, strict=True):
        assert torch.equal(r.double(), e)


@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(ragged, device):
    x, lora_a, lora_b = (t.float().to(device).requires_grad_() for t in inputs())
    weight, bias = (t.to(x).detach() for t in frozen())
    ranks = torch.tensor([4, 3], device=device) if ragged else None
    index = torch.tensor([1, -1, 0], device=device)
    args = lora_a, lora_b, index, SCALE, ranks
    torch.library.opcheck(torch.ops.v2l.lora_linear.default, (x, weight, bias, *args, True))
    checks.opcheck_backward(torch.ops.v2l.lora_linear.default, (x, weight, bias, *args, False))
    grad, u = random(3, 5, 6).to(x), random(15, 4, seed=1).to(x)
    checks.opcheck_backward(torch.ops.v2l.lora_linear_backward.default, (grad, x, weight, *args, u))


def test_gradcheck():
    checks.assert_gradcheck(op_of(*frozen(), [1, -1, 1], ranks=[4, 3]), inputs())


def test_compiles():
    op = op_of(*(t.float() for t in frozen()), [1, -1, 0])
    short, longer = ([t.float() for t in inputs(t=tokens)] for tokens in (5, 9))
    checks.assert_compiles(op, short, longer, "aot_eager")


def test_weight_is_frozen():
    x, lora_a, lora_b = inputs()
    weight, bias = (t.requires_grad_() for t in frozen())
    lora_linear(
        x, weight, bias, lora_a.requires_grad_(), lora_b, torch.tensor([0, 1, 0]), SCALE
    ).sum().backward()
    assert weight.grad is None and bias.grad is None and lora_a.grad is not None


# --- the released code -----------------------------------------------------------------------


def test_equals_released_op_order():
    x, lora_a, lora_b = inputs(e=6, n=3)
    weight, _ = frozen()
    questions = torch.tensor([2, 0, 4])
    index = torch.arange(3).repeat_interleave(questions)
    torch.testing.assert_close(
        lora_linear(x, weight, None, lora_a, lora_b, index, SCALE),
        released.lora_linear(x, weight, lora_a, lora_b, questions, SCALE),
    )


def golden_case() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    golden = load("a/lora_layer")
    prefix = "n1.down_proj."
    case = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    return golden, case, torch.arange(3).repeat_interleave(golden["n1.n_qs"])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_golden(layer):
    golden, case, index = golden_case()
    weight, scale = golden["base.down_proj.weight"][layer], golden["scaling"].item()
    lora_a, lora_b = (case[k][:, layer].clone().requires_grad_() for k in "AB")
    y = lora_linear(case["x"], weight, None, lora_a, lora_b, index, scale)
    assert relative(y, case["y"][layer]) <= 3e-6
    (y * case["cotangent_y"][layer]).sum().backward()
    assert relative(lora_a.grad, case["grad_A"][:, layer]) <= 1e-5
    assert relative(lora_b.grad, case["grad_B"][:, layer]) <= 1e-5


def test_golden_input_gradient():
    golden, case, index = golden_case()
    x = case["x"].requires_grad_()
    for layer, weight in enumerate(golden["base.down_proj.weight"]):
        lora_a, lora_b = case["A"][:, layer], case["B"][:, layer]
        y = lora_linear(x, weight, None, lora_a, lora_b, index, golden["scaling"].item())
        (y * case["cotangent_y"][layer]).sum().backward()
    assert relative(x.grad, case["grad_x"]) <= 1e-5


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_golden_packed(layer):
    """The released code packs sequences of several lengths; here each is a call of its own."""
    golden = load("a/lora_layer")
    index = torch.arange(2).repeat_interleave(golden["packed.n_qs"])
    sequences = golden["packed.x"][0].split(golden["packed.seq_lens"].tolist())
    weight, scale = golden["base.down_proj.weight"][layer], golden["scaling"].item()
    lora_a, lora_b = (golden[f"packed.{k}"][:, layer] for k in "AB")
    y = torch.cat([
        lora_linear(x[None], weight, None, lora_a, lora_b, index[i : i + 1], scale)[0]
        for i, x in enumerate(sequences)
    ])  # fmt: skip
    assert relative(y, golden["packed.y"][layer, 0]) <= 3e-6


# --- arguments -------------------------------------------------------------------------------


def arguments() -> dict[str, object]:
    names = "x", "weight", "bias", "lora_a", "lora_b", "adapter_index", "scale", "ranks"
    x, lora_a, lora_b = (t.float() for t in inputs())
    index, ranks = torch.tensor([1, -1, 0]), torch.tensor([4, 4])
    values = x, *(t.float() for t in frozen()), lora_a, lora_b, index, SCALE, ranks
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", torch.zeros(3, 7), r"x must be \[E, T, d_in\], got \[3, 7\]"),
        ("x", torch.zeros(3, 5, 7, dtype=torch.long), "x must be floating point"),
        ("weight", torch.zeros(6, 8), r"weight must be \[d_out, 7\], got \[6, 8\]"),
        ("weight", torch.zeros(6, 7).half(), "weight must be torch.float32, got torch.float16"),
        ("bias", torch.zeros(7), r"bias must be \[6\], got \[7\]"),
        ("bias", torch.zeros(6).half(), "bias must be torch.float32"),
        ("lora_a", torch.zeros(2, 4, 6), r"lora_a must be \[n, r, 7\], got \[2, 4, 6\]"),
        ("lora_a", torch.zeros(2, 4, 7).long(), "lora_a must be floating point"),
        ("lora_b", torch.zeros(2, 3, 6), r"lora_b must be \[2, 4, 6\], got \[2, 3, 6\]"),
        ("lora_b", torch.zeros(2, 4, 6).long(), "lora_b must be floating point"),
        ("adapter_index", torch.tensor([0, 1]), r"adapter_index must be \[3\], got \[2\]"),
        ("adapter_index", torch.tensor([0, 2, 0]), r"adapter_index must be in \[-1, 1\]"),
        ("adapter_index", torch.tensor([0, -2, 0]), r"in \[-1, 1\], got values in \[-2, 0\]"),
        ("adapter_index", torch.zeros(3), "adapter_index must be torch.int32 or torch.int64"),
        ("scale", float("nan"), "scale must be finite, got nan"),
        ("scale", float("-inf"), "scale must be finite, got -inf"),
        ("ranks", torch.tensor([4]), r"ranks must be \[2\], got \[1\]"),
        ("ranks", torch.tensor([4, 5]), r"ranks must be in \[0, 4\], got values in \[4, 5\]"),
    ],
)
def test_error_names_the_argument(name, wrong, message):
    with pytest.raises(ValueError, match=f"lora_linear: .*{message}"):
        lora_linear(**{**arguments(), name: wrong})


@pytest.mark.parametrize("name", [n for n in arguments() if n not in ("x", "scale")])
def test_every_tensor_on_one_device(name):
    args = arguments()
    with pytest.raises(ValueError, match=f"lora_linear: {name} must be on cpu, got meta"):
        _check(**{**args, name: args[name].to("meta")})


# --- eager inference on a CPU ---------------------------------------------------------------------


class SeesOps(TorchDispatchMode):
    """Counts calls of the op itself."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.v2l.lora_linear.default
        return func(*args, **(kwargs or {}))


def on_cpu(dtype=torch.float32, n=2) -> list[torch.Tensor]:
    weight, bias = frozen()
    x, a, b = inputs(n=n)
    return [t.to(dtype) for t in (x, weight, bias, a, b)]


@pytest.mark.parametrize("bad_slots", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("n", "index"),
    [(1, [0, 0, 0]), (1, [0, -1, 0]), (2, [1, 0, 1]), (2, [-1, 1, -1]), (3, [0, 1, 2]),
     (3, [2, 0, 1]), (3, [-1, -1, -1])],
)  # fmt: skip
def test_eager_inference_gives_the_ops_result(n, index, half, bad_slots, monkeypatch):
    """The op is not called, and adapters that no example has reach nothing."""
    monkeypatch.setenv("V2L_BACKEND", "auto")
    x, weight, bias, a, b = on_cpu(torch.bfloat16 if half else torch.float32, n)
    if bad_slots:
        for slot in set(range(n)) - set(index):
            a[slot], b[slot] = float("nan"), float("inf")
    args = x, weight, bias, a, b, torch.tensor(index), SCALE
    expected, _ = torch.ops.v2l.lora_linear(*args, None, False)
    monkeypatch.setattr(op_module, "_forward", None)
    for ranks in (None, torch.full((n,), a.shape[1])):
        actual = lora_linear(*args, ranks=ranks)
        assert actual.dtype == x.dtype
        assert relative(actual, expected) <= (2**-7 if half else 1e-6)
        assert torch.equal(actual[torch.tensor(index) < 0], expected[torch.tensor(index) < 0])


def test_eager_inference_reads_the_index_at_every_call(monkeypatch):
    monkeypatch.setenv("V2L_BACKEND", "auto")
    x, weight, bias, a, b = on_cpu()
    index = torch.tensor([0, 0, 0])
    before = lora_linear(x, weight, bias, a, b, index, SCALE)
    index[1] = 1
    after = lora_linear(x, weight, bias, a, b, index, SCALE)
    assert torch.equal(after[::2], before[::2]) and not torch.isclose(after[1], before[1]).any()
    index[1] = -1
    torch.testing.assert_close(
        lora_linear(x, weight, bias, a, b, index, SCALE)[1], F.linear(x[1], weight, bias)
    )
    index[1] = 2
    with pytest.raises(ValueError, match="adapter_index"):
        lora_linear(x, weight, bias, a, b, index, SCALE)


def test_the_op_runs_where_something_must_see_it(monkeypatch):
    monkeypatch.setenv("V2L_BACKEND", "auto")
    x, weight, bias, a, b = on_cpu()
    args = weight, bias, a, b, torch.tensor([0, 1, -1]), SCALE
    with SeesOps() as seen:
        expected = lora_linear(x, *args)
    assert seen.count == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lora_linear(x, *args).dtype == torch.bfloat16
    leaf = x.clone().requires_grad_()
    assert lora_linear(leaf, *args).requires_grad
    graph = make_fx(lambda x: lora_linear(x, *args))(x)
    assert any(node.target is torch.ops.v2l.lora_linear.default for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x), expected)
    ragged = torch.tensor([1, 4])
    torch.testing.assert_close(
        lora_linear(x, *args, ranks=ragged),
        torch.ops.v2l.lora_linear(x, *args, ragged, False)[0],
    )
