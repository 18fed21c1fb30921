import functools
import gc
import hashlib
import io
import json
import os
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from factor_transfer.config import DataConfig
from factor_transfer.data.dataset import open_data
from factor_transfer.data.frames import Frame
from factor_transfer.data.images import decoded
from factor_transfer.data.splits import FileSplit, PixelSplit
from factor_transfer.data.views import crop_and_flip, random_resized_crop
from factor_transfer.util.errors import ConfigError, DataError

SHARED = os.environ.get("FACTOR_TRANSFER_SHARED")
needs_shared = pytest.mark.skipif(
    SHARED is None, reason="FACTOR_TRANSFER_SHARED does not say where the real images lie"
)


# -- helpers


def image(seed, size=(12, 12)):
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(picture, form="PNG", **how):
    file = io.BytesIO()
    picture.save(file, form, **how)
    return file.getvalue()


def write(root, split, classes, n=4, size=(12, 12), ext="png"):
    """`n` images in each class folder of root/split, each of its own pixels."""
    for name in classes:
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for place in range(n):
            picture = image(abs(hash_of(split, name, place)), size)
            folder.joinpath(f"{place:04d}.{ext}").write_bytes(encoded(picture, "JPEG" if ext == "jpg" else "PNG"))
    return root


def hash_of(*parts):
    return int.from_bytes(repr(parts).encode()[-7:], "little")


def tarred(root, splits=("train", "validation"), to=None):
    """The folders of `root` as tars in another folder."""
    to = to or root.parent / f"{root.name}-tar"
    to.mkdir(exist_ok=True)
    for split in splits:
        with tarfile.open(to / f"{split}.tar", "w") as tar:
            tar.add(root / split, arcname=".")
    return to


def opened(path, default_size=lambda: pytest.fail("the images' own size was known"), **settings):
    return open_data(DataConfig(data=str(path), **settings), default_size)


def everything(split, size=5, view=None):
    """Images, labels, indices of a whole split."""
    chunks = np.array_split(np.arange(len(split)), max(1, len(split) // size))
    parts = list(split.batches(chunks, view))
    return [torch.cat(part) for part in zip(*parts, strict=True) if part[0] is not None]  # masks, where there are any


def error_of(path, **settings):
    with pytest.raises(DataError) as caught:
        opened(path, **settings)
    return caught.value


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


# -- a share of the training images, and a validation set made of them


def shown_of(split):
    return set(map(bytes, everything(split)[0].flatten(1).numpy()))


@functools.cache
def all_digits():
    whole = opened("digits")
    return whole, shown_of(whole.train), shown_of(whole.validation)


@hypothesis_settings(max_examples=25, deadline=None)
@given(data_seed=st.integers(0, 99), count=st.integers(10, 1100), share=st.sampled_from([0.05, 0.1, 0.3]))
def test_data__a_holdout_is_disjoint_from_what_is_trained_on(data_seed, count, share):
    whole, seen, validation = all_digits()
    data = opened(
        "digits", data_seed=data_seed, train_images=min(count, 850), validate_on="train-holdout", validation_share=share
    )
    trained, measured = shown_of(data.train), shown_of(data.validation)
    twins = 1258 - len(seen)  # images that are there twice
    assert len(trained & measured) <= twins
    assert trained | measured <= seen
    assert len(measured & validation) <= twins
    assert len(data.train) == min(count, 850)
    taken = np.bincount(data.train.labels, minlength=10)
    assert taken.max() - taken.min() <= 1
    assert np.abs(np.bincount(data.validation.labels) - share * np.bincount(whole.train.labels)).max() <= 0.5
    rows = [set(split._rows.tolist()) for split in (data.train, data.validation)]
    assert not rows[0] & rows[1]


def test_data__a_holdout_leaves_the_validation_images_unread(tmp_path):
    root = write(tmp_path, "train", "ab", n=10)
    (root / "validation" / "a").mkdir(parents=True)
    (root / "validation" / "a" / "0.png").write_bytes(b"no image")
    data = opened(root, validate_on="train-holdout")
    assert (len(data.train), len(data.validation), data.held_out) == (18, 2, True)
    assert "train-holdout: 2 of 20 training images are held out" in data.notes[-1]


def test_data__a_share_is_fixed_by_the_data_seed_and_fingerprinted():
    share = opened("digits", train_images=100)
    again, other, whole = (
        opened("digits", train_images=100),
        opened("digits", train_images=100, data_seed=1),
        opened("digits"),
    )
    assert shown_of(share.train) == shown_of(again.train) != shown_of(other.train)
    assert share.fingerprint == again.fingerprint
    prints = {share.fingerprint, other.fingerprint, whole.fingerprint, opened("digits", train_images=99).fingerprint}
    assert len(prints) == 4
    assert shown_of(share.validation) == shown_of(whole.validation)
    holdout = opened("digits", validate_on="train-holdout")
    assert holdout.fingerprint not in prints
    assert "100 of 1,258 training images, as many of each class" in share.notes[-1]


@pytest.mark.parametrize("count", [9, 1259])
def test_error__a_share_that_cannot_be_taken(count):
    found = error_of("digits", train_images=count)
    assert found.given == f"--train-images {count}"
    assert found.found == "1,258 training images in 10 classes"
    assert found.valid.startswith("10 to 1258")


# -- digits


def test_digits__has_a_fixed_disjoint_stratified_split():
    from sklearn.datasets import load_digits

    data, other = opened("digits"), opened("digits", data_seed=7)
    assert data.img_size == 8
    assert data.classes == tuple("0123456789")
    assert len(data.train) + len(data.validation) == 1797
    assert 500 <= len(data.validation) <= 560
    everywhere = np.bincount(load_digits().target)
    for split, share in ((data.train, 0.7), (data.validation, 0.3)):
        assert np.abs(np.bincount(split.labels) - share * everywhere).max() <= 0.5
    for name in ("train", "validation"):
        first, second = everything(getattr(data, name)), everything(getattr(other, name))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # Disjoint and complete: together they are all images of the library, each once.
    ours = np.concatenate([everything(split)[0][:, 0].flatten(1).numpy() for split in (data.train, data.validation)])
    theirs = (load_digits().images.reshape(-1, 64) * 255 / 16).round().astype(np.uint8)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs))


