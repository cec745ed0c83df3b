"""Stores by the libraries that speak to them: obstore for S3, GCS, Azure and HTTP, fsspec for what else there is.

Repositories of the hub are in `regraft.storage.hub_network`.

None is imported before an address of its kind is opened. Credentials are found by the libraries themselves, in the
ways of each store's own tools (environment, config files, roles of the machine).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from functools import cached_property
from importlib import import_module
from typing import Any
from urllib.parse import quote, urlsplit

from regraft.errors import BadInputError, Finding
from regraft.storage.objects import BUSY, Client, Found, Store, StoreError, Trouble, asked_wait

_OBSTORE = {"s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "http", "https"}
_STATUS: dict[str, Trouble] = {
    "401": "forbidden",
    "403": "forbidden",
    "404": "missing",
    "412": "changed",
    "416": "changed",
}
PART = 8 << 20
"""Bytes of a part of an upload; a store takes 10,000 parts, and a larger file larger ones."""
_MOST_PARTS = 9_000
_SENDING = 4
"""Parts that are under way at a time."""


def open_store(url: str, query: str = "") -> Client:
    """The store at an address, a folder of objects. Nothing is asked of it yet.

    Args:
        url: the address. Of a web address it is read as such, with escapes; of others every letter is one of the name.
        query: what follows the ``?`` of a web address, such as its signature; it is sent with every request.

    Raises ``BadInputError`` where the library that speaks to it is not installed, or the address is none.
    """
    scheme = urlsplit(url).scheme
    if scheme == "hf":
        from regraft.storage.hub_network import HubStore

        return Client(HubStore(url))
    return Client(_Obstore(url, query) if scheme in _OBSTORE else _Fsspec(url))


def obstore_at(url: str) -> Any:
    """The store of obstore's at an address, for what only its library can do.

    Raises ``BadInputError`` where that is not installed, or the address is none.
    """
    return _Obstore(url).opened


def library(name: str, url: str, extra: str) -> Any:
    """A package that speaks to a store, which ``extra`` installs.

    Raises ``BadInputError`` where it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        message = f"{name} speaks to such addresses, and it is not installed"
        fix = f"pip install '{extra}'"
        raise BadInputError(Finding("package-missing", message, where=url, fix=fix)) from None


