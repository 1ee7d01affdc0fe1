"""Account of a folder of images: what each file would be used as, or why it is not used.

The layouts are described in `datasets/folder.py`.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
from PIL import Image

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import list_folders, walk
from almrr_pipeline.common.images import IMAGE_SUFFIXES
from almrr_pipeline.datasets import folder_names
from almrr_pipeline.datasets.folder_names import judge, key, normalize
from almrr_pipeline.datasets.manifest import Item, Split
from almrr_pipeline.datasets.specimens import SPECIMENS_FILE, read_specimens

logger = logging.getLogger(__name__)

GOOD = "good"
Level = Literal["info", "warning", "error"]
_NAMED = 3  # files that a message names before it counts the rest
_DEPTH = 2  # levels below the folder where train or normal is looked for
_OTHER_SUFFIXES = (
    ".heic .heif .avif .jxl .jpf .jpx .j2k .dng .cr2 .nef .arw .raw .npy .npz .dcm .exr .hdr .svg "
    ".zip .tar .gz .tgz .7z .rar .h5 .hdf5 .pdf .mp4 .avi .mov .mkv"
)
"""Of images that are not read, and of files that hold images."""
_MASK_ENDINGS = tuple(
    separator + word
    for separator in "_-. "
    for word in ("mask", "gt", "seg", "label", "labels", "annotation", "groundtruth")
)
_ONLY_NORMAL = "training and validation images are normal ones alone"
_EXPECTED = (
    "expected is MVTec AD's layout (train/good, validation/good, test/good, test/DEFECT, "
    "ground_truth/DEFECT/STEM_mask.png) or the flat one (normal, validation, test/good, "
    "test/DEFECT, masks/DEFECT/STEM.png), where all but the first may be missing"
)


class Unused(NamedTuple):
    """A file that is not used, or a folder whose content is not."""

    path: Path
    reason: str  # with an advice where something is to be done
    level: Level
    """info: nothing is lost; warning: an image or mask may be missed; error: stops a fetch."""


@dataclass(frozen=True)
class FolderAccount:
    """What `inspect_folder` found: each file below `folder` is used or unused."""

    folder: Path  # as it was given
    root: Path  # the folder in it that contains train or normal
    items: tuple[Item, ...]  # used images, unopened, with their masks and specimens
    unused: tuple[Unused, ...]
    used_folders: tuple[Path, ...]  # of images and masks, directly in `root`, and specimens.csv

    def sentences(self, *levels: Level) -> list[str]:
        """Return a sentence per reason: the first paths, the number of others, the reason."""
        by_reason: dict[str, list[Path]] = defaultdict(list)
        for path, reason, level in self.unused:
            if level in levels:
                by_reason[reason].append(path)
        return [f"{_name_some(paths, self.folder)}: {why}" for why, paths in by_reason.items()]

    def table(self) -> pd.DataFrame:
        """Return a row per file, sorted by path.

        Columns: file, mask (paths relative to `folder`), split, label, defect_type, specimen of a
        used one; level and reason of an unused one; "" elsewhere.
        """
        rows = [
            {
                "file": show(item.image, self.folder),
                "mask": show(item.mask, self.folder) if item.mask else "",
                "split": item.split,
                "label": item.label,
                "defect_type": item.defect_type,
                "specimen": item.specimen,
            }
            for item in self.items
        ]
        rows += [
            {"file": show(each.path, self.folder), "level": each.level, "reason": each.reason}
            for each in self.unused
        ]
        columns = ["file", "split", "label", "defect_type", "mask", "specimen", "level", "reason"]
        table = pd.DataFrame(rows, columns=columns).fillna("")
        return table.sort_values("file", ignore_index=True)

    def check(self, *, name: str, strict: bool = False) -> None:
        """Report what is not used: warnings are logged, or refused as errors are if `strict`.

        Raises:
            AlmrrError: with each reason and up to three of its files; also if there is no image to
                train on.
        """
        errors, warnings = self.sentences("error"), self.sentences("warning")
        if not any(item.split == "train" for item in self.items):
            errors = errors or [f"{name}: there is no normal image to train on", *warnings]
        if strict:
            errors += [each for each in warnings if each not in errors]
        if errors:
            raise AlmrrError(". ".join(errors) + ".")
        for warning in warnings:
            logger.warning("%s: not used: %s", name, warning)


def show(path: Path, folder: Path) -> str:
    """Return a path relative to `folder`, with escapes for what cannot be printed or encoded."""
    text = (path.relative_to(folder) if path != folder else path).as_posix()
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _name_some(paths: Sequence[Path], folder: Path) -> str:
    named = ", ".join(show(path, folder) for path in paths[:_NAMED])
    more = len(paths) - _NAMED
    return f"{named} and {more} more" if more > 0 else named


def inspect_folder(
    folder: Path, *, normal_names: Sequence[str] | None = None, needs_masks: bool = False
) -> FolderAccount:
    """Tell what each file below a folder of the user's images would be used as; opens no image.

    Links are followed. Images of the folders named normal and of each defect type are taken from
    sub-folders too. What cannot be taken for certain is not used, and has the level `error`.

    Args:
        folder: contains train or normal, at most two levels below.
        normal_names: `data.normal_names`, names of folders of normal images; None for the usual.
        needs_masks: whether defective images need masks even without a folder of masks.

    Raises:
        AlmrrError: a folder cannot be read, there is neither train nor normal or there are several,
            or specimens.csv is wrong.
    """
    if not folder.is_dir():
        raise AlmrrError(f"There is no folder at {folder}; check the path.")
    root = _find_root(folder)
    sorter = _Sorter(root, normal_names)
    for entry in walk(folder):
        sorter.add(entry.path, entry.skipped, is_loss=entry.is_loss)
    sorter.choose_folders()
    items = sorter.sort(needs_masks=needs_masks)
    specimens = read_specimens(root, [item.image for item in items])
    items = [replace(item, specimen=specimens.get(item.image, "")) for item in items]
    used = [root / name for name in sorter.chosen.values() if (root / name).exists()]
    used += [root / SPECIMENS_FILE] if (root / SPECIMENS_FILE).exists() else []
    unused = sorted(_mend_links(items, sorter.unused))
    return FolderAccount(folder, root, tuple(items), tuple(unused), tuple(used))


def _find_root(folder: Path) -> Path:
    """Find the highest folder that contains train or normal."""
    taken = folder_names.TRAIN | folder_names.VALIDATION | folder_names.TEST | folder_names.MASKS
    level = [folder]
    for _ in range(_DEPTH + 1):
        found = [
            each
            for each in level
            if any(
                key(inner.name) in folder_names.TRAIN | folder_names.FLAT_TRAIN
                for inner in list_folders(each)
            )
        ]
        if len(found) > 1:
            named = _name_some(found, folder)
            raise AlmrrError(f"{named} have a folder train or normal each; name one of them.")
        if found:
            return found[0]
        level = [
            inner for each in level for inner in list_folders(each) if key(inner.name) not in taken
        ]
    raise AlmrrError(f"there is neither a folder train nor a folder normal in it; {_EXPECTED}")


def _mend_links(items: Iterable[Item], unused: Iterable[Unused]) -> list[Unused]:
    """Lower the level of files that are used through a link elsewhere."""
    used = {os.path.realpath(path) for item in items for path in (item.image, item.mask) if path}
    via = "it is used through a link"
    return [
        Unused(each.path, via, "info")
        if each.level == "warning" and os.path.realpath(each.path) in used
        else each
        for each in unused
    ]


_ROLES = {
    "train": folder_names.TRAIN | folder_names.FLAT_TRAIN,
    "validation": folder_names.VALIDATION,
    "test": folder_names.TEST,
    "masks": folder_names.MASKS,
}


class _Sorter:
    """Sorts the files of a folder by their role in the protocol."""

    def __init__(self, root: Path, normal_names: Sequence[str] | None) -> None:
        self.root, self.normal_names = root, normal_names
        self.unused: list[Unused] = []
        self.chosen: dict[str, str] = {}  # folder in `root` by role
        self._images: dict[str, list[Path]] = defaultdict(list)  # by folder in `root`
        self._types: dict[str, str] = {}  # defect types' folders by their key

    def add(self, path: Path, skipped: str, *, is_loss: bool) -> None:
        """Take an image under the root; note all other files."""
        inside = path.relative_to(self.root).parts if path.is_relative_to(self.root) else ()
        if skipped:
            self._note(path, skipped, "warning" if is_loss else "info")
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            if path != self.root / SPECIMENS_FILE:
                self._note(path, *_explain_other_file(path))
        elif not inside:
            self._note(path, f"it is outside of the folder {self.root.name} with the training")
        elif len(inside) == 1:
            self._note(path, f"it is next to the folders of images; {_EXPECTED}")
        elif not _is_line_of_text("/".join(inside)):
            advice = "the name is not UTF-8 text or has a line break; rename the file"
            self._note(path, advice, "error")
        else:
            self._images[inside[0]].append(path)

    def _note(self, path: Path, reason: str, level: Level = "warning") -> None:
        self.unused.append(Unused(path, reason, level))

    def choose_folders(self) -> None:
        """Choose a folder for each role: of several the one with images."""
        names = [each.name for each in list_folders(self.root)]
        for role, keys in _ROLES.items():
            found = [name for name in names if key(name) in keys]
            found.sort(key=lambda name: key(name) in folder_names.FLAT_TRAIN)  # train first
            full = [name for name in found if name in self._images]
            if found:
                self.chosen[role] = (full or found)[0]
            for name in full[1:]:
                both = f"{full[0]} and {name} both hold images of one purpose ({role}); keep one"
                for path in self._images[name]:
                    self._note(path, both, "error")
        for name in self._images.keys() - self.chosen.values():
            if any(key(name) in keys for keys in _ROLES.values()):
                continue  # noted above
            reason = f"the folder {name} is not part of the layout; {_EXPECTED}"
            if folder_names.looks_like_masks(name):
                reason = f"the folder {name} looks like masks; rename it to ground_truth or masks"
            for path in self._images[name]:
                self._note(path, reason)

    def sort(self, *, needs_masks: bool) -> list[Item]:
        """Return the images that are used, sorted by split, defect type and path."""
        self._types = {
            key(path.relative_to(self.root).parts[1]): path.relative_to(self.root).parts[1]
            for path in self._of("test")
            if len(path.relative_to(self.root).parts) > 2
            and judge(path.relative_to(self.root).parts[1], self.normal_names) == "defect"
        }
        items = self._normal("train") + self._normal("validation")
        if "validation" in self.chosen and not self._of("validation"):
            advice = "it holds no image; put normal ones into it, or remove it"
            self._note(self.root / self.chosen["validation"], advice, "error")
        items += self._test()
        items = self._without_masks_beside(items)
        return self._with_masks(items, needed=needs_masks)

    def _of(self, role: str) -> list[Path]:
        return sorted(self._images.get(self.chosen.get(role, ""), []))

    def _inner(self, path: Path) -> tuple[str, ...]:
        """Return the folders between the one of the role and the image."""
        return path.relative_to(self.root).parts[1:-1]

    def _normal(self, split: Split) -> list[Item]:
        images = self._of(split)
        flat = key(self.chosen.get(split, "")) in folder_names.FLAT_TRAIN
        tops = {self._inner(path)[0] if self._inner(path) else "" for path in images}
        named = {top for top in tops if top and judge(top, self.normal_names) == "normal"}
        places = len(named) + ("" in tops)
        items = []
        for path in images:
            inner = self._inner(path)
            nested = inner if flat or not inner else inner[1:]
            if inner and not flat and inner[0] not in named:
                advice = (
                    "move normal ones to train/good or name their folder in data.normal_names, "
                    "and defective ones to test/DEFECT"
                )
                self._note(path, f"{_ONLY_NORMAL}; {advice}", "error")
            elif (not flat and places > 1) or (flat and named and places > 1):
                advice = "move them into one"
                self._note(path, f"{_ONLY_NORMAL}, in one folder; {advice}", "error")
            elif self._is_normal_below(path, nested):
                items.append(Item(path, None, split, "normal", GOOD))
        return items

    def _is_normal_below(self, path: Path, nested: Sequence[str]) -> bool:
        """Whether no sub-folder of normal images is named after defects or masks."""
        for name in nested:
            if folder_names.means_defects(name) or key(name) in self._types:
                advice = "move defective ones to test/DEFECT"
                where = f"the folder {name} is inside of normal images"
                self._note(path, f"{where}, but {_ONLY_NORMAL}; {advice}", "error")
                return False
            if folder_names.looks_like_masks(name):
                self._note(path, f"the folder {name} inside of normal images looks like masks")
                return False
        return True

    def _test(self) -> list[Item]:
        items, test = [], self.chosen.get("test", "test")
        spellings = {name: key(name) for path in self._of("test") for name in self._inner(path)[:1]}
        twice = {each for each, count in Counter(spellings.values()).items() if count > 1}
        for path in self._of("test"):
            inner = self._inner(path)
            if not inner:
                advice = f"move it into {test}/{GOOD}, or into a folder named after its defect type"
                self._note(path, f"next to the folders of {test}; {advice}", "error")
                continue
            verdict = judge(inner[0], self.normal_names)
            if verdict == "unsure":
                asked = f"is {inner[0]} a folder of normal images or a defect type?"
                advice = "list all names of normal folders, and no others, in data.normal_names"
                self._note(path, f"{asked} {advice}", "error")
            elif verdict == "normal":
                if self._is_normal_below(path, inner[1:]):
                    items.append(Item(path, None, "test", "normal", GOOD))
            elif key(inner[0]) in twice:
                self._note(
                    path, "two folders of this name, spelled differently; join them", "error"
                )
            elif any(folder_names.looks_like_masks(name) for name in inner):
                advice = f"move masks to masks/{inner[0]}, next to {test}"
                self._note(path, f"masks among the images of {test}; {advice}", "error")
            elif any(judge(name, self.normal_names) == "normal" for name in inner[1:]):
                advice = f"move them to {test}/{GOOD}"
                self._note(
                    path, f"normal images inside of the defect type {inner[0]}; {advice}", "error"
                )
            else:
                items.append(Item(path, None, "test", "defective", normalize(inner[0])))
        return items

    def _without_masks_beside(self, items: list[Item]) -> list[Item]:
        """Note images that are named like the mask of another in their folder."""
        stems = {(item.image.parent, item.image.stem) for item in items}
        kept = []
        for item in items:
            folder, stem = item.image.parent, item.image.stem
            endings = [end for end in _MASK_ENDINGS if stem.lower().endswith(end)]
            if any((folder, stem[: -len(end)]) in stems for end in endings):
                reason = "named like the mask of an image next to it"
                advice = f"move masks to masks/{item.defect_type}, or rename the image"
                self._note(item.image, f"{reason}; {advice}", "error")
            else:
                kept.append(item)
        return kept

    def _with_masks(self, items: list[Item], *, needed: bool) -> list[Item]:
        """Give each defective image its mask; note masks without one, and masks of several."""
        masks = self._of("masks")
        found: dict[Path, Path] = {}
        if "masks" in self.chosen or needed:
            finder = _MaskFinder(self.root / self.chosen.get("masks", "ground_truth"), masks)
            found = {
                item.image: finder.find(item.image.relative_to(self.root).parts[1:])
                for item in items
                if item.label == "defective"
            }
        shared = {mask for mask, count in Counter(found.values()).items() if count > 1}
        for mask in sorted(set(masks) - set(found.values())):
            inner = self._inner(mask)
            of_normal = inner and judge(inner[0], self.normal_names) == "normal"
            self._note(mask, "a mask of a normal image" if of_normal else "a mask without an image")
        kept = []
        for item in items:
            own = found.get(item.image)
            if own and own in shared:
                reason = f"images of one stem would share the mask {show(own, self.root)}"
                self._note(item.image, f"{reason}; rename one of them, and give it a mask", "error")
            else:
                kept.append(replace(item, mask=own))
        for mask in shared.intersection(masks):
            self._note(mask, "a mask of two images", "error")
        return kept


class _MaskFinder:
    """Finds masks by the names of folder and file: composed, and without case where needed."""

    def __init__(self, folder: Path, masks: Iterable[Path]) -> None:
        self._folder = folder
        self._exact: dict[str, Path] = {}
        self._folded: dict[str, Path] = {}
        for path in masks:
            name = normalize(path.relative_to(folder).as_posix())
            stem = normalize(path.relative_to(folder).with_suffix("").as_posix())
            for each in (name, stem):
                self._exact.setdefault(each, path)
                self._folded.setdefault(each.casefold(), path)

    def find(self, image: Sequence[str]) -> Path:
        """Return the mask of an image, whose path in the test folder is given, or where it goes."""
        *folders, name = map(normalize, image)
        stem = Path(name).stem
        places = ["/".join(folders), folders[0]]
        wanted = [
            f"{place}/{each}"
            for place in dict.fromkeys(places)
            for each in (f"{stem}_mask.png", f"{stem}_mask", name, stem)
        ]
        for table, fold in ((self._exact, str), (self._folded, str.casefold)):
            for each in wanted:
                if mask := table.get(fold(each)):
                    return mask
        return self._folder.joinpath(*folders, f"{stem}_mask.png")


def _explain_other_file(path: Path) -> tuple[str, Level]:
    """Return why a file that is not read as an image is not used, and how much that matters."""
    accepted = f"accepted are {', '.join(sorted(IMAGE_SUFFIXES))}"
    suffix = path.suffix.lower()
    if path.name.lower() in {SPECIMENS_FILE, "parts.csv"}:
        return f"is read under the name {SPECIMENS_FILE}, next to train or normal alone", "warning"
    if suffix in _OTHER_SUFFIXES.split() or (path.name.lower() != "thumbs.db" and _is_image(path)):
        return f"the suffix {suffix or '(none)'} is not accepted; {accepted}", "warning"
    return "not an image", "info"


def _is_line_of_text(name: str) -> bool:
    """Whether a table can hold a name."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return not set(name) & set("\r\n")


def _is_image(path: Path) -> bool:
    """Whether Pillow knows a file's content by its first bytes."""
    try:
        with Image.open(path):
            return True
    except Exception:  # a damaged file makes Pillow's readers raise nearly anything
        return False
