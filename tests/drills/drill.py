"""Faults around the stages, on a copy of the project: what is lost or wrong, what a user reads.

    python tests/drills/drill.py --tries 50 --table docs/faults.md

A result is lost if it is not there after the fault and a further `dvc repro`, and wrong if it is
not the one of an undisturbed run to the last bit. The copy is on a small disk in memory where this
user may mount one; without that right, faults of disks are not tried.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

sys.path.append(str(Path(__file__).resolve().parents[1]))
from project_copy import copy_project

PROJECT = Path(__file__).resolve().parents[2]
STAGES = {
    "fetch": "fetch@sample_brick",
    "synthesize": "synthesize@sample_brick-0",
    "train": "train@sample_brick-0",
    "evaluate": "evaluate@sample_brick-0",
    "baseline": "baseline@sample_brick",
    "report": "report",
}
SAMPLES = "data/05_model_input/sample_brick/seed_0"
MODEL = "data/06_models/sample_brick/seed_0/model.safetensors"
CHECKPOINTS = ".almrr/training/sample_brick/seed_0"
RESULTS = (
    MODEL,
    "data/08_reporting/categories/sample_brick/seed_0/metrics.json",
    "data/08_reporting/categories/sample_brick/baselines.json",
    "data/08_reporting/metrics.json",
)
DISK = 1500  # megabytes
STEPS = 24  # as below
TINY = """\
# @package _global_
suite: tiny
categories: [sample_brick]
data: {textures: package, image_size: [128, 128]}
backbone: {name: tf_efficientnet_lite0, weights: package}
synthesis: {samples: 16, workers: 1}
model: {latent: 16, dim: 16, depth: 1, decoder: [8, 8], refinement_width: 4}
train: {steps: 24, batch_size: 4, learning_rate: 1.0e-3, log_every: 1, checkpoint_every: 4}
evaluate: {bootstrap: 20}
report: {examples: 1}
"""
MARK_START, MARK_END = "<!-- drills -->", "<!-- end of drills -->"


class Copy:
    """A copy of the project with a tiny suite, in a path with spaces and other alphabets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "мой проект 表面"
        self.printed = ""  # by all commands since it was emptied
        self.seconds: dict[str, float] = {}
        binaries = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder / "src"),
            "OMP_NUM_THREADS": "1",
            "DVC_NO_ANALYTICS": "1",
            "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b",
            "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
        }  # fmt: skip
        self.environment.pop("MLFLOW_TRACKING_URI", None)
        if not self.folder.exists():
            self._fill()

    def _fill(self) -> None:
        copy_project(PROJECT, self.folder)
        (self.folder / "conf/suite/tiny.yaml").write_text(TINY)
        config = self.folder / "conf/config.yaml"
        config.write_text(config.read_text().replace("suite: sample", "suite: tiny"))
        # As at installation: no drill is to meet the compilation of the kernels.
        self.run(sys.executable, "-m", "almrr_pipeline.model.kernels.warm_up")
        self.run("git", "init", "-q")
        compose = (
            "from dvc.utils.hydra import compose_and_dump; from pathlib import Path; "
            "compose_and_dump('params.yaml', str(Path('conf').resolve()), None, 'config', '', [])"
        )
        self.run(sys.executable, "-c", compose)

    def begin(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in a process group of its own."""
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def end(self, process: subprocess.Popen[str], sign: signal.Signals | None = None) -> int:
        """Send a signal to a command's whole group, if it still runs, and wait for its end."""
        if sign is not None and process.poll() is None:
            os.killpg(process.pid, sign)
        self.printed += process.communicate()[0]
        return process.returncode

    def run(self, *command: str) -> None:
        """Run a command; RuntimeError with what it printed if it fails."""
        if code := self.end(self.begin(*command)):
            raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{self.printed}")

    def fail(self, *command: str) -> None:
        """Run a command that is to fail, without a traceback; RuntimeError if it does otherwise."""
        code = self.end(self.begin(*command))
        if not code or "Traceback" in self.printed:
            raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{self.printed}")

    def force(self, stage: str) -> tuple[str, ...]:
        """The command that makes DVC run one stage, stale or not."""
        return "dvc", "repro", "--force", "--single-item", STAGES[stage]

    def duration(self, stage: str) -> float:
        """Seconds of a stage, undisturbed."""
        if stage not in self.seconds:
            begin = time.monotonic()
            self.run(*self.force(stage))
            self.seconds[stage] = time.monotonic() - begin
        return self.seconds[stage]

    def results(self) -> dict[str, str]:
        """Checksums of what there is."""
        there = [name for name in RESULTS if (self.folder / name).is_file()]
        return {
            name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in there
        }


TRAIN = ("kedro", "run", "--pipelines", "train", "--namespaces", "sample_brick.seed_0")
EVALUATE = ("kedro", "run", "--pipelines", "evaluate", "--namespaces", "sample_brick.seed_0")
SYNTHESIZE = ("kedro", "run", "--pipelines", "synthesize", "--namespaces", "sample_brick.seed_0")


@dataclass
class Row:
    """A line of the table."""

    fault: str
    tries: int = 0
    lost: int = 0
    wrong: int = 0
    sentence: str = ""
    error: str = ""  # why it was not tried, or what was not as it should be

    def __str__(self) -> str:
        return f"| {self.fault} | {self.tries} | {self.lost} | {self.wrong} | {self.sentence} |"


def sentence_of(printed: str, folder: Path = PROJECT) -> str:
    """What a user reads: the error, else the warning, on one line, without this machine's paths."""
    text = " ".join(re.sub(r"\s+\w+\.py:\d+", "", printed).split()).replace(f"{folder}/", "")
    found = re.findall(r"E(?:rror|RROR): (.+?\.)(?: |$)", text) or re.findall(
        r"(MLflow at .+? it\.|Checkpoint .+? the previous one\.)", text
    )
    return re.sub(r"\S*/(?=[^/\s]+)", "", found[-1]) if found else ""


Fault = Callable[[Copy, random.Random], None]
"""Makes a fault, lets a command meet it, and undoes it."""


def end_by(sign: signal.Signals, stage: str) -> Fault:
    """End DVC and the stage together at a random moment, imports and DVC's record included."""

    def fault(copy: Copy, rng: random.Random) -> None:
        moment = rng.uniform(0.3, copy.duration(stage) + 0.3)
        process = copy.begin(*copy.force(stage))
        time.sleep(moment)
        copy.end(process, sign)

    return fault


def kill_before_the_record(copy: Copy, rng: random.Random) -> None:
    """Kill when the last checkpoint is gone, and DVC has not yet recorded the model."""
    process = copy.begin(*copy.force("train"))
    wait_for(process, lambda: bool(checkpoints(copy)))
    wait_for(process, lambda: not checkpoints(copy))
    time.sleep(rng.uniform(0.0, 1.0))
    copy.end(process, signal.SIGKILL)


def checkpoints(copy: Copy) -> list[Path]:
    return sorted((copy.folder / CHECKPOINTS).rglob("step_*.ckpt"))


def wait_for(
    process: subprocess.Popen[str], condition: Callable[[], bool], *, seconds: float = 60
) -> None:
    """Wait while a process runs."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end and not condition():
        time.sleep(0.01)


def damage_checkpoint(copy: Copy, rng: random.Random) -> None:
    """Kill a training as soon as it has a checkpoint, damage that, and train again."""
    process = copy.begin(*copy.force("train"))
    wait_for(process, lambda: bool(checkpoints(copy)))
    copy.end(process, signal.SIGKILL)
    for path in checkpoints(copy):
        rng.choice([flip_bit, cut_short])(path)


def set_clock_back(copy: Copy, rng: random.Random) -> None:
    """Kill a training, and let all files be of tomorrow, as if the clock had been set back."""
    end_by(signal.SIGKILL, "train")(copy, rng)
    tomorrow = time.time() + 86_400
    for folder in ("data", ".almrr", ".dvc"):
        for path in (copy.folder / folder).rglob("*"):
            os.utime(path, (tomorrow, tomorrow))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def destroy(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


@contextmanager
def changed(path: Path, change: Callable[[Path], None]) -> Iterator[None]:
    """Damage a file, and put it back as it was."""
    kept, mode = path.read_bytes(), path.stat().st_mode
    path.chmod(0o644)
    change(path)
    try:
        yield
    finally:
        path.write_bytes(kept)
        path.chmod(mode)


def with_database(change: Callable[[Path], None]) -> Fault:
    def fault(copy: Copy, rng: random.Random) -> None:
        with changed(copy.folder / "mlflow.db", change):
            copy.run(*EVALUATE)

    return fault


def hold_database(copy: Copy, rng: random.Random) -> None:
    with sqlite3.connect(copy.folder / "mlflow.db", isolation_level=None) as held:
        held.execute("BEGIN EXCLUSIVE")
        try:
            copy.run(*EVALUATE)
        finally:
            held.execute("ROLLBACK")


def damage_weights(copy: Copy, rng: random.Random) -> None:
    with changed(copy.folder / MODEL, flip_bit):
        copy.fail(*EVALUATE)


def damage_synthetic_set(copy: Copy, rng: random.Random) -> None:
    """Flip a bit, and let DVC train."""
    path = rng.choice([x for x in sorted((copy.folder / SAMPLES).iterdir()) if x.is_file()])
    path.chmod(0o644)
    flip_bit(path)


def damage_cache(copy: Copy, rng: random.Random) -> None:
    """Flip a bit of the weights in DVC's cache, and lose those in data/."""
    digest = hashlib.md5((copy.folder / MODEL).read_bytes(), usedforsecurity=False).hexdigest()
    cached = copy.folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    cached.chmod(0o644)
    flip_bit(cached)
    cached.chmod(0o444)  # as DVC leaves it, and by which it takes it for unchanged
    (copy.folder / MODEL).unlink()


@contextmanager
def server(copy: Copy, database: Path) -> Iterator[subprocess.Popen[str]]:
    """An MLflow server, to which runs log meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = copy.begin(
        "mlflow", "server", "--port", str(port), "--backend-store-uri", f"sqlite:///{database}",
        "--artifacts-destination", str(database.with_suffix(".artifacts")), "--workers", "1",
    )  # fmt: skip

    def answers() -> bool:
        with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
        return False

    wait_for(process, answers)
    copy.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
    try:
        yield process
    finally:
        del copy.environment["MLFLOW_TRACKING_URI"]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def lose_the_server(moment: str) -> Fault:
    """Let the server die at the start, in the middle or at the end of a training.

    RuntimeError if the training fails, or a value of its curve is missing after the delivery.
    """

    def fault(copy: Copy, rng: random.Random) -> None:
        with tempfile.TemporaryDirectory() as folder:
            database = Path(folder) / "server.db"
            before = (copy.folder / MODEL).stat().st_mtime_ns
            with server(copy, database) as tracker:
                if moment == "start":
                    os.killpg(tracker.pid, signal.SIGKILL)
                process = copy.begin(*TRAIN)
                if moment == "middle":
                    wait_for(process, lambda: bool(checkpoints(copy)))
                if moment == "end":
                    there = copy.folder / MODEL
                    wait_for(
                        process,
                        lambda: there.is_file() and there.stat().st_mtime_ns != before,
                    )  # fmt: skip
                if tracker.poll() is None:
                    os.killpg(tracker.pid, signal.SIGKILL)
                if code := copy.end(process):
                    raise RuntimeError(f"the training ended with {code}:\n{copy.printed}")
            with server(copy, database):
                copy.run("almrr", "sync")
            with sqlite3.connect(database) as stored:
                rows = stored.execute("SELECT count(*) FROM metrics WHERE key LIKE '%loss'")
                if (count := rows.fetchone()[0]) < STEPS:
                    raise RuntimeError(f"{count} values of the loss arrived:\n{copy.printed}")

    return fault


def run_two(*commands: tuple[str, ...]) -> Fault:
    def fault(copy: Copy, rng: random.Random) -> None:
        processes = [copy.begin(*command) for command in commands]
        for process in processes:
            copy.end(process)

    return fault


@contextmanager
def small_disk(folder: Path, *, kilobytes: int) -> Iterator[None]:
    """Mount a small empty disk over a folder; PermissionError where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def read_only(*folders: Path) -> Iterator[None]:
    """Make folders read-only, for the superuser too."""
    with ExitStack() as stack:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            mount("--bind", str(folder), str(folder))
            stack.callback(subprocess.run, ["umount", folder], check=True)
            mount("-o", "remount,bind,ro", str(folder))
        yield


def mount(*arguments: str) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode:
        raise PermissionError("this user may mount no disk")


def fill_disk(stage: tuple[str, ...]) -> Fault:
    """Leave 4 to 4096 KB of the disk, so that another write of the stage is the one that fails."""

    def fault(copy: Copy, rng: random.Random) -> None:
        if not copy.folder.parent.is_mount():
            raise PermissionError("this user may mount no disk")
        left = 1024 * 2 ** rng.randrange(2, 13)
        filler = copy.folder.parent / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(copy.folder).free - left)
        try:
            if copy.end(copy.begin(*stage)) and "Traceback" in copy.printed:
                raise RuntimeError(f"a traceback with {left} bytes left:\n{copy.printed}")
        finally:
            filler.unlink()

    return fault


