"""Which part of a work a process is to do: as it was told, or as the scheduler that started it says.

SLURM_ARRAY_TASK_ID, _MIN, _STEP, _COUNT      an element of a Slurm array
JOB_COMPLETION_INDEX                          a pod of an indexed Job of Kubernetes; it does not say of how many

Sources: the documentation of Slurm's ``sbatch`` ("Output environment variables") and of Kubernetes' Jobs
("Completion mode").
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from msgspec import Struct

from regraft.errors import BadInputError, Finding

_MOST = 1_000_000


class Share(Struct, frozen=True):
    """One of several parts of a work."""

    number: int
    """From 0."""
    count: int
    """How many there are."""


def find_share(text: str | None, environment: Mapping[str, str]) -> Share:
    """The part that ``text`` says, and for what it leaves out, the scheduler.

    Args:
        text: ``"3/16"``: the part 3 of those from 0 to 15. ``"/16"``: of 16 that which the scheduler says.
        environment: what the scheduler said to the process.

    >>> find_share("3/16", {}), find_share("/16", {"JOB_COMPLETION_INDEX": "3"})
    (Share(number=3, count=16), Share(number=3, count=16))

    Raises ``BadInputError``.
    """
    number, count = _scheduled(environment)
    if text is not None:
        match = re.fullmatch(r"(\d{0,7})/(\d{1,7})", text.strip(), re.ASCII)
        if match is None:
            raise _bad(f"a part such as 3/16 was expected, this is {text[:100]!r}")
        if not match[1] and count not in (None, int(match[2])):
            raise _bad(
                f"the scheduler's array has {count} elements, and {text} speaks of {match[2]}"
            )
        number, count = int(match[1]) if match[1] else number, int(match[2])
    if number is None:
        raise _bad("nothing says which part to do, and this is no element of a scheduler's array")
    if count is None:
        raise _bad(f"this is the element {number} of an array, and nothing says how many it has")
    if not 0 <= number < count <= _MOST:
        raise _bad(
            f"there is no part {number} of {count}" + (f", only 0 to {count - 1}" if count else "")
        )
    return Share(number, count)


def _scheduled(environment: Mapping[str, str]) -> tuple[int | None, int | None]:
    number = _whole(environment, "SLURM_ARRAY_TASK_ID")
    if number is not None:
        first = _whole(environment, "SLURM_ARRAY_TASK_MIN") or 0
        step = _whole(environment, "SLURM_ARRAY_TASK_STEP") or 1
        return (number - first) // step, _whole(environment, "SLURM_ARRAY_TASK_COUNT")
    return _whole(environment, "JOB_COMPLETION_INDEX"), None


def _whole(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is None or text == "":
        return None
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise _bad(f"{name} is a whole number, and {text[:100]!r} is none")
    return int(text)


def _bad(message: str) -> BadInputError:
    fix = "give --part I/N, I from 0: --part 0/4, 1/4, 2/4 and 3/4; or --part /N where the scheduler says I"
    return BadInputError(Finding("bad-part", message, fix=fix))
