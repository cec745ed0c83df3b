"""Whether an adapter loads as it is, and has its full effect.

What should land is known from regraft's own conversion. What does land is found by trying: the installed PEFT loads
the files into a model without weights. Both are compared, target by target.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from typing import Any, overload

import numpy as np
from msgspec import Struct

from regraft.adapters.convert import Converted, convert_adapter
from regraft.adapters.detect import Known, base_names, find_books
from regraft.adapters.form import Array
from regraft.adapters.home import at_home
from regraft.adapters.protocol import Names, Opened
from regraft.adapters.uncalled import modules_of
from regraft.bridges.peft.trial import Landing, StockPeft, Trial, Tried, as_peft_finds_it
from regraft.bridges.transformers.files import InstalledTransformers
from regraft.checking.causes import causes_of_error, causes_of_rows
from regraft.checking.checkpoint import check_checkpoint, check_image_checkpoint, is_image
from regraft.checking.for_tool import ToolCheck, check_for
from regraft.checking.verdict import Check, Row, Verdict, rows_of
from regraft.checkpoints.source import is_checkpoint
from regraft.dialects.base import dialect_of
from regraft.dialects.judging import (
    FAILS,
    IGNORED,
    LOADED,
    WRONG_SCALE,
    WRONG_VALUES,
    is_tool,
    tool_readers,
)
from regraft.dialects.names import layout_named
from regraft.dialects.opening import Opening, Target, find_source
from regraft.dialects.peft.config import LoraConfig, targets_module, targets_parameter
from regraft.dialects.peft.inspect import inspect_adapter
from regraft.dialects.peft.saving import save_adapter
from regraft.dialects.peft.scan import PREFIX, scan_names
from regraft.dialects.peft.source import CONFIG, Source, names_of_scan
from regraft.dialects.peft.variants import reclaimed_names
from regraft.dialects.registry import IMAGE
from regraft.errors import (
    BadInputError,
    Finding,
    RefusedError,
    RegraftError,
    is_unknown,
    is_unreadable,
)
from regraft.errors.extras import lacking
from regraft.layouts.names import Layout
from regraft.layouts.spelled import LayoutName
from regraft.names.keys import group_names
from regraft.options import CheckOptions
from regraft.planning.model import ModelConfig, load_model
from regraft.report import log_result
from regraft.rules.book import Rules, rules_words
from regraft.rules.releases import layouts_of
from regraft.rules.templates import match_group
from regraft.sources.resolve import Resolved, resolved
from regraft.storage.stand_ins import named
from regraft.values import replace

_LABELLED = ("SEQ_CLS", "TOKEN_CLS")
"""The tasks, as PEFT calls them, whose models are made with a number of labels."""
_CLASSIFIERS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""The last layers of their heads, with a row for each label."""


@overload
def check(
    src: str | os.PathLike[str],
    *,
    tool: None = None,
    source: str | None = None,
    model: str | os.PathLike[str] | None = None,
    to: LayoutName | str = "transformers-v5",
    peft: StockPeft | None = None,
    architecture: str | None = None,
    rules: Rules = (),
) -> Check: ...
@overload
def check(
    src: str | os.PathLike[str],
    *,
    tool: str,
    source: str | None = None,
    model: str | os.PathLike[str] | None = None,
    to: LayoutName | str = "transformers-v5",
    peft: StockPeft | None = None,
    architecture: str | None = None,
    rules: Rules = (),
) -> ToolCheck: ...
def check(
    src: str | os.PathLike[str],
    *,
    tool: str | None = None,
    source: str | None = None,
    model: str | os.PathLike[str] | None = None,
    to: LayoutName | str = "transformers-v5",
    peft: StockPeft | None = None,
    architecture: str | None = None,
    rules: Rules = (),
) -> Check | ToolCheck:
    """Tell whether an adapter, each adapter of a folder, or a checkpoint loads as it is.

    Args:
        src: what `regraft.convert` takes.
        tool: what is to load it, where that is not PEFT: ``"vllm"``, ``"sglang"``, ``"unsloth"``, with ``@VERSION`` if
            one is meant. What it would do with the files as they are is told then, as a `ToolCheck`.
        source: the family of the model (``"sd3"``), for a LoRA of an image or video model whose names fit several.
        model: the base model's folder or its ``config.json``; without it little can be told.
        to: the layout of the model that it is to be loaded into. What is installed is tried; of another layout
            only names, shapes and the config are judged.
        architecture: the model's class, where its config names none that transformers has.
        rules: rule books to use in place of regraft's, as `regraft.convert` takes them.
        peft: what to try with, the installed PEFT by default; checks that share it start one process only.

    Raises:
        BadInputError: there is nothing to check at ``src``, or ``model`` is no config.
    """
    asked = CheckOptions(
        to=tool or to, source=source, model=model, architecture=architecture, rules=rules
    )
    return check_with(src, asked, peft)


