"""Faults around the stages, on a copy of the project: what is lost or wrong, what a user reads.

    python tests/drills/drill.py --kills 50 --tries 20 --table docs/faults.md

A result, any file of data/, is lost if it is not there after the fault and a further `dvc repro`,
and wrong if it is not the one of an undisturbed run to the last bit. The copy is on a small disk in
memory where this user may mount one; without that right, faults of disks are not tried. Commands
are forks of processes that have imported all (see warm.py), unless told otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import yaml
from PIL import Image
from skimage.data import brick

sys.path.append(str(Path(__file__).resolve().parents[1]))
from project_copy import copy_project

PROJECT = Path(__file__).resolve().parents[2]
CATEGORY, SEED = "folder_kacheln", "folder_kacheln/seed_0"
STAGES = {
    "settings": "settings",
    "shared": "shared",
    "fetch": f"fetch@{CATEGORY}",
    "synthesize": f"synthesize@{CATEGORY}-0",
    "train": f"train@{CATEGORY}-0",
    "evaluate": f"evaluate@{CATEGORY}-0",
    "baseline": f"baseline@{CATEGORY}",
    "report": "report",
}
SAMPLES = f"data/05_model_input/{SEED}"
MODEL = f"data/06_models/{SEED}/model.safetensors"
CHECKPOINTS = f".almrr/training/{SEED}"
DISK = 1500  # megabytes
STEPS = 16  # as below
TINY = """\
# @package _global_
suite: tiny
categories: [folder_kacheln]
data: {textures: package, image_size: [128, 128], paths: {folder_kacheln: "фото 写真"}}
backbone: {name: tf_efficientnet_lite0, weights: package}
synthesis: {samples: 8, workers: 1}
model: {latent: 16, dim: 16, depth: 1, decoder: [8, 8], refinement_width: 4}
train: {steps: 16, batch_size: 2, learning_rate: 1.0e-3, log_every: 1, checkpoint_every: 3}
inference: {flips: false, scan_backend: torch}
evaluate: {bootstrap: 20}
report: {examples: 1}
"""
WARM = {"dvc": ("dvc.commands", "dvc.repo"), "kedro": ("almrr_pipeline", "kedro", "mlflow.store")}
"""Packages that are imported before for each command."""
CUT_SHORT = {
    "Unable to read RWLock-file": ".dvc/tmp/rwlock",
    "dvc.lock' validation failed": "dvc.lock",
}
"""What DVC says of files that it writes in place, and the files."""
MARK_START, MARK_END = "<!-- drills -->", "<!-- end of drills -->"


class Copy:
    """A copy of the project with a tiny suite, in a path with spaces and other alphabets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "мой проект 表面"
        self.printed = ""  # by all commands since it was emptied
        self.seconds: dict[str, float] = {}
        self.warm: Path | None = None  # a folder of commands
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
        draw_images(self.folder / "фото 写真")
        self.run("git", "init", "-q")
        compose = (
            "from dvc.utils.hydra import compose_and_dump; from pathlib import Path; "
            "compose_and_dump('params.yaml', str(Path('conf').resolve()), None, 'config', '', [])"
        )
        self.run(sys.executable, "-c", compose)

    def begin(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in a process group of its own."""
        path = f"{self.warm or ''}{os.pathsep}{self.environment['PATH']}".strip(os.pathsep)
        program = shutil.which(command[0], path=path) or command[0]
        return subprocess.Popen(
            [program, *command[1:]], cwd=self.folder, env=self.environment | {"PATH": path},
            process_group=0, text=True,
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

    def repair(self) -> None:
        """`dvc repro`, and without a file of DVC's own that a kill has cut short, as docs say."""
        for _ in range(1 + len(CUT_SHORT)):
            code = self.end(self.begin(*REPRO))
            cut = [file for sign, file in CUT_SHORT.items() if sign in self.printed]
            if not code or not cut:
                break
            for file in cut:
                (self.folder / file).unlink(missing_ok=True)
        if code:
            raise RuntimeError(f"{' '.join(REPRO)} ended with {code}:\n{self.printed}")

    def fail(self, *command: str) -> None:
        """Run a command that is to fail, without a traceback; RuntimeError if it does otherwise."""
        code = self.end(self.begin(*command))
        if not code or "Traceback" in self.printed:
            raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{self.printed}")

    def force(self, stage: str) -> tuple[str, ...]:
        """The command that makes DVC run one stage, stale or not."""
        return "dvc", "repro", "--force", "--single-item", STAGES[stage]

    def begin_afresh(self, stage: str) -> subprocess.Popen[str]:
        """Start a stage that DVC has no record of, and so cannot take from its cache later."""
        self.forget(stage)
        return self.begin(*self.force(stage))

    def forget(self, stage: str) -> list[Path]:
        """Remove DVC's record of a stage; its outputs."""
        path = self.folder / "dvc.lock"
        record = yaml.safe_load(path.read_text())
        forgotten = record["stages"].pop(STAGES[stage])
        path.write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True))
        return [self.folder / out["path"] for out in forgotten["outs"]]

    def duration(self, stage: str) -> float:
        """Seconds of a stage, undisturbed."""
        if stage not in self.seconds:
            begin = time.monotonic()
            self.run(*self.force(stage))
            self.seconds[stage] = time.monotonic() - begin
        return self.seconds[stage]

    def results(self) -> dict[str, str]:
        """Checksums of the files in data/."""
        data = self.folder / "data"
        files = (path for path in data.rglob("*") if path.is_file() and not is_dvcs_own(path))
        return {
            path.relative_to(data).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }

    @contextmanager
    def warmed(self) -> Iterator[None]:
        """Let commands be forks of processes that have imported all."""
        with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
            folder, script = Path(temporary), Path(__file__).with_name("warm.py")
            for name, packages in WARM.items():
                address = str(folder / f"{name}.socket")
                process = self.begin(sys.executable, str(script), "serve", address, *packages)
                stack.callback(self.end, process, signal.SIGKILL)
                wait_for(process, Path(address).is_socket, seconds=600)
                stand_in = [sys.executable, "-I", "-S", str(script), "run", address, name]
                (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(stand_in)} "$@"\n')
                (folder / name).chmod(0o755)
            self.warm = folder
            try:
                yield
            finally:
                self.warm = None


