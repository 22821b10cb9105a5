"""Sources of images: labels, class names, splits, Parquet shards, saved datasets, tar files."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mto_analysis import DataError, open_images
from mto_analysis.images import Images, choose_images
from mto_analysis.images.decoding import decode_image, decode_pixels
from mto_analysis.training.evaluation.features import LabelledImages


def encoded(value: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, kind)
    return buffer.getvalue()


def write(folder: Path, *names: str) -> Path:
    for value, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(value))
    return folder


def value_of(images: Images, row: int) -> int:
    assert np.asarray(decode_image(images.read(row)))[0, 0, 0] == np.asarray(images.open(row))[0, 0, 0]
    return int(np.asarray(images.open(row))[0, 0, 0])


# Folders and lists.


def test_open_images__takes_labels_from_sub_folders(tmp_path: Path) -> None:
    images = open_images(write(tmp_path, "dog/1.png", "cat/x/2.png", "cat/1.png", "eel/9.png"))
    assert images.names == ["cat/1.png", "cat/x/2.png", "dog/1.png", "eel/9.png"]
    assert images.labels == [0, 0, 1, 2]
    assert images.class_names == ["cat", "dog", "eel"]
    assert images.read(2) == (tmp_path / "dog/1.png").read_bytes()


def test_open_images__gives_no_labels_where_a_image_has_no_folder(tmp_path: Path) -> None:
    images = open_images(write(tmp_path, "dog/1.png", "1.png"))
    assert images.labels is None
    assert images.class_names == []


def test_open_images__looks_for_classes_inside_splits(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/dog/3.png", "val/cat/4.png")
    whole = open_images(tmp_path)
    assert whole.labels == [0, 1, 0, 1]
    assert whole.class_names == ["cat", "dog"]
    for split, names in {"train": ["cat/1.png", "dog/2.png"], "validation": ["cat/4.png", "dog/3.png"]}.items():
        part = open_images(tmp_path, split=split)
        assert part.names == names
        assert part.labels == [0, 1]
    with pytest.raises(FileNotFoundError, match="has no split 'test'"):
        open_images(tmp_path, split="test")
    with pytest.raises(DataError, match=r"1\.png is one file and has no split 'val'"):
        open_images(tmp_path / "train/cat/1.png", split="val")


def test_open_images__takes_labels_from_a_list(tmp_path: Path) -> None:
    write(tmp_path, "a b.png", "c.png")
    (tmp_path / "l.txt").write_text("c.png 1\na b.png 0\n")
    images = open_images(tmp_path / "l.txt")
    assert images.names == ["c.png", "a b.png"]
    assert images.labels == [1, 0]
    assert [value_of(images, row) for row in range(2)] == [1, 0]
    (tmp_path / "l.txt").write_text("c.png\na b.png\n")
    assert open_images(tmp_path / "l.txt").labels is None


def test_choose_images__keep_their_labels(tmp_path: Path) -> None:
    images = open_images(write(tmp_path, "cat/1.png", "dog/2.png", "eel/9.png"))
    chosen = choose_images(images, ["eel/9.png", "cat/1.png"])
    assert chosen.labels == [2, 0]
    assert chosen.class_names == ["cat", "dog", "eel"]
    assert chosen.read(1) == images.read(0)


def test_open_images__follows_linked_folders_once(tmp_path: Path) -> None:
    write(tmp_path / "all", "cat/1.png", "dog/2.png", "eel/3.png")
    some = tmp_path / "some"
    some.mkdir()
    for name in ("dog", "cat"):
        (some / name).symlink_to(tmp_path / "all" / name)
    (tmp_path / "all" / "cat" / "round").symlink_to(tmp_path / "all" / "cat")
    (some / "up").symlink_to(tmp_path)
    images = open_images(some)
    assert images.names == ["cat/1.png", "dog/2.png"]
    assert images.labels == [0, 1]
    assert value_of(images, 1) == 1


def test_open_images__does_not_guess_between_kinds(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png")
    write_parquet(tmp_path / "data" / "p.parquet", [1])
    message = r"holds images \(cat/1\.png\) and Parquet files \(data/p\.parquet\); give the folder"
    with pytest.raises(DataError, match=message):
        open_images(tmp_path)
    assert len(open_images(tmp_path / "data").names) == 1


# What lies beside the images.


def test_open_images__skips_and_counts_what_is_no_data(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "dog/2.png")
    plain = open_images(tmp_path)
    assert plain.skipped == {}
    write(tmp_path, ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", "cat/.cache/1.png", "cat/._1.png", "dog/.x.jpg")
    for name in ("Thumbs.db", "cat/notes.txt", "dog/more.txt", "README"):
        (tmp_path / name).write_text("")
    images = open_images(tmp_path)
    assert (images.names, images.labels, images.class_names) == (plain.names, plain.labels, plain.class_names)
    assert images.skipped == {
        "hidden or system folders": 3,
        "hidden or system files": 3,
        ".txt files": 2,
        "files without a suffix": 1,
    }
    assert choose_images(images, ["dog/2.png"]).skipped == images.skipped


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_read__does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(OSError, match="is a pipe, no file"):
        open_images(tmp_path).read(0)


def test_open_images__follows_links_to_parents_and_neighbours_once(tmp_path: Path) -> None:
    write(tmp_path / "all", "some/cat/1.png", "other/dog/2.png")
    some = tmp_path / "all" / "some"
    (some / "again").symlink_to(some / "cat")
    (some / "up").symlink_to(tmp_path / "all")
    (some / "far").symlink_to(tmp_path / "all" / "other" / "dog")
    (some / "farther").symlink_to(tmp_path / "all" / "other")
    images = open_images(some)
    assert images.names == ["cat/1.png", "far/2.png"]
    assert images.skipped == {"linked folders that are read already": 3}


def test_open_images__names_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, "cat/1.png", "locked/2.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"locked cannot be read \(Permission denied\); make it readable"):
        open_images(tmp_path)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPEG", "avif", "jp2", "pgm", "pnm", "webp"])
def test_open_images__reads_every_suffix_of_images(suffix: str, tmp_path: Path) -> None:
    kinds = {"jfif": "jpeg", "jpe": "jpeg", "jp2": "jpeg2000", "pgm": "ppm", "pnm": "ppm"}
    (tmp_path / f"a.{suffix}").write_bytes(encoded(100, kinds.get(suffix, suffix.lower())))
    images = open_images(tmp_path)
    assert abs(value_of(images, 0) - 100) <= 3
    assert images.skipped == {}


def test_open_images__reads_lists_with_a_mark_and_names_that_start_with_a_hash(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, "#1.png", "2.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.txt").write_bytes(b"\xef\xbb\xbf# a comment\n#1.png\n2.png\n")
    assert open_images(tmp_path / "l.txt").names == ["#1.png", "2.png"]
    for again in ("./2.png", "x/../2.png", str(tmp_path / "2.png")):
        (tmp_path / "l.txt").write_text(f"2.png\n{again}\n")
        with pytest.raises(DataError, match="lists an image twice"):
            open_images("l.txt")


def test_open_images__escapes_file_names_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(encoded(7))
    (tmp_path / "l.txt").write_bytes(b"caf\xe9.png\n")
    for source in (tmp_path, tmp_path / "l.txt"):
        images = open_images(source)
        assert images.names == ["caf\\xe9.png"]
        assert value_of(images, 0) == 7


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_open_images__refuses_archives_that_are_cut(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        write_tar(path, {f"cat/{row}.png": encoded(row) for row in range(40)})
    else:
        write_parquet(path, list(range(40)))
    whole = path.read_bytes()
    for share in (0.3, 0.5, 0.8):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=r"a\.(tar|parquet)"):
            open_images(path)


# Parquet and saved datasets.


FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def write_parquet(path: Path, values: list[int], labels: list[int] | None = None, **metadata) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict = {"image": [{"bytes": encoded(value), "path": None} for value in values]}
    if labels is not None:
        columns["label"] = labels
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path, row_group_size=2)
    return path


def test_open_images__takes_labels_and_class_names_from_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p.parquet", [5, 6, 7], [1, 0, 1], info={"features": FEATURES})
    images = open_images(path)
    assert images.labels == [1, 0, 1]
    assert images.class_names == ["cat", "dog"]
    assert [value_of(images, row) for row in (2, 0, 1)] == [7, 5, 6]
    assert open_images(write_parquet(tmp_path / "q.parquet", [1])).labels is None
    hidden = open_images(write_parquet(tmp_path / "r.parquet", [1, 2], [-1, -1]))  # as hidden test labels are written
    assert hidden.labels is None


TOO_FEW_NAMES = '{"info": {"features": {"label": {"names": ["a"]}}}}'


@pytest.mark.parametrize(
    "metadata", ["null", "[1]", '{"info": null}', '{"info": {"features": [1]}}', TOO_FEW_NAMES, "not JSON"]
)
def test_open_images__reads_parquet_with_odd_metadata(metadata: str, tmp_path: Path) -> None:
    table = pq.read_table(write_parquet(tmp_path / "p.parquet", [5, 6], [1, 0]))
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "p.parquet")
    images = open_images(tmp_path / "p.parquet")
    assert (images.labels, list(images.class_names), value_of(images, 1)) == ([1, 0], [], 6)


def test_open_images__takes_another_column_of_images_and_words_as_labels(tmp_path: Path) -> None:
    table = pq.read_table(write_parquet(tmp_path / "p.parquet", [5, 6, 7], [1, 0, 1]))
    table = table.rename_columns(["img", "label"]).set_column(1, "label", pa.array(["dog", "cat", "dog"]))
    pq.write_table(table, tmp_path / "p.parquet")
    images = open_images(tmp_path / "p.parquet")
    assert [value_of(images, row) for row in range(3)] == [5, 6, 7]
    assert (images.labels, list(images.class_names)) == ([1, 0, 1], ["cat", "dog"])
    pq.write_table(table.append_column("mask", table.column("img")), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"several columns of image bytes, and none is `image`: img \(struct"):
        open_images(tmp_path / "p.parquet")


@pytest.mark.parametrize("kind", [pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())], ids=str)
def test_open_images__says_why_parquet_has_no_labels(kind: pa.DataType, tmp_path: Path) -> None:
    cells = pa.array([encoded(5), encoded(6)])
    cells = cells.dictionary_encode() if pa.types.is_dictionary(kind) else cells.cast(kind)
    for labels, words in {
        (0.0, 1.0): r"of 2 rows 0 have a class number in `label`, 0 a word; columns are image \(.*\), label \(double\)",
        (1, None): "of 2 rows 1 have a class number in `label`, 0 a word",
        ("cat", None): "of 2 rows 0 have a class number in `label`, 1 a word",
    }.items():
        pq.write_table(pa.table({"image": cells, "label": list(labels)}), tmp_path / "p.parquet")
        images = open_images(tmp_path / "p.parquet")
        assert [value_of(images, row) for row in range(2)] == [5, 6]
        assert images.labels is None
        assert re.match(words, images.unlabelled)
    with pytest.raises(DataError, match=r"p\.parquet has no labels \(of 2 rows 0 have .*\); give a folder"):
        LabelledImages(str(tmp_path / "p.parquet"))


def test_open_images__reads_a_folder_of_parquet_shards(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_parquet(data / "train-00000-of-00002.parquet", [1, 2, 3], [0, 1, 0], info={"features": FEATURES})
    write_parquet(data / "train-00001-of-00002.parquet", [4, 5, 6], [1, 1, 0], info={"features": FEATURES})
    write_parquet(data / "test-00000-of-00001.parquet", [7], [1], info={"features": FEATURES})
    train = open_images(tmp_path, split="train")
    assert train.names[2:4] == ["data/train-00000-of-00002:2", "data/train-00001-of-00002:0"]
    assert train.labels == [0, 1, 0, 1, 1, 0]
    assert train.class_names == ["cat", "dog"]
    assert [value_of(train, row) for row in (5, 0, 3, 2, 4, 1)] == [6, 1, 4, 3, 5, 2]
    again = pickle.loads(pickle.dumps(train))
    assert again.read(4) == train.read(4)
    assert open_images(tmp_path, split="test").names == ["0"]
    assert len(open_images(tmp_path).names) == 7
    with pytest.raises(FileNotFoundError, match="has no split 'val'; its files are test-00000"):
        open_images(tmp_path, split="val")


def test_open_images__says_how_to_export_a_saved_dataset(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="export it with `to_parquet`"):
        open_images(tmp_path)


def test_open_images__reads_what_the_datasets_library_exports(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": encoded(value), "path": None} for value in range(5)], "label": [0, 1, 1, 0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "p.parquet"))
    images = open_images(tmp_path / "p.parquet")
    assert images.labels == [0, 1, 1, 0, 1]
    assert images.class_names == ["cat", "dog"]
    assert [value_of(images, row) for row in range(5)] == [0, 1, 2, 3, 4]


# Tar files.


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_open_images__reads_a_tar_of_class_folders(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "p.tar",
        {"dog/2.png": encoded(2), "cat/1.png": encoded(1), "cat/notes.txt": b"", "cat/3.png": encoded(3)},
    )
    images = open_images(path)
    assert images.names == ["cat/1.png", "cat/3.png", "dog/2.png"]
    assert images.labels == [0, 0, 1]
    assert images.class_names == ["cat", "dog"]
    assert [value_of(images, row) for row in (2, 0, 1)] == [2, 1, 3]
    assert pickle.loads(pickle.dumps(images)).read(0) == encoded(1)
    assert [file.name for file in tmp_path.iterdir()] == ["p.tar"]  # no index is left beside the data


def test_open_images__reads_one_tar_per_class(tmp_path: Path) -> None:
    write_tar(tmp_path / "n02.tar", {"a.png": encoded(2), "b.png": encoded(3)})
    write_tar(tmp_path / "n01.tar", {"a.png": encoded(1)})
    images = open_images(tmp_path)
    assert images.names == ["n01.tar/a.png", "n02.tar/a.png", "n02.tar/b.png"]
    assert images.labels == [0, 1, 1]
    assert images.class_names == ["n01", "n02"]
    assert [value_of(images, row) for row in range(3)] == [1, 2, 3]


def test_open_images__reads_a_tar_of_tars(tmp_path: Path) -> None:
    inner = {name: write_tar(tmp_path / "in" / name, {"a.png": encoded(value)}) for value, name in
             enumerate(["n01.tar", "n02.tar"])}  # fmt: skip
    path = write_tar(tmp_path / "all.tar", {name: file.read_bytes() for name, file in inner.items()})
    images = open_images(path)
    assert images.names == ["n01.tar/a.png", "n02.tar/a.png"]
    assert images.labels == [0, 1]
    assert [value_of(images, row) for row in range(2)] == [0, 1]


def test_open_images__takes_labels_of_webdataset_shards_from_their_cls_files(tmp_path: Path) -> None:
    for shard in range(2):
        members: dict[str, bytes] = {}
        for row in range(3):
            members[f"{row:03}.png"] = encoded(10 * shard + row)
            members[f"{row:03}.cls"] = str(5 * shard + row).encode()
        write_tar(tmp_path / f"train-{shard:04}.tar", members)
    images = open_images(tmp_path)
    assert images.names[2:4] == ["train-0000.tar/002.png", "train-0001.tar/000.png"]
    assert images.labels == [0, 1, 2, 5, 6, 7]
    assert [value_of(images, row) for row in range(6)] == [0, 1, 2, 10, 11, 12]


def test_open_images__says_what_is_wrong_with_a_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match=r"a\.tar: a tar file cannot be read"):
        open_images(tmp_path / "a.tar")
    with pytest.raises(DataError, match="holds no images in its tar files"):
        open_images(write_tar(tmp_path / "b.tar", {"notes.txt": b"x"}))
    with pytest.raises(DataError, match=r"1\.cls holds 'cat', not a class number"):
        open_images(write_tar(tmp_path / "c.tar", {"1.png": encoded(1), "1.cls": b"cat"}))


def test_open_images__skips_and_counts_in_a_tar_what_is_no_data(tmp_path: Path) -> None:
    members = {"./cat/1.webp": encoded(1), "dog/2.png": encoded(2), os.fsdecode(b"dog/\xe9.jpeg"): encoded(3)}
    beside = ("cat/._1.webp", "__MACOSX/cat/1.png", "cat/.cache/3.png", "cat/1.json", "cat/1.npy")
    path = write_tar(tmp_path / "p.tar", members | dict.fromkeys(beside, b"x"))
    for images in (open_images(path), open_images(tmp_path)):
        assert [name.removeprefix("p.tar/") for name in images.names] == ["cat/1.webp", "dog/2.png", "dog/\\xe9.jpeg"]
        assert [value_of(images, row) for row in range(3)] == [1, 2, 3]
        assert (images.labels, images.class_names) == ([0, 1, 1], ["cat", "dog"])
        assert images.skipped == {"hidden or system files": 3, ".json files": 1, ".npy files": 1}
    with pytest.raises(DataError, match="holds an image name twice"):
        open_images(write_tar(tmp_path / "p.tar", {"1.png": encoded(1), "./1.png": encoded(2)}))


def test_read__says_that_a_tar_was_cut_short(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "p.tar", {"cat/1.png": encoded(1), "dog/2.png": encoded(2)})
    images = open_images(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(OSError, match="ends before the image does"):
        images.read(1)


# Decoding.


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decode_pixels__gives_what_pil_gives(kind: str, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((50, 60), Image.Resampling.BICUBIC).convert(mode).save(buffer, kind)
    ours = decode_pixels(buffer.getvalue()).permute(1, 2, 0).numpy().astype(int)
    assert ours.shape == (60, 50, 3)
    assert np.abs(ours - np.asarray(decode_image(buffer.getvalue())).astype(int)).max() <= 2


def test_decode_pixels__leaves_cmyk_and_gigapixels_to_pil(monkeypatch) -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 0, 0, 127)).save(buffer, "jpeg")
    np.testing.assert_array_equal(
        decode_pixels(buffer.getvalue()).permute(1, 2, 0).numpy(), np.asarray(decode_image(buffer.getvalue()))
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(Image.DecompressionBombError):
        decode_pixels(encoded(1, "jpeg"))


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_decode_pixels__refuses_cut_files(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    for length in (3, 4, 20, 160, 700, len(buffer.getvalue()) // 2):
        with pytest.raises(Exception, match=r".+"):
            decode_pixels(buffer.getvalue()[:length])
