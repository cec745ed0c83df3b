"""Planning the 45395 keys of a DeepSeek-V3 checkpoint: regraft, and the loop of transformers.

Headers are parsed already, and neither side touches a tensor. The keys come in a random order.
"""

from __future__ import annotations

from measure import Contender, Goal, alternate, parse_arguments, report, use_one_thread

use_one_thread()

import random  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from concurrent.futures import Future  # noqa: E402
from copy import deepcopy  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel  # noqa: E402
from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: E402
from transformers.core_model_loading import (  # noqa: E402
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from regraft.layouts.graph import edges_to  # noqa: E402
from regraft.names.keys import group_names  # noqa: E402
from regraft.planning.build import build_plan  # noqa: E402
from regraft.planning.model import ModelConfig  # noqa: E402
from regraft.planning.plan import Headers, Plan  # noqa: E402
from regraft.rules.book import library  # noqa: E402

LAYERS, DENSE_LAYERS, EXPERTS = 61, 3, 256
HIDDEN, INTERMEDIATE, MOE_INTERMEDIATE = 32, 48, 24
HEADS, NOPE_DIM, ROPE_DIM, VALUE_DIM = 4, 8, 8, 8
Q_RANK, KV_RANK = 16, 16
VOCABULARY = 64

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ParsedHeaders:
    """The names of a checkpoint with their shapes and dtypes, as a reader gives them."""

    names: list[str]
    shapes: list[Shape]
    dtypes: list[str]


def make_headers() -> ParsedHeaders:
    """The names of transformers 4, shuffled."""
    found = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    every_layer: dict[str, Shape] = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_a_proj": (Q_RANK, HIDDEN),
        "self_attn.q_a_layernorm": (Q_RANK,),
        "self_attn.q_b_proj": (HEADS * (NOPE_DIM + ROPE_DIM), Q_RANK),
        "self_attn.kv_a_proj_with_mqa": (KV_RANK + ROPE_DIM, HIDDEN),
        "self_attn.kv_a_layernorm": (KV_RANK,),
        "self_attn.kv_b_proj": (HEADS * (NOPE_DIM + VALUE_DIM), KV_RANK),
        "self_attn.o_proj": (HIDDEN, HEADS * VALUE_DIM),
    }
    for layer in range(LAYERS):
        here = f"model.layers.{layer}"
        for name, shape in every_layer.items():
            found[f"{here}.{name}.weight"] = shape
        if layer < DENSE_LAYERS:
            found |= mlp(f"{here}.mlp", INTERMEDIATE)
            continue
        found[f"{here}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        found[f"{here}.mlp.gate.e_score_correction_bias"] = (EXPERTS,)
        found |= mlp(f"{here}.mlp.shared_experts", MOE_INTERMEDIATE)
        for expert in range(EXPERTS):
            found |= mlp(f"{here}.mlp.experts.{expert}", MOE_INTERMEDIATE)
    names = list(found)
    random.Random(0).shuffle(names)
    return ParsedHeaders(names, [found[name] for name in names], ["BF16"] * len(names))


def mlp(path: str, size: int) -> dict[str, Shape]:
    return {
        f"{path}.{name}.weight": (HIDDEN, size) if name == "down_proj" else (size, HIDDEN)
        for name in PROJECTIONS
    }


def make_model_config() -> DeepseekV3Config:
    return DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=MOE_INTERMEDIATE,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=DENSE_LAYERS,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=Q_RANK,
        kv_lora_rank=KV_RANK,
        qk_nope_head_dim=NOPE_DIM,
        qk_rope_head_dim=ROPE_DIM,
        v_head_dim=VALUE_DIM,
    )


def plan_with_regraft(parsed: ParsedHeaders, model: ModelConfig) -> Plan:
    """Group the names, match the rules, check every key and shape, and place every tensor."""
    books = [book for book in library() if book.name == "deepseek_v3"]
    return build_plan(
        Headers(group_names(parsed.names), parsed.shapes, parsed.dtypes),
        edges_to(books, "transformers-v5"),
        scopes={book.name: model.scope_of(book.model_types) for book in books},
    )


