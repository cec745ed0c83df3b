"""Numbers that a family does not save, because PEFT draws them again from a seed: torch draws them here, too."""

from __future__ import annotations

from functools import lru_cache
from math import sqrt
from typing import Any

import numpy as np

from regraft.adapters.families.base import Wide
from regraft.adapters.form import Array
from regraft.errors import BadInputError, Finding
from regraft.names.keys import Ints


def _torch() -> Any:
    """Torch.

    Raises ``BadInputError`` where it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise BadInputError(
            Finding(
                "torch-missing",
                "this adapter does not save its random numbers; torch has to draw them again",
                fix="pip install 'regraft[torch]'",
            )
        ) from None
    return torch


@lru_cache(maxsize=16)
def random_order(count: int, seed: int) -> Ints:
    """``torch.randperm(count)`` with a seed.

    Raises ``BadInputError`` where torch is not installed.
    """
    torch = _torch()
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(torch.randperm(count, generator=generator).numpy())


def random_normal(shape: tuple[int, ...], deviation: float, seed: int) -> Array:
    """``torch.normal`` with a seed, float32.

    Raises ``BadInputError`` where torch is not installed.
    """
    torch = _torch()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.normal(mean=0.0, std=deviation, size=shape, generator=generator)
    return np.asarray(drawn.numpy())


@lru_cache(maxsize=4)
def random_uniform(shapes: tuple[tuple[int, int], ...], seed: int) -> tuple[Array, ...]:
    """Matrices drawn one after the other with one seed, as Kaiming's initialisation does, float32.

    Raises ``BadInputError`` where torch is not installed.
    """
    torch = _torch()
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        bound = sqrt(3.0) * (sqrt(2.0) / sqrt(shape[1]))
        drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        made.append(np.asarray(drawn.numpy()))
    return tuple(made)


def svd_like_torch(weight: Wide) -> tuple[Wide, Wide, Wide]:
    """``torch.linalg.svd`` in float32, of which PEFT takes the signs as they come.

    Raises ``BadInputError`` where torch is not installed.
    """
    torch = _torch()
    found = torch.linalg.svd(torch.tensor(weight, dtype=torch.float32), full_matrices=False)
    u, s, v = (np.asarray(x.numpy()).astype(np.float64) for x in found)
    return u, s, v
