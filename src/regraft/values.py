"""Frozen values: ``msgspec.Struct``, where a dataclass would do, and copies of them with other fields.

A dataclass is compiled whenever its module is imported, by some twenty times the time that a struct takes; of the two
hundred that a conversion needs, that was a third of the start. What needs a dataclass is copied by
``dataclasses.replace``.

A copy keeps nothing that properties have worked out from the fields before.

>>> from functools import cached_property
>>> class Square(Struct, frozen=True, dict=True):
...     side: int
...
...     @cached_property
...     def area(self) -> int:
...         return self.side * self.side
>>> one = Square(1)
>>> one.area, replace(one, side=2).area
(1, 4)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct, structs

if TYPE_CHECKING:  # so that mypy checks the names and types of fields
    from dataclasses import replace
else:
    replace = structs.replace

__all__ = ["Struct", "replace"]
