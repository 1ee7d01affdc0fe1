"""Faults around the stages, on a copy of the project: what is lost or wrong, what a user reads.

    python tests/drills/drill.py --tries 3 --table docs/faults.md

A result is lost if it is not there after the fault and a further `dvc repro`, and wrong if it is
not the one of an undisturbed run to the last bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
RUN = "sample_brick-0"
STAGES = ("synthesize", "train", "evaluate")
MODEL = "data/06_models/sample_brick/seed_0/model.safetensors"
METRICS = "data/08_reporting/categories/sample_brick/seed_0/metrics.json"
RESULTS = (MODEL, METRICS)
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
        names = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=PROJECT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        for name in names.stdout.splitlines():
            if (PROJECT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(PROJECT / name, self.folder / name)
        (self.folder / "conf/suite/tiny.yaml").write_text(TINY)
        config = self.folder / "conf/config.yaml"
        config.write_text(config.read_text().replace("suite: sample", "suite: tiny"))
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

    def run(self, *command: str) -> str:
        """Run a command; RuntimeError with what it printed if it fails."""
        process = self.begin(*command)
        printed, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{printed}")
        return printed

    def kedro(self, stage: str) -> tuple[str, ...]:
        return "kedro", "run", "--pipelines", stage, "--namespaces", "sample_brick.seed_0"

    def results(self) -> dict[str, str]:
        """Checksums of what there is."""
        there = [name for name in RESULTS if (self.folder / name).is_file()]
        return {
            name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in there
        }


@dataclass
class Row:
    """A line of the table."""

    fault: str
    tries: int = 0
    lost: int = 0
    wrong: int = 0
    sentence: str = ""

    def __str__(self) -> str:
        return f"| {self.fault} | {self.tries} | {self.lost} | {self.wrong} | {self.sentence} |"


def sentence_of(printed: str) -> str:
    """What a user reads: the error, else the warning, on one line, without this machine's paths."""
    text = " ".join(re.sub(r"\s+\w+\.py:\d+", "", printed).split())
    found = re.findall(r"Error: ([^│]+?\.)(?: |$)", text) or re.findall(
        r"(MLflow at .+? it\.)", text
    )
    return re.sub(r"\S*/(?=[^/\s]+)", "", found[-1]) if found else ""


Fault = Callable[[Copy, random.Random], str]
"""Makes a fault, lets a command meet it, undoes it; returns what was printed."""


def end_by(sign: signal.Signals, stage: str) -> Fault:
    def fault(copy: Copy, rng: random.Random) -> str:
        process = copy.begin(*copy.kedro(stage))
        time.sleep(rng.uniform(0.5, 14.0))
        if process.poll() is None:
            os.killpg(process.pid, sign)
        printed: str = process.communicate()[0]
        return printed

    return fault


def with_database(change: Callable[[Path], None]) -> Fault:
    def fault(copy: Copy, rng: random.Random) -> str:
        database = copy.folder / "mlflow.db"
        kept = database.read_bytes()
        change(database)
        try:
            return copy.run(*copy.kedro("evaluate"))
        finally:
            database.write_bytes(kept)

    return fault


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def hold_database(copy: Copy, rng: random.Random) -> str:
    with sqlite3.connect(copy.folder / "mlflow.db", isolation_level=None) as held:
        held.execute("BEGIN EXCLUSIVE")
        try:
            return copy.run(*copy.kedro("evaluate"))
        finally:
            held.execute("ROLLBACK")


def lose_the_server(copy: Copy, rng: random.Random) -> str:
    copy.environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    try:
        return copy.run(*copy.kedro("train"))
    finally:
        del copy.environment["MLFLOW_TRACKING_URI"]


def damage_weights(copy: Copy, rng: random.Random) -> str:
    path = copy.folder / MODEL
    kept = path.read_bytes()
    path.chmod(0o644)
    flip_bit(path)
    try:
        return fail(copy, *copy.kedro("evaluate"))
    finally:
        path.write_bytes(kept)


def damage_checkpoint(copy: Copy, rng: random.Random) -> str:
    """Kill a training as soon as it has a checkpoint, and damage that."""
    process = copy.begin(*copy.kedro("train"))
    folder, checkpoints = copy.folder / ".almrr/training/sample_brick/seed_0", []
    while process.poll() is None and not checkpoints:
        checkpoints = sorted(folder.rglob("step_*.ckpt"))
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for path in folder.rglob("step_*.ckpt"):
        (flip_bit if rng.random() < 0.5 else cut_short)(path)
    return copy.run(*copy.kedro("train"))


