"""Whether an adapter's tensors fit its base where no rule looks: rows of the vocabulary, dims, what is saved whole."""

from __future__ import annotations

from collections.abc import Iterator

from regraft.adapters.base_weights import BaseWeights, spellings
from regraft.adapters.detect import Known
from regraft.dialects.peft.saved import TOKENS, token_rows
from regraft.dialects.peft.scan import PREFIX, Scan
from regraft.dialects.peft.source import Source
from regraft.dialects.peft.targeting import Targeting
from regraft.errors import BadInputError, Finding

_OF_TOKENS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out")
"""What models call the modules that have a row for every token."""

_CONFIG_OF_WEIGHTS = "use the adapter_config.json that was saved with these weights"

_MORE_ROWS = {"mllama": 8, "mllama_text_model": 8}
"""Model types whose embedding has rows beyond the vocabulary (transformers, ``modeling_mllama.py``)."""


def check_fit(scan: Scan, source: Source, base: BaseWeights) -> list[str]:
    """Compare rows of the vocabulary, dims, and what is saved whole, with the base's tensors and with its config.

    Returns what cannot be told without the base's names. Raises ``BadInputError``.
    """
    known = base.known
    findings = [*_odd_indices(scan, source), *_unsaved(scan, source, base)]
    if known.model is not None:
        findings += [
            *_odd_rows(scan, source, known, base),
            *_odd_tokens(scan, source, known, base),
            *_odd_dims(scan, source, base),
        ]
    if findings:
        raise BadInputError(findings)
    unsaved = _perhaps_unsaved(source)
    return [] if unsaved and base.names() else unsaved


def _odd_indices(scan: Scan, source: Source) -> Iterator[Finding]:
    """Trained tokens that the config names and the file has not, or in another number."""
    given = source.config.get("trainable_token_indices")
    tensors = list(source.tensors.values())
    any_there = False
    for other in scan.others:
        if not other.keys.template.endswith(TOKENS):
            continue
        for name, number in zip(other.keys.names(), other.keys.ids.tolist(), strict=True):
            any_there = True
            rows = token_rows(source.config, f"{name.removesuffix(TOKENS)}.weight")
            shape = tensors[number].shape
            if isinstance(rows, list) and shape[:1] != (len(rows),):
                yield Finding(
                    "shape",
                    f"it has shape {list(shape)}, and trainable_token_indices names {len(rows)} tokens",
                    where=source.where,
                    key=PREFIX + name,
                    fix=_CONFIG_OF_WEIGHTS,
                )
    if given and not any_there:
        yield Finding(
            "missing",
            "it names trained tokens, and the weights have none: PEFT would not load it",
            where=source.where,
            key="trainable_token_indices",
            fix=_CONFIG_OF_WEIGHTS,
        )


def _unsaved(scan: Scan, source: Source, base: BaseWeights) -> Iterator[Finding]:
    """Modules of the base that the config says were saved, and of which the file has nothing.

    An entry that names no module of the base does nothing; one that names adapted modules leaves them out, which is
    said where they are read. Where the base's names are not at hand, nothing is said.
    """
    entries = source.config.get("modules_to_save") or []
    if not entries:
        return
    modules = {path for name in base.names() for path in _paths(name)}
    named = [name.removeprefix(PREFIX) for name in source.left_out]
    for group in source.saved() if modules else ():
        named += [] if group.rows else group.keys.names()
    there = {spelled for name in named for path in _paths(name) for spelled in spellings(path)}
    holders = [one.rpartition(".")[0] for one in source.config.get("target_parameters") or []]
    groups = [each.modules for each in scan.pairs] + [each.modules for each in scan.tuned]
    adapted = [name for group in groups for name in group.names()]
    adapted = [name for name in adapted if not any(name.endswith(end) for end in holders if end)]
    for entry in entries:
        if any(Targeting({"modules_to_save": [entry]}).left_out_by(name) for name in adapted):
            continue
        lacking = sorted(m for m in modules if m.endswith(entry) and m not in there)
        if lacking:
            more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            yield Finding(
                "missing",
                f"modules_to_save names {entry!r}, and the file has no tensor of {lacking[0]}{more}: PEFT would not "
                "load it",
                where=source.where,
                key="modules_to_save",
                fix=_CONFIG_OF_WEIGHTS,
            )


