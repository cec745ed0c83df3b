"""From the internal form to a file: four independent choices, and what each tool can hold.

    leaf spelling    what a module's tensors are called          `Writing.leaves`
    module naming    the layout, and whether dots become `_`     `Writing.layout`, `Writing.stem`
    prefix           what stands before a module                 `Writing.stem`
    alpha            a key, the header, or folded into the up    `Writing.alpha`

Sources: the readers of sd-scripts ``48d368f``, diffusers 0.42.1 with PEFT 0.21.2, ComfyUI ``a125cd8``, ai-toolkit
``27a03a9``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import numpy as np

from regraft.adapters.families.base import NoImageError
from regraft.adapters.form import Array, rescale
from regraft.adapters.scale import Number, Scale
from regraft.dialects.image import PEFT
from regraft.dialects.image.delta import (
    BOFT,
    FULL,
    GLORA,
    IA3,
    LOHA,
    LOKR,
    LORA,
    NOTHING,
    OFT,
    OFT_V2,
    SET,
    Delta,
    whole_w1,
)
from regraft.dialects.image.families import CLIP_V4, DENOISER, Family
from regraft.dialects.image.header import ADAPTER_METADATA
from regraft.dialects.image.moving import Ways, is_vector
from regraft.dialects.image.read import Home
from regraft.errors import Finding, RefusedError

KEYED, HEADER, CONFIG, FOLDED = "key", "header", "config", "folded"
"""Where a dialect has alpha."""

AlphaDtype = Callable[[str], str | None] | None
"""The dtype that an alpha once had, by its key."""


@dataclass(frozen=True, slots=True)
class Writing:
    """How one tool names and holds the adapters of a family."""

    name: str
    title: str
    layout: str
    """The layout that modules of the denoiser are named in."""
    also: tuple[str, ...]
    """Further layouts that its reader knows; a file that is in one stays so."""
    alpha: str
    leaves: Mapping[str, str]
    """Leaves of plain LoRA by role; those of the other algebras are LyCORIS'."""
    stem: Callable[[Home], str]
    refuses: Callable[[Delta], str | None]
    """Why a module cannot be held; ``None`` where it can."""

    @property
    def as_peft(self) -> bool:
        """Whether PEFT reads it, with one config for all modules of a component."""
        return self.alpha in (HEADER, CONFIG)


