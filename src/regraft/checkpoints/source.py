"""Opening a checkpoint: where every tensor's bytes are, from headers alone.

A checkpoint is one ``.safetensors`` file, or a folder with one, or with shards and an index, and
with a config, a tokenizer and other files beside them. A file that ``torch.save`` wrote
(``pytorch_model.bin``) is read too. Source of the names: ``save_pretrained`` of transformers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct, field

from regraft.dialects.registry import sniffed
from regraft.errors import BadInputError, Finding, RegraftError
from regraft.names.keys import Group, Ints, group_names
from regraft.names.patterns import patterns
from regraft.report import count_in_words
from regraft.storage.beside import check_files
from regraft.storage.dtypes import DTYPES
from regraft.storage.formats import find_form, is_torch
from regraft.storage.header import TensorInfo, first_names
from regraft.storage.hub import how_to_find
from regraft.storage.json_files import JsonFile, load_json, read_json
from regraft.storage.stand_ins import remote_at
from regraft.storage.weights import OF_TORCH, File, read_file
from regraft.values import replace

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
UNFINISHED = ".regraft-in-place"
"""A folder in which headers are kept while they are rewritten in place."""
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_BINS = (_BIN, "pytorch_model_fsdp.bin")
"""What torch writes as one file; the second is accelerate's, of a whole FSDP state dict."""
PIPELINE = "model_index.json"
"""What says which parts a folder of diffusers has."""
_PART = "diffusion_pytorch_model"
"""What diffusers calls the weights of a part."""
_PART_INDEX = f"{_PART}.safetensors.index.json"
_TORCH_ONLY = OF_TORCH[1:]
"""What torch's files are called elsewhere: read where they are given by name."""
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.(safetensors|bin)")
ADAPTER = "adapter_config.json"
# The same weights in another form: carried over, they would be in the old layout beside the new one.
_OTHER_WEIGHTS = re.compile(
    r"(.*\.(bin|pt|pth|ckpt|msgpack|h5|gguf|onnx|safetensors)(\.index\.json)?)$"
)
_MAX_INDEX_BYTES = 100_000_000
_SHOWN = 20


