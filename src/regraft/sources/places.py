"""What somebody names on a command line or in a call: a path of this machine, or an address beyond it.

/models/mixtral              a path; what exists here always wins
s3://bucket/mixtral          a folder of objects, or one of its weights files
https://host/model.safetensors
hf://org/name@revision       a repository of the hub
org/name                     the same, in the hub's local cache or else at the hub, where there is no such path
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote
from weakref import finalize

from regraft.errors import BadInputError, Finding, RegraftError
from regraft.storage.hub import find_cached, how_to_find, is_offline, parse_id
from regraft.storage.stand_ins import named
from regraft.storage.training import KEY

if TYPE_CHECKING:
    from regraft.storage.joined import Joined
    from regraft.storage.objects import Client
    from regraft.storage.outline import Outline

_FILE = re.compile(r"[^/]+\.(safetensors|bin|pt|pth|ckpt|json|gguf)")


def address_of(path: str | os.PathLike[str]) -> str | None:
    """The address that somebody named; ``None`` where it is a path of this machine.

    A path swallows one of an address's slashes, which comes back here. What follows the ``?`` of a web address may sign
    it: it is kept for `store_for`, and no part of what is shown.

    >>> address_of(Path("s3://bucket/model")), address_of("model")
    ('s3://bucket/model', None)
    """
    text = os.fspath(path)
    match = re.fullmatch(r"([a-z][a-z0-9+.-]+):/+(.+)", text, re.S | re.I)
    if match is None or os.path.lexists(text):
        return None
    scheme, place, query = match[1].lower(), match[2], ""
    if scheme in ("http", "https"):
        place, _, query = place.partition("?")
    address = f"{scheme}://{place.rstrip('/')}"
    if query:
        _QUERIES[address] = query
    return address


_PARTS = ("shard-*-model-*.safetensors", "model_world_size_*_rank_*.pt")
"""Files of single ranks: torch's, and those of a run with FSDP as verl saves it."""
_FSDP = ("pytorch_model_fsdp_0", "model")
"""The folder of a checkpoint in which accelerate, and torchtitan's kin, put the model."""
_OFFLINE: ContextVar[bool] = ContextVar("offline", default=False)
OUTLINES: list[Outline | Joined] = []
"""What stands for something beyond this machine, or in parts, until `leave`."""
_QUERIES: dict[str, str] = {}
"""What follows the ``?`` of the web addresses that were named."""


def locate(path: str | os.PathLike[str], *, whole: bool = False) -> Path:
    """A path of this machine for what is named: of what is beyond it, an outline, until `leave` is called.

    Args:
        path: a path or an address.
        whole: whether everything beside the weights is wanted, too; a store that cannot list is asked for each.

    Raises ``BadInputError`` where there is nothing at an address.
    """
    address = address_of(path)
    if not os.path.lexists(path):
        if cached := find_cached(address or os.fspath(path)):
            return _joined(cached)
        address = address or _hub_address(path)
    if address is None:
        return _joined(adapter_of(Path(path)))
    if _OFFLINE.get() or (address.startswith("hf://") and is_offline()):
        named = parse_id(address)
        fix = (
            f"run 'hf download {named[0]}' where there is a network"
            if named
            else "copy it to this machine where there is a network, or leave out --offline"
        )
        raise BadInputError(Finding("offline", _forbidden(), where=address, fix=fix))
    known = next((each for each in OUTLINES if each.url == address), None)
    if known is None:
        from regraft.storage.outline import draw

        outline = draw(address, store_for(address), file_named(address), whole=whole)
        OUTLINES.append(outline)
        if _is_adapter(outline):
            outline.fetch()
        known = outline
    return _joined(known.path)


def adapter_of(path: Path) -> Path:
    """A path; of an adapter's config the folder that it is in, which is the adapter."""
    return path.parent if path.name == "adapter_config.json" and path.is_file() else path


def _forbidden() -> str:
    by = "--offline" if _OFFLINE.get() else "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    return f"it is beyond this machine, and the network is not to be used ({by})"


def absent(path: Path, *, base: bool = False) -> list[Finding]:
    """What is wrong with a path of this machine that leads nowhere; ``base`` is one of a model's config."""
    if os.path.lexists(path) or (base and parse_id(str(path)) is not None):
        return []
    fix = (
        "give the folder of the base model, or its config.json" if base else how_to_find(str(path))
    )
    return [Finding("not-found", "there is no such file or folder", where=str(path), fix=fix)]


def check_there(*paths: Path, model: Path | None = None) -> None:
    """Raise ``BadInputError`` that names all paths that lead nowhere."""
    found = [finding for path in paths for finding in absent(path)]
    found += absent(model, base=True) if model is not None else []
    if found:
        raise BadInputError(found)


def _hub_address(path: str | os.PathLike[str]) -> str | None:
    """The address at the hub that an id names, of which nothing is on this machine, where the hub may be asked."""
    text = os.fspath(path)
    if parse_id(text) is None or Path(text).parent.exists():
        return None
    if _OFFLINE.get() or is_offline():
        return None
    from regraft.storage.hub_network import is_installed

    return f"hf://{text}" if is_installed() else None


