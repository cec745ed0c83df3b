"""Model types drawn at random, end to end, both ways, with the real transformers of both layouts.

    python scripts/drawn.py --old PYTHON --new PYTHON [--count 30] [--seed 1] [--work FOLDER]

``--old`` is a Python with transformers 4.57, ``--new`` one with transformers 5. Of the types that the newer one has a
conversion for and the older one has, too, some are drawn by a seeded shuffle. The older one makes a tiny random model
of each and writes it as ``save_pretrained`` in shards, as the same in ``.bin`` files, and as its ``state_dict()``
in one file. regraft converts each there and back; the newer and the older transformers load the results, with
nothing missing or left over, and must compute what the model computed. What a release says of the first file itself,
it may say of the result, too: transformers 4.57 cannot read every file that it writes. Such types are named. Types
that the older one cannot build tiny are passed over and named; they count as not tried.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORMS = ("saved", "bin", "state")
MOST = 30_000_000


def _transformers():
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    import torch
    import transformers

    if not hasattr(transformers, "PreTrainedConfig"):
        transformers.PreTrainedConfig = transformers.PretrainedConfig
    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    return torch, transformers


def draw(work: Path) -> None:
    """In the newer one: the types with a conversion, and their classes."""
    _transformers()
    from transformers import CONFIG_MAPPING, conversion_mapping
    from transformers.models.auto import modeling_auto

    known = conversion_mapping.get_checkpoint_conversion_mapping
    tables = [t for t in vars(modeling_auto) if t.startswith("MODEL_") and t.endswith("_NAMES")]
    found: dict[str, list[str]] = {}
    for kind in CONFIG_MAPPING:
        names: list[str] = []
        for table in sorted(tables, key=lambda t: t == "MODEL_MAPPING_NAMES"):
            entry = getattr(modeling_auto, table).get(kind) or ()
            names += [entry] if isinstance(entry, str) else entry
        names = list(dict.fromkeys(names))
        if known(kind) is not None or any(known(name) is not None for name in names):
            found[kind] = names
    (work / "types.json").write_text(json.dumps(found))


def write(work: Path) -> None:
    """In the older one: the models, until there are enough."""
    torch, transformers = _transformers()
    from tiny import shrink

    told = json.loads((work / "types.json").read_text())
    rng, kinds = random.Random(told["seed"]), sorted(told["types"])
    kinds = [kind for kind in kinds if kind in transformers.CONFIG_MAPPING]
    rng.shuffle(kinds)
    made: dict[str, dict] = {}
    passed: dict[str, str] = {}
    for kind in kinds:
        if len(made) == told["count"]:
            break
        names = [n for n in told["types"][kind] if getattr(transformers, n, None) is not None]
        for name in names[:3]:
            try:
                made[kind] = _write_one(torch, getattr(transformers, name), shrink, work / kind)
                break
            except Exception as error:
                passed[kind] = f"{name}: {type(error).__name__}: {str(error)[:100]}"
        print(kind, made.get(kind, passed.get(kind)), file=sys.stderr, flush=True)
    left = {kind: why for kind, why in passed.items() if kind not in made}
    (work / "made.json").write_text(json.dumps({"made": made, "passed over": left}))


def _write_one(torch, cls, shrink, folder: Path) -> dict:
    from safetensors.torch import save_file

    config = _agreeing(shrink(cls.config_class()))
    if sum(p.numel() for p in _on_meta(torch, cls, config).parameters()) > MOST:
        raise ValueError("its smallest size is too large here")
    torch.manual_seed(0)
    model = cls(config).eval().float()
    with torch.no_grad():
        for parameter in dict(model.named_parameters()).values():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    inputs, outputs = _run(torch, model)
    size = max(t.numel() for t in model.state_dict().values()) * 4 + 1
    for form in FORMS:
        (folder / form).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "saved", max_shard_size=size)
    model.save_pretrained(folder / "bin", max_shard_size=size, safe_serialization=False)
    model.config.architectures = [cls.__name__]
    model.config.save_pretrained(folder / "state")
    state = {key: tensor.clone().contiguous() for key, tensor in model.state_dict().items()}
    save_file(state, folder / "state" / "model.safetensors", {"format": "pt"})
    torch.save({"inputs": inputs, "outputs": outputs}, folder / "out.pt")
    return {"class": cls.__name__, "computes": outputs is not None}


def _agreeing(config):
    """With fields that follow from others as these are now: lists with an entry for each layer, sums of sizes."""
    for part in [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]:
        layers = getattr(part, "num_hidden_layers", None)
        kinds = getattr(part, "layer_types", None)
        if isinstance(layers, int) and isinstance(kinds, list):
            for name, value in list(vars(part).items()):
                if isinstance(value, list) and len(value) == len(kinds):
                    setattr(part, name, value[:layers])
        if getattr(part, "qk_nope_head_dim", None) and hasattr(part, "qk_head_dim"):
            part.qk_head_dim = part.qk_nope_head_dim + part.qk_rope_head_dim
        if getattr(part, "zero_expert_num", None):
            part.zero_expert_num = 0
        names = getattr(part, "stage_names", None)
        if isinstance(layers, int) and names and names[-1] == f"stage{len(names) - 1}":
            part.stage_names = names[: layers + 1]
            part._out_features, part._out_indices = [f"stage{layers}"], [layers]
    return config


def _on_meta(torch, cls, config):
    with torch.device("meta"):
        return cls(config)


def _run(torch, model):
    """What a model makes of small inputs of the kind that it takes; ``None`` where it takes none of these."""
    ids = torch.arange(3, 11)[None]
    torch.manual_seed(1)
    pixels = {"pixel_values": torch.randn(1, 3, 32, 32)}
    kinds = [{"input_ids": ids}, {"input_ids": ids, "decoder_input_ids": ids}, pixels]
    kinds += [{"input_ids": ids, **pixels}, {"input_values": torch.randn(1, 800)}]
    kinds += [
        {"input_features": torch.randn(1, 80, 64)},
        {"pixel_values": torch.randn(1, 3, 64, 64)},
    ]
    for inputs in kinds:
        try:
            return inputs, _tensors(torch, model, inputs)
        except Exception:
            continue
    return None, None


def _tensors(torch, model, inputs):
    torch.manual_seed(2)
    with torch.no_grad():
        made = model(**inputs)
    found = [value for value in made.to_tuple() if torch.is_tensor(value)]
    if not found:
        raise ValueError("no tensors")
    return found


def read(work: Path, folder: str, told_to: str) -> None:
    """In either: whether the files below a folder load strictly, and compute the same."""
    torch, transformers = _transformers()
    made = json.loads((work / "made.json").read_text())["made"]
    verdicts: dict[str, str] = {}
    for kind, told in made.items():
        cls, kept = getattr(transformers, told["class"], None), torch.load(work / kind / "out.pt")
        for form in FORMS:
            place = work / kind / folder / form
            if place.exists():
                try:
                    verdicts[f"{kind}/{form}"] = _read_one(torch, cls, place, kept)
                except Exception as error:
                    verdicts[f"{kind}/{form}"] = f"{type(error).__name__}: {str(error)[:200]}"
    (work / told_to).write_text(json.dumps(verdicts))


def _read_one(torch, cls, place: Path, kept: dict) -> str:
    """Empty where it is right."""
    model, info = cls.from_pretrained(place, output_loading_info=True, dtype=torch.float32)
    odd = {k: sorted(map(str, v))[:3] for k, v in info.items() if v and k != "error_msgs"}
    wrong = [str(odd)] if odd else []
    if kept["outputs"] is not None:
        found = _tensors(torch, model.eval(), kept["inputs"])
        same = len(found) == len(kept["outputs"]) and all(
            a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
            for a, b in zip(found, kept["outputs"], strict=False)
        )
        wrong += [] if same else ["other outputs"]
    return ", ".join(wrong)


def main() -> int:
    """1 where something that was tried is not right."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--old")
    parser.add_argument("--new")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--stage", nargs="+", help="what is run in the other Pythons")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="regraft-drawn-"))
    if options.stage:
        name, *rest = options.stage
        {"draw": draw, "write": write, "read": read}[name](work, *rest)
        return 0
    sys.path.insert(0, str(ROOT / "src"))
    import regraft

    def run(python: str, *stage: str) -> None:
        command = [python, __file__, "--work", work, "--stage", *stage]
        subprocess.run(command, check=True)

    run(options.new, "draw")
    types = json.loads((work / "types.json").read_text())
    asked = {"types": types, "seed": options.seed, "count": options.count}
    (work / "types.json").write_text(json.dumps(asked))
    run(options.old, "write")
    told = json.loads((work / "made.json").read_text())
    wrong: dict[str, str] = {}
    for kind in told["made"]:
        for form in FORMS:
            there, back = (work / kind / name / form for name in ("there", "back"))
            try:
                regraft.convert(work / kind / form, there, to="transformers-v5")
                regraft.convert(there, back, to="transformers-v4")
            except regraft.RegraftError as error:
                wrong[f"{kind}/{form}"] = f"{type(error).__name__}: {str(error)[:300]}"
    alike: dict[str, str] = {}
    for python, folder in ((options.new, "there"), (options.old, "back")):
        run(python, "read", folder, f"{folder}.json")
        run(python, "read", ".", f"before-{folder}.json")
        before = json.loads((work / f"before-{folder}.json").read_text())
        for name, why in json.loads((work / f"{folder}.json").read_text()).items():
            if why and why == before[name]:
                alike[name.split("/")[0]] = f"{folder} {name}: as the first file: {why}"
            elif why:
                wrong[f"{folder} {name}"] = why
    spoilt = {name.split(" ")[-1].split("/")[0] for name in wrong}
    for name, why in wrong.items():
        print(f"{name}: {why}")
    for text in alike.values():
        print(text)
    for kind, why in told["passed over"].items():
        print(f"not tried: {kind}: {why}")
    computing = sum(each["computes"] for each in told["made"].values())
    right = len(told["made"]) - len(spoilt)
    print(f"{len(alike)} of them load as their first files do, and not wholly")
    print(
        f"{right} of {len(told['made'])} types right ({computing} by their outputs, others by names and loading)"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
