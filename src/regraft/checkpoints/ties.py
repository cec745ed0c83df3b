"""Weights that a model ties, stored as two tensors with other values.

transformers 4 ties the output to the input embeddings wherever the text model's ``tie_word_embeddings`` says so, and
what is stored for the output is lost. transformers 5 ties two tensors of a file only where they are equal. So such a
file is one model in the one release, and another in the other: what is meant has to be said.

Source: ``PreTrainedModel.tie_embeddings_and_encoder_decoder`` of transformers 4.57.6 and ``tie_weights`` of 5.23.0.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from regraft.adapters.detect import covers
from regraft.checkpoints.aside import drop_rows
from regraft.checkpoints.engine import open_source
from regraft.checkpoints.source import Source
from regraft.checkpoints.tiles import read_into
from regraft.errors import BadInputError, Finding
from regraft.planning.model import Foreign, ModelConfig
from regraft.rules.book import books_for

FIELD = "tie_word_embeddings"
_TEXT = ("decoder", "generator", "text_config")
"""What ``get_text_config(decoder=True)`` takes for the text model's part, in this order."""
_TIED_TYPES = frozenset({"ernie4_5_moe", "jetmoe"})
"""The model types that a book of the library knows and that are tied where the config does not say it."""
_OUTPUTS = ("lm_head", "embed_out", "output_projection", "decoder")
_INPUTS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared")
_BUFFER = 4 << 20


@dataclass(frozen=True, slots=True)
class Tie:
    """Two tensors that are one in the model, and have other values; names of the source."""

    kept: str
    """The input embeddings, whose values transformers 4 takes for both."""
    other: str


def unequal_ties(source: Source, model: ModelConfig | None, foreign: Foreign | None) -> list[Tie]:
    """The tied weights of a checkpoint that have other values.

    Only tensors with a row for each token are read, and only where nothing says that they are not tied; two that
    differ are told by their first bytes. ``foreign`` is asked which are tied, where names do not tell it: of models
    that the library does not know.
    """
    if model is None or _says_tied(model.data) is False:
        return []
    unequal = [
        (first, other)
        for alike in _candidates(source, model)
        for first in alike[:1]
        for other in alike[1:]
        if not same_values(source, first, other)
    ]
    if not unequal:
        return []
    names = source.tensors.names
    rows = sorted({row for pair in unequal for row in pair})
    keys = [names[row] for row in rows]
    groups = None
    if foreign is not None and not covers(books_for(model.model_types()), model):
        groups = foreign.tied(model, keys, model.architectures())
    if groups is None:
        groups = _tied_by_names(model, keys)
    at = dict(zip(keys, rows, strict=True))
    return [
        Tie(kept, other)
        for kept, *others in groups
        for other in others
        if not same_values(source, at[kept], at[other])
    ]


def refuse(where: str, ties: Sequence[Tie]) -> None:
    """Raises ``BadInputError`` for tied weights with other values, of which nobody said what is meant."""
    raise BadInputError(
        Finding(
            "two-values",
            f"config.json ties it to {tie.kept}, and the two have other values: transformers 4 takes {tie.kept} for "
            "both, transformers 5 keeps both",
            where=where,
            key=tie.other,
            fix=f"say --untie to keep both and write {FIELD}: false, or leave one out: --drop {tie.other} (as "
            f"transformers 4 does) or --drop {tie.kept}",
        )
        for tie in ties
    )


def leave_out(source: Source, ties: Sequence[Tie], drop: Sequence[str]) -> tuple[Source, list[str]]:
    """The checkpoint without the values of some tied tensors, and what is said of it.

    Where it is the input embeddings', the other's values take their name: a loader looks for them there.
    """
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
            os.close(file)
    return True


def _says_tied(config: Mapping[str, Any]) -> bool | None:
    """What the part of the config says that transformers 4 goes by; ``None`` where it says nothing."""
    part = next((config[name] for name in _TEXT if isinstance(config.get(name), Mapping)), config)
    value = part.get(FIELD)
    return value if isinstance(value, bool) else None


def _candidates(source: Source, model: ModelConfig) -> list[list[int]]:
    """Tensors of one shape that have a row, or a number, for each token: those that may be tied."""
    names, shapes = source.tensors.names, source.tensors.shapes
    sizes = {part.get("vocab_size") for _, part in model.parts()}
    # Vocabularies are resized without the config.
    sizes |= {
        s[0] for n, s in zip(names, shapes, strict=True) if n.endswith("lm_head.weight") and s
    }
    alike: dict[tuple[int, ...], list[int]] = {}
    for row, shape in enumerate(shapes):
        if shape and shape[0] in sizes:
            alike.setdefault(tuple(shape), []).append(row)
    return [sorted(rows, key=lambda r: _is_output(names[r])) for rows in alike.values() if rows[1:]]


def _is_output(name: str) -> bool:
    return _leaf(name) in _OUTPUTS


def _leaf(name: str) -> str:
    return name.rpartition(".")[0].rpartition(".")[2]


def _tied_by_names(model: ModelConfig, keys: Sequence[str]) -> list[tuple[str, ...]]:
    """The input and the output embeddings by their names, where the model ties them."""
    if _says_tied(model.data) is None and not _TIED_TYPES & set(model.model_types()):
        return []
    inputs = [key for key in keys if _leaf(key) in _INPUTS]
    outputs = [key for key in keys if _is_output(key)]
    return [(inputs[0], *outputs)] if inputs and outputs else []


def nothing_to_untie(source: Source) -> Finding:
    """What is said where nothing is left that ``--untie`` could keep."""
    message = "--untie: it has no tied weights with other values"
    return Finding("option", message, where=source.where, fix="leave it out")
