from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small dataset on disk, all images different and of different sizes.

    root: its folder. training, validation, test: paths of gray normal images. textures: paths of
    colored ones.
    """
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)

    def write(folder: str, count: int, channels: int) -> list[Path]:
        paths = []
        for number in range(count):
            low, high = (0, 256) if channels == 3 else (100, 156)
            size = (60 + 7 * number, 90 - 5 * number)
            path = root / folder / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(
                generator.integers(low, high, (*size, channels), dtype=np.uint8).squeeze()
            ).save(path)
            paths.append(path)
        return paths

    return SimpleNamespace(
        root=root,
        training=write("train", 4, 1),
        validation=write("validation", 2, 1),
        test=write("test", 3, 1),
        textures=write("textures", 3, 3),
    )
