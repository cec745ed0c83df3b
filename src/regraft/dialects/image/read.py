"""From a file to the internal form: every module looked up, every tensor accounted for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice

import numpy as np

from regraft.adapters.families.settings import Patterns
from regraft.adapters.form import Array
from regraft.adapters.scale import Number
from regraft.dialects.image.delta import LORA, Delta
from regraft.dialects.image.families import (
    CLIP_V4,
    DENOISER,
    Family,
    TextEncoder,
    family_named,
    image_families,
)
from regraft.dialects.image.grouping import (
    Grouped,
    MalformedError,
    ModuleTensors,
    delta_of,
    size_of,
)
from regraft.dialects.image.header import ADAPTER_METADATA, plain_alpha, settings_of
from regraft.dialects.image.modules import Module, Names, body_names, names_of
from regraft.dialects.image.origin import read_origin
from regraft.dialects.image.prefixes import KNOWN_PREFIXES, Place, place_of
from regraft.errors import BadInputError, Finding, UnmatchedKeysError


@dataclass(frozen=True, slots=True)
class Home:
    """A module that a file adapts: the component, the layout and the key of its weight there."""

    component: str
    """``denoiser``, ``transformer_2``, or a text encoder as diffusers calls it."""
    layout: str
    key: str
    kind: str

    @property
    def module(self) -> str:
        """The module's path."""
        return self.key.removesuffix(".weight")


@dataclass(frozen=True, slots=True, eq=False)
class ImageAdapter:
    """An adapter of an image or video model, free of any file's spelling."""

    family: Family
    deltas: dict[Home, Delta]
    others: dict[str, Array]
    """Tensors that are no weights of the model."""
    metadata: dict[str, str]
    evidence: tuple[str, ...]
    notes: tuple[str, ...] = ()


# -- which family


@dataclass(frozen=True, slots=True)
class Fit:
    """A family that a file may be for: where every name of the file stands in it."""

    family: Family
    homes: dict[str, Home]
    missing: tuple[str, ...]
    """Names of the file that it does not have."""
    certain: int
    """How many modules have a size that only this family has."""
    others: int = 0
    """How many modules have a name that only ComfyUI has for them."""
    misfits: int = 0
    """How many modules have factors with a kernel where the family has a linear, or sizes that it does not have."""


def places_of(grouped: Grouped) -> dict[str, Place]:
    """The component and the module of every name."""
    return {stem: place_of(stem) for stem in grouped.modules}


def fit_families(grouped: Grouped, families: Iterable[Family] = ()) -> list[Fit]:
    """How a file's names stand in each family, or in those that are given; best first."""
    places = places_of(grouped)
    fits = [_fit(family, places, grouped) for family in families or image_families()]
    return sorted(fits, key=lambda fit: len(fit.missing))


def families_with(grouped: Grouped) -> list[Family]:
    """The families that have every module of a file; each is left at the first module that it has not."""
    places = [(place, grouped.modules[stem]) for stem, place in places_of(grouped).items()]
    return [family for family in image_families() if _has_all(family, places)]


def _has_all(family: Family, places: Sequence[tuple[Place, ModuleTensors]]) -> bool:
    known = _layouts_of(family)
    return all(
        _modules(
            known,
            place.module,
            flat=place.flat,
            scale_key=module.scale_key,
            excludes=family.excludes,
        )
        if place.component in (DENOISER, "transformer_2")
        else _text_home(family, place) is not None
        for place, module in places
    )


def strange_prefix(stems: Collection[str]) -> tuple[str, Family] | None:
    """What stands before the modules of a family in names that are otherwise right, and one such family.

    ``None`` where it is something that tools write, or no family has what follows.

    >>> prefix, family = strange_prefix(["lora_net_double_blocks_0_img_attn_qkv"])
    >>> prefix, family.name
    ('lora_net_', 'flux')
    """
    first = min(stems, key=len, default="")
    flat = "." not in first
    mark, usual = ("_", "lora_unet_") if flat else (".", "diffusion_model.")
    if place_of(first).prefix.startswith(("lora_te", "text_encoder")):
        return None
    for found in list(re.finditer(re.escape(mark), first))[:_PREFIX_PARTS]:
        prefix = first[: found.end()]
        if not all(stem.startswith(prefix) for stem in stems):
            return None
        named = {
            f"{usual}{stem.removeprefix(prefix)}": ModuleTensors(stem)
            for stem in (first, *islice(stems, _PREFIX_LOOKS))
        }
        families = families_with(Grouped(named, {}))
        if families:
            return prefix, families[0]
    return None


