"""What regraft itself does not need: packages that some commands ask for, and the extras that bring them."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

_EXTRAS = {
    "accelerate": "transformers",
    "boto3": "s3",
    "botocore": "s3",
    "diffusers": "diffusers",
    "gguf": "gguf",
    "huggingface_hub": "hub",
    "obstore": "cloud",
    "peft": "transformers",
    "ray": "ray",
    "torch": "transformers",
    "transformers": "transformers",
    "yaml": "litgpt",
}


def install_line(package: str) -> str:
    """How to install a package: by the extra that brings it, where there is one.

    >>> install_line("peft"), install_line("fsspec")
    ("pip install 'regraft[transformers]'", 'pip install fsspec')
    """
    extra = _EXTRAS.get(package)
    return f"pip install {package}" if extra is None else f"pip install 'regraft[{extra}]'"


@cache
def is_installed(package: str) -> bool:
    """Whether a package is there; it is not imported."""
    return find_spec(package) is not None


def lacking(*packages: str) -> str | None:
    """How to install the first of some packages that is not there; ``None`` where all of them are.

    >>> lacking("numpy") is None
    True
    """
    return next((install_line(name) for name in packages if not is_installed(name)), None)


def or_ask_transformers() -> str:
    """Another way where no rule book knows a model; empty where transformers is there, and was asked."""
    line = lacking("transformers", "torch")
    return "" if line is None else f"; or {line}, so that transformers is asked what it knows"


def explained(error: ModuleNotFoundError, what: str) -> ModuleNotFoundError:
    """The same error with a message that says what needs the package, and how to install it.

    >>> print(explained(ModuleNotFoundError("", name="not_there"), "regraft.load_adapter"))
    regraft.load_adapter needs not_there, which is not installed: pip install not_there
    """
    package = (error.name or "").partition(".")[0]
    if not package or is_installed(package):
        return error
    message = f"{what} needs {package}, which is not installed: {install_line(package)}"
    return ModuleNotFoundError(message, name=error.name, path=error.path)
