"""A conversion in parts, by processes that share a folder: the bytes of a plain one, whatever dies or comes late."""

import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from checkpoints.models import mixtral, snapshot, write_folder
from hypothesis import given
from hypothesis import strategies as st
from killing import run_killed

import regraft
from regraft.checkpoints import engine, noted, shares, staging, stream, windows
from regraft.checkpoints.shares import Piece, pieces_of
from regraft.cli.run import run
from regraft.errors import BadInputError
from regraft.storage import stage as stages
from regraft.storage import work
from regraft.storage.scheduler import Share, find_share

ROOT = Path(__file__).parents[2]
V4, V5 = "transformers-v4", "transformers-v5"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces so small that a little checkpoint has many of them, each marked by itself."""
    monkeypatch.setattr(shares, "SMALLEST", 1024)
    monkeypatch.setattr(stream, "WINDOW", 600)
    monkeypatch.setattr(noted, "_SYNC_BYTES", 1)


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("parts") / "src", mixtral(), shards=3)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def wanted(src):
    regraft.convert(src, src.parent / "wanted", to=V5)
    return snapshot(src.parent / "wanted")


@pytest.fixture
def place(tmp_path):
    """Where a result is to stand, and the options of its parts."""
    return tmp_path / "out", {"to": V5, "stage": tmp_path / "stage", "jobs": 2}


def codes(caught):
    return {finding.code for finding in caught.value.findings}


def test_any_number_of_parts_gives_the_same_bytes(src, wanted, place):
    out, options = place
    for number in (2, 0, 1):
        report = regraft.convert(src, out, part=f"{number}/3", **options)
        part = report.checkpoint.part
        assert (part.number, part.count, part.before) == (number, 3, 0)
        assert part.pieces > 1
        assert not out.exists() and not report.written
    assert part.left == 0
    again = regraft.convert(src, out, part="0/2", **options).checkpoint.part
    assert again.before == again.pieces
    assert regraft.convert(src, out, commit=True, **options).written
    assert snapshot(out) == wanted
    assert [path.name for path in options["stage"].iterdir()] == ["committed"]
    late = regraft.convert(src, out, part="1/2", **options).checkpoint.part
    assert late.before == late.pieces
    assert regraft.convert(src, out, to=V5, stage=options["stage"], abort=True).ended
    assert not options["stage"].exists()
    assert snapshot(out) == wanted


def test_a_file_in_parts(tmp_path, src):
    one = write_folder(tmp_path / "one", mixtral())
    regraft.convert(one / "model.safetensors", tmp_path / "plain.safetensors", to=V5)
    out, options = tmp_path / "out.safetensors", {"to": V5, "stage": tmp_path / "stage"}
    for part in ("0/2", "1/2"):
        regraft.convert(one / "model.safetensors", out, part=part, **options)
    regraft.convert(one / "model.safetensors", out, commit=True, **options)
    assert out.read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


@pytest.mark.parametrize("options", [{}, {"dtype": "*.norm.weight=float16"}])
def test_the_system_copies_what_it_can(src, tmp_path, monkeypatch, options):
    """Long runs are copied by the system, and what is cast is made in memory: the same bytes."""
    monkeypatch.setattr(windows, "_SHORT", 8)
    copied = []
    do = engine.Worker.do
    monkeypatch.setattr(
        engine.Worker, "do", lambda worker, op, out: (copied.append(op.size), do(worker, op, out))
    )
    regraft.convert(src, tmp_path / "plain", to=V5, **options)
    copied.clear()
    for part in ("1/2", "0/2"):
        staged = {"to": V5, "stage": tmp_path / "stage", **options}
        regraft.convert(src, tmp_path / "out", part=part, **staged)
    regraft.convert(src, tmp_path / "out", commit=True, **staged)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "plain")
    data = sum(size for size in copied)
    assert data if options else data == sum(array.nbytes for array in mixtral().values())


def test_overwriting(src, wanted, place):
    out, options = place
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, out, part="0/1", **options)
    assert codes(caught) == {"destination-exists"}
    regraft.convert(src, out, part="0/1", overwrite=True, **options)
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, out, commit=True, **options)
    assert codes(caught) == {"destination-exists"}
    assert snapshot(out) == {"old": b"old"}
    regraft.convert(src, out, commit=True, overwrite=True, **options)
    assert snapshot(out) == wanted


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=6),
    st.integers(20, 60),
    st.integers(1, 12),
)
def test_parts_are_each_piece_once_and_even(sizes, piece, count):
    class File:
        def __init__(self, size):
            self.size = size

    pieces = shares.cut([File(size) for size in sizes], piece)
    parts = [pieces_of(pieces, Share(number, count)) for number in range(count)]
    assert [one for part in parts for one in part] == pieces
    assert sum(one.size for one in pieces) == sum(sizes)
    mean = sum(sizes) / count
    assert all(abs(sum(one.size for one in part) - mean) <= piece for part in parts)


def test_balance_of_what_is_large():
    pieces = [Piece(f, k, k << 26, (k + 1) << 26) for f in range(200) for k in range(75)]
    for count, step in ((64, 16), (1000, 333)):
        mean = sum(piece.size for piece in pieces) / count
        for number in range(0, count, step):
            assert sum(p.size for p in pieces_of(pieces, Share(number, count))) <= 1.1 * mean


SLURM = {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_STEP": "2"}


@pytest.mark.parametrize(
    ("text", "environment", "share"),
    [
        ("3/16", {}, (3, 16)),
        ("0/1", SLURM, (0, 1)),
        (None, {**SLURM, "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
        ("/4", {**SLURM, "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
        ("/16", {"JOB_COMPLETION_INDEX": "0"}, (0, 16)),
        ("2/2", {}, None),
        ("3/2", {}, None),
        ("0/0", {}, None),
        ("-1/2", {}, None),
        ("a/b", {}, None),
        ("2", {}, None),
        ("/16", {}, None),
        (None, {}, None),
        (None, SLURM, None),
        (None, {"JOB_COMPLETION_INDEX": "3"}, None),
        ("/8", {**SLURM, "SLURM_ARRAY_TASK_COUNT": "4"}, None),
        (None, {"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "4"}, None),
        (None, {**SLURM, "SLURM_ARRAY_TASK_COUNT": "1"}, None),
    ],
)
def test_which_part(text, environment, share):
    if share is not None:
        assert find_share(text, environment) == Share(*share)
        return
    with pytest.raises(BadInputError) as caught:
        find_share(text, environment)
    assert codes(caught) == {"bad-part"}


def test_other_stages(src, tmp_path, place):
    out, options = place
    regraft.convert(src, out, part="0/2", **options)

    def fails(code, src=src, **changed):
        with pytest.raises(BadInputError) as caught:
            regraft.convert(src, out, **{"part": "1/2", **options, **changed})
        assert codes(caught) == {code}
        assert not out.exists()
        return caught.value

    fails("stage-options", dtype="bfloat16")
    fails("stage-options", to=V4)
    fails("stage-options", shard_size="2kB")
    fails("stage-incomplete", part=None, commit=True)
    fails("stage-other", src=write_folder(tmp_path / "other", mixtral()))
    for inside in (out, out / "stage", out.parent, src / "stage"):
        fails("stage-place", stage=inside)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    fails("stage-place", stage=tmp_path / "mine")
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, out, to=V5, stage=tmp_path / "mine", abort=True)
    assert codes(caught) == {"stage-place"} and (tmp_path / "mine/notes.txt").exists()
    changed = shutil.copytree(src, tmp_path / "changed" / src.name, copy_function=shutil.copy)
    assert "files of src changed" in str(fails("stage-other", src=changed))
    other = shutil.copytree(src, tmp_path / "another", copy_function=shutil.copy)
    assert "that of another conversion" in str(fails("stage-other", src=other))


def test_a_commit_lists_what_is_missing(src, place):
    out, options = place
    regraft.convert(src, out, part="1/3", **options)
    with pytest.raises(
        BadInputError, match=r"of model-00001-of-00003.safetensors \(\d: bytes 0 to"
    ):
        regraft.convert(src, out, commit=True, **options)
    regraft.convert(src, out, part="0/1", **options)
    [head] = options["stage"].glob("job-*/new/model-00001*")
    data = head.read_bytes()
    head.write_bytes(data[:-1])
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, out, commit=True, **options)
    assert codes(caught) == {"stage-damaged"} and not out.exists()
    head.write_bytes(data)
    regraft.convert(src, out, commit=True, **options)


def test_killed_at_every_mark(src, wanted, tmp_path, place):
    """Each try goes on from where the one before it died."""
    out, options = place
    counted = [(os, "fdatasync"), (os, "rename"), (stages.Stage, "mark")]
    for step in range(200):
        over = run_killed(step % 7, counted, regraft.convert, src, out, part="0/1", **options)
        assert not out.exists()
        if over:
            break
    assert over and step > 5
    regraft.convert(src, out, commit=True, **options)
    assert snapshot(out) == wanted


def test_a_commit_killed_at_any_point(src, wanted, tmp_path):
    staged = tmp_path / "staged"
    regraft.convert(src, tmp_path / "out", to=V5, stage=staged, part="0/1")
    counted = [(os, "rename"), (os, "replace"), (os, "fsync"), (work, "write_file")]
    for step in range(100):
        place = tmp_path / str(step)
        options = {"to": V5, "stage": place / "stage", "commit": True}
        shutil.copytree(staged, place / "stage")
        over = run_killed(step, counted, regraft.convert, src, place / "out", **options)
        if over:
            break
        assert not (place / "out").exists() or snapshot(place / "out") == wanted
        if not (place / "stage/committed").exists():
            regraft.convert(src, place / "out", **options)
        assert snapshot(place / "out") == wanted
        assert [path.name for path in place.iterdir() if "regraft" in path.name] == []
        shutil.rmtree(place)
    assert over and step > 5


class Late:
    """A process at work on a part that stops before its first write, until it is let go on."""

    def __init__(self, *args, **options):
        reading, self.writing = os.pipe()
        there, here = os.pipe()
        self.process = os.fork()
        if self.process:
            os.read(there, 1)
            return
        write = staging.write_all

        def waits(*args):
            os.write(here, b"x")
            os.read(reading, 1)
            staging.write_all = write
            write(*args)

        staging.write_all = waits
        try:
            regraft.convert(*args, **options)
            os._exit(0)
        except BadInputError as error:
            os._exit({"stage-gone": 1}.get(error.findings[0].code, 2))
        finally:
            os._exit(3)

    def go_on(self):
        os.write(self.writing, b"x")
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def test_a_zombie_after_the_commit(src, wanted, place):
    out, options = place
    late = Late(src, out, part="1/2", **{**options, "jobs": 1})
    regraft.convert(src, out, part="0/1", **options)
    regraft.convert(src, out, commit=True, **options)
    assert late.go_on() in (0, 1)
    assert snapshot(out) == wanted
    assert [path.name for path in options["stage"].iterdir()] == ["committed"]


def test_a_zombie_of_a_stage_that_was_ended(src, wanted, place):
    """It marks nothing in a stage of the same conversion that was begun since."""
    out, options = place
    late = Late(src, out, part="1/2", **{**options, "jobs": 1})
    regraft.convert(src, out, abort=True, to=V5, stage=options["stage"])
    first = regraft.convert(src, out, part="0/2", **options).checkpoint.part
    assert late.go_on() == 1
    rest = regraft.convert(src, out, part="1/2", **options).checkpoint.part
    assert first.left == rest.pieces and rest.before == 0
    regraft.convert(src, out, commit=True, **options)
    assert snapshot(out) == wanted


def test_two_commits_at_once(src, wanted, place, monkeypatch):
    """The second takes over from the first, which then finds nothing to put in its place."""
    out, options = place
    regraft.convert(src, out, part="0/1", **options)
    check = staging._check_files

    def meanwhile(ready, folder):
        check(ready, folder)
        monkeypatch.setattr(staging, "_check_files", check)
        regraft.convert(src, out, commit=True, **options)

    monkeypatch.setattr(staging, "_check_files", meanwhile)
    with pytest.raises(BadInputError):
        regraft.convert(src, out, commit=True, **options)
    assert snapshot(out) == wanted


def test_a_full_disk(src, place, monkeypatch):
    out, options = place

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(staging, "write_all", full)
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, out, part="0/1", **options)
    assert codes(caught) == {"cannot-write"}


def test_the_command(src, wanted, place, capsys):
    out, _ = place
    line = ["convert", str(src), str(out), "--to", V5, "--stage", str(out) + ".stage"]
    assert run([*line, "--part", "0/2"]) == 0
    assert "Part 0 of 2: " in capsys.readouterr().out
    assert run([*line, "--commit"]) == 1
    assert "pieces are not there" in capsys.readouterr().err
    assert run([*line, "--part", "1/2"]) == 0
    assert "--commit puts the result in its place" in capsys.readouterr().out
    assert run([*line, "--commit", "-q"]) == 0
    assert snapshot(out) == wanted
    assert run([*line, "--abort"]) == 0
    assert "ended and removed" in capsys.readouterr().out
    assert run([*line, "--abort"]) == 0
    assert run([*line, "--part", "0/2", "--commit"]) == 2
    assert run([*line[:5], "--commit"]) == 2
    assert run([*line, "--part", "3/2"]) == 1
    assert run(["convert", str(src), str(src), *line[2:], "--part", "0/2"]) == 2


# The examples, as a scheduler would run them.


def environment(tmp_path, src, **more):
    binary = tmp_path / "bin"
    if not binary.exists():  # it is never written while an element runs it: "text file busy"
        binary.mkdir()
        (binary / "regraft").write_text(f'#!/bin/sh\nexec {sys.executable} -m regraft "$@"\n')
        (binary / "regraft").chmod(0o755)
    out = str(tmp_path / "out")
    return {
        "PATH": f"{binary}:{os.environ['PATH']}",
        **{"SRC": str(src), "DST": out, "STAGE": out + ".stage"},
        **more,
    }


def test_slurm(src, wanted, tmp_path):
    script = ROOT / "examples/cluster/convert.sbatch"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    array = {"SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "2", "PYTHONHASHSEED": "1"}
    elements = [
        subprocess.Popen(
            ["bash", script],
            env=environment(tmp_path, src, **array, SLURM_ARRAY_TASK_ID=number),
            stdout=subprocess.DEVNULL,
        )
        for number in ("5", "6")
    ]
    assert [element.wait(60) for element in elements] == [0, 0]
    done = subprocess.run(["bash", script, "--commit"], env=environment(tmp_path, src))
    assert done.returncode == 0
    assert snapshot(tmp_path / "out") == wanted


JOB = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "batch/v1"},
        "kind": {"const": "Job"},
        "metadata": {"required": ["name", "labels"]},
        "spec": {
            "additionalProperties": False,
            "required": ["template"],
            "properties": {
                "completionMode": {"enum": ["Indexed", "NonIndexed"]},
                "completions": {"type": "integer", "minimum": 1},
                "parallelism": {"type": "integer", "minimum": 1},
                "backoffLimit": {"type": "integer", "minimum": 0},
                "template": {
                    "properties": {
                        "spec": {
                            "additionalProperties": False,
                            "required": ["containers", "restartPolicy"],
                            "properties": {
                                "restartPolicy": {"enum": ["OnFailure", "Never"]},
                                "volumes": {"items": {"required": ["name"]}},
                                "containers": {
                                    "minItems": 1,
                                    "items": {
                                        "additionalProperties": False,
                                        "required": ["name", "image"],
                                        "properties": {
                                            "name": {"type": "string"},
                                            "image": {"type": "string"},
                                            "args": {"items": {"type": "string"}},
                                            "env": {
                                                "items": {
                                                    "required": ["name", "value"],
                                                    "properties": {"value": {"type": "string"}},
                                                }
                                            },
                                            "resources": {"type": "object"},
                                            "volumeMounts": {
                                                "items": {"required": ["name", "mountPath"]}
                                            },
                                        },
                                    },
                                },
                            },
                        }
                    },
                },
            },
        },
    },
}
"""What the example uses of a Job of batch/v1, as the reference of Kubernetes' API has it."""


def test_kubernetes(src, wanted, place, monkeypatch):
    out, options = place
    text = (ROOT / "examples/cluster/convert.yaml").read_text()
    parts, commit = yaml.safe_load_all(text)
    values = {"SRC": str(src), "DST": str(out), "STAGE": str(options["stage"])}

    def command(job):
        jsonschema.validate(job, JOB)
        pod = job["spec"]["template"]["spec"]
        [container] = pod["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        for entry in container["env"]:
            assert entry["value"].startswith(container["volumeMounts"][0]["mountPath"])
        return [values.get(arg.strip("$()"), arg) for arg in container["args"]]

    assert f"/{parts['spec']['completions']}" in command(parts)
    order = list(range(parts["spec"]["completions"]))
    random.Random(0).shuffle(order)
    for number in order:
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(number))
        assert run([*command(parts), "-q"]) == 0
    assert run([*command(commit), "-q"]) == 0
    assert snapshot(out) == wanted


def test_runners_that_there_are_none_of(src, place):
    out, _ = place
    with pytest.raises(BadInputError, match="no runner 'slurm'") as caught:
        regraft.convert(src, out, to=V5, runner="slurm")
    assert codes(caught) == {"option"}
