"""The CUDA source without a GPU: it compiles for every default architecture, and is right when emulated.

The emulation (cuda_emulation/) runs the kernels of csrc/kmeans_cuda.cu thread by thread on the CPU.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from spt_fast.ops import kmeans_native
from spt_fast.ops.kmeans import assign_accumulate
from spt_fast.ops.kmeans_reference import assign_accumulate_reference

CSRC = Path(__file__).resolve().parents[1] / "csrc"
EMULATION = Path(__file__).resolve().parent / "cuda_emulation"
ARCHITECTURES = (80, 90, 100)
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CANARY = 64  # bytes behind the workspace that must not change


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory) -> str:
    path = shutil.which("nvcc")
    if path is None:
        pytest.skip("nvcc is not installed")
    trivial = tmp_path_factory.mktemp("nvcc") / "trivial.cu"
    trivial.write_text("#include <cuda_runtime.h>\n__global__ void kernel() {}\n")
    result = subprocess.run(
        [path, "-c", str(trivial), "-o", str(trivial.with_suffix(".o"))],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        pytest.skip(f"{path} cannot compile a trivial program: {result.stderr.strip()[-200:]}")
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"sm_{a}")
def test_kmeans_cuda_compiles_without_warnings_or_spills(nvcc, tmp_path, architecture):
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    if f"compute_{architecture}" not in known.split():
        pytest.skip(f"this nvcc does not know compute_{architecture}")
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-DSPT_HAVE_CUDA=1", "-Xptxas", "-v"]
    command += ["-Xcompiler", "-Wall,-Wextra", "--Werror", "all-warnings"]
    command += ["-c", str(CSRC / "kmeans_cuda.cu"), "-o", str(tmp_path / "kmeans_cuda.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

    kernels = re.findall(r"\d+([a-z]+_kernel)(\S*)'", result.stderr)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", result.stderr)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", result.stderr)]
    for (kernel, suffix), count in zip(kernels, registers, strict=True):
        print(f"sm_{architecture} {kernel}{suffix.partition('EEv')[0]}: {count} registers")
    # Two kernels for three dtypes, and one that does not depend on the dtype.
    assert len(kernels) == 7
    assert sum(spills) == 0


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    """csrc/kmeans_cuda.cu as a CPU library, its launches rewritten for cuda_emulation/cuda_runtime.h."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    launch = re.compile(r"(\w+(?:<T>)?)<<<([^,]+), ([^,]+), 0, stream>>>\((.*?)\);", re.DOTALL)
    source, launches = launch.subn(
        r"emulate(\2, \3, [&] { \1(\4); });", (CSRC / "kmeans_cuda.cu").read_text()
    )
    assert launches == source.count("emulate(") == 3
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "kmeans_cuda.cpp").write_text(source + '\n#include "shim.h"\n')
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-DSPT_HAVE_CUDA=1"]
    command += [f"-I{EMULATION}", f"-I{CSRC}", "kmeans_cuda.cpp", "-o", "emulated.so"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    library = ctypes.CDLL(str(folder / "emulated.so"))
    library.emulated_workspace.argtypes = [ctypes.c_int64] * 4
    library.emulated_workspace.restype = ctypes.c_int64
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.emulated_assign_accumulate.argtypes = [pointer, ctypes.c_int32, size * 4, size * 3, pointer, size]
    library.emulated_assign_accumulate.argtypes += [pointer] * 7
    library.emulated_assign_accumulate.restype = ctypes.c_char_p
    return library


def run_emulated(library, tokens, centers, weights=None, with_rows=True):
    """tokens [G, B, N, D] -> sums, counts, inertia, labels, distances; every output starts as NaN."""
    groups, outer, inner, width = tokens.shape
    num_centers, rows = centers.shape[1], outer * inner
    sums = torch.full((groups, num_centers, width), torch.nan, dtype=torch.float64)
    counts = torch.full((groups, num_centers), torch.nan, dtype=torch.float64)
    inertia = torch.full((groups,), torch.nan, dtype=torch.float64)
    labels = torch.full((groups, rows), -7, dtype=torch.int32) if with_rows else None
    distances = torch.full((groups, rows), torch.nan) if with_rows else None
    size = library.emulated_workspace(groups, rows, width, num_centers)
    workspace = torch.full((size + CANARY,), 255, dtype=torch.uint8)
    addresses = [
        t if t is None else t.data_ptr() for t in (weights, sums, counts, inertia, labels, distances)
    ]
    message = library.emulated_assign_accumulate(
        tokens.data_ptr(),
        DTYPE_CODES[tokens.dtype],
        (ctypes.c_int64 * 4)(*tokens.shape),
        (ctypes.c_int64 * 3)(*tokens.stride()[:3]),
        centers.data_ptr(),
        num_centers,
        *addresses,
        workspace.data_ptr(),
    )
    if message is not None:
        raise RuntimeError(message.decode())
    assert workspace[size:].eq(255).all(), "wrote behind the workspace"
    return sums, counts, inertia, labels, distances


def make_problem(groups, images, patches, prefix, width, num_centers, dtype, weighted):
    """Tokens [G, B, N, D], a view that skips prefix tokens; centres [G, K, D]; weights [G, B * N] or None."""
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(groups, images, prefix + patches, width, generator=generator).add(3).to(dtype)
    centers = torch.randn(groups, num_centers, width, generator=generator).add(3)
    weights = torch.rand(groups, images * patches, generator=generator) if weighted else None
    return activations[:, :, prefix:], centers, weights


def assert_matches_reference(given, tokens, centers, weights):
    """`given` on any device against the reference in float64 on the same tokens."""
    groups, width = tokens.shape[0], tokens.shape[-1]
    flat = tokens.double().reshape(groups, -1, width)
    weights = None if weights is None else weights.double()
    expected = assign_accumulate_reference(flat, centers.double(), weights=weights)
    for ours, reference in zip(given, expected, strict=True):
        # Only distances are rounded to float32: once per column.
        torch.testing.assert_close(ours.double(), reference.double(), rtol=width * 1.2e-7 + 1e-12, atol=1e-9)


PROBLEMS = pytest.mark.parametrize(
    ("groups", "images", "patches", "prefix", "width", "num_centers", "dtype", "weighted"),
    [
        pytest.param(1, 1, 1, 0, 1, 1, torch.float32, False, id="G1-M1-D1-K1-fp32"),
        pytest.param(2, 3, 19, 1, 33, 5, torch.float32, True, id="G2-M57-D33-K5-fp32-weighted"),
        pytest.param(1, 4, 12, 5, 64, 65, torch.float16, False, id="G1-M48-D64-K65-fp16"),
        pytest.param(3, 5, 26, 1, 63, 130, torch.bfloat16, True, id="G3-M130-D63-K130-bf16-weighted"),
        pytest.param(1, 13, 59, 1, 10, 3, torch.float32, True, id="G1-M767-D10-K3-fp32-weighted"),
    ],
)


@PROBLEMS
def test_emulated_cuda_matches_reference(
    emulated, groups, images, patches, prefix, width, num_centers, dtype, weighted
):
    problem = make_problem(groups, images, patches, prefix, width, num_centers, dtype, weighted)
    given = run_emulated(emulated, *problem)
    assert_matches_reference(given, *problem)
    again = run_emulated(emulated, *problem, with_rows=False)
    assert all(torch.equal(a, b) for a, b in zip(given[:3], again[:3], strict=True))


@pytest.mark.gpu
@PROBLEMS
def test_cuda_matches_reference(groups, images, patches, prefix, width, num_centers, dtype, weighted):
    reason = kmeans_native.why_not(torch.device("cuda"))
    if reason:
        pytest.skip(reason)
    problem = make_problem(groups, images, patches, prefix, width, num_centers, dtype, weighted)
    tokens, centers, weights = (None if tensor is None else tensor.cuda() for tensor in problem)
    arguments = {"weights": weights, "with_labels": True, "with_distances": True, "backend": "native"}
    given = assign_accumulate(tokens, centers, **arguments)
    assert_matches_reference([tensor.cpu() for tensor in given], *problem)
    again = assign_accumulate(tokens, centers, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))


