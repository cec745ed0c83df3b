"""Loading a checkpoint of any layout straight into the memory of a live model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from regraft.arrays.lazy import Lazy
from regraft.bridges.torch_tensors import parameters_of
from regraft.checkpoints.source import open_checkpoint
from regraft.errors import BadInputError, Finding, RefusedError, RegraftError, UnmatchedKeysError
from regraft.live.computed import compute_buffers
from regraft.live.lazily import LazyFiles, by_books
from regraft.live.loaded import Loaded
from regraft.live.memory import TORCH, Part, Way, collector_paused, make_parts, possible
from regraft.live.ranks import is_sharded, local_region
from regraft.live.state_dict import ConvertedStateDict, convert_state_dict
from regraft.names.live import walk_modules
from regraft.names.patterns import patterns
from regraft.planning.slices import Region, shape_of_region
from regraft.report import count_in_words
from regraft.rules.book import Rules, only_books
from regraft.sources.places import address_of, below, locate, visiting
from regraft.storage.stand_ins import named, remote_at

if TYPE_CHECKING:
    from regraft.bridges.peft.load import Inside

WAYS = ("map", "copy", "off")
"""The last one is for ``from_pretrained`` alone: it leaves the load to transformers."""


def load_checkpoint(
    model: Any,
    path: str | os.PathLike[str],
    *,
    load: Way = "map",
    adapter: str | os.PathLike[str] | None = None,
    key_mapping: dict[str, str] | None = None,
    key: str | None = None,
    rules: Rules = (),
) -> Loaded:
    """Load a checkpoint of any layout that is known into a live model, each process its own part of it.

    Args:
        model: a transformers model, or anything that holds one: on the CPU, on GPUs, on the meta device, spread with
            FSDP2 or tensor parallelism (DTensors). Made on the meta device it takes no memory before it is loaded.
        path: the checkpoint's folder, or its one file; here, in a store (``s3://bucket/model``), on a web server, or
            a model of the hub. What a training run left is read as it lies there: DCP folders, Megatron-Core's,
            files of single ranks.
        load: ``"map"`` lets tensors on the CPU be pages of the files, privately: what is written to them stays in this
            process. ``"copy"`` reads everything, for files that may be rewritten in place while the model lives.
        adapter: an adapter to load on top. It is put into the model itself, as ``load_adapter`` of transformers' models
            does, where there is no ``PeftModel`` around it.
        key_mapping: patterns and replacements of your own that come first, as ``from_pretrained`` takes them.
        key: below which key the model is in what a training run left, where several fit.
        rules: rule books to use in place of regraft's, as `regraft.convert` takes them.

    Returns:
        What was done; ``model.regraft_load`` has it, too.

    Raises:
        BadInputError: the file and the model do not fit: every weight must be in the file, and every tensor of the
            file in the model, with its shape; or a file changed while it was read; or the adapter. All problems come
            together, and the model is as it was. Only where reading itself fails, and bytes go straight into memory
            that the model had (a GPU's, a shard's, one that processes share), the error names what is not.
        UnmatchedKeysError, AmbiguousError: as ``convert_state_dict``.
        RefusedError: FullyShardedDataParallel (FSDP1) has flattened the model.
    """
    check_way(load, WAYS[:2])
    with torch.inference_mode(mode=False), below(key), visiting(), only_books(rules):
        return _load_checkpoint(model, locate(path), possible(load), adapter, key_mapping)


def _load_checkpoint(
    model: Any,
    path: Path,
    load: Way,
    adapter: str | os.PathLike[str] | None,
    key_mapping: dict[str, str] | None,
) -> Loaded:
    """``load_checkpoint``, outside of inference mode: what is made in that can be trained no more."""
    lazy = LazyFiles(open_checkpoint(path))
    if lazy.source.is_remote:
        load = "copy"  # there are no pages of files to map
    state = _tensors_of(model)
    with lazy.files, collector_paused():
        wanted = _wanted(lazy, path, model, key_mapping)
    _check_own(model, wanted, state, path)
    parts, casts, findings = _parts(wanted, state)
    findings = [*(_missing(key) for key in wanted.report.missing), *findings]
    if findings:
        raise BadInputError(findings)
    done = Loaded(load)
    # What is written where it is, and cannot be given back.
    kept = [part.name for part in parts if not _is_given_back(state[part.name])]
    with lazy.files:
        inside = None if adapter is None else _prepared(model, adapter, wanted, state)
        if inside is not None and kept:
            inside.rehearse()
        with _told_on_failure([part.name for part in parts if part.into is not None]):
            made, amounts = make_parts(parts, lazy.source.tensors, lazy.files, load)
            for key in casts:
                made[key] = made[key].to(state[key].dtype)
    with _told_on_failure(kept), _undone_on_failure(model, state):
        _place(model, wanted, state, made)
        left = compute_buffers(model)
        if inside is not None:
            inside.put()
    done.add(amounts)
    done.tensors, done.bytes = len(parts), sum(part.bytes for part in parts)
    if casts:
        done.notes.append(
            f"{count_in_words(len(casts), 'tensor', 'was')} cast to the model's dtypes"
        )
    if left:
        shown = ", ".join(pattern for pattern, _ in patterns(left))
        done.notes.append(
            f"no file has these buffers, and they are on the meta device still: {shown}"
        )
    for root in _roots(model):
        root.regraft_load = done
    return done


def _prepared(
    model: Any,
    adapter: str | os.PathLike[str],
    wanted: Mapping[str, Any],
    state: Mapping[str, Any],
) -> Inside:
    """The adapter that goes on top, converted with the weights that the model is about to be given.

    Raises as ``load_adapter`` does; nothing is loaded yet.
    """
    from regraft.bridges.peft.load import Inside

    arriving = {
        id(state[key]): made
        for key, made in wanted.items()
        if isinstance(made, Lazy) and key in state
    }
    return Inside.prepare(model, adapter, arriving)


def from_pretrained(
    cls: Any,
    path: str | os.PathLike[str],
    *args: Any,
    load: Way = "map",
    adapter: str | os.PathLike[str] | None = None,
    key: str | None = None,
    **options: Any,
) -> Any:
    """``cls.from_pretrained(path, ...)`` with the bytes moved by regraft: a checkpoint of transformers 4 in seconds.

    Names, dtypes, devices, ties, missing and unexpected keys, reports and quantisers stay transformers'. Where regraft
    cannot take part (a quantiser, offload to disk), transformers loads the model, and a warning says why.

    Args:
        cls: a class of transformers with ``from_pretrained``: ``AutoModelForCausalLM``, a model's own class.
        path: as ``from_pretrained`` takes it; or a folder in a store (``s3://bucket/model``), or what a training run
            left with a config beside it, as ``load_checkpoint`` reads it.
        *args: for ``from_pretrained``.
        load: ``"map"``, ``"copy"`` or ``"off"``; see ``load_checkpoint``.
        adapter: an adapter of either layout to load on top; the result is a ``PeftModel`` then.
        key: below which key the model is in what a training run left, where several fit.
        **options: for ``from_pretrained``.

    Returns:
        The model; ``model.regraft_load`` says what was done.

    Raises:
        BadInputError: a file changed while it was read. No model is made then.
    """
    from regraft.bridges.peft.hook import installed
    from regraft.bridges.peft.load import load_adapter

    check_way(load)
    with installed(load=load), below(key), visiting():
        there = _elsewhere(path)
        if there is not None and load == "off":
            raise BadInputError(only_by_regraft(named(str(there)), "load is 'off'"))
        result = cls.from_pretrained(path if there is None else str(there), *args, **options)
    model = result[0] if isinstance(result, tuple) else result
    if path is not None and there is not None:
        model.name_or_path = model.config._name_or_path = os.fspath(path)
    done = getattr(model, "regraft_load", None)
    if load != "off" and (done is None or done.way == "off"):
        why = (
            done.why
            if done is not None
            else f"{cls.__name__} does not load as models of transformers do"
        )
        warnings.warn(f"transformers loaded the model by itself: {why}", stacklevel=2)
    if adapter is not None:
        adapted = load_adapter(model, adapter)
        return (adapted, *result[1:]) if isinstance(result, tuple) else adapted
    return result


def _elsewhere(path: str | os.PathLike[str] | None) -> Path | None:
    """Where what is in a store, or in parts, can be read by regraft; ``None`` for what transformers reads by itself."""
    if path is None or (address_of(path) is None and not Path(path).is_dir()):
        return None
    there = locate(path)
    if there == Path(path):
        return None
    if not any(file.suffix in (".safetensors", ".bin") for file in there.rglob("*")):
        open_checkpoint(there)  # says that there are no weights, and where
    for file in there.iterdir():
        # transformers looks into headers for dtypes, and wants the bytes behind them to be there, if only as a hole.
        if (remote := remote_at(file)) is not None:
            os.truncate(file, remote.found.size)
    return there


def check_way(load: str, ways: Sequence[str] = WAYS) -> None:
    """Raises ``BadInputError`` for a way of loading that there is not."""
    if load not in ways:
        fix = f"give one of {', '.join(ways)}"
        raise BadInputError(Finding("option", f"load is {load!r}", key="load", fix=fix))


def _wanted(
    lazy: LazyFiles, path: Path, model: Any, key_mapping: dict[str, str] | None
) -> ConvertedStateDict:
    """The model's state dict, as what is to be read; what is missing is left to the caller.

    A checkpoint that neither transformers wrote is brought into the model's layout by rule books first.

    Raises ``UnmatchedKeysError`` with what else is wrong, too.
    """
    tensors = lazy.state_dict()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = convert_state_dict(tensors, to=model, key_mapping=key_mapping)
        except UnmatchedKeysError as error:
            made = by_books(lazy, path)
            if made is None:
                raise _with_all_else(error, tensors, model, key_mapping) from None
            found = convert_state_dict(made, to=model, key_mapping=key_mapping)
    if not found.report.missing:
        for warning in told:
            warnings.warn(str(warning.message), stacklevel=4)
    return found


def _with_all_else(
    error: UnmatchedKeysError,
    tensors: dict[str, Lazy],
    model: Any,
    key_mapping: dict[str, str] | None,
) -> UnmatchedKeysError:
    """The error, and what else does not fit: weights that are missing, shapes of what does land."""
    lost = {finding.key for finding in error.findings if finding.code == "unmatched"}
    rest = {name: tensor for name, tensor in tensors.items() if name not in lost}
    if not lost or not rest:
        return error
    try:
        found = convert_state_dict(rest, to=model, key_mapping=key_mapping)
        more = [*map(_missing, found.report.missing), *_parts(found, _tensors_of(model))[2]]
    except RegraftError as other:
        more = list(other.findings)
    return UnmatchedKeysError([*error.findings, *more])


def only_by_regraft(where: str, why: str) -> Finding:
    """What is wrong where transformers would have to read what is in a store or in parts by itself."""
    return Finding(
        "option",
        f"transformers cannot read it by itself, and would have to: {why}",
        where=where,
        fix="make a checkpoint of it on this machine with regraft convert, and load that",
    )


def _missing(key: str) -> Finding:
    fix = "give the checkpoint of this model, or load it with convert_state_dict, which keeps the model's values"
    return Finding(
        "missing", "the checkpoint has no values for this weight of the model", key=key, fix=fix
    )


def part_of(key: str, made: Lazy, target: Any) -> tuple[Part | None, list[Finding]]:
    """What a tensor of the model is made of in this process; what does not fit."""
    if made.dtype not in TORCH:
        message = f"torch has no type for {made.dtype}"
        return None, [Finding("dtype", message, key=key, fix="save it with another dtype")]
    dtype = TORCH[made.dtype]
    if tuple(made.shape) != tuple(target.shape):
        message = f"it has the shape {list(made.shape)}, the model wants {list(target.shape)}"
        return None, [Finding("shape", message, key=key, fix="give the checkpoint of this model")]
    region: Region | None = None
    shape = tuple(made.shape)
    if is_sharded(target):
        try:
            region = local_region(target, key)
        except BadInputError as error:
            return None, list(error.findings)
        shape = shape_of_region(region)
    if dtype != target.dtype and not (
        dtype.is_floating_point and target.dtype.is_floating_point and target.dtype.itemsize > 1
    ):
        message = f"it is {dtype}, and the model wants {target.dtype}"
        return None, [Finding("dtype", message, key=key, fix="make the model with that dtype")]
    return Part(key, made.cut(region), shape, dtype, target.device), []


def _parts(
    wanted: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[list[Part], set[str], list[Finding]]:
    """The tensors to make, those of them that are cast, and what does not fit; tied ones are made once."""
    parts: list[Part] = []
    casts: set[str] = set()
    findings: list[Finding] = []
    seen: set[int] = set()
    for key, made in wanted.items():
        if not isinstance(made, Lazy) or id(made) in seen:
            continue
        seen.add(id(made))
        target = state.get(key)
        if target is None:
            continue
        part, more = part_of(key, made, target)
        findings += more
        if part is None:
            continue
        if part.dtype != target.dtype:
            casts.add(key)
        parts.append(_settled(part, target))
    return parts, casts, findings


def _settled(part: Part, target: Any) -> Part:
    """The part, to be made in the memory that the model has, or in new memory, which a cast needs at any rate.

    Where new memory can take the place of the model's, it does, so that a failure leaves the model as it was.
    """
    local = target.to_local() if is_sharded(target) else target
    device = local.device
    if device.type == "meta":
        device = torch.device("cpu")
        if is_sharded(target) and target.device_mesh.device_type != "cpu":
            device = torch.device(target.device_mesh.device_type, torch.cuda.current_device())
    elif part.dtype == target.dtype and local.is_contiguous() and not _is_replaceable(target):
        return replace(part, device=device, into=local.detach())
    return replace(part, device=device)


def _is_replaceable(target: Any) -> bool:
    """Whether a tensor can be given other memory: nobody else looks at what it has.

    Others look at shards, at memory that processes share, and at a flat buffer of which it is a view.
    """
    return (
        not is_sharded(target)
        and target.device.type == "cpu"
        and not target.is_shared()
        and target.untyped_storage().nbytes() == target.numel() * target.element_size()
    )


def _is_given_back(target: Any) -> bool:
    """Whether a failure leaves a tensor of the model as it was."""
    return target.device.type == "meta" or _is_replaceable(target)


def _check_own(model: Any, wanted: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> None:
    """Raises ``RefusedError`` where a state dict has copies, and what is put there would not reach the model."""
    own = {
        id(tensor)
        for _, module in walk_modules(model)
        for tensor in (
            *module.parameters(),
            *module.buffers(),
            *(p for _, p in module.named_parameters(remove_duplicate=False)),
        )
    }
    key = next((key for key in wanted if key in state and id(state[key]) not in own), None)
    if key is not None:
        message = "the model's state dict has a copy of it, as FullyShardedDataParallel's has: it is kept flattened"
        fix = "load the model before it is wrapped, or shard it with fully_shard"
        raise RefusedError(Finding("flattened", message, where=str(path), key=key, fix=fix))


@contextmanager
def _undone_on_failure(model: Any, state: Mapping[str, Any]) -> Iterator[None]:
    """Give a model the tensors back that it had, where it had memory of its own for them.

    What ``state`` has is kept until the block ends.
    """
    roots = [module for _, module in walk_modules(model)]
    modules = [
        (module, dict(module._parameters), dict(module._buffers))
        for root in roots
        for module in root.modules()
    ]
    before = [(t, t.data) for t in state.values() if _is_replaceable(t)]
    try:
        yield
    except BaseException:
        for module, weights, buffers in modules:
            module._parameters.update(weights)
            module._buffers.update(buffers)
        for tensor, data in before:
            tensor.data = data
        raise


@contextmanager
def _told_on_failure(written: Sequence[str]) -> Iterator[None]:
    """Whatever is raised inside says which tensors of the model are not as they were."""
    try:
        yield
    except RegraftError as error:
        raise _with_half_loaded(error, written) from error.__cause__
    except Exception as error:
        if written:
            error.add_note(str(_half_loaded(written)))
        raise


def _with_half_loaded(error: RegraftError, written: Sequence[str]) -> RegraftError:
    """The error, and what may hold parts of two checkpoints now."""
    return type(error)([*error.findings, _half_loaded(written)]) if written else error


def _half_loaded(written: Sequence[str]) -> Finding:
    shown = ", ".join(f"{pattern} ({count})" for pattern, count in patterns(written))
    message = f"these tensors were being written, and are not as they were: {shown}"
    return Finding("half-loaded", message, fix="load the model again before it is used")


def _place(
    model: Any,
    wanted: Mapping[str, Any],
    state: Mapping[str, Any],
    made: dict[str, torch.Tensor],
) -> None:
    """Give the model its tensors; parameters stay the objects that they are, unless they had no memory."""
    of_lazy = {id(wanted[key]): key for key in made}
    fresh: dict[str, torch.Tensor] = {}
    weights = parameters_of(model)
    given: set[int] = set()
    for key, lazy in wanted.items():
        first = of_lazy.get(id(lazy)) if isinstance(lazy, Lazy) else None
        target = state.get(key)
        if first is None or target is None:
            continue
        tensor = made[first]
        if target.device.type == "meta":
            fresh[key] = _like(tensor, target)
        elif weights.get(key) not in given or key not in weights:
            _put(tensor, target)
        given.add(weights.get(key, 0))
    if fresh:
        _assign(model, fresh, weights)


def _like(tensor: torch.Tensor, target: Any) -> Any:
    """A local part as a DTensor, where the model has one."""
    if not is_sharded(target):
        return tensor
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        tensor,
        target.device_mesh,
        target.placements,
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )


@torch.no_grad()
def _put(tensor: torch.Tensor, target: Any) -> None:
    local = target.to_local() if is_sharded(target) else target
    if local.data_ptr() == tensor.data_ptr() and local.shape == tensor.shape:
        return
    if _is_replaceable(target):
        target.data = tensor
    else:
        local.copy_(tensor)


def _assign(model: Any, fresh: Mapping[str, torch.Tensor], weights: Mapping[str, int]) -> None:
    """Put tensors in the place of those on the meta device; what was tied is tied again."""
    for prefix, module in walk_modules(model):
        mine = {k.removeprefix(prefix): t for k, t in fresh.items() if k.startswith(prefix)}
        tied: dict[int, list[str]] = {}
        for key in mine:
            if prefix + key in weights:
                tied.setdefault(weights[prefix + key], []).append(key)
        module.load_state_dict(mine, strict=False, assign=True)
        for first, *others in tied.values():
            owner, _, leaf = first.rpartition(".")
            one = getattr(module.get_submodule(owner), leaf)
            for key in others:
                path, _, name = key.rpartition(".")
                setattr(module.get_submodule(path), name, one)


def _tensors_of(model: Any) -> dict[str, Any]:
    """The tensors of a model or holder by key: parameters and buffers themselves."""
    return {
        prefix + key: tensor
        for prefix, module in walk_modules(model)
        for key, tensor in module.state_dict(keep_vars=True).items()
    }


def _roots(model: Any) -> Iterator[Any]:
    """What bears the report: the model itself, or each module of an object that is none."""
    if isinstance(model, torch.nn.Module):
        yield model
        return
    for _, module in walk_modules(model):
        yield module
