"""README and docs/ as pages: links lead somewhere, the notebook runs, the site builds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def pages(project: Path) -> dict[Path, str]:
    """Text of README, docs and the others, without blocks of code."""
    paths = [*project.glob("*.md"), *project.glob("docs/*.md")]
    texts = {path: FENCE.sub("", path.read_text("utf-8")) for path in paths}
    notebook = project / "docs/tutorial.ipynb"
    texts[notebook] = "\n".join(_cells(notebook, "markdown"))
    return texts


def _cells(notebook: Path, kind: str) -> list[str]:
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def _anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_relative_link_and_anchor_leads_somewhere(pages: dict[Path, str]) -> None:
    links = [
        (path, *link.partition("#")[::2])
        for path, text in pages.items()
        for link in LINK.findall(text)
    ]
    relative = [link for link in links if "://" not in link[1]]
    assert len(relative) > 60
    missing = [
        f"{path.name}: {name}#{anchor}"
        for path, name, anchor in relative
        if not (target := (path.parent / name).resolve() if name else path).exists()
        or (anchor and anchor not in _anchors(pages[target]))
    ]
    assert missing == []


def test_the_notebook_runs_and_is_stored_without_outputs(
    project: Path,
    model_folder: Path,
    noise_paths: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    notebook = project / "docs/tutorial.ipynb"
    assert '"output_type"' not in notebook.read_text("utf-8")
    shutil.copytree(model_folder, tmp_path / "data/06_models/sample_brick/seed_0")
    for place, path in enumerate(noise_paths[:4]):
        folder = tmp_path / "data/01_raw/sample_brick/test" / ("good" if place < 2 else "scratch")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in _cells(notebook, "code"):
        exec(compile(cell, notebook.name, "exec"), names)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith("good")
    assert "stops 0% of the good" in printed
    plt = pytest.importorskip("matplotlib.pyplot")
    assert [axis.get_title() for axis in plt.gcf().axes] == ["image", "anomaly map", "overlay"]
    plt.close("all")


def test_the_site_builds_strictly_and_asks_no_other_host(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdocs = pytest.importorskip("mkdocs.__main__", reason="the site needs the extra docs")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    arguments = [
        "build",
        "--strict",
        "--config-file",
        f"{project}/mkdocs.yml",
        "--site-dir",
        f"{tmp_path}",
    ]
    built = CliRunner().invoke(mkdocs.cli, arguments)
    assert built.exit_code == 0, built.output
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe)[^>]* src=\"?(https?:[^\" >]+)", page.read_text()
        )
        loaded += re.findall(r"<link[^>]*rel=\"?stylesheet\"?[^>]*https?:", page.read_text())
        assert loaded == []
    assert (
        'id="almrr_pipeline.inference.predictor.Predictor"'
        in (tmp_path / "python/prediction.html").read_text()
    )
    assert "Choose a threshold" in (tmp_path / "tutorial.html").read_text()
