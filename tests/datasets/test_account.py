"""Folders as people have them: each file is used with the right label, or named with a reason."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import IMAGE_SUFFIXES, list_images
from almrr_pipeline.datasets.account import inspect_folder
from almrr_pipeline.datasets.folder_names import judge
from almrr_pipeline.datasets.manifest import build_manifest
from almrr_pipeline.datasets.registry import dataset_for


def touch(folder: Path, *names: str) -> Path:
    """Make empty files; an account opens no image."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def used(folder: Path, **options: Any) -> dict[str, str]:
    """Return `split/defect type` of each used image."""
    account = inspect_folder(folder, **options)
    return {
        item.image.relative_to(folder).as_posix(): f"{item.split}/{item.defect_type}"
        for item in account.items
    }


def unused(folder: Path, *levels: Any, **options: Any) -> dict[str, str]:
    account = inspect_folder(folder, **options)
    return {
        each.path.relative_to(folder).as_posix(): each.reason
        for each in account.unused
        if each.level in levels
    }


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "good/0.png", "crack/1.png", "gt/1.png")
    folder = touch(tmp_path / "tiles", "test/good/2.png")
    (folder / "train").mkdir()
    (folder / "train/good").symlink_to(tmp_path / "elsewhere/good")
    (folder / "test/crack").symlink_to(tmp_path / "elsewhere/crack")
    (folder / "masks").mkdir()
    (folder / "masks/crack").symlink_to("../../elsewhere/gt")

    assert used(folder) == {
        "test/crack/1.png": "test/crack",
        "test/good/2.png": "test/good",
        "train/good/0.png": "train/good",
    }
    assert not unused(folder, "warning", "error")


def test_a_fetch_copies_what_is_linked(workplace: Any, draw: Any, tmp_path: Path) -> None:
    folder = draw.mvtec(tmp_path / "tiles")
    (folder / "test/cut").rename(tmp_path / "cut")
    (folder / "test/cut").symlink_to(tmp_path / "cut")

    request = workplace.request(paths={"folder_tiles": str(folder)}, strict=True)
    assert workplace.fetch("folder_tiles", request)["defect_type"].tolist().count("cut") == 2


def test_links_in_circles_end_and_broken_links_are_named(tmp_path: Path) -> None:
    folder = touch(tmp_path, "train/good/0.png", "test/cut/1.png")
    (folder / "train/good/again").symlink_to(folder)
    (folder / "test/cut/up").symlink_to("..")
    (folder / "test/hole").symlink_to("/nowhere")
    (folder / "test/cut/2.png").symlink_to("absent.png")

    assert len(used(folder)) == 2
    assert unused(folder, "warning") == {
        "test/cut/2.png": "a link to nothing",
        "test/hole": "a link to nothing",
    }


def test_images_for_prediction_are_listed_through_links(tmp_path: Path) -> None:
    touch(tmp_path, "far/1.png", "near/0.png", "near/.git/2.png", "near/@eaDir/thumb.png")
    (tmp_path / "near/far").symlink_to("../far")
    (tmp_path / "near/around").symlink_to(".")

    found = list_images(tmp_path / "near", recursive=True)
    assert found == [tmp_path / "near/0.png", tmp_path / "near/far/1.png"]


@pytest.mark.parametrize(
    "name", ["Good", "OK", "\uff2f\uff2b", "ok", "Pass", "NORMAL", "defect-free", "No Defect"]
)
def test_the_usual_names_of_normal_folders_are_compared_without_case(
    tmp_path: Path, name: str
) -> None:
    touch(tmp_path, f"train/{name}/0.png", f"test/{name}/1.png", "test/crack/2.png")
    assert set(used(tmp_path).values()) == {"train/good", "test/good", "test/crack"}


@pytest.mark.parametrize(
    "name",
    ["bad", "NG", "not_ok", "NotOK", "not good", "no_good", "nok", "abnormal", "broken2", "hole"],
)
def test_the_opposite_of_normal_is_a_defect(name: str) -> None:
    assert judge(name, None) == "defect"


