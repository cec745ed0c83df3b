"""Which class of transformers a model is, where its config does not name one that there is.

What is at hand decides, in this order: which class has a place for most of the file's names, which has or had tensors
of these very names, what an unknown class is called, the task that an adapter was trained for, and the names of the
base's own weights. Where what is left would lead to different results, the user is asked.

A class that is not transformers' own may hold one that is: its names are then those of that class below a path, and
what stands beside is its own. That is so where the names below some path are, all of them, names that a known class
has or had, and more of them than without a path.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from regraft.bridges.transformers.building import model_class
from regraft.bridges.transformers.imported import Imported, import_model
from regraft.bridges.transformers.symbolic import put
from regraft.errors import AmbiguousError, BadInputError, Finding, RegraftError
from regraft.planning.model import ModelConfig
from regraft.storage.checkpoint import names_beside

_TABLES = {
    "CAUSAL_LM": ("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT"),
    "SEQ_CLS": ("MODEL_FOR_SEQUENCE_CLASSIFICATION",),
    "SEQ_2_SEQ_LM": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_SPEECH_SEQ_2_SEQ"),
    "TOKEN_CLS": ("MODEL_FOR_TOKEN_CLASSIFICATION",),
    "QUESTION_ANS": ("MODEL_FOR_QUESTION_ANSWERING",),
    "FEATURE_EXTRACTION": ("MODEL",),
}
"""The tasks of PEFT, and the tables of transformers' auto classes that go with them."""
_HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""The tasks whose classes have a head of their own, which the base's class has not."""
_PURPOSE = re.compile(r"(For[A-Z]\w*|Model|WithLMHead\w*|LMHeadModel)$")
_SHOWN = 8
_DEEPEST = 5
"""How many segments of a name are looked at for the path of a model in another."""


@dataclass(frozen=True, slots=True)
class Guessed:
    """The class that a model was taken for."""

    imported: Imported
    why: str
    others: tuple[str, ...]
    """The classes that were left aside."""

    def note(self, model: ModelConfig) -> str:
        """What the user should know of it."""
        named = ", ".join(model.architectures())
        what = f"names {named}, which transformers does not have" if named else "names no class"
        others = f" ({', '.join(self.others[:_SHOWN])})" if self.others else ""
        return (
            f"the class had to be guessed, because {model.path} {what}: it was taken for {self.taken}, "
            f"{self.why}; say --architecture CLASS if it is another{others}"
        )

    @property
    def taken(self) -> str:
        """What it was taken for, in words."""
        held = self.imported.held
        if held is None:
            return f"a {self.imported.name}"
        return f"a class that has a {held.classes[0]} at {held.path}"


@dataclass(frozen=True, slots=True)
class _Candidate:
    imported: Imported
    outcome: tuple[object, ...]
    """What becomes of each name."""
    landed: int
    """How many names it has a place for."""
    known: int
    """How many of them are called as the class has or had them."""
    exact: int
    """How many of them keep their prefix."""

    @property
    def name(self) -> str:
        """Of the class that is known."""
        held = self.imported.held
        return self.imported.name if held is None else held.classes[0]

    @property
    def shown(self) -> str:
        """The class, and where it stands."""
        held = self.imported.held
        return self.name if held is None else f"{self.name} at {held.path}"


def classes_of_type(model_type: str) -> list[str]:
    """All classes of transformers that go with a model type, the bare model first."""
    from transformers.models.auto import modeling_auto

    tables = [n for n in vars(modeling_auto) if n.startswith("MODEL_") and n.endswith("_NAMES")]
    names: list[str] = []
    for table in sorted(tables, key=lambda n: n != "MODEL_MAPPING_NAMES"):
        found = getattr(modeling_auto, table).get(model_type) or ()
        names += [found] if isinstance(found, str) else found
    return [n for n in dict.fromkeys(names) if model_class(n) is not None]


def check_architecture(model: ModelConfig) -> None:
    """Raises ``BadInputError`` where the class that the user names is none of the model's."""
    name = model.architecture
    if name is None:
        return
    known = classes_of_type(model.model_type or "")
    found = model_class(name)
    kind = getattr(getattr(found, "config_class", None), "model_type", None)
    if found is not None and (name in known or kind == model.model_type):
        return
    raise BadInputError(
        Finding(
            "unknown-class",
            f"transformers has no class {name[:80]!r} for models of the type {model.model_type}; "
            f"it has {', '.join(known) or 'none'}",
            where=model.path,
            key="--architecture",
            fix="name one of these",
        )
    )


