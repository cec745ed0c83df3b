"""From what somebody names on a command line to the adapters and checkpoints that are meant.

lora/                      one adapter
model/                     one checkpoint
loras/                     a folder with any number of both, and of single files that some tool wrote
one.safetensors  two/  ...

`find_sources` has all of them; `resolved` has one of them, together with the names that go with it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from msgspec import Struct

from regraft.checkpoints.source import is_checkpoint
from regraft.dialects.names import SourceName, layout_named, source_named
from regraft.dialects.registry import sniffed
from regraft.errors import BadInputError, Finding, RegraftError
from regraft.layouts.names import Layout
from regraft.rules.book import Rules, only_books, own_rules
from regraft.rules.said import saying
from regraft.sources.places import adapter_of, check_there, locate, visiting
from regraft.storage.formats import is_run
from regraft.values import replace

DEPTH = 4
"""How many folders deep is looked where nothing else is said."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".lora")


class Item(Struct, frozen=True):
    """One adapter or checkpoint."""

    path: Path
    name: str
    """Relative to the folder that was named, or the path's last part; no two items of a list have the same."""


class Resolved(Struct, frozen=True):
    """What somebody named, looked up once."""

    path: Path
    is_adapter: bool
    """Whether it is one adapter or several; otherwise it is a checkpoint."""
    given: SourceName
    """What was said of the source."""
    model: Path | None
    to: Layout | None
    """``None`` where nothing was named."""
    beside: tuple[Path, ...] = ()
    """Other sources."""
    own_rules: tuple[str, ...] = ()
    """Where rule books are from that are not regraft's own."""


@contextmanager
def resolved(
    src: str | os.PathLike[str],
    *,
    to: str | None = None,
    source: str | None = None,
    model: str | os.PathLike[str] | None = None,
    architecture: str | None = None,
    rules: Rules = (),
    whole: bool = False,
    beside: Sequence[str | os.PathLike[str]] = (),
) -> Iterator[Resolved]:
    """What is named, with everything that was said in force until the end: books, family, class, layouts on the way.

    What is beyond this machine has an outline until then; ``whole`` is `locate`'s. ``beside`` are other sources.

    Raises ``BadInputError`` for what is not there, and for unknown names.
    """
    with ExitStack() as stack:
        stack.enter_context(visiting())
        told: list[RegraftError] = []
        path, base, layout, given = Path(src), None, None, SourceName()
        others: list[Path] = []
        found: list[Path] = []
        with _noted(told):
            path = locate(src, whole=whole)
            found.append(path)
        for other in beside:
            with _noted(told):
                others.append(locate(other))
        with _noted(told):
            base = None if model is None else locate(model)
        with _noted(told):
            check_there(*found, *others, model=base)
        no_books: list[RegraftError] = []
        own: tuple[str, ...] = ()
        with _noted(no_books):
            stack.enter_context(only_books(rules))
            own = tuple(own_rules())
        adapter = _has_adapter(path) or not is_checkpoint(path)
        # Books that are not there may be the ones that the layouts are of.
        with _noted(told):
            layout = layout_named(to, adapter=adapter) if to is not None and not no_books else None
        if source is not None and not no_books:
            with _noted(told):
                given = source_named(source, adapter=adapter)
        told = [*no_books, *told]
        if len(told) == 1:
            raise told[0]
        if told:
            raise BadInputError(finding for error in told for finding in error.findings)
        said = saying(architecture=architecture, family=given.family, via=given.via)
        stack.enter_context(said)
        yield Resolved(path, adapter, given, base, layout, tuple(others), own)


@contextmanager
def _noted(told: list[RegraftError]) -> Iterator[None]:
    """Keep an error, so that the others of the same call are told with it."""
    try:
        yield
    except RegraftError as error:
        told.append(error)


