"""TFDS's own builders write small files of the layouts that they expect."""

import ast
import contextlib
import functools
import gzip
import hashlib
import http.server
import inspect
import io
import json
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from factories import make_options

from fedmoe_jax.data import prepare as module
from fedmoe_jax.data.load import load_dataset
from fedmoe_jax.data.prepare import NEED_TENSORFLOW, prepare
from fedmoe_jax.data.stand_in import TENSORFLOW, NeedsTensorFlow, stand_in
from fedmoe_jax.options import UserError

TRAIN, TEST = 12, 5
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (TRAIN + TEST, 32, 32, 3), np.uint8)
GREY = RNG.integers(0, 256, (TRAIN + TEST, 28, 28, 1), np.uint8)
LABEL = (np.arange(TRAIN + TEST) % 10).astype(np.uint8)
TEXT = "ANNA:\nWe are one, ā.\n\n" * 40
PARTS = {"train": slice(TRAIN), "test": slice(TRAIN, None)}


def pack_idx(values):
    """The form of MNIST's files: a header, then bytes, by gzip."""
    header = bytes(16 if values.ndim > 1 else 8)
    return gzip.compress(header + values.tobytes())


def pack_mnist(prefix=""):
    """Images and labels of both parts, by the names of the files."""
    files = {}
    for part, name in (("train", "train"), ("test", "test" if prefix else "t10k")):
        chosen = PARTS[part]
        files[f"{prefix}{name}-images-idx3-ubyte.gz"] = pack_idx(GREY[chosen])
        files[f"{prefix}{name}-labels-idx1-ubyte.gz"] = pack_idx(LABEL[chosen])
    return files


def pack_emnist():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in pack_mnist("emnist-digits-").items():
            archive.writestr(f"gzip/{name}", content)
    return {"gzip.zip": buffer.getvalue()}


def pack_tar(folder, contents):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pack_cifar(labels, parts):
    """Rows of labels and planes, by the names of the members."""
    planes = COLOUR.transpose(0, 3, 1, 2).reshape(len(COLOUR), -1)
    rows = np.concatenate([*(each[:, None] for each in labels), planes], axis=1)
    return {name: rows[chosen].tobytes() for name, chosen in parts.items()}


def pack_cifar10():
    batches = [slice(3 * i, 3 * i + 3) for i in range(4)] + [slice(0)]
    parts = {f"data_batch_{i}.bin": part for i, part in enumerate(batches, 1)}
    files = pack_cifar([LABEL], parts | {"test_batch.bin": PARTS["test"]})
    files["batches.meta.txt"] = "\n".join((*map(str, range(10)), "", "")).encode()
    return {"cifar-10-binary.tar.gz": pack_tar("cifar-10-batches-bin", files)}


