import concurrent.futures
import io
import json
import os
import shutil
import sys
import types

import numpy as np
import pyarrow as pa
import pytest
from conftest import tiny_config
from PIL import Image
from pyarrow import parquet as pq

from diffusion_jax import parts
from diffusion_jax.data import cache, parquet, sources
from diffusion_jax.errors import UserError
from diffusion_jax.running import config as configs

PICTURES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLASSES = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def encoded(picture, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind)
    return file.getvalue()


PNGS = [encoded(picture) for picture in PICTURES]


def structs(images):
    return pa.array([image and {"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)], STRUCT)


def write(path, images=PNGS, features=None, groups=3, **columns):
    """Writes a Parquet file with a column "image" of structs, or the given columns, and the hub's metadata."""
    columns = {"image": structs(images)} | {name: value for name, value in columns.items() if value is not None}
    table = pa.table({name: value for name, value in columns.items() if value is not ...})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=groups)
    return path


def opened(path, **options):
    return sources.open_source("files", str(path), **options)


def read(source):
    return [source[i] for i in range(len(source))]


def labels(source):
    return [source.label(i) for i in range(len(source))]


def error(path, **options):
    with pytest.raises(UserError) as raised:
        opened(path, **options)
    message = str(raised.value)
    assert message.startswith("config.data.") and "\n" not in message
    return message


# ---------------------------------------------------------------- images


def test_images_of_one_file(tmp_path, capsys):
    file = write(tmp_path / "a.parquet")
    source = opened(file)
    np.testing.assert_array_equal(read(source), PICTURES)
    assert (source.origin, source.name(7), source.label, source.classes) == (str(file), "a.parquet[7]", None, [])
    assert capsys.readouterr().out == f"{file}: 12 images unlabelled\n"


def test_images_are_decoded_as_those_of_files(tmp_path):
    jpeg, grey = encoded(PICTURES[0], "JPEG"), encoded(PICTURES[1, ..., 0])
    source = opened(write(tmp_path / "a.parquet", [jpeg, grey]))
    np.testing.assert_array_equal(source[0], np.asarray(Image.open(io.BytesIO(jpeg))))
    np.testing.assert_array_equal(source[1], PICTURES[1, ..., :1])


def test_only_the_first_frame_is_read_and_counted(tmp_path):
    file = io.BytesIO()
    first, *others = (Image.fromarray(picture) for picture in PICTURES[:3])
    first.save(file, "GIF", save_all=True, append_images=others)
    source = opened(write(tmp_path / "a.parquet", [file.getvalue(), PNGS[0]]))
    assert [image.shape for image in read(source)] == [(8, 8, 3)] * 2 and source.several() == 1


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_column_of_bytes(tmp_path, kind):
    source = opened(write(tmp_path / "a.parquet", image=..., picture=pa.array(PNGS, kind), size=[8] * 12))
    np.testing.assert_array_equal(read(source), PICTURES)


def test_the_column_of_images_is_that_of_the_metadata(tmp_path):
    masks = structs(PNGS[::-1])
    file = write(tmp_path / "a.parquet", features={"image": {"_type": "Image"}, "mask": {}}, mask=masks)
    np.testing.assert_array_equal(read(opened(file)), PICTURES)
    file = write(tmp_path / "b.parquet", features={"mask": {"_type": "Image"}}, mask=masks)
    np.testing.assert_array_equal(read(opened(file)), PICTURES[::-1])
    file = write(tmp_path / "c.parquet", hash=[b"a column of bytes"] * 12)
    np.testing.assert_array_equal(read(opened(file)), PICTURES)


@pytest.mark.parametrize("text", ["{", "[]", '{"info": null}', '{"info": {"features": [1]}}'])
def test_metadata_of_another_form_is_ignored(tmp_path, text):
    table = pa.table({"image": structs(PNGS)}).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "a.parquet")
    np.testing.assert_array_equal(read(opened(tmp_path / "a.parquet")), PICTURES)


def test_row_groups_are_read_when_needed_and_few_are_kept(tmp_path, monkeypatch):
    reads = []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, k, **x: reads.append(k) or whole(self, k, **x))
    monkeypatch.setattr(parquet, "MAX_BYTES", 0)
    source = opened(write(tmp_path / "a.parquet"))
    assert reads == []
    for i in (0, 1, 2, 4, 0):
        np.testing.assert_array_equal(source[i], PICTURES[i])
    assert reads == [0, 1]
    for i in (7, 0, 4):  # two are kept: 4 pushed the first one out
        np.testing.assert_array_equal(source[i], PICTURES[i])
    assert reads == [0, 1, 2, 1]
    monkeypatch.undo()
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, k, **x: reads.append(k) or whole(self, k, **x))
    reads.clear()
    source = opened(tmp_path / "a.parquet")
    np.testing.assert_array_equal([read(source), read(source)], [PICTURES] * 2)
    assert reads == [0, 1, 2, 3]


