"""What ``to`` and ``source`` mean: the grammar of `regraft.layouts.names`, with the dialects that there are."""

from __future__ import annotations

from msgspec import Struct

from regraft.dialects.registry import dialects
from regraft.errors import BadInputError, Finding
from regraft.layouts.names import (
    DEFAULT,
    DialectName,
    Layout,
    families,
    layout_of_packing,
    parse_name,
    version_of,
)
from regraft.values import replace


class _Named(Struct, frozen=True):
    """A dialect by its name; it is imported only where more than that is asked for."""

    name: str

    @property
    def title(self) -> str:
        """In words, with the names of its tools."""
        return dialects()[self.name].title

    @property
    def versions(self) -> tuple[str, ...]:
        """As they stand after the slash, the oldest first."""
        return tuple(getattr(dialects()[self.name], "versions", ()))

    @property
    def layout(self) -> str | None:
        """The layout that its adapters usually are in, where that is the same for all versions."""
        layout: str | None = getattr(dialects()[self.name], "layout", None)
        return layout


def dialect_names() -> dict[str, DialectName]:
    """The dialects by name, with the ``versions`` and the usual ``layout`` of those that have them."""
    return {name: _Named(name) for name in dialects()}


def layout_named(text: str, *, adapter: bool = True) -> Layout:
    """The layout that ``to`` names, and the dialect; see `regraft.layouts.names`.

    >>> str(layout_named("transformers-v4/0.18"))
    'transformers-v4/peft-0.18'

    Raises ``BadInputError`` for an unknown name, with those that are spelled nearly like it.
    """
    return parse_name(text, dialect_names(), adapter=adapter)


class SourceName(Struct, frozen=True):
    """What was said of a source: its layout, its dialect, or the family of its model."""

    layout: Layout | None = None
    family: str | None = None
    dialect: str | None = None
    packing: str | None = None
    """The dialect's version."""
    via: tuple[str, ...] = ()
    """Layouts on the way, where several ways are as short."""
    alpha: float | None = None
    """What the files do not tell, for dialects that have no place for it: alpha, and the rank."""
    rank: int | None = None

    @property
    def name(self) -> str | None:
        """The layout's name."""
        return None if self.layout is None else self.layout.name


def source_named(text: str | None, *, adapter: bool = True) -> SourceName:
    """What ``source`` names: a layout or both, as ``to`` does; a dialect, whose layout is found out; or a family.

    Layouts on the way may follow, after commas.

    >>> source_named("mixtral").family, source_named("transformers-v4").name, source_named("peft").dialect
    ('mixtral', 'transformers-v4', 'peft')

    Raises ``BadInputError`` for an unknown name.
    """
    if text is None:
        return SourceName()
    text, *via = text.split(",")
    for each in via:
        parse_name(each, {}, adapter=False)
    return replace(_source_named(text, adapter=adapter), via=tuple(via))


def _source_named(text: str, *, adapter: bool) -> SourceName:
    known = dialect_names()
    head, _, version = text.partition("/")
    if adapter and head in known:
        packing = version_of(text, version, known[head])
        name = layout_of_packing(packing) if packing is not None and head == DEFAULT else None
        layout = None if name is None else Layout(name, packing)
        return SourceName(layout, dialect=head, packing=packing)
    if text in families():
        return SourceName(
            family=text
        )  # some families have a layout of their name: which one it is, names tell
    try:
        layout = parse_name(text, known, adapter=adapter)
    except BadInputError as error:
        from difflib import get_close_matches

        near = get_close_matches(text, families(), n=1)
        if near and not (error.findings[0].fix or "").startswith("did you mean"):
            message, fix = f"there is no {text!r}", f"did you mean {near[0]!r}?"
            raise BadInputError(Finding("unknown-layout", message, fix=fix)) from None
        raise
    return SourceName(layout, dialect=layout.dialect, packing=layout.packing)
