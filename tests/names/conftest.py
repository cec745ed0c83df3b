"""Live models take torch, transformers and PEFT; names alone take nothing."""

from importlib.util import find_spec

if any(find_spec(name) is None for name in ("torch", "transformers", "peft")):
    collect_ignore = ["test_live.py", "test_resolve.py"]
