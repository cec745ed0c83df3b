"""The parts that ranks hold: tensor and expert parallelism as boxes of a checkpoint's tensors.

A plan maps patterns of modules or parameters to styles, as the configs of transformers do (``base_model_tp_plan``,
``base_model_ep_plan``). Source of the styles: ``transformers/distributed/tensor_parallel.py`` and
``expert_parallel.py`` of 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from regraft.errors import BadInputError, Finding
from regraft.storage.json_files import load_json

Ranges = list[tuple[int, int]]

_ROWS = ("colwise", "colwise_rep", "colwise_gather_output")
_COLUMNS = ("rowwise", "rowwise_rep", "rowwise_split_input")
_WHOLE = (
    "replicate",
    "replicated_with_grad_allreduce",
    "all_reduce",
    "sequence_parallel",
    "mla_kv_a_proj",
    "moe_tp_experts",
    "moe_identity_expert",
    "local_params",
    "ep_dispatch_experts",
    "ep_router",
)
"""Styles of modules whose tensors each rank holds whole."""
_HALVES = {"packed_colwise": -2, "packed_rowwise": -1}
"""Styles of tensors that are two side by side, and the dim that is cut in both."""
_DIMS = {
    **dict.fromkeys(_ROWS, -2),
    **dict.fromkeys(_COLUMNS, -1),
    "embedding_rowwise": 0,
    "embedding_colwise": 1,
    "grouped_gemm": 0,
    **_HALVES,
}
"""The dim of a weight that each style cuts; of a bias, which has one dim, what cuts rows cuts it, too."""
STYLES = (*_DIMS, *_WHOLE)
"""Every style that a plan may name."""
_FIELDS = ("tp", "ep")
_HEADS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_b_proj", "kv_b_proj")


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """Which tensors are cut, and how."""

    tp: Mapping[str, str] = field(default_factory=dict)
    """Patterns of modules or parameters, and their styles; ``*`` stands for a number."""
    ep: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> ParallelPlan:
        """A plan from a JSON file: ``{"tp": {pattern: style}, "ep": {pattern: style}}``.

        Raises ``BadInputError`` for fields and styles that there are not.
        """
        data = load_json(path)
        return ParallelPlan.of(data, str(path))

    @staticmethod
    def of(data: Mapping[str, Any], where: str) -> ParallelPlan:
        """A plan from plain data; see `read`."""
        findings = [
            Finding(
                "parallel-plan",
                "a plan has no such field",
                where=where,
                key=str(name),
                fix=f"the fields are {' and '.join(_FIELDS)}",
            )
            for name in data
            if name not in _FIELDS
        ]
        for name in _FIELDS:
            table = data.get(name, {})
            if not isinstance(table, Mapping):
                message = "expected a table of patterns and styles"
                findings.append(Finding("parallel-plan", message, where=where, key=name))
                continue
            findings += [
                Finding(
                    "parallel-plan",
                    f"there is no style {style!r}",
                    where=where,
                    key=str(pattern),
                    fix=f"the styles are {', '.join(STYLES)}",
                )
                for pattern, style in table.items()
                if style not in STYLES
            ]
        if findings:
            raise BadInputError(findings)
        return ParallelPlan(dict(data.get("tp", {})), dict(data.get("ep", {})))

    def check_patterns(self, names: Iterable[str], where: str) -> None:
        """Check that each pattern speaks of a tensor.

        Raises ``BadInputError``.
        """
        names = list(names)
        known = {*names, *(name.rpartition(".")[0] for name in names)}
        findings = []
        for pattern in dict.fromkeys([*self.tp, *self.ep]):
            if not any(map(_regex(pattern).fullmatch, known)) and not _is_around(pattern, names):
                message = "the pattern fits no tensor of the result, and no module that holds one"
                fix = "names are those of the layout that is wanted; * stands for a number"
                findings.append(
                    Finding("parallel-plan", message, where=where, key=pattern, fix=fix)
                )
        if findings:
            raise BadInputError(findings)


@dataclass(frozen=True, slots=True)
class Ranks:
    """One rank of many: ``tp`` ranks side by side share each layer, ``ep`` groups of them share the experts."""

    tp: int = 1
    ep: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        for name in ("tp", "ep"):
            if getattr(self, name) < 1:
                raise BadInputError(
                    Finding("option", f"{name} is {getattr(self, name)}", fix="give 1 or more")
                )
        if not 0 <= self.rank < self.world:
            message = f"there is no rank {self.rank} among {self.tp} x {self.ep}"
            raise BadInputError(Finding("option", message, fix=f"give 0 to {self.world - 1}"))

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return self.tp * self.ep

    def box(self, plan: ParallelPlan, name: str, shape: tuple[int, ...]) -> list[Ranges]:
        """The part of a tensor that the rank holds: ranges for each dim.

        >>> plan = ParallelPlan({"layers.*.mlp.experts.gate_up_proj": "packed_colwise"},
        ...                     {"layers.*.mlp.experts.gate_up_proj": "grouped_gemm"})
        >>> Ranks(tp=2, ep=2, rank=3).box(plan, "model.layers.7.mlp.experts.gate_up_proj", (8, 12, 5))
        [[(4, 8)], [(3, 6), (9, 12)], [(0, 5)]]

        Raises ``BadInputError`` for sizes that do not divide.
        """
        ranges: list[Ranges] = [[(0, size)] for size in shape]
        for table, world, at, label in (
            (plan.ep, self.ep, self.rank // self.tp, "ep"),
            (plan.tp, self.tp, self.rank % self.tp, "tp"),
        ):
            style = _style(table, name) if world > 1 else None
            dim = _dim(style, name, shape) if style is not None else None
            if dim is None:
                continue
            parts = 2 if style in _HALVES else 1
            size = shape[dim]
            if size % (parts * world):
                raise BadInputError(
                    Finding(
                        "uneven",
                        f"{size} in dim {dim} of {list(shape)} cannot be cut into {world} equal parts"
                        + (" of each half" if parts == 2 else ""),
                        key=name,
                        fix=f"choose a --{label} that divides it",
                    )
                )
            part, half = size // parts // world, size // parts
            ranges[dim] = [(k * half + at * part, k * half + (at + 1) * part) for k in range(parts)]
        return ranges

    def check_heads(
        self, plan: ParallelPlan, config: Mapping[str, Any] | None, names: Iterable[str]
    ) -> None:
        """Check that no attention head would be cut.

        Raises ``BadInputError``.
        """
        if self.tp == 1 or config is None:
            return
        styles = {name: _style(plan.tp, name) for name in names if _is_heads(name)}
        cut = next((name for name, style in styles.items() if style in (*_ROWS, *_COLUMNS)), None)
        if cut is None:
            return
        parts = [config.get("text_config"), config]
        part = next(
            p
            for p in parts
            if (isinstance(p, Mapping) and "num_attention_heads" in p) or p is config
        )
        findings = [
            Finding(
                "heads",
                f"{count} is {heads}, which {self.tp} ranks cannot share: no head is cut",
                key=cut,
                fix="choose a --tp that divides the number of heads",
            )
            for count in ("num_attention_heads", "num_key_value_heads")
            if isinstance(heads := part.get(count), int) and heads % self.tp
        ]
        if findings:
            raise BadInputError(findings)


def boxes_of(
    ranks: Ranks, plan: ParallelPlan, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[Ranges]]:
    """The part of each tensor that a rank holds.

    Raises ``BadInputError`` with all sizes that do not divide.
    """
    boxes: dict[str, list[Ranges]] = {}
    findings: list[Finding] = []
    for name, shape in shapes.items():
        try:
            boxes[name] = ranks.box(plan, name, shape)
        except BadInputError as error:
            findings += error.findings
    if findings:
        raise BadInputError(findings)
    return boxes


@dataclass(frozen=True, slots=True)
class Whole:
    """Tensors that each rank holds whole, for one reason."""

    why: str
    names: tuple[str, ...]


def left_whole(
    ranks: Ranks, plan: ParallelPlan, shapes: Mapping[str, tuple[int, ...]]
) -> list[Whole]:
    """Which tensors no rank holds a part of, and why.

    >>> plan = ParallelPlan({"mlp": "colwise", "norm": "sequence_parallel"})
    >>> for whole in left_whole(Ranks(tp=2), plan, {"mlp.weight": (4, 4), "norm.weight": (4,), "sink": (4,)}):
    ...     print(whole.names, whole.why)
    ('norm.weight',) the tp plan says sequence_parallel, which does not cut them
    ('sink',) the tp plan has no entry for them

    Raises ``BadInputError`` where a plan cuts nothing at all: more ranks of that kind would be of no use.
    """
    used = [
        (label, table)
        for label, table, world in (("tp", plan.tp, ranks.tp), ("ep", plan.ep, ranks.ep))
        if world > 1
    ]
    idle = {label for label, _ in used}
    found: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        why = []
        for label, table in used:
            style = _style(table, name)
            if style is None:
                why.append(f"the {label} plan has no entry for them")
            elif _dim(style, name, shape) is None:
                why.append(f"the {label} plan says {style}, which does not cut them")
            else:
                idle.discard(label)
        if used and len(why) == len(used):
            found.setdefault(" and ".join(why), []).append(name)
    if idle:
        raise BadInputError(
            Finding(
                "parallel-plan",
                f"--{label} {getattr(ranks, label)} cuts nothing: the {label} plan has no entry for a tensor of this "
                "model, and each rank would read all of it",
                fix=f"leave out --{label}"
                + (", which is for models with experts" if label == "ep" else "")
                + ", or give a plan that cuts something with --plan",
            )
            for label in sorted(idle)
        )
    return [Whole(why, tuple(names)) for why, names in found.items()]


def _is_around(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern is of a module above some tensors."""
    text = r"\d+".join(re.escape(part) for part in pattern.split("*"))
    above = re.compile(rf"(?:.*\.)?{text}\..*")
    return any(map(above.fullmatch, names))


def _is_heads(name: str) -> bool:
    return any(f".{part}." in name for part in _HEADS)


def _style(table: Mapping[str, str], name: str) -> str | None:
    """The style of a tensor: that of its own pattern, or of its module's."""
    module = name.rpartition(".")[0]
    found: str | None = None
    for pattern, style in table.items():
        if _regex(pattern).fullmatch(name):
            return style
        if _regex(pattern).fullmatch(module):
            found = style
    return found


def _dim(style: str, name: str, shape: tuple[int, ...]) -> int | None:
    dim = _DIMS.get(style)
    if dim is None or not shape:
        return None
    if len(shape) == 1:
        return 0 if style in _ROWS or style == "packed_colwise" else None
    return dim % len(shape)


@lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    """A pattern as one that fits a name below any model; ``*`` is a number."""
    text = r"\d+".join(re.escape(part) for part in pattern.split("*"))
    return re.compile(rf"(?:.*\.)?{text}")
