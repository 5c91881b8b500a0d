"""What every kernel needs on a GPU, without one: registers, spills, shared memory, loops.

Compiles the kernels of csrc_triton in all their configurations and checks each against its budget:
it fits into shared memory, accesses no local memory inside a loop, spills at most ``SPILL_LIMIT``
bytes elsewhere, uses the tensor cores where it should, accesses global memory in at most
``NARROW_LIMIT`` instructions of 2 bytes a thread, copies to shared memory while it multiplies, and
has no warpgroup product in a loop with its left operand in registers, which ptxas before 13.3 may
miscompile. Exit status 1 if a budget is broken. Nothing here says whether a kernel's numbers are
right. The clocks of a loop iteration and the share of the tensor cores' peak that the loop reaches
are predictions of ``profiling.model``, not measurements.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pkgutil
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import csrc_triton
from bench.harness import argument_parser
from csrc_triton.aot import AotCase
from profiling import model, sass
from v2l_fast.console import say, show_table

EXAMPLES = """
  python -m profiling.aot_report
  python -m profiling.aot_report --op perceiver_attention --architecture sm_90 --json"""
SPILL_LIMIT = 64
# A mask per row needs a few narrow accesses; a kernel whose tiles take them has dozens.
NARROW_LIMIT = 4
# A shorter loop is mostly the copies before it.
OVERLAP_ITERATIONS = 8


@dataclass(frozen=True)
class OccupancyLimits:
    """Of one multiprocessor, from the table of technical specifications in the CUDA C guide.

    Shared memory in bytes; a block takes 1 KB more than it requests.
    """

    shared_per_block: int
    shared: int
    warps: int
    blocks: int
    registers: int = 65_536


LIMITS = {
    "sm_80": OccupancyLimits(shared_per_block=166_912, shared=167_936, warps=64, blocks=32),
    "sm_86": OccupancyLimits(shared_per_block=101_376, shared=102_400, warps=48, blocks=16),
    "sm_90": OccupancyLimits(shared_per_block=232_448, shared=233_472, warps=64, blocks=32),
}


@dataclass(frozen=True)
class Resources:
    """A compiled case, in bytes and counts; ``blocks`` fit on a multiprocessor at once.

    ``predicted_clocks`` of a multiprocessor for one iteration of a block's main loop, 0 where none
    were asked for, ``profiling.model`` does not know the machine or there is no loop.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    blocks: int
    warnings: tuple[str, ...]
    sass: sass.Sass
    predicted_clocks: float


def blocks_per_multiprocessor(
    architecture: str, num_warps: int, registers: int, shared: int
) -> int:
    """Number of blocks that run at once; registers are allocated to warps in units of 256."""
    limits = LIMITS[architecture]
    per_warp = -(-registers * 32 // 256) * 256
    return min(
        limits.blocks,
        limits.warps // num_warps,
        limits.registers // per_warp // num_warps,
        limits.shared // (shared + 1024),
    )


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"csrc_triton.{name}.kernels")


def operations() -> list[str]:
    """Names of the ops that have kernels."""
    return [m.name for m in pkgutil.iter_modules(csrc_triton.__path__) if m.ispkg]


