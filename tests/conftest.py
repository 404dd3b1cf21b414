"""What all tests share: fixed seeds, poisoned memory, and tiny backbones with images for them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

# Read when torch is loaded: threads that wait sleep instead of spinning. The tests are many small ops, which
# take ten times as long where spinning threads keep each other from the cores of a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# With pytest-xdist, cores are shared by its processes.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when Triton is imported, by whatever comes first: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")
# The tests run the kernels themselves, checked or not, and leave the user's cache folder alone.
os.environ.setdefault("SPT_FAST_VERIFY", "0")

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import spt_fast

Batch = tuple[Tensor, Tensor]

# Flavours of timm's Vision Transformer that differ in which tokens enter the first block.
FLAVOURS: dict[str, dict[str, Any]] = {
    "class-token": {},
    "registers": {"reg_tokens": 4},
    "registers-no-class": {"class_token": False, "reg_tokens": 3, "global_pool": "avg"},
    "no-prefix": {"class_token": False, "global_pool": "avg"},
    "pre-norm": {"pre_norm": True},
    "no-embed-class": {"no_embed_class": True},
    "dynamic-size": {"dynamic_img_size": True},
    "attention-pool": {"global_pool": "map", "class_token": False},
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none; start every test with the same random numbers."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that memory read before it is written shows up."""
    if torch.cuda.is_available():
        # Deterministic algorithms, which the filling comes with, exist on the CPU but not for all CUDA ops.
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def waiting_refused() -> Callable[[], AbstractContextManager[None]]:
    """Contexts in which it is an error that the host waits for a GPU."""

    @contextmanager
    def context() -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                # It says once that this mode is a prototype, after it is on.
                warnings.simplefilter("ignore")
                torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context


@pytest.fixture(scope="session")
def child_environment() -> dict[str, str]:
    """Environment in which a fresh interpreter imports the package that is imported here, in any folder."""
    return {**os.environ, "PYTHONPATH": str(Path(spt_fast.__file__).resolve().parents[1])}


@pytest.fixture(params=list(FLAVOURS))
def flavour(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Keyword arguments of `make_vit`, one flavour of Vision Transformer after the other."""
    return FLAVOURS[request.param]


@pytest.fixture(scope="session")
def make_vit() -> Callable[..., VisionTransformer]:
    """Factory of random ViTs of width 32 and depth 3 for images of 32 x 32 in 16 patches; timm's options."""

    def make(
        *, model_class: type[VisionTransformer] = VisionTransformer, **options: Any
    ) -> VisionTransformer:
        sizes = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "num_classes": 5,
        }
        torch.manual_seed(1)
        return model_class(**{**sizes, **options})

    return make


@pytest.fixture(scope="session")
def make_random(make_vit: Callable[..., VisionTransformer]) -> Callable[..., VisionTransformer]:
    """`make_vit` in evaluation mode with every parameter random, so that a branch left out would show."""

    def make(**options: Any) -> VisionTransformer:
        model = make_vit(**options)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_vector = parameter.ndim == 1
                noise = torch.randn(parameter.shape, generator=generator) * (0.5 if is_vector else 0.15)
                parameter.copy_(noise + (1 if is_vector and name.endswith("weight") else 0))
        return model.eval()

    return make


# Where the host may look at numbers, by the end of the file's name and the function; and why.
MAY_WAIT = {
    ("support/waiting.py", "read"): "the numbers of a step or batch before, after the next one was queued",
    ("data/batches.py", "count_labels"): "labels are on the host still",
    ("data/batches.py", "count_given"): "labels are on the host still",
    ("data/batches.py", "_check_pixels"): "images are on the host still",
    ("methods/parameter_groups.py", "default_prompt_lr"): "once, before the first step",
    ("training/evaluation.py", "evaluate"): "labels and predictions are on the host",
    ("training/evaluation.py", "evaluate_classes"): "labels and predictions are on the host",
    ("clustering/token_stream.py", "start"): "once for each group, before its first batch",
    ("ops/cka.py", "_check_finite"): "one look at all tensors of an update, which may take in none of them",
    ("torch/optim/adam.py", "_multi_tensor_adam"): "AdamW counts its steps on the host",
    ("torch/optim/adam.py", "_single_tensor_adam"): "AdamW counts its steps on the host",
}


def check_may_wait(what: str) -> None:
    """AssertionError unless a caller is one of MAY_WAIT."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if any(code.co_filename.endswith(file) and code.co_name == name for file, name in MAY_WAIT):
            return
        frame = frame.f_back
    raise AssertionError(what)


class NoRoundTrips(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a number there, or a size that depends on it."""

    WAITING = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "_unique2",
        "repeat_interleave",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype is torch.bool for i in args[1]
        )
        to_host = (
            name == "_to_copy"
            and kwargs.get("device") == torch.device("cpu")
            and args[0].device.type != "cpu"
            and not kwargs.get("non_blocking")
        )
        if name in self.WAITING or masks or to_host:
            check_may_wait(f"{name} waits for the device")
        return func(*args, **kwargs)


