"""A conversion into S3, GCS or Azure in parts: uploads are what the parts have in common."""

import os

import pytest
from checkpoints.models import mixtral, write_folder
from object_server import serving

import regraft
from regraft.checkpoints import staged_uploads, stream
from regraft.errors import BadInputError
from regraft.storage import objects
from regraft.storage.stores import open_store
from regraft.storage.uploads import open_uploads

pytest.importorskip("boto3")
V5 = "transformers-v5"
STORES = {
    "s3": {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "k",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": "{url}",
    },
    "gs": {"GOOGLE_BEARER_TOKEN": "token", "GOOGLE_BASE_URL": "{url}"},
    "az": {
        "AZURE_STORAGE_ACCOUNT_NAME": "one",
        "AZURE_STORAGE_ACCOUNT_KEY": "a2V5",
        "AZURE_STORAGE_ENDPOINT": "{url}",
    },
}
"""What the environment says of each store, at the server of the tests."""


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


@pytest.fixture(params=STORES)
def server(request, monkeypatch):
    monkeypatch.setattr(objects, "PAUSE", 0.0)
    monkeypatch.setattr(staged_uploads, "SIZE", 2000)
    monkeypatch.setattr(stream, "WINDOW", 1500)
    if request.param == "az":
        pytest.importorskip("azure.storage.blob")
    with serving() as running:
        running.page = 2
        for name, value in STORES[request.param].items():
            monkeypatch.setenv(name, value.format(url=running.url))
        running.out = f"{request.param}://b/out"
        running.options = {"to": V5, "stage": f"{running.out}.stage", "jobs": 2}
        yield running


def codes(caught):
    return {finding.code for finding in caught.value.findings}


def part(server, src, part, **changed):
    return regraft.convert(src, server.out, part=part, **{**server.options, **changed})


def commit(server, src):
    return regraft.convert(src, server.out, commit=True, **server.options)


def left(server):
    """How many uploads would come to nothing."""
    return len(server.uploads) + sum(map(len, server.blocks.values()))


def test_any_number_of_parts(src, wanted, server):
    for number in (1, 0):
        made = part(server, src, f"{number}/2").checkpoint.part
        assert made.pieces > 1 and made.before == 0
        assert not server.folder("b/out")
        if number:
            with pytest.raises(BadInputError, match="pieces are not there") as caught:
                commit(server, src)
            assert codes(caught) == {"stage-incomplete"}
    assert made.left == 0
    again = part(server, src, "1/3").checkpoint.part
    assert again.before == again.pieces
    assert commit(server, src).written
    assert server.folder("b/out") == wanted
    seen = [
        {key.removeprefix("b/out/") for key in keys if key.startswith("b/out/")}
        for keys in server.seen
    ]
    index = "model.safetensors.index.json"
    assert all(index not in keys or keys == set(wanted) for keys in seen)
    assert not left(server) and set(server.folder("b/out.stage")) == {"committed"}
    late = part(server, src, "0/2").checkpoint.part
    assert late.before == late.pieces
    with pytest.raises(BadInputError) as caught:
        commit(server, src)
    assert codes(caught) == {"stage-committed"}
    with pytest.raises(BadInputError) as caught:
        part(server, src, "0/2", stage=f"{server.out}.other")
    assert codes(caught) == {"destination-exists"}


@pytest.mark.parametrize("server", ["s3", "az"], indirect=True)
def test_other_stages(src, server, tmp_path):
    part(server, src, "0/2")

    def fails(code, src=src, out=server.out, **changed):
        with pytest.raises(BadInputError) as caught:
            regraft.convert(src, out, **{"part": "1/2", **server.options, **changed})
        assert codes(caught) == {code}

    fails("stage-options", dtype="bfloat16")
    fails("stage-other", src=write_folder(tmp_path / "other", mixtral()))
    fails("stage-place", stage=f"{server.out}/stage")
    fails("stage-place", stage=tmp_path / "stage")
    fails("option", out="memory://out", stage="memory://stage")
    assert left(server)
    assert regraft.convert(src, server.out, abort=True, to=V5, stage=server.options["stage"]).ended
    assert (server.blocks or not left(server)) and not server.folder("b/out.stage")


@pytest.mark.parametrize("server", ["s3", "az"], indirect=True)
def test_dying_at_every_request(src, wanted, server):
    """A try that dies at a request is followed by the next, which dies a little later; what can be seen is whole."""
    step = int(os.environ.get("REGRAFT_FAULT_STEP", "9"))

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

    assert goes_on(lambda: part(server, src, "0/1", jobs=1)) > 0
    goes_on(lambda: commit(server, src))
    if "b/out.stage/committed" not in server.data:
        commit(server, src)
    assert server.folder("b/out") == wanted
    assert not left(server)


