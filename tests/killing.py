"""Runs that die like those that are killed."""

import os
import signal
from unittest import mock


def run_killed(step, counted_functions, run, *args, **options):
    """Run in a process of its own that is killed at a call; whether it came to its end before.

    ``counted_functions`` are the modules and names of what is counted.
    """
    process = os.fork()
    if process:
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
        return status == 0
    left = step

    def dying(function):
        def counted(*args, **options):
            nonlocal left
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args, **options)

        return counted

    try:
        for module, name in counted_functions:
            mock.patch.object(module, name, dying(getattr(module, name))).start()
        run(*args, **options)
        os._exit(0)
    finally:
        os._exit(1)
