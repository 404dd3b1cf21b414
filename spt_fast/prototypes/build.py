"""Prototypes from one pass of a frozen backbone over a loader of images (Sec. 3.3 and 3.4)."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from spt_fast.backbones.anatomy import describe, unwrap
from spt_fast.clustering import StreamingKMeans
from spt_fast.clustering.lloyd import LloydResult
from spt_fast.clustering.out_of_core import OutOfCoreKMeans
from spt_fast.clustering.streaming import default_capacity
from spt_fast.ops.kmeans import assign_accumulate
from spt_fast.prototypes.backbone_pass import BackbonePass
from spt_fast.prototypes.result import Prototypes
from spt_fast.prototypes.side_stream import Overlap
from spt_fast.prototypes.token_store import TokenStore
from spt_fast.support.arguments import check_int, parse_bytes
from spt_fast.support.distributed import Processes, find_processes
from spt_fast.support.errors import NonFiniteError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STRATEGIES = ("kmeans", "mean", "max", "random")
MODES = ("stream", "exact")
# Prompt lengths of the paper (Sec. 3.4, remark I).
DEFAULT_NUM_PROMPTS = {"deep": 20, "shallow": 100}
# torch's and numpy's generators both take seeds below this.
_SEED_LIMIT = 2**63

_Pool = Callable[[Tensor, int, torch.Generator], Tensor]


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
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    memory_budget: int | str = "4GiB",
    seed: int = 0,
    last_output: bool = False,
    process_group: ProcessGroup | None = None,
    progress: bool = True,
) -> Prototypes:
    """Build prompts for `model` from the patch tokens of the images in `loader`.

    The model runs once, stops before the work of its last block, and comes back as it was, also after an
    exception or Ctrl-C. Class and register tokens are left out; position embeddings are in (eq. 1).

    Where torch.distributed is initialised (torchrun), every rank of the group has to call this, with the same
    arguments but its own model and its own part of the images, and each gets the same prototypes of all of
    them. A part may be empty. An error on one rank is raised on all.

    Args:
        model: a timm Vision Transformer, or any module whose `.blocks` map tokens [B, N, D] to [B, N, D].
        loader: any iterable of batches: image tensors [B, C, H, W] of a floating-point dtype, tuples or lists
            whose first item is one, or dicts with "pixel_values", "image" or "images". It is read once.
        num_prompts: N_p, prompts per layer; None is the paper's, 20 for "deep" and 100 for "shallow".
        depth: "deep", from the inputs of every block (eq. 13), or "shallow", of block 1 only (eq. 11).
        strategy: "kmeans" (eq. 9, 10) over the tokens of all images, or one of Sec. 3.4 over the tokens of a
            single batch drawn at random: "mean" or "max" of windows of floor(N_e B / N_p) tokens, or a sample
            of N_p tokens, "random".
        capacity: "stream" only: tokens kept per layer; None is max(20_000, 500 * num_prompts).
        mode: "kmeans" only: "stream" sees every token once and needs memory for `capacity` of them; "exact"
            is Lloyd's algorithm to convergence over all tokens, which it keeps, from one k-means++ start
            (scikit-learn's default).
        max_images: stop after this many images; None reads the whole loader. Several ranks share the number
            evenly.
        device: must be the model's, if given.
        amp_dtype: autocast dtype; None is bfloat16 on CUDA and the model's own dtype elsewhere.
        memory_budget: "exact" only: memory for tokens of this process, in bytes or as text such as "4GiB";
            the others go to a temporary file. It counts tokens on the device and on the host together: on
            CUDA, up to half of the free device memory, then pinned host memory. It does not count the model
            and its batch, some chunks of 16 MiB (two on the host, on CUDA three on the device), while the
            starts of a layer are drawn a sample of max(65_536, 256 * num_prompts) of its tokens and its
            distances, and, on the CPU, once they are drawn, bounds: 14 bytes for each token of the layer
            and 4 more for every 16 prompts (12 without AVX2).
        seed: of everything drawn here. The same seed, batches and machine give the same prototypes.
        last_output: also from the last block's output, which then has to run; for `Prototypes.layer(-1)`.
        process_group: the ranks that take part; None is all of them where torch.distributed is initialised,
            else this process alone.
        progress: show a bar with images/s, on rank 0.

    Raises:
        TypeError: `model` has no blocks of the kind above, a batch holds no floating-point images, or an
            argument has the wrong type.
        ValueError: an argument is none of the allowed; the loader is empty; images do not fit the model;
            pixels or tokens are NaN or infinite (image and layer named); fewer tokens than prompts.
        OSError: "exact" finds no room for its temporary file.
        RuntimeError: another rank died, or did not answer within the group's timeout.
    """
    processes = find_processes(process_group)
    with processes.together():
        _check_choice("depth", depth, tuple(DEFAULT_NUM_PROMPTS))
        _check_choice("strategy", strategy, STRATEGIES)
        _check_choice("mode", mode, MODES)
        if num_prompts is None:
            num_prompts = DEFAULT_NUM_PROMPTS[depth]
        num_prompts = check_int("num_prompts", num_prompts, 1)
        capacity = _choose_capacity(capacity, num_prompts, strategy, mode)
        budget = parse_bytes("memory_budget", memory_budget)
        max_images = None if max_images is None else check_int("max_images", max_images, 1)
        seed = _check_seed(seed)
        passed = BackbonePass(
            model,
            loader,
            processes,
            max_images=max_images,
            progress=progress,
            depth=depth,
            last_output=last_output,
            device=device,
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
            **_versions(),
        }
    processes.check_same(
        {"num_prompts": num_prompts, "max_images": max_images, "last_output": last_output, **metadata}
    )
    if strategy != "kmeans":
        return _from_one_batch(passed, num_prompts, strategy, seed, metadata)
    if mode == "exact":
        return _from_all_tokens(passed, num_prompts, budget, seed, metadata)
    return _from_stream(passed, num_prompts, capacity, seed, metadata)


def _from_stream(
    passed: BackbonePass, num_prompts: int, capacity: int | None, seed: int, metadata: dict[str, str]
) -> Prototypes:
    """K-means by a single look at each token."""
    groups, processes = passed.tap.n_outputs, passed.processes
    clusters = StreamingKMeans(
        num_prompts, n_groups=groups, capacity=capacity, seed=_seed_of_rank(seed, processes.rank)
    )
    passed.run(
        lambda layer, tokens: clusters.partial_fit(tokens, group=layer),
        overlap=Overlap(passed.tap.device) if passed.tap.device.type == "cuda" else None,
    )
    passed.check_enough_tokens(num_prompts)
    if processes.size == 1:
        summary = clusters.summary()
    else:
        summary = replace(clusters.merged_summary(processes, passed.tap.device), seed=seed)
    with tqdm(total=groups, desc="clustering", unit=" layers", disable=not passed.progress) as bar:
        # The other ranks solve their share of the layers meanwhile.
        solved = summary.solve(num_prompts, on_group=partial(bar.update, processes.size), processes=processes)
    return passed.result(
        solved.centers, solved.counts, solved.mean_squared_distance, metadata=metadata, summary=summary
    )


def _from_all_tokens(
    passed: BackbonePass, num_prompts: int, budget: int, seed: int, metadata: dict[str, str]
) -> Prototypes:
    """K-means by Lloyd's algorithm, each layer on its own over all of its tokens."""
    groups = passed.tap.n_outputs
    with TokenStore(groups, budget, passed.tap.device) as store:

        def keep(layer: int, tokens: Tensor) -> None:
            _check_finite(tokens)
            store.append(layer, tokens)

        passed.run(keep)
        passed.check_enough_tokens(num_prompts)
        layers = tqdm(range(groups), desc="clustering", unit=" layers", disable=not passed.progress)
        fitted = [_fit_exactly(store, layer, num_prompts, seed, passed.processes) for layer in layers]
    return passed.result(
        torch.stack([fit.centers for fit in fitted]),
        torch.stack([fit.counts for fit in fitted]),
        torch.tensor([fit.inertia for fit in fitted], dtype=torch.float64) / passed.num_tokens,
        metadata=metadata,
    )


def _fit_exactly(
    store: TokenStore, layer: int, num_prompts: int, seed: int, processes: Processes
) -> LloydResult:
    """The clusters of one layer's tokens, which are gone afterwards."""
    with processes.together():
        store.load(layer)
    rng = np.random.default_rng([seed, 0])
    fitted = OutOfCoreKMeans(store.layer(layer), num_prompts, rng, processes=processes).run()
    store.release(layer)
    return fitted


def _from_one_batch(
    passed: BackbonePass, num_prompts: int, strategy: str, seed: int, metadata: dict[str, str]
) -> Prototypes:
    """Windows or a sample of the tokens of one random batch (Sec. 3.4)."""
    generator = torch.Generator().manual_seed(seed)
    pooled: list[tuple[Tensor, ...]] = []

    def pool(_: int, tokens: Tensor) -> None:
        passed.check_enough_tokens(num_prompts, "the batch drawn from loader")
        _check_finite(tokens)
        flat = tokens.flatten(0, 1).float()
        prompts = _POOLS[strategy](flat, num_prompts, generator)
        pooled.append(tuple(values.cpu() for values in (prompts, *_measure(flat, prompts))))

    owner = passed.run_one_batch(pool, generator)
    layers = passed.processes.gather(pooled)[owner]
    prompts, counts, inertia = (torch.stack(values) for values in zip(*layers, strict=True))
    return passed.result(prompts, counts, inertia, metadata=metadata)


def _measure(tokens: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Number of tokens nearest to each prompt [N_p], and the mean of their squared distances."""
    assigned = assign_accumulate(tokens[None], prompts[None], shift=tokens.mean(0, keepdim=True))
    return assigned.counts[0], assigned.inertia[0] / len(tokens)


def _windows(tokens: Tensor, num_prompts: int) -> Tensor:
    """N_p windows of floor(M / N_p) tokens, [M, D] to [N_p, window, D]; the tokens left over are dropped."""
    window = len(tokens) // num_prompts
    return tokens[: num_prompts * window].reshape(num_prompts, window, -1)


def _mean_pool(tokens: Tensor, num_prompts: int, _: torch.Generator) -> Tensor:
    return _windows(tokens, num_prompts).mean(1)


def _max_pool(tokens: Tensor, num_prompts: int, _: torch.Generator) -> Tensor:
    return _windows(tokens, num_prompts).amax(1)


def _sample(tokens: Tensor, num_prompts: int, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that the choice does not depend on the device.
    rows = torch.randperm(len(tokens), generator=generator)[:num_prompts]
    return tokens[rows.to(tokens.device)]


_POOLS: dict[str, _Pool] = {"mean": _mean_pool, "max": _max_pool, "random": _sample}


def _seed_of_rank(seed: int, rank: int) -> int:
    """Ranks draw independently of each other; rank 0 as a single process would."""
    return seed if rank == 0 else int(np.random.default_rng([seed, rank]).integers(_SEED_LIMIT - 1))


def _check_finite(tokens: Tensor) -> None:
    """Raise NonFiniteError unless every squared distance between tokens is finite in float32."""
    low, high = torch.aminmax(tokens)
    # |a - b|^2 <= D (2 max |x|)^2.
    limit = math.sqrt(torch.finfo(torch.float32).max / tokens.shape[-1]) / 2
    # Written so that NaN fails.
    if not (-limit <= float(low) and float(high) <= limit):
        row = int((~(tokens.abs() <= limit)).any(-1).flatten().nonzero()[0])
        raise NonFiniteError(f"row {row} holds NaN, infinity or numbers too large to be squared", row=row)


def _check_choice(argument: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _choose_capacity(capacity: int | None, num_prompts: int, strategy: str, mode: str) -> int | None:
    """Tokens kept per layer, or None where none are kept; also refuses options that would have no effect."""
    if strategy != "kmeans" and mode != "stream":
        raise ValueError(f"mode={mode!r} is for strategy='kmeans', got strategy={strategy!r}")
    if strategy != "kmeans" or mode != "stream":
        if capacity is not None:
            raise ValueError(
                f"capacity is for strategy='kmeans' with mode='stream', got {strategy!r} with {mode!r}"
            )
        return None
    if capacity is None:
        return default_capacity(num_prompts)
    if check_int("capacity", capacity, 1) < num_prompts:
        raise ValueError(f"capacity must be at least num_prompts ({num_prompts}), got {capacity}")
    return int(capacity)


def _check_seed(seed: int) -> int:
    number = check_int("seed", seed, 0)
    if number >= _SEED_LIMIT:
        raise ValueError(f"seed must be below 2**63, got {number}")
    return number


def _versions() -> dict[str, str]:
    return {f"{name}_version": _version(name) for name in ("spt_fast", "torch", "timm")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # Used from a source tree.
        return "unknown"