class _Obstore(Store):
    """A store of obstore's."""

    def __init__(self, url: str, query: str = "") -> None:
        self.url, self._query = url.rstrip("/"), query
        self._lib = library("obstore", url, "regraft[cloud]")
        self._errors = import_module("obstore.exceptions")
        scheme = urlsplit(url).scheme
        self._is_http = scheme in ("http", "https")
        self.login = f"{_LOGINS.get(scheme[:2], _LOGINS['az'])}; or ask for access"
        # The client asks again, and counts it; only the parts of an upload are sent again by obstore itself.
        self.opened = self._open(0)

    @cached_property
    def _write(self) -> Any:
        return self._open(5)

    def _open(self, retries: int) -> Any:
        options: dict[str, Any] = {"timeout": timedelta(seconds=60)}
        if _is_insecure(self.url):
            options["allow_http"] = True
        stores = import_module("obstore.store")
        make = stores.HTTPStore.from_url if self._is_http else stores.from_url
        address = _web_address(self.url, self._query) if self._is_http else _escaped(self.url)
        try:
            return make(address, client_options=options, retry_config={"max_retries": retries})
        except (self._errors.BaseError, ValueError) as error:
            raise BadInputError(
                Finding("bad-address", _line(error), where=self.url, fix="check the address")
            ) from None

    def read(self, key: str, start: int, end: int) -> tuple[Found, Any]:
        """Bytes of an object."""
        span: Any = {"suffix": -start} if start < 0 else (start, end)
        try:
            got = self._lib.get(self.opened, key, options={"range": span})
            return _seen(got.meta, key), got.bytes()
        except Exception as error:
            if start == 0 and "416" in str(error)[:400]:
                return self._empty(key, error)
            raise self._trouble(error) from None

    def _empty(self, key: str, error: Exception) -> tuple[Found, Any]:
        """An object without bytes, of which no range can be had."""
        with suppress(Exception):
            meta = self._lib.head(self.opened, key)
            if not meta["size"]:
                return _seen(meta, key), b""
        raise self._trouble(error) from None

    def listed(self) -> list[Found] | None:
        """Everything below the folder."""
        if self._is_http:
            return None
        try:
            batches = self._lib.list(self.opened, chunk_size=1000)
            return [_seen(meta, meta["path"]) for batch in batches for meta in batch]
        except Exception as error:
            raise self._trouble(error) from None

    def put(self, key: str, data: bytes, *, create: bool) -> None:
        """Write a small object as a whole."""
        mode = "create" if create else "overwrite"
        try:
            self._lib.put(self.opened, key, data, mode=mode, use_multipart=False)
        except Exception as error:
            raise self._trouble(error) from None

    def stream(self, key: str, parts: Iterator[Any], size: int) -> None:
        """Write an object from parts in order, as a multipart upload; one that fails is aborted."""
        part = max(PART, -(-size // _MOST_PARTS))
        source = _Parts(parts)
        try:
            self._lib.put(self._write, key, source, chunk_size=part, max_concurrency=_SENDING)
        except BaseException as error:
            if (
                source.error is not None
            ):  # where aborting failed as well, that is what the library says
                raise source.error from None
            if isinstance(error, Exception):
                raise self._trouble(error) from None
            raise

    def delete(self, key: str) -> None:
        """Remove an object."""
        try:
            self._lib.delete(self.opened, key)
        except Exception as error:
            raise self._trouble(error) from None

    def busy_for(self, key: str) -> float | None:
        """The seconds for which a store wants to be left alone, by the headers of an answer, which obstore drops."""
        from urllib.error import HTTPError
        from urllib.request import Request, urlopen  # slow to import, and seldom wanted

        try:
            address = self._address(key)
            with urlopen(Request(address, headers={"Range": "bytes=0-0"}), timeout=10):
                return None
        except HTTPError as error:
            with error:
                return asked_wait(dict(error.headers)) if error.code in BUSY else None
        except Exception:
            return None  # it is asked again as if it had said nothing

    def _address(self, key: str) -> str:
        """Where an object can be read by anybody, for a minute."""
        if self._is_http:
            return _web_address(f"{self.url}/{quote(key)}" if key else self.url, self._query)
        return str(self._lib.sign(self.opened, "GET", key, timedelta(minutes=1)))

    def _trouble(self, error: Exception) -> StoreError:
        known = self._errors
        line = _line(error)
        if isinstance(error, FileNotFoundError):
            return StoreError("missing", line)
        if isinstance(error, (known.PermissionDeniedError, known.UnauthenticatedError)):
            return StoreError("forbidden", line)
        if isinstance(error, known.AlreadyExistsError):
            return StoreError("exists", line)
        if isinstance(error, (known.PreconditionError, known.NotModifiedError)):
            return StoreError("changed", line)
        if "non-partial response" in line or "Range request not supported" in line:
            return StoreError("no-ranges", line)
        if isinstance(
            error, (NotImplementedError, known.NotSupportedError, known.InvalidPathError)
        ):
            return StoreError("unfit", line)
        status = re.search(r"status code: ([45]\d\d)", line)
        if status is not None and int(status[1]) in BUSY:
            return StoreError("busy", line)
        if status is not None and status[1] != "408" and status[1] < "500":
            return StoreError(_STATUS.get(status[1], "unfit"), line)
        if isinstance(error, (known.BaseError, OSError)):
            return StoreError("transient", line)
        raise error


def _web_address(url: str, query: str) -> str:
    """A web address with its query.

    Raises ``BadInputError`` for a fragment, which no server gets to see.
    """
    if "#" in url or "#" in query:
        message = "what follows a # is no part of what a web server is asked for"
        fix = "write %23 where it is a part of a name, and leave it out otherwise"
        raise BadInputError(Finding("bad-address", message, where=url, fix=fix))
    return f"{url}?{query}" if query else url


def _escaped(url: str) -> str:
    """The address of a bucket and what is in it, whose every letter is a part of the name, as a URL has it.

    Raises ``BadInputError`` for names that URLs do not keep.

    >>> _escaped("s3://bucket/run #3/50%25")
    's3://bucket/run%20%233/50%2525'
    """
    scheme, _, place = url.partition("://")
    bucket, slash, path = place.partition("/")
    if re.search(r"[?&]sig=", url):
        message = "a shared access signature is no part of such an address"
        fix = (
            "put it into the environment (AZURE_STORAGE_SAS_TOKEN), and leave it out of the address"
        )
        raise BadInputError(Finding("bad-address", message, where=url.partition("?")[0], fix=fix))
    if slash and {"", ".", ".."} & set(path.split("/")):
        message = "an empty part of a name, '.' and '..' mean nothing in a store"
        fix = "give the name without them"
        raise BadInputError(Finding("bad-address", message, where=url, fix=fix))
    return f"{scheme}://{bucket}{slash}{quote(path)}"


class _Parts:
    """Parts of an object, and the error that kept the next from being made."""

    def __init__(self, parts: Iterator[Any]) -> None:
        self._parts = parts
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._parts)
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise


class _Fsspec(Store):
    """A filesystem of fsspec's."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        library("fsspec", url, "fsspec")
        core = import_module("fsspec.core")
        try:
            self._fs, self._root = core.url_to_fs(self.url)
        except ImportError as error:
            message = f"fsspec has no library for such addresses: {error}"
            fix = "install what it names"
            raise BadInputError(Finding("package-missing", message, where=url, fix=fix)) from None
        except (ValueError, OSError) as error:
            raise BadInputError(Finding("bad-address", str(error), where=url)) from None
        self._known: dict[str, Found] = {}

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{key}"

    def read(self, key: str, start: int, end: int) -> tuple[Found, Any]:
        """Bytes of an object; what it is now is asked after them, since no answer says it."""
        try:
            data = self._fs.cat_file(self._path(key), start=start, end=None if start < 0 else end)
            info = self._fs.info(self._path(key))
            if info.get("type") == "directory":
                raise FileNotFoundError(key)
        except Exception as error:
            raise _trouble(error) from None
        return _told(info, key), data

    def listed(self) -> list[Found] | None:
        """Everything below the folder."""
        try:
            self._fs.invalidate_cache()
            rows = self._fs.find(self._root, detail=True)
        except Exception as error:
            raise _trouble(error) from None
        start = len(self._root.rstrip("/")) + 1
        return [_told(info, path[start:]) for path, info in rows.items()]

    def put(self, key: str, data: bytes, *, create: bool) -> None:
        """Write a small object as a whole. Whether there is one is asked before, which is no lock."""
        try:
            if create and self._fs.exists(self._path(key)):
                raise StoreError("exists", "it is there")
            self._fs.pipe_file(self._path(key), data)
        except StoreError:
            raise
        except Exception as error:
            raise _trouble(error) from None

    def stream(self, key: str, parts: Iterator[Any], size: int) -> None:
        """Write an object from parts in order."""
        try:
            self._fs.makedirs(self._path(key).rpartition("/")[0], exist_ok=True)
            file = self._fs.open(self._path(key), "wb", block_size=PART)
        except Exception as error:
            raise _trouble(error) from None
        try:
            for part in parts:
                file.write(part)
            file.close()
        except BaseException as error:
            with suppress(Exception):
                file.discard()
            if isinstance(error, OSError):
                raise _trouble(error) from None
            raise

    def delete(self, key: str) -> None:
        """Remove an object."""
        try:
            self._fs.rm_file(self._path(key))
        except Exception as error:
            raise _trouble(error) from None


def _seen(meta: Any, key: str) -> Found:
    version = meta["version"] or meta["e_tag"] or meta["last_modified"].isoformat()
    return Found(key, int(meta["size"]), _bare(str(version)))


def _bare(tag: str) -> str:
    """An ETag without its quotes, which Azure leaves out where it lists."""
    return tag[1:-1] if len(tag) > 1 and tag[0] == tag[-1] == '"' else tag


_VERSIONS = ("blob_id", "ETag", "etag", "sha256", "md5Hash", "LastModified", "mtime", "created")
"""What filesystems call what tells two versions apart."""


def _told(info: dict[str, Any], key: str) -> Found:
    version = next((info[name] for name in _VERSIONS if info.get(name) is not None), "")
    if isinstance(
        version, datetime
    ):  # some say it in one way where they list, and in another elsewhere
        version = version.timestamp()
    return Found(key, int(info.get("size") or 0), str(version))


def _trouble(error: Exception) -> StoreError:
    """Why a filesystem of fsspec's gave no answer."""
    answer = getattr(error, "response", None)
    status = getattr(answer, "status_code", None) or getattr(error, "status", None)
    name = type(error).__name__
    if status in BUSY:
        headers = getattr(answer, "headers", None) or getattr(error, "headers", None)
        return StoreError("busy", _line(error), asked_wait(headers or {}) or 0.0)
    if isinstance(error, PermissionError) or status in (401, 403) or "Gated" in name:
        return StoreError("forbidden", _line(error))
    if isinstance(error, FileNotFoundError) or status == 404:
        return StoreError("missing", _line(error))
    if isinstance(error, FileExistsError):
        return StoreError("exists", _line(error))
    if isinstance(error, (NotImplementedError, ValueError, IsADirectoryError)):
        return StoreError("unfit", _line(error))
    if isinstance(error, OSError) or status is not None:
        return StoreError("transient", _line(error))
    raise error


_PREAMBLE = re.compile(r"^Generic \w+ error: (Error performing \w+ \S+ in \S+ - )?")
"""What obstore says before it comes to the point; the address stands in the error that is made of it."""


def _line(error: Exception) -> str:
    """What an error says, in one line and without what could be a secret in an address."""
    text = str(error).strip()
    line = _PREAMBLE.sub("", text.split("\n")[0]).rstrip(": ") or type(error).__name__
    told = re.search(r"<Code>(\w+)</Code>\s*(?:<Message>([^<\n]*))?", text[:4000])
    if told is not None:
        line = f"{line.partition('<')[0].rstrip(': ')}: {': '.join(filter(None, told.groups()))}"
    return re.sub(
        r"([?&][^=\s]*(sig|token|key|credential)[^=\s]*=)[^&\s]+", r"\1...", line, flags=re.I
    )


_LOGINS = {
    "s3": "run 'aws configure', or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; AWS_REGION says where it is",
    "gs": "run 'gcloud auth application-default login', or set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or run 'az login'",
    "ht": "check the address; give one that is signed, or the store's own (s3://, gs://, az://, hf://)",
}
"""By the first letters of a scheme, what lets somebody in."""
_ENDPOINTS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
    "GOOGLE_BASE_URL",
)
"""What names a server of one's own in the environment."""


def _is_insecure(url: str) -> bool:
    """Whether an address, or the server that the environment names for it, is plain HTTP."""
    if urlsplit(url).scheme == "http":
        return True
    return any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
