"""adapted_linear on other people's models: what they hold, wrap, copy and compile."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from tests.golden import relative
from tests.hypernet.test_adapted import D_IN, D_OUT, IDS, LAYERS, adapter, factors, llama, merged
from v2l_fast import adapted_linear
from v2l_fast.errors import AdapterError
from v2l_fast.hypernet.adapted_linear import AdaptedModel
from v2l_fast.hypernet.adapter import Adapter

SUFFIX = "mlp.down_proj"
BATCH = [adapter(0), None, adapter(1, rank=2), adapter(0)]


def downs(model: nn.Module) -> list[nn.Module]:
    return [layer.mlp.down_proj for layer in model.model.layers]


def adapted(model: nn.Module | None = None) -> tuple[nn.Module, AdaptedModel]:
    model = llama() if model is None else model
    return model, adapted_linear(model, SUFFIX)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def logits_without_and_with() -> tuple[Tensor, Tensor]:
    """Logits without adapters and with BATCH."""
    model, handle = adapted()
    plain = logits(model)
    with handle.use(BATCH):
        return plain, logits(model)


@pytest.fixture(scope="module")
def expected() -> tuple[Tensor, Tensor]:
    return logits_without_and_with()


# --- which layers ----------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, experts: int = 1) -> None:
        super().__init__()
        self.down_proj = nn.Linear(D_IN, D_OUT)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(experts))


class Stack(nn.Module):
    def __init__(self, count: int = LAYERS, experts: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(experts) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer.down_proj(x).relu().repeat(1, 1, 2)[..., :D_IN]
        return x


def test_two_stacks_are_refused_by_name_and_one_can_be_chosen():
    model = nn.ModuleDict({"vision": Stack(4), "text": Stack(3)})
    with pytest.raises(AdapterError, match="vision.layers .*0 to 3.*text.layers .*0 to 2.*submod"):
        adapted_linear(model, "down_proj")
    assert len(adapted_linear(model["text"], "down_proj")._layers) == 3
    with pytest.raises(AdapterError, match=r"2 stacks .*layers.0.experts.*layers.1.experts"):
        adapted_linear(Stack(2, experts=3), "up")


def test_one_list_under_two_names_is_one_stack():
    model = Stack()
    model.blocks = model.layers
    assert adapted_linear(model, "down_proj")._layers == [x.down_proj for x in model.layers]


def test_layers_that_share_a_module_are_refused():
    model = Stack()
    for layer in model.layers:
        layer.down_proj = model.layers[0].down_proj
    with pytest.raises(AdapterError, match="share one down_proj"):
        adapted_linear(model, "down_proj")


def test_layers_that_are_no_linear_ones_are_named():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4))
    with pytest.raises(AdapterError, match="Conv1D"):
        adapted_linear(model, "mlp.c_proj")
    fused = Stack()
    for layer in fused.layers:
        layer.weights = nn.ParameterDict({"all": torch.zeros(4, 3, 2)})
    with pytest.raises(AdapterError, match="fused experts"):
        adapted_linear(fused, "weights.all")
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    with pytest.raises(AdapterError, match="NonDynamicallyQuantizableLinear"):
        adapted_linear(encoder, "self_attn.out_proj")


def test_t5():
    config = {"vocab_size": 50, "d_model": D_OUT, "d_kv": 6, "d_ff": D_IN, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(num_layers=LAYERS, **config)).eval()
    with pytest.raises(AdapterError, match="stacks"):
        adapted_linear(model, "DenseReluDense.wo")
    handle = adapted_linear(model, "layer.2.DenseReluDense.wo")  # The decoder's.
    a, b = (f["down_proj"] for f in factors(4, 0))
    own = Adapter({"wo": a}, {"wo": b}, 1.5)
    with torch.no_grad():
        plain = model(input_ids=IDS, decoder_input_ids=IDS).logits
        with handle.use([own, None, None, own]):
            actual = model(input_ids=IDS, decoder_input_ids=IDS).logits
    assert torch.equal(actual[1:3], plain[1:3])
    assert not torch.isclose(actual[[0, 3]], plain[[0, 3]]).all()


def test_adapters_that_do_not_fit_are_refused():
    _, handle = adapted()
    a, b = (f["down_proj"] for f in factors(4, 0))
    for wrong, message in (
        (Adapter({"q_proj": a}, {"q_proj": b}, 1.5), "for q_proj, this handle for down_proj"),
        (Adapter({"down_proj": a[:2]}, {"down_proj": b[:2]}, 1.5), "2 layers, .* has 3"),
        (Adapter({"down_proj": b}, {"down_proj": a}, 1.5), r"\(24, 40\), .* \(40, 24\)"),
        (Adapter({"down_proj": a.int()}, {"down_proj": b.int()}, 1.5), "int32"),
        ("clip.safetensors", "got str"),
    ):
        for batch in ([wrong], wrong if isinstance(wrong, str) else (None, wrong)):
            with pytest.raises(AdapterError, match=message):
                handle.use(batch)


# --- what the layers are -----------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Quantized(nn.Linear):
    """int8 weights, a scale for each row, like bitsandbytes' or transformers' FP8Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        weight = (linear.weight / scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def of_class(make) -> nn.Module:
    model = llama()
    for layer in model.model.layers:
        layer.mlp.down_proj = make(layer.mlp.down_proj)
    return model


def scaled(linear: nn.Linear) -> nn.Linear:
    layer = Scaled(D_IN, D_OUT, bias=False)
    layer.weight = linear.weight
    return layer


@pytest.mark.parametrize("make", [scaled, Quantized, parametrizations.weight_norm])
def test_any_kind_of_linear_layer_keeps_its_results(make):
    model = of_class(make)
    before, classes = logits(model), [type(layer) for layer in downs(model)]
    names = list(model.state_dict())
    _, handle = adapted(model)
    assert [type(layer) for layer in downs(model)] == classes
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model), before)
    with handle.use(BATCH):
        actual = logits(model)
    assert torch.equal(actual[1], before[1]) and not torch.isclose(actual[0], before[0]).all()
    assert torch.equal(logits(model), before)
    assert parametrize.is_parametrized(downs(model)[0]) == (make is parametrizations.weight_norm)


