"""CIFAR-10 is prepared, decoded and kept, or refused in one clear line."""

import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from factories import make_options

from fedmoe_jax.data import cifar10, tfds
from fedmoe_jax.data.load import load_dataset
from fedmoe_jax.options import UserError

NAMES = ("airplane", "automobile", "bird", "cat", "deer")
NAMES += ("dog", "frog", "horse", "ship", "truck")
PER_FILE = 7  # images in each member of the small archive


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
    def fail(*arguments):
        raise AssertionError("decoded although a decoded copy exists")

    return lambda: monkeypatch.setattr(tfds, "decode", fail)


def load_from(folder):
    return cifar10.load_cifar10(make_options(dir=str(folder)))


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


def test_load_cifar10_prepared_by_hand_is_in_original_order(
    tfds_dir, small, no_decoding
):
    assert_is_small(load_from(tfds_dir), small)
    no_decoding()
    assert_is_small(load_from(tfds_dir), small)
    assert sorted(p.name for p in tfds_dir.iterdir()) == ["cifar10"]


def test_load_cifar10_downloads_when_absent(small, tmp_path, monkeypatch):
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
        assert_is_small(load_dataset(make_options(name="cifar10")), small)
        server.shutdown()
    assert [p.name for p in (tmp_path / "new" / "tfds").iterdir()] == ["cifar10"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        del arguments


def test_load_cifar10_without_network_says_what_to_run_and_leaves_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(UserError) as error:
        load_from(tmp_path / "tfds")
    message = one_line(error)
    assert f"python -m fedmoe_jax.data --data_dir={tmp_path / 'tfds'}" in message
    assert "config.data.name=digits" in message
    assert "127.0.0.1 cannot be reached" in message
    assert listing(tmp_path) == []


def test_load_cifar10_does_not_retry_a_server_without_the_archive(
    tmp_path, monkeypatch
):
    served = tmp_path / "served"
    served.mkdir()
    handler = functools.partial(Quiet, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{cifar10.ARCHIVE}"
        monkeypatch.setattr(cifar10, "URL", url)
        with pytest.raises(UserError, match="HTTPError") as error:
            load_from(tmp_path / "tfds")
        server.shutdown()
    one_line(error)
    assert listing(tmp_path) == [served]


def test_prepare_cifar10_leaves_nothing_of_a_wrong_or_truncated_archive(
    small, tmp_path, monkeypatch
):
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


def test_prepare_cifar10_refuses_a_manual_folder_without_the_archive(tmp_path):
    with pytest.raises(UserError, match=cifar10.ARCHIVE) as error:
        cifar10.prepare_cifar10(tmp_path / "tfds", str(tmp_path))
    one_line(error)
    assert listing(tmp_path) == []


def test_load_cifar10_names_a_fresh_folder_beside_tfrecords(tfds_dir):
    info = tfds_dir / "cifar10" / cifar10.VERSION / "dataset_info.json"
    content = json.loads(info.read_text())
    del content["fileFormat"]
    info.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load_from(tfds_dir)
    message = one_line(error)
    assert str(info.parent) in message
    assert f"--data_dir={tfds_dir / 'array_record'}" in message


def test_load_cifar10_names_damaged_records(tfds_dir):
    source = tfds_dir / "cifar10" / cifar10.VERSION
    (records,) = source.glob("cifar10-test.array_record*")
    content = bytearray(records.read_bytes())
    content[len(content) // 2] ^= 1
    records.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_from(tfds_dir)
    assert str(source) in one_line(error)
    assert not (source / "fedmoe_jax").exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "digest"])
def test_load_cifar10_makes_a_damaged_copy_again(
    tfds_dir, small, damage, no_decoding, capsys
):
    load_from(tfds_dir)
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
    capsys.readouterr()
    assert_is_small(load_from(tfds_dir), small)
    warned = [x for x in capsys.readouterr().err.splitlines() if "warning" in x]
    assert len(warned) == 1
    assert warned[0].startswith(f"warning: decoded images in {folder} are damaged (")
    no_decoding()  # a whole copy is in its place
    assert_is_small(load_from(tfds_dir), small)
    assert capsys.readouterr().err == ""


def test_load_cifar10_caches_a_read_only_folder_for_the_user(
    tfds_dir, small, no_decoding
):
    source = tfds_dir / "cifar10" / cifar10.VERSION
    before = listing(tfds_dir)
    source.chmod(0o555)
    assert_is_small(load_from(tfds_dir), small)
    assert listing(tfds_dir) == before
    (kept,) = (Path(os.environ["XDG_CACHE_HOME"]) / "fedmoe_jax").iterdir()
    assert kept.name.startswith("cifar10-")
    no_decoding()
    assert_is_small(load_from(tfds_dir), small)


def test_load_cifar10_decodes_changed_records_again(tfds_dir, small, no_decoding):
    load_from(tfds_dir)
    (records,) = (tfds_dir / "cifar10" / cifar10.VERSION).glob("cifar10-test*")
    os.utime(records, ns=(1, 1))
    no_decoding()
    with pytest.raises(AssertionError, match="decoded although"):
        load_from(tfds_dir)


def test_load_cifar10_loads_where_nothing_can_be_written(
    tfds_dir, small, monkeypatch, capsys
):
    (tfds_dir / "cifar10" / cifar10.VERSION).chmod(0o555)
    file = tfds_dir.parent / "file"
    file.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert_is_small(load_from(tfds_dir), small)
    assert "decoded images are not kept" in capsys.readouterr().err


@pytest.mark.slow
def test_load_cifar10_of_the_real_archive():
    where = os.environ.get("TFDS_DATA_DIR", "")
    if not (Path(where) / "cifar10" / cifar10.VERSION / "dataset_info.json").exists():
        pytest.skip("CIFAR-10 is not in TFDS_DATA_DIR")
    found = load_dataset(make_options(name="cifar10"))
    assert found.train["x"].shape == (50000, 32, 32, 3)
    assert found.stratum_names == NAMES
    np.testing.assert_array_equal(np.bincount(found.train["y"]), [5000] * 10)
    np.testing.assert_array_equal(np.bincount(found.test["y"]), [1000] * 10)
    # Channel means as commonly published for the training images.
    means = found.train["x"].mean((0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=1e-3)