@contextmanager
def _like_on_a_device() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, NoRoundTrips():
        patch.setattr("spt_fast.clustering.ordered.on_host", lambda values: False)
        patch.setattr("spt_fast.clustering.reservoir.on_host", lambda values: False)
        for name in ("cpu", "numpy", "tolist", "__array__"):
            method = getattr(Tensor, name)

            def look(*args: Any, method: Any = method, **options: Any) -> Any:
                check_may_wait("brought to the host")
                return method(*args, **options)

            patch.setattr(Tensor, name, look)
        yield


@pytest.fixture(scope="session")
def like_on_a_device() -> Callable[[], AbstractContextManager[None]]:
    """Contexts that take a GPU's paths on CPU tensors, and refuse to wait or to bring them to the host."""
    return _like_on_a_device


@pytest.fixture
def vit(make_vit: Callable[..., VisionTransformer]) -> VisionTransformer:
    """The ViT that `make_vit` gives without options."""
    return make_vit()


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Tensor]:
    """Factory of images [batch, 3, size, size] of normal noise, the same for the same seed."""

    def make(batch: int = 4, *, size: int = 32, seed: int = 0) -> Tensor:
        return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def make_loader() -> Callable[..., list[Batch]]:
    """Factory of loaders: lists of (images [B, 3, size, size], labels [B]) with structure in the images."""

    def make(num_images: int = 40, batch_size: int = 8, *, size: int = 32, seed: int = 0) -> list[Batch]:
        images, labels = structured_images(num_images, size, seed)
        return list(zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True))

    return make


@pytest.fixture
def loader(make_loader: Callable[..., list[Batch]]) -> list[Batch]:
    """40 images in 5 batches."""
    return make_loader()


RunScript = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run_script(
    tmp_path_factory: pytest.TempPathFactory, child_environment: dict[str, str]
) -> Iterator[RunScript]:
    """Run a script in a fork of a process that has imported torch, timm and the package: `fork_server.py`.

    `run(script, folder, *arguments, seconds=240)` gives exit code, standard output and standard error. For
    what hangs on the start of Python itself (its flags, the environment) start Python instead.
    """
    output = tmp_path_factory.mktemp("fork_server")
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(output)],
        env={**child_environment, "OMP_NUM_THREADS": "1"},
        cwd=output,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def run(
        script: str, folder: Path, *arguments: str, seconds: int = 240
    ) -> subprocess.CompletedProcess[str]:
        request = {"script": script, "arguments": arguments, "folder": str(folder), "seconds": seconds}
        print(json.dumps(request), file=server.stdin, flush=True)
        code = server.stdout.readline()
        assert code, "the fork server has ended"
        said, errors = ((output / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(script, int(code), said, errors)

    with server:
        yield run
        server.stdin.close()


# Runs behind a script that defines `work(rank)`. Each rank ends without the group's farewell, which waits for
# ranks that are gone.
_FORK_TWO_RANKS = """
import datetime as _datetime, os as _os, sys as _sys, traceback as _traceback
import torch as _torch, torch.distributed as _dist

def _run(rank):
    _torch.set_num_threads(1)
    store = _dist.FileStore("store", 2)
    timeout = _datetime.timedelta(seconds=60)
    _dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    work(rank)
    _dist.barrier()

def _fork(rank):
    child = _os.fork()
    if child:
        return child
    code = 1
    try:
        _run(rank)
        code = 0
    except BaseException:
        _traceback.print_exc()
    finally:
        _sys.stderr.flush()
        _os._exit(code)

_children = [_fork(rank) for rank in range(2)]
_sys.exit(any([_os.waitpid(child, 0)[1] for child in _children]))
"""


@pytest.fixture
def run_two_ranks(tmp_path: Path, run_script: RunScript) -> Callable[[str], None]:
    """Run a script's `work(rank)` in two gloo processes in `tmp_path`; errors of theirs fail the test."""

    def run(script: str) -> None:
        done = run_script(script + _FORK_TWO_RANKS, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def structured_images(num_images: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images whose 4 classes differ in the direction and the colour of their waves, and noise on top."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num_images,), generator=generator)
    position = torch.linspace(0, 6.28, size)
    angle = labels * 0.8 + 0.1 * torch.randn(num_images, generator=generator)
    across = angle.cos()[:, None, None] * position[None, :, None]
    along = angle.sin()[:, None, None] * position[None, None, :]
    phase = 6.28 * torch.rand(num_images, 1, 1, generator=generator)
    waves = torch.sin((labels[:, None, None] + 1) * (across + along) + phase)
    colours = torch.nn.functional.one_hot(labels % 3, 3)[:, :, None, None] + 0.3
    noise = 0.2 * torch.randn(num_images, 3, size, size, generator=generator)
    return waves[:, None] * colours + noise, labels


@pytest.fixture(scope="session")
def load_script() -> Callable[[Path], ModuleType]:
    """Makes a module of a script that is in no package, such as those in examples."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
