"""perceiver_attention against a softmax over the normalized context."""

from __future__ import annotations

import shutil

import pytest
import torch

from csrc_triton import device as configs
from csrc_triton import perceiver_attention
from csrc_triton.perceiver_attention import kernels
from csrc_triton.perceiver_attention.reference import visible_bounds
from tests.csrc_triton import checks
from tests.csrc_triton.checks import random

COMPILERS = ["aot_eager"]
if shutil.which("g++"):
    COMPILERS.append(pytest.param("inductor", marks=pytest.mark.slow))
VARIANTS = [v.value for v in (kernels.PLAIN, kernels.TRANSPOSED_SOFTMAX, kernels.TRANSPOSED)]
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
WARPS = {"num_warps": 4, "num_stages": 2}


def oracle(query, context, inv_rms):
    normed = context * inv_rms[..., None]
    scores = query @ normed.mT
    scores = torch.where((inv_rms == 0)[:, None], float("-inf"), scores)
    empty = (inv_rms == 0).all(-1)[:, None, None]
    probs = torch.softmax(torch.where(empty, 0.0, scores), -1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(torch.where(empty, 0.0, scores), -1)
    return probs @ normed, torch.where(empty[..., 0], float("-inf"), lse)


def inputs(n: int, p: int, s: int, z: int, lengths: list[int] | None = None) -> list[torch.Tensor]:
    inv_rms = random(n, s, seed=2).abs() + 0.5
    if lengths is not None:
        inv_rms = inv_rms * (torch.arange(s) < torch.tensor(lengths)[:, None])
    return [random(n, p, z, seed=0) / z**0.5, random(n, s, z, seed=1), inv_rms]


def finite(function):
    """The function with exp(lse), which is finite in rows that see nothing."""

    def finite_lse(query, context, inv_rms):
        out, lse = function(query, context, inv_rms)
        return out, lse.exp()

    return finite_lse


OP = finite(perceiver_attention)


def assert_equals_oracle(tensors, dtype, device) -> None:
    checks.assert_equals_oracle(OP, finite(oracle), tensors, dtype, device)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    """Makes small shapes take several tiles of each kernel; called with the attention's variant."""
    tuned = configs.lookup

    def use(variant: int, splits: int = 1, tokens: int = 16, fixed: bool = True) -> None:
        tiles = {
            "attend": {"BLOCK_P": 16, "BLOCK_S": tokens, "VAR": variant, **WARPS},
            "score_gradients": {"BLOCK_P": 16, "BLOCK_S": tokens, "BLOCK_K": 16, **WARPS},
        }

        def lookup(op, capability, *, kernel, **shape):
            return tiles.get(kernel) or tuned(op, capability, kernel=kernel, **shape)

        monkeypatch.setattr(configs, "lookup", lookup)
        monkeypatch.setattr(kernels, "split_plan", lambda *counts: (splits, fixed))

    return use


@pytest.mark.parametrize("s", [1, 31, 300])
def test_equals_oracle(s, device, dtype):
    assert_equals_oracle(inputs(2, 5, s, 16), dtype, device)


@pytest.mark.parametrize(("p", "z"), [(1, 1), (128, 32)])
def test_widths(p, z, device):
    assert_equals_oracle(inputs(2, p, 9, z), torch.float32, device)


@EVERY_VARIANT
@pytest.mark.parametrize(("p", "z"), [(17, 48), (3, 257)])
def test_many_tiles_of_odd_widths(p, z, variant, kernel_device, dtype, small_tiles):
    small_tiles(variant, splits=2)
    assert_equals_oracle(inputs(2, p, 37, z), dtype, kernel_device)


@EVERY_VARIANT
@pytest.mark.parametrize("splits", [1, 8])
def test_many_tiles_of_a_ragged_batch(splits, variant, kernel_device, dtype, small_tiles):
    small_tiles(variant, splits)
    assert_equals_oracle(inputs(4, 5, 49, 16, lengths=[0, 1, 49, 32]), dtype, kernel_device)


@EVERY_VARIANT
def test_visible_tokens_behind_many_masked_ones(variant, kernel_device, small_tiles):
    small_tiles(variant, splits=2, tokens=128)
    query, context, inv_rms = inputs(3, 5, 1025, 16, lengths=[1025, 0, 700])
    inv_rms[0, :1024] = 0
    assert_equals_oracle([query, context, inv_rms], torch.float32, kernel_device)


@EVERY_VARIANT
def test_the_widest_latents(variant, kernel_device, small_tiles):
    small_tiles(variant)
    assert_equals_oracle(inputs(1, 3, 20, 512), torch.float32, kernel_device)


@EVERY_VARIANT
@pytest.mark.parametrize("fixed", [False, True])
def test_scores_that_grow_beyond_a_fixed_reference(variant, fixed, kernel_device, small_tiles):
    """Row 0 exceeds the reference of the first tile by 2^115, row 1 by 2^3, row 2 never."""
    small_tiles(variant, fixed=fixed)
    query, context, inv_rms = (t.float().to(kernel_device) for t in inputs(1, 3, 40, 16))
    ones = torch.ones_like(inv_rms)
    context[0, :, 0] = torch.arange(40) * 2.0
    query[..., 0] = torch.tensor([1.0, 0.03, -1.0])
    assert_equals_oracle([query, context, ones], torch.float32, kernel_device)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [([0, 0, 1, 0, 1, 0], [2, 5]), ([0] * 6, [0, 0]), ([1] * 6, [0, 6]), ([], [0, 0])],
)
def test_visible_bounds(visible, expected):
    bounds = visible_bounds(torch.tensor([visible], dtype=torch.float32))
    assert bounds.dtype == torch.int32 and bounds.tolist() == [expected]


