"""One class of the installed transformers: what regraft makes of its files, and what transformers does."""

import copy
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers
from transformers import conversion_mapping, core_model_loading

from regraft.arrays.apply import apply_plan
from regraft.bridges.transformers import making
from regraft.bridges.transformers.imported import import_model
from regraft.bridges.transformers.operations import UnknownOperationError
from regraft.errors import RegraftError
from regraft.layouts.graph import edges_to
from regraft.names.keys import group_names
from regraft.names.live import skeleton_of
from regraft.planning.build import build_plan
from regraft.planning.model import Scope
from regraft.planning.plan import Headers

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

    def count(self, plan, state):
        """How many of the model's keys are made of others, and how many only have another name."""
        self.converted = self.renamed = 0
        old = {plan.headers.name(i) for i in range(len(plan.headers))}
        for entry in plan.entries:
            keys = [key for term in entry.written for key in entry.keys(term).names()]
            moved = len(entry.read) == len(entry.written) == 1
            if moved and entry.read[0].dims == entry.written[0].dims:
                self.renamed += len(set(keys) - old)
            else:
                self.converted += len(keys)

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


def old_file(model):
    """The model's tensors as transformers saves them after it loaded a file in the old layout."""
    # A copy: saving changes the registry itself in transformers 5.4, and no file can be loaded afterwards.
    rules = copy.deepcopy(conversion_mapping.get_model_conversion_mapping(model, add_legacy=False))
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
    plan = build_plan(headers, edges_to(books, to), scopes=scopes)
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
    theirs = load(verdict, cls, config, file, state, "what it saved")
    imported = import_model(skeleton_of(model))
    if theirs is not None:
        book = imported.book(list(file), {k: tuple(v.shape) for k, v in file.items()})
        with refusals(verdict, "forth"):
            plan, mine = convert(file, [book], NEW)
            verdict.count(plan, state)
            compare(verdict, "forth", mine, state)
        with refusals(verdict, "back"):
            _, back = convert(state, [book], OLD)
            compare(verdict, "back", back, file)
    if theirs is not None and verdict.converted:
        with refusals(verdict, "watched"), watched():
            book = imported.book(list(file), {k: tuple(v.shape) for k, v in file.items()})
            _, mine = convert(file, [book], NEW)
            compare(verdict, "watched", mine, state)
    with refusals(verdict, "by itself"):
        book = imported.book()
        _, back = convert(state, [book], OLD)
        told = imported.book(list(back), {k: tuple(v.shape) for k, v in back.items()})
        plan, again = convert(back, [told], NEW)
        if theirs is None:
            verdict.count(plan, state)
        compare(verdict, "by itself, forth", again, state)
        if back.keys() != file.keys():
            load(verdict, cls, config, back, state, "what regraft makes")


@contextmanager
def watched():
    """Operations are learned by running them, also those that are known by name."""

    def unknown(*_, **__):
        raise UnknownOperationError("asked for")

    before = making.run, making.knows
    making.run, making.knows = unknown, lambda operations: False
    try:
        yield
    finally:
        making.run, making.knows = before


@contextmanager
def refusals(verdict, what):
    try:
        yield
    except RegraftError as error:
        verdict.differ(f"{what}: refused: " + "; ".join(str(f) for f in error.findings[:2])[:300])


def load(verdict, cls, config, file, state, what):
    """Whether transformers loads a file, and makes of it what the model had."""
    before = len(verdict.differences)
    try:
        # Some classes read more files in a method of this name of their own.
        loaded, info = transformers.PreTrainedModel.from_pretrained.__func__(
            cls,
            None,
            config=config,
            state_dict=dict(file),
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:150]}"
        verdict.differ(f"transformers cannot load {what}: {text}")
        return None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            verdict.differ(f"transformers loads {what} with {kind}", sorted(map(str, info[kind])))
    made = {k: v.detach() for k, v in loaded.state_dict().items()}
    if len(verdict.differences) == before:
        compare(verdict, f"transformers loads {what}", made, state)
    return made if len(verdict.differences) == before else None


def classes():
    """Every model class of the installed transformers."""
    found = {}
    for name in dir(transformers):
        if name.startswith("Auto") or name.endswith(("PreTrainedModel", "PretrainedModel")):
            continue
        try:
            cls = getattr(transformers, name)
        except (ImportError, RuntimeError, AttributeError):
            continue
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            found[cls.__name__] = cls
    return [cls for cls in found.values() if cls.config_class is not None]


def registered(model):
    """Whether something is registered for a model or for one in it."""
    return bool(conversion_mapping.get_model_conversion_mapping(model, add_legacy=False))


def why_not(cls):
    """Whether a class that cannot be built would count."""
    known = conversion_mapping.get_checkpoint_conversion_mapping
    return known(cls.__name__) is not None or known(cls.config_class.model_type) is not None
