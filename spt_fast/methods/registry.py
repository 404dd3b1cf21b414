"""Every method by its name: what builds it, which options it has, and how a file of it is opened."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from spt_fast.support.names import nearest

if TYPE_CHECKING:
    from torch import nn

    from spt_fast.methods.base import TunedViT
    from spt_fast.methods.file_format import TunedState

# What every method has, what every method of prompts has, and what only the prompts start from.
_COMMON = ("num_classes", "head_norm", "weight_dtype")
_OF_PROMPTS: Mapping[str, Any] = {
    "freeze_prompts": False,
    "engine": "auto",
    "pool_prompts": None,
    "prompt_dropout": 0.0,
    "allow_other_backbone": False,
}
_START = "prompts"


class Method(NamedTuple):
    """A method by name. Its class is loaded when it is asked for: names can do without torch.

    Attributes:
        file: of this wing, which holds the class.
        class_name: of a `TunedViT`.
        fixed: arguments that the name stands for.
        prompts: what prompts start from: "prototypes" (SPT), "random" (VPT) or "any"; None without prompts.
        num_prompts: of a model, where nothing else is asked for.
        depth: whether prompts enter each block, or the first one.
        pools: whether its prompts are among the tokens that a head may average.
        variants: file and name of the class that takes over where an option is given, by the option.
        shallow_prompts: `num_prompts` where its option `depth` is "shallow", if that is another number.
    """

    file: str
    class_name: str
    fixed: Mapping[str, Any] = {}
    prompts: str | None = None
    num_prompts: int | None = None
    depth: Literal["deep", "shallow"] = "deep"
    pools: bool = True
    variants: Mapping[str, tuple[str, str]] = {}
    shallow_prompts: int | None = None

    def load(self, given: Mapping[str, Any] = {}) -> type[TunedViT]:
        """The class, where these options of it are `given`."""
        places = (place for option, place in self.variants.items() if option in given)
        file, class_name = next(places, (self.file, self.class_name))
        found: type[TunedViT] = getattr(import_module(f"spt_fast.methods.{file}"), class_name)
        return found

    def prompts_with(self, given: Mapping[str, Any]) -> int | None:
        """How many there are by default, where these options of it are `given`."""
        shallow = self.shallow_prompts if given.get("depth") == "shallow" else None
        return shallow or self.num_prompts


_PROJECTED = {"project": ("vpt_projected", "ProjectedVPT")}
# In the order of docs/methods.md.
METHODS: Mapping[str, Method] = {
    "spt-deep": Method("prompted_vit", "PromptedViT", {"depth": "deep"}, "prototypes", 20),
    "spt-shallow": Method("prompted_vit", "PromptedViT", {"depth": "shallow"}, "prototypes", 100, "shallow"),
    "vpt-deep": Method("prompted_vit", "PromptedViT", {"depth": "deep"}, "random", 20, variants=_PROJECTED),
    "vpt-shallow": Method(
        "prompted_vit", "PromptedViT", {"depth": "shallow"}, "random", 100, "shallow", variants=_PROJECTED
    ),
    "gate-vpt": Method("gate_vpt", "GateVPT", prompts="any", num_prompts=100, depth="shallow"),
    "e2vpt": Method("e2vpt", "E2VPT", prompts="any", num_prompts=10),
    "vfpt": Method("vfpt", "VFPT", prompts="any", num_prompts=20),
    "cvpt": Method("cvpt", "CVPT", prompts="any", num_prompts=20, pools=False),
    "bpt": Method("bpt", "BPT", prompts="any", num_prompts=50, shallow_prompts=100),
    "adapter": Method("adapter", "Adapter"),
    "ssf": Method("ssf", "ScaleShiftFeatures"),
    "lora": Method("lora", "LoRA"),
    "peft": Method("peft_tuners", "PeftTuner"),
    "snf": Method("snf", "SkipFlows"),
    "mp": Method("mp", "MomentProbing"),
    "mp+": Method("mp_plus", "MomentProbingPlus"),
    "linear": Method("own_weights", "LinearProbe"),
    "bias": Method("own_weights", "Bias"),
    "partial": Method("own_weights", "Partial"),
    "full": Method("own_weights", "Full"),
}


def names() -> tuple[str, ...]:
    """The names that `tune` takes."""
    return tuple(METHODS)


def find(name: str) -> Method:
    """The method of a name.

    Raises:
        TypeError: `name` is no string.
        ValueError: there is no such method; the message has the nearest names.
    """
    if not isinstance(name, str):
        raise TypeError(f"method must be a string, got {name!r}")
    if name not in METHODS:
        close = nearest(name, METHODS)
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}{close}")
    return METHODS[name]


@cache
def options(name: str) -> Mapping[str, Any]:
    """The options of a method and their defaults, beside those that every method has.

    Raises:
        ValueError: there is no such method.
    """
    method = find(name)
    parameters = inspect.signature(method.load()).parameters.values()
    left_out = {"model", "options", _START, *_COMMON, *method.fixed}
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        **{
            each.name: each.default
            for each in parameters
            if each.name not in left_out and each.kind in keywords
        },
        **dict.fromkeys(method.variants),
        **({} if method.prompts is None else _OF_PROMPTS),
    }


def tune(
    model: nn.Module, name: str, *, prompts: Any = None, num_classes: int | None = None, **given: Any
) -> TunedViT:
    """`model` taken over by a method, to be trained: what it learns, and a head.

    >>> tuned = spt_fast.tune(model, "spt-deep", prompts=protos, num_classes=200)
    >>> tuned = spt_fast.tune(model, "adapter", num_classes=200, bottleneck=8)

    Args:
        model: a timm Vision Transformer; see `TunedViT`.
        name: one of `spt_fast.methods.names()`; docs/methods.md says what each learns.
        prompts: what prompts start from, for methods that have any: `Prototypes` or a tensor, or how many
            random ones; None is the method's own number, where it draws them.
        num_classes: size of a new head; None trains a copy of the model's head.
        given: options of the method (`spt_fast.methods.options(name)`), `head_norm` and `weight_dtype`.

    Raises:
        TypeError: an argument is of the wrong type, or the model is none that the method can tune.
        ValueError: there is no such method or option, or the model cannot honour one; the model is then left
            as it was.
    """
    method = find(name)
    check_options(name, given)
    start = () if method.prompts is None else (_start(name, method, prompts, given),)
    if method.prompts is None and prompts is not None:
        raise ValueError(f"prompts must be None for method {name!r}, which has none, got {prompts!r:.60}")
    # An option of a class of its own is off where it is None.
    given = {
        option: value for option, value in given.items() if value is not None or option not in method.variants
    }
    build: Any = method.load(given)
    tuned: TunedViT = build(model, *start, num_classes=num_classes, **method.fixed, **given)
    tuned.method = name
    return tuned


def load_tuned(
    path: str | os.PathLike[str], model: nn.Module, *, allow_other_backbone: bool = False, **use: Any
) -> TunedViT:
    """`model` with what a file of `save` holds, by whatever method it was tuned.

    >>> tuned = spt_fast.load_tuned("task.safetensors", model).eval()

    Args:
        allow_other_backbone: also with other weights, known by a few of them, or another image size.
        use: `weight_dtype`; for prompts also `engine`.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: the file holds no tuned model, or one of another backbone, or of a method that
            this version does not know; the model is then left as it was.
    """
    from spt_fast.methods.file_format import TunedState

    return of_state(TunedState.read(path), path, model, allow_other_backbone=allow_other_backbone, **use)


def of_state(state: TunedState, path: str | os.PathLike[str], model: nn.Module, **options: Any) -> TunedViT:
    """`load_tuned` of a file that has been read: `state` is what it held, `path` its name for errors."""
    if state.method not in METHODS:
        raise ValueError(f"{os.fspath(path)} was tuned by {state.method!r}, which this version does not know")
    tuned = METHODS[state.method].load(state.options).from_state(state, path, model, **options)
    tuned.method = state.method
    return tuned


def check_options(name: str, given: Mapping[str, Any]) -> None:
    """ValueError where a name is no option of the method; says which method has it, or what is like it."""
    known = [*options(name), *(each for each in _COMMON if each != "num_classes")]
    for option in given:
        if option not in known:
            others = [other for other in METHODS if option in options(other)]
            hint = f"; {', '.join(others)} have it" if others else nearest(option, known)
            if option == "num_prompts" and METHODS[name].prompts is not None:
                hint = f"; {_START} takes prompts, or how many random ones"
            has = ", ".join(known)
            raise ValueError(f"{option!r} is no option of method {name!r}, which has {has}{hint}")


def _start(name: str, method: Method, prompts: Any, given: Mapping[str, Any]) -> Any:
    """What the prompts of a method start from."""
    is_number = isinstance(prompts, Integral) and not isinstance(prompts, bool)
    if method.prompts == "prototypes" and (prompts is None or is_number):
        raise ValueError(
            f"prompts must be Prototypes or a tensor for method {name!r}, got {prompts!r}; "
            "spt_fast.build_prototypes(model, loader) gives them"
        )
    if method.prompts == "random" and not (prompts is None or is_number):
        raise ValueError(
            f"prompts must be a number for method {name!r}, which draws them, got {prompts!r:.60}"
        )
    return method.prompts_with(given) if prompts is None else prompts
