"""MVTec AD: 15 categories of textures and objects (Bergmann et al., CVPR 2019; IJCV 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import find_folder
from almrr_pipeline.datasets.account import inspect_folder
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.folder import list_items
from almrr_pipeline.datasets.manifest import Counts, Item
from almrr_pipeline.datasets.obtain import Archive, ArchivedDataset, has_own_path

PREFIX = "mvtec_"
_TERMS = "CC-BY-NC-SA-4.0"
_SHARES = "https://www.mydrive.ch/shares"
_BUNDLE_SHARE = "150996/b52ecdcbf521176e9db9c731f2304b27/download/420938113-1629960298"
_BUNDLE_FILE = "mvtec_anomaly_detection.tar.xz"
_BUNDLE = Archive(
    "mvtec_ad",
    _BUNDLE_FILE,
    (f"{_SHARES}/{_BUNDLE_SHARE}/{_BUNDLE_FILE}",),
    sha256="cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
    shared=True,
)
_CONTENT = ("train", "test", "ground_truth", "license.txt", "readme.txt")

# Category: the published numbers of images (table 1 of the paper), share and file of its archive.
# The links move now and then; then data.addresses or the bundle of all categories is used.
_CATEGORIES: dict[str, tuple[tuple[int, int, int], str]] = {
    "bottle": ((209, 20, 63), "150452/132a93367fb17cdf968dfb5c4013f6e7/420937370-1629958698"),
    "cable": ((224, 58, 92), "150453/10f960e07fec2838b2cd512586633a32/420937413-1629958794"),
    "capsule": ((219, 23, 109), "150454/e0ce6dd74eb150f46c0d98131b3703f2/420937454-1629958872"),
    "carpet": ((280, 28, 89), "150455/eac7fbce84d93a5094e13f391170eca4/420937484-1629959013"),
    "grid": ((264, 21, 57), "150456/bb0b2e3dc804ccb8b4485e01f8e4493b/420937487-1629959044"),
    "hazelnut": ((391, 40, 70), "150457/51d49f65e84bdc100ff8035d7dd783ea/420937545-1629959162"),
    "leather": ((245, 32, 92), "150458/923030ce14e10a7d147e95d0f8885f6b/420937607-1629959262"),
    "metal_nut": ((220, 22, 93), "150459/c68856a21dca589b0f8ff6d4ee0f18f4/420937637-1629959294"),
    "pill": ((267, 26, 141), "150460/d4f1c04da67034ccc8d8b5fa3e73f244/420938129-1629960351"),
    "screw": ((320, 41, 119), "150461/242f454cc6385e5693c4fd4b94567d1e/420938130-1629960389"),
    "tile": ((230, 33, 84), "150462/5479f0fdc97bc6fa16eab0cb0cf0109f/420938133-1629960456"),
    "toothbrush": ((60, 12, 30), "150463/895a1a5fb84b958f07417784b060434b/420938134-1629960477"),
    "transistor": ((213, 60, 40), "150464/99b8ea0332438d64fcc2475ee73f9c29/420938166-1629960554"),
    "wood": ((247, 19, 60), "150465/d5b4115b720cdb54d217e75636e6e374/420938383-1629960649"),
    "zipper": ((240, 32, 119), "150466/bd155b557520edaf692d9bfdb915c24a/420938385-1629960680"),
}


class MvtecAd(ArchivedDataset):
    """MVTec AD with its own split; each category has an archive, and there is a bundle of all."""

    name = "mvtec_ad"
    counts: Mapping[str, Counts] = {
        PREFIX + name: Counts(*numbers) for name, (numbers, _) in _CATEGORIES.items()
    }
    license = (
        "MVTec AD is licensed CC BY-NC-SA 4.0: non-commercial use, share alike; cite Bergmann et "
        "al., MVTec AD, CVPR 2019, and The MVTec Anomaly Detection Dataset, IJCV 2021."
    )

    def archives(self, category: str) -> tuple[Archive, ...]:
        """Return the category's archive and the bundle."""
        name = category.removeprefix(PREFIX)
        share, _, file = _CATEGORIES[name][1].rpartition("/")
        address = f"{_SHARES}/{share}/download/{file}/{name}.tar.xz"
        own = Archive(category, f"{name}.tar.xz", (address,), folder=f"mvtec_ad/{name}")
        return own, _BUNDLE

    def extract(self, category: str, folder: Path) -> list[Path]:
        """Return train, test, ground_truth and the license of one category."""
        name = category.removeprefix(PREFIX)
        found = find_folder(folder, "train/good", "test", name=name)
        if found is None:
            raise AlmrrError(f"there is no {name}/train/good in it")
        return [found / each for each in _CONTENT if (found / each).exists()]

    def check(self, category: str, request: FetchRequest) -> None:
        """Raise AlmrrError if the license is not accepted; own files need no acceptance."""
        accepted = _TERMS in request.settings.accept_licenses
        if not accepted and not has_own_path(self.archives(category), request):
            advice = f"If you accept these terms, add {_TERMS} to data.accept_licenses."
            raise AlmrrError(f"{category}: {self.license} {advice}")

    def verify(self, category: str, target: Path, request: FetchRequest) -> None:
        """Report what is not used, and compare the counts."""
        account = inspect_folder(target, needs_masks=True)
        account.check(name=category, strict=request.settings.strict)
        super().verify(category, target, request)

    def items(self, category: str, folder: Path) -> list[Item]:
        """Return the dataset's own split."""
        return list_items(folder)
