"""Runs the scenarios of test_distributed.py, each in as many gloo processes as it needs.

    python distributed_ranks.py FOLDER

Every rank of scenario S leaves FOLDER/S.RANK.pt: what S returned there, or the kind and text of its error.
The ranks are forks of this process, so that they need not import anything; it forks before it has threads.
Scenarios of one size share one group of processes, except those in which a rank is lost.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.distributed.launcher import LaunchConfig, elastic_launch
from torch.utils.data import TensorDataset

from spt_fast.analysis.nmi_tracker import NMITracker
from spt_fast.clustering import StreamingKMeans
from spt_fast.clustering.out_of_core import OutOfCoreKMeans
from spt_fast.clustering.reservoir import PriorityReservoir
from spt_fast.commands import main as cli
from spt_fast.data.loading import ImageLoader
from spt_fast.methods.prompted_vit import PromptedViT
from spt_fast.prototypes.build import build_prototypes
from spt_fast.prototypes.result import Prototypes
from spt_fast.prototypes.token_store import TokenStore
from spt_fast.support.distributed import Processes, find_processes
from spt_fast.training import Trainer
from spt_fast.training.recipe import Recipe

TIMEOUT = timedelta(minutes=5)  # waited for only where a test fails
SHORT = timedelta(seconds=3)  # where a rank stays silent on purpose
SECONDS_TO_LIVE = 900  # of a process that hangs

Batches = list[Tensor]
Scenario = Callable[[Path], Any]
# By the processes that run them: their number, and the first scenario of a group that cannot be shared.
LAUNCHES: dict[tuple[int, str], dict[str, Scenario]] = {}


def scenario(*sizes: int, loses_a_rank: bool = False) -> Callable[[Scenario], Scenario]:
    def register(function: Scenario) -> Scenario:
        for size in sizes:
            name = function.__name__ if len(sizes) == 1 else f"{function.__name__}_{size}"
            LAUNCHES.setdefault((size, name if loses_a_rank else ""), {})[name] = function
        return function

    return register


def make_vit() -> VisionTransformer:
    torch.manual_seed(1)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)


def make_batches(n: int = 7) -> Batches:
    """Batches of six images in one of six colours each, but for noise: tokens in clear clusters, in order."""
    generator = torch.Generator().manual_seed(0)
    colours = (4 * torch.randn(6, 3, 1, 1, generator=generator)).repeat_interleave(7, 0)[: 6 * n]
    images = colours + 0.3 * torch.randn(6 * n, 3, 32, 32, generator=generator)
    return list(images.split(6))


def mine(batches: Batches) -> Batches:
    """This rank's share: consecutive batches, unequal where they do not divide."""
    share = find_processes(None).share_of(len(batches))
    return batches[share.start : share.stop]


def build(batches: Any, **options: Any) -> dict[str, Any]:
    return facts(build_prototypes(make_vit(), batches, **{"num_prompts": 5, "progress": False, **options}))


def facts(built: Prototypes) -> dict[str, Any]:
    return {
        "prompts": built.prompts,
        "counts": built.counts,
        "mean_squared_distance": built.mean_squared_distance,
        "images": built.num_images,
        "tokens": built.num_tokens,
        "metadata": built.metadata,
    }


@scenario(1, 2, 3)
def exact(_: Path) -> Any:
    return build(mine(make_batches()), mode="exact")


@scenario(1, 3)
def exact_directions(_: Path) -> Any:
    return build(mine(make_batches()), mode="exact", metric="cosine")


@scenario(2)
def exact_from_the_file(_: Path) -> Any:
    return build(mine(make_batches()), mode="exact", memory_budget=0)


@scenario(3)
def exact_with_an_empty_rank(_: Path) -> Any:
    batches = make_batches()
    return build([batches[:3], [], batches[3:]][dist.get_rank()], mode="exact")


@scenario(3)
def exact_with_an_empty_first_rank(_: Path) -> Any:
    batches = make_batches()
    return build([[], batches[:5], batches[5:]][dist.get_rank()], mode="exact")


