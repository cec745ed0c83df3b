"""The way of one key of a LoRA for an image model: what its name says, where its module goes, what is written of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from regraft.adapters.form import Array
from regraft.adapters.protocol import Opened
from regraft.dialects.image.convert import Made, OpenedImage, convert_image
from regraft.dialects.image.delta import Delta
from regraft.dialects.image.dialect import ImageFile, refused_layout, written_as
from regraft.dialects.image.families import DENOISER
from regraft.dialects.image.leaves import split_key
from regraft.dialects.image.modules import book_of, names_of
from regraft.dialects.image.prefixes import place_of
from regraft.dialects.image.read import (
    Fit,
    Home,
    candidates,
    fit_families,
    model_config,
    read_adapter,
)
from regraft.dialects.image.write import Writing, writing
from regraft.errors import AmbiguousError, Finding, RegraftError, UnmatchedKeysError
from regraft.explaining.explanation import End, Explanation
from regraft.explaining.near import closest
from regraft.explaining.way import locate, with_entry
from regraft.layouts.graph import Edge
from regraft.layouts.names import Layout
from regraft.names.keys import group_names
from regraft.planning.build import build_plan
from regraft.planning.model import Scope
from regraft.planning.plan import Headers, Plan

_LISTED = 6
"""Names of tensors that are listed at most."""


def explain_image(
    opened: Opened, key: str, to: Layout, family: str | None, base: Path | None
) -> Explanation:
    """Explain what becomes of one tensor or module of a file in another tool's format.

    Raises ``RefusedError`` where ``to`` is no format of image models, ``BadInputError`` for a file that cannot be read.
    """
    name = written_as(to)
    if name is None:
        raise refused_layout(to, opened.where)
    assert isinstance(opened, ImageFile)
    assert opened.image is not None
    return _Search(opened.image, key, name, family, base).explain()


@dataclass(slots=True)
class _Search:
    file: OpenedImage
    key: str
    to: str
    family: str | None
    base: Path | None

    def explain(self) -> Explanation:
        start = Explanation(
            self.file.where,
            self.key,
            "adapter",
            "unknown",
            None,
            "",
            self.file.dialect,
            self.to,
            (),
            (),
        )
        try:
            fits, why = candidates(
                self.file.grouped, self.file.metadata, self.file.where, self.family
            )
        except UnmatchedKeysError as error:
            return self._unmatched(start, error.findings)
        fit = fits[0]
        adapter = read_adapter(fit, self.file.grouped, self.file.metadata, self.file.where, why)
        how = writing(self.to, fit.family)
        made, problems = self._made(fits)
        start = replace(start, evidence=(f"base: {fit.family.title}", why), problems=problems)
        if made is not None:
            how = made.how
        way = _Way(self.file, fit, adapter.deltas, how, made)
        stem = way.stem_of(self.key)
        if stem is not None:
            return way.forwards(start, stem)
        target = None if made is None else way.made_by(self.key)
        if target is not None:
            return way.backwards(start, target)
        return self._not_there(start, way)

    def _made(self, fits: Sequence[Fit]) -> tuple[Made | None, tuple[Finding, ...]]:
        """The file as it is converted, or why it cannot be."""
        try:
            return convert_image(self.file, self.to, family=self.family, base=self.base), ()
        except AmbiguousError as error:
            try:
                name = fits[0].family.name
                made = convert_image(self.file, self.to, family=name, base=self.base)
            except RegraftError as inner:
                return None, inner.findings
            return made, error.findings
        except RegraftError as error:
            return None, error.findings

    def _unmatched(self, start: Explanation, findings: Sequence[Finding]) -> Explanation:
        """A file of no one family: the modules that are spelled like this one's in the closest family."""
        leaf = split_key(self.key)
        stem = self.key if leaf is None else leaf.stem
        about = tuple(f for f in findings if f.key in (self.key, stem))
        best = fit_families(self.file.grouped)[0]
        place = place_of(stem)
        names = [
            name
            for layout in best.family.layouts
            if (known := names_of(best.family, layout)) is not None
            for name in known.spellings(flat=place.flat)
        ]
        found = tuple(place.prefix + name for name in closest(place.module, names))
        return replace(
            start,
            fate="unmatched",
            base=place.module,
            steps=(f"most of the file's modules are those of {best.family.title}",)
            * bool(best.homes),
            closest=found,
            problems=about or tuple(findings[:1]),
        )

    def _not_there(self, start: Explanation, way: _Way) -> Explanation:
        names = [*self.file.tensors, *way.homes_by_key]
        if way.made is not None:
            names += way.made.tensors
        return replace(
            start,
            closest=closest(self.key, names),
            problems=(
                Finding(
                    "no-such-key",
                    "it is neither in the file nor in what becomes of it",
                    where=self.file.where,
                    key=self.key,
                    fix="check the spelling; regraft inspect lists what is there",
                ),
                *start.problems,
            ),
        )