def test_bounds_change_no_result(device):
    args = [t.float().to(device) for t in inputs(3, 5, 33, 8, lengths=[0, 33, 17])]
    expected = perceiver_attention(*args)
    for r, e in zip(perceiver_attention(*args, visible_bounds(args[2])), expected, strict=True):
        assert torch.equal(r, e)


def shipped(kernel: str) -> list[dict[str, int]]:
    """The distinct configurations of a kernel that this GPU can run; all in the interpreter."""
    table = configs.table("perceiver_attention")
    sections = list(table)
    if torch.cuda.is_available():
        own = configs.architecture(torch.cuda.get_device_capability())
        sections = [name for name in (own, "default") if name in table]
    entries = [e for name in sections for e in table[name] if e["where"]["kernel"] == kernel]
    return list({tuple(e["config"].items()): e["config"] for e in entries}.values())


@pytest.mark.parametrize(
    ("kernel", "config"),
    [(kernel, config) for kernel in ("attend", "score_gradients") for config in shipped(kernel)],
)
def test_shipped_tiles(kernel, config, kernel_device, monkeypatch):
    tuned = configs.lookup

    def lookup(op, capability, **key):
        return dict(config) if key["kernel"] == kernel else tuned(op, capability, **key)

    monkeypatch.setattr(configs, "lookup", lookup)
    monkeypatch.setattr(kernels, "split_plan", lambda *counts: (2, False))
    tensors = inputs(2, config["BLOCK_P"] + 2, config["BLOCK_S"] + 6, 40, [config["BLOCK_S"], 9])
    assert_equals_oracle(tensors, torch.float16, kernel_device)


def test_ragged_batch_with_empty_rows(device):
    dtype = checks.widest_dtype()
    args = [t.to(device, dtype) for t in inputs(4, 5, 33, 8, lengths=[0, 1, 33, 17])]
    out, lse = perceiver_attention(*args)
    assert not out[0].any() and (lse[0] == -torch.inf).all() and torch.isfinite(lse[1:]).all()
    assert_equals_oracle(args, dtype, device)
    for row in (1, 2, 3):
        visible = args[2][row] != 0
        alone = perceiver_attention(
            args[0][row, None], args[1][row, None, visible], args[2][row, None, visible]
        )
        torch.testing.assert_close(out[row], alone[0][0])
        torch.testing.assert_close(lse[row], alone[1][0])


def test_nothing_to_attend_to(device):
    for n, p, s in ((2, 3, 0), (0, 3, 5), (2, 0, 5)):
        args = [t.float().to(device) for t in inputs(n, p, s, 4)]
        out, exp_lse, *grads = checks.values_and_gradients(OP, args)
        assert out.shape == (n, p, 4) and not out.any() and not exp_lse.any()
        assert not any(g.any() for g in grads)


