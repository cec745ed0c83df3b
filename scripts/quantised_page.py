"""Writes docs/quantised.md from what becomes of a small checkpoint of each quantization method.

python scripts/quantised_page.py          write it
python scripts/quantised_page.py --check  fail where it is not what would be written
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from checkpoints.models import write_folder  # noqa: E402
from checkpoints.quantised_samples import GPT_OSS, SAMPLES, gpt_oss, quantised  # noqa: E402

import regraft  # noqa: E402
from regraft.storage.safetensors import open_tensors  # noqa: E402

PAGE = ROOT / "docs/quantised.md"
V4, V5 = "transformers-v4", "transformers-v5"

LOADED = {
    "FP8 in blocks": "yes, dequantised",
    "FP8, with experts in FP4": "yes, dequantised",
    "compressed-tensors, 8-bit floats": "yes, with compressed-tensors",
    "compressed-tensors, packed integers": "yes, with compressed-tensors",
    "the same, with zero points": "no: it fails on the experts",
    "compressed-tensors, 8-bit integers": "no: it fails on the experts",
    "compressed-tensors, NVFP4": "no: it leaves out their second scale and says nothing",
    "ModelOpt, NVFP4": "no: it knows no such method",
    "MXFP4 (gpt-oss)": "yes, dequantised",
}
"""What stock transformers 5.23 does with experts that are stored one by one, where it was run."""

HEAD = """\
# Quantised checkpoints

What becomes of a checkpoint whose weights are quantised depends on the method, and on what a layout does to them.
This page is written by `scripts/quantised_page.py`, which converts a small checkpoint of each method: a Mixtral with
quantised attention, whose modules are at most renamed, and one with quantised experts, which transformers 5 stacks.
MXFP4 is what gpt-oss has, whose experts are stacked in both layouts.

| method | modules | experts to transformers-v5 | `--dequantize` | experts read by transformers 5.23 on a CPU |
|---|---|---|---|---|
"""

TAIL = """
- **unchanged**: scales and packed state stay or are renamed with their module, bit for bit, and come back so.
- **one by one**: the experts keep their old names; the loader collects them with their scales, dequantises where it has
  to, and stacks them. A stacked parameter has no scales that it would read.
- **refused**: exit status 3; the message names the method and the reason.
- **to bfloat16**: by the published formula; numbers change, and the report says so.
- **not run**: it needs a GPU, or a library that the tests do not have.

A checkpoint without a `quantization_config` is told by the names of its tensors. Stacked FP8 experts (some tools write
them) become single ones in transformers-v4 where no block of the scales would be cut. Tensors of torchao are renamed by
no one, for the file's metadata names them a second time.
"""


def outcome(work: Callable[[], Any]) -> str | None:
    """``None`` where something was refused."""
    try:
        return str(work())
    except regraft.RefusedError:
        return None


def row(title: str, tensors: dict[str, Any], experts: dict[str, Any], config: Any) -> str:
    """A line of the table, found out by converting."""
    with tempfile.TemporaryDirectory(prefix="regraft-") as folder:
        at = Path(folder)

        def modules() -> str:
            src = write_folder(at / "modules", tensors, config)
            regraft.convert(src, at / "there", to=V5)
            regraft.convert(at / "there", at / "back", to=V4)
            back = open_tensors(at / "back" / "model.safetensors")
            same = all(back[name].tobytes() == t.tobytes() for name, t in tensors.items())
            return "unchanged" if same else "changed"

        def stacked() -> str:
            src = write_folder(at / "experts", experts, config)
            notes = regraft.convert(src, at / "stacked", to=V5).notes
            return "one by one" if any("one by one" in note for note in notes) else "unchanged"

        def wide() -> str:
            regraft.convert(at / "experts", at / "wide", to=V5, dequantize=True)
            return "to bfloat16"

        cells = [outcome(work) or "refused" for work in (modules, stacked, wide)]
    return f"| {title} | {' | '.join(cells)} | {LOADED.get(title, 'not run')} |"


def page() -> str:
    """The whole page."""
    lines = [
        row(title, quantised(make, attention=True), quantised(make), config)
        for title, (make, config) in SAMPLES.items()
    ]
    _, tensors = gpt_oss()
    lines.append(row("MXFP4 (gpt-oss)", tensors, tensors, GPT_OSS))
    return HEAD + "\n".join(lines) + "\n" + TAIL


def main() -> int:
    """Write or check the page."""
    text = page()
    if "--check" in sys.argv:
        return 0 if PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
