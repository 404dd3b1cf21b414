"""Which backbone it is: facts of its shape and a fingerprint of its weights, for the files made with it."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import embed_dim, get_blocks, num_prefix_tokens
from spt_fast.backbones.snapshot import classifiers

_FINGERPRINTS = ("fingerprint", "norm_fingerprint")
# Facts that may differ where the user says so; number of blocks and width are the shape of the prompts.
_FACTS_TO_ALLOW = {
    "num_prefix_tokens",
    "num_heads",
    "patch_size",
    "image_size",
    "in_chans",
    "architecture",
    *_FINGERPRINTS,
}
# By which a command opens a model with such a fact.
_OPTIONS = {"image_size": "--img-size", "in_chans": "--in-chans"}
_SAMPLES_PER_TENSOR = 4
_LEAST_SAMPLES = 64
_BYTES_OF_A_SAMPLE = 2
# A weight that goes through float16 to bfloat16 ends one bfloat16 step beside the weight that goes there
# directly if it lies near the middle between two: within a sixteenth of a step, every second one of those.
_SHARE_ONE_STEP_APART = 1 / 16
_BFLOAT16_STEP = 2.0**-7
# Below 2**-14, steps of float16 do not become smaller.
_FLOAT16_SMALLEST_STEP = 2.0**-24


def describe(model: nn.Module) -> dict[str, str]:
    """Facts by which backbones differ, as metadata of saved files; those that the model states.

    Keys: `num_blocks` (L), `width` (D), `num_prefix_tokens`, `num_heads`, `patch_size` and `image_size`
    ("16x16", height first), `in_chans` (of an image), `architecture` (timm's, with the tag of its pretrained
    weights, such as "vit_base_patch16_224.mae") and `fingerprint`, of the weights of embedding and blocks.
    """
    patch_embed = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    heads = getattr(getattr(get_blocks(model)[0], "attn", None), "num_heads", None)
    facts = {
        "num_blocks": str(len(get_blocks(model))),
        "width": str(embed_dim(model)),
        "num_prefix_tokens": str(num_prefix_tokens(model)),
        "num_heads": None if heads is None else str(heads),
        "patch_size": _size(getattr(patch_embed, "patch_size", None)),
        "image_size": _size(getattr(patch_embed, "img_size", None)),
        "in_chans": _channels(patch_embed),
        "architecture": _architecture(model),
        "fingerprint": fingerprint(_weights(model)[0]),
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def describe_norm(model: nn.Module) -> dict[str, str]:
    """`norm_fingerprint`, of what lies between blocks and head; empty where there is nothing."""
    found = fingerprint(_weights(model)[1])
    return {} if found is None else {"norm_fingerprint": found}


def backbone_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """What `describe` has written into the metadata of a file."""
    return {name: metadata[name] for name in ("num_blocks", "width", *_FACTS_TO_ALLOW) if name in metadata}


def readable(facts: Mapping[str, str]) -> dict[str, str]:
    """`facts` with eight letters in the place of each fingerprint."""
    return {name: _short(fact) if name in _FINGERPRINTS else fact for name, fact in facts.items()}


def check_backbone(
    source: str | os.PathLike[str],
    facts: Mapping[str, str],
    model: nn.Module,
    *,
    allow_other_backbone: bool = False,
) -> None:
    """ValueError where `facts` are those of another backbone than `model`.

    Args:
        source: the file that they were read from, or what else holds them.
        facts: as `describe` gives them; what is missing there or for `model` is not compared.
        allow_other_backbone: compare depth and width only.

    Raises:
        ValueError: also where a fingerprint cannot be read.
    """
    check_facts(source, facts, describe(model), allow_other_backbone=allow_other_backbone)


def check_facts(
    source: str | os.PathLike[str],
    found: Mapping[str, str],
    expected: Mapping[str, str],
    *,
    allow_other_backbone: bool = False,
) -> None:
    """`check_backbone` for the facts `expected` of a model and of what was made with it."""
    for name in _FINGERPRINTS:
        if name in found and not _is_fingerprint(found[name]):
            raise ValueError(
                f"{os.fspath(source)} is damaged: its {name} is none of weights, got {found[name][:40]!r}"
            )
    wrong = [name for name in expected if name in found and not _agree(name, found, expected)]
    if allow_other_backbone:
        wrong = [name for name in wrong if name not in _FACTS_TO_ALLOW]
    if not wrong:
        return
    name = wrong[0]
    if name in _FINGERPRINTS:
        reason = (
            f"is for other weights ({_name_weights(name, found)}) than this model has "
            f"({_name_weights(name, expected)})"
        )
    else:
        reason = f"is for {name} {found[name]!r}, but this model has {expected[name]!r}"
        if name in _OPTIONS:
            reason += f" (open it with {_OPTIONS[name]} {found[name]})"
    if set(wrong) <= _FACTS_TO_ALLOW:
        reason += "; to use it all the same, give allow_other_backbone=True (--allow-other-backbone)"
    raise ValueError(f"{os.fspath(source)} {reason}")


def fingerprint(weights: Iterable[Tensor]) -> str | None:
    """A few weights of each tensor, rounded to bfloat16, as text; None where weights cannot be read.

    Moves and casts of the weights leave it the same, as `same_weights` sees it.
    """
    tensors = list(weights)
    # Sharded and quantised tensors are subclasses, whose elements are not to be had one by one.
    if not tensors or any(type(each) not in (Tensor, nn.Parameter) or each.is_meta for each in tensors):
        return None
    count = max(_SAMPLES_PER_TENSOR, -(-_LEAST_SAMPLES // len(tensors)))
    with torch.no_grad():
        samples = [_sample(each, count).to(tensors[0].device, torch.bfloat16) for each in tensors]
        bits = torch.cat(samples).view(torch.int16).cpu().numpy()
    return base64.b64encode(bits.astype("<i2").tobytes()).decode()


def same_weights(first: str, second: str) -> bool:
    """Whether two fingerprints are of the same weights, up to their rounding to float16 or bfloat16.

    Weights pass for the same if they differ by about 0.1 % or less, in the root mean square.
    """
    if first == second:
        return True
    a, b = (np.frombuffer(base64.b64decode(each), "<i2").astype("<i4") for each in (first, second))
    if len(a) != len(b):
        return False
    differ = a != b
    # The bits of a bfloat16 are the upper half of those of a float32.
    x, y = ((each[differ] << 16).view("<f4").astype(np.float64) for each in (a, b))
    step = _BFLOAT16_STEP * np.maximum(abs(x), abs(y)) + _FLOAT16_SMALLEST_STEP
    apart = abs(x - y)
    # Four standard deviations above the mean of a binomial distribution.
    most = _SHARE_ONE_STEP_APART * len(a) + 4 * math.sqrt(_SHARE_ONE_STEP_APART * len(a))
    return bool((apart <= step).all()) and int((apart > _FLOAT16_SMALLEST_STEP).sum()) <= most


def _is_fingerprint(text: str) -> bool:
    """Whether `text` can be what `fingerprint` gives: 16-bit numbers in base64."""
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return len(content) > 0 and len(content) % _BYTES_OF_A_SAMPLE == 0


def _sample(tensor: Tensor, count: int) -> Tensor:
    """`count` elements over the whole of a tensor, or all where it has fewer."""
    flat = tensor.detach().reshape(-1)
    # One less than the distance that would fit: not all of a matrix's samples come from one column.
    step = max(1, len(flat) // count - 1)
    start = 0 if step == 1 else len(flat) // (2 * count)
    return flat[start::step][:count]


def _weights(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Floating-point parameters of embedding and blocks, and of what comes after the blocks but the head.

    A model's children stand in the order in which they run, as in timm; both lists are in order of names.
    """
    of_head = {id(parameter) for each in classifiers(model) for parameter in each.parameters()}
    blocks, after, seen = get_blocks(model), set[int](), False
    for child in model.children():
        if seen:
            after |= {id(parameter) for parameter in child.parameters()}
        seen = seen or child is blocks
    parameters = [
        parameter
        for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0])
        if parameter.is_floating_point() and id(parameter) not in of_head
    ]
    return (
        [parameter for parameter in parameters if id(parameter) not in after],
        [parameter for parameter in parameters if id(parameter) in after],
    )


