"""Which family an adapter is of.

A family is found by its file: that of ``peft_type`` ``VERA`` is ``vera.py``, and what LoRA's config can ask for is in
``lora/``. Nothing but the file of the family in question is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

from regraft.adapters import families
from regraft.adapters.families.base import Family
from regraft.adapters.families.lora_variants import Mixed


def family_of(config: Mapping[str, Any]) -> type[Family] | None:
    """The family of an adapter; ``None`` for plain LoRA, and for what is bound to no module.

    >>> family_of({"peft_type": "VERA"}).title
    'VeRA'
    >>> family_of({"peft_type": "LORA", "use_dora": True}).title
    'DoRA'
    >>> family_of({"peft_type": "LORA", "use_dora": False}) is None
    True
    """
    named = families_in(str(config.get("peft_type")).lower()) + _ADDED.get()
    found = [family for family in named if family.covers(config)]
    return found[0] if len(found) == 1 else Mixed if found else None


_ADDED: ContextVar[tuple[type[Family], ...]] = ContextVar("added", default=())


@contextmanager
def also(family: type[Family]) -> Iterator[None]:
    """Let there be a family more, in this thread, as long as this lasts."""
    token = _ADDED.set((*_ADDED.get(), family))
    try:
        yield
    finally:
        _ADDED.reset(token)


def added_families() -> tuple[type[Family], ...]:
    """Those that stand beside this room's."""
    return _ADDED.get()


def all_families() -> tuple[type[Family], ...]:
    """All families whose tensors belong to modules of the base, by name; plain LoRA has a path of its own."""
    names = sorted(module.name for module in iter_modules(families.__path__))
    found = [family for name in names for family in families_in(name)]
    return tuple(sorted(found, key=lambda family: family.title.lower()))


@lru_cache(maxsize=256)
def families_in(name: str) -> tuple[type[Family], ...]:
    """The families that a module of this room defines, or the modules of a package of it; none where there is none."""
    path = f"{families.__name__}.{name}"
    if not name.isidentifier() or find_spec(path) is None:
        return ()
    modules = [import_module(path)]
    below = iter_modules(getattr(modules[0], "__path__", ()))
    modules += [import_module(f"{path}.{name}") for name in sorted(m.name for m in below)]
    return tuple(
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Family)
        and value.__module__ == module.__name__
        and value.types
        and value.title
    )
