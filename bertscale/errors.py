"""The error that a user sees as one line, and the exit codes.

Standard library only: on a batch host there may be no pydantic.
"""


class UserError(ValueError):
    """Reports a mistake that the user can mend: one line without a traceback, exit code MISTAKE."""


FAULT = 1
DIFFERENT = 1  # of `bertscale diff`, as of `diff`
MISTAKE = 2
STOPPED_AND_SAVED = 75  # EX_TEMPFAIL of sysexits.h: try again
HUNG = 76
CRASH_LOOP = 77
TOO_FEW_NODES = 78
INTERRUPTED = 130  # 128 + SIGINT, as a shell says it

BROKEN_PIPE = 141  # 128 + SIGPIPE: who reads the output has left

# The table of the documentation; any other code is that of the rank that failed first, 128 + N for signal N.
EXIT_CODES = {
    0: "done",
    FAULT: "a fault of the program, with its traceback",
    MISTAKE: "a mistake that you can mend, in one line; never tried again",
    STOPPED_AND_SAVED: "stopped by a signal, and saved: the same command resumes",
    HUNG: "gave up: the ranks hang, again and again",
    CRASH_LOOP: "gave up: restarts, or requeues, bring no new checkpoint; the last one is named",
    TOO_FEW_NODES: "too few healthy nodes (in a Slurm job)",
    INTERRUPTED: "interrupted: nothing to save, or killed by a second Ctrl-C",
}
