"""A file of LoRAs for an image or video model, converted: opened, identified, moved, fitted, written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from regraft.adapters.form import Array
from regraft.adapters.provenance import digest_all
from regraft.adapters.scale import Number
from regraft.dialects.image.delta import LORA, Delta
from regraft.dialects.image.families import DENOISER, Family
from regraft.dialects.image.grouping import Grouped, group_tensors
from regraft.dialects.image.header import ADAPTER_METADATA, settings_of
from regraft.dialects.image.moving import Ways, move_deltas, with_kernels
from regraft.dialects.image.origin import KEY, Origin, read_origin, unfolded, write_origin
from regraft.dialects.image.prefixes import Place, place_of
from regraft.dialects.image.read import (
    Fit,
    Home,
    ImageAdapter,
    candidates,
    read_adapter,
)
from regraft.dialects.image.weights import ImageBase
from regraft.dialects.image.write import KEYED, Writing, Written, fit_to, write_deltas, writing
from regraft.errors import AmbiguousError, BadInputError, Choice, Finding, RegraftError
from regraft.report import AdapterReport, Target, count_in_words
from regraft.storage.safetensors import open_tensors, read_header

_STALE = re.compile(r"sshs_\w*hash|modelspec\.hash_sha256")
"""Entries that are of the old file's bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A converted file, ready to be written."""

    tensors: dict[str, Array]
    metadata: dict[str, str]
    report: AdapterReport
    deltas: Mapping[Home, Delta]
    """The modules that it has."""
    how: Writing
    ways: Ways
    config: dict[str, Any]
    """A config beside the file, where the dialect has one."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenedImage:
    """A file of LoRAs, by module; which family it is for is not decided."""

    where: str
    tensors: dict[str, Array]
    metadata: dict[str, str]
    grouped: Grouped
    dialect: str
    """Whose file it is."""
    form: str
    """The dialect that its names are of."""


def open_image(path: Path) -> OpenedImage:
    """Open a file.

    Raises ``BadInputError`` with every key that no tool is known to write, ``RefusedError`` for adapters that cannot
    be read.
    """
    header = read_header(path)
    return opened_image(str(path), open_tensors(path, header), dict(header.metadata))


def opened_image(where: str, tensors: dict[str, Array], metadata: dict[str, str]) -> OpenedImage:
    """The tensors and the header of a file, opened.

    Raises what `open_image` raises.
    """
    grouped = group_tensors(tensors, where)
    settings_of(metadata, where)
    if not grouped.modules:
        message = "there is no adapter in this file"
        raise BadInputError(Finding("empty", message, where=where, fix="check the path"))
    whose, form = dialect_of(grouped, metadata), form_of(grouped)
    return OpenedImage(where, tensors, metadata, grouped, whose, form)


def form_of(grouped: Grouped) -> str:
    """The dialect of a file's names: what stands before most of its modules."""
    found = Counter(form_of_place(place_of(stem)) for stem in grouped.modules)
    return found.most_common(1)[0][0]


def form_of_place(place: Place) -> str:
    """The dialect of a name."""
    prefix = place.prefix.removeprefix("base_model.model.")
    if place.flat:
        return "kohya"
    if prefix.startswith("text_encoders."):
        return "comfyui"
    if prefix.startswith("lora_te"):
        return "ai-toolkit"
    return _FORMS.get(prefix, "bfl" if _BFL.match(place.module) else "diffusers")


def dialect_of(grouped: Grouped, metadata: Mapping[str, str]) -> str:
    """Whose file it is: by what only one tool writes, and otherwise by its names."""
    spellings = {s for module in grouped.modules.values() for s in module.spellings}
    return tool_of(spellings, metadata) or form_of(grouped)


def tool_of(spellings: set[str], metadata: Mapping[str, str]) -> str:
    """The tool that a file says it is of; empty where it does not."""
    if "xlabs" in spellings:
        return "xlabs"
    if "ot_revision" in metadata:
        return "onetrainer"
    return "ai-toolkit" if "ai-toolkit" in metadata.get("software", "") else ""


