"""NanoTWICE: nanofibers under an electron microscope (Carrera et al., IEEE TII 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import find_folder
from almrr_pipeline.common.images import list_images
from almrr_pipeline.datasets.account import GOOD
from almrr_pipeline.datasets.manifest import Counts, Item
from almrr_pipeline.datasets.obtain import Archive, ArchivedDataset

_NORMAL, _ANOMALOUS = "Normal", "Anomalous"
_DEFECT_TYPE = "anomalous"
_TIFF = (".tif", ".tiff")
_FILE = "dfg05er_Data.zip"
_ADDRESS = f"http://web.mi.imati.cnr.it/ettore/NanoTWICE/{_FILE}"


class Nanotwice(ArchivedDataset):
    """5 normal images to train on, 40 defective ones to test: image metrics are undefined."""

    name = "nanotwice"
    counts: Mapping[str, Counts] = {name: Counts(5, 0, 40)}
    archive = Archive(name, _FILE, (_ADDRESS,))
    license = (
        "NanoTWICE: no license is stated; cite Carrera, Manganini, Boracchi and Lanzarone, "
        "Defect Detection in SEM Images of Nanofibrous Materials, "
        "IEEE Transactions on Industrial Informatics, 2017."
    )

    def extract(self, category: str, folder: Path) -> list[Path]:
        """Return the folders Normal and Anomalous."""
        found = find_folder(folder, _NORMAL, _ANOMALOUS)
        if found is None:
            raise AlmrrError(f"there are no folders {_NORMAL} and {_ANOMALOUS} in it")
        return [found / _NORMAL, found / _ANOMALOUS]

    def items(self, category: str, folder: Path) -> list[Item]:
        """Return the normal images for training, the anomalous ones for testing."""
        normal = list_images(folder / _NORMAL, _TIFF)
        anomalous = list_images(folder / _ANOMALOUS / "images", _TIFF)
        masks = folder / _ANOMALOUS / "gt"
        return [Item(path, None, "train", "normal", GOOD) for path in normal] + [
            Item(path, masks / f"{path.stem}_gt.png", "test", "defective", _DEFECT_TYPE)
            for path in anomalous
        ]
