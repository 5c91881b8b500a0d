"""What the machine code of a kernel does in its loops, from the listing of nvdisasm.

A loop is a cycle of the control-flow graph, so that code which ptxas moves behind the end counts
where it runs. Subroutines (division, square root) are not followed.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import networkx

_LABEL = re.compile(r"^(\S+):$")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*)\S*\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\S+)\)")
_MMA = ("HMMA", "HGMMA")
_LOCAL = ("LDL", "STL")


@dataclass(frozen=True)
class Instruction:
    predicate: str | None
    opcode: str
    operands: tuple[str, ...]
    target: str | None


@dataclass(frozen=True)
class Sass:
    """Counts of instructions; those named ``loop_`` are inside a loop.

    ``loop_register_a`` counts warpgroup products whose left operand is in registers: before ptxas
    13.3 a pipelined one can be miscompiled (triton-lang/triton#9433).
    """

    instructions: int
    loop_instructions: int
    loop_local: int
    mma: int
    loop_mma: int
    loop_register_a: int


def disassemble(nvdisasm: str, cubin: Path) -> str:
    done = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True)
    return done.stdout


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and label -> index of the instruction after it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            predicate, opcode, rest = match.groups()
            target = _TARGET.search(rest)
            operands = tuple(part.strip() for part in rest.split(",") if part.strip())
            instructions.append(
                Instruction(predicate, opcode, operands, target[1] if target else None)
            )
    return instructions, labels


def loops(instructions: list[Instruction], labels: dict[str, int]) -> set[int]:
    """Indices of the instructions on a cycle."""
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
    return {
        index
        for component in networkx.strongly_connected_components(flow)
        if len(component) > 1
        for index in component
    }


def analyze(listing: str) -> Sass:
    instructions, labels = parse(listing)
    inside = loops(instructions, labels)
    looped = [instructions[i] for i in sorted(inside)]
    return Sass(
        instructions=len(instructions),
        loop_instructions=len(looped),
        loop_local=sum(op.opcode in _LOCAL for op in looped),
        mma=sum(op.opcode in _MMA for op in instructions),
        loop_mma=sum(op.opcode in _MMA for op in looped),
        loop_register_a=sum(
            op.opcode == "HGMMA" and op.operands[1].startswith("R") for op in looped
        ),
    )
