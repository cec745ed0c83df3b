"""Uploads in parts, of which any process that knows their ids may send any part: to S3, GCS and Azure.

A part that is sent again replaces the one before. Nothing can be seen of an object until its upload is completed.

S3 and GCS take the same requests (https://cloud.google.com/storage/docs/multipart-uploads), which boto3 sends. Azure
has blocks of a blob with ids of one's own, and lists of blocks that make the blob (Put Block, Put Block List:
https://learn.microsoft.com/rest/api/storageservices/put-block), which azure-storage-blob sends.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib import import_module
from typing import Any, Protocol
from urllib.parse import quote

from regraft.errors import BadInputError, Finding
from regraft.storage.objects import BUSY, Client, StoreError, Trouble, asked_wait
from regraft.storage.stores import library, obstore_at

_TROUBLES: dict[int, Trouble] = {
    401: "forbidden",
    403: "forbidden",
    404: "missing",
    408: "transient",
    **dict.fromkeys(BUSY, "busy"),
}
_TIMEOUT = 60
"""Seconds that an answer may take."""
_SIGNED = timedelta(hours=6)
"""How long an address that Azure's blobs are written at is good for."""
_RENEWED = 3600.0
"""After how many seconds another is made."""
_SAS_TOKENS = ("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY")
_ACCOUNT_KEYS = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY")
_ACCOUNTS = ("AZURE_STORAGE_ACCOUNT_NAME",)
_ENDPOINTS = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
"""The variables by which obstore is told of Azure (https://docs.rs/object_store, `AzureConfigKey`)."""
_GOOGLE = "https://storage.googleapis.com"
_GOOGLE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"

Parts = dict[int, tuple[int, str]]
"""Of the parts of an upload that have come, by their numbers, their size in bytes and what names them."""


class Uploads(Protocol):
    """The uploads to a folder in a store. Every method raises ``BadInputError`` where no answer can be had."""

    go_with_object: bool
    """Whether an upload is lost where an object of its name is removed."""

    def begin(self, key: str) -> str:
        """Begin an upload; its id."""

    def send(self, key: str, upload: str, number: int, data: Any) -> bool:
        """Send a part; parts count from 1. Whether the upload is still there, where the store knows."""

    def parts(self, key: str, upload: str) -> Parts | None:
        """The parts that have come; ``None`` where there is no such upload."""

    def tag(self, names: dict[int, str]) -> str:
        """The ETag that the object of the parts with these names will have; empty where nobody can know it before."""
        return ""

    def appeared(self, key: str, size: int, tag: str) -> bool:
        """Whether there is an object of this size and this ETag."""
        return False

    def complete(self, key: str, upload: str, names: dict[int, str]) -> None:
        """Let the object appear, of the parts with these names."""

    def abort(self, key: str, upload: str) -> None:
        """End an upload, whose parts are removed where the store can; it may be gone."""


def open_uploads(client: Client) -> Uploads:
    """The uploads to the folder of a client.

    Raises ``BadInputError`` where a library is not installed, or the store has no uploads in parts.
    """
    url = client.store.url
    scheme, _, place = url.partition("://")
    if scheme in ("s3", "s3a", "gs"):
        return _S3(client, place, is_google=scheme == "gs")
    if scheme in ("az", "azure", "adl", "abfs", "abfss"):
        return _Azure(client)
    message = "work in parts writes to S3, GCS or Azure, or to a folder that all machines see"
    fix = "write to one of these, or convert to this address without --stage"
    raise BadInputError(Finding("option", message, where=url, fix=fix))


def _known(status: int) -> Trouble:
    return _TROUBLES.get(status, "unfit" if 400 <= status < 500 else "transient")


def _ask(client: Client, key: str, once: Callable[[], Any], *, gone: bool = False) -> Any:
    """Ask a store; ``None`` where an upload is ``gone`` that may be."""
    try:
        return client.ask(key, once)
    except StoreError as error:
        if gone and error.trouble == "missing":
            return None
        raise client.failed(key, error) from None


