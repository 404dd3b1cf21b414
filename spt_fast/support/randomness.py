"""Random numbers that a seed decides, while the caller's global generators stay as they are.

Limits: the generators of Python, NumPy, torch on the CPU and torch on one CUDA device, in this process.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


def seed_of(*facts: int | str) -> int:
    """A seed in [0, 2**63) that numbers and words decide, and nothing else: of no machine, no version."""
    digest = blake2b(repr(facts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Start the global generators of Python, NumPy, torch on the CPU and on a CUDA `device` from `seed`.

    For use within `seeded`, which gives them back as they were.
    """
    random.seed(seed)
    # NumPy's takes 32 bits.
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


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
            seed_all(seed, device)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
