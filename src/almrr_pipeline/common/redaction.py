"""Removal of secrets and local paths from addresses that are shown to others."""

from __future__ import annotations

from pathlib import PureWindowsPath
from urllib.parse import urlsplit


def redact_address(address: str) -> str:
    """Return an address without user name, password and query; of a local path only the last name.

    A removed query is marked by "?...".
    """
    if "://" not in address or address.startswith("file://"):
        return PureWindowsPath(address).name  # splits at / and at \
    parts = urlsplit(address)
    query = "?..." if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"
