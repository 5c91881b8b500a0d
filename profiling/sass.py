"""What the machine code of a kernel does in its loops, from the listing of nvdisasm.

A loop is a cycle of the control-flow graph, so that code which ptxas moves behind the end counts
where it runs. Subroutines (division, square root) are not followed. The main loop is the innermost
one with tensor-core instructions that has most of them, or the innermost one with most instructions
if none has any; its path is the one through its body with most of the work. A loop that waits for a
barrier in shared memory is therefore a part of the main loop around it.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import networkx

_LABEL = re.compile(r"^(\S+):$")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_ENCODING = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"`\((\S+)\)")
_LEFT_PENDING = re.compile(r"SB0, 0x([0-9a-f]+)")
MMA = ("HMMA", "HGMMA")
# From global to shared memory: by the threads, and by TMA.
COPIES = ("LDGSTS", "UTMALDG")
_LOCAL = ("LDL", "STL")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: with its modifiers, as "LDG.E.128".
        stall: clocks until the warp may issue its next instruction.
        sets, reads: scoreboards that it releases with its result and after reading its operands; 7
            for none.
        waits: bit mask of the scoreboards that it waits for.
    """

    predicate: str | None
    name: str
    operands: tuple[str, ...]
    target: str | None
    stall: int = 1
    sets: int = 7
    reads: int = 7
    waits: int = 0

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    @property
    def bytes(self) -> int:
        """Bytes that a warp moves with a load or store of global memory."""
        for modifier, size in ((".128", 16), (".64", 8), (".U16", 2), (".U8", 1)):
            if modifier in self.name:
                return 32 * size
        return 32 * 4


@dataclass(frozen=True)
class Sass:
    """Counts of instructions; those named ``loop_`` are inside a loop.

    ``loop_register_a`` counts warpgroup products whose left operand is in registers: before ptxas
    13.3 a pipelined one can be miscompiled (triton-lang/triton#9433). ``narrow`` counts accesses to
    global memory of less than 4 bytes a thread. ``exposed_copies``: the main loop issues its copies
    to shared memory behind all its products, and waits for them in the next iteration.
    """

    instructions: int
    loop_instructions: int
    loop_local: int
    mma: int
    loop_mma: int
    loop_register_a: int
    narrow: int
    exposed_copies: bool


def disassemble(nvdisasm: str, cubin: Path) -> str:
    done = subprocess.run(
        [nvdisasm, "-c", "-hex", cubin], capture_output=True, text=True, check=True
    )
    return done.stdout


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and label -> index of the instruction after it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            predicate, name, rest = match.groups()
            target = _TARGET.search(rest)
            operands = tuple(part.strip() for part in rest.split(",") if part.strip())
            instructions.append(
                Instruction(predicate, name, operands, target[1] if target else None)
            )
        elif instructions and (encoding := _ENCODING.match(line)):
            # The upper half of the encoding ends in the control fields.
            control = int(encoding[1], 16) >> 41
            instructions[-1] = replace(
                instructions[-1],
                stall=control & 15,
                sets=control >> 5 & 7,
                reads=control >> 8 & 7,
                waits=control >> 11 & 63,
            )
    return instructions, labels


def _flow(instructions: list[Instruction], labels: dict[str, int]) -> networkx.DiGraph:
    """The control-flow graph over indices of instructions."""
    flow = networkx.DiGraph()
    flow.add_nodes_from(range(len(instructions)))
    for here, following in pairwise(range(len(instructions) + 1)):
        op = instructions[here]
        jumps = op.opcode == "BRA" and op.target in labels
        if jumps:
            flow.add_edge(here, labels[op.target])
        # A second operand of BRA is a condition, as a predicate is.
        always = op.predicate is None and (
            op.opcode in ("EXIT", "RET") or (jumps and len(op.operands) == 1)
        )
        if not always and following < len(instructions):
            flow.add_edge(here, following)
    return flow


