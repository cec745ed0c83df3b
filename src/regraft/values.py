"""Frozen values: ``msgspec.Struct``, where a dataclass would do, and copies of both with other fields.

A dataclass is compiled whenever its module is imported, by some twenty times the time that a struct takes; of the two
hundred that a conversion needs, that was a third of the start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct, structs

if TYPE_CHECKING:  # so that mypy checks the names and types of fields
    from dataclasses import replace
else:
    import dataclasses

    _Value = TypeVar("_Value")

    def replace(value: _Value, /, **changes: Any) -> _Value:
        """A copy with other values in some fields, of a struct or a dataclass.

        >>> class Point(Struct, frozen=True):
        ...     x: int
        ...     y: int
        >>> replace(Point(1, 2), y=3)
        Point(x=1, y=3)
        """
        if isinstance(value, Struct):
            copy = structs.replace(value, **changes)
            kept = getattr(copy, "__dict__", None)
            if kept:  # what properties have worked out from the fields before
                kept.clear()
            return copy
        return dataclasses.replace(value, **changes)


__all__ = ["Struct", "replace"]