class Tensors(Struct, frozen=True, eq=False, dict=True):
    """All tensors of a checkpoint, in columns; row i is the tensor ``names[i]``."""

    names: list[str]
    dtypes: list[str]
    """The format's names, such as ``BF16``."""
    shapes: list[tuple[int, ...]]
    """In elements."""
    files: Ints
    """The number of the file."""
    starts: Ints
    """Where the bytes begin, from the start of the file."""
    sizes: Ints
    """In bytes."""

    @cached_property
    def groups(self) -> list[Group]:
        """The names by template, with the rows as ids: what asks for a kind of name looks at a few dozen."""
        return group_names(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Source(Struct, frozen=True):
    """A checkpoint to read."""

    where: str
    root: Path
    """The folder that its files are in."""
    files: tuple[File, ...]
    tensors: Tensors
    config: JsonFile | None
    """Its ``config.json``, which need not be sound."""
    index: Mapping[str, Any] | None
    """The index's metadata; ``None`` where there is no index."""
    others: tuple[Path, ...]
    """Files to carry over, relative to the folder."""
    left_out: tuple[str, ...] = field(default=())
    """Weights in other forms that stay behind."""
    notes: tuple[str, ...] = ()
    """What is not as it should be, and does not matter: an index that is not right."""
    parted: bool = False
    """Whether it is a folder with a folder for each part of a pipeline: names begin with the part's and a slash."""

    @property
    def is_remote(self) -> bool:
        """Whether any of its weights is in a store, or put together as it is read."""
        return any(remote_at(file.path) is not None for file in self.files)

    @property
    def config_data(self) -> dict[str, Any]:
        """What its ``config.json`` says, to be changed by nobody; empty where there is none.

        Raises ``BadInputError`` where it is not sound.
        """
        if self.config is None:
            return {}
        if self.config.error is not None:
            raise self.config.error
        return self.config.data

    @property
    def is_bin(self) -> bool:
        """Whether torch wrote it."""
        return self.files[0].path.suffix in OF_TORCH


def is_checkpoint(path: Path) -> bool:
    """Whether a path looks like a checkpoint, and not like an adapter of any dialect."""
    if path.is_file():
        if path.name.startswith("adapter_model") or (path.parent / ADAPTER).is_file():
            return False
        if path.suffix in _TORCH_ONLY and (path.stat().st_size == 0 or not is_torch(path)):
            return False
        if path.suffix not in (".safetensors", *OF_TORCH) or sniffed(path):
            return False
        return path.suffix != ".safetensors" or not _is_lora(path)
    if (path / ADAPTER).is_file() or any(path.glob("adapter_model*")):
        return False
    if any((path / name).is_file() for name in (INDEX, SINGLE, *_BINS, _BIN_INDEX, PIPELINE)):
        return True
    if not path.is_dir() or any(path.rglob(ADAPTER)) or sniffed(path):
        return False
    return any(path.glob("*.safetensors")) or (path / CONFIG).is_file()


_FACTOR = re.compile(r".*\.lora_(?:A|B|down|up)(?:\.\w+)?\.weight")


def _is_lora(path: Path) -> bool:
    """Whether the first tensors of a file are mostly factors of a LoRA, whoever wrote it."""
    names = first_names(path)
    return 2 * sum(_FACTOR.fullmatch(name) is not None for name in names) > len(names)


def open_checkpoint(path: Path) -> Source:
    """Read the headers of a checkpoint; everything that is wrong with them is reported together.

    Reads headers and the index, never the data.

    Raises ``BadInputError``.
    """
    if (path / PIPELINE).is_file():
        return _open_pipeline(path)
    index: _Index | None = None
    notes: list[str] = []
    others: tuple[Path, ...] = ()
    left_out: tuple[str, ...] = ()
    if path.is_file():
        other = find_form(path)
        if other is not None:
            raise BadInputError(other)
        found = [path]
        root = path.parent
        part = _SHARD.fullmatch(path.name)
        if part and int(part[3]) > 1:
            message = f"it is one of {int(part[3])} files of a checkpoint"
            fix = "give the folder that they are in"
            raise BadInputError(Finding("one-shard", message, where=str(path), fix=fix))
    else:
        root = path
        if not path.is_dir():
            message, fix = "there is no such file or folder", how_to_find(str(path))
            raise BadInputError(Finding("not-found", message, where=str(path), fix=fix))
        index = _find_index(root, notes)
        weights = _list_shards(root, index, notes)
        found = [root / name for name in weights]
        others, left_out = _list_others(root, weights)
    if (root / UNFINISHED).exists():
        message = "a run that renamed its tensors in place did not come to its end"
        fix = "run 'regraft convert --in-place' on it again: it puts back what it was"
        raise BadInputError(Finding("unfinished", message, where=str(root), fix=fix))
    heads = [root / name for name in (CONFIG, INDEX, _BIN_INDEX)]
    findings = _absent(found, index)
    found = [file for file in found if index is None or os.path.lexists(file)]
    findings += check_files(root, [*found, *heads, *(root / other for other in others)])
    sound = not findings and (root / CONFIG).is_file()
    config = read_json(root / CONFIG) if sound else None
    files: list[File] = []
    parts: list[tuple[Mapping[str, TensorInfo], int]] = []
    for file in found:
        try:
            opened, tensors, said = read_file(file)
        except RegraftError as error:
            findings += error.findings
            continue
        notes += said
        files.append(opened)
        parts.append((tensors, opened.data_start))
    if not findings:
        findings += _check_names(root, files, [part for part, _ in parts], index, notes)
    if findings:
        raise BadInputError(findings)
    metadata = index.metadata if index is not None else None
    columns = _columns(parts)
    return Source(
        str(path),
        root,
        tuple(files),
        columns,
        config,
        metadata,
        others,
        left_out,
        tuple(notes),
    )


def _open_pipeline(root: Path) -> Source:
    """All parts of a folder of diffusers as one checkpoint."""
    parts: list[tuple[str, Source]] = []
    findings: list[Finding] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if not any(f.suffix in (".safetensors", ".bin") for f in folder.iterdir()):
            continue
        try:
            parts.append((folder.name, open_checkpoint(folder)))
        except RegraftError as error:
            findings += error.findings
    if not parts and not findings:
        message = f"there are no weights in the folders beside {PIPELINE}"
        findings.append(Finding("no-weights", message, where=str(root)))
    if findings:
        raise BadInputError(findings)
    starts = np.cumsum([0, *(len(part.files) for _, part in parts)])
    tables = [part.tensors for _, part in parts]
    joined = Tensors(
        [f"{name}/{tensor}" for name, part in parts for tensor in part.tensors.names],
        [dtype for table in tables for dtype in table.dtypes],
        [shape for table in tables for shape in table.shapes],
        np.concatenate([t.files + start for t, start in zip(tables, starts, strict=False)]),
        np.concatenate([table.starts for table in tables]),
        np.concatenate([table.sizes for table in tables]),
    )
    files = tuple(
        replace(file, name=f"{name}/{file.name}") for name, part in parts for file in part.files
    )
    left_out = tuple(f"{name}/{path}" for name, part in parts for path in part.left_out)
    own = {file.path for file in files} | {root / path for path in left_out}
    others = tuple(path for path in _list_others(root, ())[0] if root / path not in own)
    notes = tuple(f"{name}: {note}" for name, part in parts for note in part.notes)
    return Source(str(root), root, files, joined, None, None, others, left_out, notes, parted=True)


def open_weights(paths: Iterable[Path]) -> Source:
    """The weights files that somebody else has found, as one checkpoint without a config; see `open_checkpoint`.

    Raises ``BadInputError``.
    """
    files: list[File] = []
    parts: list[tuple[Mapping[str, TensorInfo], int]] = []
    findings: list[Finding] = []
    notes: list[str] = []
    for path in paths:
        try:
            opened, tensors, said = read_file(path)
        except RegraftError as error:
            findings += error.findings
            continue
        notes += said
        files.append(opened)
        parts.append((tensors, opened.data_start))
    root = files[0].path.parent if files else Path()
    findings = findings or _check_names(root, files, [part for part, _ in parts], None, [])
    if findings:
        raise BadInputError(findings)
    return Source(
        str(root), root, tuple(files), _columns(parts), None, None, (), notes=tuple(notes)
    )


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}
    path: str = ""


