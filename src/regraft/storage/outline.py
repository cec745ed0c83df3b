"""Checkpoints beyond this machine, as folders that can be looked at: their outlines.

An outline is a temporary folder with the names of what is in a store. Of the small files that say what a checkpoint is
it has the content, of weights the headers, and of everything else an empty file in its place, a *stand-in*. Whoever
opens a stand-in with `regraft.storage.probe.open_regular`, or reads its ranges, gets the object's own bytes from the
store; whoever opens it in another way finds a file that ends too early, and never a wrong byte.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from regraft.errors import BadInputError, Finding
from regraft.storage.objects import Client, Found, Traffic
from regraft.storage.stand_ins import NAMES, STAND_INS, Remote, open_remote
from regraft.storage.threads import Pool

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_TELLING = re.compile(
    r"([^/]+/)?(config\.json|adapter_config\.json|model_index\.json|[^/]*\.index\.json)"
)
"""Files that say what a checkpoint is, in its folder or in that of one of its parts."""
_INDEX = "model.safetensors.index.json"
_USUAL = ("config.json", _INDEX)
_ELSE = ("adapter_config.json", "model.safetensors", "adapter_model.safetensors")
_LAST = (
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    ".metadata",
    "pytorch_model_fsdp_0/.metadata",
    "model/.metadata",
)
"""What is looked for where a store cannot list: first what a checkpoint has, then what else there may be."""
_CHUNKS = re.compile(rb"__[0-9]+_[0-9]+\.distcp")
"""How torch calls the files that the ranks of a run write, of which ``.metadata`` speaks."""
_BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "README.md",
    "LICENSE",
)
"""What a model's folder has beside the weights, for stores that cannot list."""
_MOST = 1_000_000_000
"""Bytes that ``.metadata`` has at most."""
_HEAD = 1 << 20
"""Bytes that are read of a weights file whose header's length nobody knows."""
_SMALLEST = 1 << 16
_PER_TENSOR = 140
"""Bytes that a header has for a tensor beside its name, at most about."""
_AT_ONCE = 16
_BUFFER = 1 << 20


@dataclass(eq=False)
class Outline:
    """The outline of what is at an address."""

    url: str
    client: Client
    root: Path
    """The folder."""
    path: Path
    """What was asked for: the folder, or a file in it."""
    listed: bool = False
    _made: list[str] = field(default_factory=list)

    @property
    def traffic(self) -> Traffic:
        """What went over the network for it."""
        return self.client.traffic

    def name(self) -> None:
        """Let texts call it by its address."""
        NAMES[str(self.path)] = self.url
        NAMES[str(self.root)] = self.client.store.url

    def stand_in(self, found: Found, head: bytes = b"") -> Path:
        """Make a stand-in for an object."""
        path = self._place(found.key)
        path.write_bytes(head)
        path.chmod(0o644)
        where = os.path.realpath(path)
        STAND_INS[where] = Remote(self.client, found, head)
        self._made.append(where)
        return path

    def keep(self, key: str, data: bytes) -> Path:
        """Keep a small object as the file that it is."""
        path = self._place(key)
        path.write_bytes(data)
        path.chmod(0o644)
        return path

    def fetch(self) -> None:
        """Get everything that has a stand-in as a whole, for what is read into memory anyway."""
        for where in self._made:
            remote = STAND_INS.get(where)
            if remote is None:
                continue
            with open_remote(remote) as file, Path(where).open("wb") as out:
                shutil.copyfileobj(file, out, _BUFFER)
            del STAND_INS[where]

    def _place(self, key: str) -> Path:
        path = self.root / key
        if not path.resolve().is_relative_to(self.root.resolve()):
            message = f"the store names {key[:200]!r}, which leads out of its folder"
            raise BadInputError(Finding("bad-path", message, where=self.url))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def close(self) -> None:
        """Remove it."""
        for where in self._made:
            STAND_INS.pop(where, None)
        for path in (str(self.path), str(self.root)):
            NAMES.pop(path, None)
        shutil.rmtree(self.root.parent, ignore_errors=True)


def draw(url: str, client: Client, name: str | None, *, whole: bool) -> Outline:
    """Make the outline of what is at an address; ``client`` is its store, or that of its folder where it is a file.

    At most one request for each file that is looked into, and one to list them.

    Args:
        url: the address.
        client: the store.
        name: the file in it, where the address is of one.
        whole: whether everything beside the weights is wanted, too, where a store cannot list.

    Raises ``BadInputError`` where there is nothing, or no answer can be had.
    """
    above = Path(tempfile.mkdtemp(prefix="regraft-"))
    root = above / (_safe(client.store.url.rpartition("/")[2]) or "store")
    root.mkdir()
    outline = Outline(url, client, root, root / name if name else root)
    outline.name()
    try:
        if name:
            _draw_file(outline, name)
        else:
            _draw_folder(outline, whole=whole)
    except BaseException:
        outline.close()
        raise
    return outline


def _safe(name: str) -> str:
    return re.sub(r"[^\w.@-]", "_", name)[:100].lstrip(".")


