"""`build_prototypes`: prompts from one pass of a frozen backbone over a loader of images (Sec. 3.3, 3.4)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from spt_fast.backbones.anatomy import unwrap
from spt_fast.backbones.identity import describe, readable
from spt_fast.clustering import StreamingKMeans
from spt_fast.clustering.lloyd import LloydResult
from spt_fast.clustering.out_of_core import OutOfCoreKMeans
from spt_fast.clustering.streaming import resolve_capacity
from spt_fast.prototypes.backbone_pass import BackbonePass
from spt_fast.prototypes.pooling import POOLS, pool
from spt_fast.prototypes.result import Prototypes
from spt_fast.prototypes.side_stream import SideStream
from spt_fast.prototypes.token_store import TokenStore
from spt_fast.support.arguments import (
    SEED_LIMIT,
    check_bool,
    check_choice,
    check_int,
    check_seed,
    parse_bytes,
)
from spt_fast.support.distributed import Processes, find_processes
from spt_fast.support.versions import version_facts
from spt_fast.support.waiting import first_true

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STRATEGIES = ("kmeans", *POOLS)
MODES = ("stream", "exact")
# Prompt lengths of the paper (Sec. 3.4, remark I).
DEFAULT_NUM_PROMPTS = {"deep": 20, "shallow": 100}
DEFAULT_MEMORY_BUDGET = "4GiB"


def build_prototypes(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_prompts: int | None = None,
    depth: Literal["deep", "shallow"] = "deep",
    strategy: Literal["kmeans", "mean", "max", "random"] = "kmeans",
    capacity: int | None = None,
    mode: Literal["stream", "exact"] = "stream",
    max_images: int | None = None,
    amp_dtype: torch.dtype | None = None,
    memory_budget: int | str | None = None,
    seed: int = 0,
    last_output: bool = False,
    process_group: ProcessGroup | None = None,
    progress: bool = True,
) -> Prototypes:
    """Build prompts for `model` from the patch tokens of the images in `loader`.

    The model runs once, where it is, and stops before the work of its last block. It comes back as it was,
    also after an exception or Ctrl-C. Class and register tokens are left out; position embeddings are in
    (eq. 1).

    Where torch.distributed is initialised (torchrun), every rank of the group has to call this, with the same
    arguments but its own model and its own share of the images, which may be empty. Each rank gets the same
    prototypes of all images. An error on one rank is raised on all.

    Args:
        model: a timm Vision Transformer, or any module whose `.blocks` map tokens [B, N, D] to [B, N, D].
        loader: any iterable of batches: image tensors [B, C, H, W] of a floating-point dtype, tuples or lists
            whose first item is one, or dicts with "pixel_values", "image" or "images". It is read once.
        num_prompts: N_p, prompts per layer; None is the paper's number, 20 for "deep" and 100 for "shallow".
        depth: "deep", from the inputs of every block (eq. 13), or "shallow", of block 1 only (eq. 11).
        strategy: "kmeans" (eq. 9, 10) over the tokens of all images, or one of Sec. 3.4 over the tokens of a
            single batch, drawn at random: "mean" or "max" of windows of floor(N_e B / N_p) tokens, or
            "random", a sample of N_p tokens.
        capacity: for "stream" only: tokens kept per layer; None is max(20_000, 500 * num_prompts).
        mode: for "kmeans" only: "stream" sees every token once and keeps `capacity` of them; "exact" keeps
            all tokens and runs Lloyd's algorithm on them to convergence, from one k-means++ start
            (scikit-learn's default).
        max_images: stop after this many images, which several ranks share evenly; None is the whole loader.
        amp_dtype: autocast dtype; None is bfloat16 on CUDA and the model's own dtype elsewhere.
        memory_budget: for "exact" only: memory in which this process keeps tokens, on the device and on the
            host together, in bytes or as text such as "800 MB"; None is "4GiB". On CUDA, up to half of the
            free device memory is used first, then pinned host memory. Other tokens go to a temporary file.
            Not in the budget are the model and its batch, chunks of 16 MiB (two on the host, and three on a
            CUDA device) and, for one layer at a time, first a sample of max(65_536, 256 * num_prompts) tokens
            with their distances, then, on the CPU only, bounds: 14 bytes a token and 4 more for every 16
            prompts (12 without AVX2).
        seed: of everything drawn here, 0 to 2**63 - 1. The same seed, batches and machine give the same
            prototypes.
        last_output: also make prototypes of the last block's output, for `Prototypes.repeat_last_output`; the
            last block then has to run.
        process_group: the ranks that work together; None is all of them where torch.distributed is
            initialised, and this process alone elsewhere.
        progress: show a bar with images/s, on rank 0.

    Raises:
        TypeError: `model` has no blocks of the kind above, a batch holds no floating-point images, or an
            argument has the wrong type.
        ValueError: an argument has a value that is not allowed, or that the strategy or the mode would
            ignore; the loader is empty; images do not fit the model; there are fewer tokens than prompts.
        NonFiniteError: pixels or tokens are NaN or infinite, or tokens too large to be squared in float32.
            `image` is counted from 0 over the loader of the rank that found it; `layer` is set for tokens.
        OSError: "exact" finds no room for its temporary file.
        RuntimeError: another rank died, or did not answer within the group's timeout.
    """
    processes = find_processes(process_group)
    with processes.together():
        check_choice("depth", depth, DEFAULT_NUM_PROMPTS)
        check_choice("strategy", strategy, STRATEGIES)
        check_choice("mode", mode, MODES)
        if strategy != "kmeans" and mode != "stream":
            raise ValueError(f"mode={mode!r} is for strategy='kmeans', got strategy={strategy!r}")
        if num_prompts is None:
            num_prompts = DEFAULT_NUM_PROMPTS[depth]
        num_prompts = check_int("num_prompts", num_prompts, 1)
        capacity = _choose_capacity(capacity, num_prompts, strategy, mode)
        budget = _choose_budget(memory_budget, strategy, mode)
        max_images = None if max_images is None else check_int("max_images", max_images, 1)
        seed = check_seed(seed)
        last_output = check_bool("last_output", last_output)
        progress = check_bool("progress", progress)
        backbone = BackbonePass(
            model,
            loader,
            processes,
            max_images=max_images,
            progress=progress,
            depth=depth,
            last_output=last_output,
            amp_dtype=amp_dtype,
        )
        metadata = {
            "strategy": strategy,
            **({"mode": mode} if strategy == "kmeans" else {}),
            **({"capacity": str(capacity)} if capacity is not None else {}),
            "prompt_depth": depth,
            "seed": str(seed),
            **({"processes": str(processes.size)} if processes.size > 1 else {}),
            **describe(unwrap(model)),
            **version_facts("spt_fast", "torch", "timm"),
        }
    processes.check_same(
        {
            "num_prompts": num_prompts,
            "max_images": max_images,
            "last_output": last_output,
            **readable(metadata),
        }
    )
    if strategy != "kmeans":
        return _from_one_batch(backbone, num_prompts, strategy, seed, metadata)
    if mode == "exact":
        return _from_all_tokens(backbone, num_prompts, budget, seed, metadata)
    return _from_stream(backbone, num_prompts, capacity, seed, metadata)


def _from_stream(
    backbone: BackbonePass, num_prompts: int, capacity: int | None, seed: int, metadata: dict[str, str]
) -> Prototypes:
    """K-means by a single look at each token."""
    processes = backbone.processes
    clusters = StreamingKMeans(
        num_prompts,
        n_groups=backbone.n_layers,
        capacity=capacity,
        seed=_seed_of_rank(seed, processes.rank),
    )
    backbone.run(
        lambda layer, tokens: clusters.partial_fit_unchecked(tokens, layer),
        SideStream(backbone.device) if backbone.device.type == "cuda" else None,
    )
    backbone.check_enough_tokens(num_prompts)
    if processes.size == 1:
        summary = clusters.summary()
    else:
        summary = replace(clusters.merged_summary(processes, backbone.device), seed=seed)
    with _layer_bar(backbone) as bar:
        # The other ranks solve their share of the layers meanwhile.
        solved = summary.solve(num_prompts, on_group=partial(bar.update, processes.size), processes=processes)
    return backbone.result(solved.centers, solved.counts, solved.inertia, metadata=metadata, summary=summary)


def _from_all_tokens(
    backbone: BackbonePass, num_prompts: int, budget: int, seed: int, metadata: dict[str, str]
) -> Prototypes:
    """K-means by Lloyd's algorithm, each layer on its own over all of its tokens."""
    with TokenStore(backbone.n_layers, budget, backbone.device) as store:

        def keep(layer: int, tokens: Tensor) -> Tensor:
            store.append(layer, tokens)
            return _first_unfit(tokens)

        backbone.run(keep)
        backbone.check_enough_tokens(num_prompts)
        fitted = []
        with _layer_bar(backbone) as bar:
            for layer in range(backbone.n_layers):
                fitted.append(_fit_exactly(store, layer, num_prompts, seed, backbone.processes))
                bar.update()
    return backbone.result(
        torch.stack([fit.centers for fit in fitted]),
        torch.stack([fit.counts for fit in fitted]),
        torch.tensor([fit.inertia for fit in fitted], dtype=torch.float64),
        metadata=metadata,
    )


def _fit_exactly(
    store: TokenStore, layer: int, num_prompts: int, seed: int, processes: Processes
) -> LloydResult:
    """Cluster the tokens of one layer, which the store forgets afterwards."""
    with processes.together():
        store.load(layer)
    rng = np.random.default_rng([seed, 0])
    fitted = OutOfCoreKMeans(store.layer(layer), num_prompts, rng, processes=processes).run()
    store.release(layer)
    return fitted


def _from_one_batch(
    backbone: BackbonePass, num_prompts: int, strategy: str, seed: int, metadata: dict[str, str]
) -> Prototypes:
    """Windows or a sample of the tokens of one random batch (Sec. 3.4)."""
    generator = torch.Generator().manual_seed(seed)
    pooled: list[tuple[Tensor, ...]] = []

    def pool_layer(_: int, tokens: Tensor) -> Tensor:
        backbone.check_enough_tokens(num_prompts, "the batch drawn from loader")
        made = pool(strategy, tokens.flatten(0, 1).float(), num_prompts, generator)
        pooled.append(tuple(values.cpu() for values in made))
        return _first_unfit(tokens)

    owner = backbone.run_one_batch(pool_layer, generator)
    layers = backbone.processes.gather(pooled)[owner]
    prompts, counts, inertia = (torch.stack(values) for values in zip(*layers, strict=True))
    return backbone.result(prompts, counts, inertia, metadata=metadata)


def _layer_bar(backbone: BackbonePass) -> tqdm[Any]:
    return tqdm(total=backbone.n_layers, desc="clustering", unit=" layers", disable=not backbone.progress)


def _seed_of_rank(seed: int, rank: int) -> int:
    """Ranks draw independently of each other; rank 0 as a single process would."""
    return seed if rank == 0 else int(np.random.default_rng([seed, rank]).integers(SEED_LIMIT - 1))


def _first_unfit(tokens: Tensor) -> Tensor:
    """The first row of [B, N_e, D] with which a squared distance may be infinite in float32, or -1; int64."""
    # |a - b|^2 <= D (2 max |x|)^2.
    limit = math.sqrt(torch.finfo(torch.float32).max / tokens.shape[-1]) / 2
    # The extremes are NaN if any number is; unlike a mask, they need no memory.
    low, high = tokens.amin(-1).float(), tokens.amax(-1).float()
    return first_true(~((-limit <= low) & (high <= limit)))


def _choose_capacity(capacity: int | None, num_prompts: int, strategy: str, mode: str) -> int | None:
    """Tokens kept per layer, or None where none are kept."""
    if not _has_effect("capacity", capacity, "stream", strategy, mode):
        return None
    return resolve_capacity(capacity, num_prompts, "num_prompts")


def _choose_budget(memory_budget: int | str | None, strategy: str, mode: str) -> int:
    """Bytes of tokens to keep in memory."""
    if not _has_effect("memory_budget", memory_budget, "exact", strategy, mode):
        return 0
    return parse_bytes("memory_budget", DEFAULT_MEMORY_BUDGET if memory_budget is None else memory_budget)


def _has_effect(argument: str, value: object, its_mode: str, strategy: str, mode: str) -> bool:
    """Whether `argument`, an option of one mode of k-means, has an effect; ValueError where it has none."""
    if strategy == "kmeans" and mode == its_mode:
        return True
    if value is not None:
        raise ValueError(
            f"{argument} is for strategy='kmeans' with mode={its_mode!r}, "
            f"got {value!r} for strategy={strategy!r} with mode={mode!r}"
        )
    return False
