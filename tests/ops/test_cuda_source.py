"""The CUDA sources without a GPU: they compile for every default architecture, and are right when emulated.

The emulation (cuda_emulation/) runs the kernels of csrc/ thread by thread on the CPU. Bounds are derived in
docs/design/kmeans-cuda.md ("Rounding").
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

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
GENERATIONS = {H100_SHARED: 9, A100_SHARED: 8, SMALL_SHARED: 12}
# Sums move to float64 this often, so that runs of a test's size do it several times; few tokens are screened.
SHORTER = {
    "kTokensPerFlush = 2048": "kTokensPerFlush = 64",
    "kRowsPerMove = 4096": "kRowsPerMove = 64",
    "kTokensPerLane = 31": "kTokensPerLane = 2",
    "kScreenRuns = 64": "kScreenRuns = 3",
    "kMinScreenTokens = int64_t{1} << 15": "kMinScreenTokens = 256",
}


def load_inspector():
    """benchmarks/cuda_sources.py, which is no part of the installed package."""
    spec = importlib.util.spec_from_file_location("cuda_sources", ROOT / "benchmarks" / "cuda_sources.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_hot_kernels_use_tensor_cores_and_wide_copies_and_do_not_spill(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    cuda_sources = load_inspector()
    kernels = cuda_sources.inspect(nvcc, "90a", tmp_path)
    hot = {name: kernel for name, kernel in kernels.items() if name.startswith(cuda_sources.HOT)}
    assert len(hot) == 22
    for name, kernel in kernels.items():
        assert kernel.spill_bytes == 0, name
    tools = all(kernel.instructions is not None for kernel in hot.values())
    if not tools:
        pytest.skip("nvdisasm is not installed")
    for name, kernel in hot.items():
        if name.startswith("accumulate_kernel"):
            assert kernel.count("LDG.E.64") or kernel.count("LDG.E.128"), name
        else:
            assert kernel.count("HGMMA" if name.startswith("screen_kernel") else "HMMA") > 0, name
            assert kernel.count("LDGSTS", ".128") > 0, name


def build_emulated(folder: Path, changes: dict[str, str]) -> ctypes.CDLL:
    """csrc/kmeans_cuda.cu as a CPU library, after `changes` to the text of the kernels."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    shutil.copytree(EMULATION, folder / "tests" / "cuda_emulation")
    shutil.copytree(CSRC, folder / "csrc")
    changed = 0
    for source in (folder / "csrc").glob("*.cu*"):
        text = source.read_text()
        for old, new in changes.items():
            changed += text.count(old)
            text = text.replace(old, new)
        source.write_text(text)
    assert changed == len(changes)
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-w", "-DSPT_HAVE_CUDA=1"]
    command += [
        "-DSPT_HAVE_SM90A=1",
        "-Itests/cuda_emulation",
        "-Icsrc",
        "tests/cuda_emulation/library.cpp",
        "-o",
        "emulated.so",
    ]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    library = ctypes.CDLL(str(folder / "emulated.so"))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for workspace in (library.emulated_assign_accumulate_workspace, library.emulated_distances_workspace):
        workspace.argtypes = [size] * 4
        workspace.restype = size
    tokens = [pointer, ctypes.c_int32, size * 4, size * 3]
    library.emulated_assign_accumulate.argtypes = [*tokens, pointer, size, *[pointer] * 8]
    library.emulated_distances.argtypes = [*tokens, pointer, size, *[pointer] * 3]
    library.emulated_assign_accumulate.restype = library.emulated_distances.restype = ctypes.c_char_p
    return library


@pytest.fixture(autouse=True)
def screen_wanted(monkeypatch) -> None:
    monkeypatch.setenv("SPT_FAST_CUDA_SCREEN", "1")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    return build_emulated(tmp_path_factory.mktemp("emulated"), SHORTER)


def call_emulated(library, operation, tokens, centers, tensors):
    """Calls with the addresses of `tensors` (None: null) and a workspace, which must suffice."""
    groups, outer, inner, width = tokens.shape
    num_centers = centers.shape[1]
    measure = getattr(library, f"emulated_{operation}_workspace")
    size = measure(groups, outer * inner, width, num_centers)
    workspace = torch.full((size + CANARY,), 255, dtype=torch.uint8)
    start = -workspace.data_ptr() % 16  # malloc's alignment is not CUDA's
    workspace = torch.full((size + CANARY + start,), 255, dtype=torch.uint8)[start:]
    message = getattr(library, f"emulated_{operation}")(
        tokens.data_ptr(),
        DTYPE_CODES[tokens.dtype],
        (ctypes.c_int64 * 4)(*tokens.shape),
        (ctypes.c_int64 * 3)(*tokens.stride()[:3]),
        centers.data_ptr(),
        num_centers,
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        workspace.data_ptr(),
    )
    if message is not None:
        raise RuntimeError(message.decode())
    assert workspace[size:].eq(255).all(), "wrote behind the workspace"


