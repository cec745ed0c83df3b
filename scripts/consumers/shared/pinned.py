"""Functions of packages that do not import on a CPU, taken unchanged from the pinned archive.

The archive is downloaded by pip into a temporary folder (or into CONSUMERS_CACHE, where it is kept), and never
installed. `cut` runs single functions and classes of one of its files, with stand-ins for what they import.
"""

import __future__

import ast
import builtins
import functools
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from pathlib import Path

PINS = Path(__file__).parents[3] / "requirements/consumers.txt"
# A version without a suffix for the device, and no compiler: nothing is built but the metadata that pip asks for.
ENVIRONMENT = {"VLLM_TARGET_DEVICE": "empty"}


class NotThereError(Exception):
    """A package that could not be had."""


def pinned(package):
    """The requirement of a package that is downloaded, and not installed: `vllm==0.33.0`."""
    found = re.search(rf"(?m)^({re.escape(package)}==\S+) *; *extra == .archive", PINS.read_text())
    if found is None:
        raise NotThereError(f"{package} is not pinned in {PINS.name}")
    return found[1]


@functools.cache
def kept():
    """Where archives go: CONSUMERS_CACHE, or a folder that is gone with the process."""
    folder = os.environ.get("CONSUMERS_CACHE")
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return Path(folder)
    made = tempfile.TemporaryDirectory()
    kept.folder = made
    return Path(made.name)


@functools.cache
def archive(package, source=False):
    """The folder with a pinned package's Python files. Raises `NotThereError`.

    `source`: take the source archive where the wheel is large; its metadata is made without isolation.
    """
    requirement = pinned(package)
    folder = kept() / requirement.replace("==", "-")
    if (folder / "done").exists():
        return folder
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", str(folder)]
    command += ["--no-build-isolation", "--no-binary", package] * source + [requirement]
    version = requirement.partition("==")[2]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_VERSION_OVERRIDE": version}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    files = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    if done.returncode or not files:
        raise NotThereError(f"{requirement} could not be downloaded: {done.stderr.strip()[-200:]}")
    if files[0].suffix == ".whl":
        with zipfile.ZipFile(files[0]) as opened:
            names = [n for n in opened.namelist() if n.endswith(".py")]
            opened.extractall(folder, names)
    else:
        with tarfile.open(files[0]) as opened:
            members = [m for m in opened.getmembers() if m.name.endswith(".py")]
            for member in members:
                member.name = member.name.partition("/")[2]
            opened.extractall(folder, members, filter="data")
    files[0].unlink()
    (folder / "done").touch()
    return folder


def parse(folder, path):
    """The module's tree."""
    return ast.parse((folder / path).read_text(), path)


def cut(folder, path, names, given):
    """Run definitions of one file, unchanged, and return the namespace that they are in.

    `names` are functions, classes and constants of the module; `given` is what stands for its imports.
    """
    body = [node for node in parse(folder, path).body if _names(node) & set(names)]
    left = set(names).difference(*map(_names, body))
    if left:
        raise NotThereError(f"{path} has no {', '.join(sorted(left))}")
    # Dataclasses look for the module that they are in.
    made = types.ModuleType(f"cut:{path}")
    sys.modules[made.__name__] = made
    space = vars(made)
    space |= given
    # Annotations name what is not imported.
    flag = __future__.annotations.compiler_flag
    module = ast.Module(body, [])
    exec(compile(module, path, "exec", flag), space)
    return space


def _names(node):
    """What a statement of a module defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {each.id for each in targets if isinstance(each, ast.Name)}


def attributes(folder, path, name, wanted, given):
    """Values that a class gives its attributes, of those that are `wanted`."""
    space = {"__builtins__": builtins, **given}
    for node in ast.walk(parse(folder, path)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for each in node.body:
                if _names(each) & set(wanted):
                    exec(compile(ast.Module([each], []), path, "exec"), space)
    return {key: space[key] for key in wanted if key in space}


def stand_in(name, given):
    """A module for what functions import as they are called."""
    for number in range(1, name.count(".") + 1):
        outer = ".".join(name.split(".")[:number])
        sys.modules.setdefault(outer, types.ModuleType(outer))
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update({k: v for k, v in given.items() if not k.startswith("__")})


class Quiet:
    """A logger, or anything else that is called and not asked for an answer."""

    def __getattr__(self, name):
        return lambda *_, **__: None
