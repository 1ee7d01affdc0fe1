"""All data sources by name: one line each."""

from __future__ import annotations

from almrr_pipeline.sources.source import FetchRequest, Patience, Source

__all__ = ["SOURCES", "FetchRequest", "Patience", "Source"]

SOURCES: dict[str, Source] = {}