def test_digits__are_shifted_by_one_and_never_flipped():
    split = opened("digits").train
    chunk = np.arange(200)
    (plain,), (shown,) = (list(split.batches([chunk], view)) for view in (None, 4))
    assert torch.equal(shown.image, crop_and_flip(plain.image, chunk, 4, 0, padding=1, hflip=0.0))
    assert not torch.equal(shown.image, plain.image)


def test_digits__are_resized_on_request():
    data = opened("digits", img_size=16)
    (batch,) = data.validation.batches([np.array([3])], None)
    (own,) = opened("digits").validation.batches([np.array([3])], None)
    small = Image.fromarray(own.image[0].permute(1, 2, 0).numpy())
    expected = np.array(small.resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(batch.image[0].permute(1, 2, 0).numpy(), expected)


# -- splits of folders and tars


def test_folder__validation_is_never_all_images(tmp_path):
    # timm's own search returns every image here: it knows no test/.
    write(tmp_path, "train", ["a", "b"], n=10)
    write(tmp_path, "test", ["a", "b"], n=3)
    data = opened(tmp_path)
    assert (len(data.train), len(data.validation)) == (20, 6)
    assert data.notes == (f"training: {tmp_path}/train; validation: {tmp_path}/test",)
    shown = {bytes(picture.numpy()) for picture in everything(data.validation)[0]}
    assert shown == {bytes(pixels(path).numpy()) for path in (tmp_path / "test").rglob("*.png")}


def test_folder__without_validation_holds_out_a_fixed_share_of_each_class(tmp_path):
    write(tmp_path, "train", ["a", "b"], n=20)
    data = opened(tmp_path, validation_share=0.2)
    assert (len(data.train), len(data.validation)) == (32, 8)
    assert np.bincount(data.validation.labels).tolist() == [4, 4]
    assert "held out" in data.notes[1]
    parts = [{bytes(p.numpy()) for p in everything(split)[0]} for split in (data.train, data.validation)]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 40
    again, other = opened(tmp_path, validation_share=0.2), opened(tmp_path, validation_share=0.2, data_seed=1)
    assert torch.equal(everything(again.validation)[0], everything(data.validation)[0])
    assert not torch.equal(everything(other.validation)[0], everything(data.validation)[0])
    assert len({data.fingerprint, again.fingerprint, other.fingerprint}) == 2


def test_folder__of_class_folders_alone_is_a_training_set(tmp_path):
    write(tmp_path, "", ["cat", "dog"], n=10)
    data = opened(tmp_path)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.validation)) == (18, 2)