@pytest.mark.parametrize(
    "name",
    ["ok_parts", "good 2", "good1", "GoodParts", "OK品", "良品", "iO", "Gutteile", "clean", "0"],
)
def test_an_unclear_name_is_asked_for_and_a_parameter_answers(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "train/good/0.png", f"test/{name}/1.png")
    with pytest.raises(AlmrrError, match=r"a defect type\? .*data\.normal_names"):
        inspect_folder(tmp_path).check(name="folder_tiles")

    answer = {"normal_names": ["good", name.upper()]}
    assert used(tmp_path, **answer)[f"test/{name}/1.png"] == "test/good"
    assert used(tmp_path, normal_names=["good"])[f"test/{name}/1.png"] == f"test/{name}"


def test_the_parameter_names_normal_folders_of_a_fetch(
    workplace: Any, draw: Any, tmp_path: Path
) -> None:
    folder = draw.mvtec(tmp_path / "tiles")
    (folder / "test/good").rename(folder / "test/Gut")
    paths = {"folder_tiles": str(folder)}
    request = workplace.request(paths=paths, normal_names=["good", "gut"])

    manifest = workplace.fetch("folder_tiles", request)
    assert (manifest.query("split == 'test'")["label"] == "normal").sum() == 2


def test_nested_folders_are_taken(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "train/good/2024-05-02/0.png",
        "train/good/1.png",
        "test/ok/line1/2.png",
        "test/scratch/line1/3.png",
        "test/scratch/line2/3.png",
        "masks/scratch/line1/3.png",
        "masks/scratch/line2/3_mask.png",
    )
    account = inspect_folder(tmp_path)
    assert len(used(tmp_path)) == 5
    masks = [item.mask.relative_to(tmp_path).as_posix() for item in account.items if item.mask]
    assert masks == ["masks/scratch/line1/3.png", "masks/scratch/line2/3_mask.png"]
    assert not account.unused


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train/good/bad/9.png", "images are normal ones alone"),
        ("train/good/scratch/9.png", "images are normal ones alone"),
        ("train/good/NG_2/9.png", "images are normal ones alone"),
        ("test/scratch/seg/9.png", "masks among the images"),
        ("test/scratch/3.label.png", "named like the mask of an image next to it"),
        ("train/2024-05-02/9.png", r"data\.normal_names"),
        ("train/normal/9.png", "in one folder"),
        ("test/product/good/9.png", "inside of the defect type product"),
        ("test/Scratch/9.png", "spelled differently"),
        ("test/scratch/3_mask.png", "named like the mask of an image next to it"),
        ("test/scratch/gt/3.png", "masks among the images"),
        ("test/ground_truth/scratch/3.png", "masks among the images"),
        ("normal/9.png", "train and normal both hold images"),
        ("Ground_Truth/scratch/3.png", "Ground_Truth and masks both hold images"),
    ],
)
def test_what_is_not_certain_is_refused_by_name(tmp_path: Path, name: str, said: str) -> None:
    touch(tmp_path, "train/good/0.png", "test/scratch/3.png", "masks/scratch/3.png", name)
    with pytest.raises(AlmrrError, match=said) as caught:
        inspect_folder(tmp_path).check(name="folder_tiles")
    assert Path(name).name in str(caught.value)


@pytest.mark.parametrize("train", ["train/good", "normal", "Train/Good"])
@pytest.mark.parametrize("masks", ["ground_truth", "masks", "Ground Truth", "MASKS", "gt"])
@pytest.mark.parametrize("mask", ["3.png", "3_mask.png"])
def test_either_mask_folder_goes_with_either_layout(
    tmp_path: Path, train: str, masks: str, mask: str
) -> None:
    touch(tmp_path, f"{train}/0.png", "Test/cut/3.png", f"{masks}/cut/{mask}")
    account = inspect_folder(tmp_path)
    assert [item.mask for item in account.items if item.label == "defective"] == [
        tmp_path / masks / "cut" / mask
    ]


def test_masks_that_are_not_used_are_named(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "train/good/0.png",
        "test/cut/1.png",
        "masks/cut/1.png",
        "masks/cut/2.png",
        "masks/good/0.png",
        "label_masks/cut/1.png",
    )
    reasons = unused(tmp_path, "warning")
    assert reasons["masks/cut/2.png"] == "a mask without an image"
    assert reasons["masks/good/0.png"] == "a mask of a normal image"
    assert "looks like masks" in reasons["label_masks/cut/1.png"]


