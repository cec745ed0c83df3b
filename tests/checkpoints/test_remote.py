"""Checkpoints beyond this machine: looked at by their headers, converted by ranges, with nothing kept here."""

import json
import os
import tempfile
from pathlib import Path

import fsspec
import ml_dtypes
import numpy as np
import pytest
from checkpoints.models import MIXTRAL, mixtral, snapshot, write_folder
from making import book_of, equation_of
from object_server import serving

import regraft
from regraft.checkpoints import gather, stream
from regraft.cli.run import run
from regraft.errors import BadInputError
from regraft.rules.book import only_books
from regraft.storage import objects, outline
from regraft.storage.safetensors import write_tensors

STEP = int(os.environ.get("REGRAFT_FAULT_STEP", "4"))
"""Every how many requests a fault is put: with 1 this takes a minute."""
V4, V5 = "transformers-v4", "transformers-v5"


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Windows so small that a tiny checkpoint has several, and a place of its own for outlines."""
    monkeypatch.setattr(objects, "PAUSE", 0.0)
    monkeypatch.setattr(stream, "WINDOW", 1000)
    place = tmp_path / "outlines"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert not list(place.iterdir()), "outlines are removed"


@pytest.fixture
def bare(monkeypatch):
    """Of weights no more is read with the header than the header itself."""
    for name, size in (("_HEAD", 8), ("_SMALLEST", 8), ("_PER_TENSOR", 0)):
        monkeypatch.setattr(outline, name, size)


@pytest.fixture
def server(monkeypatch):
    for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("REGION", "r")):
        monkeypatch.setenv(f"AWS_{name}", value)
    with serving() as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.fixture
def base(tmp_path, server):
    """A checkpoint of three files, here and on the server, and its conversion here."""
    folder = write_folder(tmp_path / "in", mixtral(), shards=3)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    regraft.convert(folder, tmp_path / "local", to=V5)
    server.put_folder(folder, "b/in")
    return folder


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def addresses(server):
    return ["s3://b/in", f"{server.url}/b/in"]


def test_converts_from_and_to_stores(base, server, tmp_path):
    local = files_of(tmp_path / "local")
    for number, source in enumerate(addresses(server)):
        report = regraft.convert(source, tmp_path / f"out{number}", to=V5)
        assert files_of(tmp_path / f"out{number}") == local
        assert report.source == source
        regraft.convert(source, f"s3://b/out{number}", to=V5)
        assert server.folder(f"b/out{number}") == local
        back = regraft.convert(f"s3://b/out{number}", tmp_path / f"back{number}", to=V4)
        assert back.checkpoint.tensors_out == len(mixtral())
    assert files_of(tmp_path / "back0") == files_of(tmp_path / "back1")
    assert regraft.verify("s3://b/in", "s3://b/out0").equal
    wrong = bytearray(server.data["b/out0/model-00001-of-00003.safetensors"])
    wrong[-1] ^= 1
    server.data["b/out0/model-00001-of-00003.safetensors"] = bytes(wrong)
    found = regraft.verify("s3://b/in", "s3://b/out0")
    assert [finding.code for finding in found.differences] == ["differs"]


def test_headers_are_enough(base, server, capsys):
    shards = 3
    for source in addresses(server):
        for command in (
            ["inspect", source],
            ["check", source, "--for", V4],
            ["explain", source, "lm_head.weight", "--to", V5],
            ["slices", source, "--to", V5],
            ["convert", source, "nowhere", "--to", V5, "--dry-run"],
        ):
            server.requests.clear()
            assert run([*command, "--json"]) == 0, capsys.readouterr()
            said = capsys.readouterr()
            looked = [request for request in server.requests if request.key != "b"]
            assert len(server.requests) <= len(files_of(base)) + 2
            assert sum(request.key.endswith(".safetensors") for request in looked) <= shards + 2
            assert str(tempfile.gettempdir()) not in said.out + said.err
            assert source in said.out or command[0] in ("explain", "slices")
            json.loads(said.out)


def test_parts_of_what_is_in_a_store(base, server, tmp_path):
    """The stage is here, and what identifies the source is its ETags."""
    options = {"to": V5, "stage": tmp_path / "stage"}
    for part in ("1/2", "0/2"):
        regraft.convert("s3://b/in", tmp_path / "out", part=part, **options)
    key = "b/in/model-00001-of-00003.safetensors"
    data = server.data[key]
    server.data[key] = data[:-1] + b"?"
    with pytest.raises(BadInputError, match="files of in changed") as caught:
        regraft.convert("s3://b/in", tmp_path / "out", commit=True, **options)
    assert caught.value.findings[0].code == "stage-other"
    server.data[key] = data
    regraft.convert("s3://b/in", tmp_path / "out", commit=True, **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "local")


def test_one_file(base, server, tmp_path):
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in mixtral().items()}
    write_tensors(tmp_path / "one.safetensors", tensors, {"format": "pt"})
    server.data["b/one.safetensors"] = (tmp_path / "one.safetensors").read_bytes()
    server.data["b/config.json"] = json.dumps(MIXTRAL).encode()
    regraft.convert(tmp_path / "one.safetensors", tmp_path / "two.safetensors", to=V5, model=base)
    regraft.convert("s3://b/one.safetensors", "s3://b/two.safetensors", to=V5)
    assert server.data["b/two.safetensors"] == (tmp_path / "two.safetensors").read_bytes()
    regraft.convert(
        "s3://b/one.safetensors", tmp_path / "three.safetensors", to=V5, model="s3://b/in"
    )
    assert snapshot(tmp_path / "three.safetensors") == snapshot(tmp_path / "two.safetensors")


def test_memory_filesystem(base, tmp_path):
    memory = fsspec.filesystem("memory")
    for name, data in files_of(base).items():
        memory.pipe_file(f"/models/in/{name}", data)
    try:
        regraft.convert("memory://models/in", "memory://models/out", to=V5)
        there = {
            path.removeprefix("/models/out/"): memory.cat_file(path)
            for path in memory.find("/models/out")
        }
        assert there == files_of(tmp_path / "local")
        with pytest.raises(BadInputError, match="nothing at this address"):
            regraft.convert("memory://models/none", tmp_path / "none", to=V5)
    finally:
        memory.rm("/models", recursive=True)


@pytest.mark.parametrize("most", [1 << 24, 300])
def test_a_transpose_is_read_in_large_parts(server, tmp_path, monkeypatch, most):
    """Runs of single elements: what a window needs is read with what lies between, and turned in memory."""
    monkeypatch.setattr(gather, "MOST", most)
    book = book_of(equation_of("x.{l}.w : e a b == y.{l}.w : e b a", "turned"))
    tensors = {
        f"x.{i}.w": np.arange(i, 720 + i, dtype=np.float32).reshape(2, 20, 18) for i in (0, 1)
    }
    src = write_folder(tmp_path / "src", tensors, {"model_type": "test"})
    server.put_folder(src, "b/turned")
    with only_books([book]):
        regraft.convert(src, tmp_path / "here", to="new")
        server.requests.clear()
        regraft.convert("s3://b/turned", tmp_path / "there", to="new")
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")
    windows = 2 * 2880 // 1000 + 2
    assert len(server.requests) <= 5 + 4 * windows * (1 if most > 300 else 10)


def test_what_can_be_seen_when(base, server):
    regraft.convert("s3://b/in", "s3://b/out", to=V5)
    index = "b/out/model.safetensors.index.json"
    whole = {f"b/out/{name}" for name in server.folder("b/out")}
    for seen in server.seen:
        assert index not in seen or whole <= seen, "the index is the last to be seen"
    with pytest.raises(BadInputError) as error:
        regraft.convert("s3://b/in", "s3://b/out", to=V5)
    assert error.value.findings[0].code == "destination-exists"
    server.seen.clear()
    server.data["b/out/model-00004-of-00004.safetensors"] = b"old"
    before = server.folder("b/out")
    regraft.convert("s3://b/in", "s3://b/out", to=V5, overwrite=True)
    assert index not in server.seen[0], "the old index goes first"
    assert all(index not in seen for seen in server.seen[:-1])
    assert "model-00004-of-00004.safetensors" in before
    assert "model-00004-of-00004.safetensors" not in server.folder("b/out")


def emptied(server):
    for key in list(server.folder("b/out")):
        del server.data[f"b/out/{key}"]
    server.requests.clear()


@pytest.fixture
def tiny(tmp_path, server, bare):
    """A conversion with a fault in any of its requests: what it makes, and how to make it on the server."""
    folder = write_folder(tmp_path / "tiny", mixtral(layers=1), {**MIXTRAL, "num_hidden_layers": 1})
    regraft.convert(folder, tmp_path / "local", to=V5, shard_size=3000)
    server.put_folder(folder, "b/tiny")

    def make(fault=None):
        emptied(server)
        server.fault = fault
        try:
            regraft.convert("s3://b/tiny", "s3://b/out", to=V5, shard_size=3000, jobs=2)
        finally:
            server.fault = None
        return server.folder("b/out")

    assert make() == files_of(tmp_path / "local")
    return make, len(server.requests), files_of(tmp_path / "local")


def test_a_fault_at_any_request(tiny):
    """One request fails once: the result is the same, whichever it was."""
    make, count, local = tiny
    kinds = ("503", "drop", "short", "less", "500")
    for number in range(0, count, STEP):
        fault = kinds[number // STEP % len(kinds)]
        made = make(lambda r, number=number, fault=fault: fault if r.number == number else None)
        assert made == local, (number, fault)


def test_a_fault_that_stays_leaves_no_half_result(tiny, server):
    make, count, local = tiny
    kinds = ("whole", "etag", "403", "404")
    for number in range(0, count, STEP):
        fault = kinds[number // STEP % len(kinds)]
        try:
            made = make(lambda r, number=number, fault=fault: fault if r.number >= number else None)
        except BadInputError as error:
            codes = ("no-ranges", "file-changed", "store-denied", "missing-file", "not-found")
            assert error.findings[0].code in codes, (number, fault)
            made = server.folder("b/out")
            assert "model.safetensors.index.json" not in made
            assert all(local[name] == data for name, data in made.items()), (number, fault)
        else:
            assert made == local, (number, fault)


def test_goes_on_where_it_was_stopped(base, bare, server, tmp_path):
    local = files_of(tmp_path / "local")
    shard = "b/in/model-00003-of-00003.safetensors"
    far = len(server.data[shard]) * 0.7
    server.fault = lambda request: (
        "403" if request.key == shard and request.range[0] > far else None
    )
    with pytest.raises(BadInputError, match="credentials"):
        regraft.convert("s3://b/in", tmp_path / "out", to=V5)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.regraft" / "journal").stat().st_size > 1
    server.fault = None
    server.requests.clear()
    report = regraft.convert("s3://b/in", tmp_path / "out", to=V5, resume=True)
    assert report.checkpoint.resumed
    assert files_of(tmp_path / "out") == local


def test_adapters(server, tmp_path):
    adapter = next(
        path.parent
        for path in sorted((Path(__file__).parents[1] / "golden").rglob("adapter_config.json"))
        if "mixtral" in str(path)
    )
    model = Path(__file__).parents[1] / "golden" / "bases" / "mixtral"
    server.put_folder(adapter, "b/lora")
    regraft.convert(adapter, tmp_path / "here", to=V5, model=model)
    regraft.convert("s3://b/lora", "s3://b/made", to=V5, model=model)
    assert server.folder("b/made") == files_of(tmp_path / "here")


def test_what_works_on_this_machine_only(base, server, tmp_path):
    for given in ({"in_place": True}, {"dequantize": True}, {"resume": True}):
        with pytest.raises(BadInputError) as error:
            regraft.convert(
                "s3://b/in", "s3://b/in" if "in_place" in given else "s3://b/x", to=V5, **given
            )
        assert error.value.findings[0].code == "option"


@pytest.mark.parametrize(
    ("src", "dst", "code"),
    [
        ("s3://b/in", "s3://b/in/", "destination-is-source"),
        ("s3://b/in", "s3a://b/in", "destination-is-source"),
        ("s3://b/one/a.safetensors", "s3://b/one/a.safetensors", "destination-is-source"),
        ("s3://b/in", "s3://b/in/sub", "destination-in-source"),
        ("s3://b/in", "s3://b/one.safetensors", "destination-is-file"),
        ("s3://b/in", "{url}/b/out", "bad-address"),
        ("s3://b/in", "hf://org/out", "bad-address"),
    ],
)
def test_places_that_are_not_written_to(base, server, tmp_path, src, dst, code):
    write_tensors(tmp_path / "a.safetensors", mixtral(), {"format": "pt"})
    server.data["b/one/a.safetensors"] = (tmp_path / "a.safetensors").read_bytes()
    server.data["b/one/config.json"] = json.dumps(MIXTRAL).encode()
    before = dict(server.data)
    for given in ({}, {"stage": "s3://b/stage", "part": "0/1"}):
        dst = dst.format(url=server.url)
        if given and dst.startswith("http"):
            continue
        with pytest.raises(BadInputError) as caught:
            regraft.convert(src, dst, to=V5, overwrite=True, **given)
        (finding,) = caught.value.findings
        assert (finding.code, finding.where) == (code, dst.rstrip("/")) and finding.fix
    assert server.data == before


def test_a_path_that_exists_wins(base, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "s3:" / "b" / "in", mixtral())
    server.requests.clear()
    regraft.convert("s3://b/in", tmp_path / "out", to=V5)
    assert not server.requests


def test_slices_are_read_from_a_store(base, server, tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    here = regraft.slices(base, to=V5, names=[name])
    there = regraft.slices("s3://b/in", to=V5, names=[name])
    assert there.runs == here.runs
    assert np.array_equal(there.read()[name], here.read()[name])
    del there, here


def test_every_letter_of_a_name_counts(base, server, tmp_path):
    local = files_of(tmp_path / "local")
    name = "b/run #3/50%25 a?b=c;{é}"
    regraft.convert(base, f"s3://{name}", to=V5)
    assert server.folder(name) == local
    web = f"{server.url}/b/run%20%233/50%2525%20a%3Fb=c;%7B%C3%A9}}"
    for number, source in enumerate((f"s3://{name}", web)):
        regraft.convert(source, tmp_path / f"{number}", to=V5)
        assert files_of(tmp_path / f"{number}") == local
    for address in ("s3://b//out", "s3://b/in/../out", f"{server.url}/b/in#3"):
        with pytest.raises(BadInputError) as error:
            regraft.inspect(address)
        assert error.value.findings[0].code == "bad-address" and error.value.findings[0].fix


def test_web_addresses_that_are_signed(base, server, tmp_path):
    """A signature goes with every request, and nothing shows it; one of a file is good for that file alone."""
    folder = write_folder(tmp_path / "one", mixtral(), shards=1)
    server.data["b/my dir/my model.safetensors"] = (folder / "model.safetensors").read_bytes()

    def fault(request):
        good = request.query.get("sig") == ["se/cret="] and not request.key.endswith(
            "r/config.json"
        )
        return None if good else "403"

    server.fault = fault
    signed = "?sv=1&sig=se%2Fcret%3D"
    report = regraft.convert(f"{server.url}/b/in{signed}", tmp_path / "signed", to=V5)
    assert files_of(tmp_path / "signed") == files_of(tmp_path / "local")
    assert report.source == f"{server.url}/b/in" and "cret" not in str(report.to_dict())
    file = f"{server.url}/b/my%20dir/my%20model.safetensors"
    regraft.convert(f"{file}{signed}", tmp_path / "file", to=V5, model=folder / "config.json")
    regraft.convert(folder, tmp_path / "want", to=V5)
    made, want = files_of(tmp_path / "file"), files_of(tmp_path / "want")
    assert made["my model.safetensors"] == want["model.safetensors"]
    with pytest.raises(BadInputError) as error:
        regraft.inspect(f"{file}?sig=wrongcret")
    assert error.value.findings[0].code == "store-denied" and "cret" not in str(error.value)
