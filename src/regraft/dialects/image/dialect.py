"""The dialects of image and video LoRAs, as the registry has them.

One reader serves all of them, because files mix their spellings; a dialect here is who wrote a file, and what is
written. Four can be written: kohya's, diffusers', ComfyUI's and ai-toolkit's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from msgspec import Struct, field

from regraft.adapters.convert import Converted
from regraft.adapters.protocol import Names, Opened, Writer
from regraft.dialects.base import Capabilities, Evidence, Found, PlainFile
from regraft.dialects.image import DIALECTS, PEFT
from regraft.dialects.image.recognise import CONFIG, file_in, recognise, weights_in
from regraft.dialects.peft.saving import save_adapter
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.layouts.names import Layout
from regraft.storage.safetensors import write_tensors

if TYPE_CHECKING:
    from regraft.adapters.detect import Known
    from regraft.adapters.ranks import Options
    from regraft.dialects.image.convert import OpenedImage
    from regraft.dialects.judging import ToolReader

WEIGHTS = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file in a folder."""


def written_as(to: Layout) -> str | None:
    """The dialect of image models that is meant; ``None`` where it is none. PEFT's folder has the name of PEFT."""
    if to.dialect == "peft":
        return PEFT
    return to.dialect if to.dialect in DIALECTS else None


def refused_layout(to: Layout, where: str) -> RefusedError:
    """That a layout is none of image models."""
    return RefusedError(
        Finding(
            "dialect",
            f"this is a LoRA of an image or video model, and {to} does not have these",
            where=where,
            fix=f"convert it to one of {', '.join(('peft', *DIALECTS[:-1]))}",
        )
    )


class ImageFile(PlainFile):
    """An opened file, for `regraft.converting.convert`: it converts itself, because its parts are of several models."""

    image: OpenedImage | None = field(default=None)

    def convert(
        self, to: Layout, family: str | None, base: Path | None, asked: Options
    ) -> Converted:
        """The file in another dialect of image models.

        Raises what `regraft.dialects.image.convert.convert_image` raises.
        """
        from regraft.dialects.image.convert import convert_image

        assert self.image is not None
        name = written_as(to)
        if name is None:
            raise refused_layout(to, self.where)
        if asked.compact or asked.uniform:
            raise BadInputError(
                Finding(
                    "option", "ranks of image LoRAs are not changed by --compact or --uniform-rank"
                )
            )
        made = convert_image(self.image, name, family=family, base=base, via=asked.via)
        config = made.config or {"dialect": name}
        return Converted(config, made.tensors, made.metadata, made.report)

    def names(self) -> Names:
        """Not for the commands that see one model only."""
        self._only_converts()

    def _only_converts(self) -> NoReturn:
        raise RefusedError(
            Finding(
                "dialect",
                "this command does not support LoRAs of image and video models",
                where=self.where,
                fix="use convert, verify, explain, inspect, or check --for",
            )
        )


_FILES = Capabilities(experts=False, embeddings=False, suffixes=(".safetensors",))


class ImageDialect(Struct, frozen=True):
    """One tool's files."""

    name: str
    title: str
    layout: str = "diffusers"
    capabilities: Capabilities = _FILES
    image_only: bool = True
    """Its `writer` refuses adapters of other models."""
    usage: str = ""
    """How its tool is given a file, with places for its path and its name."""

    @property
    def readers(self) -> tuple[ToolReader, ...]:
        """What its tool does with files as they are; imported when it is asked."""
        from regraft.dialects.image.judges import READERS

        return READERS.get(self.name, ())

    def sniff(self, src: Path) -> Evidence | None:
        """A file, or a folder with one, whose names are those of this tool."""
        if recognise(src) != self.name:
            return None
        return Evidence(certain=True, why=f"its tensors are named as by {self.title}")

    def find(self, src: Path) -> Found:
        """The file."""
        path = file_in(src)
        if path is None:
            raise BadInputError(
                Finding(
                    "not-found" if not src.exists() else "not-an-adapter",
                    "there is no such file or folder"
                    if not src.exists()
                    else "there is not one .safetensors file here that is an adapter by itself",
                    where=str(src),
                    fix="give the file",
                )
            )
        others: tuple[Path, ...] = ()
        if src.is_dir():
            others = tuple(
                p.relative_to(src) for p in sorted(src.rglob("*")) if p.is_file() and p != path
            )
        return Found(path.parent, (path.parent,), path, others)

    def open(self, folder: Path, root: Path, weights: Path | None) -> ImageFile:
        """All of its tensors, by module."""
        from regraft.dialects.image.convert import open_image

        assert weights is not None
        return self._file(open_image(weights))

    def in_memory(self, result: Converted) -> ImageFile:
        """A result, as it would be opened."""
        from regraft.dialects.image.convert import opened_image

        return self._file(opened_image("the result", result.tensors, result.metadata))

    def _file(self, image: OpenedImage) -> ImageFile:
        return ImageFile(
            "",
            image.where,
            {"dialect": self.name},
            image.tensors,
            {},
            metadata=image.metadata,
            image=image,
        )

    def writer(self, opened: Opened, known: Known, to: Layout) -> Writer:
        """Nothing: these files are made by `ImageFile.convert`. Raises ``RefusedError``."""
        raise RefusedError(
            Finding(
                "dialect",
                f"{self.name} is for LoRAs of image and video models, and this is one of "
                f"{known.model_type or 'another kind of model'}",
                where=opened.where,
                fix="convert it to transformers-v5, vllm, mlx or gguf, say (`regraft layouts` lists all)",
            )
        )

    def save(self, folder: Path, opened: Opened, result: Converted) -> None:
        """One file."""
        write_tensors(folder / WEIGHTS, result.tensors, result.metadata)