_PREFIX_PARTS, _PREFIX_LOOKS = 6, 200
"""How long a prefix may be, and how many names are looked at for one."""


def _layouts_of(family: Family) -> tuple[Names, ...]:
    """The modules of a family in each layout."""
    found = (names_of(family, layout) for layout in family.layouts)
    return tuple(names for names in found if names is not None)


def _fit(family: Family, places: Mapping[str, Place], grouped: Grouped) -> Fit:
    found: dict[str, tuple[Module, ...]] = {}
    homes: dict[str, Home] = {}
    missing = []
    known = _layouts_of(family)
    for stem, place in places.items():
        if place.component in (DENOISER, "transformer_2"):
            module = grouped.modules[stem]
            modules = _modules(
                known,
                place.module,
                flat=place.flat,
                scale_key=module.scale_key,
                excludes=family.excludes,
            )
            if modules:
                found[stem] = modules
                continue
        else:
            home = _text_home(family, place)
            if home is not None:
                homes[stem] = home
                continue
        missing.append(stem)
    usual = Counter(modules[0].layout for modules in found.values() if len(modules) == 1)
    for stem, modules in found.items():
        most = modules[0] if len(modules) == 1 else max(modules, key=lambda m: usual[m.layout])
        homes[stem] = Home(places[stem].component, most.layout, most.key, most.kind)
    certain = sum(_has_context(family, home, grouped.modules[stem]) for stem, home in homes.items())
    misfits = sum(_misfits(family, home, grouped.modules[stem]) for stem, home in homes.items())
    others = sum(modules[0].other_name for modules in found.values())
    return Fit(family, homes, tuple(missing), certain, others, misfits)


@lru_cache(maxsize=1 << 15)
def _modules(
    known: tuple[Names, ...], name: str, *, flat: bool, scale_key: bool, excludes: str
) -> tuple[Module, ...]:
    """The module in every layout that has it, with the right kind of parameter.

    Files of one family have the same names, and what was looked up for one is remembered for the next.
    """
    found = []
    for names in known:
        module = names.find(name, flat=flat)
        if module is None or (excludes and re.fullmatch(excludes, module.path) is not None):
            continue
        if scale_key == module.key.endswith(".scale"):
            found.append(module)
    return tuple(found)


def _text_home(family: Family, place: Place) -> Home | None:
    for encoder in family.text_encoders:
        if not _names_encoder(place, encoder):
            continue
        module = _in_body(encoder.body, place)
        if module is not None:
            return Home(encoder.name, "transformers-v4", module.key, "linear")
    return None


def _names_encoder(place: Place, encoder: TextEncoder) -> bool:
    if place.component.startswith("te:"):
        said = place.component.removeprefix("te:")
        return said in encoder.kohya or said == encoder.comfy
    return place.component == encoder.name


def _in_body(body: str, place: Place) -> Module | None:
    names = body_names(body)
    found = names.find(place.module, flat=place.flat)
    if found is None and body == "clip":
        prefix = CLIP_V4.replace(".", "_") if place.flat else CLIP_V4
        found = names.find(prefix + place.module, flat=place.flat)
    return found


def _has_context(family: Family, home: Home, module: ModuleTensors) -> bool:
    """Whether a module is as wide as the text that this family's cross-attention sees."""
    down = module.tensors.get("down")
    return (
        family.context > 0
        and down is not None
        and re.search(r"\.attn2\.to_[kv]\.weight$", home.key) is not None
        and down.shape[1] == family.context
    )


def _misfits(family: Family, home: Home, module: ModuleTensors) -> bool:
    """Whether a module has a kernel, or a shape, that this family does not have."""
    down = module.tensors.get("down")
    if down is not None and (down.ndim > 2) != (home.kind == "conv"):
        return True
    size = size_of(module) if family.ratios else None
    return size is not None and any(
        re.fullmatch(pattern, home.module) is not None and size[0] != ratio * size[1]
        for pattern, ratio in family.ratios
    )