def check_with(
    src: str | os.PathLike[str], asked: CheckOptions, peft: StockPeft | None = None
) -> Check | ToolCheck:
    """What `check` does, its options in one value; ``to`` may be a tool's name there."""
    with resolved(
        src,
        source=asked.source,
        model=asked.model,
        architecture=asked.architecture,
        rules=asked.rules,
    ) as found:
        path, base = found.path, found.model
        family = None if asked.source is None else _family_of_image(path, found)
        result: Check | ToolCheck
        if not found.is_adapter:
            result = _check_model(path, base, asked.to)
        elif is_tool(asked.to):
            result = check_for(path, asked.to, base, family)
        else:
            result = _check_adapters(path, base, asked.to, family, peft)
    log_result(result)
    return result


def passed_over(src: Path, to: str) -> str | None:
    """Why a checkpoint is not checked for a tool; ``None`` for what is."""
    if not is_tool(to) or not is_checkpoint(src):
        return None
    name = to.partition("@")[0]
    if is_image(src):
        if name in _IMAGE_LOADERS:
            return None
        return f"nothing is known of how {name} takes a checkpoint of an image or video model"
    return f"it is a checkpoint: --for {name} tells what {name} does with adapters"


_IMAGE_LOADERS = ("diffusers", "comfyui")
"""The tools of which it is known how they take checkpoints of image models."""


def _check_model(src: Path, model: Path | None, to: str) -> Check:
    """A checkpoint. Raises ``BadInputError`` where it is to be checked for a tool that loads none."""
    if is_image(src):
        return _check_image_model(src, model, to)
    if (why := passed_over(src, to)) is not None:
        fix = "leave --for out: whether transformers loads it is told then"
        raise BadInputError(Finding("not-an-adapter", why, where=str(src), fix=fix))
    layout = layout_named(to)
    return Check(named(str(src)), str(layout), [check_checkpoint(src, model, layout)])


def _check_image_model(src: Path, model: Path | None, to: str) -> Check:
    """A checkpoint of an image model is for diffusers, unless another tool was named.

    Raises ``RefusedError`` for tools of which nothing is known.
    """
    tool = _DIFFUSERS if to == _USUAL else to.partition("@")[0]
    if tool not in _IMAGE_LOADERS:
        message = f"nothing is known of how {to} takes a checkpoint of an image or video model"
        fix = "say --for diffusers or --for comfyui; regraft inspect tells what it is"
        raise RefusedError(Finding("dialect", message, where=str(src), fix=fix))
    return Check(named(str(src)), tool, [check_image_checkpoint(src, model, tool)])


def _family_of_image(src: Path, found: Resolved) -> str:
    """The family that was named for a LoRA of an image model.

    Raises ``BadInputError`` where no family was, or the source is something else.
    """
    family = found.given.family
    if not found.is_adapter or dialect_of(src).name not in IMAGE or family is None:
        message = "--from: only for the family of a LoRA of an image or video model"
        raise BadInputError(Finding("option", message, where=str(src), fix="leave it out"))
    return family


