"""Random numbers that a seed decides, while the caller's global generators stay as they are.

Limits: the generators of Python, NumPy, torch on the CPU and torch on one CUDA device, in this process.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Within `with seeded(seed):`, all global generators start from `seed`; afterwards they are as before.

    The generator of `device` is one of them, if it is a CUDA device. Those of other CUDA devices stay as they
    are, which `torch.manual_seed` would change.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda):
            reseed(seed, device)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def reseed(seed: int, device: torch.device | None = None) -> None:
    """Let all global generators start from `seed`; for use within `seeded`, which gives them back."""
    random.seed(seed)
    # NumPy's takes 32 bits.
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def derived_seed(*numbers: int) -> int:
    """A seed of 63 bits that depends on all of `numbers`, such as a seed, an epoch and a step."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
