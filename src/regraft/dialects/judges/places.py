"""Whether a base has a weight under a tool's name, by the rule books for its names and the base's config."""

from __future__ import annotations

from collections.abc import Iterator

from regraft.equation.notation import Bound, Equation, Term
from regraft.equation.sizes import evaluate, known_dims
from regraft.layouts.graph import Edge
from regraft.names.keys import Group, Ints, group_names
from regraft.planning.model import ModelConfig, Scope
from regraft.rules.book import books_for
from regraft.rules.indices import reading_of
from regraft.rules.kinds import IN, KINDS, OUT
from regraft.rules.templates import match_group


class Places:
    """The weights of a base in one or more layouts, as far as rule books know them."""

    def __init__(self, model: ModelConfig, *layouts: str) -> None:
        books = [
            (b, name)
            for b in books_for(model.model_types())
            for name in layouts
            if name in b.layouts
        ]
        self.known = bool(books)
        """Whether any book knows the base in the layouts."""
        self._terms: list[tuple[Equation, Term, str, Scope]] = []
        for book, layout in books:
            scope = model.scope_of(book.model_types)
            edge = Edge.out_of(book, layout)
            for rule in book.rules:
                terms, kinds = edge.sides(rule)[0], rule.kinds(edge.direction)[0]
                self._terms += [
                    (rule.equation, t, k, scope) for t, k in zip(terms, kinds, strict=True)
                ]
            self._terms += [(c.equation, c.term, c.kind, scope) for c in book.carries]

    def problem(self, key: str, out: int, into: int) -> str | None:
        """Why there is no weight of this name and these sizes; ``None`` where there is one, or nothing tells."""
        if not self.known:
            return None
        sizes = self.sizes(key)
        if sizes is None:
            return "the base has no such weight"
        wrong = [
            f"{mine} where the base has {size}"
            for mine, size in zip((out, into), sizes, strict=True)
            if size is not None and size != mine
        ]
        return f"its shape is another one: {', '.join(wrong)}" if wrong else None

    def sizes(self, key: str) -> tuple[int | None, int | None] | None:
        """A weight's rows and columns (out, in), each ``None`` where nothing says it; ``None`` for no known weight."""
        (group,) = group_names([key])
        sizes: dict[str, int | None] | None = None
        for equation, term, kind, scope in self._found(group):
            sizes = sizes or {OUT: None, IN: None}
            dims = known_dims(equation, term, scope.look_up)
            roles = KINDS[kind].roles or (OUT, IN)
            if len(dims) == len(roles):
                told = dict(zip(roles, dims, strict=True))
                sizes = {role: told[role] if old is None else old for role, old in sizes.items()}
        return None if sizes is None else (sizes[OUT], sizes[IN])

    def _found(self, group: Group) -> Iterator[tuple[Equation, Term, str, Scope]]:
        for each in self._terms:
            equation, term, _, scope = each
            match = None if term.key is None else match_group(term.key, group)
            if match is None or term.key is None:
                continue
            loops = reading_of(equation, term.key).read(match.holes, {})[0].loops
            if all(_inside(bound, equation, loops, scope) for bound in equation.bounds):
                yield each


def _inside(bound: Bound, equation: Equation, loops: Ints, scope: Scope) -> bool:
    """Whether a number, that of a layer, is one that the base has."""
    limit = evaluate(bound, scope.look_up)
    names = equation.loops
    if limit is None or bound.axis not in names:
        return True
    return bool((loops[:, names.index(bound.axis)] < limit).all())


__all__ = ["Places"]
