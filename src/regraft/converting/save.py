"""Saving what is trained in a live model, in a layout of choice."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model_state_dict
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from regraft.bridges.peft.holders import Place, find_models, find_peft_models
from regraft.bridges.peft.known import LiveTransformers, known_model, live_layout, to_numpy
from regraft.bridges.peft.locks import alone_with
from regraft.bridges.transformers.files import InstalledTransformers
from regraft.converting.adapters import Request, convert_adapters
from regraft.converting.convert import convert
from regraft.dialects.names import layout_named, source_named
from regraft.dialects.peft.inspect import inspect_adapter
from regraft.dialects.peft.scan import PREFIX
from regraft.dialects.peft.source import CONFIG, WEIGHTS, open_adapter
from regraft.errors import BadInputError, Finding
from regraft.layouts.spelled import LayoutName
from regraft.options import ConvertOptions
from regraft.planning.model import Foreign, ModelConfig
from regraft.report import Report, log_report
from regraft.rules.book import Rules, books_for, only_books, own_books, own_rules
from regraft.storage.folder import copy_file
from regraft.storage.safetensors import write_tensors
from regraft.storage.stale import TRAINING_ARGUMENTS, is_training_state


def save_adapter(
    model: Any,
    dst: str | os.PathLike[str],
    *,
    to: LayoutName | str | None = None,
    adapter: str = "default",
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    via: str | None = None,
    rules: Rules = (),
) -> Report:
    """Save an adapter of a live model, in any layout or dialect.

    Args:
        model: a ``PeftModel``, a transformers model with adapters inside, or anything that holds one of them, as
            `regraft.load_adapter` takes it.
        dst: the folder to write, or the file where the dialect writes one. It appears whole or not at all.
        to: the layout, such as ``"transformers-v4"`` or ``"vllm"``; that of the live model if omitted.
        adapter: the adapter's name in the model.
        overwrite: replace ``dst`` if it exists.
        dry_run: run without writing.
        verify: compare what every target adds in the model and in the result, before anything is written.
        via: allow what is done only on request, as `regraft.convert` takes it.
        rules: rule books to use in place of regraft's, as `regraft.convert` takes them.

    Returns:
        What was done, as `regraft.convert` returns it.

    Raises:
        BadInputError: there is no transformers model, it has no adapter of this name, or ``dst`` exists.
        RefusedError: it has no exact equivalent in the layout. Nothing is written.
    """
    with ExitStack() as stack:
        stack.enter_context(alone_with(model))
        stack.enter_context(only_books(rules))
        place = _holder_of(model, adapter)
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="regraft-"))
        files = _write(place, adapter, Path(scratch))
        live = _own_layout(place, files) if _is_own(place) else str(live_layout())
        asked = ConvertOptions(
            to=live if to is None else to,
            overwrite=overwrite,
            dry_run=dry_run,
            verify=verify,
            via=via,
        )
        report = convert_adapters(
            Request(
                src=files,
                dst=Path(dst),
                to=layout_named(asked.to),
                given=source_named(live),
                model=None,
                asked=asked,
                foreign=_foreign(place),
                known=_known(place),
            )
        )
        report.source = f"the {type(model).__name__} in memory"
        report.own_rules = own_rules()
        log_report(report)
        return report


def _holder_of(model: Any, adapter: str) -> Place:
    """Where in a model an adapter is. Raises ``BadInputError`` where it is nowhere, or in several models."""
    places = find_models(model)
    if not places and own_books():
        # No model of transformers, and books of the user's own that may know it.
        places = find_peft_models(model)
    if not places:
        raise BadInputError(
            Finding(
                "no-model",
                f"a {type(model).__name__} that holds no transformers model",
                fix="give the rule book that knows it with rules=, for a model of your own in a PeftModel; or save it "
                "with its own save_pretrained, and give that folder to regraft.convert",
            )
        )
    found = [place for place in places if adapter in _configs(place)]
    if len(found) == 1:
        return found[0]
    names = sorted({name for place in places for name in _configs(place)})
    message = (
        f"several models in it have an adapter {adapter!r}"
        if found
        else f"the model has no adapter {adapter!r}; it has {', '.join(names) or 'none'}"
    )
    fix = "give the inner model" if found else "name one of them as adapter"
    raise BadInputError(Finding("no-such-adapter", message, where=type(model).__name__, fix=fix))


def _is_own(place: Place) -> bool:
    """Whether a model is none of transformers' own, and books of the user's own know it in layouts of theirs."""
    if not isinstance(place.base, PreTrainedModel):
        return True
    mine, live = own_books(), live_layout().name
    knowing = books_for(known_model(place.base).model_types(), mine) if mine else []
    return bool(knowing) and not any(live in book.layouts for book in knowing)


def _own_layout(place: Place, files: Path) -> str:
    """The layout that an adapter of such a model is in, as its names tell; one of them where they are alike.

    Raises ``BadInputError`` where no book knows them.
    """
    source = open_adapter(files, files)
    found = inspect_adapter(source, _known(place), _foreign(place))
    if found.layouts:
        return found.layouts[0]
    message = f"no rule book knows what it adapts in the {type(place.base).__name__}"
    fix = "give a rule book that does with rules="
    unknown = (Finding("unknown-model", message, key=name, fix=fix) for name in source.tensors)
    raise BadInputError(found.problems or unknown)


def _known(place: Place) -> ModelConfig | None:
    """The config of a live model, where it has one that says what it is."""
    config = getattr(place.base, "config", None)
    if isinstance(place.base, PreTrainedModel) or hasattr(config, "to_dict"):
        return known_model(place.base)
    return None


def _foreign(place: Place) -> Foreign:
    is_theirs = isinstance(place.base, PreTrainedModel)
    return LiveTransformers(place.base) if is_theirs else InstalledTransformers()


def _configs(place: Place) -> Mapping[str, PeftConfig]:
    holder: Any = place.peft_model or place.base
    return getattr(holder, "peft_config", None) or {}


def _write(place: Place, adapter: str, folder: Path) -> Path:
    """The adapter's files, as the installed PEFT writes them, and the folder that they are in."""
    if place.peft_model is not None:
        place.peft_model.save_pretrained(str(folder), selected_adapters=[adapter])
        return folder if adapter == "default" else folder / adapter
    tensors = get_peft_model_state_dict(place.base, adapter_name=adapter)
    config = _configs(place)[adapter]
    training, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = training
    arrays = {f"{PREFIX}{name}": to_numpy(value) for name, value in tensors.items()}
    write_tensors(folder / WEIGHTS, arrays, {"format": "pt"})
    return folder


