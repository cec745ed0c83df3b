"""`regraft check --for TOOL`: what a tool would do with an adapter as it is, and the command that mends it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.adapters.convert import convert_adapter
from regraft.adapters.detect import (
    books_by_keys,
    find_books,
    model_beside,
    why_of_another,
)
from regraft.adapters.ranks import Options
from regraft.bridges.transformers.files import InstalledTransformers
from regraft.dialects.base import dialect_of, sniffed
from regraft.dialects.judging import UNKNOWN, Files, Judgement, Outcome, ToolReader, tool_readers
from regraft.dialects.names import layout_named
from regraft.dialects.opening import Target, find_source
from regraft.dialects.peft.source import CONFIG, WEIGHTS
from regraft.dialects.served import demands_apart, has_demands
from regraft.dialects.tool_files import look_at
from regraft.errors import AmbiguousError, BadInputError, Finding, RegraftError, is_unreadable
from regraft.errors.codes import Status
from regraft.planning.model import ModelConfig, load_model
from regraft.rules.book import rules_words
from regraft.shown import Shown
from regraft.storage.hub import how_to_find
from regraft.storage.json_files import folder_with_config
from regraft.storage.safetensors import TensorFile, read_header
from regraft.values import replace

_ASKS_FOR_BASE = (
    "the command that mends it needs the base, too: add --model and the folder of the base model"
)


@dataclass(slots=True, repr=False)
class ToolCheck(Shown):
    """What a tool would do with an adapter as it is."""

    source: str
    tool: str
    version: str
    """The release that it was judged by."""
    basis: str
    """Where that is known from: ``run``, ``its functions, run`` or ``its source``."""
    verdict: str
    """``full``, ``partial``, ``none``, ``fails`` or ``wrong-scale``, or ``unknown``: it hangs on the base."""
    targets: list[Outcome] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Why it loads nothing of it."""
    notes: list[str] = field(default_factory=list)
    fix: str | None = None
    """The command that mends it."""
    no_fix: str | None = None
    """Why there is none."""
    of_another: str | None = None
    """Why the base that was given is of another family than the adapter; ``None`` where it is not."""

    @property
    def healthy(self) -> bool:
        """Whether it loads with its full effect."""
        return self.verdict == "full"

    @property
    def why(self) -> str:
        """Why not, in one line; empty where nothing is wrong."""
        reasons = (*self.failures, *(each.reason for each in self.targets if each.reason))
        return "" if self.healthy else next(iter(reasons), "")

    @property
    def is_unknown(self) -> bool:
        """Whether it would load with bases of one family and not with another's, and nothing tells which it is for."""
        return self.verdict == UNKNOWN

    @property
    def remedy(self) -> list[str]:
        """The command that mends it, where there is one."""
        return [self.fix] if self.fix else []

    @property
    def remedy_needs(self) -> str:
        """What that command lacks; empty where it can be run as it is."""
        return _ASKS_FOR_BASE if _ASKS_FOR_BASE in self.notes else ""

    @property
    def is_unproven(self) -> bool:
        """Whether it is only not proven: a tool's behaviour is known, and the base that it hangs on is not."""
        return self.is_unknown and self.of_another is None

    @property
    def status(self) -> Status:
        """The exit status of the command that found it."""
        return Status.DONE if self.healthy else Status.NO

    def to_dict(self) -> dict[str, Any]:
        """The check as plain data."""
        return {
            "source": self.source,
            "tool": self.tool,
            "version": self.version,
            "basis": self.basis,
            "verdict": self.verdict,
            "targets": [
                {"key": t.key, "outcome": t.outcome, "reason": t.reason} for t in self.targets
            ],
            "failures": self.failures,
            "notes": self.notes,
            "fix": self.fix,
            "no_fix": self.no_fix,
            "of_another": self.of_another,
        }