def _check_image(src: Path, model: Path | None, to: str, family: str | None, dialect: str) -> Check:
    """A LoRA of an image model, as diffusers takes it where no tool was named.

    Raises ``RefusedError`` where a layout was named: such files are for tools.
    """
    if to != _USUAL:
        tools = ", ".join(name for name in tool_readers() if name in _IMAGE_TOOLS)
        message = f"this is a LoRA of an image or video model, and {to} does not have these"
        raise RefusedError(Finding("dialect", message, where=str(src), fix=f"say --for {tools}"))
    found = check_for(src, _DIFFUSERS, model, family)
    verdict = Verdict("", "LORA", dialect, found.healthy)
    verdict.tried = f"{found.tool} {found.version}, known from {found.basis}"
    verdict.error = next(iter(found.failures), None)
    verdict.rows = rows_of((each.key, {"outcome": _FATES[each.outcome]}) for each in found.targets)
    verdict.causes = list(dict.fromkeys(each.reason for each in found.targets if each.reason))
    verdict.remedy = [found.fix] if found.fix is not None else []
    verdict.no_remedy, verdict.notes = found.no_fix, found.notes
    return Check(named(str(src)), _DIFFUSERS, [verdict])


_USUAL, _DIFFUSERS = layouts_of("transformers")[-1], "diffusers"
_IMAGE_TOOLS = ("diffusers", "comfyui", "kohya")
_FATES = {
    LOADED: "lands",
    IGNORED: "dropped",
    FAILS: "refused",
    WRONG_SCALE: "scaled",
    WRONG_VALUES: "differs",
}
"""What tools make of a module, in a check's words."""


def _check_adapters(
    src: Path, model: Path | None, to: str, family: str | None, peft: StockPeft | None
) -> Check:
    """Each adapter of a path; ``family`` is that of a LoRA of an image model, where it was named."""
    opening = find_source(src)
    if opening.dialect.name in IMAGE:
        return _check_image(src, model, to, family, opening.dialect.name)
    found, shown, layout = opening.found, named(str(src)), layout_named(to)
    verdicts: list[Verdict] = []
    stock = peft or StockPeft()
    has_layout = stock.is_there and stock.layout() == layout.name
    config = load_model(model) if model is not None else None
    checker = _Checker(src, model, layout, config, stock, has_layout)
    for folder in found.folders:
        name = str(folder.relative_to(found.root)).removeprefix(".")
        try:
            source = opening.open(folder)
        except RegraftError as error:
            if is_unreadable(error) and len(found.folders) == 1:
                raise
            verdict = Verdict(name, "adapter", healthy=False, findings=list(error.findings))
            verdict.unreadable = is_unreadable(error)
            verdict.no_remedy = "its files are wrong in themselves"
            verdicts.append(verdict)
            continue
        if isinstance(source, Source):
            verdicts.append(checker.check(source))
        else:
            verdicts.append(checker.check_other(opening, source))
    return Check(shown, str(layout), verdicts)


class _Made(Struct, frozen=True, eq=False):
    """What regraft makes of an adapter, or why it makes nothing."""

    there: Opened | None
    """The adapter with the paths that the base has for its modules; ``None`` where it has no place in it."""
    moved: str | None
    """What was done to these paths, where they were moved into or out of a bigger model than its own."""
    converted: Converted | None = None
    failure: RegraftError | None = None


