"""regraft moves model checkpoints and adapters between weight layouts, exactly, and says so when it can't."""

from __future__ import annotations

TYPE_CHECKING = False
"""As ``typing`` has it, which takes longer to import than all of this: the command line catches Ctrl-C from here on."""

if TYPE_CHECKING:
    from regraft import errors as errors
    from regraft.arrays.anonymous import rearrange
    from regraft.bridges.peft.hook import install, installed, uninstall
    from regraft.bridges.peft.load import load_adapter
    from regraft.checking.check import check
    from regraft.checking.verify import verify
    from regraft.checkpoints.inspect import CheckpointInspection
    from regraft.converting.convert import convert
    from regraft.converting.plan import plan
    from regraft.converting.save import SaveInLayout, save_adapter
    from regraft.converting.slices import slices
    from regraft.dialects.image.inspect import ImageFolder, ImageSummary
    from regraft.dialects.peft.inspect import Inspection
    from regraft.errors import (
        AmbiguousError,
        BadInputError,
        Finding,
        NotEqualError,
        RefusedError,
        RegraftError,
        UnmatchedKeysError,
    )
    from regraft.explaining.diff import diff
    from regraft.explaining.explain import explain
    from regraft.explaining.inspect import inspect
    from regraft.layouts.spelled import LayoutName
    from regraft.learning.learn import learn
    from regraft.learning.watch import learn_from
    from regraft.live.load import from_pretrained, load_checkpoint
    from regraft.live.mapping import mapping
    from regraft.live.state_dict import convert_state_dict
    from regraft.merging.extract import extract
    from regraft.merging.merge import merge
    from regraft.planning.plan import Plan
    from regraft.report import Report
    from regraft.rules.book import load_book, only_books

__version__ = "0.1.0.dev0"

__all__ = [
    "AmbiguousError",
    "BadInputError",
    "CheckpointInspection",
    "Finding",
    "ImageFolder",
    "ImageSummary",
    "Inspection",
    "LayoutName",
    "NotEqualError",
    "Plan",
    "RefusedError",
    "RegraftError",
    "Report",
    "SaveInLayout",
    "UnmatchedKeysError",
    "check",
    "convert",
    "convert_state_dict",
    "diff",
    "explain",
    "extract",
    "from_pretrained",
    "inspect",
    "install",
    "installed",
    "learn",
    "learn_from",
    "load_adapter",
    "load_book",
    "load_checkpoint",
    "mapping",
    "merge",
    "only_books",
    "plan",
    "rearrange",
    "save_adapter",
    "slices",
    "uninstall",
    "verify",
]


_LAZY = {
    "AmbiguousError": "regraft.errors",
    "BadInputError": "regraft.errors",
    "Finding": "regraft.errors",
    "NotEqualError": "regraft.errors",
    "RefusedError": "regraft.errors",
    "RegraftError": "regraft.errors",
    "UnmatchedKeysError": "regraft.errors",
    "check": "regraft.checking.check",
    "convert": "regraft.converting.convert",
    "inspect": "regraft.explaining.inspect",
    "install": "regraft.bridges.peft.hook",
    "installed": "regraft.bridges.peft.hook",
    "load_adapter": "regraft.bridges.peft.load",
    "uninstall": "regraft.bridges.peft.hook",
    "CheckpointInspection": "regraft.checkpoints.inspect",
    "ImageFolder": "regraft.dialects.image.inspect",
    "ImageSummary": "regraft.dialects.image.inspect",
    "Inspection": "regraft.dialects.peft.inspect",
    "LayoutName": "regraft.layouts.spelled",
    "Plan": "regraft.planning.plan",
    "Report": "regraft.report",
    "SaveInLayout": "regraft.converting.save",
    "convert_state_dict": "regraft.live.state_dict",
    "from_pretrained": "regraft.live.load",
    "load_checkpoint": "regraft.live.load",
    "mapping": "regraft.live.mapping",
    "diff": "regraft.explaining.diff",
    "learn": "regraft.learning.learn",
    "learn_from": "regraft.learning.watch",
    "explain": "regraft.explaining.explain",
    "extract": "regraft.merging.extract",
    "merge": "regraft.merging.merge",
    "load_book": "regraft.rules.book",
    "only_books": "regraft.rules.book",
    "plan": "regraft.converting.plan",
    "rearrange": "regraft.arrays.anonymous",
    "save_adapter": "regraft.converting.save",
    "slices": "regraft.converting.slices",
    "verify": "regraft.checking.verify",
}


if (
    not TYPE_CHECKING
):  # so that type checkers see the imports above, and refuse a name that is not there

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name == "errors":
            return import_module("regraft.errors")
        if name not in _LAZY:
            raise AttributeError(f"module 'regraft' has no attribute {name!r}")
        try:
            return getattr(import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:
            from regraft.errors.extras import explained

            told = explained(error, f"regraft.{name}")
            if told is error:
                raise
            raise told from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
