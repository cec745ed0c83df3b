"""Converting a checkpoint into a store: nothing is kept on this machine.

A store cannot rename a folder, so a result cannot appear as a whole. What can be seen, and when:

- a weights file can be seen once it is complete, and never before;
- the index, or the only weights file where there is no index, is written last, when everything else is there;
- where something is replaced, the old index goes first: whoever opens the checkpoint in between finds none.

So a reader that goes by the index finds nothing or everything; one that lists the folder sees files come.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import BinaryIO

from regraft.checkpoints.prepared import Prepared
from regraft.checkpoints.sharding import OutFile
from regraft.checkpoints.source import CONFIG, INDEX, Source
from regraft.checkpoints.stream import Advance, Stream
from regraft.errors import BadInputError, Finding
from regraft.report import count_in_words
from regraft.storage.objects import Client
from regraft.storage.probe import open_regular
from regraft.storage.stand_ins import remote_at

_REPLACED = re.compile(r"[^/]*\.(safetensors|bin)(\.index\.json)?")
"""What of an older checkpoint must not lie beside a new one."""
_LARGEST = 1 << 27
"""Bytes of a file beside the weights that is sent as a whole."""


def check_free(client: Client, *, overwrite: bool, name: str | None = None) -> list[str]:
    """What is in the place of a result: of one file with a ``name``, or in the folder.

    Raises ``BadInputError`` where there is anything, and it may not be replaced; and where nothing can be written.
    """
    rows = client.listed()
    if rows is None:
        message = "a web server is read from, and nothing can be written to it"
        fix = "give a folder of this machine, or one in a store, such as s3://bucket/model"
        raise BadInputError(Finding("bad-address", message, where=client.store.url, fix=fix))
    there = [row.key for row in rows if name is None or row.key == name]
    if there and not overwrite:
        many = count_in_words(len(there), "file")
        message = f"something is at the address already ({many}, such as {there[0][:200]})"
        raise BadInputError(
            Finding(
                "destination-exists",
                message,
                where=client.store.url,
                fix="pass --overwrite, or choose another place",
            )
        )
    return there


def check_apart(source: Source, client: Client, name: str | None) -> None:
    """Check that a result comes neither over the source, while that is read, nor into its folder.

    Raises ``BadInputError``.
    """
    to = plain(client.store.url)
    for file in source.files:
        remote = remote_at(file.path)
        if remote is None:
            continue
        where = plain(remote.where)
        folder = where.rpartition("/")[0]
        if to == folder and (name is None or f"{to}/{name}" == where):
            code, message = "destination-is-source", "the place to write is the one that is read"
        elif f"{to}/".startswith(f"{folder}/") and to != folder and source.root.is_dir():
            code, message = "destination-in-source", f"it is inside {folder}, which is read"
        else:
            continue
        fix = "choose another place, and remove the old one when the result is verified"
        raise BadInputError(Finding(code, message, where=client.where(name or ""), fix=fix))


def plain(address: str) -> str:
    """An address, in the one of two spellings that most tools have."""
    return re.sub("^s3a:", "s3:", address)


def upload(
    ready: Prepared,
    client: Client,
    jobs: int,
    *,
    overwrite: bool,
    advance: Advance,
    name: str | None = None,
) -> None:
    """Make a result's files and send them to a store; with a ``name`` the one file alone.

    Raises ``BadInputError``. What was sent before stays then, without the index.
    """
    there = check_free(client, overwrite=overwrite, name=name)
    with Stream(ready, jobs, advance) as stream:

        def send(file: OutFile) -> None:
            client.stream(file.name, _parts(stream, file), file.size)

        place(ready, client, there, send, create=not overwrite, name=name)


def place(
    ready: Prepared,
    client: Client,
    there: Collection[str],
    send: Callable[[OutFile], None],
    *,
    create: bool,
    name: str | None = None,
) -> None:
    """Let a result appear: ``send`` makes one weights file visible; what says that all is there comes last.

    What is ``there`` already is replaced. Raises ``BadInputError``.
    """
    first = {file.name for file in ready.layout.files} | {INDEX}
    for key in there:
        if key == INDEX or (ready.layout.index is None and key in first):
            client.delete(key)
    files = ready.layout.files
    last = files[-1] if ready.layout.index is None else None
    for file in files[: len(files) - (last is not None)]:
        send(file)
    if name is None:
        _send_others(ready, client)
    if last is not None:
        send(last)
    for key in there:
        if _REPLACED.fullmatch(key) and key not in first:
            client.delete(key)
    if ready.layout.index is not None:
        client.put(INDEX, ready.layout.index, create=create)


def _parts(stream: Stream, file: OutFile) -> Iterator[memoryview]:
    for _, data in stream.run(file):
        yield data.data


def _send_others(ready: Prepared, client: Client) -> None:
    """Everything beside the weights."""
    for path, text in ready.written.items():
        client.put(path, text)
    if ready.config is not None:
        client.put(CONFIG, ready.config)
    others = {path.as_posix(): ready.source.root / path for path in ready.source.others}
    for key, origin in {**others, **ready.copied}.items():
        if key == CONFIG and ready.config is not None:
            continue
        file, size = open_regular(origin)
        with file:
            if size <= _LARGEST:
                client.put(key, file.read())
            else:
                client.stream(key, chunks_of(file), size)


def chunks_of(file: BinaryIO) -> Iterator[bytes]:
    """An open file in parts."""
    while data := file.read(1 << 23):
        yield data
