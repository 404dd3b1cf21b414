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

from spt_fast.backbones.anatomy import unwrap
from spt_fast.backbones.identity import describe, readable
from spt_fast.clustering import StreamingKMeans
from spt_fast.clustering.lloyd import LloydResult
from spt_fast.clustering.out_of_core import OutOfCoreKMeans
from spt_fast.prototypes.backbone_pass import BackbonePass
from spt_fast.prototypes.directions import METRICS, Directions
from spt_fast.prototypes.drawn import DrawnFromAll
from spt_fast.prototypes.options import (
    DEFAULT_NUM_PROMPTS,
    MODES,
    SAMPLINGS,
    STRATEGIES,
    ExactOptions,
    choose_capacity,
    choose_exact,
    choose_token_dtype,
)
from spt_fast.prototypes.pooling import POOLS, pool
from spt_fast.prototypes.result import Prototypes, layer_bar
from spt_fast.prototypes.side_stream import SideStream
from spt_fast.prototypes.token_store import TokenStore
from spt_fast.support.arguments import SEED_LIMIT, check_bool, check_choice, check_int, check_seed
from spt_fast.support.distributed import Processes, find_processes
from spt_fast.support.versions import version_facts
from spt_fast.support.waiting import first_true

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def build_prototypes(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_prompts: int | None = None,
    depth: Literal["deep", "shallow"] = "deep",
    strategy: Literal["kmeans", "mean", "max", "random"] = "kmeans",
    metric: Literal["euclidean", "cosine"] = "euclidean",
    capacity: int | None = None,
    mode: Literal["stream", "exact"] = "stream",
    init: Literal["k-means++", "random", "uniform"] | None = None,
    n_init: int | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
    sampling: Literal["batch", "all"] = "batch",
    position_embedding: bool = True,
    max_images: int | None = None,
    amp_dtype: torch.dtype | None = None,
    token_dtype: torch.dtype | None = None,
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
            "random", a sample of N_p tokens. `sampling` changes that.
        metric: for "kmeans" only: "cosine" clusters the directions of the tokens, their lengths set to 1.
            That is what the norm of a block leaves of a prompt, but for its mean over the channels.
            Prototypes then have the mean length of the tokens of their layer, and `inertia` is that of the
            directions.
        capacity: for "stream" only: tokens kept per layer; None is max(20_000, 500 * num_prompts).
        mode: for "kmeans" only: "stream" sees every token once and keeps `capacity` of them; "exact" keeps
            all tokens and runs Lloyd's algorithm on them until `tol` or `max_iter` ends it.
        init, n_init, tol, max_iter: for "exact" only, as in `KMeans`: where Lloyd starts ("uniform" is our
            reading of the paper's uniform partition: the means of K consecutive parts of the data, equal in
            size), from how many starts, and when it stops. None is k-means++, 1, 1e-4 and 300, scikit-learn's
            defaults.
        sampling: for "mean", "max" and "random" only: "batch", the paper's (Sec. 3.4), or "all", as the
            released code does: N_p of the tokens of all images at random, or N_p of the windows of all
            images. A window is then floor(N_e / (N_p - 1)) tokens of one image, or what these leave over.
            `counts` and `inertia` are then estimates from a sample of 4,096 tokens.
        position_embedding: False takes the tokens of block 1 before the position embedding is added, as the
            released code does, and not as eq. 1 has them; those of later blocks are the same.
        max_images: stop after this many images, which several ranks share evenly; None is the whole loader.
        amp_dtype: autocast dtype; None is bfloat16 on CUDA and the model's own dtype elsewhere.
        token_dtype: for "kmeans" only: what tokens are rounded to before they are clustered; None is bfloat16
            on CUDA, unless `amp_dtype` is torch.float32, and the dtype that the model gives them elsewhere.
            Prompts are float32 in any case.
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
        check_choice("metric", metric, METRICS)
        if strategy != "kmeans" and metric != "euclidean":
            raise ValueError(f"metric={metric!r} is for strategy='kmeans', got strategy={strategy!r}")
        if strategy != "kmeans" and mode != "stream":
            raise ValueError(f"mode={mode!r} is for strategy='kmeans', got strategy={strategy!r}")
        if num_prompts is None:
            num_prompts = DEFAULT_NUM_PROMPTS[depth]
        num_prompts = check_int("num_prompts", num_prompts, 1)
        capacity = choose_capacity(capacity, num_prompts, strategy, mode)
        exact = choose_exact(memory_budget, init, n_init, tol, max_iter, strategy=strategy, mode=mode)
        check_choice("sampling", sampling, SAMPLINGS)
        if sampling != "batch" and strategy == "kmeans":
            raise ValueError(f"sampling is for strategy {', '.join(map(repr, POOLS))}, got {sampling!r}")
        position_embedding = check_bool("position_embedding", position_embedding)
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
            position_embedding=position_embedding,
            last_output=last_output,
            amp_dtype=amp_dtype,
        )
        token_dtype = choose_token_dtype(token_dtype, amp_dtype, strategy, backbone.device)
        metadata = {
            "strategy": strategy,
            **({"mode": mode} if strategy == "kmeans" else {}),
            **({"metric": metric} if metric != "euclidean" else {}),
            **({"capacity": str(capacity)} if capacity is not None else {}),
            **(exact.facts() if exact is not None else {}),
            **({"sampling": sampling} if strategy != "kmeans" else {}),
            **({} if position_embedding else {"position_embedding": "False"}),
            "prompt_depth": depth,
            "seed": str(seed),
            **({"token_dtype": str(token_dtype)[6:]} if token_dtype is not None else {}),
            **({"processes": str(processes.size)} if processes.size > 1 else {}),
            **describe(unwrap(model)),
            **version_facts("spt_fast", "torch", "timm"),
        }
    processes.check_same(
        {
            "num_prompts": num_prompts,
            "max_images": max_images,
            "last_output": last_output,
            "position_embedding": position_embedding,
            "amp_dtype": str(amp_dtype),
            **readable(metadata),
        }
    )
    if sampling == "all":
        return _drawn_from_all(backbone, num_prompts, strategy, seed, metadata)
    if strategy != "kmeans":
        return _from_one_batch(backbone, num_prompts, strategy, seed, metadata)
    if exact is not None:
        return _from_all_tokens(backbone, num_prompts, exact, token_dtype, seed, metadata)
    return _from_stream(backbone, num_prompts, capacity, token_dtype, seed, metadata)


