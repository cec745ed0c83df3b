"""The pipeline onto a device: chunks, their order, errors and cancellation, on a device that is only played."""

import threading
import time

import numpy as np
import pytest
import torch
from making import plan_of, rule_book
from safetensors.numpy import save_file

from regraft.arrays.apply import apply_plan
from regraft.checkpoints.source import open_weights
from regraft.errors import BadInputError, Finding
from regraft.live import devices
from regraft.live.devices import CHUNK, chunk_size, chunks_of, fill_device
from regraft.live.lazily import LazyFiles


class FakeDevice:
    """A device whose copies begin late, in the order of their queue; a buffer that is reused too soon shows."""

    def __init__(self, fails_at=None):
        self.sent = []
        self.buffers = []
        self.finished = 0
        self.fails_at = fails_at
        self.lock = threading.Lock()

    def pinned(self, size):
        buffer = torch.full((size,), 0xAA, dtype=torch.uint8)
        with self.lock:
            self.buffers.append(buffer)
        return buffer

    def stream(self):
        return []

    def send(self, stream, buffer, size, target, at):
        with self.lock:
            self.sent.append((target, at, size))
            if self.fails_at == len(self.sent):
                raise RuntimeError("the device fell off the bus")
        event = [False]
        stream.append((event, buffer, size, target, at))
        return stream, event

    def wait(self, what):
        stream, event = what
        while not event[0]:
            self._copy(stream)

    def finish(self, stream):
        while stream:
            self._copy(stream)
        with self.lock:
            self.finished += 1

    def _copy(self, stream):
        event, buffer, size, target, at = stream.pop(0)
        target.reshape(-1).view(torch.uint8)[at : at + size] = buffer[:size]
        event[0] = True


EQUATION = """
x.{l}.{e}.w1 : a i, x.{l}.{e}.w3 : b i == y.{l}.up : e (a + b) i where a = b
"""
TURNED = "z.{l} : i o == t.{l} : o i"


@pytest.fixture
def wanted(tmp_path):
    """Tensors that are stacked and joined, turned, and kept; what they should be, and where from."""
    rng = np.random.default_rng(0)
    tensors = {
        f"x.{layer}.{e}.w{w}": rng.integers(0, 9000, (16, 40)).astype(np.int16)
        for layer in range(2) for e in range(4) for w in (1, 3)
    }  # fmt: skip
    tensors |= {f"z.{n}": rng.integers(0, 9000, (30, 50)).astype(np.int16) for n in range(2)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    plan = plan_of(rule_book(EQUATION, TURNED), tensors)
    want = apply_plan(plan, list(tensors.values()))
    lazy = LazyFiles(open_weights([path]))
    found = lazy.state_dict()
    made = apply_plan(plan, [found[name] for name in tensors])
    targets = {name: torch.empty(t.shape, dtype=torch.int16) for name, t in made.items()}
    with lazy.files:
        yield want, [(targets[n], t.cut()) for n, t in made.items()], targets, lazy


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("chunk", [64, 1000, 1 << 20])
def test_every_tensor_arrives_whole(wanted, jobs, chunk):
    want, pairs, targets, lazy = wanted
    device = FakeDevice()
    read = fill_device(pairs, lazy.source.tensors, lazy.files, None, jobs, device, chunk)
    for name, target in targets.items():
        assert np.array_equal(target.numpy(), want[name]), name
    assert read >= sum(t.nbytes for t in want.values())
    assert sum(size for *_, size in device.sent) == sum(t.nbytes for t in want.values())
    assert all(size <= chunk for *_, size in device.sent)
    assert len(device.buffers) <= 2 * jobs
    assert all(len(buffer) == chunk for buffer in device.buffers)
    assert device.finished == min(jobs, len(device.sent))


def test_chunks_come_in_the_order_of_the_files(wanted):
    _, pairs, _, lazy = wanted
    tensors = lazy.source.tensors
    firsts = []
    for chunk in chunks_of(pairs, tensors, 512):
        places = [
            (s, at)
            for one in chunk.strips
            for s, at in zip(one.sources, one.source_at, strict=True)
        ]
        firsts.append(min(int(tensors.starts[s]) + 2 * int(at) for s, at in places))
    assert firsts == sorted(firsts)


def test_a_device_that_fails_stops_all_threads(wanted):
    _, pairs, _, lazy = wanted
    device = FakeDevice(fails_at=3)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="fell off the bus"):
        fill_device(pairs, lazy.source.tensors, lazy.files, None, 3, device, 64)
    assert threading.active_count() == before
    assert device.finished == 3
    assert len(device.sent) < 30


def test_a_file_that_ends_early_stops_all_threads(wanted, monkeypatch):
    _, pairs, _, lazy = wanted
    device, real, count = FakeDevice(), devices.fill_slices, 0

    def failing(*args):
        nonlocal count
        count += 1
        if count == 5:
            raise BadInputError(Finding("file-changed", "it ended early"))
        return real(*args)

    monkeypatch.setattr(devices, "fill_slices", failing)
    with pytest.raises(BadInputError):
        fill_device(pairs, lazy.source.tensors, lazy.files, None, 2, device, 64)
    assert device.finished == 2
    sent = len(device.sent)
    time.sleep(0.05)
    assert len(device.sent) == sent


def test_an_interrupt_waits_for_what_has_begun(wanted, monkeypatch):
    _, pairs, _, lazy = wanted
    device = FakeDevice()
    real = threading.Thread.join

    def interrupted(self, *args):
        monkeypatch.setattr(threading.Thread, "join", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill_device(pairs, lazy.source.tensors, lazy.files, None, 2, device, 64)
    assert device.finished == 2


def test_buffers_are_small_where_there_is_little_to_read():
    assert chunk_size(1 << 40, 16) == CHUNK
    assert chunk_size(100, 4) == 1 << 20
    assert 1 << 20 < chunk_size(1 << 27, 4) < CHUNK


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_real_one(wanted):
    want, pairs, _, lazy = wanted
    device = torch.device("cuda", torch.cuda.current_device())
    there = [(target.to(device), strips) for target, strips in pairs]
    fill_device(there, lazy.source.tensors, lazy.files, device, 2)
    for (target, _), expected in zip(there, want.values(), strict=True):
        assert np.array_equal(target.cpu().numpy(), expected)