@dataclass(slots=True)
class _Checker:
    src: Path
    told: Path | None
    to: Layout
    config: ModelConfig | None
    peft: StockPeft
    has_layout: bool
    """Whether what is installed has models in the layout, so that it can be tried."""
    foreign: InstalledTransformers = field(default_factory=InstalledTransformers)

    def check(self, source: Source) -> Verdict:
        """What would become of one adapter."""
        made = self.convert(source)
        converted, failure = made.converted, made.failure
        verdict = Verdict(source.name, source.peft_type)
        if converted is not None:
            verdict.layout = converted.report.source_layout
            verdict.notes += [n for n in converted.report.notes if n.startswith("it is a ")]
        elif failure is not None:
            verdict.findings = list(failure.findings)
        if failure is not None and any(f.code == "wrong-base" for f in failure.findings):
            # Nothing of it can be tried with this base, so none is built.
            self.judge(source, converted, verdict)
            return verdict
        scan, _ = scan_names(list(source.tensors), source.where, lora=verdict.kind == "LORA")
        names = names_of_scan(scan)
        bases = tuple(base_names(names))
        known = self.known(source, names)
        model = self.config or (known.model if known is not None else None)
        if not self.has_layout:
            self.judge(source, converted, verdict)
            line = lacking("transformers", "peft", "torch")
            how = "" if line is None else f": {line}"
            verdict.notes.append(
                f"nothing was tried: PEFT with a transformers of {self.to.name} is not installed here{how}"
            )
        elif model is None:
            self.judge(source, converted, verdict)
            verdict.notes.append(
                "nothing could be tried, because the base model is not known: give it with --model"
            )
        else:
            self.attempt(source, made, bases, known, model, verdict)
        if failure is not None and is_unknown(failure) and verdict.tried is None:
            # Its base is not known, or not which of several it is: that says nothing against the adapter.
            verdict.healthy, verdict.no_remedy = None, None
        if verdict.rows and all(row.dead for row in verdict.rows):
            verdict.healthy = False
            verdict.causes.append(
                "B is zero in every LoRA, as it is before training: it changes nothing"
            )
            if not verdict.remedy:
                verdict.no_remedy = "there is nothing in it to convert"
        return verdict

    def check_other(self, opening: Opening, opened: Opened) -> Verdict:
        """An adapter that no PEFT reads, because its files are another tool's."""
        verdict = Verdict(opened.name, opened.kind, healthy=False)
        verdict.causes.append(
            f"it is written as by {opening.dialect.name} ({opening.dialect.title}), which PEFT does not read"
        )
        try:
            there, moved = at_home(opened, self.config, self.foreign)
            done = convert_adapter(
                there,
                self.to,
                self.config,
                foreign=self.foreign,
                into=Target.writes(self.to, opening),
            )
        except RegraftError as error:
            verdict.findings = list(error.findings)
            verdict.no_remedy = "regraft cannot convert it: " + _first(verdict.findings)
            return verdict
        verdict.notes += [moved] if moved is not None else []
        verdict.layout = done.report.source_layout
        verdict.rows = rows_of(
            (t.key, {"outcome": "refused", "rank": t.rank, "scale": t.scale})
            for t in done.report.targets
        )
        verdict.remedy = self.remedy(opened)
        return verdict

    def convert(self, source: Source) -> _Made:
        """The adapter in the layout, or why it cannot be in it."""
        there, moved = None, None
        try:
            there, moved = at_home(source, self.config, self.foreign)
            made = convert_adapter(there, self.to, self.config, foreign=self.foreign)
        except RegraftError as error:
            return _Made(there, moved, failure=error)
        made.report.notes += [moved] if moved is not None else []
        return _Made(there, moved, made)

    def known(self, source: Source, names: Names) -> Known | None:
        """What is known of the base, if it is."""
        try:
            return find_books(names, source.hints(), self.config, source.where, self.foreign)
        except RegraftError:
            return None

    def attempt(
        self,
        source: Source,
        made: _Made,
        bases: tuple[str, ...],
        known: Known | None,
        model: ModelConfig,
        verdict: Verdict,
    ) -> None:
        """Try it with the installed PEFT; ``bases`` are names that tensors of the base may have, by its keys."""
        converted, mapping = made.converted, source.config.get("auto_mapping")
        if made.there is None and isinstance(mapping, Mapping):
            # The class that PEFT noted is none that it could be tried with.
            self.judge(source, converted, verdict)
            return
        noted = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
        named = noted if made.moved is None else None
        labelled, said = _with_labels(model, source)
        verdict.notes += said
        task = source.config.get("task_type")
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="regraft-")))
            assert source.weights is not None
            wanted: str | None = None
            remedies: tuple[str, ...] = ()
            if converted is not None:
                wanted = str(scratch / "wanted")
                assert isinstance(made.there, Source)
                save_adapter(scratch / "wanted", made.there, converted)
                if not converted.report.copied:
                    remedies = (wanted,)
            folder = stack.enter_context(
                as_peft_finds_it(source.weights, Path(source.where) / CONFIG)
            )
            try:
                trial = Trial(labelled, named, folder, wanted, remedies, bases, task)
                tried = self.peft.attempt(trial)
            except RegraftError as error:
                self.judge(source, converted, verdict)
                verdict.findings += error.findings
                return
        self.tell(source, converted, known, tried, verdict)
        if verdict.healthy:
            return
        if tried.remedy is not None:
            verdict.remedy, verdict.remedy_tried = self.remedy(source), True
        elif converted is None:
            verdict.no_remedy = "regraft cannot convert it: " + _first(verdict.findings)
        elif converted.report.copied:
            verdict.no_remedy = f"it is in {self.to} already, and regraft would make the same of it"
        else:
            why = f": {tried.unwanted}" if tried.unwanted else ""
            verdict.no_remedy = f"what regraft makes of it does not load rightly either{why}"

    def remedy(self, source: Opened) -> list[str]:
        """The command line that converts it."""
        src = self.src / source.name if source.name else self.src
        beside = (self.src if self.src.is_dir() else self.src.parent) / source.name
        version = str(self.to).partition("/")[0].rpartition("-")[2]
        dst = beside.resolve() if not beside.name else beside
        if not isinstance(source, Source) and self.src.is_file():
            dst = self.src.with_suffix("")
        out = dst.with_name(f"{dst.name}-{version}")
        words = ["regraft", "convert", str(src), str(out), "--to", str(self.to)]
        words += [] if self.told is None else ["--model", str(self.told)]
        return [shlex.join([*words, *rules_words()])]

    def tell(
        self,
        source: Source,
        converted: Converted | None,
        known: Known | None,
        tried: Tried,
        verdict: Verdict,
    ) -> None:
        """Turn what came of a trial into a verdict."""
        verdict.tried = f"{tried.versions}, {tried.model_class}"
        verdict.error, verdict.warnings = tried.error, tried.warnings
        if tried.guessed is not None:
            verdict.notes.append(tried.guessed)
        landings = [self.called(landing, known) for landing in tried.landings]
        if tried.error is not None:
            verdict.causes = causes_of_error(tried.error)
        if tried.error is not None and converted is not None:
            verdict.rows = rows_of(
                (t.key, {"outcome": "refused", "rank": t.rank, "scale": t.scale})
                for t in converted.report.targets
            )
        elif tried.error is None:
            verdict.rows = rows_of((landing.key, _facts(landing)) for landing in landings)
            reclaimed = (
                reclaimed_names(source.config, known, self.to.name) if known is not None else ()
            )
            moved = converted is not None and converted.report.source_layout != self.to.name
            verdict.causes = causes_of_rows(verdict.rows, source.config, reclaimed, moved=moved)
        if tried.unwanted is not None:
            verdict.notes.append(f"what should land cannot be told: {tried.unwanted}")
        right = tried.error is None and tried.unwanted is None and bool(landings)
        verdict.healthy = right and all(landing.outcome == "lands" for landing in landings)
        if tried.error is None and converted is None:
            verdict.notes.append(
                f"{tried.versions} takes it without an error; whether it has its effect there is not proven"
            )

    def called(self, landing: Landing, known: Known | None) -> Landing:
        """The same, unless the model does not call the module that a LoRA stands on."""
        if known is None or landing.rank is None or not landing.key.endswith(".weight"):
            return landing
        (group,) = group_names([landing.key.removesuffix(".weight")])
        for table in modules_of(known, self.to.name):
            if not table.called and match_group(table.module, group) is not None:
                return dataclasses.replace(landing, outcome="uncalled", detail=table.why)
        return landing

    def judge(self, source: Source, converted: Converted | None, verdict: Verdict) -> None:
        """Tell from names, shapes and the config, without trying anything."""
        verdict.healthy = False
        if converted is None:
            verdict.no_remedy = "regraft cannot convert it: " + _first(verdict.findings)
            return
        fits = converted.report.copied or _same(source, converted)
        inspected = inspect_adapter(source, self.config, self.foreign)
        verdict.findings += inspected.problems
        targets = converted.report.targets
        if fits and not targets:
            verdict.rows = [
                Row(t.pattern, t.count, "lands", t.rank, t.scale, keys=t.keys)
                for t in inspected.targets
            ]
        else:
            lands = {t.key for t in targets} if fits else _staying(source, converted)
            outcomes = ("lands" if t.key in lands else "elsewhere" for t in targets)
            verdict.rows = rows_of(
                (t.key, {"outcome": outcome, "rank": t.rank, "scale": t.scale})
                for t, outcome in zip(targets, outcomes, strict=True)
            )
        if not fits:
            verdict.causes.append(
                f"this adapter uses the {converted.report.source_layout} layout; {self.to} ignores or rejects keys "
                "that do not match"
            )
            verdict.remedy = self.remedy(source)
        elif inspected.problems:
            verdict.no_remedy = "its files are wrong in themselves"
        else:
            # Where transformers 5 loads, PEFT converts in between, and no layout proves what comes of it.
            verdict.healthy = True if self.to.name == layouts_of("transformers")[0] else None


