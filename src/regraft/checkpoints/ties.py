"""Weights that a model ties, stored as two tensors with other values.

transformers 4 ties the output to the input embeddings wherever the text model's ``tie_word_embeddings`` says so, and
what is stored for the output is lost. transformers 5 ties two tensors of a file only where they are equal. So such a
file is one model in the one release, and another in the other: what is meant has to be said.

Source: ``PreTrainedModel.tie_embeddings_and_encoder_decoder`` of transformers 4.57.6 and ``tie_weights`` of 5.23.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from regraft.checkpoints.aside import drop_rows
from regraft.checkpoints.source import CONFIG, Source
from regraft.checkpoints.tiles import read_into
from regraft.errors import BadInputError, Finding
from regraft.planning.model import Foreign, ModelConfig, TiedNames
from regraft.rules.book import books_for, covers
from regraft.storage.weights import open_source
from regraft.values import replace

FIELD = "tie_word_embeddings"
_TEXT = ("decoder", "generator", "text_config")
"""What ``get_text_config(decoder=True)`` takes for the text model's part, in this order."""
_OUTPUTS = frozenset({"lm_head", "embed_out", "output_projection", "decoder"})
_INPUTS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in"})
_SHARED = "shared"
_BUFFER = 4 << 20


class Tie(Struct, frozen=True):
    """Two tensors that are one in the model, and have other values; names of the source."""

    kept: str
    """The one that the other follows: of embeddings the input's, whose values transformers 4 takes for both."""
    other: str
    is_head: bool
    """Whether the other is the output embeddings, which only the config ties in transformers 4."""


class Ties(Struct, frozen=True):
    """Tensors of a checkpoint that a model may have as one, and that have other values."""

    unequal: tuple[Tie, ...] = ()
    """Those that are tied."""
    undecided: tuple[Tie, ...] = ()
    """Embeddings of which nothing says whether they are tied: no class, no config."""


def unequal_ties(source: Source, model: ModelConfig | None, foreign: Foreign | None) -> Ties:
    """The tied weights of a checkpoint that have other values.

    None where the config says that nothing is tied. ``foreign`` is asked for the ties of the model's class, whatever
    they are; of models that the library knows, only the embeddings are ever tied, and names tell them. Where there is
    no class to ask, the config tells it, or the defaults of transformers 4 for the model's type. Two that differ are
    told by their first bytes.
    """
    if model is not None and _says_tied(model.data) is False:
        return Ties()
    known = model is not None and covers(books_for(model.model_types()), model.model_types())
    if model is not None and foreign is not None and not known:
        groups = foreign.tied(model, source.tensors.names, model.architectures())
        if groups is not None:
            return Ties(tuple(_unequal(source, groups)))
    if model is not None and _ties_by_default(model):
        return Ties(tuple(_unequal(source, _tied_by_names(source, model))))
    if known:
        return Ties()
    return Ties(undecided=tuple(_unequal(source, _tied_by_names(source, model))))


def _unequal(source: Source, groups: Sequence[TiedNames]) -> Iterator[Tie]:
    at = {name: row for row, name in enumerate(source.tensors.names)} if groups else {}
    shapes = source.tensors.shapes
    for group in groups:
        kept, *others = group.names
        for other in others:
            # A loader refuses other shapes by itself.
            same_shape = shapes[at[kept]] == shapes[at[other]]
            if same_shape and not same_values(source, at[kept], at[other]):
                yield Tie(kept, other, other in group.heads)


def undecided_note(tie: Tie, model: ModelConfig | None) -> str:
    """What is said of embeddings of which nothing says whether they are tied."""
    lacking = f"there is no {CONFIG}" if model is None else f"{CONFIG} does not have {FIELD}"
    return (
        f"{lacking}, and no class that could be asked, so nothing says whether {tie.other} is tied to {tie.kept}; they "
        f"have other values, and both are kept. If they are tied, transformers 4 takes {tie.kept} for both"
    )


def refuse(where: str, ties: Sequence[Tie]) -> None:
    """Raises ``BadInputError`` for tied weights with other values, of which nobody said what is meant."""
    raise BadInputError(_two_values(where, tie) for tie in ties)


def _two_values(where: str, tie: Tie) -> Finding:
    old = (
        f"takes {tie.kept} for both"
        if tie.is_head
        else "may have one tensor for both, with the values that it reads last"
    )
    return Finding(
        "two-values",
        f"the model's class and config.json tie it to {tie.kept}, and the two have other values: transformers 4 {old}, "
        "transformers 5 keeps both",
        where=where,
        key=tie.other,
        fix=f"say --untie to keep both and write {FIELD}: false, or leave one out: --drop {tie.other} (as "
        f"transformers 4 does) or --drop {tie.kept}"
        if tie.is_head
        else f"leave one out: --drop {tie.other} or --drop {tie.kept}; or, for transformers 5 alone, say --untie to "
        f"keep both and write {FIELD}: false",
    )


def refuse_rest(source: Source, ties: Sequence[Tie], drop: Sequence[str]) -> None:
    """Raises ``BadInputError`` where what stays, when a tensor is left out that others follow, still has two values."""
    at = {name: row for row, name in enumerate(source.tensors.names)} if ties else {}
    left: dict[str, list[Tie]] = {}
    for tie in ties:
        if tie.kept in drop and tie.other not in drop:
            left.setdefault(tie.kept, []).append(tie)
    findings = [
        _two_values(source.where, replace(tie, kept=first.other))
        for first, *others in left.values()
        for tie in others
        if not same_values(source, at[first.other], at[tie.other])
    ]
    if findings:
        raise BadInputError(findings)