def run_two(*commands: tuple[str, ...]) -> Fault:
    def fault(copy: Copy, rng: random.Random) -> str:
        processes = [copy.begin(*command) for command in commands]
        return "".join(process.communicate()[0] for process in processes)

    return fault


@contextmanager
def small_disk(folder: Path, *, kilobytes: int) -> Iterator[None]:
    """Mount a full file system over a folder; PermissionError where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder],
        capture_output=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        raise PermissionError("only root can mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def fill_disk(copy: Copy, rng: random.Random) -> str:
    with small_disk(copy.folder / ".almrr", kilobytes=rng.choice([16, 64, 256])):
        return fail(copy, *copy.kedro("train"))


def without_git(copy: Copy, rng: random.Random) -> str:
    git = copy.folder / ".git"
    git.rename(git.with_name(".no_git"))
    try:
        return copy.run(*copy.kedro("evaluate"))
    finally:
        git.with_name(".no_git").rename(git)


def strict_umask(copy: Copy, rng: random.Random) -> str:
    before = os.umask(0o077)
    try:
        return copy.run(*copy.kedro("evaluate"))
    finally:
        os.umask(before)


def fail(copy: Copy, *command: str) -> str:
    """Run a command that is to fail, without a traceback."""
    process = copy.begin(*command)
    printed: str = process.communicate()[0]
    if process.returncode == 0:
        raise RuntimeError(f"{' '.join(command)} did not fail:\n{printed}")
    if "Traceback" in printed:
        raise RuntimeError(f"{' '.join(command)} ended with a traceback:\n{printed}")
    return printed


def faults() -> dict[str, Fault]:
    """All faults by their names in the table."""
    evaluate = ("kedro", "run", "--pipelines", "evaluate", "--namespaces", "sample_brick.seed_0")
    repro = ("dvc", "repro", f"evaluate@{RUN}", "--force", "--single-item")
    killed = {f"SIGKILL in {stage}": end_by(signal.SIGKILL, stage) for stage in STAGES}
    asked = {f"SIGTERM in {stage}": end_by(signal.SIGTERM, stage) for stage in STAGES}
    return {
        **killed,
        **asked,
        "Ctrl-C in train": end_by(signal.SIGINT, "train"),
        "checkpoint cut or with a flipped bit": damage_checkpoint,
        "flipped bit in the weights": damage_weights,
        "database locked": hold_database,
        "database cut short": with_database(cut_short),
        "database deleted": with_database(Path.unlink),
        "no MLflow server": lose_the_server,
        "disk full": fill_disk,
        "`kedro run` while `dvc repro` runs": run_two(evaluate, repro),
        "two `dvc repro`": run_two(repro, repro),
        "no git": without_git,
        "umask 077": strict_umask,
    }


def drill(copy: Copy, names: list[str], *, tries: int, seed: int) -> Iterator[Row]:
    """Try each fault, then `dvc repro`, and compare with the undisturbed results."""
    copy.run("dvc", "repro", f"evaluate@{RUN}")
    before = copy.results()
    rng = random.Random(seed)
    for name in names:
        row = Row(name)
        try:
            for _ in range(tries if re.match("SIG|Ctrl", name) else 1):
                row.sentence = sentence_of(faults()[name](copy, rng)) or row.sentence
                copy.run("dvc", "repro", f"evaluate@{RUN}")
                after = copy.results()
                row.tries += 1
                row.lost += len(before.keys() - after.keys())
                row.wrong += sum(after[each] != before[each] for each in after)
        except PermissionError as error:
            row.sentence = f"not tried: {error}"
        yield row


def main() -> None:
    """Run the drills and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the faults' names")
    parser.add_argument("--table", type=Path, help="file whose table is replaced")
    arguments = parser.parse_args()
    lines = [
        "| fault | tries | lost | wrong | what a user reads |",
        "| --- | --- | --- | --- | --- |",
    ]
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        names = [name for name in faults() if arguments.only in name]
        for row in drill(Copy(Path(folder)), names, tries=arguments.tries, seed=arguments.seed):
            print(row, flush=True)
            lines.append(str(row))
            bad += row.lost + row.wrong
    if arguments.table:
        text = arguments.table.read_text(encoding="utf-8")
        head, tail = text.partition(MARK_START)[0], text.partition(MARK_END)[2]
        table = "\n".join(lines)
        arguments.table.write_text(
            f"{head}{MARK_START}\n{table}\n{MARK_END}{tail}", encoding="utf-8"
        )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
