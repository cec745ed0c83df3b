"""What the scripts that learn books have in common: configs, three sizes of which one is only checked, the files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from regraft.bridges.transformers.probing import outline_of
from regraft.learning.learn import learn_pairs
from regraft.learning.shrink import shrink
from regraft.learning.watch import pair_of

Config = dict[str, Any]
ConverterOf = Callable[[Config], Callable[..., Any]]
"""Makes the converter of state dicts that go with a config."""

LLAMA: Config = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
MIXTRAL: Config = {
    **LLAMA,
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def write_books(
    tool: str, configs: Mapping[str, Config], converter_of: ConverterOf, **how: Any
) -> None:
    """Learn a book of each config into the folder that the command line names first, and say what it is worth."""
    out = out_folder()
    for name, config in configs.items():
        found = learn_config(name, config, converter_of, tool, **how)
        write_book(out / f"{tool}_{name}.toml", found)


def out_folder() -> Path:
    """The folder that the command line names first."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    return out


def write_book(path: Path, found: Any) -> None:
    """Write a learned book, and print how much it explains and where it was equal."""
    path.write_text(found.text)
    verified = ", ".join("equal" if each.equal else "NOT equal" for each in found.verified)
    print(f"{path.stem}: {found.explained} of {found.total} tensors explained; {verified}")
    for key, why in list(found.odd.items())[:5]:
        print(f"  {key}: {why}")


def learn_config(
    name: str,
    config: Config,
    converter_of: ConverterOf,
    tool: str,
    *,
    with_torch: bool,
    source: str,
) -> Any:
    """What is learned of transformers 4's layout and a tool's; ``converter_of`` makes the converter for a config."""
    pairs, kinds = [], {}
    for size in range(3):
        known = outline_of(shrink(config, size), name, "transformers-v4")
        kinds = kinds or known.kinds
        convert = converter_of(known.config)
        where = f"size {size + 1}"
        pairs.append(
            pair_of(convert, known.shapes, known.config, with_torch=with_torch, where=where)
        )
    return learn_pairs(
        pairs,
        layouts=("transformers-v4", tool),
        name=f"{tool}_{name}",
        kind_of=(kinds.get, lambda _: None),
        source=source,
    )