def test_folder__class_numbers_come_from_train_for_both_splits(tmp_path):
    write(tmp_path, "train", ["a", "b", "c", "class10", "class2"])
    write(tmp_path, "validation", ["c", "b"])
    data = opened(tmp_path)
    assert data.classes == ("a", "b", "c", "class2", "class10")  # timm's order
    assert set(data.validation.labels.tolist()) == {1, 2}
    images, labels, _ = everything(data.validation)
    by_pixels = {
        bytes(pixels(path).numpy()): data.classes.index(path.parent.name)
        for path in (tmp_path / "validation").rglob("*.png")
    }
    assert [by_pixels[bytes(picture.numpy())] for picture in images] == labels.tolist()


def test_folder__agrees_with_timms_reader(tmp_path):
    from timm.data.readers import create_reader

    write(tmp_path, "train", ["b2", "B10", "a"], n=12)
    write(tmp_path, "val", ["a", "b2"])
    reader = create_reader("", root=str(tmp_path / "train"))
    data = opened(tmp_path)
    assert list(data.classes) == sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    images, labels, indices = everything(data.train)
    assert indices.tolist() == list(range(36))
    assert labels.tolist() == [target for _, target in reader.samples]
    for shown, (path, _) in zip(images, reader.samples, strict=True):
        assert torch.equal(shown, pixels(path))


def test_tar__is_the_folder_it_was_made_of(tmp_path):
    root = write(write(tmp_path / "x", "train", ["a", "b"]), "validation", ["a", "b"])
    (root / "train" / "a" / ".hidden.png").write_bytes(b"no image")
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w") as tar:
        tar.add(root, arcname="")
    found = [opened(root), opened(tarred(root)), opened(whole)]
    assert len({data.fingerprint for data in found}) == 1
    for data in found[1:]:
        for name in ("train", "validation"):
            ours, theirs = everything(getattr(data, name)), everything(getattr(found[0], name))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@needs_shared
def test_tar__real_images_are_the_same_with_and_without_workers(tmp_path):
    # Handles opened before workers fork gave timm 41 wrong images of 2,000.
    path = tmp_path
    for split in ("train", "validation"):  # the training images, five times as many, are of no account here
        (path / f"{split}.tar").symlink_to(Path(SHARED) / "cifar10-jpeg" / "validation.tar")
    wanted = np.random.default_rng(0).permutation(10_000)[:600]
    chunks = np.array_split(wanted, 12)
    data = [opened(path, workers=workers, pixel_cache_gb=0) for workers in (0, 2)]
    shown = [list(each.validation.batches(chunks, None)) for each in data]
    assert isinstance(data[0].validation, FileSplit)
    with tarfile.open(path / "validation.tar") as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".jpg"))
        for chunk, alone, together in zip(chunks, *shown, strict=True):
            assert torch.equal(alone.image, together.image)
            for place, index in enumerate(chunk):
                expected = np.array(Image.open(tar.extractfile(names[index])))
                assert np.array_equal(together.image[place].permute(1, 2, 0).numpy(), expected)
                assert data[0].classes[alone.label[place]] == names[index].split("/")[1]


# -- the same view however it is asked for


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    root = tmp_path_factory.mktemp("large")
    write(root, "train", ["a", "b"], n=6, size=(130, 110), ext="jpg")
    return write(root, "val", ["a", "b"], n=2, size=(130, 110), ext="jpg")


@pytest.mark.parametrize("kind", ["pixels", "files", "large"])
def test_batches__have_the_same_bits_for_any_size_order_and_workers(kind, tmp_path, large):
    root, settings = large, {"default_size": lambda: 112, "color_jitter": 0.3}
    if kind != "large":
        root, settings = write(write(tmp_path, "train", ["a", "b"], n=6), "val", ["a"]), {}
    if kind == "files":
        settings = {"pixel_cache_gb": 0}
    data = [opened(root, workers=workers, **settings) for workers in (0, 2)]
    assert isinstance(data[0].train, PixelSplit if kind == "pixels" else FileSplit)
    whole = everything(data[0].train, size=12, view=3)
    order = random.Random(0).sample(range(12), 12)
    for split in (data[0].train, data[1].train):
        for size in (1, 5):
            chunks = [np.array(order[start : start + size]) for start in range(0, 12, size)]
            for chunk, batch in zip(chunks, split.batches(chunks, 3), strict=True):
                assert batch.index.tolist() == chunk.tolist()
                assert torch.equal(batch.image, whole[0][chunk])
                assert torch.equal(batch.label, whole[1][chunk])
                assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(everything(data[0].train, view=4)[0], whole[0])