def test_emulated_cuda_gives_ties_to_the_lowest_centre(emulated):
    tokens = torch.zeros(1, 1, 70, 4)
    centers = torch.ones(1, 100, 4)
    sums, counts, _, labels, distances = run_emulated(emulated, tokens, centers)
    assert labels.eq(0).all()
    assert distances.eq(4).all()
    assert counts[0].tolist() == [70.0] + [0.0] * 99
    assert sums.eq(0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_emulated_cuda_shows_a_token_that_is_not_finite_in_the_inertia(emulated, value):
    tokens = torch.zeros(2, 1, 70, 4)
    tokens[1, 0, 66, 2] = value
    _, counts, inertia, labels, _ = run_emulated(emulated, tokens, torch.ones(2, 3, 4))
    assert inertia.tolist() == [280.0, torch.inf]
    assert counts.sum(1).tolist() == [70.0, 70.0]
    assert labels.eq(0).all()


def test_emulated_cuda_clears_the_outputs_of_an_empty_input(emulated):
    sums, counts, inertia, _, _ = run_emulated(emulated, torch.zeros(2, 0, 5, 4), torch.ones(2, 3, 4))
    assert not sums.any()
    assert not counts.any()
    assert not inertia.any()


def test_emulated_cuda_refuses_too_many_groups(emulated):
    tokens, centers = torch.zeros(65536, 1, 1, 1), torch.zeros(65536, 1, 1)
    with pytest.raises(RuntimeError, match="groups must be at most 65535 on CUDA, got 65536"):
        run_emulated(emulated, tokens, centers)
