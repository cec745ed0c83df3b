"""What stands beside the weights in a folder of diffusers: configs, ``model_index.json``, scheduler and tokenizers.

They come from a folder of the same family, where one is given. Otherwise configs are made from shapes, where these are
those of a published model, so that what shapes do not tell is known; what is not known is said, and not guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from regraft.checkpoints.part_configs import Shapes, known_config, seen_config
from regraft.checkpoints.parts import MovedPiece
from regraft.checkpoints.pipelines import Part, Pipeline
from regraft.checkpoints.source import CONFIG, PIPELINE
from regraft.errors import BadInputError, Finding
from regraft.storage.json_files import load_json

_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".msgpack", ".onnx", ".index.json")


class PartFiles(Struct):
    """Files to make and to copy, by where they go, and what is to be said of them."""

    written: dict[str, bytes] = field(default_factory=dict)
    copied: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def files_beside(pipeline: Pipeline, moved: Sequence[MovedPiece], model: Path | None) -> PartFiles:
    """The files beside the weights of some parts; ``model`` is a folder of diffusers that has them.

    Raises ``BadInputError`` where the folder is none, or is that of a model of other sizes.
    """
    shapes: dict[str, tuple[Part, Shapes]] = {
        m.piece.part.name: (m.piece.part, dict(zip(m.moves.names, m.moves.shapes, strict=True)))
        for m in moved
    }
    return _made(pipeline, shapes) if model is None else _taken(shapes, model)


def files_of_part(family: str, part: Part, shapes: Shapes, model: Path | None) -> PartFiles:
    """The config of one part by itself; ``model`` is diffusers' folder of that part, or its ``config.json``.

    Raises ``BadInputError`` where that is the config of a model of other sizes.
    """
    files = PartFiles()
    if model is not None:
        file = model / CONFIG if model.is_dir() else model
        findings = _compare(file, load_json(file), seen_config(part.cls, shapes))
        if findings:
            raise BadInputError(findings)
        files.copied[CONFIG] = file
        return files
    config = known_config(family, part, shapes)
    if config is None:
        files.notes.append(
            f"no {CONFIG}: shapes do not tell all of it. Fix: give diffusers' one with --model"
        )
    else:
        files.written[CONFIG] = _json(config)
        files.notes.append(f"made from shapes that are those of a published model: {CONFIG}")
    return files


def is_of_diffusers(path: Path) -> bool:
    """Whether a config, or that of a folder, is one of diffusers."""
    file = path / CONFIG if path.is_dir() else path
    if (path / PIPELINE).is_file():
        return True
    return file.name == CONFIG and file.is_file() and says_diffusers(load_json(file))


def says_diffusers(config: Mapping[str, Any]) -> bool:
    """Whether a config is one of diffusers."""
    return "_class_name" in config and "model_type" not in config


def _taken(parts: dict[str, tuple[Part, Shapes]], model: Path) -> PartFiles:
    """The files of another folder, checked against the shapes that are there."""
    if not (model / PIPELINE).is_file():
        message = f"it has no {PIPELINE}, so it is not a folder of diffusers"
        fix = "give the folder of a pipeline of the same family, with or without its weights"
        raise BadInputError(Finding("no-config", message, where=str(model), fix=fix))
    files = PartFiles()
    findings: list[Finding] = []
    files.copied[PIPELINE] = model / PIPELINE
    lacking = []
    for name, (part, shapes) in parts.items():
        file = model / name / CONFIG
        if not file.is_file():
            lacking.append(name)
            continue
        files.copied[f"{name}/{CONFIG}"] = file
        findings += _compare(file, load_json(file), seen_config(part.cls, shapes))
    if findings:
        raise BadInputError(findings)
    if lacking:
        files.notes.append(f"{model} has no {CONFIG} for {', '.join(lacking)}: there is none")
    listed = load_json(model / PIPELINE)
    for name in listed:
        folder = model / name
        if name not in parts and folder.is_dir() and not folder.is_symlink():
            for file in sorted(folder.rglob("*")):
                if file.is_file() and not file.name.endswith(_WEIGHTS):
                    files.copied[str(file.relative_to(model))] = file
    absent = [
        name
        for name, entry in listed.items()
        if isinstance(entry, list) and entry[:1] != [None] and name not in parts
        if not any(path.startswith(f"{name}/") for path in files.copied)
    ]
    if absent:
        files.notes.append(
            f"{PIPELINE} names these, too, and they are not there: {', '.join(absent)}"
        )
    return files


def _compare(file: Path, config: dict[str, Any], seen: dict[str, Any]) -> list[Finding]:
    """The fields of a config that the shapes contradict."""
    return [
        Finding(
            "wrong-base",
            f"it is {config[name]!r}, and the tensors say {value!r}",
            where=str(file),
            key=name,
            fix="give with --model a folder of the same model",
        )
        for name, value in seen.items()
        if name in config and config[name] is not None and _plain(config[name]) != _plain(value)
    ]


def _plain(value: Any) -> Any:
    """A value as JSON has it; a list of one number repeated as the number."""
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, list) and value and all(each == value[0] for each in value):
        return value[0]
    return value


def _made(pipeline: Pipeline, parts: dict[str, tuple[Part, Shapes]]) -> PartFiles:
    """What shapes tell, and what is known of the published models that have them."""
    files = PartFiles()
    index: dict[str, Any] = {"_class_name": pipeline.cls}
    for part in pipeline.parts:
        index[part.name] = [part.library, part.cls] if part.name in parts else [None, None]
    for name, library, cls in pipeline.helpers:
        index[name] = [library, cls]
    unknown = []
    for name, (part, shapes) in parts.items():
        config = known_config(pipeline.name, part, shapes)
        if config is None:
            unknown.append(name)
        else:
            files.written[f"{name}/{CONFIG}"] = _json(config)
    files.written[PIPELINE] = _json(index)
    if files.written.keys() - {PIPELINE}:
        made = ", ".join(path for path in files.written if path != PIPELINE)
        files.notes.append(f"made from shapes that are those of a published model: {made}")
    if unknown:
        files.notes.append(
            f"no {CONFIG} for {', '.join(unknown)}: shapes do not tell all of it. Fix: give with --model a folder of "
            "diffusers that has them"
        )
    helpers = ", ".join(name for name, _, _ in pipeline.helpers)
    if helpers:
        files.notes.append(
            f"not in a single file, and not made: {helpers}. Fix: give with --model a folder of diffusers that has them"
        )
    return files


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
