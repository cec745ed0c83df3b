"""A dialect that nobody has, in one file, through the public kit: what it takes to add one."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import regraft
from regraft.adapters.convert import convert_adapter
from regraft.adapters.form import Blob, Lora
from regraft.adapters.scale import Scale
from regraft.dialects.base import (
    Capabilities,
    Evidence,
    Found,
    PlainFile,
    PlainNames,
    PlainWriter,
    dialects,
)
from regraft.layouts.names import Layout
from regraft.storage.safetensors import open_tensors, read_header, write_tensors
from regraft.testing import check_dialect, deltas_of

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = "pairs.safetensors"


class PairsWriter(PlainWriter):
    title = "Pairs"
    capabilities = Capabilities(scales=False, ranks=False, embeddings=False, saved=False)

    def blob(self, deltas, saved):
        tensors = {}
        for each in deltas:
            down, up = self.spelling.factor_names(each.key)
            tensors[down], tensors[up] = each.lora.a, each.lora.b
        alpha = deltas[0].lora.scale.alpha if deltas else 0
        return Blob({"dialect": "pairs"}, tensors, {"alpha": json.dumps(alpha)})


@dataclass(frozen=True)
class Pairs:
    """``net.KEY.down`` (rank, in) and ``net.KEY.up`` (out, rank); one alpha, in the metadata."""

    name = "pairs"
    title = "pairs.safetensors, with one alpha for all"
    capabilities = PairsWriter.capabilities
    spelling = PlainNames("net.", "down", "up")

    def sniff(self, src):
        return Evidence(True, f"there is a {FILE}") if (src / FILE).is_file() else None

    def find(self, src):
        return Found(src, (src,), src / FILE)

    def open(self, folder, root, weights):
        tensors = open_tensors(weights)
        alpha = json.loads(read_header(weights).metadata["alpha"])
        loras = {}
        for name, down in tensors.items():
            if name.endswith(".down"):
                key = name.removeprefix("net.").removesuffix(".down")
                up = tensors[f"net.{key}.up"]
                loras[key] = Lora(down, up, Scale(down.shape[-2], alpha))
        return PlainFile(
            "", str(weights), {"dialect": "pairs"}, tensors, loras, spelling=self.spelling
        )

    def writer(self, opened, known, to):
        return PairsWriter(opened, known, to, self.spelling)

    def save(self, folder, opened, result):
        write_tensors(folder / FILE, result.tensors, result.metadata)


def test_the_kit_passes_it(tmp_path):
    check_dialect(Pairs(), tmp_path)


def test_the_kit_passes_peft(tmp_path):
    check_dialect(dialects()["peft"], tmp_path)


def test_the_kit_notices_a_lost_scale(tmp_path):
    class Forgetful(Pairs):
        def open(self, folder, root, weights):
            opened = super().open(folder, root, weights)
            for lora in opened.loras.values():
                lora.scale = Scale(lora.scale.rank, lora.scale.rank)
            return opened

    with pytest.raises(AssertionError, match="is off by"):
        check_dialect(Forgetful(), tmp_path)


def test_a_genuine_adapter_goes_through_it_and_back(tmp_path):
    """PEFT, v4 -> Pairs, v5 -> PEFT, v5: the same as PEFT, v4 -> PEFT, v5."""
    case, to = GOLDEN / "cases/mixtral__gud_attn", Layout("transformers-v5")
    peft, pairs = dialects()["peft"], Pairs()
    opened = peft.open(case, case, None)
    model = None
    straight = convert_adapter(opened, to, model)

    class Through(type(opened)):
        def writer(self, known, to):
            return pairs.writer(self, known, to)

    other = Through(opened.name, opened.where, opened.config, opened.tensors)
    made = convert_adapter(other, to, model)
    assert all(name.startswith("net.") for name in made.tensors)
    folder = tmp_path / "pairs"
    folder.mkdir()
    pairs.save(folder, other, made)
    back = pairs.open(folder, folder, folder / FILE)
    factors = {
        key: lora.scale.value * (lora.b.astype(np.float64) @ lora.a.astype(np.float64))
        for key, lora in back.loras.items()
    }
    wanted = regraft.dialects.peft.source.Source("", "straight", straight.config, straight.tensors)
    from regraft.adapters.base_weights import BaseWeights
    from regraft.adapters.convert import Identity, read
    from regraft.adapters.detect import find_books

    known = find_books(wanted.names(), wanted.hints(), None, "straight")
    identity = Identity(known, to.name, None, ())
    deltas = read(wanted, identity, BaseWeights.of(known, to.name)).adapter.factors
    for keys, _ in deltas.kinds:
        for key, i in zip(keys.names(), keys.ids.tolist(), strict=True):
            want = deltas.scales[i].value * (
                deltas.b[i].astype(np.float64) @ deltas.a[i].astype(np.float64)
            )
            assert np.allclose(factors[key], want, rtol=1e-6, atol=1e-9), key
    assert deltas_of(back).keys() == factors.keys()