def read_only_data(copy: Copy, rng: random.Random) -> None:
    with read_only(copy.folder / "data"):
        copy.fail(*EVALUATE)


def read_only_home(copy: Copy, rng: random.Random) -> None:
    home = copy.folder.parent / "home"
    before = copy.environment.get("HOME", "")
    copy.environment["HOME"] = str(home)
    try:
        with read_only(home):
            copy.run(*EVALUATE)
    finally:
        copy.environment["HOME"] = before


def read_only_cache(copy: Copy, rng: random.Random) -> None:
    (copy.folder / MODEL).with_name("history.csv").unlink()
    with read_only(copy.folder / ".dvc/cache"):
        copy.end(copy.begin(*copy.force("evaluate")))


def without_git(copy: Copy, rng: random.Random) -> None:
    git = copy.folder / ".git"
    git.rename(git.with_name(".no_git"))
    try:
        copy.run(*EVALUATE)
    finally:
        git.with_name(".no_git").rename(git)


def shallow_clone(copy: Copy, rng: random.Random) -> None:
    """Give the copy the history of a shallow clone."""
    git = copy.folder / ".git"
    git.rename(git.with_name(".no_git"))
    clone = ["git", "clone", "-q", "--depth", "1", "--no-checkout", f"file://{PROJECT}", ".clone"]
    try:
        copy.run(*clone)
        (copy.folder / ".clone/.git").rename(git)
        copy.run(*copy.force("evaluate"))
    finally:
        shutil.rmtree(git, ignore_errors=True)
        shutil.rmtree(copy.folder / ".clone", ignore_errors=True)
        git.with_name(".no_git").rename(git)


