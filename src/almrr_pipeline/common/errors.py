"""Errors whose message is written for the user."""

from __future__ import annotations


class AlmrrError(Exception):
    """An error that the user can correct; the message states what is wrong, where, and what to do.

    `kedro run` and `almrr` print the message without a traceback and exit with status 1.
    """


class DiskError(AlmrrError):
    """The disk is full or cannot be written, so that trying another address would not help."""
