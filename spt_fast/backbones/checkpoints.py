"""Weights from a file into a timm model: MAE, MoCo-v3, DINO, DINOv2, iBOT, data2vec, JAX .npz and timm's own.

Every key of a file is taken, renamed, dropped or refused by name; nothing is left out without a word.
"""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import embed_dim, get_blocks
from spt_fast.backbones.positions import from_square_grid
from spt_fast.support.errors import first_line, one_line
from spt_fast.support.files import check_input_path, open_safetensors

State = dict[str, Tensor]

_EMBEDDING = "patch_embed.proj.weight"
# Where a file holds several backbones or several states, the first of these is taken.
_WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model", "module", "student", "encoder")
_PREFERRED_PREFIXES = ("teacher.", "base_encoder.", "encoder_q.", "student.")
# Beside the weights in files of a training run; none of it is a weight of the backbone.
_HEADS = re.compile(
    r"(head|head_dist|dino_head|ibot_head|fc|mlp_head|lm_head|predictor|projector)s?\.|pre_logits\."
)
_DECODER = re.compile(r"decoder_|decoder\.")
_MASK_TOKENS = ("mask_token", "masked_embed")
# DINOv2's training code holds its blocks in lists of lists, under their numbers in the whole model.
_NESTED_BLOCK = re.compile(r"^blocks\.\d+\.(?=\d+\.)")
_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


@dataclass
class LoadReport:
    """What became of the keys of a file.

    Attributes:
        kind: who wrote the file, as far as its names tell.
        dropped: names of what was left out, with a star for the rest of a name.
        notes: what was chosen, renamed, moved or resized, each a phrase.
    """

    kind: str = ""
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        dropped = f"dropped {', '.join(self.dropped)}" if self.dropped else ""
        return "; ".join(filter(None, [self.kind, *self.notes, dropped]))


def load_weights(model: nn.Module, path: str | Path) -> LoadReport:
    """Read a file into `model`, whose weights are all replaced but those of its head.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or does not fit; says what the file and the model have. The model may
            have been changed then.
    """
    source = check_input_path(path, argument="checkpoint")
    if source.suffix.lower() == ".npz":
        return _load_jax(model, source)
    return load_state(model, _read(source), source)


def load_state(model: nn.Module, content: Any, source: str | Path) -> LoadReport:
    """The same for the content of a file; `source` is what error messages call it.

    Raises:
        ValueError: as `load_weights`.
    """
    state, report = _find_backbone(content, source)
    state = _named_as_in(model, state, report)
    _check_geometry(model, state, source)
    _check_heads(model, state, source, report)
    state = _converted_by_timm(model, state, source, report)
    _check_keys(model, state, source)
    model.load_state_dict(state, strict=False)
    return report


def _read(source: Path) -> Any:
    """The objects of a file, unpickled as tensors and plain containers only."""
    if source.suffix.lower() == ".safetensors":
        try:
            with open_safetensors(source) as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except ValueError as error:
            raise ValueError(f"checkpoint cannot be read: {error}") from error
    try:
        # Training scripts store their arguments beside the weights: a bag of attributes, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if not found:
            raise ValueError(f"checkpoint {source} is damaged or holds no weights") from error
        raise ValueError(
            f"checkpoint {source} holds a {found[1]} beside its weights, which could run code when read; "
            "if you trust it, load it with torch.load(FILE, weights_only=False) and save the weights "
            "alone with torch.save"
        ) from error
    # torch raises different errors for files that it did not write.
    except Exception as error:
        raise ValueError(f"checkpoint {source} cannot be read: {first_line(error)}") from error


def _find_backbone(content: Any, source: str | Path) -> tuple[State, LoadReport]:
    """The weights of one backbone, by names without prefixes, and a report of what lay beside them."""
    report = LoadReport()
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {source} holds a {type(content).__name__}, not weights by name")
    # Random states, losses and means are tensors too: of other models than ViTs, names end with ".weight".
    paths = (_path_to_weights(content, ending) for ending in (_EMBEDDING, ".weight", ""))
    path = next((path for path in paths if path is not None), None)
    if path is None:
        raise ValueError(
            f"checkpoint {source} holds no weights by name, but {', '.join(map(str, content)) or 'nothing'}"
        )
    for wrapper in path:
        report.dropped += sorted(str(name) for name in content if name != wrapper)
        if len(content) > 1:
            report.notes.append(f"took '{wrapper}'")
        content = content[wrapper]
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    prefixes = sorted({name[: -len(_EMBEDDING)] for name in state if name.endswith(_EMBEDDING)})
    prefix = _choose_prefix(prefixes, source) if prefixes else _wrapper_of_all(state)
    others = _group(name for name in state if not name.startswith(prefix))
    report.dropped += others
    if others:
        report.notes.append(f"took '{prefix}*'")
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    report.kind = _kind(state, prefix)
    return state, report