def leave_out(source: Source, ties: Sequence[Tie], drop: Sequence[str]) -> tuple[Source, list[str]]:
    """The checkpoint without the values of some tied tensors, and what is said of it.

    Where it is the input embeddings', the other's values take their name: a loader looks for them there.
    """
    if not ties:
        return source, []
    tensors = source.tensors
    at = {name: row for row, name in enumerate(tensors.names)}
    dtypes, files = list(tensors.dtypes), tensors.files.copy()
    starts, sizes = tensors.starts.copy(), tensors.sizes.copy()
    gone: list[str] = []
    notes: list[str] = []
    for tie in ties:
        if tie.other in drop:
            gone.append(tie.other)
            notes.append(f"dropped {tie.other}: it is tied to {tie.kept}, whose values are kept")
        elif tie.kept in drop:
            kept, other = at[tie.kept], at[tie.other]
            gone.append(tie.other)
            for column in (files, starts, sizes):
                column[kept] = column[other]
            dtypes[kept] = dtypes[other]
            notes.append(
                f"dropped the values of {tie.kept}: it is tied to {tie.other}, whose values have its name now"
            )
    if not gone:
        return source, []
    moved = replace(tensors, dtypes=dtypes, files=files, starts=starts, sizes=sizes)
    return drop_rows(replace(source, tensors=moved), gone), notes


def without_ties(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that ties nothing, in the fields of either release.

    >>> without_ties({"text_config": {"model_type": "llama"}})
    {'text_config': {'model_type': 'llama', 'tie_word_embeddings': False}, 'tie_word_embeddings': False}
    """
    parts = {
        name: {**config[name], FIELD: False} for name in _TEXT if isinstance(config.get(name), dict)
    }
    return {**config, **parts, FIELD: False}


def same_values(source: Source, one: int, other: int) -> bool:
    """Whether two tensors of a checkpoint have the same type and bytes; read in parts, until they differ."""
    tensors = source.tensors
    if tensors.dtypes[one] != tensors.dtypes[other] or tensors.sizes[one] != tensors.sizes[other]:
        return False
    places = [(int(tensors.files[row]), int(tensors.starts[row])) for row in (one, other)]
    if places[0] == places[1]:
        return True
    size = int(tensors.sizes[one])
    opened = [open_source(source.files[number]) for number, _ in places]
    try:
        buffers = [np.empty(min(_BUFFER, size), np.uint8) for _ in places]
        for at in range(0, size, _BUFFER):
            parts = [buffer[: min(_BUFFER, size - at)] for buffer in buffers]
            for file, part, (_, start) in zip(opened, parts, places, strict=True):
                read_into(file, part.data, start + at)
            if not np.array_equal(parts[0], parts[1]):
                return False
    finally:
        for file in opened:
            file.close()
    return True


def _says_tied(config: Mapping[str, Any]) -> bool | None:
    """What the part of the config says that transformers 4 goes by; ``None`` where it says nothing."""
    value = _text_part(config).get(FIELD)
    return value if isinstance(value, bool) else None


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that transformers 4 goes by."""
    return next((config[name] for name in _TEXT if isinstance(config.get(name), Mapping)), config)


def _ties_by_default(model: ModelConfig) -> bool:
    """Whether the embeddings are tied, by the config or by what transformers 4 takes where it does not say it."""
    said = _says_tied(model.data)
    inner = _text_part(model.data).get("model_type")
    kind = inner if isinstance(inner, str) else model.model_type
    return bool(said) if said is not None else kind in tied_types()


@lru_cache(maxsize=1)
def tied_types() -> frozenset[str]:
    """The model types whose embeddings transformers 4 ties where the config does not say it."""
    text = Path(__file__).with_name("tables").joinpath("tied_types.txt").read_text("utf-8")
    return frozenset(line for line in text.splitlines() if not line.startswith("#"))


def _tied_by_names(source: Source, model: ModelConfig | None) -> list[TiedNames]:
    """The embeddings by their names: where no class can be asked.

    The output's follow the input's; where a model has one for several inputs, these follow it, too.
    """
    tensors = source.tensors
    sizes = {part.get("vocab_size") for _, part in model.parts()} if model is not None else set()
    # Vocabularies are resized without the config.
    sizes |= {
        shape[0]
        for name, shape in zip(tensors.names, tensors.shapes, strict=True)
        if shape and (name.endswith("lm_head.weight") or (model is None and is_output(name)))
    }
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, shape in zip(tensors.names, tensors.shapes, strict=True):
        if shape and shape[0] in sizes:
            alike.setdefault(tuple(shape), []).append(name)
    return [tied for names in alike.values() if (tied := _by_roles(names)) is not None]


def _by_roles(names: Sequence[str]) -> TiedNames | None:
    """Those of some names of one shape that are embeddings, and tied."""
    shared = [name for name in names if _leaf(name) == _SHARED]
    inputs = sorted((n for n in names if _leaf(n) in _INPUTS), key=lambda n: n.count("."))
    outputs = [name for name in names if is_output(name)]
    found = [*shared, *inputs] if shared else inputs[:1]
    if not found or len(found) + len(outputs) < 2:
        return None
    return TiedNames((*found, *outputs), frozenset(outputs))


def is_output(name: str) -> bool:
    """Whether a name is that of an output that models tie to their input embeddings."""
    return _leaf(name) in _OUTPUTS


def is_input(name: str) -> bool:
    """Whether a name is that of input embeddings."""
    return _leaf(name) in _INPUTS and name.endswith(".weight")


def _leaf(name: str) -> str:
    return name.rpartition(".")[0].rpartition(".")[2]


def nothing_to_untie(source: Source) -> Finding:
    """What is said where nothing is left that ``--untie`` could keep."""
    message = "--untie: it has no tied weights with other values"
    return Finding("option", message, where=source.where, fix="leave it out")
