"""Opening an adapter: its config, its tensors, and the files beside them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from msgspec import Struct

from regraft.adapters.base_weights import BaseWeights
from regraft.adapters.detect import Known
from regraft.adapters.families.base import Family
from regraft.adapters.families.table import family_of
from regraft.adapters.form import Adapter, Array, Saved, SavedGroup
from regraft.adapters.protocol import Hints, Names, Reading, Writer
from regraft.dialects.alike import one_of_each
from regraft.dialects.base import Found
from regraft.dialects.peft.config import patterns_of, promise_of, targets_module
from regraft.dialects.peft.config_check import check_fields
from regraft.dialects.peft.family_config import lora_config
from regraft.dialects.peft.merged import unmerged
from regraft.dialects.peft.modules import ModuleReader
from regraft.dialects.peft.packing import BEFORE, SINCE, packing_of_version
from regraft.dialects.peft.reading import FactorReader
from regraft.dialects.peft.saved import Style, names_of, saved_groups
from regraft.dialects.peft.scan import PREFIX, Scan, scan_names
from regraft.dialects.peft.shared import settle_shared
from regraft.dialects.peft.stripped import Stripped, strip_tensors
from regraft.dialects.peft.variants import claimed_names, refuse_nested
from regraft.dialects.unread import find_dialect
from regraft.errors import (
    AmbiguousError,
    BadInputError,
    Choice,
    Finding,
    RefusedError,
    RegraftError,
)
from regraft.layouts.names import Layout, layout_of_packing
from regraft.planning.model import ModelConfig
from regraft.planning.side import Side
from regraft.rules.book import Shared
from regraft.storage.beside import check_files
from regraft.storage.expressions import start_file
from regraft.storage.formats import find_form
from regraft.storage.hub import how_to_find
from regraft.storage.json_files import load_json
from regraft.storage.safetensors import TensorFile, open_tensors, read_header
from regraft.storage.slow_expressions import find_slow
from regraft.values import replace

if TYPE_CHECKING:
    from regraft.adapters.deltas import Deltas

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WEIGHTS_BIN = "adapter_model.bin"
ASIDE = "regraft_kept.safetensors"
"""A file beside the weights: factors that their layout cannot hold, for the way back."""
NO_CONFIG = f"there is no {CONFIG} beside it, which says rank and alpha"
"""What is wrong with weights alone."""


class PeftNames:
    """How PEFT names tensors in its files."""

    def spell(self, key: str) -> str:
        """A tensor of the base, or a module."""
        return PREFIX + key

    def saved_name(self, item: Saved) -> str:
        """A saved tensor, where it stood."""
        module, _, leaf = item.new.rpartition(".")
        wrapped = isinstance(item.style, Style) and item.style.wrapped
        return f"{PREFIX}{module}{'.base_layer' * wrapped}.{leaf}"

    def factor_names(self, module: str) -> tuple[str, str]:
        """A module's A and B."""
        return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