def _facts(landing: Landing) -> dict[str, Any]:
    return {
        "outcome": landing.outcome,
        "rank": landing.rank,
        "scale": landing.scale,
        "factor": landing.factor,
        "dead": landing.dead,
        "detail": landing.detail,
    }


def _same(source: Source, converted: Converted) -> bool:
    """Whether a conversion changed neither names nor values, nor what the config means."""
    return (
        source.tensors.keys() == converted.tensors.keys()
        and all(_is_kept(source, converted, name) for name in source.tensors)
        and _means_the_same(source.config, converted)
    )


def _is_kept(source: Source, converted: Converted, name: str) -> bool:
    """Whether a tensor of the result has the same name and the same values in the source."""
    old, new = source.tensors.get(name), converted.tensors[name]
    return (
        old is not None
        and old.dtype == new.dtype
        and old.shape == new.shape
        and np.array_equal(_bits(old), _bits(new))
    )


def _staying(source: Source, converted: Converted) -> set[str]:
    """The targets of which a conversion left the tensors as they are, with the same scale."""
    by_module: dict[str, list[str]] = {}
    for name in converted.tensors:
        path = name.removeprefix(PREFIX)
        for _ in range(_FACTOR_PARTS):
            path = path.rpartition(".")[0]
            by_module.setdefault(path, []).append(name)
    config, staying = source.config, set[str]()
    scales = LoraConfig(config) if config["peft_type"] == "LORA" else None
    for target in converted.report.targets:
        if target.parameter:
            continue  # its factors have one name in each layout, whatever parameter of the module they are for
        path = target.key.rpartition(".")[0]
        same_scale = scales is None or (
            targets_module(config.get("target_modules") or [], path)
            and isclose(scales.scale(path).value, target.scale)
        )
        names = by_module.get(path, [])
        if names and same_scale and all(_is_kept(source, converted, name) for name in names):
            staying.add(target.key)
    return staying