def test_batches__small_images_are_the_same_from_memory_and_from_files(tmp_path):
    root = write(write(tmp_path, "train", ["a", "b"], n=6, size=(14, 12)), "val", ["a"])
    stored = opened(root)
    assert stored.img_size == 14
    read = opened(root, workers=0, pixel_cache_gb=0)
    for view in (None, 2):
        assert torch.equal(everything(stored.train, view=view)[0], everything(read.train, view=view)[0])


def test_batches__large_images_are_the_views_of_views(large):
    data = opened(large, default_size=lambda: 112, workers=0, color_jitter=0.2, scale=(0.5, 0.9), data_seed=9)
    first = Image.open(large / "train" / "a" / "0000.jpg").convert("RGB")
    (batch,) = data.train.batches([np.array([0])], 5)
    assert torch.equal(
        batch.image[0], random_resized_crop(first, Frame.of(112), (0.5, 0.9), 0.5, 0.2, seed=9, index=0, view=5)
    )
    assert data.img_size == 112


def test_batches__leave_torchs_generator_alone(large):
    split = opened(large, default_size=lambda: 112, workers=2).train
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    everything(split, view=0)
    assert torch.equal(torch.rand(4), expected)


def test_batches__another_process_shows_the_same_bits(python):
    program = (
        "import hashlib, numpy as np\n"
        "from factor_transfer.config import DataConfig\n"
        "from factor_transfer.data.dataset import open_data\n"
        "split = open_data(DataConfig(data='digits', data_seed=3), lambda: 0).train\n"
        "(batch,) = split.batches([np.arange(64)], 9)\n"
        "print(hashlib.sha256(batch.image.contiguous().numpy().tobytes()).hexdigest())\n"
    )
    other = python(program).stdout.strip()
    (batch,) = opened("digits", data_seed=3).train.batches([np.arange(64)], 9)
    assert hashlib.sha256(batch.image.contiguous().numpy().tobytes()).hexdigest() == other


def test_batches__empty_chunks_and_no_chunks(tmp_path):
    split = opened("digits").train
    assert list(split.batches([], 0)) == []
    (batch,) = split.batches([np.array([], dtype=np.int64)], 0)
    assert batch.image.shape == (0, 3, 8, 8)


# -- size and fingerprint


def test_img_size__is_the_images_own_up_to_96_else_the_default(tmp_path, large):
    write(tmp_path, "train", ["a", "b"], size=(96, 60))
    assert opened(tmp_path).img_size == 96
    assert opened(tmp_path, img_size=20).img_size == 20
    asked = []
    opened(large, default_size=lambda: asked.append(1) or 100, workers=0)
    assert asked == [1]


def test_fingerprint__changes_with_whatever_changes_a_batch(tmp_path, large):
    root = write(write(tmp_path, "train", ["a", "b"]), "val", ["a", "b"])
    first = opened(root).fingerprint
    assert opened(root, workers=0, validation_share=0.3).fingerprint == first  # neither changes a batch
    prints = {first}
    for change in ({"img_size": 10}, {"hflip": 0.0}, {"crop_padding": 0}, {"data_seed": 1}):
        prints.add(opened(root, **change).fingerprint)
    (tmp_path / "map.txt").write_text("b\na\n")
    prints.add(opened(root, class_map=str(tmp_path / "map.txt")).fingerprint)
    (root / "val" / "a" / "0000.png").write_bytes(encoded(image(99)))
    prints.add(opened(root).fingerprint)
    assert len(prints) == 7
    big = opened(large, lambda: 112).fingerprint
    moved = opened(tarred(large, ("train", "val"), tmp_path / "moved"), lambda: 112).fingerprint
    assert big == moved
    assert big != opened(large, lambda: 112, color_jitter=0.1).fingerprint
    (tmp_path / "moved" / "val.tar").unlink()
    assert big != opened(tmp_path / "moved", lambda: 112).fingerprint


# -- class maps


