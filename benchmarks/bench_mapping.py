"""Live models: what a mapping costs, and state dicts of 46 000 tensors.

A ViT of 2890 layers, so that every parameter has a new name, in a plain module; and the experts of a DeepSeek-V3.
Models are on the meta device, tensors are small: the work for each tensor counts, and not the moving of large ones.
"""

from __future__ import annotations

from measure import Contender, Goal, alternate, parse_arguments, report, use_one_thread

use_one_thread()

import statistics  # noqa: E402
from collections.abc import Iterable  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from bench_plan import (  # noqa: E402
    ParsedHeaders,
    TransformersPlanner,
    make_headers,
    make_model_config,
)
from transformers import DeepseekV3ForCausalLM, ViTConfig, ViTForImageClassification  # noqa: E402

import regraft  # noqa: E402

LAYERS = 2890
HIDDEN = 8
MOST_BEYOND = 0.050
"""Seconds that a mapping may take beyond a walk over the modules."""

Tensors = dict[str, Any]


class Holder(torch.nn.Module):
    """A plain module around a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model


def make_vit() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=HIDDEN,
        image_size=8,
        patch_size=4,
    )
    with torch.device("meta"):
        return ViTForImageClassification(config)


def make_tensors(names: Iterable[tuple[str, tuple[int, ...]]]) -> Tensors:
    return {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in names}


def copy(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def check_fits(model: torch.nn.Module, made: Tensors) -> None:
    """The result has the names and shapes of the model; otherwise the times mean little."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in made.items()} != wanted:
        raise SystemExit("the converted state dict does not fit the model")


def main() -> None:
    arguments = parse_arguments(str(__doc__).splitlines()[0], rounds=11)
    torch.set_num_threads(1)
    vit = make_vit()
    holder = Holder(vit)
    planner = TransformersPlanner(vit)
    new = make_tensors((name, tuple(tensor.shape)) for name, tensor in vit.state_dict().items())
    old = dict(regraft.convert_state_dict(new, to="transformers-v4", model=vit))
    key = f"vit.encoder.layer.{LAYERS - 1}.attention.attention.query.weight"
    renamed = regraft.mapping(holder).rename(key)
    if renamed != f"model.vit.layers.{LAYERS - 1}.attention.q_proj.weight":
        raise SystemExit(f"{key} became {renamed}")
    check_fits(holder, regraft.convert_state_dict(old, to=holder))
    if planner.plan(list(old)).keys() != new.keys():
        raise SystemExit("transformers makes other names")
    seconds = alternate(
        [
            Contender("named_modules", lambda: sum(1 for _ in holder.named_modules())),
            Contender("mapping", lambda: regraft.mapping(holder)),
            Contender("mapping, rename", lambda: regraft.mapping(holder).rename(key)),
            Contender("convert_state_dict", lambda: regraft.convert_state_dict(old, to=holder)),
            Contender("clone", lambda: copy(old)),
            Contender("state_dict()", holder.state_dict),
            Contender("transformers, names", lambda: planner.plan(list(old))),
        ],
        arguments.rounds,
    )
    walk, whole = (statistics.median(seconds[name]) for name in ("named_modules", "mapping"))
    verdict = "reached" if whole - walk <= MOST_BEYOND else "missed"
    facts = {
        "tensors": len(old),
        "modules": sum(1 for _ in holder.named_modules()),
        "mapping beyond named_modules": f"{1000 * (whole - walk):.1f} ms (goal: at most "
        f"{1000 * MOST_BEYOND:.0f} ms, {verdict})",
    }
    goals = [Goal("transformers, names", "convert_state_dict", at_least=1)]
    report("A ViT of many layers in a plain module", seconds, goals, facts, arguments.json)

    parsed: ParsedHeaders = make_headers()
    with torch.device("meta"):
        deepseek = DeepseekV3ForCausalLM(make_model_config())
    experts = TransformersPlanner(deepseek)
    source = make_tensors(zip(parsed.names, parsed.shapes, strict=True))
    check_fits(deepseek, regraft.convert_state_dict(source, to=deepseek))
    seconds = alternate(
        [
            Contender(
                "convert_state_dict", lambda: regraft.convert_state_dict(source, to=deepseek)
            ),
            Contender("clone", lambda: copy(source)),
            Contender("transformers, names", lambda: experts.plan(parsed.names)),
        ],
        arguments.rounds,
    )
    facts = {"tensors": f"{len(source)}, which become {len(deepseek.state_dict())}"}
    print()
    report("Experts that are stacked", seconds, goals, facts, None)


if __name__ == "__main__":
    main()
