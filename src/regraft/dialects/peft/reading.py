"""Reading a PEFT LoRA into factors by base tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import numpy as np
from msgspec import Struct

from regraft.adapters.form import Array, Factors, is_float
from regraft.adapters.scale import Scale
from regraft.dialects.peft.config import LoraConfig, targets_module, targets_parameter
from regraft.dialects.peft.nesting import untold_order
from regraft.dialects.peft.packing import PACKINGS, packing_of_version, swaps, unpack
from regraft.dialects.peft.scan import PREFIX, Pairs, Scan
from regraft.dialects.peft.targeting import Targeting, untargeted
from regraft.equation.sizes import known_shape
from regraft.errors import AmbiguousError, BadInputError, Choice, Finding
from regraft.names.keys import MARK, Group, fill
from regraft.planning.plan import Headers
from regraft.planning.side import Side
from regraft.rules.kinds import KINDS
from regraft.rules.terms import RuleTerm
from regraft.values import replace

_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")


_AGAIN = "use the adapter_config.json that was saved with these weights, or save the adapter again"


class _Modules(Struct, frozen=True, eq=False):
    """Modules that are adapted, and what the books say of their weights."""

    pairs: Pairs
    keys: Group
    found: RuleTerm | None
    as_parameter: bool
    """Whether they are adapted as parameters (``X.weight``)."""


class FactorReader:
    """Turns the pairs of a scan into ``Factors``; all problems of the adapter are collected."""

    def __init__(
        self,
        scan: Scan,
        tensors: Sequence[Array],
        names: Sequence[str],
        config: Mapping[str, Any],
        side: Side,
        where: str,
        packing: str | None = None,
    ) -> None:
        self.scan, self.tensors, self.names, self.side = scan, tensors, names, side
        self.config, self.lora, self.where = config, LoraConfig(config), where
        self.targeting = Targeting(config)
        self.findings: list[Finding] = []
        self.ambiguous: list[Finding] = []
        self.forced = packing
        self.packing: str | None = packing
        self.shaped: set[str] = set()
        """Packings that are told by the shapes of some parameter."""
        self.assumed: set[str] = set()
        """Packings that the version told where shapes fit more than one."""
        self.targeted = 0
        self.untold = False
        self.untargeted: list[Finding] = []
        self.groups: list[Group] = []
        """Keys of the base tensors, whose ids count ``a``, ``b``, ``scales``, ``shapes`` and ``dtypes``."""
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[str] = []
        self.a: list[Array] = []
        self.b: list[Array] = []
        self.scales: list[Scale] = []
        self.kinds: list[tuple[Group, str]] = []

    def read(self) -> Factors:
        """The factors.

        Raises ``BadInputError`` with everything that is wrong, ``AmbiguousError`` where the packing of stacked
        experts cannot be told.
        """
        modules, parameters = self._look_up()
        for found in modules:
            self._add_modules(found)
        for same, listed in parameters:
            self._add_parameters(same, listed)
        if not self.targeted and self.untargeted:
            self.findings.append(
                Finding(
                    "targets-nothing",
                    f"target_modules = {self.config.get('target_modules')!r} and target_parameters = "
                    f"{self.config.get('target_parameters')!r} name nothing that is in the weights file "
                    f"({self.untargeted[0].key}, …)",
                    where=self.where,
                    key="adapter_config.json",
                    fix="use the config that was saved with these weights",
                )
            )
        else:
            self.findings.extend(self.untargeted)
        self._check_dtypes()
        if self.findings:
            raise BadInputError(self.findings)
        if len(self.shaped) == 1 and (self.ambiguous or self.assumed - self.shaped):
            return self._read_as(next(iter(self.shaped)))
        if self.ambiguous:
            raise AmbiguousError(self.ambiguous)
        headers = Headers(self.groups, self.shapes, self.dtypes)
        return Factors(headers, self.a, self.b, self.scales, self.kinds)

    def _look_up(self) -> tuple[list[_Modules], list[tuple[list[Pairs], tuple[str, ...] | None]]]:
        """What the books say of everything that is adapted: of modules, and of parameters of one module each.

        With the latter stand the names that a module's parameters have in order, where a book lists them.
        """
        modules: list[_Modules] = []
        wrapped: dict[str, tuple[list[Pairs], tuple[str, ...] | None]] = {}
        named = self.config.get("target_parameters")
        start = 0
        for pairs in self.scan.pairs:
            listed = self.side.parameters(pairs.modules)
            stacked = self._unlisted(pairs.modules) if listed is None and named else listed
            if (stacked or pairs.depth) and not pairs.attention:
                wrapped.setdefault(pairs.modules.template, ([], listed))[0].append(pairs)
                continue
            for part, as_parameter in self._split(pairs) if named else ((pairs, False),):
                ids = np.arange(start, start + len(part.a))
                template = f"{part.modules.template}.{part.parameter}"
                keys = Group(template, ids, part.modules.numbers)
                modules.append(_Modules(part, keys, self.side.find(keys), as_parameter))
                start += len(ids)
        return modules, list(wrapped.values())

    def _read_as(self, packing: str) -> Factors:
        """Read all in one packing: a file is packed by one PEFT, so what some shapes tell holds for the rest."""
        again = FactorReader(
            self.scan, self.tensors, self.names, self.config, self.side, self.where, packing
        )
        self.packing = packing
        return again.read()

    def _report(self, code: str, message: str, key: str, fix: str = _AGAIN) -> None:
        self.findings.append(Finding(code, message, where=self.where, key=key, fix=fix))

    def _split(self, pairs: Pairs) -> Iterator[tuple[Pairs, bool]]:
        """The modules of a group, those that are adapted as parameters (``X.weight``) apart."""
        entries = self.config.get("target_parameters")
        if pairs.attention:
            yield pairs, False
            return
        modules = self.config.get("target_modules") or []
        apart = np.array(
            [
                targets_parameter(entries, path + ".weight") and not targets_module(modules, path)
                for path in pairs.modules.names()
            ]
        )
        for rows, as_parameter in ((~apart, False), (apart, True)):
            if rows.any():
                part = replace(
                    pairs, modules=pairs.modules.take(rows), a=pairs.a[rows], b=pairs.b[rows]
                )
                yield part, as_parameter

    def _add_modules(self, modules: _Modules) -> None:
        pairs, keys, found, as_parameter = (
            modules.pairs,
            modules.keys,
            modules.found,
            modules.as_parameter,
        )
        a = [self.tensors[i] for i in pairs.a.tolist()]
        b = [self.tensors[i] for i in pairs.b.tolist()]
        unruled = "embedding" if pairs.embedding else "parameter" if as_parameter else "any"
        if pairs.attention:
            unruled = "linear"
        kind = found.kind if found is not None else unruled
        if as_parameter and kind == "embedding":
            kind = (
                "parameter"  # PEFT adds B A to the parameter as it is stored, (vocabulary, hidden)
            )
        if kind == "embedding" and not pairs.embedding:
            self._report(
                "shape",
                "the config adapts this embedding as a module, whose factors PEFT calls lora_embedding_A and "
                "lora_embedding_B, and the file has lora_A and lora_B, as for a parameter: PEFT would pass over them",
                self.names[int(pairs.a[0])],
                "use the config that was saved with these weights",
            )
        scales = self._scales(pairs)
        if pairs.attention == "out":
            scales = [scale.times(2) for scale in scales]
        flat = any(x.ndim > 2 for x in a) and self.side.carried_kind(keys)
        stored = self._check_pairs(pairs, a, b, scales, flat or kind)
        self._check_targets(pairs)
        self.a += a
        self.b += b
        self.scales += scales
        self.groups.append(keys)
        self.shapes += stored
        self.dtypes += map(dtype_name, map(_DTYPE, a))
        self.kinds.append((keys, kind))

    def _scales(self, pairs: Pairs) -> list[Scale]:
        if self.lora.is_uniform:
            return [self.lora.scale("")] * len(pairs.a)
        entries = self.config.get("target_parameters")
        paths = pairs.owners()
        cache: dict[tuple[int, Any], Scale] = {}
        result = []
        for path in paths:
            name = path + ".weight" if targets_parameter(entries, path + ".weight") else path
            scale = self.lora.scale(name)
            result.append(cache.setdefault((scale.rank, scale.alpha), scale))
        return result

    def _check_pairs(
        self, pairs: Pairs, a: list[Array], b: list[Array], scales: list[Scale], kind: str
    ) -> list[tuple[int, ...]]:
        """The shape of each base tensor, out and in as its kind stores them."""
        first = scales[0].rank
        sizes = set(map(_SHAPE, a)), set(map(_SHAPE, b))
        if scales.count(scales[0]) == len(scales) and all(len(found) == 1 for found in sizes):
            shape = _base_shape(a[0].shape, b[0].shape, first, kind)
            if isinstance(shape, tuple):
                return [shape] * len(a)
        each = [(x.shape, y.shape, s.rank) for x, y, s in zip(a, b, scales, strict=True)]
        known = {key: _base_shape(*key, kind) for key in set(each)}
        for key, problem in known.items():
            if isinstance(problem, str):
                rows = [row for row, other in enumerate(each) if other == key]
                more = f" ({len(rows)} modules like this one)" if len(rows) > 1 else ""
                self._report("shape", problem + more, self.names[int(pairs.a[rows[0]])])
        return [shape if isinstance(shape := known[key], tuple) else (0, 0) for key in each]

    def _check_dtypes(self) -> None:
        """Factors are numbers to multiply: of each other dtype, the first one is named."""
        factors = [
            i for pairs in self.scan.pairs for ids in (pairs.a, pairs.b) for i in ids.tolist()
        ]
        for dtype in dict.fromkeys(self.tensors[i].dtype for i in factors):
            if not is_float(dtype):
                odd = next(i for i in factors if self.tensors[i].dtype == dtype)
                self._report(
                    "dtype",
                    f"a LoRA factor is a floating-point tensor, this one is {dtype}",
                    self.names[odd],
                    "save the adapter unquantised",
                )

    def _check_targets(self, pairs: Pairs) -> None:
        if self.targeting.leaves_out:
            named = self.config.get("target_parameters")
            paths = [p for p in pairs.owners() if not targets_parameter(named, p + ".weight")]
            key = PREFIX + "{}." + ("lora_embedding_A" if pairs.embedding else "lora_A.weight")
            found = untargeted(paths, self.targeting, self.where, key)
            if found is not None:
                self.targeted += len(pairs.a)
                self.findings.append(found)
                return
        modules = self.config.get("target_modules")
        parameters = self.config.get("target_parameters")
        if modules is None and not parameters:
            self.targeted += len(pairs.a)
            if self.config.get("peft_type") == "LORA" and not self.untold:
                self.untold = True
                self.findings.append(
                    Finding(
                        "config",
                        "there is no target_modules: PEFT would adapt what it does by default for this type of model, "
                        "and ignore the factors of everything else",
                        where=self.where,
                        key="target_modules",
                        fix=_AGAIN,
                    )
                )
            return
        named = () if modules is None or isinstance(modules, str) else modules
        if named and not pairs.attention and _last(pairs.modules).issubset(named):
            self.targeted += len(pairs.a)
            return
        missing = None
        for path in pairs.owners():
            if targets_module(modules if modules is not None else [], path) or targets_parameter(
                parameters, path + ".weight"
            ):
                self.targeted += 1
            elif missing is None:
                missing = path
        if missing is not None:
            self.untargeted.append(
                Finding(
                    "not-targeted",
                    "neither target_modules nor target_parameters of adapter_config.json names this "
                    "module, so PEFT would ignore its factors",
                    where=self.where,
                    key=f"{PREFIX}{missing}.lora_A.weight",
                    fix="add it to target_modules, or remove its factors from the weights file",
                )
            )

    def _add_parameters(self, same: list[Pairs], listed: tuple[str, ...] | None) -> None:
        by_module: dict[tuple[int, ...], dict[int, tuple[int, int]]] = {}
        for pairs in same:
            for row, numbers in enumerate(map(tuple, pairs.modules.numbers.tolist())):
                ids = int(pairs.a[row]), int(pairs.b[row])
                by_module.setdefault(numbers, {})[pairs.depth] = ids
        template = same[0].modules.template
        names = self._unlisted(same[0].modules) if listed is None else listed
        names = names or ("weight",)
        if len(names) > 1 and listed is None:
            path = same[0].modules.name(0)
            self.findings.append(untold_order(self.side, path, names, self.where))
            return
        entries = self.config.get("target_parameters")
        found: dict[str, list[tuple[tuple[int, ...], tuple[int, int]]]] = {}
        for numbers, depths in by_module.items():
            module = Group(template, np.zeros(1, dtype=np.int64), np.array([numbers])).name(0)
            wanted = [n for n in names if targets_parameter(entries, f"{module}.{n}")]
            if not wanted and self._linear_fits(module, depths):
                wanted = ["weight"]
            if not wanted:
                self.untargeted.append(
                    Finding(
                        "not-targeted",
                        "target_parameters of adapter_config.json names no parameter of this module",
                        where=self.where,
                        key=self.names[next(iter(depths.values()))[0]],
                        fix=f"add {module}.{names[0]} or another of its parameters",
                    )
                )
                continue
            if sorted(depths) != list(range(len(wanted))):
                self._report(
                    "nesting",
                    f"target_parameters names {len(wanted)} of its parameters ({', '.join(wanted)}), but the "
                    f"file has factors for {len(depths)} ('.base_layer' repeated {sorted(depths)} times)",
                    self.names[next(iter(depths.values()))[0]],
                )
                continue
            self.targeted += 1
            for position, name in enumerate(wanted):
                found.setdefault(name, []).append((numbers, depths[len(wanted) - 1 - position]))
        for name, rows in found.items():
            self._add_parameter(f"{template}.{name}", rows)

    def _unlisted(self, modules: Group) -> tuple[str, ...]:
        """The parameters of modules that no table gives: those that rules and config name.

        Several of them are in no order that means something.
        """
        module = modules.name(0)
        names: dict[str, None] = {}
        for entry in self.config.get("target_parameters") or ():
            head, _, name = entry.rpartition(".")
            if name != "weight" and (module == head or module.endswith(f".{head}")):
                keys = Group(f"{modules.template}.{name}", modules.ids, modules.numbers)
                if self.side.find(keys) is not None:
                    names[name] = None
        return tuple(names)

    def _linear_fits(self, module: str, depths: Mapping[int, object]) -> bool:
        modules = self.config.get("target_modules")
        return len(depths) == 1 and 0 in depths and targets_module(modules or [], module)

    def _add_parameter(
        self,
        template: str,
        rows: list[tuple[tuple[int, ...], tuple[int, int]]],
    ) -> None:
        start = len(self.a)
        numbers = np.array([row[0] for row in rows], dtype=np.int64).reshape(len(rows), -1)
        keys = Group(template, np.arange(start, start + len(rows)), numbers)
        found = self.side.find(keys)
        kind = found.kind if found is not None else "parameter"
        kept = []
        for row, (_, (i, j)) in enumerate(rows):
            a, b = self.tensors[i], self.tensors[j]
            name = keys.name(row)
            scale = self.lora.scale(name)
            if not KINDS[kind].name.startswith("experts"):
                shape = _base_shape(a.shape, b.shape, scale.rank, kind)
                if isinstance(shape, str):
                    self._report("shape", shape, self.names[i])
                    continue
            else:
                sound = a.ndim == b.ndim == 2 and 0 not in (*a.shape, *b.shape)
                if not sound or a.shape[0] != b.shape[1]:
                    self._report(
                        "shape",
                        f"lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit together",
                        self.names[i],
                    )
                    continue
                experts, left = divmod(a.shape[0], scale.rank)
                if left or not experts:
                    self._report(
                        "rank",
                        f"{a.shape[0]} rows of lora_A are no multiple of the rank {scale.rank} that "
                        "adapter_config.json gives",
                        self.names[i],
                        "use the config that was saved with these weights",
                    )
                    continue
                packing = self._choose_packing(a, b, experts, found, self.names[i])
                if packing is None:
                    continue
                a, b = unpack(a, b, experts, swapped=swaps(packing, kind, experts))
                shape = _stored(kind, experts, b.shape[1], a.shape[2])
            kept.append(row)
            self.a.append(a)
            self.b.append(b)
            self.scales.append(scale)
            self.shapes.append(shape)
            self.dtypes.append(dtype_name(a.dtype))
        keys = Group(template, np.arange(start, start + len(kept)), numbers[kept])
        self.groups.append(keys)
        self.kinds.append((keys, kind))

    def _choose_packing(
        self,
        a: Array,
        b: Array,
        experts: int,
        found: RuleTerm | None,
        name: str,
    ) -> str | None:
        """The packing: told by ``peft_version`` and the shapes; where they leave it open, ask."""
        told = packing_of_version(self.config.get("peft_version"))
        kind = found.kind if found is not None else "experts"
        if self.forced is None and swaps(PACKINGS[0], kind, experts) == swaps(
            PACKINGS[1], kind, experts
        ):
            self.packing = told or self.packing
            return told or PACKINGS[-1]
        fits = list(PACKINGS)
        if found is not None:
            look_up = self.side.scope_of(found.rule.book).look_up
            expected = known_shape(found.rule.equation, found.term, look_up)
            if expected is not None:
                fits = []
                for packing in PACKINGS:
                    x, y = unpack(a, b, experts, swapped=swaps(packing, kind, experts))
                    if _stored(kind, experts, y.shape[1], x.shape[2]) == expected:
                        fits.append(packing)
        if self.forced is not None:
            if self.forced not in fits and fits:
                self._report(
                    "shape",
                    f"it was said that its experts are packed as by {self.forced}, and lora_A {list(a.shape)} and "
                    f"lora_B {list(b.shape)} fit {fits[0]} only",
                    name,
                    "say nothing, or what is so",
                )
            return self.forced
        if len(fits) == 1:
            self.packing = fits[0]
            self.shaped.add(fits[0])
        elif told is not None:
            self.packing = told
            self.assumed.add(told)
        else:
            self.ambiguous.append(
                Finding(
                    "packing",
                    "adapter_config.json has no peft_version, and the shapes fit both the packing before "
                    "PEFT 0.19 and the one since",
                    where=self.where,
                    key=name,
                    fix="put the peft_version that wrote it into adapter_config.json, or say which with "
                    f"--from {self.side.layout}/{PACKINGS[0]} (or /{PACKINGS[1]}), or give --model",
                    choices=tuple(
                        Choice(
                            f"{self.side.layout}/{each}",
                            "the shapes fit",
                            f"experts are packed as by {each}",
                        )
                        for each in PACKINGS
                    ),
                )
            )
            return None
        return self.packing


def _last(modules: Group) -> set[str]:
    """The last segments of some paths.

    >>> from regraft.names.keys import table
    >>> _last(table("l.0.mlp.w1", "l.1.mlp.w1", "l.1.mlp.w2")[0]) == {"w1", "w2"}
    True
    """
    leaf = modules.template.rpartition(".")[2]
    marks = leaf.count(MARK)
    if not marks:
        return {leaf}
    return {
        fill(leaf, numbers) for numbers in set(map(tuple, modules.numbers[:, -marks:].tolist()))
    }


@lru_cache(maxsize=64)
def dtype_name(dtype: np.dtype[Any]) -> str:
    """A dtype's name; numpy works it out anew each time."""
    return dtype.name


