"""NanoTWICE: nanofibres under an electron microscope (Carrera et al., IEEE Trans. on Industrial Informatics 2017)."""

from __future__ import annotations

import logging
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import find_folder, transfer
from almrr_pipeline.common.images import list_images
from almrr_pipeline.datasets.layout import GOOD
from almrr_pipeline.datasets.manifest import Counts, Item, check_counts
from almrr_pipeline.datasets.obtain import Archive, DownloadSpec, obtain
from almrr_pipeline.datasets.base import FetchRequest, Source

logger = logging.getLogger(__name__)

_PARTS = ("Normal", "Anomalous")
_DEFECT = "anomalous"
_TIFF = (".tif", ".tiff")
_OFFER = DownloadSpec(
    "nanotwice",
    "nanotwice",
    (Archive("nanotwice", "dfg05er_Data.zip", ("http://web.mi.imati.cnr.it/ettore/NanoTWICE/dfg05er_Data.zip",)),),
)


class Nanotwice(Source):
    """5 normal images to train on, 40 to test, each with defects: image-level metrics are undefined."""

    name = "nanotwice"
    categories = ("nanotwice",)
    license = (
        "NanoTWICE: no license is stated; cite Carrera, Manganini, Boracchi and Lanzarone, Defect Detection in SEM "
        "Images of Nanofibrous Materials, IEEE Transactions on Industrial Informatics, 2017."
    )

    def fetch(self, category: str, *, target: Path, request: FetchRequest) -> None:
        """Fill `target` with Normal and Anomalous."""
        logger.info("%s: %s", category, self.license)

        def take(folder: Path, is_ours: bool) -> None:
            found = find_folder(folder, *_PARTS)
            if found is None:
                raise AlmrrError("there are no folders Normal and Anomalous in it")
            transfer([found / part for part in _PARTS], target, move=is_ours)
            check_counts(self.items(category, target), self.expected(category), name=category, strict=request.strict)

        obtain(_OFFER, target=target, request=request, take=take)

    def items(self, category: str, folder: Path) -> list[Item]:
        """Return the normal images for training, the anomalous ones for testing."""
        masks = folder / "Anomalous" / "gt"
        train = [Item(path, None, "train", "normal", GOOD) for path in list_images(folder / "Normal", _TIFF)]
        test = [
            Item(path, masks / f"{path.stem}_gt.png", "test", "defective", _DEFECT)
            for path in list_images(folder / "Anomalous" / "images", _TIFF)
        ]
        return train + test

    def expected(self, category: str) -> Counts:
        """Return the published numbers of images."""
        return Counts(5, 0, 40)