@scenario(1, 2, 3)
def exact_with_empty_clusters(_: Path) -> Any:
    """Starts far from every token: all but one centre have to be given tokens of whatever rank."""
    torch.manual_seed(0)
    tokens = torch.randn(999, 9) * torch.linspace(1, 20, 999)[:, None]
    processes = find_processes(None)
    share = processes.share_of(len(tokens))
    starts = 1e4 + torch.arange(4.0)[:, None] * torch.ones(9)
    with TokenStore(1, 0, chunk_bytes=1_000) as store:
        store.append(0, tokens[share.start : share.stop])
        fit = OutOfCoreKMeans(
            store.layer(0), 4, np.random.default_rng(0), starts=starts[None], processes=processes
        ).run()
    return {"centers": fit.centers, "counts": fit.counts, "inertia": fit.inertia, "n_iter": fit.n_iter}


@scenario(1, 2, 3)
def exact_with_and_without_pruning(_: Path) -> Any:
    """Many iterations of two restarts over overlapping clusters; the ranks' chunks are cut differently."""
    torch.manual_seed(0)
    tokens = 0.5 * torch.randn(9, 13)[torch.randint(9, (2_503,))] + torch.randn(2_503, 13)
    starts = torch.stack([tokens[:6], tokens[6:12]])
    processes = find_processes(None)
    share = processes.share_of(len(tokens))
    results: dict[str, Any] = {}
    with TokenStore(1, 30_000, chunk_bytes=[10_000, 70_000, 100][processes.rank]) as store:
        store.append(0, tokens[share.start : share.stop])
        for side in ("pruned", "plain"):
            fit = OutOfCoreKMeans(
                store.layer(0),
                6,
                np.random.default_rng(0),
                starts=starts,
                processes=processes,
                prune=side == "pruned",
            )
            for tol in (1.0, 1e-6):
                done = fit.run(tol)
            results |= {f"{side}_{key}": value for key, value in vars(done).items()}
    return results


@scenario(1, 2, 3)
def stream(_: Path) -> Any:
    return build(mine(make_batches()))


@scenario(2)
def stream_with_little_room(_: Path) -> Any:
    return build(mine(make_batches()), capacity=40, last_output=True)


@scenario(3)
def stream_with_an_empty_rank(_: Path) -> Any:
    batches = make_batches()
    return build([[], batches[:3], batches[3:]][dist.get_rank()])


@scenario(1, 2, 3)
def stream_of_sorted_tokens(_: Path) -> Any:
    """Far more tokens than are kept, each rank with clusters and a spread of its own; true inertia."""
    torch.manual_seed(0)
    means = 3 * torch.randn(60, 24)
    tokens = (means + 0.5 * torch.randn(1_000, 60, 24) * torch.linspace(0.2, 3, 60)[:, None]).transpose(0, 1)
    tokens = tokens.reshape(-1, 24)
    tokens[::5_000] *= 20
    processes = find_processes(None)
    share = processes.share_of(len(tokens))
    streaming = StreamingKMeans(8, capacity=8_000, seed=processes.rank)
    for batch in tokens[share.start : share.stop].split(700):
        streaming.partial_fit(batch)
    summary = streaming.merged_summary(processes, torch.device("cpu"))
    solved = summary.solve(8, processes=processes)
    squared = torch.cdist(tokens.double(), solved.centers[0].double()).square().amin(1)
    return {
        "inertia": float(squared.mean()),
        "estimate": float(solved.mean_squared_distance[0]),
        "total": float(summary.groups[0].weights.double().sum()),
        "kept": len(summary.groups[0]),
        "counts": float(solved.counts.sum()),
        "n": len(tokens),
    }


@scenario(3)
def merged_reservoir(_: Path) -> Any:
    """The merged sample, and the keys and importances of all tokens by which it can be checked."""
    rank, processes = dist.get_rank(), find_processes(None)
    rows = [500, 30, 1_200][rank]
    reservoir = PriorityReservoir(
        100, 1, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(rank)
    )
    twin = torch.Generator().manual_seed(rank)
    tokens = rank * 10_000 + torch.arange(float(rows))[:, None]
    importance = (
        0.1 + (rank + 1) * torch.rand(rows, generator=torch.Generator().manual_seed(9 + rank)).double()
    )
    reservoir.offer(tokens, importance, None)
    keys = (1 - torch.rand(rows, dtype=torch.float64, generator=twin)) / importance
    summary = reservoir.merged_summary(processes)
    return {
        "tokens": summary.tokens[:, 0],
        "weights": summary.weights,
        "mine": (tokens[:, 0], keys, importance),
    }