def _stored(kind: str, experts: int, out_size: int, in_size: int) -> tuple[int, ...]:
    return (experts, out_size, in_size) if kind == "experts" else (experts, in_size, out_size)


def _base_shape(
    a: tuple[int, ...], b: tuple[int, ...], rank: int, kind: str
) -> tuple[int, ...] | str:
    if len(a) < 2 or len(b) < 2:
        return f"LoRA factors have two dims or more, these have {list(a)} and {list(b)}"
    if 0 in a or 0 in b:
        return f"lora_A {list(a)} and lora_B {list(b)} have no elements"
    if len(a) != len(b) or any(size != 1 for size in b[2:]):
        return f"lora_A {list(a)} and lora_B {list(b)} do not fit together: their dims differ"
    if len(a) > 2 and kind not in ("any", "parameter"):
        return f"LoRA factors of a {kind} weight have two dims, these have {list(a)} and {list(b)}"
    if a[0] != b[1] and len(a) == 2:
        return f"lora_A {list(a)} and lora_B {list(b)} do not fit together: their ranks differ"
    if a[0] != rank:
        return f"adapter_config.json gives the rank {rank}, the factors have {a[0]}"
    shape = (b[0], *a[1:])
    return (shape[1], shape[0]) if kind in ("embedding", "conv1d") else shape
