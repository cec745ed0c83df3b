"""The conversion registry of the installed transformers, as plain data.

Source: ``transformers.conversion_mapping`` and ``transformers.core_model_loading`` (5.4 to 5.24): a list of
transforms for each model type or class name, each with regular expressions for the old names and templates for the
new ones. Renamings are applied in order, then at most one converter.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import is_
from typing import Any

import transformers
from transformers import conversion_mapping as mapping
from transformers import core_model_loading as loading

from regraft.errors import BadInputError, Finding
from regraft.storage.expressions import Expression, expression, start_file

OLDEST, NEWEST = (5, 4), (5, 24)
"""The releases whose registry is known."""

_KNOWN_KINDS = (
    "WeightRenaming",
    "WeightConverter",
    "GroupWeightRename",
    "PrefixChange",
    "Inkling2IndexOffsetWeightRename",
)
"""The classes of transforms whose own methods `Step` and `Transform` describe."""
_DESCRIBED = (
    "rename_source_key",
    "reverse_transform",
    "_scoped_match",
    "materialize_tensors",
    "convert",
)
"""Their methods that decide what becomes of a name or a tensor."""

_CAPTURE = re.compile(r"\(.+?\)")
_GROUP = re.compile(r"\\(\d)")


Rename = Callable[[str], tuple[str, int] | None]
"""A key's other form, and which of the sources matched; ``None`` where none does."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One direction of a transform: where it matches, and what stands there then."""

    pattern: re.Pattern[str]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    offset: int = 0
    paired: bool = False
    """Whether source i becomes target i; otherwise every source becomes the first target."""
    bounded: Expression | None = None
    """The same pattern in bounded time, where it is not transformers' own."""

    def match(self, text: str) -> tuple[re.Match[str], int] | None:
        """Where it matches, and which of the sources."""
        found = (self.bounded or self.pattern).search(text)
        if found is None:
            return None
        names = ((n, v) for n, v in found.groupdict().items() if v is not None)
        return found, int(next(names)[0][1:])

    def write(self, text: str, found: re.Match[str], source: int, target: int) -> str:
        """The text with a target in place of what matched."""
        first = self.pattern.groupindex[f"g{source}"]

        def group(at: re.Match[str]) -> str:
            value = found[first + int(at[1])] or ""
            return str(int(value) + self.offset) if self.offset else value

        replaced = _GROUP.sub(group, self.targets[target])
        return text[: found.start()] + replaced + text[found.end() :]


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    """One entry of the registry, in both directions."""

    entry: str
    """The model type or the class that it is registered for."""
    number: int
    forward: Step
    """From the old names to those of the model."""
    backward: Step
    operations: tuple[Any, ...] = ()
    """Of a converter: transformers' own operations, in order. A renaming has none."""
    guarded: bool = False
    """Whether it acts only where one of its first source's names is there (two renames that share a name)."""
    adds_prefix: bool = False
    unknown: str | None = None
    """Why it cannot be described by patterns; ``None`` where it can."""
    calls: tuple[Rename, Rename] | None = None
    """The renaming's own functions, forth and back, where it has some that no pattern describes."""

    def __str__(self) -> str:
        return f"{self.entry} #{self.number}"


@lru_cache(maxsize=1)
def check_version() -> str:
    """The installed release.

    Raises ``BadInputError`` where its registry is not known.
    """
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if release < OLDEST:
        low, high = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise BadInputError(
            Finding(
                "transformers-version",
                f"transformers {transformers.__version__} has no conversion registry that regraft knows",
                fix=f"install transformers {low} to {high}",
            )
        )
    return str(transformers.__version__)


def newer_than_tested() -> str | None:
    """What to say where the installed release is newer than all that were tested; ``None`` where it is not."""
    version = check_version()
    if tuple(int(part) for part in version.split(".")[:2]) <= NEWEST:
        return None
    return (
        f"transformers {version} is newer than {'.'.join(map(str, NEWEST))}, the newest release that this "
        "regraft was tested with"
    )


@lru_cache(maxsize=1)
def warn_of_release() -> None:
    """Warn, once, of a release that is newer than all that were tested."""
    said = newer_than_tested()
    if said is not None:
        warnings.warn(said, stacklevel=4)


def look_up(entry: str) -> tuple[Transform, ...] | None:
    """The transforms that are registered for a model type or a class; ``None`` where there are none."""
    check_version()
    table = _table()
    found = table.get(entry)
    return None if found is None else _read(entry, _Same(found))


def entries() -> list[str]:
    """Everything that has transforms."""
    check_version()
    return list(_table())


def user_registered(entry: str) -> bool:
    """Whether somebody registered it at run time."""
    return entry in getattr(mapping, "USER_REGISTERED_MAPPINGS", ())


def read_key_mapping(key_mapping: dict[str, str]) -> tuple[Transform, ...]:
    """The renamings of a ``key_mapping`` that a user gives to ``from_pretrained``."""
    made = [loading.WeightRenaming(k, v) for k, v in key_mapping.items()]
    return tuple(_bounded(_transform(_GIVEN, n, t)) for n, t in enumerate(made))


_GIVEN = "key_mapping"


