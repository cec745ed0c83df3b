"""What mlx-lm does with an adapter: its own two files, and layers that the config makes.

Source: mlx-lm 0.32.2 and 0.31.3, ``tuner/utils.py`` (linear_to_lora_layers, load_adapters), run on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.adapters.form import Array
from regraft.dialects.halves import config_of_model
from regraft.dialects.judges.places import Places
from regraft.dialects.judging import (
    FAILS,
    IGNORED,
    LOADED,
    WRONG_SCALE,
    WRONG_VALUES,
    Files,
    Judgement,
)
from regraft.dialects.mlx import BLOCK, CONFIG, MLX, WEIGHTS

_STRICT = "0.32.0"
"""The release since which tensors without a layer are an error; before, they were passed over."""


class MlxLm:
    """``mlx_lm``'s ``--adapter-path``."""

    tool = "mlx"
    versions = ("0.31.3", "0.32.2")
    basis = "run"
    to = "mlx"

    def judge(self, files: Files, version: str) -> Judgement:
        """What it would do."""
        judged = Judgement()
        if not (files.folder / WEIGHTS).is_file():
            judged.failures.append(f"there is no {WEIGHTS}")
        if files.config is None:
            judged.failures.append(f"there is no {CONFIG}")
        elif files.config.get("fine_tune_type") == "full":
            judged.notes.append("it replaces whole weights, and is no adapter")
            self._judge_weights(files, version, judged)
            return judged
        elif not judged.failures:
            self._judge_config(files.config, judged)
        if judged.failures or files.config is None:
            return judged
        if not files.tensors:
            judged.notes.append(f"{WEIGHTS} is empty")
            return judged
        self._judge_tensors(files, files.config, version, judged)
        return judged

    def _judge_weights(self, files: Files, version: str, judged: Judgement) -> None:
        """Whole weights, which must be the base's."""
        strict = version >= _STRICT
        for name, tensor in files.tensors.items():
            wrong = None
            if files.model is not None and name.endswith(".weight") and tensor.ndim == 2:
                wrong = Places(files.model, MLX.layout).problem(name, *tensor.shape)
            judged.add(name, LOADED if wrong is None else FAILS if strict else IGNORED, wrong or "")

    def _judge_config(self, config: Mapping[str, Any], judged: Judgement) -> None:
        parameters = config.get("lora_parameters")
        if not isinstance(parameters, Mapping):
            judged.failures.append("the config has no lora_parameters")
            return
        missing = [name for name in ("rank", "scale", "dropout") if name not in parameters]
        if "num_layers" not in config:
            missing.append("num_layers")
        if missing:
            judged.failures.append(f"the config does not say {', '.join(missing)}")

    def _judge_tensors(
        self, files: Files, config: Mapping[str, Any], version: str, judged: Judgement
    ) -> None:
        places = Places(files.model, MLX.layout) if files.model is not None else None
        strict = version >= _STRICT
        if config.get("fine_tune_type") == "dora" and any(
            tensor.ndim == 3 for tensor in files.tensors.values()
        ):
            judged.failures.append("stacked experts have no DoRA")
            return
        modules: dict[str, dict[str, Array]] = {}
        for name, tensor in files.tensors.items():
            module, _, leaf = name.rpartition(".")
            modules.setdefault(module, {})[leaf] = tensor
        for module, found in modules.items():
            problem = _not_made(module, found, files, config)
            shapes = None if problem else _shape(module, found, config, places)
            if problem:
                judged.add(module, FAILS if strict else IGNORED, problem)
            elif "lora_b" not in found:
                judged.add(module, IGNORED, "it has no lora_b, which stays zero")
            elif "lora_a" not in found:
                judged.add(
                    module, WRONG_VALUES, "it has no lora_a, which stays as it is initialised"
                )
            elif shapes:
                judged.add(module, FAILS if strict else WRONG_SCALE, shapes)
            else:
                judged.add(module, LOADED)


def _not_made(
    module: str, found: Mapping[str, Array], files: Files, config: Mapping[str, Any]
) -> str | None:
    """Why the config makes no layer that has these tensors."""
    dora = config.get("fine_tune_type") == "dora"
    odd = set(found) - {"lora_a", "lora_b", *(("m",) if dora else ())}
    if odd:
        return f"no layer has a parameter called {sorted(odd)[0]}"
    keys = config["lora_parameters"].get("keys")
    match = BLOCK.fullmatch(module)
    if isinstance(keys, list) and module in keys:
        return None
    if match is None:
        return "it is in no block, and keys does not name it"
    if isinstance(keys, list) and match[2] not in keys:
        return "keys does not name it"
    count, layers = config["num_layers"], None
    if files.model is not None:
        layers = config_of_model(files.model).get("num_hidden_layers")
    if (
        isinstance(layers, int)
        and isinstance(count, int)
        and 0 < count <= layers - 1 - int(match[1])
    ):
        return f"only the last {count} blocks get layers (num_layers)"
    return None


def _shape(
    module: str, found: Mapping[str, Array], config: Mapping[str, Any], places: Places | None
) -> str | None:
    """What does not fit of a module's factors."""
    a, b = found.get("lora_a"), found.get("lora_b")
    if a is None or b is None:
        return None
    rank = config["lora_parameters"]["rank"]
    stacked = b.ndim == 3
    if stacked and a.ndim == 2:
        return "experts stand one below the other in lora_a, as until mlx-lm 0.26"
    mine = b.shape[-1] if stacked else b.shape[0]
    if mine != rank:
        return f"its rank is {mine}, and the config's {rank}"
    if places is None:
        return None
    out, into = (b.shape[1], a.shape[2]) if stacked else (b.shape[1], a.shape[0])
    return places.problem(f"{module}.weight", out, into)


READER = MlxLm()