def guess(
    model: ModelConfig,
    keys: Sequence[str],
    make: Callable[[str], Imported],
    *,
    adapter: bool,
    task: str | None,
) -> Guessed | None:
    """The class of a model by the names of a file; ``None`` where transformers has no class of its type.

    ``make`` builds a class and imports it; a class that cannot be built from the config is left out, unless none can.

    Raises ``AmbiguousError`` where the classes that fit best lead to different results.
    """
    candidates = _candidates(classes_of_type(model.model_type or ""), keys, make, adapter=adapter)
    if not candidates:
        return None
    held = find_held(model, [c.imported for c in candidates], keys, adapter=adapter)
    if held is not None:
        return held
    most = max(c.landed for c in candidates)
    left = [c for c in candidates if c.landed == most]
    why = f"which has a place for {most} of {len(keys)} names"
    if most and model.architectures() and not any(c.known for c in left):
        raise _undecided(
            model, left, f"but none of them has tensors that are called like {keys[0]}"
        )
    if most:
        closest = max((c.known, c.exact) for c in left)
        if any((c.known, c.exact) < closest for c in left):
            why += ", with the prefix that they have"
        left = [c for c in left if (c.known, c.exact) == closest]
        for reason, fits in _hints(model, left, task):
            kept = [c for c in left if fits(c)]
            if kept and len(kept) < len(left):
                left, why = kept, f"{why}, and {reason}"
    if len({c.outcome for c in left}) > 1:
        raise _undecided(model, left, "with different results")
    others = tuple(c.name for c in candidates if c is not left[0])
    return Guessed(left[0].imported, why, others)


def _candidates(
    classes: Sequence[str], keys: Sequence[str], make: Callable[[str], Imported], *, adapter: bool
) -> list[_Candidate]:
    candidates: list[_Candidate] = []
    failed: RegraftError | None = None
    for name in classes:
        try:
            candidates.append(_candidate(make(name), keys, adapter=adapter))
        except RegraftError as error:
            failed = failed or error
    if failed is not None and not candidates:
        raise failed
    return candidates


def _candidate(imported: Imported, keys: Sequence[str], *, adapter: bool) -> _Candidate:
    keys = _with_parameters(imported, keys) if adapter else keys
    outcome: list[object] = [None] * len(keys)
    landed = known = exact = 0
    had = _spelled(imported)
    for rows, new in imported.landings(keys):
        if new is None:
            continue
        renamed = bool(new.fired) or new.hit is not None
        # An adapter keeps the prefix that it has.
        kept = imported.renamer.forward(rows.text).key if renamed else rows.text
        landed += len(rows.ids)
        known += len(rows.ids) * (_numberless(rows.text) in had)
        exact += len(rows.ids) * (kept == new.key)
        rule = "" if new.hit is None else f"{new.hit.scoped.transform}, {new.hit.source}"
        text = kept if adapter else new.key
        for number, row in zip(rows.ids.tolist(), rows.numbers.tolist(), strict=True):
            outcome[number] = (put(text, row), rule)
    return _Candidate(imported, tuple(outcome), landed, known, exact)


def _with_parameters(imported: Imported, keys: Sequence[str]) -> list[str]:
    """Keys with a parameter's name in place of ``weight`` where modules have no weight: stacked experts."""
    names = imported.skeleton.tensors
    leaves: dict[str, str] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if f"{module}.weight" not in names:
            leaves.setdefault(module.rpartition(".")[2], leaf)
    split = [key.rpartition(".") for key in keys]
    return [
        f"{module}.{leaves.get(module.rpartition('.')[2], leaf)}" if leaf == "weight" else key
        for key, (module, _, leaf) in zip(keys, split, strict=True)
    ]