@scenario(2)
def strategies(_: Path) -> Any:
    batches = mine(make_batches())
    return {
        (strategy, seed): build(batches, strategy=strategy, seed=seed)
        for strategy in ("mean", "max", "random")
        for seed in range(6)
    }


@scenario(2)
def strategy_with_an_empty_rank(_: Path) -> Any:
    return [build([[], iter(make_batches())][dist.get_rank()], strategy="mean", seed=s) for s in range(3)]


@scenario(1, 2)
def exact_from_equal_parts(_: Path) -> Any:
    return build(mine(make_batches()), mode="exact", init="uniform")


@scenario(3)
def drawn_from_all_with_an_empty_rank(_: Path) -> Any:
    batches = make_batches()
    share = [batches[:3], [], batches[3:]][dist.get_rank()]
    return [build(share, strategy=strategy, sampling="all") for strategy in ("mean", "random")]


@scenario(3)
def max_images(_: Path) -> Any:
    return build(mine(make_batches()), max_images=8)


@scenario(3)
def max_images_for_fewer_than_all(_: Path) -> Any:
    return build(mine(make_batches()), max_images=2, mode="exact")


@scenario(2)
def nan_on_rank_1(_: Path) -> Any:
    """What is raised: pixels that are NaN, or finite pixels of 3e38 that make tokens which are not finite."""
    rank = dist.get_rank()
    errors = {}
    for name, value, options in (
        ("pixels", torch.nan, {}),
        ("stream", 3e38, {}),
        ("exact", 3e38, {"mode": "exact"}),
        ("mean", 3e38, {"strategy": "mean"}),
    ):
        batches = mine(make_batches())
        if rank == 1:
            batches[1][2] = value
        if name == "mean":
            batches = [[], batches[1:2]][rank]
        try:
            build(batches, **options)
        except ValueError as error:
            errors[name] = error
    return errors


@scenario(3)
def loader_fails_on_rank_2(_: Path) -> Any:
    def loader() -> Iterator[Tensor]:
        yield from mine(make_batches())
        if dist.get_rank() == 2:
            raise KeyError("no such image")

    return build(loader())


@scenario(2)
def no_image_anywhere(_: Path) -> Any:
    return {s: _caught(lambda s=s: build([], strategy=s)) for s in ("kmeans", "mean")}


@scenario(2)
def too_few_tokens(_: Path) -> Any:
    return build(make_batches(1), num_prompts=200)


@scenario(2)
def different_arguments(_: Path) -> Any:
    return build(mine(make_batches()), seed=dist.get_rank())


@scenario(2)
def bad_argument_on_rank_0(_: Path) -> Any:
    return build(mine(make_batches()), num_prompts=5 * dist.get_rank())


@scenario(2)
def nmi_file_is_there_already(folder: Path) -> Any:
    tracker = NMITracker(PromptedViT(make_vit(), 2, num_classes=0))
    (folder / "nmi.csv").touch()
    return _caught(lambda: tracker.to_csv(folder / "nmi.csv"))


def train(**options: Any) -> dict[str, Any]:
    """25 images in batches of 7, of which the last has 4: three ranks, and then five, share them."""
    processes = find_processes(None)
    images = TensorDataset(torch.cat(make_batches())[:25], torch.arange(25) % 5)
    share = {"num_images": 25, "seed": 3, "processes": processes}
    train = ImageLoader(images, batch_size=7, shuffle=True, in_step=True, **share)
    val = ImageLoader(images, batch_size=4, **share)
    tuned = PromptedViT(make_vit(), torch.full((2, 3, 32), 0.3), num_classes=5)
    recipe = Recipe(epochs=3, lr=1e-2, ema=0.8, **options)
    trainer = Trainer(tuned, train, val, recipe, processes=processes, progress=False)
    history = trainer.run()
    assert trainer.evaluation is not None
    return {
        "loss": history.loss,
        "val_accuracy": history.val_accuracy,
        "ema_accuracy": history.ema_accuracy,
        "counts": trainer.evaluation.counts,
        **tuned.learned_state_dict(),
    }


@scenario(1, 2, 3, 5)
def training(_: Path) -> Any:
    return train()


@scenario(1, 2)
def training_in_parts(_: Path) -> Any:
    return train(accumulate=3, clip_grad=0.5, label_smoothing=0.1)


