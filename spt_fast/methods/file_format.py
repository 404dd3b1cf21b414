"""The file of a tuned model: what was learned, and the facts that say which model it fits."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from spt_fast.backbones.identity import check_facts
from spt_fast.backbones.pooling import NORMS, Pooling, norm_follows_average, pool_of, stated_pooling
from spt_fast.backbones.snapshot import HEAD_NORMS
from spt_fast.data.transforms import PREPROCESSING, Preprocessing
from spt_fast.prompting.checks import check_class_names
from spt_fast.support.arguments import check_bool, check_choice, check_tensor
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.files import read_safetensors, write_safetensors

PROMPTED_KIND, TUNED_KIND = "prompted_vit", "tuned_vit"
# The shape of the head tells the number of classes; their names, and what is done to images, are read. The
# methods of prompts differ in where they start.
_FACTS_THAT_MAY_DIFFER = ("num_classes", "class_names", PREPROCESSING, "method")


@dataclass(frozen=True)
class TunedState:
    """What `TunedViT.save` writes.

    Attributes:
        tensors: what the method learns, such as "prompts" [L or 1, N_p, D] or "model." before the name of a
            weight of the model; and "head." before each name of the head's own state.
        facts: those of `describe` and `describe_norm`, and `method` and `global_pool`; `options` (JSON) of
            the method if there are any; for prompts `prompt_depth` and `pool_prompts`; `norm` ("own" or
            "new") where `open_model` stated it, `head_norm` ("batch") where there is one, `num_classes` where
            the model states it, `class_names` and `preprocessing` (JSON) if set.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        learned: Mapping[str, Tensor],
        head: nn.Module,
        *,
        facts: Mapping[str, str],
        options: Mapping[str, Any],
        head_norm: str,
        class_names: Sequence[str] | None,
        preprocessing: Preprocessing | None,
    ) -> TunedState:
        """The state of what was learned on `model`; the tensors are the model's, not copies.

        Raises:
            TypeError: `preprocessing` is something else.
        """
        if not isinstance(preprocessing, Preprocessing | None):
            raise TypeError(
                f"preprocessing must be a Preprocessing of spt_fast.data.transforms or None, "
                f"got {preprocessing!r}"
            )
        of_head = {f"head.{name}": value for name, value in head.state_dict(keep_vars=True).items()}
        facts = {**facts, "global_pool": str(getattr(model, "global_pool", ""))}
        stated = stated_pooling(model)
        if stated is not None:
            facts["norm"] = stated.norm
        if options:
            facts["options"] = json.dumps(dict(options))
        if head_norm != "none":
            facts["head_norm"] = head_norm
        num_classes = getattr(model, "num_classes", None)
        if num_classes is not None:
            facts["num_classes"] = str(num_classes)
        if class_names is not None:
            facts["class_names"] = json.dumps(list(class_names))
        if preprocessing is not None:
            facts[PREPROCESSING] = preprocessing.to_json()
        return cls({**learned, **of_head}, facts)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> TunedState:
        """What a file holds.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, or no file of a tuned model, or a fact or a tensor is missing, not
                finite or cannot be read.
        """
        state = cls(*read_safetensors(path, kind=PROMPTED_KIND, or_kind=TUNED_KIND))
        try:
            state._check()
        except (TypeError, ValueError, RuntimeError) as error:
            raise _not_valid(path, error) from error
        return state

    def _check(self) -> None:
        # Older files, which hold prompts, do not say so; those of projected prompts have options.
        if self.facts.get("method", "spt-").startswith(("spt-", "vpt-")) and not self.options:
            self._check_prompts()
        for name, tensor in self.tensors.items():
            check_finite(name, tensor)
        check_choice("norm", self.facts.get("norm", "own"), NORMS)
        check_choice("head_norm", self.facts.get("head_norm", "none"), HEAD_NORMS)
        number = self.facts.get("num_classes", "0")
        if not number.isdecimal():
            raise ValueError(f"num_classes must be an integer >= 0, got {number!r}")
        check_class_names(self.class_names, self.num_classes)
        # Errors in what is read on demand.
        self.preprocessing, self.options  # noqa: B018

    def _check_prompts(self) -> None:
        for name, held in (
            ("prompts", self.tensors),
            ("prompt_depth", self.facts),
            ("pool_prompts", self.facts),
        ):
            if name not in held:
                raise ValueError(f"it holds no {name}")
        prompts = check_tensor("prompts", self.tensors["prompts"])
        if prompts.ndim != 3:
            raise ValueError(f"prompts must be [L or 1, N_p, D], got {list(prompts.shape)}")
        check_choice("prompt_depth", self.facts["prompt_depth"], ("deep", "shallow"))
        check_choice("pool_prompts", self.facts["pool_prompts"], ("True", "False"))

    def write(self, path: str | os.PathLike[str], *, overwrite: bool) -> None:
        """Write to a safetensors file, completely or not at all.

        Raises:
            NonFiniteError: a tensor holds NaN or infinity, so that `read` would refuse the file; `layer` is
                set where it is the prompts of a block.
            FileExistsError, FileNotFoundError, OSError: as `support.files.write_safetensors`.
        """
        check_bool("overwrite", overwrite)
        for name, tensor in self.tensors.items():
            check_finite(name, tensor)
        kind = PROMPTED_KIND if "prompt_depth" in self.facts else TUNED_KIND
        write_safetensors(path, self.tensors, self.facts, kind=kind, overwrite=overwrite)

    @property
    def method(self) -> str:
        """Its name; of older files, which hold prompts, SPT's."""
        return self.facts.get("method") or f"spt-{self.depth}"

    @property
    def options(self) -> dict[str, Any]:
        """Of the method."""
        found = json.loads(self.facts.get("options", "{}"))
        if not isinstance(found, dict):
            raise ValueError(f"options must be a JSON object, got {self.facts['options']!r}")
        return found

    @property
    def depth(self) -> Literal["deep", "shallow"]:
        return "shallow" if self.facts.get("prompt_depth") == "shallow" else "deep"

    @property
    def pool_prompts(self) -> bool:
        return self.facts.get("pool_prompts") == "True"

    @property
    def stated_pooling(self) -> Pooling | None:
        """The form in which `open_model` opened the model, where it stated one."""
        return self._pooling if "norm" in self.facts else None

    @property
    def _pooling(self) -> Pooling:
        pool = pool_of(self.facts.get("global_pool", ""), pool_prompts=self.pool_prompts)
        return Pooling(pool, self.facts.get("norm", "own"))

    def check_pooling(self, path: str | os.PathLike[str], model: nn.Module) -> None:
        """ValueError where `open_model` opened `model` in another form than that of this state."""
        opened = stated_pooling(model)
        if opened is not None and opened.pool == "avg-with-prompts" and "pool_prompts" not in self.facts:
            # Of a method without prompts among the tokens: there are only patches to average.
            opened = replace(opened, pool="avg")
        if opened is not None and opened != self._pooling:
            raise ValueError(
                f"{os.fspath(path)} is for {self._pooling}, but this model was opened with {opened} "
                "(--pool, --norm; pool=None is timm's own pooling)"
            )
        self.check_place_of_norm(path, model)

    def check_place_of_norm(self, path: str | os.PathLike[str], model: nn.Module) -> None:
        """ValueError where the norm stood on the other side of the average of tokens than in `model`."""
        stated, opened = self.stated_pooling, stated_pooling(model)
        moved_here = stated is None and opened is not None and opened.moved
        averages = stated is not None and stated.is_named and stated.pool != "token"
        if moved_here or (averages and not norm_follows_average(model)):
            place, other = ("before", "after") if moved_here else ("after", "before")
            how = "with pool=None" if moved_here else "by open_model, whose pool moves it"
            raise ValueError(
                f"{os.fspath(path)} is for a norm {place} the average of the tokens, but this model has it "
                f"{other}: open the model {how}"
            )

    @property
    def num_classes(self) -> int | None:
        number = self.facts.get("num_classes")
        return None if number is None else int(number)

    def size_of_new_head(self, model: nn.Module) -> int | None:
        """What `num_classes` a tuned model of this state needs on `model`; None keeps the model's head."""
        if self.num_classes == 0 and not any(name.startswith("head.") for name in self.tensors):
            return 0
        same = self.num_classes is None or self.num_classes == getattr(model, "num_classes", None)
        return None if same else self.num_classes

    @property
    def head_norm(self) -> Literal["none", "batch"]:
        return "batch" if self.facts.get("head_norm") == "batch" else "none"

    @property
    def class_names(self) -> tuple[str, ...] | None:
        text = self.facts.get("class_names")
        if text is None:
            return None
        names = json.loads(text)
        if not isinstance(names, list):
            raise ValueError(f"class_names must be a JSON list of strings, got {text!r}")
        return tuple(names)

    @property
    def preprocessing(self) -> Preprocessing | None:
        text = self.facts.get(PREPROCESSING)
        return None if text is None else Preprocessing.from_json(text)

    def check_method(self, path: str | os.PathLike[str], own: TunedState) -> None:
        """ValueError where this state is of another method than a model's `own`."""
        here, there = (("prompts" if "prompt_depth" in each.facts else each.method) for each in (self, own))
        if here != there:
            raise ValueError(
                f"{os.fspath(path)} was tuned by {self.tuned_by}, but this model is tuned by "
                f"{own.tuned_by}; spt_fast.load_tuned takes the method from the file"
            )

    @property
    def tuned_by(self) -> str:
        """The method and its options, for errors."""
        given = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.method!r}{given and f' ({given})'}"

    def check_fits(
        self, path: str | os.PathLike[str], own: TunedState, *, allow_other_backbone: bool = False
    ) -> None:
        """ValueError where this state, read from `path`, cannot take the place of a model's `own`."""
        check_bool("allow_other_backbone", allow_other_backbone)
        check_shapes(path, self.tensors, own.tensors)
        expected = {name: fact for name, fact in own.facts.items() if name not in _FACTS_THAT_MAY_DIFFER}
        check_facts(path, self.facts, expected, allow_other_backbone=allow_other_backbone)
        try:
            check_class_names(self.class_names, own.num_classes)
        except ValueError as error:
            raise _not_valid(path, error) from error