_DOWN_UP = {"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight"}
_A_B = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
_LYCORIS = {
    role: f".{role}"
    for role in (
        *(f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *(f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        *("oft_blocks", "rescale", "on_input", "dora_scale", "initial_norm"),
    )
} | {
    "ia3": ".weight",
    "oft_R": ".oft_R.weight",
    "scaled_oft": ".oft_R.scaled_oft",
    "set": ".set_weight",
    **{role: f".{role}.weight" for role in ("a1", "a2", "b1", "b2")},
}


def writing(dialect: str, family: Family, *, alone: bool = True) -> Writing:
    """How a dialect writes a family.

    ``alone`` says whether an adapter is for no other family; otherwise names that they share are taken where both are
    read.
    """
    if not family.native and dialect in ("comfyui", "ai-toolkit"):
        raise RefusedError(
            Finding(
                "dialect",
                f"its family is known from diffusers' {family.title} only, and not under its own code's names, "
                f"which {dialect} has",
                fix="convert it to kohya or diffusers, or give a rule book for it with --rules",
            )
        )
    if dialect == "comfyui" and not alone:
        return _comfyui(family, family.of_comfy)
    return {
        "kohya": _kohya,
        "diffusers": _diffusers,
        "comfyui": _comfyui,
        "ai-toolkit": _ai_toolkit,
        PEFT: _peft,
    }[dialect](family)


def _kohya(family: Family) -> Writing:
    def stem(home: Home) -> str:
        encoder = family.text_encoder(home.component)
        prefix = "lora_unet_" if encoder is None else encoder.kohya[0]
        return prefix + home.module.replace(".", "_")

    also = ("diffusers",) if family.component == "unet" and family.kohya != "diffusers" else ()
    return Writing(
        "kohya", "kohya's format", family.kohya, also, KEYED, _DOWN_UP, stem, _refused_by_kohya
    )


def _refused_by_kohya(delta: Delta) -> str | None:
    if delta.algebra == SET:
        return "a weight that takes the place of the base's has no name there"
    if delta.bias is not None and delta.algebra not in (FULL, NOTHING):
        return "no loader of it reads a delta of the bias beside other tensors of the module"
    return None


def _diffusers(family: Family) -> Writing:
    def stem(home: Home) -> str:
        component = family.component if home.component == DENOISER else home.component
        return f"{component}.{home.module}"

    return Writing(
        "diffusers", "diffusers", "diffusers", (), HEADER, _A_B, stem, _refused_by_diffusers
    )


def _peft(family: Family) -> Writing:
    def stem(home: Home) -> str:
        return f"base_model.model.{home.module}"

    return Writing(
        PEFT, "a PEFT folder", "diffusers", (), CONFIG, _A_B, stem, _refused_by_diffusers
    )


def _refused_by_diffusers(delta: Delta) -> str | None:
    if is_vector(delta):
        return "it holds no deltas of norms or biases"
    if delta.algebra != LORA or "mid" in delta.tensors:
        return f"it holds plain LoRA only, and this is {delta.algebra}"
    if delta.magnitude is not None and delta.magnitude_in:
        return "its DoRA is on the out axis, and this one is on the in axis"
    return None


def _comfyui(family: Family, name: Callable[[str], str] | None = None) -> Writing:
    named = family.in_comfy if name is None else name

    def stem(home: Home) -> str:
        encoder = family.text_encoder(home.component)
        if encoder is None:
            return f"diffusion_model.{named(home.module)}"
        return f"text_encoders.{encoder.comfy}.transformer.{home.module}"

    return Writing("comfyui", "ComfyUI", family.native, (), KEYED, _A_B, stem, _refused_by_comfyui)


def _refused_by_comfyui(delta: Delta) -> str | None:
    if delta.magnitude is not None and not delta.magnitude_in:
        return "it divides DoRA on the out axis by the lengths of the base's rows, and not of the sum's"
    if delta.algebra == IA3:
        return "it does not read IA3"
    if delta.algebra == OFT_V2:
        return "it does not read OneTrainer's OFT"
    if delta.algebra in (OFT, BOFT) and (delta.alpha or "rescale" in delta.tensors):
        return "it ignores OFT's rescale, and takes the constraint for another number"
    return None


def _ai_toolkit(family: Family) -> Writing:
    if family.ai_toolkit == "lora_unet_":
        like = _kohya(family)
        layout = family.ai_toolkit_layout or family.kohya
        return replace(like, name="ai-toolkit", title="ai-toolkit", layout=layout, also=())

    def stem(home: Home) -> str:
        encoder = family.text_encoder(home.component)
        if encoder is None:
            return family.ai_toolkit + home.module
        if len(family.text_encoders) == 1:
            return f"lora_te.{home.module}"
        # All that follow the first are called the second.
        return f"lora_te{1 if encoder is family.text_encoders[0] else 2}.{home.module}"

    return Writing(
        "ai-toolkit",
        "ai-toolkit",
        family.ai_toolkit_layout or family.native,
        (),
        FOLDED,
        _A_B,
        stem,
        _refused_by_ai_toolkit,
    )


def _refused_by_ai_toolkit(delta: Delta) -> str | None:
    if is_vector(delta) or delta.bias is not None:
        return "it holds no deltas of norms or biases"
    if delta.magnitude is not None and delta.magnitude_in:
        return "its DoRA is on the out axis, and this one is on the in axis"
    if delta.magnitude is not None and (delta.conv or delta.algebra != LORA):
        return "it has DoRA of linears only, around plain LoRA"
    if delta.algebra not in (LORA, LOKR) or "mid" in delta.tensors:
        return f"it holds LoRA and LoKr only, and this is {delta.algebra}"
    return None


# -- what can be held


def fit_to(deltas: Mapping[Home, Delta], how: Writing, ways: Ways) -> dict[Home, Delta]:
    """All modules in a form that a dialect holds.

    Raises ``RefusedError`` with everything that has none.
    """
    made = _fit(deltas, how, ways, set())
    if how.as_peft or how.alpha == FOLDED:
        mixed = _mixed_dora(made)
        made = _fit(made, how, ways, mixed) if mixed else made
    return made


def _fit(
    deltas: Mapping[Home, Delta], how: Writing, ways: Ways, mixed: set[str]
) -> dict[Home, Delta]:
    """``mixed`` are components of which DoRA cannot be held, because some of their modules are none."""
    made: dict[Home, Delta] = {}
    findings = []
    for home, delta in deltas.items():
        elsewhere = _no_place(home, how)
        if elsewhere is not None:
            findings.append(ways.elsewhere(home, delta, *elsewhere, how.title))
            continue
        why = how.refuses(delta)
        if why is None and home.component in mixed and delta.magnitude is not None:
            why = "it has DoRA for all modules of a component or for none, and some here are none"
        if why is None:
            made[home] = delta
            continue
        try:
            lower = ways.lower(home, delta, NoImageError(why))
            again = how.refuses(lower)
            if again is not None:
                raise NoImageError(again)
        except NoImageError as error:
            findings.append(ways.finding(home, delta, error, f"in {how.title}"))
            continue
        made[home] = lower
    if findings:
        raise RefusedError(findings)
    return made


def _no_place(home: Home, how: Writing) -> tuple[str, str] | None:
    """Why a dialect has no place for a component, and which dialects have one; ``None`` where it has."""
    if home.component == "transformer_2" and how.name != "diffusers":
        return (
            "one file is for one model, and this is the second transformer of a pipeline",
            "diffusers",
        )
    if home.component == DENOISER:
        return None
    if how.alpha == CONFIG:
        return (
            f"it is for one model, and this is of the {home.component}",
            "kohya, diffusers or comfyui",
        )
    return None


def _mixed_dora(deltas: Mapping[Home, Delta]) -> set[str]:
    """Components of which only some modules are DoRA."""
    kinds: dict[str, set[bool]] = {}
    for home, delta in deltas.items():
        kinds.setdefault(home.component, set()).add(delta.magnitude is not None)
    return {component for component, found in kinds.items() if len(found) > 1}


# -- the file


@dataclass(slots=True)
class Written:
    """A file's tensors and header, and what changed on the way."""

    tensors: dict[str, Array]
    header: dict[str, str]
    folded: list[Home]
    """Modules whose scale went into their up."""
    rounded: list[Home]
    """Those of them whose numbers changed by more than a power of two."""
    config: dict[str, Any] = field(default_factory=dict)
    """A config beside the file, where the dialect has one."""


def write_deltas(deltas: Mapping[Home, Delta], how: Writing, alpha_dtype: AlphaDtype) -> Written:
    """The tensors of a file, and what its header has to say.

    ``alpha_dtype`` gives the dtype of an alpha by its key, where an earlier file had it.
    """
    written = Written({}, {}, [], [])
    for home, delta in deltas.items():
        stem = how.stem(home)
        if how.alpha == FOLDED and delta.algebra == LORA:
            delta = _folded(home, delta, written)
        _write_module(stem, home, delta, how, alpha_dtype, written)
    if how.as_peft:
        _add_missing_biases(deltas, how, written)
    if how.alpha == HEADER:
        said = adapter_metadata(deltas, how)
        if said is not None:
            written.header[ADAPTER_METADATA] = said
    if how.alpha == CONFIG:
        written.config = _peft_config(list(deltas.items()))
    return written


def _folded(home: Home, delta: Delta, written: Written) -> Delta:
    ratio = delta.scale.value
    if ratio == 1.0:
        return delta
    up, exact = rescale(delta.tensors["up"], ratio)
    written.folded.append(home)
    if not exact:
        written.rounded.append(home)
    rank = delta.rank
    return replace(
        delta, tensors={**delta.tensors, "up": up}, alpha=rank, rslora=False, exact=exact
    )


def _write_module(
    stem: str,
    home: Home,
    delta: Delta,
    how: Writing,
    alpha_dtype: AlphaDtype,
    written: Written,
) -> None:
    tensors = dict(delta.tensors)
    if how.name == "comfyui" and "lokr_t2" in tensors and "lokr_w1_a" in tensors:
        tensors = whole_w1(tensors)
    leaves = {**_LYCORIS, **(_DOWN_UP if "mid" in tensors else how.leaves)}
    if delta.algebra in (FULL, NOTHING):
        vector = is_vector(delta) and home.kind == "vector"
        leaves = {"diff": ".w_norm" if vector else ".diff"}
    for role, tensor in tensors.items():
        written.tensors[stem + leaves[role]] = tensor
    if not how.as_peft and _has_alpha(delta, how):
        written.tensors[f"{stem}.alpha"] = _alpha(delta, f"{stem}.alpha", alpha_dtype)
    if delta.magnitude is not None:
        written.tensors[stem + _magnitude_leaf(how)] = _magnitude(delta, how)
    if delta.bias is not None:
        name, bias = _bias(delta, home, how)
        written.tensors[stem + name] = bias
    if delta.reshape is not None and how.name == "comfyui":
        written.tensors[f"{stem}.reshape_weight"] = np.array(delta.reshape, np.int64)


def _has_alpha(delta: Delta, how: Writing) -> bool:
    if delta.algebra in (FULL, SET, IA3, OFT_V2, NOTHING):
        return False
    if delta.algebra == LORA:
        return how.alpha == KEYED
    return delta.alpha is not None or delta.algebra in (LOHA, LOKR, GLORA)


def _alpha(delta: Delta, key: str, alpha_dtype: AlphaDtype) -> Array:
    """Alpha in the dtype that it had, or that of the module's tensors, where that holds it."""
    scale = delta.scale
    value: Number = scale.alpha
    if delta.algebra in (OFT, BOFT) or (delta.algebra == LOKR and not delta.rank):
        value = delta.alpha or 0
    elif scale.rslora:
        value = scale.value * scale.rank
    usual = next(iter(delta.tensors.values())).dtype
    named = None if alpha_dtype is None else alpha_dtype(key)
    number = _as_float(value)
    for dtype in (_dtype(named), delta.alpha_dtype, usual, np.dtype(np.float32)):
        if dtype is None:
            continue
        made = _cast(number, dtype)
        if float(made) == number and np.isfinite(made):
            return made
    made = _cast(number, np.dtype(np.float32))
    if not np.isfinite(made) or (number and not made):
        raise RefusedError(
            Finding(
                "not-representable",
                f"its alpha is {number:g}, which float32 does not hold",
                key=key,
                fix="correct the alpha, or save the adapter again",
            )
        )
    return made


def _as_float(value: Number) -> float:
    """A number of a file; infinite where float64 does not hold it."""
    try:
        return float(value)
    except OverflowError:
        return inf if value > 0 else -inf


def _cast(number: float, dtype: np.dtype[Any]) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(number, np.float64).astype(dtype)


def _dtype(name: str | None) -> np.dtype[Any] | None:
    if name is None:
        return None
    import ml_dtypes

    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        return None


def _magnitude_leaf(how: Writing) -> str:
    if how.alpha == FOLDED:
        return ".magnitude"
    return ".lora_magnitude_vector" if how.as_peft else ".dora_scale"


def _magnitude(delta: Delta, how: Writing) -> Array:
    """(out,) for diffusers, of a convolution (1, out, 1, ...); LyCORIS' has the dims of the weight."""
    assert delta.magnitude is not None
    kernel = delta.tensors["down"].ndim - 2 if delta.algebra == LORA else len(delta.kernel)
    ones = (1,) * kernel
    if how.as_peft or how.alpha == FOLDED:
        return delta.magnitude.reshape(1, -1, *ones) if kernel else delta.magnitude
    return delta.magnitude.reshape(*((1, -1) if delta.magnitude_in else (-1, 1)), *ones)


def _bias(delta: Delta, home: Home, how: Writing) -> tuple[str, Array]:
    assert delta.bias is not None
    if how.as_peft:
        if delta.bias_scaled:
            return ".lora_B.bias", delta.bias
        return ".lora_B.bias", (delta.bias.astype(np.float64) / delta.scale.value).astype(
            np.float32
        )
    name = ".b_norm" if home.kind == "vector" else ".diff_b"
    if not delta.bias_scaled or delta.scale.value == 1.0:
        return name, delta.bias
    return name, np.asarray(delta.bias_delta).astype(np.float32)


def _add_missing_biases(deltas: Mapping[Home, Delta], how: Writing, written: Written) -> None:
    """PEFT's config says ``lora_bias`` for all modules of a component; zeros add nothing."""
    biased = {home.component for home, delta in deltas.items() if delta.bias is not None}
    for home, delta in deltas.items():
        if home.component in biased and delta.bias is None:
            up = delta.tensors["up"]
            written.tensors[f"{how.stem(home)}.lora_B.bias"] = np.zeros(len(up), up.dtype)


def adapter_metadata(deltas: Mapping[Home, Delta], how: Writing) -> str | None:
    """The header's entry for diffusers; ``None`` where everything is what it takes for granted.

    That is one rank, alpha = rank, no DoRA and no biases: without the entry diffusers 0.42.1 gives all modules one
    alpha, the most common rank.
    """
    components: dict[str, list[tuple[Home, Delta]]] = {}
    for home, delta in deltas.items():
        components.setdefault(how.stem(home).partition(".")[0], []).append((home, delta))
    said: dict[str, Any] = {}
    plain = True
    for component, modules in components.items():
        settings = _settings(modules, start=not component.startswith("text_encoder"))
        plain &= settings["r"] == settings["lora_alpha"] and not any(
            settings[name] for name in ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias")
        )
        said.update({f"{component}.{name}": value for name, value in settings.items()})
    return None if plain else json.dumps(said, indent=2, sort_keys=True)


def _settings(modules: Sequence[tuple[Home, Delta]], *, start: bool) -> dict[str, Any]:
    """PEFT's settings of one component; ``start`` says whether paths begin where the component does."""
    ranks = {_path(home): delta.rank for home, delta in modules}
    alphas = {_path(home): _peft_alpha(delta.scale) for home, delta in modules}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(m, start=start): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(m, start=start): a for m, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks),
        "use_dora": any(delta.magnitude is not None for _, delta in modules),
        "lora_bias": any(delta.bias is not None for _, delta in modules),
        "use_rslora": False,
        "bias": "none",
    }


