"""How a call walks through the rooms of the package: functions, modules, and changes of room.

A room is what stands directly under ``regraft/``. Each way is called twice in a process of its own, and the second
call is traced, so that imports and caches do not count, and no way is shortened by what another one imported. Of every
function the first call counts: what a reader who follows the way has to open, one after the other.

    python scripts/walk.py                 # the five ways, as a table
    python scripts/walk.py adapter --modules   # one of them, with what it visits
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import regraft

ROOT = Path(regraft.__file__).parent
TESTS = Path(__file__).parents[1] / "tests"
CASE, BASE = TESTS / "golden/cases/mixtral__gud_attn", TESTS / "golden/bases/mixtral"


@dataclass
class Walk:
    """What was called, in the package alone."""

    functions: set[tuple[str, str, int]] = field(default_factory=set)
    visits: Counter[str] = field(default_factory=Counter)
    """How often a module was entered from another one."""
    changes: int = 0
    """How often the way led from one room into another."""
    _module: str = ""

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """Take note of one call."""
        if event != "call":
            return
        path = frame.f_code.co_filename
        if not path.startswith(str(ROOT)) or frame.f_code.co_name.startswith("<"):
            return  # comprehensions and lambdas are part of the function that they stand in
        module = path[len(str(ROOT)) + 1 : -len(".py")]
        function = module, frame.f_code.co_qualname, frame.f_code.co_firstlineno
        if function in self.functions:
            return
        self.functions.add(function)
        if module != self._module:
            self.visits[module] += 1
            self.changes += bool(self._module) and room_of(module) != room_of(self._module)
            self._module = module


def room_of(module: str) -> str:
    """The room of a module, by its path in the package."""
    return module.partition("/")[0]


def trace(way: Callable[[], object]) -> Walk:
    """The walk of a call that was made once before."""
    way()
    walk = Walk()
    sys.setprofile(walk)
    try:
        way()
    finally:
        sys.setprofile(None)
    return walk


def command(*args: str | Path) -> Callable[[], object]:
    """A command line, each time into a folder that is not there yet."""
    from regraft.cli import main

    def run() -> None:
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
            words = [str(scratch) + "/out" if word == "OUT" else str(word) for word in args]
            status = main(words)
        assert status in (0, 4), status

    return run


def load() -> Callable[[], object]:
    """An old adapter into a live model."""
    import torch
    from transformers import AutoModelForCausalLM

    def run() -> None:
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        regraft.load_adapter(model, CASE)

    return run


def state_dict() -> Callable[[], object]:
    """The state dict of a live model, in the old layout."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE)
    return lambda: regraft.convert_state_dict(model.state_dict(), to="transformers-v4", model=model)


WAYS: dict[str, Callable[[], Callable[[], object]]] = {
    "adapter": lambda: command("convert", CASE, "OUT", "--to", "transformers-v5"),
    "checkpoint": lambda: command("convert", BASE, "OUT", "--to", "transformers-v5"),
    "load_adapter": load,
    "convert_state_dict": state_dict,
    "check": lambda: command("check", CASE, "--model", BASE),
}


def main() -> None:
    """Print what the ways do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", help=f"some of: {', '.join(WAYS)}")
    parser.add_argument("--modules", action="store_true", help="list the modules by visits")
    given = parser.parse_args()
    if len(given.ways) != 1:
        print(f"{'way':20} functions modules rooms room changes", flush=True)
        for name in given.ways or WAYS:
            more = ["--modules"] if given.modules else []
            subprocess.run([sys.executable, __file__, name, *more], check=True)
        return
    (name,) = given.ways
    walk = trace(WAYS[name]())
    rooms = {room_of(module) for module in walk.visits}
    print(
        f"{name:20} {len(walk.functions):9} {len(walk.visits):7} {len(rooms):5} {walk.changes:12}"
    )
    if given.modules:
        for module, visits in walk.visits.most_common():
            print(f"    {visits:4}  {module}")


if __name__ == "__main__":
    main()
