"""Which files are adapters of image and video models: by their names, and what stands beside them.

Every adapter's folder is asked, and few are of these models, so what takes the names apart is imported for those alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import BadInputError
from regraft.storage.header import Header, first_names, read_header

if TYPE_CHECKING:
    from regraft.dialects.image.grouping import Grouped, ModuleTensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What PEFT writes."""

_MOST = 1 << 20
"""Headers with more tensors are of no adapter."""


def file_in(src: Path) -> Path | None:
    """The one weights file of a path, where it has no PEFT config; ``None`` where there is none, or several.

    A folder with weights in folders inside is a collection, of which no single file is the whole.
    """
    if src.is_file():
        alone = src.suffix == ".safetensors" and not (src.parent / CONFIG).is_file()
        return src if alone else None
    if not src.is_dir() or (src / CONFIG).is_file():
        return None
    found = [path for path in src.glob("*.safetensors") if path.is_file()]
    return found[0] if len(found) == 1 and next(src.glob("*/*.safetensors"), None) is None else None


def recognise(src: Path) -> str | None:
    """The dialect of a path, by the names in its header; ``None`` where it is no adapter of an image model."""
    path = file_in(src)
    if path is None:
        return None
    try:
        stat = path.stat()
        return _recognised(path, stat.st_mtime_ns, stat.st_size)
    except OSError:
        return None


@lru_cache(maxsize=64)
def _recognised(path: Path, changed: int, size: int) -> str | None:
    try:
        header = read_header(path)
    except BadInputError:
        return None
    return recognised_header(header)


def recognised_header(header: Header) -> str | None:
    """The dialect of a header; ``None`` where not most of its keys are an image adapter's."""
    from regraft.dialects.image.convert import dialect_of
    from regraft.dialects.image.grouping import Grouped, ModuleTensors
    from regraft.dialects.image.header import ADAPTER_METADATA
    from regraft.dialects.image.leaves import split_key

    if len(header.tensors) > _MOST:
        return None
    modules: dict[str, ModuleTensors] = {}
    unread = 0
    for key in header.tensors:
        leaf = split_key(key)
        if leaf is None or leaf.role == "ia3":
            unread += leaf is None
            if unread > len(header.tensors) // 2:
                return None
            continue
        module = modules.setdefault(leaf.stem, ModuleTensors(leaf.stem))
        module.spellings.add(leaf.spelling)
        if leaf.role.partition(".")[0] == "set":
            module.scale_key = True
    grouped = Grouped(modules, {})
    if all(module.spellings == {"bfl"} for module in modules.values()):
        return None  # norms of a base model are named like what takes the place of them
    if not modules or not (ADAPTER_METADATA in header.metadata or _is_image(grouped)):
        return None
    return dialect_of(grouped, header.metadata)


_ALWAYS = ("unet.", "lora_unet_", "diffusion_model.", "model.diffusion_model.")


def _is_image(grouped: Grouped) -> bool:
    """Whether names are an image model's: by what stands before them, or by a family that has most of them."""
    from regraft.dialects.image.prefixes import FLAT, place_of
    from regraft.dialects.image.read import fit_families, strange_prefix

    places = [place_of(stem) for stem in grouped.modules]
    if any(FLAT.match(stem) for stem in grouped.modules) or any(
        place.prefix in _ALWAYS
        or place.prefix.startswith("text_encoder")
        or (place.prefix == "transformer." and "transformer_blocks." in place.module)
        for place in places
    ):
        return True
    best = fit_families(grouped)[0]
    return 2 * len(best.missing) < len(grouped.modules) or (
        _is_flat(grouped) or strange_prefix(grouped.modules) is not None
    )


def _is_flat(grouped: Grouped) -> bool:
    """Whether names are as kohya's tools write them, without dots, whatever they begin with."""
    return all(
        "." not in stem and "_" in stem and not module.spellings & {"lora_A", "lora.down"}
        for stem, module in grouped.modules.items()
    )


NO_DENOISER = frozenset(
    {
        "model",
        "transformer",
        "encoder",
        "decoder",
        "language_model",
        "vision_tower",
        "vision_model",
        "visual",
        "vit",
        "bert",
    }
)
"""Where names of transformers' models begin, and those of no denoiser, as a test holds against the books."""


def weights_in(src: Path) -> Path | None:
    """The weights of a folder, or of a file in it; ``None`` where this is no adapter of a denoiser of diffusers."""
    path = src if src.is_file() else src / WEIGHTS
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        config = config_beside(path)
        if config is None or config.get("task_type") is not None:
            return None
        mapping = config.get("auto_mapping")
        library = mapping.get("parent_library") if isinstance(mapping, dict) else None
        if library is not None and not str(library).startswith("diffusers"):
            return None
        # Most folders are no such adapter, and their first names tell; a header may be long.
        first = first_names(path) if library is None else []
        if first and (_is_elsewhere(first[0]) or not _is_of_a_denoiser(first, said=False)):
            return None
        header = read_header(path)
    except (BadInputError, OSError):
        return None
    return path if _is_of_a_denoiser(header.tensors, said=library is not None) else None


def config_beside(path: Path) -> Mapping[str, Any] | None:
    """PEFT's config in the folder of a weights file; ``None`` where there is none."""
    from regraft.dialects.tool_files import look_at

    look = look_at(path)
    config = look.config if look is not None else None
    return config if config is not None and isinstance(config.get("peft_type"), str) else None


def _is_elsewhere(name: str) -> bool:
    """Whether a name begins as no denoiser's does, which spares reading the books of all families.

    >>> _is_elsewhere("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    True
    """
    return name.removeprefix("base_model.model.").partition(".")[0] in NO_DENOISER


def _is_of_a_denoiser(names: Iterable[str], *, said: bool) -> bool:
    """Whether a family has all modules that names are about; one is enough where the config names diffusers."""
    from regraft.dialects.image.grouping import Grouped, ModuleTensors
    from regraft.dialects.image.leaves import split_key
    from regraft.dialects.image.read import families_with

    modules: dict[str, ModuleTensors] = {}
    for name in names:
        leaf = split_key(name)
        if leaf is None:
            continue
        modules.setdefault(leaf.stem, ModuleTensors(leaf.stem))
        if said or (len(modules) == 1 and not families_with(Grouped(modules, {}))):
            break
    return bool(modules) and bool(families_with(Grouped(modules, {})))
