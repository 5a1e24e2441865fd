"""Prepared TFDS data sets are read by their features, without TensorFlow."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from factories import make_options

from fedmoe_jax.data import tfds
from fedmoe_jax.data.load import load_dataset
from fedmoe_jax.options import UserError

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (15, 28, 28, 1), np.uint8)
COARSE, FINE = np.arange(15) % 2, np.arange(15) % 3
TRAIN = 10


def prepare(root, features, examples, name="tiny", version="1.0.0"):
    """Writes a data set in array_record form; `examples` maps splits to dicts."""
    import tensorflow_datasets as source

    def describe(builder):
        return source.core.DatasetInfo(builder=builder, features=features)

    fields = {
        "VERSION": source.core.Version(version),
        "pkg_dir_path": None,
        "_info": describe,
        "_split_generators": lambda builder, manager: {
            split: enumerate(rows) for split, rows in examples.items()
        },
        "_generate_examples": None,
    }
    with source.core.registered.skip_registration():
        kind = type(name.title(), (source.core.GeneratorBasedBuilder,), fields)
        kind.__abstractmethods__ = frozenset()
    builder = kind(data_dir=str(root), file_format="array_record")
    builder.download_and_prepare(
        download_config=source.download.DownloadConfig(try_download_gcs=False)
    )
    return root / name / version


def list_rows(places, **changes):
    from PIL import Image

    def row(i):
        png = Image.fromarray(X[i, ..., 0])
        return {"image": png, "fine": int(FINE[i]), "coarse": int(COARSE[i])}

    return [row(i) | {k: f(i) for k, f in changes.items()} for i in places]


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory):
    """Images with two labels, one of them a class with names."""
    import tensorflow_datasets as source

    root = tmp_path_factory.mktemp("tfds")
    features = source.features.FeaturesDict(
        {
            "image": source.features.Image(shape=(28, 28, 1)),
            "fine": source.features.ClassLabel(names=["a", "b", "c"]),
            "coarse": np.int64,
            "weight": np.float32,
        }
    )
    rows = list_rows(range(15), weight=lambda i: 0.5)
    prepare(root, features, {"train": rows[:TRAIN], "test": rows[TRAIN:]})
    return root


@pytest.fixture
def root(prepared_once, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(prepared_once, tmp_path / "tfds"))


def load(root, **changes):
    return load_dataset(make_options(name="tiny", dir=str(root), **changes))


def pair(data, split):
    """The labels of one split, by the images that they belong to."""
    x, y = getattr(data, split)["x"], getattr(data, split)["y"]
    return {image.tobytes(): int(label) for image, label in zip(x, y, strict=True)}


def test_load_dataset_reads_images_and_the_label_that_is_named(root, capsys):
    for key, labels in (("fine", FINE), ("coarse", COARSE)):
        data = load(root, label_key=key)
        names = ("a", "b", "c") if key == "fine" else ("0", "1")
        assert data.stratum_names == names and data.task == "images"
        expected = {x.tobytes(): y for x, y in zip(X, labels, strict=True)}
        assert pair(data, "train") | pair(data, "test") == expected
        assert len(data.train["x"]) == TRAIN
    assert capsys.readouterr().err.count("decoding tiny from") == 2
    load(root, label_key="fine")  # from its own copy
    assert capsys.readouterr().err == ""


@pytest.fixture
def no_decoding(monkeypatch):
    def fail(*arguments):
        raise AssertionError("decoded although a decoded copy exists")

    return lambda: monkeypatch.setattr(tfds, "decode", fail)


def find_records(root):
    return root / "tiny" / "1.0.0"


def assert_whole(data):
    expected = {x.tobytes(): y for x, y in zip(X, FINE, strict=True)}
    assert pair(data, "train") | pair(data, "test") == expected


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "digest"])
def test_load_dataset_makes_a_damaged_copy_again(root, damage, no_decoding, capsys):
    load(root, label_key="fine")
    (folder,) = (find_records(root) / "fedmoe_jax").iterdir()
    path = folder / "train_x.npy"
    whole = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(whole[:-1])
    elif damage == "flip":
        path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    elif damage == "remove":
        path.unlink()
    else:
        (folder / "sha256.json").write_text("[]")
    capsys.readouterr()
    assert_whole(load(root, label_key="fine"))
    warned = [x for x in capsys.readouterr().err.splitlines() if "warning" in x]
    assert len(warned) == 1
    assert warned[0].startswith(f"warning: decoded images in {folder} are damaged (")
    no_decoding()  # a whole copy is in its place
    assert_whole(load(root, label_key="fine"))
    assert capsys.readouterr().err == ""


def test_load_dataset_caches_a_read_only_folder_for_the_user(root, no_decoding):
    listing = lambda: sorted(root.rglob("*"))
    before = listing()
    find_records(root).chmod(0o555)
    assert_whole(load(root, label_key="fine"))
    assert listing() == before
    (kept,) = (Path(os.environ["XDG_CACHE_HOME"]) / "fedmoe_jax").iterdir()
    assert kept.name.startswith("tiny-")
    no_decoding()
    assert_whole(load(root, label_key="fine"))


def test_load_dataset_decodes_changed_records_again(root, no_decoding):
    load(root, label_key="fine")
    (records,) = find_records(root).glob("tiny-test*")
    os.utime(records, ns=(1, 1))
    no_decoding()
    with pytest.raises(AssertionError, match="decoded although"):
        load(root, label_key="fine")


def test_load_dataset_loads_where_nothing_can_be_written(root, monkeypatch, capsys):
    find_records(root).chmod(0o555)
    file = root.parent / "file"
    file.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert_whole(load(root, label_key="fine"))
    assert "decoded images are not kept" in capsys.readouterr().err


@pytest.mark.slow
def test_load_dataset_of_the_real_cifar10():
    where = os.environ.get("TFDS_DATA_DIR", "")
    if not tfds.find_source(Path(where), "cifar10"):
        pytest.skip("CIFAR-10 is not in TFDS_DATA_DIR")
    found = load_dataset(make_options(name="cifar10"))
    assert found.train["x"].shape == (50000, 32, 32, 3)
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    assert found.stratum_names == tuple(names.split())
    np.testing.assert_array_equal(np.bincount(found.train["y"]), [5000] * 10)
    np.testing.assert_array_equal(np.bincount(found.test["y"]), [1000] * 10)
    # Channel means as commonly published for the training images.
    means = found.train["x"].mean((0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=1e-3)


def test_load_dataset_takes_the_newest_version(root):
    assert tfds.find_source(root, "tiny") == root / "tiny" / "1.0.0"
    for version in ("1.0.9", "1.0.10", "notes"):
        (root / "tiny" / version).mkdir()
        (root / "tiny" / version / tfds.INFO).touch()
    assert tfds.find_source(root, "tiny").name == "1.0.10"
    assert tfds.find_source(root, "../tiny") is tfds.find_source(root, "big") is None


def change_features(root, **changes):
    path = root / "tiny" / "1.0.0" / "features.json"
    tree = json.loads(path.read_text())
    tree["featuresDict"]["features"] |= changes
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokenizer", "t.json"), ("client", "speaker"), ("kilobytes", 1), ("length", 9)],
)
def test_load_dataset_of_images_refuses_fields_of_text_before_it_decodes(
    root, capsys, field, value
):
    told = f"data.{field}={value!r} .* data.name='tiny', which does not read it; allow"
    with pytest.raises(UserError, match=told):
        load(root, label_key="fine", **{field: value})
    assert capsys.readouterr().err == ""


def test_load_dataset_says_which_keys_there_are(root):
    for label in ("", "image", "weight", "none"):
        with pytest.raises(UserError) as error:
            load(root, label_key=label)
        told = f"data.label_key={label!r} is not allowed; allowed: coarse, fine"
        assert str(error.value) == told
    change_features(root, label={"classLabel": {"numClasses": "3"}})
    features = tfds.read_features(root / "tiny" / "1.0.0")
    assert tfds.choose_key(features, "data.label_key", "", "label") == "label"
    with pytest.raises(UserError, match="data.image_key='x' .* allowed: image"):
        load(root, label_key="fine", image_key="x")


def test_load_dataset_names_features_that_cannot_be_read(root):
    path = root / "tiny" / "1.0.0" / "features.json"
    path.write_text("[]")
    with pytest.raises(UserError, match="features.json cannot be read"):
        load(root)


def test_load_dataset_refuses_tfrecords(root):
    path = root / "tiny" / "1.0.0" / tfds.INFO
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="holds tfrecord files, allowed: array_record"):
        load(root, label_key="fine")


def test_load_dataset_names_damaged_records(root):
    (records,) = (root / "tiny" / "1.0.0").glob("*test.array_record*")
    content = bytearray(records.read_bytes())
    content[len(content) // 2] ^= 1
    records.write_bytes(content)
    with pytest.raises(UserError, match="the records in .* are damaged") as error:
        load(root, label_key="fine")
    assert "\n" not in str(error.value)
    assert not (find_records(root) / "fedmoe_jax").exists()


@pytest.mark.parametrize("case", ["split", "sizes", "labels", "huge", "sparse"])
def test_load_dataset_refuses_what_no_task_can_use(tmp_path, case):
    import tensorflow_datasets as source
    from PIL import Image

    features = source.features.FeaturesDict(
        {"image": source.features.Image(shape=(None, None, 1)), "label": np.int64}
    )
    grow = lambda i: Image.fromarray(np.zeros((4 + i, 4), np.uint8))
    same = lambda i: Image.fromarray(np.zeros((4, 4), np.uint8))
    image = grow if case == "sizes" else same
    labels = {"labels": [-1, 0, 1], "huge": [0, 1, 2**40], "sparse": [0, 1, 3000]}
    label = lambda i: labels.get(case, [0, 1, 2])[i]
    rows = [{"image": image(i), "label": label(i)} for i in range(3)]
    splits = {"train": rows} | ({} if case == "split" else {"test": rows})
    prepare(tmp_path, features, splits)
    told = {
        "split": "has no split 'test'; allowed: .* this has train",
        "sizes": r"has images of \[4, 4, 1\] and \[5, 4, 1\] pixels; allowed: one size",
        "labels": "label_key='label' has 3 different labels from -1 to 1; allowed: 0 ",
        "huge": "label_key='label' has 3 different labels from 0 to 1099511627776; al",
        "sparse": "has 3 different labels from 0 to 3000; allowed: 0 to 2, as at least",
    }
    with pytest.raises(UserError, match=told[case]) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_load_dataset_sorts_by_the_id(tmp_path):
    import tensorflow_datasets as source

    features = source.features.FeaturesDict(
        {
            "id": source.features.Text(),
            "image": source.features.Image(shape=(28, 28, 1)),
            "label": np.int64,
        }
    )
    rows = [
        {k: row[k] for k in ("id", "image", "label")}
        for row in list_rows(
            range(15), id=lambda i: f"x_{99 - i}", label=lambda i: int(FINE[i])
        )
    ]
    prepare(tmp_path, features, {"train": rows[:TRAIN], "test": rows[TRAIN:]})
    data = load(tmp_path)
    np.testing.assert_array_equal(data.train["x"], X[:TRAIN][::-1])
    np.testing.assert_array_equal(data.test["y"], FINE[TRAIN:][::-1])