def check_finite(name: str, tensor: Tensor) -> None:
    good = tensor.isfinite()
    if bool(good.all()):
        return
    layer = int((~good).nonzero()[0, 0]) if name == "prompts" else None
    where = name if layer is None else f"{name}[{layer}]"
    raise NonFiniteError(f"{where} holds NaN or infinity, all numbers must be finite", layer=layer)


def _difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    extra, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    shown = [*extra[:3], f"{len(extra) - 3} more"] if len(extra) > 4 else extra
    parts = [f"lacks {', '.join(missing)}"] * bool(missing)
    parts += [f"holds {', '.join(shown)}, which nothing that this model learns has"] * bool(extra)
    return " and ".join(parts) + f"; this model needs {sorted(expected)}"


def check_shapes(
    path: str | os.PathLike[str], found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """TypeError or ValueError unless the tensors of `path` can take the place of those expected."""
    if found.keys() != expected.keys():
        raise ValueError(f"{Path(path)} {_difference(found, expected)}")
    for name, tensor in expected.items():
        if not isinstance(found[name], Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(found[name]).__name__}")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{Path(path)} holds {name} of shape {list(found[name].shape)}, "
                f"but this model needs {list(tensor.shape)}"
            )
        # A head may have integers of its own, such as the count of batches in a batch norm.
        if found[name].is_floating_point() != tensor.is_floating_point():
            raise _not_valid(path, f"{name} is {found[name].dtype}, this model needs {tensor.dtype}")


def _not_valid(path: str | os.PathLike[str], reason: object) -> ValueError:
    return ValueError(f"{os.fspath(path)} does not hold a valid tuned model ({reason})")
