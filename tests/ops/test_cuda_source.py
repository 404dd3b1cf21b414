"""The CUDA sources without a GPU: what nvcc makes of them for sm_90a, and that they are right when emulated.

The emulation (cuda_emulation/) runs the kernels of csrc/ thread by thread on the CPU. Bounds are derived in
docs/design/kmeans-cuda.md ("Rounding").
"""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_fast.ops import kmeans_native
from spt_fast.ops.accuracy import assigned_deviations, rounding_band
from spt_fast.ops.accuracy import kmeans_problem as make_problem
from spt_fast.ops.kmeans import assign_accumulate, squared_distances
from spt_fast.ops.kmeans_reference import assign_accumulate_reference, distances_reference

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
EMULATION = Path(__file__).resolve().parent / "cuda_emulation"
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CANARY = 64  # bytes behind the workspace that must not change
H100_SHARED, A100_SHARED, SMALL_SHARED = 232448, 166912, 101376  # a block's shared memory at most
# kStaticShared of the emulation: at least what a kernel with dynamic shared memory has of static.
STATIC_SHARED = 1024
# Sums move to float64 after so few tokens that runs of a test's size do it several times.
KNOBS = ("-DSPT_ADDITIONS_PER_FLUSH=4",)


@pytest.fixture(scope="module")
def benchmark_modules():
    """benchmarks/cuda_sources.py and cuda_hot_path.py, which are no part of the installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        names = ("cuda_sources", "cuda_hot_path")
        return [importlib.import_module(f"benchmarks.{name}") for name in names]


WHOLE = CSRC / "kmeans_cuda.cu"
TWO_READS = EMULATION.parent / "native" / "two_reads.cu"
ARCHITECTURES = ("80", "90a", "100", "120")


@pytest.fixture(scope="module")
def compiled(benchmark_modules, tmp_path_factory) -> Iterator[Callable[[str, Path], dict[str, Any]]]:
    """The kernels of a source for an architecture. All are compiled at once, two at a time."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    cuda_sources, _ = benchmark_modules
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            (arch, source): pool.submit(
                cuda_sources.inspect, nvcc, arch, tmp_path_factory.mktemp("nvcc"), source
            )
            for arch, source in [("90a", WHOLE), *((arch, TWO_READS) for arch in ARCHITECTURES)]
        }
        yield lambda arch, source: jobs[arch, source].result()


# What a warp issued for an ordinary tile when this was written, and 3 % for another nvcc.
TILES = {
    "one_read_kernel<bf16, 2, 6, 3>": (12, 0, 865),
    "one_read_kernel<fp32, 1, 6, 3>": (12, 0, 1245),
    "assign_kernel<bf16>": (8, 32, 520),
    "assign_kernel<fp32>": (6, 16, 655),
}


def test_kernels_use_tensor_cores_and_wide_copies_and_do_not_spill(compiled, benchmark_modules):
    cuda_sources, cuda_hot_path = benchmark_modules
    kernels = compiled("90a", WHOLE)
    for name, kernel in kernels.items():
        assert kernel.spill_bytes == 0, name
    found = {hot: [name for name in kernels if name.startswith(hot)] for hot in cuda_sources.HOT}
    for hot, names in found.items():
        assert all(kernels[name].static_shared <= STATIC_SHARED for name in names), hot
        assert {name.partition("<")[2][:4] for name in names} == {"fp32", "fp16", "bf16"}, hot
    if any(kernel.function is None for kernel in kernels.values()):
        pytest.skip("nvdisasm is not installed")
    for name in found["one_read_kernel"] + found["assign_kernel"]:
        assert kernels[name].count("HMMA") > 0, name
        assert kernels[name].count("LDGSTS", ".128") > 0, name
    for name, (copies, multiply_adds, most) in TILES.items():
        wanted = {cuda_hot_path.COPY: copies, "FFMA": multiply_adds}
        path = cuda_hot_path.hot_path(kernels[name].function, wanted)
        assert cuda_hot_path.count(path, cuda_hot_path.COPY) >= copies, name
        assert len(path) <= most, name


