"""Formats that adapt the same modules in every layer: what is not adapted gets factors of zeros."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from regraft.adapters.detect import Known
from regraft.adapters.form import Images, Lora
from regraft.dialects.halves import config_of
from regraft.equation.notation import Equation, Term
from regraft.equation.sizes import known_dims
from regraft.errors import BadInputError, Finding
from regraft.layouts.graph import Edge
from regraft.names.keys import MARK, group_names
from regraft.planning.model import Scope
from regraft.rules.kinds import IN, KINDS, OUT
from regraft.rules.templates import match_group

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def layer_count(known: Known, where: str, title: str) -> int:
    """How many layers the base has.

    Raises ``BadInputError`` where its config is not known.
    """
    count = config_of(known).get("num_hidden_layers")
    if isinstance(count, int):
        return count
    raise BadInputError(
        Finding(
            "model-needed",
            f"{title} adapts the same modules in every layer, and nothing says how many layers the base has",
            where=where,
            fix="give the base model with --model (its folder or its config.json)",
        )
    )


class Sizes:
    """The sizes of the base's weights: those of adapted weights of the same name, or what books and config say."""

    def __init__(
        self, known: Known, layout: str, made: Iterable[Images], title: str, where: str
    ) -> None:
        self.known, self.layout, self.title, self.where = known, layout, title, where
        self._seen = {
            _NUMBER.sub("#", key): (lora.b.shape[-2], lora.a.shape[-1])
            for image in made
            for key, lora in _examples(image)
        }

    def of(self, key: str) -> tuple[int, int]:
        """Out and in of a weight.

        Raises ``BadInputError`` where nothing says them.
        """
        same = _NUMBER.sub("#", key)
        if same not in self._seen:
            found = next(self._by_books(key), None)
            if found is None:
                raise BadInputError(
                    Finding(
                        "unknown-size",
                        f"{self.title} wants factors for this weight as well, and nothing says its size",
                        where=self.where,
                        key=key,
                        fix="give the base model with --model (its folder or its config.json)",
                    )
                )
            self._seen[same] = found
        return self._seen[same]

    def _by_books(self, key: str) -> Iterator[tuple[int, int]]:
        (group,) = group_names([key])
        for book in self.known.books:
            if self.layout not in book.layouts:
                continue
            edge = Edge.out_of(book, self.layout)
            scope = self.known.scopes.get(book.name, Scope())
            for rule in book.rules:
                terms, kinds = edge.sides(rule)[0], rule.kinds(edge.direction)[0]
                for term, kind in zip(terms, kinds, strict=True):
                    if term.key is not None and match_group(term.key, group) is not None:
                        yield from _matrix(rule.equation, term, kind, scope)


def _examples(image: Images) -> Iterator[tuple[str, Lora]]:
    """One LoRA of each name, layers and experts left aside; ``fc_1`` and ``fc_2`` are two."""
    rows = np.array([row for row, lora in enumerate(image.loras) if lora is not None], dtype=int)
    segments = image.keys.template.split(".")
    whole = [segment == MARK for segment in segments for _ in range(segment.count(MARK))]
    others = image.keys.numbers[rows][:, np.flatnonzero(~np.array(whole, dtype=bool))]
    for row in rows[np.unique(others, axis=0, return_index=True)[1] if others.size else slice(1)]:
        lora = image.loras[row]
        assert lora is not None
        yield image.keys.name(row), lora


def _matrix(equation: Equation, term: Term, kind: str, scope: Scope) -> Iterator[tuple[int, int]]:
    dims = known_dims(equation, term, scope.look_up)
    roles = KINDS[kind].roles or (OUT, IN)
    if len(dims) == len(roles) and None not in dims:
        yield tuple(dims[roles.index(role)] for role in (OUT, IN))  # type: ignore[misc]


def loras_of(made: Iterable[Images]) -> dict[str, Lora]:
    """All LoRAs by key."""
    return {
        key: lora
        for image in made
        for key, lora in zip(image.keys.names(), image.loras, strict=True)
        if lora is not None
    }


def as_images(loras: Mapping[str, Lora]) -> list[Images]:
    """LoRAs of linears by key, as a writer takes them."""
    names = list(loras)
    return [
        Images(group, "linear", [loras[names[i]] for i in group.ids.tolist()])
        for group in group_names(names)
    ]


def most_common(loras: Sequence[Lora]) -> Lora:
    """The LoRA whose scale and dtype the added ones take: the largest."""
    one_of_each_size = {lora.a.size: lora for lora in reversed(loras)}
    return one_of_each_size[max(one_of_each_size)]