def _peft_config(modules: Sequence[tuple[Home, Delta]]) -> dict[str, Any]:
    """An ``adapter_config.json`` for a denoiser.

    PEFT looks for targets at ends of paths, so a path of one segment (``proj_out``) would be that of many modules:
    then an expression names them, which is compared with whole paths.
    """
    settings = _settings(modules, start=True)
    paths: list[str] = settings["target_modules"]
    if any("." not in path for path in paths):
        settings["target_modules"] = "|".join(path.replace(".", r"\.") for path in paths)
    usual = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None}
    return {**usual, "inference_mode": True, "lora_dropout": 0.0, **settings}


def _path(home: Home) -> str:
    """A module for PEFT's config, which matches ends of paths.

    transformers 5 has one level less in a CLIPTextModel than files have; without it both are matched.
    """
    return home.module if home.component == DENOISER else home.module.removeprefix(CLIP_V4)


def _peft_alpha(scale: Scale) -> Number:
    value = scale.alpha if not scale.rslora else scale.value * scale.rank
    return int(value) if float(value).is_integer() else value


def _exactly(module: str, *, start: bool) -> str:
    """A pattern that fits one path only: PEFT looks at ends of paths, and ``proj_out`` is the end of many."""
    return ("^" if start else "") + module.replace(".", r"\.")


def layouts_of(homes: Sequence[Home]) -> list[str]:
    """The layouts of a denoiser's modules."""
    return list(dict.fromkeys(home.layout for home in homes if home.component == DENOISER))
