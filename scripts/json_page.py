"""The page of the documentation that describes what ``--json`` prints, from the schemas."""

from __future__ import annotations

import json
from typing import Any

from regraft.views.schema import DOCUMENTS, schema_of

HEAD = """\
# What `--json` prints

Every command prints one JSON document to stdout with `--json`, and nothing else there; messages go to stderr.
`regraft schema COMMAND` prints the [JSON Schema](https://json-schema.org) of it, and the tests hold the commands to
it. New fields may come, so ignore what you do not know; `schema_version` grows when one is renamed, removed or means
something else, and the changelog says so. Numbers that JSON does not have are text: `"NaN"`, `"Infinity"`,
`"-Infinity"`. This page is made by `make pictures`.

"""


def json_page() -> str:
    """The page in Markdown."""
    text = HEAD
    told: set[str] = set()
    for document in DOCUMENTS:
        schema = schema_of(document)
        names = [name for name in schema["$defs"] if name not in told]
        told |= set(names)
        title = (
            "A failure, of any command" if document == "error" else f"`regraft {document} --json`"
        )
        text += f"## {title}\n\n"
        for name in names:
            text += _table(name, schema["$defs"][name])
    return text.rstrip() + "\n"


def _table(name: str, schema: dict[str, Any]) -> str:
    first = schema["description"].split("\n\n")[0].replace("``", "`")
    lines = [f"### {name}", "", first, "", "| field | type | |", "|---|---|---|"]
    for field, value in schema["properties"].items():
        told = value.get("description", "").replace("``", "`").replace("|", "\\|")
        optional = "" if field in schema["required"] else " (may be left out)"
        lines.append(f"| `{field}` | {_type(value)}{optional} | {told} |")
    return "\n".join(lines) + "\n\n"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "prefixItems" in schema:
        return "[" + ", ".join(map(_type, schema["prefixItems"])) + "]"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}" if "items" in schema else "list"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return f"object of {_type(inner)}" if isinstance(inner, dict) else "object"
    return str(schema.get("type", "anything"))