class SaveInLayout(TrainerCallback):
    """A callback that writes each checkpoint of a ``Trainer`` in another layout, too.

    Beside the files of ``checkpoint-100`` a folder ``checkpoint-100/LAYOUT`` appears, ready for the tool. What the
    Trainer needs to resume stays as it is. An adapter is converted as an adapter, a model as a model.

    Args:
        to: the layout or dialect, such as ``"vllm"`` or ``"transformers-v4"``.
        folder: what to call the folder in each checkpoint; the layout's name if omitted.
        options: other arguments of `regraft.convert`, such as ``via`` or ``rules``.

    >>> trainer = Trainer(model, args, callbacks=[regraft.SaveInLayout(to="vllm")])  # doctest: +SKIP
    """

    def __init__(self, to: LayoutName | str, *, folder: str | None = None, **options: Any) -> None:
        with only_books(options.get("rules", ())):
            layout_named(to)
        self.to = to
        self.folder = folder or to.replace(":", "-").replace("/", "-")
        self.options = options

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Refuse before the training what could not be saved after it; of sharded models nothing is asked."""
        if not state.is_world_process_zero or args.fsdp or args.deepspeed:
            return
        known = {name: self.options[name] for name in ("via", "rules") if name in self.options}
        for adapter in [name for place in find_models(model) for name in _configs(place)]:
            dst = Path(args.output_dir or ".") / self.folder
            save_adapter(
                model, dst, to=self.to, adapter=adapter, dry_run=True, overwrite=True, **known
            )

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Convert what was just saved, in the one process that saves."""
        checkpoint = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or not checkpoint.is_dir():
            return
        places = find_models(model)
        with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".regraft-") as scratch:
            base, files = Path(scratch) / "base", Path(scratch) / "files"
            base.mkdir()
            options = dict(self.options)
            if len(places) == 1 and any(checkpoint.rglob(CONFIG)):
                config = places[0].base.config
                (base / "config.json").write_text(config.to_json_string(use_diff=False), "utf-8")
                options.setdefault("model", base)
            _link_weights(checkpoint, files, self.folder)
            convert(files, checkpoint / self.folder, to=self.to, overwrite=True, **options)


def _link_weights(checkpoint: Path, files: Path, without: str) -> None:
    """The files of a Trainer's checkpoint that are the model's, by their names in another folder."""
    for path in sorted(checkpoint.rglob("*")):
        inside = path.relative_to(checkpoint)
        if path.is_dir() or inside.parts[0] == without or _is_of_training(path):
            continue
        place = files / inside
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:
            copy_file(path, place)


def _is_of_training(path: Path) -> bool:
    return path.name == TRAINING_ARGUMENTS or is_training_state(path)
