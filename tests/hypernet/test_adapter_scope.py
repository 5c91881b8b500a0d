"""Which adapters are in force in threads, tasks, generators and repeated forward passes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.golden import relative
from tests.hypernet.test_adapted import D_IN, IDS, llama
from tests.hypernet.test_adapted_models import (
    BATCH,
    Stack,
    adapted,
    downs,
    logits,
    logits_without_and_with,
)
from v2l_fast import adapted_linear
from v2l_fast.errors import AdapterError
from v2l_fast.hypernet.adapted_linear import AdaptedModel


@pytest.fixture(scope="module")
def expected() -> tuple[Tensor, Tensor]:
    return logits_without_and_with()


# --- where adapters are in force -------------------------------------------------------------


def test_threads_started_inside_a_block(expected):
    model, handle = adapted()
    outputs: list[Tensor] = []
    go = threading.Event()

    def late() -> None:
        go.wait()
        outputs.append(logits(model))

    with handle.use(BATCH):
        threads = [
            threading.Thread(target=lambda: outputs.append(logits(model))),
            threading.Timer(0, lambda: outputs.append(logits(model))),
            threading.Thread(target=late),
        ]
        for thread in threads:
            thread.start()
    go.set()
    for thread in threads:
        thread.join()
    assert len(outputs) == 3 and all(torch.equal(f, expected[1]) for f in outputs)


def test_tasks_of_executors(expected):
    model, handle = adapted()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, model).result(), expected[0])
        with handle.use(BATCH):
            assert torch.equal(pool.submit(logits, model).result(), expected[1])
            with handle.use([None] * 4):
                assert torch.equal(pool.submit(logits, model).result(), expected[0])
        assert torch.equal(pool.submit(logits, model).result(), expected[0])


def test_a_thread_that_gets_its_work_otherwise_is_refused(expected):
    model, handle = adapted()
    with ThreadPool(1) as pool:
        assert torch.equal(pool.apply(logits, (model,)), expected[0])
        with handle.use(BATCH), pytest.raises(AdapterError, match="enter use.. in this thread"):
            pool.apply(logits, (model,))

        def within() -> Tensor:
            with handle.use(BATCH[::-1]):
                return logits(model)

        with handle.use(BATCH):
            assert torch.equal(pool.apply(within)[1], logits_of(BATCH[::-1])[1])


def logits_of(batch: list) -> Tensor:
    model, handle = adapted()
    with handle.use(batch):
        return logits(model)


def test_data_parallel_replicas_are_refused():
    model, handle = adapted()
    for layer in downs(model):
        layer._is_replica = True
    with handle.use(BATCH), pytest.raises(AdapterError, match="DataParallel"):
        logits(model)
    with handle.use([BATCH[0]] * 4):
        logits(model)


def test_asyncio_tasks(expected):
    model, handle = adapted()
    reverse = logits_of(BATCH[::-1])

    async def run(batch: list | None) -> list[Tensor]:
        outputs = []
        with handle.use(batch) if batch else contextlib.nullcontext():
            for _ in range(3):
                await asyncio.sleep(0)
                outputs.append(logits(model))
                outputs.append(await asyncio.to_thread(logits, model))
        return outputs

    async def main() -> list[list[Tensor]]:
        return await asyncio.gather(run(BATCH), run(None), run(BATCH[::-1]))

    for outputs, target in zip(
        asyncio.run(main()), (expected[1], expected[0], reverse), strict=True
    ):
        assert all(torch.equal(f, target) for f in outputs)


def test_generators(expected):
    model, handle = adapted()
    reverse = logits_of(BATCH[::-1])

    def answers(batch: list):
        with handle.use(batch):
            while True:
                yield logits(model)

    first, second = answers(BATCH), answers(BATCH[::-1])
    for _ in range(2):
        assert torch.equal(next(first), expected[1])
        assert torch.equal(next(second), reverse)
    with pytest.raises(AdapterError, match="suspended generator"):
        logits(model)
    with handle.use([None] * 4):
        assert torch.equal(logits(model), expected[0])
        assert torch.equal(next(first), expected[1])
    first.close()
    assert torch.equal(next(second), reverse)
    second.close()
    assert torch.equal(logits(model), expected[0])


def test_streaming_from_a_generator(expected):
    model, handle = adapted()

    def stream():
        outputs: list[Tensor] = []
        with handle.use(BATCH):
            thread = threading.Thread(target=lambda: outputs.append(logits(model)))
            thread.start()
            yield "started"
            thread.join()
            yield outputs[0]

    assert torch.equal(list(stream())[1], expected[1])


def test_a_block_may_be_entered_again(expected):
    model, handle = adapted()
    block = handle.use(BATCH)
    for _ in range(2):
        with block, handle.use([None] * 4), block:
            assert torch.equal(logits(model), expected[1])
        assert torch.equal(logits(model), expected[0])
    assert torch.equal(block(logits)(model), expected[1])
    assert not handle._scope.open


def test_context_managers_lend_their_block(expected):
    model, handle = adapted()
    reverse = logits_of(BATCH[::-1])

    @contextlib.contextmanager
    def lent(batch: list):
        with handle.use(batch):
            yield

    with lent(BATCH):
        assert torch.equal(logits(model), expected[1])
        with handle.use(BATCH[::-1]):
            assert torch.equal(logits(model), reverse)
    with handle.use(BATCH[::-1]), lent(BATCH):
        assert torch.equal(logits(model), expected[1])
    with contextlib.ExitStack() as stack:
        stack.enter_context(handle.use(BATCH))
        assert torch.equal(logits(model), expected[1])
        stack.enter_context(lent(BATCH[::-1]))
        assert torch.equal(logits(model), reverse)
    block = handle.use(BATCH)
    block.__enter__()
    assert torch.equal(logits(model), expected[1])
    block.__exit__(None, None, None)
    assert torch.equal(logits(model), expected[0])


# --- activation checkpointing ------------------------------------------------------------------


def training(reentrant: bool | None) -> tuple[nn.Module, AdaptedModel]:
    model = llama().train().requires_grad_(True)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return adapted(model)


def grads_of(model: nn.Module) -> list[Tensor]:
    outputs = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return outputs


def loss_of(model: nn.Module) -> Tensor:
    return model(IDS, labels=IDS, use_cache=False).loss


def run_in_thread(function) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_run_again_as_they_ran(reentrant):
    target = {}
    model, handle = training(None)
    for name, batch in (("first", BATCH), ("second", BATCH[::-1]), ("plain", None)):
        with handle.use(batch) if batch else contextlib.nullcontext():
            loss_of(model).backward()
        target[name] = grads_of(model)
    model, handle = training(reentrant)

    def check(*names: str) -> None:
        outputs = grads_of(model)
        total = [sum(parts) for parts in zip(*(target[name] for name in names), strict=True)]
        assert all(relative(f, t) <= 1e-5 for f, t in zip(outputs, total, strict=True))

    with handle.use(BATCH):
        first = loss_of(model)
    plain = loss_of(model)
    with handle.use(BATCH[::-1]):
        second = loss_of(model)
        plain.backward()
        check("plain")
        first.backward()
        check("first")
    run_in_thread(second.backward)
    check("second")
    with handle.use(BATCH):
        first = loss_of(model)
        with handle.use(BATCH[::-1]):
            second = loss_of(model)
    (first + second + loss_of(model)).backward()
    check("first", "second", "plain")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside_of_checkpoints(reentrant):
    model = Stack().requires_grad_(True)
    handle = adapted_linear(model, "down_proj")
    x = torch.randn(4, 2, D_IN, requires_grad=True)

    def run(levels: int) -> Tensor:
        function = lambda x: sum(layer.down_proj(x) for layer in model.layers)  # noqa: E731
        for _ in range(levels):
            function = lambda x, f=function: checkpoint(f, x, use_reentrant=reentrant)  # noqa: E731
        with handle.use(BATCH):
            loss = function(x).square().sum()
        loss.backward()
        outputs, x.grad = x.grad, None
        return outputs

    assert relative(run(2), run(0)) <= 1e-6


class Repeated(torch.autograd.Function):
    """Somebody's own checkpoint."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        return torch.autograd.grad(y, x, grad)[0], None


def test_an_unknown_kind_of_checkpoint_is_refused_after_the_block():
    model = Stack()
    handle = adapted_linear(model, "down_proj")
    x = torch.randn(4, 2, D_IN, requires_grad=True)
    Repeated.apply(x, model.layers[0].down_proj).sum().backward()
    with handle.use(BATCH):
        y = Repeated.apply(x, model.layers[0].down_proj).sum()
        y.backward(retain_graph=True)
    with pytest.raises(AdapterError, match="inside the block"):
        y.backward()
