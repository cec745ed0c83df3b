"""Converting an adapter: config and weights as one transaction."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from regraft.adapters.detect import Detected, Known, detect_layout, find_books, layout_of_version
from regraft.adapters.factors import Array, Factors, Images, Lora
from regraft.adapters.image import images
from regraft.adapters.packing import packing_of_version
from regraft.adapters.peft_config import LoraConfig, targets_module, targets_parameter
from regraft.adapters.reading import FactorReader, Side
from regraft.adapters.record import Record, read_record
from regraft.adapters.scan import PREFIX, Others, Scan, scan_names
from regraft.adapters.source import RECORD, Source
from regraft.adapters.writing import (
    ConfigWriter,
    Result,
    Written,
    check_config,
    tail_of,
    write_factors,
)
from regraft.arrays.apply import apply_plan
from regraft.equation.notation import parse_key
from regraft.errors import BadInputError, Finding, RefusedError, RegraftError
from regraft.layouts import LAYOUTS, Layout
from regraft.names.keys import Group
from regraft.plan.build import build_plan
from regraft.plan.model import ModelConfig
from regraft.plan.plan import Headers, Plan
from regraft.report import AdapterReport, Target
from regraft.rules.book import Rule
from regraft.rules.templates import match_group

_FORMAT = 1


@dataclass(slots=True)
class Converted:
    """An adapter in its new layout, ready to be written."""

    config: dict[str, Any]
    tensors: dict[str, Array]
    metadata: dict[str, str]
    report: AdapterReport
    plan: Plan | None = None


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
        self.known = find_books(
            self.scan, self.source.config, self.given_model, self.source.where
        )
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
        factors = self.read_factors(side)
        arrays = list(self.source.tensors.values())
        others = self.plan_others(target, side, repack)
        recorded = self.source.record()
        record = self.open_record(recorded)
        plan: Plan | None = None
        if repack:
            made = list(_unmoved(factors))
            rules: dict[str, str] = {}
        else:
            plan = self.plan_factors(factors, target)
            self.refuse_unknown_variants(plan)
            made = list(_images(plan, factors, record))
            rules = _rule_of_each(plan)
        packing = self.target_packing(recorded)
        out_side = Side(self.known.books, target, self.known.scopes)
        result = write_factors(made, out_side, packing, self.reclaimed(target))
        exact = {image.keys.name(i): lora.exact for image in made for i, lora in enumerate(image.loras) if lora}
        report = self.new_report(layout)
        config = self.write_config(result, packing, recorded, others)
        names = self.write_others(others, result, arrays)
        report.carried = len(names)
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
        metadata[RECORD] = self.new_record(layout, config, record)
        return Converted(config, result.tensors, metadata, report, plan)

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
                            f"target_modules names it, but the file has no factors for it"
                            + (f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""),
                            where=self.source.where,
                            key=PREFIX + lost[0],
                            rule=str(entry.rule),
                            fix="save the adapter again; if it was left out on purpose, name the modules "
                            "that are there one by one in target_modules",
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
            certain = self.known.model_type is None or self.known.model_type in book.reclaimed_model_types
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

    # Tensors that are no LoRA factors

    def plan_others(self, target: str, side: Side, repack: bool) -> list[_Moved]:
        inside = [o for o in self.scan.others if o.prefix]
        outside = [o for o in self.scan.others if not o.prefix]
        if outside and self.is_lora:
            raise BadInputError(
                [
                    Finding(
                        "prefix",
                        f"keys of a PEFT adapter begin with {PREFIX!r}",
                        where=self.source.where,
                        key=o.keys.name(0),
                        fix=f"put {PREFIX!r} before every key, or save the adapter with save_pretrained",
                    )
                    for o in outside
                ]
            )
        moved = [
            _Moved(name, name, False, i, inside=False)
            for o in outside
            for name, i in zip(o.keys.names(), o.keys.ids.tolist(), strict=True)
        ]
        if not inside:
            return moved
        self.refuse_changed(inside, side)
        wrapped = {i for o in inside if o.wrapped for i in o.keys.ids.tolist()}
        tensors = list(self.source.tensors.values())
        if repack:
            return moved + [
                _Moved(name, name, i in wrapped, i)
                for o in inside
                for name, i in zip(o.keys.names(), o.keys.ids.tolist(), strict=True)
            ]
        order = [i for o in inside for i in o.keys.ids.tolist()]
        place = {i: at for at, i in enumerate(order)}
        groups = [
            Group(o.keys.template, np.array([place[i] for i in o.keys.ids.tolist()]), o.keys.numbers)
            for o in inside
        ]
        headers = Headers(
            groups,
            [tensors[i].shape for i in order],
            [tensors[i].dtype.name for i in order],
        )
        plan = self.plan_absolute(headers, target)
        result = apply_plan(plan, [tensors[i] for i in order])
        sources: dict[str, str] = {}
        whose: dict[str, bool] = {}
        for entry in plan.entries:
            for term in entry.written:
                keys = entry.keys(term)
                per_loop = len(keys) // len(entry)
                for row in range(len(keys)):
                    first = int(entry.sources[0][row // per_loop].reshape(-1)[0])
                    sources[keys.name(row)] = headers.name(first)
                    whose[keys.name(row)] = order[first] in wrapped
        for carried in plan.carried:
            for name, i in zip(carried.group.names(), carried.group.ids.tolist(), strict=True):
                sources[name], whose[name] = name, order[i] in wrapped
        return moved + [
            _Moved(sources[name], name, whose[name], tensor) for name, tensor in result.items()
        ]

    def plan_absolute(self, headers: Headers, target: str) -> Plan:
        try:
            return build_plan(
                headers,
                self.known.books,
                target_layout=target,
                scopes=dict(self.known.scopes),
                where=self.source.where,
            )
        except BadInputError as error:
            if all(finding.code == "missing" for finding in error.findings):
                raise RefusedError(
                    [
                        Finding(
                            "partial-weights",
                            f"saved weights (modules_to_save) become part of a bigger tensor, and {f.message}",
                            where=f.where,
                            rule=f.rule,
                            fix="merge the adapter into its base and convert the base",
                        )
                        for f in error.findings
                    ]
                ) from None
            raise

    def refuse_changed(self, others: Iterable[Others], side: Side) -> None:
        """Refuse tensors of families that have no rule where the base weight they stand on changes."""
        findings = []
        for rule, term, _, _ in side.rules():
            key = term.key
            if key is None or _keeps(rule):
                continue
            module = str(key).removesuffix(".weight")
            below = parse_key(module + ".{*adapter_tensor}")
            for other in others:
                if match_group(key, other.keys) is not None:
                    continue
                match = match_group(below, other.keys)
                if match is not None and match.rests[-1]:
                    kind = self.source.peft_type
                    findings.append(
                        Finding(
                            "no-image",
                            f"this tensor of {'a variant of ' if kind == 'LORA' else ''}{kind} stands on a "
                            "weight that is laid out otherwise there, and no rule carries it"
                            + (f" ({len(match.rows)} like it)" if len(match.rows) > 1 else ""),
                            where=self.source.where,
                            key=other.keys.name(int(match.rows[0])),
                            rule=str(rule),
                            fix="merge the adapter into its base and convert the base",
                        )
                    )
        if findings:
            raise RefusedError(findings)

    def write_others(self, others: list[_Moved], result: Result, arrays: list[Array]) -> list[str]:
        names = []
        for item in others:
            tensor = arrays[item.tensor] if isinstance(item.tensor, int) else item.tensor
            name = item.new
            if item.inside:
                module, _, leaf = name.rpartition(".")
                depth = result.wrappers.get(module, 1) if item.wrapped else 0
                name = PREFIX + module + ".base_layer" * depth + "." * bool(module) + leaf
            result.tensors[name] = tensor
            names.append(name)
        return names

    # The config

    def write_config(
        self, result: Result, packing: str, recorded: Mapping[str, Any], others: list[_Moved]
    ) -> dict[str, Any]:
        source = self.source.config
        saved = self.modules_to_save(others)
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

    def modules_to_save(self, others: list[_Moved]) -> list[str] | None:
        """``modules_to_save`` with the names the modules have now; ``None`` where nothing changes."""
        entries = self.source.config.get("modules_to_save")
        if not isinstance(entries, list):
            return None
        result: list[str] = []
        for entry in entries:
            new: dict[str, list[str]] = {}
            same = True
            for item in others:
                owner = _owner(item.old, entry)
                if owner is not None:
                    new.setdefault(owner, []).append(item.new)
                    same &= item.old == item.new
            modules = [_common_module(names) for names in new.values()]
            if same or not modules or all(m.endswith(entry) for m in modules):
                result.append(entry)
            else:
                result += sorted({m if m.endswith(entry) else tail_of(m) for m in modules})
        result = list(dict.fromkeys(result))
        return None if result == entries else result

    def open_record(self, recorded: Mapping[str, Any]) -> Record:
        if recorded.get("source", {}).get("layout") != self.to.name:
            return Record()
        return read_record(recorded.get("parts", {}), bool(self.source.config.get("use_rslora")))

    def new_record(self, layout: str, config: Mapping[str, Any], record: Record) -> str:
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
        inexact = sum(1 for image in made for lora in image.loras if lora is not None and not lora.exact)
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
            self.notes.append(f"B became float32 in {wider} targets, because the ratio is no power of two")
        for name in config:
            if name == "peft_version" and source.get(name) != config[name]:
                self.notes.append(
                    f"peft_version says {config[name]} now, because it tells readers how experts are packed"
                )


@dataclass(frozen=True, slots=True)
class _Moved:
    old: str
    new: str
    wrapped: bool
    """Whether the module it belongs to is adapted, too."""
    tensor: Array | int
    inside: bool = True
    """Whether it belongs to a module of the base: its key has PEFT's prefix."""


