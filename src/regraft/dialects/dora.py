"""DoRA in files that are not PEFT's: factors and a magnitude for each module.

``W' = m / |V| * V`` with ``V = W + scale B A`` and the lengths of V's rows, as in PEFT, so factors and magnitudes are
moved as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import field

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.families.base import Family, Part
from regraft.adapters.families.lora.dora import Dora, TokenDora
from regraft.adapters.form import Adapter, Array, Blob, Lora, Saved
from regraft.adapters.ladder import Carried
from regraft.adapters.protocol import Reading
from regraft.adapters.tuned import TunedModules
from regraft.dialects.base import (
    Capabilities,
    Delta,
    PlainFile,
    PlainWriter,
    adjust,
    written_of,
)
from regraft.dialects.everywhere import as_images
from regraft.errors import Finding, RefusedError
from regraft.planning.plan import Headers, Plan
from regraft.planning.side import Side
from regraft.values import replace


class DoraFile(PlainFile):
    """An opened adapter whose modules are plain LoRAs, or, where there are magnitudes, DoRAs."""

    magnitudes: dict[str, Array] = field(default_factory=dict)
    """By the key of the base tensor, one number for each row."""

    @property
    def family(self) -> type[Family] | None:
        """DoRA where there are magnitudes."""
        if not self.magnitudes:
            return None
        return TokenDora if "embedding" in self.kinds.values() else Dora

    def read(
        self,
        side: Side,
        packing: str | None = None,
        base: BaseWeights | None = None,
    ) -> Reading:
        """The modules by base tensor."""
        reading = super().read(side, packing, base)
        if not self.magnitudes:
            return reading
        factors = reading.adapter.factors
        assert factors is not None
        headers: Headers = factors.headers
        kinds = []
        for group, kind in factors.kinds:
            kinds.append((group, "linear" if kind == "any" else kind))
        by_id = {i: kind for group, kind in kinds for i in group.ids.tolist()}
        parts = []
        for number, (key, lora) in enumerate(self.loras.items()):
            settings = {"r": lora.scale.rank, "lora_alpha": lora.scale.alpha}
            lengths = "t" if by_id[number] == "embedding" else "m"
            tensors = {"A": lora.a, "B": lora.b, lengths: self.magnitudes[key].reshape(-1)}
            parts.append(Part(tensors, lora.b.shape[0], lora.a.shape[1], settings, by_id[number]))
        forms: list[object] = [
            (
                tuple((role, x.shape, x.dtype.name) for role, x in part.tensors.items()),
                tuple(part.settings.values()),
            )
            for part in parts
        ]
        modules = TunedModules(headers, parts, kinds, forms)
        family = TokenDora if "embedding" in by_id.values() else Dora
        own = Adapter(modules=modules, family=family(self.config, {}))
        return replace(reading, adapter=own)

    def as_lora(self) -> DoraFile:
        """The same without magnitudes."""
        config = {name: value for name, value in self.config.items() if name != "use_dora"}
        return replace(self, magnitudes={}, config=config)


DORA_CONFIG = {"peft_type": "LORA", "use_dora": True, "rank_pattern": {}, "alpha_pattern": {}}
"""What PEFT's config says of a DoRA."""


class DoraWriter(PlainWriter):
    """Writes plain LoRAs and DoRAs; a subclass says what a file has (`file`) and what its tool adapts besides."""

    def holds(self, family: Family) -> bool:
        """DoRA, and where its tool adapts embeddings, with its tokens' magnitudes."""
        if isinstance(family, TokenDora):
            return self.capabilities.embeddings
        return bool(getattr(family, "switches", ()) == ("use_dora",))

    def file(self, deltas: Sequence[Delta], magnitudes: Mapping[str, Array]) -> Blob:
        """The file; ``magnitudes`` are by the key of the base tensor, and there are none in a plain LoRA."""
        raise NotImplementedError

    def completed(
        self, deltas: list[Delta], magnitudes: dict[str, Array]
    ) -> tuple[list[Delta], dict[str, Array]]:
        """What is written of a DoRA, with what the tool adapts besides."""
        return deltas, magnitudes

    def blob(self, deltas: Sequence[Delta], saved: Sequence[Saved]) -> Blob:
        """A plain LoRA."""
        return self.file(deltas, {})

    def write_family(
        self,
        carried: Carried,
        plan: Plan | None,
        modules: TunedModules,
        family: Family,
        saved: Sequence[Saved],
        entries: Sequence[str],
    ) -> tuple[Blob, bool]:
        """A DoRA. Whether its config was checked: there is nothing in it that could be read differently."""
        can, where = self.capabilities, self.opened.where
        deltas, magnitudes = arranged(carried, family, can, self.title, where)
        self.check(deltas, saved)
        self.narrow_doubles(deltas)
        deltas, magnitudes = self.completed(deltas, magnitudes)
        blob = self.file(deltas, magnitudes)
        return Blob(blob.config, blob.tensors, blob.metadata, written=written_of(deltas)), True


def arranged(
    carried: Carried, family: Family, can: Capabilities, title: str, where: str
) -> tuple[list[Delta], dict[str, Array]]:
    """The modules of a DoRA as a writer gets them: factors of one rank and scale, and the magnitudes.

    Raises ``RefusedError`` for what is not DoRA, and for PEFT's embeddings, whose magnitudes are the columns'.
    """
    if not isinstance(family, Dora):
        raise RefusedError(
            Finding(
                "no-image",
                f"{title} has LoRA and DoRA only, and this is {family.title}",
                where=where,
                fix="ask for deltas of full rank (--via dense), or for an approximation (--via svd:RANK)",
            )
        )
    parts = carried.parts.items()
    findings = [
        embedding_finding(key, where)
        for key, part in parts
        if part.kind == "embedding" and "t" not in part.tensors
    ]
    if findings:
        raise RefusedError(findings)
    loras = {name: Lora(part["A"], part["B"], family.scale(part)) for name, part in parts}
    adjust(as_images(loras), can)
    deltas = [Delta(name, "linear", lora) for name, lora in loras.items()]
    lengths = {name: part["t" if "t" in part.tensors else "m"] for name, part in parts}
    return deltas, {name: each.reshape(-1) for name, each in lengths.items()}


def embedding_finding(key: str, where: str) -> Finding:
    """That DoRA of an embedding is another thing in each tool."""
    return Finding(
        "no-image",
        "DoRA of an embedding: MLX measures the row of each token, and PEFT the columns",
        where=where,
        key=key,
        fix="merge the adapter into its base and convert the base",
    )
