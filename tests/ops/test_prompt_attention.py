"""prompt_attention against its written-out reference in float64: values, gradients, bad input, tracing.

What is computed is tested for both sets of kernels: those of the CPU, and Triton's, in its interpreter where
there is no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from spt_fast.ops import prompt_attention_tiles as tiles
from spt_fast.ops import triton_support
from spt_fast.ops.accuracy import attention_bounds, in_float64, value_and_gradients, worst_error
from spt_fast.ops.accuracy import attention_inputs as make_inputs
from spt_fast.ops.prompt_attention import explain_backend, packed_prompt_attention, prompt_attention
from spt_fast.ops.prompt_attention_reference import prompt_attention_reference

Shape = tuple[int, int, int, int, int]  # B, H, N, N_p, d
CPU_SHAPES = [(2, 3, 17, 5, 8), (1, 1, 1, 1, 1), (3, 2, 65, 20, 16), (2, 12, 197, 100, 64), (2, 4, 10, 0, 8)]
# Every N, N_p and d of the grid of awkward ones, in pairs that differ; the interpreter is slow.
SHORT_SHAPES = [
    (2, 3, 1, 0, 32),
    (3, 1, 1, 100, 128),
    (1, 2, 5, 1, 72),
    (5, 2, 5, 20, 64),
    (2, 1, 63, 7, 80),
    (1, 2, 63, 0, 128),
    (19, 1, 3, 2, 16),
]
# In float32 tiles hold 32 rows at most: as many tiles of fewer rows, and some more for the last.
NARROW_SHAPES = [(1, 2, 197, 20, 64), (1, 1, 197, 7, 72), (1, 1, 257, 100, 32), (1, 1, 257, 1, 80)]
FLOAT32_SHAPES = [(1, 2, 69, 20, 64), (1, 1, 69, 7, 72), (1, 1, 97, 100, 32), (1, 1, 97, 1, 80)]
NARROW = [torch.bfloat16, torch.float16]
CASES = [
    *(("cpu", shape, dtype) for shape in CPU_SHAPES for dtype in (torch.float32, *NARROW)),
    *(("triton", shape, torch.float32) for shape in SHORT_SHAPES + FLOAT32_SHAPES),
    *(("triton", shape, NARROW[index % 2]) for index, shape in enumerate(SHORT_SHAPES + NARROW_SHAPES)),
]
needs_triton = pytest.mark.skipif(not triton_support.INSTALLED, reason="Triton is not installed")


def case_id(case: tuple[str, Shape, torch.dtype]) -> str:
    backend, shape, dtype = case
    return "{}-B{}-H{}-N{}-P{}-d{}-{}".format(backend, *shape, str(dtype).removeprefix("torch."))


@pytest.fixture(params=["cpu", pytest.param("triton", marks=needs_triton)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both sets of kernels, one after the other."""
    return use(request.param, monkeypatch)


