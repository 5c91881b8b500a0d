"""Inductor's CUDA code of everything that the product compiles, made and compiled without a GPU.

The product's own entry points (``SmolVLM.compile``, ``Decoder.compile``,
``HyperNetwork.compile_layers``, the passes of ``ModelRunner``, ``TrainStep``) run on tensors that
say they are on cuda:0 and hold no data, at the widths of the 500M shape in bfloat16 with fewer
layers. Each piece is called with two lengths. Inductor lowers its graphs for an architecture, and
Triton with its ptxas compiles every kernel that Inductor wrote to machine code, in the first of the
configurations that Inductor would try.

What this shows: each piece lowers, its kernels compile, how many graphs and kernels there are, and
bytes of registers that spill. Exit status 1 if a piece fails or has more graphs than recorded here.

What it does not show: that numbers are right, or any time. Matrix products, convolutions and our
own ops are calls in the generated code, not kernels in it. Attention without our ops is decomposed
into products and a softmax here, because only a CUDA build of PyTorch can choose a fused kernel:
the counts on a GPU may be lower. Padding of products, which Inductor decides by timing them, and
folding of constants are off. Gradients are traced as if on the "meta" device, because the
autograd engine of a CPU build does not accept CUDA tensors; devices are put back before lowering.

Changes how this process sees CUDA: run it in a process of its own.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import ctypes
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._dynamo import device_interface
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx
from torch._inductor.codecache import PyCodeCache
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from bench.harness import argument_parser
from bench.models import SHAPES, random_backbone, random_hypernet
from bench.runs.train_step import Case, batch
from v2l_fast.console import say, show_table
from v2l_fast.generation import ModelRunner
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.training.step import StepOptions, TrainStep
from v2l_fast.vlm.smolvlm import SmolVLM

EXAMPLES = """
  python -m profiling.lowering
  python -m profiling.lowering --piece "decode step" --architecture sm_90 --json"""
ARCHITECTURES = ("sm_80", "sm_90")
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}
BACKEND = "v2l_lowering"
CUDA, META = torch.device("cuda", 0), torch.device("meta")
# Further decoder layers and tower layers run the code of the first ones; the second perceiver block
# differs from the first, and those after it do not differ from the second.
_SHAPE = SHAPES["500M"]
SHAPE = replace(
    _SHAPE,
    text={**_SHAPE.text, "num_hidden_layers": 3},
    vision={**_SHAPE.vision, "num_hidden_layers": 2},
    vocabulary=512,
)
NETWORK = {"num_blocks": 2}
LENGTHS = (37, 53)
ROWS, CAPACITY, RANK = 3, 256, 32


# --- CUDA tensors without a GPU -------------------------------------------------------------------


class _WithoutData(TorchDispatchMode):
    """CUDA tensors are fake ones; CPU tensors are real."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    @classmethod
    def is_infra_mode(cls) -> bool:
        # The compiler refuses to run inside of any other mode.
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        mode = next((x.fake_mode for x in leaves if isinstance(x, FakeTensor)), None)
        if mode is None and any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves):
            mode = self.fake
        with mode or contextlib.nullcontext():
            return func(*args, **kwargs)


