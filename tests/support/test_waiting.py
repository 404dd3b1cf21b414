"""Numbers between a device and the host: nothing is lost or reordered on the way."""

from __future__ import annotations

import pytest
import torch

from spt_fast.support.waiting import OnTheWay, first_true, move, send


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_values_go_there_and_back(device: str) -> None:
    values = torch.randn(3, 2, dtype=torch.float64)
    there = send(values, torch.device(device))
    assert there.device.type == device
    assert torch.equal(move(move(values, there.device), values.device, torch.float32), values.float())
    back = OnTheWay(there)
    assert back.read() == values.tolist()
    assert back.has_arrived()


@pytest.mark.parametrize(
    ("mask", "expected"),
    [([0, 0, 0], -1), ([1, 0, 1], 0), ([0, 1, 1], 1), ([[0, 0], [0, 1]], 3), ([0, 0, 1], 2)],
)
def test_the_first_of_several_is_found(mask: list[int], expected: int) -> None:
    found = first_true(torch.tensor(mask, dtype=torch.bool))
    assert (found.dtype, int(found)) == (torch.int64, expected)
