import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_pictures

from data_loader import Loader
from datasets.labels import Labels, folder_labels
from datasets.sources import find_source
from datasets.toy_faces import HAIR_LENGTHS
from errors import UserError

ATTRIBUTES = ["5_o_Clock_Shadow", "Eyeglasses", "Smiling"]
ROWS = {"000001.jpg": (-1, 1, 1), "000002.jpg": (-1, -1, -1), "000003.jpg": (1, -1, 1), "000004.jpg": (1, 1, -1)}


def write_list(path):
    """Write CelebA's list of attributes: in its own format, or as the .csv that Kaggle has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    separator, first = (",", "image_id,") if path.suffix == ".csv" else (" ", f"{len(ROWS)}\n")
    lines = [first + separator.join(ATTRIBUTES), *(separator.join(map(str, (name, *ROWS[name]))) for name in ROWS)]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def celeb(tmp_path):
    """The folder of CelebA's images in torchvision's layout, below the path to give."""
    make_pictures(folder := tmp_path / "celeba" / "img_align_celeba", ROWS)
    return folder


def smiling(tmp_path, attribute="Smiling"):
    return find_source("celeb", str(tmp_path), attribute=attribute).labels()


def test_classes_of_a_folder_are_those_directly_below_it_as_imagefolder_has_them(tmp_path):
    from torchvision.datasets import ImageFolder

    make_pictures(tmp_path, ["b/1.png", "b/2.png", "a/deep/er/3.png", "a/4.png", "C/5.png", "C/a/6.png"])
    source, expected = find_source("folder", str(tmp_path)), ImageFolder(str(tmp_path))
    labels = source.labels()
    assert list(labels.classes) == expected.classes == ["C", "a", "b"]
    paths = [str(tmp_path / item) for item in source.items]
    assert dict(zip(paths, labels.targets, strict=True)) == dict(expected.samples)


def test_a_folder_whose_name_is_no_utf8_is_a_class_and_an_image_beside_the_folders_an_error():
    names = [os.path.join(os.fsdecode(b"caf\xe9"), "x"), os.path.join("dog", "y")]
    assert folder_labels("", names).classes == ("caf\\xe9", "dog")
    with pytest.raises(UserError, match=r"in none: 1, the first stray\.png"):
        folder_labels("", [*names, "stray.png"])


@pytest.mark.parametrize("names, warns", [
    ("train/a/1 train/b/2 val/a/3 val/b/4", True), ("train/1 Test/2", True),
    ("cat/train/1 cat/test/2 dog/train/3 dog/test/4", False), ("cat/images/1 dog/images/2", False),
    ("train/1 bus/2", False), ("cat/a/1 cat/b/2 dog/a/3", False),
])  # fmt: skip
def test_folders_that_are_parts_of_a_dataset_are_a_warning(capsys, names, warns):
    assert len(folder_labels("data", [name.replace("/", os.sep) for name in names.split()]).classes) == 2
    assert ("set --image_path to one of them" in capsys.readouterr().err) == warns


@pytest.mark.parametrize("images, place", [
    ("celeba/img_align_celeba", "celeba/list_attr_celeba.txt"), ("celeba/img_align_celeba", "list_attr_celeba.csv"),
    ("celeba/img_align_celeba", "celeba/img_align_celeba/list_attr_celeba.txt"),
    ("celeba/img_align_celeba", "celeba/Anno/list_attr_celeba.txt"), ("CelebA/0", "CelebA/list_attr_celeba.csv"),
    ("CelebA/Img/img_align_celeba", "CelebA/Img/list_attr_celeba.txt"),
    ("CelebA/archive/img_align_celeba/img_align_celeba", "CelebA/archive/list_attr_celeba.csv"),
])  # fmt: skip
def test_an_attribute_of_celeb_is_its_classes_and_a_missing_list_says_where_it_goes(tmp_path, images, place):
    make_pictures(tmp_path / images, [name.replace(".jpg", ".png") for name in ROWS])
    with pytest.raises(UserError, match=rf"download list_attr_celeba\.txt .*{tmp_path / Path(images).parts[0]}$"):
        smiling(tmp_path)
    write_list(tmp_path / place)
    assert smiling(tmp_path) == Labels(("not_Smiling", "Smiling"), [1, 0, 1, 0])
    assert smiling(tmp_path, "Eyeglasses").targets == [1, 0, 0, 1]


@pytest.mark.parametrize("name, text, attribute", [
    ("txt", "4\nSmiling\n000001.jpg 1\n000002.jpg -1\n000003.jpg 1\n000004.jpg 0\n", "Smiling"),
    ("txt", "\ufeffimage_id Smiling\n000001 1\n000002 -1\n000003 1\n000004 0\n", "Smiling"),
    ("csv", "file,Wavy Hair\n000001.jpg,1\n000002.jpg,-1\n000003.jpg,1\n000004.jpg,0\n", "Wavy Hair"),
    ("csv", "file,a, b \n\n1/000001.jpg,0, 1\n000002.jpg,0,-1\n000003.jpg,0,1\n000004.jpg,0, 0\n", "b"),
])  # fmt: skip
def test_a_list_of_one_s_own(celeb, tmp_path, name, text, attribute):
    """Spreadsheets write a byte order mark, which is no part of the header's first word."""
    (celeb.parent / f"list_attr_celeba.{name}").write_text(text, encoding="utf-8")
    assert smiling(tmp_path, attribute) == Labels((f"not_{attribute}", attribute), [1, 0, 1, 0])


