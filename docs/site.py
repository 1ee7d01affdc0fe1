"""What mkdocs adds to docs/: README as the first page, the notebook, and the Python API."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
PYTHON = {
    "Prediction": (
        "inference.predictor inference.inference_config inference.calibration inference.export "
        "inference.tiling inference.tta inference.mlflow_model reporting.overlays"
    ),
    "Network": (
        "model.almrr model.backbone model.regional_features model.mfrm model.bimamba model.frm "
        "model.memory model.posterior"
    ),
    "Training": "training.train training.losses training.data training.optim training.checkpoints",
    "Synthesis": "synthesis.simulate synthesis.masks synthesis.textures synthesis.synthetic_set",
    "Evaluation": (
        "evaluation.evaluate evaluation.curves evaluation.thresholds evaluation.bootstrap "
        "evaluation.reliability evaluation.summary baselines.memory_bank"
    ),
    "Datasets": (
        "datasets.base datasets.registry datasets.manifest datasets.folder datasets.doctor "
        "datasets.obtain"
    ),
    "Settings": "config",
}
"""Modules of the package by page, in the order of the menu."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages of the Python API to the menu."""
    (reference,) = (entry["Reference"] for entry in config.nav or [] if "Reference" in entry)
    reference.append({"Python": [{name: f"python/{name.lower()}.md"} for name in PYTHON]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are in no file of docs/."""
    from mkdocs.structure.files import File

    texts = {page: (ROOT / name).read_text("utf-8") for name, page in PAGES.items()}
    texts["tutorial.md"] = show_notebook(ROOT / "docs/tutorial.ipynb")
    texts |= {f"python/{name.lower()}.md": list_modules(name) for name in PYTHON}
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead links to where the site has their files; what it has not is named without a link."""
    folder = ROOT if page.file.src_uri in PAGES.values() else ROOT / "docs"

    def relink(match: re.Match[str]) -> str:
        text, target, anchor = match.group(1), match.group(2), match.group(3) or ""
        path = Path(os.path.normpath(folder / target))
        if path.is_relative_to(ROOT / "docs"):
            page_or_file = path.relative_to(ROOT / "docs").as_posix().replace(".ipynb", ".md")
            return f"[{text}]({page_or_file}{anchor})"
        name = path.relative_to(ROOT).as_posix()
        return f"[{text}]({PAGES[name]}{anchor})" if name in PAGES else f"`{name}`"

    return re.sub(r"\[([^]]+)\]\(([\w./-]+)(#[\w-]*)?\)", relink, markdown)


def show_notebook(path: Path) -> str:
    """The cells of a notebook as Markdown."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(
        text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in texts
    )


def list_modules(name: str) -> str:
    """A page for mkdocstrings."""
    modules = (f"::: almrr_pipeline.{module}" for module in PYTHON[name].split())
    return f"# {name}\n\n" + "\n\n".join(modules)