def _register_device_guard() -> None:
    """Register PyTorch's guard for CUDA tensors without a GPU, which a CPU build leaves out.

    PyTorch registers it in place of a guard that has no devices: the lazy backend's is lent.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    kinds = torch._C._autograd.DeviceType
    guards = (ctypes.c_void_p * (int(kinds.Lazy) + 1)).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    if not guards[int(kinds.CUDA)]:
        guards[int(kinds.CUDA)] = guards[int(kinds.Lazy)]
    torch._C._ensureCUDADeviceGuardSet()


def _cuda_functions(architecture: str) -> dict[str, Any]:
    """What ``torch.cuda`` answers."""
    capability = tuple(map(int, architecture.removeprefix("sm_")))
    properties = SimpleNamespace(
        name=architecture, major=capability[0], minor=capability[1], total_memory=80 << 30,
        multi_processor_count=MULTIPROCESSORS[architecture], warp_size=32,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        regs_per_multiprocessor=65536, L2_cache_size=40 << 20, gcnArchName="",
    )  # fmt: skip
    return {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "_lazy_init": lambda: None,
        "get_device_capability": lambda _=None: capability,
        "get_device_name": lambda _=None: architecture,
        "get_device_properties": lambda _=None: properties,
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda _=None: (70 << 30, 80 << 30),
        "manual_seed": lambda _: None, "manual_seed_all": lambda _: None,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "_exchange_device": lambda _: 0, "_maybe_exchange_device": lambda _: 0,
    }  # fmt: skip


@contextlib.contextmanager
def _pretend(architecture: str) -> Iterator[None]:
    """CUDA tensors and the properties of a card inside of the block."""
    _register_device_guard()
    functions = _cuda_functions(architecture)
    interface = device_interface.CudaInterface
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    known = device_interface.caching_worker_device_properties
    cached = (
        DeviceProperties.create,
        torch.utils._triton.triton_backend,
        torch.utils._triton.triton_hash_with_backend,
    )
    with contextlib.ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
            # The interface holds the functions as they were when it was defined.
            if name in vars(interface) and name != "is_available":
                stack.enter_context(mock.patch.object(interface, name, staticmethod(function)))
        for owner, name, value in (
            (torch.Tensor, "pin_memory", lambda tensor, *_: tensor),
            (torch.Tensor, "is_pinned", lambda tensor, *_: tensor.device.type == "cpu"),
            (triton_helpers, "set_driver_to_gpu", lambda: None),
            (driver, "_active", SimpleNamespace(get_current_target=lambda: target)),
            # Otherwise true without a GPU; it must not follow is_available above.
            (FakeTensorMode, "avoid_device_init", True),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(known, clear=True))
        for function in cached:
            function.cache_clear()
            stack.callback(function.cache_clear)
        # Otherwise torch.tensor copies to the device below the modes.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(_WithoutData())
        yield


def _without_data(module: nn.Module) -> None:
    """Put a module on the device. ``Module.to`` cannot: it swaps tensors, which modes refer to."""
    moved: dict[int, Tensor] = {}
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    twin = torch.empty_like(tensor, device=CUDA)
                    if isinstance(tensor, nn.Parameter):
                        twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
                    moved[id(tensor)] = twin
                tensors[name] = moved[id(tensor)]


# --- lowering -------------------------------------------------------------------------------------


def _set_device(module: fx.GraphModule, inputs: Sequence[Any], device: torch.device) -> None:
    """Make a graph and its inputs say that they are on a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, FakeTensor) and value.fake_device.type in ("cuda", "meta"):
            value.fake_device = device
        is_device = isinstance(value, torch.device) and value.type in ("cuda", "meta")
        return device if is_device else value

    pytree.tree_map(moved, list(inputs))
    for node in module.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(moved, (node.args, node.kwargs))
        pytree.tree_map(moved, [node.meta.get(key) for key in ("val", "example_value")])
    module.recompile()


class _Recorder:
    """A backend of ``torch.compile`` that keeps Inductor's code and runs the graphs it came from.

    Attributes:
        graphs: number of graphs that Dynamo has compiled with it.
        code: Inductor's Python module of each lowered graph; a graph with gradients has two.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self.code: list[str] = []

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable:
        traced_on = META if torch.is_grad_enabled() else CUDA
        _set_device(module, inputs, traced_on)
        try:
            run = compile_fx.compile_fx(module, inputs, inner_compile=self._lower)
        finally:
            _set_device(module, inputs, CUDA)
        # Behind the call: for a graph that takes a number, the first one makes Dynamo start again.
        self.graphs += 1
        return run

    def _lower(self, module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable:
        _set_device(module, inputs, CUDA)
        run = make_boxed_func(copy.deepcopy(module).forward)

        def keep(graph: GraphLowering) -> SimpleNamespace:
            code, _ = graph.codegen()
            self.code.append(code.value)
            return SimpleNamespace(call=run, __file__="", key="")

        with mock.patch.object(GraphLowering, "compile_to_module", keep):
            compile_fx.compile_fx_inner(module, inputs, **options)
        return run


_recorder = _Recorder()


@torch._dynamo.register_backend(name=BACKEND)
def _record(module: fx.GraphModule, inputs: list[Any]) -> Callable:
    return _recorder(module, inputs)


def kernel_sources(code: str) -> dict[str, str]:
    """Name -> source of the Triton kernels in a module that Inductor wrote."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return {
        ast.literal_eval(call.args[0]): ast.literal_eval(call.args[1])
        for call in calls
        if ast.unparse(call.func) == "async_compile.triton"
    }