def cases(op: str) -> list[AotCase]:
    """The cases of one module of kernels.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, which replaces the compiler.
        ValueError: two cases share a name.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 replaces Triton's compiler: unset it")
    listed = _module(op).aot_cases()
    names = [case.name for case in listed]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{op}: more than one case has the name {sorted(duplicates)}")
    return listed


def _source(case: AotCase) -> ASTSource:
    arguments = case.function.arg_names
    names = [*case.signature, *case.constexprs]
    if sorted(names) != sorted(arguments) or not case.divisible <= set(case.signature):
        raise ValueError(
            f"{case.name}: signature {names} and divisible {sorted(case.divisible)} do not fit "
            f"the arguments {arguments}"
        )
    types = {name: case.signature.get(name, "constexpr") for name in arguments}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or name in case.divisible
    }
    options = {"constexprs": dict(case.constexprs), "attrs": aligned}
    if case.function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(case.function, types, **options)
    return ASTSource(case.function, types, **options)


def _number(pattern: str, log: str) -> int:
    match = re.search(pattern, log)
    if match is None:
        raise ValueError(f"ptxas -v reports no {pattern!r}: {log.strip()!r}")
    return int(match[1])


def measure(case: AotCase, predict: bool = False) -> Resources:
    """Compile a case from scratch; nothing is kept on disk. A prediction takes some seconds.

    Raises:
        ValueError: the case does not name every argument of its function exactly once.
        triton.CompilationError and others of Triton: the kernel does not compile.
    """
    source = _source(case)
    target = GPUTarget("cuda", int(case.architecture.removeprefix("sm_")), 32)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    output = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(output),
    ):
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=target, options=options)
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        listing = sass.disassemble(knobs.nvidia.nvdisasm.path, cubin)
    log = output.getvalue()
    registers = _number(r"Used (\d+) registers", log)
    shared = compiled.metadata.shared
    blocks = blocks_per_multiprocessor(case.architecture, case.num_warps, registers, shared)
    return Resources(
        registers=registers,
        spill_stores=_number(r"(\d+) bytes spill stores", log),
        spill_loads=_number(r"(\d+) bytes spill loads", log),
        shared=shared,
        blocks=blocks,
        warnings=tuple(
            line.strip()
            for line in log.splitlines()
            if "warning" in line.lower() or re.search(r"\(C7\d{3}\)", line)
        ),
        sass=sass.analyze(listing),
        predicted_clocks=(
            model.loop_clocks(
                case.architecture,
                listing,
                case.num_warps,
                blocks,
                model.TmaCopies(case.tma_bytes, case.num_stages - 1),
            )
            if predict
            else 0.0
        ),
    )


def violations(case: AotCase, resources: Resources) -> list[str]:
    """The budgets that a compiled case breaks, one line each."""
    broken = []
    limit = LIMITS[case.architecture].shared_per_block
    if resources.shared > limit:
        broken.append(f"{resources.shared:,} B of shared memory, limit {limit:,}")
    if resources.sass.loop_local:
        broken.append(f"{resources.sass.loop_local} local-memory accesses in a loop")
    spilled = max(resources.spill_stores, resources.spill_loads)
    if spilled > SPILL_LIMIT:
        broken.append(f"{spilled} B spilled, limit {SPILL_LIMIT}")
    if case.half and resources.sass.narrow > NARROW_LIMIT:
        broken.append(f"{resources.sass.narrow} narrow accesses, limit {NARROW_LIMIT}")
    long = case.iterations >= OVERLAP_ITERATIONS
    if case.expects_mma and case.expects_overlap and long and resources.sass.exposed_copies:
        broken.append("a loop waits for the copies that it has just issued")
    if resources.sass.loop_register_a:
        broken.append(f"{resources.sass.loop_register_a} products with A in registers in a loop")
    if case.expects_mma and not resources.sass.mma:
        broken.append("no tensor-core instruction")
    broken += [f"ptxas: {line}" for line in resources.warnings]
    return [f"{case.name}: {line}" for line in broken]


def _versions() -> dict[str, str]:
    return {"triton": triton.__version__, "ptxas": knobs.nvidia.ptxas.version}


def predicted_share(case: AotCase, resources: Resources) -> float | None:
    """Share of the tensor cores' peak that the main loop reaches by prediction.

    None where there is no prediction or the case does not use tensor cores.
    """
    machine = model.MACHINES.get(case.architecture)
    if machine is None or not resources.predicted_clocks or not case.expects_mma:
        return None
    return case.flops / (case.iterations * resources.predicted_clocks * machine.flops)


def predicted_seconds(
    case: AotCase, resources: Resources, programs: int, processors: int
) -> float | None:
    """Predicted time of a launch's main loops on a GPU of ``processors`` multiprocessors.

    None where there is no prediction of the loop. What the model does not know is left out: DRAM,
    launching, and what comes before and after the loop.
    """
    machine = model.MACHINES.get(case.architecture)
    if machine is None or not resources.predicted_clocks:
        return None
    # The clocks of a block are its share of a full multiprocessor's.
    blocks = -(-programs // processors)
    return blocks * case.iterations * resources.predicted_clocks / machine.clock


def _share(case: AotCase, resources: Resources) -> str:
    share = predicted_share(case, resources)
    return "-" if share is None else f"{share:.0%}"


def _print_table(measured: Sequence[tuple[AotCase, Resources]]) -> None:
    versions = " ".join(f"{tool} {version}" for tool, version in _versions().items())
    columns = ("case", "warps", "stages", "registers", "spill B", "shared B", "blocks/SM",
               "loop instr.", "loop local", "loop mma", "mma", "narrow", "predicted loop clk",
               "predicted share", "kFLOP", "KB", "FLOP/B")  # fmt: skip
    rows = []
    for case, resources in measured:
        numbers = (
            case.num_warps, case.num_stages, resources.registers,
            max(resources.spill_stores, resources.spill_loads), f"{resources.shared:,}",
            resources.blocks, resources.sass.loop_instructions, resources.sass.loop_local,
            resources.sass.loop_mma, resources.sass.mma, resources.sass.narrow,
            f"{resources.predicted_clocks:,.0f}", _share(case, resources),
            f"{case.flops / 1e3:,.0f}", f"{case.bytes / 1e3:,.1f}",
            f"{case.flops / case.bytes:.1f}" if case.bytes else "-",
        )  # fmt: skip
        rows.append([case.name, *(f"{number:>7}" for number in numbers)])
    show_table(columns, rows, title=f"Compiled without a GPU by {versions}")


def _record(case: AotCase, resources: Resources) -> dict[str, object]:
    return {
        "name": case.name,
        "architecture": case.architecture,
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "flops": case.flops,
        "bytes": case.bytes,
        **asdict(resources),
        "predicted_share_of_peak": predicted_share(case, resources),
        "violations": violations(case, resources),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argument_parser("profiling.aot_report", __doc__, EXAMPLES)
    parser.add_argument("--op", action="append", choices=operations(), help="default: all")
    parser.add_argument("--architecture", choices=sorted(LIMITS), help="default: all")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    measured = [
        (case, measure(case, predict=True))
        for op in options.op or operations()
        for case in cases(op)
        if options.architecture in (None, case.architecture)
    ]
    broken = [line for pair in measured for line in violations(*pair)]
    if options.json:
        records = [_record(*pair) for pair in measured]
        print(json.dumps({**_versions(), "cases": records}, indent=2))
    else:
        _print_table(measured)
        for line in broken:
            say(line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
