from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.own_data.guard import JOURNAL, restore_after_kill, restored_on_failure

FILES = (Path("old.yaml"), Path("new.yaml"))


@pytest.fixture
def project_folder(tmp_path: Path) -> Path:
    (tmp_path / "old.yaml").write_text("old")
    return tmp_path


def _change(folder: Path) -> None:
    (folder / "old.yaml").write_text("changed")
    (folder / "new.yaml").write_text("made")


def _fail(folder: Path, error: BaseException | None) -> None:
    """Change the files and raise, or get SIGTERM."""
    with restored_on_failure(folder, FILES):
        _change(folder)
        if error is None:
            signal.raise_signal(signal.SIGTERM)
        else:
            raise error


def _is_as_before(folder: Path) -> bool:
    return [path.name for path in folder.glob("*.yaml")] == ["old.yaml"] and (
        folder / "old.yaml"
    ).read_text() == "old"


@pytest.mark.parametrize("error", [AlmrrError("no"), KeyboardInterrupt()])
def test_a_failure_restores_the_files(project_folder: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        _fail(project_folder, error)
    assert _is_as_before(project_folder)
    assert not (project_folder / JOURNAL).exists()


def test_success_keeps_what_was_written(project_folder: Path) -> None:
    with restored_on_failure(project_folder, FILES):
        _change(project_folder)
    assert (project_folder / "old.yaml").read_text() == "changed"
    assert not restore_after_kill(project_folder)
    assert (project_folder / "new.yaml").exists()


def test_sigterm_restores_and_exits_with_143(project_folder: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        _fail(project_folder, None)
    assert raised.value.code == 143
    assert _is_as_before(project_folder)


def test_what_a_killed_process_left_is_restored_later(project_folder: Path) -> None:
    code = (
        "import os; from pathlib import Path\n"
        "from almrr_pipeline.own_data.guard import restored_on_failure\n"
        "with restored_on_failure(Path.cwd(), [Path('old.yaml'), Path('new.yaml')]):\n"
        "    Path('old.yaml').write_text('changed'); Path('new.yaml').write_text('made')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=project_folder, check=False)
    assert (project_folder / "old.yaml").read_text() == "changed"
    assert restore_after_kill(project_folder)
    assert _is_as_before(project_folder)


def test_two_at_a_time_are_refused(project_folder: Path) -> None:
    journal = project_folder / JOURNAL
    journal.mkdir(parents=True)
    entries = {"pid": os.getpid(), "files": [], "existing": []}
    (journal / "files.json").write_text(json.dumps(entries))
    with pytest.raises(AlmrrError, match=f"process {os.getpid()}"):
        restore_after_kill(project_folder)
