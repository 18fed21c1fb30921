"""What a folder, a tar or a dataset of others is read as, and what is said of what is not read."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from factor_transfer.config import DataConfig
from factor_transfer.data.dataset import Dataset, open_data
from factor_transfer.data.images import image_extensions
from factor_transfer.data.layouts import split_of, splits_among
from factor_transfer.data.trees import folder_tree, tar_tree
from factor_transfer.export.predict import find_images
from factor_transfer.util.errors import ConfigError, DataError

CLASSES = ("cat", "dog")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8))


def put(*paths: Path, ending: str = "png", count: int = 3) -> None:
    """Images in each of the folders, each of its own pixels."""
    for folder in paths:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(zlib.crc32(f"{folder}{number}".encode())).save(folder / f"{number}.{ending}")


def splits(root: Path, *names: str, classes: tuple[str, ...] = CLASSES, **counts: int) -> Path:
    for name in names:
        put(*(root / name / each for each in classes), count=counts.get(Path(name).name, 3))
    return root


def tarred(root: Path) -> Path:
    path = root.with_name(f"{root.name}.tar")
    with tarfile.open(path, "w") as tar:
        tar.add(root, arcname=root.name)
    return path


def opened(path: object, **settings: Any) -> Dataset:
    return open_data(DataConfig(data=str(path), **settings), lambda: 32)


def refused(path: object, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        opened(path, **settings)
    return caught.value


# -- names of splits


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("training_set", "test_set"),
        ("Training", "Testing"),
        ("Train", "Val"),
        ("TRAIN", "VALID"),
        ("train-images", "validation data"),
        ("trainset", "TestSet"),
        ("train2017", "val2017"),
        ("seg_train", "seg_test"),
        ("trainval", "dev"),
        ("train", "evaluation"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_layout__the_usual_names_are_splits_and_not_classes(
    tmp_path: Path, train: str, validation: str, packed: bool
) -> None:
    root = splits(tmp_path / "photos", train, validation, **{validation: 2})
    data = opened(tarred(root) if packed else root)
    assert data.classes == CLASSES
    assert (len(data.train), len(data.validation), data.held_out) == (6, 4, False)
    assert f"/{train}; validation: " in data.notes[0]
    assert data.notes[0].endswith(f"/{validation}")


@pytest.mark.parametrize("validation", ["valid", "dev", "Validation_Set"])
def test_layout__validation_is_preferred_to_test(tmp_path: Path, validation: str) -> None:
    root = splits(tmp_path, "train", "test", "extra", validation, test=1, **{validation: 2})
    data = opened(root)
    assert len(data.validation) == 4
    assert data.notes[0] == (
        f"training: {root}/train; validation: {root}/{validation}; not used: {root}/test, {root}/extra"
    )


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("train", "Training"), "2 folders of training images: Training, train"),
        (("train", "val", "validation"), "2 folders of validation images: val, validation"),
        (("train", "test", "testing"), "2 folders of validation images: test, testing"),
        (("train_a", "test_a", "train_b", "test_b"), "2 folders of training images: train_a, train_b"),
        (("val", "cats"), "val, cats but no train"),
    ],
)
def test_layout__what_could_be_read_in_two_ways_is_refused(tmp_path: Path, names: tuple[str, ...], found: str) -> None:
    error = refused(splits(tmp_path, *names))
    assert error.found == found
    assert error.hint


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("split", ["test", "Val"])
def test_layout__splits_within_classes_are_refused(tmp_path: Path, packed: bool, split: str) -> None:
    root = tmp_path / "photos"
    put(*(root / name / part for name in CLASSES for part in ("train", split)))
    error = refused(tarred(root) if packed else root)
    assert "cat/train" in str(error.found)
    assert f"dog/{split}" in str(error.found)
    assert "train/CLASS/image.jpg" in str(error.valid)
    put(*(tmp_path / "deep" / "train" / name / part for name in CLASSES for part in ("train", split)))
    assert "cat/train" in str(refused(tmp_path / "deep").found)


def test_layout__a_class_may_be_called_as_a_split_is(tmp_path: Path) -> None:
    data = opened(splits(tmp_path, "train", "val", classes=("bus", "test", "train")))
    assert data.classes == ("bus", "test", "train")
    put(*(tmp_path / "classes" / name for name in ("bus", "train", "tram")))
    error = refused(tmp_path / "classes")  # is train/ a class, or a split without class folders?
    assert "3 images in" in str(error.found)
    assert "where train is a class" in str(error.hint)
    put(*(tmp_path / "other" / name for name in ("train_station", "test_tube")))
    assert opened(tmp_path / "other").classes == ("test_tube", "train_station")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wrapper", ["photos", "data/images", "seg_train"])
def test_layout__folders_around_the_splits_are_looked_through(tmp_path: Path, wrapper: str, packed: bool) -> None:
    root = splits(tmp_path / "root", f"{wrapper}/train", f"{wrapper}/test", test=2)
    (root / "readme.txt").write_text("x")
    data = opened(tarred(root) if packed else root)
    assert (data.classes, len(data.train), len(data.validation)) == (CLASSES, 6, 4)
    assert f"{wrapper}/train" in data.notes[0]


def test_layout__folders_without_images_beside_the_splits_do_not_matter(tmp_path: Path) -> None:
    splits(tmp_path, "images/train", "images/val")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train" / "0.txt").write_text("0")
    assert refused(tmp_path).found  # labels/ has splits as well
    shutil.rmtree(tmp_path / "labels")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").write_text("{}")
    assert opened(tmp_path).classes == CLASSES
    put(tmp_path / "annotations")
    assert "images/train" in str(refused(tmp_path).found)


def test_layout__a_split_that_holds_itself_is_looked_into(tmp_path: Path) -> None:
    data = opened(splits(tmp_path, "seg_train/seg_train", "seg_test/seg_test"))
    assert (data.classes, data.held_out) == (CLASSES, False)


def test_layout__splits_of_unknown_names_are_pointed_at(tmp_path: Path) -> None:
    data = opened(splits(tmp_path, "entrenamiento", "prueba"))
    assert data.classes == ("entrenamiento", "prueba")
    assert "all hold cat, dog" in data.notes[1]
    assert "have to be called train and validation" in data.notes[1]


def test_layout__a_test_folder_without_classes_is_not_measured_on(tmp_path: Path) -> None:
    splits(tmp_path, "train", train=10)
    put(tmp_path / "test")
    data = opened(tmp_path)
    assert data.held_out
    assert f"validation: none; not used: {tmp_path}/test" in data.notes[0]
    assert "cannot be measured on" in data.notes[1]
    (tmp_path / "test").rename(tmp_path / "val")
    assert "no class folders" in str(refused(tmp_path).found)


def test_layout__a_tar_beside_its_own_folder_is_not_read(tmp_path: Path) -> None:
    splits(tmp_path, "train", "val")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(tmp_path / "train", arcname="train")
    data = opened(tmp_path)
    assert data.notes[1] == f"beside them in {tmp_path}, not read: 1 x .tar (train.tar)"
    fingerprint = data.fingerprint  # of the files, which are hashed now
    shutil.rmtree(tmp_path / "train")
    assert opened(tmp_path).fingerprint == fingerprint


def test_layout__labels_in_one_split_alone_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "train")
    splits(tmp_path, "val")
    assert refused(tmp_path, label_weight=0.0).found == "class folders, but none in training"


def test_split_of__knows_names_and_leaves_others_alone() -> None:
    assert {split_of(name) for name in ("cat", "training_wheels", "", "data", "2017", "protest", "valley")} == {None}
    assert splits_among(["cat_train", "dog_test"]) == {}


# -- the walk


def test_walk__leaves_out_what_systems_leave_and_counts_it(tmp_path: Path) -> None:
    root = splits(tmp_path, "train", "val")
    put(root / "train" / "cat" / "@eaDir", root / "train" / "__MACOSX" / "cat", root / "train" / ".thumbs")
    picture(1).save(root / "train" / "cat" / "._0.png")
    for name in ("train/dog/Thumbs.db", "train/dog/notes.txt", "train/dog/more.TXT", "train/dog/figure.pdf"):
        (root / name).write_bytes(b"x")
    (root / "train" / "dog" / "README").write_text("x")
    expected = (
        "2 x .txt (dog/more.TXT), 2 x hidden (.thumbs), 1 x .pdf (dog/figure.pdf), 1 x @eaDir (cat/@eaDir), "
        "1 x Thumbs.db (dog/Thumbs.db), 1 x __MACOSX (__MACOSX), 1 x file without an ending (dog/README)"
    )
    data = opened(root)
    assert (data.classes, len(data.train)) == (CLASSES, 6)
    said = next(note for note in data.notes if "not read" in note)
    assert sorted(said.split("not read: ")[1].split(", ")) == sorted(expected.split(", "))
    packed = opened(tarred(root))
    assert packed.fingerprint == data.fingerprint
    assert sorted(next(n for n in packed.notes if "not read" in n).split("not read: ")[1].split(", ")) == sorted(
        expected.split(", ")
    )


@pytest.mark.parametrize("target", ["..", "../..", "../../.."])
def test_walk__a_loop_of_links_is_noticed(tmp_path: Path, target: str) -> None:
    root = tmp_path / "photos"
    splits(root, "")
    (root / "cat" / "loop").symlink_to(target, target_is_directory=True)
    data = opened(root)
    assert len(data.train) + len(data.validation) == 6
    assert "1 x folder linked again (cat/loop)" in data.notes[1]


def test_walk__linked_folders_are_read_once(tmp_path: Path) -> None:
    put(tmp_path / "store" / "c", tmp_path / "store" / "d", count=4)
    root = tmp_path / "train"
    root.mkdir()
    (root / "cat").symlink_to(tmp_path / "store" / "c")
    (root / "dog").symlink_to(tmp_path / "store" / "d")
    assert sorted(folder_tree(root).folders) == ["cat", "dog"]
    assert len(folder_tree(root).files) == 8
    (root / "again").symlink_to("cat")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    found = folder_tree(root)
    assert len(found.files) == 8
    assert found.left_out["gone"] == "broken link"
    assert list(found.left_out.values()).count("folder linked again") == 1


def test_walk__a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    splits(tmp_path, "")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    assert "1 x no regular file (cat/pipe.png)" in opened(tmp_path).notes[1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_walk__a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    splits(tmp_path, "")
    (tmp_path / "cat").chmod(0)
    assert "Permission denied" in str(refused(tmp_path).found)


def test_walk__links_in_a_tar_are_followed_or_counted(tmp_path: Path) -> None:
    put(tmp_path / "cat", tmp_path / "dog")
    (tmp_path / "dog" / "again.png").symlink_to("../cat/0.png")
    (tmp_path / "dog" / "twice.png").symlink_to("again.png")
    (tmp_path / "dog" / "out.png").symlink_to("/etc/hostname")
    (tmp_path / "dog" / "loop.png").symlink_to("loop.png")
    (tmp_path / "dog" / "cats").symlink_to("../cat")
    os.link(tmp_path / "cat" / "1.png", tmp_path / "dog" / "hard.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("dog", "cat"):  # links come before what they name
            tar.add(tmp_path / name, arcname=name)
    found = tar_tree(tmp_path / "x.tar", "x").images()
    assert len(found.files) == 9
    for link, name in (("again", "0"), ("twice", "0"), ("hard", "1")):
        assert found.files[f"dog/{link}.png"].read() == (tmp_path / "cat" / f"{name}.png").read_bytes()
    assert {name for name, kind in found.left_out.items() if kind == "link to a folder or out of the tar"} == {
        "dog/out.png", "dog/loop.png", "dog/cats"
    }  # fmt: skip


READ_BY_PILLOW = [".avif", ".jfif", ".jp2", ".webp", ".tga", ".gif", ".pbm", ".JPE"]


def test_walk__one_list_of_images_for_training_and_for_predict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not {".pdf", ".eps", ".ps", ".wmf", ".psd", ".h5", ".mpg", ".txt", ".json"} & image_extensions()
    readable = [ending for ending in READ_BY_PILLOW if ending.lower() in image_extensions()]
    assert len(readable) >= 6
    for folder in ("cat", "dog"):
        (tmp_path / folder).mkdir()
        for ending in readable:
            what = picture(len(folder + ending))
            what.convert("1" if ending == ".pbm" else "RGB").save(tmp_path / folder / f"one{ending}")
        (tmp_path / folder / "figure.eps").write_bytes(b"%!PS-Adobe")
    data = opened(tmp_path)
    assert len(data.train) + len(data.validation) == 2 * len(readable)
    found = {name for name, _ in find_images([str(tmp_path)])}
    assert found == {f"{tmp_path}/{folder}/one{ending}" for folder in ("cat", "dog") for ending in readable}
    assert "not read: 2 x .eps (cat/figure.eps)" in capsys.readouterr().err


def test_predict__walks_as_training_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a" / "@eaDir", tmp_path / "a", count=2)
    (tmp_path / "a" / "loop").symlink_to("..")
    assert [name for name, _ in find_images([str(tmp_path)])] == [f"{tmp_path}/a/{each}.png" for each in (0, 1)]
    assert "1 x @eaDir (a/@eaDir)" in (said := capsys.readouterr().err)
    assert "1 x folder linked again (a/loop)" in said
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x.txt").write_text("x")
    with pytest.raises(DataError, match="no images in it, but 1 x .txt"):
        list(find_images([str(tmp_path / "none")]))


def test_layout__a_document_called_jpg_is_no_image(tmp_path: Path) -> None:
    """Pillow would hand it to Ghostscript."""
    splits(tmp_path, "")
    (tmp_path / "cat" / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    assert "1 unreadable image" in str(refused(tmp_path).found)
    assert "cannot identify" in str(refused(tmp_path).found)


def test_layout__says_which_images_lie_in_no_class_folder(tmp_path: Path) -> None:
    splits(tmp_path, "train", "validation")
    picture(0).save(tmp_path / "train" / "montage.png")
    data = opened(tmp_path)
    assert len(data.train) == 6
    assert f"1 images in {tmp_path}/train lie in no class folder and are left out: montage.png" in data.notes


def test_layout__packed_splits_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.zip").write_bytes(b"PK")
    (tmp_path / "val.tar.gz").write_bytes(b"x")
    assert "1 x .zip (train.zip)" in str(refused(tmp_path).found)


# -- Hugging Face datasets


def hub(
    tmp_path: Path, columns: dict[str, Any], features: dict[str, Any], split_names: tuple[str, ...] = ("train",)
) -> str:
    """A dataset of parquet files, six images a split."""
    import datasets

    content = io.BytesIO()
    picture(0).save(content, "PNG")
    folder = tmp_path / "set"
    for split in split_names:
        rows = {"image": [{"bytes": content.getvalue(), "path": None}] * 6} | columns
        kinds = {"image": datasets.Image()} | features
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
        (folder / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return f"hfds/{folder}"


@pytest.fixture
def kinds() -> dict[str, Any]:
    import datasets

    one = datasets.ClassLabel(names=["cat", "dog"])
    return {"one": one, "several": datasets.List(one), "float": datasets.Value("float32"),
            "int": datasets.Value("int64"), "word": datasets.Value("string"), "image": datasets.Image()}  # fmt: skip


VALUES: dict[str, Any] = {"one": [0, 1] * 3, "several": [[0], [0, 1]] * 3, "float": [0.5, 1.5] * 3, "int": [0, 7] * 3,
                          "word": ["x", "y"] * 3, "none": ["x", None] * 3}  # fmt: skip


def of_columns(tmp_path: Path, kinds: dict[str, Any], **columns: str) -> str:
    values = {name: VALUES[kind] for name, kind in columns.items()}
    return hub(tmp_path, values, {name: kinds["word" if kind == "none" else kind] for name, kind in columns.items()})


@pytest.mark.parametrize(
    ("columns", "wanted", "classes"),
    [
        ({"label": "one"}, None, ("cat", "dog")),
        ({"breed": "one"}, None, ("cat", "dog")),
        ({"fine": "one", "coarse": "one"}, "coarse", ("cat", "dog")),
        ({"label": "int", "id": "int"}, None, ("0", "7")),
        ({"breed": "word"}, "breed", ("x", "y")),
        ({"tags": "several", "label": "one"}, None, ("cat", "dog")),
    ],
)
def test_hub__the_only_column_of_classes_is_read_or_the_one_that_is_named(
    tmp_path: Path, kinds: dict[str, Any], columns: dict[str, str], wanted: str | None, classes: tuple[str, ...]
) -> None:
    data = opened(of_columns(tmp_path, kinds, **columns), data_dir=str(tmp_path / "cache"), label_column=wanted)
    assert data.classes == classes
    assert f"classes column {wanted or next(n for n in columns if n in ('label', 'breed'))}" in data.notes[0]


@pytest.mark.parametrize(
    ("columns", "wanted", "found"),
    [
        ({"fine": "one", "coarse": "one"}, None, "2 columns that could be the labels: fine, coarse"),
        ({"label": "one", "coarse": "one"}, None, "2 columns that could be the labels: label, coarse"),
        ({"labels": "several"}, None, "several labels for each image, which is not built yet"),
        ({"label": "float"}, None, "float32 numbers, for regression, which is not built yet"),
        ({"label": "one", "score": "float"}, "score", "float32 numbers"),
        ({"label": "one", "tags": "several"}, "tags", "several labels"),
        ({"label": "one"}, "lable", "columns image (Image), label (ClassLabel)"),
        ({"breed": "word"}, None, "no column of labels"),
        ({"label": "none"}, None, "images without a class"),
    ],
)
def test_hub__columns_that_are_no_classes_are_refused(
    tmp_path: Path, kinds: dict[str, Any], columns: dict[str, str], wanted: str | None, found: str
) -> None:
    error = refused(of_columns(tmp_path, kinds, **columns), data_dir=str(tmp_path / "cache"), label_column=wanted)
    assert found in str(error.found)
    assert error.hint or "without a class" in found


def test_hub__the_column_of_images_is_asked_for_where_there_are_two(tmp_path: Path, kinds: dict[str, Any]) -> None:
    content = io.BytesIO()
    picture(9).save(content, "PNG")
    mask = [{"bytes": content.getvalue(), "path": None}] * 6
    name = hub(tmp_path, {"mask": mask, "label": VALUES["one"]}, {"mask": kinds["image"], "label": kinds["one"]})
    given = {"data_dir": str(tmp_path / "cache")}
    assert "2 columns of images: image, mask" in str(refused(name, **given).found)
    data = opened(name, **given, image_column="mask", validation_share=0.4)
    (batch,) = data.validation.batches([np.array([0])], None)
    assert np.array_equal(batch.image[0].permute(1, 2, 0).numpy(), np.array(picture(9)))
    assert refused(name, **given, image_column="label").valid == "image, mask"


@pytest.mark.parametrize(
    ("names", "validation"),
    [(("train", "test"), "test"), (("train", "dev", "test"), "dev"), (("training", "valid"), "valid")],
)
def test_hub__splits_are_known_by_the_same_names(
    tmp_path: Path, kinds: dict[str, Any], names: tuple[str, ...], validation: str
) -> None:
    import yaml

    name = hub(tmp_path, {"label": VALUES["one"]}, {"label": kinds["one"]}, names)
    files = [{"split": split, "path": f"data/{split}-*"} for split in names]
    card = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]})
    (tmp_path / "set" / "README.md").write_text(f"---\n{card}---\n")
    data = opened(name, data_dir=str(tmp_path / "cache"))
    assert (len(data.train), len(data.validation), data.held_out) == (6, 6, False)
    assert f"training: {names[0]}; validation: {validation}" in data.notes[0]
    assert ("not used: test" in data.notes[0]) == (len(names) == 3)


@pytest.mark.parametrize("names", [("Training", "Testing"), ("Train", "Val"), ("photos/Train", "photos/Test")])
def test_hub__a_local_folder_whose_splits_the_library_does_not_know_is_refused(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    """It gives all of them as one split, train."""
    error = refused(f"hfds/{splits(tmp_path / 'set', *names)}", data_dir=str(tmp_path / "cache"))
    assert all(Path(name).name in str(error.found) for name in names)
    assert "which the library reads as train" in str(error.found)
    put(*(tmp_path / "turned" / name / split for name in CLASSES for split in ("train", "test")))
    error = refused(f"hfds/{tmp_path / 'turned'}", data_dir=str(tmp_path / "cache"))
    assert "cat/train" in str(error.found)


def test_hub__rows_without_an_image_are_named(tmp_path: Path, kinds: dict[str, Any]) -> None:
    content = io.BytesIO()
    picture(0).save(content, "PNG")
    images = [{"bytes": content.getvalue(), "path": None}] * 5 + [None]
    name = hub(tmp_path, {"image": images, "label": VALUES["one"]}, {"label": kinds["one"]})
    assert refused(name, data_dir=str(tmp_path / "cache")).found == "1 rows without an image in train: 5"


def test_hub__without_labels_none_are_read(tmp_path: Path, kinds: dict[str, Any]) -> None:
    data = opened(of_columns(tmp_path, kinds, tags="several"), data_dir=str(tmp_path / "cache"), label_weight=0.0)
    assert not data.labelled
    assert "no labels are read" in data.notes[0]


@pytest.mark.parametrize("setting", ["label_column", "image_column"])
def test_hub__columns_of_other_data_are_refused(setting: str) -> None:
    assert "which has no columns" in str(refused("digits", **{setting: "label"}).found)


# -- WebDataset


def shard(path: Path, samples: list[dict[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                member = tarfile.TarInfo(f"{number:03}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def sample(seed: int, label: int) -> dict[str, bytes]:
    content = io.BytesIO()
    picture(seed).save(content, "PNG")
    return {"png": content.getvalue(), "cls": str(label).encode()}


@pytest.mark.parametrize(
    ("train", "test"),
    [("Training-0000", "Testing-0000"), ("set-train0000", "set-valid0000"), ("train/a/0000", "val/a/0000")],
)
def test_shards__splits_are_known_by_the_same_names(tmp_path: Path, train: str, test: str) -> None:
    shard(tmp_path / f"{train}.tar", [sample(n, n % 2) for n in range(4)])
    shard(tmp_path / f"{test}.tar", [sample(n, n % 2) for n in range(2)])
    data = opened("wds/x", data_dir=str(tmp_path))
    assert (len(data.train), len(data.validation), data.held_out) == (4, 2, False)


def test_shards__one_shard_serves_one_split(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", [sample(n, n % 2) for n in range(4)])
    shard(tmp_path / "training-1.tar", [sample(n, n % 2) for n in range(2)])
    assert refused("wds/x", data_dir=str(tmp_path)).found == "2 names of training images: train, training"
    (tmp_path / "training-1.tar").unlink()
    shard(tmp_path / "train" / "test-0.tar", [sample(n, n % 2) for n in range(2)])
    assert refused("wds/x", data_dir=str(tmp_path)).found == "train/test-0.tar: train, test"


def test_shards__what_is_not_read_is_said(tmp_path: Path) -> None:
    mask = {"jpg": sample(1, 0)["png"]}
    shard(tmp_path / "train-0.tar", [sample(n, n % 2) | mask for n in range(4)] + [{"json": b"{}"}])
    shard(tmp_path / "extra-0.tar", [sample(0, 0)])
    (tmp_path / "._train-0.tar").write_bytes(b"x")
    data = opened("wds/x", data_dir=str(tmp_path), validation_share=0.3)
    assert data.notes[0] == "shards: training: train; validation: none; not used: extra-0.tar"
    assert data.notes[1] == "1 samples have no image and are left out: train-0.tar/004"
    assert data.notes[2] == "4 samples have several images (.jpg, .png): the first kind is read"
    (batch,) = data.train.batches([np.array([0])], None)
    assert np.array_equal(batch.image[0].permute(1, 2, 0).numpy(), np.array(picture(1)))


@pytest.mark.parametrize("label", [0.7, True, [1, 0], "1", -1])
def test_shards__labels_that_are_no_class_are_refused(tmp_path: Path, label: object) -> None:
    samples = [sample(n, 0) | {"json": json.dumps({"y": label}).encode()} for n in range(2)]
    shard(tmp_path / "train-0.tar", samples)
    splits = {"train": {"filenames": ["train-0.tar"], "alt_label": "y"}}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    assert "000: no class" in str(refused("wds/x", data_dir=str(tmp_path)).found)


def test_shards__each_split_has_its_own_field(tmp_path: Path) -> None:
    for split in ("train", "val"):
        fields = {"a": 1, "b": 0} if split == "val" else {"a": 0, "b": 1}
        samples = [
            sample(n, 0) | {"json": json.dumps({k: (v + n) % 2 for k, v in fields.items()}).encode()} for n in range(4)
        ]
        shard(tmp_path / f"{split}.tar", samples)
    info = {
        "train": {"filenames": ["train.tar"], "alt_label": "a"},
        "val": {"filenames": ["val.tar"], "alt_label": "b"},
    }
    (tmp_path / "_info.json").write_text(json.dumps({"splits": info}))
    data = opened("wds/x", data_dir=str(tmp_path))
    assert data.train.labels.tolist() == data.validation.labels.tolist() == [0, 1, 0, 1]


def test_shards__need_no_classes_where_labels_weigh_nothing(tmp_path: Path) -> None:
    bare = [{"png": sample(n, 0)["png"]} for n in range(4)]
    shard(tmp_path / "train-0.tar", [*bare, sample(4, 1)])
    shard(tmp_path / "val-0.tar", [sample(n, n % 2) for n in range(2)])
    assert "000: no class" in str(refused("wds/x", data_dir=str(tmp_path)).found)
    data = opened("wds/x", data_dir=str(tmp_path), label_weight=0.0)
    assert (data.labelled, data.classes, len(data.train), len(data.validation)) == (False, (), 5, 2)
    assert "4 samples have no class: no labels are read" in data.notes
    shard(tmp_path / "train-0.tar", [sample(n, n % 2) for n in range(4)])
    whole = opened("wds/x", data_dir=str(tmp_path), label_weight=0.0)
    assert (whole.labelled, whole.classes) == (True, ("0", "1"))


# -- images that a finished run is measured on


def measured(path: Path, known: tuple[str, ...], **settings: Any) -> Dataset:
    return open_data(DataConfig(data=str(path), **settings), lambda: 32, known=known)


def test_known__a_few_of_the_classes_are_enough(tmp_path: Path) -> None:
    put(tmp_path / "dog", count=1)
    data = measured(tmp_path, ("ant", "dog", "zebra"))
    assert data.classes == ("ant", "dog", "zebra")
    assert data.validation.labels.tolist() == [1]
    assert data.notes[-1] == "2 of 3 classes have no images here, and are not measured: ant, zebra"
    with pytest.raises(ConfigError, match="(?s)1 classes that the run does not know: dog.*those of the run: ant, cow"):
        measured(tmp_path, ("ant", "cow"))


def test_known__all_images_are_measured_or_the_validation_set(tmp_path: Path) -> None:
    splits(tmp_path, "")
    assert len(measured(tmp_path, CLASSES).validation) == 6
    root = splits(tmp_path / "divided", "train", "val", val=2)
    put(root / "train" / "stranger")
    assert len(measured(root, CLASSES).validation) == 4
