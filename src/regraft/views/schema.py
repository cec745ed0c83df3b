"""What the commands print with ``--json``, as JSON Schema, made from the types that they print.

The descriptions are the docstrings of these types and of their fields.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any

import msgspec

from regraft.checking.certificate import AdapterVerification
from regraft.checking.for_tool import ToolCheck
from regraft.checking.verdict import Check, Row, Verdict
from regraft.checkpoints.inspect import CheckpointInspection
from regraft.checkpoints.slices import SlicesReport
from regraft.checkpoints.verify import Verification
from regraft.dialects.image.inspect import ImageSummary
from regraft.dialects.peft.inspect import Inspected, Inspection, TargetPattern, TensorPattern
from regraft.errors import Finding
from regraft.explaining.diff import Diff
from regraft.explaining.explanation import Explanation
from regraft.layouts.catalog import Catalog
from regraft.merging.extraction import Extraction
from regraft.report import SCHEMA_VERSION, AdapterReport, CheckpointReport, Report
from regraft.rules.lint.book import Linted
from regraft.views.documents import BookList, CodeList, LearnedBook, Probes, ShownBook
from regraft.views.environment import Environment
from regraft.views.outcome import Problem, SourceOutcome


@dataclass(frozen=True, slots=True)
class Failure:
    """What every command prints in place of its result when it fails."""

    error: Problem


DOCUMENTS: dict[str, tuple[Any, ...]] = {
    "convert": (Report, SourceOutcome),
    "inspect": (Inspection, CheckpointInspection, ImageSummary),
    "verify": (Verification, AdapterVerification, SourceOutcome),
    "merge": (Report,),
    "extract": (Extraction,),
    "check": (Check, ToolCheck, SourceOutcome),
    "explain": (Explanation,),
    "diff": (Diff,),
    "learn": (LearnedBook,),
    "probe": (Probes,),
    "slices": (SlicesReport,),
    "layouts": (Catalog,),
    "rules list": (BookList,),
    "rules show": (ShownBook,),
    "rules lint": (Linted,),
    "errors": (CodeList,),
    "env": (Environment,),
    "error": (Failure,),
}
"""What each command prints; ``error`` is what any of them prints when it fails."""

_LEFT_OUT: dict[type, tuple[str, ...]] = {
    AdapterReport: ("trace",),
    CheckpointReport: ("trace",),
    Verification: ("trace",),
    TargetPattern: ("keys",),
    TensorPattern: ("keys",),
    Row: ("keys",),
}
_DERIVED: dict[type, tuple[str, ...]] = {
    Inspected: ("layout", "ranks", "alphas", "scales"),
    CheckpointInspection: ("layout",),
    Verification: ("equal",),
    AdapterVerification: ("equal", "error"),
    Check: ("healthy",),
    Verdict: ("counts",),
    Explanation: ("arrives",),
    Diff: ("equal",),
    Linted: ("sound",),
}
"""Properties that are printed beside the fields."""


def schema_of(document: str) -> dict[str, Any]:
    """The JSON Schema of a document of `DOCUMENTS`.

    >>> schema_of("error")["$defs"]["Problem"]["required"]
    ['kind', 'findings']
    >>> schema_of("error")["$defs"]["Failure"]["required"]
    ['schema_version', 'error']
    """
    definitions: dict[str, Any] = {}
    roots = [_value(of, definitions) for of in DOCUMENTS[document]]
    # A document inside another one, such as a report in an outcome, has its version, too.
    for name in {of.__name__ for some in DOCUMENTS.values() for of in some} & set(definitions):
        _add_version(definitions[name])
    root = roots[0] if len(roots) == 1 else {"anyOf": roots}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"regraft {document} --json" if document != "error" else "a failure",
        **root,
        "$defs": definitions,
    }


def _add_version(root: dict[str, Any]) -> None:
    version = {
        "description": "The version of this schema; it grows when a field is renamed, removed or means another thing.",
        "const": SCHEMA_VERSION,
    }
    made = {
        "regraft": {"description": "The version of regraft that wrote it.", "type": "string"},
        "seconds": {
            "description": "How long the command had taken when it was written.",
            "type": "number",
        },
    }
    root["properties"] = {"schema_version": version, **made, **root["properties"]}
    root["required"] = ["schema_version", *root["required"]]


def _describe(of: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """A reference to the schema of a type, which is added to the definitions."""
    if of.__name__ not in definitions:
        definitions[of.__name__] = {}
        definitions[of.__name__] = _object(of, definitions)
    return {"$ref": f"#/$defs/{of.__name__}"}


def _object(of: type, definitions: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(of, localns=vars(typing) | {"Trace": object})
    told = field_docs(of)
    properties: dict[str, Any] = {}
    names = [name for name in hints if name not in _LEFT_OUT.get(of, ())]
    for name in names:
        properties[name] = _value(hints[name], definitions)
    for name in _DERIVED.get(of, ()):
        getter = getattr(of, name).fget
        properties[name] = _value(typing.get_type_hints(getter)["return"], definitions)
        told[name] = inspect.cleandoc(getter.__doc__)
    for name, text in told.items():
        if name in properties:
            properties[name] = {"description": text, **properties[name]}
    # A finding leaves out what it does not say; everything else is always there.
    required = [n for n in properties if of is not Finding or n in ("code", "message")]
    return {
        "type": "object",
        "description": inspect.cleandoc(of.__doc__ or ""),
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _has_fields(hint: Any) -> bool:
    """Whether it is a dataclass or a struct, which a schema of its own describes."""
    return isinstance(hint, type) and (
        hasattr(hint, "__dataclass_fields__") or issubclass(hint, msgspec.Struct)
    )


def _value(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if _has_fields(hint):
        return _describe(hint, definitions)
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return {"type": "array", "items": _value(arguments[0], definitions)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _value(arguments[1], definitions)}
    parts = [a for a in arguments if _has_fields(a)]
    if parts:
        return {"anyOf": [*(_describe(part, definitions) for part in parts), {"type": "null"}]}
    if float in arguments and origin in (UnionType, typing.Union):
        return {"anyOf": [option for of in arguments for option in _options(of, definitions)]}
    if hint is float:
        return {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}
    schema: dict[str, Any] = msgspec.json.schema(hint)
    return schema


def _options(hint: Any, definitions: dict[str, Any]) -> list[dict[str, Any]]:
    schema = _value(hint, definitions)
    options: list[dict[str, Any]] = schema.get("anyOf", [schema])
    return options


@cache
def _source_of(of: type) -> ast.ClassDef:
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(of))).body
    assert isinstance(found, ast.ClassDef)
    return found


def field_docs(of: type) -> dict[str, str]:
    """The docstrings of a class's fields.

    >>> field_docs(Problem)["findings"]
    'Every problem of the input.'
    """
    docs: dict[str, str] = {}
    name = None
    own = [
        base
        for base in reversed(of.__mro__)
        if base.__module__.partition(".")[0] not in ("builtins", "msgspec")
    ]
    nodes = [node for base in own for node in _source_of(base).body]
    for node in nodes:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif (
            name is not None
            and isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            docs[name] = " ".join(inspect.cleandoc(node.value.value).split())
        else:
            name = None
    return docs