def _unmoved(factors: Factors) -> Iterator[Images]:
    for keys, kind in factors.kinds:
        ids = keys.ids.tolist()
        yield Images(
            keys, kind, [Lora(factors.a[i], factors.b[i], factors.scales[i]) for i in ids]
        )


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


def _keeps(rule: Rule) -> bool:
    """Whether a rule leaves name, shape and kind as they are."""
    left, right = rule.equation.left, rule.equation.right
    return (
        len(left) == len(right) == 1
        and left[0].key == right[0].key
        and left[0].dims == right[0].dims
        and rule.left_kinds == rule.right_kinds
    )


def _owner(key: str, entry: str) -> str | None:
    """The module that an entry of ``modules_to_save`` saves and that a tensor belongs to."""
    segments = key.split(".")
    for end in range(1, len(segments)):
        path = ".".join(segments[:end])
        if path.endswith(entry):
            return path
    return None


def _common_module(names: list[str]) -> str:
    split = [name.split(".")[:-1] for name in names]
    common = split[0]
    for other in split[1:]:
        length = next((i for i, (x, y) in enumerate(zip(common, other, strict=False)) if x != y), None)
        common = common[: min(len(common), len(other)) if length is None else length]
    return ".".join(common)


__all__ = ["Converted", "Written", "convert_adapter"]