def _joined(path: Path) -> Path:
    """A path; of a training run's checkpoint in parts one in which its tensors are whole."""
    inside = next(
        (f for f in (path, *(path / n for n in _FSDP)) if (f / ".metadata").is_file()), None
    )
    looked = _PARTS if inside is None and path.is_dir() else ()
    if inside is None and not any(next(path.glob(name), None) for name in looked):
        return path
    from regraft.storage.joined import is_joined, join

    inside = inside or path
    if not is_joined(inside):
        return path
    known = next((each for each in OUTLINES if each.url == str(path)), None)
    if known is None:
        known = join(path, inside, KEY.get())
        OUTLINES.append(known)
    return known.path


@contextmanager
def below(key: str | None) -> Iterator[None]:
    """Let the model of a training run's checkpoint be below a key, such as ``model`` or ``app.model``."""
    token = KEY.set(key) if key is not None else None
    try:
        yield
    finally:
        if token is not None:
            KEY.reset(token)


def take_key(key: str | None) -> None:
    """Let `below` hold until the end of this context, as of a command line."""
    KEY.set(key)


def stay_offline(*, wanted: bool) -> None:
    """Let nothing be asked over the network until the end of this context, as of a command line."""
    _OFFLINE.set(wanted)


def settings() -> tuple[str | None, bool]:
    """What `below` and `stay_offline` were told, for another process."""
    return KEY.get(), _OFFLINE.get()


def left_behind() -> list[str]:
    """What of training runs' checkpoints is no part of the model: states of optimizers and the like."""
    return [name for each in OUTLINES for name in getattr(each, "left", ())]


def file_named(address: str) -> str | None:
    """The name of the file that an address is of; ``None`` where it is a folder's.

    >>> file_named("https://host/my%20model.safetensors"), file_named("s3://bucket/folder")
    ('my model.safetensors', None)
    """
    name = address.rpartition("/")[2]
    if address.startswith(("http://", "https://")):
        name = unquote(name)
    return name if _FILE.fullmatch(name) else None


def store_for(address: str) -> Client:
    """The store that an address is in: the folder, or that of the file."""
    from regraft.storage.stores import open_store

    if _OFFLINE.get():
        raise BadInputError(Finding("offline", _forbidden(), where=address))
    folder = address if file_named(address) is None else address.rpartition("/")[0]
    return open_store(folder, _QUERIES.get(address, ""))


def _is_adapter(outline: Outline) -> bool:
    """Whether it is one adapter or several, which are read into memory: they are fetched as a whole."""
    from regraft.checkpoints.source import is_checkpoint

    if outline.path.is_dir() and any(outline.path.rglob("adapter_config.json")):
        return not (outline.path / "config.json").is_file()
    return outline.path.suffix != ".json" and not is_checkpoint(outline.path)


def leave(since: int = 0) -> None:
    """Remove the outlines that were made, or all after the first ``since``."""
    while len(OUTLINES) > since:
        OUTLINES.pop().close()


def traffic(clients: Iterable[Client] = ()) -> dict[str, int]:
    """What went over the network for the outlines that are there and some other stores; empty where nothing did."""
    total: dict[str, int] = {}
    for one in [
        *(outline.traffic for outline in OUTLINES if outline.traffic is not None),
        *(client.traffic for client in clients),
    ]:
        for name, count in one.to_dict().items():
            total[name] = total.get(name, 0) + count
    return total


def opened() -> int:
    """How many outlines there are, for `leave` and `keep_with`."""
    return len(OUTLINES)


def keep_with(holder: object, since: int) -> None:
    """Let the outlines that were made after the first ``since`` be there as long as something is."""
    for outline in OUTLINES[since:]:
        finalize(holder, outline.close)
    del OUTLINES[since:]


@contextmanager
def visiting() -> Iterator[None]:
    """Let what the block locates be there until its end, and let its errors call it by its address."""
    before = len(OUTLINES)
    try:
        with renaming():
            yield
    finally:
        if len(OUTLINES) > before:
            leave(before)


@contextmanager
def renaming() -> Iterator[None]:
    """Let errors call what is beyond this machine by its address."""
    try:
        yield
    except RegraftError as error:
        raise _by_address(error) from error.__cause__


def _by_address(error: RegraftError) -> RegraftError:
    findings = [
        replace(
            finding,
            message=named(finding.message),
            where=None if finding.where is None else named(finding.where),
            fix=None if finding.fix is None else named(finding.fix),
        )
        for finding in error.findings
    ]
    return error if tuple(findings) == error.findings else type(error)(findings)


def no_address(path: str | os.PathLike[str], what: str) -> None:
    """Raise ``BadInputError`` where an address is given for what has to be on this machine."""
    address = address_of(path)
    if address is not None:
        message = f"{what} works on files of this machine only"
        raise BadInputError(
            Finding("option", message, where=address, fix="give a path of this machine")
        )