_BY_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Names that PEFT adds to ``modules_to_save`` by itself, whether or not the model has such a module."""


def _perhaps_unsaved(source: Source) -> list[str]:
    """Entries of ``modules_to_save`` without a tensor, where the base's names are not at hand."""
    entries = source.config.get("modules_to_save") or []
    usual = _BY_TASK.get(str(source.config.get("task_type")), ())
    entries = [entry for entry in entries if entry not in usual]
    if not entries:
        return []
    named = [name.removeprefix(PREFIX) for name in source.left_out]
    for group in source.saved():
        named += [] if group.rows else group.keys.names()
    there = {path for name in named for path in _paths(name)}
    return [
        f"modules_to_save names {entry!r}, and the file has no tensor of it: if the base has such a module, PEFT does "
        "not load the adapter (with the base's weights as --model this is checked)"
        for entry in entries
        if not any(path.endswith(entry) for path in there)
    ]


def _paths(name: str) -> Iterator[str]:
    """The modules that a tensor is in, from the outermost."""
    segments = name.split(".")
    for end in range(1, len(segments)):
        yield ".".join(segments[:end])


def _odd_dims(scan: Scan, source: Source, base: BaseWeights) -> Iterator[Finding]:
    """Factors with more dims than the base weight that they adapt."""
    tensors, names = list(source.tensors.values()), list(source.tensors)
    if all(tensor.ndim <= 2 for tensor in tensors):
        return
    for pairs in scan.pairs:
        for row, number in enumerate(pairs.a.tolist()):
            dims = tensors[number].ndim
            weight = base.find(f"{pairs.modules.name(row)}.weight") if dims > 2 else None
            if weight is not None and weight.ndim != dims:
                yield Finding(
                    "shape",
                    f"it has {dims} dims, and the base weight that it adapts has {weight.ndim}",
                    where=source.where,
                    key=names[number],
                    fix="save the adapter again, with factors of two dims",
                )


def _odd_rows(scan: Scan, source: Source, known: Known, base: BaseWeights) -> Iterator[Finding]:
    """Tensors with another number of rows than the base has tokens, by its tensor or else by its config."""
    assert known.model is not None
    sizes = _sizes(known)
    for key, module, rows in _rows(scan, source):
        weight = base.find(f"{module}.weight")
        wanted = sizes if weight is None or not weight.ndim else {weight.shape[0]}
        if wanted and rows not in wanted:
            yield Finding(
                "vocabulary",
                f"it has a row for each of {rows} tokens, and the base has "
                f"{' or '.join(map(str, sorted(wanted)))} ({known.model.path})",
                where=source.where,
                key=key,
                fix="give as --model the base that it was trained on, with its embeddings resized",
            )


def _odd_tokens(scan: Scan, source: Source, known: Known, base: BaseWeights) -> Iterator[Finding]:
    """Trained tokens that the base has not."""
    sizes = _sizes(known)
    for other in scan.others:
        for name in other.keys.names() if other.keys.template.endswith(TOKENS) else ():
            module = name.removesuffix(TOKENS)
            weight = base.find(f"{module}.weight")
            most = weight.shape[0] if weight is not None and weight.ndim else max(sizes, default=0)
            rows = token_rows(source.config, f"{module}.weight")
            beyond = [row for row in rows if row >= most] if isinstance(rows, list) else []
            if most and beyond:
                yield Finding(
                    "vocabulary",
                    f"it is of token {max(beyond)}, and the base has {most}",
                    where=source.where,
                    key=PREFIX + name,
                    fix="give as --model the base that it was trained on, with its embeddings resized",
                )


def _sizes(known: Known) -> set[int]:
    """The vocabularies that the base's config tells."""
    assert known.model is not None
    found: set[int] = set()
    for _, part in known.model.parts():
        more = _MORE_ROWS.get(str(part.get("model_type")), 0)
        for name, value in part.items():
            if "vocab" in name and isinstance(value, int) and not isinstance(value, bool):
                found |= {value, value + more}
    return found


def _rows(scan: Scan, source: Source) -> Iterator[tuple[str, str, int]]:
    """Key, module and rows of everything that has a row for each token."""
    tensors, names = list(source.tensors.values()), list(source.tensors)
    for other in scan.others:
        module, _, leaf = other.keys.template.rpartition(".")
        if not other.prefix or leaf not in ("weight", "bias") or not _is_of_tokens(module):
            continue
        for name, number in zip(other.keys.names(), other.keys.ids.tolist(), strict=True):
            if tensors[number].ndim and (leaf == "weight" or module.endswith("lm_head")):
                yield PREFIX + name, name.rpartition(".")[0], tensors[number].shape[0]
    for pairs in scan.pairs:
        if not _is_of_tokens(pairs.modules.template):
            continue
        ids = (pairs.a if pairs.embedding else pairs.b).tolist()
        for module, number in zip(pairs.modules.names(), ids, strict=True):
            shape = tensors[number].shape
            if len(shape) == 2:
                yield names[number], module, shape[1] if pairs.embedding else shape[0]


def _is_of_tokens(module: str) -> bool:
    return module.rpartition(".")[2] in _OF_TOKENS