class _Way:
    """A file's modules, and where they go in one tool's format."""

    def __init__(
        self,
        file: OpenedImage,
        fit: Fit,
        deltas: Mapping[Home, Delta],
        how: Writing,
        made: Made | None,
    ) -> None:
        self.file, self.fit, self.deltas, self.how, self.made = file, fit, deltas, how, made
        self.homes_by_key = {_shown(home): home for home in deltas}

    def stem_of(self, key: str) -> str | None:
        """The file's name of the module that a key is about."""
        leaf = split_key(key)
        for name in (key, None if leaf is None else leaf.stem):
            if name in self.file.grouped.modules:
                return name
        for name in (key, f"{key}.weight"):
            if name in self.homes_by_key:
                return self._named(self.homes_by_key[name])
        return None

    def _named(self, home: Home) -> str:
        return next(stem for stem, h in self.fit.homes.items() if h == home)

    def forwards(self, start: Explanation, stem: str) -> Explanation:
        """What becomes of a module of the file."""
        home = self.fit.homes[stem]
        leaf = split_key(start.key)
        role = leaf.role if leaf is not None and start.key in self.file.tensors else ""
        about = tuple(
            f
            for f in start.problems
            if f.key is None or f.key in (_shown(home), home.key, stem, start.key)
        )
        found = replace(
            start,
            base=_shown(home),
            role=role,
            steps=tuple(self._read(stem, home)),
            problems=about or tuple(f for f in start.problems[:1] if self.made is None),
        )
        return self._along(found, home)

    def _read(self, stem: str, home: Home) -> Iterator[str]:
        """What a name and its tensors say."""
        place, delta = place_of(stem), self.deltas[home]
        component = self.fit.family.component if home.component == DENOISER else home.component
        if place.prefix:
            yield f"{place.prefix} stands before modules of the {component}"
        if place.module != home.module:
            listed = " (looked up in the list of its modules)" * place.flat
            yield f"{place.module} is {home.module}, as {home.layout} names it{listed}"
        said = f" of rank {delta.rank}" if delta.rank else ""
        scale = f", multiplied by {delta.scale.value:g}" if delta.rank else ""
        tensors = self.file.grouped.modules[stem].tensors
        yield f"its tensors ({', '.join(tensors)}) are {delta.name}{said}{scale}"

    def _along(self, found: Explanation, home: Home) -> Explanation:
        """The way of a module: the rule that moves it, or none."""
        plan = self._plan(home)
        entry = None if plan is None else locate(plan, home.key)
        if plan is not None and entry is not None:
            made = with_entry(found, plan, *entry, home.key)
            rule = entry[0].rule
            made = replace(
                made,
                fate="moved",
                rule=f"{rule.book}/{rule.name}",
                where=rule.where,
                equation=rule.equation.text.strip(),
            )
            names = [key for end in self._targets(plan, home.key) for key in end]
            return self._written(made, home, names)
        shape = self.deltas[home].shape
        here = End((home.key,), 1, 0, shape, home.kind, home.key, mine=True)
        made = replace(
            found,
            fate="carried",
            why=f"{self.how.title} names this module alike: only its tensors may be called otherwise",
            where=self.how.name,
            equation=home.key,
            sources=(here,),
            targets=(here,),
        )
        return self._written(made, home, [home.key])

    def _plan(self, home: Home) -> Plan | None:
        """The plan of all modules that are named like this one's; ``None`` where names stay."""
        book = book_of(self.fit.family)
        if (
            book is None
            or home.layout == self.how.layout
            or home.component.startswith("text_encoder")
        ):
            return None
        if self.made is not None and home in self.made.deltas:
            return None
        homes = [h for h in self.deltas if (h.component, h.layout) == (home.component, home.layout)]
        headers = Headers(
            group_names([h.key for h in homes]),
            [self._shape(h) for h in homes],
            ["float32"] * len(homes),
        )
        config = model_config(self.fit.family, {h: self.deltas[h] for h in homes})
        return build_plan(
            headers,
            (Edge.to(book, self.how.layout),),
            scopes={book.name: Scope(config)},
            partial=True,
            where=self.file.where,
        )

    def _shape(self, home: Home) -> tuple[int, ...]:
        delta = self.deltas[home]
        if home.kind == "vector":
            return (delta.out,)
        return (
            (*delta.shape, 1, 1) if home.kind == "conv" and len(delta.shape) == 2 else delta.shape
        )

    def _targets(self, plan: Plan, key: str) -> Iterator[list[str]]:
        """The keys that a key leads to."""
        for entry in plan.entries:
            rows = len(entry)
            for term in entry.read:
                names = entry.keys(term).names()
                if key not in names:
                    continue
                row = names.index(key) // max(1, len(names) // rows)
                for written in entry.written:
                    whole = entry.keys(written).names()
                    each = len(whole) // rows
                    yield whole[row * each : (row + 1) * each]

    def _written(self, found: Explanation, home: Home, keys: Sequence[str]) -> Explanation:
        """The same with what the file has in the end."""
        if self.made is None:
            return found
        steps = []
        for key in keys:
            target = next(
                (h for h in self.made.deltas if (h.component, h.key) == (home.component, key)), None
            )
            if target is None:
                steps.append(f"nothing is written for {key}: nothing is added there")
                continue
            delta = self.made.deltas[target]
            stem = self.made.how.stem(target)
            steps.append(f"it becomes {delta.name} of {_listed(self._tensors(stem))}")
            reason = self.made.ways.reasons.get(target)
            if reason is not None:
                steps.append(f"as {self.made.ways.rungs[target]}, because {reason}")
        return replace(found, steps=(*found.steps, *steps))

    def _tensors(self, stem: str) -> dict[str, Array]:
        assert self.made is not None
        start = f"{stem}."
        return {
            name: x
            for name, x in self.made.tensors.items()
            if name.startswith(start)
            and (leaf := split_key(name)) is not None
            and leaf.stem == stem
        }

    # -- from the result back

    def made_by(self, key: str) -> Home | None:
        """The module of the result that a key is about."""
        assert self.made is not None
        leaf = split_key(key)
        stems = {key, None if leaf is None else leaf.stem}
        return next((h for h in self.made.deltas if self.made.how.stem(h) in stems), None)

    def backwards(self, start: Explanation, target: Home) -> Explanation:
        """What makes a module of the result."""
        for home in self.deltas:
            if home.component != target.component:
                continue
            plan = self._plan(home)
            keys = (
                [home.key]
                if plan is None
                else [k for t in self._targets(plan, home.key) for k in t]
            )
            if target.key in keys:
                stem = self._named(home)
                step = f"it is not in the file: it is made of {stem}"
                made = self.forwards(start, stem)
                return replace(made, base=_shown(target), steps=(step, *made.steps))
        return replace(start, fate="carried", base=_shown(target), why="the format asks for it")


def _shown(home: Home) -> str:
    """A base tensor, with its component where that is no denoiser."""
    return home.key if home.component == DENOISER else f"{home.component}.{home.key}"


def _listed(tensors: Mapping[str, Array]) -> str:
    names = [f"{name} [{', '.join(map(str, x.shape))}]" for name, x in tensors.items()]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
