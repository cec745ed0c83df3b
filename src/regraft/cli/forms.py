"""Which functions put what a command found into words, and on a page: one each for every type, found here alone."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from regraft.cli.output import Output
from regraft.shown import Shown

if TYPE_CHECKING:
    from regraft.errors.codes import Status
    from regraft.views.model import Page


class Forms(Struct, frozen=True):
    """The functions of one type, as ``module:function``, so that each is imported when it is used."""

    words: str
    """Called with the output and the result."""
    page: str | None = None
    """Makes a `regraft.views.model.Page` of it; ``None`` where there is none."""


FORMS: dict[str, Forms] = {
    "regraft.report.Report": Forms(
        "regraft.cli.words:show_report", "regraft.views.data:page_of_report"
    ),
    "regraft.dialects.peft.inspect.Inspection": Forms(
        "regraft.cli.words:show_inspection", "regraft.views.data:page_of_inspection"
    ),
    "regraft.checkpoints.inspect.CheckpointInspection": Forms(
        "regraft.cli.checkpoint_words:show_inspected_checkpoint"
    ),
    "regraft.dialects.image.inspect.ImageSummary": Forms("regraft.cli.image_words:show_image"),
    "regraft.dialects.image.inspect.ImageFolder": Forms("regraft.cli.image_words:show_images"),
    "regraft.checkpoints.verify.Verification": Forms(
        "regraft.cli.checkpoint_words:show_verification", "regraft.views.data:page_of_verification"
    ),
    "regraft.checking.certificate.AdapterVerification": Forms(
        "regraft.cli.words:show_adapter_verification",
        "regraft.views.data:page_of_adapter_verification",
    ),
    "regraft.checking.verdict.Check": Forms(
        "regraft.cli.check_words:show_check", "regraft.views.data:page_of_check"
    ),
    "regraft.checking.for_tool.ToolCheck": Forms(
        "regraft.cli.check_words:show_tool", "regraft.views.data:page_of_tool_check"
    ),
    "regraft.explaining.explanation.Explanation": Forms(
        "regraft.cli.explain:show_explanation", "regraft.views.answers:page_of_explanation"
    ),
    "regraft.explaining.diff.Diff": Forms(
        "regraft.cli.diff:show_diff", "regraft.views.answers:page_of_diff"
    ),
    "regraft.rules.lint.book.Linted": Forms(
        "regraft.cli.rules:show_linted", "regraft.views.answers:page_of_lint"
    ),
    "regraft.merging.extraction.Extraction": Forms("regraft.cli.extract:show_extraction"),
    "regraft.views.documents.RankSlices": Forms("regraft.cli.slices:show_slices"),
    "regraft.layouts.catalog.Catalog": Forms("regraft.cli.layouts:show_catalog"),
    "regraft.views.documents.BookList": Forms("regraft.cli.rules:show_list"),
    "regraft.views.documents.ShownBook": Forms("regraft.cli.rules:show_book"),
    "regraft.views.documents.LearnedBook": Forms("regraft.cli.learn:show_learned"),
    "regraft.views.documents.Probes": Forms("regraft.cli.probe:show_probes"),
    "regraft.views.documents.CodeList": Forms("regraft.cli.errors:show_codes"),
    "regraft.views.environment.Environment": Forms("regraft.cli.env:show_environment"),
}
"""By the type's module and name. JSON is each type's own ``to_dict``, and `regraft.views.schema` describes it."""


def tell(
    out: Output, found: Shown, html: Path | None = None, *sources: str | Path | None
) -> Status:
    """Tell what a command found, in the form that was asked for, and as a page with ``html``; its exit status."""
    if out.json:
        out.data(found.to_dict())
    elif not out.quiet:
        show(out, found)
    if html is not None and (page := page_of(found)) is not None:
        from regraft.cli.pages import write

        write(out, html, page, [Path(source) for source in sources if source is not None])
    return found.status


def forms_of(kind: type[Shown]) -> Forms | None:
    """The forms of a type; ``None`` where it has none."""
    return FORMS.get(f"{kind.__module__}.{kind.__qualname__}")


def show(out: Output, found: object) -> None:
    """Write a result in words."""
    forms = FORMS.get(f"{type(found).__module__}.{type(found).__qualname__}")
    if forms is None:
        raise TypeError(f"nothing is known of how to show a {type(found).__name__}")
    _function(forms.words)(out, found)


def page_of(found: Shown) -> Page | None:
    """The page of a result; ``None`` where its type has none."""
    forms = forms_of(type(found))
    if forms is None or forms.page is None:
        return None
    page: Page = _function(forms.page)(found)
    return page


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)
