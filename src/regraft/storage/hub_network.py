"""Repositories of Hugging Face's hub over the network, by huggingface_hub: reading by ranges, and pushing a result.

The server (``HF_ENDPOINT``), the token and being offline are what huggingface_hub says they are. What is read is of one
commit, the one that the revision was at when it was first asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from regraft.errors import BadInputError, Finding
from regraft.errors.extras import install_line
from regraft.storage.hub import is_offline, parse_id
from regraft.storage.objects import BUSY, Client, Found, Store, StoreError, Trouble, asked_wait

_STATUS: dict[int, Trouble] = {
    401: "forbidden",
    403: "forbidden",
    404: "missing",
    416: "changed",
}
_TIMEOUT = 60.0


def is_installed() -> bool:
    """Whether huggingface_hub is there."""
    return find_spec("huggingface_hub") is not None


def _library(where: str) -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError:
        message = "huggingface_hub speaks to the hub, and it is not installed"
        fix = install_line("huggingface_hub")
        raise BadInputError(Finding("package-missing", message, where=where, fix=fix)) from None


class HubStore(Store):
    """A repository at a revision, which cannot be written to."""

    login = (
        "check the name; log in with 'hf auth login' or set HF_TOKEN; where the model is gated, ask for access on its"
        " page"
    )

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        named = parse_id(self.url)
        if named is None:
            message = "an address of the hub is hf://ORG/NAME or hf://ORG/NAME@REVISION"
            raise BadInputError(Finding("bad-address", message, where=url, fix="give one such"))
        self.repository, self.revision = named
        self._hub = _library(url)
        self._files = import_module("huggingface_hub.hf_api")
        self._utils = import_module("huggingface_hub.utils")
        self._api = self._hub.HfApi()

    @cached_property
    def _commit(self) -> str:
        info = self._asked(lambda: self._api.repo_info(self.repository, revision=self.revision))
        return str(info.sha)

    def read(self, key: str, start: int, end: int) -> tuple[Found, Any]:
        """Bytes of a file."""
        commit = self._commit
        span = f"bytes={start}" if start < 0 else f"bytes={start}-{end - 1}"
        place = f"{quote(self.repository)}/resolve/{quote(commit, safe='')}/{quote(key)}"
        headers = {**self._utils.build_hf_headers(), "Range": span, "Accept-Encoding": "identity"}

        def get() -> Any:
            session = self._utils.get_session()
            url = f"{self._api.endpoint}/{place}"
            answer = session.get(url, headers=headers, timeout=_TIMEOUT, follow_redirects=True)
            if answer.status_code == 416 and start == 0:
                return answer
            self._utils.hf_raise_for_status(answer)
            return answer

        answer = self._asked(get)
        if answer.status_code == 416:  # a file without bytes has no ranges
            return Found(key, 0, commit), b""
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
        if answer.status_code != 206 or match is None:
            size = len(answer.content)
            if start == 0 and size < end:  # a file that ends before may come as a whole
                return Found(key, size, commit), answer.content
            raise StoreError("no-ranges", f"the answer has status {answer.status_code}")
        if start >= 0 and int(match[1]) != start:
            raise StoreError("transient", f"bytes from {match[1]} came, and not from {start}")
        return Found(key, int(match[3]), commit), answer.content

    def listed(self) -> list[Found] | None:
        """Everything in the repository."""
        commit = self._commit
        rows = self._asked(
            lambda: list(self._api.list_repo_tree(self.repository, revision=commit, recursive=True))
        )
        files = [row for row in rows if isinstance(row, self._files.RepoFile)]
        return [Found(row.path, int(row.size), commit) for row in files]

    def put(self, key: str, data: bytes, *, create: bool) -> None:
        """Nothing is written file by file."""
        raise StoreError("unfit", "the hub takes whole results: convert into a folder with --push")

    def stream(self, key: str, parts: Iterator[Any], size: int) -> None:
        """Nothing is written file by file."""
        self.put(key, b"", create=False)

    def delete(self, key: str) -> None:
        """Nothing is removed."""
        self.put(key, b"", create=False)

    def _asked(self, ask: Any) -> Any:
        try:
            return ask()
        except StoreError:
            raise
        except Exception as error:
            raise trouble_of(error) from None


def trouble_of(error: Exception) -> StoreError:
    """Why the hub gave no answer."""
    line = str(error).strip().split("\n")[0] or type(error).__name__
    name = type(error).__name__
    answer = getattr(error, "response", None)
    status = getattr(answer, "status_code", None)
    if name == "GatedRepoError":
        return StoreError("forbidden", "it is gated, and nobody is let in without access to it")
    if name == "DisabledRepoError":
        return StoreError("forbidden", line)
    if name in ("OfflineModeIsEnabled", "LocalTokenNotFoundError"):
        return StoreError("forbidden", line)
    if answer is not None and status in BUSY:
        return StoreError("busy", line, asked_wait(answer.headers) or 0.0)
    if status == 401:
        line = f"{status}, which the hub says of what is private and of what there is not"
    if status in _STATUS:
        return StoreError(_STATUS[status], line)
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return StoreError("unfit", line)
    module = type(error).__module__.partition(".")[0]
    if status is not None or isinstance(error, OSError) or module.startswith("http"):
        return StoreError("transient", line)
    raise error


def check_push(repository: str, *, offline: bool) -> None:
    """Check what can be checked before a result is made: the name, the package, and who is asking.

    Raises ``BadInputError``.
    """
    if parse_id(repository) is None or "@" in repository or repository.startswith("hf:"):
        message = f"a repository is ORG/NAME, and this is {repository[:200]!r}"
        fix = "give --push ORG/NAME, your name or that of an organization first"
        raise BadInputError(Finding("bad-address", message, fix=fix))
    if offline or is_offline():
        message = "the network is not to be used (--offline, HF_HUB_OFFLINE), and --push needs it"
        fix = "leave --push out, and run 'hf upload' on the result where there is a network"
        raise BadInputError(Finding("offline", message, where=repository, fix=fix))
    hub = _library(repository)
    client = Client(HubStore(f"hf://{repository}"))
    _once(client, lambda: hub.HfApi().whoami())


def _once(client: Client, ask: Any) -> Any:
    def once() -> Any:
        try:
            return ask()
        except Exception as error:
            raise trouble_of(error) from None

    try:
        return client.ask("", once)
    except StoreError as error:
        raise client.failed("", error) from None


def push(
    repository: str, files: Mapping[str, Path | bytes], message: str, revision: str | None = None
) -> str:
    """Upload files to a repository in one commit, which appears as a whole; where it is then.

    The repository is made, if it is not there. What else is in it stays, but for weights of another name.

    Raises ``BadInputError``.
    """
    hub = _library(repository)
    api, client = hub.HfApi(), Client(HubStore(f"hf://{repository}"))
    _once(client, lambda: api.create_repo(repository, exist_ok=True))
    there = _once(
        client, lambda: [row.path for row in api.list_repo_tree(repository, recursive=True)]
    )
    added = [
        hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=data)
        for name, data in files.items()
    ]
    stale = [hub.CommitOperationDelete(path_in_repo=name) for name in replaced(there, list(files))]
    info = _once(
        client,
        lambda: api.create_commit(
            repository, [*added, *stale], commit_message=message, revision=revision
        ),
    )
    return str(info.commit_url)


_WEIGHTS = re.compile(r"(pytorch_)?model[^/]*\.(safetensors|bin)(\.index\.json)?")


def replaced(there: Sequence[str], files: Sequence[str]) -> list[str]:
    """Weights that are in a repository and would lie beside new ones.

    >>> replaced(["model-00001-of-00002.safetensors", "README.md"], ["model.safetensors"])
    ['model-00001-of-00002.safetensors']
    """
    if not any(_WEIGHTS.fullmatch(name) for name in files):
        return []
    return [name for name in there if _WEIGHTS.fullmatch(name) and name not in files]
