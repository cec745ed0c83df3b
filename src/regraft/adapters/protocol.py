"""What a conversion asks of a dialect: an opened adapter to read from, and a writer for the result.

The room ``dialects`` has those that there are. Nothing here knows how any of them spells a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, Self

from msgspec import Struct

from regraft.adapters.provenance import Remembered, read_remembered
from regraft.names.keys import Group

if TYPE_CHECKING:
    from regraft.adapters.base_weights import BaseWeights
    from regraft.adapters.deltas import Deltas
    from regraft.adapters.detect import Known
    from regraft.adapters.families.base import Family
    from regraft.adapters.form import Adapter, Array, Blob, Images, Saved, SavedGroup
    from regraft.adapters.ladder import Carried
    from regraft.adapters.tuned import TunedModules
    from regraft.layouts.names import Layout
    from regraft.planning.model import ModelConfig, Scope
    from regraft.planning.plan import Plan
    from regraft.planning.side import Side
from regraft.planning.lookup import Lookup
from regraft.rules.book import Book, Shared


class Names(Struct, frozen=True, eq=False, dict=True):
    """What an adapter's keys say of its base, without any file's spelling."""

    modules: tuple[Group, ...]
    """Modules that are adapted."""
    tensors: tuple[Group, ...]
    """Tensors that stand for tensors of the base, or belong to no module of it."""
    bound: bool
    """Whether anything in it belongs to a module of the base."""
    notes: tuple[str, ...] = ()
    """What was done to the keys, for the report."""

    @cached_property
    def candidates(self) -> tuple[Group, ...]:
        """Names that tensors of the base may have: first the weights of its modules, in order."""
        weights = (Group(f"{m.template}.weight", m.ids, m.numbers) for m in self.modules)
        return (*weights, *self.tensors)

    def lookup(self, books: Sequence[Book], scopes: Mapping[str, Scope] | None = None) -> Lookup:
        """What books say of them, with the parameters of modules."""
        return Lookup.of(books, self.candidates, scopes, self.modules)


class Hints(Struct, frozen=True):
    """What an adapter's config and metadata say of its base."""

    source: str
    """Where it is said, for messages: the config's name."""
    model_type: str | None = None
    classes: tuple[str, ...] = ()
    """The class that was adapted, where it is named."""
    task: str | None = None
    base: str | None = None
    """A path or an id of the base."""
    beside: str | None = None
    """A folder with the base's config beside the adapter: what the base is where ``base`` is no folder here."""
    replicated: object = None
    """Ranges of layers that the base was built of, one after the other."""
    spelled: tuple[str, ...] = ()
    """Names of base tensors that something else has, which is of the same base."""
    layout: str | None = None
    """The layout that the form of its file tells."""
    likely: tuple[str, str] | None = None
    """A layout that something else makes likely, and what."""
    metadata: Mapping[str, str] = {}
    """That of its file, where regraft may have written what it was made of."""

    @property
    def remembered(self) -> Remembered:
        """What regraft wrote when it made the file; empty where it did not."""
        return read_remembered(self.metadata)


class Promise(Struct, frozen=True):
    """That an adapter has every module of the base whose path ends in one of some names."""

    ends: tuple[str, ...]
    field: str
    """What says so, for messages."""

    @property
    def all_seen(self) -> bool:
        """Whether the last expert that was seen is the last: names without numbers are of every one that there is."""
        return not any(part.isdigit() for end in self.ends for part in end.split("."))


class Reading(Struct, frozen=True, eq=False):
    """All of an adapter in the internal form, and what reading it told."""

    adapter: Adapter
    """What it adds to tensors of the base."""
    packing: str | None = None
    """How stacked experts are packed, as far as it is known."""
    evidence: tuple[str, ...] = ()
    saved: tuple[SavedGroup, ...] = ()
    """Tensors that stand for tensors of the base."""
    unbound: Mapping[str, Array] = {}
    """Tensors that belong to no module of the base, by their names."""
    promise: Promise | None = None
    """``None`` where it does not say that it has every module of a name."""
    notes: tuple[str, ...] = ()
    """What the user should know, and what no more is known of."""

    @property
    def all_seen(self) -> bool:
        """Whether the last expert in it is the last of the base, where no config says how many there are."""
        return self.promise is not None and self.promise.all_seen


class Spelling(Protocol):
    """How a dialect names tensors in its files."""

    def spell(self, key: str) -> str:
        """The name in the file of a tensor of the base."""
        ...

    def saved_name(self, item: Saved) -> str:
        """The name in the file of a saved tensor, where it stood."""
        ...

    def factor_names(self, module: str) -> tuple[str, str]:
        """The names in the file of a module's A and B."""
        ...