@scenario(2)
def training_with_a_nan_on_one_rank(_: Path) -> Any:
    images = torch.cat(make_batches())[:12].clone()
    images[5] = torch.nan
    dataset = TensorDataset(images, torch.arange(12) % 5)
    processes = find_processes(None)
    loader = ImageLoader(dataset, num_images=12, batch_size=4, processes=processes, in_step=True)
    tuned = PromptedViT(make_vit(), torch.full((2, 3, 32), 0.3), num_classes=5)
    return _caught(Trainer(tuned, loader, recipe=Recipe(epochs=1), processes=processes, progress=False).run)


@scenario(3)
def part_of_the_processes(_: Path) -> Any:
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return _caught(lambda: build(make_batches(), process_group=group))
    rank = dist.get_rank(group)
    return build(make_batches()[rank::2], process_group=group, mode="exact")


@scenario(3, loses_a_rank=True)
def rank_dies_in_the_pass(_: Path) -> Any:
    def loader() -> Iterator[Tensor]:
        for batch in mine(make_batches()):
            yield batch
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    return build(loader())


@scenario(2, loses_a_rank=True)
def rank_dies_in_an_iteration(_: Path) -> Any:
    whole, sweeps = TokenStore.chunks, itertools.count(1)

    def dying(*args: Any) -> Iterator[Tensor]:
        # The sweeps before are for the mean, the sample of the starts and the first assignment.
        if next(sweeps) == 4 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args)

    TokenStore.chunks = dying  # type: ignore[method-assign]
    return build(mine(make_batches()), mode="exact")


@scenario(2, loses_a_rank=True)
def rank_stays_silent(folder: Path) -> Any:
    dist.barrier()
    group = dist.new_group(timeout=SHORT)
    if dist.get_rank() == 1:
        # It outlives rank 0, whose call can therefore only have been ended by the timeout.
        while not _outcome(folder, "rank_stays_silent", 0).exists():
            time.sleep(0.05)
        os._exit(0)
    return build(mine(make_batches()), process_group=group)


COMMAND = ("prototypes", "--model=shipped", "--data=digits", "--num-prompts=3", "--device=cpu")


@scenario(3)
def command_line(folder: Path) -> Any:
    base = (*COMMAND, "--max-images=13")
    out = str(folder / "prototypes.safetensors")
    code, printed = _printed(*base, "--batch-size", "4", "--out", out)
    dist.barrier()
    again = cli.main([*base, "--out", out])  # it is there already
    missing = cli.main([*base, "--out", str(folder / "other"), "--checkpoint", "no_such_file"])
    return {"codes": (code, again, missing), "printed": printed}


def under_torchrun(folder: Path) -> None:
    """The command line in two processes, started by the launcher behind torchrun."""
    signal.alarm(SECONDS_TO_LIVE)
    options = (*COMMAND, "--max-images=24", "--mode=exact", "--batch-size=12", "--out")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="test",
        max_restarts=0,
        start_method="fork",
    )
    ranks = elastic_launch(config, _printed)(*options, str(folder / "two"))
    torch.save([ranks[0], ranks[1]], folder / "under_torchrun.pt")


def _printed(*arguments: str) -> tuple[int, str]:
    """Exit code and standard output of the command line."""
    torch.set_num_threads(1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(arguments)
    return code, printed.getvalue()


def _caught(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        return type(error).__name__, str(error)


def _outcome(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}.{rank}.pt"


def _run_rank(scenarios: dict[str, Scenario], size: int, rank: int, folder: Path) -> None:
    signal.alarm(SECONDS_TO_LIVE)
    torch.set_num_threads(1)
    if size > 1:
        store = dist.FileStore(str(folder / f"{next(iter(scenarios))}.store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    for name, function in scenarios.items():
        torch.save(_caught(partial(function, folder)), _outcome(folder, name, rank))


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        # Skips the group's own shutdown, which waits for ranks that are gone.
        os._exit(code)


def main() -> None:
    folder = Path(sys.argv[1])
    for (size, _), scenarios in LAUNCHES.items():
        for child in [_fork(partial(_run_rank, scenarios, size, rank, folder)) for rank in range(size)]:
            os.waitpid(child, 0)
    os.waitpid(_fork(partial(under_torchrun, folder)), 0)


if __name__ == "__main__":
    assert isinstance(find_processes(None), Processes)
    main()
