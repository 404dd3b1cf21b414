"""Whether a kernel may serve on this GPU: it is checked once against PyTorch, and the verdict is kept.

Limits: the check runs in a process of its own. After a kernel has used a wrong address, every later call of
its process to that GPU fails; a kernel that hangs takes its process with it; and neither shows beforehand.
The price is the start of that process: seconds, once for each kernel, dtype, GPU model, driver and build.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spt_fast.support.cache import cache_folder, read_cached, write_cached
from spt_fast.support.errors import one_line
from spt_fast.support.versions import version_facts

VARIABLE = "SPT_FAST_VERIFY"  # "0": no check, every kernel is trusted
_PACKAGE = Path(__file__).resolve().parents[1]
# Seconds. Long enough for imports from a slow disk, and for Triton to compile on a busy machine.
START_TIMEOUT, KERNEL_TIMEOUT = 300.0, 300.0
_POLL = 0.05
# What ends a process from outside: the system where memory is short, or a scheduler.
_SENT_BY_OTHERS = {"SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGXCPU"}
# Without the package's own `__init__`, whose imports take longer than torch's.
_CHILD = """
import json, sys, types
request = json.loads(sys.argv[1])
sys.path[:] = request["path"]
package = types.ModuleType("spt_fast")
package.__path__ = [request["package"]]
sys.modules["spt_fast"] = package
from spt_fast.ops.trust import check_for_parent
check_for_parent(request)
"""


class Kernel(NamedTuple):
    """What is trusted or refused as one.

    `proof` is "MODULE:FUNCTION"; the function takes a device and a dtype, runs the kernel, and returns what
    is wrong, or "". It raises `UndecidedError` where that does not depend on the kernel.
    """

    name: str
    proof: str
    files: tuple[str, ...]  # patterns, in the package, of the files that the kernel is made of


class Gpu(NamedTuple):
    """What a verdict depends on beside the kernel, its dtype and its build."""

    name: str
    capability: str
    driver: str


class Verdict(NamedTuple):
    """What is kept of a check."""

    kernel: str
    dtype: str
    gpu: Gpu
    build: str
    reason: str  # why the kernel is refused; "" where it is trusted


class UndecidedError(Exception):
    """A check could not be made, for a reason that is not the kernel's."""


# By kernel, dtype and device: why the kernel may not serve, or "". Two threads may check the same kernel at
# once, which costs time only: a lock that is held during a check would hang in a process forked meanwhile.
_reasons: dict[tuple[str, torch.dtype, torch.device], str] = {}
_checks: str = "all"  # or "kept", or "none"


