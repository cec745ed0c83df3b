"""Stores beyond this machine: answers that are whole and of one version, or an error."""

import io
import sys

import pytest
from object_server import serving

from regraft.errors import BadInputError
from regraft.storage import objects
from regraft.storage.objects import TRIES, Client, StoreError
from regraft.storage.outline import draw
from regraft.storage.probe import open_regular
from regraft.storage.ranges import RemoteRanges, open_ranges
from regraft.storage.stamp import Stamp
from regraft.storage.stand_ins import RemoteFile, remote_at
from regraft.storage.stores import open_store

DATA = bytes(range(256)) * 40


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(objects, "PAUSE", 0.0)
    for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("REGION", "r")):
        monkeypatch.setenv(f"AWS_{name}", value)
    with serving() as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        running.data["b/in/x.bin"] = DATA
        yield running


def stores(server):
    return [open_store("s3://b/in"), open_store(f"{server.url}/b/in")]


def test_reads_what_is_there(server):
    for client in stores(server):
        found, first = client.first("x.bin", 100)
        assert (found.key, found.size, bytes(first)) == ("x.bin", len(DATA), DATA[:100])
        assert bytes(client.read(found, 300, 700)) == DATA[300:700]
        assert client.first("y.bin", 10) is None
        counted = {"requests": 3, "read": 500, "written": 0, "retries": 0, "waited": 0}
        assert client.traffic.to_dict() == counted
    assert [row.key for row in open_store("s3://b/in").listed()] == ["x.bin"]
    assert open_store(f"{server.url}/b/in").listed() is None


def failing(fault, times):
    """Lets the next requests fail, but for those of one byte that ask a busy store how long it is busy."""
    left = [None] * times
    return lambda request: fault if request.range != (0, 0) and left and not left.pop() else None


@pytest.mark.parametrize("fault", ["503", "500", "429", "drop", "short", "less", "more"])
def test_asks_again_for_what_may_pass(server, fault):
    for client in stores(server):
        found, _ = client.first("x.bin", 1)
        server.fault = failing(fault, 2)
        assert bytes(client.read(found, 5, 905)) == DATA[5:905]
        assert client.traffic.retries == 2
        next_one = len(server.requests)
        server.fault = lambda request, at=next_one: fault if request.number == at else None
        assert bytes(client.first("x.bin", 100)[1]) == DATA[:100]
        assert client.traffic.retries == 3
        server.fault = lambda request: fault
        with pytest.raises(BadInputError) as error:
            client.read(found, 5, 905)
        assert error.value.findings[0].code == "store-failed"
        assert f"{TRIES} tries" in error.value.findings[0].message
        server.fault = None


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("whole", "no-ranges"),
        ("etag", "file-changed"),
        ("401", "store-denied"),
        ("403", "store-denied"),
        ("404", "missing-file"),
    ],
)
def test_gives_up_at_once_on_what_stays(server, fault, code):
    for client in stores(server):
        found, _ = client.first("x.bin", 1)
        begun = len(server.requests)
        server.fault = lambda request: fault
        with pytest.raises(BadInputError) as error:
            client.read(found, 5, 905)
        assert error.value.findings[0].code == code
        assert len(server.requests) == begun + 1
        server.fault = None


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_what_is_listed_is_what_is_read(server, scheme, monkeypatch):
    """Azure writes ETags without quotes where it lists, and with them where it answers."""
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "t")
    monkeypatch.setenv("GOOGLE_BASE_URL", server.url)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "one")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", server.url)
    client = open_store(f"{scheme}://b/in")
    client.put("new", b"12", create=True)
    with pytest.raises(BadInputError, match="exists already"):
        client.put("new", b"34", create=True)
    new, old = client.listed()
    assert (new.key, old.key) == ("new", "x.bin")
    assert bytes(client.read(old, 5, 905)) == DATA[5:905]
    client.delete("new")
    assert client.first("new", 2) is None