def run_emulated(
    library, tokens, centers, shift=None, weights=None, rows=("labels", "distances"), shared=H100_SHARED
):
    """tokens [G, B, N, D] -> sums, counts, inertia, labels, distances; equal in either order of threads."""
    groups, outer, inner, width = tokens.shape
    num_centers, num_rows = centers.shape[1], outer * inner
    results = []
    for backwards in (False, True):
        sums = torch.full((groups, num_centers, width), torch.nan, dtype=torch.float64)
        counts = torch.full((groups, num_centers), torch.nan, dtype=torch.float64)
        inertia = torch.full((groups,), torch.nan, dtype=torch.float64)
        labels = torch.full((groups, num_rows), -7, dtype=torch.int32) if "labels" in rows else None
        distances = torch.full((groups, num_rows), torch.nan) if "distances" in rows else None
        outputs = (sums, counts, inertia, labels, distances)
        library.emulated_machine(shared, GENERATIONS[shared], backwards)
        call_emulated(library, "assign_accumulate", tokens, centers, (shift, weights, *outputs))
        results.append(outputs)
    for ours, again in zip(*results, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, again, rtol=0, atol=0, equal_nan=True)
    return results[0]


def run_emulated_distances(library, tokens, centers, shift=None):
    groups, outer, inner, _ = tokens.shape
    library.emulated_machine(H100_SHARED, 9, False)
    distances = torch.full((groups, outer * inner, centers.shape[1]), torch.nan)
    call_emulated(library, "distances", tokens, centers, (shift, distances))
    return distances


def assert_matches_reference(given, tokens, centers, shift, weights):
    """`given` against float64: labels and distances within the rounding band, the rest by our own labels.

    Without distances the tokens may have been screened.
    """
    found = assigned_deviations(given, tokens, centers, shift, weights)
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
        pytest.param(2, 1, 70, 0, 100, 20, BF16, False, id="G2-M70-D100-K20-bf16-4-byte-rows"),
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


# One read on Hopper: 33 to 128 centres, half types, no weights, no distances. Up to 192 columns a block.
SCREENED = pytest.mark.parametrize(
    ("groups", "images", "patches", "prefix", "width", "num_centers", "dtype"),
    [
        pytest.param(1, 1, 257, 0, 64, 33, BF16, id="G1-M257-D64-K33-bf16"),
        pytest.param(2, 3, 97, 1, 100, 40, BF16, id="G2-M291-D100-K40-bf16-4-byte-rows"),
        pytest.param(1, 2, 150, 0, 63, 65, FP16, id="G1-M300-D63-K65-fp16-odd-rows"),
        pytest.param(3, 2, 130, 2, 200, 112, FP16, id="G3-M260-D200-K112-fp16-2-blocks"),
        pytest.param(1, 1, 333, 0, 400, 100, BF16, id="G1-M333-D400-K100-bf16-4-blocks"),
        pytest.param(1, 2, 131, 1, 768, 128, BF16, id="G1-M262-D768-K128-bf16-4-blocks"),
        pytest.param(1, 1, 259, 0, 1030, 64, FP16, id="G1-M259-D1030-K64-fp16-8-blocks"),
    ],
)


@SCREENED
def test_emulated_screen_matches_reference(
    emulated, groups, images, patches, prefix, width, num_centers, dtype
):
    problem = make_problem(groups, images, patches, prefix, width, num_centers, dtype, False)
    given = run_emulated(emulated, *problem, rows=("labels",))
    assert_matches_reference(given, *problem)
    # An older GPU reads twice, and knows distances better.
    older = run_emulated(emulated, *problem, rows=("labels",), shared=A100_SHARED)
    assert not torch.equal(given[2], older[2])
    assert_matches_reference(older, *problem)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(86, 130), st.integers(0, 2)),
    width=st.integers(1, 260),
    num_centers=st.integers(33, 128),
    dtype=st.sampled_from([FP16, BF16]),
    seed=st.integers(0, 99),
)
def test_emulated_screen_matches_reference_at_any_size(emulated, shape, width, num_centers, dtype, seed):
    problem = make_problem(*shape, width, num_centers, dtype, False, seed)
    given = run_emulated(emulated, *problem, rows=("labels",))
    if shape[1] * shape[2] >= 256 and width > 3:  # fewer columns are full of ties
        assert_matches_reference(given, *problem)
    assert given[1].sum(1).tolist() == [shape[1] * shape[2]] * shape[0]


def clustered_problem(rows, width, num_centers, dtype):
    """Tokens around their centres, as k-means finds them, beside an outlier dimension."""
    generator = torch.Generator().manual_seed(4)
    centers = torch.randn(1, num_centers, width, generator=generator)
    centers[..., 3] += 500
    tokens = centers[:, torch.randint(num_centers, (rows,), generator=generator)]
    tokens = (tokens + torch.randn(1, rows, width, generator=generator)).to(dtype)[:, None]
    return tokens, centers, tokens.float().mean((1, 2)), None


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_emulated_screen_keeps_its_accuracy_beside_an_outlier_dimension(emulated, dtype):
    problem = clustered_problem(300, 130, 50, dtype)
    given = run_emulated(emulated, *problem, rows=("labels",))
    assert_matches_reference(given, *problem)
    exact = assign_accumulate_reference(problem[0][0].double(), problem[1].double())
    # Coordinates of 500 would cost float32 3e-5 of the inertia for each without the shift.
    torch.testing.assert_close(given[2], exact[2], rtol=1e-5, atol=0)


