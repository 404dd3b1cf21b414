"""Kernels are checked once, in another process, before they serve: planted faults, and what is kept of them.

The CPU stands in for a GPU, and functions of a module made here for proofs. Starting a process takes seconds:
tests that do not need one check in their own.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spt_fast.commands import main as cli
from spt_fast.ops import cases, kmeans, nmi, prompt_attention, triton_support, trust
from spt_fast.ops.prompt_attention_cpu import (
    attend_plainly,
    differentiate_plainly,
    prompt_attention_backward,
    prompt_attention_forward,
)
from spt_fast.ops.prompt_attention_shapes import empty_gradients, empty_output

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)

# Each proof leaves a line in the file `runs`, so that the tests see how often a kernel was checked.
PLANTED = """
import os, signal, sys, time
from pathlib import Path

def _ran(device, dtype):
    with open(Path(__file__).with_name("runs"), "a") as file:
        file.write(f"{device} {dtype}\\n")

def right(*args):
    _ran(*args)
    return ""

def wrong(*args):
    _ran(*args)
    return "sums: beyond the bound: sums"

def raises(*args):
    _ran(*args)
    raise RuntimeError("CUDA error: an illegal memory access\\nwas encountered")

def crashes(*args):
    _ran(*args)
    print("Fatal: out of luck", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

def is_killed(*args):
    _ran(*args)
    os.kill(os.getpid(), signal.SIGKILL)

def hangs(*args):
    _ran(*args)
    time.sleep(600)

def undecided(*args):
    from spt_fast.ops.trust import UndecidedError
    _ran(*args)
    raise UndecidedError("no memory is left")
"""


Plant = Callable[[str], trust.Kernel]


@pytest.fixture
def planted_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Factory of kernels whose proof is one of the functions above; with an empty cache, and checks on."""
    folder = tmp_path / "planted"
    folder.mkdir()
    (folder / "planted_proofs.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    forget(monkeypatch)
    return lambda proof: trust.Kernel("planted", f"planted_proofs:{proof}", ("ops/trust.py",))


@pytest.fixture
def planted(planted_apart: Plant, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """The same, checked in this process."""

    # Loaded anew: each test has a file of its own.
    sys.modules.pop("planted_proofs", None)
    proofs = importlib.import_module("planted_proofs")

    def check_here(kernel: trust.Kernel, device: torch.device, _: trust.Gpu, dtype: torch.dtype) -> str:
        return getattr(proofs, kernel.proof.partition(":")[2])(device, dtype)

    monkeypatch.setattr(trust, "check_apart", check_here)
    return planted_apart


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process knows, as a new process would not know it."""
    monkeypatch.setattr(trust, "_reasons", {})
    trust.build_of.cache_clear()


def runs(tmp_path: Path) -> int:
    """How often a planted proof was run."""
    path = tmp_path / "planted" / "runs"
    return len(path.read_text().splitlines()) if path.exists() else 0


def verdict_files() -> list[Path]:
    return sorted(trust.verdict_folder().glob("*"))


def test_a_kernel_that_is_right_is_checked_once_for_each_dtype(planted, tmp_path, monkeypatch) -> None:
    kernel = planted("right")
    for _ in range(3):
        assert trust.why_not(kernel, CPU, torch.float32) == ""
    assert trust.why_not(kernel, CPU, torch.float16) == ""
    assert (tmp_path / "planted" / "runs").read_text() == "cpu torch.float32\ncpu torch.float16\n"
    forget(monkeypatch)
    assert trust.why_not(kernel, CPU, torch.float32) == ""
    assert runs(tmp_path) == 2
    assert [path.suffix for path in verdict_files()] == [".json"] * 2  # and no temporary files


@pytest.mark.parametrize(
    ("proof", "reason"),
    [
        ("raises", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("crashes", "the process that ran it was ended by signal 11: Fatal: out of luck"),
        ("hangs", "the process that ran it did not end within 1 s"),
    ],
)
def test_whatever_a_kernel_does_to_its_process_it_is_refused(
    planted_apart: Plant, monkeypatch: pytest.MonkeyPatch, proof: str, reason: str
) -> None:
    if proof == "hangs":
        monkeypatch.setattr(trust, "KERNEL_TIMEOUT", 1.0)
    found = trust.why_not(planted_apart(proof), CPU, torch.bfloat16)
    assert found == f"its kernel failed the check in bfloat16 on cpu: {reason}"


def test_a_kernel_that_hangs_is_given_up_where_starting_may_take_as_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As by default: which of the two times runs is not told by how long they are."""
    assert trust.START_TIMEOUT == trust.KERNEL_TIMEOUT
    for name in ("START_TIMEOUT", "KERNEL_TIMEOUT"):
        monkeypatch.setattr(trust, name, 3.0)
    report = tmp_path / "report"
    hangs = f"import time; open({str(report)!r}, 'w').write('begins'); time.sleep(60)"
    began = time.monotonic()
    assert trust._run([sys.executable, "-S", "-c", hangs], report, tmp_path / "errors") is None
    assert report.read_text() == "begins"
    assert time.monotonic() - began < 50


def test_a_kernel_that_is_right_is_trusted_by_another_process(planted_apart: Plant, tmp_path: Path) -> None:
    assert trust.why_not(planted_apart("right"), CPU, torch.float16) == ""
    assert (tmp_path / "planted" / "runs").read_text() == "cpu torch.float16\n"


def test_a_kernel_that_is_wrong_is_refused_from_then_on(planted, tmp_path, monkeypatch) -> None:
    kernel = planted("wrong")
    for _ in range(2):
        found = trust.why_not(kernel, CPU, torch.bfloat16)
        assert found == "its kernel failed the check in bfloat16 on cpu: sums: beyond the bound: sums"
        forget(monkeypatch)
    assert runs(tmp_path) == 1
    (verdict,) = trust.kept_verdicts()
    assert (verdict.kernel, verdict.dtype) == ("planted", "bfloat16")
    assert verdict.reason == "sums: beyond the bound: sums"


def test_what_is_not_the_kernels_fault_is_not_held_against_it(planted, tmp_path, monkeypatch) -> None:
    """It may not serve in this process; the next process checks it again."""
    kernel = planted("undecided")
    for count in (1, 2):
        for _ in range(2):
            found = trust.why_not(kernel, CPU, torch.float32)
            assert found == (
                "its kernel could not be checked in float32 on cpu: no memory is left; "
                "SPT_FAST_VERIFY=0 uses it unchecked"
            )
        assert runs(tmp_path) == count
        forget(monkeypatch)
    assert trust.kept_verdicts() == []


def test_a_check_that_cannot_start_is_not_held_against_the_kernel(
    planted_apart: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = planted_apart("right")._replace(proof="no_such_module:proof")
    found = trust.why_not(broken, CPU, torch.float32)
    assert "the process that checks it ended with exit code 1: ModuleNotFoundError" in found
    forget(monkeypatch)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert "could not be checked" in trust.why_not(planted_apart("right"), CPU, torch.float32)
    assert trust.kept_verdicts() == []


def test_a_check_that_others_end_is_not_held_against_the_kernel(planted_apart: Plant) -> None:
    """As the system does where memory is short."""
    found = trust.why_not(planted_apart("is_killed"), CPU, torch.float32)
    assert "could not be checked in float32 on cpu: the process that checks it was ended by signal 9" in found
    assert trust.kept_verdicts() == []


def test_the_process_that_checks_makes_sure_that_it_has_the_same_gpu(planted_apart, monkeypatch) -> None:
    monkeypatch.setattr(trust, "describe", lambda _: trust.Gpu("another", "9.0", "1"))
    found = trust.why_not(planted_apart("right"), CPU, torch.float32)
    assert "could not be checked in float32 on another" in found
    assert "cpu is another GPU there" in found


def test_another_driver_and_another_build_are_checked_anew(planted, tmp_path, monkeypatch) -> None:
    kernel = planted("right")
    trust.why_not(kernel, CPU, torch.float32)
    forget(monkeypatch)
    monkeypatch.setattr(trust, "describe", lambda _: trust.Gpu("cpu", "", "580.1"))
    trust.why_not(kernel, CPU, torch.float32)
    assert runs(tmp_path) == 2
    forget(monkeypatch)
    other = kernel._replace(files=("ops/cases.py",))
    trust.why_not(other, CPU, torch.float32)
    assert runs(tmp_path) == 3
    assert len(trust.kept_verdicts()) == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"kernel": "planted"}', "null", "\udcff"])
def test_a_damaged_verdict_is_made_again(planted, tmp_path, monkeypatch, damage) -> None:
    kernel = planted("wrong")
    before = trust.why_not(kernel, CPU, torch.float32)
    (path,) = verdict_files()
    whole = path.read_bytes()
    path.write_bytes(damage.encode(errors="surrogateescape"))
    forget(monkeypatch)
    assert trust.kept_verdicts() == []
    assert trust.why_not(kernel, CPU, torch.float32) == before
    assert runs(tmp_path) == 2
    assert path.read_bytes() == whole


def test_the_verdict_of_another_kernel_is_not_taken(planted, tmp_path, monkeypatch) -> None:
    kernel = planted("right")
    trust.why_not(kernel, CPU, torch.float32)
    (path,) = verdict_files()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kernel": "other"}))
    forget(monkeypatch)
    trust.why_not(kernel, CPU, torch.float32)
    assert runs(tmp_path) == 2


def test_without_a_folder_to_write_to_each_process_checks_with_a_warning(
    planted, tmp_path, monkeypatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kernel = planted("right")
    for count in (1, 2):
        with pytest.warns(UserWarning, match="verdict on planted cannot be kept.*set XDG_CACHE_HOME"):
            assert trust.why_not(kernel, CPU, torch.float32) == ""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert trust.why_not(kernel, CPU, torch.float32) == ""
        assert runs(tmp_path) == count
        forget(monkeypatch)


def test_checks_can_be_turned_off(planted, tmp_path, monkeypatch) -> None:
    kernel = planted("wrong")
    monkeypatch.setenv(trust.VARIABLE, "0")
    assert trust.why_not(kernel, CPU, torch.float32) == ""
    assert runs(tmp_path) == 0
    forget(monkeypatch)
    monkeypatch.setenv(trust.VARIABLE, "1")
    assert trust.why_not(kernel, CPU, torch.float32)
    # `doctor --check` looks at refused kernels all the same, and `doctor` at kept verdicts only.
    with trust.every_kernel_trusted():
        assert trust.why_not(kernel, CPU, torch.float32) == ""
    with trust.kept_verdicts_only():
        assert trust.why_not(kernel, CPU, torch.float32)
        assert trust.why_not(kernel, CPU, torch.float16) == ""
    assert runs(tmp_path) == 1


def test_threads_that_ask_at_once_get_one_answer(planted) -> None:
    kernel, found = planted("wrong"), []
    threads = [
        threading.Thread(target=lambda: found.append(trust.why_not(kernel, CPU, torch.float32)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(set(found)) == 1


def test_processes_that_ask_at_once_agree_and_leave_one_whole_file(planted, tmp_path) -> None:
    kernel = planted("wrong")
    forks = multiprocessing.get_context("fork")
    barrier, answers = forks.Barrier(4), forks.SimpleQueue()

    def ask() -> None:
        barrier.wait(60)
        answers.put(trust.why_not(kernel, CPU, torch.float32))

    started = [forks.Process(target=ask) for _ in range(4)]
    for process in started:
        process.start()
    found = {answers.get() for _ in started}
    for process in started:
        process.join()
    assert found == {"its kernel failed the check in float32 on cpu: sums: beyond the bound: sums"}
    assert len(verdict_files()) == 1
    assert len(trust.kept_verdicts()) == 1
    checks = runs(tmp_path)
    assert trust.why_not(kernel, CPU, torch.float32) in found
    assert runs(tmp_path) == checks


def test_doctor_shows_the_verdicts(planted, capsys) -> None:
    cli.main(["doctor"])
    assert "none: no kernel for CUDA was checked yet" in capsys.readouterr().out
    trust.why_not(planted("wrong"), CPU, torch.float32)
    cli.main(["doctor"])
    printed = capsys.readouterr().out
    assert str(trust.verdict_folder()) in printed
    assert "planted, float32" in printed
    assert "refused: sums: beyond the bound: sums (cpu" in printed


OPS = {
    "k-means": (kmeans.KERNEL, lambda: kmeans.explain_backend(GPU, torch.float16), "reference"),
    "prompt_attention": (
        prompt_attention.KERNEL,
        lambda: prompt_attention.explain_backend(GPU, torch.float16, 64),
        "joined",
    ),
    "sigmoid_nmi": (nmi.KERNEL, lambda: nmi.explain_backend(GPU, torch.float16), "portable"),
}


@pytest.fixture
def on_a_gpu(planted, monkeypatch) -> pytest.MonkeyPatch:
    """Every kernel could serve a GPU that is not there; a check of one would fail the test."""
    monkeypatch.setattr(kmeans.kmeans_native, "why_not", lambda _: "")
    monkeypatch.setattr(triton_support, "why_not", lambda _: "")
    monkeypatch.setattr(trust, "describe", lambda _: trust.Gpu("card", "9.0", "1"))
    return monkeypatch


@pytest.mark.parametrize("op", OPS)
def test_an_operation_does_without_a_refused_kernel(op, on_a_gpu) -> None:
    kernel, explain, fallback = OPS[op]
    wrong = kernel._replace(proof="planted_proofs:wrong")
    on_a_gpu.setattr(trust, "describe", lambda _: trust.Gpu("cpu", "", ""))
    on_a_gpu.setattr({"k-means": kmeans, "prompt_attention": prompt_attention}.get(op, nmi), "KERNEL", wrong)
    trust.why_not(wrong, CPU, torch.float16)  # the verdict that the stand-in leaves is that of the GPU, too
    name, reason = explain()
    assert name == fallback
    assert "its kernel failed the check in float16 on cpu: sums: beyond the bound" in reason


@pytest.mark.parametrize("op", OPS)
def test_an_operation_uses_a_trusted_kernel(op, on_a_gpu) -> None:
    kernel, explain, _ = OPS[op]
    on_a_gpu.setattr(trust, "describe", lambda _: trust.Gpu("cpu", "", ""))
    trust.why_not(kernel._replace(proof="planted_proofs:right"), CPU, torch.float16)
    assert explain()[0] in ("native", "triton")


def test_nothing_is_checked_while_a_graph_is_captured(on_a_gpu, tmp_path) -> None:
    on_a_gpu.setattr(torch.cuda, "is_initialized", lambda: True)
    on_a_gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    name, reason = nmi.explain_backend(GPU, torch.float16)
    assert name == "portable"
    assert "was not checked before a CUDA graph is captured" in reason
    assert trust.kept_verdicts() == []


def test_nothing_is_checked_while_code_is_compiled(on_a_gpu) -> None:
    on_a_gpu.setattr(torch.compiler, "is_compiling", lambda: True)
    assert prompt_attention.explain_backend(GPU, torch.float16, 64)[0] == "triton"
    assert trust.kept_verdicts() == []


def test_a_refusal_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        nmi, "explain_backend", lambda *_: ("portable", "PyTorch in float64: a planted fault")
    )
    with pytest.warns(UserWarning, match="sigmoid_nmi is computed by PyTorch in float64: a planted fault"):
        nmi.sigmoid_nmi(torch.ones(2, 4), torch.ones(1, 3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nmi.sigmoid_nmi(torch.ones(2, 4), torch.ones(1, 3, 4))


@pytest.mark.parametrize("kernel", [kmeans.KERNEL, prompt_attention.KERNEL, nmi.KERNEL], ids=lambda k: k.name)
def test_every_proof_passes_where_all_is_right_and_names_what_is_not(kernel, monkeypatch) -> None:
    module, _, function = kernel.proof.partition(":")
    prove = getattr(importlib.import_module(module), function)
    assert prove(CPU, torch.float32) == ""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("invalid argument")

    for op in ("assign_accumulate", "squared_distances"):
        monkeypatch.setattr(kmeans, op, fail)
    monkeypatch.setattr(nmi, "sigmoid_nmi", fail)
    monkeypatch.setattr(cases.accuracy, "value_and_gradients", fail)
    assert prove(CPU, torch.float32).endswith(": RuntimeError: invalid argument")


@pytest.mark.parametrize("kernel", [kmeans.KERNEL, prompt_attention.KERNEL, nmi.KERNEL], ids=lambda k: k.name)
def test_the_build_knows_the_files_of_the_kernel(kernel) -> None:
    package = Path(trust.__file__).parents[1]
    for pattern in kernel.files:
        if not pattern.startswith("_kmeans"):
            assert list(package.glob(pattern)), pattern


def test_a_proof_whose_kernel_does_not_run_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = cases.Outcome("op", "cuda:0", "float32", "reference", "built without CUDA", {}, "")
    monkeypatch.setattr(cases, "check_case", lambda *_: outcome)
    with pytest.raises(trust.UndecidedError, match="built without CUDA"):
        cases.prove_kmeans(CPU, torch.float32)
    monkeypatch.setattr(
        cases, "check_case", lambda *_: outcome._replace(fallback="", message="OutOfMemoryError: 2 GiB")
    )
    with pytest.raises(trust.UndecidedError, match="2 GiB"):
        cases.prove_nmi(CPU, torch.float32)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        subprocess.CalledProcessError(1, ["gcc"]),
        PermissionError(13, "Permission denied", "/root/.triton"),
    ],
)
def test_a_proof_that_the_machine_prevents_decides_nothing(monkeypatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(nmi, "sigmoid_nmi", fail)
    with pytest.raises(trust.UndecidedError, match=type(error).__name__):
        cases.prove_nmi(CPU, torch.float32)


@pytest.mark.parametrize("shape", [(2, 3, 7, 9, 8), (1, 1, 5, 1, 16)])
def test_compiled_code_whose_kernel_is_refused_gets_the_same_attention(shape) -> None:
    """Plain formulas, against PyTorch's flash kernel for the CPU in float64."""
    batch, heads, queries, keys, width = shape
    q, k, v, grad = (
        torch.randn(batch, heads, n, width, dtype=torch.float64) for n in (queries, keys, keys, queries)
    )
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=0.3)
    plain = attend_plainly(q, k, v, scale=0.3)
    torch.testing.assert_close(plain, flash)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, scale=0.3)
    exact = torch.autograd.grad(out, leaves, grad)
    ours = differentiate_plainly(grad, q, k, v, *plain, 0.0, False, scale=0.3)
    torch.testing.assert_close(ours, tuple(exact))


@pytest.mark.parametrize(("images", "prompts"), [(True, True), (True, False), (False, True)])
def test_compiled_code_whose_kernel_is_refused_gets_results_of_the_same_shapes(images, prompts) -> None:
    """On a device for which PyTorch's flash kernel for the CPU is no way out."""
    q, k, v = torch.randn(3, 2, 4, 7, 8, device="meta")
    prompt_k, prompt_v = torch.randn(2, 4, 5, 8, device="meta")
    out, lse = prompt_attention_forward(q, k, v, prompt_k, prompt_v, None, 0.3)
    assert [tensor.shape for tensor in (out, lse)] == [tensor.shape for tensor in empty_output(q)]
    found = prompt_attention_backward(
        torch.empty_like(out), q, k, v, prompt_k, prompt_v, out, lse, 0.3, images, prompts
    )
    expected = empty_gradients(q, prompt_k, images, prompts)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [kmeans.KERNEL, prompt_attention.KERNEL, nmi.KERNEL], ids=lambda k: k.name)
def test_kernels_prove_themselves_on_this_gpu(kernel: trust.Kernel, planted_apart: Plant) -> None:
    assert trust.why_not(kernel, GPU, torch.bfloat16) == ""
    (verdict,) = trust.kept_verdicts()
    assert verdict.gpu.name == torch.cuda.get_device_name(GPU)
