"""Numbers that a family does not save, because PEFT draws them again from a seed: torch draws them here, too."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from regraft.errors import BadInputError, Finding
from regraft.names.keys import Ints


@lru_cache(maxsize=16)
def random_order(count: int, seed: int) -> Ints:
    """``torch.randperm(count)`` with a seed.

    Raises ``BadInputError`` where torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise BadInputError(
            Finding(
                "torch-missing",
                "this adapter does not save its random places; torch has to draw them again",
                fix="pip install 'regraft[torch]'",
            )
        ) from None
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(torch.randperm(count, generator=generator).numpy())