def hinted_families(metadata: Mapping[str, str]) -> tuple[list[Family], str]:
    """The families that a header names, and what says so."""
    fields = ("modelspec.architecture", "ss_base_model_version", "ss_network_module")
    for name in fields:
        said = metadata.get(name, "").strip().lower()
        if name == "ss_network_module":
            said = said.rpartition(".")[2].removeprefix("lora_").removeprefix("oft_")
        if not said:
            continue
        told = said.partition("/")[0]
        found = [f for f in image_families() if f.marks and re.fullmatch(f.marks, told)]
        if found:
            return found, f"the header's {name} is {metadata[name]!r}"
    return [], ""


def candidates(
    grouped: Grouped, metadata: Mapping[str, str], where: str, given: str | None = None
) -> tuple[list[Fit], str]:
    """The families that all names of a file fit, and the evidence that leaves these.

    Raises ``UnmatchedKeysError`` where none has all of them, ``BadInputError`` where the header contradicts the names.
    """
    named = _named(grouped, metadata, given)
    fits = fit_families(grouped, named)
    whole = [fit for fit in fits if not fit.missing]
    if not whole:
        raise _no_family(fits[0], where, named=bool(named))
    if given is not None:
        return whole, f"it was said to be {whole[0].family.title}"
    if named:
        return whole, f"it was made of a file for {_titles(whole)}"
    hinted, why = hinted_families(metadata)
    whole = [fit for fit in whole if not fit.misfits] or whole
    whole = [fit for fit in whole if not fit.others] or whole
    agreeing = [fit for fit in whole if fit.family in hinted]
    if hinted and not agreeing:
        raise BadInputError(
            Finding(
                "wrong-base",
                f"{why}, and its modules are those of {_titles(whole)}",
                where=where,
                fix=f"say which it is with --from {whole[0].family.name}, or correct the header",
            )
        )
    if agreeing:
        return agreeing, why
    certain = [fit for fit in whole if fit.certain]
    if certain and len(certain) < len(whole):
        return certain, "the width of its cross-attention"
    return whole, f"its modules are those of {_titles(whole)}"


def _named(grouped: Grouped, metadata: Mapping[str, str], given: str | None) -> tuple[Family, ...]:
    """The families that a user, our own note, or a tool for one family only leaves; none where nothing is said."""
    if given is not None:
        names: tuple[str, ...] = (given,)
    elif any("xlabs" in module.spellings for module in grouped.modules.values()):
        names = ("flux",)
    else:
        origin = read_origin(metadata)
        names = () if origin is None else origin.families
    found = (family_named(name) for name in names)
    return tuple(family for family in found if family is not None)


def model_config(family: Family, deltas: Mapping[Home, Delta]) -> dict[str, int]:
    """What an adapter's shapes say of its base's config: which block is the last, where that block is another."""
    if family.last_block is None:
        return {}
    pattern, ratio = family.last_block
    seen = [0]
    for home, delta in deltas.items():
        found = re.fullmatch(pattern, home.module)
        if found is None:
            continue
        number = int(next(group for group in found.groups() if group is not None))
        if delta.out == ratio * delta.into:
            return {"num_layers": number + 1}
        seen.append(number)
    return {"num_layers": max(seen) + 2}


def _titles(fits: Sequence[Fit]) -> str:
    return " or ".join(fit.family.title for fit in fits)


def _no_family(best: Fit, where: str, *, named: bool) -> UnmatchedKeysError:
    known = len(best.homes)
    title = best.family.title
    strange = strange_prefix(best.missing)
    if strange is not None:
        prefix, family = strange
        usual = "lora_unet_" if prefix.endswith("_") else "diffusion_model., unet. or transformer."
        return UnmatchedKeysError(
            Finding(
                "unmatched",
                f"before the names of {family.title}'s modules stands {prefix!r}, which no tool is known to write",
                where=where,
                key=best.missing[0],
                fix=f"rename its keys, with {usual} in the place of {prefix}; known are {KNOWN_PREFIXES}",
            )
        )
    if not known:
        return UnmatchedKeysError(
            Finding(
                "unmatched",
                "no family of image or video models that regraft knows has a module of this name",
                where=where,
                key=best.missing[0],
                fix=f"see that the name begins as tools write it ({KNOWN_PREFIXES}); if it does, give the rule "
                f"book of its model with --rules, or {_OWN_FOLDER}",
            )
        )
    what = "as it was said to be" if named else f"as {known} of its modules are"
    return UnmatchedKeysError(
        Finding(
            "unmatched",
            f"{title} ({what}) has no module of this name",
            where=where,
            key=stem,
            fix=f"check the file; if it is of another family, name that with --from, or {_OWN_FOLDER}",
        )
        for stem in best.missing
    )


