"""A bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import io
import logging
import sys
import time

import pytest

from almrr_pipeline.common import progress
from almrr_pipeline.common.progress import format_amount, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    with track(2048, unit="B", description="download a.zip", done=1024) as advance:
        advance(1024)

    assert "download a.zip:  50%" in terminal.getvalue()


def test_a_bar_shows_values_next_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    with track(2, unit="steps", description="train") as advance:
        time.sleep(0.2)  # a bar is drawn ten times a second
        advance(2, loss=0.125)

    assert "loss=0.125" in terminal.getvalue()


def test_elsewhere_a_line_is_logged_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = iter([0.0, 4.0, 12.0, 13.0])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))

    with track(4, unit="images", description="check wood") as advance:
        for _ in range(3):
            advance(1)

    assert caplog.messages == ["check wood: 2 images (50 %), 00:12 left"]


def test_a_line_names_the_values(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = iter([0.0, 11.0])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))

    with track(4, unit="steps", description="train", done=1) as advance:
        advance(1, loss=0.123456, stage="last")

    assert caplog.messages == ["train: 2 steps (50 %), 00:22 left, loss 0.1235, stage last"]


@pytest.mark.parametrize(
    ("amount", "unit", "shown"),
    [
        (7, "files", "7 files"),
        (999, "B", "999 B"),
        (1536, "B", "1.5 KiB"),
        (3 << 20, "B", "3 MiB"),
        (5 << 30, "B", "5 GiB"),
    ],
)
def test_bytes_are_shown_for_people(amount: int, unit: str, shown: str) -> None:
    assert format_amount(amount, unit) == shown
