"""What a backbone hands to its head: the class token or an average of tokens, and the final norm."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

Pool = Literal["token", "avg", "avg-with-prompts"]
Norm = Literal["own", "new"]
POOLS = ("token", "avg", "avg-with-prompts")
NORMS = ("own", "new")
# Where `open_model` keeps it.
_ATTRIBUTE = "spt_fast_pooling"


@dataclass(frozen=True)
class Pooling:
    """The form in which `open_model` opened a model, and in which a file was tuned.

    Attributes:
        pool: "token", the class token after the final norm; "avg", the average of the patch tokens, then the
            norm; "avg-with-prompts", the average of patch tokens and prompts, then the norm; or whatever
            else timm calls the pooling of a model.
        norm: "own", the norm of the weights; "new", a norm with weights 1 and biases 0. Both are frozen.
        moved: whether the norm came before the average, and was put behind it.
    """

    pool: str
    norm: str = "own"
    moved: bool = field(default=False, compare=False)

    @property
    def is_named(self) -> bool:
        """Whether `open_model` takes this `pool`."""
        return self.pool in POOLS

    def __str__(self) -> str:
        return f"pool={self.pool!r}, norm={self.norm!r}"


# The released code behind the paper's numbers; the paper says that images are averaged (footnote 2).
PAPER_FOR_MAE = Pooling("avg-with-prompts", "own")


def is_mae(name: str, checkpoint: str | Path | None = None) -> bool:
    """Whether timm's name of a Vision Transformer, or the name of a file, is that of MAE's weights.

    timm tags them "mae"; MAE's authors call their files mae_pretrain_vit_base.pth and the like.
    """
    architecture, _, tag = name.rpartition("/")[2].partition(".")
    by_file = checkpoint is not None and Path(checkpoint).name.startswith("mae_")
    return "vit" in architecture and (tag == "mae" or by_file)


def timm_options(pool: str | None) -> dict[str, Any]:
    """Options of `timm.create_model` for a model that pools so."""
    return {"global_pool": "token" if pool == "token" else "avg"} if pool in POOLS else {}


def set_pooling(model: nn.Module, pooling: Pooling) -> None:
    """Let `model`, which has the weights of its norm by now, end in this form, and state it.

    Raises:
        ValueError: the model cannot pool so, or has no norm to make anew.
    """
    found = getattr(model, "global_pool", None)
    wanted = "token" if pooling.pool == "token" else "avg"
    if pooling.is_named and found != wanted:
        why = (
            ": it has no class token" if getattr(model, "cls_token", 0) is None and wanted == "token" else ""
        )
        raise ValueError(
            f"pool={pooling.pool!r} needs a model with global_pool={wanted!r}, got {found!r}{why}"
        )
    norm, after_pooling = getattr(model, "norm", None), getattr(model, "fc_norm", None)
    if pooling.is_named and wanted == "avg" and not norm_follows_average(model):
        if after_pooling is None:
            raise ValueError(
                f"pool={pooling.pool!r} needs a model with `fc_norm`, got {type(model).__name__}"
            )
        vars(model)["_modules"].update(norm=after_pooling, fc_norm=norm)
        pooling = replace(pooling, moved=True)
    if pooling.norm == "new":
        _reset_norm(model)
    vars(model)[_ATTRIBUTE] = pooling


def stated_pooling(model: nn.Module) -> Pooling | None:
    """The form in which `open_model` opened `model`, if it was told one and nobody changed it since."""
    stated: Pooling | None = getattr(model, _ATTRIBUTE, None)
    if stated is None:
        return None
    found = pool_of(str(getattr(model, "global_pool", "")), pool_prompts=stated.pool == "avg-with-prompts")
    return stated if found == stated.pool else None


def pool_of(global_pool: str, *, pool_prompts: bool) -> str:
    """`Pooling.pool` where timm calls the pooling `global_pool`, and prompts are averaged too or are not."""
    return "avg-with-prompts" if global_pool == "avg" and pool_prompts else global_pool


def norm_follows_average(model: nn.Module) -> bool:
    """Whether the final norm comes after the average; True where there is no average."""
    return getattr(model, "global_pool", None) != "avg" or _has_weights(getattr(model, "fc_norm", None))


def _reset_norm(model: nn.Module) -> None:
    norms = [getattr(model, name, None) for name in ("norm", "fc_norm")]
    with_weights = [norm for norm in norms if _has_weights(norm)]
    if len(with_weights) != 1 or not callable(getattr(with_weights[0], "reset_parameters", None)):
        raise ValueError(
            f"norm='new' needs a model with one final norm, `norm` or `fc_norm`, got {type(model).__name__} "
            f"with {len(with_weights)}"
        )
    with_weights[0].reset_parameters()  # type: ignore[union-attr]


def _has_weights(norm: Any) -> bool:
    return isinstance(norm, nn.Module) and any(True for _ in norm.parameters())
