"""Prototypes of several data sets together: side by side, or clustered anew from their passes' samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from spt_fast.backbones.identity import backbone_facts, check_facts
from spt_fast.clustering.summary import Summary
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.data.transforms import PREPROCESSING, Preprocessing
from spt_fast.prototypes.directions import merged_facts
from spt_fast.prototypes.result import Prototypes, from_layers
from spt_fast.support.arguments import check_int


def concatenate(prototypes: Sequence[Prototypes]) -> Prototypes:
    """The prompts of all sets side by side, in their order: [L, sum of N_p, D].

    `counts` stay those of each set, and `inertia` is their sum: an upper bound, because a token may be nearer
    to a prompt of another set than to its own. What the metadata of all sets say alike is kept.

    Warns:
        UserWarning: the metadata say that the images were resized or normalised in different ways.

    Raises:
        TypeError: no sequence of `Prototypes`.
        ValueError: none, or sets of different layers, width, backbone, `metric` or `position_embedding`.
    """
    sets = _check(prototypes)
    _warn_of_preprocessings(sets)
    return _side_by_side(sets)


def _side_by_side(sets: Sequence[Prototypes]) -> Prototypes:
    last = [each.last_output for each in sets]
    return Prototypes(
        torch.cat([each.prompts for each in sets], dim=1),
        torch.cat([each.counts for each in sets], dim=1),
        torch.stack([each.inertia for each in sets]).sum(0),
        num_images=sum(each.num_images for each in sets),
        num_tokens=sum(each.num_tokens for each in sets),
        metadata={**_common_metadata(sets), "concatenated": "True"},
        last_output=None if None in last else _side_by_side([each for each in last if each is not None]),
    )


def merge(
    prototypes: Sequence[Prototypes],
    num_prompts: int | None = None,
    *,
    on_layer: Callable[[], object] | None = None,
) -> Prototypes:
    """Prototypes of all images of several passes, as if they had been one: each token counts once.

    Solved from the samples of the passes, which stay as they are; the result can `select` too. Its sample is
    as large as theirs together.

    Args:
        prototypes: with their samples: of k-means in stream mode, from `build_prototypes` or from files saved
            with `with_sample=True`.
        num_prompts: N_p; None is that of the first.
        on_layer: called after each layer, for a progress bar.

    Warns:
        UserWarning: as `concatenate`.

    Raises:
        TypeError: no sequence of `Prototypes`.
        ValueError: none, sets of different layers, width, backbone, `metric` or `position_embedding`, or one
            without a sample; more prompts than the samples can give.
    """
    sets = _check(prototypes)
    summaries = []
    for index, each in enumerate(sets):
        if each._summary is None:
            raise ValueError(f"merge needs the sample of each pass, {each._why_no_summary()} ([{index}])")
        summaries.append(each._summary)
    if len({summary.n_groups for summary in summaries}) > 1:
        raise ValueError("prototypes must all be with last_output or all without")
    _warn_of_preprocessings(sets)
    summary = Summary(
        groups=tuple(map(_together, zip(*(_scaled(summary) for summary in summaries), strict=True))),
        totals=tuple(map(sum, zip(*(summary.totals for summary in summaries), strict=True))),
        seed=summaries[0].seed,
    )
    num_prompts = check_int(
        "num_prompts", sets[0].prompts.shape[1] if num_prompts is None else num_prompts, 1
    )
    if num_prompts > summary.max_clusters:
        raise ValueError(f"num_prompts must be at most {summary.max_clusters}, got {num_prompts}")
    solved = summary.solve(num_prompts, on_group=on_layer)
    return from_layers(
        solved.centers,
        solved.counts,
        solved.inertia,
        num_images=sum(each.num_images for each in sets),
        num_tokens=sum(each.num_tokens for each in sets),
        metadata={
            **_common_metadata(sets),
            **merged_facts([(each.metadata, each.num_tokens) for each in sets]),
        },
        with_last_output=summary.n_groups > len(sets[0].prompts),
        summary=summary,
    )


def _check(prototypes: Sequence[Prototypes]) -> list[Prototypes]:
    if isinstance(prototypes, Prototypes) or not isinstance(prototypes, Iterable):
        raise TypeError(f"prototypes must be a list of Prototypes, got {type(prototypes).__name__}")
    sets = list(prototypes)
    for index, each in enumerate(sets):
        if not isinstance(each, Prototypes):
            raise TypeError(f"prototypes must be Prototypes, got {type(each).__name__} as number {index}")
    if not sets:
        raise ValueError("prototypes must hold at least one set, got none")
    shapes = [(each.prompts.shape[0], each.prompts.shape[2]) for each in sets]
    if len(set(shapes)) > 1:
        raise ValueError(f"prototypes must be of one number of layers and one width, got (L, D) = {shapes}")
    for index, each in enumerate(sets[1:], start=1):
        check_facts(f"prototypes[{index}]", each.metadata, backbone_facts(sets[0].metadata))
    metrics = [each.metadata.get("metric", "euclidean") for each in sets]
    if len(set(metrics)) > 1:
        raise ValueError(f"prototypes must all be of one metric, got {', '.join(metrics)}")
    embedded = [each.metadata.get("position_embedding", "True") for each in sets]
    if len(set(embedded)) > 1:
        raise ValueError(
            "prototypes must all be of tokens with position embedding or all without, "
            f"got position_embedding = {', '.join(embedded)}"
        )
    return sets


def _warn_of_preprocessings(sets: Sequence[Prototypes]) -> None:
    """Warn, in the name of the caller's caller, where sets say that different things were done to images."""
    texts = [each.metadata[PREPROCESSING] for each in sets if PREPROCESSING in each.metadata]
    found = list(dict.fromkeys(str(Preprocessing.from_json(text)) for text in texts))
    if len(found) > 1:
        warnings.warn(
            f"prototypes were made with images of different preprocessing ({'; '.join(found)}); the result "
            "does not say which to use",
            stacklevel=3,
        )


def _scaled(summary: Summary) -> list[WeightedTokens]:
    """The tokens of each layer, with weights that add up to the tokens which the pass has seen."""
    scaled = []
    for group, total in zip(summary.groups, summary.totals, strict=True):
        weights = group.unit_weights()
        scaled.append(
            WeightedTokens(group.tokens, weights * (total / float(weights.sum())), group.mean, group.backend)
        )
    return scaled


def _together(groups: Sequence[WeightedTokens]) -> WeightedTokens:
    """One problem of the tokens of several, where the first of them are: files are read into host memory."""
    device = groups[0].tokens.device
    weights: list[Tensor] = [group.unit_weights().to(device) for group in groups]
    totals = torch.stack([each.sum() for each in weights])
    means = torch.stack([group.mean.to(device, torch.float64) for group in groups])
    dtypes = {group.tokens.dtype for group in groups}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return WeightedTokens(
        torch.cat([group.tokens.to(device, dtype) for group in groups]),
        torch.cat(weights).float(),
        (totals[:, None] * means).sum(0).div(totals.sum()).float(),
        groups[0].backend,
    )


def _common_metadata(sets: Sequence[Prototypes]) -> dict[str, str]:
    """What is the same in all, and how many there were."""
    first, *others = (each.metadata for each in sets)
    common = {key: value for key, value in first.items() if all(o.get(key) == value for o in others)}
    return {**common, **backbone_facts(first), "sets": str(len(sets))}