# accumulate_kernel for rows of whole and aligned 16 bytes, and for any.
WIDE = {f"accumulate_kernel<{dtype}, uint4>" for dtype in ("fp32", "fp16", "bf16")}
NARROW = {f"accumulate_kernel<{dtype}>" for dtype in ("fp32", "fp16", "bf16")}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sums_keep_16_loads_in_flight_and_do_not_spill(compiled, benchmark_modules, arch):
    _, cuda_hot_path = benchmark_modules
    kernels = compiled(arch, TWO_READS)
    assert {name for name in kernels if name.startswith("accumulate_kernel")} == WIDE | NARROW
    for name, kernel in kernels.items():
        assert kernel.spill_bytes == 0, name
    for name in WIDE | NARROW:
        # Sixteen warps of so many registers share a multiprocessor.
        assert kernels[name].registers <= 128, name
    if any(kernel.function is None for kernel in kernels.values()):
        pytest.skip("nvdisasm is not installed")
    for name in WIDE:
        # An element of each of 16 rows takes a multiply-add.
        wanted = {"FFMA": 16 * (4 if "fp32" in name else 8)}
        path = cuda_hot_path.hot_path(kernels[name].function, wanted, of="LDG.E.128", may_loop=True)
        assert cuda_hot_path.count(path, "FFMA") == wanted["FFMA"], name
        assert cuda_hot_path.loads_in_flight(path) == 16 * 16, name


# Of a made-up kernel; in the loop, the way over .L_x_2 copies and the way over .L_x_3 does not.
LISTING = """
\t.section\t.text.kernel,"ax",@progbits
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   LDG.E.64 R8, [R2.64+0x10] ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R20], [R2.64] ;
        /*0080*/                   STS.64 [R20], R12 ;
.L_x_3:
        /*0090*/              @!P1 BRA `(.L_x_4) ;
        /*00a0*/                   STG.E [R2.64], R12 ;
.L_x_4:
        /*00b0*/                   BRA.DIV ~URZ, `(.L_x_5) ;
        /*00c0*/               @P2 CALL.REL.NOINC `(.L_x_6) ;
        /*00d0*/                   BRA `(.L_x_1) ;
.L_x_6:
        /*00e0*/                   EXIT ;
.L_x_5:
        /*00f0*/                   BRA `(.L_x_4) ;
"""


def test_the_ordinary_tile_is_found_in_the_machine_code(benchmark_modules):
    _, cuda_hot_path = benchmark_modules
    kernel = cuda_hot_path.parse(LISTING)["kernel"]
    path = cuda_hot_path.hot_path(kernel, {cuda_hot_path.COPY: 1})
    assert [instruction.address for instruction in path] == [
        *(0x10, 0x20, 0x30, 0x60, 0x70, 0x80, 0x90, 0xB0, 0xC0, 0xD0)
    ]
    assert cuda_hot_path.loads_in_flight(path) == 24
    assert cuda_hot_path.shared_bytes(path) == 32 * (16 + 8)
    assert len(cuda_hot_path.hot_path(kernel, {})) == 9
    with pytest.raises(ValueError, match="the kernel has no loop with IMMA"):
        cuda_hot_path.hot_path(kernel, {}, of="IMMA")
    inner = LISTING.replace("@P2 CALL.REL.NOINC `(.L_x_6)", "@P2 BRA `(.L_x_3)")
    with pytest.raises(ValueError, match="an inner loop lies on the hot path, at 0xb0"):
        cuda_hot_path.hot_path(cuda_hot_path.parse(inner)["kernel"], {})


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    """csrc/kmeans_cuda.cu as a CPU library."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    target = tmp_path_factory.mktemp("emulated") / "emulated.so"
    # The kernels read values of one type as another, which a GPU's compiler allows.
    command = [compiler, "-std=c++17", "-O2", "-fno-strict-aliasing", "-shared", "-fPIC", "-w", *KNOBS]
    command += [f"-I{EMULATION}", f"-I{CSRC}", str(EMULATION / "library.cpp"), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    library = ctypes.CDLL(str(target))
    for operation in ("assign_accumulate", "distances"):
        getattr(library, f"emulated_{operation}_workspace").restype = ctypes.c_int64
        getattr(library, f"emulated_{operation}").restype = ctypes.c_char_p
    library.emulated_wait.restype = library.emulated_why_not.restype = ctypes.c_char_p
    return library


class TokenView(ctypes.Structure):
    """As in csrc/kmeans.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        *((size, ctypes.c_int64) for size in ("groups", "outer", "inner", "width")),
        *((stride, ctypes.c_int64) for stride in ("group_stride", "outer_stride", "inner_stride")),
    )

    @classmethod
    def of(cls, tokens: torch.Tensor) -> TokenView:
        return cls(tokens.data_ptr(), DTYPE_CODES[tokens.dtype], *tokens.shape, *tokens.stride()[:3])


