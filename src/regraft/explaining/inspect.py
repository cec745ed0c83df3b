"""Telling what a path is: an adapter, a checkpoint, a LoRA of an image model, or a folder of such files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from regraft.bridges.transformers.files import InstalledTransformers
from regraft.checkpoints.inspect import CheckpointInspection, inspect_checkpoint
from regraft.dialects.image.inspect import ImageFolder, ImageSummary, summaries, summarize
from regraft.dialects.image.recognise import recognise, weights_in
from regraft.dialects.peft.inspect import Inspection
from regraft.dialects.peft.inspect import inspect as inspect_adapters
from regraft.dialects.peft.scan import PREFIX
from regraft.dialects.peft.source import CONFIG, NO_CONFIG
from regraft.errors import RegraftError
from regraft.layouts.spelled import LayoutName
from regraft.options import InspectOptions
from regraft.planning.model import Foreign, load_model
from regraft.report import logged
from regraft.rules.book import Rules
from regraft.sources.resolve import Resolved, resolved
from regraft.storage.safetensors import read_header

_SOME = 20
"""Files of a folder, of which one of an image model makes it a folder of such files."""

Found = Inspection | CheckpointInspection | ImageSummary | ImageFolder
"""What there is to tell, by what a path is."""


def inspect(
    src: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    source: LayoutName | str | None = None,
    architecture: str | None = None,
    rules: Rules = (),
) -> Inspection | CheckpointInspection | ImageSummary | ImageFolder:
    """Tell what an adapter is, a checkpoint, a LoRA of an image model, or each of a folder.

    The type of the result says which. What is wrong with an adapter that can be opened stands in its ``problems``; a
    base model that is not known is no problem, only less is told.

    >>> regraft.inspect("my-lora").adapters[0].layout  # doctest: +SKIP
    'transformers-v4'
    >>> regraft.inspect("kohya.safetensors").family  # doctest: +SKIP
    'flux'

    Args:
        src: what `regraft.convert` takes.
        model: the base model's folder or its ``config.json``.
        source: the dialect of ``src``, or the family of its model; found out where it is not given.
        architecture: the class of the model, where its ``config.json`` names none that transformers has.
        rules: rule books to use in place of regraft's, as `regraft.convert` takes them.

    Returns:
        An ``Inspection`` of adapters, a ``CheckpointInspection``, an ``ImageSummary`` of one file, or an
        ``ImageFolder`` of many.

    Raises:
        BadInputError: there is nothing of all this, or it cannot be opened, or ``model`` is no config.
    """
    asked = InspectOptions(model=model, source=source, architecture=architecture, rules=rules)
    return inspected(src, asked)


@logged
def inspected(
    src: str | os.PathLike[str],
    asked: InspectOptions,
    each: Callable[[ImageSummary], None] | None = None,
) -> Inspection | CheckpointInspection | ImageSummary | ImageFolder:
    """What `inspect` does, its options in one value; ``each`` is told every file of many as soon as it is read."""
    with resolved(src, **asked.values()) as found:
        return inspect_source(found, InstalledTransformers(), each)


def inspect_source(
    source: Resolved, foreign: Foreign | None, each: Callable[[ImageSummary], None] | None = None
) -> Found:
    """What a source is; the type of the result says which.

    ``each`` is told every file of a folder of LoRAs of image models as soon as it is read.

    Raises ``BadInputError`` where it cannot be opened.
    """
    path = source.path
    image = _image_in(path)
    if image is not None:
        return summarize(image)
    if _is_folder_of_images(path):
        files = []
        for found in summaries(path):
            summary = found
            folder = (path / found.file).parent
            if (folder / CONFIG).is_file() and weights_in(folder) is None:
                summary = _summary_of_peft(folder, found, source.model, foreign)
            elif found.problem and found.tensors:
                summary = _summary_of_others(path / found.file, found)
            files.append(summary)
            if each is not None:
                each(summary)
        return ImageFolder(str(path), files)
    if source.is_adapter:
        return inspect_adapters(path, model=source.model, foreign=foreign, said=source.given)
    return inspect_checkpoint(path, source.model, foreign)


def _summary_of_peft(
    folder: Path, found: ImageSummary, model: Path | None, foreign: Foreign | None
) -> ImageSummary:
    """An adapter of another kind of model that lies beside LoRAs of image models, in the same columns."""
    plain = ImageSummary(found.file, tensors=found.tensors, size=found.size, trainer="PEFT")
    try:
        (adapter,) = inspect_adapters(folder, model=model, foreign=foreign).adapters
    except RegraftError as error:
        return replace(plain, problem=error.findings[0].message)
    ranks: Counter[str] = Counter()
    alphas: Counter[str] = Counter()
    for target in adapter.targets:
        ranks[str(target.rank)] += target.count
        alphas[f"{target.alpha:g}"] += target.count
    modules = sum(target.count for target in adapter.targets)
    kind = ", ".join(adapter.variants) or ("LoRA" if adapter.peft_type == "LORA" else "")
    return replace(
        plain,
        family=adapter.model_type or "",
        dialect=" or ".join(adapter.layouts) or adapter.dialect,
        algorithms={kind or adapter.peft_type: modules},
        modules=modules,
        ranks=dict(ranks.most_common()),
        alphas=dict(alphas.most_common()),
        base=adapter.base_model or "",
        problem=next((finding.message for finding in adapter.problems), ""),
    )


def _summary_of_others(file: Path, found: ImageSummary) -> ImageSummary:
    """What no LoRA of an image model is, in the same columns: a model's own weights, or PEFT's without their config."""
    plain = ImageSummary(found.file, tensors=found.tensors, size=found.size)
    if (file.parent / "config.json").is_file():
        with suppress(RegraftError):
            family = load_model(file.parent).model_type or ""
            return replace(plain, family=family, algorithms={"whole weights": found.tensors})
    names = read_header(file).tensors
    if names and all(name.startswith(PREFIX) for name in names):
        return replace(plain, trainer="PEFT", problem=NO_CONFIG)
    return found


def _image_in(path: Path) -> Path | None:
    """The one file of an image model that a path is, or that is in it beside its config."""
    if _is_folder(path):
        return None
    weights = weights_in(path)
    if weights is None and recognise(path) is not None:
        weights = path
    return weights


def _is_folder_of_images(path: Path) -> bool:
    if not _is_folder(path) or (path / "config.json").exists() or any(path.glob("*.index.json")):
        return False
    found = sorted(path.rglob("*.safetensors"))[:_SOME]
    return any(recognise(each) is not None for each in found)


def _is_folder(path: Path) -> bool:
    """Whether a path is more than one file, or one adapter with its config."""
    return path.is_dir() and not (path / "adapter_config.json").exists()
