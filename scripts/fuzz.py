"""Changes sound inputs at random and looks for internal errors, hangs, memory and wrong results.

python scripts/fuzz.py [--seconds 60] [--seed N] [--target NAME] [--keep FOLDER]

Each input goes through regraft in a process of its own that is forked from one with everything imported, with 10
seconds of its own and 600 MB. Wanted is a result, or one of regraft's errors; a bare exception, a hang or a death is a
find, and the input is kept. A converted adapter, and what it is converted back to, is compared with what the source's
factors say, in float64, by numpy and the names alone (``dense.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dense import assert_same
from dialect_files import Sound, assert_as_much, change_dialect_file, copied, energy, sound_inputs

import regraft
from regraft.dialects.image.inspect import summarize
from regraft.dialects.image.recognise import weights_in
from regraft.errors import RegraftError
from regraft.rules.lint.book import lint_file
from regraft.storage.safetensors import open_tensors
from regraft.storage.torch_file import open_torch

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SECONDS, MEMORY = 10, 600 << 20
ODD = [
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    "",
    "\ud800",
    "a" * 5000,
    None,
    True,
    [],
    {},
    [[]],
    {"a": 1},
    "(a|a)*$",
    ".*",
    "(",
    "all-linear",
    [1],
    ["q_proj"],
    {"q_proj": 2},
]


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes lost, doubled or other ones."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not made:
            break
        at = rng.randrange(len(made))
        how = rng.randrange(5)
        if how == 0:
            made[at] = rng.randrange(256)
        elif how == 1:
            made[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            del made[at : at + rng.choice((1, 4, 50))]
        elif how == 3:
            made[at:at] = made[at : at + rng.choice((1, 8, 100))]
        else:
            made[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, 2**64 - 1)))
    return bytes(made)


def change_json(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """One value of a JSON document replaced, removed or nested."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.5):
        key = rng.choice(list(value))
        how = rng.random()
        if how < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.25:
            return {**value, str(rng.choice(ODD)): value[key]}
        return {**value, key: change_json(value[key], rng, depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return [*value[:at], change_json(value[at], rng, depth + 1), *value[at + 1 :]]
    return rng.choice(ODD)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def change_file(path: Path, rng: random.Random) -> None:
    """A text or binary file, changed as what it is, or byte by byte."""
    if path.suffix == ".json" and rng.random() < 0.8:
        value = json.loads(path.read_text())
        for _ in range(rng.choice((1, 1, 2, 3))):
            value = change_json(value, rng)
            if not isinstance(value, dict):
                break
        write_json(path, value)
    elif path.suffix == ".safetensors" and rng.random() < 0.6:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
        name = rng.choice([n for n in header if n != "__metadata__"])
        if rng.random() < 0.3:
            header[name + rng.choice(("", ".x", "0", "\ud800"))] = header.pop(name)
        elif rng.random() < 0.3:
            header[name]["shape"] = header[name]["shape"][::-1]
        else:
            header[name] = change_json(header[name], rng)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    else:
        path.write_bytes(change_bytes(path.read_bytes(), rng))


def fuzz_adapter(folder: Path, rng: random.Random) -> None:
    case = rng.choice(ADAPTERS)
    shutil.copytree(case, folder / "in")
    change_file(rng.choice([p for p in sorted((folder / "in").iterdir()) if p.is_file()]), rng)
    try_adapter(folder)


def fuzz_base(folder: Path, rng: random.Random) -> None:
    shutil.copytree(rng.choice(ADAPTERS), folder / "in")
    shutil.copytree(GOLDEN / "bases" / "mixtral", folder / "base")
    change_file(folder / "base" / "config.json", rng)
    try_adapter(folder, folder / "base")


def try_adapter(folder: Path, base: Path = GOLDEN / "bases" / "mixtral") -> None:
    regraft.inspect(folder / "in", model=base)
    regraft.convert(folder / "in", folder / "out", to="transformers-v5", model=base)
    if (folder / "in" / "adapter_model.safetensors").exists():
        same(folder / "in", folder / "out")
        regraft.convert(folder / "out", folder / "back", to="transformers-v4", model=base)
        same(folder / "in", folder / "back")


def same(before: Path, after: Path) -> None:
    assert_same(before, after)
    compared[0] += 1


def as_much(before: float | None, after: float | None) -> None:
    assert_as_much(before, after)
    compared[0] += before is not None and after is not None


def fuzz_checkpoint(folder: Path, rng: random.Random) -> None:
    shutil.copytree(GOLDEN / "bases" / "mixtral", folder / "in")
    weights = next(iter(sorted((folder / "in").glob("*.safetensors"))))
    if rng.random() < 0.5:
        names = open_tensors(weights)
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, weights.name)}
        write_json(folder / "in" / "model.safetensors.index.json", change_json(index, rng))
    else:
        change_file(weights, rng)
    regraft.convert(folder / "in", folder / "out", to="transformers-v5")


