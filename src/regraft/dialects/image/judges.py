"""What diffusers, ComfyUI and sd-scripts do with a file as it is, where that is not what was trained.

Everything here was found by running the loaders on genuine files: diffusers 0.42.1
(``loaders/lora_conversion_utils.py``, ``loaders/lora_pipeline.py``, ``utils/peft_utils.py``), ComfyUI ``a125cd8``
(``comfy/lora.py``, ``comfy/weight_adapter``); sd-scripts ``48d368f`` (``networks/lora*.py``) was read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from regraft.adapters.form import Array
from regraft.dialects.image.delta import (
    BOFT,
    FULL,
    IA3,
    LOHA,
    LOKR,
    LORA,
    NOTHING,
    OFT,
    OFT_V2,
    SET,
    Delta,
)
from regraft.dialects.image.families import DENOISER, Family, family_named
from regraft.dialects.image.grouping import Grouped, ModuleTensors, group_tensors
from regraft.dialects.image.modules import names_of
from regraft.dialects.image.prefixes import Place, place_of
from regraft.dialects.image.read import Fit, Home, candidates, read_adapter
from regraft.dialects.judging import (
    FAILS,
    IGNORED,
    LOADED,
    WRONG_SCALE,
    WRONG_VALUES,
    Files,
    Judgement,
)
from regraft.errors import RegraftError

Verdict = tuple[str, str] | None


@dataclass(frozen=True, slots=True, eq=False)
class Adapted:
    """One module of a file: how it is named, and what it adds."""

    stem: str
    place: Place
    tensors: ModuleTensors
    home: Home
    delta: Delta


@dataclass(frozen=True, slots=True, eq=False)
class ImageFileView:
    """A file, as a judge looks at it."""

    family: str
    unet: bool
    modules: tuple[Adapted, ...]
    keys: tuple[str, ...]
    metadata: Mapping[str, str]

    def any(self, test: Callable[[Adapted], bool]) -> bool:
        """Whether a module passes a test."""
        return any(map(test, self.modules))

    @property
    def spellings(self) -> set[str]:
        """How its leaves are spelled."""
        return {s for each in self.modules for s in each.tensors.spellings}


def looks(files: Files) -> list[tuple[Family, ImageFileView]]:
    """A file by module, for each family that it fits; only for those that fit its widths, where they tell.

    Raises what reading it raises.
    """
    tensors: dict[str, Array] = dict(files.tensors)
    where = str(files.src)
    grouped = group_tensors(tensors, where)
    fits, why = candidates(grouped, files.metadata, where, files.family)
    return [(fit.family, _look(fit, grouped, files, why)) for fit in _of_width(fits, grouped)]


def _look(fit: Fit, grouped: Grouped, files: Files, why: str) -> ImageFileView:
    adapter = read_adapter(fit, grouped, dict(files.metadata), str(files.src), why)
    modules = tuple(
        Adapted(stem, place_of(stem), module, fit.homes[stem], adapter.deltas[fit.homes[stem]])
        for stem, module in grouped.modules.items()
    )
    unet = fit.family.component == "unet"
    return ImageFileView(fit.family.name, unet, modules, tuple(files.tensors), files.metadata)


_WIDTHS = {"flux": {3072}, "chroma": {3072}, "sd3": {1536, 2432}}
"""How wide the hidden states are of the models that there are of families whose blocks are named alike."""
_QUERY = re.compile(r"(?:.*\.)?transformer_blocks\.\d+\.attn\.to_[qkv]")


def _of_width(fits: list[Fit], grouped: Grouped) -> list[Fit]:
    """The families that are as wide as a file's attention; all of them where none is."""
    seen = {
        module.tensors["down"].shape[1]
        for stem, module in grouped.modules.items()
        if "down" in module.tensors and _QUERY.fullmatch(fits[0].homes[stem].module)
    }
    alike = [fit for fit in fits if seen & _WIDTHS.get(fit.family.name, set())]
    return alike or fits


class Rules(Protocol):
    """What is known of one loader."""

    def failures(self, view: ImageFileView) -> Iterator[str]:
        """Why it loads nothing."""
        ...

    def judge(self, view: ImageFileView, module: Adapted) -> Verdict:
        """What becomes of a module; ``None`` where it is loaded as it is."""
        ...