def _bounded(transform: Transform) -> Transform:
    """A transform whose patterns somebody gave, so that they may not take any time they like."""
    start_file(_GIVEN)
    forward, backward = (
        replace(step, bounded=expression(step.pattern.pattern, _GIVEN))
        for step in (transform.forward, transform.backward)
    )
    return replace(transform, forward=forward, backward=backward)


def _table() -> dict[str, list[Any]]:
    known: Any = mapping
    if known._checkpoint_conversion_mapping_cache is None:
        known.get_checkpoint_conversion_mapping("legacy")
    table: dict[str, list[Any]] = known._checkpoint_conversion_mapping_cache
    return table


class _Same:
    """Transforms as a key of a cache: these very ones. The key holds them, or another list could have their ids."""

    def __init__(self, transforms: list[Any]) -> None:
        self.held = tuple(transforms)

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.held)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Same)
            and len(self.held) == len(other.held)
            and all(map(is_, self.held, other.held))
        )


@lru_cache(maxsize=1024)
def _read(entry: str, registered: _Same) -> tuple[Transform, ...]:
    return tuple(_transform(entry, n, t) for n, t in enumerate(registered.held))


def _transform(entry: str, number: int, raw: Any) -> Transform:
    kind = type(raw).__name__
    grouped = kind == "GroupWeightRename"
    unknown = _why_unknown(type(raw))
    nothing = Step(re.compile("(?P<g0>(?!))"), (), ())
    if unknown is not None and _only_renames(type(raw)):
        return Transform(entry, number, nothing, nothing, calls=_calls(raw))
    if unknown is not None:
        return Transform(entry, number, nothing, nothing, unknown=unknown)
    # A copy: in 5.4 a transform shares its lists with its reverse, which changes them.
    back = copy.deepcopy(raw).reverse_transform()
    return Transform(
        entry,
        number,
        _step(raw, paired=grouped),
        _step(back, paired=grouped),
        tuple(getattr(raw, "operations", ())),
        grouped,
        kind == "PrefixChange",
    )


def _why_unknown(kind: type) -> str | None:
    """Why transforms of a class cannot be read from their patterns; ``None`` where they can.

    A class that changes nothing of what its nearest known base does is read like that base.
    """
    known = next(
        (k for k in kind.__mro__ if k.__name__ in _KNOWN_KINDS and _is_of_transformers(k)), None
    )
    if known is None:
        return f"{kind.__name__} is a kind of transform that this regraft does not know"
    changed = [
        name for name in _DESCRIBED if getattr(kind, name, None) is not getattr(known, name, None)
    ]
    if changed:
        return (
            f"{kind.__name__} has its own {' and '.join(changed)}, which this regraft does not know"
        )
    return None


def _only_renames(kind: type) -> bool:
    """Whether a class is a renaming with functions of its own for names, and nothing else: those can be called."""
    renaming: Any = loading.WeightRenaming
    own = ("_scoped_match", "materialize_tensors", "convert")
    return issubclass(kind, renaming) and all(
        getattr(kind, name, None) is getattr(renaming, name, None) for name in own
    )


def _calls(raw: Any) -> tuple[Rename, Rename]:
    """A renaming's own functions: what it makes of a key when a file is loaded, and when one is saved."""
    return _caller(copy.deepcopy(raw)), _caller(copy.deepcopy(raw).reverse_transform())


def _caller(raw: Any) -> Rename:
    def call(key: str) -> tuple[str, int] | None:
        try:
            new, _ = raw.rename_source_key(key)
        except Exception:  # code that was not written for any key there is
            return None
        return None if new == key else (str(new), 0)

    return call


def _is_of_transformers(kind: type) -> bool:
    return getattr(loading, kind.__name__, None) is kind


def _step(raw: Any, *, paired: bool) -> Step:
    return Step(
        raw.compiled_sources,
        tuple(raw.source_patterns),
        tuple(_plain(t) for t in raw.target_patterns),
        getattr(raw, "offset", 0),
        paired,
    )


def _plain(target: str) -> str:
    r"""What a target says, also once transformers 5.4 has saved a model: that writes patterns into its registry.

    >>> _plain(r"^layers.(\d+).mlp")
    'layers.\\1.mlp'
    """
    text = target.replace(r"\.", ".").removeprefix("^").removesuffix("$")
    return _CAPTURE.sub(r"\\1", text, count=1)


def digits_spelled(transforms: Sequence[Transform]) -> frozenset[int]:
    """Numbers that the patterns of some transforms spell out: for these an index is not like any other."""
    found: set[int] = set()
    for transform in transforms:
        for step in (transform.forward, transform.backward):
            for text in step.sources:
                found.update(int(d) for d in re.findall(r"(?<!\\)[0-9]+", text))
    return frozenset(found)


def has_single_digits(transforms: Sequence[Transform]) -> bool:
    """Whether a pattern looks at one digit of a number, so that numbers of two digits are not like the others.

    A renaming's own function may look at anything.
    """
    lone = re.compile(r"(?:\[0-9\]|\\d)(?![+*{])")
    return any(transform.calls for transform in transforms) or any(
        lone.search(text)
        for transform in transforms
        for step in (transform.forward, transform.backward)
        for text in step.sources
    )
