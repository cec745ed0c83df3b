"""One key through the transforms of a model, forth and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from regraft.bridges.transformers.scopes import Scoped, Scopes

WILDCARD = "*"
_TRIES = 64


@dataclass(frozen=True, slots=True)
class Hit:
    """The converter that a key belongs to."""

    scoped: Scoped
    source: int
    """Which of the converter's sources the key is."""


@dataclass(frozen=True, slots=True)
class Renamed:
    """What becomes of an old key."""

    key: str
    """Of several targets of a converter, the first."""
    hit: Hit | None = None
    fired: tuple[Scoped, ...] = ()


@dataclass(frozen=True, slots=True)
class Split:
    """A converter seen from one of the tensors that it makes."""

    scoped: Scoped
    target: int
    """Which of the converter's targets it is."""
    targets: tuple[str, ...]
    """The keys of all its targets."""
    sources: tuple[str, ...]
    """The old keys, with ``*`` for the index of a stacked tensor."""
    fired: tuple[Scoped, ...] = ()


@dataclass(frozen=True, slots=True)
class Renamer:
    """The transforms of one model."""

    scopes: Scopes
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The model's keys: a key that the model has, and whose new form it has not, keeps its name."""

    def forward(self, key: str, guards: frozenset[Scoped] | None = None) -> Renamed:
        """An old key's new form. ``guards`` are the guarded renamings that act; all where it is not given."""
        fired: list[Scoped] = []
        new = key
        for scoped in (*self.scopes.renamings, *self.scopes.legacy):
            if guards is not None and scoped.transform.guarded and scoped not in guards:
                continue
            done = scoped.rename(new, scoped.transform.forward)
            if done is not None and done[0] != new:
                new = done[0]
                fired.append(scoped)
        for scoped in self.scopes.converters:
            done = scoped.rename(new, scoped.transform.forward)
            if done is not None:
                return Renamed(done[0], Hit(scoped, done[1]), (*fired, scoped))
        return Renamed(new, None, tuple(fired))

    def guards(self, keys: Iterable[str]) -> frozenset[Scoped]:
        """The guarded renamings that act on some keys: those of which the first source is there."""
        guarded = [s for s in self.scopes.renamings if s.transform.guarded]
        if not guarded:
            return frozenset()
        found = set()
        for key in keys:
            new = key
            for scoped in self.scopes.renamings:
                done = scoped.rename(new, scoped.transform.forward)
                if done is None:
                    continue
                if scoped.transform.guarded and done[1] == 0:
                    found.add(scoped)
                new = done[0]
        return frozenset(found)

    def split(self, key: str) -> Split | None:
        """The converter that makes a key of the model; ``None`` where none does."""
        for scoped in self.scopes.converters:
            parts = scoped.strip(key)
            if parts is None:
                continue
            step = scoped.transform.backward
            found = step.match(parts[1])
            if found is None:
                continue
            match, target = found
            prefix, rest = parts
            targets = tuple(
                prefix + rest[: match.start()] + text + rest[match.end() :]
                for text in scoped.transform.forward.targets
            )
            if targets[target] != key:
                continue
            sources = [
                prefix + step.write(rest, match, target, n) for n in range(len(step.targets))
            ]
            return Split(scoped, target, targets, tuple(sources))
        return None

    def backward(self, key: str, wanted: str | None = None) -> str | None:
        """The old spelling of a key: all renamings undone in reverse order.

        Where that does not lead back, some of them are left out; ``None`` where nothing leads back. ``wanted`` is
        what the old key must become, the key itself where it is not given.
        """
        wanted = key if wanted is None else wanted
        for old in self.undone(key):
            if self.forward(old).key == wanted:
                return old
        return key if wanted in self.tensors and self.forward(key).key == key else None

    def undone(self, key: str) -> Iterator[str]:
        """Old spellings that may lead to a key, the one with everything undone first."""
        return islice(self._undone(key, self.scopes.renamings[::-1]), _TRIES)

    def _undone(self, key: str, left: Sequence[Scoped]) -> Iterator[str]:
        for place, scoped in enumerate(left):
            done = scoped.rename(key, scoped.transform.backward)
            if done is not None and done[0] != key:
                ways = (done[0], key) if not _doubles(scoped, key, done[0]) else (key, done[0])
                for way in ways:
                    yield from self._undone(way, left[place + 1 :])
                return
        yield key


def _doubles(scoped: Scoped, key: str, old: str) -> bool:
    """Whether a prefix would stand twice: a model that calls a part ``text_model`` had no such prefix in it."""
    name = scoped.path.rpartition(".")[2]
    return (
        scoped.transform.adds_prefix
        and bool(name)
        and old.count(f"{name}.") > key.count(f"{name}.")
    )
