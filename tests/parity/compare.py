"""One class of the installed transformers: what regraft makes of its files, and what transformers does."""

import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import transformers
from transformers import conversion_mapping, core_model_loading

from regraft.arrays.apply import apply_plan
from regraft.bridges.transformers.imported import import_model
from regraft.errors import RegraftError
from regraft.names.keys import group_names
from regraft.names.live import skeleton_of
from regraft.plan.build import build_plan
from regraft.plan.model import Scope
from regraft.plan.plan import Headers

OLD, NEW = "transformers-v4", "transformers-v5"


@dataclass
class Verdict:
    """What came out for one class."""

    name: str
    keys: int = 0
    renamed: int = 0
    converted: int = 0
    equal: bool = False
    """Whether regraft and transformers agree in everything."""
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def differ(self, what, shown=()):
        shown = list(shown)
        text = f"{what} ({len(shown)}: {', '.join(map(str, shown[:3]))})" if shown else what
        self.differences.append(text)


def fill(model):
    """Give every tensor of a state dict values of its own."""
    draw = torch.Generator().manual_seed(7)
    seen = set()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.data_ptr() in seen and tensor.numel():
                continue
            seen.add(tensor.data_ptr())
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=draw))
            elif tensor.is_complex():
                tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype))


def old_file(model, prefixed=True):
    """The model's tensors as transformers saves them after it loaded a file in the old layout."""
    rules = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    if not prefixed:
        rules = [r for r in rules if type(r).__name__ != "PrefixChange"]
    before = getattr(model, "_weight_conversions", None)
    model._weight_conversions = rules or None
    state = {k: v.detach() for k, v in model.state_dict().items()}
    try:
        made = core_model_loading.revert_weight_conversion(model, state) if rules else state
    finally:
        model._weight_conversions = before
    return {key: tensor.contiguous() for key, tensor in made.items()}


def convert(state, books, to):
    """A state dict through regraft."""
    headers = Headers(
        group_names(list(state)),
        [tuple(t.shape) for t in state.values()],
        [str(t.dtype) for t in state.values()],
    )
    scopes = {book.name: Scope() for book in books}
    plan = build_plan(headers, books, target_layout=to, scopes=scopes)
    return plan, apply_plan(plan, list(state.values()))


def unequal(one, other):
    """Keys whose tensors differ."""
    return [k for k in one if k in other and not same(one[k], other[k])]


def same(one, other):
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and bool(torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)))
    )


def compare(verdict, what, mine, theirs):
    """Note down how two state dicts differ."""
    less = [k for k in theirs if k not in mine]
    more = [k for k in mine if k not in theirs]
    odd = unequal(mine, theirs)
    if less:
        verdict.differ(f"{what}: not made", less)
    if more:
        verdict.differ(f"{what}: not in transformers", more)
    if odd:
        verdict.differ(f"{what}: other values", odd)
    return not (less or more or odd)


def judge(cls, config):
    """Everything that is measured of one class."""
    begun = time.perf_counter()
    verdict = Verdict(cls.__name__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        model = cls(config).eval().float()
        fill(model)
        _judge(verdict, cls, config, model)
    verdict.equal = not verdict.differences
    verdict.seconds = round(time.perf_counter() - begun, 3)
    return verdict


def _judge(verdict, cls, config, model):
    state = {k: v.detach() for k, v in model.state_dict().items()}
    verdict.keys = len(state)
    file = old_file(model)
    try:
        loaded, info = cls.from_pretrained(
            None, config=config, state_dict=dict(file), output_loading_info=True, dtype=torch.float32
        )
        theirs = {k: v.detach() for k, v in loaded.state_dict().items()}
        ignored = set(info["missing_keys"])
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[what]:
                verdict.differ(f"transformers loads with {what}", sorted(map(str, info[what])))
    except Exception as error:
        verdict.differ(f"transformers cannot load what it saved: {type(error).__name__}: {str(error)[:150]}")
        theirs, ignored = state, set()
    if odd := [k for k in unequal(theirs, state) if k not in ignored]:
        verdict.differ("transformers loads other values than it saved", odd)
    imported = import_model(skeleton_of(model))
    book = imported.book(list(file), {k: tuple(v.shape) for k, v in file.items()})
    for rule in book.rules:
        verdict.converted += len(rule.equation.right) if rule.equation.left[0].dims != rule.equation.right[0].dims or len(rule.equation.left) + len(rule.equation.right) > 2 else 0
    verdict.renamed = len([k for k in file if k not in state])
    try:
        _, mine = convert(file, [book], NEW)
        compare(verdict, "forth", mine, {k: v for k, v in state.items() if True})
        compare(verdict, "forth, as loaded", {k: v for k, v in mine.items() if k not in ignored}, {k: v for k, v in theirs.items() if k not in ignored})
    except RegraftError as error:
        verdict.differ("forth: refused: " + "; ".join(str(f) for f in error.findings[:2])[:300])
    try:
        _, back = convert(state, [book], OLD)
        compare(verdict, "back", back, file)
    except RegraftError as error:
        verdict.differ("back: refused: " + "; ".join(str(f) for f in error.findings[:2])[:300])
    try:
        plain = imported.book()
        _, back = convert(state, [plain], OLD)
        compare(verdict, "default back", back, file)
        told = imported.book(list(back), {k: tuple(v.shape) for k, v in back.items()})
        _, again = convert(back, [told], NEW)
        compare(verdict, "default forth", again, state)
    except RegraftError as error:
        verdict.differ("default: refused: " + "; ".join(str(f) for f in error.findings[:2])[:300])