@dataclass(frozen=True, slots=True)
class ImageReader:
    """A loader of image LoRAs, for ``regraft check --for``."""

    tool: str
    versions: tuple[str, ...]
    basis: str
    to: str
    rules: Rules
    needs_base: bool = False
    """Whether more can be told with the base; the names of these families are known without it."""

    def judge(self, files: Files, version: str) -> Judgement:
        """What it would do."""
        try:
            views = looks(files)
        except RegraftError as error:
            return Judgement(failures=[error.findings[0].message])
        found = [(family, self._judge(view)) for family, view in views]
        worst = max((judged for _, judged in found), key=lambda each: _GRAVITY[each.verdict])
        if len({judged.verdict for _, judged in found}) > 1:
            said = ", ".join(f"{judged.verdict} for {family.title}" for family, judged in found)
            worst.notes.append(
                f"the file alone does not tell which model it is for: {said}; say which with --from"
            )
        return worst

    def _judge(self, view: ImageFileView) -> Judgement:
        judged = Judgement(failures=list(self.rules.failures(view)))
        for module in view.modules:
            verdict = self.rules.judge(view, module)
            judged.add(module.stem, *(verdict or (LOADED, "")))
        return judged


_GRAVITY = {"full": 0, "partial": 1, "wrong-scale": 2, "none": 3, "fails": 4}


# -- diffusers


_ATTENTION = re.compile(r".*\.attn\d?\.(?:to_[qkv]|to_out\.0)")
_BLOCKS = re.compile(r"(?:.*\.)?(?:double_blocks|single_blocks|(?:single_)?transformer_blocks)\..*")


_CONVERTED: dict[str, tuple[str, ...]] = {
    "sd3": (),
    "ltx-video": (r"diffusion_model\.",),
    "lumina2": (r"diffusion_model\.",),
    "wan": (r"diffusion_model\.", r"lora_unet_"),
    "hunyuan-video": (r".*img_attn_qkv",),
    "qwen-image": (r"diffusion_model\.", r"lora_unet_", r".*\.alpha$", r".*default\."),
    "z-image": (r"diffusion_model\.", r"lora_unet_", r".*\.alpha$", r".*default\."),
    "flux2": (
        r"diffusion_model\.",
        r"base_model\.model\.",
        r".*\.lora_down\.weight$",
        r".*\.lokr_",
    ),
    "flux": (r".*\.lora_down\.weight", r".*processor", r".*query_norm\.scale", r".*base_model"),
}
"""Keys of which one is enough for a family's converter to be called (``lora_state_dict`` in ``lora_pipeline.py``)."""
_UNET_KEY = re.compile(r"lora_(?:unet|te[12]?)_")
"""How all keys begin of a file that the converter of UNets is called for."""
_OWN_PREFIX = re.compile(r"(?:unet|transformer|text_encoder(?:_[23])?)\.")


_BEFORE = {
    "qwen-image": ("lora_unet_", "diffusion_model.", ""),
    "z-image": ("lora_unet_", "diffusion_model.", ""),
    "wan": ("lora_unet_", "diffusion_model."),
}
"""What may stand before a name that these families' converters take."""


def _is_left(module: Adapted) -> bool:
    """Whether Wan's converter leaves a module over: it knows Wan's own names, and alphas in blocks."""
    if module.place.flat:
        return False
    outside = not module.home.module.startswith("blocks.")
    return module.home.layout != "wan" or (outside and "alpha" in module.tensors.tensors)


_WAN_BLOCK = [f"{kind}_attn.{x}" for kind in ("self", "cross") for x in "qkvo"]
_WAN_BLOCK += ["ffn.0", "ffn.2"]


def _incomplete_blocks(view: ImageFileView) -> Iterator[str]:
    """Wan's converter of musubi's names takes whole blocks with alphas, and nothing else."""
    has = {m.home.module: m for m in view.modules}
    blocks = {name.split(".")[1] for name in has if name.startswith("blocks.")}
    outside = [m for name, m in has.items() if not name.startswith("blocks.")]
    if outside:
        yield f"IndexError: {outside[0].stem} is in no block"
        return
    wanted = (f"blocks.{n}.{x}" for n in range(len(blocks)) for x in _WAN_BLOCK)
    absent = [x for x in wanted if x not in has or "alpha" not in has[x].tensors.tensors]
    if absent:
        yield f"KeyError: {absent[0]} has no factors, or no alpha, and it takes whole blocks alone"