def why_not(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str:
    """Why `kernel` may not serve tensors of `dtype` on `device`; "" if it may.

    The first call with a kernel, a dtype and a device looks for a kept verdict, and has the kernel checked if
    there is none. While a CUDA graph is captured nothing is checked, and an unchecked kernel may not serve.
    """
    if _checks == "none":
        return ""
    reason = _reasons.get((kernel.name, dtype, device))
    return _first_answer(kernel, device, dtype) if reason is None else reason


def _first_answer(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str:
    """`why_not` where this process has no answer yet."""
    if device.type == "cuda" and device.index is None:
        current = torch.device("cuda", torch.cuda.current_device())  # type: ignore[unreachable]
        return why_not(kernel, current, dtype)
    if os.environ.get(VARIABLE) == "0":
        reason = ""
    elif (kept := kept_verdict(kernel, device, dtype)) is not None:
        reason = _explain(kept)
    elif _checks == "kept":
        return ""
    elif _capturing():
        return "its kernel was not checked before a CUDA graph is captured; run the operation once before"
    else:
        reason = _check(kernel, device, dtype)
    # Threads that checked the same kernel go on with one answer.
    return _reasons.setdefault((kernel.name, dtype, device), reason)


@contextmanager
def kept_verdicts_only() -> Iterator[None]:
    """While this is open no kernel is checked anew, and those without a verdict are trusted."""
    with _checking("kept"):
        yield


@contextmanager
def every_kernel_trusted() -> Iterator[None]:
    """While this is open kernels serve whatever their verdict says, so that they can be examined."""
    with _checking("none"):
        yield


@contextmanager
def _checking(which: str) -> Iterator[None]:
    global _checks
    before, _checks = _checks, which
    try:
        yield
    finally:
        _checks = before


def describe(device: torch.device) -> Gpu:
    """The GPU model and the driver of a CUDA device; a stand-in for the CPU, which the tests use."""
    if device.type != "cuda":
        return Gpu(device.type, "", "")
    facts = torch.cuda.get_device_properties(device)
    return Gpu(str(facts.name), f"{facts.major}.{facts.minor}", _driver())


@cache
def _driver() -> str:
    """The driver's own version where Linux tells it, else the version of CUDA that it serves."""
    text = read_cached(Path("/sys/module/nvidia/version"))
    return text.strip() if text else f"CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


@cache
def build_of(kernel: Kernel) -> str:
    """Versions and a hash of the kernel's files."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in kernel.files for path in _PACKAGE.glob(pattern)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    facts = version_facts("spt_fast", "triton") | {"torch_version": torch.__version__}
    return ", ".join([*(f"{name} {value}" for name, value in sorted(facts.items())), digest.hexdigest()[:16]])


def verdict_folder() -> Path:
    """Where verdicts are kept, one file for each; any of them may be deleted.

    Raises:
        OSError: there is no home folder.
    """
    return cache_folder() / "kernels"


def kept_verdict(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> Verdict | None:
    """The verdict of an earlier check; None where there is none that can be read."""
    wanted = Verdict(kernel.name, _name(dtype), describe(device), build_of(kernel), "")
    with suppress(OSError):
        found = _parse(read_cached(_path(wanted)))
        if found is not None and found._replace(reason="") == wanted:
            return found
    return None


def kept_verdicts() -> list[Verdict]:
    """All verdicts in the cache folder, also those of other GPUs, drivers and builds."""
    try:
        paths = sorted(verdict_folder().glob("*.json"))
    except OSError:
        return []
    found = (_parse(read_cached(path)) for path in paths)
    return [verdict for verdict in found if verdict is not None]


def _keep(verdict: Verdict) -> None:
    """Write a verdict down; warn where that is impossible."""
    try:
        write_cached(
            _path(verdict), json.dumps({**verdict._asdict(), "gpu": verdict.gpu._asdict()}, indent=1)
        )
    except OSError as error:
        warnings.warn(
            f"the verdict on {verdict.kernel} cannot be kept, so that every process checks it anew: {error}; "
            "set XDG_CACHE_HOME to a folder that can be written to",
            stacklevel=6,
        )


def _path(verdict: Verdict) -> Path:
    key = hashlib.sha256(json.dumps(verdict[:-1]).encode()).hexdigest()[:16]
    return verdict_folder() / f"{verdict.kernel}-{verdict.dtype}-{key}.json"


def _parse(text: str | None) -> Verdict | None:
    """A verdict from its file's text; None where it is damaged."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        fields = json.loads(text or "")
        verdict = Verdict(**{**fields, "gpu": Gpu(**fields["gpu"])})
        if all(isinstance(value, str) for value in (*verdict[:2], *verdict.gpu, *verdict[3:])):
            return verdict
    return None


def _explain(verdict: Verdict) -> str:
    if not verdict.reason:
        return ""
    return f"its kernel failed the check in {verdict.dtype} on {verdict.gpu.name}: {verdict.reason}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _capturing() -> bool:
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(initialized) and torch.cuda.is_current_stream_capturing()


def _check(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str:
    """Have the kernel checked by another process, keep the verdict; why it may not serve, or ""."""
    gpu = describe(device)
    try:
        reason = check_apart(kernel, device, gpu, dtype)
    except (UndecidedError, OSError) as error:
        return (
            f"its kernel could not be checked in {_name(dtype)} on {gpu.name}: {one_line(error)}; "
            f"{VARIABLE}=0 uses it unchecked"
        )
    verdict = Verdict(kernel.name, _name(dtype), gpu, build_of(kernel), reason)
    _keep(verdict)
    return _explain(verdict)


def check_apart(kernel: Kernel, device: torch.device, gpu: Gpu, dtype: torch.dtype) -> str:
    """What another process finds wrong with the kernel, or ""; it may crash or hang there.

    Raises:
        UndecidedError: it did not get to the kernel, or was ended from outside.
        OSError: it cannot be started.
    """
    if getattr(sys, "frozen", False) or not sys.executable:
        raise UndecidedError("there is no Python interpreter to start")
    with tempfile.TemporaryDirectory() as folder:
        report, errors = Path(folder, "report"), Path(folder, "errors")
        request = {
            "path": [str(entry) for entry in sys.path],
            "package": str(_PACKAGE),
            "proof": kernel.proof,
            "device": str(device),
            "gpu": gpu,
            "dtype": _name(dtype),
            "report": str(report),
        }
        code = _run([sys.executable, "-c", _CHILD, json.dumps(request)], report, errors)
        lines = (read_cached(report) or "").splitlines()
        if len(lines) == 2:
            try:
                result: dict[str, str] = json.loads(lines[1])
            except ValueError as error:
                raise UndecidedError(f"its report is damaged: {one_line(error)}") from error
            if "undecided" in result:
                raise UndecidedError(result["undecided"])
            return result["wrong"]
        if code is None:
            how = f"did not end within {KERNEL_TIMEOUT if lines else START_TIMEOUT:.0f} s"
        else:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        last = (read_cached(errors) or "").strip().splitlines()[-1:]
        how = ": ".join([how, *last])
        if not lines or (code is not None and code < 0 and signal.Signals(-code).name in _SENT_BY_OTHERS):
            raise UndecidedError(f"the process that checks it {how}")
        return f"the process that ran it {how}"


def _run(command: list[str], report: Path, errors: Path) -> int | None:
    """Run a command that reports when it gets to the kernel; its exit code, None where its time was up."""
    with errors.open("wb") as file:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            env={**os.environ, VARIABLE: "0"},
            start_new_session=True,
        )
    began, limit, in_kernel = time.monotonic(), START_TIMEOUT, False
    try:
        while time.monotonic() - began < limit:
            with suppress(subprocess.TimeoutExpired):
                return child.wait(_POLL)
            if not in_kernel and read_cached(report):
                began, limit, in_kernel = time.monotonic(), KERNEL_TIMEOUT, True
        return None
    finally:
        if child.poll() is None:
            _kill(child)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started; one that a driver holds is not waited for."""
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    with suppress(subprocess.TimeoutExpired):
        child.wait(5)


def check_for_parent(request: dict[str, Any]) -> None:
    """Run a check in the process started for it; report in two lines that it begins, and its result."""
    device = torch.device(request["device"])
    module, _, function = request["proof"].partition(":")
    proof = getattr(import_module(module), function)
    with open(request["report"], "w", encoding="utf-8", buffering=1) as report:
        # As where the process has changed CUDA_VISIBLE_DEVICES after it had started CUDA.
        if describe(device)[:2] != Gpu(*request["gpu"])[:2]:
            raise SystemExit(f"{device} is another GPU there, {describe(device).name}")
        # What fails here is not the kernel's fault.
        torch.zeros(1, device=device).add_(1).item()
        report.write("begins\n")
        try:
            result = {"wrong": proof(device, getattr(torch, request["dtype"]))}
        except UndecidedError as error:
            result = {"undecided": one_line(error)}
        except Exception as error:  # whatever it is, it is the verdict
            result = {"wrong": f"{type(error).__name__}: {one_line(error)}"}
        report.write(json.dumps(result))
        report.flush()
        # Not the farewell of CUDA, which a kernel may have spoiled.
        os._exit(0)
