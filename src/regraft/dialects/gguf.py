"""GGUF: one file with a LoRA for llama.cpp.

Each factor is a tensor, named after the base's: ``blk.0.attn_q.weight.lora_a`` (rank, in) and ``.lora_b`` (out, rank),
with experts first where the base stacks them; ``token_embd``'s A is stored (vocabulary, rank). One number for the
file, ``adapter.lora.alpha``, is divided by the rank of each tensor; 0, or none, stands for a scale of 1.

Source: llama.cpp as in llama-cpp-python 0.3.36 (``convert_lora_to_gguf.py``, ``src/llama-adapter.{h,cpp}``). Files are
written by the package gguf, which also dequantises.
"""

from __future__ import annotations

import os
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from importlib import resources
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from msgspec import field

from regraft.adapters.form import Array, Blob, Images, Lora, Saved, rescale
from regraft.adapters.protocol import Hints, Opened, Reading
from regraft.adapters.scale import Scale
from regraft.dialects.base import (
    Capabilities,
    Delta,
    Evidence,
    Found,
    PlainFile,
    PlainNames,
    PlainWriter,
)
from regraft.dialects.halves import (
    one_file,
    pairs,
    refuse_tied_head,
    same_dtype,
    shape_finding,
    whole,
)
from regraft.errors import BadInputError, Finding, RefusedError
from regraft.errors.extras import install_line
from regraft.planning.side import Side
from regraft.storage.folder import copy_file
from regraft.storage.formats import GGUF as FORM
from regraft.storage.gguf_file import GgufHead, read_gguf_head, read_gguf_tensor
from regraft.values import replace

if TYPE_CHECKING:
    from regraft.adapters.base_weights import BaseWeights
    from regraft.adapters.convert import Converted
    from regraft.adapters.detect import Known
    from regraft.dialects.judging import ToolReader
    from regraft.layouts.names import Layout

FILE = "adapter.gguf"
ARCHITECTURE, _ALPHA = "general.architecture", "adapter.lora.alpha"
_TOKENS = "adapter.alora.invocation_tokens"
_NORM = "_norm.weight"
_PROVENANCE = "regraft."
_EMBEDDING = "token_embd.weight"
_PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": ml_dtypes.bfloat16}


def _package() -> Any:
    """The package gguf. Raises ``BadInputError`` where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise BadInputError(
            Finding(
                "package-missing",
                "LoRAs in GGUF files are read and written by the package gguf, which is not installed",
                fix=install_line("gguf"),
            )
        ) from error
    return gguf


@lru_cache(maxsize=1)
def architectures() -> Mapping[str, str]:
    """llama.cpp's name of an architecture by transformers' model type."""
    text = (resources.files("regraft.dialects") / "tables" / "gguf.toml").read_text("utf-8")
    return dict(tomllib.loads(text)["architectures"])


def _read(path: Path, head: GgufHead) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors, and the type of those that were quantised."""
    gguf = _package()
    tensors, quantised, findings = {}, {}, []
    with path.open("rb") as file:
        free = file.seek(0, os.SEEK_END)  # no two tensors have the same bytes
        for name, each in head.tensors.items():
            try:
                kind = gguf.GGMLQuantizationType(each.kind)
                block, size = gguf.GGML_QUANT_SIZES[kind]
                data = read_gguf_tensor(file, each, block, size)
                free -= len(data)
                if free < 0:
                    raise ValueError("it shares its bytes with another tensor")
                if kind.name in _PLAIN:
                    plain = np.dtype(_PLAIN[kind.name]).newbyteorder(head.order)
                    made = np.frombuffer(data, plain).astype(plain.newbyteorder("="))
                else:
                    made = _dequantised(gguf.quants.dequantize, data, kind, block, size)
                    quantised[name] = kind.name
                tensors[name] = made.reshape(each.shape)
            except (ValueError, KeyError, NotImplementedError) as error:
                findings.append(_bad(path, str(error), name))
    if findings:
        raise BadInputError(findings)
    return tensors, quantised


_BLOCKS = 1 << 12
"""How many blocks are dequantised at a time: what is made on the way is several times as large as the result."""