_BFL = re.compile(r"(?:double|single)_blocks\.")
_FORMS = {
    "diffusion_model.": "comfyui",
    "model.diffusion_model.": "comfyui",
    "transformer.": "diffusers",
    "transformer_2.": "diffusers",
    "unet.": "diffusers",
    "text_encoder.": "diffusers",
    "text_encoder_2.": "diffusers",
    "text_encoder_3.": "diffusers",
}


def convert_image(
    opened: OpenedImage,
    to: str,
    *,
    family: str | None = None,
    base: Path | None = None,
    via: str | None = None,
) -> Made:
    """Convert an opened file to a dialect.

    ``family`` says what it is for, where its names do not tell; ``base`` has weights of the base, ``via`` allows
    deltas of full rank (``dense``) or of a lower one (``svd:RANK``) where there is no exact equivalent.

    Raises ``UnmatchedKeysError``, ``BadInputError``, ``AmbiguousError`` or ``RefusedError`` with all findings.
    """
    fits, why = candidates(opened.grouped, opened.metadata, opened.where, family)
    names = tuple(fit.family.name for fit in fits)
    made: list[tuple[Fit, Made]] = []
    errors: list[RegraftError] = []
    for fit in fits:
        adapter = read_adapter(fit, opened.grouped, opened.metadata, opened.where, why)
        try:
            made.append((fit, _converted(opened, fit, adapter, to, base, via, names)))
        except RegraftError as error:
            errors.append(error)
    if errors and (not made or len(errors) == len(fits)):
        raise errors[0]
    if len(made) > 1 and not all(_same(made[0][1], other) for _, other in made[1:]):
        if opened.form == to:
            staying = [
                result for _, result in made if result.tensors.keys() == opened.tensors.keys()
            ]
            if len(staying) == 1:
                return _unsettled(
                    staying[0], [fit.family for fit, _ in made], "its names stay what they are"
                )
        raise AmbiguousError(
            Finding(
                "which-model",
                f"its modules are those of {' or '.join(fit.family.title for fit, _ in made)}, whose files for "
                f"{to} differ",
                where=opened.where,
                fix=f"say which it is with --from {' or --from '.join(fit.family.name for fit, _ in made)}",
                choices=tuple(_choice(fit, result) for fit, result in made),
            )
        )
    if len(made) > 1:
        return _unsettled(made[0][1], [fit.family for fit, _ in made], "the result is the same")
    return made[0][1]


def _unsettled(made: Made, families: Sequence[Family], why: str) -> Made:
    """A file whose result is known, whichever of some families it is for."""
    titles = " or ".join(family.title for family in families)
    made.report.notes[:] = [n for n in made.report.notes if not n.startswith("base: ")]
    made.report.notes.append(f"base: {titles}; {why} for each of them")
    return made


def _choice(fit: Fit, made: Made) -> Choice:
    first = next(iter(made.tensors))
    return Choice(
        fit.family.name, f"its modules are those of {fit.family.title}", f"{first} and so on"
    )


def _same(one: Made, other: Made) -> bool:
    """Whether two results are the same; a 1x1 convolution and a linear have the same numbers."""
    return one.tensors.keys() == other.tensors.keys() and all(
        x.size == other.tensors[key].size
        and np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(other.tensors[key]).tobytes()
        for key, x in one.tensors.items()
    )


