"""What llama.cpp does with an adapter: one GGUF file, whose tensors must be the base's.

Source: llama.cpp as in llama-cpp-python 0.3.36, ``src/llama-adapter.cpp`` (llama_adapter_lora_init_impl).
"""

from __future__ import annotations

from regraft.dialects.gguf import ARCHITECTURE, GGUF, architectures
from regraft.dialects.judges.places import Places
from regraft.dialects.judging import FAILS, IGNORED, LOADED, Files, Judgement
from regraft.errors import RegraftError


class LlamaCpp:
    """The loader of ``--lora``."""

    tool = "llama.cpp"
    versions = ("0.3.36",)
    """Of llama-cpp-python, which brings a copy of llama.cpp."""
    basis = "its source"
    to = "gguf"

    def judge(self, files: Files, version: str) -> Judgement:
        """What it would do."""
        judged = Judgement()
        if GGUF.sniff(files.src) is None:
            judged.failures.append("it is no GGUF file, and llama.cpp reads nothing else")
            return judged
        found = GGUF.find(files.src)
        try:
            opened = GGUF.open(found.folders[0], found.root, found.weights)
        except RegraftError as error:
            judged.failures += [finding.message for finding in error.findings]
            return judged
        places = None
        if files.model is not None:
            places = Places(files.model, GGUF.layout)
            wanted = architectures().get(files.model.model_type or "")
            mine = opened.config[ARCHITECTURE]
            if wanted and wanted != mine:
                judged.failures.append(f"its architecture is {mine}, and the base's is {wanted}")
                return judged
        for key, lora in opened.loras.items():
            problem = places and places.problem(key, lora.b.shape[-2], lora.a.shape[-1])
            judged.add(key, FAILS if problem else LOADED, problem or "")
        for name in opened.tensors:
            if name.endswith("_norm.weight"):
                judged.add(name, IGNORED, "weights of norms are passed over")
        if opened.invoked:
            judged.notes.append("it works after the tokens that it names only")
        if opened.quantised:
            judged.notes.append("its factors are quantised, and are computed with as they are")
        return judged


READER = LlamaCpp()
