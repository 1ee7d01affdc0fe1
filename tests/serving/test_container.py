"""The Dockerfile of the server; no container runs here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from almrr_pipeline.cli import almrr


def test_the_dockerfile_passes_hadolint(project: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    command = [hadolint, "--failure-threshold", "style", project / "Dockerfile"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_container_has_what_it_copies_and_serves_where_it_is_asked(project: Path) -> None:
    text = (project / "Dockerfile").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    kept = {line[1:] for line in (project / ".dockerignore").read_text().split() if line[0] == "!"}
    assert {name for line in copied for name in line.split()} == kept
    assert all((project / name).exists() for name in kept)
    program, name, *arguments = json.loads(text.partition("ENTRYPOINT ")[2])
    options = almrr.commands[name].make_context(name, arguments).params
    assert (program, options["host"]) == ("almrr", "0.0.0.0")
    assert f"http://127.0.0.1:{options['port']}/health" in text
    assert re.findall(r"^USER (\d+)$", text, re.MULTILINE)
