"""Data sets are what they say, and bad or absent data ends in one clear line."""

import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier

from fedmoe_jax.data import cache, cifar10, synthetic
from fedmoe_jax.data import load as data
from fedmoe_jax.options import UserError

NAMES = ("airplane", "automobile", "bird", "cat", "deer")
NAMES += ("dog", "frog", "horse", "ship", "truck")
PER_FILE = 7  # images in each member of the small archive


# --- tasks that need no files


def test_unknown_name_is_one_line():
    with pytest.raises(UserError) as error:
        data.load_dataset("mnist", "")
    assert str(error.value) == (
        "data.name='mnist' is unknown; allowed: digits, synthetic, cifar10"
    )


def test_digits_are_rescaled_and_split_evenly():
    digits = data.load_dataset("digits", "")
    assert digits.train["x"].shape == (1437, 8, 8, 1)
    assert digits.test["x"].shape == (360, 8, 8, 1)
    assert digits.stratum_names == tuple("0123456789")
    assert digits.train["x"].min() == 0 and digits.train["x"].max() == 255
    everything = np.concatenate([digits.train["x"], digits.test["x"]]).reshape(1797, -1)
    source = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    np.testing.assert_array_equal(
        np.sort(everything.view("V64").ravel()), np.sort(source.view("V64").ravel())
    )
    counts = np.bincount(digits.test["y"])
    np.testing.assert_allclose(counts, np.bincount(load_digits().target) / 5, atol=1)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_arrays_are_the_same_every_time(name):
    np.random.seed(1)
    first = data.load_dataset(name, "")
    np.random.seed(2)
    again = data.load_dataset(name, "")
    jax.tree.map(np.testing.assert_array_equal, first[:4], again[:4])
    assert first[4:] == again[4:]


def test_synthetic_answer_is_known():
    task = data.load_dataset("synthetic", "")
    assert task.train["x"].shape == (4096, 8, 8, 1)
    np.testing.assert_array_equal(np.bincount(task.train["y"]), [256] * 16)
    np.testing.assert_array_equal(np.bincount(task.test["y"]), [64] * 16)
    x, test_x = (
        np.reshape(a / 255, (len(a), -1)) for a in (task.train["x"], task.test["x"])
    )
    y, test_y = task.train["y"], task.test["y"]
    group, test_group = synthetic.synthetic_group(y), synthetic.synthetic_group(test_y)

    pooled = RidgeClassifier().fit(x, y).score(test_x, test_y)
    experts = [RidgeClassifier().fit(x[group == g], y[group == g]) for g in range(4)]
    pairs = [(test_x[test_group == g], test_y[test_group == g]) for g in range(4)]
    own = [e.score(*pair) for e, pair in zip(experts, pairs, strict=True)]
    linear_group = RidgeClassifier().fit(x, group).score(test_x, test_group)

    assert min(own) > 0.97
    assert pooled < 0.4
    assert linear_group < 0.35


def test_synthetic_groups_disagree_about_every_pattern():
    task = data.load_dataset("synthetic", "")
    # The bright bar of the lower half, found without the labels.
    bars = task.train["x"][:, 4:, :, 0].reshape(-1, 4, 4, 2).mean((1, 3)).argmax(1)
    group = synthetic.synthetic_group(task.train["y"])
    meaning = np.zeros((4, 4), int)
    for g in range(4):
        for bar in range(4):
            chosen = task.train["y"][(group == g) & (bars == bar)] % 4
            meaning[g, bar] = np.bincount(chosen).argmax()
    np.testing.assert_array_equal(
        meaning, [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]]
    )


def test_best_group_is_the_largest_share():
    counts = np.zeros((3, 16), int)
    counts[0, [3, 4, 5]] = [5, 3, 3]  # 5 of group 0, 6 of group 1
    counts[1, 15] = 1
    counts[2, [0, 8]] = 2  # a tie goes to the lower group
    np.testing.assert_array_equal(synthetic.best_group(counts), [1, 3, 0])


def test_arrays_that_do_not_fit_are_refused():
    digits = data.load_dataset("digits", "")
    for change in (
        {"stratum": digits.stratum[1:]},
        {"stratum": digits.stratum + 1},
        {"test": {"x": digits.test["x"]}},
        {"test": digits.test | {"x": digits.test["x"][:, 1:]}},
        {"owner": digits.stratum[1:]},
    ):
        with pytest.raises((AssertionError, ValueError)):
            data.check_data(digits._replace(**change))


# --- CIFAR-10