def _path_to_weights(content: Any, ending: str, depth: int = 4) -> list[str] | None:
    """The wrappers, from the outermost, around tensors whose names have this ending; None without any."""
    if depth == 0 or not isinstance(content, Mapping):
        return None
    if any(
        isinstance(value, Tensor) and value.ndim > 0 and str(name).endswith(ending)
        for name, value in content.items()
    ):
        return []
    for wrapper in _WRAPPERS:
        path = _path_to_weights(content.get(wrapper), ending, depth - 1)
        if path is not None:
            return [wrapper, *path]
    return None


def _wrapper_of_all(state: State) -> str:
    """What data-parallel and compiled models put before every name."""
    prefix = ""
    for wrapper in ("module.", "_orig_mod.", "module."):
        if state and all(name.startswith(prefix + wrapper) for name in state):
            prefix += wrapper
    return prefix


def _choose_prefix(prefixes: list[str], source: str | Path) -> str:
    """Which of several backbones: DINO's own code takes the teacher, MoCo's the encoder with gradients."""
    if len(prefixes) == 1:
        return prefixes[0]
    for preferred in _PREFERRED_PREFIXES:
        found = [prefix for prefix in prefixes if preferred in prefix]
        if len(found) == 1:
            return found[0]
    raise ValueError(
        f"checkpoint {source} holds several backbones, under {', '.join(map(repr, prefixes))}; "
        "save the one that you mean to a file of its own"
    )


def _named_as_in(model: nn.Module, state: State, report: LoadReport) -> State:
    """Drop what is no weight of the backbone, and give the others the names that `model` has for them."""
    expected = _expected(model)
    pools_by_attention = any(name.startswith("attn_pool.") for name in expected)
    kept: State = {}
    dropped: list[str] = []
    for name, value in state.items():
        # With a mask token timm takes a file for one of DINOv2's; MAE's belongs to its decoder.
        is_extra = bool(_HEADS.match(name) or _DECODER.match(name)) or name in _MASK_TOKENS
        # Of a model that pools otherwise.
        is_extra |= name.startswith("attn_pool.") and not pools_by_attention
        if is_extra or name.endswith("relative_position_index"):
            dropped.append(name)
        else:
            kept[_NESTED_BLOCK.sub("blocks.", name)] = value
    report.dropped += _group(dropped)
    if "register_tokens" in kept and "reg_token" in expected:
        # timm adds the class token's position to it, and has positions for patches only.
        kept["reg_token"] = kept.pop("register_tokens")
        kept["cls_token"] = kept["cls_token"] + kept["pos_embed"][:, :1]
        kept["pos_embed"] = kept["pos_embed"][:, 1:]
        report.notes.append("register_tokens -> reg_token")
    _rename(kept, expected, report, ".mlp.w12.", ".mlp.fc1.")
    _rename(kept, expected, report, ".mlp.w3.", ".mlp.fc2.")
    for number in "12":
        _rename(kept, expected, report, f".gamma_{number}", f".ls{number}.gamma")
    _share_position_bias(kept, expected, report)
    _hand_over_norm(kept, expected, report)
    return kept


def _kind(state: State, prefix: str) -> str:
    """Who wrote a file, as far as its names tell."""
    if "base_encoder." in prefix:
        return "MoCo-v3"
    if any(_DECODER.match(name) for name in state):
        return "MAE with its decoder"
    if _SHARED_TABLE in state or "blocks.0.attn.q_bias" in state:
        return "data2vec or BEiT"
    if "masked_embed" in state:
        return "iBOT"
    return "DINOv2" if "mask_token" in state else "timm's names"


def _rename(state: State, expected: State, report: LoadReport, old: str, new: str) -> None:
    found = [name for name in state if old in name and name.replace(old, new) in expected]
    for name in found:
        state[name.replace(old, new)] = state.pop(name)
    if found:
        report.notes.append(f"{old.strip('.')} -> {new.strip('.')}")


def _share_position_bias(state: State, expected: State, report: LoadReport) -> None:
    """Give each block a copy of the table that all share, which timm's BEiT has in its blocks."""
    if _SHARED_TABLE not in state or _SHARED_TABLE in expected:
        return
    targets = [name for name in expected if name.endswith(".attn.relative_position_bias_table")]
    if targets:
        table = state.pop(_SHARED_TABLE)
        state.update(dict.fromkeys(targets, table))
        report.notes.append(f"{_SHARED_TABLE} copied to {len(targets)} blocks")