def test_another_version_is_an_error(server):
    for client in stores(server):
        found, _ = client.first("x.bin", 1)
        server.data["b/in/x.bin"] = DATA[::-1]
        with pytest.raises(BadInputError, match="changed while it was read"):
            client.read(found, 5, 905)
        server.data["b/in/x.bin"] = DATA


def test_writes_whole_objects(server):
    client = open_store("s3://b/out")
    client.put("small", b"123", create=True)
    with pytest.raises(BadInputError) as error:
        client.put("small", b"456", create=True)
    assert error.value.findings[0].code == "destination-exists"
    assert server.data["b/out/small"] == b"123"

    def parts(fails):
        for number in range(3):
            yield bytes([number]) * (6 << 20)
        if fails:
            raise KeyError("gone")

    client.stream("large", parts(False), 18 << 20)
    assert server.data["b/out/large"] == b"".join(parts(False))
    with pytest.raises(KeyError):
        client.stream("half", parts(True), 18 << 20)
    assert "b/out/half" not in server.data
    assert not server.uploads, "an upload that fails is aborted"
    client.delete("small")
    assert "b/out/small" not in server.data


def test_a_file_that_stands_for_an_object(server):
    outline = draw("s3://b/in/x.bin", open_store("s3://b/in"), "x.bin", whole=False)
    try:
        assert remote_at(outline.path).where == "s3://b/in/x.bin"
        file, size = open_regular(outline.path)
        with file:
            assert (size, file.read()) == (len(DATA), DATA)
            file.seek(-10, io.SEEK_END)
            assert (file.tell(), file.read()) == (len(DATA) - 10, DATA[-10:])
        stamp = Stamp.of(outline.path)
        assert (stamp.size, bool(stamp.version)) == (len(DATA), True)
        ranges = open_ranges(outline.path, stamp)
        assert isinstance(ranges, RemoteRanges)
        one, other = bytearray(10), bytearray(500)
        ranges.fill([memoryview(one), memoryview(other)], 90)
        assert bytes(one + other) == DATA[90:600]
        with pytest.raises(EOFError):
            ranges.fill([memoryview(bytearray(20))], len(DATA) - 10)
        assert RemoteFile(remote_at(outline.path)).seekable()
    finally:
        outline.close()
    assert remote_at(outline.path) is None
    assert not outline.root.parent.exists()


def test_names_that_lead_out_are_refused(server):
    outline = draw("s3://b/in", open_store("s3://b/in"), None, whole=False)
    try:
        with pytest.raises(BadInputError, match="leads out of its folder"):
            outline.keep("../../x", b"1")
    finally:
        outline.close()


def test_a_store_whose_library_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(BadInputError) as error:
        open_store("s3://b/in")
    assert error.value.findings[0].code == "package-missing"
    assert error.value.findings[0].fix == "pip install 'regraft[cloud]'"


@pytest.mark.parametrize("address", ["nothing://b/in", "s3://"])
def test_addresses_that_are_none(address):
    with pytest.raises(BadInputError) as error:
        open_store(address)
    assert error.value.findings[0].code in ("bad-address", "package-missing")


@pytest.fixture
def waits(monkeypatch):
    """The waits, none of which is waited."""
    waited: list[float] = []
    monkeypatch.setattr(objects, "pause", lambda seconds: waited.append(round(seconds)) or True)
    return waited


IN_A_MINUTE = "Mon, 02 Jan 2023 00:01:00 GMT"


@pytest.mark.parametrize("status", ["503", "429"])
@pytest.mark.parametrize("after", ["60", IN_A_MINUTE])
def test_leaves_a_busy_store_alone_for_as_long_as_it_asks(
    server, waits, monkeypatch, status, after
):
    monkeypatch.setattr(objects.time, "time", lambda: 1672617600.0)
    server.date = "Mon, 02 Jan 2023 00:00:00 GMT"
    for client in stores(server):
        found, _ = client.first("x.bin", 1)
        begun = len(server.requests)
        # Each try of obstore's is followed by a request that asks how long.
        fault = f"{status} after {after}"
        server.fault = lambda r, begun=begun, fault=fault: fault if r.number < begun + 4 else None
        assert bytes(client.read(found, 5, 905)) == DATA[5:905]
        assert waits == [60, 60]
        assert client.traffic.to_dict() == {
            "requests": 6,
            "read": 901,
            "written": 0,
            "retries": 2,
            "waited": 120,
        }
        waits.clear()


