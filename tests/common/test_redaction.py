"""Addresses are shown without secrets and without local folders."""

from __future__ import annotations

import pytest

from almrr_pipeline.common.redaction import redact_address


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://user:secret@host:8080/a/b.zip?token=1", "https://host:8080/a/b.zip?..."),
        ("https://host/a.zip", "https://host/a.zip"),
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("file:///home/me/data", "data"),
        ("/home/me/weights.pth", "weights.pth"),
        (r"C:\Users\me\data", "data"),
        ("hub", "hub"),
    ],
)
def test_an_address_is_shown_without_secrets_and_folders(address: str, shown: str) -> None:
    assert redact_address(address) == shown