def test_emulated_screen_is_used_only_where_it_is_asked_for(emulated, monkeypatch):
    problem = make_problem(1, 1, 300, 0, 100, 40, BF16, False)
    screened = run_emulated(emulated, *problem, rows=())
    monkeypatch.delenv("SPT_FAST_CUDA_SCREEN")
    plain = run_emulated(emulated, *problem, rows=())
    assert not torch.equal(screened[2], plain[2])
    assert all(
        torch.equal(a, b) for a, b in zip(plain[:3], run_emulated(emulated, *problem)[:3], strict=True)
    )


def test_screen_decides_on_most_tokens_and_leaves_the_rest(tmp_path):
    library = build_emulated(tmp_path, SHORTER | {"listed[group] = begin + length": "listed[group] = 0"})
    problem = make_problem(1, 1, 300, 0, 100, 40, BF16, False)
    decided = run_emulated(library, *problem, rows=())[1].sum().item()
    assert 0.8 * 300 < decided < 300


def test_emulated_screen_gives_no_token_to_one_of_two_equal_centres_by_itself(emulated):
    tokens, centers, shift, _ = clustered_problem(300, 40, 40, BF16)
    centers[0, 20:] = centers[0, :20]
    _, counts, _, labels, _ = run_emulated(emulated, tokens, centers, shift, rows=("labels",))
    assert labels.max() < 20
    assert counts.sum() == 300


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_emulated_screen_shows_a_token_that_is_not_finite_in_the_inertia(emulated, value, dtype):
    tokens = torch.zeros(2, 1, 270, 4, dtype=dtype)
    tokens[1, 0, 266, 2] = value
    _, counts, inertia, labels, _ = run_emulated(emulated, tokens, torch.ones(2, 40, 4), rows=("labels",))
    assert inertia.tolist() == [1080.0, torch.inf]
    assert counts.sum(1).tolist() == [270.0, 270.0]
    assert labels.eq(0).all()


@pytest.mark.parametrize("scale", [1e-3, 6e4])
def test_emulated_screen_keeps_float16_centres_of_any_size(emulated, scale):
    tokens, centers, _, _ = make_problem(1, 1, 300, 0, 40, 50, FP32, False)
    tokens, centers = ((tokens - 3) * (scale / 6)).to(FP16), (centers - 3) * (scale / 6)
    given = run_emulated(emulated, tokens, centers, rows=("labels",))
    assert_matches_reference(given, tokens, centers, None, None)


@pytest.mark.parametrize("num_centers", [20, 100], ids=["one-read", "two-reads"])
def test_emulated_cuda_matches_reference_at_the_width_of_a_vit(emulated, num_centers):
    # One tile of 32 tokens and a part of one; all columns that a warp can own.
    problem = make_problem(1, 3, 15, 1, 768, num_centers, BF16, False)
    assert_matches_reference(run_emulated(emulated, *problem), *problem)


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


def test_emulated_cuda_clears_the_outputs_of_an_empty_input(emulated):
    sums, counts, inertia, _, _ = run_emulated(emulated, torch.zeros(2, 0, 5, 4), torch.ones(2, 3, 4))
    assert not sums.any()
    assert not counts.any()
    assert not inertia.any()


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


def check_after(tmp_path, change, problem, rows):
    library = build_emulated(tmp_path, SHORTER | change)
    assert_matches_reference(run_emulated(library, *problem, rows=rows), *problem)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("wait_copies<kOneReadStages - 1>();", "", id="wait-for-copies"),
        pytest.param(
            "tile, first_block, num_blocks);\n    __syncthreads();",
            "tile, first_block, num_blocks);",
            id="barrier-after-products",
        ),
        pytest.param(
            "(p, shape, group, row, end);\n    __syncthreads();",
            "(p, shape, group, row, end);",
            id="barrier-after-labels",
        ),
    ],
)
def test_emulation_sees_a_missing_barrier(tmp_path, old, new):
    problem = make_problem(1, 1, 70, 0, 200, 21, BF16, False)
    with pytest.raises(AssertionError):
        check_after(tmp_path, {old: new}, problem, ("labels", "distances"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("wait_copies<1>();\n    show", "show", id="wait-for-copies"),
        pytest.param(
            "    show_to_warpgroups();\n    __syncthreads();\n    copy", "    copy", id="show-copies"
        ),
        pytest.param("wait_products<1>();", "", id="wait-for-products"),
        pytest.param("    cluster_wait();\n    const", "    const", id="wait-for-cluster"),
        pytest.param(
            "    __syncthreads();\n    wait_products", "    wait_products", id="barrier-after-units"
        ),
    ],
)
def test_emulation_sees_a_missing_barrier_of_the_screen(tmp_path, old, new):
    problem = make_problem(1, 1, 400, 0, 200, 40, BF16, False)
    with pytest.raises((AssertionError, RuntimeError)):
        check_after(tmp_path, {old: new}, problem, ("labels",))


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