def is_dvcs_own(path: Path) -> bool:
    """Whether a file is none of a stage: .gitignore, and what DVC's trial of links leaves."""
    return path.name == ".gitignore" or (path.name.startswith(".") and path.suffix == ".tmp")


def draw_images(folder: Path) -> None:
    """Photographs of bricks, some with a hole, in the layout of MVTec AD."""
    rng, source = np.random.default_rng(0), brick()  # (512, 512) uint8
    for number in range(36):
        row, column = rng.integers(0, source.shape[0] - 128, 2)
        image = source[row : row + 128, column : column + 128].copy()
        split = "train/good" if number < 24 else "test/good" if number < 30 else "test/hole"
        if split == "test/hole":
            image[20:40, 20 : 30 + number] = 0
            mask = np.zeros_like(image)
            mask[20:40, 20 : 30 + number] = 255
            save_image(mask, folder / f"ground_truth/hole/{number:03}_mask.png")
        save_image(image, folder / split / f"{number:03}.png")


def save_image(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


REPRO = ("dvc", "repro", "--no-run-cache")
"""Makes what is missing; what DVC remembers of an earlier run would hide what a fault has left."""
TRAIN = ("kedro", "run", "--pipelines", "train", "--namespaces", f"{CATEGORY}.seed_0")
EVALUATE = ("kedro", "run", "--pipelines", "evaluate", "--namespaces", f"{CATEGORY}.seed_0")
SYNTHESIZE = ("kedro", "run", "--pipelines", "synthesize", "--namespaces", f"{CATEGORY}.seed_0")


@dataclass
class Row:
    """A line of the table."""

    fault: str
    tries: int = 0
    lost: int = 0
    wrong: int = 0
    sentence: str = ""
    seconds: float = 0.0
    error: str = ""  # why it was not tried, or what was not as it should be

    def __str__(self) -> str:
        return f"| {self.fault} | {self.tries} | {self.lost} | {self.wrong} | {self.sentence} |"


def sentence_of(printed: str, patterns: Sequence[str], folder: Path = PROJECT) -> str:
    """The first pattern's last match, on one line, without this machine's paths; or nothing."""
    text = " ".join(re.sub(r"\s+\w+\.py:\d+", "", printed).split()).replace(f"{folder}/", "")
    for pattern in patterns:
        if found := re.findall(pattern, text):
            sentence = re.sub(r"(?<![\w./])(?!\.dvc)[^\s'(]*/(?=[^/\s]+)", "", found[-1])
            for chance, name in CHANCES.items():
                sentence = re.sub(chance, name, sentence)
            return sentence
    return ""


def read_by_user(during: str, after: str, folder: Path, *, ends: bool) -> tuple[int, str]:
    """What a user reads, and its rank: of several tries the row gets that of the lowest.

    Args:
        during: printed by the commands that met the fault.
        after: printed by the `dvc repro` that followed.
        folder: the project's.
        ends: whether a command that met the fault may have ended well, and then said so.
    """
    patterns = (*SENTENCES, ENDS) if ends else SENTENCES
    for rank, pattern in enumerate(patterns):
        if sentence := sentence_of(during, [pattern], folder):
            if pattern != ABORTED:
                return rank, sentence
            break
    text = during + after  # a stage is begun again in the fault too
    for rank, pattern in enumerate(NEXT, start=len(patterns)):
        if then := sentence_of(text, [pattern], folder):
            said = f"{sentence or 'Nothing'}{'' if sentence.endswith('!') else '.'}"
            return rank, f"{said} Then `dvc repro`: {then}"
    return len(patterns) + len(NEXT), sentence


CHANCES = {
    r"\(PID \d+\)": "(PID N)",
    r":\d{4,5}\b": ":PORT",
    r"\S+@\S+\.jsonl": "FILE.jsonl",
    r"\.staging@[^\s,]+": "FOLDER",
    r"\.dvc/cache/[\w/]+": ".dvc/cache/...",
    r"\bin [\d.]+ s\.": "in N s.",
    r" (?:Stage '|Running stage|Use `dvc push`).*": "",
}
"""What differs from try to try, or is said of other stages, and what the table has for it."""


ABORTED = r"(Aborted!|ERROR: interrupted by the user)"
SENTENCES = (
    r"(SIGTERM: stopped after step \d+\. .+?\.)(?: |$)",
    r"(?<!\w)(?:Error|ERROR): (?!failed to reproduce \S+ (?:failed to run|\[Errno)|interrupted)"
    r"(?!.{,60}RWLock-file|\S+dvc.lock' validation failed)(.+?\.)(?: |$)",
    r"(MLflow at .+? it\.|Checkpoint .+? the previous one\.)",
    r"ERROR: (failed to reproduce \S+ \[Errno \d+\] (?:No space left on device|.+?'))(?: |$)",
    ABORTED,
)
"""The first that a command has printed is what a user reads: errors, then warnings."""
ENDS = r"INFO (\d+ nodes in [\d.]+ s\.)"
NEXT = (
    r"(Checkpoint .+? the previous one\.)",
    r"(Resuming from the checkpoint .+?\.ckpt\.)",
    r"(Stage '[^']+' is cached - skipping run, checking out outputs)",
    r"(Running stage '[^']+':)",
    r"(Data and pipelines are up to date\.)",
)
"""How the next run goes on."""

Fault = Callable[[Copy, random.Random], int | None]
"""Makes a fault, lets a command meet it, and undoes it; how often, if not once."""
CHAIN = 5


def end_by(sign: signal.Signals, stage: str) -> Fault:
    """End DVC and the stage together at random moments, DVC's record included.

    A stage that has been ended is begun again and ended again, up to CHAIN times in a row.
    """

    def fault(copy: Copy, rng: random.Random) -> int:
        done, met = True, 0
        for _ in range(CHAIN):
            moment = rng.uniform(0.1, copy.duration(stage) + 0.1)
            process = copy.begin_afresh(stage) if done else copy.begin(*REPRO)
            with suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            met += process.poll() is None
            done = copy.end(process, sign) == 0
        return met

    return fault


def kill_before_the_record(copy: Copy, rng: random.Random) -> None:
    """Kill when the last checkpoint is gone, and DVC has not yet recorded the model."""
    process = copy.begin_afresh("train")
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
    process = copy.begin_afresh("train")
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
    """Flip a bit of the weights in DVC's cache, lose those in data/, and take the cache's.

    DVC trusts its cache; the model is refused, until its damaged file is gone and it is trained.
    """
    digest = hashlib.md5((copy.folder / MODEL).read_bytes(), usedforsecurity=False).hexdigest()
    cached = copy.folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    cached.chmod(0o644)
    flip_bit(cached)
    cached.chmod(0o444)  # as DVC leaves it, and by which it takes it for unchanged
    (copy.folder / MODEL).unlink()
    copy.run("dvc", "checkout", STAGES["train"])
    copy.fail(*EVALUATE)
    cached.unlink()
    copy.run(*copy.force("train"))


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


LEAST_LEFT = 1 << 15
"""Bytes, of which some are left where a stage writes less."""


def fill_disk(stage: str) -> Fault:
    """Leave less of the disk than a stage writes, so that another write is the one that fails."""

    def fault(copy: Copy, rng: random.Random) -> int:
        if not copy.folder.parent.is_mount():
            raise PermissionError("this user may mount no disk")
        left = 4096 * rng.randrange(1 + max(remove(copy.forget(stage)), LEAST_LEFT) // 4096)
        filler = copy.folder.parent / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(copy.folder).free - left)
        try:
            code = copy.end(copy.begin(*copy.force(stage)))
            if code and "Traceback" in copy.printed:
                raise RuntimeError(f"a traceback with {left} bytes left:\n{copy.printed}")
        finally:
            filler.unlink()
        return int(code != 0 or "takes nothing now" in copy.printed)

    return fault


def remove(paths: list[Path]) -> int:
    """Remove files and folders; how many bytes they had."""
    files = [file for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    for file in files:
        file.unlink()
    return size


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
        **{f"disk full in {stage}": fill_disk(stage) for stage in STAGES},
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
        "two `dvc repro`": run_two(REPRO, ("dvc", "repro", "--force", "report")),
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


def share(name: str, *, tries: int, kills: int | None) -> int:
    """How often a fault is to be tried."""
    if kills is not None and (signals := re.match("SIGKILL in|SIGTERM in|Ctrl-C in", name)):
        return math.ceil(kills * (0.4 if signals[0] == "SIGKILL in" else 0.3))
    return tries if REPEATED.match(name) else 1


def drill(copy: Copy, tries: dict[str, int], *, seed: int, until: float) -> Iterator[Row]:
    """Try each fault, then `dvc repro`, and compare with the undisturbed results."""
    copy.run("dvc", "repro")
    before = copy.results()
    for name, wanted in tries.items():
        row, rng, lowest, begin = Row(name), random.Random(f"{seed} {name}"), 99, time.monotonic()
        try:
            for _ in range(MOST_ROUNDS * wanted):
                if row.tries >= wanted or time.monotonic() > until:
                    break
                copy.printed = ""
                met = faults()[name](copy, rng)
                during, copy.printed = copy.printed, ""
                copy.repair()
                if met != 0:
                    rank, sentence = read_by_user(
                        during, copy.printed, copy.folder, ends=not REPEATED.match(name)
                    )
                    if rank <= lowest:
                        lowest, row.sentence = rank, sentence
                after = copy.results()
                row.tries += 1 if met is None else met
                lost = before.keys() - after.keys()
                wrong = {each for each in after if after[each] != before.get(each)}
                row.lost, row.wrong = row.lost + len(lost), row.wrong + len(wrong)
                row.error = " ".join(sorted(lost | wrong)) or row.error
        except (PermissionError, RuntimeError) as error:
            row.error = str(error)
            copy.repair()
        row.seconds = time.monotonic() - begin
        if row.tries or row.error:
            yield row


MOST_ROUNDS = 3
"""For each try that is wanted: a fault may miss its command."""


def merge(table: str, rows: list[Row], *, add: bool = False) -> str:
    """The table with these rows in place of earlier ones of the same faults, or added to them."""
    by_fault = {}
    for line in [line for line in table.splitlines() if line.startswith("| ")][2:]:
        fault, *counts, sentence = line.strip("| ").split(" | ")
        by_fault[fault] = Row(fault, *map(int, counts), sentence)
    for row in rows:
        old = by_fault.get(row.fault, Row(row.fault)) if add else Row(row.fault)
        sums = (row.tries + old.tries, row.lost + old.lost, row.wrong + old.wrong)
        by_fault[row.fault] = Row(row.fault, *sums, row.sentence or old.sentence)
    head = [
        "| fault | tries | lost | wrong | what a user reads |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join(head + [str(by_fault[name]) for name in faults() if name in by_fault])


def main() -> None:
    """Run the drills and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=50, help="of faults whose moment is drawn")
    parser.add_argument("--kills", type=int, help="of each stage, by its three signals together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="regular expression for the faults' names")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further try then")
    parser.add_argument("--cold", action="store_true", help="start all commands as users do")
    parser.add_argument("--table", type=Path, help="file whose table gets the rows")
    parser.add_argument("--add", action="store_true", help="to the tries that the table has")
    parser.add_argument("--folder", type=Path, help="to work in; it is kept, and taken as it is")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(arguments.folder or temporary).resolve()
        with suppress(PermissionError):
            if not (folder / "disk").is_mount():
                stack.enter_context(small_disk(folder / "disk", kilobytes=1024 * DISK))
        tries = {
            name: share(name, tries=arguments.tries, kills=arguments.kills)
            for name in faults()
            if re.search(arguments.only, name)
        }
        copy = Copy(folder / "disk")
        if not arguments.cold:
            stack.enter_context(copy.warmed())
        until = time.monotonic() + 60 * arguments.minutes
        for row in drill(copy, tries, seed=arguments.seed, until=until):
            print(row, f"{row.seconds:.0f} s", row.error, flush=True)
            rows.append(row)
            if arguments.table:
                text = arguments.table.read_text(encoding="utf-8")
                head, _, rest = text.partition(MARK_START)
                table, _, tail = rest.partition(MARK_END)
                table = merge(table, [row], add=arguments.add)
                text = f"{head}{MARK_START}\n{table}\n{MARK_END}{tail}"
                arguments.table.write_text(text, encoding="utf-8")
    sys.exit(any(row.lost or row.wrong or row.error for row in rows))


if __name__ == "__main__":
    main()