def _dequantised(dequantize: Any, data: bytes, kind: Any, block: int, size: int) -> Array:
    """The numbers of a quantised tensor, of which ``size`` bytes stand for ``block`` numbers."""
    made = np.empty(len(data) // size * block, np.float32)
    raw = np.frombuffer(data, np.uint8)
    for first in range(0, len(data) // size, _BLOCKS):
        part = dequantize(raw[first * size : (first + _BLOCKS) * size], kind).reshape(-1)
        made[first * block : first * block + part.size] = part
    return made


def _bad(path: Path, why: str, key: str | None = None) -> Finding:
    message = f"the GGUF file is not sound: {why}"
    fix = "check that the file is complete, or convert it again"
    return Finding("bad-gguf", message, where=str(path), key=key, fix=fix)


class GgufFile(PlainFile):
    """A LoRA from a GGUF file."""

    quantised: dict[str, str] = field(default_factory=dict)
    """The type of tensors that were quantised."""
    invoked: bool = False
    """Whether it works only after certain tokens."""
    norms: int = 0
    """How many weights of norms are in the file, which llama.cpp ignores."""

    def check_convertible(self) -> None:
        """An activated LoRA is none for every token."""
        if self.invoked:
            raise RefusedError(
                Finding(
                    "no-image",
                    "it is an activated LoRA, which works only after the tokens that it names, and no plain LoRA "
                    "does that",
                    where=self.where,
                    key=_TOKENS,
                    fix="use it with llama.cpp",
                )
            )

    def read(
        self,
        side: Side,
        packing: str | None = None,
        base: BaseWeights | None = None,
    ) -> Reading:
        """The factors; that they were quantised is told, and what llama.cpp ignores."""
        reading = super().read(side, packing, base)
        told = list(reading.evidence)
        if self.quantised:
            kinds = ", ".join(sorted(set(self.quantised.values())))
            told.append(
                f"{len(self.quantised)} factors were quantised ({kinds}) and are dequantised"
            )
        if self.norms:
            told.append(f"{self.norms} weights of norms are left out: llama.cpp ignores them, too")
        return replace(reading, evidence=tuple(told))


class GgufWriter(PlainWriter):
    """Writes factors under the names of llama.cpp's tensors."""

    title = "GGUF"
    capabilities = Capabilities(scales=False, saved=False, suffixes=(".gguf",), doubles=False)

    def arrange(self, made: Sequence[Images]) -> Sequence[Images]:
        """One alpha for all; the rank of each tensor divides it.

        What a scale differs by goes into B, which is exact where it is a power of two.
        """
        loras = [lora for image in made for lora in image.loras if lora is not None]
        sizes: Counter[Fraction] = Counter()
        for lora in loras:
            alpha = Fraction(lora.scale.value) * lora.a.shape[-2]
            if alpha:
                sizes[alpha] += lora.a.size
        common = whole(self._in_float32(sizes.most_common(1)[0][0]) if sizes else 1.0)
        for lora in loras:
            target = Scale(lora.a.shape[-2], common)
            near = lora.scale.value and abs(target.value / lora.scale.value - 1) < 2.0**-23
            if not near:
                lora.b, exact = rescale(lora.b, lora.scale.ratio_to(target))
                lora.exact = lora.exact and exact
            lora.scale = target
        return made

    def _in_float32(self, alpha: Fraction) -> float:
        """An alpha as the file has it; 0 would stand for a scale of 1.

        Raises ``RefusedError`` where it is out of range.
        """
        with np.errstate(all="ignore"):
            found = float(np.float32(float(alpha)))
        if isfinite(found) and found:
            return found
        raise RefusedError(
            Finding(
                "not-representable",
                f"the file has one alpha, a float32, and {float(alpha):g} is out of its range",
                where=self.opened.where,
                key=_ALPHA,
                fix="check lora_alpha and alpha_pattern of adapter_config.json",
            )
        )

    def blob(self, deltas: Sequence[Delta], saved: Sequence[Saved]) -> Blob:
        """The tensors, and the two fields that a file must have."""
        where = self.opened.where
        refuse_tied_head(self.known, (d.key for d in deltas), "output.weight", self.title, where)
        tensors = {}
        for delta in deltas:
            a, b = same_dtype(delta.lora.a, delta.lora.b)
            embedding = delta.kind == "embedding" or delta.key == _EMBEDDING
            tensors[f"{delta.key}.lora_a"] = a.T if embedding else a
            tensors[f"{delta.key}.lora_b"] = b
        alpha = deltas[0].lora.scale.alpha if deltas else 1
        config = {"dialect": "gguf", ARCHITECTURE: self._architecture(), _ALPHA: alpha}
        return Blob(config, tensors)

    def _architecture(self) -> str:
        model_type = self.known.model_type or ""
        found = architectures().get(model_type) or self.opened.config.get(ARCHITECTURE)
        if not isinstance(found, str):
            raise BadInputError(
                Finding(
                    "model-needed",
                    f"a GGUF file names the architecture, and none is known for {model_type or 'this base'}",
                    where=self.opened.where,
                    fix="give the base model with --model (its folder or its config.json)",
                )
            )
        return found


class Gguf:
    """llama.cpp's adapters."""

    name = "gguf"
    title = "GGUF: one file with a LoRA for llama.cpp"
    layout = "gguf"
    usage = "Use it with: llama-cli -m BASE.gguf --lora {path}"
    capabilities = GgufWriter.capabilities
    spelling = PlainNames("", "weight.lora_a", "weight.lora_b")

    @property
    def readers(self) -> tuple[ToolReader, ...]:
        """How the tool loads adapters."""
        from regraft.dialects.judges.llama_cpp import READER

        return (READER,)

    def sniff(self, src: Path) -> Evidence | None:
        """A file that begins as GGUF does, or a folder with one."""
        file = _file(src)
        return (
            Evidence(certain=True, why=f"{file.name} is a GGUF file") if file is not None else None
        )

    def find(self, src: Path) -> Found:
        """The one file."""
        file = _file(src)
        if file is None:
            message = "there is no GGUF file here, or more than one"
            raise BadInputError(Finding("not-an-adapter", message, where=str(src)))
        if src.is_file():
            return Found(src.parent, (src.parent,), file)
        others = tuple(
            sorted(p.relative_to(src) for p in src.rglob("*") if p.is_file() and p != file)
        )
        return Found(src, (src,), file, others)

    def open(self, folder: Path, root: Path, weights: Path | None) -> GgufFile:
        """Its factors by base tensor."""
        path = weights if weights is not None else _file(folder)
        assert path is not None
        where = str(path)
        try:
            head = read_gguf_head(path)
        except ValueError as error:
            raise BadInputError(_bad(path, str(error))) from None
        fields = head.fields
        kinds = fields.get("general.type"), fields.get("adapter.type")
        if kinds != ("adapter", "lora"):
            raise BadInputError(
                Finding(
                    "not-an-adapter",
                    f"this is {FORM.what} and no LoRA (general.type is {kinds[0]!r} and adapter.type {kinds[1]!r}); "
                    "models in it are not read",
                    where=where,
                    fix=f"{FORM.fix}; of LoRAs those are read that convert_lora_to_gguf.py wrote",
                )
            )
        tensors, quantised = _read(path, head)
        alpha = fields.get(_ALPHA, 0)
        if isinstance(alpha, str):
            raise BadInputError(_bad(path, f"it has the text {alpha!r} for a number", _ALPHA))
        norms = [name for name in tensors if name.endswith(_NORM)]
        factors = {name: tensor for name, tensor in tensors.items() if name not in norms}
        loras: dict[str, Lora] = {}
        findings = []
        for key, (a, b) in pairs(factors, (".lora_a", ".lora_b"), where).items():
            if key == _EMBEDDING:
                a = a.T
            if a.ndim not in (2, 3) or a.ndim != b.ndim or a.shape[-2] != b.shape[-1]:
                findings.append(shape_finding(where, f"{key}.lora_a", a, b))
                continue
            rank = a.shape[-2]
            loras[key] = Lora(a, b, Scale(rank, whole(alpha) if alpha else rank))
        if findings:
            raise BadInputError(findings)
        architecture = fields.get(ARCHITECTURE)
        types = [name for name, arch in architectures().items() if arch == architecture]
        metadata = {
            name.removeprefix(_PROVENANCE): value
            for name, value in fields.items()
            if name.startswith(_PROVENANCE) and isinstance(value, str)
        }
        return GgufFile(
            "",
            where,
            {"dialect": self.name, ARCHITECTURE: architecture, _ALPHA: alpha},
            tensors,
            loras,
            kinds={_EMBEDDING: "embedding"},
            metadata=metadata,
            said=Hints(where, model_type=types[0] if len(types) == 1 else None, layout=self.layout),
            spelling=self.spelling,
            quantised=quantised,
            invoked=bool(head.lists.get(_TOKENS)),
            norms=len(norms),
        )

    def writer(self, opened: Opened, known: Known, to: Layout) -> GgufWriter:
        """What writes one."""
        return GgufWriter(opened, known, to, self.spelling)

    def save(self, folder: Path, opened: Opened, result: Converted) -> None:
        """Write the file."""
        path = folder / FILE
        if result.report.copied:
            copy_file(Path(opened.where), path)
            return
        gguf = _package()
        writer = gguf.GGUFWriter(None, result.config[ARCHITECTURE])
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32(_ALPHA, float(result.config[_ALPHA]))
        for name, text in result.metadata.items():
            if name != "format":
                writer.add_string(_PROVENANCE + name, text)
        for name, tensor in result.tensors.items():
            data = np.ascontiguousarray(tensor)
            if data.dtype.name == "bfloat16":
                kind = gguf.GGMLQuantizationType.BF16
                writer.add_tensor(name, data.view(np.uint8), raw_dtype=kind)
            else:
                writer.add_tensor(name, data)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _file(src: Path) -> Path | None:
    """The GGUF file that a path is or has."""
    try:
        found = src if src.is_file() else one_file(src, (FILE,), (".gguf",))
        if found is None:
            return None
        with found.open("rb") as file:
            return found if file.read(4) == b"GGUF" else None
    except OSError:
        return None


GGUF = Gguf()