_OWN_FOLDER = "give the folder of its model in diffusers' form with --model"


# -- reading


def read_adapter(
    fit: Fit, grouped: Grouped, metadata: dict[str, str], where: str, why: str
) -> ImageAdapter:
    """The internal form of a file, as an adapter of one family.

    Raises ``BadInputError`` with everything that is wrong with its tensors.
    """
    alphas = Alphas(metadata, grouped, where)
    deltas: dict[Home, Delta] = {}
    findings = []
    for stem, module in grouped.modules.items():
        home = fit.homes[stem]
        kernel = _kernel(fit.family, home)
        alpha, rslora = alphas.of(home, module, fit.family)
        try:
            delta = delta_of(module, home.kind, kernel, alpha, rslora=rslora)
        except MalformedError as error:
            findings.append(Finding(error.code, str(error), where=where, key=stem, fix=_AGAIN))
            continue
        except (IndexError, ValueError, ZeroDivisionError):
            shapes = ", ".join(f"{role} {t.shape}" for role, t in module.tensors.items())
            message = f"its tensors have shapes that no tool writes: {shapes}"
            findings.append(Finding("shape", message, where=where, key=stem, fix=_AGAIN))
            continue
        said = alphas.other_rank(home, delta, fit.family)
        if said is not None:
            message = (
                f"its factors have the rank {delta.rank}, and {ADAPTER_METADATA} gives it {said}"
            )
            findings.append(Finding("shape", message, where=where, key=stem, fix=_AGAIN))
        if "xlabs" in module.spellings and home.module.endswith(".linear1"):
            delta = _whole_linear1(delta)
        if home in deltas:
            findings.append(
                Finding(
                    "doubled-target",
                    f"two modules of the file adapt {home.key}",
                    where=where,
                    key=stem,
                    fix="take one of them out",
                )
            )
        deltas[home] = delta
    if findings:
        raise BadInputError(findings)
    notes = list(alphas.notes)
    if _is_split(metadata, deltas):
        notes.append(
            "it was trained with split_qkv: the rank in the file is three times (four, with the MLP) the one that was "
            "trained, alpha is not, and every loader applies alpha / rank as it is in the file; so does regraft"
        )
    else:
        notes += _unlike_header(metadata, deltas.values())
    return ImageAdapter(fit.family, deltas, grouped.others, metadata, (why,), tuple(notes))


_AGAIN = "save the file again with the tool that made it; a tensor of it is damaged, or of another module"


def _kernel(family: Family, home: Home) -> tuple[int, ...] | None:
    if home.kind != "conv":
        return None
    return next((k for pattern, k in family.kernels if re.fullmatch(pattern, home.module)), None)