def _find_index(root: Path, notes: list[str]) -> _Index | None:
    """The index that a loader goes by: one whole file comes before it, as in ``from_pretrained``."""
    known = (INDEX, _PART_INDEX, _BIN_INDEX)
    file = next((root / n for n in known if (root / n).is_file()), None)
    if file is None or (file.name == _BIN_INDEX and (root / SINGLE).is_file()):
        return None
    whole = file.name.removesuffix(".index.json")
    if (root / whole).is_file():
        named = load_json(file).get("weight_map")
        if not isinstance(named, dict) or any(shard != whole for shard in named.values()):
            notes.append(f"{file.name} is left aside: {whole} is there, and loaders take that one")
            return None
    where = str(file)
    data = load_json(file)
    names = data.get("weight_map")
    metadata = data.get("metadata", {})
    if not isinstance(names, dict) or not names or not isinstance(metadata, dict):
        message = "its weight_map must be a table of tensors and the files that they are in"
        raise BadInputError(Finding("index", message, where=where, fix="save the model again"))
    findings = []
    shards: Iterable[str] = names.values()
    if set(map(type, names.values())) != {str}:
        shards = (s if isinstance(s, str) else repr(s) for s in names.values())
    for shard in dict.fromkeys(shards):
        if not _is_plain(shard):
            findings.append(
                Finding(
                    "index",
                    f"it names {shard[:200]!r}, and a shard must be a file of this folder",
                    where=where,
                    fix="correct weight_map, or download the index again",
                )
            )
    if findings:
        raise BadInputError(findings[:_SHOWN])
    return _Index(names, metadata, where)


