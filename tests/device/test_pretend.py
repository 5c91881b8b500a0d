"""The pretend device finds what it is for."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from tests.device import pretend
from tests.device.pretend import CUDA, CudaTensor, PretendDevice


@pytest.fixture
def device():
    with pretend.cuda() as device:
        yield device


def capture(run, pool=None) -> pretend.PretendGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph


def test_tensors_say_that_they_are_on_the_device(device: PretendDevice):
    tensor = torch.arange(6.0, device=CUDA).view(2, 3).to(torch.bfloat16)
    assert isinstance(tensor, CudaTensor) and tensor.device == CUDA and tensor.is_cuda
    assert (tensor @ tensor.mT + 1).cpu().tolist() == [[6, 15], [15, 51]]
    weight = torch.nn.Parameter(torch.ones(3, device=CUDA))
    (weight * 2).sum().backward()
    assert weight.grad is not None and weight.grad.device == CUDA
    assert not device.problems


def test_mixed_devices_raise(device: PretendDevice):
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=CUDA) + torch.ones(3)
    assert len(device.problems) == 1


@pytest.mark.parametrize(
    ("kind", "wait"),
    [
        ("item", lambda t: t.sum().item()),
        ("tolist", lambda t: t.tolist()),
        ("copy to the host", lambda t: t.cpu()),
        ("copy from pageable memory", lambda t: torch.ones(3).to(CUDA, non_blocking=True)),
        ("boolean index", lambda t: t[t > 0]),
        ("index from pageable memory", lambda t: t[torch.tensor([0, 1])]),
        ("item", lambda t: bool((t > 0).all())),
        ("torch.cuda.synchronize", lambda t: torch.cuda.synchronize()),
    ],
)
def test_waits(device: PretendDevice, kind, wait):
    tensor = torch.ones(3, device=CUDA)
    with device.watch() as waits:
        wait(tensor)
    assert kind in [name for name, _ in waits]


def test_what_does_not_wait(device: PretendDevice):
    tensor = torch.ones(3, device=CUDA)
    with device.watch() as waits:
        pinned = torch.ones(3).pin_memory()
        tensor.copy_(pinned, non_blocking=True)
        tensor[0] = 2.0
        torch.tensor([1, 2], pin_memory=True).to(CUDA, non_blocking=True)
        tensor.index_copy_(0, torch.arange(3, device=CUDA), tensor + 1)
    assert not waits and not device.problems


def test_a_replay_computes_from_what_its_inputs_hold_now(device: PretendDevice):
    held = torch.zeros(2, device=CUDA)
    outputs = []
    graph = capture(lambda: outputs.append(held * 2 + 1))
    held.fill_(3.0)
    graph.replay()
    assert outputs[0].cpu().tolist() == [7, 7] and not device.problems


@pytest.mark.parametrize("wait", [lambda t: t.sum().item(), lambda t: t.cpu(), lambda t: t[t > 0]])
def test_a_wait_in_a_capture_is_a_problem(device: PretendDevice, wait):
    tensor = torch.ones(3, device=CUDA)
    capture(lambda: wait(tensor))
    assert "in a graph capture" in device.problems[0]


def test_memory_freed_after_the_capture_is_a_problem(device: PretendDevice):
    held = [torch.ones(3, device=CUDA)]
    outputs = []
    graph = capture(lambda: outputs.append(held[0] + 1))
    graph.replay()
    assert not device.problems
    held.clear()
    gc.collect()
    with pytest.raises(RuntimeError, match="freed since"):
        graph.replay()
    assert device.problems


def test_a_pool_whose_graphs_are_gone_is_a_problem(device: PretendDevice):
    tensor = torch.ones(3, device=CUDA)
    first = capture(lambda: tensor + 1)
    second = capture(lambda: tensor + 2, first.pool())
    pool = first.pool()
    del first, second
    gc.collect()
    capture(lambda: tensor + 3, pool)
    assert "memory pool" in device.problems[0]


@torch.library.custom_op("v2l_fast::test_transposed", mutates_args=())
def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


@transposed.register_fake
def _(x):
    return torch.empty_like(x)


def test_an_output_unlike_its_fake_is_a_problem(device: PretendDevice):
    transposed(torch.ones(2, 3, device=CUDA))
    assert "its fake" in device.problems[0]


INDICES = [
    [2, 0, 1],
    [-1],
    [],
    range(2),
    [True, False, True],
    (slice(None), [1, 0]),
    (..., [0, 3]),
    (None, [1, 2]),
    (1, [2, 3]),
    ([0, 2], [1, 3]),
    ([[0, 1], [2, 0]],),
    ([True, False, True], 1),
    np.array([2, 0]),
    (slice(None), np.array([2, 0])),
    np.array([True, False, True]),
    torch.tensor([2, 0]),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_selects_and_writes_what_it_does_on_a_cpu(device: PretendDevice, index):
    expected = torch.arange(12.0).view(3, 4)
    values = expected.to(CUDA)
    with device.watch() as waits:
        selected = values[index]
    assert selected.device == CUDA and torch.equal(selected.cpu(), expected[index])
    # A copy of the index, which on a real device the host waits for.
    assert any("pageable memory" in kind for kind, _ in waits)
    values[index] = -1.0
    expected[index] = -1.0
    assert torch.equal(values.cpu(), expected)
    values[index] = values[index] * 2 + 1
    expected[index] = expected[index] * 2 + 1
    assert torch.equal(values.cpu(), expected)
    weight = torch.nn.Parameter(values)
    weight[index].sum().backward()
    counts = torch.zeros(3, 4).requires_grad_()
    counts[index].sum().backward()
    assert torch.equal(weight.grad.cpu(), counts.grad)
    assert not device.problems


VALUES = [
    3,
    True,
    [1, 2],
    [[1.0, 2.0], [3.0, 4.0]],
    (True, False),
    np.arange(4.0),
    [np.float32(1), np.float32(2)],
    [np.arange(2), np.arange(2)],
    [torch.tensor(1.5), 2],
    torch.arange(3),
]


@pytest.mark.filterwarnings("ignore:To copy construct", "ignore:Creating a tensor from a list")
@pytest.mark.parametrize("data", VALUES, ids=str)
def test_a_tensor_of_python_values_holds_them(device: PretendDevice, data):
    def makers(like: torch.Tensor):
        options = {"device": like.device}
        yield lambda values: torch.tensor(values, **options)
        yield lambda values: torch.tensor(values, dtype=torch.bfloat16, **options)
        yield lambda values: torch.as_tensor(values, **options)
        yield lambda values: torch.asarray(values, **options)
        yield like.new_tensor
        yield lambda values: like.new_tensor(values, dtype=torch.float64)

    here, there = torch.ones(1), torch.ones(1, device=CUDA)
    for expect, make in zip(makers(here), makers(there), strict=True):
        expected, made = expect(data), make(data)
        assert made.device == CUDA and made.dtype == expected.dtype
        assert torch.equal(made.cpu(), expected)
    assert not device.problems


@pytest.mark.parametrize("maker", ["tensor", "as_tensor"])
def test_a_list_of_device_tensors_is_read_by_the_host(device: PretendDevice, maker):
    number = torch.arange(3, device=CUDA)[2]
    with device.watch() as waits:
        made = getattr(torch, maker)([[number, 1], [0, number]])
    assert made.tolist() == [[2, 1], [0, 2]] and made.device.type == "cpu"
    assert [kind for kind, _ in waits] == ["copy to the host"] * 2
