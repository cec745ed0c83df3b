"""Writes site/tables.js: what the page that inspects files in a browser has to know of dialects and rule books.

Writes the heads of the rule books, too, into the one file that every command reads.

    python scripts/make_site.py          write it
    python scripts/make_site.py --check  fail where it is not what would be written

The page has no other copy of any table. In keys of rule books ``{}`` stands for an index and ``{*}`` for any number of
whole segments; keys, kinds and outcomes stand once, and are named by their number.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from regraft.adapters import detect
from regraft.adapters.families import lora_variants
from regraft.adapters.provenance import KEY as PROVENANCE
from regraft.dialects import (
    gguf,
    litgpt,
    megatron_bridge,
    mlx,
    nemo,
    registry,
    skyrl,
    stacked,
    tinker,
    tool_files,
    torchtune,
    unread,
    unsloth,
)
from regraft.dialects.image import convert as image_convert
from regraft.dialects.image import (
    delta,
    grouping,
    inspect,
    leaves,
    prefixes,
    recognise,
)
from regraft.dialects.image import peft as image_peft
from regraft.dialects.image.families import BODIES, CLIP_V4, DENOISER, FAMILIES, Family
from regraft.dialects.image.header import ADAPTER_METADATA
from regraft.dialects.image.modules import Names, body_names, names_of
from regraft.dialects.image.origin import KEY as ORIGIN
from regraft.dialects.peft import (
    config,
    config_check,
    packing,
    scan,
    source,
    targeting,
    writing,
)
from regraft.equation.notation import Hole, Key, Segments
from regraft.layouts.names import known_layouts, layout_of_packing
from regraft.rules.book import HEADS, Book, Parameters, Rule, heads_of_library, library
from regraft.storage import formats
from regraft.storage.dtypes import DTYPES
from regraft.storage.header import MAX_HEADER_BYTES
from regraft.storage.header_check import MAX_DIMS, MAX_NAME_LENGTH, MAX_NAME_PARTS

SITE = Path(__file__).parents[1] / "site"
TABLES = SITE / "tables.js"
HEAD = """\
// Written by scripts/make_site.py from regraft's rule books and dialects; not to be changed by hand.
"""


class Pool:
    """Things that stand once, and are named by their number."""

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}

    def number(self, thing: Hashable) -> int:
        return self.numbers.setdefault(thing, len(self.numbers))

    def things(self) -> list[Any]:
        return list(self.numbers)


def expression(pattern: str | re.Pattern[str]) -> str:
    """A regular expression as JavaScript writes it."""
    text = pattern if isinstance(pattern, str) else pattern.pattern
    return text.replace("(?P<", "(?<")


def glob(key: Key) -> str:
    """A key's template.

    >>> from regraft.equation.notation import parse_key
    >>> glob(parse_key("{*p}.layers.{3 b + r}.w1"))
    '{*}.layers.{}.w1'
    """
    return "".join(
        "{}" if isinstance(part, Hole) else "{*}" if isinstance(part, Segments) else part
        for part in key.parts
    )


# -- rule books


class Books:
    """Rule books in few words."""

    def __init__(self) -> None:
        self.keys, self.kinds, self.outcomes = Pool(), Pool(), Pool()

    def table(self, book: Book) -> dict[str, Any]:
        return {
            "name": book.name,
            "title": book.title,
            "layouts": book.layouts,
            "adapters": [book.left_adapters, book.right_adapters],
            "tells": book.tells,
            "types": book.model_types,
            "rules": [self.rule(rule) for rule in book.rules],
            "carries": [
                [self.keys.number(glob(carry.term.key)), self.kinds.number(carry.kind)]
                for carry in book.carries
                if carry.term.key is not None
            ],
            "parameters": [self.parameters(book, table) for table in book.parameters],
        }

    def rule(self, rule: Rule) -> list[Any]:
        """What tells its outcome from other rules', and the keys of either side with their kinds."""
        equation = rule.equation
        sides = (equation.left, rule.left_kinds), (equation.right, rule.right_kinds)
        outcome = tuple((tuple(map(str, terms)), kinds) for terms, kinds in sides)
        return [
            self.outcomes.number(outcome),
            *(
                [
                    [self.keys.number(glob(term.key)), self.kinds.number(kind)]
                    for term, kind in zip(terms, kinds, strict=True)
                    if term.key is not None
                ]
                for terms, kinds in sides
            ),
        ]

    def parameters(self, book: Book, table: Parameters) -> dict[str, Any]:
        kinds = tuple(
            detect._parameter_kinds(book, f"{table.module}.{name}") for name in table.names
        )
        within = [
            next(
                (
                    number
                    for number, rule in enumerate(book.rules)
                    for term in (rule.equation.left if side == "left" else rule.equation.right)
                    if term.key is not None and str(term.key).startswith(f"{table.module}.")
                ),
                -1,
            )
            for side in ("left", "right")
        ]
        return {
            "module": self.keys.number(glob(table.module)),
            "sides": table.sides,
            "names": table.names,
            "within": within,
            "outcome": self.outcomes.number((table.sides, table.names, kinds)),
        }


