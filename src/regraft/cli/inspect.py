"""`regraft inspect`: what an adapter or a checkpoint is."""

from __future__ import annotations

from pathlib import Path

import click

from regraft.cli import options
from regraft.cli.app import Job
from regraft.cli.output import Output


@click.command(cls=options.WithArguments)
@options.src
@options.source
@options.model
@options.architecture
@options.rules
@options.beyond
@options.html
@options.json
@options.quiet
def inspect(
    src: Path,
    source: str | None,
    model: Path | None,
    architecture: str | None,
    rules: tuple[str, ...],
    html: Path | None,
    json: bool,
    quiet: bool,
) -> Job:
    """Show what an adapter or a checkpoint is.

    Shows its layout, with the evidence; of an adapter its ranks, scales and targets, of a checkpoint its model,
    files and tensors. Of a LoRA of an image or video model, or of a folder of such files: family, tool, algorithms,
    ranks, alphas, base and text encoders, one file a line (--json: one object a line).

    Exit status: 0 it is sound, 1 something is wrong with it, 2 usage.
    """
    options.check_layouts(rules, from_=source)
    out = Output(json=json, quiet=quiet)

    def job() -> int:
        from regraft.api import inspect
        from regraft.checkpoints.source import is_checkpoint
        from regraft.cli.pages import failure_page, show_page
        from regraft.cli.words import show_findings, show_inspection

        if html is None and _is_image(src):
            with options.told(rules, architecture):
                return _inspect_image(out, src)
        if is_checkpoint(src):
            with options.told(rules, architecture):
                return _inspect_checkpoint(out, src, model, html)
        with options.told(rules, architecture), failure_page(html, "inspect", src):
            inspection = inspect(src, model=model, source=source)
        if json:
            out.data(inspection.to_dict())
        elif not quiet:
            show_inspection(out, inspection)
        show_page(out, html, inspection, src)
        if inspection.problems:
            show_findings(out, "bad input", inspection.problems)
            return 1
        return 0

    return job


def _inspect_checkpoint(out: Output, src: Path, model: Path | None, html: Path | None) -> int:
    from regraft.bridges.transformers.files import InstalledTransformers
    from regraft.checkpoints.inspect import inspect_checkpoint
    from regraft.cli.checkpoint_words import show_inspected_checkpoint
    from regraft.cli.words import show_findings

    if html is not None:
        message = "there is no page of a checkpoint alone; 'convert --dry-run --html' makes one"
        raise click.BadParameter(message, param_hint="--html")
    result = inspect_checkpoint(src, model, InstalledTransformers())
    if out.json:
        out.data(result.to_dict())
    elif not out.quiet:
        show_inspected_checkpoint(out, result)
    if result.problems:
        show_findings(out, "bad input", result.problems)
        return 1
    return 0


def _is_image(src: Path) -> bool:
    """Whether a path is a LoRA of an image model, or a folder with several files of which one is."""
    from regraft.dialects.image.recognise import recognise, weights_in

    if src.is_file() or not src.is_dir() or (src / "adapter_config.json").exists():
        return recognise(src) is not None or weights_in(src) is not None
    if (src / "config.json").exists() or any(src.glob("*.index.json")):
        return False
    found = sorted(src.rglob("*.safetensors"))[:20]
    return any(recognise(path) is not None for path in found)


def _inspect_image(out: Output, src: Path) -> int:
    from regraft.cli.image_words import show_image, show_images
    from regraft.dialects.image.inspect import summaries, summarize
    from regraft.dialects.image.recognise import weights_in

    one = src if src.is_file() else weights_in(src)
    if one is not None:
        summary = summarize(one)
        if out.json:
            out.data(summary.to_dict())
        elif not out.quiet:
            show_image(out, summary)
        return 1 if summary.problem else 0
    wrong = False
    rows = []
    for summary in summaries(src):
        wrong |= bool(summary.problem)
        if out.json:
            out.line(summary.to_dict())
        else:
            rows.append(summary)
    if not out.json and not out.quiet:
        show_images(out, rows)
    return 1 if wrong else 0
