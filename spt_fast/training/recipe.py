"""How a model is tuned: the options of `spt-fast train` and the keys of a YAML file, in one dataclass."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from spt_fast.methods.registry import METHODS
from spt_fast.support.names import instead, nearest
from spt_fast.training.recipe_values import OF_PROMPTS, Option, check_prompt_init
from spt_fast.training.shipped_recipes import shipped

GROUPS = ("model", "images", "optimisation", "choice")
# The images of a step for which `lr_scale: batch` leaves rates as they are, as in VPT.
SCALE_BATCH = 256


_METHOD = "spt-deep"  # where none is stated


def _field(group: str, default: Any, help: str, choices: tuple[str, ...] = (), **bounds: float) -> Any:
    """A field with the help of its option.

    Args:
        choices: of a str, where its type does not say them.
        bounds: of a number: those of `support.arguments.check_number`.
    """
    metadata = {"group": group, "help": help, "choices": choices, "bounds": bounds}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_model, _images, _optimisation, _choice = (partial(_field, group) for group in GROUPS)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is tuned; on which model, images and device it is, and where it goes, are no part of it.

    The defaults are the paper's (Sec. 4.1), and where it is silent those of docs/recipes.md, which describes
    every field; so does `spt-fast train --help`. None is "not stated": the value is found from the rest.

    >>> recipe = spt_fast.Recipe(epochs=20, ema=0.999)
    >>> recipe = spt_fast.Recipe.named("paper-fgvc", lr=5e-2)
    >>> recipe = spt_fast.Recipe.from_yaml("recipe.yaml").replace(seed=1)

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a value is out of range, or two contradict each other.
    """

    method: str | None = _model(
        None, "what is learned beside the head, of docs/methods.md (unset: spt-deep)", tuple(METHODS)
    )
    method_options: Mapping[str, Any] = _model(
        {}, "an option of the method, such as bottleneck=8; may be repeated"
    )
    num_prompts: int | None = _model(
        None, "prompts per block (unset: of SPT and VPT 20 deep, 100 shallow)", minimum=1
    )
    prompt_init: Literal["prototypes", "random", "vipamin"] | None = _model(
        None,
        "where prompts start: prototypes of the training images, VPT's random values, or VIPAMIN "
        "(unset: of SPT prototypes, of the others random)",
    )
    prompt_init_options: Mapping[str, Any] = _model(
        {}, "of vipamin: k, weight or max_images, such as k=32; may be repeated"
    )
    freeze_prompts: bool = _model(False, "learn the head only (Table 4a)")
    prompt_dropout: float = _model(
        0.0, "share of the prompts' elements that a step drops", minimum=0, below=1
    )
    pool: Literal["token", "avg", "avg-with-prompts"] | None = _model(
        None,
        "what the head gets: the class token, or the average of patches, or of patches and prompts "
        "(unset: avg-with-prompts for MAE's weights, else timm's own)",
    )
    norm: Literal["own", "new"] | None = _model(
        None, "the final norm: that of the weights, or a new one, frozen too (unset: own)"
    )
    head_init: Literal["timm", "trunc_normal", "kaiming"] = _model(
        "timm", "start of the head: timm's, the released code's (truncated normal), or VPT's"
    )
    head_std: float | None = _model(None, "of trunc_normal (unset: 0.02; the code's MoCo: 0.01)", above=0)
    head_norm: Literal["none", "batch"] = _model(
        "none", "batch: a batch norm without weights before the head, as in MAE's linear probe"
    )
    # float16 would need its gradients scaled.
    weight_dtype: Literal["bf16"] | None = _model(
        None, "run the frozen backbone in it (unset: as its weights are)"
    )

    batch_size: int = _images(32, "images of a batch, over all processes together", minimum=1)
    augment: Literal["resized-crop", "crop", "none"] | None = _images(
        None,
        "training images: random resized crops (timm), or random crops after resize, both with flips "
        "(unset: resized-crop; none on VTAB and the digits)",
    )
    resize: Literal["model", "fgvc", "vtab", "short"] | None = _images(
        None,
        "timm's for the model; short side 256, centre 224; straight to the square; short side, centre "
        "(unset: as the prompts were made, or as fits the data)",
    )
    mean_std: Literal["model", "imagenet"] | None = _images(
        None, "of pixels (unset: as the prompts were made, else the model's)"
    )
    drop_last: bool = _images(False, "leave out a last training batch that is not full")
    balance: Literal["none", "loss", "sampler"] = _images(
        "none",
        "of unequal classes: weights of the loss, or drawing images so that classes come equally often",
    )

    epochs: int = _optimisation(100, "passes over the training images", minimum=1)
    warmup_epochs: float | None = _optimisation(
        None,
        "linear rise of the rates, below epochs; may be a fraction (unset: a tenth of epochs)",
        minimum=0,
    )
    optimizer: str = _optimisation("adamw", "a name of timm.optim.list_optimizers()")
    momentum: float = _optimisation(0.9, "of optimizers that have one, such as sgd", minimum=0, below=1)
    lr: float = _optimisation(1e-2, "highest learning rate, of everything but prompts", above=0)
    lr_scale: Literal["none", "batch"] = _optimisation(
        "none", f"batch: lr and prompt_lr times the images of a step / {SCALE_BATCH}"
    )
    prompt_lr: float | None = _optimisation(
        None,
        "highest rate of the prompts (unset: 30 lr times the prompts' root mean square; lr with sgd and kin)",
        above=0,
    )
    min_lr: float = _optimisation(1e-8, "rate of the last step, where the schedule is cosine", minimum=0)
    schedule: Literal["cosine", "constant"] = _optimisation("cosine", "rates after the warm-up")
    weight_decay: float = _optimisation(1e-4, "of prompts and head; biases and norms have none", minimum=0)
    head_weight_decay: float | None = _optimisation(None, "of the head (unset: weight_decay)", minimum=0)
    ema: float | None = _optimisation(
        None, "decay of averaged weights, evaluated beside the plain ones (unset: none)", above=0, below=1
    )
    drop_path: float = _optimisation(
        0.0, "stochastic depth of the last block; it grows linearly", minimum=0, below=1
    )
    label_smoothing: float = _optimisation(0.0, "of the training loss", minimum=0, below=1)
    mixup: float = _optimisation(0.0, "alpha of mixup; 0 is none", minimum=0)
    cutmix: float = _optimisation(0.0, "alpha of cutmix; 0 is none", minimum=0)
    clip_grad: float | None = _optimisation(
        None, "largest norm of the gradient (unset: not clipped)", above=0
    )
    accumulate: int = _optimisation(1, "batches of a step", minimum=1)
    amp: Literal["auto", "off", "bf16", "fp16"] = _optimisation(
        "auto", "autocast of training and validation, not of tests; auto is bf16 on CUDA, else off"
    )
    compile: bool = _optimisation(False, "run the model through torch.compile")
    channels_last: bool = _optimisation(False, "memory format of images and weights")

    keep: Literal["last", "best"] = _choice("last", "weights of the last epoch, or of the best by validation")
    patience: int | None = _choice(
        None, "stop after so many validations in a row without a better one (unset: never)", minimum=1
    )
    val_every: int = _choice(1, "validate after every so many epochs, and after the last", minimum=1)
    seed: int = _choice(0, "of everything that is drawn")

    def __post_init__(self) -> None:
        for option in options():
            checked = option.check(getattr(self, option.name))
            object.__setattr__(self, option.name, checked)
        self._check_method()
        self._check_head()
        self._check_rates()
        self._check_step()

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **changes: Any) -> Recipe:
        """The recipe of a YAML file, whose keys are fields; fields that it leaves out have their defaults.

        Of the `run.yaml` of a run it takes the recipe, and nothing of what the run was of.

        Args:
            changes: fields that win over the file's. With another `method` the file's `method_options` are
                none, with another `prompt_init` its `prompt_init_options`.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError: `changes` has a name that is no field.
            ValueError: the file is no YAML, has a key that is no field or comes twice, or a value is wrong.
        """
        from spt_fast.support.files import check_input_path
        from spt_fast.support.yaml_text import read_yaml

        check_input_path(path, argument="recipe")
        source = os.fspath(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is no valid YAML: it is not UTF-8") from error
        values = read_yaml(text, source)
        of_run = values.get("recipe")
        return cls._of(of_run if isinstance(of_run, Mapping) else values, source, changes)

    @classmethod
    def named(cls, name: str, **changes: Any) -> Recipe:
        """A recipe that ships with the package, one of `names()`; `changes` as in `from_yaml`.

        Raises:
            TypeError: `changes` has a name that is no field, or `name` is no text.
            ValueError: there is no such recipe, or a value is wrong.
        """
        known = shipped()
        if not isinstance(name, str):
            raise TypeError(f"recipe must be one of Recipe.names(), got {name!r}")
        if name not in known:
            raise ValueError(
                "recipe must be one of Recipe.names(), or on the command line a YAML file, "
                f"got {name!r}{nearest(name, known)}"
            )
        return cls._of(known[name], f"recipe {name}", changes)

    @staticmethod
    def names() -> tuple[str, ...]:
        """The names that `named` takes, in alphabetical order; FAMILY/TASK where values differ by task."""
        return tuple(shipped())

    @classmethod
    def _of(cls, values: Mapping[str, Any], source: str, changes: Mapping[str, Any]) -> Recipe:
        check_names(changes)
        for name in values:
            if name not in _names():
                raise ValueError(f"{source}: {name!r} is no field of a recipe{instead(name, _names())}")
        try:
            return cls(**{**_still_meant(values, changes), **changes})
        except (TypeError, ValueError) as error:
            given = f" with {', '.join(changes)} given" if changes else ""
            raise type(error)(f"{source}{given}: {error}") from error

    def replace(self, **changes: Any) -> Recipe:
        """The same recipe with other values of these fields; errors as `Recipe`.

        Raises:
            TypeError: a name is no field.
        """
        check_names(changes)
        return dataclasses.replace(self, **changes)

    def to_yaml(self) -> str:
        """All fields with their values, as `from_yaml` reads them."""
        from spt_fast.support.yaml_text import write_yaml

        return write_yaml(dataclasses.asdict(self))

    def differences(self, other: Recipe) -> list[str]:
        """A line for each field in which `other` differs, such as "lr: 0.01 here, 0.05 there"."""
        return [
            f"{name}: {here} here, {there} there"
            for name in _names()
            if (here := getattr(self, name)) != (there := getattr(other, name))
        ]

    @property
    def method_name(self) -> str:
        """`method`, or "spt-deep" where it is not stated."""
        return self.method or _METHOD

    @property
    def depth(self) -> Literal["deep", "shallow"]:
        """Where the prompts of `method` go in, as its options say; "deep" where there are none."""
        is_shallow = self.method_options.get("depth") == "shallow"
        return "shallow" if is_shallow else METHODS[self.method_name].depth

    @property
    def has_prompts(self) -> bool:
        """Whether `method` has prompts."""
        return METHODS[self.method_name].prompts is not None

    @property
    def prompts_from(self) -> Literal["prototypes", "random", "vipamin"] | None:
        """`prompt_init`, or where the prompts of `method` start where it is not stated; None without any."""
        kind = METHODS[self.method_name].prompts
        if self.prompt_init is None and kind is not None:
            return "prototypes" if kind == "prototypes" else "random"
        return self.prompt_init

    @property
    def needs_prototypes(self) -> bool:
        """Whether the prompts start from prototypes."""
        return self.prompts_from == "prototypes"

    @property
    def prompts_per_block(self) -> int | None:
        """`num_prompts`, or as many as `method` has where it is not stated; None where there are none."""
        return self.num_prompts or METHODS[self.method_name].prompts_with(self.method_options)

    @property
    def warmup(self) -> float:
        """`warmup_epochs`, or a tenth of `epochs` where it is not stated."""
        return 0.1 * self.epochs if self.warmup_epochs is None else self.warmup_epochs

    @property
    def peak_lr(self) -> float:
        """`lr`, scaled as `lr_scale` says, for batches of `batch_size`."""
        return self.lr * self._scale

    @property
    def peak_prompt_lr(self) -> float | None:
        """`prompt_lr`, scaled likewise; None where it depends on the prompts."""
        if self.prompt_lr is None:
            return None if self._turns_by_rate else self.peak_lr
        return self.prompt_lr * self._scale

    @property
    def _scale(self) -> float:
        return self.batch_size * self.accumulate / SCALE_BATCH if self.lr_scale == "batch" else 1.0

    @property
    def _turns_by_rate(self) -> bool:
        """Whether the length of a step is about the rate, whatever the gradient (docs/train.md)."""
        return not re.search("sgd|momentum|nesterov", self.optimizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        return self

    def _check_method(self) -> None:
        if self.has_prompts:
            check_prompt_init(self.method_name, self.prompt_init, self.prompt_init_options)
            return
        defaults = {option.name: option.default for option in options()}
        for name in OF_PROMPTS:
            if (value := getattr(self, name)) != defaults[name]:
                raise ValueError(
                    f"{name} is for prompts, which method={self.method!r} does not have, got {value!r}"
                )

    def _check_head(self) -> None:
        if self.head_std is not None and self.head_init != "trunc_normal":
            raise ValueError(
                f"head_std is for head_init='trunc_normal', got {self.head_std} with {self.head_init!r}"
            )

    def _check_rates(self) -> None:
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be below epochs ({self.epochs}), got {self.warmup_epochs:g}"
            )
        if self.schedule == "constant":
            return
        for name, rate in (("lr", self.peak_lr), ("prompt_lr", self.peak_prompt_lr)):
            if rate is not None and rate <= self.min_lr:
                scaled = f" after lr_scale={self.lr_scale!r}" if self.lr_scale != "none" else ""
                raise ValueError(f"{name} must be above min_lr ({self.min_lr:g}), got {rate:g}{scaled}")

    def _check_step(self) -> None:
        mixed = next((name for name in ("mixup", "cutmix") if getattr(self, name)), None)
        if mixed and self.balance == "loss":
            raise ValueError(
                f"{mixed} mixes classes, which balance='loss' would weigh one by one: "
                "take balance='sampler', or one of the two"
            )
        if self.amp == "fp16" and self.weight_dtype is not None:
            raise ValueError(f"amp='fp16' and weight_dtype={self.weight_dtype!r} contradict each other")


@cache
def options() -> tuple[Option, ...]:
    """The fields of `Recipe`, in their order."""
    hints = get_type_hints(Recipe)
    return tuple(_option(field, hints[field.name]) for field in dataclasses.fields(Recipe))


def given_or_default(recipe: Recipe | None) -> Recipe:
    """`recipe`, or that of the defaults where it is None.

    Raises:
        TypeError: it is something else, such as the name of one.
    """
    if recipe is not None and not isinstance(recipe, Recipe):
        raise TypeError(
            "recipe must be a Recipe, as spt_fast.Recipe(epochs=20) or Recipe.named('paper') gives one, or "
            f"None, got {recipe!r:.60}"
        )
    return recipe or Recipe()


def _still_meant(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without the options of a method, and of a start, that `changes` replace by another."""
    kept = dict(values)
    if "method" in changes and (changes["method"] or _METHOD) != (values.get("method") or _METHOD):
        kept.pop("method_options", None)
    if "prompt_init" in changes and changes["prompt_init"] != values.get("prompt_init"):
        kept.pop("prompt_init_options", None)
    return kept


def check_names(names: Iterable[str]) -> None:
    """TypeError unless each is a field of `Recipe`."""
    for name in names:
        if name not in _names():
            raise TypeError(f"{name!r} is no field of a recipe{instead(name, _names())}")


@cache
def _names() -> tuple[str, ...]:
    return tuple(option.name for option in options())


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    optional = type(None) in get_args(hint)
    (kind,) = [each for each in (get_args(hint) if optional else (hint,)) if each is not type(None)]
    choices = get_args(kind) if get_origin(kind) is Literal else field.metadata["choices"]
    if get_origin(kind) is Mapping:
        kind = dict
    return Option(
        field.name,
        field.metadata["group"],
        field.metadata["help"],
        {} if kind is dict else field.default,
        str if choices else kind,
        choices,
        optional,
        field.metadata["bounds"],
    )
