"""`spt-fast doctor`: what is installed here, and which code each operation will run."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from spt_fast.support.versions import installed_version

if TYPE_CHECKING:
    from spt_fast.commands.options import Commands

WRONG = 1  # exit code
_REQUIRED = ("torch", "timm", "safetensors", "numpy", "tqdm", "pyyaml")
_OPTIONAL = {
    "triton": "Linux only",
    "matplotlib": "extra: plots",
    "tensorboard": "extra: train",
    "peft": "extra: peft",
    "faiss-cpu": "extra: faiss",
    "faiss-gpu": "extra: faiss-gpu",
}

Line = tuple[str, str]


def add(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "doctor",
        help="what is installed, which code each operation runs here, and why",
        description="What is installed, which code each operation runs here, and why; "
        "or, with --check, whether the results are right.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run every operation on every device and compare it with float64; exit code 1 if one is wrong",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report or the outcomes of the check; returns the exit code."""
    if args.check:
        from spt_fast.commands import self_check

        return 0 if self_check.report() else WRONG
    print(report())
    return 0


def report() -> str:
    """All facts, one per line, in sections; nothing that is missing makes it fail."""
    sections = {
        "versions": _versions(),
        "machine": _machine(),
        "compiled extension": _extension(),
        "backends": _backends(),
        "kernels checked on GPUs": _verdicts(),
        "engines of PromptedViT": _engines(),
        "shipped backbone": _backbone(),
    }
    return "\n\n".join(_section(title, list(lines)) for title, lines in sections.items())


def _section(title: str, lines: list[Line]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in lines)])


def _versions() -> Iterator[Line]:
    yield "spt_fast", installed_version("spt_fast") or "not installed (run from a checkout)"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    for name in _REQUIRED:
        yield name, installed_version(name) or "MISSING"
    for name, note in _OPTIONAL.items():
        yield name, installed_version(name) or f"not installed ({note})"


def _machine() -> Iterator[Line]:
    import torch

    yield "system", f"{platform.system()} {platform.machine()}"
    yield "cpu", f"{os.cpu_count()} cores; torch uses {torch.get_num_threads()} threads"
    if torch.version.cuda is None:
        yield "cuda", "this torch is built without CUDA"
    elif not torch.cuda.is_available():
        yield "cuda", f"no device available (torch is built for CUDA {torch.version.cuda})"
    else:
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield "cuda", f"{', '.join(names)} (torch is built for CUDA {torch.version.cuda})"


def _extension() -> Iterator[Line]:
    from spt_fast.ops import kmeans_native

    try:
        info = kmeans_native.build_info()
    except RuntimeError as error:
        yield "present", f"no: {error}; k-means falls back to plain PyTorch"
        return
    yield "present", "yes"
    yield "instruction set", f"{info['isa']} (this processor can use: {', '.join(info['isas'])})"
    yield "openmp", "yes" if info["openmp"] else "no: one thread"
    yield "cuda", f"yes, for {info['cuda_archs']}" if info["cuda"] else "no: CPU only"
    yield "compiler", str(info["compiler"])


def _backends() -> Iterator[Line]:
    import torch

    from spt_fast.clustering import faiss_backend
    from spt_fast.commands.self_check import devices
    from spt_fast.ops import kmeans, nmi, prompt_attention
    from spt_fast.ops.trust import kept_verdicts_only

    # A report starts no checks, which take seconds each.
    with kept_verdicts_only():
        for device in devices():
            name, reason = kmeans.explain_backend(device)
            yield f"k-means on {device}", f"{name}: {reason}" if reason else name
        yield "k-means by faiss", faiss_backend.explain()
        for device in devices():
            name, reason = prompt_attention.explain_backend(device, torch.float32, 64)
            yield f"prompt_attention on {device}", f"{name}: {reason}"
            name, reason = nmi.explain_backend(device)
            yield f"sigmoid_nmi on {device}", f"{name}: {reason}"


def _verdicts() -> Iterator[Line]:
    from spt_fast.ops import kmeans, nmi, prompt_attention, trust

    if os.environ.get(trust.VARIABLE) == "0":
        yield "checks", f"off ({trust.VARIABLE}=0): every kernel is used unchecked"
    try:
        yield "kept in", str(trust.verdict_folder())
    except OSError as error:
        yield "kept in", f"nowhere: {error}"
    verdicts = trust.kept_verdicts()
    builds = {
        kernel.name: trust.build_of(kernel) for kernel in (kmeans.KERNEL, prompt_attention.KERNEL, nmi.KERNEL)
    }
    for verdict in verdicts:
        judgement = f"refused: {verdict.reason}" if verdict.reason else "trusted"
        age = "" if builds.get(verdict.kernel) == verdict.build else "; of another build"
        yield (
            f"{verdict.kernel}, {verdict.dtype}",
            f"{judgement} ({verdict.gpu.name}, driver {verdict.gpu.driver}{age})",
        )
    if not verdicts:
        yield "verdicts", "none: no kernel for CUDA was checked yet"


def _engines() -> Iterator[Line]:
    from spt_fast.prompting.engines import known_blocks

    yield "kv", f"deep prompts in timm's {', '.join(known_blocks())}: the prompts' outputs are discarded"
    yield "concat", "shallow prompts, whose outputs go on to the next block, and all other blocks"


def _backbone() -> Iterator[Line]:
    from spt_fast.data.shipped import backbone_facts

    facts = backbone_facts()
    yield "architecture", ", ".join(f"{name} {value}" for name, value in facts["architecture"].items())
    yield "pretraining", f"masked autoencoding, {facts['epochs']} epochs, last loss {facts['loss']:.4f}"
