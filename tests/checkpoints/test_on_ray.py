"""Parts handed out by Ray, with a stand-in for Ray: `make cluster` has the real one, and lets workers and nodes die."""

import pickle
import sys
from types import SimpleNamespace

import pytest
from checkpoints.models import mixtral, snapshot, write_folder

import regraft
from regraft.checkpoints import shares
from regraft.errors import BadInputError

V5 = "transformers-v5"


class Ray:
    """What is used of Ray; tasks are done when they are waited for, the last one first."""

    exceptions = SimpleNamespace(RayError=type("RayError", (Exception,), {}))

    def __init__(self):
        self.shipped, self.options, self.cancelled, self.lost = [], {}, [], set()

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 3.0}

    def put(self, value):
        return pickle.dumps(value)

    def remote(self, **options):
        self.options = options

        def wrap(function):
            def begin(*args):
                self.shipped.append(pickle.dumps(args))
                return function, pickle.dumps(args)

            return SimpleNamespace(remote=begin)

        return wrap

    def wait(self, tasks):
        return [tasks[-1]], tasks[:-1]

    def get(self, tasks):
        results = []
        for function, args in tasks:
            shared, part = pickle.loads(args)
            if part in self.lost:
                raise self.exceptions.RayError("the worker died")
            results.append(function(pickle.loads(shared), part))
        return results

    def cancel(self, task):
        self.cancelled.append(task)


@pytest.fixture
def ray(monkeypatch):
    made = Ray()
    monkeypatch.setitem(sys.modules, "ray", made)
    monkeypatch.setattr(shares, "SMALLEST", 1024)
    return made


@pytest.fixture
def src(tmp_path):
    return write_folder(tmp_path / "src", mixtral(), shards=2)


def test_the_parts_and_the_commit(src, ray, tmp_path, monkeypatch):
    regraft.convert(src, tmp_path / "plain", to=V5)
    told = []
    monkeypatch.chdir(tmp_path)
    options = {"to": V5, "runner": "ray", "part": "/5", "jobs": 2}
    report = regraft.convert("src", "out", progress=lambda *row: told.append(row), **options)
    assert report.written and report.checkpoint.part is None
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain", "src"]
    assert len(ray.shipped) == 5 and ray.options["num_cpus"] == 2
    assert [row[0] for row in told] == ["out"] * 5
    assert told[-1][1:] == (report.checkpoint.bytes,) * 2


def test_how_many_parts(src, ray, tmp_path):
    regraft.convert(src, tmp_path / "out", to=V5, runner="ray")
    assert len(ray.shipped) == 1
    for part in ("1/2", "x", "/0"):
        with pytest.raises(BadInputError) as caught:
            regraft.convert(src, tmp_path / "more", to=V5, runner="ray", part=part)
        assert caught.value.findings[0].code == "bad-part"


def test_a_part_that_fails(src, ray, tmp_path):
    """What is done stays in the stage, and the same call goes on from there."""
    out, options = tmp_path / "out", {"to": V5, "runner": "ray", "part": "/4"}
    ray.lost.add("1/4")
    with pytest.raises(BadInputError, match="the worker died") as caught:
        regraft.convert(src, out, **options)
    assert caught.value.findings[0].code == "cluster"
    assert len(ray.cancelled) == 1 and not out.exists()
    ray.lost.clear()
    regraft.convert(src, out, **options)
    assert out.exists()
    with pytest.raises(BadInputError) as caught:
        regraft.convert(src, out, **options)
    assert caught.value.findings[0].code == "destination-exists"


def test_without_ray(src, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInputError, match=r"pip install 'regraft\[ray\]'"):
        regraft.convert(src, tmp_path / "out", to=V5, runner="ray")