def _hand_over_norm(state: State, expected: State, report: LoadReport) -> None:
    """The final norm of a model that averages patch tokens comes after the average."""
    moved = [
        name
        for name in ("norm.weight", "norm.bias")
        if name in state and name not in expected and f"fc_{name}" in expected and f"fc_{name}" not in state
    ]
    for name in moved:
        state[f"fc_{name}"] = state.pop(name)
    if moved:
        report.notes.append("norm -> fc_norm")


def _check_geometry(model: nn.Module, state: State, source: str | Path) -> None:
    """ValueError where the sizes that a user chooses differ: channels, patches, width, depth, heads."""
    own = _expected(model)
    if _EMBEDDING in state and _EMBEDDING in own and state[_EMBEDDING].ndim == own[_EMBEDDING].ndim == 4:
        theirs, mine = (list(each[_EMBEDDING].shape) for each in (state, own))
        _compare(source, "channels of an image", theirs[1], mine[1], f"open it with in_chans={theirs[1]}")
        patches = ["x".join(map(str, shape[2:])) for shape in (theirs, mine)]
        _compare(source, "patches of", patches[0], patches[1], "choose a model with such patches")
        _compare(source, "width", theirs[0], mine[0], "choose the model of that size")
    _compare(source, "blocks", _depth(state), _depth(own), "choose the model of that size")


def _check_heads(model: nn.Module, state: State, source: str | Path, report: LoadReport) -> None:
    """ValueError for MoCo-v3's ViT-S, which has 12 heads where timm's has 6: no weight tells of it."""
    if report.kind == "MoCo-v3" and embed_dim(model) == 384:
        attention: Any = get_blocks(model)[0].attn
        _compare(source, "heads of MoCo-v3's ViT-S", 12, attention.num_heads, "open it with num_heads=12")


def _compare(source: str | Path, what: str, theirs: object, mine: object, hint: str) -> None:
    if theirs != mine:
        raise ValueError(
            f"checkpoint {source} does not fit this model: {what}: {theirs} in the file, "
            f"{mine} in the model; {hint}"
        )


def _depth(state: Mapping[str, Any]) -> int:
    numbers = (re.match(r"blocks\.(\d+)\.", name) for name in state)
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)


def _converted_by_timm(model: nn.Module, state: State, source: str | Path, report: LoadReport) -> State:
    """What timm's own filter for this kind of model makes of the file: it resizes positions, for one."""
    convert: Callable[..., State] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )
    if convert is None:
        return state
    original = state
    before = {name: tuple(value.shape) for name, value in state.items()}
    try:
        state = convert(dict(state), model)
    # It takes shapes apart without checks.
    except Exception as error:
        if _EMBEDDING in state:
            _check_keys(model, state, source)
        raise ValueError(
            f"checkpoint {source} cannot be converted to this model: {one_line(error)}"
        ) from error
    resized = [name for name, shape in before.items() if name in state and shape != state[name].shape]
    for name in resized[:1]:
        more = f" and {len(resized) - 1} more" if len(resized) > 1 else ""
        report.notes.append(f"{name}{more} resized, {list(before[name])} -> {list(state[name].shape)}")
    if (positions := state.get("pos_embed")) is not None:
        state["pos_embed"] = _positions(model, original.get("pos_embed", positions), positions, report)
    gone = _group(before.keys() - state.keys())
    if state.keys() <= before.keys():
        report.dropped += gone
    elif gone:
        report.notes.append(f"renamed by timm: {', '.join(gone)}")
    return state


def _positions(model: nn.Module, of_file: Tensor, by_timm: Tensor, report: LoadReport) -> Tensor:
    """Those that timm made of a file's, unless it may have taken one grid for another of as many patches."""
    found = from_square_grid(model, of_file)
    if found is None:
        return by_timm
    report.notes += filter(None, [found[1]])
    return found[0]


def _check_keys(model: nn.Module, state: State, source: str | Path) -> None:
    """ValueError unless the file has each weight that the model has, in its shape, and no other."""
    own = _expected(model)
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    problems = [
        f"{name} is {list(state[name].shape)} in the file, {list(own[name].shape)} in the model"
        for name in wrong[:2]
    ]
    for what, names in (("missing from the file", missing), ("unknown to the model", unknown)):
        if names:
            problems.append(f"{len(names)} tensors are {what}: {', '.join(_group(names)[:4])}")
    if {"norm.weight", "norm.bias"} & set(missing) and "fc_norm.weight" in unknown:
        problems.append("the file's norm follows an average of patch tokens: open it with global_pool='avg'")
    if problems:
        raise ValueError(f"checkpoint {source} does not fit this model: " + "; ".join(problems))