@pytest.fixture(scope="module")
def small():
    """Images, labels and the archive in the layout of the real one."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (6 * PER_FILE, 32, 32, 3), np.uint8)
    y = rng.integers(0, 10, 6 * PER_FILE).astype(np.uint8)
    rows = np.concatenate([y[:, None], x.transpose(0, 3, 1, 2).reshape(len(x), -1)], 1)
    contents = {"batches.meta.txt": "\n".join((*NAMES, "", "")).encode()}
    files = [*cifar10.MEMBERS["train"], *cifar10.MEMBERS["test"]]
    for name, part in zip(files, np.split(rows, 6), strict=True):
        contents[name] = part.tobytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return x, y, buffer.getvalue()


def expect_archive(patch, url, archive):
    """Makes TFDS expect the given archive at the given address."""
    from tensorflow_datasets.core.download import checksums
    from tensorflow_datasets.image_classification.cifar import Cifar10

    checksum = hashlib.sha256(archive).hexdigest()
    info = checksums.UrlInfo(len(archive), checksum, cifar10.ARCHIVE)
    patch.setattr(Cifar10, "url_infos", {url: info})
    patch.setattr(cifar10, "URL", url)


@pytest.fixture(scope="module")
def prepared_once(small, tmp_path_factory):
    """A folder prepared from the small archive, fetched by hand."""
    root = tmp_path_factory.mktemp("prepared")
    (root / "manual").mkdir()
    (root / "manual" / cifar10.ARCHIVE).write_bytes(small[2])
    with pytest.MonkeyPatch.context() as patch:
        expect_archive(patch, cifar10.URL, small[2])
        cifar10.prepare_cifar10(root / "tfds", str(root / "manual"))
    return root / "tfds"


@pytest.fixture
def tfds_dir(prepared_once, tmp_path, monkeypatch):
    """A copy to spoil, and a user cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(prepared_once, tmp_path / "tfds"))


@pytest.fixture
def no_decoding(monkeypatch):
    def fail(source):
        raise AssertionError("decoded although a decoded copy exists")

    return lambda: monkeypatch.setattr(cifar10, "_decode", fail)


def listing(folder):
    return sorted(path for path in Path(folder).rglob("*"))


def assert_is_small(found, small):
    x, y, _ = small
    np.testing.assert_array_equal(found.train["x"], x[: 5 * PER_FILE])
    np.testing.assert_array_equal(found.test["x"], x[5 * PER_FILE :])
    np.testing.assert_array_equal(found.train["y"], y[: 5 * PER_FILE])
    np.testing.assert_array_equal(found.test["y"], y[5 * PER_FILE :])
    assert found.stratum_names == NAMES


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def test_prepared_by_hand_is_read_in_original_order(tfds_dir, small, no_decoding):
    assert_is_small(data.load_dataset("cifar10", str(tfds_dir)), small)
    no_decoding()
    assert_is_small(data.load_dataset("cifar10", str(tfds_dir)), small)
    assert sorted(p.name for p in tfds_dir.iterdir()) == ["cifar10"]