def test_two_images_of_one_stem_do_not_share_a_mask(tmp_path: Path) -> None:
    touch(tmp_path, "train/good/0.png", "test/cut/1.png", "test/cut/1.jpg", "masks/cut/1_mask.png")
    with pytest.raises(AlmrrError, match=r"1\.jpg, .*1\.png: images of one stem would share"):
        inspect_folder(tmp_path).check(name="folder_tiles")
    assert unused(tmp_path, "error")["masks/cut/1_mask.png"] == "a mask of two images"


def test_names_are_compared_composed(tmp_path: Path) -> None:
    """As macOS stores and Linux does not; specimens.csv comes from a spreadsheet."""
    composed, apart = (unicodedata.normalize(form, "Prüfling é") for form in ("NFC", "NFD"))
    touch(tmp_path, f"train/good/{apart}.png", f"test/{apart}/1.PNG", f"masks/{composed}/1.png")
    (tmp_path / "specimens.csv").write_text(
        f"image,specimen\ntrain/good/{composed}.png,7", encoding="utf-8"
    )
    train, defective = inspect_folder(tmp_path).items
    assert (train.specimen, defective.defect_type) == ("7", composed)
    assert defective.mask == tmp_path / "masks" / composed / "1.png"


@pytest.mark.parametrize(
    "text",
    [
        "image,specimen,\nnormal/0.png,7,\n,,\n",
        "image,specimen\nnormal/0.png,7,\n,\n",
        'Image, Specimen\r\n\r\n"normal\\0.png","7"\r\n',
        "note,specimen,image\n,7,./normal//0.png\n",
    ],
)
def test_specimens_csv_as_spreadsheets_save_it(tmp_path: Path, text: str) -> None:
    touch(tmp_path, "normal/0.png", "normal/1.png")
    (tmp_path / "specimens.csv").write_text(text, encoding="utf-8", newline="")
    assert [item.specimen for item in inspect_folder(tmp_path).items] == ["7", ""]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"image;specimen\nnormal/0.png;7\n", "columns image;specimen; it needs .* commas"),
        ("image,specimen\nnormal/0.png,7\n".encode("utf-16"), "as comma-separated UTF-8 text"),
        ("image,specimen\nnormal/0.png,Prüfling\n".encode("cp1252"), "as comma-separated UTF-8"),
        (b"image,specimen\nnormal/0.png,7,8\n", "line 2 has 3 fields, not 2"),
        (b"image,specimen\nnormal/0.png,7\nnormal/0.png,8\n", "two specimens, 7 and 8"),
        (b'image,specimen\n"normal/0.png,7\n', "as comma-separated UTF-8 text"),
        (b"\n,\n", "it is empty"),
    ],
)
def test_specimens_csv_of_other_programs_is_refused_with_the_cure(
    tmp_path: Path, content: bytes, said: str
) -> None:
    touch(tmp_path, "normal/0.png")
    (tmp_path / "specimens.csv").write_bytes(content)
    with pytest.raises(AlmrrError, match=said):
        inspect_folder(tmp_path)


@pytest.mark.parametrize("name", ["/normal/0.png", "masks/cut/1.png", "other/2.png"])
def test_specimens_csv_names_images_alone(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "normal/0.png", "test/cut/1.png", "masks/cut/1.png", "other/2.png")
    (tmp_path / "specimens.csv").write_text(f"image,specimen\n{name},7")
    with pytest.raises(AlmrrError, match="line 2: there is no image"):
        inspect_folder(tmp_path)


def test_a_suffix_that_is_not_accepted_is_named_with_those_that_are(
    workplace: Any, tmp_path: Path
) -> None:
    touch(tmp_path, *(f"train/good/{number}.heic" for number in range(5)))
    request = workplace.request(paths={"folder_tiles": str(tmp_path)})
    said = (
        r"folder_tiles: there is no normal image to train on\. train/good/0\.heic, "
        r"train/good/1\.heic, train/good/2\.heic and 2 more: the suffix \.heic is not accepted; "
        r"accepted are \.bmp, .*\.jpeg, \.jpg, .*\.png"
    )
    with pytest.raises(AlmrrError, match=said):
        workplace.fetch("folder_tiles", request)


