"""Running one command line: errors become messages and an exit status."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from types import FrameType

import click

from regraft.cli.app import app
from regraft.cli.output import Output, silence
from regraft.errors import BadInputError, Finding, RefusedError, RegraftError
from regraft.errors.codes import CODES, Code, Status


class _Terminated(BaseException):
    pass


def run(args: Sequence[str]) -> int:
    """Run a command line and return its exit status; what it says (--key, --offline) holds for it alone."""
    return copy_context().run(_run, args)


def _run(args: Sequence[str]) -> int:
    options = args[: args.index("--")] if "--" in args else args
    out = Output(json="--json" in options)
    try:
        with _termination(), _quiet_libraries():
            job = app.main(args=list(args), prog_name="regraft", standalone_mode=False)
            # Commands return what is to be done instead of doing it, so that click's own handling
            # of errors and interrupts ends with the parsing.
            return int(job() if callable(job) else job or Status.DONE)
    except RegraftError as error:
        return _fail_known(out, error, _value_of(options, "--to"))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return Status.DONE
        finding = Finding("system", error.strerror or str(error), where=_file_of(error))
        return _fail_known(out, BadInputError(finding))
    except (KeyboardInterrupt, click.Abort) as error:
        return _fail_stopped(out, "interrupted", error, Status.INTERRUPTED)
    except _Terminated as error:
        return _fail_stopped(out, "terminated", error, Status.TERMINATED)
    except click.UsageError as error:
        return _fail_usage(out, error)
    except Exception as error:
        return _fail_bug(out, error)
    finally:
        places = sys.modules.get("regraft.sources.places")
        if places is not None and places.OUTLINES:
            places.leave()


def _fail_known(out: Output, error: RegraftError, layout: str | None = None) -> int:
    return _fail(out, error.kind, headline(error, layout), error.findings, error.status)


def headline(error: RegraftError, layout: str | None = None) -> str:
    """The kind of an error in words; a refusal says what was refused if all findings agree on it.

    >>> headline(RefusedError(Finding("no-image", "DoRA does not follow")), "transformers-v5")
    'refused: no exact equivalent in transformers-v5'
    """
    codes = {finding.code for finding in error.findings}
    if not isinstance(error, RefusedError) or len(codes) != 1:
        return error.title
    code = CODES[codes.pop()]
    place = f" in {layout}" if layout is not None and code is Code.NO_IMAGE else ""
    return f"{error.title}: {code.title}{place}"


def _value_of(args: Sequence[str], option: str) -> str | None:
    """What an option was given; the command has parsed it, so it is there or the default holds."""
    for at, arg in enumerate(args):
        if arg == option and at + 1 < len(args):
            return args[at + 1]
        if arg.startswith(option + "="):
            return arg.removeprefix(option + "=")
    return None


def _fail_stopped(out: Output, title: str, error: BaseException, status: Status) -> int:
    """What was done stays for --resume, where that is worth it; else nothing is left."""
    notes: list[str] = getattr(error, "__notes__", [])
    findings = [Finding("left", note) for note in notes]
    return _fail(out, "interrupted", title, findings, status)


_OTHERS_WORDS = {"--force": "--overwrite", "--output": "-o"}
"""Options as other tools call them; by their spelling alone something else would be suggested."""


def _fail_usage(out: Output, error: click.UsageError) -> int:
    from regraft.cli.options import WrongUsageError

    errors = error.errors if isinstance(error, WrongUsageError) else [error]
    words = [_usage_words(each) for each in errors]
    command = "regraft" if error.ctx is None else error.ctx.command_path
    fix = f"see '{command} --help'"
    findings = [Finding("usage", each) for each in words[:-1]]
    findings.append(Finding("usage", words[-1], fix=fix))
    return _fail(out, "usage", "usage", findings, Status.USAGE)


def _usage_words(error: click.UsageError) -> str:
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        meant = _OTHERS_WORDS.get(error.option_name, "")
        if any(meant in option.opts for option in error.ctx.command.params):
            words = f"No such option {error.option_name!r}. Did you mean {meant!r}?"
            return words
    return error.format_message().rstrip(".")


def _fail_bug(out: Output, error: Exception) -> int:
    if os.environ.get("REGRAFT_DEBUG", "0") not in ("", "0"):
        import traceback

        out.warn("".join(traceback.format_exception(error)))
    finding = Finding(
        "internal",
        f"{type(error).__name__}: {error}",
        fix="please report it, with the traceback that REGRAFT_DEBUG=1 shows",
    )
    return _fail_known(out, RegraftError(finding))


def _fail(out: Output, kind: str, title: str, findings: Sequence[Finding], status: Status) -> int:
    if out.json:
        # On one line: of many sources, lines stand before it, each a document of its own.
        out.line({"error": {"kind": kind, "findings": [f.to_dict() for f in findings]}})
    from regraft.cli.words import show_findings

    show_findings(out, title, findings)
    return status


def _reader_left() -> bool:
    """Whether stdout is a pipe that nobody reads any more, which is no error of a command."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
        return True
    return False


def _file_of(error: OSError) -> str | None:
    return None if error.filename is None else os.fsdecode(error.filename)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep warnings and logs of libraries off stderr, where findings and notes stand, save when looking for a bug."""
    if os.environ.get("REGRAFT_DEBUG", "0") not in ("", "0"):
        yield
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _termination() -> Iterator[None]:
    """Let a request to terminate unwind the stack, so that staged folders are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