def fuzz_bin(folder: Path, rng: random.Random) -> None:
    path = folder / "adapter_model.bin"
    if rng.random() < 0.5:
        parts = [
            b"K\x01",
            b"q\x00",
            b"h\x00",
            b"\x85",
            b"\x86",
            b"\x87",
            b"(",
            b"t",
            b"]",
            b"}",
            b"a",
            b"e",
            b"s",
            b"u",
            b"Q",
            b"R",
            b"b",
            b"0",
            b"N",
            b"\x88",
            b"X\x01\x00\x00\x00a",
            b"r\x00\x00\x00\x10",
            b"ctorch\nFloatStorage\n",
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ccollections\nOrderedDict\n",
            pickle.dumps({"a": 1}, 2)[2:-1],
            b"\x8a\x08" + b"\xff" * 8,
        ]
        data = b"\x80\x02" + b"".join(rng.choices(parts, k=rng.choice((5, 30, 3000)))) + b"."
        with zipfile.ZipFile(
            path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        ) as out:
            out.writestr("a/data.pkl", data)
            out.writestr("a/data/a", b"\0" * 100)
    else:
        path.write_bytes(change_bytes(rng.choice(BINS), rng))
    open_torch(path)


def fuzz_dialect(folder: Path, rng: random.Random) -> None:
    sound = rng.choice(SOUND)
    source, files = copied(sound, folder)
    change_dialect_file(rng.choice(files), rng, change_file, change_json)
    if source.is_file() or sound.dialect == "peft-image":
        summarize(weights_in(source) or source)
    else:
        regraft.inspect(source, model=sound.base)
    out = folder / ("out.safetensors" if source.is_file() else "out")
    regraft.convert(source, out, to=sound.to, model=sound.base)
    before = energy(source, sound.dialect)
    as_much(before, energy(out, sound.to))
    if sound.dialect not in UNWRITTEN:
        back = folder / ("back.safetensors" if source.is_file() else "back")
        try:
            regraft.convert(out, back, to=sound.dialect, model=sound.base)
        except RegraftError:
            return  # one that another tool cannot hold
        as_much(before, energy(back, sound.dialect))


UNWRITTEN = ("tinker", "megatron-bridge", "onetrainer", "bfl", "xlabs", "peft-image")


def fuzz_book(folder: Path, rng: random.Random) -> None:
    text = rng.choice(BOOKS)
    words = [
        "(",
        ")",
        "+",
        "==",
        ",",
        "where",
        "{*p}",
        "{l}",
        "...",
        "a",
        "2",
        "[",
        "]",
        '"',
        "\n",
        "9" * 500,
        "(" * 500,
    ]
    for _ in range(rng.choice((1, 2, 5, 30))):
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(words) + text[at + rng.choice((0, 1, 5)) :]
    (folder / "book.toml").write_text(text)
    lint_file(folder / "book.toml")
    with regraft.only_books([regraft.load_book(folder / "book.toml")]):
        regraft.convert(ADAPTERS[0], folder / "out", to="transformers-v5")