def _has_out(module: Adapted) -> bool:
    """Whether a module of Z-Image's own names loses its alpha: the converter renames that, and not its lora_A."""
    own = module.home.module.endswith("attention.out") and "lora_A" in module.tensors.spellings
    return own and "alpha" in module.tensors.tensors


def _is_converted(view: ImageFileView) -> bool:
    """Whether diffusers calls a converter; otherwise names are taken as they are."""
    keys = [key for key in view.keys if not key.endswith(".dora_scale")]
    if view.unet:
        return all(map(_UNET_KEY.match, keys))
    patterns = _CONVERTED["flux" if view.family == "chroma" else view.family]
    return any(re.match(pattern, key) for pattern in patterns for key in keys)


def _alpha_by_pattern(view: ImageFileView, module: Adapted) -> float | None:
    """The alpha that PEFT gives a module of a file that no converter takes; ``None`` where it has no alphas.

    All get the most common one. The others are patterns that a name may end in, and the first that does counts.
    """
    if _is_converted(view):
        return None
    own = [m for m in view.modules if m.place.prefix == "transformer."]
    alphas = {
        m.place.module: float(m.tensors.tensors["alpha"].reshape(-1)[0])
        for m in own
        if "alpha" in m.tensors.tensors
    }
    if not alphas:
        return None
    usual = Counter(alphas.values()).most_common(1)[0][0]
    name = f".{module.place.module}"
    fits = (alpha for end, alpha in alphas.items() if alpha != usual and name.endswith(f".{end}"))
    return next(fits, usual)


def _has_own_name(view: ImageFileView, module: Adapted) -> bool:
    """Whether the name of a module is diffusers' when what stands before it is taken away."""
    family = family_named(view.family)
    names = None if family is None else names_of(family, "diffusers")
    found = None if names is None else names.find(module.place.module, flat=module.place.flat)
    return found is not None and found.path == module.place.module


def _rename_prefix(view: ImageFileView) -> Iterator[str]:
    """LTX-Video's converter puts ``transformer.`` in the place of ``diffusion_model.``, and does nothing else."""
    strange = [key for key in view.keys if not key.startswith("diffusion_model.")]
    alphas = [key for key in view.keys if "lora" not in key and not key.endswith(".dora_scale")]
    if strange:
        yield f"ValueError: {strange[0]} does not begin with diffusion_model. as others do"
    elif alphas:
        yield f"ValueError: not all names contain 'lora', because it has {alphas[0]}"
    elif not view.any(lambda m: _has_own_name(view, m)):
        yield f"NoMatchingPeftModuleError: {view.modules[0].stem} is renamed to what the model has not"


_LUMINA_ROWS = 2304 + 768 + 768
"""Of the fused projection of queries, keys and values that Lumina2's converter splits."""
_LUMINA_BLOCKS = ("noise_refiner", "context_refiner", "layers")
_LUMINA_BLOCK = ("attention.qkv", "attention.out", *(f"feed_forward.w{n}" for n in (1, 2, 3)))


def _take_blocks(view: ImageFileView) -> Iterator[str]:
    """Lumina2's converter takes whole blocks of Lumina2's own names with lora_A and lora_B, and nothing else."""
    strange = [m for m in view.modules if m.place.prefix != "diffusion_model."]
    has = {m.place.module: m for m in view.modules if "lora_A" in m.tensors.spellings}
    wanted = []
    for start in _LUMINA_BLOCKS:
        count = len({x.split(".")[1] for x in has if x.startswith(f"{start}.")})
        leaves = _LUMINA_BLOCK + ("adaLN_modulation.1",) * (start != "context_refiner")
        wanted += [f"{start}.{n}.{leaf}" for n in range(count) for leaf in leaves]
    fused = [has[x] for x in wanted if x in has and x.endswith(".qkv")]
    left = [m for m in view.modules if m.place.module not in wanted or "alpha" in m.tensors.tensors]
    if strange:
        yield f"KeyError: the first 16 letters of {strange[0].stem} are taken away, as of others"
    elif absent := [x for x in wanted if x not in has]:
        yield f"KeyError: {absent[0]} has no factors, and it takes whole blocks alone"
    elif odd := [m for m in fused if m.tensors.tensors["up"].shape[0] != _LUMINA_ROWS]:
        yield f"RuntimeError: the fused attention of {odd[0].stem} has not the {_LUMINA_ROWS} rows that are split"
    elif left:
        yield f"ValueError: {left[0].stem} is left over"


