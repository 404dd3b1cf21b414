"""Random numbers that a seed decides, without leaving a trace in the caller's global generators.

Limits: the generators of Python, NumPy, torch's CPU and one CUDA device; of this process only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Within `with seeded(seed):`, all global generators start from `seed`; they come back as they were.

    `device` is the one besides the CPU whose random numbers are drawn, if it is CUDA. The generators of other
    devices are left alone, which `torch.manual_seed` would not do.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda):
            random.seed(seed)
            # NumPy's takes 32 bits.
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            for each in cuda:
                with torch.cuda.device(each):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