def test_hooks_stay_and_see_the_adapted_output(expected):
    model, seen = llama(), []
    for layer in downs(model):
        layer.register_forward_pre_hook(lambda *_: seen.append("before"))
        layer.register_forward_hook(lambda _, args, out: seen.append(out.clone()))
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    handle = adapted_linear(model, SUFFIX)
    with handle.use(BATCH):
        assert torch.equal(logits(model), expected[1])
    assert len(seen) == 2 * LAYERS
    handle.remove()
    logits(model)
    assert not torch.isclose(seen[1][0], seen[2 * LAYERS + 1][0]).all()


def test_hooks_of_accelerate(expected):
    model = llama()
    for layer in downs(model):
        add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True, io_same_device=True))
    assert downs(model)[0].weight.device.type == "meta"
    _, handle = adapted(model)
    assert torch.equal(logits(model), expected[0])
    with handle.use(BATCH):
        assert relative(logits(model), expected[1]) <= 1e-6


@pytest.mark.parametrize("first", ["peft", "handle"])
def test_with_peft(first):
    model = llama()
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    if first == "handle":
        handle = adapted_linear(model, SUFFIX)
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, config).eval()
    if first == "peft":
        handle = adapted_linear(wrapped, SUFFIX)
    plain = logits(wrapped)
    with handle.use(BATCH):
        actual = logits(wrapped)
    assert torch.equal(actual[1], plain[1])
    reference = merged(llama(), BATCH[0])
    torch.manual_seed(5)
    reference = peft.get_peft_model(reference, config).eval()
    assert relative(actual[0], logits(reference)[0]) <= 1e-5
    if first == "peft":
        wrapped.unload()
        with pytest.raises(AdapterError, match="replaced since"), handle.use(BATCH):
            pass


def test_layers_replaced_within_a_block():
    model, handle = adapted()
    with pytest.raises(AdapterError, match="replaced since"), handle.use(BATCH):
        model.model.layers[1].mlp.down_proj = torch.nn.Linear(
            model.config.intermediate_size, model.config.hidden_size, bias=False
        )
        logits(model)


def test_nothing_to_adapt():
    with pytest.raises(AdapterError, match="adapters is empty"):
        adapted()[1].use([])
    with pytest.raises(AdapterError, match=r"must be an nn.Module, got NoneType"):
        adapted_linear(None, SUFFIX)


@pytest.mark.parametrize("change", [
    lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.train(), lambda m: m.eval(),
])  # fmt: skip
def test_changes_after_adapting(change):
    model, handle = adapted()
    change(model)
    reference = change(merged(llama(), BATCH[0]))
    with handle.use(BATCH):
        actual = logits(model)
    tolerance = 0.05 if actual.dtype == torch.bfloat16 else 3e-6
    assert relative(actual[0], logits(reference)[0]) <= tolerance
    with handle.use(BATCH):
        model.float()
        assert relative(logits(model)[0], logits(reference.float())[0]) <= 0.05


def test_autocast(expected):
    model, handle = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16), handle.use(BATCH):
        actual = logits(model)
    assert actual.dtype == torch.bfloat16
    assert relative(actual.float(), expected[1]) <= 0.05


# --- handles -----------------------------------------------------------------------------------