def spilled_bytes(name: str, source: str) -> int:
    """Compile a kernel to machine code in its first configuration; bytes that it spills.

    Raises:
        triton.CompilationError and others of Triton: the kernel does not compile.
    """
    autotuner = getattr(PyCodeCache.load(source), name)
    output = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(output):
        knobs.nvidia.dump_ptxas_log = True
        result = autotuner._precompile_config(autotuner.configs[0])
    if not result.kernel.asm["cubin"]:
        raise ValueError(f"{name}: no machine code")
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", output.getvalue())))


# --- pieces ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompiledModels:
    """The compiled models of a piece."""

    backbone: SmolVLM
    network: HyperNetwork

    def states(self, rows: int, length: int) -> Tensor:
        size = rows, length, self.backbone.hidden_size
        return torch.zeros(size, dtype=self.backbone.decoder.dtype, device=CUDA)

    def bank(self) -> AdapterBank:
        """Two adapters of one rank, as the server's bank holds them."""
        ((module, (d_in, d_out)),) = self.network.config.target_modules.items()
        layers, dtype = self.network.config.num_layers, self.backbone.decoder.dtype
        a, b = (
            torch.zeros(layers, 2, RANK, width, dtype=dtype, device=CUDA) for width in (d_in, d_out)
        )
        index = torch.zeros(ROWS, dtype=torch.long, device=CUDA)
        return AdapterBank({module: a}, {module: b}, index, self.network.config.scale)

    def runner(self) -> ModelRunner:
        return ModelRunner(self.backbone.decoder, ROWS, CAPACITY, (0,))