def test_gives_up_where_a_store_asks_for_too_long_a_wait(server, waits):
    for client in stores(server):
        found, _ = client.first("x.bin", 1)
        server.fault = lambda request: "503 after 3600"
        with pytest.raises(BadInputError, match="alone for 3600 s, longer than the 300 s") as error:
            client.read(found, 5, 905)
        assert error.value.findings[0].code == "store-failed"
        assert "after that time" in error.value.findings[0].fix
        server.fault = None
    assert not waits


def test_what_says_nothing_is_asked_again_soon(server, waits):
    for client in stores(server):
        found, _ = client.first("x.bin", 1)
        begun = len(server.requests)
        server.fault = lambda request, begun=begun: "429" if request.number == begun else None
        assert bytes(client.read(found, 5, 905)) == DATA[5:905]
    assert waits == [0, 0]


def test_waits_before_it_writes_again(server, waits):
    client = open_store("s3://b/out")
    server.fault = lambda request: "503 after 9" if request.number < 2 else None
    client.put("x", b"data")
    assert server.data["b/out/x"] == b"data"
    assert waits == [9]


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"retry-after": "12"}, 12),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": IN_A_MINUTE, "Date": "Mon, 02 Jan 2023 00:00:30 GMT"}, 30),
        ({"Retry-After": "Sun, 01 Jan 2023 00:00:00 GMT", "Date": IN_A_MINUTE}, 0),
        ({"RateLimit": '"resolvers";r=0;t=85'}, 85),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": ""}, None),
        ({"Retry-After": "Mon, 99 Jan 2023 00:00:00 GMT"}, None),
        ({}, None),
    ],
)
def test_reads_how_long_to_wait(headers, wait):
    assert objects.asked_wait(headers) == wait


def test_a_put_whose_answer_was_lost_is_no_other_object(server, monkeypatch):
    client = open_store("s3://b/out")
    put = type(client.store).put

    def lost(store, key, data, *, create):
        monkeypatch.setattr(type(client.store), "put", put)
        put(store, key, data, create=create)
        raise objects.StoreError("transient", "the connection broke off")

    monkeypatch.setattr(type(client.store), "put", lost)
    client.put("x", b"data", create=True)
    with pytest.raises(BadInputError, match="exists already"):
        client.put("x", b"other", create=True)
    assert server.data["b/out/x"] == b"data"


def test_says_how_to_be_let_in(server):
    server.fault = lambda request: "403"
    for address, how in (("s3://b/in", "aws configure"), (f"{server.url}/b/in", "signed")):
        with pytest.raises(BadInputError) as error:
            open_store(address).first("x.bin", 1)
        assert how in error.value.findings[0].fix


def test_a_server_that_stalls_is_given_up_sooner(monkeypatch):
    """Each try runs out of time, so that as many as for quick failures would take minutes."""
    now = [0.0]

    class Stalled:
        url = "http://host"

        def read(self, key, start, end):
            now[0] += 60
            raise StoreError("transient", "operation timed out")

    monkeypatch.setattr("regraft.storage.objects.time.monotonic", lambda: now[0])
    monkeypatch.setattr("regraft.storage.objects.pause", lambda seconds: True)
    monkeypatch.setattr("regraft.storage.objects._STALLED", {})
    for _ in range(2):  # who asks again at once does not wait again
        with pytest.raises(BadInputError, match="no answer in 2 tries: operation timed out"):
            Client(Stalled()).first("x.bin", 8)
        assert now[0] == 120
    now[0] += 100
    with pytest.raises(BadInputError):
        Client(Stalled()).first("x.bin", 8)
    assert now[0] == 340