def books() -> dict[str, Any]:
    pools = Books()
    tables = [pools.table(book) for book in library()]
    return {
        "keys": pools.keys.things(),
        "kinds": pools.kinds.things(),
        "books": tables,
        "layouts": list(known_layouts()),
    }


# -- dialects


def dialects() -> dict[str, Any]:
    known = registry.dialects()
    return {
        "titles": {name: known[name].title for name in known},
        "usual": {name: getattr(known[name], "layout", None) for name in known},
        "written_by": tool_files.WRITTEN_BY,
        "split": tool_files.SPLIT,
        "packed": expression(tool_files.PACKED),
        "inner": tool_files.INNER,
        "outer": tool_files.OUTER,
        "provenance": PROVENANCE,
        "files": {
            "config": tool_files.CONFIG,
            "weights": tool_files.WEIGHTS,
            "bin": tool_files.WEIGHTS_BIN,
            "mlx": mlx.WEIGHTS,
            "nemo": nemo.OWN,
            "run": megatron_bridge.RUN,
            "torchtune": torchtune.WEIGHTS,
            "litgpt": litgpt.CONFIG,
        },
        "ends": {
            "torchtune": [torchtune._A, torchtune._B, torchtune._M],
            "litgpt": [litgpt._A, litgpt._B],
        },
        "unsloth": {
            "flat": unsloth.FLAT,
            "record": unsloth.RECORD,
            "fixed": unsloth.FIXED,
            "grouped": unsloth.GROUPED,
            "families": sorted(unsloth.FAMILIES),
        },
        "nemo": {
            "stamp": nemo.STAMP,
            "stamps": nemo.STAMPS,
            "native": expression(nemo.NATIVE),
            "version": nemo._VERSION_OF,
        },
        "tinker": {"head": tinker.HEAD, "attention": expression(tinker._ATTENTION)},
        "stacked": {
            "name": expression(stacked.STACKED),
            "plain": stacked._PLAIN,
        },
        "skyrl": expression(skyrl._EXPERT),
        "gguf": {
            "architectures": dict(gguf.architectures()),
            "alpha": gguf._ALPHA,
            "architecture": gguf.ARCHITECTURE,
            "embedding": gguf._EMBEDDING,
            "norm": gguf._NORM,
        },
        "peft": {
            "prefix": scan.PREFIX,
            "types": sorted(config_check.PEFT_TYPES),
            "needed": dict(config_check._NEEDED),
            "fields": {name: kind.expected for name, kind in config_check._FIELDS.items()},
            "most_digits": source._MOST_DIGITS,
            "leave_out": {
                "heads": sorted(targeting._HEADS),
                "classifiers": sorted(targeting._CLASSIFIERS),
                "first_number_since": targeting._FIRST_NUMBER_SINCE,
            },
            "version": writing.PEFT_VERSION,
            "variants": config.VARIANTS,
            "inits": list(lora_variants.BASE_CHANGING_INITS),
            "wrappers": scan._WRAPPERS,
            "holders": scan.HOLDERS,
            "factor": expression(scan._FACTOR),
            "since": packing.SINCE,
            "before": packing.BEFORE,
            "layout_of": {name: layout_of_packing(name) for name in packing.PACKINGS},
        },
        "foreign": [[expression(p), dims, tool] for p, dims, tool in unread._KEYS],
    }


# -- image models