def test_two_handles_of_one_model(expected):
    model, first = adapted()
    second = adapted_linear(model, SUFFIX)
    other = adapted_linear(model, "mlp.up_proj")
    for handle in (first, second):
        with handle.use(BATCH):
            assert torch.equal(logits(model), expected[1])
    assert torch.equal(logits(model), expected[0])
    a, b = (f["down_proj"] for f in factors(4, 0))
    with first.use(BATCH), other.use([Adapter({"up_proj": b}, {"up_proj": a}, 1.5)] * 4):
        assert not torch.isclose(logits(model), expected[1]).all()


def test_removing_a_handle(expected):
    model, handle = adapted()
    with handle.use(BATCH), pytest.raises(AdapterError, match="block is open"):
        handle.remove()
    handle.remove()
    handle.remove()
    assert not any(layer._forward_hooks for layer in downs(model))
    assert torch.equal(logits(model), expected[0])
    with pytest.raises(AdapterError, match="removed"), handle.use(BATCH):
        pass


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
def test_copies(copied, expected):
    model, handle = adapted()
    with handle.use(BATCH):
        twin = copied(model)
        assert torch.equal(logits(twin), expected[0])
    own = adapted_linear(twin, SUFFIX)
    with own.use(BATCH):
        assert torch.equal(logits(twin), expected[1])
        assert torch.equal(logits(model), expected[0])
    pair = copied(handle)
    with pair.use(BATCH):
        assert torch.equal(logits(pair.model), expected[1])
        assert torch.equal(logits(model), expected[0])


def test_save_pretrained(tmp_path):
    model, _ = adapted()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


# --- generation --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_take_copies_of_each_adapter(options):
    model, handle = adapted()
    common = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False, **options}
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    beams, kept = options["num_beams"], options.get("num_return_sequences", 1)
    with handle.use([a for a in BATCH for _ in range(beams)]):
        actual = model.generate(**inputs, **common)
    for row, own in enumerate(BATCH):
        alone = merged(llama(), own).generate(
            input_ids=IDS[row, None], attention_mask=torch.ones_like(IDS[row, None]), **common
        )
        mine = actual[row * kept : (row + 1) * kept, : alone.shape[1]]
        assert torch.equal(mine, alone[:, : mine.shape[1]])
    with handle.use(BATCH), pytest.raises(AdapterError, match="num_beams .* k times in a row"):
        model.generate(**inputs, **common)


# --- torch.compile -----------------------------------------------------------------------------


def batches() -> list[list]:
    sets = [[adapter(i, rank=1 + i % 3), None, adapter(i + 9), adapter(i)] for i in range(5)]
    return [*sets, [adapter(1)] * 4, [adapter(i) for i in range(4)]]


@torch.no_grad()
def run_stack(model: nn.Module) -> Tensor:
    return model(torch.linspace(-2, 2, 4 * 3 * D_IN).sin().view(4, 3, D_IN))


def test_compiled_once_for_every_set_of_adapters(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    model = Stack()
    handle = adapted_linear(model, "down_proj")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = run_stack(model)
    assert relative(run_stack(compiled), plain) <= 1e-6
    for batch in batches():
        with handle.use(batch):
            assert relative(run_stack(compiled), run_stack(model)) <= 1e-6
            assert not torch.isclose(run_stack(compiled)[0], plain[0]).all()
    assert relative(run_stack(compiled), plain) <= 1e-6
    with ThreadPoolExecutor(1) as pool:
        with handle.use(BATCH):
            target = run_stack(model)
            assert relative(pool.submit(run_stack, compiled).result(), target) <= 1e-6
        assert relative(pool.submit(run_stack, compiled).result(), plain) <= 1e-6


def test_compiled_before_it_was_adapted():
    model = Stack()
    compiled = torch.compile(model, backend="eager")
    plain = run_stack(compiled)
    handle = adapted_linear(model, "down_proj")
    with handle.use(BATCH):
        assert relative(run_stack(compiled), run_stack(model)) <= 1e-6
        assert not torch.isclose(run_stack(compiled)[0], plain[0]).all()
    handle.remove()
    assert relative(run_stack(compiled), plain) <= 1e-6


def test_compiled_in_asyncio_tasks():
    model = Stack()
    plain = run_stack(model)
    handle = adapted_linear(model, "down_proj")
    with handle.use(BATCH):
        target = run_stack(model)
    compiled = torch.compile(model, backend="eager")

    async def run(batch: list | None) -> Tensor:
        with handle.use(batch) if batch else contextlib.nullcontext():
            await asyncio.sleep(0)
            return run_stack(compiled)

    async def main() -> list[Tensor]:
        return await asyncio.gather(run(BATCH), run(None))

    for actual, right in zip(asyncio.run(main()), (target, plain), strict=True):
        assert relative(actual, right) <= 1e-6