class AssignArgs(ctypes.Structure):
    """As in csrc/kmeans.h."""

    _fields_ = (
        ("tokens", TokenView),
        *((name, ctypes.c_void_p) for name in ("centers", "shift", "weights")),
        ("num_centers", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sums", "counts", "inertia", "labels", "distances")),
        ("corrects", ctypes.c_bool),
    )


class DistanceArgs(ctypes.Structure):
    """As in csrc/kmeans.h."""

    _fields_ = (
        ("tokens", TokenView),
        *((name, ctypes.c_void_p) for name in ("centers", "shift")),
        ("num_centers", ctypes.c_int64),
        ("distances", ctypes.c_void_p),
    )


def call_emulated(library, operation, args):
    """Calls with a workspace that is as large as the library wants it, and must suffice."""
    size = getattr(library, f"emulated_{operation}_workspace")(ctypes.byref(args))
    workspace = torch.full((size + CANARY,), 255, dtype=torch.uint8)
    start = -workspace.data_ptr() % 16  # malloc's alignment is not CUDA's
    workspace = torch.full((size + CANARY + start,), 255, dtype=torch.uint8)[start:]
    message = getattr(library, f"emulated_{operation}")(
        ctypes.byref(args), ctypes.c_void_p(workspace.data_ptr())
    )
    if message is not None:
        raise RuntimeError(message.decode())
    assert workspace[size:].eq(255).all(), "wrote behind the workspace"


def mean_center(centers):
    """The shift that tokens on CUDA get if none is given."""
    return centers.mean(1)


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def run_emulated(
    library,
    tokens,
    centers,
    shift=None,
    weights=None,
    rows=("labels", "distances"),
    shared=H100_SHARED,
    last=None,
):
    """tokens [G, B, N, D] -> sums, counts, inertia, labels, distances; corrected from `last`, if given.

    They are equal for threads in order and late copies, and for threads in reverse and early copies.
    """
    groups, outer, inner, width = tokens.shape
    num_centers, num_rows = centers.shape[1], outer * inner
    shift = mean_center(centers) if shift is None else shift
    results = []
    for reverse_and_early in (False, True):
        sums = torch.full((groups, num_centers, width), torch.nan, dtype=torch.float64)
        counts = torch.full((groups, num_centers), torch.nan, dtype=torch.float64)
        inertia = torch.full((groups,), torch.nan, dtype=torch.float64)
        labels = torch.full((groups, num_rows), -7, dtype=torch.int32) if "labels" in rows else None
        distances = torch.full((groups, num_rows), torch.nan) if "distances" in rows else None
        if last is not None:
            sums, counts, labels = last[0].clone(), last[1].clone(), last[3].clone()
        outputs = (sums, counts, inertia, labels, distances)
        library.emulated_machine(shared, reverse_and_early, reverse_and_early)
        inputs = (address(centers), address(shift), address(weights), num_centers)
        args = AssignArgs(TokenView.of(tokens), *inputs, *map(address, outputs), last is not None)
        call_emulated(library, "assign_accumulate", args)
        results.append(outputs)
    for ours, again in zip(*results, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, again, rtol=0, atol=0, equal_nan=True)
    return results[0]


def run_emulated_distances(library, tokens, centers, shift=None):
    groups, outer, inner, _ = tokens.shape
    shift = mean_center(centers) if shift is None else shift
    library.emulated_machine(H100_SHARED, False, False)
    distances = torch.full((groups, outer * inner, centers.shape[1]), torch.nan)
    args = DistanceArgs(
        TokenView.of(tokens), address(centers), address(shift), centers.shape[1], address(distances)
    )
    call_emulated(library, "distances", args)
    return distances


def assert_matches_reference(given, tokens, centers, shift, weights, before=()):
    """`given` against float64: labels and distances within the rounding band, the rest by our own labels."""
    found = assigned_deviations(given, tokens, centers, shift, weights, before)
    assert all(deviation.ok for deviation in found.values()), found
    # Labels are the reference's where nothing is close, which is nearly everywhere.
    flat = tokens.reshape(len(tokens), -1, tokens.shape[-1]).double()
    expected = assign_accumulate_reference(flat, centers.double())
    assert (given[3] == expected[3]).double().mean() > 0.98


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# One read: no weights and at most 32 centres; anything else reads twice.
PROBLEMS = pytest.mark.parametrize(
    ("groups", "images", "patches", "prefix", "width", "num_centers", "dtype", "weighted"),
    [
        pytest.param(1, 1, 1, 0, 1, 1, FP32, False, id="G1-M1-D1-K1-fp32"),
        pytest.param(2, 3, 19, 1, 33, 5, FP32, False, id="G2-M57-D33-K5-fp32"),
        pytest.param(1, 1, 40, 0, 200, 24, FP32, False, id="G1-M40-D200-K24-fp32"),
        pytest.param(1, 2, 35, 1, 96, 32, BF16, False, id="G1-M70-D96-K32-bf16"),
        pytest.param(2, 1, 70, 0, 100, 20, BF16, False, id="G2-M70-D100-K20-bf16-unaligned-rows"),
        pytest.param(3, 5, 26, 1, 63, 13, BF16, False, id="G3-M130-D63-K13-bf16-odd-rows"),
        pytest.param(1, 1, 40, 0, 1000, 8, BF16, False, id="G1-M40-D1000-K8-bf16"),
        pytest.param(1, 1, 50, 2, 72, 9, FP16, False, id="G1-M50-D72-K9-fp16"),
        pytest.param(1, 13, 59, 1, 16, 3, FP16, False, id="G1-M767-D16-K3-fp16"),
        pytest.param(2, 3, 19, 1, 33, 5, FP32, True, id="G2-M57-D33-K5-fp32-weighted"),
        pytest.param(1, 4, 12, 5, 64, 65, FP16, False, id="G1-M48-D64-K65-fp16"),
        pytest.param(3, 5, 26, 1, 63, 130, BF16, True, id="G3-M130-D63-K130-bf16-weighted"),
        pytest.param(1, 1, 300, 0, 36, 33, FP32, False, id="G1-M300-D36-K33-fp32"),
        pytest.param(1, 13, 59, 1, 10, 3, FP32, True, id="G1-M767-D10-K3-fp32-weighted"),
        pytest.param(1, 1, 20, 0, 1100, 4, BF16, False, id="G1-M20-D1100-K4-bf16"),
    ],
)


@PROBLEMS
def test_emulated_cuda_matches_reference(
    emulated, groups, images, patches, prefix, width, num_centers, dtype, weighted
):
    problem = make_problem(groups, images, patches, prefix, width, num_centers, dtype, weighted)
    given = run_emulated(emulated, *problem)
    assert_matches_reference(given, *problem)
    again = run_emulated(emulated, *problem, rows=())
    assert all(torch.equal(a, b) for a, b in zip(given[:3], again[:3], strict=True))


@pytest.mark.parametrize("num_centers", [20, 100], ids=["one-read", "two-reads"])
def test_emulated_cuda_matches_reference_at_the_width_of_a_vit(emulated, num_centers):
    # One tile of 32 tokens and a part of one; all columns that a warp can own.
    problem = make_problem(1, 3, 15, 1, 768, num_centers, BF16, False)
    assert_matches_reference(run_emulated(emulated, *problem), *problem)


def integer_problem(rows, num_centers, width, dtype, share):
    """Tokens of integers, so that sums are exact; centre 0 has `share` of them, some centres none."""
    generator = torch.Generator().manual_seed(rows + num_centers)
    centers = torch.zeros(2, num_centers, width)
    centers[:, :, 0] = 8.0 * (torch.arange(num_centers) % 8)
    centers[:, :, 1] = 8.0 * (torch.arange(num_centers) // 8)
    owner = torch.randint(num_centers // 2, (2, rows), generator=generator) * 2
    owner[torch.rand(2, rows, generator=generator) < share] = 0
    noise = torch.randint(-3, 4, (2, rows, width), generator=generator)
    tokens = centers.gather(1, owner[..., None].expand(-1, -1, width)) + noise
    weights = torch.randint(0, 9, (2, rows), generator=generator).float()
    return tokens[:, None].to(dtype), centers, weights, owner


@pytest.mark.parametrize(
    ("rows", "num_centers", "width", "dtype", "share"),
    [
        pytest.param(1500, 40, 8, BF16, 0.0, id="M1500-K40-D8-bf16"),
        pytest.param(1500, 34, 8, FP16, 0.9, id="M1500-K34-D8-fp16-one-centre-has-most"),
        pytest.param(1024, 36, 12, FP32, 0.3, id="M1024-K36-D12-fp32"),
        pytest.param(700, 33, 5, FP32, 1.0, id="M700-K33-D5-fp32-one-centre-has-all"),
        pytest.param(90, 400, 3, FP32, 0.0, id="M90-K400-D3-fp32-fewer-tokens-than-centres"),
        pytest.param(127, 64, 264, FP32, 0.0, id="M127-K64-D264-fp32"),
    ],
)
def test_emulated_cuda_adds_integers_exactly(emulated, rows, num_centers, width, dtype, share):
    tokens, centers, weights, owner = integer_problem(rows, num_centers, width, dtype, share)
    sums, counts, inertia, labels, distances = run_emulated(emulated, tokens, centers, weights=weights)
    assert torch.equal(labels.long(), owner)
    weighted = tokens.flatten(1, 2).double() * weights[..., None]
    expected = torch.zeros_like(sums).scatter_add_(1, owner[..., None].expand_as(weighted), weighted)
    assert torch.equal(sums, expected)
    assert torch.equal(counts, torch.zeros_like(counts).scatter_add_(1, owner, weights.double()))
    torch.testing.assert_close(inertia, (weights.double() * distances).sum(1), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("rows", "num_centers", "width", "dtype", "share"),
    [
        pytest.param(1500, 40, 8, BF16, 0.0, id="M1500-K40-D8-bf16"),
        pytest.param(1500, 34, 8, FP16, 0.02, id="M1500-K34-D8-fp16-few-change"),
        pytest.param(300, 40, 12, FP32, 0.0, id="M300-K40-D12-fp32"),
        pytest.param(700, 33, 5, FP32, 0.5, id="M700-K33-D5-fp32"),
        pytest.param(90, 20, 8, BF16, 0.5, id="M90-K20-D8-bf16-one-read"),
    ],
)
def test_emulated_cuda_corrects_integers_exactly(emulated, rows, num_centers, width, dtype, share):
    tokens, centers, _, _ = integer_problem(rows, num_centers, width, dtype, 0.1)
    last = run_emulated(emulated, tokens, centers)
    others = centers.clone()
    # Centres change places: all (no share), or so many of the first group; none of the second.
    chosen = max(2, round(share * num_centers)) if share else num_centers
    others[0, :chosen] = centers[0, :chosen].roll(1, 0)
    corrected = run_emulated(emulated, tokens, others, last=last)
    anew = run_emulated(emulated, tokens, others)
    changed = (last[3] != anew[3]).sum(1)
    assert changed[0] > 0
    assert changed[1] == 0
    for ours, expected in zip(corrected, anew, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_emulated_cuda_corrects_pass_after_pass(emulated, dtype):
    tokens, centers, shift, _ = make_problem(2, 3, 50, 1, 63, 40, dtype, False)
    given, before = run_emulated(emulated, tokens, centers, shift), []
    for _ in range(15):
        before.append(given[3])
        centers = torch.where((given[1] > 0)[..., None], given[0] / given[1][..., None], centers).float()
        given = run_emulated(emulated, tokens, centers, shift, last=given)
    assert_matches_reference(given, tokens, centers, shift, None, before)


def test_emulated_cuda_keeps_the_errors_of_tokens_that_have_left(emulated):
    """A centre that keeps the least of its tokens has sums as good as those of all that it had."""
    tokens, centers = torch.full((1, 1, 4, 8), 1000.0), torch.full((1, 40, 8), 1e6)
    tokens[0, 0, 0] = 1e-3
    centers[0, 0], away = 500.0, centers.clone()
    away[0, 0], away[0, 1] = 0.0, 1000.0
    last = run_emulated(emulated, tokens, centers)
    given = run_emulated(emulated, tokens, away, last=last)
    assert given[1][0, :2].tolist() == [1, 3]
    shift = mean_center(away)
    assert assigned_deviations(given, tokens, away, shift, None, [last[3]])["sums"].ok
    assert not assigned_deviations(given, tokens, away, shift, None)["sums"].ok


def test_emulated_cuda_corrects_without_weights_and_with_labels_only(emulated):
    tokens, centers, _, weights = make_problem(1, 1, 40, 0, 8, 40, FP32, True)
    last = run_emulated(emulated, tokens, centers)
    with pytest.raises(RuntimeError, match="corrects needs labels, and takes no weights"):
        run_emulated(emulated, tokens, centers, weights=weights, last=last)


def test_a_token_that_is_not_finite_spoils_the_sums_of_its_own_centre_only_in_two_reads(emulated):
    tokens, centers, _, _ = integer_problem(200, 40, 8, FP32, 0.0)
    tokens[0, 0, 66, 2] = torch.nan
    sums, _, inertia, labels, _ = run_emulated(emulated, tokens, centers)
    assert labels[0, 66] == 0
    assert inertia.isinf().tolist() == [True, False]
    assert sums[0, 1:].isfinite().all()
    assert sums[1].isfinite().all()


def test_the_workspace_of_two_reads_is_small_beside_the_tokens(emulated):
    # 1.63 GB of tokens. Labels, distances and the sorted rows take 21 MB, partial sums 7 MB.
    rows, width = 1_060_000, 768
    view = TokenView(0, DTYPE_CODES[BF16], 1, 1, rows, width, rows * width, rows * width, width)
    args = AssignArgs(view, None, None, None, 100)
    assert emulated.emulated_assign_accumulate_workspace(ctypes.byref(args)) < 30e6


@pytest.mark.parametrize("shared", [A100_SHARED, SMALL_SHARED])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_emulated_cuda_serves_gpus_with_less_shared_memory(emulated, shared, dtype):
    problem = make_problem(1, 1, 33, 0, 400, 20, dtype, False)
    assert_matches_reference(run_emulated(emulated, *problem, shared=shared), *problem)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.integers(0, 2)),
    width=st.integers(1, 150),
    num_centers=st.integers(1, 40),
    dtype=st.sampled_from([FP32, FP16, BF16]),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_emulated_cuda_matches_reference_at_any_size(
    emulated, shape, width, num_centers, dtype, weighted, seed
):
    problem = make_problem(*shape, width, num_centers, dtype, weighted, seed)
    tokens, centers, shift, weights = problem
    # Shares of 0.98 need many tokens; tiny problems are allowed a tie.
    given = run_emulated(emulated, *problem)
    if tokens.shape[1] * tokens.shape[2] >= 60:
        assert_matches_reference(given, *problem)
    rows = tokens.shape[1] * tokens.shape[2]
    ones = torch.ones(tokens.shape[0], rows, dtype=torch.float64)
    members = (ones if weights is None else weights.double()).sum(1)
    torch.testing.assert_close(given[1].sum(1), members, rtol=1e-12, atol=0)
    distances = run_emulated_distances(emulated, tokens, centers, shift)
    flat = tokens.flatten(1, 2)
    error = (distances.double() - distances_reference(flat.double(), centers.double())).abs()
    assert (error <= rounding_band(flat, centers, shift)).all()


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("num_centers", [6, 40])
def test_emulated_cuda_keeps_its_accuracy_beside_an_outlier_dimension(emulated, dtype, num_centers):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(1, 1, 60, 80, generator=generator)
    tokens[..., 7] += 1e4
    tokens = tokens.to(dtype)
    centers = tokens[0, :, :num_centers].float() + 0.1
    shift = tokens.float().mean((1, 2))
    given = run_emulated(emulated, tokens, centers, shift)
    assert_matches_reference(given, tokens, centers, shift, None)
    exact = assign_accumulate_reference(tokens[0].double(), centers.double())
    # A band of 1e-4 of the inertia: without the shift, float32 would be off by its size.
    torch.testing.assert_close(given[2], exact[2], rtol=1e-4, atol=0)


@pytest.mark.parametrize("num_centers", [20, 100])
def test_emulated_cuda_gives_ties_to_the_lowest_centre(emulated, num_centers):
    tokens = torch.zeros(1, 1, 70, 4)
    centers = torch.ones(1, num_centers, 4)
    for shift in (None, torch.zeros(1, 4)):
        sums, counts, _, labels, distances = run_emulated(emulated, tokens, centers, shift)
        assert labels.eq(0).all()
        assert distances.eq(4).all()
        assert counts[0].tolist() == [70.0] + [0.0] * (num_centers - 1)
        assert sums.eq(0).all()


def test_emulated_cuda_finds_equal_tokens_at_distance_zero(emulated):
    tokens = torch.full((1, 1, 40, 24), 7.25, dtype=BF16)
    sums, _, inertia, _, distances = run_emulated(emulated, tokens, torch.full((1, 3, 24), 7.25))
    assert not inertia.any()
    assert not distances.any()
    assert sums[0, 0].eq(290).all()


@pytest.mark.parametrize("scale", [1e-3, 6e4])
def test_emulated_cuda_keeps_float16_centres_of_any_size(emulated, scale):
    tokens, centers, _, _ = make_problem(1, 1, 60, 0, 40, 7, FP32, False)
    tokens, centers = ((tokens - 3) * (scale / 5)).to(FP16), (centers - 3) * (scale / 5)
    given = run_emulated(emulated, tokens, centers)
    assert_matches_reference(given, tokens, centers, None, None)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("num_centers", [3, 40])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_emulated_cuda_shows_a_token_that_is_not_finite_in_the_inertia(emulated, value, num_centers, dtype):
    tokens = torch.zeros(2, 1, 70, 4, dtype=dtype)
    tokens[1, 0, 66, 2] = value
    _, counts, inertia, labels, _ = run_emulated(emulated, tokens, torch.ones(2, num_centers, 4))
    assert inertia.tolist() == [280.0, torch.inf]
    assert counts.sum(1).tolist() == [70.0, 70.0]
    assert labels.eq(0).all()


def test_emulated_cuda_refuses_an_empty_input(emulated):
    with pytest.raises(RuntimeError, match="tokens must not be empty"):
        run_emulated(emulated, torch.zeros(2, 0, 5, 4), torch.ones(2, 3, 4))


def test_emulated_cuda_refuses_too_many_groups(emulated):
    tokens, centers = torch.zeros(65536, 1, 1, 1), torch.zeros(65536, 1, 1)
    with pytest.raises(RuntimeError, match="groups must be at most 65535 on CUDA, got 65536"):
        run_emulated(emulated, tokens, centers)
    with pytest.raises(RuntimeError, match="groups must be at most 65535 on CUDA, got 65536"):
        run_emulated_distances(emulated, tokens, centers)


def test_emulated_cuda_refuses_a_width_beyond_shared_memory(emulated):
    tokens, centers = torch.zeros(1, 1, 1, 60000), torch.zeros(1, 1, 60000)
    with pytest.raises(RuntimeError, match="width 60000 is too large for the shared memory of this GPU"):
        run_emulated_distances(emulated, tokens, centers)


@pytest.fixture
def only_checked(emulated):
    """Launches are checked against the limits of the GPU, and no kernel runs."""
    emulated.emulated_checks_only(True)
    yield
    emulated.emulated_checks_only(False)


# sm_90 and sm_100, sm_80, sm_86 and sm_120.
@pytest.mark.parametrize("shared", [H100_SHARED, A100_SHARED, SMALL_SHARED])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_no_launch_asks_for_more_shared_memory_than_it_may_have(emulated, only_checked, shared, dtype):
    emulated.emulated_machine(shared, False, False)
    address, refused = 1 << 12, []  # nothing is read or written
    for width in (8, 63, 384, 768, 1024, 4096):
        for rows in (1, 100_000):
            view = TokenView(
                address, DTYPE_CODES[dtype], 1, 1, rows, width, rows * width, rows * width, width
            )
            for num_centers in range(1, 301):
                for weights in (None, address):
                    inputs = (address, address, weights, num_centers)
                    args = AssignArgs(view, *inputs, *[address] * 5)
                    message = emulated.emulated_assign_accumulate(
                        ctypes.byref(args), ctypes.c_void_p(address)
                    )
                    if message is not None:
                        refused.append((width, rows, num_centers, message))
                args = DistanceArgs(view, address, address, num_centers, address)
                message = emulated.emulated_distances(ctypes.byref(args), ctypes.c_void_p(address))
                if message is not None:
                    refused.append((width, rows, num_centers, message))
    assert not refused


def test_a_gpu_for_which_there_is_no_code_is_named_as_the_reason(emulated):
    assert emulated.emulated_why_not() == b""
    emulated.emulated_code(False)
    try:
        reason = emulated.emulated_why_not().decode()
    finally:
        emulated.emulated_code(True)
    assert reason == (
        "kernels built for the emulation do not run on this GPU: "
        "no kernel image is available for execution on the device"
    )


@pytest.fixture
def skip_wait(emulated):
    """`emulated_skip_wait` of the library, which has none skipped afterwards."""
    yield emulated.emulated_skip_wait
    emulated.emulated_skip_wait(-1)


@pytest.mark.parametrize(
    ("rows", "num_centers", "least"), [(300, 21, 4), (900, 110, 3)], ids=["one-read", "two-reads"]
)
def test_emulation_sees_every_missing_wait(emulated, skip_wait, rows, num_centers, least):
    problem = make_problem(1, 1, rows, 0, 40, num_centers, BF16, False)
    skip_wait(-1)
    assert_matches_reference(run_emulated(emulated, *problem), *problem)
    waits = []
    while (name := emulated.emulated_wait(len(waits))) is not None:
        waits.append(Path(name.decode()).name)
    assert len(waits) >= least
    unseen = []
    for index, name in enumerate(waits):
        skip_wait(index)
        try:
            assert_matches_reference(run_emulated(emulated, *problem), *problem)
        except AssertionError:
            continue
        unseen.append(name)
    assert not unseen


def skip_without_gpu() -> None:
    reason = kmeans_native.why_not(torch.device("cuda"))
    if reason:
        pytest.skip(reason)


def on_cpu(tensors):
    return [None if tensor is None else tensor.cpu() for tensor in tensors]


@pytest.mark.gpu
@PROBLEMS
def test_cuda_matches_reference(groups, images, patches, prefix, width, num_centers, dtype, weighted):
    skip_without_gpu()
    problem = make_problem(
        groups, images, patches, prefix, width, num_centers, dtype, weighted, device="cuda"
    )
    tokens, centers, shift, weights = problem
    arguments = {"shift": shift, "weights": weights, "with_labels": True, "with_distances": True}
    given = assign_accumulate(tokens, centers, backend="native", **arguments)
    assert_matches_reference(on_cpu(given), *on_cpu(problem))
    again = assign_accumulate(tokens, centers, backend="native", **arguments)
    assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(("width", "num_centers"), [(768, 20), (768, 100), (1024, 32), (384, 300), (63, 5)])
def test_cuda_matches_reference_at_full_size(dtype, width, num_centers):
    skip_without_gpu()
    problem = make_problem(2, 64, 197, 1, width, num_centers, dtype, False, device="cuda")
    tokens, centers, shift, _ = problem
    given = assign_accumulate(
        tokens, centers, shift=shift, with_labels=True, with_distances=True, backend="native"
    )
    assert_matches_reference(on_cpu(given), *on_cpu(problem))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(("width", "num_centers"), [(768, 20), (768, 100), (63, 40)])
def test_cuda_corrects_pass_after_pass_at_full_size(dtype, width, num_centers):
    skip_without_gpu()
    problem = make_problem(2, 64, 197, 1, width, num_centers, dtype, False, device="cuda")
    tokens, centers, shift, _ = problem
    arguments = {"shift": shift, "with_labels": True, "with_distances": True, "backend": "native"}
    given, before = assign_accumulate(tokens, centers, **arguments), []
    for _ in range(15):
        before.append(given.labels.cpu())
        centers = torch.where((given[1] > 0)[..., None], given[0] / given[1][..., None], centers).float()
        last, given = given, assign_accumulate(tokens, centers, last=given, **arguments)
    assert_matches_reference(on_cpu(given), *on_cpu((tokens, centers, shift, None)), before)
    again = assign_accumulate(tokens, centers, last=last, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize(("width", "num_centers"), [(768, 100), (384, 64), (1280, 128), (63, 40)])
def test_cuda_matches_reference_without_distances_at_full_size(dtype, width, num_centers):
    skip_without_gpu()
    problem = make_problem(1, 250, 197, 1, width, num_centers, dtype, False, device="cuda")
    tokens, centers, shift, _ = problem
    arguments = {"shift": shift, "with_labels": True, "backend": "native"}
    given = assign_accumulate(tokens, centers, **arguments)
    assert_matches_reference(on_cpu(given), *on_cpu(problem))
    again = assign_accumulate(tokens, centers, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(given[:4], again[:4], strict=True))


@pytest.mark.gpu
@PROBLEMS
def test_cuda_distances_match_reference(groups, images, patches, prefix, width, num_centers, dtype, weighted):
    skip_without_gpu()
    problem = make_problem(
        groups, images, patches, prefix, width, num_centers, dtype, weighted, device="cuda"
    )
    tokens, centers, shift, _ = problem
    distances = squared_distances(tokens, centers, shift=shift, backend="native")
    tokens, centers, shift, _ = on_cpu(problem)
    flat = tokens.flatten(1, 2)
    error = (distances.cpu().double() - distances_reference(flat.double(), centers.double())).abs()
    assert (error <= rounding_band(flat, centers, shift)).all()
