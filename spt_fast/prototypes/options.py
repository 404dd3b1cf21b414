"""What the options of `build_prototypes` mean: defaults, checks, and which of them have an effect."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spt_fast.clustering.kmeans import INITS
from spt_fast.clustering.lloyd import MAX_ITER, N_INIT, TOL
from spt_fast.clustering.streaming import resolve_capacity
from spt_fast.ops.kmeans import TOKEN_DTYPES
from spt_fast.prototypes.pooling import POOLS
from spt_fast.support.arguments import check_choice, check_int, check_number, parse_bytes

STRATEGIES = ("kmeans", *POOLS)
MODES = ("stream", "exact")
SAMPLINGS = ("batch", "all")
# Prompt lengths of the paper (Sec. 3.4, remark I).
DEFAULT_NUM_PROMPTS = {"deep": 20, "shallow": 100}
DEFAULT_MEMORY_BUDGET = "4GiB"


def choose_capacity(capacity: int | None, num_prompts: int, strategy: str, mode: str) -> int | None:
    """Tokens kept per layer, or None where none are kept."""
    if not _has_effect("capacity", capacity, "stream", strategy, mode):
        return None
    return resolve_capacity(capacity, num_prompts, "num_prompts")


def choose_token_dtype(
    token_dtype: torch.dtype | None, amp_dtype: torch.dtype | None, strategy: str, device: torch.device
) -> torch.dtype | None:
    """What tokens are rounded to before k-means; None for what the model gives."""
    if token_dtype is not None:
        if strategy != "kmeans":
            raise ValueError(f"token_dtype is for strategy='kmeans', got {token_dtype} for {strategy!r}")
        if token_dtype not in TOKEN_DTYPES:
            allowed = ", ".join(map(str, TOKEN_DTYPES))
            raise ValueError(f"token_dtype must be one of {allowed}, got {token_dtype!r}")
        return token_dtype
    # Half the memory, and tensor cores. It changes inertia by less than 0.003 %
    # (benchmarks/bench_token_dtype.py). On CPUs it would save nothing.
    wanted = strategy == "kmeans" and device.type == "cuda" and amp_dtype != torch.float32
    return torch.bfloat16 if wanted else None


class ExactOptions(NamedTuple):
    """How exact mode clusters: bytes of tokens to keep in memory, where Lloyd starts and when it stops."""

    budget: int
    init: str
    n_init: int
    tol: float
    max_iter: int

    def facts(self) -> dict[str, str]:
        """For the metadata; the budget changes nothing."""
        return {name: str(getattr(self, name)) for name in ("init", "n_init", "tol", "max_iter")}


def choose_exact(
    memory_budget: int | str | None,
    init: str | None,
    n_init: int | None,
    tol: float | None,
    max_iter: int | None,
    *,
    strategy: str,
    mode: str,
) -> ExactOptions | None:
    """The options of exact mode, None in another; ValueError where one would have no effect."""
    given = {
        "memory_budget": memory_budget,
        "init": init,
        "n_init": n_init,
        "tol": tol,
        "max_iter": max_iter,
    }
    if not all([_has_effect(name, value, "exact", strategy, mode) for name, value in given.items()]):
        return None
    return ExactOptions(
        parse_bytes("memory_budget", DEFAULT_MEMORY_BUDGET if memory_budget is None else memory_budget),
        check_choice("init", "k-means++" if init is None else init, INITS),
        check_int("n_init", N_INIT if n_init is None else n_init, 1),
        check_number("tol", TOL if tol is None else tol, 0),
        check_int("max_iter", MAX_ITER if max_iter is None else max_iter, 1),
    )


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
