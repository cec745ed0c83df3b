"""A conversion into S3 in parts: uploads are what the parts have in common; the bytes are those of a plain one."""

import os

import pytest
from checkpoints.models import mixtral, write_folder
from object_server import serving

import regraft
from regraft.checkpoints import staged_uploads, stream
from regraft.errors import BadInputError
from regraft.storage import objects

pytest.importorskip("boto3")
V5 = "transformers-v5"
OUT, OPTIONS = "s3://b/out", {"to": V5, "stage": "s3://b/out.stage", "jobs": 2}


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("uploads") / "src", mixtral(), shards=2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def wanted(src):
    regraft.convert(src, src.parent / "wanted", to=V5)
    folder = src.parent / "wanted"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(objects, "PAUSE", 0.0)
    monkeypatch.setattr(staged_uploads, "SIZE", 2000)
    monkeypatch.setattr(stream, "WINDOW", 1500)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "k")
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    with serving() as running:
        running.page = 2
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


def codes(caught):
    return {finding.code for finding in caught.value.findings}


def commit(src):
    return regraft.convert(src, OUT, commit=True, **OPTIONS)


def test_any_number_of_parts(src, wanted, server):
    for number in (1, 0):
        part = regraft.convert(src, OUT, part=f"{number}/2", **OPTIONS).checkpoint.part
        assert part.pieces > 1 and part.before == 0
        assert not server.folder("b/out")
        if number:
            with pytest.raises(BadInputError, match="pieces are not there") as caught:
                commit(src)
            assert codes(caught) == {"stage-incomplete"}
    assert part.left == 0
    again = regraft.convert(src, OUT, part="1/3", **OPTIONS).checkpoint.part
    assert again.before == again.pieces
    assert commit(src).written
    assert server.folder("b/out") == wanted
    seen = [
        {key.removeprefix("b/out/") for key in keys if key.startswith("b/out/")}
        for keys in server.seen
    ]
    index = "model.safetensors.index.json"
    assert all(index not in keys or keys == set(wanted) for keys in seen)
    assert not server.uploads and set(server.folder("b/out.stage")) == {"committed"}
    late = regraft.convert(src, OUT, part="0/2", **OPTIONS).checkpoint.part
    assert late.before == late.pieces
    with pytest.raises(BadInputError) as caught:
        commit(src)
    assert codes(caught) == {"stage-committed"}
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, OUT, part="0/2", **{**OPTIONS, "stage": "s3://b/other"})
    assert codes(caught) == {"destination-exists"}


def test_other_stages(src, server, tmp_path):
    regraft.convert(src, OUT, part="0/2", **OPTIONS)

    def fails(code, src=src, out=OUT, **changed):
        with pytest.raises(BadInputError) as caught:
            regraft.convert(src, out, **{"part": "1/2", **OPTIONS, **changed})
        assert codes(caught) == {code}

    fails("stage-options", dtype="bfloat16")
    fails("stage-other", src=write_folder(tmp_path / "other", mixtral()))
    fails("stage-place", stage="s3://b/out/stage")
    fails("stage-place", stage=tmp_path / "stage")
    fails("option", out="memory://out", stage="memory://stage")
    assert server.uploads
    assert regraft.convert(src, OUT, abort=True, to=V5, stage=OPTIONS["stage"]).ended
    assert not server.uploads and not server.folder("b/out.stage")


def test_dying_at_every_request(src, wanted, server):
    """A try that dies at a request is followed by the next, which dies a little later; what can be seen is whole."""
    step = int(os.environ.get("REGRAFT_FAULT_STEP", "6"))

    def goes_on(run):
        died = 0
        for at in range(2, 200, step):
            count = 0

            def fault(request, at=at):
                nonlocal count
                count += request.method in ("PUT", "POST")
                if request.method in ("PUT", "POST") and count >= at:
                    return "403"

            server.fault = fault
            try:
                run()
                break
            except BadInputError:
                died += 1
            index = "b/out/model.safetensors.index.json" in server.data
            assert not index or server.folder("b/out") == wanted
        server.fault = None
        return died

    assert goes_on(lambda: regraft.convert(src, OUT, part="0/1", **{**OPTIONS, "jobs": 1})) > 0
    goes_on(lambda: commit(src))
    if "b/out.stage/committed" not in server.data:
        commit(src)
    assert server.folder("b/out") == wanted
    assert not server.uploads


def test_faults_are_asked_again(src, wanted, server):
    server.fault = lambda request: "503" if request.number % 9 == 1 else None
    regraft.convert(src, OUT, part="0/1", **OPTIONS)
    commit(src)
    assert server.folder("b/out") == wanted


def test_a_zombie_after_the_commit(src, wanted, server, monkeypatch):
    """A part that goes on after the commit has no upload any more."""
    make = stream.Stream.make

    def meanwhile(self, *args):
        monkeypatch.setattr(stream.Stream, "make", make)
        regraft.convert(src, OUT, part="0/1", **OPTIONS)
        commit(src)
        return make(self, *args)

    monkeypatch.setattr(stream.Stream, "make", meanwhile)
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, OUT, part="0/2", **{**OPTIONS, "jobs": 1})
    assert codes(caught) == {"stage-gone"}
    assert server.folder("b/out") == wanted
    assert not server.uploads


def test_overwriting(src, wanted, server):
    server.data["b/out/model.safetensors.index.json"] = b"{}"
    server.data["b/out/model-00009-of-00009.safetensors"] = b"old"
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, OUT, part="0/1", **OPTIONS)
    assert codes(caught) == {"destination-exists"}
    regraft.convert(src, OUT, part="0/1", overwrite=True, **OPTIONS)
    regraft.convert(src, OUT, commit=True, overwrite=True, **OPTIONS)
    assert server.folder("b/out") == wanted


def test_uploads_that_were_ended_elsewhere(src, wanted, server):
    """A store's own rules end old uploads: another is begun, and the commit knows what is missing."""
    regraft.convert(src, OUT, part="0/1", **OPTIONS)
    server.uploads.pop(next(iter(server.uploads)))
    with pytest.raises(BadInputError) as caught:
        commit(src)
    assert codes(caught) == {"stage-incomplete"}
    part = regraft.convert(src, OUT, part="0/1", **OPTIONS).checkpoint.part
    assert 0 < part.before < part.pieces
    commit(src)
    assert server.folder("b/out") == wanted