@pytest.mark.parametrize("server", ["s3", "az"], indirect=True)
def test_faults_are_asked_again(src, wanted, server):
    server.fault = lambda request: "503" if request.number % 9 == 1 else None
    part(server, src, "0/1")
    commit(server, src)
    assert server.folder("b/out") == wanted


@pytest.mark.parametrize("server", ["s3", "az"], indirect=True)
def test_a_zombie_after_the_commit(src, wanted, server, monkeypatch):
    """A part that goes on after the commit has no upload any more."""
    make = stream.Stream.make

    def meanwhile(self, *args):
        monkeypatch.setattr(stream.Stream, "make", make)
        part(server, src, "0/1")
        commit(server, src)
        return make(self, *args)

    monkeypatch.setattr(stream.Stream, "make", meanwhile)
    with pytest.raises(BadInputError) as caught:
        part(server, src, "0/2", jobs=1)
    assert codes(caught) == {"stage-gone"}
    assert server.folder("b/out") == wanted
    assert not server.uploads  # Azure removes by itself what no list takes up


def test_a_part_of_a_job_that_is_over(src, server, monkeypatch):
    """Nothing is begun in a stage that was ended while a part was at work, and nothing of it stays."""
    find = staged_uploads.RemoteStage.find

    def meanwhile(self, *args, **options):
        monkeypatch.setattr(staged_uploads.RemoteStage, "find", find)
        regraft.convert(src, server.out, abort=True, to=V5, stage=server.options["stage"])
        return find(self, *args, **options)

    monkeypatch.setattr(staged_uploads.RemoteStage, "find", meanwhile)
    with pytest.raises(BadInputError) as caught:
        part(server, src, "0/1")
    assert codes(caught) == {"stage-gone"}
    assert not left(server) and not server.data


@pytest.mark.parametrize("server", ["s3", "az"], indirect=True)
def test_ending_that_died(src, wanted, server):
    """Ending a job dies at each of its requests; the next conversion, or ending it again, leaves nothing behind."""
    for at in (2, 5):
        part(server, src, "0/1")
        count = 0

        def fault(request, at=at):
            nonlocal count
            count += request.method != "GET"
            return "403" if request.method != "GET" and count >= at else None

        server.fault = fault
        options = {"abort": True, "to": V5, "stage": server.options["stage"]}
        try:
            regraft.convert(src, server.out, **options)
        except BadInputError:
            server.fault = None
            if at == 2:
                regraft.convert(src, server.out, **options)
                assert not server.uploads and not server.data
        server.fault = None
    part(server, src, "0/1")
    commit(server, src)
    assert server.folder("b/out") == wanted
    assert not server.uploads and set(server.folder("b/out.stage")) == {"committed"}


@pytest.mark.parametrize("server", ["gs"], indirect=True)
def test_tokens_of_google(src, server, monkeypatch):
    """GCS is asked with a token of Google's own chain of credentials where the environment has none."""
    auth = pytest.importorskip("google.auth")
    from google.auth.credentials import AnonymousCredentials

    class Known(AnonymousCredentials):
        valid, token = False, None

        def refresh(self, request):
            self.token, self.valid = "fresh", True

    uploads = open_uploads(open_store(server.out))
    assert uploads.begin("a") in server.uploads
    assert server.tokens == {"Bearer token"}
    monkeypatch.delenv("GOOGLE_BEARER_TOKEN")
    monkeypatch.setattr(auth, "default", lambda scopes: (Known(), "project"))
    upload = (uploads := open_uploads(open_store(server.out))).begin("a")
    assert uploads.send("a", upload, 1, b"x") and uploads.parts("a", upload)
    assert server.tokens == {"Bearer token", "Bearer fresh"}

    def none(scopes):
        raise auth.exceptions.DefaultCredentialsError("no credentials")

    monkeypatch.setattr(auth, "default", none)
    with pytest.raises(BadInputError, match="no credentials") as caught:
        open_uploads(open_store(server.out)).begin("a")
    assert codes(caught) == {"store-denied"}