def _split_factors(view: ImageFileView) -> Iterator[str]:
    """HunyuanVideo's converter treats A as it treats B where it splits the refiner's attention, or swaps halves."""
    if any(key.endswith(".alpha") for key in view.keys):
        yield "IndexError: alpha has no dims to divide"
    for module in view.modules:
        name = module.place.module
        if name.startswith("txt_in.") and name.endswith("self_attn_qkv"):
            yield f"RuntimeError: A of {module.stem} is split in three, and not only its B"
            return
        if name == _LAST_SWAPPED and module.delta.algebra == LORA and _rank(module) < 2:
            yield f"ValueError: the halves of A of {module.stem} are exchanged, and it has one row"


def _rank(module: Adapted) -> int:
    return int(module.tensors.tensors["down"].shape[0])


_LAST_SWAPPED = "final_layer.adaLN_modulation.1"
"""The last modulation, of which diffusers has the halves of its rows the other way round."""
_CONVERTERS: dict[str, Callable[[ImageFileView], Iterator[str]]] = {
    "ltx-video": _rename_prefix,
    "lumina2": _take_blocks,
    "hunyuan-video": _split_factors,
}
"""What a family's converter cannot take, once it is called."""


_KOHYA_FLUX = ("lora_unet_", "lora_te", "lora_transformer_", "transformer.", "diffusion_model.")
"""What stands before names that the converter of FLUX's files with ``lora_down`` knows."""


