"""A family of image or video models that no rule book is for, made of the modules of diffusers' own class.

diffusers is asked in a process of its own, which builds the class of the base's ``config.json`` on the meta device:
no weights are read, and there is no code of the base's. Only what is named the same in a file and in the model can be
told so: diffusers' names, dotted or flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from msgspec import Struct

from regraft.bridges.helper import Helper, HelperEndedError
from regraft.checkpoints.pipelines import PIPELINES
from regraft.dialects.image.families import Family, TextEncoder
from regraft.errors import BadInputError, Finding, RegraftError
from regraft.errors.extras import install_line
from regraft.storage.json_files import load_json

_THERE = Helper(__name__, "list_modules")
_DENOISERS = ("transformer", "unet")
_BODIES = {
    "CLIPTextModel": "clip",
    "CLIPTextModelWithProjection": "clip",
    "T5EncoderModel": "t5",
    "UMT5EncoderModel": "t5",
}
"""Kinds of text encoders by their class; every other one is a language model."""


class Modules(Struct, frozen=True):
    """The modules with a weight of one model."""

    linears: tuple[str, ...]
    convolutions: tuple[tuple[str, tuple[int, ...]], ...]
    """Each with its kernel."""


def family_of_base(base: Path | None) -> Family | None:
    """The family of a base in diffusers' form that no rule book is for; ``None`` for every other base.

    ``base`` is a pipeline's folder, or that of its denoiser.

    Raises ``BadInputError`` where diffusers is not installed, or does not have the base's class.
    """
    folder = _denoiser_of(base)
    if folder is None:
        return None
    where = folder / "config.json"
    config = load_json(where)
    name = config.get("_class_name")
    if not isinstance(name, str) or "_diffusers_version" not in config or name in _KNOWN:
        return None
    if find_spec("diffusers") is None or find_spec("torch") is None:
        raise BadInputError(
            Finding(
                "package-missing",
                f"there is no rule book for {name}, and diffusers, which has it, is not installed",
                where=str(where),
                fix=install_line("diffusers"),
            )
        )
    try:
        found: Modules = _THERE.ask(config)
    except HelperEndedError as error:
        message = f"diffusers could not make a {name} of this: {error}"
        raise BadInputError(Finding("config", message, where=str(where))) from None
    except RegraftError as error:
        raise type(error)([_at(finding, where) for finding in error.findings]) from None
    return Family(
        name.lower(),
        name,
        "",
        folder.name if folder.name in _DENOISERS else "transformer",
        "",
        "diffusers",
        _encoders(folder.parent),
        modules=found.linears,
        convolutions=tuple(module for module, _ in found.convolutions),
        kernels=tuple((_pattern(module), kernel) for module, kernel in found.convolutions),
    )


_KNOWN = frozenset(part.cls for pipeline in PIPELINES for part in pipeline.parts)


def _at(finding: Finding, where: Path) -> Finding:
    return Finding(finding.code, finding.message, where=str(where), fix=finding.fix)


def _pattern(module: str) -> str:
    return module.replace(".", r"\.")


def _denoiser_of(base: Path | None) -> Path | None:
    """The folder with the denoiser's config."""
    if base is None or not base.is_dir():
        return None
    for folder in (base, *(base / name for name in _DENOISERS)):
        if (folder / "config.json").is_file():
            return folder
    return None


def _encoders(pipeline: Path) -> tuple[TextEncoder, ...]:
    """The text encoders that a pipeline's ``model_index.json`` names."""
    path = pipeline / "model_index.json"
    index = load_json(path) if path.is_file() else {}
    names = sorted(name for name in index if name.startswith("text_encoder"))
    found = []
    for number, name in enumerate(names, 1):
        said = index[name]
        cls = said[1] if isinstance(said, list) and len(said) == 2 else None
        if isinstance(cls, str):
            one = ("lora_te_", "lora_te1_") if len(names) == 1 else (f"lora_te{number}_",)
            found.append(TextEncoder(name, _BODIES.get(cls, "decoder"), one, ""))
    return tuple(found)


def _make(cls: Any, config: dict[str, Any]) -> Any:
    return cls.from_config(config)


def list_modules(config: Mapping[str, Any]) -> Modules:
    """The modules of the class that a config names; what the process answers with.

    Raises ``BadInputError`` where diffusers does not have it, or it does not take the config.
    """
    import diffusers
    import torch

    name = str(config["_class_name"])
    version = diffusers.__version__
    cls = getattr(diffusers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, diffusers.ModelMixin):
        message = f"diffusers {version} has no model {name}"
        raise BadInputError(Finding("config", message, fix="install a release that has it"))
    try:
        with torch.device("meta"):
            model = _make(cls, dict(config))
    except Exception as error:  # whatever a class makes of a config that is not its own
        message = (
            f"diffusers {version} cannot make a {name} of this: {type(error).__name__}: {error}"
        )
        raise BadInputError(Finding("config", message, fix="check the config")) from None
    linears, convolutions = [], []
    for module, part in model.named_modules():
        weight = getattr(part, "weight", None)
        if not isinstance(weight, torch.Tensor) or not module:
            continue
        if weight.ndim > 2:
            convolutions.append((module, tuple(weight.shape[2:])))
        else:
            linears.append(module)
    return Modules(tuple(linears), tuple(convolutions))
