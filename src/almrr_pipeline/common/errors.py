"""The one kind of error whose message is meant for the person at the keyboard."""

from __future__ import annotations


class AlmrrError(Exception):
    """Something the user can put right; the message says what was wrong, where, and what to do.

    The doors (`kedro run`, `almrr`) print the message alone, without a traceback, and exit with status 1.
    """
