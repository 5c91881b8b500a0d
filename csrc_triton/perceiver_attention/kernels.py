"""Triton kernels of perceiver_attention: forward with split-KV, combine, and score gradients.

Roofline of the forward, per token at Z = 512, P = 128 in bf16:

- bytes: 1 KB of context. FLOPs: 262 k, so 256 FLOP/B, above the ridge of an A100 (156) and of an
  H200 (184 at the measured rates): bound by tensor cores and shared memory, not by DRAM.
- floor at S = 832, N = 1,536, one block: 1.07 ms on an A100 (312 TFLOP/s), 0.42 ms at 790 TFLOP/s.

Roofline of the backward: 655 kFLOP a token in all, 512 B of intermediate weights.

This module is responsible for tiles, launches and the order of every sum; ``reference.py`` defines
what is computed, :mod:`csrc_triton.dispatch` decides when to launch.

Forward. One program holds 64 query rows and their [64, 512] fp32 accumulator, half the register
file; more rows spill. The two row tiles of a slice read the same context and run next to each
other, so the second read comes from L2.

Three forms of the inner loop, VAR, because the compiler lays out two chained products badly:

- ``PLAIN``: warps compute the same scores twice where a tile has 64 rows.
- ``TRANSPOSED_SOFTMAX``: softmax on the transposed scores; best on sm_80 from a width of 256 on.
- ``TRANSPOSED``: scores and accumulator both transposed, the scores inside a condition that always
  holds, which hides the second product from the layout rules. Every wgmma operand comes from shared
  memory; one in registers would be miscompiled when pipelined by ptxas before 13.3 (triton#9433;
  Triton 3.7 ships 12.8). It spills on sm_80.

The softmax of large batches refers to the largest score of the first tile (``split_plan``), so the
loop has no maximum, no decay and no rescaled accumulator: predicted 1.21x and 1.26x at Z = 512 on
sm_80 and sm_90 (docs/results.md). Triton issues a stage's copies behind the products, so two stages
do not overlap them on sm_90; three do, and fit up to a width of 256.

``gluon_attend.py`` has another form of the forward for sm_90, which a tile may select.

Loops over tokens count from 0: one that starts at a computed token is not prefetched.

Backward. One GEMM recomputes the scores from the log-sum-exp next to grad_out · context and writes
dS · inv_rms and P · inv_rms in the input dtype, [N, S, 2P] (512 B a token); two batched products
turn these into the gradients of query and context. A single kernel for all of it spills on every
tile tried. The gradient of inv_rms is sum_p dS (q · c) + P (dO · c), a row sum in the same
epilogue: neither the context nor its gradient is read again for it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton import device
from csrc_triton.aot import AotCase
from csrc_triton.perceiver_attention.reference import visible_bounds

OP = "perceiver_attention"
MAX_WIDTH = 512
# Row offsets inside a tile are 32-bit; a tile has at most 128 rows.
MAX_ROW_STRIDE = 2**23

PLAIN = tl.constexpr(0)
TRANSPOSED_SOFTMAX = tl.constexpr(1)
TRANSPOSED = tl.constexpr(2)

LOG2E = tl.constexpr(1.4426950408889634)
# Below every finite score, and finite: differences of two of them are never NaN.
LOWEST = tl.constexpr(-3.0e38)
# Tiles that a multiprocessor computes one after another, from which a fixed reference pays.
FIXED_STEPS = 32
# Key of a tile; 1 selects the form in Gluon.
GLUON = "GLUON"
# A weight relative to the reference of its row may grow to this before the row is computed again.
LIMIT = tl.constexpr(2.0**60)


@triton.jit
def _tile(norms, context, start, end, S, stride_xs, s, z, Z: tl.constexpr, BLOCK_Z: tl.constexpr):
    """Norms [BLOCK_S] and context [BLOCK_S, BLOCK_Z] of the tokens from ``start`` on."""
    norm = tl.load(norms + start + s, mask=start + s < end, other=0.0).to(tl.float32)
    x_rows = context + start.to(tl.int64) * stride_xs
    # Rows past the end repeat the last one: a mask on the contiguous axis alone keeps wide loads.
    x_ptrs = x_rows + tl.minimum(s, S - 1 - start)[:, None] * stride_xs + z[None, :]
    if Z == BLOCK_Z:
        x = tl.load(x_ptrs)
    else:
        x = tl.load(x_ptrs, mask=(z < Z)[None, :], other=0.0)
    return norm, x


@triton.jit
def _scores(q, x, norm, VAR: tl.constexpr):
    """Scores in base 2, -inf where masked: [BLOCK_P, BLOCK_S] if PLAIN, else transposed."""
    if VAR == TRANSPOSED:
        scores = tl.dot(x, tl.trans(q), input_precision="ieee")
    else:
        scores = tl.dot(q, tl.trans(x), input_precision="ieee")
        if VAR == TRANSPOSED_SOFTMAX:
            scores = tl.trans(scores)
    along = tl.expand_dims(norm, 0 if VAR == PLAIN else 1)
    return tl.where(along != 0, scores * (along * LOG2E), float("-inf"))


@triton.jit
def _weights(scores, norm, peak, sums, VAR: tl.constexpr, ONLINE: tl.constexpr):
    """Weights p · inv_rms of a tile of scores, the peak and sums that include it, and the factor by
    which older products decay."""
    AXIS: tl.constexpr = 1 if VAR == PLAIN else 0
    decay = peak
    if ONLINE:
        new_peak = tl.maximum(peak, tl.max(scores, AXIS))
        decay = tl.exp2(peak - new_peak)
        sums *= tl.expand_dims(decay, AXIS)
        peak = new_peak
    probs = tl.exp2(scores - tl.expand_dims(peak, AXIS))
    return probs * tl.expand_dims(norm, 1 - AXIS), peak, sums + probs, decay


@triton.jit(do_not_specialize=["stride_rn", "S", "n_splits"])
def attend(
    query_ptr, context_ptr, inv_rms_ptr, bounds_ptr, out_ptr, lse_ptr, retry_ptr,
    stride_qn, stride_qp, stride_xn, stride_xs, stride_rn,
    P, S, n_splits,
    Z: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_Z: tl.constexpr,
    VAR: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """One tile of query rows over one split of a slice's visible tokens.

    out [N, n_splits, P, Z] and lse [N, n_splits, P] get the split's own softmax average and natural
    log-sum-exp. Each split takes an equal share of the range from the first to the last visible
    token, in whole tiles.

    With ``ONLINE`` the reference of a row's softmax is its largest score so far, else its largest
    of the first tile; a program in which that is too small sets its element of retry [programs].
    ``ONLINE`` computes those programs alone, or all of them if retry is None.
    """
    dtype: tl.constexpr = context_ptr.dtype.element_ty
    tiles = tl.cdiv(P, BLOCK_P)
    pid = tl.program_id(0)
    if ONLINE:
        if retry_ptr is not None:
            if tl.load(retry_ptr + pid) == 0:
                return
    split = (pid // tiles) % n_splits
    n = (pid // (tiles * n_splits)).to(tl.int64)
    rows = (pid % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    z = tl.arange(0, BLOCK_Z)

    low = tl.load(bounds_ptr + 2 * n)
    high = tl.load(bounds_ptr + 2 * n + 1)
    share = tl.cdiv(tl.cdiv(high - low, BLOCK_S), n_splits) * BLOCK_S
    begin = low + split * share
    end = tl.minimum(begin + share, high)

    q_ptrs = query_ptr + n * stride_qn + tl.minimum(rows, P - 1)[:, None] * stride_qp + z[None, :]
    if Z == BLOCK_Z:
        q = tl.load(q_ptrs)
    else:
        q = tl.load(q_ptrs, mask=(z < Z)[None, :], other=0.0)
    s = tl.arange(0, BLOCK_S)
    norms = inv_rms_ptr + n * stride_rn
    context = context_ptr + n * stride_xn
    # Sums stay spread over the tile until the end: a reduction across warps in every step is slow.
    AXIS: tl.constexpr = 1 if VAR == PLAIN else 0
    if VAR == PLAIN:
        sums = tl.zeros([BLOCK_P, BLOCK_S], tl.float32)
    else:
        sums = tl.zeros([BLOCK_S, BLOCK_P], tl.float32)
    if VAR == TRANSPOSED:
        acc = tl.zeros([BLOCK_Z, BLOCK_P], tl.float32)
    else:
        acc = tl.zeros([BLOCK_P, BLOCK_Z], tl.float32)
    peak = tl.full([BLOCK_P], LOWEST, tl.float32)
    if not ONLINE:
        norm, x = _tile(
            norms, context, tl.minimum(begin, S - 1), end, S, stride_xs, s, z, Z, BLOCK_Z
        )
        peak = tl.maximum(peak, tl.max(_scores(q, x, norm, VAR), AXIS))
    for done in range(0, end - begin, BLOCK_S):
        start = begin + done
        norm, x = _tile(norms, context, start, end, S, stride_xs, s, z, Z, BLOCK_Z)
        if VAR == TRANSPOSED:
            w = tl.zeros([BLOCK_S, BLOCK_P], tl.float32)
            decay = tl.zeros([BLOCK_P], tl.float32)
            # Always true; it hides the second product from the rules that choose layouts.
            if start < S:
                scores = _scores(q, x, norm, VAR)
                w, peak, sums, decay = _weights(scores, norm, peak, sums, VAR, ONLINE)
            if ONLINE:
                acc *= decay[None, :]
            acc = tl.dot(tl.trans(x), w.to(dtype), acc, input_precision="ieee")
        else:
            scores = _scores(q, x, norm, VAR)
            w, peak, sums, decay = _weights(scores, norm, peak, sums, VAR, ONLINE)
            w = w.to(dtype)
            if VAR == TRANSPOSED_SOFTMAX:
                w = tl.trans(w)
            if ONLINE:
                acc *= decay[:, None]
            acc = tl.dot(w, x, acc, input_precision="ieee")

    total = tl.sum(sums, AXIS)
    if not ONLINE:
        # NaN is not above the limit: a context that is not finite stays visible in the output.
        tl.store(retry_ptr + pid, (tl.max(total, 0) >= LIMIT).to(tl.int32))
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(total)) / LOG2E)
    if VAR == TRANSPOSED:
        acc = tl.trans(acc)
    acc = acc * (1.0 / total)[:, None]
    out_rows = (n * n_splits + split) * P + rows
    tl.store(lse_ptr + out_rows, lse, mask=rows < P)
    tl.store(
        out_ptr + out_rows[:, None] * Z + z[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(rows < P)[:, None] & (z < Z)[None, :],
    )


@triton.jit(do_not_specialize=["n_splits"])
def combine(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, P, n_splits,
    Z: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Z: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merges the splits of a tile of rows by log-sum-exp; SPLITS is n_splits or the next power of
    two, and no load waits for another."""
    tiles = tl.cdiv(P, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    z = tl.arange(0, BLOCK_Z)
    real = rows < P
    inside = real[:, None] & (z < Z)[None, :]
    first = n * n_splits * P + rows

    split = tl.arange(0, SPLITS)
    present = real[:, None] & (split < n_splits)[None, :]
    lse_ptrs = part_lse_ptr + first[:, None] + split[None, :] * P
    part_lse = tl.load(lse_ptrs, mask=present, other=float("-inf"))
    peak = tl.max(part_lse, 1)
    # A row that sees nothing has peak -inf: subtract 0 there, so that exp gives 0 and not NaN.
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(part_lse - base[:, None]), 1)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    acc = tl.zeros([BLOCK_P, BLOCK_Z], tl.float32)
    for i in tl.range(0, n_splits, num_stages=3):
        at = first + i * P
        weight = tl.exp(tl.load(part_lse_ptr + at, mask=real, other=float("-inf")) - base)
        part = tl.load(part_ptr + at[:, None] * Z + z[None, :], mask=inside, other=0.0)
        acc += weight[:, None] * part
    out_rows = n * P + rows
    tl.store(lse_ptr + out_rows, tl.where(empty, float("-inf"), base + tl.log(total)), mask=real)
    acc = acc * (1.0 / total)[:, None]
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_rows[:, None] * Z + z[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def row_dots(
    grad_out_ptr, out_ptr, grad_lse_ptr, delta_ptr, rows,
    Z: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    """delta = sum_z grad_out · out - grad_lse, of contiguous rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    z = tl.arange(0, BLOCK_Z)
    at = row[:, None] * Z + z[None, :]
    inside = (row < rows)[:, None] & (z < Z)[None, :]
    d_out = tl.load(grad_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    d_lse = tl.load(grad_lse_ptr + row, mask=row < rows, other=0.0)
    tl.store(delta_ptr + row, tl.sum(d_out * out, 1) - d_lse, mask=row < rows)


@triton.jit(do_not_specialize=["stride_rn", "S"])
def score_gradients(
    query_ptr, grad_out_ptr, context_ptr, inv_rms_ptr, lse_ptr, delta_ptr, weights_ptr, d_norm_ptr,
    stride_qn, stride_qp, stride_dn, stride_dp, stride_xn, stride_xs, stride_rn,
    S, P: tl.constexpr, Z: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A [tokens, rows] tile of weights = [dS · inv_rms | P · inv_rms], [N, S, 2P].

    d_norm [N, row tiles, S] gets the tile's share of the gradient of inv_rms.
    """
    dtype: tl.constexpr = context_ptr.dtype.element_ty
    row_tiles = tl.cdiv(P, BLOCK_P)
    token_tiles = tl.cdiv(S, BLOCK_S)
    pid = tl.program_id(0)
    tile = pid % row_tiles
    n = (pid // (row_tiles * token_tiles)).to(tl.int64)
    start = (pid // row_tiles) % token_tiles * BLOCK_S
    rows = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    s = tl.arange(0, BLOCK_S)
    k = tl.arange(0, BLOCK_K)

    norms = inv_rms_ptr + n * stride_rn
    norm = tl.load(norms + start + s, mask=start + s < S, other=0.0).to(tl.float32)
    near_rows = (rows if P % BLOCK_P == 0 else tl.minimum(rows, P - 1))[:, None]
    q_ptrs = query_ptr + n * stride_qn + near_rows * stride_qp + k[None, :]
    d_ptrs = grad_out_ptr + n * stride_dn + near_rows * stride_dp + k[None, :]
    x_rows = context_ptr + n * stride_xn + start.to(tl.int64) * stride_xs
    x_ptrs = x_rows + tl.minimum(s, S - 1 - start)[:, None] * stride_xs + k[None, :]
    dots = tl.zeros([BLOCK_S, BLOCK_P], tl.float32)
    d_dots = tl.zeros([BLOCK_S, BLOCK_P], tl.float32)
    # A tile of masked tokens takes no step: its weights are 0 whatever the products are.
    visible_width = tl.max((norm != 0).to(tl.int32), 0) * Z
    for at in range(0, visible_width, BLOCK_K):
        if Z % BLOCK_K == 0:
            q = tl.load(q_ptrs + at)
            d_out = tl.load(d_ptrs + at)
            x = tl.load(x_ptrs + at)
        else:
            inside = (at + k < Z)[None, :]
            q = tl.load(q_ptrs + at, mask=inside, other=0.0)
            d_out = tl.load(d_ptrs + at, mask=inside, other=0.0)
            x = tl.load(x_ptrs + at, mask=inside, other=0.0)
        dots = tl.dot(x, tl.trans(q), dots, input_precision="ieee")
        d_dots = tl.dot(x, tl.trans(d_out), d_dots, input_precision="ieee")

    real = rows < P
    lse = tl.load(lse_ptr + n * P + rows, mask=real, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    delta = tl.load(delta_ptr + n * P + rows, mask=real, other=0.0)
    along = norm[:, None]
    used = (along != 0) & real[None, :]
    # Masked context is finite but may be large enough for its products not to be.
    dots = tl.where(used, dots, 0.0)
    d_dots = tl.where(used, d_dots, 0.0)
    probs = tl.where(used, tl.exp2((dots * along - lse[None, :]) * LOG2E), 0.0)
    d_scores = tl.where(used, probs * (d_dots * along - delta[None, :]), 0.0)
    d_norm = tl.sum(d_scores * dots + probs * d_dots, 1)
    tl.store(d_norm_ptr + (n * row_tiles + tile) * S + start + s, d_norm, mask=start + s < S)
    inside = (start + s < S)[:, None] & real[None, :]
    w_ptrs = weights_ptr + ((n * S + start + s) * (2 * P))[:, None] + rows[None, :]
    tl.store(w_ptrs, (d_scores * along).to(dtype), mask=inside)
    tl.store(w_ptrs + P, (probs * along).to(dtype), mask=inside)


# --- launches --------------------------------------------------------------------------------


def padded_width(width: int) -> int:
    """The power of two, at least 16, that a tile pads the latent width to."""
    return max(16, triton.next_power_of_2(width))


@functools.lru_cache(maxsize=1024)
def split_plan(programs: int, processors: int, token_tiles: int) -> tuple[int, bool]:
    """Number of parts to split each slice's tokens into, and whether to fix the softmax reference.

    A slice is not split where ``programs`` fill the GPU. Otherwise the number of splits is the one
    of the shortest time, in token tiles: a program takes 1.5 tiles besides its own, and combining
    takes 1 and 0.1 a split (prediction of ``profiling.model`` for sm_90).

    A fixed reference takes about a fifth off a tile and needs a second launch, which costs as much
    as one or two tiles.
    """
    if token_tiles == 0:
        return 1, False

    def steps(splits: int) -> int:
        return -(-programs * splits // processors) * -(-token_tiles // splits)

    def cost(splits: int) -> float:
        waves = -(-programs * splits // processors)
        return waves * 1.5 + steps(splits) + (1 + 0.1 * splits if splits > 1 else 0)

    limit = 1 if programs >= processors else min(processors, token_tiles)
    splits = min(range(1, limit + 1), key=cost)
    return splits, steps(splits) >= FIXED_STEPS


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last axis is strided; outer strides may be anything."""
    fits = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor if fits and tensor.stride(-2) <= MAX_ROW_STRIDE else tensor.contiguous()


def _config(kernel: str, query: Tensor) -> dict[str, int]:
    return device.lookup(
        OP,
        device.capability(query.device),
        kernel=kernel,
        inputs="single" if query.dtype == torch.float32 else "half",
        width=padded_width(query.shape[-1]),
    )


def gluon_form() -> ModuleType | None:
    """The module ``gluon_attend``, or None if the installed triton has no Gluon for it."""
    try:
        from csrc_triton.perceiver_attention import gluon_attend
    except (ImportError, AttributeError):
        # Gluon is experimental: older versions lack it, later ones may rename parts of it.
        return None
    return gluon_attend


def alternatives(section: str, where: Mapping[str, int | str]) -> list[dict[str, int]]:
    """Tiles of another form that the tuner may try at an entry; never a default.

    Args:
        section: of the configuration file.
    """
    gluon = gluon_form()
    of_entry = where["kernel"] == "attend" and where.get("inputs") == "half"
    if gluon is None or section != "sm_90" or not of_entry:
        return []
    return [{**tile, GLUON: 1} for tile in gluon.TILES.get(where["width"], ())]


def _check_width(width: int) -> None:
    if width > MAX_WIDTH:
        raise ValueError(
            f"perceiver_attention kernels hold a latent width of at most {MAX_WIDTH}, got {width}; "
            "set V2L_BACKEND=reference"
        )


def perceiver_attention(
    query: Tensor,
    context: Tensor,
    inv_rms: Tensor,
    bounds: Tensor | None = None,
    *,
    config: dict[str, int] | None = None,
    plan: tuple[int, bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``reference.perceiver_attention``.

    Outer strides of query and context are used as they are, even 0; tensors whose last axis is
    strided are copied first. ``config`` and ``plan``, as :func:`split_plan` returns it, override
    the tuned choice. A tile that selects the form in Gluon selects ``attend`` where that form
    cannot serve the call.

    Raises:
        ValueError: the latent width is above 512.
    """
    (n, p, z), s = query.shape, context.shape[1]
    _check_width(z)
    out, lse = query.new_empty(n, p, z), query.new_empty(n, p, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    query, context, inv_rms = (_rows_contiguous(t) for t in (query, context, inv_rms))
    bounds = (visible_bounds(inv_rms) if bounds is None else bounds).contiguous()
    config = dict(_config("attend", query) if config is None else config)
    gluon = gluon_form() if config.pop(GLUON, 0) else None
    if gluon is not None and not gluon.serves(query, context):
        gluon = None
    programs = n * triton.cdiv(p, config["BLOCK_P"])
    if plan is None:
        on_gpu = query.device.type == "cuda"
        gpu = torch.cuda.get_device_properties(query.device) if on_gpu else None
        processors = 1 if gpu is None else gpu.multi_processor_count
        plan = split_plan(programs, processors, triton.cdiv(s, config["BLOCK_S"]))
    n_splits, fixed = plan
    part, part_lse = out, lse
    if n_splits > 1:
        part = query.new_empty(n, n_splits, p, z, dtype=torch.float32)
        part_lse = query.new_empty(n, n_splits, p, dtype=torch.float32)
    programs, block_z = programs * n_splits, padded_width(z)
    # float16 holds no weight above 65,504, which a fixed reference would soon exceed; compiled for
    # float32 it spills. The interpreter runs it in float32, because it computes bfloat16 wrongly.
    fixed = fixed and (query.dtype == torch.bfloat16 or query.device.type == "cpu")
    fixed = fixed and query.dtype != torch.float16
    retry = query.new_empty(programs, dtype=torch.int32) if fixed else None
    with torch.cuda.device_of(query):
        for online in (False, True) if fixed else (True,):
            if gluon is not None:
                tensors = query, context, inv_rms, bounds, part, part_lse, retry
                gluon.launch(programs, *tensors, n_splits, online, config)
                continue
            attend[(programs,)](
                query, context, inv_rms, bounds, part, part_lse, retry,
                query.stride(0), query.stride(1), context.stride(0), context.stride(1),
                inv_rms.stride(0), p, s, n_splits, Z=z, BLOCK_Z=block_z, ONLINE=online, **config,
            )  # fmt: skip
        if n_splits > 1:
            merge = _config("combine", query)
            combine[(n * triton.cdiv(p, merge["BLOCK_P"]),)](
                part, part_lse, out, lse, p, n_splits,
                Z=z, BLOCK_Z=block_z, SPLITS=triton.next_power_of_2(n_splits), **merge,
            )  # fmt: skip
    return out, lse


def perceiver_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    context: Tensor,
    inv_rms: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.perceiver_attention_backward``.

    Strides as in the forward; ``config`` overrides the tuned choice for ``score_gradients``.

    Raises:
        ValueError: the latent width is above 512.
    """
    (n, p, z), s = query.shape, context.shape[1]
    _check_width(z)
    if query.numel() == 0 or context.numel() == 0:
        return (
            query.new_zeros(query.shape),
            context.new_zeros(context.shape),
            inv_rms.new_zeros(inv_rms.shape),
        )
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    grad_lse = grad_lse.contiguous()
    query, context, norm = (_rows_contiguous(t) for t in (query, context, inv_rms))
    config = _config("score_gradients", query) if config is None else config
    dots = _config("row_dots", query)
    row_tiles = triton.cdiv(p, config["BLOCK_P"])
    delta = torch.empty_like(lse)
    weights = query.new_empty(n, s, 2 * p)
    d_norm = query.new_empty(n, row_tiles, s, dtype=torch.float32)
    with torch.cuda.device_of(query):
        row_dots[(triton.cdiv(n * p, dots["BLOCK_P"]),)](
            grad_out, out, grad_lse, delta, n * p, Z=z, BLOCK_Z=padded_width(z), **dots
        )
        score_gradients[(n * row_tiles * triton.cdiv(s, config["BLOCK_S"]),)](
            query, grad_out, context, norm, lse, delta, weights, d_norm,
            query.stride(0), query.stride(1), grad_out.stride(0), grad_out.stride(1),
            context.stride(0), context.stride(1), norm.stride(0), s, P=p, Z=z, **config,
        )  # fmt: skip
    d_query = torch.bmm(weights[..., :p].mT, context)
    d_context = torch.bmm(weights, torch.cat([query, grad_out], dim=1))
    return d_query, d_context, d_norm.sum(1).to(inv_rms.dtype)


# --- compiling without a GPU -----------------------------------------------------------------


def aot_cases() -> list[AotCase]:
    """Every configuration at P = 128, S = 832, for every architecture that it serves.

    sm_90 also uses the defaults that no entry of its own replaces, and has the tiles of the form in
    Gluon, which only the tuner may select. ``attend`` is compiled as large
    batches launch it, with a fixed reference and the launch that repeats programs, and as small
    ones do, which write float32 partial results.
    """
    table = device.table(OP)
    served = [
        *(("sm_80", entry) for entry in table["sm_80"]),
        *(("sm_90", entry) for entry in table["sm_90"]),
        *(("sm_86", entry) for entry in table["default"]),
        *(("sm_90", e) for e in table["default"] if e["where"].get("inputs") != "half"),
    ]
    tiles = [(architecture, entry["where"], entry["config"]) for architecture, entry in served]
    tiles += [
        ("sm_90", entry["where"], tile)
        for entry in table["sm_90"]
        for tile in alternatives("sm_90", entry["where"])
    ]
    return [
        aot_case(architecture, where, config, form)
        for architecture, where, config in tiles
        for form in _forms(where)
    ]


def _forms(where: Mapping[str, int | str]) -> tuple[str, ...]:
    """Of attend: fixed reference, its repetition, and partial results with either reference; in
    float32 it is always online."""
    if where["kernel"] != "attend":
        return ("",)
    half = where["inputs"] == "half"
    return ("fixed", "retry", "split", "fixed split") if half else ("retry", "split")


def aot_case(
    architecture: str,
    where: Mapping[str, int | str],
    config: Mapping[str, int],
    form: str | None = None,
) -> AotCase:
    """A kernel with a configuration; of attend in a form, by default that of large batches."""
    note = _forms(where)[0] if form is None else form
    config = dict(config)
    num_warps, num_stages = config.pop("num_warps"), config.pop("num_stages")
    kernel, single = where["kernel"], where.get("inputs") == "single"
    z, p, s, size = where.get("width", MAX_WIDTH), 128, 832, 4 if single else 2
    block_p, block_s = config["BLOCK_P"], config.get("BLOCK_S", 0)
    # FLOPs; elements of the input dtype; float32 values.
    function, flops, elements, values = {
        "attend": (attend, 4 * block_p * s * z, s * z * block_p // p + 2 * block_p * z, s),
        "combine": (combine, 4 * block_p * z, block_p * z, 2 * block_p * z),
        "row_dots": (row_dots, 2 * block_p * z, 2 * block_p * z, block_p),
        "score_gradients": (
            score_gradients,
            4 * block_p * block_s * z,
            block_s * z * block_p // p + 2 * block_p * z + 2 * block_p * block_s,
            2 * block_s,
        ),
    }[kernel]
    tensor = "*fp32" if single else "*bf16"
    types = dict.fromkeys(("query_ptr", "grad_out_ptr", "context_ptr", "weights_ptr"), tensor)
    tma_bytes = 0
    constants = {"Z": z, **config}
    gluon = gluon_form() if constants.pop(GLUON, 0) else None
    if gluon is not None:
        function = gluon.attend
        types["context"] = gluon.layout(block_s, z, tensor[1:])[-1]
        constants["STAGES"] = num_stages
        del constants["VAR"]
        tma_bytes = size * block_s * z
    if "BLOCK_Z" in function.arg_names:
        constants["BLOCK_Z"] = z
    if kernel == "attend":
        constants["ONLINE"] = "fixed" not in note
        if note == "split":
            constants["retry_ptr"] = None
    if kernel == "combine":
        constants["SPLITS"] = 16
    if kernel == "score_gradients":
        constants["P"] = p
    types["out_ptr"] = "*fp32" if "split" in note else tensor
    types |= dict.fromkeys(("bounds_ptr", "retry_ptr"), "*i32")
    names = [name for name in function.arg_names if name not in constants]
    blocks = " ".join(f"{name.split('_')[-1]}{value}" for name, value in config.items())
    return AotCase(
        name=f"{OP}.{kernel} {tensor[1:]} z{z} {blocks} {architecture} {note}".rstrip(),
        function=function,
        signature={
            name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names
        },
        constexprs=constants,
        divisible=frozenset(n for n in names if n.startswith("stride_") or n == "P")
        - {"stride_rn"},
        num_warps=num_warps,
        num_stages=num_stages,
        architecture=architecture,
        expects_mma=not single and kernel in ("attend", "score_gradients"),
        flops=flops,
        bytes=size * elements + 4 * values,
        iterations=triton.cdiv(s, block_s) if kernel == "attend" else z // config.get("BLOCK_K", z),
        # Triton issues a stage's copies behind the products. A third stage does not fit at the
        # largest width, but for sm_80. Gluon issues them before.
        expects_overlap=(
            kernel != "attend" or z < MAX_WIDTH or architecture == "sm_80" or gluon is not None
        ),
        tma_bytes=tma_bytes,
    )