def test_class_map__numbers_both_splits(tmp_path):
    root = write(write(tmp_path, "train", ["a", "b"]), "val", ["a"])
    (tmp_path / "map.txt").write_text("b\nnone\na\n\n")
    data = opened(root, class_map=str(tmp_path / "map.txt"))
    assert data.classes == ("b", "none", "a")
    assert data.train.labels.tolist() == [2] * 4 + [0] * 4
    assert set(data.validation.labels.tolist()) == {2}
    assert "1 of 3 classes have no training images" in data.notes[-1]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [("a\n", "not in it: b"), ("a\nb\na\n", "named twice: a"), ("a\n\nb\n", "line 2 is empty"), ("", "no lines")],
)
def test_class_map__mistakes_are_named(tmp_path, content, wanted):
    root = write(tmp_path, "train", ["a", "b"])
    (tmp_path / "map.txt").write_text(content)
    error = error_of(root, class_map=str(tmp_path / "map.txt"))
    assert error.given.startswith("--class-map ")
    assert wanted in error.found


def test_class_map__that_is_missing_gets_near_names(tmp_path):
    root = write(tmp_path, "train", ["a", "b"])
    (tmp_path / "classes.txt").write_text("a\nb\n")
    error = error_of(root, class_map=str(tmp_path / "clases.txt"))
    assert error.given.startswith("--class-map ")
    assert "classes.txt" in error.hint


# -- mistakes


def test_error__missing_path_gets_near_names(tmp_path):
    (tmp_path / "pictures").mkdir()
    error = error_of(tmp_path / "pictres")
    assert error.given == f"--data {tmp_path / 'pictres'}"
    assert "no pictres in" in error.found
    assert "pictures" in error.hint
    assert "no nowhere in" in error_of(tmp_path / "nowhere" / "deep" / "er").found
    assert "digits" in error_of("digit").hint


def test_error__no_images(tmp_path):
    assert "no images" in error_of(tmp_path).found
    (tmp_path / "loose.png").write_bytes(encoded(image(0)))
    assert "no class folders" in error_of(tmp_path).found
    (tmp_path / "notes.txt").write_text("x")
    assert error_of(tmp_path / "notes.txt").found == "a file"


@pytest.mark.parametrize("as_tar", [False, True])
def test_error__empty_class_folders_are_named(tmp_path, as_tar):
    root = write(write(tmp_path / "x", "train", ["a", "b"]), "validation", ["a"])
    (root / "train" / "hollow" / "deeper").mkdir(parents=True)
    (root / "train" / "hollow" / "readme.txt").write_text("x")
    error = error_of(tarred(root) if as_tar else root)
    assert error.given.startswith("--data ")
    assert "1 class folders without an image" in error.found
    assert error.found.endswith("hollow")


def test_error__validation_classes_that_training_lacks_are_named(tmp_path):
    root = write(write(tmp_path, "train", ["a", "b"]), "val", ["a", "zebra"])
    error = error_of(root)
    assert "zebra" in error.found
    assert error.valid == "a, b"
    (tmp_path / "map.txt").write_text("a\nb\nzebra\n")
    assert "zebra" in error_of(root, class_map=str(tmp_path / "map.txt")).found


def test_error__one_class_only(tmp_path):
    assert "one class only: a" in error_of(write(tmp_path, "train", ["a"])).found


def test_error__validation_without_train(tmp_path):
    assert "val but no train" in error_of(write(tmp_path, "val", ["a", "b"])).found


def test_error__no_image_can_be_held_out(tmp_path):
    assert "one training image" in error_of(write(tmp_path, "train", ["a", "b"], n=1)).found


@pytest.mark.parametrize("damage", ["cut", "compressed", "text"])
def test_error__a_damaged_tar_is_named(tmp_path, damage):
    root = write(write(tmp_path / "x", "train", ["a", "b"]), "validation", ["a"])
    path = tarred(root)
    tar = path / "train.tar"
    if damage == "compressed":
        with tarfile.open(tar, "w:gz") as made:
            made.add(root / "train", arcname=".")
    else:
        tar.write_bytes(tar.read_bytes()[:2000] if damage == "cut" else b"hello" * 1000)
    assert "train.tar" in error_of(path).found


# -- corrupt and unusual images