def pack_cifar100():
    parts = {f"{part}.bin": chosen for part, chosen in PARTS.items()}
    files = pack_cifar([LABEL // 5, LABEL], parts)
    for kind, count in (("fine", 100), ("coarse", 20)):
        names = "\n".join(f"{kind}{i}" for i in range(count))
        files[f"{kind}_label_names.txt"] = names.encode()
    return {"cifar-100-binary.tar.gz": pack_tar("cifar-100-binary", files)}


def pack_svhn():
    files = {}
    for part, chosen in (PARTS | {"extra": slice(1)}).items():
        buffer, label = io.BytesIO(), LABEL[chosen]
        # The digit 0 is stored as 10, and images along the last axis.
        y = np.where(label == 0, 10, label).astype(np.uint8)[:, None]
        x = np.moveaxis(COLOUR[chosen], 0, -1)
        scipy.io.savemat(buffer, {"X": x, "y": y})
        files[f"{part}_32x32.mat"] = buffer.getvalue()
    return files


IMAGES = {
    "mnist": (pack_mnist, GREY),
    "fashion_mnist": (pack_mnist, GREY),
    "emnist/digits": (pack_emnist, GREY),
    "cifar10": (pack_cifar10, COLOUR),
    "cifar100": (pack_cifar100, COLOUR),
    "svhn_cropped": (pack_svhn, COLOUR),
}


@pytest.fixture
def expect(monkeypatch):
    """Makes TFDS expect files of these contents, of few examples."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums
    from tensorflow_datasets.image_classification import mnist

    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", TRAIN)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", TEST)
    digits = mnist.EMNIST.builder_configs["digits"]
    monkeypatch.setattr(digits, "train_examples", TRAIN)
    monkeypatch.setattr(digits, "test_examples", TEST)

    def expect(name, files, url=""):
        kind = tfds.builder_cls(name.split("/")[0])
        known = kind.url_infos
        if url:
            monkeypatch.setattr(kind, "URL", url)
            known = {f"{url}{old.rpartition('/')[2]}": known[old] for old in known}
        infos = {}
        for place, info in known.items():
            content = files.get(info.filename, b"")
            sum_ = hashlib.sha256(content).hexdigest()
            infos[place] = checksums.UrlInfo(len(content), sum_, info.filename)
        monkeypatch.setattr(kind, "url_infos", infos)

    return expect


def write(folder, files):
    """The folder, with these files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


def listing(folder):
    return sorted(path.name for path in Path(folder).rglob("*"))


def load(name, folder, **changes):
    return load_dataset(make_options(name=name, dir=str(folder), **changes))


@pytest.mark.parametrize("name", IMAGES)
def test_prepare_images_from_files_by_hand(name, tmp_path, expect, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack, x = IMAGES[name]
    files = pack()
    expect(name, files)
    root = tmp_path / "tfds"
    source = prepare(name, root, write(tmp_path / "files", files))
    assert source.parent == root / name
    assert [path.name for path in root.iterdir()] == [name.split("/")[0]]
    data = load(name, root)
    for part, chosen in PARTS.items():
        rows = getattr(data, part)
        found = {i.tobytes(): int(y) for i, y in zip(rows["x"], rows["y"], strict=True)}
        expected = zip(x[chosen], LABEL[chosen], strict=True)
        assert found == {image.tobytes(): int(y) for image, y in expected}
    if (
        "id"
        in json.loads((source / "features.json").read_text())["featuresDict"][
            "features"
        ]
    ):  # in their original order, then
        np.testing.assert_array_equal(data.train["x"], x[:TRAIN])
    if name == "cifar100":
        assert data.stratum_names[7] == "fine7"
        coarse = load(name, root, label_key="coarse_label")
        np.testing.assert_array_equal(coarse.train["y"], LABEL[:TRAIN] // 5)
    monkeypatch.setattr(module, "build", None)  # what is there stays as it is
    assert prepare(name, root) == source


def test_prepare_shuffles_more_than_fits_into_memory(tmp_path, expect, monkeypatch):
    from tensorflow_datasets.core import shuffle

    files = pack_mnist()
    expect("mnist", files)
    folder, found = write(tmp_path / "files", files), []
    for most in (shuffle.MAX_MEM_BUFFER_SIZE, 1000):
        monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", most)
        source = prepare("mnist", tmp_path / str(most), folder)
        records = sorted(source.glob("*array_record*"))
        found.append([path.read_bytes() for path in records])
    assert len(found[0]) == 2 and found[0] == found[1]


def test_load_dataset_prepares_cifar10_where_it_is_absent(
    tmp_path, expect, monkeypatch
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    files = pack_cifar10()
    expect("cifar10", files)
    folder = write(tmp_path / "files", files)
    by_hand = functools.partial(prepare, manual_dir=folder)
    monkeypatch.setattr("fedmoe_jax.data.load.prepare", by_hand)
    data = load_dataset(make_options(name="cifar10"))
    np.testing.assert_array_equal(data.test["x"], COLOUR[TRAIN:])


def test_prepare_text_from_a_file_by_hand(tmp_path, expect):
    files = {"input.txt": TEXT.encode()}
    expect("tiny_shakespeare", files)
    prepare("tiny_shakespeare", tmp_path / "tfds", write(tmp_path / "files", files))
    data = load("tiny_shakespeare", tmp_path / "tfds", length=8)
    tokens, length = data.train["tokens"], data.train["length"]
    rows = [row[1:size] for row, size in zip(tokens, length, strict=True)]
    text = bytes([tokens[0, 0]]) + np.concatenate(rows).tobytes()
    assert text.decode() == TEXT[: int(0.9 * len(TEXT))]


def test_prepare_takes_the_config_that_tfds_takes(tmp_path, expect, monkeypatch):
    from tensorflow_datasets.image_classification.mnist import EMNIST

    digits = EMNIST.builder_configs["digits"]
    monkeypatch.setattr(EMNIST, "DEFAULT_BUILDER_CONFIG_NAME", digits.name)
    files = pack_emnist()
    expect("emnist", files)
    root, folder = tmp_path / "tfds", write(tmp_path / "files", files)
    source = prepare("emnist", root, folder)
    assert source.parent == root / "emnist" / "digits"
    monkeypatch.setattr(module, "build", None)
    assert prepare("emnist", root) == prepare("emnist/digits", root) == source


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        del arguments


@contextlib.contextmanager
def serve(folder):
    """The address of a server of a folder."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_prepare_downloads_what_it_is_not_given(tmp_path, expect):
    files = pack_mnist()
    with serve(write(tmp_path / "served", files)) as url:
        expect("mnist", files, url)
        source = prepare("mnist", tmp_path / "new" / "tfds")
    assert (source / "dataset_info.json").exists()
    assert [path.name for path in (tmp_path / "new" / "tfds").iterdir()] == ["mnist"]


def refuse(told, root, name="mnist", folder=""):
    """The one line in which the data set is refused; nothing is left of it."""
    with pytest.raises(UserError, match=told) as error:
        prepare(name, root, folder)
    assert "\n" not in str(error.value) and "; allowed: " in str(error.value)
    assert not root.exists()
    return str(error.value)


def test_prepare_without_network_says_what_to_run(tmp_path, expect):
    root = tmp_path / "tfds"
    expect("mnist", {}, "http://127.0.0.1:9/")
    message = refuse("127.0.0.1 cannot be reached: ConnectionError", root)
    assert f"'python -m fedmoe_jax.data mnist --data_dir={root}' on a mac" in message
    assert "--manual_dir=FOLDER" in message


def test_prepare_does_not_wait_for_a_silent_server(tmp_path, expect, monkeypatch):
    monkeypatch.setattr(module, "READ", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        expect("mnist", {}, f"http://127.0.0.1:{server.getsockname()[1]}/")
        refuse("127.0.0.1 cannot be reached: ", tmp_path / "tfds")


def test_prepare_does_not_retry_a_server_without_the_file(tmp_path, expect):
    with serve(write(tmp_path / "served", {})) as url:
        expect("mnist", {}, url)
        refuse("DownloadError: Failed to get url .*404", tmp_path / "tfds")


def test_prepare_leaves_nothing_of_a_wrong_or_truncated_file(tmp_path, expect):
    (whole,) = pack_cifar10().values()
    name, root = "cifar-10-binary.tar.gz", tmp_path / "tfds"
    folder = write(tmp_path / "files", {name: whole[:-1000]})
    expect("cifar10", {name: whole})
    refuse("NonMatchingChecksumError", root, "cifar10", folder)
    expect("cifar10", {name: whole[:-1000]})
    refuse("Error while extracting|EOFError|ReadError", root, "cifar10", folder)
    other = root / "cifar10" / "1.0.0"
    other.mkdir(parents=True)
    with pytest.raises(UserError):
        prepare("cifar10", root, folder)
    assert listing(root) == ["1.0.0", "cifar10"]


def test_prepare_refuses_a_folder_without_the_file(tmp_path, expect):
    files = pack_mnist()
    expect("mnist", files)
    del files["train-labels-idx1-ubyte.gz"]
    told = "manual_dir='.*files' holds no train-labels-idx1-ubyte.gz"
    refuse(told, tmp_path / "tfds", folder=write(tmp_path / "files", files))


def test_prepare_leaves_no_config_behind(tmp_path, expect):
    expect("emnist", {})
    folder = write(tmp_path / "files", {})
    refuse("holds no gzip.zip", tmp_path / "tfds", "emnist/digits", folder)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing", "data.name='nothing' is unknown to TFDS; allowed: a name of its"),
        ("../mnist", "unknown to TFDS; allowed: a name such as mnist"),
        ("mnist/all", "data.name='mnist/all' is unknown to TFDS; allowed: mnist"),
        ("emnist/all", "unknown to TFDS; allowed: emnist/byclass, emnist/bymerge, "),
        ("cats_vs_dogs", "needs operations of TensorFlow; .* 'pip install tensorf"),
        ("titanic", "its builder needs tf.string of TensorFlow; allowed: "),
        ("robomimic_ph", "its builder needs the package h5py; allowed: "),
        ("imagenet2012", "AssertionError: Manual directory .* does not exist"),
    ],
)
def test_prepare_refuses_what_it_cannot_do(name, told, tmp_path):
    refuse(told, tmp_path / "tfds", name)


def test_prepare_names_a_fresh_folder_beside_tfrecords(tmp_path):
    source = tmp_path / "emnist" / "digits" / "3.1.0"
    source.mkdir(parents=True)
    (source / "dataset_info.json").write_text("{}")
    beside = tmp_path / "array_record"
    told = f"holds tfrecord files, .* emnist/digits --data_dir={beside}', then set "
    with pytest.raises(UserError, match=told) as error:
        prepare("emnist/digits", tmp_path)
    assert "\n" not in str(error.value)


def list_operations(kind):
    """What the modules of a builder use of TensorFlow beyond the stand-in."""
    found = set()
    for each in kind.__mro__:
        if not each.__module__.startswith("tensorflow_datasets.core"):
            with contextlib.suppress(TypeError, OSError):
                found |= list_members(inspect.getsource(sys.modules[each.__module__]))

    def stands_in(member):
        try:
            functools.reduce(getattr, member.split(".")[1:], TENSORFLOW)
        except NeedsTensorFlow:
            return False
        return True

    return {member for member in found if not stands_in(member)}


def list_members(source):
    """Members of `tf` in a source, but for types of arguments and results."""
    tree, left = ast.parse(source), set()
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                left |= {id(each) for each in ast.walk(getattr(node, field))}
    nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    names = {ast.unparse(node) for node in nodes if id(node) not in left}
    found = {name for name in names if name.startswith("tf.")}
    return {x for x in found if not any(y.startswith(f"{x}.") for y in found)}


@pytest.mark.slow
def test_builders_of_labelled_images_that_need_tensorflow_are_known():
    """Of the whole catalogue; builders that cannot be made are refused by name."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import features

    needing, images = set(), 0
    for name in tfds.list_builders(with_community_datasets=False):
        with stand_in(), contextlib.suppress(Exception):
            kind = tfds.builder_cls(name)
            found = kind(data_dir="/nowhere").info.features
            kinds = {type(each) for each in dict(found.items()).values()}
            if {features.Image, features.ClassLabel} <= kinds:
                images += 1
                needing |= {name} if list_operations(kind) else set()
    assert images > 70 and needing == set(NEED_TENSORFLOW)


@pytest.mark.slow
def test_main_prepares_or_refuses_in_one_line(tmp_path):
    def command(*arguments):
        line = [sys.executable, "-m", "fedmoe_jax.data", *arguments]
        return subprocess.run(line, capture_output=True, text=True)

    records = tmp_path / "ready" / "cifar10" / "3.0.2"
    records.mkdir(parents=True)
    info = json.dumps({"fileFormat": "array_record"})
    (records / "dataset_info.json").write_text(info)
    ready = command("cifar10", f"--data_dir={tmp_path / 'ready'}")
    assert ready.returncode == 0
    assert f"data.name=cifar10 and TFDS_DATA_DIR={tmp_path / 'ready'}" in ready.stdout
    (tmp_path / "manual").mkdir()
    manual = f"--manual_dir={tmp_path / 'manual'}"
    folder = f"--data_dir={tmp_path / 'tfds'}"
    for names, told in (
        (["cifar10"], "holds no cifar-10-binary.tar.gz"),
        ([], "allowed: the name of one data set"),
        (["cifar10", "mnist"], "allowed: the name of one data set"),
    ):
        refused = command(*names, folder, manual)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1 and told in refused.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"ready", "manual"}
