"""Converting an adapter: config and weights as one transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.components import Record
from regraft.adapters.detect import Known, detect_layout, find_books
from regraft.adapters.families.base import Family
from regraft.adapters.families.table import family_of
from regraft.adapters.form import Array, Factors, Images, Lora
from regraft.adapters.kept import (
    Kept,
    add_factors,
    digest_all,
    drop_stand_ins,
    fill_saved,
    keep_changed,
    keep_uncalled,
    put_back,
)
from regraft.adapters.ladder import (
    Carried,
    Carrier,
    lora_config,
    sources_of,
    unmoved_images,
    write_family_config,
    write_parts,
)
from regraft.adapters.move import images
from regraft.adapters.ranks import Options, compact, make_uniform, tighten
from regraft.adapters.saved import Moved, move_others, rename_saved, rename_tokens, write_others
from regraft.adapters.tuned import TunedModules
from regraft.dialects.peft.complete import check_complete, guess_count
from regraft.dialects.peft.config import targets_module, targets_parameter
from regraft.dialects.peft.fitting import check_fit
from regraft.dialects.peft.packing import packing_of_version
from regraft.dialects.peft.provenance import KEY, Origin, write_remembered
from regraft.dialects.peft.reading import FactorReader
from regraft.dialects.peft.scan import Scan, scan_names
from regraft.dialects.peft.source import Source
from regraft.dialects.peft.unbound import check_unbound
from regraft.dialects.peft.variants import claimed_names, reclaimed_names, refuse_attention
from regraft.dialects.peft.writing import (
    ConfigWriter,
    Result,
    Written,
    check_config,
    plain_entries,
    write_factors,
)
from regraft.errors import (
    AmbiguousError,
    BadInputError,
    Finding,
    RefusedError,
    RegraftError,
)
from regraft.layouts import LAYOUTS, Layout, layout_of_packing, other_layout
from regraft.names.keys import group_names
from regraft.planning.build import build_plan, check_layouts
from regraft.planning.model import Foreign, ModelConfig
from regraft.planning.plan import Headers, Plan
from regraft.planning.side import Side
from regraft.report import AdapterReport, Target, Trace
from regraft.rules.templates import match_group


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
    options: Options | None = None,
    foreign: Foreign | None = None,
) -> Converted:
    """Convert one adapter in memory.

    ``layout`` is the source's, found out where it is not given; ``model`` is the config of the base, needed where
    the adapter itself does not tell sizes (only some experts are adapted, say); ``foreign`` is asked for models
    that the library does not know. ``options`` allow what is done only by name.

    Raises ``BadInputError``, ``UnmatchedKeysError``, ``AmbiguousError`` or ``RefusedError`` with all findings.
    """
    in_place = layout is not None and layout.name == to.name
    if not in_place and check_unbound(source, model):
        known = Known((), {}, model, None, "nothing in it is bound to a layer of the base")
        alone = _Conversion(source, to, known, Scan((), ()), [known.evidence], None, Options())
        alone.layout = to.name if layout is None else layout.name
        return alone.copy("it means the same in both layouts and was copied as it is")
    family = family_of(source.config)
    scan, findings = _scan(source, family)
    if findings:
        raise BadInputError(findings)
    if not in_place:
        refuse_attention(scan, source.where)
    spelled = source.remembered().names
    known = find_books(scan, source.config, model, source.where, foreign, spelled)
    conversion = _Conversion(
        source, to, known, scan, [known.evidence], family, options or Options(), [*known.notes]
    )
    try:
        conversion.choose_layout(layout)
        check_fit(scan, source, known, BaseWeights.of(known, conversion.layout))
        if conversion.is_there_already():
            conversion.check_readable()
            return conversion.copy()
        return conversion.convert()
    except RefusedError as error:
        raise RefusedError(
            replace(finding, where=finding.where or source.where) for finding in error.findings
        ) from error


def source_layout(
    source: Source,
    to: Layout,
    model: ModelConfig | None,
    layout: Layout | None,
    foreign: Foreign | None = None,
) -> tuple[str, Known, list[str]]:
    """The layout of an adapter, the rule books for it, and what told it.

    Raises what `convert_adapter` raises.
    """
    family = family_of(source.config)
    scan, findings = _scan(source, family)
    if findings:
        raise BadInputError(findings)
    spelled = source.remembered().names
    known = find_books(scan, source.config, model, source.where, foreign, spelled)
    conversion = _Conversion(source, to, known, scan, [known.evidence], family, Options())
    conversion.choose_layout(layout)
    return conversion.layout, known, conversion.evidence


def _scan(source: Source, family: type[Family] | None) -> tuple[Scan, list[Finding]]:
    plain = source.peft_type == "LORA" and family is None
    prefix = family.prefix if family is not None else None
    return scan_names(list(source.tensors), source.where, plain, prefix)


@dataclass(slots=True)
class _Conversion:
    source: Source
    to: Layout
    known: Known
    scan: Scan
    evidence: list[str]
    family: type[Family] | None
    """``None`` for plain LoRA, and for what is bound to no module."""
    options: Options
    notes: list[str] = field(default_factory=list)
    layout: str = ""
    """The source's."""
    packing: str | None = None
    """How stacked experts are packed in the source, as far as it is known."""
    config_was: dict[str, Any] | None = None
    """The source's config, where another family stands in for it."""
    tokens: dict[str, Any] | None = None
    """``trainable_token_indices`` with the names that embeddings have now, where it changes."""

    @property
    def config(self) -> dict[str, Any]:
        return self.source.config

    @property
    def plain(self) -> bool:
        """Whether it is a LoRA and nothing more."""
        return self.source.peft_type == "LORA" and self.family is None

    @property
    def comes_back(self) -> bool:
        """Whether regraft made the source from an adapter of the layout that it goes to now."""
        return self.source.remembered().source.layout == self.to.name

    def there(self) -> Side:
        """The side that is written."""
        return Side(self.known.books, self.to.name, self.known.scopes)

    def choose_layout(self, given: Layout | None) -> None:
        """The layout the adapter is in; where its names are the same in all, the one that makes work."""
        check_layouts(self.known.books, self.to.name)
        if given is not None:
            check_layouts(self.known.books, given.name)
        detected = detect_layout(self.scan, self.source, self.known.books)
        if given is None:
            self.evidence += detected.evidence
            self.layout = detected.layout or self.unnamed_layout()
        elif detected.by_names and detected.layout != given.name:
            raise BadInputError(
                Finding(
                    "layout",
                    f"it was said to be {given}, but {detected.evidence[0]}",
                    where=self.source.where,
                    fix="leave --from out",
                )
            )
        else:
            self.layout, self.packing = given.name, given.packing

    def unnamed_layout(self) -> str:
        """What to take an adapter for whose names are the same in all layouts.

        Its shapes may tell. Where they do not, it makes no difference to the tensors; but PEFT treats some configs
        otherwise in transformers 5, so on the way there it is taken for an old one. Back, only a config that
        names modules by an expression could match more there than it did.
        """
        errors = {name: self.misfit(name) for name in LAYOUTS}
        fitting = [name for name, error in errors.items() if error is None]
        if not fitting:
            raise errors[other_layout(self.to.name)] or AssertionError
        if len(fitting) == 1:
            self.evidence.append(f"its shapes are those of {fitting[0]}")
            return fitting[0]
        if self.is_turned():
            return self.layout_of_version()
        expression = isinstance(self.config.get("target_modules"), str)
        return (
            self.to.name
            if self.to.name == "transformers-v4" and not expression
            else other_layout(self.to.name)
        )

    def is_turned(self) -> bool:
        """Whether a saved weight is laid out otherwise in the other layout, under the same name."""
        rules = Side(self.known.books, self.to.name, self.known.scopes).rules()
        return any(
            match_group(term.key, other.keys) is not None
            for rule, term, _, _ in rules
            if term.key is not None
            and [str(t.key) for t in rule.equation.left]
            == [str(t.key) for t in rule.equation.right]
            and [t.dims for t in rule.equation.left] != [t.dims for t in rule.equation.right]
            for other in self.scan.others
        )

    def layout_of_version(self) -> str:
        """The layout that goes with the PEFT that saved an adapter, where nothing else tells it."""
        version = self.config.get("peft_version")
        packing = packing_of_version(version)
        if packing is None:
            raise AmbiguousError(
                Finding(
                    "which-layout",
                    "its names and shapes fit both layouts, and adapter_config.json has no peft_version",
                    where=self.source.where,
                    fix=f"say which it is with --from ({' or '.join(LAYOUTS)})",
                )
            )
        layout = layout_of_packing(packing)
        self.evidence.append(f"it was saved by PEFT {version}, which goes with {layout}")
        return layout

    def misfit(self, layout: str) -> RegraftError | None:
        """Why an adapter cannot be of a layout, ``None`` where it can."""
        target = other_layout(layout)
        side = Side(self.known.books, layout, self.known.scopes)
        try:
            if self.family is not None:
                self.plan_family(self.carrier(layout, target).read(), target)
            else:
                self.plan(self.read_factors(side, quiet=True), target)
            move_others(self.scan, self.source, self.known, side, target, in_place=False)
        except RefusedError:
            return None
        except RegraftError as error:
            return error
        return None

    def is_there_already(self) -> bool:
        """Whether it is in the target layout, with experts packed as they are to be."""
        if self.layout != self.to.name or self.options.asks:
            return False
        if self.plain and self.is_claimed():
            return False
        if not self.plain or not self.config.get("target_parameters"):
            return True
        have = self.packing or packing_of_version(self.config.get("peft_version"))
        return have == self.to.usual_packing

    def is_claimed(self) -> bool:
        """Whether it names modules in a way that makes PEFT adapt the experts in their place."""
        names = claimed_names(self.config, self.known, self.to.name)
        targets = self.config.get("target_modules")
        return any(
            path.rpartition(".")[2] in names and targets_module(targets, path)
            for pairs in self.scan.pairs
            for path in (pairs.modules.names() if names and not pairs.depth else ())
        )

    def check_readable(self) -> None:
        """Check an adapter that stays as it is like one that does not; how it is packed need not be known.

        Raises ``BadInputError``.
        """
        try:
            if self.family is not None:
                self.carrier(self.layout, self.layout).read()
            elif self.plain:
                self.read_factors(Side(self.known.books, self.layout, self.known.scopes), True)
        except AmbiguousError:
            return

    def copy(self, why: str | None = None) -> Converted:
        report = self.new_report()
        report.copied = True
        report.tensors_out = report.tensors_in
        report.carried = report.tensors_in
        report.trace = _trace_of(self.source.tensors)
        self.notes.append(why or f"it is in {self.to.name} already and was copied as it is")
        tensors, metadata = dict(self.source.tensors), dict(self.source.metadata)
        return Converted(dict(self.config), tensors, metadata, report)

    def new_report(self) -> AdapterReport:
        return AdapterReport(
            self.source.name,
            self.source.peft_type,
            self.layout,
            str(self.to),
            self.evidence,
            tensors_in=len(self.source.tensors),
            notes=self.notes,
        )

    def carrier(self, layout: str, target: str) -> Carrier:
        assert self.family is not None
        return Carrier(
            self.family,
            self.config,
            self.source.tensors,
            self.scan,
            self.known,
            layout,
            target,
            self.source.where,
        )

    def convert(self) -> Converted:
        report = self.new_report()
        restored = self.restore(report)
        if restored is not None:
            return restored
        if self.family is not None:
            return self.convert_family(report)
        record = Record()
        if self.comes_back:
            record = self.source.remembered().record(bool(self.config.get("use_rslora")))
        came_as = self.source.tensors
        factors_back, written_back = self.take_back()
        here = Side(self.known.books, self.layout, self.known.scopes)
        there = self.there()
        in_place = self.layout == self.to.name
        factors = self.read_factors(here)
        plan = None if in_place else self.plan(factors, self.to.name)
        others = move_others(
            self.scan, self.source, self.known, here, self.to.name, in_place=in_place
        )
        made = list(_unmoved(factors) if plan is None else _images(plan, factors, record))
        made, others, saved, kept = self.use_base(made, others)
        via = self.options.via
        errors = tighten(made, via) if via is not None and via != "dense" else {}
        if self.change_ranks(made) or errors:
            record = Record()
        reclaimed = reclaimed_names(self.config, self.known, self.to.name)
        result = write_factors(made, there, self.target_packing, reclaimed)
        if kept.entries and not result.written:
            raise RefusedError(
                Finding(
                    "nothing-left",
                    "every LoRA of it had to be added to its base weight, so nothing is left that PEFT "
                    "could adapt, and PEFT loads no such adapter",
                    where=self.source.where,
                    key=next(iter(kept.table.modules)),
                    fix="merge the adapter into its base and convert the base",
                )
            )
        add_factors(result, factors_back, written_back)
        config = self.write_config(result, saved)
        write_others(others, result)
        lost = keep_changed(made, factors, self.source.tensors, kept)
        if kept.tensors and any(lora and lora.changed for image in made for lora in image.loras):
            kept.table.changed = digest_all(result.tensors)
        if lost:
            self.notes.append(
                f"the way back will not give back every bit of {_count(lost, 'LoRA')}: their factors were rescaled, "
                "or joined with factors of another dtype"
            )
        if self.comes_back:
            remembered = self.source.remembered()
            put_back(result.tensors, came_as, remembered.kept, self.source.aside)
        self.note_changes(config, made)
        report.carried = len(others)
        report.tensors_out = len(result.tensors)
        report.rules = plan.fired() if plan is not None else {}
        rung = "svd" if errors else "family"
        report.targets = _targets(result.written, made, plan, rung, errors)
        beside = tuple((moved.old, moved.new) for moved in others)
        report.trace = Trace(factors.headers, plan, scales=factors.scales, beside=beside)
        metadata = {"format": "pt", **self.source.metadata}
        metadata[KEY] = write_remembered(
            self.to.name,
            Origin(self.layout, self.packing),
            self.config,
            config,
            record,
            kept.table,
            self.spelling(plan),
        )
        return Converted(config, result.tensors, metadata, report, plan, kept.tensors)

    def spelling(self, plan: Plan | None) -> list[str]:
        """One name of each kind that the adapter had, so that the way back spells names as they were."""
        if plan is None or not self.known.imported:
            return []
        names: dict[str, str] = {}
        for entry in plan.entries:
            for term in entry.read:
                keys = entry.keys(term)
                names.setdefault(keys.template, keys.name(0))
        return list(names.values())

    def take_back(self) -> tuple[dict[str, Array], list[Written]]:
        """Leave out what only stood in for something in the layout that this adapter comes back from."""
        if not self.comes_back:
            return {}, []
        table = self.source.remembered().kept
        drop, factors, written = drop_stand_ins(self.source.tensors, table, self.source.aside)
        if drop:
            tensors = {n: t for n, t in self.source.tensors.items() if n not in drop}
            self.source = replace(self.source, tensors=tensors)
            self.scan, _ = _scan(self.source, self.family)
        return factors, written

    def restore(self, report: AdapterReport) -> Converted | None:
        """All of an adapter that another family stood in for, where nothing was changed since."""
        if not self.comes_back:
            return None
        remembered, aside = self.source.remembered(), self.source.aside
        before = remembered.config_before(self.config)
        if not remembered.kept.whole or before is None or not aside:
            return None
        if digest_all(self.source.tensors) != remembered.kept.whole:
            return None
        self.notes.append("the adapter that this one was made of is back, bit for bit")
        report.carried = report.tensors_out = len(aside)
        report.peft_type = str(before.get("peft_type"))
        return Converted(before, dict(aside), {"format": "pt"}, report)

    def convert_family(self, report: AdapterReport) -> Converted:
        """Carry a family along, in its own form or as LoRAs."""
        there = self.there()
        here = Side(self.known.books, self.layout, self.known.scopes)
        in_place = self.layout == self.to.name
        carrier = self.carrier(self.layout, self.to.name)
        tuned = carrier.read()
        plan = None if in_place else self.plan_family(tuned, self.to.name)
        others = move_others(
            self.scan, self.source, self.known, here, self.to.name, in_place=in_place
        )
        carried = carrier.carry(plan, tuned, self.options.via)
        if carried.factors is None:
            if self.source.peft_type == "BONE" and self.to.name == "transformers-v5":
                self.notes.append(
                    "PEFT has no Bone since 0.19, so no PEFT that goes with transformers 5 loads this adapter"
                )
            _, others, saved, kept = self.use_base([], others)
            result = write_parts(carried.parts, carrier.family)
            config = self.family_config(carrier, carried, plan, tuned, saved)
            report.targets = _family_targets(carried, plan)
        else:
            others = [item for item in others if not carrier.family.shares(item.old)]
            factors = carried.factors
            record = Record()
            made = unmoved_images(factors) if plan is None else list(_images(plan, factors, record))
            made, others, saved, kept = self.use_base(made, others)
            errors = tighten(made, self.options.via)
            self.change_ranks(made)
            self.config_was, self.source = (
                self.config,
                replace(self.source, config=lora_config(self.config)),
            )
            self.family = None
            reclaimed = reclaimed_names(self.config, self.known, self.to.name)
            result = write_factors(made, there, self.target_packing, reclaimed)
            config = self.write_config(result, saved)
            self.note_changes(config, made)
            rung = "svd" if errors else carried.rung
            report.targets = _targets(result.written, made, plan, rung, errors)
            self.note_rung(carrier.family, carried, rung)
        write_others(others, result)
        beside = tuple((moved.old, moved.new) for moved in others)
        report.trace = Trace(tuned.headers, plan, beside=beside)
        report.carried = len(others)
        report.tensors_out = len(result.tensors)
        report.rules = plan.fired() if plan is not None else {}
        aside = dict(kept.tensors)
        if carried.factors is not None or carried.moved:
            aside.update(self.source.tensors)
            kept.table.whole = digest_all(result.tensors)
        metadata = {"format": "pt", **self.source.metadata}
        before = self.config_was or self.config
        metadata[KEY] = write_remembered(
            self.to.name,
            Origin(self.layout, self.packing),
            before,
            config,
            Record(),
            kept.table,
            self.spelling(plan),
        )
        return Converted(config, result.tensors, metadata, report, plan, aside)

    def family_config(
        self,
        carrier: Carrier,
        carried: Carried,
        plan: Plan | None,
        tuned: TunedModules,
        saved: list[str] | None,
    ) -> dict[str, Any]:
        config = dict(self.config)
        if plan is not None and carried.parts:
            renamed = {
                tuned.headers.name(i).removesuffix(".weight"): new.removesuffix(".weight")
                for new, i in sources_of(plan).items()
            }
            config = write_family_config(
                config,
                carrier.family,
                carried.parts,
                carried.changes,
                self.known.model,
                renamed,
                self.there(),
            )
        if saved is not None:
            config["modules_to_save"] = saved
        if self.tokens is not None:
            config["trainable_token_indices"] = self.tokens
        before = self.source.remembered().config_before(self.config) if self.comes_back else None
        if before is not None and not carried.moved:
            family = type(carrier.family)(before, {})
            paths = {k.removesuffix(".weight"): part.settings for k, part in carried.parts.items()}
            if all(
                targets_module(before.get("target_modules"), path)
                and family.settings(path) == settings
                for path, settings in paths.items()
            ):
                return before
        carrier.confirm(config, carried.parts)
        return config

    def change_ranks(self, made: Iterable[Images]) -> bool:
        """What was asked for of ranks; whether components are not the source's any more."""
        changed: list[tuple[int, int]] = []
        if self.options.compact:
            changed = compact(made)
            ranks = (
                ", ".join(f"{a} -> {b}" for a, b in sorted(set(changed))) or "nothing to leave out"
            )
            self.notes.append(f"ranks without components that add nothing (--compact): {ranks}")
        if self.options.uniform:
            rank = make_uniform(made)
            self.notes.append(f"all targets have rank {rank}, as was asked for")
        return bool(changed)

    def note_rung(self, family: Family, carried: Carried, rung: str) -> None:
        """Tell what stands in for the family."""
        how = {
            "lora": "exactly",
            "base": "exactly, with the base's weights",
            "dense": "as deltas of full rank, as was asked for",
            "svd": "approximately, as was asked for",
        }[rung]
        why = f": {carried.why}" if carried.why else ""
        self.notes.append(f"{family.title} became LoRA, {how}{why}")

    def read_factors(self, side: Side, quiet: bool = False) -> Factors:
        reader = FactorReader(
            self.scan,
            list(self.source.tensors.values()),
            list(self.source.tensors),
            self.config if self.plain else {"r": 1, "lora_alpha": 1},
            side,
            self.source.where,
            self.packing,
        )
        factors = reader.read()
        if reader.packing is not None and not quiet:
            self.packing = reader.packing
            version = self.config.get("peft_version")
            told = f"peft_version {version}" if version else "the shapes"
            self.evidence.append(f"experts are packed as by {reader.packing} ({told})")
        return factors

    def plan(self, adapted: Factors | TunedModules, target: str) -> Plan:
        plan = build_plan(
            adapted.headers,
            self.known.books,
            target_layout=target,
            scopes=dict(self.known.scopes),
            partial=True,
            guess=guess_count(self.config),
            where=self.source.where,
            unmatched_fix=self.known.unmatched_fix,
        )
        check_complete(plan, self.config, self.source.where)
        return plan

    def plan_family(self, tuned: TunedModules, target: str) -> Plan:
        """The plan; where a size is not known that it needs, an error that asks for it."""
        try:
            return self.plan(tuned, target)
        except BadInputError:
            if not tuned.unknown:
                raise
            raise BadInputError(
                Finding(
                    "unknown-size",
                    "the size of this weight is told neither by the adapter's tensors nor by the base's config",
                    where=self.source.where,
                    key=tuned.headers.name(min(tuned.unknown)),
                    fix="give the base's folder with its weights as --model",
                )
            ) from None

    def use_base(
        self, made: list[Images], others: list[Moved]
    ) -> tuple[list[Images], list[Moved], list[str] | None, Kept]:
        """What only the base's own weights can supply; also ``modules_to_save`` where it changes."""
        base = BaseWeights.of(self.known, self.to.name)
        where = self.source.where
        there = self.there()
        renamed = rename_saved(self.config, others, there)
        self.tokens = rename_tokens(self.config, others)
        everywhere = plain_entries(self.config)
        made, others, kept = keep_uncalled(
            made, others, self.known, self.to.name, base, where, everywhere
        )
        entries = renamed or self.config.get("modules_to_save") or []
        others = fill_saved(others, entries, self.known, self.to.name, base, kept, where)
        if kept.entries:
            renamed = [*entries, *kept.entries]
            self.notes.append(
                f"{_count(len(kept.table.modules), 'LoRA')} added to the base weights, which are saved in their "
                f"place ({', '.join(kept.entries)}): the model reads these weights and does not call the modules"
            )
        return made, others, renamed, kept

    @property
    def target_packing(self) -> str:
        """How stacked experts are to be packed: as asked for, as they came, or as is usual."""
        if self.to.packing is None and self.comes_back:
            return self.source.remembered().source.packing or self.to.usual_packing
        return self.to.usual_packing

    def write_config(self, result: Result, saved: list[str] | None) -> dict[str, Any]:
        config = dict(self.config)
        if self.plain and result.written:
            config = ConfigWriter(self.config, result, self.known.model, self.there()).write(
                self.target_packing
            )
        if saved is not None:
            config["modules_to_save"] = saved
        if self.tokens is not None:
            config["trainable_token_indices"] = self.tokens
        before = self.config_before(result)
        if before is not None:
            return before
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

    def config_before(self, result: Result) -> dict[str, Any] | None:
        """The config that this adapter had in the target layout, where it says the truth of the result."""
        remembered = self.source.remembered()
        if not self.comes_back or remembered.source.packing not in (None, self.target_packing):
            return None
        before = remembered.config_before(self.config)
        if before is None or check_config(before, result.written):
            return None
        for w in result.written:
            name = f"{w.module}.{w.parameter or 'weight'}"
            if not targets_module(before.get("target_modules") or [], w.module) and (
                not targets_parameter(before.get("target_parameters"), name)
            ):
                return None
        return before

    def note_changes(self, config: Mapping[str, Any], made: Sequence[Images]) -> None:
        source = self.config
        loras = [lora for image in made for lora in image.loras if lora is not None]
        if source.get("lora_dropout") and not config.get("lora_dropout"):
            self.notes.append(
                f"lora_dropout {source['lora_dropout']} became 0: PEFT takes no dropout on target_parameters "
                "(outputs are the same; further training differs)"
            )
        folded = sum(not lora.exact for lora in loras)
        if folded:
            self.notes.append(
                f"parts of unequal scale share one now in {_count(folded, 'target')}: the ratio was folded into B"
            )
        wider = sum(lora.b.dtype != lora.a.dtype for lora in loras)
        if wider:
            self.notes.append(
                f"B became float32 in {_count(wider, 'target')}, because the ratio is no power of two"
            )
        if source.get("peft_version") != config.get("peft_version"):
            self.notes.append(
                f"peft_version says {config.get('peft_version')} now, because it tells readers how "
                "experts are packed"
            )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _family_targets(carried: Carried, plan: Plan | None) -> list[Target]:
    rules = _rules(plan)
    return [
        Target(
            key,
            int(part.settings.get("r") or 0),
            part.settings.get("alpha", part.settings.get("lora_alpha", 0)) or 0,
            1.0,
            rules.get(key, "carried over"),
            True,
        )
        for key, part in carried.parts.items()
    ]