def find_held(
    model: ModelConfig, classes: Sequence[Imported], keys: Sequence[str], *, adapter: bool
) -> Guessed | None:
    """The known class that one of somebody's own holds at a path; ``None`` where names fit as well without one.

    All names below the path must be such as the known class has or had. Only the base's own weights tell several
    classes apart.

    Raises ``AmbiguousError`` where they do not.
    """
    texts = Counter(map(_numberless, keys))
    spelled = [(imported, _spelled(imported)) for imported in classes]
    most = max(sum(n for text, n in texts.items() if text in known) for _, known in spelled)
    named = next(iter(model.architectures()), "a class of its own")
    found: list[_Candidate] = []
    for path in _places(texts):
        below = {
            text[len(path) + 1 :]: n for text, n in texts.items() if text.startswith(f"{path}.")
        }
        if sum(below.values()) > most:
            fitting = [imported for imported, known in spelled if below.keys() <= known]
            held = (import_model(imported.skeleton.held(path, named)) for imported in fitting)
            found += (_candidate(imported, keys, adapter=adapter) for imported in held)
    if not found:
        return None
    best = max(candidate.known for candidate in found)
    left = [candidate for candidate in found if candidate.known == best]
    why = f"which is how {best} of {len(keys)} names are"
    for reason, fits in _hints_of_weights(model, left):
        kept = [c for c in left if fits(c)]
        if kept and len(kept) < len(left):
            left, why = kept, f"{why}, and {reason}"
    if len({c.outcome for c in left}) > 1:
        raise _undecided(model, left, "with different results")
    return Guessed(left[0].imported, why, ())


def _places(texts: Iterable[str]) -> set[str]:
    """The paths that names begin with, as far as they have no index.

    >>> sorted(_places(["model.layers.#.q.weight", "proj.weight"]))
    ['model', 'model.layers', 'proj']
    """
    found: set[str] = set()
    for text in texts:
        segments = text.split("#")[0].split(".")[:_DEEPEST]
        found.update(".".join(segments[:end]) for end in range(1, len(segments)))
    return found


def _spelled(imported: Imported) -> set[str]:
    """The names that a class has or had, with one sign for every index."""
    return {_numberless(n) for _, origin in imported.origins for n in (*origin.new, *origin.old)}


def _numberless(name: str) -> str:
    """A name with one sign for every index.

    >>> _numberless("layers.970079.experts.3.w1")
    'layers.#.experts.#.w1'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


def _hints(
    model: ModelConfig, left: Sequence[_Candidate], task: str | None
) -> Iterator[tuple[str, Callable[[_Candidate], bool]]]:
    """What else may tell classes apart, with the words for it."""
    for name in model.architectures():
        purpose = _PURPOSE.search(name)
        if purpose is not None:
            end = purpose[0]
            yield f"is called like {name}", lambda c, end=end: c.name.endswith(end)  # type: ignore[misc]
    if task in _TABLES:
        wanted = _of_task(task, model.model_type or "")
        yield f"is for the adapter's task {task}", lambda c: c.name in wanted
    yield from _hints_of_weights(model, left)


def _hints_of_weights(
    model: ModelConfig, left: Sequence[_Candidate]
) -> Iterator[tuple[str, Callable[[_Candidate], bool]]]:
    """What the names of the base's own weights tell."""
    names = names_beside(Path(model.path))
    if names:
        landed = {c.name: sum(c.imported.lands(names)) for c in left}
        best = max(landed.values(), default=0)
        yield "has a place for the base's own weights", lambda c: landed[c.name] == best
        sizes = {c.name: len(c.imported.skeleton.tensors) for c in left}
        least = min((sizes[c.name] for c in left if landed[c.name] == best), default=0)
        yield "has the fewest weights besides", lambda c: sizes[c.name] == least


def classes_of_task(model: ModelConfig, task: str | None) -> list[str]:
    """The classes that an adapter's task wants in place of the base's own, which its config names; often none."""
    if task not in _HEADED:
        return []
    wanted = _of_task(task, model.model_type or "")
    return [] if wanted & set(model.architectures()) else sorted(wanted)


def _of_task(task: str, model_type: str) -> set[str]:
    from transformers.models.auto import modeling_auto

    found: set[str] = set()
    for table in _TABLES[task]:
        name = getattr(modeling_auto, f"{table}_MAPPING_NAMES", {}).get(model_type) or ()
        found.update([name] if isinstance(name, str) else name)
    return found


def _undecided(model: ModelConfig, left: Sequence[_Candidate], but: str) -> AmbiguousError:
    names = ", ".join(c.shown for c in left)
    named = ", ".join(model.architectures())
    what = f"names {named}, which transformers does not have" if named else "names no class"
    return AmbiguousError(
        Finding(
            "which-class",
            f"its config {what}, and the names of the file fit {names}, {but}",
            where=model.path,
            key="architectures",
            fix="say which it is with --architecture CLASS (architecture= in Python)",
        )
    )
