"""The pretend device finds what it is for."""

from __future__ import annotations

import gc

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