def _vision(models: CompiledModels, length: int) -> None:
    side = models.backbone.tile_size
    views = torch.zeros(length // 16, 3, side, side, dtype=torch.uint8)
    models.backbone.encode_views(views)


def _decoder(models: CompiledModels, length: int) -> None:
    for _ in models.backbone.decoder.layer_inputs(models.states(2, length)):
        pass


def _hypernet(models: CompiledModels, length: int, masked: bool) -> None:
    mask = torch.ones(2, length, dtype=torch.long, device=CUDA) if masked else None
    for count in (1, 2):
        models.network.group(0, [models.states(2, length)] * count, mask)


def _prefill(models: CompiledModels, length: int, adapted: bool) -> None:
    rows = torch.arange(2, device=CUDA)
    bank = models.bank() if adapted else None
    models.runner().run_prefill(models.states(2, length), rows, rows, bank)


def _continuation(models: CompiledModels, length: int, adapted: bool) -> None:
    rows = torch.arange(2, device=CUDA)
    bank = models.bank() if adapted else None
    states = models.states(2, length)
    models.runner().run_continuation(states, rows, rows, rows, 2 * length, bank)


def _decode(models: CompiledModels, length: int, adapted: bool) -> None:
    models.runner().run_decode(ROWS, length, models.bank() if adapted else None)


def _train(models: CompiledModels, length: int) -> None:
    case = Case("lowering", SHAPE, NETWORK, 2, 2, length // 16)
    TrainStep(models.network, models.backbone, StepOptions(recompute=False))(
        batch(case, models.backbone)
    )


@dataclass(frozen=True)
class Piece:
    """Something that the product compiles.

    Attributes:
        call: runs it once at a length.
        graphs: recorded number of Dynamo's graphs; more fail.
        kernels: recorded number of distinct kernels that Inductor writes, for comparison; the same
            on both architectures.
        grad: whether gradients are recorded, which also lowers the backward pass.
    """

    name: str
    call: Callable[[CompiledModels, int], None]
    graphs: int
    kernels: int
    grad: bool = False


PIECES = {
    piece.name: piece
    for piece in (
        Piece("vision chunk", _vision, 1, 14),
        Piece("decoder layer", _decoder, 1, 8),
        Piece("hypernetwork layer", lambda m, n: _hypernet(m, n, False), 1, 31),
        Piece("hypernetwork layer, masked", lambda m, n: _hypernet(m, n, True), 1, 31),
        Piece("prefill", lambda m, n: _prefill(m, n, False), 1, 13),
        Piece("prefill, adapters", lambda m, n: _prefill(m, n, True), 1, 13),
        Piece("continuation, adapters", lambda m, n: _continuation(m, n, True), 1, 10),
        Piece("decode step", lambda m, n: _decode(m, n, False), 1, 10),
        Piece("decode step, adapters", lambda m, n: _decode(m, n, True), 1, 10),
        # One graph each of vision, a context layer and the hypernetwork, and four of an answer
        # layer: Dynamo compiles for one row apart from several, and for the first layer apart from
        # the others, because the embeddings that it reads need no gradient. One graph for all
        # layers would compute the embeddings' gradient at every step.
        Piece("training step", _train, 7, 160, grad=True),
    )
}


@dataclass(frozen=True)
class Lowered:
    """A piece on an architecture.

    Attributes:
        graphs: of Dynamo, after two lengths.
        modules: Inductor's modules: one for each graph, and one more for its gradients.
        kernels: distinct Triton kernels.
        spills: bytes, the sum over kernels.
        failure: why it could not be lowered or compiled; None if it could.
    """

    piece: str
    architecture: str
    graphs: int = 0
    modules: int = 0
    kernels: int = 0
    spills: int = 0
    failure: str | None = None

    @property
    def violation(self) -> str | None:
        """What is wrong with it, in a line."""
        recorded = PIECES[self.piece].graphs
        name = f"{self.piece} {self.architecture}"
        if self.failure is not None:
            return f"{name}: {self.failure}"
        if self.graphs > recorded:
            return f"{name}: {self.graphs} graphs, recorded {recorded}"
        return None


def lower(piece: Piece, architecture: str) -> Lowered:
    """Lower a piece for an architecture and compile its kernels; nothing is kept on disk."""
    global _recorder
    _recorder = recorder = _Recorder()
    torch._dynamo.reset()
    settings = torch._inductor.config.patch(
        {
            "force_disable_caches": True,
            "compile_threads": 1,
            "use_static_triton_launcher": False,
            # It would compute the constants on the device.
            "joint_graph_constant_folding": False,
            # It would time padded products on the device.
            "shape_padding": False,
        }
    )
    eager = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    count, spills = 0, 0
    try:
        backbone = random_backbone(SHAPE, "cpu", torch.bfloat16)
        network = random_hypernet(SHAPE, **NETWORK)
        if not piece.grad:
            network = network.to(torch.bfloat16)
        with fresh_cache(), settings, eager, _pretend(architecture):
            _without_data(backbone.model)
            _without_data(network)
            backbone = SmolVLM(backbone.model, backbone.tokenizer, backbone.name_or_path)
            models = CompiledModels(backbone, network)
            backbone.compile(BACKEND)
            models.network.compile_layers(BACKEND)
            with torch.set_grad_enabled(piece.grad):
                for length in LENGTHS:
                    piece.call(models, length)
            sources = {s: n for code in recorder.code for n, s in kernel_sources(code).items()}
            count = len(sources)
            spills = sum(spilled_bytes(name, source) for source, name in sources.items())
        failure = None
    except Exception as error:
        # Dynamo, Inductor and Triton raise dozens of types: the row says which one.
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        failure = f"{type(error).__name__}: {reason}"
    return Lowered(
        piece.name, architecture, recorder.graphs, len(recorder.code), count, spills, failure
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argument_parser("profiling.lowering", __doc__, EXAMPLES)
    parser.add_argument("--piece", action="append", choices=PIECES, help="default: all")
    parser.add_argument("--architecture", choices=ARCHITECTURES, help="default: both")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    lowered = [
        lower(PIECES[name], architecture)
        for architecture in ARCHITECTURES
        if options.architecture in (None, architecture)
        for name in options.piece or PIECES
    ]
    broken = [row.violation for row in lowered if row.violation is not None]
    if options.json:
        print(json.dumps({"pieces": [asdict(row) for row in lowered], "broken": broken}, indent=2))
        return 1 if broken else 0
    rows = [
        [row.piece, row.architecture, f"{row.graphs} / {PIECES[row.piece].graphs}",
         f"{row.modules}", f"{row.kernels} / {PIECES[row.piece].kernels}", f"{row.spills}",
         "not lowered" if row.failure else "ok"]
        for row in lowered
    ]  # fmt: skip
    columns = ("piece", "arch", "graphs / recorded", "modules", "kernels / recorded", "spill B", "")
    show_table(columns, rows, title=f"Lowered without a GPU by torch {torch.__version__}")
    for line in broken:
        say(line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
