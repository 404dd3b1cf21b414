"""What of prompt_attention only a GPU can show: capture into a CUDA graph, and tensors on a second device.

These tests have never run. Values, gradients and repeated bits are tested on a GPU, where there is one, by
tests/ops/test_prompt_attention.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_fast import prompt_attention

pytestmark = pytest.mark.gpu


def make_inputs(seed: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3, 197, 64)] * 3 + [(3, 20, 64)] * 2
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [tensor.to(device, torch.bfloat16).requires_grad_() for tensor in tensors]


def value_and_gradients(inputs: list[Tensor]) -> list[Tensor]:
    out = prompt_attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, out.detach())]


def test_a_graph_replays_forward_and_backward() -> None:
    fixed, others = make_inputs(0, "cuda"), make_inputs(1, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        value_and_gradients(fixed)  # compiles the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(fixed)
    with torch.no_grad():
        for mine, theirs in zip(fixed, others, strict=True):
            mine.copy_(theirs)
    graph.replay()
    for found, expected in zip(captured, value_and_gradients(others), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_a_device_that_is_not_current() -> None:
    with torch.cuda.device(0):
        found = value_and_gradients(make_inputs(2, "cuda:1"))
    expected = value_and_gradients(make_inputs(2, "cuda:0"))
    for first, second in zip(found, expected, strict=True):
        assert first.device == torch.device("cuda", 1)
        # Two models of GPU may differ in the last bits.
        torch.testing.assert_close(first.cpu(), second.cpu(), atol=2e-2, rtol=2e-2)
