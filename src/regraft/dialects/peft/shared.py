"""Modules that stood in two places of a model: their adapters have every tensor twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from regraft.adapters.form import Array
from regraft.dialects.peft.scan import PREFIX
from regraft.errors import BadInputError, Finding
from regraft.names.patterns import patterns
from regraft.report import count_in_words
from regraft.rules.book import Shared


def settle_shared(
    tensors: Mapping[str, Array], shared: Sequence[Shared], where: str
) -> tuple[Mapping[str, Array], list[str]]:
    """Tensors with each module in the one place that the other layout has for it, and what is said of it.

    Raises ``BadInputError`` where the two places of one module have other tensors: it is one module.
    """
    made = dict(tensors)
    findings: list[Finding] = []
    settled: list[str] = []
    for each in shared:
        first, second = (f"{PREFIX}{path}." for path in (each.first, each.second))
        for name in [name for name in tensors if name.startswith(first)]:
            twin = second + name.removeprefix(first)
            settled.append(name)
            if twin in tensors and not _same(tensors[name], tensors[twin]):
                findings.append(
                    Finding(
                        "two-values",
                        f"it is the same module as {twin}, and its tensors are others there",
                        where=where,
                        key=name,
                        fix="keep one of the two",
                    )
                )
            made[twin] = made.pop(name)
    if findings:
        raise BadInputError(findings)
    if not settled:
        return tensors, []
    shown = ", ".join(pattern for pattern, _ in patterns(settled))
    many = count_in_words(len(settled), "tensor")
    said = f"a module stood in two places, and is there once now, with {many}: {shown}"
    return made, [said]


def _same(one: Array, other: Array) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()
    )