def damaged(root, where="train/a", good=None):
    """Three files that cannot be decoded."""
    whole = good or encoded(image(1, (40, 40)), "JPEG")
    for name, content in (("0001", whole[: len(whole) // 2]), ("0002", b""), ("0003", b"not an image")):
        next((root / where).glob(f"{name}.*")).write_bytes(content)
    return root


@pytest.mark.parametrize("as_tar", [False, True])
def test_corrupt__small_images_are_named_counted_and_never_replaced(tmp_path, as_tar):
    root = write(write(tmp_path / "x", "train", ["a", "b"], n=5), "validation", ["a", "b"])
    root = damaged(damaged(root), "validation/b")
    path = tarred(root) if as_tar else root
    error = error_of(path)
    assert error.given == f"--data {path}"
    assert error.found.startswith("6 unreadable images")
    for name in ("a/0001.png", "a/0002.png", "a/0003.png", "b/0001.png"):
        assert name in error.found
    assert "--skip-corrupt" in error.hint
    data = opened(path, skip_corrupt=True)
    assert (len(data.train), len(data.validation)) == (7, 5)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert "6 unreadable images" in data.notes[1]
    shown = everything(data.train)[0]
    assert torch.equal(shown[1], pixels(root / "train" / "a" / "0004.png"))
    assert len({bytes(picture.numpy()) for picture in shown}) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt__a_large_image_is_named_by_whoever_meets_it(tmp_path, workers):
    root = write(tmp_path, "train", ["a", "b"], n=5, size=(130, 110), ext="jpg")
    damaged(write(root, "val", ["a", "b"], n=2, size=(130, 110), ext="jpg"))
    data = opened(root, lambda: 112, workers=workers)
    with pytest.raises(DataError) as caught:
        everything(data.train, view=0)
    assert caught.value.given == f"--data {root}"
    assert "train/a/0001.jpg" in caught.value.found
    assert "Traceback" not in str(caught.value)
    skipped = opened(root, lambda: 112, workers=workers, skip_corrupt=True)
    assert "3 unreadable images" in skipped.notes[1]
    assert everything(skipped.train, view=0)[1].tolist() == [0, 0, 1, 1, 1, 1, 1]
    gc.collect()


def test_corrupt__skipping_may_not_empty_a_class(tmp_path):
    root = write(tmp_path, "train", ["a", "b"], n=4)
    damaged(root)
    (root / "train" / "a" / "0000.png").write_bytes(b"x")
    assert "nothing is left of a" in error_of(root, skip_corrupt=True).found


def test_unusual__images_become_sensible_rgb(tmp_path):
    red = Image.new("RGB", (12, 12), (200, 30, 40))
    two = Image.new("RGB", (12, 12), (0, 0, 250))
    deep = Image.fromarray(np.full((12, 12), 0x8012, np.uint16))
    clear = Image.new("RGBA", (12, 12), (200, 30, 40, 0))
    palette = red.quantize(4)
    kinds = {
        "a-palette.png": (encoded(palette), (200, 30, 40)),
        "b-clear-palette.png": (encoded(palette, transparency=bytes([0, 0, 0, 0])), (200, 30, 40)),
        "c-deep.png": (encoded(deep), (128, 128, 128)),
        "d-deep.tif": (encoded(deep, "TIFF"), (128, 128, 128)),
        "e-moving.gif": (encoded(red, "GIF", save_all=True, append_images=[two]), (200, 30, 40)),
        "f-moving.png": (encoded(red, save_all=True, append_images=[two]), (200, 30, 40)),
        "g-grey.jpg": (encoded(Image.new("L", (12, 12), 77), "JPEG"), (77, 77, 77)),
        "h-clear.png": (encoded(clear), (200, 30, 40)),
        "i-grey-clear.png": (encoded(Image.new("LA", (12, 12), (90, 3))), (90, 90, 90)),
        "j-bits.png": (encoded(Image.new("1", (12, 12), 1)), (255, 255, 255)),
        "k-print.jpg": (encoded(Image.new("CMYK", (12, 12), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    }
    write(tmp_path, "train", ["b"])
    (tmp_path / "train" / "a").mkdir()
    for name, (content, _) in kinds.items():
        (tmp_path / "train" / "a" / name).write_bytes(content)
    write(tmp_path, "val", ["b"])
    images, labels, _ = everything(opened(tmp_path).train)
    for shown, (name, (_, wanted)) in zip(images[labels == 0], kinds.items(), strict=True):
        difference = (shown.permute(1, 2, 0).int() - torch.tensor(wanted)).abs().max()
        assert difference <= 3, name


def test_unusual__pixels_without_an_rgb_meaning_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        decoded(Image.new("F", (2, 2), 0.5))
    with pytest.raises(ValueError, match="32-bit"):
        decoded(Image.new("I", (2, 2), 100_000))


# -- timm's names


def write_mnist(root, name="MNIST"):
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    made = {}
    for split, prefix, n in (("train", "train", 30), ("validation", "t10k", 20)):
        values = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        header = b"".join(number.to_bytes(4, "big") for number in (0x803, n, 28, 28))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + values.tobytes())
        header = b"".join(number.to_bytes(4, "big") for number in (0x801, n))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        made[split] = (values, labels)
    return made


def test_torch__test_set_is_the_validation_set(tmp_path):
    made = write_mnist(tmp_path)
    data = opened("torch/mnist", data_dir=str(tmp_path))
    assert data.img_size == 28
    assert len(data.classes) == 10
    assert "test set" in data.notes[0]
    for name in ("train", "validation"):
        images, labels, _ = everything(getattr(data, name))
        assert np.array_equal(images[:, 1].numpy(), made[name][0])
        assert np.array_equal(labels.numpy(), made[name][1])


def test_torch__absent_files_are_never_downloaded(tmp_path):
    error = error_of("torch/cifar10", data_dir=str(tmp_path / "none"))
    assert error.given == f"--data torch/cifar10 --data-dir {tmp_path / 'none'}"
    assert "cifar-10-batches-py" in error.hint
    assert not (tmp_path / "none").exists()
    assert "--data-dir" in error_of("torch/cifar10").found
    assert "cifar10" in error_of("torch/cifar1", data_dir=str(tmp_path)).valid


def test_stream__has_no_index(tmp_path):
    assert "cannot be replayed" in error_of("tfds/cifar10").found


def test_hfds__a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = write(write(tmp_path / "pictures", "train", ["a", "b"]), "test", ["b", "a"], n=2)
    data = opened(f"hfds/{root}", data_dir=str(tmp_path / "cache"))
    assert data.classes == ("a", "b")
    assert (len(data.train), len(data.validation)) == (8, 4)
    images, labels, _ = everything(data.validation)
    for shown, label in zip(images, labels.tolist(), strict=True):
        folder = root / "test" / data.classes[label]
        assert any(torch.equal(shown, pixels(path)) for path in folder.iterdir())
    error = error_of(f"hfds/{tmp_path / 'absent'}", data_dir=str(tmp_path / "cache"))
    assert error.given.startswith("--data hfds/")


def write_shards(root, split, n, shards=2):
    root.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(root / f"set-{split}-{shard:04d}.tar", "w") as tar:
            for place in range(shard, n, shards):
                parts = {
                    "cls": str(place % 3).encode(),
                    "png": encoded(image(hash_of(split, place))),
                    "json": json.dumps({"other": 2 - place % 3}).encode(),
                }
                for extension, content in parts.items():
                    member = tarfile.TarInfo(f"key{place:04d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("info", [False, True])
def test_wds__shards_are_indexed_by_sample_key(tmp_path, info):
    root = tmp_path / "shards"
    write_shards(root, "train", 10)
    write_shards(root, "validation", 6, shards=1)
    if info:
        splits = {
            split: {"name": split, "alt_label": "other", "filenames": sorted(p.name for p in root.glob(f"*{split}*"))}
            for split in ("train", "validation")
        }
        (root / "_info.json").write_text(json.dumps({"splits": splits}))
    data = opened("wds/set", data_dir=str(root))
    assert data.classes == ("0", "1", "2")
    places = [*range(0, 10, 2), *range(1, 10, 2)]
    images, labels, _ = everything(data.train)
    assert labels.tolist() == [2 - place % 3 if info else place % 3 for place in places]
    for shown, place in zip(images, places, strict=True):
        assert np.array_equal(shown.permute(1, 2, 0).numpy(), np.array(image(hash_of("train", place))))
    assert len(data.validation) == 6


def test_wds__mistakes_are_named(tmp_path):
    assert "no absent in" in error_of("wds/set", data_dir=str(tmp_path / "absent")).found
    assert "no shards named train" in error_of("wds/set", data_dir=str(tmp_path)).found
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        content = encoded(image(0))
        member = tarfile.TarInfo("one.png")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    assert "one: no class" in error_of("wds/set", data_dir=str(tmp_path)).found


# -- real images


def test_error__a_data_dir_that_would_not_be_used(tmp_path):
    write(tmp_path, "train", ["a", "b"])
    assert re.search(
        r"(?s)^--data-dir elsewhere\n.*leave --data-dir out", str(error_of(tmp_path, data_dir="elsewhere"))
    )


def test_error__a_padding_that_could_leave_nothing_of_an_image(tmp_path):
    write(tmp_path, "train", ["a", "b"])
    assert "--crop-padding 12" in str(error_of(tmp_path, crop_padding=12))
    assert len(opened(tmp_path, crop_padding=11).train)


def test_error__a_worker_that_is_killed_is_no_traceback(tmp_path, python):
    """In a process of its own: torch's loader kills itself when a worker dies."""
    write(tmp_path, "train", ["a", "b"], size=(200, 200))
    script = (
        "import os, signal; from factor_transfer.data import dataset, images\n"
        "from factor_transfer.config import DataConfig\n"
        "import numpy as np; from factor_transfer.util.errors import DataError\n"
        f"found = dataset.open_data(DataConfig(data={str(tmp_path)!r}, workers=2), default_size=lambda: 128)\n"
        "images.Files.open = lambda self, index: os.kill(os.getpid(), signal.SIGKILL)\n"
        "try: list(found.train.batches([np.arange(2)] * 4, view=0))\n"
        "except DataError as error: print(error)\n"
    )
    done = python(script, timeout=120)
    assert re.search(r"--workers 2\n.*killed.*\n.*fewer --workers", done.stdout), done.stderr


# -- the user's own augmentation


def own(picture):
    """Draws from all three generators that augmentations use."""
    values = np.asarray(picture).astype(int)
    values += random.randrange(9) + np.random.randint(9) + int(torch.randint(9, ()))
    return Image.fromarray((values % 256).astype(np.uint8))


def test_transform__is_replayed_in_any_order_and_any_process(tmp_path):
    root = write(write(tmp_path, "train", ["a", "b"], n=6), "val", ["a"])
    alone, together = (
        open_data(DataConfig(data=str(root), workers=workers), lambda: 0, own).train for workers in (0, 2)
    )
    whole = everything(alone, view=3)[0]
    order = random.Random(0).sample(range(12), 12)
    for split in (alone, together):
        for chunk, batch in zip(np.array_split(order, 4), split.batches(np.array_split(order, 4), 3), strict=True):
            assert torch.equal(batch.image, whole[chunk])
    assert not torch.equal(everything(alone, view=4)[0], whole)
    plain = everything(alone, view=None)[0]
    assert len({tuple((whole[i].int() - plain[i].int() + 256).remainder(256).unique().tolist()) for i in range(12)}) > 3


def test_transform__another_one_is_another_dataset_and_the_same_one_is_not(tmp_path, monkeypatch):
    root = write(write(tmp_path / "data", "train", ["a", "b"]), "val", ["a"])
    (tmp_path / "mine.py").write_text(
        "from PIL import ImageOps\nmirror = ImageOps.mirror\ndef upside(i): return ImageOps.flip(i)\n"
        "def wide(i): return i.resize((20, 12))\ndef fails(i): raise RuntimeError('no such luck')\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    prints = {name: opened(root, transform=name).fingerprint for name in (None, "mine:mirror", "mine:upside")}
    assert len(set(prints.values())) == 3
    assert opened(root, transform="mine:mirror").fingerprint == prints["mine:mirror"]
    train = opened(root, transform="mine:mirror", workers=0).train
    assert torch.equal(everything(train, view=0)[0], everything(train, view=None)[0].flip(-1))
    wrong = {"mine:wide": "(3, 12, 20)", "mine:fails": "no such luck", "mine:number": "a int",
             "mine:absent": "no attribute", "nowhere:f": "No module", "mirror": "package.module"}  # fmt: skip
    for name, found in wrong.items():
        with pytest.raises(ConfigError, match="--transform") as error:
            opened(root, transform=name)
        assert found in str(error.value)


def test_transform__that_fails_on_one_image_names_it(tmp_path):
    root = write(write(tmp_path, "train", ["a", "b"], n=20), "val", ["a"])
    bad = np.asarray(Image.open(root / "train" / "b" / "0019.png"))

    def picky(picture):
        if np.array_equal(np.asarray(picture), bad):
            raise RuntimeError("not this one")
        return picture

    split = open_data(DataConfig(data=str(root), workers=2), lambda: 0, picky).train
    with pytest.raises(DataError, match=r"b/0019.png \(--transform: not this one\)"):
        everything(split, view=0)