class Opened(Protocol):
    """One adapter, opened by its dialect; nothing has been converted."""

    @property
    def name(self) -> str:
        """The subfolder it came from, or an empty string."""
        ...

    @property
    def where(self) -> str:
        """The file or folder, for messages."""
        ...

    @property
    def kind(self) -> str:
        """The tuner's name, as the config has it."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The config, as it is in the file."""
        ...

    @property
    def tensors(self) -> Mapping[str, Array]:
        """Tensors by their names in the file."""
        ...

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the weights file."""
        ...

    @property
    def sidecar(self) -> dict[str, Array]:
        """Factors that regraft kept in a file beside the weights."""
        ...

    @property
    def spelling(self) -> Spelling:
        """How its tensors are named."""
        ...

    @property
    def family(self) -> type[Family] | None:
        """The family; ``None`` for plain LoRA, and for what is bound to no module."""
        ...

    def before(self, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Opened:
        """Another adapter in the same form, which a file says that it was made of. Raises ``BadInputError``."""
        ...

    def names(self) -> Names:
        """What its keys say. Raises ``BadInputError`` with everything that is wrong with them."""
        ...

    def hints(self) -> Hints:
        """What its config and metadata say of the base."""
        ...

    def stands_alone(self, model: ModelConfig | None) -> bool:
        """Whether it means the same in every layout. Raises ``RefusedError`` where a layout changes its meaning."""
        ...

    def check_convertible(self) -> None:
        """Raise ``RefusedError`` for what can be read but not converted."""
        ...

    def choose_layout(self, to: str, other: str, *, transposed: bool) -> tuple[str, str | None]:
        """The layout to take it for where names and shapes are the same in all, and the evidence if there is any.

        ``transposed`` says that a saved weight is stored differently under the same name.
        """
        ...

    def is_ready(self, to: Layout, known: Known, packing: str | None) -> bool:
        """Whether it is what a conversion to ``to`` would write, when it is in this layout already."""
        ...

    def read(
        self,
        side: Side,
        packing: str | None = None,
        base: BaseWeights | None = None,
    ) -> Reading:
        """All of it; the ``base`` tells sizes that nothing else does, and has to fit where no rule looks.

        Raises ``BadInputError`` with everything that is wrong, ``AmbiguousError`` where a packing cannot be told.
        """
        ...

    def shown(self, item: Saved) -> tuple[str, str]:
        """The names of a saved tensor before and after, for reports."""
        ...

    def warnings(self, to: str) -> list[str]:
        """What the user should know of this kind of adapter in a layout."""
        ...

    def roles(self) -> Mapping[str, tuple[str, str]]:
        """For every tensor of the file the base tensor that it is about, and what it is to it (``lora_A``, say)."""
        ...

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """The same with other paths of the modules of its base."""
        ...

    def readings(self) -> Iterator[tuple[Self, str]]:
        """Other ways to read names that are not as its format has them, and what is said of each; the base decides."""
        ...

    def without(self, names: Iterable[str]) -> Self:
        """The same without tensors that only stand for something else."""
        ...

    def settle_shared(self, shared: Sequence[Shared]) -> tuple[Self, list[str]]:
        """The same with each module in the places that the result has for it, and what is said of it.

        Raises ``BadInputError`` where the two places of one module have other tensors.
        """
        ...

    def as_lora(self) -> Self:
        """The same with the config of a plain LoRA on the same modules."""
        ...

    def writer(self, known: Known, to: Layout) -> Writer:
        """What writes the result in its own dialect; what need not change of the config stays."""
        ...

    def deltas(self, known: Known, layout: str, packing: str | None = None) -> Deltas:
        """What it adds to base tensors, in its own layout. Raises ``BadInputError`` and its kin."""
        ...


class Writing(Protocol):
    """A dialect that results are written in, whatever dialect they were opened by."""

    @property
    def title(self) -> str:
        """One line that says what it is."""
        ...

    def writer(self, opened: Opened, known: Known, to: Layout) -> Writer:
        """What writes an adapter."""
        ...


class Into(Struct, frozen=True, eq=False):
    """The dialect that a result is to be in."""

    dialect: Writing
    own: bool
    """Whether the adapter was opened by it; then what needs no change stays as it is."""

    def layout(self, to: Layout, known: Known) -> Layout:
        """What is converted to: where only the dialect was named, its usual layout for this base."""
        choose = getattr(self.dialect, "layout_for", None) if to.usual else None
        name = choose(known) if choose is not None else None
        return to if name is None else replace(to, name=name)


class Writer(Protocol):
    """Writes adapters of one base in one layout."""

    @property
    def claimed(self) -> tuple[str, ...]:
        """Last segments of modules that the dialect's reader would take for something else."""
        ...

    @property
    def spelling(self) -> Spelling:
        """How tensors are named."""
        ...

    def holds(self, family: Family) -> bool:
        """Whether the dialect can hold a family's modules; otherwise they become LoRAs where that is exact."""
        ...

    def entries(self, saved: Sequence[Saved]) -> Sequence[str]:
        """What the config must say of saved modules."""
        ...

    def owner(self, key: str, entry: str) -> str | None:
        """The module that an entry saves and a tensor belongs to."""
        ...

    def entry_for(self, module: str) -> str:
        """An entry that saves one module more, and no other."""
        ...

    def write_lora(
        self,
        made: Sequence[Images],
        saved: Sequence[Saved],
        entries: Sequence[str],
        returned: Mapping[str, Array],
        written: Sequence[Any],
    ) -> Blob:
        """A plain LoRA, with what is to be said of it; ``returned`` are factors that come back under their names."""
        ...

    def write_family(
        self,
        carried: Carried,
        plan: Plan | None,
        modules: TunedModules,
        family: Family,
        saved: Sequence[Saved],
        entries: Sequence[str],
    ) -> tuple[Blob, bool]:
        """A family's modules; whether the config is one that was checked before."""
        ...
