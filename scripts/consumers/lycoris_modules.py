"""Compare what LyCORIS' own modules add to a weight with what regraft makes of the files that hold them.

    python scripts/consumers/lycoris_modules.py

Every algorithm of LyCORIS, in all its forms, is built by its own code on a linear, on convolutions and on a norm of a
tiny Stable Diffusion 1.5, in float64. What a module adds is read off its forward, by inputs of which each is one at
one place: its merge is no measure, it multiplies LoHa and LoKr by alpha / rank twice. The module's tensors go into a
file of kohya's names; the base with that file merged into it, and with what the file becomes for every target, must
be what forward makes of it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers_loras import MODELS
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule

import regraft
from regraft.storage.safetensors import open_tensors, write_tensors

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WIDE = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
CONV = "mid_block.resnets.0.conv1"
POINT = "mid_block.attentions.0.proj_in"
NORM = "mid_block.resnets.0.norm1"
TARGETS = ("kohya", "diffusers", "comfyui", "ai-toolkit")

DORA = (
    {"weight_decompose": True, "wd_on_out": True},
    {"weight_decompose": True, "wd_on_out": False},
)
LOKR = (
    {"decompose_both": True, "lora_dim": 1, "factor": 4},
    {"factor": 2},
    {"full_matrix": True},
    {"lora_dim": 10000},
    {"factor": 2, "unbalanced_factorization": True},
)
ALGORITHMS: tuple[tuple[str, Any, tuple[dict[str, Any], ...], tuple[str, ...]], ...] = (
    (
        "LoCon",
        LoConModule,
        ({}, {"use_tucker": True}, {"rs_lora": True}, {"use_scalar": True}, *DORA),
        (LINEAR, WIDE, CONV, POINT),
    ),
    (
        "LoHa",
        LohaModule,
        ({}, {"use_tucker": True}, {"rs_lora": True}, {"use_scalar": True}, *DORA),
        (LINEAR, WIDE, CONV, POINT),
    ),
    (
        "LoKr",
        LokrModule,
        (*LOKR, *({**x, "use_tucker": True} for x in LOKR[:2]), *({**LOKR[1], **x} for x in DORA)),
        (LINEAR, WIDE, CONV, POINT),
    ),
    # Not with rs_lora: forward divides by the root of the rank then, and the file's alpha does not say it.
    ("GLoRA", GLoRAModule, ({},), (LINEAR, WIDE)),
    (
        "diag-OFT",
        DiagOFTModule,
        ({}, {"constraint": 1e-3}, {"rescaled": True}),
        (LINEAR, WIDE, CONV, POINT),
    ),
    (
        "BOFT",
        ButterflyOFTModule,
        ({}, {"constraint": 1e-3}, {"rescaled": True}),
        (LINEAR, WIDE, CONV, POINT),
    ),
    ("IA3", IA3Module, ({}, {"train_on_input": True}), (LINEAR, WIDE, CONV, POINT)),
    ("full", FullModule, ({},), (LINEAR, WIDE, CONV, POINT)),
    ("norm", NormModule, ({},), (NORM,)),
)


def cases() -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    """What is tried: its name, the class, its options and the module that it is for."""
    for name, cls, forms, modules in ALGORITHMS:
        for form in forms:
            for module in modules:
                said = ", ".join(f"{k}={v}" for k, v in form.items())
                kind = module.rpartition(".")[2]
                yield f"{name} of {kind}" + (f" ({said})" if said else ""), cls, form, module


def random_module(cls: Any, form: dict[str, Any], module: torch.nn.Module, stem: str) -> Any:
    """A module of LyCORIS with random numbers everywhere."""
    made = cls(stem, module, **{"lora_dim": 2, "alpha": 3, **form})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        for name, parameter in made.named_parameters():
            if name in ("dora_scale", "rescale"):
                parameter.copy_(1 + parameter.abs())
    return made


def effective(
    module: torch.nn.Module, weight: torch.Tensor, has_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and the bias that a module's forward has; ``weight`` is one of the same shape and type."""
    if weight.ndim == 1:
        x = torch.randn(2, len(weight), 4, 4)
        plain = torch.nn.functional.group_norm(x, module.num_groups, eps=module.eps)
        made = module(x)
        rows = [
            torch.linalg.lstsq(
                torch.stack([a.reshape(-1), torch.ones(a.numel())], 1), b.reshape(-1)
            ).solution
            for a, b in zip(plain.transpose(0, 1), made.transpose(0, 1), strict=True)
        ]
        scale, shift = torch.stack(rows).T
        return scale, shift
    units = torch.eye(weight[0].numel(), dtype=weight.dtype).reshape(-1, *weight.shape[1:])
    bias = module(torch.zeros_like(units[:1])).reshape(-1)
    columns = module(units).reshape(len(units), -1) - bias
    return columns.T.reshape(weight.shape), bias if has_bias else None