def image() -> dict[str, Any]:
    layouts = Pool()
    kinds = Pool()

    def modules(names: Names) -> list[list[Any]]:
        return [
            [meant.shown, meant.ending, kinds.number(meant.kind)]
            + ([] if spelled is meant else [spelled.shown])
            for spelled, meant in names.dotted
        ]

    def family(one: Family) -> dict[str, Any]:
        known = {layout: names_of(one, layout) for layout in one.layouts}
        return {
            "name": one.name,
            "title": one.title,
            "component": one.component,
            "excludes": expression(one.excludes),
            "marks": expression(one.marks),
            "context": one.context,
            "ratios": [[expression(p), ratio] for p, ratio in one.ratios],
            "encoders": [[e.name, e.body, e.kohya, e.comfy] for e in one.text_encoders],
            "modules": {
                layout: layouts.number(_packed(modules(names)))
                for layout, names in known.items()
                if names is not None
            },
        }

    families = [family(one) for one in FAMILIES]
    bodies = {name: layouts.number(_packed(modules(body_names(name)))) for name in BODIES}
    return {
        "families": families,
        "bodies": bodies,
        "modules": [json.loads(text) for text in layouts.things()],
        "kinds": kinds.things(),
        "clip_v4": CLIP_V4,
        "denoiser": DENOISER,
        "metadata": ADAPTER_METADATA,
        "origin": ORIGIN,
        "suffixes": [[expression(p), role, spelling] for p, role, spelling in leaves._SUFFIXES],
        "usual": leaves._USUAL,
        "processors": expression(leaves._PROCESSORS),
        "xlabs": expression(leaves._XLABS),
        "no_weights": expression(leaves._NO_WEIGHTS),
        "unread": leaves.UNREAD,
        "flat": expression(prefixes.FLAT),
        "dotted": prefixes._DOTTED,
        "toolkit": expression(prefixes._TOOLKIT),
        "comfy": expression(prefixes._COMFY),
        "forms": image_convert._FORMS,
        "bfl": expression(image_convert._BFL),
        "head": expression(inspect._HEAD),
        "musubi": inspect._MUSUBI,
        "ranked": inspect._RANKED,
        "around": sorted(grouping.AROUND),
        "oft_v2": sorted(grouping._OFT_V2),
        "always": recognise._ALWAYS,
        "elsewhere": sorted(recognise.NO_DENOISER),
        "components": image_peft._COMPONENTS,
        "names": {
            name: getattr(delta, name)
            for name in ("BOFT", "FULL", "GLORA", "IA3", "LOHA", "LOKR", "LORA", "NOTHING")
        }
        | {name: getattr(delta, name) for name in ("OFT", "OFT_V2", "SET")},
    }


def _packed(thing: object) -> str:
    return json.dumps(thing, ensure_ascii=False, separators=(",", ":"))


def formats_known() -> list[list[str]]:
    """The first bytes of files of other formats, as Latin letters, and what they are."""
    return [[start.decode("latin-1"), form.what] for start, form in formats._STARTS]


def tables() -> str:
    """The file: each part and each book in a line of its own."""
    known = books()
    shelf = "".join(f"    {_packed(book)},\n" for book in known.pop("books"))
    parts = {
        "header": {
            "most": MAX_HEADER_BYTES,
            "name": [MAX_NAME_LENGTH, MAX_NAME_PARTS],
            "dims": MAX_DIMS,
            "dtypes": {name: [d.bits, d.numpy.name] for name, d in DTYPES.items()},
            "formats": formats_known(),
        },
        "dialects": dialects(),
        "image": image(),
        **known,
    }
    lines = "".join(f"  {_packed(name)}: {_packed(part)},\n" for name, part in parts.items())
    return f'{HEAD}export default {{\n{lines}  "books": [\n{shelf}  ],\n}};\n'


if __name__ == "__main__":
    for file, made in ((HEADS, heads_of_library()), (TABLES, tables())):
        if "--check" not in sys.argv[1:]:
            file.write_text(made, encoding="utf-8")
            print(f"{file}: {len(made)} characters")
        elif not file.exists() or file.read_text(encoding="utf-8") != made:
            sys.exit(f"{file} is not what the books and dialects say; run scripts/make_site.py")
