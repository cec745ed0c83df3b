"""Converting a checkpoint into an object store in parts, by processes that share nothing but the store.

Every weights file is an upload in parts, and a piece of it is a part: the store itself keeps what has come, so work
that died goes on from that. In the stage, which is a folder in the store, stands how the uploads are called:

STAGE/job-ID/job            what is being made
STAGE/job-ID/uploads/F.K    the id of file F's upload; K counts those that were ended by somebody else
STAGE/job-ID/committing     a commit has found everything, and nothing in the way
STAGE/job-ID/completing/F   the ETag that file F will have, where that is known before it can be seen
STAGE/job-ID/complete/F     file F can be seen
STAGE/job-ID/ended          the job is over, and its notes are being removed
STAGE/committed             the job that was committed here

Such a note is written only where there is none, so of two processes that begin an upload both use one. What can be seen
of a result, and when, is what `regraft.checkpoints.upload` says: nothing before the commit, the index last.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import count
from pathlib import PurePosixPath

import msgspec
import numpy as np

from regraft.checkpoints.prepared import Prepared
from regraft.checkpoints.sharding import OutFile
from regraft.checkpoints.shares import Piece, cut, pieces_of
from regraft.checkpoints.staging import check_complete, committed_already, job_of
from regraft.checkpoints.stream import Advance, Stream
from regraft.checkpoints.upload import check_free, place, plain
from regraft.errors import BadInputError, Finding
from regraft.report import PartReport
from regraft.storage.objects import Client
from regraft.storage.scheduler import Share
from regraft.storage.stage import Job
from regraft.storage.stores import open_store
from regraft.storage.threads import Pool
from regraft.storage.uploads import Parts, Uploads, open_uploads
from regraft.values import replace

SIZE = 1 << 23
"""Bytes of a piece; S3 and GCS take no smaller parts than 5 MiB, and no more than 10,000."""
_MOST = 9_000
_AT_ONCE = 16
_NOTE = 1 << 24


def size_of(files: Collection[OutFile]) -> int:
    """Bytes of a piece."""
    return max(SIZE, -(-max(file.size for file in files) // _MOST))


class RemoteStage:
    """A stage in a store that a process takes part in.

    Raises ``BadInputError`` where it is another job's, or no answer can be had.
    """

    def __init__(self, client: Client, target: Client, ready: Prepared) -> None:
        self.client, self.target, self.ready = client, target, ready
        self.url = client.store.url
        if f"{self.url}/".startswith(f"{target.store.url}/"):
            message = "it is inside the folder of the result"
            fix = f"give one beside it, such as {target.store.url}.stage"
            raise BadInputError(Finding("stage-place", message, where=self.url, fix=fix))
        self.uploads = open_uploads(target)
        self.files = ready.layout.files
        self.job: Job = replace(job_of(ready, size_of(self.files)), target=plain(target.store.url))
        self.pieces = cut(self.files, self.job.piece)
        self.is_committed = False
        self._join()

    def _join(self) -> None:
        names = [row.key for row in self.client.listed() or []]
        jobs = {name.partition("/")[0] for name in names if name.startswith("job-")}
        strange = [name for name in names if not name.startswith(("job-", "committed"))]
        if strange:
            message = (
                f"it is to hold what is staged and nothing else, and has {', '.join(strange[:5])}"
            )
            fix = "give --stage a folder of its own"
            raise BadInputError(Finding("stage-place", message, where=self.url, fix=fix))
        notes = [f"{job}/job" for job in sorted(jobs - {self.job.name})]
        for name in ["committed", *notes]:
            data = self._read(name)
            other = None if data is None else msgspec.json.decode(data, type=Job)
            if other is not None and other.name != self.job.name:
                raise self.job.against(other, self.url)
            self.is_committed |= other is not None
        if not self.is_committed:
            if f"{self.job.name}/ended" in names:  # whoever ended it died meanwhile
                self.forget()
            self.client.create(f"{self.job.name}/job", msgspec.json.encode(self.job))

    def _read(self, name: str) -> bytes | None:
        found = self.client.first(name, _NOTE)
        return None if found is None else bytes(found[1])

    def find(self, number: int, *, make: bool) -> tuple[str, Parts] | None:
        """The upload of a file and its parts; ``None`` where the file is complete, or nobody has begun and is to."""
        key = self.files[number].name
        if self._read(f"{self.job.name}/complete/{number}") is not None:
            return None
        for attempt in count():
            name = f"{self.job.name}/uploads/{number}.{attempt}"
            known = self._read(name)
            if known is None:
                if not make:
                    return None
                known = self._begin(key, name)
            parts = self.uploads.parts(key, known.decode())
            if parts is not None:
                return known.decode(), parts
            if self._appeared(number):
                self.note_complete(number)
                return None
        raise AssertionError("counting does not end")

    def _begin(self, key: str, note: str) -> bytes:
        """Begin a file's upload and note its id; that of somebody else who was first.

        Whoever ends the job says so before looking for uploads, and here the note is written before looking for that:
        an upload of a job that is over is ended by one of the two.
        """
        own = self.uploads.begin(key)
        known = b""
        try:
            known = self.client.create(note, own.encode())
            if self._is_over():
                known = b""
                self.client.delete(note)
                raise self.gone()
        finally:
            if known != own.encode():
                self.uploads.abort(key, own)
        return known

    def _is_over(self) -> bool:
        """Whether the job was ended or committed by somebody else."""
        return (
            self._read(f"{self.job.name}/job") is None
            or self._read(f"{self.job.name}/ended") is not None
        )

    def gone(self) -> BadInputError:
        """The error where the job was ended meanwhile."""
        message = (
            "the upload was ended meanwhile: by --abort, by a commit, or by the store's own rules"
        )
        fix = "run the part again, if it is still wanted"
        return BadInputError(Finding("stage-gone", message, where=self.url, fix=fix))

    def check_there(self) -> None:
        """Check that the job goes on: not every store says of what is sent that nobody waits for it.

        Raises ``BadInputError``.
        """
        if self._is_over():
            raise self.gone()

    def is_complete(self, number: int) -> bool:
        """Whether a file can be seen."""
        return self._read(f"{self.job.name}/complete/{number}") is not None

    def _appeared(self, number: int) -> bool:
        """Whether a commit that died let a file appear and could not say so any more."""
        expected = self._read(f"{self.job.name}/completing/{number}")
        if not expected:
            return False
        file = self.files[number]
        return self.uploads.appeared(file.name, file.size, expected.decode())

    def note_complete(self, number: int) -> None:
        """Note that a file can be seen."""
        self.client.put(f"{self.job.name}/complete/{number}", b"")

    def here(self, piece: Piece, parts: Parts) -> bool:
        """Whether a piece is among the parts that have come."""
        return parts.get(piece.number + 1, (-1, ""))[0] == piece.size

    def look(self, *, make: bool = False) -> list[tuple[str, Parts] | None]:
        """The uploads of all files."""
        with Pool(_AT_ONCE, "regraft-look") as pool:
            return list(
                pool.map(lambda number: self.find(number, make=make), range(len(self.files)))
            )

    def forget(self) -> None:
        """End the uploads that are left, and remove every note but that of the commit."""
        forget(self.client, self.uploads, {str(n): f.name for n, f in enumerate(self.files)})


def forget(client: Client, uploads: Uploads | None, names: dict[str, str]) -> None:
    """End uploads and remove the notes of jobs; ``names`` are those of the files, by their numbers."""
    jobs = {row.key.partition("/")[0] for row in client.listed() or []}
    ended = [f"{job}/ended" for job in sorted(jobs) if job.startswith("job-")]
    for key in ended:
        client.put(key, b"")
    rows = sorted(client.listed() or [], key=lambda row: "/uploads/" not in row.key)
    for row in rows:
        folder, _, rest = row.key.partition("/")
        if not folder.startswith("job-") or rest == "ended":
            continue
        number = PurePosixPath(rest).name.partition(".")[0]
        if rest.startswith("uploads/") and uploads is not None and number in names:
            found = client.first(row.key, _NOTE)
            if found is not None:
                uploads.abort(names[number], bytes(found[1]).decode())
        client.delete(row.key)
    for key in ended:
        client.delete(key)


def send_part(
    ready: Prepared,
    target: Client,
    stage: Client,
    share: Share,
    jobs: int,
    *,
    overwrite: bool,
    advance: Advance,
    name: str | None,
) -> PartReport:
    """Make and send what one part has to send and nobody has sent yet.

    Raises ``BadInputError``.
    """
    staged = RemoteStage(stage, target, ready)
    mine = pieces_of(staged.pieces, share)
    report = PartReport(share.number, share.count, len(mine), sum(piece.size for piece in mine))
    if staged.is_committed:
        report.before = len(mine)
        return report
    if staged._read(f"{staged.job.name}/committing") is None:
        check_free(target, overwrite=overwrite, name=name)
    with Stream(ready, jobs) as stream:
        for number in sorted({piece.file for piece in mine}):
            its = [piece for piece in mine if piece.file == number]
            found = staged.find(number, make=True)
            if found is None:
                report.before += len(its)
                advance(sum(piece.size for piece in its))
                continue
            upload, parts = found
            wanted = [piece for piece in its if not staged.here(piece, parts)]
            report.before += len(its) - len(wanted)
            advance(sum(piece.size for piece in its) - sum(piece.size for piece in wanted))
            _send(staged, stream, number, upload, wanted, advance)
    for file in ready.source.files:
        file.stamp.check()
    staged.check_there()
    report.left = sum(
        found is None or not staged.here(piece, found[1]) for piece, found in _with_uploads(staged)
    )
    return report


def _send(
    staged: RemoteStage,
    stream: Stream,
    number: int,
    upload: str,
    pieces: Collection[Piece],
    advance: Advance,
) -> None:
    file = staged.files[number]

    def make(start: int, stop: int) -> None:
        data = np.concatenate([part for _, part in stream.make(file, start, stop)])
        if not staged.uploads.send(file.name, upload, start // staged.job.piece + 1, data.data):
            raise staged.gone()
        advance(len(data))

    for _ in stream.each(make, ((piece.start, piece.stop) for piece in pieces)):
        pass


def _with_uploads(
    staged: RemoteStage,
) -> list[tuple[Piece, tuple[str, Parts] | None]]:
    """Every piece of a file that is not complete, with the file's upload."""
    uploads = staged.look()
    complete = {
        number
        for number, found in enumerate(uploads)
        if found is None and staged.is_complete(number)
    }
    return [(piece, uploads[piece.file]) for piece in staged.pieces if piece.file not in complete]