def check_for(
    src: str | os.PathLike[str],
    tool: str,
    model: str | os.PathLike[str] | None = None,
    family: str | None = None,
) -> ToolCheck:
    """Tell what a tool would do with an adapter as it is.

    Args:
        src: the folder or the file that the tool would be given.
        tool: its name, with ``@VERSION`` if one is meant (``"vllm"``, ``"vllm@0.33.0"``).
        model: the base model's folder or its ``config.json``; without it less can be told.
        family: of the base, for a LoRA of an image or video model whose names fit several.

    Raises:
        BadInputError: there is no adapter at ``src``, its files are broken, or no such tool is known.
    """
    name, _, asked = tool.partition("@")
    reader = tool_readers().get(name)
    if reader is None:
        raise BadInputError(
            Finding(
                "option",
                f"nothing is known of how {name!r} loads adapters; known: {', '.join(tool_readers())}",
                fix="name one of these, or a layout",
            )
        )
    files = replace(_files(Path(src), model, reader.to), family=family)
    version = _nearest(reader, asked)
    possible = _possible_types(files, name)
    verdict, judged = _common([reader.judge(replace(files, told=t), version) for t in possible])
    result = ToolCheck(
        str(src),
        name,
        version,
        reader.basis,
        verdict,
        judged.targets,
        judged.failures,
        judged.notes,
    )
    if asked and asked != version:
        result.notes.append(f"{name} {asked} was not looked at; this is what {version} does")
    result.of_another = _of_another(files) if model is not None else None
    if result.of_another is not None:
        result.verdict = UNKNOWN if result.healthy else result.verdict
        result.notes.append(f"{result.of_another}: give the base that it was trained on")
    elif result.is_unknown:
        result.notes.append(
            "whether it loads hangs on the family of the base, and nothing here tells it: give it with --model"
        )
    elif files.model is None and getattr(reader, "needs_base", True):
        of_family = (
            f" beyond its family ({possible[0][0]})" if len(possible) == 1 and possible[0] else ""
        )
        result.notes.append(
            f"the base is not known{of_family}, so names were compared with none: give it with --model"
        )
    if not result.healthy and not result.is_unknown:
        _find_fix(result, reader, files, model)
    return result


def _files(src: Path, model: str | os.PathLike[str] | None, own: str) -> Files:
    if not src.exists():
        raise BadInputError(
            Finding(
                "not-found",
                "there is no such file or folder",
                where=str(src),
                fix=how_to_find(str(src)),
            )
        )
    _check_readable(src)
    dialect = _dialect(src, own)
    look = look_at(src)
    weights = src if src.is_file() else _weights_in(src)
    tensors: Any = {}
    metadata: dict[str, str] = {}
    if weights.suffix == ".safetensors" and weights.is_file():
        tensors, metadata = TensorFile(weights), dict(read_header(weights).metadata)
    elif src.is_dir() and look is None and not any(src.iterdir()):
        raise BadInputError(
            Finding(
                "not-an-adapter",
                "the folder is empty",
                where=str(src),
                fix="give an adapter's folder",
            )
        )
    config = look.config if look is not None else None
    if look is not None and config is not None and src.is_dir() and not weights.is_file():
        opened = find_source(src).one()
        tensors, metadata = opened.tensors, opened.metadata
    base = load_model(Path(model)) if model is not None else _named_base(src, config)
    return Files(src, config, tensors, dialect, base, metadata)


def _check_readable(src: Path) -> None:
    """Raises ``BadInputError`` where a file cannot be read at all: that is no answer of the tool's."""
    try:
        opening = find_source(src)
        for _ in opening:
            pass
    except RegraftError as error:
        if is_unreadable(error):
            raise


def _dialect(src: Path, own: str) -> str:
    """The dialect of a path; where it may be of several, the tool's own, or the first: a tool does not ask."""
    try:
        return dialect_of(src).name
    except AmbiguousError:
        certain = [name for name, told in sniffed(src).items() if told.certain]
        return own if own in certain else certain[0]


def _weights_in(folder: Path) -> Path:
    """PEFT's file, or the only one there is."""
    found = list(folder.glob("*.safetensors"))
    return found[0] if len(found) == 1 else folder / WEIGHTS


def _named_base(src: Path, config: Mapping[str, Any] | None) -> ModelConfig | None:
    """The base that the files name, each tool's in its own way; of files that cannot be read their config's."""
    try:
        hints = getattr(find_source(src).one(), "hints", None)
        return model_beside(hints()) if hints is not None else None
    except RegraftError:
        named = [(config or {}).get(name) for name in ("base_model_name_or_path", "model")]
        return next((load_model(f) for f in map(folder_with_config, named) if f is not None), None)


