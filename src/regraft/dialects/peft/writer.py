"""Writing an adapter as PEFT has it: tensors under their names, and the config that goes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.detect import Known
from regraft.adapters.families.base import Family
from regraft.adapters.form import Array, Blob, Images, Saved, Written
from regraft.adapters.ladder import Carried, sources_of
from regraft.adapters.provenance import Remembered, read_remembered
from regraft.adapters.tuned import TunedModules
from regraft.dialects.peft.config import tail_of
from regraft.dialects.peft.config_before import (
    is_sound,
    saves_the_same,
    says_the_same,
    targets_all,
)
from regraft.dialects.peft.family_config import write_family_config, write_parts
from regraft.dialects.peft.saved import owner_of, rename_saved, rename_tokens, write_saved
from regraft.dialects.peft.variants import reclaimed_names
from regraft.dialects.peft.writing import (
    ConfigWriter,
    Result,
    check_config,
    plain_entries,
    write_factors,
)
from regraft.errors import Finding, RegraftError
from regraft.layouts.names import Layout
from regraft.planning.plan import Plan
from regraft.planning.side import Side

if TYPE_CHECKING:
    from regraft.dialects.peft.source import PeftNames, Source


class PeftWriter(Struct, frozen=True, dict=True):
    """Writes one adapter for one base in one layout; what need not change of its config stays."""

    source: Source
    known: Known
    to: Layout
    fresh: bool = False
    """Whether the adapter comes from another dialect, so that its config is made from nothing."""

    @cached_property
    def side(self) -> Side:
        """What the books say of the layout."""
        return Side(self.known.books, self.to.name, self.known.scopes)

    @property
    def packing(self) -> str:
        """How stacked experts are to be packed."""
        return self.to.usual_packing

    @cached_property
    def _remembered(self) -> Remembered:
        return read_remembered(self.source.metadata)

    @property
    def _comes_back(self) -> bool:
        return self._remembered.source.layout == self.to.name

    def holds(self, family: Family) -> bool:
        """What PEFT has."""
        return family.in_peft

    @property
    def claimed(self) -> tuple[str, ...]:
        """Last segments of modules that PEFT would move to the experts."""
        return reclaimed_names(self.source.config, self.known, self.to.name)

    @property
    def spelling(self) -> PeftNames:
        """How tensors are named."""
        return self.source.spelling

    def entries(self, saved: Sequence[Saved]) -> Sequence[str]:
        """``modules_to_save`` with the names that modules have now."""
        if self.fresh:
            return list(dict.fromkeys(i.new.rpartition(".")[0] for i in saved if not i.rows))
        renamed = rename_saved(self.source.config, saved, self.side)
        return self._own_entries if renamed is None else renamed

    @property
    def _own_entries(self) -> list[str]:
        return self.source.config.get("modules_to_save") or []

    def owner(self, key: str, entry: str) -> str | None:
        """The module that an entry of ``modules_to_save`` saves and a tensor belongs to."""
        return owner_of(key, entry)

    def entry_for(self, module: str) -> str:
        """An entry of ``modules_to_save`` for one module more, as short as ``target_modules`` has proved safe."""
        tail = tail_of(module)
        return tail if tail.endswith(tuple(plain_entries(self.source.config))) else module

    def write_lora(
        self,
        made: Sequence[Images],
        saved: Sequence[Saved],
        entries: Sequence[str],
        returned: Mapping[str, Array],
        written: Sequence[Written],
    ) -> Blob:
        """A plain LoRA; ``returned`` are factors that come back under the names they had."""
        result = write_factors(made, self.side, self.packing, self.claimed)
        result.tensors.update(returned)
        for item in written:
            result.written.append(item)
            result.wrappers[item.module] = 1
        config = self._lora_config(result, saved, entries)
        before = self._lora_config_before(result, config, saved)
        config = config if before is None else before
        result.tensors.update(write_saved(saved, result.wrappers))
        written, notes = tuple(result.written), self._notes(config)
        wrong = check_config(config, written) if before is None else ()
        if wrong:
            raise RegraftError(
                Finding(
                    "internal",
                    "the config that was made does not give this target its scale; please report this",
                    key=wrong[0],
                )
            )
        return Blob(config, result.tensors, written=written, notes=tuple(notes))

    def _lora_config(
        self, result: Result, saved: Sequence[Saved], entries: Sequence[str]
    ) -> dict[str, Any]:
        source = self.source
        config = dict(source.config)
        if source.plain and result.written:
            writer = ConfigWriter(config, result, self.known.model, self.side)
            config = writer.write(self.packing)
        self._write_entries(config, saved, entries, [each.module for each in result.written])
        return config

    def _write_entries(
        self,
        config: dict[str, Any],
        saved: Sequence[Saved],
        entries: Sequence[str],
        tuned: Sequence[str],
    ) -> None:
        """``modules_to_save`` and ``trainable_token_indices``, where they change; ``tuned`` modules are adapted."""
        kept = self._that_save(entries, saved, tuned)
        if kept != self._own_entries:
            config["modules_to_save"] = kept
        tokens = rename_tokens(self.source.config, saved)
        if tokens is not None:
            config["trainable_token_indices"] = tokens

    def _that_save(
        self, entries: Sequence[str], saved: Sequence[Saved], tuned: Sequence[str]
    ) -> list[str]:
        """Entries of ``modules_to_save`` without those that saved nothing and would name a module here."""
        names = [item.new for item in saved if not item.rows]
        idle = [e for e in entries if all(owner_of(name, e) is None for name in names)]
        if not idle:
            return list(entries)
        there = [f"{module}.weight" for module in tuned]
        there += BaseWeights.of(self.known, self.to.name).names()
        named = {e for e in idle if any(owner_of(name, e) is not None for name in there)}
        return [entry for entry in entries if entry not in named]

    def _lora_config_before(
        self, result: Result, config: Mapping[str, Any], saved: Sequence[Saved]
    ) -> dict[str, Any] | None:
        """The config that this adapter had in the target layout, where it says the truth of the result."""
        remembered = self._remembered
        if not self._comes_back or remembered.source.packing not in (None, self.packing):
            return None
        before = remembered.config_before(self.source.config)
        if before is None:
            return None
        same = says_the_same(before, config, result.written, saved, self.packing)
        return before if same else None

    def write_family(
        self,
        carried: Carried,
        plan: Plan | None,
        modules: TunedModules,
        family: Family,
        saved: Sequence[Saved],
        entries: Sequence[str],
    ) -> tuple[Blob, bool]:
        """A family's modules; whether the config is the one that it had before."""
        result = write_parts(carried.parts, family)
        config = dict(self.source.config)
        if (plan is not None or self.fresh) and carried.parts:
            sources = sources_of(plan) if plan is not None else {}
            renamed = {
                modules.headers.name(i).removesuffix(".weight"): new.removesuffix(".weight")
                for new, i in sources.items()
            }
            config = write_family_config(
                config,
                family,
                carried.parts,
                carried.changes,
                self.known.model,
                renamed,
                self.side,
            )
        tuned = [key.removesuffix(".weight") for key in carried.parts]
        self._write_entries(config, saved, entries, tuned)
        before = self._family_config_before(carried, family, config, saved)
        result.tensors.update(write_saved(saved, result.wrappers))
        blob = Blob(config if before is None else before, result.tensors)
        return blob, before is not None

    def _family_config_before(
        self,
        carried: Carried,
        family: Family,
        config: Mapping[str, Any],
        saved: Sequence[Saved],
    ) -> dict[str, Any] | None:
        remembered = self._remembered
        before = remembered.config_before(self.source.config) if self._comes_back else None
        own = {name for pair in family.fields.items() for name in pair if name is not None}
        if before is None or carried.moved or not is_sound(before, config, own):
            return None
        was = type(family)(before, {})
        parts = {key.removesuffix(".weight"): part for key, part in carried.parts.items()}
        if not all(was.settings(path) == part.settings for path, part in parts.items()):
            return None
        targeted = targets_all(before, ((path, "") for path in parts))
        return before if targeted and saves_the_same(before, config, saved) else None

    def _notes(self, after: Mapping[str, Any]) -> list[str]:
        """What the user should know of changes to the config."""
        if self.fresh:
            return []
        before, notes = self.source.config, []
        if before.get("lora_dropout") and not after.get("lora_dropout"):
            notes.append(
                f"lora_dropout {before['lora_dropout']} became 0: PEFT takes no dropout on target_parameters "
                "(outputs are the same; further training differs)"
            )
        if before.get("peft_version") != after.get("peft_version"):
            notes.append(
                f"peft_version says {after.get('peft_version')} now, because it tells readers how "
                "experts are packed"
            )
        return notes
