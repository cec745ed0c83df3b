"""The byte work of ``from_pretrained``, done by regraft; everything around it stays transformers'.

Source: ``PreTrainedModel._load_pretrained_model`` and ``core_model_loading.convert_and_load_state_dict_in_model`` of
transformers 5.23. What they do beside moving bytes is done here with their own functions: names are compared with
what they would make of them, parameters are set by ``set_param_for_module``, and what is missing or unexpected is
reported through their ``LoadStateDictInfo``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from regraft.arrays.lazy import Lazy
from regraft.bridges.peft.patches import Patch
from regraft.bridges.transformers.imported import Imported
from regraft.checkpoints.source import CONFIG, open_weights
from regraft.errors import BadInputError, Finding, RegraftError
from regraft.live.lazily import LazyFiles, by_books
from regraft.live.load import only_by_regraft, part_of
from regraft.live.loaded import Loaded
from regraft.live.mapping import mapping
from regraft.live.memory import Part, Way, collector_paused, make_parts, possible
from regraft.live.ranks import is_sharded
from regraft.live.ruled import Ruled
from regraft.live.state_dict import StateDictReport, convert_model
from regraft.names.live import LiveModel
from regraft.report import count_in_words
from regraft.rules.book import own_books
from regraft.storage.stand_ins import named, remote_at

_TAKEN = ("model", "state_dict", "checkpoint_files", "load_config")
_DEVICES = ("cpu", "cuda")
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
"""A segment of a name that is a number; names that differ in these alone are of one kind."""


class StepBackError(Exception):
    """Why transformers has to load a model by itself."""


def loading_patch(way: Callable[[], Way]) -> Patch | None:
    """The replacement of what moves bytes in ``from_pretrained``; ``None`` for a transformers that is not known.

    ``way`` tells how to load; it is asked for each model.
    """
    from transformers import PreTrainedModel

    patch = Patch(
        PreTrainedModel, "_load_pretrained_model", lambda original: _load_model(original, way)
    )
    current = getattr(patch.current(), "__func__", None)
    if current is None or not set(_TAKEN) <= set(inspect.signature(current).parameters):
        return None
    return patch


def _load_model(original: Any, way: Callable[[], Way]) -> Any:
    function = original.__func__

    @wraps(function)
    def _load_pretrained_model(
        model: Any,
        state_dict: Any,
        checkpoint_files: Any,
        load_config: Any,
        *args: Any,
        **options: Any,
    ) -> Any:
        usual = (model, state_dict, checkpoint_files, load_config, *args)
        how = possible(way())
        if how == "off":
            result = function(*usual, **options)
            _check_made(model, result[0].missing_keys, "load is 'off'")
            return result
        try:
            _check_can(model, state_dict, checkpoint_files, load_config)
            # What is made in inference mode can be trained no more; transformers' threads are outside of it.
            with collector_paused(), torch.inference_mode(mode=False):
                paths = [Path(path) for path in checkpoint_files]
                info, done = load_files(model, paths, load_config, how)
        except StepBackError as reason:
            beyond = next(
                (p for p in checkpoint_files or () if remote_at(Path(p)) is not None), None
            )
            if beyond is not None:
                raise BadInputError(only_by_regraft(named(str(beyond)), str(reason))) from reason
            result = function(*usual, **options)
            _check_made(model, result[0].missing_keys, str(reason))
            model.regraft_load = Loaded("off", str(reason))
            return result
        model.regraft_load = done
        return info, None

    return staticmethod(_load_pretrained_model)


def _check_can(model: Any, state_dict: Any, files: Any, config: Any) -> None:
    """Raises ``StepBackError`` for what is not done here."""
    from transformers.integrations import deepspeed

    zero3: Callable[[], bool] = deepspeed.is_deepspeed_zero3_enabled

    devices = (config.device_map or {}).values()
    others = {d for d in map(_device_type, devices) if d not in _DEVICES}
    reasons: tuple[tuple[Any, str], ...] = (
        (state_dict is not None, "a state dict was given"),
        (not files, "there are no weights files"),
        (config.hf_quantizer is not None, "the model is quantised, or to be"),
        ("disk" in devices, "a part of the model is offloaded to disk"),
        (others, f"the devices {', '.join(sorted(others))} are not supported"),
        (zero3(), "DeepSpeed ZeRO-3 spreads the model"),
        (getattr(model, "_pp_stage", None) is not None, "the model is spread by layers"),
        (
            any(not str(file).endswith((".safetensors", ".bin")) for file in files or ()),
            "the weights are neither safetensors nor .bin files",
        ),
    )
    for applies, reason in reasons:
        if applies:
            raise StepBackError(reason)


def _device_type(device: Any) -> str:
    if isinstance(device, int):
        return "cuda"
    return str(device).partition(":")[0]


def load_files(model: Any, paths: Sequence[Path], config: Any, way: Way) -> tuple[Any, Loaded]:
    """Load weights files into a model that transformers has made; what it returns of them, and what was done.

    Raises:
        StepBackError: something that transformers has to do itself. Nothing is changed then.
        BadInputError: a file changed while it was read. Nothing is changed then.
    """
    from transformers.core_model_loading import set_param_for_module
    from transformers.utils.loading_report import LoadStateDictInfo

    try:
        lazy = LazyFiles(open_weights(paths))
    except RegraftError as error:
        raise StepBackError(f"the files could not be opened: {error}") from error
    state = model.state_dict()
    with lazy.files:
        rules = _rules_of(model)
        is_ruled = isinstance(rules.imported, Ruled)
        made, unmatched = _convert(rules, lazy.state_dict())
        names = _Names(model, config, state, is_ruled=is_ruled)
        others = by_books(lazy, _folder_of(paths)) if unmatched else None
        if others is not None:
            made, unmatched = _convert(rules, others)
        else:
            unmatched = [*unmatched, *names.check(lazy.source.tensors.names, made, unmatched)]
        parts, casts = _parts(made, state, config, may_cast=is_ruled or lazy.source.is_remote)
        way = "copy" if config.disable_mmap or lazy.source.is_remote else way
        tensors, amounts = make_parts(parts, lazy.source.tensors, lazy.files, way)
    info = LoadStateDictInfo(
        missing_keys=set(state),
        unexpected_keys=names.unexpected(unmatched),
        mismatched_keys=set(),
        conversion_errors={},
        error_msgs=[],
        skipped_pp_keys=set(),
    )
    no_quantizer: Any = None
    for name, tensor in tensors.items():
        value = tensor.to(casts[name]) if name in casts else tensor
        set_param_for_module(model, name, value, info, no_quantizer)
    model._weight_conversions = names.used()
    done = Loaded(way, tensors=len(parts), bytes=sum(part.bytes for part in parts))
    done.add(amounts)
    if casts:
        done.notes.append(
            f"{count_in_words(len(casts), 'tensor', 'was')} cast to the dtypes of the model"
        )
    return info, done


def _folder_of(paths: Sequence[Path]) -> Path:
    """The checkpoint that some weights files are: the folder of several, or the one file."""
    alone = len(paths) == 1 and not (paths[0].parent / CONFIG).is_file()
    return paths[0] if alone else paths[0].parent


@dataclass(frozen=True, slots=True)
class _Rules:
    """What is known of a model that is being loaded."""

    live: LiveModel
    imported: Imported | Ruled


def _rules_of(model: Any) -> _Rules:
    """What the user's rule books, or the registry, know of a model. Raises ``StepBackError`` where neither does."""
    try:
        found = mapping(model)
        number = next(i for i, one in enumerate(found.live.models) if one.module is model)
        return _Rules(found.live.models[number], found.imported[number])
    except RegraftError as error:
        raise StepBackError(str(error)) from error