def strict_umask(copy: Copy, rng: random.Random) -> None:
    before = os.umask(0o077)
    try:
        copy.run(*copy.force("train"))
    finally:
        os.umask(before)


def faults() -> dict[str, Fault]:
    """All faults by their names in the table."""
    return {
        **{f"SIGKILL in {stage}": end_by(signal.SIGKILL, stage) for stage in STAGES},
        "SIGKILL between the last checkpoint and DVC's record": kill_before_the_record,
        **{f"SIGTERM in {stage}": end_by(signal.SIGTERM, stage) for stage in STAGES},
        **{f"Ctrl-C in {stage}": end_by(signal.SIGINT, stage) for stage in STAGES},
        "disk full in synthesize": fill_disk(SYNTHESIZE),
        "disk full in train": fill_disk(TRAIN),
        "disk full in evaluate": fill_disk(EVALUATE),
        "checkpoint cut or with a flipped bit": damage_checkpoint,
        "flipped bit in the synthetic set": damage_synthetic_set,
        "flipped bit in the weights": damage_weights,
        "flipped bit in DVC's cache": damage_cache,
        "MLflow server gone at the start": lose_the_server("start"),
        "MLflow server gone in a training": lose_the_server("middle"),
        "MLflow server gone as a training ends": lose_the_server("end"),
        "database locked": hold_database,
        "database cut short": with_database(cut_short),
        "database overwritten": with_database(destroy),
        "database deleted": with_database(Path.unlink),
        "read-only data": read_only_data,
        "read-only home": read_only_home,
        "read-only DVC cache": read_only_cache,
        "two `dvc repro`": run_two(("dvc", "repro"), ("dvc", "repro", "--force", "report")),
        "two `kedro run` on one database": run_two(EVALUATE, TRAIN),
        "two `kedro run` of one training": run_two(TRAIN, TRAIN),
        "`kedro run` while `dvc repro` runs": run_two(EVALUATE, ("dvc", "repro", "--force")),
        "clock set back": set_clock_back,
        "no git": without_git,
        "shallow clone": shallow_clone,
        "umask 077": strict_umask,
    }