def _is_plain(name: str) -> bool:
    return (
        bool(name)
        and name not in (".", "..")
        and not set("/\\\0") & set(name)
        and Path(name).suffix in (".safetensors", ".bin")
    )


def _list_shards(root: Path, index: _Index | None, notes: list[str]) -> list[str]:
    if index is not None:
        return sorted(set(index.weight_map.values()))
    for name in (SINGLE, f"{_PART}.safetensors", *_BINS, f"{_PART}.bin"):
        if (root / name).is_file():
            return [name]
    names = sorted(path.name for path in root.glob("*.safetensors"))
    if len(names) == 1 and _SHARD.fullmatch(names[0]) is None:
        other = find_form(root / names[0])
        if other is not None:
            raise BadInputError(other)
        return names
    if not names:
        return [_only_of_torch(root, notes)]
    sets: dict[tuple[str, int], list[str]] = {}
    for name in names:
        part = _SHARD.fullmatch(name)
        if part is not None:
            sets.setdefault((part[1], int(part[3])), []).append(name)
    whole = [shards for (_, count), shards in sets.items() if len(shards) == count]
    if len(whole) == 1:
        rest = [name for name in names if name not in whole[0]]
        if len(whole[0]) > 1:
            notes.append(f"there is no {INDEX}; the files' own numbers say which belong together")
        if rest:
            notes.append(f"left aside, because they belong to no whole set: {', '.join(rest)}")
        return whole[0]
    if len(sets) == 1 and not whole and len(next(iter(sets.values()))) == len(names):
        (base, count), there = next(iter(sets.items()))
        numbers = {int(_shard_number(name)) for name in there}
        absent = sorted(set(range(1, count + 1)) - numbers)
        shown = ", ".join(f"{base}-{n:05d}-of-{count:05d}.safetensors" for n in absent[:_SHOWN])
        message = f"{len(there)} of {count} files are here: the download is not complete"
        fix = f"download what is missing: {shown}"
        raise BadInputError(Finding("no-index", message, where=str(root), fix=fix))
    message = f"there are {len(names)} weight files and no {INDEX} that says which belong together"
    fix = "download the index, or keep the files of one model"
    raise BadInputError(Finding("no-index", message, where=str(root), fix=fix))


def _only_of_torch(root: Path, notes: list[str]) -> str:
    """The one file of torch's in a folder whose weights have no loader's name (``last.ckpt``).

    Raises ``BadInputError`` where there is none, and where there are several.
    """
    names = sorted(p.name for p in root.iterdir() if p.suffix in OF_TORCH)
    names = [name for name in names if (root / name).is_file() and is_torch(root / name)]
    if not names:
        message = f"there are no weights here: neither {SINGLE} nor {INDEX}"
        fix = f"give the folder with {SINGLE} or its shards, or the weights file itself"
        finding = Finding("no-weights", message, where=str(root), fix=fix)
        raise BadInputError(find_form(root) or finding)
    if len(names) > 1:
        shown = ", ".join(names[:_SHOWN])
        message = f"no file here has a loader's name; weights may be in {count_in_words(len(names), 'file')}: {shown}"
        fix = f"give the one that is meant: {root / names[0]}"
        raise BadInputError(Finding("no-index", message, where=str(root), fix=fix))
    notes.append(f"{names[0]} has the weights: nothing here has a name that loaders look for")
    return names[0]


def _shard_number(name: str) -> str:
    part = _SHARD.fullmatch(name)
    assert part is not None
    return part[2]


