"""The public's troubles as data: one file in ``cases/`` for each kind of report.

A file names its source and what happened there, the keys with their shapes, and what must come of it: the keys that are
made, or the code of the finding; ``back`` says that the way back gives every bit. Keys and shapes are rebuilt.
"""

import fnmatch
import itertools
import json
import tomllib
from math import prod
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.storage.safetensors import open_tensors, write_tensors

CASES = sorted((Path(__file__).parent / "cases").glob("*.toml"))
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 12,
}
BASES = {
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen3_moe": {**SIZES, "num_experts": 4, "moe_intermediate_size": 6},
    "deepseek_v3": {
        **SIZES,
        "n_routed_experts": 4,
        "moe_intermediate_size": 6,
        "first_k_dense_replace": 1,
    },
    "llama": SIZES,
}


def tensors_of(case):
    """The tensors of a case: every number once, so that none can take another's place."""
    made, begun = {}, 1
    for row in case["keys"]:
        loops = row.get("over", {})
        for values in itertools.product(*(range(n) for n in loops.values())):
            name = row["key"].format(**dict(zip(loops, values, strict=True)))
            size = prod(row["shape"])
            made[name] = np.arange(begun, begun + size, dtype=np.float32).reshape(row["shape"])
            begun += size
    return made


def write(folder, case):
    """The base's config, and the adapter or the checkpoint."""
    base = {**BASES[case["base"]], **case.get("model", {})}
    config = {"model_type": case["base"], "architectures": [case.get("class", "")], **base}
    if not case.get("class"):
        del config["architectures"]
    adapter = case.get("adapter")
    src = folder / "src"
    for path in (src, folder / "base"):
        path.mkdir()
    name = "model.safetensors" if adapter is None else "adapter_model.safetensors"
    write_tensors(src / name, tensors_of(case), {"format": "pt"})
    (folder / "base" / "config.json").write_text(json.dumps(config))
    if adapter is None:
        (src / "config.json").write_text(json.dumps(config))
        return src, {}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **adapter}
    (src / "adapter_config.json").write_text(json.dumps(settings))
    return src, {"model": folder / "base"}


@pytest.mark.parametrize("file", CASES, ids=lambda path: path.stem)
def test_the_outcome_is_the_right_one(file, tmp_path):
    case = tomllib.loads(file.read_text())
    assert ("#" in case["source"] or "tried" in case["source"]) and case["about"]
    src, options = write(tmp_path, case)
    to = case.get("to", "transformers-v5")
    if "code" in case:
        with pytest.raises(regraft.RegraftError) as caught:
            regraft.convert(src, tmp_path / "new", to=to, **options)
        assert case["code"] in {finding.code for finding in caught.value.findings}
        assert not (tmp_path / "new").exists()
        return
    report = regraft.convert(src, tmp_path / "new", to=to, **options)
    (file,) = (tmp_path / "new").glob("*.safetensors")
    made = open_tensors(file)
    for pattern in case["made"]:
        assert fnmatch.filter(made, pattern), f"{pattern} is not among {sorted(made)}"
    strange = [n for n in made if not any(fnmatch.fnmatchcase(n, p) for p in case["made"])]
    assert not strange
    for text in case.get("notes", ()):
        assert any(text in note for note in report.notes), report.notes
    if "model" in options:
        assert regraft.verify(src, tmp_path / "new", **options)
    if case.get("back"):
        regraft.convert(tmp_path / "new", tmp_path / "back", to=case["back"], **options)
        (file,) = (tmp_path / "back").glob("*.safetensors")
        back, before = open_tensors(file), tensors_of(case)
        assert back.keys() == before.keys()
        assert all(np.array_equal(back[name], tensor) for name, tensor in before.items())