def use(name: str, monkeypatch: pytest.MonkeyPatch, reason: str = "a test") -> str:
    """Let CPU tensors go to the code of this name."""
    if name == "triton" and not triton_support.INSTALLED:
        pytest.skip("Triton is not installed")
    if name != "cpu":
        monkeypatch.setattr("spt_fast.ops.prompt_attention.explain_backend", lambda *_: (name, reason))
    return name


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def assert_matches_reference(
    shape: Shape, dtype: torch.dtype, scale: float | None, device: str
) -> list[torch.Tensor]:
    """The output and the five gradients of `prompt_attention`, after the comparison."""
    inputs = make_inputs(shape, dtype, device=device)
    ours = value_and_gradients(prompt_attention, inputs, scale)
    bounds = attention_bounds(inputs, scale)
    for got, (name, (exact, bound)) in zip(ours, bounds.items(), strict=True):
        assert got.dtype == dtype
        assert got.shape == exact.shape
        assert worst_error(got, exact) <= bound, name
    return ours


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_forward_and_backward_match_reference(
    case: tuple[str, Shape, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, shape, dtype = case
    assert_matches_reference(shape, dtype, None, device_of(use(name, monkeypatch)))


def test_scale_is_honoured(backend: str) -> None:
    assert_matches_reference((2, 2, 17, 5, 16), torch.float32, 0.7, device_of(backend))


@pytest.mark.parametrize(
    ("scale", "error"),
    [("0.5", TypeError), ("x", TypeError), (True, TypeError), (math.nan, ValueError), (math.inf, ValueError)],
)
def test_scale_must_be_a_finite_number(scale: Any, error: type[Exception]) -> None:
    message = f"^scale must be a finite number, got {scale!r}$"
    with pytest.raises(error, match=message):
        prompt_attention(*make_inputs((2, 2, 9, 3, 8), torch.float32), scale=scale)
    with pytest.raises(error, match=message):
        packed_prompt_attention(*packed_inputs("cpu"), scale=scale)


def test_scale_may_change_in_compiled_code() -> None:
    inputs = make_inputs((2, 2, 9, 3, 8), torch.float32)
    compiled = torch.compile(prompt_attention, fullgraph=True, backend="aot_eager")
    for scale in (None, 0.5, 0.25):
        torch.testing.assert_close(compiled(*inputs, scale=scale), prompt_attention(*inputs, scale=scale))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(
        st.integers(1, 2),
        st.integers(1, 2),
        st.integers(1, 33),
        st.integers(0, 33),
        st.sampled_from([8, 16, 24]),
    ),
    seed=st.integers(0, 2**16),
)
def test_any_shape_matches_reference(backend: str, shape: Shape, seed: int) -> None:
    inputs = make_inputs(shape, torch.float32, seed, device_of(backend))
    oracle = value_and_gradients(prompt_attention_reference, in_float64(inputs), None)
    for got, exact in zip(value_and_gradients(prompt_attention, inputs, None), oracle, strict=True):
        assert worst_error(got, exact) <= 1e-5


@pytest.mark.parametrize("width", [1, 3, 24])
def test_odd_widths_match_reference_on_cpu(width: int) -> None:
    assert_matches_reference((2, 3, 11, 4, width), torch.float32, None, "cpu")


def test_without_prompts_it_is_plain_attention(backend: str) -> None:
    q, k, v, *none = make_inputs((2, 2, 19, 0, 16), torch.float32, device=device_of(backend))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(prompt_attention(q, k, v, *none), plain)


def surrounded(shape: tuple[int, ...], generator: torch.Generator, device: str) -> torch.Tensor:
    """Random numbers as a view of a larger tensor that is NaN all around."""
    outer = torch.full([size + 2 for size in shape[:-1]] + [shape[-1] + 16], float("nan"), device=device)
    inner = outer[tuple(slice(1, size + 1) for size in shape[:-1])][..., 8 : shape[-1] + 8]
    return inner.copy_(torch.randn(shape, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_beyond_the_arguments_is_read(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    device = device_of(backend)
    qkv = surrounded((2, 37, 3, 2, 24), generator, device).to(dtype).requires_grad_()
    prompts = [surrounded((2, 5, 24), generator, device).to(dtype).requires_grad_() for _ in range(2)]
    out = packed_prompt_attention(qkv, *prompts)
    grads = torch.autograd.grad(
        out, [qkv, *prompts], surrounded(tuple(out.shape), generator, device).to(dtype)
    )
    assert all(tensor.isfinite().all() for tensor in (out, *grads))


def test_rows_that_are_not_aligned(backend: str) -> None:
    values = torch.randn(2 * 9 * 3 * 2 * 8 + 1, device=device_of(backend))[1:]
    q, k, v = values.view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
    shared = torch.randn(2, 2, 3, 8, device=values.device).transpose(-1, -2).contiguous().transpose(-1, -2)
    oracle = prompt_attention_reference(*(tensor.double() for tensor in (q, k, v, *shared)))
    assert worst_error(prompt_attention(q, k, v, *shared), oracle) <= 1e-5


def packed_inputs(device: str, batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, 18, 3, 2, 16), (2, 5, 16), (2, 5, 16))
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def test_packed_form_equals_the_other(backend: str) -> None:
    qkv, *prompts = packed_inputs(device_of(backend))
    out = packed_prompt_attention(qkv, *prompts)
    other = prompt_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0), *prompts).transpose(1, 2).flatten(2)
    assert out.is_contiguous()
    assert torch.equal(out, other)
    cotangent = torch.randn_like(out)
    grads = [torch.autograd.grad(result, [qkv, *prompts], cotangent) for result in (out, other)]
    assert grads[0][0].is_contiguous()
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=["images-only", "prompts-only"])
def test_gradients_that_are_needed_do_not_depend_on_others(backend: str, needed: tuple[bool, bool]) -> None:
    inputs = packed_inputs(device_of(backend))
    cotangent = torch.randn(3, 18, 32).to(inputs[0].device)
    everything = torch.autograd.grad(packed_prompt_attention(*inputs), inputs, cotangent)
    inputs[0].requires_grad_(needed[0])
    for prompt in inputs[1:]:
        prompt.requires_grad_(needed[1])
    wanted = [index for index, tensor in enumerate(inputs) if tensor.requires_grad]
    some = torch.autograd.grad(packed_prompt_attention(*inputs), [inputs[i] for i in wanted], cotangent)
    for index, grad in zip(wanted, some, strict=True):
        torch.testing.assert_close(grad, everything[index])


