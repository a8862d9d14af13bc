"""The exception for a user's mistake: the command line prints its sentence, no traceback, and exits with code 2."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. Its message is one sentence that names the file, record or key and how to mend it."""

    said_elsewhere = False  # by another process of the run, to which the mistake is known too