class DiffusersRules:
    """diffusers 0.42.1, ``load_lora_weights``."""

    def failures(self, view: ImageFileView) -> Iterator[str]:
        """Exceptions."""
        if not _is_converted(view):
            yield from self._unconverted(view)
            return
        if view.family in _BEFORE:
            yield from self._half_converted(view)
        odd = [
            m
            for m in view.modules
            if m.delta.algebra not in (LORA, SET) or "mid" in m.delta.tensors
        ]
        kohya = "lora_down" in view.spellings or any(m.place.flat for m in view.modules)
        lokr = odd and all(m.delta.algebra == LOKR for m in odd)
        if odd and view.unet and kohya:
            yield f"ValueError: keys of {odd[0].delta.name} are not renamed"
        elif (
            odd
            and not all("lora" in key for key in view.keys)
            and not (lokr and view.family in ("flux2", "z-image"))
        ):
            yield f"ValueError: not all names contain 'lora', because it has {odd[0].delta.name}"
        if view.family in _CONVERTERS:
            yield from _CONVERTERS[view.family](view)
        if view.family in ("flux", "chroma"):
            yield from self._flux(view)
        if view.family == "flux2":
            yield from self._flux2(view)

    @staticmethod
    def _unconverted(view: ImageFileView) -> Iterator[str]:
        """Exceptions where names are taken as they are."""
        alone = [key for key in view.keys if "lora" not in key and not key.endswith(".dora_scale")]
        if view.family in (
            "flux",
            "chroma",
        ):  # alphas are taken out, and one name with lora in it is enough
            alone = [] if any("lora" in key for key in view.keys) else alone
        if alone:
            yield f"ValueError: not all names contain 'lora', because it has {alone[0]}"
        elif any(".lora_linear_layer." in key and ".self_attn." not in key for key in view.keys):
            yield "IndexError: lora_linear_layer is known of text encoders alone"

    @staticmethod
    def _half_converted(view: ImageFileView) -> Iterator[str]:
        """Exceptions of the converters that put ``transformer.`` before whatever they are given."""
        strange = [m for m in view.modules if m.place.prefix not in _BEFORE[view.family]]
        if len(strange) == len(view.modules):
            yield f"NoMatchingPeftModuleError: {strange[0].stem} is renamed to what the model has not"
        elif view.family == "wan" and (left := [m for m in view.modules if _is_left(m)]):
            yield f"ValueError: {left[0].stem} is left over"
        elif view.family == "wan" and strange == [] and view.modules[0].place.flat:
            yield from _incomplete_blocks(view)
        elif "lora.down" in view.spellings:
            yield "ValueError: names with .lora.down are left over"
        elif view.family == "z-image" and (left := [m for m in view.modules if _has_out(m)]):
            yield f"ValueError: the alpha of {left[0].stem} is left over, because its factors are not renamed"

    @staticmethod
    def _flux(view: ImageFileView) -> Iterator[str]:
        stems = {m.home.module for m in view.modules}
        rows = [m for m in view.modules if m.home.layout == "bfl"]
        if any(m.home.key.endswith(".scale") for m in view.modules):
            if "guidance_in.in_layer" not in stems or "double_blocks.18.img_mod.lin" not in stems:
                yield "KeyError: it is read as a control adapter, which has every module of the model"
        elif "lora_down" in view.spellings and not any(
            m.place.prefix.startswith(_KOHYA_FLUX) for m in view.modules
        ):
            yield "ValueError: its converter finds no name that it knows"
        elif (
            any(
                m.place.prefix == "diffusion_model." and m.home.layout == "diffusers"
                for m in view.modules
            )
            and "lora_down" in view.spellings
        ):
            yield "ValueError: diffusers' names with diffusion_model. are left over"
        elif any(m.place.prefix.startswith("base_model.model.") for m in view.modules) and not rows:
            yield "KeyError: names with base_model are to be those of FLUX's own code"
        elif any(m.place.prefix.startswith("base_model.model.") for m in rows):
            if any(_BLOCKS.fullmatch(m.home.module) is None for m in rows):
                yield "ValueError: img_in and others are left over, which a Kontext adapter of fal has not"
            elif "double_blocks.18.img_mod.lin" not in stems:
                yield "KeyError: it is read as an adapter that has every module of all blocks"
        if any(
            m.place.prefix == "lora_transformer_"
            and _BLOCKS.fullmatch(m.home.module)
            and ".attn." not in m.home.module
            for m in view.modules
        ):
            yield "KeyError: its converter knows the attention of lora_transformer_ blocks, and nothing else in them"
        for prefix in ("lora_unet_", "lora_transformer_"):
            if any(m.stem.startswith(f"{prefix}distilled_guidance_layer") for m in view.modules):
                yield "ValueError: Chroma's distilled_guidance_layer is left over"

    @staticmethod
    def _flux2(view: ImageFileView) -> Iterator[str]:
        if "lora_down" in view.spellings:
            return
        lokr = any(".lokr_" in key for key in view.keys)
        dotted = ("diffusion_model.", "base_model.model.")
        left = [
            m
            for m in view.modules
            if m.place.prefix not in dotted
            or (
                m.home.layout == "diffusers"
                and not lokr
                and _BLOCKS.fullmatch(m.home.module) is None
            )
            or ("alpha" in m.tensors.tensors and not lokr)
        ]
        if lokr:
            left = [m for m in left if m.place.prefix != "lycoris_" or m.home.layout != "bfl"]
        if left:
            yield f"ValueError: {left[0].stem} is left over"

    def judge(self, view: ImageFileView, module: Adapted) -> Verdict:
        """What becomes of a module."""
        if not _is_converted(view) and _OWN_PREFIX.match(module.stem) is None:
            own = "unet." if view.unet else "transformer."
            return IGNORED, f"its name does not begin with {own!r}, and no converter takes it"
        if view.family in ("flux", "chroma"):
            verdict = self._judge_flux(view, module)
            if verdict is not None:
                return verdict
        if view.family == "flux2" and (verdict := self._judge_flux2(view, module)) is not None:
            return verdict
        if view.family == "ltx-video" and not _has_own_name(view, module):
            return IGNORED, "its converter renames what stands before names, and not names"
        if view.family == "hunyuan-video" and module.place.module == _LAST_SWAPPED:
            return WRONG_VALUES, "the halves of its A are exchanged, and not only those of its B"
        if view.family == "z-image" and (verdict := self._judge_z_image(module)) is not None:
            return verdict
        if view.unet:
            verdict = self._judge_unet(view, module)
            if verdict is not None:
                return verdict
        if view.family == "wan" and module.home.module.endswith(
            ("k_img", "v_img", "add_k_proj", "add_v_proj")
        ):
            ends = {m.home.module.rpartition(".")[2] for m in view.modules}
            if not ({"k_img", "v_img"} <= ends or {"add_k_proj", "add_v_proj"} <= ends):
                return (
                    IGNORED,
                    "it is overwritten with zeros, because only one of add_k_proj and add_v_proj is there",
                )
        if "dora_scale" in module.tensors.tensors:
            return WRONG_VALUES, "dora_scale is left out, and the rest is loaded as plain LoRA"
        if module.delta.algebra in (FULL, NOTHING):
            return IGNORED, "deltas of norms and biases are left out"
        return None

    @staticmethod
    def _judge_flux(view: ImageFileView, module: Adapted) -> Verdict:
        inside = _BLOCKS.fullmatch(module.home.module) is not None
        text = module.home.component != DENOISER
        if text:
            return None
        if module.place.flat and module.delta.algebra != LORA:
            return (
                IGNORED,
                f"its converter takes plain LoRA only, and this is {module.delta.algebra}",
            )
        if module.place.flat and not inside:
            return IGNORED, "its name loses 'transformer.', and is then filtered out"
        plain = "xlabs" not in module.tensors.spellings and not view.any(
            lambda m: m.home.key.endswith(".scale") or m.place.prefix.startswith("base_model")
        )
        if module.home.layout == "bfl" and not module.place.flat and plain:
            return IGNORED, "no converter knows FLUX's own names with lora_A and lora_B"
        scale = module.delta.scale.value if module.delta.algebra == LORA else 1.0
        if "lora_down" in view.spellings and module.place.prefix == "transformer." and scale != 1.0:
            return (
                WRONG_SCALE,
                "its alpha is left out, because its names have transformer. before them",
            )
        alpha = _alpha_by_pattern(view, module)
        if alpha is not None and alpha != module.delta.scale.alpha:
            return (
                WRONG_SCALE,
                f"it gets alpha {alpha:g}, because alphas are looked up by how names end",
            )
        if module.home.module == "final_layer.adaLN_modulation.1" and not module.place.flat:
            return WRONG_VALUES, "the halves of its A are exchanged, and not only those of its B"
        return None

    @staticmethod
    def _judge_z_image(module: Adapted) -> Verdict:
        name = module.home.module
        if name.startswith(("x_embedder", "final_layer")):
            return IGNORED, "no converter knows Z-Image's own names of its first and last layer"
        if (
            name.endswith(("attention.qkv", "attention.out"))
            and "lora_A" in module.tensors.spellings
        ):
            return IGNORED, "Z-Image's own names of attention are converted with lora_down alone"
        return None

    @staticmethod
    def _judge_flux2(view: ImageFileView, module: Adapted) -> Verdict:
        name = module.home.module
        if "lora_down" in view.spellings:
            if module.place.prefix != "lora_unet_" or module.home.layout != "bfl":
                return IGNORED, "with lora_down, only lora_unet_ and FLUX.2's own names are known"
            if name.startswith("guidance_in.") or "modulation" in name.casefold():
                return IGNORED, "its converter of kohya's names does not know this module"
        elif name == "final_layer.adaLN_modulation.1":
            return WRONG_VALUES, "the halves of its A are exchanged, and not only those of its B"
        elif f"{module.stem}.lora_A.default.weight" in view.keys:
            return IGNORED, "names with .default. are not known of FLUX.2"
        return None

    @staticmethod
    def _judge_unet(view: ImageFileView, module: Adapted) -> Verdict:
        names = {m.home.layout for m in view.modules if m.home.component == DENOISER}
        if module.place.flat and module.home.layout == "ldm" and "diffusers" in names:
            return (
                IGNORED,
                "the file has names of both kinds, and those of input_blocks are deleted",
            )
        if module.place.flat and _ATTENTION.fullmatch(module.home.module):
            alphas = Counter(m.delta.scale.alpha for m in view.modules if m.delta.algebra == LORA)
            usual = alphas.most_common(1)[0][0] if alphas else None
            if usual is not None and module.delta.scale.alpha != usual:
                return (
                    WRONG_SCALE,
                    f"it gets the most common alpha, {usual:g}, because its own is looked up by another name",
                )
        return None