REPEATED = re.compile("SIG|Ctrl|disk full")
"""Faults whose moment is drawn: the others are tried once."""


def drill(copy: Copy, names: list[str], *, tries: int, seed: int) -> Iterator[Row]:
    """Try each fault, then `dvc repro`, and compare with the undisturbed results."""
    copy.run("dvc", "repro")
    before = copy.results()
    if len(before) != len(RESULTS):
        raise RuntimeError(f"results are missing without any fault:\n{copy.printed}")
    for name in names:
        row, rng = Row(name), random.Random(f"{seed} {name}")
        try:
            for _ in range(tries if REPEATED.match(name) else 1):
                copy.printed = ""
                faults()[name](copy, rng)
                copy.run("dvc", "repro")
                row.sentence = sentence_of(copy.printed, copy.folder) or row.sentence
                after = copy.results()
                row.tries += 1
                row.lost += len(before.keys() - after.keys())
                row.wrong += sum(after[each] != before[each] for each in after)
        except (PermissionError, RuntimeError) as error:
            row.error = str(error)
        yield row


def merge(table: str, rows: list[Row]) -> str:
    """The table with these rows in place of earlier ones of the same faults."""
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    by_fault = {line.split(" | ")[0][2:]: line for line in lines}
    by_fault.update({row.fault: str(row) for row in rows if row.tries})
    head = [
        "| fault | tries | lost | wrong | what a user reads |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join(head + [by_fault[name] for name in faults() if name in by_fault])


def main() -> None:
    """Run the drills and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=50, help="of faults whose moment is drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="regular expression for the faults' names")
    parser.add_argument("--table", type=Path, help="file whose table gets the rows")
    parser.add_argument("--folder", type=Path, help="to work in; it is kept, and taken as it is")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(arguments.folder or temporary).resolve()
        with suppress(PermissionError):
            if not arguments.folder:
                stack.enter_context(small_disk(folder / "disk", kilobytes=1024 * DISK))
        names = [name for name in faults() if re.search(arguments.only, name)]
        copy = Copy(folder / "disk")
        for row in drill(copy, names, tries=arguments.tries, seed=arguments.seed):
            print(row, row.error, flush=True)
            rows.append(row)
            if arguments.table:
                text = arguments.table.read_text(encoding="utf-8")
                head, _, rest = text.partition(MARK_START)
                table, _, tail = rest.partition(MARK_END)
                text = f"{head}{MARK_START}\n{merge(table, [row])}\n{MARK_END}{tail}"
                arguments.table.write_text(text, encoding="utf-8")
    sys.exit(any(row.lost or row.wrong or row.error for row in rows))


if __name__ == "__main__":
    main()