def test_every_letter_of_a_name_counts(src, wanted, server):
    name = "run #3/50%25 a?b=c;{é}"
    for one in (server.data, server.uploads, server.blocks):
        one.clear()
    out = f"{server.out.rpartition('/')[0]}/{name}"
    options = {**server.options, "stage": f"{out}.stage"}
    regraft.convert(src, out, part="0/1", **options)
    regraft.convert(src, out, commit=True, **options)
    assert server.folder(f"b/{name}") == wanted
    assert set(server.data) == {*(f"b/{name}/{key}" for key in wanted), f"b/{name}.stage/committed"}
    assert regraft.verify(src, out).equal


@pytest.mark.parametrize("server", ["az"], indirect=True)
def test_names_that_azure_cannot_sign(server, monkeypatch):
    uploads = open_uploads(open_store(server.out))
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    with pytest.raises(BadInputError, match="with a space") as caught:
        uploads.send("a b", "id", 1, b"x")
    assert codes(caught) == {"bad-address"}


@pytest.mark.parametrize("server", ["az"], indirect=True)
def test_a_shared_access_signature(src, wanted, server, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "?sv=1&sig=se%2Fcret%3D")
    part(server, src, "0/1")
    commit(server, src)
    assert server.folder("b/out") == wanted
    assert all(request.query["sig"] == ["se/cret="] for request in server.requests)
    with pytest.raises(BadInputError, match="no part of such an address") as caught:
        open_store(f"{server.out}?sv=1&sig=secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("server", ["s3", "az"], indirect=True)
def test_overwriting(src, wanted, server):
    server.data["b/out/model.safetensors.index.json"] = b"{}"
    server.data["b/out/model-00009-of-00009.safetensors"] = b"old"
    with pytest.raises(BadInputError) as caught:
        part(server, src, "0/1")
    assert codes(caught) == {"destination-exists"}
    part(server, src, "0/1", overwrite=True)
    regraft.convert(src, server.out, commit=True, overwrite=True, **server.options)
    assert server.folder("b/out") == wanted


@pytest.mark.parametrize("server", ["s3", "az"], indirect=True)
def test_uploads_that_were_ended_elsewhere(src, wanted, server):
    """A store's own rules end old uploads: another is begun, and the commit knows what is missing."""
    part(server, src, "0/1")
    uploads = server.uploads or server.blocks
    uploads.pop(next(iter(uploads)))
    with pytest.raises(BadInputError) as caught:
        commit(server, src)
    assert codes(caught) == {"stage-incomplete"}
    made = part(server, src, "0/1").checkpoint.part
    assert 0 < made.before < made.pieces
    commit(server, src)
    assert server.folder("b/out") == wanted


def test_a_stage_is_of_one_destination(src, wanted, server):
    """Uploads lie at the result's own keys: no commit takes them to another place."""
    part(server, src, "0/1")
    for changed in ({"part": "0/1"}, {"commit": True}):
        with pytest.raises(BadInputError, match=r"conversion to .*out, where") as caught:
            regraft.convert(src, f"{server.out}2", **server.options, **changed)
        assert codes(caught) == {"stage-other"}
    assert not server.folder("b/out2")
    commit(server, src)
    assert server.folder("b/out") == wanted


@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_an_abort_finds_the_uploads_by_itself(src, server):
    part(server, src, "0/1")
    assert left(server)
    options = {"to": V5, "stage": server.options["stage"]}
    regraft.convert(src, f"{server.out}-wrong", abort=True, **options)
    assert not left(server) and not server.folder("b/out.stage")


@pytest.mark.parametrize("server", ["s3", "az"], indirect=True)
def test_a_commit_that_died_before_it_noted_a_file(src, wanted, server):
    part(server, src, "0/1")
    server.fault = lambda r: "403" if r.method == "PUT" and "/complete/" in r.key else None
    with pytest.raises(BadInputError):
        commit(server, src)
    assert server.folder("b/out") and "b/out/model.safetensors.index.json" not in server.data
    server.fault = None
    commit(server, src)
    assert server.folder("b/out") == wanted and not left(server)


@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_what_lies_there_by_chance_is_not_what_was_made(src, wanted, server):
    """A file of the same size is not taken for one that a commit which died let appear."""
    part(server, src, "0/1")
    server.fault = lambda r: "403" if r.method == "PUT" and "/complete/" in r.key else None
    with pytest.raises(BadInputError):
        commit(server, src)
    server.fault = None
    key = next(key for key in server.data if key.startswith("b/out/model-"))
    server.data[key] = bytes(len(server.data[key]))
    server.tags.pop(key)
    with pytest.raises(BadInputError) as caught:
        commit(server, src)
    assert codes(caught) == {"stage-incomplete"}
    part(server, src, "0/1")
    commit(server, src)
    assert server.folder("b/out") == wanted
