"""What is installed here, and which code each operation will run: `spt-fast doctor`."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from spt_fast.clustering import faiss_backend
from spt_fast.commands.self_check import devices
from spt_fast.data.shipped import backbone_facts
from spt_fast.ops import kmeans, kmeans_native, nmi, prompt_attention
from spt_fast.prompting.engines import known_blocks

_REQUIRED = ("torch", "timm", "safetensors", "numpy", "tqdm")
_OPTIONAL = {
    "triton": "Linux only",
    "matplotlib": "extra: plots",
    "faiss-cpu": "extra: faiss",
    "faiss-gpu": "extra: faiss-gpu",
}

Line = tuple[str, str]


def report() -> str:
    """All facts, one per line, in sections; never raises because something is missing."""
    sections = {
        "versions": _versions(),
        "machine": _machine(),
        "compiled extension": _extension(),
        "backends": _backends(),
        "engines of PromptedViT": _engines(),
        "shipped backbone": _backbone(),
    }
    return "\n\n".join(_section(title, list(lines)) for title, lines in sections.items())


def _section(title: str, lines: list[Line]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in lines)])


def _versions() -> Iterator[Line]:
    yield "spt_fast", _version("spt_fast") or "not installed (run from a checkout)"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    for name in _REQUIRED:
        yield name, _version(name) or "MISSING"
    for name, note in _OPTIONAL.items():
        yield name, _version(name) or f"not installed ({note})"


def _machine() -> Iterator[Line]:
    yield "system", f"{platform.system()} {platform.machine()}"
    yield "cpu", f"{os.cpu_count()} cores; torch uses {torch.get_num_threads()} threads"
    yield "cuda", _cuda()


def _cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"no device available (torch is built for CUDA {torch.version.cuda})"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (torch is built for CUDA {torch.version.cuda})"


def _extension() -> Iterator[Line]:
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
    for device in devices():
        name, reason = kmeans.explain_backend(device)
        yield f"k-means on {device}", f"{name}: {reason}" if reason else name
    yield "k-means by faiss", faiss_backend.explain()
    for device in devices():
        name, reason = prompt_attention.explain_backend(device, torch.float32, 64)
        yield f"prompt_attention on {device}", f"{name}: {reason}"
        name, reason = nmi.explain_backend(device)
        yield f"sigmoid_nmi on {device}", f"{name}: {reason}"


def _engines() -> Iterator[Line]:
    yield "kv", f"deep prompts in timm's {', '.join(known_blocks())}: the prompts' outputs are discarded"
    yield "concat", "shallow prompts, whose outputs go on to the next block, and all other blocks"


def _backbone() -> Iterator[Line]:
    facts = backbone_facts()
    yield "architecture", ", ".join(f"{name} {value}" for name, value in facts["architecture"].items())
    yield "pretraining", f"masked autoencoding, {facts['epochs']} epochs, last loss {facts['loss']:.4f}"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
