"""`spt-fast doctor --check`: all is right here, and whatever is not shows."""

from __future__ import annotations

import pytest
import torch

from spt_fast.commands import main as cli
from spt_fast.commands import self_check
from spt_fast.commands.doctor import WRONG
from spt_fast.ops import accuracy, kmeans, nmi, prompt_attention
from spt_fast.ops.cases import Outcome, check_case

CPU = torch.device("cpu")
CPU_OPS = {
    "assign_accumulate": 6 * 3,
    "squared_distances": 3,
    "Lloyd's algorithm": 3,
    "prompt_attention": 5 * 3,
    "packed_prompt_attention": 3,
    "sigmoid_nmi": 2 * 3,
}


def checked(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, list[str]]]:
    """Exit code, and the lines of the CPU by the operation they begin with."""
    code = cli.main(["doctor", "--check"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " cpu " in line]
    return code, {op: [line for line in lines if line.startswith((f"{op},", f"{op} "))] for op in CPU_OPS}


def test_every_operation_is_right_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = checked(capsys)
    assert code == 0
    assert {op: len(found) for op, found in lines.items()} == CPU_OPS
    for found in lines.values():
        assert all(line.endswith("  ok") for line in found)
        for dtype in ("float32", "float16", "bfloat16"):
            assert any(f" {dtype} " in line for line in found)


def test_summary_says_what_was_not_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(self_check, "all_cases", lambda _: [])
    assert self_check.report()
    assert capsys.readouterr().out.splitlines()[-1].startswith("no CUDA device is available")


# By the operation whose lines then have to say WRONG: the calls to break, each of them broken once.
BREAKS = [
    {
        "assign_accumulate": (kmeans, "assign_accumulate"),
        "packed_prompt_attention": (prompt_attention, "packed_prompt_attention"),
        "sigmoid_nmi": (nmi, "sigmoid_nmi"),
    },
    {
        "squared_distances": (kmeans, "squared_distances"),
        "Lloyd's algorithm": (self_check, "lloyd"),
    },
]


@pytest.mark.parametrize("broken", BREAKS, ids=", ".join)
def test_an_operation_that_raises_is_reported_and_the_others_still_run(
    broken: dict[str, tuple[object, str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access\nwas encountered")

    for module, name in broken.values():
        monkeypatch.setattr(module, name, fail)
    code, lines = checked(capsys)
    assert code == WRONG
    assert {op: len(found) for op, found in lines.items()} == CPU_OPS
    for op, found in lines.items():
        end = "WRONG: RuntimeError: an illegal memory access was encountered" if op in broken else "  ok"
        assert all(line.endswith(end) for line in found)


def outcomes(op: str, *dtypes: torch.dtype) -> list[Outcome]:
    """What the check of one operation finds on the CPU."""
    cases = [case for case in self_check.all_cases(CPU) if case.op.startswith(op)]
    assert cases
    return [check_case(case, CPU, dtype) for case in cases for dtype in dtypes]


def test_a_wrong_label_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kmeans.assign_accumulate

    def wrong(*args: object, **options: object) -> kmeans.PassResult:
        found = right(*args, **options)
        if options.get("with_labels"):
            found.labels[0, -1] = (found.labels[0, -1] + 1) % found.counts.shape[1]
        return found

    monkeypatch.setattr(kmeans, "assign_accumulate", wrong)
    for outcome in outcomes("assign_accumulate", *self_check.DTYPES):
        assert "WRONG: beyond the bound: labels, distances, counts" in self_check.line(outcome)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda values: values * (1 + 1e-3), "WRONG: beyond the bound: nmi"),
        (lambda values: values * float("nan"), "WRONG: beyond the bound: nmi"),
        (lambda values: values[:1], "WRONG: ValueError: the result has shape (1,), not (2,)"),
        (lambda values: values * (1 + 1e-6 * torch.rand(())), "WRONG: a second run gave other bits"),
    ],
    ids=["off", "nan", "shape", "bits"],
)
def test_a_wrong_value_shows(change, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = nmi.sigmoid_nmi
    monkeypatch.setattr(nmi, "sigmoid_nmi", lambda *inputs: change(right(*inputs)))
    (outcome,) = outcomes("sigmoid_nmi, 20 prompts", torch.float32)
    assert not outcome.ok
    assert verdict in self_check.line(outcome)


def test_a_gradient_that_is_wrong_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = accuracy.value_and_gradients

    def wrong(attention, inputs, scale):
        out, *gradients = right(attention, inputs, scale)
        if attention is prompt_attention.prompt_attention:
            gradients[3] = gradients[3] * 1.1
        return [out, *gradients]

    monkeypatch.setattr(accuracy, "value_and_gradients", wrong)
    for outcome in outcomes("prompt_attention, 7 prompts", *self_check.DTYPES):
        assert self_check.line(outcome).endswith("WRONG: beyond the bound: dprompt_k")


def test_a_fallback_on_a_gpu_is_named() -> None:
    outcome = Outcome("op", "cuda:0", "float32", "reference", "built without CUDA", {}, "")
    assert outcome.ok
    assert self_check.line(outcome).endswith("ok, but it is a fallback: built without CUDA")


def test_problems_that_only_a_gpu_checks_are_right_here() -> None:
    """They would take longer than all others; the float32 ones stand for them."""
    on_cpu = {case.op for case in self_check.all_cases(CPU)}
    more = [case for case in self_check.all_cases(torch.device("cuda", 0)) if case.op not in on_cpu]
    assert len(more) == 2
    for case in more:
        assert check_case(case, CPU, torch.float32).ok


def test_reference_of_lloyd_refuses_ties() -> None:
    tokens = torch.zeros(4, 3)
    with pytest.raises(ArithmeticError, match="two centres tie"):
        accuracy.lloyd_reference(tokens, torch.ones(2, 3), 1)