def test_holes_in_the_mask_reach_nothing(device):
    args = [t.to(device, checks.widest_dtype()) for t in inputs(2, 3, 11, 4)]
    query, context, inv_rms = args
    inv_rms = inv_rms * (torch.arange(11, device=device) % 3 > 0)
    first = checks.values_and_gradients(OP, [query, context, inv_rms])
    other = torch.where((inv_rms == 0)[..., None], 1e6, context)
    again = checks.values_and_gradients(OP, [query, other, inv_rms])
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b)
    assert not first[3][inv_rms == 0].any() and not first[4][inv_rms == 0].any()


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@EVERY_VARIANT
def test_masked_context_may_hold_any_finite_value(variant, kernel_device, dtype, small_tiles):
    small_tiles(variant, splits=2)
    query, context, inv_rms = (t.to(kernel_device, dtype) for t in inputs(3, 5, 50, 16))
    s = torch.arange(50, device=kernel_device)
    # Visible ranges that start late, and whose shares are smaller than the whole context's.
    visible = torch.stack([s % 3 > 0, (s > 20) & (s < 40), s < 10])
    inv_rms = inv_rms * visible
    largest = torch.finfo(dtype).max
    dirty = torch.where(visible[..., None], context, largest * (-1.0) ** s[:, None]).to(dtype)
    clean = torch.where(visible[..., None], context, 0.0)
    results = checks.values_and_gradients(OP, [query, dirty, inv_rms])
    expected = checks.values_and_gradients(OP, [query, clean, inv_rms])
    for r, e in zip(results, expected, strict=True):
        assert torch.equal(r, e)
    assert not results[3][~visible].any() and not results[4][~visible].any()
    assert_equals_oracle([query, clean, inv_rms], dtype, kernel_device)


def test_parts_merge_by_log_sum_exp(device):
    args = inputs(2, 3, 20, 4, lengths=[20, 3])
    query, context, inv_rms = (t.to(device, checks.widest_dtype()) for t in args)
    out, lse = perceiver_attention(query, context, inv_rms)
    parts = [
        perceiver_attention(query, context[:, p], inv_rms[:, p])
        for p in (slice(0, 8), slice(8, 20))
    ]
    merged_lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(o * (part_lse - merged_lse).exp()[..., None] for o, part_lse in parts)
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse)


@EVERY_VARIANT
def test_large_scores_do_not_overflow(variant, device, small_tiles):
    small_tiles(variant, splits=2)
    query, context, inv_rms = (t.float().to(device) for t in inputs(1, 2, 40, 4))
    out, lse = perceiver_attention(query * 1e4, context, inv_rms)
    expected_out, expected_lse = oracle(query * 1e4, context, inv_rms)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(out, expected_out)


def test_context_that_is_not_finite_shows(device):
    query, context, inv_rms = (t.float().to(device) for t in inputs(2, 3, 20, 4))
    context[0, 7, 2] = torch.nan
    out, _ = perceiver_attention(query, context, inv_rms)
    assert out[0].isnan().all() and torch.isfinite(out[1]).all()


def test_layouts_do_not_matter(device):
    checks.assert_layouts_do_not_matter(perceiver_attention, inputs(2, 3, 37, 16), device)


def test_views_are_read_by_their_strides(device):
    """One query for every slice, every other token, tokens that are not adjacent in memory."""
    query, context, inv_rms = (t.float().to(device) for t in inputs(2, 3, 37, 16))
    query = query[:1]

    def function(view_context):
        return lambda q, c, r: OP(q.expand(2, -1, -1), view_context(c), r[:, ::2])

    contiguous = function(lambda c: c[:, ::2].contiguous())
    expected = checks.values_and_gradients(contiguous, [query, context, inv_rms])
    for view in (lambda c: c[:, ::2], lambda c: c.transpose(0, 1)[::2].transpose(0, 1)):
        results = checks.values_and_gradients(function(view), [query, context, inv_rms])
        for r, e in zip(results, expected, strict=True):
            torch.testing.assert_close(r, e)


@EVERY_VARIANT
def test_same_bits_twice(variant, device, small_tiles):
    small_tiles(variant, splits=3)
    args = [t.half().to(device) for t in inputs(2, 20, 70, 32, lengths=[70, 40])]
    checks.assert_same_bits_twice(OP, args)