class TransformersPlanner:
    """What transformers does for each key before it loads a tensor; preparations are not timed.

    Left out, in its favour: dtypes, devices, quantisation, sharding, and starting to read.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self.prefix = model.base_model_prefix
        self.renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        self.converters = [item for item in mapping if isinstance(item, WeightConverter)]
        self.converter_of = {
            pattern: item for item in self.converters for pattern in item.source_patterns
        }
        self.expected = model.state_dict()

    def plan(self, names: list[str]) -> dict[str, WeightRenaming | WeightConverter]:
        """The transform that makes each tensor of the model, with its sources collected."""
        transforms: dict[str, WeightRenaming | WeightConverter] = {}
        unread: Future[Any] = Future()
        for name in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(
                name, self.renamings, self.converters, self.prefix, self.expected
            )
            if target not in self.expected:
                raise SystemExit(f"transformers has no place for {name}")
            fresh = (
                WeightRenaming(name, target)
                if pattern is None
                else deepcopy(self.converter_of[pattern])
            )
            transform = transforms.setdefault(target, fresh)
            transform.add_tensor(target, name, pattern or name, unread)
        return transforms


def sources_of_plan(plan: Plan, names: list[str]) -> dict[str, set[str]]:
    """Which names each tensor of the result is made of."""
    sources: dict[str, set[str]] = {}
    for entry in plan.entries:
        for term in entry.written:
            for row, key in enumerate(entry.keys(term).names()):
                ids = [number for part in entry.sources for number in part[row].reshape(-1)]
                sources[key] = {names[number] for number in ids}
    for carried in plan.carried:
        rows = zip(carried.group.names(), carried.group.ids.tolist(), strict=True)
        sources.update((key, {names[number]}) for key, number in rows)
    return sources


def check_same(
    plan: Plan, transforms: dict[str, WeightRenaming | WeightConverter], names: list[str]
) -> None:
    """Both plans make the same tensors of the same sources; otherwise the times mean little."""
    theirs: dict[str, set[str]] = {}
    for transform in transforms.values():
        for target, sources in transform.layer_targets.items():
            theirs.setdefault(target, set()).update(sources)
    ours = sources_of_plan(plan, names)
    if ours != theirs:
        odd = [key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)]
        raise SystemExit(f"the plans differ in {len(odd)} tensors: {sorted(odd)[:4]}")


def main() -> None:
    arguments = parse_arguments(str(__doc__).splitlines()[0], rounds=11)
    torch.set_num_threads(1)
    parsed = make_headers()
    config = make_model_config()
    model = ModelConfig(config.to_dict(), "memory")
    with torch.device("meta"):
        planner = TransformersPlanner(DeepseekV3ForCausalLM(config))

    start = time.perf_counter()
    plan = plan_with_regraft(parsed, model)
    first = time.perf_counter() - start
    check_same(plan, planner.plan(parsed.names), parsed.names)
    seconds = alternate(
        [
            Contender("regraft", lambda: plan_with_regraft(parsed, model)),
            Contender("transformers", lambda: planner.plan(parsed.names)),
        ],
        arguments.rounds,
    )
    facts = {
        "keys": len(parsed.names),
        "first plan of the process (rule books are read)": f"{1000 * first:.0f} ms",
        "results": "the same tensors of the same sources",
    }
    for name, values in seconds.items():
        rate = len(parsed.names) / statistics.median(values)
        facts[f"keys per second, {name}"] = f"{rate:,.0f}"
    goals = [Goal("transformers", "regraft", at_least=25)]
    report("Planning DeepSeek-V3, transformers 4 to 5", seconds, goals, facts, arguments.json)


if __name__ == "__main__":
    main()