# -- ComfyUI


class ComfyRules:
    """ComfyUI, ``load_lora_for_models``."""

    def failures(self, view: ImageFileView) -> Iterator[str]:
        """It logs what it does not know, and goes on."""
        return iter(())

    def judge(self, view: ImageFileView, module: Adapted) -> Verdict:
        """What becomes of a module."""
        prefix, delta = module.place.prefix, module.delta
        denoiser = module.home.component == DENOISER
        if prefix.startswith("base_model.model."):
            return IGNORED, "no key begins with base_model.model."
        if denoiser and prefix == "unet." and _ATTENTION.fullmatch(module.home.module):
            return IGNORED, "attention is not known with 'unet.' and diffusers' names"
        if denoiser and prefix == "transformer." and view.family == "wan":
            return IGNORED, "Wan's modules are known by their own names only"
        if (
            denoiser
            and not prefix
            and module.home.layout not in ("diffusers",)
            and "xlabs" not in module.tensors.spellings
            and not view.any(lambda m: m.home.key.endswith(".scale"))
        ):
            return IGNORED, "names without 'diffusion_model.' are not known"
        if delta.algebra == IA3:
            return IGNORED, "it does not read IA3"
        if delta.algebra == OFT_V2:
            return IGNORED, "it does not read OneTrainer's OFT"
        if delta.algebra in (OFT, BOFT) and (delta.alpha or "rescale" in delta.tensors):
            return (
                WRONG_VALUES,
                "rescale is ignored, and the constraint is taken for another number",
            )
        if delta.magnitude is not None and not delta.magnitude_in:
            return (
                WRONG_VALUES,
                "DoRA on the out axis is divided by the lengths of the base's rows, and not of the sum's",
            )
        if {"lokr_t2", "lokr_w1_a"} <= set(delta.tensors):
            return (
                IGNORED,
                "LoKr with Tucker and a decomposed w1 is an error in its log, and the module stays as it is",
            )
        own = "alpha" in module.tensors.tensors
        if delta.algebra in (LORA, LOHA) and not own and delta.scale.value != 1.0:
            return WRONG_SCALE, "it reads no metadata, and alpha stands only there"
        return None