def find_sources(
    paths: Iterable[Path], depth: int = DEPTH, *, results: bool = True
) -> tuple[list[Item], list[Path]]:
    """The adapters and checkpoints that paths stand for, and folders that were not looked into.

    These are folders below ``depth``, and links to folders elsewhere.

    A path in which nothing is found is an item itself, so that what is wrong with it is said where it is opened.
    Hidden files and links to folders are passed over. Where there will be no ``results``, what is given twice is
    there once, and items of one name are named by as much of their paths as tells them apart.

    Raises:
        BadInputError: two of them have one name, so that their ``results`` would be one.
    """
    items: list[Item] = []
    deeper: list[Path] = []
    for path in map(adapter_of, paths):
        found = [path] if _is_one(path) else list(_walk(path, depth, deeper, path.resolve()))
        items += [Item(each, _name(each, path)) for each in found or [path]]
    if not results:
        return _told_apart(_each_once(items)), deeper
    twice = _twice(items)
    if twice:
        raise BadInputError(
            Finding(
                "option",
                "several sources have this name: "
                + ", ".join(str(item.path) for item in items if item.name == name),
                key=name,
                fix="give the folder that they are in, or convert them one by one",
            )
            for name in twice
        )
    return items, deeper


def _twice(items: Iterable[Item]) -> list[str]:
    return [name for name, count in Counter(item.name for item in items).items() if count > 1]


def _each_once(items: Iterable[Item]) -> list[Item]:
    """The items, without those that are there already: a folder stands for the weights in it, too."""
    named: dict[Path, Item] = {}
    for item in items:
        named.setdefault(Path(os.path.normpath(item.path.absolute())), item)
    return [
        item
        for path, item in named.items()
        if not (path.match("adapter_model.*") and path.parent in named)
    ]


def _told_apart(items: list[Item]) -> list[Item]:
    """The items, those of one name named by the ends of their paths; no two of them are of one path."""
    twice = set(_twice(items))
    paths = [Path(os.path.normpath(item.path)) for item in items]
    longest = max((len(path.parts) for path in paths), default=0)
    named = items
    for length in range(2, longest + 1):
        if not _twice(named):
            break
        named = [
            replace(item, name=_end(path, length)) if item.name in twice else item
            for item, path in zip(items, paths, strict=True)
        ]
    return named


def _end(path: Path, length: int) -> str:
    return Path(*path.parts[-length:]).as_posix()


def _name(item: Path, root: Path) -> str:
    return item.relative_to(root).as_posix() if item != root else item.resolve().name


def _is_one(path: Path) -> bool:
    """Whether a path is one adapter or one checkpoint, and not a folder with some in it."""
    if not path.is_dir():
        return True
    if _has_adapter(path):
        return True
    if is_checkpoint(path) and not _is_collection(path):
        return True
    return _has_own_files(path) or is_run(path)


def _has_adapter(path: Path) -> bool:
    """Whether a path is the folder of an adapter as PEFT saves it."""
    return (path / "adapter_config.json").is_file() or any(path.glob("adapter_model*"))


def _is_collection(path: Path) -> bool:
    """Whether there is nothing but weights files here, each with a tool's own marks: single files, not shards."""
    files = [each for each in path.iterdir() if each.suffix in _WEIGHTS and each.is_file()]
    named = (path / "config.json").is_file() or any(path.glob("*.index.json"))
    return bool(files) and not named and all(sniffed(each) for each in files)


def _has_own_files(path: Path) -> bool:
    """Whether a tool's folder is recognised by what lies in it, without looking deeper."""
    return any(name != "peft" for name in sniffed(path))


def _walk(folder: Path, depth: int, deeper: list[Path], root: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        inside = sorted((each for each in entries if not each.name.startswith(".")), key=_by_name)
    for each in inside:
        path = Path(each.path)
        if each.is_dir(follow_symlinks=False):
            if _is_one(path):
                yield path
            elif depth > 0:
                yield from _walk(path, depth - 1, deeper, root)
            else:
                deeper.append(path)
        elif each.is_symlink() and each.is_dir():
            if not path.resolve().is_relative_to(root):  # else it is there without the link
                deeper.append(path)
        elif path.suffix in _WEIGHTS and each.is_file():
            yield path


def _by_name(entry: os.DirEntry[str]) -> str:
    return entry.name