def _draw_file(outline: Outline, name: str) -> None:
    beside = ["config.json", "adapter_config.json"] if name.endswith(_WEIGHTS) else []
    found = _look(outline, [name, *beside], {}, maybe=beside)
    if name not in found:
        raise _nothing(outline)


def _draw_folder(outline: Outline, *, whole: bool) -> None:
    rows = outline.client.listed()
    if rows is None:
        _guess(outline, whole=whole)
        return
    rows = [row for row in rows if row.key and not row.key.endswith("/")]
    if not rows:
        raise _nothing(outline)
    outline.listed = True
    telling = [row.key for row in rows if _TELLING.fullmatch(row.key)]
    names = _tensors_of(_look(outline, telling, {}))
    weights = [
        r.key for r in rows if r.key.endswith(".safetensors") and (not names or r.key in names)
    ]
    _look(outline, weights, names)
    for row in rows:
        if not (outline.root / row.key).exists():
            outline.stand_in(row)


def _guess(outline: Outline, *, whole: bool) -> None:
    """Look for what a checkpoint usually has."""
    found = _look(outline, _USUAL, {})
    names = _tensors_of(found)
    if names:
        _look(outline, list(names), names)
    else:
        found = {**found, **_look(outline, _ELSE, {})}
    if not (names or any(key.endswith(_WEIGHTS) for key in found)):
        found = {**found, **_guess_last(outline)}
    if not found:
        raise _nothing(outline)
    if whole:
        _look(outline, _BESIDE, {})


def _guess_last(outline: Outline) -> dict[str, bytes]:
    """Look for what torch wrote: files of its own, or a checkpoint of a run of many ranks."""
    found = _look(outline, _LAST, {})
    _look(outline, list(_tensors_of(found, _LAST[0], ".bin")), {})
    for key in _LAST[2:]:
        if key in found:
            remote = STAND_INS.get(os.path.realpath(outline.root / key))
            data = found[key] if remote is None else remote.read(0, min(remote.found.size, _MOST))
            above = key.removesuffix(".metadata")
            files = {f"{above}{name.decode()}" for name in _CHUNKS.findall(bytes(data))}
            _look(outline, sorted(files), dict.fromkeys(files, 1))
    return found


def _tensors_of(
    found: Mapping[str, bytes], key: str = _INDEX, end: str = ".safetensors"
) -> dict[str, int]:
    """For every file that an index names about how many bytes its header has."""
    sizes: dict[str, int] = {}
    with suppress(msgspec.DecodeError, RecursionError, KeyError):
        index = msgspec.json.decode(found[key], type=_Names)
        for tensor, file in index.weight_map.items():
            if "/" not in file and file.endswith(end):
                sizes[file] = sizes.get(file, _SMALLEST) + len(tensor) + _PER_TENSOR
    return sizes


class _Names(msgspec.Struct):
    weight_map: dict[str, str]


def _look(
    outline: Outline, keys: Sequence[str], sizes: Mapping[str, int], *, maybe: Sequence[str] = ()
) -> dict[str, bytes]:
    """Look into objects, several at once: small ones are kept, of weights the header.

    What is not there is left out, and so is what is beside a file and nobody may see (``maybe``): a signature may be
    good for one file, and stores say the same of what is not there to those who may not know it.
    """
    if not keys:
        return {}

    def look(key: str) -> tuple[Found, bytes] | None:
        try:
            return _head(outline.client, key, sizes.get(key, _HEAD))
        except BadInputError as error:
            if key in maybe and error.findings[0].code == "store-denied":
                return None
            raise

    with Pool(min(_AT_ONCE, len(keys)), "regraft-look") as pool:
        heads = list(pool.map(look, keys))
    seen: dict[str, bytes] = {}
    for key, head in zip(keys, heads, strict=True):
        if head is None:
            continue
        found, data = head
        seen[key] = data
        if len(data) == found.size and not key.endswith(_WEIGHTS):
            outline.keep(key, data)
        else:
            outline.stand_in(found, data)
    return seen


def _head(client: Client, key: str, count: int) -> tuple[Found, bytes] | None:
    """An object's first bytes: all of a small one, no less than the header of a safetensors file."""
    first = client.first(key, count)
    if first is None:
        return None
    found, data = first[0], bytes(first[1])
    if key.endswith(".safetensors") and len(data) >= 8:
        wanted = 8 + int.from_bytes(data[:8], "little")
        if len(data) < wanted <= min(found.size, 8 + 100_000_000):
            data += client.read(found, len(data), wanted)
        return found, data if len(data) == found.size else data[:wanted]
    if key.endswith(".json") and len(data) < found.size <= 100_000_000:
        data += client.read(found, len(data), found.size)
    return found, data


def _nothing(outline: Outline) -> BadInputError:
    message = "there is nothing at this address"
    fix = "check the address; for a server that cannot list, give the address of the weights file"
    return BadInputError(Finding("not-found", message, where=outline.url, fix=fix))
