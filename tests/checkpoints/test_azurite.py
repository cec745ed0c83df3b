"""Conversions into Azure by its own emulator, Azurite (``npm install -g azurite``), where that is installed."""

import os
import shutil
import socket
import subprocess
import time

import pytest
from checkpoints.models import mixtral, write_folder

import regraft
from regraft.checkpoints import staged_uploads
from regraft.storage.stores import open_store

AZURITE = os.environ.get("REGRAFT_AZURITE") or shutil.which("azurite-blob")
pytestmark = pytest.mark.skipif(AZURITE is None, reason="Azurite is not installed")
blob = pytest.importorskip("azure.storage.blob")
ServiceRequestError = pytest.importorskip("azure.core.exceptions").ServiceRequestError
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Those that Azurite lets in, for everybody to know."""
V5 = "transformers-v5"


@pytest.fixture
def address(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    place = ["--location", str(tmp_path / "azurite"), "--blobPort", str(port)]
    process = subprocess.Popen([AZURITE, *options, *place], stdout=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    try:
        client = blob.BlobServiceClient(endpoint, credential=KEY, retry_total=0)
        until = time.monotonic() + 60
        while True:
            try:
                client.create_container("models")
                break
            except ServiceRequestError:
                assert time.monotonic() < until, "it does not start"
                time.sleep(0.2)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
        yield "az://models/step=10/out"
    finally:
        process.terminate()
        process.wait()


def contents(address):
    client = open_store(address)
    return {row.key: bytes(client.read(row, 0, row.size)) for row in client.listed()}


def test_azure(address, tmp_path, monkeypatch):
    monkeypatch.setattr(staged_uploads, "SIZE", 2000)
    src = write_folder(tmp_path / "src", mixtral(), shards=2)
    regraft.convert(src, tmp_path / "wanted", to=V5)
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "wanted").iterdir()}

    regraft.convert(src, f"{address}-whole", to=V5)
    assert contents(f"{address}-whole") == wanted

    options = {"to": V5, "stage": f"{address}.stage"}
    for number in (1, 0):
        regraft.convert(src, address, part=f"{number}/2", **options)
        assert not contents(address)
    regraft.convert(src, address, commit=True, **options)
    assert contents(address) == wanted

    regraft.convert(f"{address}-whole", f"{address}-back", to="transformers-v4", jobs=2)
    regraft.convert(tmp_path / "wanted", tmp_path / "back", to="transformers-v4")
    back = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    assert contents(f"{address}-back") == back

    # Over a checkpoint of one file: Azure loses what is staged for a blob when that is removed.
    one = write_folder(tmp_path / "one", mixtral())
    for _ in range(2):
        options = {"to": V5, "stage": f"{address}.again", "overwrite": True}
        regraft.convert(one, f"{address}-one", abort=True, to=V5, stage=f"{address}.again")
        regraft.convert(one, f"{address}-one", part="0/1", **options)
        regraft.convert(one, f"{address}-one", commit=True, **options)
    assert "model.safetensors" in contents(f"{address}-one")