def _agree(name: str, found: Mapping[str, str], expected: Mapping[str, str]) -> bool:
    if name in _FINGERPRINTS:
        return same_weights(found[name], expected[name])
    # Equal weights are equal by whatever name they were opened; the name decides where nothing else does.
    if name == "architecture" and "fingerprint" in found and "fingerprint" in expected:
        return True
    return found[name] == expected[name]


def _name_weights(name: str, facts: Mapping[str, str]) -> str:
    what = f"{name} {_short(facts[name])}"
    return f"{facts['architecture']}, {what}" if "architecture" in facts else what


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _size(given: Any) -> str | None:
    """ "16x16" of 16 or (16, 16)."""
    if given is None:
        return None
    height, width = (given, given) if isinstance(given, int) else given
    return f"{height}x{width}"


def _channels(patch_embed: Any) -> str | None:
    projection = getattr(patch_embed, "proj", None)
    # Of a hybrid model it projects features of a network, not an image.
    if not isinstance(projection, nn.Conv2d) or hasattr(patch_embed, "backbone"):
        return None
    return str(projection.in_channels)


def _architecture(model: nn.Module) -> str | None:
    for holder in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, holder, None)
        if isinstance(config, dict) and config.get("architecture"):
            tag = config.get("tag")
            return f"{config['architecture']}.{tag}" if tag else str(config["architecture"])
    return None
