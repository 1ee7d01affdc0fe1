"""Errors whose message is written for the user."""

from __future__ import annotations


class AlmrrError(Exception):
    """An error that the user can correct; the message states what is wrong, where, and what to do.

    `kedro run` and `almrr` print the message without a traceback and exit with status 1.
    """


class DiskError(AlmrrError):
    """The disk is full or cannot be written, so that trying another address would not help."""


def quote(text: object, *, most: int = 300) -> str:
    """Words of others for a sentence: one line of printable characters, cut where it is long."""
    line = " ".join(str(text)[: 10 * most].split())
    printable = "".join(each if each.isprintable() else "?" for each in line)
    return printable if len(printable) <= most else f"{printable[:most]}..."