def test_threads_read_one_row_group_once(tmp_path, monkeypatch):
    reads = []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, k, **x: reads.append(k) or whole(self, k, **x))
    source = opened(write(tmp_path / "a.parquet"))
    order = np.random.default_rng(1).integers(0, 12, 300)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        np.testing.assert_array_equal(list(pool.map(source.read, order)), PICTURES[order])
    assert sorted(reads) == [0, 1, 2, 3]


# ---------------------------------------------------------------- files and splits


def test_files_of_a_folder_are_sorted_by_name(tmp_path, capsys):
    for k in (2, 0, 1):
        write(tmp_path / "set" / f"{k}.parquet", PNGS[4 * k : 4 * k + 4])
    (tmp_path / "set" / "README.md").write_text("a data set")
    source = opened(tmp_path / "set")
    np.testing.assert_array_equal(read(source), PICTURES)
    assert [source.name(i) for i in (0, 3, 4, 11)] == [f"{k}.parquet[{i}]" for k, i in ((0, 0), (0, 3), (1, 0), (2, 3))]
    assert capsys.readouterr().out == f"{tmp_path}/set: 12 images unlabelled; left out: 1 .md\n"


def test_a_part_of_a_split(tmp_path):
    source = opened(write(tmp_path / "a.parquet", label=list(range(12))), split="train[5:7]")
    np.testing.assert_array_equal(read(source), PICTURES[5:7])
    assert labels(source) == [5, 6] and source.name(0) == "a.parquet[5]"


@pytest.mark.parametrize(
    "train, test",
    [
        ("data/train-00000-of-00002", "data/test-00000-of-00001"),
        ("plain_text/train/0000", "plain_text/test/0000"),
        ("train", "test"),
        ("Training_0", "testing_0"),
        ("tests/train-0", "tests/test-0"),  # the name of the file goes before that of its folder
    ],
)
def test_the_split_is_in_the_name_of_the_file_or_its_folder(tmp_path, capsys, train, test):
    write(tmp_path / "set" / f"{train}.parquet", PNGS[:8])
    write(tmp_path / "set" / f"{test}.parquet", PNGS[8:])
    np.testing.assert_array_equal(read(opened(tmp_path / "set")), PICTURES[:8])
    assert capsys.readouterr().out.endswith("left out: 1 outside train\n")
    np.testing.assert_array_equal(read(opened(tmp_path / "set", split="test")), PICTURES[8:])
    message = error(tmp_path / "set", split="val")
    assert message.startswith("config.data.split='val': ")
    assert message.endswith("set' has no Parquet files of that name: give one that it has, test, train")


def test_splits_of_other_names(tmp_path):
    for k, split in enumerate(("fold_1", "fold_2", "dev")):
        write(tmp_path / f"{split}-00000-of-00001.parquet", PNGS[k : k + 1])
    for k, split in enumerate(("fold_1", "fold_2", "validation")):
        np.testing.assert_array_equal(read(opened(tmp_path, split=split)), PICTURES[k : k + 1])


