"""Maps of the frozen backbone, kept on disk while a model is trained on a CPU.

The backbone never changes and images return in the same orientation, so that most embeddings of a
long training are repetitions. Kept are the backbone's own maps in their own type, before they are
resized: what was kept is bit-identical to what is embedded anew.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DISK_FRACTION = 0.5
"""At most this fraction of the free space on the disk is taken, whatever the limit."""


class FeatureCache:
    """The backbone for images that are known by keys: each is embedded once, then read.

    Images are embedded one by one, since what is computed for an image must not depend on which
    others are kept: resuming would not repeat it. On one thread that is no slower.

    Args:
        backbone: the frozen feature extractor, on the CPU.
        folder: where the file is made; it has no name and is gone when the process ends.
        limit: its largest size in bytes.
        preferred: keys below this number return more often than others; these take only the room
            that the preferred ones cannot fill.
    """

    def __init__(
        self,
        backbone: Callable[[Tensor], list[Tensor]],
        folder: Path,
        *,
        limit: float,
        preferred: int,
    ) -> None:
        self._backbone = backbone
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._limit = min(limit, DISK_FRACTION * shutil.disk_usage(folder).free)
        self._preferred = preferred
        self._places: dict[int, int] = {}  # where in the file a key's maps begin, in bytes
        self._shapes: list[torch.Size] = []  # (h, w, C) of an image's maps
        self._dtype = torch.float32  # of the maps
        self._others = 0  # kept images whose key is not preferred

    @torch.no_grad()
    def __call__(self, images: Tensor, keys: Tensor) -> list[Tensor]:
        """As the backbone, with channels innermost: images (B, 3, H, W), integer keys (B,)."""
        images = images.contiguous(memory_format=torch.channels_last)
        rows = [self._maps(*row) for row in zip(torch.split(images, 1), keys.tolist(), strict=True)]
        return [torch.stack(maps).permute(0, 3, 1, 2) for maps in zip(*rows, strict=True)]

    def _maps(self, image: Tensor, key: int) -> list[Tensor]:
        """Maps (h, w, C) of an image (1, 3, H, W)."""
        if key in self._places:
            self._file.seek(self._places[key])
            sizes = [shape.numel() for shape in self._shapes]
            values = torch.empty(sum(sizes), dtype=self._dtype)
            buffer: Any = values.view(torch.uint8).numpy()
            self._file.readinto(buffer)
            parts = torch.split(values, sizes)
            return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        maps = [x[0].permute(1, 2, 0).contiguous() for x in self._backbone(image)]
        self._shapes, self._dtype = [x.shape for x in maps], maps[0].dtype
        self._keep(key, torch.cat([x.flatten() for x in maps]).view(torch.uint8))
        return maps

    def _keep(self, key: int, values: Tensor) -> None:
        """Append bytes to the file where the limit allows it."""
        size, preferred = values.nbytes, key < self._preferred
        taken = len(self._places) if preferred else self._preferred + self._others
        if (taken + 1) * size > self._limit:
            return
        try:
            place = self._file.seek(len(self._places) * size)
            if self._file.write(values.numpy()) < size:  # type: ignore[arg-type]
                raise OSError("the file was written in part")
        except OSError as error:
            self._limit = 0.0
            logger.warning("No more features are kept, training goes on slower: %s.", error)
            return
        self._places[key] = place
        self._others += not preferred