def test_an_image_is_known_by_its_content_too(tmp_path: Path, draw: Any) -> None:
    touch(tmp_path, "train/good/0.png", "train/good/notes.txt", "train/good/Thumbs.db")
    touch(tmp_path, "train/good/more.zip", "test/cut.7z")
    draw.image(tmp_path / "1.png").rename(tmp_path / "train/good/0001")
    named = ["test/cut.7z", "train/good/0001", "train/good/more.zip"]
    assert list(unused(tmp_path, "warning")) == named


def test_unused_images_are_counted_and_refused_where_strict(
    workplace: Any, draw: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = draw.mvtec(tmp_path / "tiles")
    for number in range(4):
        draw.image(folder / "abnormal" / f"{number}.png")
    paths = {"folder_tiles": str(folder)}
    said = (
        r"abnormal/0\.png, abnormal/1\.png, abnormal/2\.png and 1 more: .* not part of the layout"
    )

    with pytest.raises(AlmrrError, match=said):
        workplace.fetch("folder_tiles", workplace.request(paths=paths, strict=True))
    caplog.clear()
    workplace.fetch("folder_tiles", workplace.request(paths=paths))
    assert "abnormal/2.png and 1 more" in caplog.text


def test_the_test_folder_alone_is_not_taken_for_training(tmp_path: Path) -> None:
    touch(tmp_path, "test/normal/0.png", "test/cut/1.png")
    with pytest.raises(AlmrrError, match="neither a folder train nor a folder normal"):
        inspect_folder(tmp_path)


def test_one_of_several_folders_has_to_be_named(tmp_path: Path) -> None:
    touch(tmp_path, "bottle/train/good/0.png", "cable/train/good/0.png")
    with pytest.raises(AlmrrError, match="bottle, cable have a folder train or normal each"):
        inspect_folder(tmp_path)


def test_names_that_cannot_be_printed_are_escaped(tmp_path: Path) -> None:
    touch(tmp_path, "train/good/0.png")
    (tmp_path / os.fsdecode(b"\xff\n.png")).touch()
    (said,) = inspect_folder(tmp_path).sentences("warning")
    assert said.encode().startswith(rb"\udcff\n.png: ")


@pytest.mark.parametrize(
    "name", [b"train/good/\xff.png", b"train/good/a\nb.png", b"test/\xe9/0.png"]
)
def test_names_that_no_table_holds_are_errors(tmp_path: Path, name: bytes) -> None:
    touch(tmp_path, "train/good/0.png", os.fsdecode(name))
    (said,) = inspect_folder(tmp_path).sentences("error")
    assert "the name is not UTF-8 text or has a line break; rename the file" in said


def test_the_table_has_a_row_for_each_file(tmp_path: Path) -> None:
    touch(tmp_path, "train/good/0.png", "test/cut/1.png", "masks/cut/1.png", "other/2.png")
    table = inspect_folder(tmp_path).table().set_index("file")
    assert list(table.index) == ["other/2.png", "test/cut/1.png", "train/good/0.png"]
    assert table.loc["test/cut/1.png", "mask"] == "masks/cut/1.png"
    assert table.loc["other/2.png", "level"] == "warning"


def test_the_files_of_mvtec_ad_are_accounted_for_too(
    workplace: Any, draw: Any, tmp_path: Path
) -> None:
    folder = draw.mvtec(tmp_path / "wood")
    draw.mask(folder / "ground_truth/cut/099_mask.png")
    draw.image(folder / "train/good/9.png").rename(folder / "train/good/9.heic")
    paths = {"mvtec_wood": str(folder)}
    said = r"099_mask\.png: a mask without an image\. .*9\.heic: the suffix"
    with pytest.raises(AlmrrError, match=said):
        workplace.fetch("mvtec_wood", workplace.request(paths=paths, strict=True))


def test_a_link_to_nothing_is_named_where_images_are_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (touch(tmp_path, "0.png") / "1.png").symlink_to("absent.png")
    assert list_images(tmp_path) == [tmp_path / "0.png"]
    assert f"{tmp_path}/1.png is left out: a link to nothing" in caplog.text


@pytest.mark.parametrize("mode", [0o000, 0o444])
@pytest.mark.usefixtures("read_only_folder")
def test_a_folder_that_may_not_be_read_is_named(mode: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        touch(Path(name), "train/good/0.png", "test/cut/0.png")
        (Path(name) / "test/cut").chmod(mode)
        with pytest.raises(AlmrrError, match=r"test/cut cannot be read \(Permission denied\)"):
            inspect_folder(Path(name))
        (Path(name) / "test/cut").chmod(0o755)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AlmrrError, match=r"There is no folder at .*absent; check the path"):
        inspect_folder(tmp_path / "absent")


def test_a_category_spelled_apart_is_refused_with_the_reason() -> None:
    with pytest.raises(AlmrrError, match="has its accents apart"):
        dataset_for(unicodedata.normalize("NFD", "folder_Prüfling"))


def test_a_manifest_without_training_images_names_the_category(tmp_path: Path) -> None:
    touch(tmp_path, "train/good/notes.txt", "test/good/0.png")
    items = list(inspect_folder(tmp_path).items)
    with pytest.raises(AlmrrError, match=r"^folder_tiles: there is no normal image"):
        build_manifest(items, root=tmp_path, expected=None, strict=False, name="folder_tiles")


TOPS = [
    *["test", "masks"] * 3,
    "train",
    "Train",
    "normal",
    "validation",
    "test",
    "masks",
    "ground_truth",
    "other",
    "@eaDir",
]
INNER = ["good", "OK", "normal", "crack", "Crack", "é", "e\u0301", "line1", "bad", "masks", "ok 2"]
FILES = ["0.png", "1.JPG", "0_mask.png", "1.jfif", ".2.png", "1.tif", "notes.txt"]
PATHS = st.tuples(
    st.sampled_from(TOPS),
    st.lists(st.sampled_from([*["crack"] * 8, *INNER]), max_size=2),
    st.sampled_from(FILES),
)
LINKS = st.tuples(st.sampled_from(TOPS), st.sampled_from(INNER), st.sampled_from(["", *TOPS]))
NORMAL = {"good", "ok", "normal"}


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PATHS, min_size=1, max_size=16), st.lists(LINKS, max_size=2))
def test_every_image_is_used_rightly_or_named(
    paths: list[tuple[str, list[str], str]], links: list[tuple[str, str, str]]
) -> None:
    """The label follows from the path alone; a link counts as a folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = touch(Path(name), "train/good/first.png")
        for top, inner, file in paths:
            touch(folder, "/".join([top, *inner, file]))
        for top, link, target in links:
            place = folder / top / link
            if place.parent.is_dir() and not os.path.lexists(place):
                place.symlink_to(folder / target)
        account = inspect_folder(folder)
        items = {item.image: item for item in account.items}
        named = {each.path for each in account.unused}
        masks = {item.mask for item in account.items}
        for path in _all_files(folder):
            if path in items:
                assert (items[path].split, items[path].defect_type) == _expected(path, folder)
                assert path not in named
            elif path.suffix.lower() in {*IMAGE_SUFFIXES, ".jfif"}:
                assert path in masks or not named.isdisjoint({path, *path.parents})


def _all_files(folder: Path) -> list[Path]:
    """Every file, those below a link once, without going round in circles."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        inside = Path(place)
        around = [os.path.realpath(inside), *map(os.path.realpath, inside.parents)]
        folders[:] = [each for each in folders if os.path.realpath(inside / each) not in around]
        if len(inside.relative_to(folder).parts) > 6:
            folders.clear()
        found += [inside / each for each in names]
    return found


def _expected(path: Path, folder: Path) -> tuple[str, str]:
    top, *inner = path.relative_to(folder).parts[:-1]
    if top.lower() in {"train", "normal"}:
        return "train", "good"
    if top == "validation":
        return "validation", "good"
    assert top == "test"
    first = unicodedata.normalize("NFC", inner[0])
    return "test", "good" if first.lower() in NORMAL else first