# -- sd-scripts


class KohyaRules:
    """sd-scripts, ``networks.lora*`` and ``--network_weights``."""

    def failures(self, view: ImageFileView) -> Iterator[str]:
        """It ignores what it does not know."""
        return iter(())

    def judge(self, view: ImageFileView, module: Adapted) -> Verdict:
        """What becomes of a module."""
        prefix = module.place.prefix
        if not module.place.flat or prefix in ("lycoris_", "lora_transformer_"):
            return IGNORED, "names begin with lora_unet_ or lora_te there, and have no dots"
        if "lora_down" not in module.tensors.spellings:
            return (
                IGNORED,
                f"networks.lora takes plain LoRA only, and this is {module.delta.algebra}",
            )
        if "mid" in module.delta.tensors:
            return FAILS, "networks.lora has no lora_mid"
        if module.delta.magnitude is not None:
            return WRONG_VALUES, "dora_scale is left out, and the rest is loaded as plain LoRA"
        wanted = {"sd15": "diffusers", "sd2": "diffusers"}.get(view.family)
        if module.home.component == DENOISER and wanted and module.home.layout != wanted:
            return IGNORED, "modules of Stable Diffusion 1 and 2 have diffusers' names there"
        return None


DIFFUSERS_READER = ImageReader(
    "diffusers", ("0.42.1",), "its functions, run", "diffusers", DiffusersRules()
)
COMFYUI_READER = ImageReader("comfyui", ("2025.10.12",), "its source", "comfyui", ComfyRules())
KOHYA_READER = ImageReader("kohya", ("2026.2.16",), "its source", "kohya", KohyaRules())
READERS = {each.tool: (each,) for each in (DIFFUSERS_READER, COMFYUI_READER, KOHYA_READER)}
