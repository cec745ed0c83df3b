"""Converting an adapter: config and weights as one transaction."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from regraft.adapters.detect import Detected, Known, detect_layout, find_books, layout_of_version
from regraft.adapters.factors import Array, Factors, Images, Lora
from regraft.adapters.image import images
from regraft.adapters.kept import (
    BaseWeights,
    Kept,
    add_factors,
    drop_stand_ins,
    fill_saved,
    keep_uncalled,
)
from regraft.adapters.others import move_others, rename_saved, write_others
from regraft.adapters.packing import packing_of_version
from regraft.adapters.peft_config import LoraConfig, targets_module, targets_parameter
from regraft.adapters.reading import FactorReader, Side
from regraft.adapters.record import Record, read_record
from regraft.adapters.scan import PREFIX, Scan, scan_names
from regraft.adapters.source import RECORD, Source
from regraft.adapters.writing import (
    ConfigWriter,
    Result,
    Written,
    check_config,
    write_factors,
)
from regraft.errors import BadInputError, Finding, RefusedError, RegraftError
from regraft.files.checkpoint import Checkpoint
from regraft.layouts import LAYOUTS, Layout
from regraft.plan.build import build_plan
from regraft.plan.model import ModelConfig
from regraft.plan.plan import Plan
from regraft.report import AdapterReport, Target
from regraft.rules.book import Rule

_FORMAT = 1


@dataclass(slots=True)
class Converted:
    """An adapter in its new layout, ready to be written."""

    config: dict[str, Any]
    tensors: dict[str, Array]
    metadata: dict[str, str]
    report: AdapterReport
    plan: Plan | None = None
    aside: dict[str, Array] = field(default_factory=dict)
    """Factors that the layout cannot hold, for a file beside the result."""


def convert_adapter(
    source: Source,
    to: Layout,
    model: ModelConfig | None = None,
    layout: Layout | None = None,
) -> Converted:
    """Convert one adapter in memory.

    ``layout`` is the source's, found out where it is not given; ``model`` is the config of the base, needed where
    the adapter itself does not tell sizes (only some experts are adapted, say).

    Raises ``BadInputError``, ``UnmatchedKeysError``, ``AmbiguousError`` or ``RefusedError`` with all findings.
    """
    return _Conversion(source, to, model, layout).run()


@dataclass(slots=True)
class _Conversion:
    source: Source
    to: Layout
    given_model: ModelConfig | None
    given_layout: Layout | None
    scan: Scan = field(init=False)
    names: list[str] = field(init=False)
    known: Known = field(init=False)
    notes: list[str] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)
    packing: str | None = None

    def run(self) -> Converted:
        self.names = list(self.source.tensors)
        self.scan, findings = scan_names(self.names, self.source.where, self.is_lora)
        if findings:
            raise BadInputError(findings)
        self.known = find_books(self.scan, self.source.config, self.given_model, self.source.where)
        self.evidence.append(self.known.evidence)
        layout = self.choose_layout()
        if layout == self.to.name and not self.must_repack(layout):
            return self.copy(layout)
        return self.convert(layout)

    @property
    def is_lora(self) -> bool:
        return self.source.peft_type == "LORA"

    def choose_layout(self) -> str:
        """The layout the adapter is in; where its names are the same in all, the one that makes work."""
        detected = detect_layout(self.scan, self.known.books, self.source.where)
        if self.given_layout is not None:
            if detected.layout not in (None, self.given_layout.name):
                raise BadInputError(
                    Finding(
                        "layout",
                        f"it was said to be {self.given_layout}, but {detected.evidence[0]}",
                        where=self.source.where,
                        fix="leave --from out",
                    )
                )
            self.packing = self.given_layout.packing
            return self.given_layout.name
        if detected.layout is not None:
            self.evidence += detected.evidence
            return detected.layout
        return self.choose_unnamed(detected)

    def choose_unnamed(self, detected: Detected) -> str:
        recorded = self.source.record().get("layout")
        if recorded in LAYOUTS:
            self.evidence.append(f"regraft wrote it as {recorded}")
            return str(recorded)
        self.evidence += detected.evidence
        if self.source.config.get("target_parameters"):
            version = self.source.config.get("peft_version")
            likely = layout_of_version(version)
            if likely is not None:
                self.evidence.append(f"it was saved by PEFT {version}, which goes with {likely}")
                return likely
        return next(name for name in LAYOUTS if name != self.to.name)

    def must_repack(self, layout: str) -> bool:
        """Whether stacked experts are packed otherwise than they are to be."""
        if not self.is_lora or not self.source.config.get("target_parameters"):
            return False
        have = self.packing or packing_of_version(self.source.config.get("peft_version"))
        return have != self.to.usual_packing and layout == self.to.name

    def copy(self, layout: str) -> Converted:
        report = self.new_report(layout)
        report.copied = True
        report.tensors_out = report.tensors_in
        report.carried = len(self.names)
        report.notes.append(f"it is in {self.to.name} already and was copied as it is")
        return Converted(
            dict(self.source.config), dict(self.source.tensors), dict(self.source.metadata), report
        )

    def new_report(self, layout: str) -> AdapterReport:
        return AdapterReport(
            self.source.name,
            self.source.peft_type,
            layout,
            str(self.to),
            self.evidence,
            tensors_in=len(self.names),
            notes=self.notes,
        )

    def convert(self, layout: str) -> Converted:
        target = self.to.name
        repack = layout == target
        side = Side(self.known.books, layout, self.known.scopes)
        recorded = self.source.record()
        record = self.open_record(recorded)
        back, returned = self.take_back(recorded)
        factors = self.read_factors(side)
        others = move_others(self.scan, self.source, self.known, side, target, repack)
        plan: Plan | None = None
        if repack:
            made = list(_unmoved(factors))
            rules: dict[str, str] = {}
        else:
            plan = self.plan_factors(factors, target)
            self.refuse_unknown_variants(plan)
            made = list(_images(plan, factors, record))
            rules = _rule_of_each(plan)
        base = BaseWeights(self.known, target, self.checkpoint())
        made, saved, kept = keep_uncalled(made, self.known, target, base, self.source.where)
        entries = self.source.config.get("modules_to_save") or []
        names_now = rename_saved(self.source.config, others)
        others = fill_saved(
            others, names_now or entries, self.known, target, base, kept, self.source.where
        )
        packing = self.target_packing(recorded)
        out_side = Side(self.known.books, target, self.known.scopes)
        result = write_factors(made, out_side, packing, self.reclaimed(target))
        add_factors(result, back, returned)
        exact = {
            image.keys.name(i): lora.exact
            for image in made
            for i, lora in enumerate(image.loras)
            if lora is not None
        }
        report = self.new_report(layout)
        if kept.entries:
            names_now = [*(names_now or entries), *kept.entries]
            self.notes.append(
                f"{len(kept.modules)} LoRAs were added to their base weights, which are saved in their place "
                f"({', '.join(kept.entries)}): the model reads these weights and does not call the modules"
            )
        config = self.write_config(result, packing, recorded, names_now)
        write_others([*others, *saved], result)
        report.carried = len(others) + len(saved)
        report.tensors_out = len(result.tensors)
        if plan is not None:
            report.rules = plan.fired()
        report.targets = [
            Target(
                w.key,
                w.scale.rank,
                w.scale.alpha,
                w.scale.value,
                rules.get(w.key, "carried over"),
                exact.get(w.key, True),
                w.parameter is not None,
            )
            for w in result.written
        ]
        self.note_changes(config, made)
        metadata = dict(self.source.metadata)
        metadata.setdefault("format", "pt")
        metadata[RECORD] = self.new_record(layout, config, record, kept)
        return Converted(config, result.tensors, metadata, report, plan, kept.tensors)

    def take_back(self, recorded: Mapping[str, Any]) -> tuple[dict[str, Array], list[Written]]:
        """Leave out what only stood in for something in the layout that this adapter comes back from."""
        if recorded.get("source", {}).get("layout") != self.to.name:
            return {}, []
        drop, factors, written = drop_stand_ins(
            self.source.tensors, recorded.get("kept", {}), self.source.aside
        )
        if drop:
            self.source = replace(
                self.source,
                tensors={n: t for n, t in self.source.tensors.items() if n not in drop},
            )
            self.names = list(self.source.tensors)
            self.scan, _ = scan_names(self.names, self.source.where, self.is_lora)
        return factors, written

    def checkpoint(self) -> Checkpoint | None:
        """The base's weights, where the base was given as a folder that has them."""
        model = self.known.model
        return Checkpoint.find(Path(model.path).parent) if model is not None else None

    def read_factors(self, side: Side) -> Factors:
        reader = FactorReader(
            self.scan,
            list(self.source.tensors.values()),
            self.names,
            self.source.config if self.is_lora else {"r": 1, "lora_alpha": 1},
            side,
            self.source.where,
            self.packing,
        )
        factors = reader.read()
        if reader.packing is not None:
            self.packing = reader.packing
            version = self.source.config.get("peft_version")
            told = f"peft_version {version}" if version else "the shapes"
            self.evidence.append(f"experts are packed as by {reader.packing} ({told})")
        return factors

    def plan_factors(self, factors: Factors, target: str) -> Plan:
        plan = build_plan(
            factors.headers,
            self.known.books,
            target_layout=target,
            scopes=dict(self.known.scopes),
            partial=True,
            guess=self.guess,
            where=self.source.where,
            unmatched_fix=self.known.unmatched_fix,
        )
        self.check_gaps(plan)
        return plan

    def guess(self, rule: Rule, axis: str, seen: int) -> int | None:
        """How many experts there are where no config says it: as many as were seen, if one more would be named.

        A config that names modules by leaf names would have adapted every further expert, so there is none.
        """
        entries = self.source.config.get("target_modules")
        if (
            not isinstance(entries, list)
            or self.source.config.get("layers_to_transform") is not None
            or self.source.config.get("exclude_modules")
            or any(any(part.isdigit() for part in entry.split(".")) for entry in entries)
        ):
            return None
        return seen

    def check_gaps(self, plan: Plan) -> None:
        """Where one leaf name adapts every expert, an expert that is missing was lost."""
        entries = self.source.config.get("target_modules")
        filtered = self.source.config.get("layers_to_transform") is not None or bool(
            self.source.config.get("exclude_modules")
        )
        if not isinstance(entries, list) or filtered:
            return
        findings = []
        for entry in plan.entries:
            for term, ids in zip(entry.read, entry.sources, strict=True):
                absent = np.flatnonzero(ids.reshape(-1) < 0)
                if not len(absent) or len(absent) == ids.size:
                    continue
                keys = entry.keys(term)
                lost = []
                for row in absent.tolist():
                    module = keys.name(row).removesuffix(".weight")
                    if targets_module(entries, module):
                        lost.append(module)
                if lost:
                    findings.append(
                        Finding(
                            "missing",
                            "target_modules names it and the base model has it, but the file has no "
                            "factors for it"
                            + (f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""),
                            where=self.source.where,
                            key=PREFIX + lost[0],
                            rule=str(entry.rule),
                            fix="check that --model is the base it was trained on, otherwise save it again; if "
                            "it was left out on purpose, name the modules that are there one by one in "
                            "target_modules",
                        )
                    )
        if findings:
            raise BadInputError(findings)

    def refuse_unknown_variants(self, plan: Plan) -> None:
        """What is more than a plain LoRA is carried over, but not where its base weight changes."""
        if not self.is_lora:
            return
        lora = LoraConfig(self.source.config)
        names = lora.variants()
        init = lora.changes_base()
        if init is not None:
            names.append(f"the initialisation {init!r}, which changes base weights when it loads,")
        if not names:
            return
        moved = [
            entry.keys(term).name(int(row))
            for entry in plan.entries
            if not (entry.moves_nothing and entry.read[0].key == entry.written[0].key)
            for term, ids in zip(entry.read, entry.sources, strict=True)
            for row in np.flatnonzero(ids.reshape(-1) >= 0)[:1]
        ]
        if moved:
            raise RefusedError(
                Finding(
                    "variant",
                    f"{' and '.join(names)} cannot follow it: its weight moves to a parameter that PEFT adapts "
                    "with plain LoRA only",
                    where=self.source.where,
                    key=moved[0],
                    fix="merge the adapter into its base and convert the base, or train a plain LoRA on the "
                    "experts and keep the rest as a second adapter",
                )
            )
        reclaimed = self.reclaimed(self.to.name)
        if not reclaimed or not self.to.name.endswith("v5"):
            return
        hit = [
            path
            for pairs in self.scan.pairs
            for path in pairs.modules.names()
            if path.rpartition(".")[2] in reclaimed
        ]
        if hit:
            raise RefusedError(
                Finding(
                    "variant",
                    f"PEFT moves every LoRA with this module's name to the experts when it loads an adapter for "
                    f"this model, and what keeps it (target_parameters) does not go with {' and '.join(names)}",
                    where=self.source.where,
                    key=hit[0],
                    fix="merge the adapter into its base and convert the base",
                )
            )

    def reclaimed(self, target: str) -> tuple[str, ...]:
        """Leaf names that must not stand in ``target_modules`` of the result."""
        if not self.is_lora:
            return ()
        names: list[str] = []
        lora = LoraConfig(self.source.config)
        plain = not lora.variants() and lora.changes_base() is None
        for book in self.known.books:
            certain = (
                self.known.model_type is None or self.known.model_type in book.reclaimed_model_types
            )
            if book.right == target and (plain or certain):
                names += book.reclaimed
        return tuple(dict.fromkeys(names))

    def target_packing(self, recorded: Mapping[str, Any]) -> str:
        if self.to.packing is not None:
            return self.to.packing
        before = recorded.get("source", {})
        if before.get("layout") == self.to.name and before.get("packing"):
            return str(before["packing"])
        return self.to.usual_packing

    # The config

    def write_config(
        self,
        result: Result,
        packing: str,
        recorded: Mapping[str, Any],
        saved: list[str] | None,
    ) -> dict[str, Any]:
        source = self.source.config
        if not self.is_lora or not result.written:
            config = dict(source)
            if saved is not None:
                config["modules_to_save"] = saved
            return self.restored(config, recorded, result) or config
        config = ConfigWriter(source, result, self.known.model).write(packing)
        if saved is not None:
            config["modules_to_save"] = saved
        restored = self.restored(config, recorded, result)
        if restored is not None:
            return restored
        wrong = check_config(config, result.written)
        if wrong:
            raise RegraftError(
                Finding(
                    "internal",
                    "the config that was made does not give this target its scale; please report this",
                    key=wrong[0],
                )
            )
        return config

    def restored(
        self, config: dict[str, Any], recorded: Mapping[str, Any], result: Result
    ) -> dict[str, Any] | None:
        """The config this adapter had in the target layout before, where it still says the truth."""
        before = recorded.get("source", {})
        if before.get("layout") != self.to.name or (
            before.get("packing") and before["packing"] != self.target_packing(recorded)
        ):
            return None
        old = dict(self.source.config)
        for name, (was, became) in recorded.get("config", {}).items():
            if self.source.config.get(name) != became:
                return None
            if was is None and name not in recorded.get("had", []):
                old.pop(name, None)
            else:
                old[name] = was
        if self.is_lora:
            if check_config(old, result.written):
                return None
            for w in result.written:
                named = targets_module(old.get("target_modules") or [], w.module)
                if not named and not targets_parameter(
                    old.get("target_parameters"), f"{w.module}.{w.parameter or 'weight'}"
                ):
                    return None
        del config
        return old

    def open_record(self, recorded: Mapping[str, Any]) -> Record:
        if recorded.get("source", {}).get("layout") != self.to.name:
            return Record()
        return read_record(recorded.get("parts", {}), bool(self.source.config.get("use_rslora")))

    def new_record(self, layout: str, config: Mapping[str, Any], record: Record, kept: Kept) -> str:
        source = self.source.config
        changed = {
            name: [source.get(name), config.get(name)]
            for name in sorted({*source, *config})
            if source.get(name) != config.get(name)
        }
        return json.dumps(
            {
                "format": _FORMAT,
                "layout": self.to.name,
                "source": {"layout": layout, "packing": self.packing},
                "config": changed,
                "had": [name for name in changed if name in source],
                "parts": record.to_json(),
                "kept": kept.to_json(),
            },
            sort_keys=True,
        )

    def note_changes(self, config: Mapping[str, Any], made: Iterable[Images]) -> None:
        source = self.source.config
        if source.get("lora_dropout") and not config.get("lora_dropout"):
            self.notes.append(
                f"lora_dropout {source['lora_dropout']} became 0: PEFT takes no dropout on target_parameters "
                "(outputs are the same; further training differs)"
            )
        inexact = sum(
            1 for image in made for lora in image.loras if lora is not None and not lora.exact
        )
        if inexact:
            self.notes.append(
                f"in {inexact} targets parts of unequal scale share one now: the ratio was folded into B"
            )
        wider = sum(
            1
            for image in made
            for lora in image.loras
            if lora is not None and lora.b.dtype != lora.a.dtype
        )
        if wider:
            self.notes.append(
                f"B became float32 in {wider} targets, because the ratio is no power of two"
            )
        for name in config:
            if name == "peft_version" and source.get(name) != config[name]:
                self.notes.append(
                    f"peft_version says {config[name]} now, because it tells readers how experts are packed"
                )


def _unmoved(factors: Factors) -> Iterator[Images]:
    for keys, kind in factors.kinds:
        ids = keys.ids.tolist()
        yield Images(keys, kind, [Lora(factors.a[i], factors.b[i], factors.scales[i]) for i in ids])


def _images(plan: Plan, factors: Factors, record: Record) -> Iterator[Images]:
    kinds = {keys.template: kind for keys, kind in factors.kinds}
    for entry in plan.entries:
        yield from images(entry, factors, record)
    for carried in plan.carried:
        ids = carried.group.ids.tolist()
        loras: list[Lora | None] = [
            Lora(factors.a[i], factors.b[i], factors.scales[i]) for i in ids
        ]
        yield Images(carried.group, _carried_kind(kinds[carried.group.template]), loras)


def _carried_kind(kind: str) -> str:
    return "linear" if kind == "any" else kind


def _rule_of_each(plan: Plan) -> dict[str, str]:
    rules = {}
    for entry in plan.entries:
        for term in entry.written:
            rules.update(dict.fromkeys(entry.keys(term).names(), str(entry.rule)))
    for carried in plan.carried:
        rules.update(dict.fromkeys(carried.group.names(), carried.carry.why))
    return rules


__all__ = ["Converted", "Written", "convert_adapter"]