def test_downloads_when_absent(small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "new" / "tfds"))
    served = tmp_path / "served"
    served.mkdir()
    (served / cifar10.ARCHIVE).write_bytes(small[2])
    handler = functools.partial(Quiet, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{cifar10.ARCHIVE}"
        expect_archive(monkeypatch, url, small[2])
        assert_is_small(data.load_dataset("cifar10", ""), small)
        server.shutdown()
    assert [p.name for p in (tmp_path / "new" / "tfds").iterdir()] == ["cifar10"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        del arguments


def test_no_network_says_what_to_run_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(UserError) as error:
        data.load_dataset("cifar10", str(tmp_path / "tfds"))
    message = one_line(error)
    assert f"python -m fedmoe_jax.data --data_dir={tmp_path / 'tfds'}" in message
    assert "config.data.name=digits" in message
    assert "127.0.0.1 cannot be reached" in message
    assert listing(tmp_path) == []


def test_server_without_the_archive_is_not_retried(tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    handler = functools.partial(Quiet, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{cifar10.ARCHIVE}"
        monkeypatch.setattr(cifar10, "URL", url)
        with pytest.raises(UserError, match="HTTPError") as error:
            data.load_dataset("cifar10", str(tmp_path / "tfds"))
        server.shutdown()
    one_line(error)
    assert listing(tmp_path) == [served]


def test_wrong_or_truncated_archive_leaves_nothing(small, tmp_path, monkeypatch):
    archive = tmp_path / "manual" / cifar10.ARCHIVE
    archive.parent.mkdir()
    archive.write_bytes(small[2][:-1000])
    for expected, reason in [
        (small[2], "NonMatchingChecksumError"),
        (small[2][:-1000], "EOFError|BadGzipFile|ReadError"),
    ]:
        expect_archive(monkeypatch, cifar10.URL, expected)
        with pytest.raises(UserError, match=reason) as error:
            cifar10.prepare_cifar10(tmp_path / "tfds", str(archive.parent))
        one_line(error)
        assert listing(tmp_path) == [archive.parent, archive]


def test_manual_folder_without_the_archive(tmp_path):
    with pytest.raises(UserError, match=cifar10.ARCHIVE) as error:
        cifar10.prepare_cifar10(tmp_path / "tfds", str(tmp_path))
    one_line(error)
    assert listing(tmp_path) == []


def test_tfrecord_folder_names_a_fresh_one(tfds_dir):
    info = tfds_dir / "cifar10" / cifar10.VERSION / "dataset_info.json"
    content = json.loads(info.read_text())
    del content["fileFormat"]
    info.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        data.load_dataset("cifar10", str(tfds_dir))
    message = one_line(error)
    assert str(info.parent) in message
    assert f"--data_dir={tfds_dir / 'array_record'}" in message


def test_damaged_records_are_named(tfds_dir):
    source = tfds_dir / "cifar10" / cifar10.VERSION
    (records,) = source.glob("cifar10-test.array_record*")
    content = bytearray(records.read_bytes())
    content[len(content) // 2] ^= 1
    records.write_bytes(content)
    with pytest.raises(UserError) as error:
        data.load_dataset("cifar10", str(tfds_dir))
    assert str(source) in one_line(error)
    assert not (source / "fedmoe_jax").exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "digest"])
def test_damaged_cache_says_what_to_delete(tfds_dir, small, damage):
    data.load_dataset("cifar10", str(tfds_dir))
    (folder,) = (tfds_dir / "cifar10" / cifar10.VERSION / "fedmoe_jax").iterdir()
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
    with pytest.raises(UserError) as error:
        data.load_dataset("cifar10", str(tfds_dir))
    assert f"delete {folder}," in one_line(error)
    shutil.rmtree(folder)
    assert_is_small(data.load_dataset("cifar10", str(tfds_dir)), small)


def test_read_only_folder_is_cached_for_the_user(tfds_dir, small, no_decoding):
    source = tfds_dir / "cifar10" / cifar10.VERSION
    before = listing(tfds_dir)
    source.chmod(0o555)
    assert_is_small(data.load_dataset("cifar10", str(tfds_dir)), small)
    assert listing(tfds_dir) == before
    (kept,) = (Path(os.environ["XDG_CACHE_HOME"]) / "fedmoe_jax").iterdir()
    assert kept.name.startswith("cifar10-")
    no_decoding()
    assert_is_small(data.load_dataset("cifar10", str(tfds_dir)), small)


def test_changed_records_are_decoded_again(tfds_dir, small, no_decoding):
    data.load_dataset("cifar10", str(tfds_dir))
    (records,) = (tfds_dir / "cifar10" / cifar10.VERSION).glob("cifar10-test*")
    os.utime(records, ns=(1, 1))
    no_decoding()
    with pytest.raises(AssertionError, match="decoded although"):
        data.load_dataset("cifar10", str(tfds_dir))


def test_nowhere_to_write_still_loads(tfds_dir, small, monkeypatch, capsys):
    (tfds_dir / "cifar10" / cifar10.VERSION).chmod(0o555)
    file = tfds_dir.parent / "file"
    file.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert_is_small(data.load_dataset("cifar10", str(tfds_dir)), small)
    assert "cannot keep decoded arrays" in capsys.readouterr().err


def test_interrupted_write_leaves_no_cache(tmp_path, monkeypatch):
    def fail(path, value):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError):
        cache.write_cache(tmp_path / "kept", data.load_dataset("digits", "").train)
    assert listing(tmp_path) == []


def test_two_writers_leave_one_whole_cache(tmp_path):
    digits = data.load_dataset("digits", "")
    for _ in range(2):
        cache.write_cache(tmp_path / "kept", digits.train)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    found = cache.read_cache(tmp_path / "kept", ("x", "y"))
    for name, value in digits.train.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.slow
def test_command_line(prepared_once, tmp_path):
    def command(*arguments):
        line = [sys.executable, "-m", "fedmoe_jax.data", *arguments]
        return subprocess.run(line, capture_output=True, text=True)

    ready = command(f"--data_dir={prepared_once}")
    assert ready.returncode == 0
    assert f"TFDS_DATA_DIR={prepared_once}" in ready.stdout
    refused = command(f"--data_dir={tmp_path / 'tfds'}", f"--manual_dir={tmp_path}")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1 and cifar10.ARCHIVE in refused.stderr
    assert listing(tmp_path) == []


@pytest.mark.slow
def test_real_cifar10():
    where = os.environ.get("TFDS_DATA_DIR", "")
    if not (Path(where) / "cifar10" / cifar10.VERSION / "dataset_info.json").exists():
        pytest.skip("CIFAR-10 is not in TFDS_DATA_DIR")
    found = data.load_dataset("cifar10", "")
    assert found.train["x"].shape == (50000, 32, 32, 3)
    assert found.stratum_names == NAMES
    np.testing.assert_array_equal(np.bincount(found.train["y"]), [5000] * 10)
    np.testing.assert_array_equal(np.bincount(found.test["y"]), [1000] * 10)
    # Channel means as commonly published for the training images.
    means = found.train["x"].mean((0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=1e-3)
