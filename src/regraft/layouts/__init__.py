"""Layout names: what ``to`` and ``source`` may be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from regraft.errors import BadInputError, Finding

BEFORE = "peft-0.18"
SINCE = "peft-0.19"
PACKINGS = (BEFORE, SINCE)
"""How PEFT packed the factors of stacked experts before 0.19, and how it has since (``dialects.peft.packing``)."""

LAYOUTS = {
    "transformers-v4": "names and shapes of transformers 4 (4.57.6), experts packed as by PEFT 0.18",
    "transformers-v5": "names and shapes of transformers 5 (5.23.0), experts packed as since PEFT 0.19",
}
"""The layouts that are known, and what they are."""

_USUAL = {"transformers-v4": BEFORE, "transformers-v5": SINCE}


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout of the base, and how adapters pack stacked experts in it (``None``: as usual there)."""

    name: str
    packing: str | None = None

    @property
    def usual_packing(self) -> str:
        """The packing that adapters of this layout have unless they say otherwise."""
        return self.packing or _USUAL[self.name]

    def __str__(self) -> str:
        return self.name if self.packing is None else f"{self.name}/{self.packing}"


def layout_of_packing(packing: str) -> str:
    """The layout whose adapters usually have a packing.

    >>> layout_of_packing("peft-0.18")
    'transformers-v4'
    """
    return next(name for name, usual in _USUAL.items() if usual == packing)


def other_layout(name: str) -> str:
    """The layout that a layout is converted to or from.

    >>> other_layout("transformers-v4")
    'transformers-v5'
    """
    return next(other for other in LAYOUTS if other != name)


def parse_layout(text: str, more: Iterable[str] = ()) -> Layout:
    """A layout from its name, with the packing after a slash where it matters.

    ``more`` are layouts that rule books of the user's own lead to.

    >>> parse_layout("transformers-v5"), parse_layout("transformers-v4/peft-0.19").packing
    (Layout(name='transformers-v5', packing=None), 'peft-0.19')

    Raises ``BadInputError`` for an unknown name; it lists the known ones.
    """
    known = (*LAYOUTS, *(name for name in more if name not in LAYOUTS))
    if text in known:
        return Layout(text)
    name, _, packing = text.partition("/")
    if name not in LAYOUTS or (packing and packing not in PACKINGS):
        raise BadInputError(
            Finding(
                "unknown-layout",
                f"there is no layout {text!r}; known: {', '.join(known)}, each also with /{' or /'.join(PACKINGS)}",
            )
        )
    return Layout(name, packing or None)