def _rules(plan: Plan | None) -> dict[str, str]:
    rules: dict[str, str] = {}
    for entry in plan.entries if plan is not None else ():
        for term in entry.written:
            rules.update(dict.fromkeys(entry.keys(term).names(), str(entry.rule)))
    for item in plan.carried if plan is not None else ():
        rules.update(dict.fromkeys(item.group.names(), item.carry.why))
    return rules


def _targets(
    written: Iterable[Written],
    made: Iterable[Images],
    plan: Plan | None,
    rung: str = "family",
    errors: Mapping[str, float] | None = None,
) -> list[Target]:
    exact = {
        image.keys.name(row): lora.exact
        for image in made
        for row, lora in enumerate(image.loras)
        if lora is not None
    }
    rules = _rules(plan)
    return [
        Target(
            w.key,
            w.scale.rank,
            w.scale.alpha,
            w.scale.value,
            rules.get(w.key, "carried over"),
            exact.get(w.key, True) and rung == "family",
            w.parameter is not None,
            rung,
            (errors or {}).get(w.key, 0.0),
        )
        for w in written
    ]


def _trace_of(tensors: Mapping[str, Array]) -> Trace:
    shapes = [tensor.shape for tensor in tensors.values()]
    dtypes = [tensor.dtype.name for tensor in tensors.values()]
    return Trace(Headers(group_names(list(tensors)), shapes, dtypes))


def _unmoved(factors: Factors) -> Iterator[Images]:
    for keys, kind in factors.kinds:
        ids = keys.ids.tolist()
        yield Images(keys, kind, [Lora(factors.a[i], factors.b[i], factors.scales[i]) for i in ids])


def _images(plan: Plan, factors: Factors, record: Record) -> Iterator[Images]:
    kinds = {keys.template: kind for keys, kind in factors.kinds}
    for entry in plan.entries:
        yield from images(entry, factors, record)
    for carried in plan.carried:
        keys = carried.group
        kind = kinds[keys.template]
        loras: list[Lora | None] = [
            Lora(factors.a[i], factors.b[i], factors.scales[i]) for i in keys.ids.tolist()
        ]
        if kind == "any" or (kind == "parameter" and carried.carry.kind == "linear"):
            kind = "linear"
        yield Images(keys, kind, loras)
