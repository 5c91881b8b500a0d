"""A cycle model of one multiprocessor: predicts the time of a kernel's main loop from machine code.

The machine code says when a warp may issue: stall counts, scoreboards and barriers are the
compiler's. The model adds what it does not say: four sub-cores that each issue one instruction a
clock, their pipes, one port of 128 B/clk to shared memory, the tensor cores, and the path from L2
with its latency. It does not know conflicts of shared-memory banks, the instruction cache, DRAM, or
clocks that fall under load (an H100 at the full tensor rate throttles to about 80%).

**Every number is a prediction.** The model was compared with published rates of kernels that were
compiled here in the same way (TFLOP/s, at 1.755 and 1.41 GHz):

| kernel | predicted | published | published / predicted |
|---|---|---|---|
| Triton MLA decoding, 64 rows x 64, 8 warps, 3 stages, H100 (FlagGems#510) | 281 | 280 | 1.00 |
| Triton attention, width 128, 128 x 128, 8 warps, 3 stages, H100 (triton#205) | 538 | 487 | 0.90 |
| the same, width 64, H100 | 411-451 | about 400 | 0.9 |
| the same, width 128, 128 x 64, 8 warps, 3 stages, A100 (flash-attention#307) | 187 | 188 | 1.00 |
| the same, width 64, 128 x 64, 4 warps, A100 (flash-attention#307) | 249 | 187 | 0.75 |
| matrix product, 128 x 256 x 64, 8 warps, 3 stages, H100 | 902 | about 620 | 0.7 |
| matrix product, 128 x 256 x 64, 8 warps, A100 | 267 | about 225 | 0.85 |

A prediction is good to 10% for attention, and 15-30% too fast near the tensor cores' peak.
It ranks tiles of one kernel on one card; it replaces no measurement.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from profiling.sass import Instruction, main_path

ITERATIONS = 12
_WARPGROUP = re.compile(r"HGMMA\.\d+x(\d+)x\d+")
_PENDING = re.compile(r"0x([0-9a-f]+)")
_FMA = {"FADD", "FMUL", "FFMA", "IMAD", "FMUL2", "FADD2", "FFMA2"}
_SPECIAL = {"MUFU", "F2I", "I2F", "F2F", "POPC", "FLO", "BREV", "I2FP"}
_ALU = {
    "IADD3", "LOP3", "SHF", "FMNMX", "FSETP", "ISETP", "SEL", "FSEL", "PRMT", "MOV", "LEA", "VIADD",
    "VIMNMX", "IMNMX", "F2FP", "PLOP3", "IABS", "IADD", "LOP", "SGXT", "BMSK", "P2R", "R2P", "VOTE",
    "VIADDMNMX", "FCHK", "VIMNMX3", "FMNMX3", "LOP32I",
}  # fmt: skip
_SHARED = {"LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS"}
_MEMORY = _SHARED | {"LDG", "STG", "LDGSTS", "LDL", "STL", "RED"}


@dataclass(frozen=True)
class Machine:
    """A multiprocessor.

    Attributes:
        hmma: clocks of a sub-core's tensor core for one HMMA.16816.
        fma: clocks of its FP32 pipe for one instruction of a warp.
        flops: dense bfloat16 FLOP a clock.
        l2: bytes a clock that it receives from L2.
        latency: clocks of an access to global memory.
        clock: Hz.
    """

    hmma: float
    fma: float
    flops: float
    l2: float
    latency: float
    clock: float


MACHINES = {
    "sm_80": Machine(hmma=8.0, fma=2.0, flops=2048, l2=40, latency=500, clock=1.41e9),
    "sm_90": Machine(hmma=6.4, fma=1.0, flops=4096, l2=48, latency=600, clock=1.755e9),
}


@dataclass(frozen=True)
class TmaCopies:
    """What the machine code does not say about copies by TMA.

    Attributes:
        bytes: that one iteration of a block's main loop copies.
        ahead: iterations between a copy and the wait for it.
    """

    bytes: float = 0.0
    ahead: int = 1


def loop_clocks(
    architecture: str, listing: str, num_warps: int, blocks: int, copies: TmaCopies = TmaCopies()
) -> float:
    """Predicted clocks of a multiprocessor for one iteration of one block's main loop.

    Args:
        listing: of ``nvdisasm -c -hex``.
        blocks: that run on the multiprocessor at once.
        copies: by TMA, if the loop has any.

    Returns:
        0 where the machine is not known, no block fits or there is no loop.
    """
    path = main_path(listing)
    if architecture not in MACHINES or not blocks or not path:
        return 0.0
    return _Simulation(MACHINES[architecture], path, num_warps, blocks, copies).run()


def shared_clocks(instruction: Instruction) -> float:
    """Clocks of the port to shared memory; 0 for an instruction that does not use it."""
    if instruction.opcode not in _SHARED:
        return 0.0
    if instruction.opcode in ("LDSM", "STSM"):
        return float(instruction.name[-1]) if instruction.name[-1] in "24" else 1.0
    return 4.0 if ".128" in instruction.name else 2.0 if ".64" in instruction.name else 1.0


def pipe(machine: Machine, instruction: Instruction) -> tuple[str, float] | None:
    """The pipe of a sub-core that an instruction occupies, and for how many clocks."""
    opcode = instruction.opcode
    if opcode == "HMMA":
        return "tensor", machine.hmma * (1.0 if "16816" in instruction.name else 0.5)
    for name, opcodes, clocks in (
        ("fma", _FMA, machine.fma), ("special", _SPECIAL, 8.0), ("alu", _ALU, 2.0),
        ("memory", _MEMORY, 2.0),
    ):  # fmt: skip
        if opcode in opcodes:
            return name, clocks
    return ("uniform", 2.0) if opcode.startswith("U") else None


@dataclass(eq=False)
class _Warp:
    block: int
    number: int
    at: int = 0
    iteration: int = 0
    ready: float = 0.0
    waiting: bool = False
    scoreboards: list[int] = field(default_factory=lambda: [0] * 7)
    copies: list[float] = field(default_factory=list)
    groups: list[float] = field(default_factory=list)
    products: list[tuple[int, int]] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def release(self, scoreboard: int) -> None:
        self.scoreboards[scoreboard] -= 1


@dataclass(eq=False)
class _WarpGroup:
    """Four warps whose products run when all of them have issued theirs."""

    issued: dict[tuple[int, int], int] = field(default_factory=dict)
    done: dict[tuple[int, int], float] = field(default_factory=dict)
    last: float = 0.0


class _Simulation:
    """The main loop of several blocks, from the first iteration to the last."""

    def __init__(
        self,
        machine: Machine,
        path: list[Instruction],
        num_warps: int,
        blocks: int,
        copies: TmaCopies,
    ) -> None:
        self.machine, self.path, self.num_warps, self.blocks = machine, path, num_warps, blocks
        self.copies = copies
        # Each warp copies a part of the tile.
        self.tma_parts = num_warps * sum(i.opcode == "UTMALDG" for i in path)
        # Block and iteration that waits -> arrivals of the parts of its tile.
        self.tiles: dict[tuple[int, int], list[float]] = {}
        self.pipes = [pipe(machine, i) for i in path]
        self.warps = [_Warp(b, w) for b in range(blocks) for w in range(num_warps)]
        self.cores = [[w for w in self.warps if w.number % 4 == core] for core in range(4)]
        self.busy: list[dict[str, float]] = [{} for _ in range(4)]
        self.shared = self.l2 = self.tensor = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.barriers: dict[tuple[int, tuple[str, ...]], list[_Warp]] = {}
        self.warpgroups: dict[tuple[int, int], _WarpGroup] = {}

    def run(self) -> float:
        """Clocks between iterations, after the first third of them, for one block."""
        now, turns = 0.0, [0] * 4
        pending = set(self.warps)
        while pending:
            while self.events and self.events[0][0] <= now:
                _, _, release = heapq.heappop(self.events)
                release()
            issued, following = False, math.inf
            for core, warps in enumerate(self.cores):
                for offset in range(len(warps)):
                    warp = warps[(turns[core] + offset) % len(warps)]
                    if warp not in pending or warp.waiting:
                        continue
                    earliest = self._earliest(warp, core, now)
                    if earliest > now:
                        following = min(following, earliest)
                        continue
                    self._issue(warp, core, now)
                    if warp.iteration == ITERATIONS:
                        pending.discard(warp)
                    # A warp keeps its turn while it can issue at every clock.
                    position = turns[core] + offset + (warp.ready > now + 1)
                    turns[core] = position % len(warps)
                    issued = True
                    break
            if issued:
                now += 1
                continue
            following = min(following, self.events[0][0] if self.events else math.inf)
            if following == math.inf:
                raise RuntimeError("the loop waits for something that the model does not know")
            now = max(now + 1, math.ceil(following))
        first = ITERATIONS // 3 - 1
        spans = [(w.ends[-2] - w.ends[first]) / (ITERATIONS - 2 - first) for w in self.warps]
        return sum(spans) / len(spans) / self.blocks

    def _earliest(self, warp: _Warp, core: int, now: float) -> float:
        """When the warp may issue; inf while it waits for a scoreboard or a product's issue."""
        instruction, occupied = self.path[warp.at], self.pipes[warp.at]
        if warp.ready > now:
            return warp.ready
        if any(instruction.waits >> i & 1 and warp.scoreboards[i] for i in range(6)):
            return math.inf
        match = _PENDING.search(", ".join(instruction.operands))
        left = int(match[1], 16) if match else 0
        if "PHASECHK" in instruction.name and warp.iteration >= self.copies.ahead:
            arrivals = self.tiles.get((warp.block, warp.iteration), [])
            if len(arrivals) < self.tma_parts:
                return math.inf
            now = max(now, *arrivals, 0.0)
        if instruction.opcode == "DEPBAR" and match:
            warp.groups = sorted(t for t in warp.groups if t > now)
            if len(warp.groups) > left:
                return warp.groups[len(warp.groups) - left - 1]
        if instruction.opcode == "WARPGROUP" and "DEPBAR" in instruction.name:
            done = self._warpgroup(warp).done
            warp.products = [p for p in warp.products if done.get(p, math.inf) > now]
            if len(warp.products) > left:
                return done.get(warp.products[len(warp.products) - left - 1], math.inf)
        return max(now, self.busy[core].get(occupied[0], 0.0)) if occupied else now

    def _at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (time, next(self.order), event))

    def _arrive(self, clocks: float) -> None:
        """A copy from global memory is written through the port to shared memory."""
        self.shared += clocks

    def _warpgroup(self, warp: _Warp) -> _WarpGroup:
        return self.warpgroups.setdefault((warp.block, warp.number // 4), _WarpGroup())

    def _issue(self, warp: _Warp, core: int, now: float) -> None:
        instruction, occupied = self.path[warp.at], self.pipes[warp.at]
        if occupied:
            self.busy[core][occupied[0]] = now + occupied[1]
        warp.ready = now + max(1, instruction.stall)
        result, read = self._execute(warp, instruction, now)
        for scoreboard, time in ((instruction.sets, result), (instruction.reads, read)):
            if scoreboard != 7:
                warp.scoreboards[scoreboard] += 1
                self._at(time, partial(warp.release, scoreboard))
        warp.at += 1
        if warp.at == len(self.path):
            warp.at, warp.iteration = 0, warp.iteration + 1
            warp.ends.append(now)

    def _execute(self, warp: _Warp, instruction: Instruction, now: float) -> tuple[float, float]:
        """When the result is there and when the operands are read."""
        opcode = instruction.opcode
        if opcode in _SHARED:
            self.shared = max(self.shared, now) + shared_clocks(instruction)
            return self.shared + 22, self.shared
        if opcode in ("LDGSTS", "LDG", "STG", "RED"):
            start = max(self.l2, now)
            self.l2 = start + instruction.bytes / self.machine.l2
            if opcode in ("STG", "RED"):
                return start + 30, start + 20
            arrival = self.l2 + self.machine.latency
            if opcode == "LDGSTS":
                self._at(arrival, partial(self._arrive, instruction.bytes / 128))
                arrival += instruction.bytes / 128
                warp.copies.append(arrival)
            return arrival, now + 20
        if opcode == "UTMALDG":
            part = self.copies.bytes / self.tma_parts
            self.l2 = max(self.l2, now + 30) + part / self.machine.l2
            arrival = self.l2 + self.machine.latency
            self._at(arrival, partial(self._arrive, part / 128))
            waits = warp.block, warp.iteration + self.copies.ahead
            self.tiles.setdefault(waits, []).append(arrival + part / 128)
        elif opcode == "LDGDEPBAR":
            warp.groups.append(max(warp.copies, default=now))
            warp.copies = []
        elif opcode == "BAR" and "SYNC" in instruction.name:
            together = self.barriers.setdefault((warp.block, instruction.operands), [])
            together.append(warp)
            warp.waiting = len(together) < self.num_warps
            if not warp.waiting:
                for other in together:
                    other.waiting, other.ready = False, max(other.ready, now + 12)
                together.clear()
        elif opcode == "HGMMA":
            self._multiply(warp, instruction, now)
        latency = {"MUFU": 22, "LDL": 40, "STL": 40, "S2R": 25, "S2UR": 25, "R2UR": 12}
        return now + latency.get(opcode, 24 if opcode in _SPECIAL else 6), now + 12

    def _multiply(self, warp: _Warp, instruction: Instruction, now: float) -> None:
        match, group = _WARPGROUP.match(instruction.name), self._warpgroup(warp)
        columns = int(match[1]) if match else 256
        key = warp.iteration, warp.at
        commits = any("gsb0" in operand for operand in instruction.operands)
        if commits:
            warp.products.append(key)
        group.issued[key] = group.issued.get(key, 0) + 1
        if group.issued[key] < 4:
            return
        from_registers = instruction.operands[1].startswith("R")
        fetch, multiply = columns / 4 + (0 if from_registers else 16), columns / 2
        start = max(self.shared, now, group.last - 2 * multiply - 64)
        self.shared = start + fetch
        self.tensor = max(self.tensor, start + min(fetch, 24)) + multiply
        # A product cannot end before its operands were read.
        self.tensor = group.last = max(self.tensor, self.shared)
        if commits:
            group.done[key] = group.last + 30
