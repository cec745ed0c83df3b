"""Copies, padding and numbers in keys, file to file."""

import json

import numpy as np
import pytest
from making import HEAD, equation_of

import regraft
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


def test_padding_with_another_value_is_refused(folders):
    folder, _, _ = folders
    (folder / "book.toml").write_text(BOOK.replace("fill p = 0", "fill p = 1"))
    with pytest.raises(regraft.RefusedError, match="zeros only"):
        converted(folder, "old", "new", "out")
