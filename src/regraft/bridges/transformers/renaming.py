"""One key through the transforms of a model, forth and back."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from regraft.bridges.transformers.facts import unwritten
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

    def at(self, key: str) -> Renamed:
        """The same for another key."""
        return Renamed(key, self.hit, self.fired)


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
    tensors: Container[str] = ()
    """The model's keys, and the same with stand-ins for indices."""
    base: str = ""
    """What a head model calls the base model in it."""
    is_head: bool = False
    """Whether this is one."""

    def ways(self, key: str, new: Renamed) -> list[Renamed]:
        """What a key may be in the model, best first: renamed, as it is, with more or less of the base's prefix.

        A key that the model has, and whose new form it has not, keeps its name.
        """
        ways = [new, Renamed(key)]
        for way in ways[:2] if self.base else ():
            if self.is_head:
                ways.append(way.at(f"{self.base}.{way.key}"))
            if not self.is_head and way.key.startswith(f"{self.base}."):
                ways.append(way.at(way.key[len(self.base) + 1 :]))
        if self.is_head and new.key.startswith(f"{self.base}.") and new.key != key:
            ways.append(new.at(new.key[len(self.base) + 1 :]))
        if self.is_head and self.base_was_doubled(key):
            ways.append(Renamed(key[len(self.base) + 1 :]))
        return ways

    def base_was_doubled(self, key: str) -> bool:
        """Whether a renaming adds the base's prefix when it is undone: then heads may have it, too."""
        return key.startswith(f"{self.base}.") and any(
            scoped.transform.adds_prefix for scoped in self.scopes.renamings
        )

    def land(self, key: str) -> Renamed | None:
        """The model's key for an old one; ``None`` where it has none."""
        ways = self.ways(key, self.forward(key))
        return next((way for way in ways if way.key in self.tensors), None)

    def forward(self, key: str, guards: frozenset[Scoped] | None = None) -> Renamed:
        """An old key's new form. ``guards`` are the guarded renamings that act; all where it is not given."""
        fired: list[Scoped] = []
        new = key
        for scoped in (*self.scopes.renamings, *self.scopes.legacy):
            if guards is not None and scoped.transform.guarded and scoped not in guards:
                continue
            done = scoped.rename(new)
            if done is not None and done[0] != new:
                new = done[0]
                fired.append(scoped)
        for scoped in self.scopes.converters:
            done = scoped.rename(new)
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
                done = scoped.rename(new)
                if done is None:
                    continue
                if scoped.transform.guarded and done[1] == 0:
                    found.add(scoped)
                new = done[0]
        return frozenset(found)

    def split(self, key: str) -> Split | None:
        """The converter that makes a key of the model; ``None`` where none does.

        A pattern may match inside a longer name (``up_proj`` in ``gate_up_proj``); the one counts whose targets the
        model has, all of them.
        """
        found = list(self._splits(key))
        whole = (split for split in found if all(t in self.tensors for t in split.targets))
        return next(whole, next(iter(found), None))

    def _splits(self, key: str) -> Iterator[Split]:
        for scoped in self.scopes.converters:
            parts = scoped.below(key)
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
            yield Split(scoped, target, targets, tuple(sources))

    def backward(self, key: str) -> Renamed | None:
        """An old spelling of a key: all renamings undone in reverse order.

        Where that does not lead back, some of them are left out; ``None`` where nothing leads back.
        """
        for old in (*self.undone(key), key):
            new = self.land(old)
            if new is not None and new.key == key and new.hit is None:
                return new.at(old)
        return None

    def undone(self, key: str) -> Iterator[str]:
        """Old spellings that may lead to a key, the one with everything undone first."""
        return islice(self._undone(key, self.scopes.renamings[::-1]), _TRIES)

    def _undone(self, key: str, left: Sequence[Scoped]) -> Iterator[str]:
        for place, scoped in enumerate(left):
            old = scoped.undo(key)
            if old is not None and old != key:
                kept = self._was_never_written(scoped, key, old)
                for way in (key, old) if kept else (old, key):
                    yield from self._undone(way, left[place + 1 :])
                return
        yield key

    def _was_never_written(self, scoped: Scoped, key: str, old: str) -> bool:
        """Whether transformers 4 itself never wrote what a renaming reads.

        That is so of the names of tensors in older releases still, and of a model inside a bigger one of its own
        family, where no prefix stood twice. What no rule tells is a fact in ``v4_files.toml``.
        """
        step = scoped.transform.forward
        if scoped.transform.calls is not None:
            return False
        if unwritten(scoped.transform.entry, step.sources[0], key):
            return True
        if any(
            (step.sources, step.targets)
            == (s.transform.forward.sources, s.transform.forward.targets)
            for s in self.scopes.legacy
        ):
            return True
        name = scoped.path.rpartition(".")[2]
        if not scoped.transform.adds_prefix or not name or scoped.parent is None:
            return False
        family, own = scoped.parent.model_type or "", scoped.model.model_type or ""
        return own.startswith(family) and old.count(f"{name}.") > key.count(f"{name}.")