def _converted(
    opened: OpenedImage,
    fit: Fit,
    adapter: ImageAdapter,
    to: str,
    base: Path | None,
    via: str | None,
    names: tuple[str, ...],
) -> Made:
    family = adapter.family
    how = writing(to, family, alone=len(names) == 1)
    ways = Ways(opened.where, None if base is None else ImageBase(base, family), via)
    origin = read_origin(opened.metadata)
    back = origin if origin is not None and to in origin.names else None
    homes: Mapping[Home, Delta] = with_kernels(adapter.deltas, ways)
    if origin is not None:
        homes = _without_partner(homes, origin)
    if back is not None and any(layout in how.also for layout in back.layouts):
        how = replace(how, layout=next(x for x in back.layouts if x in how.also))
    stays = back is None and bool(how.also) and (opened.form == to or len(names) > 1)
    kept = {h: d for h, d in homes.items() if stays and h.layout in how.also}
    rest = {h: d for h, d in homes.items() if h not in kept}
    _check_apart(kept, rest, family, ways)
    moved = {**kept, **move_deltas(rest, family, how.layout, ways)}
    fitted = fit_to(_padded_shape(moved, how), how, ways)
    if back is not None:
        fitted = {
            home: unfolded(delta, back.alphas.get(how.stem(home))) for home, delta in fitted.items()
        }
    fitted = _with_image_partner(fitted, family, how)
    written = write_deltas(fitted, how, None if back is None else back.alpha_dtype)
    if back is not None:
        _leave_bare(fitted, how, back, written)
    tensors = {**written.tensors, **adapter.others}
    layouts = tuple(dict.fromkeys(h.layout for h in homes if h.component == DENOISER))
    alphas = _alphas(opened, fit, adapter) if _lost_alphas(fitted, written) else {}
    added = tuple(h.key for h in fitted if h.key.endswith("_proj.weight") and h not in moved)
    metadata = _metadata(opened, how, written, tensors, origin, alphas, layouts, names, added)
    report = _report(opened, adapter, fitted, how, ways, written, tensors)
    return Made(tensors, metadata, report, fitted, how, ways, written.config)


def _leave_bare(deltas: Mapping[Home, Delta], how: Writing, back: Origin, written: Written) -> None:
    """Leave out an alpha that the file did not have and that says nothing."""
    for home, delta in deltas.items():
        stem = how.stem(home)
        if delta.algebra == LORA and delta.scale.value == 1.0 and back.had_no_alpha(stem):
            written.tensors.pop(f"{stem}.alpha", None)


def _check_apart(
    kept: Mapping[Home, Delta], rest: Mapping[Home, Delta], family: Family, ways: Ways
) -> None:
    """Raise ``BadInputError`` where a weight is adapted under its names in two layouts."""
    if kept and rest:
        move_deltas({**rest, **kept}, family, next(iter(kept)).layout, ways)


def _with_image_partner(
    deltas: Mapping[Home, Delta], family: Family, how: Writing
) -> dict[Home, Delta]:
    """Wan's projections of an image come in pairs for diffusers.

    diffusers 0.42.1 (``_maybe_expand_t2v_lora_for_i2v``) overwrites what there is with zeros where a file has
    add_k_proj or add_v_proj alone; a partner of zeros adds nothing and prevents it.
    """
    made = dict(deltas)
    ends = {home.module.rpartition(".")[2] for home in deltas}
    both = {"add_k_proj", "add_v_proj"}
    if family.name != "wan" or how.name != "diffusers" or len(ends & both) != 1:
        return made
    (missing,) = both - ends
    home = next(h for h in deltas if h.module.rpartition(".")[2] in both)
    delta = deltas[home]
    zeros = {role: np.zeros_like(tensor) for role, tensor in delta.tensors.items()}
    partner = replace(home, key=home.key.replace((ends & both).pop(), missing))
    made[partner] = replace(delta, tensors=zeros, magnitude=None)
    return made


def _without_partner(deltas: Mapping[Home, Delta], origin: Origin) -> dict[Home, Delta]:
    """The same without a partner that we added."""
    return {
        home: delta
        for home, delta in deltas.items()
        if home.key not in origin.added or any(t.any() for t in delta.tensors.values())
    }


def _padded_shape(deltas: Mapping[Home, Delta], how: Writing) -> dict[Home, Delta]:
    """BFL's control adapters take twice the channels in; ComfyUI pads the base where the file says its new shape."""
    made = dict(deltas)
    control = any(home.key.endswith(".scale") for home in deltas)
    if control and how.name == "comfyui":
        for home, delta in deltas.items():
            if home.key == "img_in.weight" and delta.reshape is None:
                made[home] = replace(delta, reshape=(delta.out, delta.into))
    return made


# -- the header


