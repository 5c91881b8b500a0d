"""The forward of perceiver_attention in Gluon for sm_90; it computes what ``kernels.attend`` does.

Triton issues the copies of a tile behind the products of the one before, and two stages, which are
all that fit at a width of 512, then do not overlap them. Here TMA copies the next tile while this
one is multiplied. Both products read shared memory alone: weights in registers are what ptxas may
miscompile. ``profiling.model`` predicts 1.5 times the speed of ``kernels.attend`` at a width of
512, 1.2 times at 256 and 128, and nothing at 64.

**Compiled ahead of time, never run**: Gluon has no interpreter. The tests execute the source with a
stand-in for the language, one program after another, which shows wrong indices, masks and missing
waits, but neither races between warps nor what the compiler makes of it. No tile that ships selects
this form. ``bench/runs/tune.py`` may, on a GPU, if it is right in every case of
``bench/attention_gate.py`` and faster.

Shared memory is ordered by hand. Threads write ``q`` and ``w``, and wgmma reads them: a fence
between the two kinds of access, then a barrier of all warps. A buffer of ``x`` is filled again
behind a barrier that follows the last product which reads it.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from csrc_triton import device

# Width -> tiles for the tuner. Triton compiles them, too: they also serve what this form cannot.
TILES = {
    512: [{"BLOCK_P": 64, "BLOCK_S": 64, "VAR": 2, "num_warps": 8, "num_stages": 2}],
    256: [
        {"BLOCK_P": 64, "BLOCK_S": 128, "VAR": 2, "num_warps": 8, "num_stages": 2},
        {"BLOCK_P": 64, "BLOCK_S": 64, "VAR": 2, "num_warps": 8, "num_stages": 3},
    ],
    128: [
        {"BLOCK_P": 64, "BLOCK_S": 64, "VAR": 2, "num_warps": 4, "num_stages": 3},
        {"BLOCK_P": 128, "BLOCK_S": 64, "VAR": 2, "num_warps": 8, "num_stages": 3},
    ],
}

# Names of Triton 3.6, and of versions before 3.9.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

LOG2E = gl.constexpr(1.4426950408889634)
LOWEST = gl.constexpr(-3.0e38)
LIMIT = gl.constexpr(2.0**60)


@gluon.jit
def _copy_tile(context, row, x, ready, step, count, STAGES: gl.constexpr):
    """Start to copy tile ``step`` into its buffer, unless it is past the last one."""
    slot = step % STAGES
    mbarrier.expect(ready.index(slot), context.block_type.nbytes, pred=step < count)
    load_tile(context, [row, 0], ready.index(slot), x.index(slot), pred=step < count)


@gluon.jit(do_not_specialize=["stride_rn", "S", "n_splits"])
def attend(
    query_ptr, context, inv_rms_ptr, bounds_ptr, out_ptr, lse_ptr, retry_ptr,
    stride_qn, stride_qp, stride_rn, P, S, n_splits,
    Z: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_S: gl.constexpr, STAGES: gl.constexpr,
    ONLINE: gl.constexpr,
):  # fmt: skip
    """As ``kernels.attend``; context is a descriptor of [N * S, Z] rows."""
    dtype: gl.constexpr = context.dtype
    WARPS: gl.constexpr = gl.num_warps()
    # Four warps, one warpgroup, hold 64 rows; further warpgroups first divide rows, then columns.
    DOWN: gl.constexpr = min(WARPS, BLOCK_P // 16)
    ACROSS: gl.constexpr = WARPS // DOWN
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [DOWN, ACROSS], [16, BLOCK_S // ACROSS, 16]
    )
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [DOWN, ACROSS], [16, min(256, Z // ACROSS), 16]
    )
    # Eight elements a thread: whole rows of global memory.
    LANES: gl.constexpr = min(32, Z // 8)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)

    tiles = gl.cdiv(P, BLOCK_P)
    pid = gl.program_id(0)
    if ONLINE:
        if retry_ptr is not None:
            if gl.load(retry_ptr + pid) == 0:
                return
    split = (pid // tiles) % n_splits
    n = pid // (tiles * n_splits)
    first_row = (pid % tiles) * BLOCK_P
    low = gl.load(bounds_ptr + 2 * n)
    high = gl.load(bounds_ptr + 2 * n + 1)
    share = gl.cdiv(gl.cdiv(high - low, BLOCK_S), n_splits) * BLOCK_S
    begin = low + split * share
    end = gl.minimum(begin + share, high)
    count = gl.cdiv(gl.maximum(end - begin, 0), BLOCK_S)

    x = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_S, Z], SHARED)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    x_row = n * S + begin
    for i in gl.static_range(STAGES - 1):
        _copy_tile(context, x_row + i * BLOCK_S, x, ready, i, count, STAGES)

    n = n.to(gl.int64)
    rows = first_row + gl.arange(0, BLOCK_P, gl.SliceLayout(1, ROWS))
    z = gl.arange(0, Z, gl.SliceLayout(0, ROWS))
    q_rows = query_ptr + n * stride_qn + gl.minimum(rows, P - 1)[:, None] * stride_qp
    q = gl.allocate_shared_memory(dtype, [BLOCK_P, Z], SHARED)
    q.store(gl.load(q_rows + z[None, :]))
    fence_async_shared()
    w = gl.allocate_shared_memory(dtype, [BLOCK_P, BLOCK_S], SHARED)

    s = gl.arange(0, BLOCK_S, gl.SliceLayout(0, SCORES))
    norms = inv_rms_ptr + n * stride_rn + begin
    norm = gl.load(norms + s, mask=begin + s < end, other=0.0).to(gl.float32)
    acc = gl.zeros([BLOCK_P, Z], gl.float32, ACC)
    # Sums stay spread over the tile until the end: a reduction across warps in every step is slow.
    sums = gl.zeros([BLOCK_P, BLOCK_S], gl.float32, SCORES)
    peak = gl.full([BLOCK_P], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    for step in range(count):
        # All warps have finished the product that read the buffer of the tile that is copied now.
        barrier()
        ahead = step + STAGES - 1
        _copy_tile(context, x_row + ahead * BLOCK_S, x, ready, ahead, count, STAGES)
        slot = step % STAGES
        mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
        tile = x.index(slot)
        zero = gl.zeros([BLOCK_P, BLOCK_S], gl.float32, SCORES)
        scores = warpgroup_mma(q, tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        along = norm[None, :]
        scores = gl.where(along != 0, scores * (along * LOG2E), float("-inf"))
        if ONLINE:
            new_peak = gl.maximum(peak, gl.max(scores, 1))
            decay = gl.exp2(peak - new_peak)
            peak = new_peak
            sums *= decay[:, None]
            acc *= gl.convert_layout(decay, gl.SliceLayout(1, ACC))[:, None]
        else:
            if step == 0:
                peak = gl.maximum(peak, gl.max(scores, 1))
        probs = gl.exp2(scores - peak[:, None])
        sums += probs
        w.store((probs * along).to(dtype))
        fence_async_shared()
        barrier()
        product = warpgroup_mma(w, tile, acc, is_async=True)
        following = begin + (step + 1) * BLOCK_S + s
        norm = gl.load(inv_rms_ptr + n * stride_rn + following, mask=following < end, other=0.0)
        norm = norm.to(gl.float32)
        acc = warpgroup_mma_wait(0, deps=[product])

    barrier()
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))
    total = gl.sum(sums, 1)
    if not ONLINE:
        gl.store(retry_ptr + pid, (gl.max(total, 0) >= LIMIT).to(gl.int32))
    empty = total == 0
    total = gl.where(empty, 1.0, total)
    lse = gl.where(empty, float("-inf"), (peak + gl.log2(total)) / LOG2E)
    out_row = (n * n_splits + split) * P
    lse_rows = first_row + gl.arange(0, BLOCK_P, gl.SliceLayout(1, SCORES))
    gl.store(lse_ptr + out_row + lse_rows, lse, mask=lse_rows < P)
    acc *= gl.convert_layout(1.0 / total, gl.SliceLayout(1, ACC))[:, None]
    out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), ROWS)
    out_rows = out_ptr + (out_row + rows)[:, None] * Z
    gl.store(out_rows + z[None, :], out, mask=(rows < P)[:, None])


# --- launching -------------------------------------------------------------------------------


def layout(block_s: int, width: int, dtype: str) -> tuple[list[int], gl.NVMMASharedLayout, str]:
    """Block of the descriptor of the context, its layout in shared memory, and its Triton type."""
    block = [block_s, width]
    shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return block, shared, f"tensordesc<{dtype}{block},{shared!r}>"


def serves(query: Tensor, context: Tensor) -> bool:
    """Whether this form can take the tensors: half precision on sm_90, a width that needs no mask,
    and a context of evenly spaced rows as TMA reads them."""
    slices, tokens, width = context.shape
    row = context.stride(1)
    return (
        query.is_cuda
        and device.architecture(device.capability(query.device)) == "sm_90"
        and query.dtype.itemsize == 2
        and width in TILES
        and context.stride(2) == 1
        and (slices == 1 or context.stride(0) == tokens * row)
        and row >= width
        and row % 8 == 0
        and context.data_ptr() % 16 == 0
        and slices * tokens < 2**31
    )


def launch(
    programs: int,
    query: Tensor,
    context: Tensor,
    inv_rms: Tensor,
    bounds: Tensor,
    part: Tensor,
    part_lse: Tensor,
    retry: Tensor | None,
    n_splits: int,
    online: bool,
    config: dict[str, int],
) -> None:
    """As ``kernels.perceiver_attention`` launches ``attend``; ``config`` as in ``TILES``."""
    (_, rows, width), (slices, tokens, _) = query.shape, context.shape
    flat = context.as_strided((slices * tokens, width), (context.stride(1), 1))
    block, shared, _ = layout(config["BLOCK_S"], width, "")
    attend[(programs,)](
        query, TensorDescriptor.from_tensor(flat, block, shared), inv_rms, bounds, part, part_lse,
        retry, query.stride(0), query.stride(1), inv_rms.stride(0), rows, tokens, n_splits,
        Z=width, BLOCK_P=config["BLOCK_P"], BLOCK_S=config["BLOCK_S"],
        STAGES=config["num_stages"], ONLINE=online, num_warps=config["num_warps"],
    )  # fmt: skip