@pytest.mark.parametrize("attribute, content, words", [
    ("smiling", None, "--attribute smiling .*choose one of " + ", ".join(ATTRIBUTES)),
    (None, None, "--attribute; choose one of "),
    ("Smiling", b"1\nSmiling\n000001.jpg 1\n", r"lacks images: 3, the first 000002\.jpg"),
    *(("Smiling", content, r"list_attr_celeba\.txt") for content in (
        b"", b"4\n", b"4\nSmiling\n000001.jpg\n", b"4\na Smiling\n000001.jpg 1\n",
        b"4\na Smiling\n000001.jpg 1 yes\n", b"<html>Quota exceeded</html>", b"Wavy Hair Smiling\n000001.jpg 1 1\n",
        b"," + b"x" * 200_000, b"4\na Smiling\n000001.jpg 1 1\n000002.jpg 1\n", b"\xff\xfe\x00",
        "4\nSmiling\n000001.jpg 1\n".encode("utf-16"))),
])  # fmt: skip
def test_what_is_wrong_with_an_attribute_or_the_list_is_one_line(celeb, tmp_path, attribute, content, words):
    path = celeb.parent / "list_attr_celeba.txt"
    write_list(path) if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        smiling(tmp_path, attribute)
    assert "\n" not in str(error.value)


def test_toy_faces_are_drawn_with_the_hair_of_their_class():
    """Beside the chin there is hair or background: long hair reaches lower than medium hair, and that than short."""
    source = find_source("toy", toy_num=90, seed=5)
    labels = source.labels()
    assert list(labels.classes) == ["short", "medium", "long"] == [*HAIR_LENGTHS]
    lowest = [[], [], []]
    for item, number in zip(source.items, labels.targets, strict=True):
        column = np.asarray(source.decode(item, 64)).astype(int)[:, 14]
        background = np.abs(column - column[0]).sum(1) < 30
        lowest[number].append((~background[:55]).nonzero()[0].max(initial=0))
    short, medium, long = map(np.median, lowest)
    assert short < medium < long


@pytest.mark.parametrize("labels, words", [
    (None, "--dataset toy has no classes"),
    (lambda: Labels(("cat",), [0, 0, 0]), "two classes or more; the only one is cat"),
    (lambda: Labels(("cat", "dog", "fox"), [0, 0, 1]), "two images or more of each class: dog has 1, fox has 0"),
])  # fmt: skip
def test_too_few_classes_or_images_are_an_error_before_any_image_is_decoded(labels, words):
    source = replace(find_source("toy", toy_num=3), labels=labels)
    with pytest.raises(UserError, match=words):
        Loader(source, 32, 2, conditional=True)
