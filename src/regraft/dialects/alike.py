"""Names of a file that are alike, of which it is enough to look at one: by them a tool's form is known."""

from __future__ import annotations

from collections.abc import Iterable


def one_of_each(names: Iterable[str]) -> list[str]:
    """One name of each kind, where names that differ in their digits alone are of one kind.

    Whatever looks at names one by one looks at few so, even where a file has a hundred thousand.

    >>> one_of_each(["a.0.w", "a.1.w", "b"])
    ['a.0.w', 'b']
    """
    names = names if isinstance(names, (list, tuple)) else list(names)
    kinds = "\n".join(names).encode("utf-8", "surrogatepass").translate(_ALIKE).split(b"\n")
    if len(kinds) != len(names):  # a name of several lines
        return list(names)
    return list(dict(zip(kinds[::-1], names[::-1], strict=True)).values())[::-1]


_ALIKE = bytes(ord("0") if chr(byte) in "0123456789" else byte for byte in range(256))