def loops(flow: networkx.DiGraph) -> set[int]:
    """Indices of the instructions on a cycle."""
    return {
        index
        for component in networkx.strongly_connected_components(flow)
        if len(component) > 1
        for index in component
    }


def main_loop(instructions: list[Instruction], flow: networkx.DiGraph) -> list[Instruction]:
    """The path through the main loop from its first instruction on; empty without a loop."""

    def work(index: int) -> int:
        opcode = instructions[index].opcode
        return 10**6 * (opcode in MMA) + 10**4 * (opcode in COPIES) + 200 * (opcode == "MUFU") - 1

    parents = networkx.immediate_dominators(flow, 0)
    bodies: dict[int, set[int]] = {}
    for latch, head in flow.edges:
        if head > latch or latch not in parents:
            continue
        above = latch
        while above != head and parents.get(above, above) != above:
            above = parents[above]
        if above == head:
            reached = flow.reverse(copy=False).subgraph(set(parents) - {head})
            inside = {head, latch}
            if latch != head:
                inside |= networkx.descendants(reached, latch)
            bodies[head] = bodies.get(head, set()) | inside
    with_products = {
        head: body
        for head, body in bodies.items()
        if any(instructions[i].opcode in MMA for i in body)
    }
    bodies = with_products or bodies
    innermost = [
        (head, body)
        for head, body in bodies.items()
        if not any(other < body for other in bodies.values())
    ]
    if not innermost:
        return []
    head, body = max(
        innermost,
        key=lambda loop: (sum(instructions[i].opcode in MMA for i in loop[1]), len(loop[1])),
    )
    forward = networkx.DiGraph((u, v) for u, v in flow.subgraph(body).edges if v > u)
    forward.add_node(head)
    best: dict[int, tuple[int, int | None]] = {head: (work(head), None)}
    for index in networkx.topological_sort(forward):
        before = [(best[p][0], p) for p in forward.predecessors(index) if p in best]
        if before and index != head:
            total, last = max(before)
            best[index] = (total + work(index), last)
    latches = [i for i in best if flow.has_edge(i, head)]
    at: int | None = max(latches, key=lambda i: best[i][0], default=None)
    path = []
    while at is not None:
        path.append(instructions[at])
        at = best[at][1]
    return path[::-1]


def _waits_for_own_copies(path: list[Instruction]) -> bool:
    copies = [i for i, op in enumerate(path) if op.opcode in COPIES]
    if not copies or any(op.opcode in MMA for op in path[copies[-1] :]):
        return False
    if path[copies[-1]].opcode == "UTMALDG":
        # The code does not say how many tiles ahead the copy is.
        return True
    groups = sum(op.opcode == "LDGDEPBAR" for op in path)
    waits = [_LEFT_PENDING.search(", ".join(op.operands)) for op in path if op.opcode == "DEPBAR"]
    pending = [int(match[1], 16) for match in waits if match]
    return bool(pending) and min(pending) < groups


def main_path(listing: str) -> list[Instruction]:
    """:func:`main_loop` of a listing."""
    instructions, labels = parse(listing)
    return main_loop(instructions, _flow(instructions, labels))


def analyze(listing: str) -> Sass:
    instructions, labels = parse(listing)
    flow = _flow(instructions, labels)
    inside = loops(flow)
    looped = [instructions[i] for i in sorted(inside)]
    return Sass(
        instructions=len(instructions),
        loop_instructions=len(looped),
        loop_local=sum(op.opcode in _LOCAL for op in looped),
        mma=sum(op.opcode in MMA for op in instructions),
        loop_mma=sum(op.opcode in MMA for op in looped),
        loop_register_a=sum(
            op.opcode == "HGMMA" and op.operands[1].startswith("R") for op in looped
        ),
        narrow=sum(op.opcode in ("LDG", "STG") and op.bytes < 32 * 4 for op in instructions),
        exposed_copies=_waits_for_own_copies(main_loop(instructions, flow)),
    )