def test_without_names_of_splits_all_is_train(tmp_path):
    for k, name in enumerate(("0000", "traingle", "untested")):
        write(tmp_path / f"{name}.parquet", PNGS[k : k + 1])
    np.testing.assert_array_equal(read(opened(tmp_path)), PICTURES[:3])
    assert error(tmp_path, split="test").endswith("give train, which is everything")
    single = write(tmp_path / "test.parquet")
    assert "give one that it has, test" in error(single)


def test_a_folder_with_images_is_one_of_images(tmp_path):
    write(tmp_path / "a.parquet")
    Image.fromarray(PICTURES[3]).save(tmp_path / "picture.png")
    np.testing.assert_array_equal(read(opened(tmp_path)), PICTURES[3:4])


def test_version_changes_with_the_files(tmp_path):
    def version(**options):
        return opened(tmp_path / "set", **options).version

    file = write(tmp_path / "set" / "train-0.parquet")
    versions = [version()]
    assert version() == versions[0]
    write(tmp_path / "set" / "test-0.parquet", PNGS[:2])
    assert version() == versions[0]
    versions.append(version(split="test"))
    os.utime(file, ns=(0, 0))
    versions.append(version())
    write(file, PNGS[:4])
    os.utime(file, ns=(0, 0))
    versions.append(version())
    versions.append(version(split="train[:2]"))
    write(tmp_path / "set" / "train-1.parquet")
    versions.append(version())
    assert len(set(versions)) == len(versions)


# ---------------------------------------------------------------- labels


def test_classes_are_those_of_the_metadata(tmp_path):
    numbers = [0, 1] * 6
    source = opened(write(tmp_path / "a.parquet", features=CLASSES, label=numbers))
    assert (labels(source), source.classes) == (numbers, ["cat", "dog"])
    features = dict.fromkeys(("fine", "kind"), CLASSES["label"])
    source = opened(write(tmp_path / "b.parquet", features=features, kind=[0] * 12, fine=numbers))
    assert labels(source) == [0] * 12  # of two, the first column


@pytest.mark.parametrize("name", ["label", "labels"])
@pytest.mark.parametrize("kind", [pa.int64(), pa.uint8()])
def test_classes_of_integers_are_numbers(tmp_path, name, kind):
    numbers = [0, 3, 1] * 4
    source = opened(write(tmp_path / "a.parquet", **{name: pa.array(numbers, kind)}))
    assert (labels(source), source.classes) == (numbers, ["0", "1", "2", "3"])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_classes_of_text_are_sorted(tmp_path, kind):
    for k, texts in enumerate((["dog", "cat"], ["eel", "dog"])):
        write(tmp_path / f"{k}.parquet", PNGS[:2], label=pa.array(texts, pa.string()).cast(kind))
    source = opened(tmp_path)
    assert (labels(source), source.classes) == ([1, 0, 2, 1], ["cat", "dog", "eel"])


@pytest.mark.parametrize(
    "columns",
    [
        {"labels": ["a"] * 12},
        {"caption": ["a"] * 12},
        {"index": list(range(12))},
        {"label": [0.5] * 12},
        {"label": [[1]] * 12},
    ],
)
def test_other_columns_are_no_labels(tmp_path, columns):
    source = opened(write(tmp_path / "a.parquet", **columns))
    assert source.label is None and len(source.classes) == 0


@pytest.mark.parametrize("number, features", [(-1, CLASSES), (2, CLASSES), (None, CLASSES), (10**9, None), (-5, None)])
def test_labels_that_lack_a_class_are_left_out(tmp_path, capsys, number, features):
    source = opened(write(tmp_path / "a.parquet", features=features, label=[0] * 11 + [number]))
    assert source.label is None and len(source.classes) == 0
    assert "a.parquet: the column 'label' is left out: 1 of 12 rows have no class\n" in capsys.readouterr().out