class LargestResult(TorchDispatchMode):
    """Notes the most elements of a tensor that an operator has made, views not counted."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if not any(result.alias_info for result in func._schema.returns):
            for tensor in results if isinstance(results, tuple) else (results,):
                self.elements = max(self.elements, tensor.numel())
        return results


@pytest.mark.parametrize("needed", [True, False], ids=["images-too", "prompts-only"])
def test_no_gradient_of_images_is_made_without_need(backend: str, needed: bool) -> None:
    qkv, *prompts = packed_inputs(device_of(backend))
    out = packed_prompt_attention(qkv.requires_grad_(needed), *prompts)
    with LargestResult() as largest:
        out.sum().backward()
    assert (largest.elements >= qkv.numel()) == needed


@pytest.mark.parametrize("limit", [1, 2, 4, 5])
@needs_triton
def test_prompt_gradients_of_several_images_a_program(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """As where there are more heads of images than multiprocessors; the last program may have fewer."""
    monkeypatch.setattr("spt_fast.ops.prompt_attention_tiles.images_per_split", lambda *_: limit)
    qkv, *prompts = packed_inputs(device_of(use("triton", monkeypatch)), batch=5)
    ours = torch.autograd.grad(packed_prompt_attention(qkv.detach(), *prompts).square().sum(), prompts)
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in (qkv, *prompts)]
    images = exact[0].permute(2, 0, 3, 1, 4).unbind(0)
    expected = prompt_attention_reference(*images, *exact[1:]).square().sum()
    for mine, theirs in zip(ours, torch.autograd.grad(expected, exact[1:]), strict=True):
        assert worst_error(mine, theirs) <= 1e-5


def test_two_runs_give_the_same_bits(backend: str) -> None:
    inputs = make_inputs((2, 2, 33, 7, 16), torch.float32, device=device_of(backend))
    first, second = (value_and_gradients(prompt_attention, inputs, None) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("per_image", [False, True])
def test_each_image_gets_the_prompts_of_its_task(backend: str, per_image: bool) -> None:
    device = device_of(backend)
    q, k, v = torch.randn(3, 4, 2, 9, 16, device=device)
    tasks = 4 if per_image else 2
    prompt_k, prompt_v = torch.randn(2, tasks, 2, 5, 16, device=device)
    task = torch.arange(4, device=device) if per_image else torch.tensor([1, 0, 0, 1], device=device)
    together = prompt_attention(q, k, v, prompt_k, prompt_v, task=task)
    exact = (tensor.double().cpu() for tensor in (q, k, v, prompt_k, prompt_v))
    assert worst_error(together, prompt_attention_reference(*exact, task=task.cpu())) <= 1e-5
    qkv = torch.stack((q, k, v)).permute(1, 3, 0, 2, 4)
    packed = packed_prompt_attention(qkv, prompt_k, prompt_v, task=task)
    torch.testing.assert_close(packed, together.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["column", "every-second", "expanded"])
def test_tasks_may_lie_in_memory_as_they_like(backend: str, kind: str) -> None:
    device = device_of(backend)
    q, k, v = torch.randn(3, 4, 2, 9, 16, device=device)
    prompt_k, prompt_v = torch.randn(2, 3, 2, 5, 16, device=device)
    task = {
        "column": torch.tensor([[2, 0], [0, 1], [1, 1], [2, 2]], device=device)[:, 0],
        "every-second": torch.tensor([2, 0, 0, 1, 1, 1, 2, 2], device=device)[::2],
        "expanded": torch.tensor(2, device=device).expand(4),
    }[kind]
    assert not task.is_contiguous()
    exact = (tensor.double().cpu() for tensor in (q, k, v, prompt_k, prompt_v))
    expected = prompt_attention_reference(*exact, task=task.cpu())
    assert worst_error(prompt_attention(q, k, v, prompt_k, prompt_v, task=task), expected) <= 1e-5


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors start as NaN: whatever is not written, or is read before, shows."""
    # Without it, the reference's products raise on a GPU.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(was)


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("rows", "transposed", "prompts"),
    # Every two of the three meet.
    [(16, False, 20), (16, True, 0), (32, False, 0), (32, True, 20), (64, False, 20), (64, True, 0)],
    ids=[
        f"{tiles}-{order}"
        for tiles in ("three-tiles", "two-tiles", "one-tile")
        for order in ("rows", "columns")
    ],
)
def test_backward_kernel_for_any_number_of_key_tiles(
    rows: int, transposed: bool, prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = device_of(use("triton", monkeypatch))
    monkeypatch.setattr(tiles, "backward_tiles", lambda *_: tiles.Tiles(rows, 16, 4, 1, transposed))
    assert torch.randn(2, device=device).new_empty(2).isnan().all()
    shape = (2, 1, 45 - prompts, prompts, 24)
    first = assert_matches_reference(shape, torch.float32, None, device)
    inputs = make_inputs(shape, torch.float32, device=device)
    second = value_and_gradients(prompt_attention, inputs, None)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    for needed in (range(3), range(3, 5)):
        inputs = make_inputs(shape, torch.float32, device=device)
        for index, tensor in enumerate(inputs):
            tensor.requires_grad_(index in needed)
        prompt_attention(*inputs).square().sum().backward()
        exact = in_float64(inputs)
        prompt_attention_reference(*exact).square().sum().backward()
        for index in needed:
            assert worst_error(inputs[index].grad, exact[index].grad) <= 1e-5


@pytest.mark.filterwarnings("ignore:prompt_attention joins")
@pytest.mark.parametrize("num_prompts", [0, 5])
@pytest.mark.parametrize("name", ["cpu", pytest.param("triton", marks=needs_triton), "joined"])
def test_images_of_no_task_are_nan_where_tasks_are_not_read(
    name: str, num_prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code never looks at the values of a tensor, on the CPU as on a GPU."""
    device = device_of(use(name, monkeypatch))
    qkv, prompts = torch.randn(3, 9, 3, 2, 16), torch.randn(2, 2, 2, num_prompts, 16)
    qkv, prompt_k, prompt_v = qkv.to(device), *prompts.to(device)
    torch.compiler.reset()
    compiled = torch.compile(packed_prompt_attention, fullgraph=True, backend="eager")
    out = compiled(qkv, prompt_k, prompt_v, task=torch.tensor([1, 2, -1], device=device))
    torch.testing.assert_close(out[:1], packed_prompt_attention(qkv[:1], prompt_k[1], prompt_v[1]))
    assert out[1:].isnan().all()


def test_reference_passes_gradcheck() -> None:
    inputs = make_inputs((2, 2, 5, 3, 4), torch.float64)
    assert torch.autograd.gradcheck(prompt_attention_reference, inputs)
    assert torch.autograd.gradcheck(prompt_attention, inputs)


def test_strided_views_give_the_same_result() -> None:
    qkv = torch.randn(2, 11, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    prompt_k, prompt_v = torch.randn(5, 2, 4, 8).permute(1, 2, 0, 3).unbind(0)
    packed = [tensor.contiguous() for tensor in (q, k, v, prompt_k, prompt_v)]
    torch.testing.assert_close(prompt_attention(q, k, v, prompt_k, prompt_v), prompt_attention(*packed))


def test_batch_order_does_not_matter() -> None:
    q, k, v, prompt_k, prompt_v = (tensor.detach() for tensor in make_inputs((4, 2, 9, 3, 8), torch.float32))
    straight = prompt_attention(q, k, v, prompt_k, prompt_v)
    reversed_ = prompt_attention(q.flip(0), k.flip(0), v.flip(0), prompt_k, prompt_v)
    torch.testing.assert_close(reversed_.flip(0), straight)


def test_prompt_order_does_not_matter() -> None:
    q, k, v, prompt_k, prompt_v = (tensor.detach() for tensor in make_inputs((2, 2, 9, 6, 8), torch.float32))
    straight = prompt_attention(q, k, v, prompt_k, prompt_v)
    torch.testing.assert_close(prompt_attention(q, k, v, prompt_k.flip(1), prompt_v.flip(1)), straight)


@pytest.mark.parametrize("num_prompts", [0, 3])
def test_compiles_without_graph_break(num_prompts: int) -> None:
    inputs = make_inputs((2, 2, 9, num_prompts, 8), torch.float32)
    compiled = torch.compile(prompt_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), prompt_attention(*inputs))


def test_compiles_once_for_all_batch_sizes() -> None:
    _, *prompts = packed_inputs("cpu")
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(packed_prompt_attention, fullgraph=True, dynamic=True, backend=count)
    # None is as large as another dimension, which the compiler would take for the same one.
    for batch in (4, 6, 7):
        qkv = torch.randn(batch, 18, 3, 2, 16, requires_grad=True)
        ours, eager = compiled(qkv, *prompts), packed_prompt_attention(qkv, *prompts)
        torch.testing.assert_close(ours, eager)
        torch.testing.assert_close(
            *(torch.autograd.grad(result.square().sum(), qkv)[0] for result in (ours, eager))
        )
    assert len(graphs) == 1


# Torch's own check looks at gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)], ids=["all", "frozen-images", "frozen-prompts"])
def test_operators_pass_opcheck(backend: str, frozen: tuple[int, ...]) -> None:
    inputs = packed_inputs(device_of(backend), batch=2)
    for index in frozen:
        inputs[index].requires_grad_(False)
    qkv, *prompts = inputs
    torch.library.opcheck(torch.ops.spt_fast.packed_prompt_attention, (*inputs, None, 0.25))
    q, k, v = qkv.detach().permute(2, 0, 3, 1, 4).clone().unbind(0)
    for tensor in (q, k, v):
        tensor.requires_grad_(qkv.requires_grad)
    torch.library.opcheck(torch.ops.spt_fast.prompt_attention, (q, k, v, *prompts, None, 0.25))


def test_backward_operator_passes_opcheck(backend: str) -> None:
    q, k, v, *prompts = (
        tensor.detach() for tensor in make_inputs((2, 2, 9, 3, 16), torch.float32, device=device_of(backend))
    )
    out, lse = torch.ops.spt_fast.prompt_attention(q, k, v, *prompts, None, 0.25)
    for wanted in ((True, True), (True, False), (False, True)):
        arguments = (torch.randn_like(out), q, k, v, *prompts, out, lse, 0.25, *wanted)
        torch.library.opcheck(torch.ops.spt_fast.prompt_attention_backward, arguments)


def test_second_derivative_is_refused() -> None:
    inputs = packed_inputs("cpu")
    (grad,) = torch.autograd.grad(packed_prompt_attention(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="prompt_attention can be differentiated once only"):
        grad.sum().backward()


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)], ids=["all", "frozen-images", "frozen-prompts"])
def test_no_image_gives_no_rows_and_gradients_of_zero(backend: str, frozen: tuple[int, ...]) -> None:
    inputs = packed_inputs(device_of(backend))
    inputs[0] = inputs[0].detach()[:0].requires_grad_()
    for index in frozen:
        inputs[index].requires_grad_(False)
    out = packed_prompt_attention(*inputs)
    assert out.shape == (0, *packed_prompt_attention(*packed_inputs(device_of(backend))).shape[1:])
    out.sum().backward()
    for tensor in (tensor for tensor in inputs if tensor.requires_grad):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


def test_no_image_has_no_task() -> None:
    qkv, prompt_k, prompt_v = (tensor.detach() for tensor in packed_inputs("cpu"))
    task = torch.zeros(0, dtype=torch.int64)
    assert len(packed_prompt_attention(qkv[:0], prompt_k[None], prompt_v[None], task=task)) == 0


def test_meta_tensors_give_shapes() -> None:
    inputs = make_inputs((2, 3, 17, 5, 8), torch.bfloat16, device="meta")
    out = prompt_attention(*inputs)
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 17, 8), torch.bfloat16, "meta")
    out.sum().backward()
    assert [tensor.grad.shape for tensor in inputs if tensor.grad is not None] == [t.shape for t in inputs]


# What PyTorch loads for forward mode is compiled by its own deprecated means.
@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("name", ["q", "k", "v", "prompt_k", "prompt_v"])
def test_tangents_are_refused(name: str) -> None:
    names = ("q", "k", "v", "prompt_k", "prompt_v")
    inputs = dict(zip(names, make_inputs((2, 3, 5, 4, 8), torch.float32), strict=True))

    def of_one(tensor: torch.Tensor) -> torch.Tensor:
        return prompt_attention(**{**inputs, name: tensor})

    given = inputs[name].detach()
    with pytest.raises(ValueError, match=f"{name} must carry no tangent, got one: prompt_attention has no"):
        torch.func.jvp(of_one, (given,), (given,))


def test_tensors_without_tangent_are_taken_in_forward_mode() -> None:
    inputs = [tensor.detach() for tensor in make_inputs((2, 3, 5, 4, 8), torch.float32)]
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(prompt_attention(*inputs), prompt_attention(*inputs))


def test_operator_refuses_gradients_with_tasks() -> None:
    qkv, prompt_k, prompt_v = packed_inputs("cpu")
    task = torch.zeros(3, dtype=torch.int64)
    out, _ = torch.ops.spt_fast.packed_prompt_attention(qkv, prompt_k[None], prompt_v[None], task, 0.25)
    with pytest.raises(RuntimeError, match="for inference only"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("device", "dtype", "width", "name"),
    [
        ("cpu", torch.float32, 64, "cpu"),
        ("cpu", torch.float64, 7, "cpu"),
        ("mps", torch.float32, 64, "joined"),
        ("meta", torch.float32, 64, "meta"),
    ],
)
def test_backend_is_explained(device: str, dtype: torch.dtype, width: int, name: str) -> None:
    backend, reason = explain_backend(torch.device(device), dtype, width)
    assert backend == name
    assert reason


@pytest.mark.parametrize(
    ("dtype", "width", "reason"),
    [
        (torch.float64, 64, "float64"),
        (torch.float32, 144, "head width 144"),
        (torch.float16, 20, "head width 20"),
    ],
)
def test_kernels_do_not_take_everything(
    dtype: torch.dtype, width: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_support, "why_not", lambda device: "")
    backend, why = explain_backend(torch.device("cuda"), dtype, width)
    assert backend == "joined"
    assert reason in why


def test_falling_back_gives_the_same_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = packed_inputs("cpu")
    expected = packed_prompt_attention(*inputs)
    use("joined", monkeypatch, "a reason of this test")
    with pytest.warns(UserWarning, match="slower: a reason of this test"):
        torch.testing.assert_close(packed_prompt_attention(*inputs), expected)
    # Warnings are errors in these tests.
    q, k, v = inputs[0].permute(2, 0, 3, 1, 4).unbind(0)
    again = prompt_attention(q, k, v, *inputs[1:])
    torch.testing.assert_close(again.transpose(1, 2).flatten(2), expected)


def test_autocast_takes_mixed_dtypes() -> None:
    q, k, v, prompt_k, prompt_v = (tensor.detach() for tensor in make_inputs((2, 2, 9, 3, 8), torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = prompt_attention(q, k, v.bfloat16(), prompt_k, prompt_v.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), prompt_attention(q, k, v, prompt_k, prompt_v), atol=0.05, rtol=0.05
    )


BAD_INPUTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    ({"prompt_v": None}, TypeError, "prompt_v must be a tensor, got NoneType"),
    (
        {"q": torch.ones(2, 3, 5, 4, dtype=torch.int64)},
        TypeError,
        "q must be a floating-point tensor, got torch.int64",
    ),
    (
        {"q": torch.ones(3, 5, 4)},
        ValueError,
        r"q must have 4 dimensions \[B, H, N, d\], got shape \(3, 5, 4\)",
    ),
    ({"prompt_k": torch.ones(1, 3, 6, 4)}, ValueError, r"prompt_k must have 3 dimensions \[H, N_p, d\]"),
    (
        {"k": torch.ones(2, 3, 6, 4)},
        ValueError,
        r"k must have the shape of q, \(2, 3, 5, 4\), got \(2, 3, 6, 4\)",
    ),
    ({"v": torch.ones(1, 3, 5, 4)}, ValueError, "v must have the shape of q"),
    ({"prompt_k": torch.ones(2, 6, 4)}, ValueError, "prompt_k must have the 3 heads of q, got 2"),
    ({"prompt_v": torch.ones(3, 6, 8)}, ValueError, "prompt_v must have the head width of q, 4, got 8"),
    ({"prompt_v": torch.ones(3, 7, 4)}, ValueError, "equally many prompts, got 6 and 7"),
    (
        {"v": torch.ones(2, 3, 5, 4).double()},
        TypeError,
        "v must have the dtype of q, torch.float32, got torch.float64",
    ),
    ({"prompt_k": torch.ones(3, 6, 4).half()}, TypeError, "prompt_k must have the dtype of q"),
    (
        {"prompt_v": torch.ones(3, 6, 4, device="meta")},
        ValueError,
        "prompt_v must be on the device of q, cpu, got meta",
    ),
    ({"q": torch.ones(0, 3, 5, 4)}, ValueError, "k must have the shape of q"),
    (
        dict(zip(("q", "k", "v"), torch.ones(3, 2, 3, 0, 4), strict=True)),
        ValueError,
        r"q must hold at least one token of each image \[B, H, N, d\], got shape \(2, 3, 0, 4\)",
    ),
    ({"v": torch.ones(2, 3, 5, 4).to(torch.float8_e5m2)}, TypeError, "v must be float32, float16, bfloat16"),
    ({"task": torch.zeros(2, dtype=torch.int64)}, ValueError, r"prompt_k must have 4 dimensions \[T, H, N_p"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD_INPUTS, ids=[case[2][:40] for case in BAD_INPUTS]
)
def test_bad_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = dict(zip(("q", "k", "v"), torch.ones(3, 2, 3, 5, 4), strict=True))
    good |= dict(zip(("prompt_k", "prompt_v"), torch.ones(2, 3, 6, 4), strict=True))
    with pytest.raises(error, match=message):
        prompt_attention(**{**good, **change})


BAD_TASKS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"task": [0, 1]}, TypeError, "task must be a tensor, got list"),
    ({"task": torch.zeros(2)}, TypeError, "task must be torch.int64, got torch.float32"),
    ({"task": torch.zeros(3, dtype=torch.int64)}, ValueError, r"task must have shape \(2,\), one per image"),
    ({"task": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "task must be on cpu"),
    ({"task": torch.tensor([0, 4])}, ValueError, "task must be from 0 to 3, got 4"),
    ({"task": torch.tensor([-1, 0])}, ValueError, "task must be from 0 to 3, got -1"),
    ({"prompt_v": torch.ones(5, 3, 6, 4)}, ValueError, "equally many tasks, got 4 and 5"),
    (
        dict(zip(("prompt_k", "prompt_v"), torch.ones(2, 0, 3, 6, 4), strict=True)),
        ValueError,
        "at least one task, got none",
    ),
    (
        {"prompt_v": torch.ones(4, 3, 6, 4, requires_grad=True)},
        ValueError,
        "task must be None where gradients",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_TASKS, ids=[case[2][:40] for case in BAD_TASKS])
def test_bad_tasks_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = dict(zip(("q", "k", "v"), torch.ones(3, 2, 3, 5, 4), strict=True))
    good |= dict(zip(("prompt_k", "prompt_v"), torch.ones(2, 4, 3, 6, 4), strict=True))
    good["task"] = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(error, match=message):
        prompt_attention(**{**good, **change})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 2, 3, 4), r"qkv must be \[B, N, 3, H, d\], got shape \(2, 5, 2, 3, 4\)"),
        ((2, 5, 9, 4), "qkv must have 5 dimensions"),
        ((2, 0, 3, 3, 4), "qkv must hold at least one token of each image"),
    ],
)
def test_bad_packed_input_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_prompt_attention(torch.ones(shape), torch.ones(3, 6, 4), torch.ones(3, 6, 4))
