"""Uploads in parts to S3, of which any process that knows their ids may send any part: by boto3.

A part that is sent again replaces the one before. Nothing can be seen of an object until its upload is completed.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from regraft.errors import BadInputError, Finding
from regraft.storage.objects import Client, StoreError, Trouble

_TROUBLES: dict[int, Trouble] = {
    401: "forbidden",
    403: "forbidden",
    404: "missing",
    408: "transient",
    429: "transient",
}


class Uploads:
    """The uploads to a folder in S3.

    Raises ``BadInputError`` where boto3 is not installed, or the address is none of S3's.
    """

    def __init__(self, url: str, client: Client) -> None:
        self.url, self.client = url.rstrip("/"), client
        match = re.fullmatch(r"s3a?://([^/]+)/?(.*)", self.url)
        if match is None:
            message = "work in parts writes to S3, or to a folder that all machines see"
            fix = "write to such a folder, or convert to this address without --stage"
            raise BadInputError(Finding("option", message, where=url, fix=fix))
        self.bucket, self.prefix = match[1], match[2]
        try:
            boto3, config = import_module("boto3"), import_module("botocore.config")
        except ImportError:
            message = "boto3 sends parts of files to S3, and it is not installed"
            fix = "pip install 'regraft[s3]'"
            raise BadInputError(Finding("package-missing", message, where=url, fix=fix)) from None
        self._errors = import_module("botocore.exceptions")
        # Threads share it. What is asked again is counted, and so asked again by the client.
        settings = config.Config(
            retries={"total_max_attempts": 1}, max_pool_connections=64, read_timeout=60
        )
        self._s3 = boto3.client("s3", config=settings)

    def begin(self, key: str) -> str:
        """Begin an upload; its id."""
        return str(self._ask("create_multipart_upload", key)["UploadId"])

    def send(self, key: str, upload: str, number: int, data: Any) -> bool:
        """Send a part; parts count from 1. Whether the upload is still there."""
        body = bytes(data)
        options: dict[str, Any] = {"UploadId": upload, "PartNumber": number, "Body": body}
        sent = self._ask("upload_part", key, gone=True, **options)
        if sent is not None:
            self.client.traffic.add(written=len(body))
        return sent is not None

    def parts(self, key: str, upload: str) -> dict[int, tuple[int, str]] | None:
        """Size and ETag of the parts that have come, by their numbers; ``None`` where there is no such upload."""
        parts: dict[int, tuple[int, str]] = {}
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

    def complete(self, key: str, upload: str, etags: dict[int, str]) -> str:
        """Let the object appear, of these parts; its ETag."""
        parts = [{"PartNumber": number, "ETag": etags[number]} for number in sorted(etags)]
        options: dict[str, Any] = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
        return str(self._ask("complete_multipart_upload", key, **options)["ETag"])

    def abort(self, key: str, upload: str) -> None:
        """End an upload, whose parts are removed; it may be gone."""
        self._ask("abort_multipart_upload", key, gone=True, UploadId=upload)

    def _ask(self, operation: str, key: str, *, gone: bool = False, **options: Any) -> Any:
        """Ask S3; ``None`` where an upload is ``gone`` that may be."""
        where = f"{self.prefix}/{key}" if self.prefix else key

        def once() -> Any:
            try:
                return getattr(self._s3, operation)(Bucket=self.bucket, Key=where, **options)
            except self._errors.ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                known = _TROUBLES.get(status, "unfit" if 400 <= status < 500 else "transient")
                raise StoreError(known, str(error)) from None
            except (self._errors.BotoCoreError, self._errors.HTTPClientError) as error:
                denied = "Credential" in type(error).__name__
                raise StoreError("forbidden" if denied else "transient", str(error)) from None

        try:
            return self.client.ask(key, once)
        except StoreError as error:
            if gone and error.trouble == "missing":
                return None
            raise self.client.failed(key, error) from None