def _check_made(model: Any, missing: Collection[str], why: str) -> None:
    """Raises ``BadInputError`` where transformers alone left out weights that a rule book of the user's own makes."""
    if not missing or not own_books():
        return
    imported = _rules_of(model).imported
    if isinstance(imported, Ruled) and (lost := sorted(imported.changed & set(missing))):
        message = (
            f"transformers loaded the model by itself and found no values for this weight: {why}"
        )
        fix = "load it with regraft.load_checkpoint, or convert the checkpoint with regraft.convert and load that"
        raise BadInputError(Finding("missing", message, key=key, fix=fix) for key in lost)


def _convert(rules: _Rules, tensors: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], list[str]]:
    """The model's tensors, as what is to be read; and the names of the file that it has no place for.

    Raises ``StepBackError``.
    """
    live, imported = rules.live, rules.imported
    try:
        report = StateDictReport(imported.layout)
        unmatched: list[str] = []
        try:
            made = convert_model(imported, dict(tensors), imported.layout, report)
        except RegraftError as error:
            lands = imported.lands(list(tensors))
            unmatched = [name for name, fits in zip(tensors, lands, strict=True) if not fits]
            if not unmatched:
                raise StepBackError(str(error)) from error
            rest = {name: t for name, t in tensors.items() if name not in set(unmatched)}
            made = convert_model(imported, rest, imported.layout, report)
    except RegraftError as error:
        raise StepBackError(str(error)) from error
    placed = {place: made[key] for key in made for place in live.keys.get(key, ())}
    if len(placed) < len(made):
        lost = next(key for key in made if not live.keys.get(key))
        raise StepBackError(f"the model has no place for {lost}")
    return placed, unmatched