class _S3(Uploads):
    """Multipart uploads of S3 and GCS, by boto3."""

    go_with_object = False

    def __init__(self, client: Client, place: str, *, is_google: bool) -> None:
        self.client = client
        self.bucket, _, self.prefix = place.partition("/")
        url = client.store.url
        boto3 = library("boto3", url, "regraft[gcs]" if is_google else "regraft[s3]")
        self._errors = import_module("botocore.exceptions")
        # Threads share it. What is asked again is counted, and so asked again by the client.
        settings: dict[str, Any] = {
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 64,
            "read_timeout": _TIMEOUT,
        }
        config = import_module("botocore.config").Config
        if is_google:
            self._s3 = _google_client(boto3, config, settings, url)
        else:
            self._s3 = boto3.client("s3", config=config(**settings))

    def begin(self, key: str) -> str:
        """Begin an upload; its id."""
        return str(self._ask("create_multipart_upload", key)["UploadId"])

    def send(self, key: str, upload: str, number: int, data: Any) -> bool:
        """Send a part."""
        body = bytes(data)
        options: dict[str, Any] = {"UploadId": upload, "PartNumber": number, "Body": body}
        sent = self._ask("upload_part", key, gone=True, **options)
        if sent is not None:
            self.client.traffic.add(written=len(body))
        return sent is not None

    def parts(self, key: str, upload: str) -> Parts | None:
        """The parts that have come, which ETags name."""
        parts: Parts = {}
        after = 0
        while True:
            options: dict[str, Any] = {"UploadId": upload, "PartNumberMarker": after}
            page = self._ask("list_parts", key, gone=True, **options)
            if page is None:
                return None
            for part in page.get("Parts", ()):
                parts[part["PartNumber"]] = part["Size"], part["ETag"]
            if not page.get("IsTruncated"):
                return parts
            after = page["NextPartNumberMarker"]

    def tag(self, names: dict[int, str]) -> str:
        """The ETag that S3 gives where parts are named by their MD5: that of all of these, and how many there are."""
        digests = [names[number].strip('"') for number in sorted(names)]
        if not all(re.fullmatch("[0-9a-f]{32}", digest) for digest in digests):
            return ""
        whole = hashlib.md5(bytes.fromhex("".join(digests)), usedforsecurity=False)
        return f"{whole.hexdigest()}-{len(digests)}"

    def appeared(self, key: str, size: int, tag: str) -> bool:
        """Whether there is an object of this size and this ETag."""
        seen = self._ask("head_object", key, gone=True)
        return seen is not None and (seen["ContentLength"], seen["ETag"].strip('"')) == (size, tag)

    def complete(self, key: str, upload: str, names: dict[int, str]) -> None:
        """Let the object appear."""
        parts = [{"PartNumber": number, "ETag": names[number]} for number in sorted(names)]
        options: dict[str, Any] = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
        self._ask("complete_multipart_upload", key, **options)

    def abort(self, key: str, upload: str) -> None:
        """End an upload."""
        self._ask("abort_multipart_upload", key, gone=True, UploadId=upload)

    def _ask(self, operation: str, key: str, *, gone: bool = False, **options: Any) -> Any:
        where = f"{self.prefix}/{key}" if self.prefix else key

        def once() -> Any:
            try:
                return getattr(self._s3, operation)(Bucket=self.bucket, Key=where, **options)
            except self._errors.ClientError as error:
                answer = error.response.get("ResponseMetadata", {})
                wait = asked_wait(answer.get("HTTPHeaders", {})) or 0.0
                raise StoreError(
                    _known(answer.get("HTTPStatusCode", 0)), str(error), wait
                ) from None
            except (self._errors.BotoCoreError, self._errors.HTTPClientError) as error:
                denied = "Credential" in type(error).__name__
                raise StoreError("forbidden" if denied else "transient", str(error)) from None

        return _ask(self.client, key, once, gone=gone)