def _metadata(
    opened: OpenedImage,
    how: Writing,
    written: Written,
    tensors: Mapping[str, Array],
    origin: Origin | None,
    alphas: Mapping[str, Number],
    layouts: tuple[str, ...],
    families: tuple[str, ...],
    added: tuple[str, ...],
) -> dict[str, str]:
    """The header: the old one without what is of the old bytes, what the dialect needs, and what the way back needs.

    A file that is back as it was has the header that it had.
    """
    old = {k: v for k, v in opened.metadata.items() if k != KEY}
    if origin is not None and how.name in origin.names and origin.digest == digest_all(tensors):
        return dict(origin.header)
    kept = {k: v for k, v in old.items() if not _STALE.fullmatch(k) and k != ADAPTER_METADATA}
    names = tuple(dict.fromkeys((opened.form, opened.dialect)))
    bare = [
        stem
        for stem, module in opened.grouped.modules.items()
        if "down" in module.tensors and "alpha" not in module.tensors
    ]
    entry = write_origin(names, layouts, families, added, old, opened.tensors, alphas, bare)
    return {"format": "pt", **kept, **written.header, KEY: entry}


def _lost_alphas(before: Mapping[Home, Delta], written: Written) -> bool:
    """Whether scales went into factors somewhere on the way."""
    return bool(written.folded) or any(not delta.exact for delta in before.values())


def _alphas(opened: OpenedImage, fit: Fit, adapter: ImageAdapter) -> dict[str, Number]:
    """The alpha of every LoRA by the name that the file has for its module."""
    return {
        stem: adapter.deltas[home].scale.alpha
        for stem, home in fit.homes.items()
        if adapter.deltas[home].algebra == LORA and not adapter.deltas[home].rslora
    }


# -- the report


def _report(
    opened: OpenedImage,
    adapter: ImageAdapter,
    fitted: Mapping[Home, Delta],
    how: Writing,
    ways: Ways,
    written: Written,
    tensors: Mapping[str, Array],
) -> AdapterReport:
    report = AdapterReport(
        "",
        "LORA",
        opened.dialect,
        how.name,
        [*adapter.evidence],
        tensors_in=len(opened.tensors),
        tensors_out=len(tensors),
        carried=len(adapter.others),
        notes=[*adapter.notes],
    )
    report.rules = dict(Counter(delta.name for delta in fitted.values()))
    report.targets = [
        Target(
            how.stem(home),
            delta.rank,
            delta.scale.alpha,
            delta.scale.value,
            delta.name,
            delta.exact and home not in written.rounded,
            rung=ways.rungs.get(home, "family"),
            error=ways.errors.get(home, 0.0),
        )
        for home, delta in fitted.items()
    ]
    report.notes += _notes(opened, adapter, fitted, how, ways, written)
    return report


def _notes(
    opened: OpenedImage,
    adapter: ImageAdapter,
    fitted: Mapping[Home, Delta],
    how: Writing,
    ways: Ways,
    written: Written,
) -> Iterable[str]:
    yield f"base: {adapter.family.title}"
    for rung, what in (
        ("lora", "became LoRA, exactly"),
        ("dense", "became deltas of full rank, as was asked for"),
        ("svd", "became LoRAs of a lower rank, as was asked for"),
    ):
        homes = [home for home in fitted if ways.rungs.get(home) == rung]
        if homes:
            yield f"{_count(homes, 'module')} {what}: {ways.reasons[homes[0]]}"
    if written.folded:
        exactly = "" if written.rounded else ", exactly (powers of two)"
        yield f"{how.title} has no alpha: alpha / rank was multiplied into {_count(written.folded, 'module')}{exactly}"
        if written.rounded:
            yield f"this rounds in {_count(written.rounded, 'module')}, whose factors are float32 now"
    if opened.dialect == "diffusers" and ADAPTER_METADATA in opened.metadata and how.alpha == KEYED:
        yield f"alpha was in the header only ({ADAPTER_METADATA}), and has a key for each module now"
    if written.config.get("lora_bias"):
        yield "the base's modules need biases, to which lora_bias adds"
    if adapter.others:
        first = next(iter(adapter.others))
        yield f"copied, although no weights of the model: {count_in_words(len(adapter.others), 'tensor')}: {first}"
    if any(home.component != DENOISER for home in fitted):
        names = ", ".join(dict.fromkeys(h.component for h in fitted if h.component != DENOISER))
        yield f"text encoders: {names}"


def _count(items: list[Home], noun: str) -> str:
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"
