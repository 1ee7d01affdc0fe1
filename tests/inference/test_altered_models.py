"""A model folder that is not what was written: one sentence, soon, and no memory taken."""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.predictor import Predictor
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.checksums import MANIFEST_FILE
from almrr_pipeline.model.weights_io import read_config

GIGABYTE = 2**30
Change = Callable[[Path], None]


def set_value(file: str, *names: str, to: Any) -> Change:
    """Another value in a file of settings; "1e999" becomes that number."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        inner = content
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = to
        text = json.dumps(content)
        (folder / file).write_text(text.replace('"1e999"', "1e999"))

    return change


def in_config(*names: str, to: Any) -> Change:
    return set_value("config.json", *names, to=to)


def in_inference(*names: str, to: Any) -> Change:
    return set_value("inference.json", *names, to=to)


def flip_byte_of_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x40
    path.write_bytes(content)


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def claim_a_huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def add_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), "another": torch.zeros(3)}, path)


def make_integers(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.long() for name, tensor in load_file(path).items()}, path)


def pickle_in_place_of_weights(folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, folder / "model.safetensors")


def nest_deeply(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000)


def fill_settings(folder: Path) -> None:
    (folder / "inference.json").write_text(" " * 2_000_000 + "{}")


def damage_checksums(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_bytes(b"\xff" * 80)


def drop_weights_from_checksums(folder: Path) -> None:
    lines = (folder / MANIFEST_FILE).read_text().splitlines(keepends=True)
    (folder / MANIFEST_FILE).write_text("".join(x for x in lines if "safetensors" not in x))


ALTERED: dict[str, Change] = {
    "a depth of ten millions": in_config("model", "depth", to=10_000_000),
    "a width beyond memory": in_config("model", "latent", to=2_000_000_000),
    "another width": in_config("model", "dim", to=8192),
    "more blocks": in_config("model", "depth", to=200),
    "an infinite prior": in_config("model", "posterior_gamma", to="1e999"),
    "a memory without end": in_config("model", "memory_size", to=10**12),
    "an image beyond memory": in_config("image_size", to=[16_000_000, 16_000_000]),
    "a network of a hub": in_config("backbone", "name", to="hf-hub:someone/network"),
    "a network of a folder": in_config("backbone", "name", to="local-dir:/etc"),
    "a scheme behind a name": in_config("backbone", "name", to="resnet18.x:y/../../z"),
    "weights of an address": in_config("backbone", "weights", to="https://example.org/w.pth"),
    "settings of endless nesting": nest_deeply,
    "a setting that the weights cannot tell": in_config("model", "standardize", to=True),
    "a flipped bit in the weights": flip_byte_of_weights,
    "weights that were cut": cut_weights,
    "a header larger than the file": claim_a_huge_header,
    "a further tensor": add_a_tensor,
    "integers for weights": make_integers,
    "a pickle for weights": pickle_in_place_of_weights,
    "a threshold that is no number": in_inference("thresholds", "image", "value", to=float("nan")),
    "another threshold": in_inference("thresholds", "image", "value", to=0.99),
    "a category that is a path": in_inference("category", to="../../etc/passwd"),
    "an endless overlap": in_inference("tiling", "overlap", to=0.9999999),
    "a scale without end": in_inference("tiling", "scale", to="1e999"),
    "a window beyond any image": in_inference("smoothing", to=10**9),
    "an endless size limit": in_inference("reading", "max_megapixels", to="1e999"),
    "settings of two megabytes": fill_settings,
    "checksums that were damaged": damage_checksums,
    "checksums without the weights": drop_weights_from_checksums,
}


def load_in_bounds(folder: Path, answers: Any) -> None:
    """Load with a gigabyte left to take; answer with what was raised."""
    torch.set_num_threads(1)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + GIGABYTE, taken + GIGABYTE))
    try:
        Predictor(folder, device="cpu", scan_backend="torch")
        answers.put("nothing was refused")
    except AlmrrError as error:
        answers.put(str(error))
    except BaseException as error:
        answers.put(f"{type(error).__name__}: {error}")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as on Linux")
@pytest.mark.parametrize("fault", ALTERED)
def test_an_altered_model_is_refused_in_one_sentence_within_a_gigabyte(
    model_folder: Path, tmp_path: Path, fault: str
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    ALTERED[fault](folder)
    fork = multiprocessing.get_context("fork")  # spares each the import of torch
    answers = fork.SimpleQueue()
    process = fork.Process(target=load_in_bounds, args=(folder, answers))
    process.start()
    process.join(timeout=60)
    process.kill()  # what hangs
    assert not answers.empty(), "no answer within a minute"
    said = answers.get()
    assert str(folder) in said, said
    assert said.endswith(".")
    assert "\n" not in said


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["config.json", "inference.json", MANIFEST_FILE]), st.data())
def test_any_settings_are_taken_or_refused_in_a_sentence(
    model_folder: Path, file: str, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = shutil.copytree(model_folder, Path(name) / "model")
        if file == MANIFEST_FILE or data.draw(st.booleans()):
            (folder / file).write_bytes(data.draw(st.binary(max_size=200)))
        else:
            content = json.loads((folder / file).read_text())
            inner = content
            while isinstance(inner, dict | list) and inner:
                keys = sorted(inner) if isinstance(inner, dict) else [*range(len(inner))]
                outer, key = inner, data.draw(st.sampled_from(keys))
                inner = outer[key]
            outer[key] = data.draw(JSON)
            (folder / file).write_text(json.dumps(content))
        try:
            read_config(folder)
            InferenceConfig.load(folder)
        except AlmrrError as error:
            assert str(folder) in str(error)  # noqa: PT017 (both ends are allowed)


def test_a_model_without_checksums_loads_with_one_warning(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "older")
    (folder / MANIFEST_FILE).unlink()
    Predictor(folder, device="cpu", scan_backend="torch")
    assert [each.levelname for each in caplog.records].count("WARNING") == 1
    assert MANIFEST_FILE in caplog.text


def test_new_thresholds_keep_the_checksums_true(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "calibrated")
    config = InferenceConfig.load(folder)
    config.model_copy(update={"smoothing": 3}).save(folder)
    assert InferenceConfig.load(folder).smoothing == 3


def test_the_checks_change_no_weight(model_folder: Path) -> None:
    stored = load_file(model_folder / "model.safetensors")
    state = ALMRR.load(model_folder, scan_backend="torch").state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
