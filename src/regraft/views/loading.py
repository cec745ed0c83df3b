"""How a result is loaded, in words."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from regraft.report import Report

_CALLS = 6
"""So many calls are shown."""


def how_to_load(report: Report) -> str:
    """The calls that load a result, on one line."""
    layouts = {adapter.target_layout for adapter in report.adapters}
    if "diffusers" in layouts:
        return f"Load with diffusers: pipeline.load_lora_weights({_quote(report.destination)})"
    if "peft-image" in layouts:
        call = f"PeftModel.from_pretrained(denoiser, {_quote(report.destination)})"
        return f"Load with PEFT: {call}, on a pipeline's transformer or unet"
    usage = _usage(next(iter(layouts), ""))
    if usage:
        path = _file_of(report.destination)
        return usage.format(path=shlex.quote(path), file=shlex.quote(Path(path).name))
    calls = []
    parameters = {frozenset(t.key for t in a.targets if t.parameter) for a in report.adapters}
    apart = len(parameters - {frozenset()}) > 1  # PEFT cannot hold them on one model
    for number, adapter in enumerate(report.adapters):
        folder = _quote(str(Path(report.destination) / adapter.name))
        if number == 0 or apart:
            calls.append(f"model = PeftModel.from_pretrained(model, {folder})")
        else:
            calls.append(f"model.load_adapter({folder}, {_quote(Path(adapter.name).name)})")
    if len(calls) > _CALLS:
        calls[_CALLS:] = ["…"]
    if len(calls) == 1:
        calls = [calls[0].removeprefix("model = ")]
    layout = next(iter(layouts), "").partition("/")[0].partition(":")[0]  # LAYOUT:DIALECT/VERSION
    head, _, version = layout.rpartition("-v")
    if head != "transformers":  # a rule book's own
        return f"Load with PEFT, into a model in the layout {layout}: " + "; ".join(calls)
    return f"Load with transformers {version}: " + "; ".join(calls)


def _usage(layout: str) -> str:
    """How the tool of a dialect is given a result, with a place for its path; empty where nothing says it."""
    from regraft.dialects.base import dialects

    name = layout.partition("/")[0].rpartition(":")[2]
    return str(getattr(dialects().get(name), "usage", ""))


def _file_of(destination: str) -> str:
    """The result where it is one file, in a folder or not (with a README, say); otherwise the folder."""
    folder = Path(destination)
    inside = list(folder.iterdir()) if folder.is_dir() else []
    weights = [path for path in inside if path.suffix in (".safetensors", ".gguf")]
    alone = len(weights) == 1 and not any(path.suffix == ".json" for path in inside)
    return str(weights[0]) if alone else destination


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else json.dumps(text)
