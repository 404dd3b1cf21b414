"""`benchmarks.timing`: how sides take turns, and what it would ask of a GPU, with a stand-in for one."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "timing.py"


@pytest.fixture(scope="module")
def timing() -> Iterator[ModuleType]:
    # By its path: the folder is not installed with the package.
    spec = importlib.util.spec_from_file_location("benchmarks_timing", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_sides_take_turns_and_warm_up_is_not_counted(timing: ModuleType) -> None:
    calls: list[str] = []
    sides = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timed = timing.alternate(sides, 5, warmup=2)
    rounds = [calls[i : i + 3] for i in range(0, 21, 3)]
    assert all(sorted(each) == list("abc") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1, "the order changes"
    assert {name: len(seconds.device) for name, seconds in timed.items()} == dict.fromkeys("abc", 5)
    assert timed["a"].device == timed["a"].host


class FakeCuda:
    """Events that count the launches of a stream."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        log = self.log

        class Event:
            def record(self) -> None:
                log.append("record")

            def synchronize(self) -> None:
                log.append("wait")

            def elapsed_time(self, end: Any) -> float:
                return 250.0

        return Event()


@pytest.mark.parametrize("ahead", [False, True])
def test_gpu_is_timed_by_events_around_the_call(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: fake.log.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: fake.log.append("sleep"))
    timed = timing.alternate(
        {"side": lambda: fake.log.append("run")}, 1, device="cuda", warmup=0, launched_ahead=ahead
    )
    assert fake.log == ["idle", *(["sleep"] if ahead else []), "record", "run", "record", "wait"]
    assert timed["side"].device == [0.25]
    assert 0 <= timed["side"].host_median < 0.25


def test_rotating_inputs_do_not_fit_the_cache(timing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 8, 4)[:, 1:].requires_grad_()
    assert timing.Rotating([x])()[0] is x, "a CPU gets one copy"
    monkeypatch.setattr(timing, "_CACHE_BYTES", 4 * x.untyped_storage().nbytes())
    monkeypatch.setattr(timing, "_on_host", lambda _: False)
    rotating = timing.Rotating([x])
    found = [rotating()[0] for _ in range(12)]
    places = Counter(tensor.data_ptr() for tensor in found)
    assert sorted(places.values()) == [3, 3, 3, 3]
    for copy in found:
        assert torch.equal(copy, x)
        assert (copy.stride(), copy.storage_offset()) == (x.stride(), x.storage_offset())
        assert copy.is_leaf
        assert copy.requires_grad