@pytest.mark.parametrize("splits", [2, 30])
def test_splits_agree(splits, kernel_device, small_tiles):
    args = [t.float().to(kernel_device) for t in inputs(2, 5, 90, 16, lengths=[90, 33])]
    small_tiles(VARIANTS[0])
    whole = checks.values_and_gradients(OP, args)
    small_tiles(VARIANTS[0], splits)
    for r, e in zip(checks.values_and_gradients(OP, args), whole, strict=True):
        torch.testing.assert_close(r, e)


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_opcheck(device, precision):
    args = tuple(t.to(device, precision).requires_grad_() for t in inputs(2, 3, 7, 4))
    bounds = visible_bounds(args[2].detach())
    torch.library.opcheck(torch.ops.v2l.perceiver_attention.default, (*args, bounds))
    out, lse = perceiver_attention(*args)
    checks.opcheck_backward(
        torch.ops.v2l.perceiver_attention_backward.default,
        (torch.ones_like(out), torch.ones_like(lse), *args, out, lse),
    )


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles(compiler):
    # Pointwise work around the op gives the compiler something to fuse.
    checks.assert_compiles(
        lambda q, c, r: perceiver_attention(q * 2, c.sin(), r)[0].cos(),
        *([t.float() for t in inputs(2, 3, s, 4)] for s in (7, 13)),
        compiler,
    )


def test_gradcheck():
    checks.assert_gradcheck(perceiver_attention, inputs(2, 3, 4, 3))
    query, context, inv_rms = inputs(3, 2, 4, 3, lengths=[2, 0, 4])
    checks.assert_gradcheck(lambda q, c: OP(q, c, inv_rms), [query, context])


@pytest.mark.parametrize(
    ("programs", "processors", "token_tiles", "expected"),
    [
        (3072, 132, 13, (1, True)),  # the slices alone fill the GPU
        (132, 132, 13, (1, False)),  # they do, but a program takes too few tiles
        (132, 132, 1024, (1, True)),
        (2, 132, 13, (13, False)),
        (2, 132, 64, (22, False)),
        (2, 132, 1024, (64, False)),
        (8, 132, 1024, (16, True)),
        (64, 108, 2048, (5, True)),  # 320 programs, 2.96 waves
        (1, 1, 100, (1, True)),
        (2, 132, 0, (1, False)),
    ],
)
def test_split_plan(programs, processors, token_tiles, expected):
    assert kernels.split_plan(programs, processors, token_tiles) == expected


# --- arguments -------------------------------------------------------------------------------


def test_what_the_kernels_cannot_serve(kernel_device):
    wide = [t.float().to(kernel_device) for t in inputs(1, 2, 3, 513)]
    with pytest.raises(ValueError, match="at most 512, got 513; set V2L_BACKEND=reference"):
        perceiver_attention(*wide)
    with pytest.raises(RuntimeError, match="float64"):
        perceiver_attention(*(t.to(kernel_device) for t in inputs(2, 3, 5, 4)))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("query", torch.zeros(3, 4), r"query must be \[N, P, Z\], got \[3, 4\]"),
        ("query", torch.zeros(2, 3, 4, dtype=torch.long), "query must be floating point"),
        ("context", torch.zeros(2, 5, 3), r"context must be \[2, S, 4\], got \[2, 5, 3\]"),
        ("context", torch.zeros(3, 5, 4), r"context must be \[2, S, 4\], got \[3, 5, 4\]"),
        ("context", torch.zeros(2, 5, 4).half(), "context must be torch.float32, got torch.fl"),
        ("context", torch.zeros(2, 5, 4, device="meta"), "context must be on cpu, got meta"),
        ("inv_rms", torch.zeros(2, 4), r"inv_rms must be \[2, 5\], got \[2, 4\]"),
        ("inv_rms", torch.zeros(2, 5, dtype=torch.bool), "inv_rms must be floating point"),
        ("inv_rms", torch.zeros(2, 5, device="meta"), "inv_rms must be on cpu, got meta"),
        ("bounds", torch.zeros(2, 3, dtype=torch.int32), r"bounds must be \[2, 2\], got \[2, 3\]"),
        ("bounds", torch.zeros(2, 2), "bounds must be torch.int32, got torch.float32"),
    ],
)
def test_error_names_the_argument(name, wrong, message):
    args = {
        "query": torch.zeros(2, 3, 4),
        "context": torch.zeros(2, 5, 4),
        "inv_rms": torch.zeros(2, 5),
    }
    with pytest.raises(ValueError, match=f"perceiver_attention: {message}"):
        perceiver_attention(**{**args, name: wrong})
