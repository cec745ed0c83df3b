"""A dialect that nobody has, in one file: what it takes to add one. Tests register it."""

import json
from dataclasses import dataclass

from regraft.adapters.form import Blob, Lora
from regraft.adapters.scale import Scale
from regraft.dialects.base import (
    Capabilities,
    Evidence,
    Found,
    PlainFile,
    PlainNames,
    PlainWriter,
)
from regraft.storage.safetensors import open_tensors, read_header, write_tensors

FILE = "pairs.safetensors"


class PairsWriter(PlainWriter):
    title = "Pairs"
    capabilities = Capabilities(
        scales=False, ranks=False, embeddings=False, saved=False, suffixes=(".safetensors",)
    )

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
    layout = "transformers-v5"
    capabilities = PairsWriter.capabilities
    spelling = PlainNames("net.", "down", "up")

    def sniff(self, src):
        if src.is_dir():
            return (
                Evidence(certain=True, why=f"there is a {FILE}") if (src / FILE).is_file() else None
            )
        if src.suffix not in self.capabilities.suffixes or not src.is_file():
            return None
        header = read_header(src)
        fits = "alpha" in header.metadata and all(n.startswith("net.") for n in header.tensors)
        return Evidence(certain=True, why="its keys begin with net.") if fits else None

    def find(self, src):
        if src.is_dir():
            return Found(src, (src,), src / FILE)
        return Found(src.parent, (src.parent,), src)

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