def _google_client(boto3: Any, config: Any, settings: dict[str, Any], url: str) -> Any:
    """A client of boto3's that speaks to GCS, with a token of Google's in place of a signature of AWS's."""
    token = _google_token(url)
    client = boto3.client(
        "s3",
        endpoint_url=os.environ.get("GOOGLE_BASE_URL", _GOOGLE),
        region_name="auto",
        config=config(
            **settings,
            signature_version=import_module("botocore").UNSIGNED,
            s3={"addressing_style": "path"},
            # Checksums of AWS's own would come in headers that GCS does not know.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )

    def sign(request: Any, **_: Any) -> None:
        request.headers["Authorization"] = f"Bearer {token()}"

    client.meta.events.register("before-send.s3", sign)
    return client


def _google_token(url: str) -> Callable[[], str]:
    """What gives a valid token: the environment's, or that of Google's own chain of credentials."""
    given = os.environ.get("GOOGLE_BEARER_TOKEN")
    if given:
        return lambda: given
    auth = library("google.auth", url, "regraft[gcs]")
    transport = import_module("google.auth.transport.requests")
    errors = import_module("google.auth.exceptions")
    lock = threading.Lock()
    held: list[Any] = []

    def token() -> str:
        try:
            with lock:
                if not held:
                    held.append(auth.default(scopes=[_GOOGLE_SCOPE])[0])
                if not held[0].valid:
                    held[0].refresh(transport.Request())
                return str(held[0].token)
        except errors.GoogleAuthError as error:
            transient = getattr(error, "retryable", False)
            raise StoreError("transient" if transient else "forbidden", str(error)) from None

    return token


class _Azure(Uploads):
    """Blocks of blobs in Azure, by azure-storage-blob; an upload is what the ids of its blocks begin with.

    Addresses are signed by obstore, so that credentials are found as they are for everything else, but where it
    cannot: with a token of somebody's own, or for names that addresses escape. Azure has nothing
    that ends an upload: blocks that no list took up go after a week, or when somebody else writes or removes the blob.
    """

    go_with_object = True

    def __init__(self, client: Client) -> None:
        self.client = client
        url = client.store.url
        self._lib = library("azure.storage.blob", url, "regraft[azure]")
        self._errors = import_module("azure.core.exceptions")
        self._obstore = library("obstore", url, "regraft[azure]")
        self._store = obstore_at(url)
        self._blobs: dict[tuple[str, str], tuple[float, Any]] = {}
        self._lock = threading.Lock()

    def begin(self, key: str) -> str:
        """An id; nothing is asked for it."""
        return uuid.uuid4().hex[:16]

    def send(self, key: str, upload: str, number: int, data: Any) -> bool:
        """Send a block."""
        body = bytes(data)
        name = _block(upload, number)
        self._ask(key, "PUT", lambda blob: blob.stage_block(name, body, len(body)))
        self.client.traffic.add(written=len(body))
        return True

    def parts(self, key: str, upload: str) -> Parts:
        """The blocks that have come, whether or not a commit took them up already."""
        lists = self._ask(key, "GET", lambda blob: blob.get_block_list("all"), gone=True)
        blocks = [block for blocks in lists or () for block in blocks]
        return {
            int(block.id[len(upload) :]): (block.size, block.id)
            for block in blocks
            if block.id.startswith(upload)
        }

    def complete(self, key: str, upload: str, names: dict[int, str]) -> None:
        """Let the blob appear."""
        blocks = [self._lib.BlobBlock(names[number]) for number in sorted(names)]
        self._ask(key, "PUT", lambda blob: blob.commit_block_list(blocks))

    def abort(self, key: str, upload: str) -> None:
        """Nothing: Azure removes the blocks by itself."""

    def _ask(self, key: str, method: str, call: Callable[[Any], Any], *, gone: bool = False) -> Any:
        def once() -> Any:
            try:
                return call(self._blob(key, method))
            except self._errors.HttpResponseError as error:
                message = str(error).strip().split("\n")[0]
                if error.error_code == "InvalidBlobOrBlock":
                    message = f"blocks that something else sent and did not commit lie at this name: {message}"
                wait = asked_wait(getattr(error.response, "headers", {})) or 0.0
                raise StoreError(_known(error.status_code or 0), message, wait) from None
            except self._errors.AzureError as error:
                raise StoreError("transient", str(error)) from None

        return _ask(self.client, key, once, gone=gone)

    def _blob(self, key: str, method: str) -> Any:
        """A blob at an address that is signed for reading or writing, and signed anew before that ends."""
        with self._lock:
            made, blob = self._blobs.get((key, method), (0.0, None))
            if blob is None or time.monotonic() - made > _RENEWED:
                blob = self._open(key, method)
                self._blobs[key, method] = time.monotonic(), blob
            return blob

    def _open(self, key: str, method: str) -> Any:
        options: dict[str, Any] = {"retry_total": 0, "read_timeout": _TIMEOUT}
        token = _first_of(_SAS_TOKENS)
        if token:  # with which obstore signs no address
            address = f"{self._address(key)}?{token.removeprefix('?')}"
            return self._lib.BlobClient.from_blob_url(address, **options)
        signed = self._signed(key, method)
        # What is escaped in an address is signed as it is escaped, which Azure does not take.
        if re.search(r"[%;]", signed.partition("?")[0]) is None:
            return self._lib.BlobClient.from_blob_url(signed, **options)
        secret = _first_of(_ACCOUNT_KEYS)
        if not secret:
            message = (
                "without an account's key, work in parts writes to no names in Azure that addresses escape"
                " (with a space, one of %#?;{}<>, a letter beyond ASCII): choose another name, or convert"
                " without --stage"
            )
            raise StoreError("unfit", message)
        credential = {"account_name": self._account(), "account_key": secret}
        return self._lib.BlobClient.from_blob_url(self._address(key), credential, **options)

    def _signed(self, key: str, method: str) -> str:
        try:
            return str(self._obstore.sign(self._store, method, key, _SIGNED))
        except import_module("obstore.exceptions").BaseError as error:
            line = str(error).strip().split("\n")[0]
            raise StoreError("forbidden", line) from None

    def _account(self) -> str:
        return str(self._store.config.get("account_name") or _first_of(_ACCOUNTS))

    def _address(self, key: str) -> str:
        """Where a blob is, by what the environment says as obstore reads it."""
        endpoint = _first_of(_ENDPOINTS) or f"https://{self._account()}.blob.core.windows.net"
        path = "/".join(filter(None, (self._store.prefix, key)))
        return f"{endpoint.rstrip('/')}/{self._store.config['container_name']}/{quote(path)}"


def _first_of(names: Sequence[str]) -> str:
    """The first variable that says something."""
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _block(upload: str, number: int) -> str:
    """The id of a block; all those of a blob have the same length, as Azure wants it."""
    return f"{upload}{number:05d}"