def _whole_linear1(delta: Delta) -> Delta:
    """XLabs' qkv of a single block is the first three sevenths of linear1; it adds nothing to the rest."""
    up = delta.tensors["up"]
    whole = np.zeros((len(up) * 7 // 3, *up.shape[1:]), up.dtype)
    whole[: len(up)] = up
    return replace(delta, tensors={**delta.tensors, "up": whole}, out=len(whole), padded=True)


def _is_split(metadata: Mapping[str, str], deltas: Mapping[Home, Delta]) -> bool:
    said = metadata.get("ss_network_args", "")
    return (
        "split_qkv" in said
        and re.search(r'split_qkv"?\s*[:=]\s*"?(true|1)', said.lower()) is not None
    )


def _unlike_header(metadata: Mapping[str, str], deltas: Iterable[Delta]) -> Iterator[str]:
    """Ranks and alphas that sd-scripts' header says, and that no module has.

    Tools that merge, resize or edit files leave the header as it was, so this is no error; loaders go by the tensors.
    """
    deltas = list(deltas)
    loras = [delta for delta in deltas if delta.algebra == LORA]
    network = metadata.get("ss_network_module", "").rpartition(".")[2].lower()
    kinds = {delta.algebra for delta in deltas}
    said_kind = next(
        (kind for kind in ("lora", "loha", "lokr", "oft") if network.startswith(kind)), None
    )
    if said_kind is not None and kinds and not any(said_kind in kind.lower() for kind in kinds):
        shown = " and ".join(sorted(kinds))
        yield f"the header's ss_network_module is {network}, and the tensors are {shown}'s: the tensors count"
    have: dict[str, set[Number | None]] = {
        "ss_network_dim": {delta.rank for delta in loras},
        "ss_network_alpha": {delta.alpha for delta in loras},
    }
    for name, found in have.items():
        numbers = sorted({float(each) for each in found if each is not None})
        try:
            said = float(metadata[name])
        except (KeyError, ValueError):
            continue  # absent, None, or Dynamic, as resizing writes it
        if numbers and said not in numbers:
            shown = " and ".join(f"{each:g}" for each in numbers[:3])
            more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
            yield f"the header's {name} is {said:g}, and the tensors have {shown}{more}: the tensors count"
        elif loras and not numbers and said not in have["ss_network_dim"]:
            yield f"the header's {name} is {said:g}, and no module has an alpha: the scale is 1"


@dataclass(slots=True)
class Alphas:
    """Where alpha is said besides a module's own key."""

    metadata: Mapping[str, str]
    grouped: Grouped
    where: str
    notes: list[str] = field(default_factory=list)
    _configs: dict[str, _Config] = field(default_factory=dict)
    _plain: Number | None = None

    def __post_init__(self) -> None:
        own = any("alpha" in m.tensors for m in self.grouped.modules.values())
        spellings = {s for m in self.grouped.modules.values() for s in m.spellings}
        self._configs = _configs(self.metadata, self.where)
        if own or self._configs:
            return
        name = "ss_network_alpha" if spellings == {"lora_down"} else "alpha"
        if spellings <= {"lora_down", "lora_A"} and name in self.metadata:
            value = plain_alpha(self.metadata, name, self.where)
            if value is None:
                return
            self._plain = int(value) if value.is_integer() else value
            self.notes.append(
                f"alpha is {self._plain:g} for all modules: only {name} in the header says so"
            )

    def of(self, home: Home, module: ModuleTensors, family: Family) -> tuple[Number | None, bool]:
        """The alpha of a module, and whether it is divided by the root of the rank."""
        if "down" not in module.tensors:
            return None, False
        component = family.component if home.component == DENOISER else home.component
        config = self._configs.get(component)
        if config is None:
            return self._plain, False
        return config.alpha(home.module), config.rslora

    def other_rank(self, home: Home, delta: Delta, family: Family) -> int | None:
        """The rank that the header gives a LoRA whose factors have another one."""
        component = family.component if home.component == DENOISER else home.component
        config = self._configs.get(component)
        said = config.rank_of(home.module) if config is not None else None
        return said if delta.algebra == LORA and said != delta.rank else None


@dataclass(frozen=True, slots=True)
class _Config:
    usual: Number | None
    patterns: Patterns
    rslora: bool
    rank: int | None
    ranks: Patterns

    def alpha(self, module: str) -> Number | None:
        found = self.patterns.find(module)
        return self.usual if found is None else found

    def rank_of(self, module: str) -> int | None:
        found: int | None = self.ranks.find(module)
        return self.rank if found is None else found


def _configs(metadata: Mapping[str, str], where: str) -> dict[str, _Config]:
    """What diffusers' header says, by component."""
    found = {}
    for component, settings in settings_of(metadata, where).items():
        usual = settings.get("lora_alpha")
        found[component] = _Config(
            usual,
            Patterns(settings.get("alpha_pattern"), "alpha_pattern"),
            bool(settings.get("use_rslora")),
            settings.get("r"),
            Patterns(settings.get("rank_pattern"), "rank_pattern"),
        )
    return found


def has_lora(deltas: Iterable[Delta]) -> bool:
    """Whether there is a LoRA among some deltas."""
    return any(delta.algebra == LORA for delta in deltas)
