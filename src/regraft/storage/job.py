"""What a run makes, noted down so that a later one goes on with the same work only, or says what differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
from msgspec import Struct

from regraft.errors import BadInputError, Finding

_SHOWN = 3


class LocalJob(Struct, frozen=True):
    """What is being made, on this machine: the same job makes the same bytes."""

    release: str
    """That of regraft."""
    read: dict[str, tuple[int, int | str]]
    """The files that it is made from: the size of each in bytes, and when it was written or its ETag."""
    options: dict[str, str]
    """What was asked for, as `regraft.options.Options.given` has it."""
    result: str = ""
    """A digest of what is made, where that is known before; then other words for the same options are no difference."""

    def is_same(self, other: LocalJob) -> bool:
        """Whether both make the same bytes."""
        known = bool(self.result and other.result)
        here = (self.release, self.read, self.result)
        same_options = known or self.options == other.options
        return here == (other.release, other.read, other.result) and same_options

    def differences(self, before: LocalJob) -> list[str]:
        """What is not as it was in a job ``before``, each in a few words.

        >>> job = LocalJob("1.0", {"model.safetensors": (8, 1)}, {"--dtype": "bfloat16"})
        >>> job.differences(LocalJob("1.0", {"model.safetensors": (8, 2)}, {}))
        ['--dtype is bfloat16 now, and was not given', 'written to since: model.safetensors']
        """
        found = []
        if self.release != before.release:
            found.append(f"regraft {before.release} began it, and this is {self.release}")
        found += _options(self.options, before.options)
        both = self.read.keys() & before.read.keys()
        if written := sorted(name for name in both if self.read[name] != before.read[name]):
            found.append(f"written to since: {_names(written)}")
        if gone := before.read.keys() - both:
            found.append(f"not read now: {_names(gone)}")
        if new := self.read.keys() - both:
            found.append(f"not read then: {_names(new)}")
        return found or ["the rules or a config it goes by differ"]

    def other_work(self, before: LocalJob, where: str, fix: str) -> BadInputError:
        """The error where a run is asked to go on with what it does not make."""
        message = "what was begun here is other work: " + "; ".join(self.differences(before))
        return BadInputError(Finding("other-work", message, where=where, fix=fix))

    def encode(self) -> bytes:
        """The job as a file holds it."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    @staticmethod
    def decode(text: bytes) -> LocalJob | None:
        """The job that a file holds; ``None`` where it is torn or of a release that noted it in another way."""
        try:
            return msgspec.json.decode(text, type=LocalJob)
        except msgspec.DecodeError:
            return None


def _options(now: Mapping[str, str], before: Mapping[str, str]) -> Iterable[str]:
    for flag in dict.fromkeys((*now, *before)):
        here, there = now.get(flag), before.get(flag)
        if here == there:
            continue
        was = "was not given" if there is None else f"was {there}"
        yield (
            f"{flag} is not given now, and {was}"
            if here is None
            else (f"{flag} is {here} now, and {was}")
        )


def _names(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