def _absent(found: list[Path], index: _Index | None) -> list[Finding]:
    """Shards that an index names and that are not there."""
    gone = [path for path in found if not os.path.lexists(path)]
    if not gone or index is None:
        return []
    absent = [path.name for path in gone]
    lost = sum(shard in absent for shard in index.weight_map.values())
    there = len(found) - len(absent)
    return [
        Finding(
            "missing-file",
            f"the index names it, and it is not here: {there} of {len(found)} files are, so the download is not "
            f"complete ({lost} of {len(index.weight_map)} tensors are missing)",
            where=str(path),
            fix="download it, and run this again",
        )
        for path in gone[:_SHOWN]
    ]


def _list_others(root: Path, weights: Iterable[str]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    own = {*weights, INDEX, _PART_INDEX, _BIN_INDEX, CONFIG}
    others, left_out = [], []
    for folder, names, files in os.walk(root):
        inside = Path(folder).relative_to(root)
        names[:] = sorted(
            n for n in names if n not in (".git", ".cache", "__pycache__", UNFINISHED + ".tmp")
        )
        for name in sorted(files):
            at_top = inside == Path()
            if at_top and name in own:
                continue
            if at_top and _OTHER_WEIGHTS.fullmatch(name):
                left_out.append(name)
            else:
                others.append(inside / name)
        for name in list(names):
            if (Path(folder) / name).is_symlink():
                names.remove(name)
                left_out.append(str(inside / name))
    return tuple(others), tuple(left_out)


def _check_names(
    root: Path,
    files: list[File],
    parts: list[Mapping[str, TensorInfo]],
    index: _Index | None,
    notes: list[str],
) -> list[Finding]:
    findings: list[Finding] = []
    seen: dict[str, str] = {}
    for file, tensors in zip(files, parts, strict=True):
        if not seen.keys().isdisjoint(tensors):
            name = next(name for name in tensors if name in seen)
            findings.append(
                Finding(
                    "duplicate-key",
                    f"the tensor is in {seen[name]} as well, and which is meant is unclear",
                    where=str(file.path),
                    key=name,
                    fix="remove one of them",
                )
            )
        seen.update(dict.fromkeys(tensors, file.name))
    if not seen and not findings:
        findings.append(Finding("empty", "the checkpoint has no tensors", where=str(root)))
    if index is not None and seen != index.weight_map:
        listed, name_of_index = index.weight_map, Path(index.path).name
        absent = [(name, shard) for name, shard in listed.items() if name not in seen]
        for name, shard in absent[:_SHOWN]:
            more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
            message = f"the index says that it is in {shard}, and it is in no file{more}"
            findings.append(
                Finding("index", message, where=index.path, key=name, fix="download it again")
            )
        # Loaders read whole files, whatever the index says of single tensors.
        elsewhere = [n for n, shard in listed.items() if seen.get(n, shard) != shard]
        unlisted = [name for name in seen if name not in listed]
        for names, what in (
            (elsewhere, "are in other files than it says"),
            (unlisted, "are in the files, and it does not list them"),
        ):
            if names:
                shown = ", ".join(pattern for pattern, _ in patterns(names))
                notes.append(
                    f"{name_of_index} is not right, and the result's is: {len(names)} tensors {what} ({shown})"
                )
    return findings


def _columns(parts: list[tuple[Mapping[str, TensorInfo], int]]) -> Tensors:
    names = [name for tensors, _ in parts for name in tensors]
    infos = [info for tensors, _ in parts for info in tensors.values()]
    count = len(infos)
    counts = np.array([len(tensors) for tensors, _ in parts], dtype=np.int64)
    files = np.repeat(np.arange(len(parts), dtype=np.int64), counts)
    starts = np.fromiter((info.start for info in infos), np.int64, count)
    ends = np.fromiter((info.end for info in infos), np.int64, count)
    base = np.array([start for _, start in parts], dtype=np.int64)
    return Tensors(
        names,
        [info.dtype for info in infos],
        [info.shape for info in infos],
        files,
        starts + base[files],
        ends - starts,
    )


def item_bits(dtype: str) -> int:
    """The size of one element of a type, in bits."""
    return DTYPES[dtype].bits