def _possible_types(files: Files, tool: str) -> list[tuple[str, ...]]:
    """The model types that the base may have: as its config or the adapter tells, or one of each kind that fits.

    The adapter tells them as it tells a conversion: by its config, then by its keys.
    """
    if files.model is not None:
        return [()]
    named, fitting = None, None
    try:
        opened = find_source(files.src).one()
        if hasattr(opened, "hints") and hasattr(opened, "names"):
            names, hints = opened.names(), opened.hints()
            named = hints.model_type
            fitting = [t for book in books_by_keys(names) for t in book.model_types]
            known = find_books(names, hints, None, opened.where)
            if known.model_type is not None:
                return [(known.model_type,)]
    except RegraftError:
        pass
    if not has_demands(tool):
        return [(named,) if named is not None else ()]
    kinds = demands_apart(tool, fitting or None)
    return [tuple(filter(None, (named, kind))) for kind in kinds]


def _common(all_judged: list[Judgement]) -> tuple[str, Judgement]:
    """The verdict and what is said for every base that is possible; unknown where it is full for some only."""
    verdicts = {judged.verdict for judged in all_judged}
    if len(verdicts) == 1 or "full" not in verdicts:
        return all_judged[0].verdict, all_judged[0]
    full = next(judged for judged in all_judged if judged.verdict == "full")
    fates: dict[str, set[str]] = {}
    for target in (target for judged in all_judged for target in judged.targets):
        fates.setdefault(target.key, set()).add(target.outcome)
    mixed = [
        each if len(fates[each.key]) == 1 else Outcome(each.key, UNKNOWN) for each in full.targets
    ]
    return UNKNOWN, Judgement(mixed, [], full.notes)


def _of_another(files: Files) -> str | None:
    """Why the base is of another family than the adapter's files say."""
    try:
        opened = find_source(files.src).one()
        if hasattr(opened, "hints") and hasattr(opened, "names"):
            find_books(opened.names(), opened.hints(), files.model, opened.where)
    except RegraftError as error:
        return why_of_another(error.findings)
    return None


def _nearest(reader: ToolReader, asked: str) -> str:
    """The newest release that is known and not newer than the one that is asked for."""
    known = list(reader.versions)
    older = [v for v in known if not asked or _order(v) <= _order(asked)]
    return older[-1] if older else known[0]


def _order(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _find_fix(
    result: ToolCheck, reader: ToolReader, files: Files, model: str | os.PathLike[str] | None
) -> None:
    """The command that makes it load, where there is one: the conversion is carried out, and nothing written."""
    base = str(model) if model is not None else None
    end = [] if files.family is None else ["--from", files.family]
    end += [] if base is None else ["--model", base]
    by_file = False
    layout = layout_named(reader.to)
    try:
        opening = find_source(files.src)
        into = Target.writes(layout, opening)
        for opened in opening:
            by_itself = getattr(opened, "convert", None)
            if by_itself is not None:
                where = None if base is None else Path(base)
                by_itself(layout, files.family, where, Options())
                by_file = True
                continue
            foreign = InstalledTransformers()
            convert_adapter(opened, layout, files.model, None, None, foreign, into=into)
    except RegraftError as error:
        if base is not None or not _asks_for_base(error):
            first = error.findings[0]
            result.no_fix = first.message + (f"; {first.fix}" if first.fix else "")
            return
        result.notes.append(_ASKS_FOR_BASE)
    out = _beside(Path(result.source), result.tool, file=by_file)
    result.fix = shlex.join(
        ["regraft", "convert", result.source, str(out), "--to", reader.to, *end, *rules_words()]
    )


def _beside(src: Path, tool: str, *, file: bool) -> Path:
    """Where a result for a tool goes: beside the adapter; of a single file, a ``file`` or a folder."""
    whole = src.parent if src.is_file() and src.stem == "adapter_model" else src
    if whole.is_file():
        return whole.with_name(f"{whole.stem}-{tool}{'.safetensors' if file else ''}")
    whole = whole.resolve() if whole.name in ("", "..") else whole
    return whole.with_name(f"{whole.name}-{tool}")


def _asks_for_base(error: RegraftError) -> bool:
    """Whether all that is missing is the base; ``--via dense --model BASE`` is another way, not this command's lack."""
    fixes = [finding.fix or "" for finding in error.findings]
    return all("--model" in fix and "--via" not in fix for fix in fixes)


__all__ = ["CONFIG", "ToolCheck", "check_for"]