def commit_uploads(
    ready: Prepared, target: Client, stage: Client, *, overwrite: bool, name: str | None
) -> None:
    """Check that all parts are there and nothing changed, and let the result appear.

    A commit that was killed is done again by the next. Raises ``BadInputError``.
    """
    staged = RemoteStage(stage, target, ready)
    if staged.is_committed:
        raise committed_already(staged.url, target.store.url)
    rows = _with_uploads(staged)
    missing = [p for p, found in rows if found is None or not staged.here(p, found[1])]
    check_complete(ready, missing, len(staged.pieces), staged.url)
    for file in ready.source.files:
        file.stamp.check()
    note = f"{staged.job.name}/committing"
    if staged._read(note) is None:
        check_free(target, overwrite=overwrite, name=name)
        stage.create(note, b"")
    uploads = {piece.file: found for piece, found in rows if found is not None}
    numbers = {file.name: number for number, file in enumerate(staged.files)}

    def send(file: OutFile) -> None:
        number = numbers[file.name]
        if number not in uploads:
            return
        upload, parts = uploads[number]
        etags = {part: etag for part, (_, etag) in parts.items()}
        stage.put(f"{staged.job.name}/completing/{number}", staged.uploads.tag(etags).encode())
        staged.uploads.complete(file.name, upload, etags)
        staged.note_complete(number)

    there = [row.key for row in target.listed() or []] if name is None else []
    complete = {file.name for file in staged.files if numbers[file.name] not in uploads}
    kept = set(numbers) if staged.uploads.go_with_object else complete
    place(ready, target, [k for k in there if k not in kept], send, create=False, name=name)
    stage.put("committed", msgspec.json.encode(staged.job))
    staged.forget()


def abort_uploads(target: Client, stage: Client) -> bool:
    """End what is staged in a store; whether there was anything.

    Raises ``BadInputError``.
    """
    rows = stage.listed() or []
    for row in rows:
        if row.key.partition("/")[2] != "job":
            continue
        found = stage.first(row.key, _NOTE)
        if found is None:
            continue
        job = msgspec.json.decode(bytes(found[1]), type=Job)
        is_here = job.target in ("", plain(target.store.url))
        uploads = open_uploads(target if is_here else open_store(job.target))
        forget(stage, uploads, {str(number): name for number, name in enumerate(job.made)})
    forget(stage, None, {})
    if any(row.key == "committed" for row in rows):
        stage.delete("committed")
    return bool(rows)