class PeftImageDialect(ImageDialect, frozen=True):
    """PEFT's folder, for the denoiser of an image model."""

    @property
    def readers(self) -> tuple[ToolReader, ...]:
        """None of its own."""
        return ()

    def sniff(self, src: Path) -> Evidence | None:
        """A folder with a config of PEFT, and names of an image model."""
        if weights_in(src) is None:
            return None
        return Evidence(certain=True, why="PEFT saved it of a denoiser of diffusers")

    def find(self, src: Path) -> Found:
        """The weights; the config is read with them."""
        path = weights_in(src)
        if path is None:
            raise BadInputError(
                Finding(
                    "not-an-adapter",
                    "there is no adapter here that PEFT saved of an image model",
                    where=str(src),
                    fix="give its folder, or its weights file with adapter_config.json beside it",
                )
            )
        own = {path, path.parent / CONFIG}
        others: tuple[Path, ...] = ()
        if src.is_dir():
            others = tuple(
                p.relative_to(src) for p in sorted(src.rglob("*")) if p.is_file() and p not in own
            )
        return Found(path.parent, (path.parent,), path, others, (path.parent / CONFIG,))

    def open(self, folder: Path, root: Path, weights: Path | None) -> ImageFile:
        """All of its tensors, by module, with what the config says."""
        from regraft.dialects.image.peft import open_folder

        assert weights is not None
        return self._file(open_folder(weights))

    def in_memory(self, result: Converted) -> ImageFile:
        """A result, as it would be opened."""
        from regraft.dialects.image.peft import opened_folder

        config = result.config
        return self._file(opened_folder("the result", result.tensors, result.metadata, config))

    def save(self, folder: Path, opened: Opened, result: Converted) -> None:
        """Weights and config."""
        save_adapter(folder, None, result)


KOHYA = ImageDialect(
    "kohya",
    "sd-scripts, LyCORIS and musubi-tuner: flat names and .alpha",
    usage="Use it with: cp {path} WEBUI/models/Lora/ for Automatic1111 or Forge, --network_weights {path} for "
    "sd-scripts and musubi-tuner",
)
DIFFUSERS = ImageDialect("diffusers", "diffusers: save_lora_weights, with alpha in the header")
COMFYUI = ImageDialect(
    "comfyui",
    "ComfyUI: diffusion_model. and the model's own names",
    usage="Use it with: cp {path} ComfyUI/models/loras/, then choose {file} in the node Load LoRA",
)
AI_TOOLKIT = ImageDialect(
    "ai-toolkit",
    "ai-toolkit: lora_A and lora_B, no alpha",
    usage="Use it with: pretrained_lora_path: {path} under network: in the job's config of ai-toolkit",
)
ONETRAINER = ImageDialect("onetrainer", "OneTrainer, in its five forms (read only)")
XLABS = ImageDialect("xlabs", "x-flux: LoRAs of FLUX's attention processors (read only)")
BFL = ImageDialect("bfl", "FLUX's own names, as in BFL's control adapters (read only)")
PEFT_IMAGE = PeftImageDialect(
    PEFT,
    "PEFT on a denoiser of diffusers: adapter_config.json and adapter_model.safetensors",
    capabilities=Capabilities(experts=False, embeddings=False),
)
