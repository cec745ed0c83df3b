"""What provokes the codes of files, of headers and of the places that are written to."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from checkpoints.models import mixtral, write_folder
from errors.lab import BASES, V5, provokes

import regraft
from regraft.checkpoints.on_ray import Cluster
from regraft.storage import json_files, objects
from regraft.storage.dtypes import DTYPES, count_cells
from regraft.storage.folder import check_destination, copy_file
from regraft.storage.header import read_header
from regraft.storage.json_files import load_json
from regraft.storage.objects import Client, Store, StoreError
from regraft.storage.stage import Stage
from regraft.storage.stamp import Stamp
from regraft.storage.work import Work, check_own, open_work
from regraft.views.html import check_page_place

# Where the result is written


@provokes("left")
def _(lab):
    """Ctrl-C after the first bytes are on disk."""
    note = Work.note

    def interrupted(work, units):
        note(work, units or [(0, 0)])
        raise KeyboardInterrupt

    lab.patch.setattr(Work, "note", interrupted)
    return lab.run("convert", BASES / "mixtral", lab.out, "--to", V5)


@provokes("other-work")
def _(lab):
    """A run of other options was interrupted there."""
    note = Work.note

    def interrupted(work, units):
        note(work, units or [(0, 0)])
        raise KeyboardInterrupt

    with lab.patch.context() as patch:
        patch.setattr(Work, "note", interrupted)
        lab.run("convert", BASES / "mixtral", lab.out, "--to", V5, "--shard-size", "400B")
    return lab.run("convert", BASES / "mixtral", lab.out, "--to", V5, "--resume")


@provokes("destination-exists")
def _(lab):
    lab.out.mkdir()
    check_destination(lab.path / "src", lab.out, overwrite=False)


@provokes("destination-is-source")
def _(lab):
    check_destination(lab.path, lab.path, overwrite=False)


@provokes("destination-in-source")
def _(lab):
    check_destination(lab.path, lab.out, overwrite=False)


@provokes("source-in-destination")
def _(lab):
    check_destination(lab.path / "inside", lab.path, overwrite=True)


@provokes("destination-in-use")
def _(lab):
    lab.patch.chdir(lab.path)
    check_destination(lab.path.parent / "src", lab.path, overwrite=True)


@provokes("destination-is-file")
def _(lab):
    check_destination(lab.path / "src", lab.file(b"", "file"), overwrite=True)


@provokes("page-exists")
def _(lab):
    check_page_place(lab.file(b"weights"))


@provokes("work-folder")
def _(lab):
    (lab.path / "work").symlink_to(lab.path)
    check_own(lab.path / "work")


@provokes("cannot-write")
def _(lab):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    src = lab.adapter()
    lab.patch.setattr("regraft.dialects.peft.saving.write_tensors", full)
    lab.convert(src)


@provokes("cannot-copy")
def _(lab):
    copy_file(lab.file(b"x"), lab.path / "missing" / "copy")


@provokes("no-space")
def _(lab):
    src = lab.adapter()
    lab.patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e6, 0, 1))
    lab.convert(src)


@provokes("in-use")
def _(lab):
    src = lab.adapter()
    with open_work(lab.out):
        lab.convert(src)


# Files


@provokes("missing-file")
def _(lab):
    load_json(lab.path / "nothing.json")


@provokes("not-a-file")
def _(lab):
    load_json(lab.path)


@provokes("bad-path")
def _(lab):
    # Not every release of Python stops at this where a path is looked up; all do where it is opened.
    def stop(path):
        raise ValueError("embedded null byte")

    lab.patch.setattr(Path, "stat", lambda self, **_: stop(self))
    read_header("a\0b")


@provokes("unreadable-file")
def _(lab):
    def forbid(*_):
        raise PermissionError(errno.EACCES, "no")

    path = lab.file(b"{}")
    lab.patch.setattr(os, "open", forbid)
    load_json(path)


@provokes("file-changed")
def _(lab):
    path = lab.file(b"{}")
    with path.open("rb") as file:
        stamp = Stamp.of(path, file.fileno())
        path.write_bytes(b"{ }")
        stamp.check(file.fileno())


class _Refusing(Store):
    """A store that gives one answer."""

    url = "s3://bucket"

    def __init__(self, trouble):
        self.trouble = trouble

    def read(self, key, start, end):
        raise StoreError(self.trouble, "as a store says it")


def _ask(lab, trouble):
    lab.patch.setattr(objects, "PAUSE", 0.0)
    Client(_Refusing(trouble)).first("model.safetensors", 8)


@provokes("store-failed")
def _(lab):
    _ask(lab, "transient")


@provokes("store-denied")
def _(lab):
    _ask(lab, "forbidden")


@provokes("no-ranges")
def _(lab):
    _ask(lab, "no-ranges")


@provokes("bad-dcp")
def _(lab):
    (lab.out.parent / "run").mkdir()
    (lab.out.parent / "run" / ".metadata").write_bytes(b"nothing")
    regraft.convert(lab.out.parent / "run", lab.out, to="transformers-v5")


@provokes("which-key")
def _(lab):
    dcp = Path(__file__).parents[1] / "storage" / "dcp" / "nested"
    regraft.convert(dcp, lab.out, to="transformers-v5", key="nothing")


@provokes("offline")
def _(lab):
    regraft.convert("hf://no-such/model", lab.out, to="transformers-v5")


@provokes("bad-address")
def _(lab):
    _ask(lab, "unfit")


@provokes("file-too-large")
def _(lab):
    lab.patch.setattr(json_files, "_MAX_JSON_BYTES", 1)
    load_json(lab.file(b"{}"))


@provokes("link-outside")
def _(lab):
    src = lab.checkpoint()
    (src / "notes.txt").symlink_to(lab.file(b"", "secret"))
    lab.convert(src)


@provokes("system")
def _(lab):
    src = lab.adapter()

    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    lab.patch.setattr("regraft.explaining.inspect.inspected", fail)
    return lab.run("inspect", src)


_CONTENT = {
    "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n",
    "html-page": b"<!DOCTYPE html><html>",
    "zip-archive": b"PK\x03\x04\xff\xff\xff\xff....",
    "not-json": b"{",
    "not-utf8": b'{"\xff": 1}',
    "not-an-object": b"[]",
    "duplicate-key": b'{"a": 1, "a": 2}',
}


@provokes(*_CONTENT)
def _(lab, code):
    load_json(lab.file(_CONTENT[code]))


@provokes("torch-missing")
def _(lab):
    from regraft.adapters.families.seeded import _torch

    lab.patch.setitem(__import__("sys").modules, "torch", None)
    _torch()


@provokes("package-missing")
def _(lab):
    from regraft.dialects.gguf import _package

    lab.patch.setitem(__import__("sys").modules, "gguf", None)
    _package()


@provokes("bad-gguf")
def _(lab):
    regraft.convert(lab.file(b"GGUF\x03", "adapter.gguf"), lab.path / "out", to="transformers-v5")


@provokes("bad-torch-file")
def _(lab):
    from regraft.storage.torch_file import open_torch

    open_torch(lab.file(b"\x80\x02}q\x00.", "adapter_model.bin"))


@provokes("not-tensors")
def _(lab):
    regraft.convert_state_dict([], to=V5)


# Headers

_ONE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
_TWO = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}

_HEADERS = {
    "header-not-utf8": (b'{"\xff":1}', b""),
    "header-not-json": (b'{"a":', b""),
    "header-not-object": (b"[]", b""),
    "metadata-not-text": ({"__metadata__": {"a": 1}}, b""),
    "bad-name": (b'{"\\ud800":' + json.dumps(_ONE).encode() + b"}", b"x"),
    "bad-entry": ({"t": 5}, b""),
    "overlap": ({"a": _TWO, "b": _ONE | {"data_offsets": [1, 2]}}, b"xx"),
    "hole": ({"a": _ONE, "b": _ONE | {"data_offsets": [2, 3]}}, b"xxx"),
    "trailing-bytes": ({}, b"x"),
    "more-problems": ({str(i): 5 for i in range(1001)}, b""),
}


@provokes(*_HEADERS)
def _(lab, code):
    lab.header(*_HEADERS[code])


_TENSORS = {
    "missing-field": {"shape": ...},
    "unknown-field": {"strides": [1]},
    "unknown-dtype": {"dtype": "F9"},
    "bad-shape": {"shape": [-1]},
    "bad-offsets": {"data_offsets": [1, 0]},
    "size-mismatch": {"shape": [2]},
}


@provokes(*_TENSORS)
def _(lab, code):
    lab.tensor(**_TENSORS[code])


@provokes("file-truncated")
def _(lab):
    read_header(lab.file(b"123"))


@provokes("header-too-large")
def _(lab):
    read_header(lab.file((2**63).to_bytes(8, "little") + b"{}"))


@provokes("packed-row")
def _(lab):
    count_cells(DTYPES["F4"], (2, 3), where="a file", key="t")


# Checkpoints


@provokes("option")
def _(lab):
    lab.convert(lab.path, jobs=2)


@provokes("bad-size")
def _(lab):
    lab.convert(lab.checkpoint(), shard_size="much")


@provokes("bad-dtype")
def _(lab):
    lab.convert(lab.checkpoint(), dtype="int3")


@provokes("bad-jobs")
def _(lab):
    lab.convert(lab.checkpoint(), jobs=0)


@provokes("no-index")
def _(lab):
    src = lab.checkpoint(shards=2)
    (src / "model.safetensors.index.json").unlink()
    next(src.glob("*00001*")).rename(src / "other.safetensors")
    lab.convert(src)


@provokes("index")
def _(lab):
    src = lab.checkpoint(shards=2)
    (src / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    lab.convert(src)


@provokes("one-shard")
def _(lab):
    lab.convert(next(lab.checkpoint(shards=2).glob("*00001*")))


@provokes("unfinished")
def _(lab):
    src = lab.checkpoint()
    (src / ".regraft-in-place").touch()
    lab.convert(src)


@provokes("not-in-place")
def _(lab):
    src = lab.checkpoint()
    regraft.convert(src, src, to=V5, in_place=True)


@provokes("no-such-key")
def _(lab):
    regraft.slices(lab.checkpoint(), to=V5, names=["nothing"])


@provokes("bad-box")
def _(lab):
    regraft.slices(lab.checkpoint(), to=V5, box={"lm_head.weight": [(0, 99)]})


@provokes("out-buffer")
def _(lab):
    name = "lm_head.weight"
    regraft.slices(lab.checkpoint(), to=V5, names=[name]).read({name: np.zeros(1, np.int8)})


_RANKS = {
    "heads": (["--tp", "4"], {}),
    "uneven": (["--ep", "2"], {}),
    "parallel-plan": (["--tp", "2"], {"pp": {}}),
}


@provokes(*_RANKS)
def _(lab, code):
    options, change = _RANKS[code]
    tp = {"model.layers.*.self_attn.q_proj": "colwise"}
    ep = {"model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm"}
    plan = lab.json({"tp": tp, "ep": ep, **change}, "plan.json")
    args = ("slices", lab.checkpoint(), "--to", V5, *options, "--plan", plan, "--rank", 0)
    return lab.run(*args)


@provokes("packed")
def _(lab):
    _convert_quantised(lab, "gptq", bits=4)


@provokes("companion")
def _(lab):
    _convert_quantised(lab, "fbgemm_fp8", make="per_channel")


def _convert_quantised(lab, name, make=None, **more):
    from checkpoints import test_quantised as quantised

    tensors = quantised.quantised(getattr(quantised, make or name))
    lab.convert(lab.checkpoint(tensors, quantised.method(name, **more)))


@provokes("mixed-dtypes")
def _(lab):
    from checkpoints.models import mixtral

    tensors = mixtral()
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    lab.convert(lab.checkpoint(tensors | {name: tensors[name].astype(np.float16)}))


@provokes("differs")
def _(lab):
    from checkpoints.models import mixtral, write_folder

    src = lab.checkpoint()
    other = write_folder(lab.path / "other", {n: t + 1 for n, t in mixtral().items()})
    return lab.run("verify", src, other)


@provokes("other-format")
def _(lab):
    file = lab.path / "tf_model.h5"
    file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(60))
    lab.convert(file)


# Work in parts


def staged(lab, source=None, **options):
    """Do a part, or what else is said, in a stage."""
    src = lab.path / (source or "src")
    if not src.exists():
        write_folder(src, mixtral(), shards=1 if source is None else 2)
    options = {"part": "0/1", "to": V5, "stage": lab.path / "stage", **options}
    return regraft.convert(src, lab.out, **options)


@provokes("bad-part")
def _(lab):
    staged(lab, part="3/2")


@provokes("stage-other")
def _(lab):
    staged(lab)
    staged(lab, "other")


@provokes("stage-options")
def _(lab):
    staged(lab)
    staged(lab, dtype="bfloat16")


@provokes("stage-incomplete")
def _(lab):
    staged(lab, part=None, commit=True)


@provokes("stage-committed")
def _(lab):
    staged(lab)
    staged(lab, part=None, commit=True)
    staged(lab, part=None, commit=True)


@provokes("stage-gone")
def _(lab):
    """Somebody ends the work while a part is at it."""
    make = Stage.make

    def meanwhile(stage, name, size):
        make(stage, name, size)
        staged(lab, part=None, abort=True)

    lab.patch.setattr(Stage, "make", meanwhile)
    staged(lab)


@provokes("stage-damaged")
def _(lab):
    staged(lab)
    [file] = (lab.path / "stage").glob("job-*/new/*.safetensors")
    file.write_bytes(b"")
    staged(lab, part=None, commit=True)


@provokes("stage-place")
def _(lab):
    (lab.path / "stage").mkdir()
    lab.file(b"", "stage/mine")
    staged(lab)


@provokes("cluster")
def _(lab):
    lab.patch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    Cluster("local")