def _expected(model: nn.Module) -> State:
    """What a file must hold for `model`: its state without the head."""
    return {name: value for name, value in model.state_dict().items() if not _HEADS.match(name)}


def _group(names: Any) -> list[str]:
    """Names with what they have in common, up to their first dot, as one: "head.*"."""
    found = set()
    for name in names:
        wrapper = "module." if name.startswith("module.") else ""
        first, dot, _ = name.removeprefix(wrapper).partition(".")
        found.add(f"{wrapper}{first}.*" if dot else name)
    return sorted(found)


def _load_jax(model: nn.Module, source: Path) -> LoadReport:
    """A file of Google's JAX code, by timm's reader; what that would leave out or adapt is refused here."""
    import numpy as np

    load = getattr(model, "load_pretrained", None)
    if not callable(load):
        raise ValueError(f"checkpoint {source}: {type(model).__name__} reads no .npz files")
    try:
        with np.load(source) as file:
            shapes = {name: file[name].shape for name in file.files}
            norm = {
                ours: torch.from_numpy(file[name])
                for name in file.files
                for ours, theirs in (("weight", "scale"), ("bias", "bias"))
                if name.endswith(f"Transformer/encoder_norm/{theirs}")
            }
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint {source} cannot be read: {first_line(error)}") from error
    _check_jax_geometry(model, shapes, source)
    report = LoadReport("JAX")
    report.dropped += sorted(
        {name.rpartition("/")[0] + "/*" for name in shapes if re.search(r"(^|/)(head|pre_logits)/", name)}
    )
    of_head = {name for name in model.state_dict() if _HEADS.match(name)}
    weights = {name: each for name, each in model.named_parameters() if name not in of_head}
    try:
        with torch.no_grad():
            # What is NaN afterwards, the reader has passed over.
            for each in weights.values():
                each.fill_(float("nan"))
            load(str(source))
            if (positions := weights.get("pos_embed")) is not None:
                theirs = next(shape for name, shape in shapes.items() if name.endswith("pos_embedding"))
                if theirs != positions.shape:
                    report.notes.append(f"pos_embed resized, {list(theirs)} -> {list(positions.shape)}")
                positions.copy_(_positions(model, positions.clone(), positions, report))
    # timm looks its arrays up by name and copies them without checks.
    except Exception as error:
        raise ValueError(f"checkpoint {source} does not fit this model: {one_line(error)}") from error
    after_pooling = getattr(model, "fc_norm", None)
    if isinstance(getattr(model, "norm", None), nn.Identity) and isinstance(after_pooling, nn.LayerNorm):
        after_pooling.load_state_dict(norm)
        report.notes.append("Transformer/encoder_norm -> fc_norm")
    missing = _group(name for name, each in weights.items() if each.isnan().any())
    if missing:
        raise ValueError(
            f"checkpoint {source} does not fit this model: missing from the file: {', '.join(missing)}"
        )
    return report


def _check_jax_geometry(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    own = model.state_dict()
    kernels = [
        shape for name, shape in shapes.items() if name.endswith("embedding/kernel") and len(shape) == 4
    ]
    if not kernels:
        raise ValueError(f"checkpoint {source} holds no embedding/kernel, as files of a JAX ViT do")
    if _EMBEDDING in own:
        height, width, channels, features = kernels[0]
        mine = tuple(own[_EMBEDDING].shape)
        _compare(source, "channels of an image", channels, mine[1], f"open it with in_chans={channels}")
        patches = [f"{height}x{width}", f"{mine[2]}x{mine[3]}"]
        _compare(source, "patches of", patches[0], patches[1], "choose a model with such patches")
        _compare(source, "width", features, mine[0], "choose the model of that size")
    numbers = [re.search(r"encoderblock_(\d+)/", name) for name in shapes]
    depth = 1 + max((int(found[1]) for found in numbers if found), default=-1)
    stacked = [shape[0] for name, shape in shapes.items() if "encoderblock/LayerNorm_0/scale" in name]
    depth = stacked[0] if stacked else depth
    _compare(source, "blocks", depth, _depth(own), "choose the model of that size")
    has_class_token = any(name.rpartition("/")[2] == "cls" for name in shapes)
    if has_class_token and getattr(model, "cls_token", None) is None:
        raise ValueError(f"checkpoint {source} has a class token, and this model has none")