def _from_stream(
    backbone: BackbonePass,
    num_prompts: int,
    capacity: int | None,
    token_dtype: torch.dtype | None,
    seed: int,
    metadata: dict[str, str],
) -> Prototypes:
    """K-means by a single look at each token."""
    processes = backbone.processes
    clusters = StreamingKMeans(
        num_prompts,
        n_groups=backbone.n_layers,
        capacity=capacity,
        seed=_seed_of_rank(seed, processes.rank),
    )
    directions = _directions(backbone, metadata)

    def take_in(layer: int, tokens: Tensor) -> Tensor:
        if directions is None:
            return clusters.partial_fit_unchecked(tokens, layer)
        clusters.partial_fit_unchecked(directions.of(layer, tokens), layer)
        return _first_unfit(tokens)

    backbone.run(
        take_in,
        SideStream(backbone.device) if backbone.device.type == "cuda" else None,
        token_dtype,
    )
    backbone.check_enough_tokens(num_prompts)
    if processes.size == 1:
        summary = clusters.summary()
    else:
        summary = replace(clusters.merged_summary(processes, backbone.device), seed=seed)
    with layer_bar(backbone.n_layers, backbone.progress) as bar:
        # The other ranks solve their share of the layers meanwhile.
        solved = summary.solve(num_prompts, on_group=partial(bar.update, processes.size), processes=processes)
    if directions is not None:
        metadata = {**metadata, **directions.facts(processes, backbone.num_tokens)}
    return backbone.result(solved.centers, solved.counts, solved.inertia, metadata=metadata, summary=summary)


def _from_all_tokens(
    backbone: BackbonePass,
    num_prompts: int,
    exact: ExactOptions,
    token_dtype: torch.dtype | None,
    seed: int,
    metadata: dict[str, str],
) -> Prototypes:
    """K-means by Lloyd's algorithm, each layer on its own over all of its tokens."""
    directions = _directions(backbone, metadata)
    with TokenStore(backbone.n_layers, exact.budget, backbone.device) as store:

        def keep(layer: int, tokens: Tensor) -> Tensor:
            store.append(layer, tokens if directions is None else directions.of(layer, tokens))
            return _first_unfit(tokens)

        backbone.run(keep, token_dtype=token_dtype)
        backbone.check_enough_tokens(num_prompts)
        fitted = []
        with layer_bar(backbone.n_layers, backbone.progress) as bar:
            for layer in range(backbone.n_layers):
                fitted.append(_fit_exactly(store, layer, num_prompts, exact, seed, backbone.processes))
                bar.update()
    if directions is not None:
        metadata = {**metadata, **directions.facts(backbone.processes, backbone.num_tokens)}
    return backbone.result(
        torch.stack([fit.centers for fit in fitted]),
        torch.stack([fit.counts for fit in fitted]),
        torch.tensor([fit.inertia for fit in fitted], dtype=torch.float64, device="cpu"),
        metadata={**metadata, "n_iter": " ".join(str(fit.n_iter) for fit in fitted)},
    )


def _directions(backbone: BackbonePass, metadata: dict[str, str]) -> Directions | None:
    """What turns tokens into directions, where the metric is the cosine."""
    return Directions(backbone.n_layers, backbone.device) if metadata.get("metric") == "cosine" else None


def _fit_exactly(
    store: TokenStore, layer: int, num_prompts: int, exact: ExactOptions, seed: int, processes: Processes
) -> LloydResult:
    """Cluster the tokens of one layer, which the store forgets afterwards."""
    with processes.together():
        store.load(layer)
    rng = np.random.default_rng([seed, 0])
    kmeans = OutOfCoreKMeans(
        store.layer(layer), num_prompts, rng, init=exact.init, n_init=exact.n_init, processes=processes
    )
    fitted = kmeans.run(exact.tol, exact.max_iter)
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


def _drawn_from_all(
    backbone: BackbonePass, num_prompts: int, strategy: str, seed: int, metadata: dict[str, str]
) -> Prototypes:
    """Tokens, or windows of the tokens of single images, drawn from all images, as the released code does."""
    processes = backbone.processes
    layers = [
        DrawnFromAll(strategy, num_prompts, backbone.device, [seed, layer, processes.rank])
        for layer in range(backbone.n_layers)
    ]

    def take_in(layer: int, tokens: Tensor) -> Tensor:
        layers[layer].take_in(tokens)
        return _first_unfit(tokens)

    backbone.run(take_in)
    backbone.check_enough_tokens(num_prompts)
    with processes.together():
        drawn = [layer.result(processes, backbone.num_tokens) for layer in layers]
    prompts, counts, inertia = (torch.stack(values) for values in zip(*drawn, strict=True))
    return backbone.result(prompts, counts, inertia, metadata=metadata)


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
