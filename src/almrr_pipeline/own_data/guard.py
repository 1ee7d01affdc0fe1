"""Files that are as they were when the work on them fails, is interrupted, or is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import is_running, remove_folder

JOURNAL = Path(".almrr/before_training")
_LIST = "files.json"
TERMINATED = 128 + signal.SIGTERM


@contextmanager
def restored_on_failure(project: Path, files: Sequence[Path]) -> Iterator[None]:
    """Put files back as they were if the block raises, also at Ctrl-C and SIGTERM.

    A copy is kept on disk: what SIGKILL has prevented is done by `restore_after_kill`.

    Raises:
        AlmrrError: another process is at it.
        SystemExit: at SIGTERM, with status 143.
    """
    restore_after_kill(project)
    journal = project / JOURNAL
    journal.mkdir(parents=True)
    existing = [str(file) for file in files if (project / file).is_file()]
    for position, file in enumerate(existing):
        shutil.copy2(project / file, journal / str(position))
    entries = {"pid": os.getpid(), "files": [str(file) for file in files], "existing": existing}
    (journal / _LIST).write_text(json.dumps(entries), encoding="utf-8")
    before = signal.signal(signal.SIGTERM, _exit_at_sigterm)
    try:
        yield
    except BaseException:
        _restore(project)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        remove_folder(journal)


def restore_after_kill(project: Path) -> bool:
    """Put back what a killed process has left changed; AlmrrError if it is still running."""
    path = project / JOURNAL / _LIST
    if not path.is_file():
        remove_folder(project / JOURNAL)
        return False
    pid = int(json.loads(path.read_text(encoding="utf-8"))["pid"])
    if is_running(pid):
        raise AlmrrError(f"Another `almrr train` is running here (process {pid}); wait for it.")
    _restore(project)
    remove_folder(project / JOURNAL)
    return True


def _restore(project: Path) -> None:
    journal = project / JOURNAL
    entries = json.loads((journal / _LIST).read_text(encoding="utf-8"))
    for file in set(entries["files"]) - set(entries["existing"]):
        (project / file).unlink(missing_ok=True)
    for position, file in enumerate(entries["existing"]):
        shutil.copy2(journal / str(position), project / file)


def _exit_at_sigterm(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)
