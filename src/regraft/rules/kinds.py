"""Kinds of tensors: which dims are batch, out and in. They come from the layout, never from a shape.

Source: how torch's and transformers' modules store their weights, and how PEFT reads them
(``peft/tuners/lora/layer.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from msgspec import Struct

from regraft.equation.notation import Term

BATCH, OUT, IN, NONE = "batch", "out", "in", "none"


class Kind(Struct, frozen=True):
    """The role of every dim of a tensor.

    ``module`` is True where PEFT adapts the module (``target_modules``), False where it adapts the parameter
    (``target_parameters``).
    """

    name: str
    roles: tuple[str, ...] | None
    module: bool
    kernel: bool = False
    """Whether any number of dims may follow, which belong to the last role: a convolution's kernel."""

    def fits(self, term: Term) -> bool:
        """Whether a term can be of this kind."""
        if self.roles is None:
            return True
        dims = len(term.dims)
        if self.kernel:
            return term.ends_open or dims >= len(self.roles)
        return dims <= len(self.roles) if term.ends_open else dims == len(self.roles)

    def role(self, dim: int) -> str:
        """The role of a dim.

        >>> KINDS["experts"].role(0)
        'batch'
        """
        if self.roles is None:
            return NONE
        return self.roles[min(dim, len(self.roles) - 1)] if self.kernel else self.roles[dim]

    def size(self, shape: Sequence[int], role: str) -> int:
        """How many positions the dims of a role have together.

        >>> KINDS["conv"].size((8, 4, 3, 3), IN)
        36
        """
        return prod(size for dim, size in enumerate(shape) if self.role(dim) == role)

    def steps(self, shape: Sequence[int], role: str) -> tuple[int, ...]:
        """How far one step in each dim moves among the positions of a role; 0 in dims of others."""
        return tuple(
            self.size([n if d > dim else 1 for d, n in enumerate(shape)], role)
            if self.role(dim) == role
            else 0
            for dim in range(len(shape))
        )


KINDS = {
    kind.name: kind
    for kind in (
        Kind("linear", (OUT, IN), module=True),
        Kind("conv", (OUT, IN, IN), module=True, kernel=True),
        Kind("conv1d", (IN, OUT), module=True),
        Kind("embedding", (IN, OUT), module=True),
        Kind("parameter", (OUT, IN), module=False),
        Kind("experts", (BATCH, OUT, IN), module=False),
        Kind("experts-transposed", (BATCH, IN, OUT), module=False),
        Kind("experts-unmarked", (BATCH, IN, OUT), module=False),
        Kind("vector", (NONE,), module=False),
        Kind("any", None, module=True),
    )
}
"""``linear`` (out, in), ``conv`` (out, in and the kernel's dims), transformers' ``Conv1D`` (in, out), ``embedding``
(vocabulary = in, hidden = out), a ``parameter`` of its own (out, in), ``experts`` (E, out, in),
``experts-transposed`` (E, in, out) on a module that says so (``is_transposed``), ``experts-unmarked`` the same on a
module that does not, ``vector`` and ``any`` for what has no delta."""