@dataclass(slots=True)
class Source:
    """An adapter as PEFT has it on disk. The tensors are views; nothing has been read yet."""

    name: str
    """The sub-folder it came from, or an empty string."""
    where: str
    config: dict[str, Any]
    tensors: Mapping[str, Array]
    metadata: dict[str, str] = field(default_factory=dict)
    weights: Path | None = None
    aside: dict[str, Array] = field(default_factory=dict)
    """Factors that regraft kept in a file beside the weights."""
    stripped: Stripped | None = None
    """What was taken out of its keys."""
    unmerged: str | None = None
    """What was done to fused layers whose parts are adapted each by itself."""
    doubled: bool = False
    """Whether the base has a ``model`` in its ``model``."""
    left_out: frozenset[str] = frozenset()
    """Names of tensors that it had, and that only stood for something else."""
    family: type[Family] | None = field(init=False, repr=False, compare=False)
    """The family; ``None`` for plain LoRA, and for what is bound to no module."""
    _scanned: Scan | None = field(default=None, init=False, repr=False, compare=False)
    _named: Names | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.family = family_of(self.config)

    @property
    def peft_type(self) -> str:
        """``LORA``, ``IA3``, ..."""
        return str(self.config["peft_type"])

    @property
    def opened_by(self) -> str:
        """The dialect that it was opened by."""
        return "peft"

    @property
    def evidence(self) -> tuple[str, ...]:
        """What told its dialect how to read it."""
        return ()

    @property
    def kind(self) -> str:
        """The tuner's name."""
        return self.peft_type

    @property
    def sidecar(self) -> dict[str, Array]:
        """Factors that regraft kept in a file beside the weights."""
        return self.aside

    @property
    def spelling(self) -> PeftNames:
        """How its tensors are named."""
        return PeftNames()

    @property
    def plain(self) -> bool:
        """Whether it is a LoRA and nothing more."""
        return self.peft_type == "LORA" and self.family is None

    def before(self, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Source:
        """The adapter that this one says that it was made of. Raises ``BadInputError``."""
        made = Source(self.name, self.where, dict(config), tensors)
        wrong = check_fields(config, self.where)
        wrong += _check_names(tensors, one_of_each(tensors), self.where)
        wrong = wrong or _find_slow(config, tensors)
        if wrong:
            raise BadInputError(wrong)
        return made

    def scan(self) -> Scan:
        """Its keys, sorted. Raises ``BadInputError`` with everything that is wrong with them."""
        if self._scanned is None:
            family = self.family
            prefix = family.prefix if family is not None else None
            found, findings = scan_names(
                list(self.tensors), self.where, lora=self.plain, prefix=prefix, doubled=self.doubled
            )
            if findings:
                raise BadInputError(findings)
            self._scanned = found
        return self._scanned

    def names(self) -> Names:
        """What its keys say of the base. Raises ``BadInputError``."""
        if self._named is None:
            said = (str(self.stripped) if self.stripped else None, self.unmerged)
            self._named = names_of_scan(self.scan(), tuple(note for note in said if note))
        return self._named

    def hints(self) -> Hints:
        """What its config and metadata say of the base."""
        hints = hints_of(self.config, self.metadata)
        if (Path(self.where) / "config.json").is_file():  # the base's, saved with the adapter
            return replace(hints, beside=self.where)
        return hints

    def stands_alone(self, model: ModelConfig | None) -> bool:
        """Whether it means the same in every layout. Raises ``RefusedError``, ``UnmatchedKeysError``."""
        from regraft.dialects.peft.unbound import check_unbound

        return check_unbound(self, model)

    def check_convertible(self) -> None:
        """Raise ``RefusedError`` for what can be read but not converted."""
        refuse_nested(self.scan(), self.where)

    def choose_layout(self, to: str, other: str, *, transposed: bool) -> tuple[str, str | None]:
        """The layout to take it for where names and shapes are the same in all, and the evidence if there is any.

        It makes no difference to the tensors, unless a saved weight is transposed; but PEFT treats some configs
        differently in transformers 5, so on the way there it is taken for an old one. Back, only a config that names
        modules by an expression could match more there than it did.
        """
        if transposed:
            return self._layout_of_version(to, other)
        expression = isinstance(self.config.get("target_modules"), str)
        stays = to == layout_of_packing(BEFORE) and not expression
        return (to if stays else other), None

    def _layout_of_version(self, to: str, other: str) -> tuple[str, str]:
        version = self.config.get("peft_version")
        packing = packing_of_version(version)
        if packing is None:
            raise AmbiguousError(
                Finding(
                    "which-layout",
                    f"its names and shapes fit both layouts, and {CONFIG} has no peft_version",
                    where=self.where,
                    fix=f"say which it is with --from ({to} or {other})",
                    choices=(
                        Choice(other, "its names and shapes fit", "saved weights are transposed"),
                        Choice(to, "its names and shapes fit", "saved weights stay as they are"),
                    ),
                )
            )
        layout = layout_of_packing(packing) or other
        return layout, f"it was saved by PEFT {version}, which goes with {layout}"

    def is_ready(self, to: Layout, known: Known, packing: str | None) -> bool:
        """Whether PEFT would load it rightly in its layout, with experts packed as they are to be."""
        if self.stripped or self.unmerged:
            return False
        if self.plain and self._is_claimed(to.name, known):
            return False
        if not self.plain or not self.config.get("target_parameters"):
            return True
        have = packing or packing_of_version(self.config.get("peft_version"))
        return have == to.usual_packing

    def _is_claimed(self, layout: str, known: Known) -> bool:
        """Whether it names modules in a way that makes PEFT adapt the experts in their place."""
        names = claimed_names(self.config, known, layout)
        targets = self.config.get("target_modules")
        return any(
            path.rpartition(".")[2] in names and targets_module(targets, path)
            for pairs in self.scan().pairs
            for path in (pairs.modules.names() if names and not pairs.depth else ())
        )

    def read(
        self,
        side: Side,
        packing: str | None = None,
        base: BaseWeights | None = None,
    ) -> Reading:
        """All of it in the internal form. Raises ``BadInputError``, ``AmbiguousError``."""
        notes: list[str] = []
        if base is not None:
            from regraft.dialects.peft.fitting import check_fit

            notes = check_fit(self.scan(), self, base)
        saved, unbound, promise = self.saved(), self._unbound(), promise_of(self.config)
        reading = self._deltas(side, packing, base)
        return replace(reading, saved=saved, unbound=unbound, promise=promise, notes=tuple(notes))

    def _deltas(self, side: Side, packing: str | None, base: BaseWeights | None) -> Reading:
        """What it adds to tensors of the base."""
        family = self.family
        if family is not None:
            shared = {name: x for name, x in self.tensors.items() if family.shares(name)}
            own = family(self.config, shared)
            reads = self.scan(), list(self.tensors.values()), own, side, self.where
            modules = ModuleReader(*reads).read()
            if modules.unknown and base is not None and base.weights is not None:
                modules = ModuleReader(*reads, base.shapes()).read()
            return Reading(Adapter(modules=modules, family=own))
        reader = FactorReader(
            self.scan(),
            list(self.tensors.values()),
            list(self.tensors),
            self.config if self.plain else {"r": 1, "lora_alpha": 1},
            side,
            self.where,
            packing,
        )
        factors = reader.read()
        if reader.packing is None:
            return Reading(Adapter(factors))
        version = self.config.get("peft_version")
        shown = f"peft_version {version}" if version else "the shapes"
        evidence = f"experts are packed as by {reader.packing} ({shown})"
        return Reading(Adapter(factors), reader.packing, (evidence,))

    def saved(self) -> tuple[SavedGroup, ...]:
        """Tensors that stand for tensors of the base. Raises ``BadInputError``."""
        outside = [o for o in self.scan().others if not o.prefix]
        if outside and self.peft_type == "LORA":
            raise BadInputError(
                Finding(
                    "prefix",
                    f"keys of a PEFT adapter begin with {PREFIX!r}",
                    where=self.where,
                    key=o.keys.name(0),
                    fix=f"put {PREFIX!r} before every key, or save the adapter with save_pretrained",
                )
                for o in outside
            )
        return saved_groups(self.scan().others)

    def _unbound(self) -> dict[str, Array]:
        """Tensors that belong to no module of the base, by their names."""
        tensors = list(self.tensors.values())
        return {
            name: tensors[i]
            for o in self.scan().others
            if not o.prefix
            for name, i in zip(o.keys.names(), o.keys.ids.tolist(), strict=True)
        }

    def shown(self, item: Saved) -> tuple[str, str]:
        """The names of a saved tensor before and after, for reports."""
        return names_of(item)

    def warnings(self, to: str) -> list[str]:
        """What the user should know of this kind of adapter in a layout."""
        if self.peft_type == "BONE" and to == layout_of_packing(SINCE):
            return [
                "PEFT has no Bone since 0.19, so no PEFT that goes with transformers 5 loads this adapter"
            ]
        return []

    def roles(self) -> Mapping[str, tuple[str, str]]:
        """Tensors by what is written behind a module's path."""
        found = {name: (name.removeprefix(PREFIX), "") for name in self.tensors}
        names = list(self.tensors)
        for pairs in self.scan().pairs:
            for path, a, b in zip(
                pairs.modules.names(), pairs.a.tolist(), pairs.b.tolist(), strict=True
            ):
                found[names[a]] = f"{path}.{pairs.parameter}", "A"
                found[names[b]] = f"{path}.{pairs.parameter}", "B"
        return found

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """The same with other paths of its modules; the config says the same of them as before."""
        from regraft.dialects.peft.renaming import RenamedTensors, renamed_config

        config = renamed_config(self, rename)
        names = {
            PREFIX + rename(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else name: name
            for name in self.tensors
        }
        return dataclasses.replace(
            self, config=config, tensors=RenamedTensors(self.tensors, names), weights=None
        )

    def readings(self) -> Iterator[tuple[Self, str]]:
        """What it may be where its keys begin otherwise than PEFT's; which, the base can tell."""
        from regraft.dialects.peft.lead import readings

        return readings(self)

    def without(self, names: Iterable[str]) -> Self:
        """The same without tensors that only stand for something else."""
        gone = frozenset(names)
        rest = {name: x for name, x in self.tensors.items() if name not in gone}
        return dataclasses.replace(self, tensors=rest, left_out=self.left_out | gone)

    def settle_shared(self, shared: Sequence[Shared]) -> tuple[Self, list[str]]:
        """The same with each module in the places that the result has for it.

        Raises ``BadInputError`` where the two places of one module have other tensors.
        """
        tensors, notes = settle_shared(self.tensors, shared, self.where)
        return (dataclasses.replace(self, tensors=tensors), notes) if notes else (self, [])

    def as_lora(self) -> Self:
        """The same with the config of a plain LoRA on the same modules."""
        return dataclasses.replace(self, config=lora_config(self.config))

    def deltas(self, known: Known, layout: str, packing: str | None = None) -> Deltas:
        """What it adds to base tensors, by PEFT's formulas."""
        from regraft.dialects.peft.deltas import PeftDeltas

        return PeftDeltas(self, known, layout, packing)

    def writer(self, known: Known, to: Layout) -> Writer:
        """What writes the result; what need not change of the config stays."""
        from regraft.dialects.peft.writer import PeftWriter

        return PeftWriter(self, known, to)


def names_of_scan(scan: Scan, notes: tuple[str, ...] = ()) -> Names:
    """What sorted keys say of the base; ``notes`` say what was done to them."""
    return Names(
        tuple(scan.modules()),
        (*(o.keys for o in scan.others), *scan.parameters()),
        bool(scan.pairs or scan.tuned) or any(o.prefix for o in scan.others),
        notes,
    )


def hints_of(config: Mapping[str, Any], metadata: Mapping[str, str]) -> Hints:
    """What ``adapter_config.json`` and the metadata say of the base."""
    mapping = config.get("auto_mapping")
    mapping = mapping if isinstance(mapping, Mapping) else {}
    library, named = mapping.get("parent_library"), mapping.get("base_model_class")
    from_library = isinstance(library, str) and library.startswith("transformers.models.")
    version = config.get("peft_version")
    packing = packing_of_version(version) if config.get("target_parameters") else None
    likely = None
    layout = layout_of_packing(packing) if packing is not None else None
    if layout is not None:
        likely = layout, f"it was saved by PEFT {version}, which goes with {layout}"
    task, base = config.get("task_type"), config.get("base_model_name_or_path")
    return Hints(
        source=CONFIG,
        model_type=str(library).split(".")[2] if from_library else None,
        classes=(named,) if isinstance(named, str) else (),
        task=task if isinstance(task, str) else None,
        base=base if isinstance(base, str) else None,
        replicated=config.get("layer_replication"),
        likely=likely,
        metadata=metadata,
    )


def find_adapters(src: Path) -> Found:
    """What a source path holds: a folder, one weights file, or a folder with adapters in sub-folders.

    Raises ``BadInputError``.
    """
    if src.is_file():
        if src.suffix not in (".safetensors", ".bin"):
            raise BadInputError(
                find_form(src)
                or Finding(
                    "not-an-adapter",
                    "an adapter is a folder, a .safetensors file or an adapter_model.bin",
                    where=str(src),
                    fix="give the folder that PEFT's save_pretrained wrote",
                )
            )
        if not (src.parent / CONFIG).is_file():
            if src.suffix == ".safetensors":
                read_header(src)  # a file that is cut off is no better with a config beside it
            raise BadInputError(
                Finding(
                    "no-config",
                    NO_CONFIG,
                    where=str(src),
                    fix=f"put the {CONFIG} that belongs to it beside it; LoRAs of image and video models have none, "
                    "and are known by how their names begin (lora_unet_, diffusion_model., unet., transformer.)",
                )
            )
        if strange := list(check_files(src.parent, (src, src.parent / CONFIG, src.parent / ASIDE))):
            raise BadInputError(strange)
        beside = tuple(p for p in (src.parent / CONFIG, src.parent / ASIDE) if p.is_file())
        return Found(src.parent, (src.parent,), src, (), beside)
    if not src.is_dir():
        raise BadInputError(
            Finding(
                "not-found",
                "there is no such file or folder",
                where=str(src),
                fix=how_to_find(str(src)),
            )
        )
    folders = sorted({path.parent for path in src.rglob(CONFIG)})
    if not folders:
        has = any((src / name).exists() for name in (WEIGHTS, WEIGHTS_BIN))
        known = None if has else find_form(src)
        raise BadInputError(
            known
            or Finding(
                "no-config",
                f"there is no {CONFIG} here, which says rank and alpha"
                if has
                else f"there is neither an adapter here ({CONFIG}) nor a checkpoint (model.safetensors, or its index)",
                where=str(src),
                fix=f"put the {CONFIG} there that save_pretrained wrote with it"
                if has
                else "give the folder that save_pretrained wrote",
            )
        )
    own = {folder / name for folder in folders for name in (CONFIG, WEIGHTS, WEIGHTS_BIN, ASIDE)}
    entries = [
        path
        for path in sorted(src.rglob("*"))
        if (path.is_symlink() or not path.is_dir()) and not _is_bookkeeping(path.relative_to(src))
    ]
    if strange := list(check_files(src, entries)):
        raise BadInputError(strange)
    others = tuple(path.relative_to(src) for path in entries if path.is_file() and path not in own)
    return Found(src, tuple(folders), None, others)


def _is_bookkeeping(path: Path) -> bool:
    """Whether a file belongs to git or to a download cache (which keeps the weights themselves in ``blobs``)."""
    return any(part in (".git", ".cache", "blobs", "refs", ".no_exist") for part in path.parts[:-1])


_MOST_DIGITS = 15
"""A number in a key with more digits is no layer's or expert's, and would not fit into 64 bits as a table's entry."""
_NUMBER = re.compile(rf"(?:^|\.)[0-9]{{{_MOST_DIGITS + 1},}}(?=\.|$)", re.MULTILINE)


def _check_names(tensors: Mapping[str, Array], few: Sequence[str], where: str) -> list[Finding]:
    """Names that are not text, or that hold a number which nothing can have; ``few`` has one of each kind."""
    odd = []
    if any(_NUMBER.search(name) or not _is_text(name) for name in few):
        odd = [name for name in tensors if _NUMBER.search(name) or not _is_text(name)]
    return [
        Finding(
            "odd-key",
            f"this is no name of a tensor: it holds a number of more than {_MOST_DIGITS} digits"
            if _is_text(name)
            else "this is no name of a tensor: it holds half of a surrogate pair, which is not text",
            where=where,
            key=name.encode("utf-8", "backslashreplace").decode()[:300],
            fix="save the adapter again",
        )
        for name in odd
    ]


def modules_in(tensors: Iterable[str]) -> set[str]:
    """What may be modules' paths in the names of a file: all that is left of a dot."""
    found: set[str] = set()
    for name in tensors:
        path = name.removeprefix(PREFIX)
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def _find_slow(config: Mapping[str, Any], tensors: Iterable[str]) -> list[Finding]:
    """The regular expressions of a config that take too long for the modules of a file."""
    patterns = list(patterns_of(config))
    return find_slow(patterns, modules_in(tensors)) if patterns else []


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_adapter(
    folder: Path,
    root: Path,
    weights: Path | None = None,
    *,
    foreign: bool = False,
    by_tensor: bool = False,
    as_named: bool = False,
) -> Source:
    """Open one adapter; everything that is wrong with its two files is reported together.

    ``foreign`` allows another tool's form, which a caller then has to look for itself. With ``by_tensor`` each tensor
    is read when it is asked for, and not kept. What wrappers and an adapter's name left in keys is taken out of them,
    unless they are wanted ``as_named``.

    Raises ``BadInputError``; ``RefusedError`` where it is sound, but in another tool's form.
    """
    files = _read_files(folder, weights, by_tensor=by_tensor)
    config, tensors = files.config, files.tensors
    few = one_of_each(tensors)
    findings = check_fields(config, str(folder / CONFIG)) if config is not None else []
    findings += files.findings
    findings += _check_names(tensors, few, str(files.weights))
    if not findings:
        findings += _find_slow(config or {}, tensors)
    if findings or config is None:
        raise BadInputError(findings)
    dialect = None if foreign else find_dialect(config, few, tensors, folder)
    if dialect is not None:
        raise RefusedError(dialect)
    stripped = None
    if not (foreign or as_named):
        tensors, stripped = strip_tensors(tensors, few, _prefix_of(config), str(folder))
    config, tensors, told = unmerged(config, tensors, str(folder))
    name = str(folder.relative_to(root))
    name = "" if name == "." else name
    metadata, aside = files.metadata, files.aside
    return Source(
        name, str(folder), config, tensors, metadata, files.weights, aside, stripped, told
    )


def _prefix_of(config: Mapping[str, Any]) -> str:
    """What the names of an adapter's own tensors begin with, below their modules; all kinds of LoRA have one."""
    if config["peft_type"] == "LORA":
        return "lora_"
    family = family_of(config)
    return family.prefix if family is not None else ""


class _Files(Struct):
    """What an adapter's files hold, as far as they can be read."""

    weights: Path | None
    findings: list[Finding]
    """What is wrong with the files themselves."""
    config: dict[str, Any] | None = None
    tensors: Mapping[str, Array] = {}
    metadata: dict[str, str] = {}
    aside: dict[str, Array] = {}


def _read_files(folder: Path, weights: Path | None, *, by_tensor: bool) -> _Files:
    """Read config and weights; tensors are views, or, with ``by_tensor``, are read one by one."""
    file = weights
    if file is None:
        file = next((p for p in (folder / WEIGHTS, folder / WEIGHTS_BIN) if p.is_file()), None)
    read = _Files(file, [])
    start_file(str(folder / CONFIG))
    try:
        read.config = load_json(folder / CONFIG)
    except RegraftError as error:
        read.findings += error.findings
    try:
        if file is None:
            read.findings.append(
                Finding(
                    "no-weights",
                    f"the weights are missing: there is neither {WEIGHTS} nor {WEIGHTS_BIN}",
                    where=str(folder),
                    fix="copy the weights file here, or save the adapter again",
                )
            )
        elif file.suffix == ".bin":
            from regraft.storage.torch_file import open_torch

            read.tensors = open_torch(file)
        elif by_tensor:
            read.tensors = by_name = TensorFile(file)
            read.metadata = dict(by_name.header.metadata)
        else:
            header = read_header(file)
            read.metadata = dict(header.metadata)
            read.tensors = open_tensors(file, header)
        if file is not None and not read.tensors:
            read.findings.append(
                Finding(
                    "empty",
                    "the adapter is empty: its weights file has no tensors",
                    where=str(file),
                    fix="save the adapter again; a sharded (ZeRO, FSDP) state must be gathered first",
                )
            )
        if (folder / ASIDE).is_file():
            read.aside = open_tensors(folder / ASIDE)
    except RegraftError as error:
        read.findings += error.findings
    return read
