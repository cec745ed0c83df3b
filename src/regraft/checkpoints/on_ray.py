"""Parts of a conversion on a cluster of Ray's: the parts that an array of a scheduler does, handed out by Ray.

A task is one part (`regraft.checkpoints.staging`), and is told its number and what was asked for: some hundred bytes.
Ray runs it again where a process or a node dies; it then does what was not marked as done. No cluster is started here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from regraft.errors import BadInputError, Finding, RegraftError
from regraft.errors.extras import install_line
from regraft.report import PartReport

Work = Callable[[str], PartReport]
"""Does the part that it is given as text, ``"3/16"``."""
Done = Callable[[PartReport], None]

_TRIES = 10
"""How often a part is begun again whose process or node died."""
_PER_PROCESSOR = 4
_SMALLEST = 1 << 28
"""Bytes of a part, unless it is said how many there are."""
_MOST = 1000


class Cluster:
    """A cluster that is there already.

    Raises ``BadInputError`` where Ray is not installed, or there is no cluster.
    """

    def __init__(self, address: str) -> None:
        try:
            self._ray = import_module("ray")
        except ImportError:
            message = "Ray hands out the parts, and it is not installed"
            fix = install_line("ray")
            raise BadInputError(Finding("package-missing", message, fix=fix)) from None
        if self._ray.is_initialized():
            return
        if address in ("", "local"):
            raise _no_cluster(address, "regraft starts no cluster by itself")
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise _no_cluster(address, str(error).partition("\n")[0]) from None

    def count(self, size: int) -> int:
        """How many parts a result of so many bytes is worth."""
        processors = int(self._ray.cluster_resources().get("CPU", 1))
        return max(1, min(_PER_PROCESSOR * processors, size // _SMALLEST, _MOST))

    def run(self, work: Work, count: int, jobs: int, done: Done) -> None:
        """Do all parts; ``done`` is called for each. Where one fails, those that have not begun are left.

        Raises what ``work`` raises.
        """
        options = {"num_cpus": jobs, "max_retries": _TRIES, "scheduling_strategy": "SPREAD"}
        task = self._ray.remote(**options)(_do)
        shared = self._ray.put(work)
        waiting = [task.remote(shared, f"{number}/{count}") for number in range(count)]
        try:
            while waiting:
                finished, waiting = self._ray.wait(waiting)
                for made, error in self._ray.get(finished):
                    if error is not None:
                        raise error
                    done(made)
        except self._ray.exceptions.RayError as error:
            message = (
                f"a part was not done in {_TRIES + 1} tries: {str(error).partition(chr(10))[0]}"
            )
            fix = "see what kills the workers (memory?); the same command goes on from what is done"
            raise BadInputError(Finding("cluster", message, fix=fix)) from None
        finally:
            for left in waiting:
                self._ray.cancel(left)


def _do(work: Work, part: str) -> tuple[Any, RegraftError | None]:
    """A task; an error is a value, since Ray would run again what raises."""
    try:
        return work(part), None
    except RegraftError as error:
        return None, error


def count_of(part: str | None) -> int | None:
    """How many parts ``"/16"`` asks for.

    Raises ``BadInputError``.
    """
    if part is None:
        return None
    first, _, count = part.strip().partition("/")
    if first or not count.isdecimal() or not 0 < int(count) <= _MOST * 1000:
        message = (
            f"a runner does all parts, and is told how many, such as /16; this is {part[:100]!r}"
        )
        raise BadInputError(Finding("bad-part", message, fix="give --part /N, or leave it out"))
    return int(count)


def _no_cluster(address: str, why: str) -> BadInputError:
    message = f"there is no cluster of Ray's at {address or 'no address'!r}: {why}"
    fix = "start one (ray start --head), or give the address of one with --address"
    return BadInputError(Finding("cluster", message, fix=fix))