TARGETS: dict[str, Callable[[Path, random.Random], None]] = {
    "adapter": fuzz_adapter,
    "base": fuzz_base,
    "checkpoint": fuzz_checkpoint,
    "bin": fuzz_bin,
    "dialect": fuzz_dialect,
    "book": fuzz_book,
}
ADAPTERS = sorted(
    p.parent
    for p in GOLDEN.rglob("adapter_config.json")
    if "mixtral" in str(p) and "v5" not in str(p)
)
BOOKS = [p.read_text() for p in sorted(Path(regraft.__file__).parent.glob("rules/library/*.toml"))]
BINS: list[bytes] = []
SOUND: list[Sound] = []


def make_bins() -> None:
    """Files that torch wrote, in both forms; none where torch is not installed."""
    try:
        import peft  # noqa: F401 - so that no process has to
        import torch
        import transformers  # noqa: F401
    except ImportError:
        return
    state = {"a": torch.randn(4, 3), "b": torch.arange(5), "c": torch.ones(2, 2).t()}
    for zipped in (True, False):
        with tempfile.NamedTemporaryFile() as file:
            torch.save(state, file.name, _use_new_zipfile_serialization=zipped)
            BINS.append(Path(file.name).read_bytes())


def attempt(target: str, seed: int, folder: Path) -> str | None:
    """Try one input in a process of its own; what is wrong, if anything."""
    report = folder / "report"
    child = os.fork()
    if child == 0:
        code = 0
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(10 * SECONDS)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                TARGETS[target](folder, random.Random(seed))
            except RegraftError:
                code = 3
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            helpers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            (folder / "told").write_text(f"{peak >> 10} {helpers >> 10} {compared[0]}")
            if peak * 1024 > MEMORY and peak > before:
                report.write_text(f"{peak >> 10} MB")
                code = 2
        except BaseException:
            report.write_text(traceback.format_exc())
            code = 2
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGPROF)
        return f"no end after {SECONDS} s" if late else f"signal {os.WTERMSIG(status)}"
    outcome = os.WEXITSTATUS(status)
    counts["converted" if outcome == 0 else "refused"] += outcome in (0, 3)
    if (folder / "told").exists():
        own, helpers, comparisons = map(int, (folder / "told").read_text().split())
        counts["comparisons"] += comparisons
        for name, size in (("most MB", own), ("most MB of a helper", helpers)):
            counts[name] = max(counts[name], size)
    return report.read_text() if report.exists() else None


counts: Counter[str] = Counter()
compared = [0]
"""How often what an adapter adds was compared with what its source adds, in this process."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    parser.add_argument("--target", choices=sorted(TARGETS))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-finds"), help="where finds are put")
    options = parser.parse_args()
    make_bins()
    made = tempfile.TemporaryDirectory(prefix="regraft-sound-")
    SOUND.extend(sound_inputs(Path(made.name) / "sound"))
    end, tried, seen = time.monotonic() + options.seconds, 0, Counter[str]()
    names = [options.target] if options.target else sorted(TARGETS)
    while time.monotonic() < end:
        seed = options.seed + tried
        target = names[tried % len(names)]
        with tempfile.TemporaryDirectory(prefix="regraft-fuzz-") as temporary:
            folder = Path(temporary)
            wrong = attempt(target, seed, folder)
            if wrong is not None:
                lines = [line.strip() for line in wrong.strip().splitlines()]
                place = next((x for x in reversed(lines) if x.startswith("File ")), "")
                what = f"{target}: {lines[-1][:200]} {place}"
                seen[what] += 1
                if seen[what] == 1:
                    kept = options.keep / f"{target}-{seed}"
                    shutil.copytree(folder, kept, dirs_exist_ok=True, ignore_dangling_symlinks=True)
                    print(f"{kept}: {what}", flush=True)
        tried += 1
    made.cleanup()
    print(f"{tried} inputs from seed {options.seed}: {dict(counts)}, {len(seen)} kinds of finds")
    return 1 if seen else 0


if __name__ == "__main__":
    sys.exit(main())
