"""What wrappers and adapters' names leave in the keys of an adapter that was not saved by PEFT's ``save_pretrained``.

State dicts of training runs have the segments of FSDP, DDP, ``torch.compile`` and activation checkpointing in their
keys, and the adapter's name. PEFT's files have neither. No model of transformers or of PEFT has modules of these names,
but ``module``, which is taken away only where every key has it in the same place.

>>> keys = ["_orig_mod.base_model.model.l.0._fsdp_wrapped_module.q.lora_A.default.weight"]
>>> stripped = strip_names(keys, "lora_")
>>> stripped.names
['base_model.model.l.0.q.lora_A.weight']
>>> print(stripped)
segments of wrappers (_fsdp_wrapped_module, _orig_mod) and the adapter's name 'default' were taken out of 1 key
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from regraft.adapters.form import Array
from regraft.dialects.peft.renaming import RenamedTensors
from regraft.dialects.peft.scan import PREFIX
from regraft.errors import BadInputError, Finding

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_MODULE = "module"
_SAVED = "modules_to_save"
_DEFAULT = "default"
"""The name that PEFT gives an adapter where none is given."""
_PATH = PREFIX.rstrip(".").split(".")


class Stripped(Struct, frozen=True):
    """Keys without what does not belong in them, in the order of the file."""

    names: list[str]
    before: tuple[str, ...] = ()
    """The keys as they are in the file."""
    wrappers: tuple[str, ...] = ()
    """Which segments were taken out."""
    adapter: str | None = None
    """The adapter's name that was."""
    weights: bool = False
    """Whether the name of the adapted weight stood before ``lora_A``."""
    count: int = 0
    """Of how many keys something was taken out."""

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        said = [f"segments of wrappers ({', '.join(self.wrappers)})"] if self.wrappers else []
        said += [f"the adapter's name {self.adapter!r}"] if self.adapter is not None else []
        said += ["the name of the adapted weight before its factors"] if self.weights else []
        were = "were" if len(said) > 1 or self.wrappers else "was"
        keys = "key" if self.count == 1 else "keys"
        return f"{' and '.join(said)} {were} taken out of {self.count} {keys}"


def strip_tensors(
    tensors: Mapping[str, Array], few: Sequence[str], family: str, where: str
) -> tuple[Mapping[str, Array], Stripped]:
    """Tensors by their keys without what does not belong in them; ``few`` has one key of each kind.

    Raises ``BadInputError`` where two keys would become one.
    """
    names = list(tensors)
    if not strip_names(few, family):
        return tensors, Stripped(names, tuple(names))
    stripped = strip_names(names, family)
    firsts: dict[str, str] = {}
    findings = []
    for old, new in zip(tensors, stripped.names, strict=True):
        if new in firsts:
            findings.append(
                Finding(
                    "prefix",
                    f"without what wrappers put into it, it is the same key as {firsts[new]}",
                    where=where,
                    key=old,
                    fix="take one of the two out",
                )
            )
        firsts.setdefault(new, old)
    if findings:
        raise BadInputError(findings)
    return RenamedTensors(tensors, firsts), stripped


def strip_names(names: Sequence[str], family: str) -> Stripped:
    """Keys without wrappers' segments, the one adapter's name, and ``weight`` before factors.

    ``family`` is what the segments begin with that a family's tensors have below their modules. Several adapters'
    names in one file stay, for they are several adapters.
    """
    split = [name.split(".") for name in names]
    gone: dict[str, None] = {}
    of_family = {_adapter_in(s, family) for s in split if _is_of(s, family)}
    named = of_family | {found for s in split if (found := _adapter_in(s, family)) is not None}
    # A training run names its adapter in every key: what stands in some of them is no name, but for PEFT's own name
    # behind what PEFT alone puts there.
    name = next(iter(named)) if len(named) == 1 else None
    among = family
    if of_family == {None} and named == {None, _DEFAULT}:
        name, among = _DEFAULT, ""
    weights = False
    made: list[str] = []
    everywhere = _where_module_is(split)
    for segments in split:
        kept = [s for at, s in enumerate(segments) if s not in _WRAPPERS and at != everywhere]
        if len(kept) < len(segments):
            gone.update((s, None) for s in segments if s in _WRAPPERS or s == _MODULE)
        if name is not None:
            kept = _without_name(kept, among, name)
        at = next((i for i, s in enumerate(kept) if family and s.startswith(family)), 0)
        if at > 1 and kept[at - 1] == "weight":
            kept, weights = [*kept[: at - 1], *kept[at:]], True
        made.append(".".join(kept))
    count = sum(old != new for old, new in zip(names, made, strict=True))
    wrappers = tuple(sorted(g for g in gone if g in _WRAPPERS or everywhere is not None))
    return Stripped(made, tuple(names), wrappers, name, weights, count)


def _is_of(segments: Sequence[str], family: str) -> bool:
    """Whether a key is of a tensor that a family adds below a module."""
    return bool(family) and any(segment.startswith(family) for segment in segments[1:])


def _where_module_is(split: Sequence[Sequence[str]]) -> int | None:
    """Where ``module`` stands in every key: before PEFT's prefix, or right behind it."""
    bare = [[s for s in segments if s not in _WRAPPERS] for segments in split]
    for place in (0, len(_PATH)):
        before = _PATH[:place]
        if bare and all(b[:place] == before and b[place : place + 1] == [_MODULE] for b in bare):
            # Wrappers of other kinds may stand before it, the same ones in every key.
            places = {
                [at for at, s in enumerate(segments) if s not in _WRAPPERS][place]
                for segments in split
            }
            return places.pop() if len(places) == 1 else None
    return None


def _adapter_in(segments: Sequence[str], family: str) -> str | None:
    """The adapter's name in a key, where there is one."""
    for at, segment in enumerate(segments[:-1]):
        follows = segments[at + 1]
        if segment == _SAVED and at + 2 < len(segments):
            return follows
        if family and segment.startswith(family) and at:
            is_name = follows not in ("weight", "bias") and not follows.isdigit()
            return follows if is_name and segments[at + 2 :] in ([], ["weight"], ["bias"]) else None
    return None


def _without_name(segments: Sequence[str], family: str, name: str) -> list[str]:
    for at, segment in enumerate(segments[:-1]):
        if segments[at + 1] != name:
            continue
        if segment == _SAVED:
            return [*segments[:at], *segments[at + 2 :]]
        if family and segment.startswith(family):
            return [*segments[: at + 1], *segments[at + 2 :]]
    return list(segments)