_FACTOR_PARTS = 3
"""At most so many parts of a tensor's name follow its module: ``lora_A.default.weight``."""


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _means_the_same(config: Mapping[str, Any], converted: Converted) -> bool:
    """Whether a config names what a conversion adapts, with the same scales."""
    new = converted.config
    if config["peft_type"] != "LORA" or new["peft_type"] != "LORA":
        return {**config, "peft_version": None} == {**new, "peft_version": None}
    if (config.get("modules_to_save") or []) != (new.get("modules_to_save") or []):
        return False
    scales, modules = LoraConfig(config), config.get("target_modules") or []
    for target in converted.report.targets:
        if target.parameter:
            path, named = target.key, targets_parameter(config.get("target_parameters"), target.key)
        else:
            path = target.key.rpartition(".")[0]
            named = targets_module(modules, path)
        if not named or not isclose(scales.scale(path).value, target.scale):
            return False
    return True


def _with_labels(model: ModelConfig, source: Source) -> tuple[ModelConfig, list[str]]:
    """The base with as many labels as a classifier's saved head has, and what is said of it.

    Whoever trains one gives their number when the base is loaded; the base's own config has another one.
    """
    if source.config.get("task_type") not in _LABELLED:
        return model, []
    heads = [source.tensors.get(PREFIX + name) for name in _CLASSIFIERS]
    rows = {head.shape[0] for head in heads if head is not None}
    own = model.data.get("id2label")
    have = len(own) if isinstance(own, Mapping) else model.data.get("num_labels", 2)
    if len(rows) != 1 or rows == {have}:
        return model, []
    (count,) = rows
    data = {k: v for k, v in model.data.items() if k not in ("id2label", "label2id")}
    said = f"the base is taken with {count} labels (num_labels={count}), as the saved head has"
    return replace(model, data={**data, "num_labels": count}), [said]


def _first(findings: Sequence[Finding]) -> str:
    if not findings:
        return "it says no reason"
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    key = f"{findings[0].key}: " if findings[0].key else ""
    return f"{key}{findings[0].message}{more}"