class _Names:
    """What transformers itself makes of the names of a file, one of each kind."""

    def __init__(
        self, model: Any, config: Any, state: Mapping[str, Any], *, is_ruled: bool
    ) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.model, self.state, self.is_ruled = model, dict(state), is_ruled
        self.changes = list(config.weight_mapping or ())
        self.renamings = [c for c in self.changes if isinstance(c, WeightRenaming)]
        self.converters = [c for c in self.changes if isinstance(c, WeightConverter)]

    def _rename(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        base = self.model.base_model_prefix
        new, pattern = rename_source_key(name, self.renamings, self.converters, base, self.state)
        if new not in self.state and name in self.state:
            new, pattern = rename_source_key(name, [], [], base, self.state)
        return new, pattern

    def check(
        self, names: Sequence[str], made: Mapping[str, Lazy], unmatched: Sequence[str]
    ) -> list[str]:
        """Compare what transformers would make of one name of each kind with what was made.

        Returns the names of which neither makes anything, such as frequencies that older releases saved.

        Raises ``StepBackError`` where they differ: a ``key_mapping`` of the caller's, a change that is not known.
        """
        lost = set(unmatched)
        kinds: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            kinds.setdefault(_NUMBER.sub("#", name), []).append(row)
        becomes = _targets_of([rows[0] for rows in kinds.values()], made)
        idle: list[int] = []
        for first, *others in kinds.values():
            name = names[first]
            if name in lost:
                new, _ = self._rename(name)
                if new in self.state:
                    raise StepBackError(f"{name} is {new} for transformers alone")
            elif self._is_idle(name, becomes[first]):
                idle += [first, *others]
        becomes = _targets_of(idle, made)
        return [names[row] for row in idle if self._is_idle(names[row], becomes[row])]

    def _is_idle(self, name: str, becomes: set[str]) -> bool:
        """Whether a name comes to nothing, here and in transformers. Raises ``StepBackError`` where they differ."""
        new, _ = self._rename(name)
        if not becomes and new not in self.state:
            return True
        if new not in becomes:
            if becomes and self.is_ruled and new not in self.state:
                # transformers has no place for it, and a rule book of the user's own makes something of it.
                return False
            told = ", ".join(sorted(becomes)) or "nothing"
            raise StepBackError(f"{name} becomes {new} for transformers, and {told} for regraft")
        return False

    def unexpected(self, unmatched: Sequence[str]) -> set[str]:
        """The keys that the model has no place for, as transformers would report them."""
        found: set[str] = set()
        for name in unmatched:
            new, pattern = self._rename(name)
            if pattern is None:
                found.add(new)
                continue
            converter = next(c for c in self.converters if pattern in c.source_patterns)
            first = converter.target_patterns[0]
            found |= {new.replace(first, other) for other in converter.target_patterns}
        return found

    def used(self) -> list[Any]:
        """The changes that were at work, which ``save_pretrained`` undoes."""
        return [change for change in self.changes if change.was_used()]


def _targets_of(rows: Sequence[int], made: Mapping[str, Lazy]) -> dict[int, set[str]]:
    """The tensors that some of the file's tensors give something to."""
    found: dict[int, set[str]] = {row: set() for row in rows}
    for name, tensor in made.items():
        for row in [tensor.row] if tensor.row >= 0 else tensor.rows().tolist():
            if row in found:
                found[row].add(name)
    return found


def _parts(
    made: Mapping[str, Lazy], state: Mapping[str, Any], config: Any, *, may_cast: bool
) -> tuple[list[Part], dict[str, torch.dtype]]:
    """The tensors to make, and the types that some of them are cast to.

    Raises ``StepBackError`` where shapes or types do not fit.
    """
    from transformers.integrations.accelerate import get_device

    wanted = _dtypes(made, state, config)
    devices = config.device_map or {"": "cpu"}
    parts: list[Part] = []
    casts: dict[str, torch.dtype] = {}
    cast_bytes = 0
    for name, tensor in made.items():
        part, findings = part_of(name, tensor, state[name])
        if part is None:
            raise StepBackError(str(findings[0]))
        device = torch.device(get_device(devices, name, valid_torch_device=True))
        if is_sharded(state[name]):
            device = torch.device(state[name].device_mesh.device_type, device.index)
        parts.append(Part(name, part.strips, part.shape, part.dtype, device))
        if part.dtype != wanted[name]:
            casts[name] = wanted[name]
            cast_bytes += part.bytes
    if not may_cast and cast_bytes * 2 > sum(part.bytes for part in parts):
        one = next(iter(casts))
        before = next(part.dtype for part in parts if part.name == one)
        raise StepBackError(f"most of it is cast, such as {one} from {before} to {casts[one]}")
    return parts, casts


def _dtypes(
    made: Mapping[str, Lazy], state: Mapping[str, Any], config: Any
) -> dict[str, torch.dtype]:
    """The type that each tensor has in the model, which keeps some of them in another one."""
    plan = config.dtype_plan or {}
    found = {name: state[name].dtype for name in made}
    if plan:
        from transformers.core_model_loading import build_glob_alternation

        pattern, of_group, _ = build_glob_alternation(list(plan))
        for name in made:
            hit = pattern.search(name)
            if hit is not None and hit.lastgroup is not None:
                found[name] = plan[of_group[hit.lastgroup]]
    return found
