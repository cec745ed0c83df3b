"""What the demonstration does and says."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from regraft.cli.output import Output
from regraft.cli.words import show_adapters
from regraft.converting.convert import convert
from regraft.demo import proof
from regraft.names.patterns import patterns

_TOLERANCE = 1e-12
"""Of float64 sums that are added up in another order."""


def main(args: Sequence[str] = ()) -> int:
    """Run the demonstration; 1 if a proof fails.

    With an argument, the converted adapters are kept in that folder.
    """
    with resources.as_file(resources.files("regraft.demo") / "data") as data:
        if args:
            return _Demo(data, Path(args[0])).run(kept=True)
        with tempfile.TemporaryDirectory(prefix="regraft-demo-") as folder:
            return _Demo(data, Path(folder)).run(kept=False)


class _Demo:
    def __init__(self, data: Path, folder: Path) -> None:
        self.adapter, self.base = data / "adapter", data / "base"
        self.v5, self.v4 = folder / "transformers-v5", folder / "transformers-v4"
        self.out = Output()
        self.failed = 0

    def run(self, *, kept: bool) -> int:
        start = time.perf_counter()
        config, tensors = proof.read_adapter(self.adapter)
        self.tell(
            f"The adapter: a LoRA on a small Mixtral, saved by PEFT {config['peft_version']} with "
            "transformers 4.\nThere every expert is a module with factors of its own:\n",
            *_key_lines(tensors),
            "\ntransformers 5 keeps all experts of a layer in two parameters. There such keys name "
            "nothing,\nand a loader that passes over them leaves the experts without their "
            "training.\n",
        )

        self.tell("1. Convert it:  regraft convert adapter out --to transformers-v5 --model base\n")
        report = convert(self.adapter, self.v5, to="transformers-v5", model=self.base)
        show_adapters(self.out, report, load=False)
        new_config, new_tensors = proof.read_adapter(self.v5)
        self.tell(
            "\n   Its keys now ('base_layer' holds the factors of gate_up_proj):\n",
            *_key_lines(new_tensors),
        )

        self.tell("\n2. Prove it: delta = alpha / r * B @ A, by numpy alone, weight by weight\n")
        experts = json.loads((self.base / "config.json").read_text())["num_local_experts"]
        before = proof.deltas_v4(config, tensors)
        after = proof.deltas_v5(new_config, new_tensors, experts)
        difference = proof.largest_difference(before, after)
        size = max(float(np.abs(d).max()) for d in before.values())
        packed = sum("expert" in weight for weight in before)
        self.check(
            f"{len(before)} deltas ({packed} of experts) are the same: the largest element is "
            f"{size:.3g}, the largest difference {difference:.3g}",
            holds=size > 0 and difference <= _TOLERANCE * size,
        )

        swapped = proof.deltas_v5(new_config, proof.swap_experts(new_tensors, experts), experts)
        norms = proof.norm(before), proof.norm(swapped)
        self.tell("\n   Is that check worth anything? Exchange experts 0 and 1 in the result:")
        self.check(
            f"a check of norms does not notice: {norms[0]:.6f} before, {norms[1]:.6f} after",
            holds=abs(norms[0] - norms[1]) <= _TOLERANCE * norms[0],
        )
        wrong = proof.largest_difference(before, swapped)
        self.check(
            f"the deltas do: the largest difference is {wrong:.3g}", holds=wrong > 1e-3 * size
        )

        self.tell("\n3. Convert the result back:  regraft convert out back --to transformers-v4")
        convert(self.v5, self.v4, to="transformers-v4", model=self.base)
        old_config, old_tensors = proof.read_adapter(self.v4)
        self.check(
            f"all {len(tensors)} tensors are the original's, bit for bit",
            holds=_bits(tensors) == _bits(old_tensors),
        )
        self.check("so is adapter_config.json, field for field", holds=config == old_config)
        self.finish(kept=kept, seconds=time.perf_counter() - start)
        return 1 if self.failed else 0

    def finish(self, *, kept: bool, seconds: float) -> None:
        folder = str(self.v5) if kept else "out"
        if self.failed:
            self.tell(f"\n{self.failed} of the checks FAILED: please report it.")
            return
        self.tell(f"\nThat took {seconds:.2f} s, without torch.")
        if not kept:
            self.tell("It was done in a temporary folder; 'python -m regraft.demo DIR' keeps it.")
        self.tell(
            f"Load with transformers 5: PeftModel.from_pretrained(model, {json.dumps(folder)})"
        )

    def tell(self, *lines: str) -> None:
        for line in lines:
            self.out.text(line + "\n")

    def check(self, claim: str, *, holds: bool) -> None:
        self.failed += not holds
        self.tell(f"   {'ok    ' if holds else 'FAILED'} {claim}")


def _key_lines(tensors: Mapping[str, Any]) -> list[str]:
    found = [(p, n) for p, n in patterns(tensors) if "mlp" in p or "sparse" in p]
    rest = len(tensors) - sum(count for _, count in found)
    lines = [f"   {count:3} x {pattern}" for pattern, count in found]
    return [*lines, f"   {rest:3} of attention"]


def _bits(tensors: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (t.dtype.str, t.shape, t.tobytes()) for name, t in tensors.items()}
