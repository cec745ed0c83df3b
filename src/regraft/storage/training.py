"""What training runs save: the model, and beside it the states of optimizers and the like."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextvars import ContextVar

from regraft.errors import BadInputError, Finding

STATES = re.compile(
    r"(^|\.)(optim|optimizer|optimizers|optimizer_state|optimizer_states|optim_state|optimizer_state_dict|lr_scheduler|"
    r"lr_schedulers|scheduler|dataloader|train_state|rng_state|callbacks|loops|exp_avg|exp_avg_sq|max_exp_avg_sq|"
    r"momentum_buffer|param_groups)(\.|$)"
)
"""What of a training run is not the model."""
KEY: ContextVar[str | None] = ContextVar("key", default=None)
"""Below which key the model is, where somebody said it."""


def which_key(where: str, keys: Collection[str]) -> BadInputError:
    """The error where the model may be below one of several keys, or below none."""
    if keys:
        names = ", ".join(sorted(name or "(none)" for name in keys))
        message, fix = f"tensors are below several keys: {names}", "name one with --key"
    else:
        message, fix = "there is no tensor of a model in it", "check --key, and the folder"
    return BadInputError(Finding("which-key", message, where=where, fix=fix))


def left_words(left: Collection[str]) -> str:
    """What is left, in a sentence."""
    return (
        f"left behind, because they are no part of the model: {len(left)} states of the training, such as "
        f"{next(iter(left))}"
    )
