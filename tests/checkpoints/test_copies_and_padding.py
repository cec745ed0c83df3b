"""Copies, padding and numbers in keys, file to file."""

import json

import numpy as np
import pytest
from making import HEAD, equation_of

import regraft
from regraft.checkpoints import reads
from regraft.checkpoints.gather import Files
from regraft.checkpoints.prepare import prepare
from regraft.checkpoints.verify import verify
from regraft.checkpoints.windows import Windows
from regraft.storage.safetensors import open_tensors, write_tensors

BOOK = (
    HEAD.replace('"test"]', '"tiny"]')
    + equation_of("norm.{l} : a == r{t}.{2 l + 1}.norm : a where t = 2, copies t")
    + equation_of(
        "emb : v i == padded : (v + p) i where v = config.words, p = config.all - v, fill p = 0",
        "p",
    )
)


def x(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.fixture
def folders(tmp_path):
    old = {"norm.0": x(4), "norm.1": x(5), "emb": x(3, 300)}
    new = {f"r{t}.{2 * n + 1}.norm": old[f"norm.{n}"] for n in range(2) for t in range(2)}
    new["padded"] = np.concatenate([old["emb"], np.zeros((2, 300), np.float32)])
    for name, tensors in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name / "model.safetensors", tensors, {})
        config = {"model_type": "tiny", "words": 3, "all": 5}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "book.toml").write_text(BOOK)
    return tmp_path, old, new


def converted(folder, source, to, out):
    with regraft.only_books([regraft.load_book(folder / "book.toml")]):
        regraft.convert(folder / source, folder / out, to=to)
    return open_tensors(folder / out / "model.safetensors")


def test_there_and_back(folders):
    folder, old, new = folders
    for source, to, wanted in (("old", "new", new), ("new", "old", old)):
        made = converted(folder, source, to, f"to-{to}")
        assert made.keys() == wanted.keys()
        assert all(np.array_equal(made[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize(("key", "code"), [("r1.3.norm", "copies-differ"), ("padded", "padding")])
def test_what_would_be_lost_is_an_error(folders, key, code):
    folder, _, new = folders
    new = {k: v.copy() for k, v in new.items()}
    new[key].reshape(-1)[-1] = 9
    write_tensors(folder / "new" / "model.safetensors", new, {})
    with pytest.raises(regraft.BadInputError) as caught:
        converted(folder, "new", "old", "out")
    (finding,) = caught.value.findings
    assert (finding.code, finding.key) == (code, key)
    assert not (folder / "out").exists()


def test_what_is_demanded_of_a_file_that_becomes_shorter(folders, monkeypatch):
    """Read, never mapped: a mapped file would end the process."""
    folder, _, new = folders
    file = folder / "new/model.safetensors"
    look = reads.check_reads

    def shorter(plan, source):
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size - new["padded"].nbytes // 2)
        return look(plan, source)

    monkeypatch.setattr(reads, "check_reads", shorter)
    with pytest.raises(regraft.BadInputError) as caught:
        converted(folder, "new", "old", "out")
    assert [finding.code for finding in caught.value.findings] == ["file-changed"]
    assert not (folder / "out").exists()


VALUES = (
    HEAD.replace('"test"]', '"tiny"]')
    + equation_of(
        "emb : v i == padded : (v + p) (i + q) where v = 3, p = 2, q = 1, i = 30, fill p = 2.5, fill q = -1",
        "p",
    )
    + equation_of("w.{e} : a b == stack : (e + f) b a where e = 2, f = 1, fill f = 7")
)


@pytest.fixture
def filled(tmp_path):
    """Padding that is no zero, in rows, in columns and in a place of a stack, whose types are cast as well."""
    old = {"emb": x(3, 30), "w.0": x(4, 5), "w.1": x(4, 5)}
    padded = np.full((5, 31), 2.5, np.float32)
    padded[:3, :30], padded[:3, 30] = old["emb"], -1
    stack = np.stack([old["w.0"].T, old["w.1"].T, np.full((5, 4), 7, np.float32)])
    new = {"padded": padded, "stack": stack}
    write_tensors(tmp_path / "old.safetensors", old, {})
    (tmp_path / "book.toml").write_text(VALUES)
    return tmp_path, new


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_padding_that_is_no_zero_goes_into_files_and_is_checked_there(filled, dtype):
    folder, new = filled
    book = [regraft.load_book(folder / "book.toml")]
    given = {"rules": book, "dtype": dtype}
    regraft.convert(folder / "old.safetensors", folder / "out.safetensors", to="new", **given)
    made = open_tensors(folder / "out.safetensors")
    wanted = {k: v.astype(dtype or v.dtype) for k, v in new.items()}
    assert all(np.array_equal(made[k], wanted[k]) for k in wanted)
    regraft.convert(folder / "out.safetensors", folder / "back.safetensors", to="old", rules=book)
    back = open_tensors(folder / "back.safetensors")
    assert np.array_equal(back["emb"], wanted["padded"][:3, :30])
    spoiled = {k: np.array(v) for k, v in made.items()}
    spoiled["padded"][4, 3] = 0
    write_tensors(folder / "bad.safetensors", spoiled, {})
    with pytest.raises(regraft.BadInputError, match=r"not all of it is 2\.5"):
        regraft.convert(folder / "bad.safetensors", folder / "no.safetensors", to="old", rules=book)


def test_slices_and_windows_of_padding(filled):
    folder, new = filled
    book = [regraft.load_book(folder / "book.toml")]
    source = folder / "old.safetensors"
    cut = regraft.slices(source, to="new", rules=book, box=[(1, 3), [(0, 1), (2, 4)]])
    made = cut.read()
    assert np.array_equal(made["padded"], new["padded"][1:3][:, [0, 2, 3]])
    assert np.array_equal(made["stack"], new["stack"][1:3][:, [0, 2, 3]])
    with regraft.only_books(book):
        ready = prepare(source, "new")
    windows = Windows(ready.moves, ready.dtypes, ready.source.tensors)
    (file,) = ready.layout.files
    regraft.convert(source, folder / "out.safetensors", to="new", rules=book)
    whole = (folder / "out.safetensors").read_bytes()
    with Files(ready.source.files) as files:
        parts = [
            windows.read(files, file, n, min(n + 37, file.size)) for n in range(0, file.size, 37)
        ]
    assert b"".join(part.tobytes() for part in parts) == whole


def test_verifying_looks_at_padding(folders):
    folder, _, _ = folders
    made = converted(folder, "old", "new", "out")
    spoiled = {k: np.array(v) for k, v in made.items()}
    spoiled["padded"][4, 7] = 1
    write_tensors(folder / "out" / "model.safetensors", spoiled, {})
    with regraft.only_books([regraft.load_book(folder / "book.toml")]):
        found = verify(folder / "old", folder / "out")
    assert [f.key for f in found.differences] == ["padded"]