def unet() -> torch.nn.Module:
    """A tiny Stable Diffusion 1.5."""
    torch.manual_seed(0)
    _, _, kind, config = MODELS["sd15"]
    return kind(**config).double()


def merged(base: Path, lora: Path, out: Path) -> dict[str, np.ndarray]:
    """The base with a file merged into it."""
    regraft.merge(base, [lora], out, source="sd15", overwrite=True)
    return dict(open_tensors(out))


def check(
    label: str, cls: Any, form: dict[str, Any], key: str, folder: Path, counts: dict[str, int]
) -> list[str]:
    """What is wrong with one module."""
    model = unet()
    state = {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}
    base = folder / "base.safetensors"
    write_tensors(base, state, {})
    module = model.get_submodule(key)
    if key == CONV:
        module.padding = (0, 0)  # so that an input as large as the kernel has one output
    stem = f"lora_unet_{key.replace('.', '_')}"
    lycoris = random_module(cls, form, module, stem)
    lycoris.apply_to()
    # Only now: a FullModule has its delta as the difference from the weight that it takes the place of.
    tensors = {
        f"{stem}.{name}": np.array(x.detach().numpy()) for name, x in lycoris.state_dict().items()
    }
    narrow = cls in (DiagOFTModule, ButterflyOFTModule)  # which compute in float32
    with torch.no_grad():
        if narrow:
            lycoris.float()
            module.float()
            torch.set_default_dtype(torch.float32)
        like = torch.from_numpy(state[f"{key}.weight"]).to(torch.get_default_dtype())
        weight, bias = effective(module, like, f"{key}.bias" in state)
        torch.set_default_dtype(torch.float64)
    want = {f"{key}.weight": weight.double().numpy()}
    if bias is not None:
        want[f"{key}.bias"] = bias.double().numpy()
    src = folder / "lycoris.safetensors"
    write_tensors(src, tensors, {"ss_network_module": "lycoris.kohya"})
    wrong = different(
        f"{label}: merged", merged(base, src, folder / "out.safetensors"), state, want
    )
    for to in TARGETS:
        made = folder / "made.safetensors"
        try:
            regraft.convert(src, made, to=to, source="sd15", overwrite=True)
            counts["as it is"] += 1
        except regraft.RefusedError:
            try:
                regraft.convert(
                    src, made, to=to, source="sd15", model=base, via="dense", overwrite=True
                )
                counts["dense"] += 1
            except regraft.RefusedError:
                counts["refused"] += 1
                continue
        wrong += different(
            f"{label}: {to}", merged(base, made, folder / "out.safetensors"), state, want
        )
    return wrong


def different(
    label: str, got: dict[str, np.ndarray], base: dict[str, np.ndarray], want: dict[str, np.ndarray]
) -> list[str]:
    """Where the merged base is not what forward has."""
    wrong = []
    for name, before in base.items():
        delta = want.get(name, before) - before
        off = np.abs(got[name] - before - delta).max()
        if off > 2e-6 * max(np.abs(delta).max(), np.abs(before).max()):
            wrong.append(f"{label}: {name} is off by {off:.3g} of {np.abs(delta).max():.3g}")
    return wrong


def main() -> int:
    """Check every algorithm."""
    torch.set_default_dtype(torch.float64)
    wrong: list[str] = []
    tried = list(cases())
    counts = {"as it is": 0, "dense": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as folder:
        for label, *case in tried:
            wrong += check(label, *case, Path(folder), counts)
    print(
        f"{len(tried)} modules; conversions: {counts}; {len(wrong)} wrong; diffusers {diffusers.__version__}"
    )
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