# ---------------------------------------------------------------- the cache


def config_of(path, folder, **overrides):
    return tiny_config(
        data__source="files", data__path=str(path), data__cache_dir=str(folder), data__channels=3, **overrides
    )


@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_images_of_a_config(tmp_path, limit):
    for k in range(2):
        file = tmp_path / "set" / "data" / f"train-{k:05}-of-00002.parquet"
        write(file, PNGS[6 * k : 6 * k + 6], features=CLASSES, label=[k] * 6)
    write(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", PNGS[:2], features=CLASSES, label=[0, 1])
    config = config_of(tmp_path / "set", tmp_path / "cache", data__cache_limit_gb=limit)
    images = parts.images(config)
    assert isinstance(images, cache.Cached if limit else cache.OnTheFly) and images.classes == ("cat", "dog")
    np.testing.assert_array_equal(images[:], PICTURES)
    np.testing.assert_array_equal(images.examples(np.arange(12))["label"], [0] * 6 + [1] * 6)
    np.testing.assert_array_equal(parts.images(config, "test")[:], PICTURES[:2])


def test_null_and_damaged_images_are_skipped(tmp_path):
    images = structs(PNGS[:8]).to_pylist()
    images[1] = None
    images[3]["bytes"] = None
    images[5]["bytes"] = b"no picture"
    file = write(tmp_path / "a.parquet", image=pa.array(images, STRUCT))
    source = opened(file)
    for i, message in ((1, "it is null"), (3, r"no bytes, only the path '3\.png'"), (5, "neither AVIF")):
        with pytest.raises(ValueError, match=message):
            source[i]
    with pytest.raises(UserError, match=r"image a\.parquet\[1\]: it is null: .*skip_corrupt=True"):
        parts.images(config_of(file, tmp_path / "cache"))
    images = parts.images(config_of(file, tmp_path / "cache", data__skip_corrupt=True))
    np.testing.assert_array_equal(images[:], PICTURES[[0, 2, 4, 6, 7]])


# ---------------------------------------------------------------- bad files


def test_files_that_cannot_be_read(tmp_path):
    good = write(tmp_path / "good.parquet").read_bytes()
    footer = 8 + int.from_bytes(good[-8:-4], "little")
    for name, content, reason in (
        ("text", b"a,b\n1,2\n" * 9, "Parquet magic bytes not found"),
        ("empty", b"", "size is 0 bytes"),
        ("cut", good[: len(good) // 2], "Parquet magic bytes not found"),
        ("footer", good[:-footer] + b"\xff" * (footer - 8) + good[-8:], "deserialize thrift"),
    ):
        file = tmp_path / f"{name}.parquet"
        file.write_bytes(content)
        message = error(file)
        assert message.startswith(f"config.data.path: {file} cannot be read (") and reason in message
        assert message.endswith("): download it again")
    write(tmp_path / "several" / "0.parquet")
    shutil.copy(tmp_path / "cut.parquet", tmp_path / "several" / "1.parquet")
    assert "several/1.parquet cannot be read" in error(tmp_path / "several")


def test_files_without_images(tmp_path):
    file = write(tmp_path / "a.parquet", [])
    assert error(file) == f"config.data.path='{file}' has no rows: give Parquet files with images"
    file = write(tmp_path / "b.parquet", image=..., text=["a"], number=[1])
    assert "b.parquet has no column of images (text: string, number: int64): give files with" in error(file)
    file = write(tmp_path / "c.parquet", mask=structs(PNGS))
    assert error(file).endswith("c.parquet has several columns of images (image, mask): write files with one of them")
    both = {name: {"_type": "Image"} for name in ("image", "mask")}
    file = write(tmp_path / "d.parquet", features=both, mask=structs(PNGS))
    assert "several columns of images (image, mask)" in error(file)
    paths = [{"bytes": None, "path": "0.png"}, None]
    file = write(tmp_path / "e.parquet", image=pa.array(paths, STRUCT))
    assert "has no bytes in its column 'image', at most the paths of images: give the folder of these" in error(file)


def test_a_shard_without_rows_is_no_mistake(tmp_path):
    write(tmp_path / "0.parquet", [])
    write(tmp_path / "1.parquet")
    np.testing.assert_array_equal(read(opened(tmp_path)), PICTURES)


def test_files_of_different_data_sets(tmp_path):
    write(tmp_path / "0.parquet", features=CLASSES, label=[0] * 12)
    write(tmp_path / "1.parquet", features={"label": {"names": ["a"], "_type": "ClassLabel"}}, label=[0] * 12)
    assert "1.parquet has other columns or classes than 0.parquet" in error(tmp_path)
    write(tmp_path / "1.parquet", image=..., picture=structs(PNGS))
    assert "('picture' and None, 'image' and 'label'): give the files of one data set" in error(tmp_path)


def test_pyarrow_is_missing(tmp_path, monkeypatch):
    file = write(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert error(file) == f"config.data.path='{file}' is a Parquet file, which pyarrow reads: pip install pyarrow"


# ---------------------------------------------------------------- the hub


def hub_cache(folder, files):
    """Writes {name: images} as huggingface_hub keeps them in its cache: links to blobs. Returns the snapshot."""
    root = folder / "datasets--someone--birds"
    snapshot = root / "snapshots" / "a1b2c3"
    for k, (name, images) in enumerate(files.items()):
        write(root / "blobs" / f"{k:064}", images, features=CLASSES, label=[1] * len(images))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(root / "blobs" / f"{k:064}", (snapshot / name).parent))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a1b2c3")
    return snapshot


FILES = {"data/train-00000-of-00001.parquet": PNGS[:8], "data/test-00000-of-00001.parquet": PNGS[8:]}


class Hub(types.SimpleNamespace):
    """Stands for huggingface_hub: a hub that has, online, the files of a snapshot."""

    def __init__(self, snapshot, online=True):
        super().__init__(snapshot=snapshot, online=online, calls=[], HfApi=lambda: self)

    def dataset_info(self, name, timeout):
        if not self.online:
            raise OSError("no\nnetwork")
        names = [file.relative_to(self.snapshot).as_posix() for file in self.snapshot.rglob("*.*")]
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(self, name, **options):
        self.calls.append((name, options))
        if not self.snapshot.exists():
            raise OSError("nothing here")
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a hub with a data set in the place of huggingface_hub."""
    fake = Hub(hub_cache(tmp_path / "hub", FILES))
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def hub_error(source):
    with pytest.raises(UserError) as raised:
        sources.open_source(source, "")
    message = str(raised.value)
    assert message.startswith(f"config.data.source='{source}' ") and "\n" not in message
    return message


def test_a_data_set_of_the_hub(hub, capsys):
    (hub.snapshot / "README.md").write_text("birds")
    Image.fromarray(PICTURES[0]).save(hub.snapshot / "logo.png")
    source = sources.open_source("hf:someone/birds", "")
    np.testing.assert_array_equal(read(source), PICTURES[:8])
    assert (source.origin, source.classes, labels(source)) == ("hf:someone/birds", ["cat", "dog"], [1] * 8)
    assert source.name(3) == "data/train-00000-of-00001.parquet[3]"
    np.testing.assert_array_equal(read(sources.open_source("hf:someone/birds", "", split="test[1:]")), PICTURES[9:])
    assert hub.calls[0] == ("someone/birds", {"repo_type": "dataset", "allow_patterns": ["*.parquet"]})
    assert "does not answer" not in capsys.readouterr().out


def test_the_cache_of_the_hub_serves_without_a_network(hub, capsys):
    hub.online = False
    np.testing.assert_array_equal(read(sources.open_source("hf:someone/birds", "")), PICTURES[:8])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("hf:someone/birds: the hub does not answer (no network), so its cache is used as it is")
    assert hub.calls[0][1]["local_files_only"] and len(lines) == 2
    shutil.rmtree(hub.snapshot)
    message = hub_error("hf:someone/birds")
    assert "cannot be fetched (no network) and is not in the hub's cache: check the name and the network" in message


def test_a_download_that_fails(hub, monkeypatch):
    def fail(*_, **options):
        raise OSError("the line\nis cut")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    assert hub_error("hf:someone/birds").endswith("cannot be fetched (the line is cut): try again")


@pytest.mark.parametrize("online", [True, False])
def test_parts_of_a_data_set(tmp_path, monkeypatch, online):
    files = {"small/train/0.parquet": PNGS[:2], "large/train-0.parquet": PNGS[2:], "large/test-0.parquet": PNGS[:1]}
    fake = Hub(hub_cache(tmp_path, files), online)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    for part, pictures in (("small", PICTURES[:2]), ("large", PICTURES[2:]), ("small/train", PICTURES[:2])):
        np.testing.assert_array_equal(read(sources.open_source(f"hf:someone/birds/{part}", "")), pictures)
    assert fake.calls[0][1]["allow_patterns"] == ["small/*.parquet"]
    assert "several parts, large, small: give one, 'hf:someone/birds/large'" in hub_error("hf:someone/birds")
    assert "no Parquet files in a folder 'tiny': give one of large, small" in hub_error("hf:someone/birds/tiny")


def test_folders_of_splits_are_no_parts(tmp_path, monkeypatch):
    files = {"train/0000.parquet": PNGS[:2], "test/0000.parquet": PNGS[2:]}
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(hub_cache(tmp_path, files)))
    np.testing.assert_array_equal(read(sources.open_source("hf:someone/birds", "", split="test")), PICTURES[2:])


def test_names_that_the_hub_cannot_have(hub, monkeypatch):
    for source in ("hf:", "hf:birds", "hf:someone/", "hf:someone/birds/../x", "hf:some one/birds"):
        assert "must be 'hf:<owner>/<name>' or 'hf:<owner>/<name>/<folder>'" in hub_error(source)
    shutil.rmtree(hub.snapshot / "data")
    (hub.snapshot / "birds.csv").write_text("a")
    assert hub_error("hf:someone/birds").endswith(
        "has no Parquet files: download its images and give their folder, --config.data.path=…"
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert hub_error("hf:someone/birds").endswith("is fetched from the Hugging Face hub: pip install huggingface_hub")


def test_a_config_of_the_hub_keeps_its_name(hub, tmp_path):
    config = tiny_config(data__source="hf:someone/birds", data__channels=3, data__cache_dir=str(tmp_path / "cache"))
    assert configs.with_absolute_paths(config).data.source == "hf:someone/birds"
    np.testing.assert_array_equal(parts.images(config)[:], PICTURES[:8])
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("hf-someone-birds-8x8x3-")


def test_a_file_of_the_cache_has_no_suffix_behind_its_link(hub):
    np.testing.assert_array_equal(read(opened(hub.snapshot / "data/train-00000-of-00001.parquet")), PICTURES[:8])


@pytest.mark.parametrize("path", ["data/train-00000-of-00001.parquet", "plain_text/train/0000.parquet"])
def test_the_cache_of_huggingface_hub(tmp_path, monkeypatch, capsys, path):
    constants = pytest.importorskip("huggingface_hub.constants")
    hub_cache(tmp_path / "hub", {path: PNGS[:5], path.replace("train", "test"): PNGS[5:]})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    np.testing.assert_array_equal(read(sources.open_source("hf:someone/birds", "")), PICTURES[:5])
    np.testing.assert_array_equal(read(sources.open_source("hf:someone/birds", "", split="test")), PICTURES[5:])
    assert "hf:someone/birds: the hub does not answer (" in capsys.readouterr().out
    assert "is not in the hub's cache" in hub_error("hf:someone/fish")
