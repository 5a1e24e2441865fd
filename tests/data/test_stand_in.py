"""TensorFlow's part in TFDS's builders: files, PNG and JPEG, and nothing beyond."""

import io

import numpy as np
import pytest
from PIL import Image

from fedmoe_jax.data.stand_in import (
    TENSORFLOW,
    NeedsTensorFlow,
    encode_image,
    replace,
    stand_in,
    to_text,
)

FILES = TENSORFLOW.io.gfile


def make_encoder(shape, kind="png", dtype=np.uint8):
    from tensorflow_datasets.core.features import image_feature

    return image_feature._ImageEncoder(shape=shape, dtype=dtype, encoding_format=kind)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_encode_image_loses_nothing_as_png(channels):
    shape = (5, 4, channels)
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    png = encode_image(make_encoder(shape), image)
    found = np.asarray(Image.open(io.BytesIO(png)))
    np.testing.assert_array_equal(found.reshape(shape), image)


def test_encode_image_keeps_16_bits():
    image = np.array([[[0], [65535]], [[256], [7]]], np.uint16)
    png = encode_image(make_encoder((2, 2, 1), dtype=np.uint16), image)
    assert np.asarray(Image.open(io.BytesIO(png))).tolist() == image[..., 0].tolist()


def test_encode_image_is_close_as_jpeg():
    image = np.broadcast_to(np.arange(0, 256, 8, np.uint8)[:, None], (32, 32, 3))
    jpeg = encode_image(make_encoder((32, 32, 3), "jpeg"), image)
    found = Image.open(io.BytesIO(jpeg))
    assert found.format == "JPEG"
    assert np.abs(np.asarray(found).astype(int) - image).max() < 20


def test_encode_image_refuses_another_shape_or_dtype():
    for image in (np.zeros((5, 4, 3), np.uint8), np.zeros((5, 4, 1))):
        with pytest.raises(ValueError):
            encode_image(make_encoder((5, 4, 1)), image)


def test_stand_in_lasts_as_long_as_it_is_needed():
    from tensorflow_datasets.core.features import image_feature
    from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow

    before = image_feature._ImageEncoder._encode_image
    with stand_in():
        assert tensorflow.io.gfile is FILES
        assert image_feature._ImageEncoder._encode_image is encode_image
        with pytest.raises(NeedsTensorFlow, match="^tf.one_hot$"):
            tensorflow.one_hot([1], 2)
    assert image_feature._ImageEncoder._encode_image is before
    with pytest.raises(ModuleNotFoundError):
        tensorflow.io.gfile  # noqa: B018


def test_files_are_those_of_python(tmp_path):
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        FILES.makedirs(folder)
    with FILES.GFile(folder / "text.txt", "w") as file:
        file.write("ā\r\nb\n")
    assert (folder / "text.txt").read_bytes() == "ā\r\nb\n".encode()
    with FILES.GFile(str(folder / "text.txt")) as file:
        assert list(file) == ["ā\r\n", "b\n"]
    FILES.copy(folder / "text.txt", folder / "copy.txt")
    with FILES.GFile(folder / "copy.txt", "rb") as file:
        assert file.read(2) == "ā".encode()
    found = FILES.glob(folder / "*.txt")
    assert found == [str(folder / "copy.txt"), str(folder / "text.txt")]
    assert FILES.isdir(folder) and sorted(FILES.listdir(folder)) == [
        "copy.txt",
        "text.txt",
    ]
    FILES.remove(folder / "copy.txt")
    assert not FILES.exists(folder / "copy.txt") and FILES.exists(folder)
    assert [top for top, *_ in FILES.walk(tmp_path / "a")] == [
        str(tmp_path / "a"),
        str(folder),
    ]


def test_to_text_reads_utf8():
    assert to_text("ā".encode()) == to_text("ā") == "ā"


def test_replace_gives_members_back_after_a_fault():
    class Owner:
        one = 1

    with pytest.raises(KeyError), replace(Owner, one=2):
        assert Owner.one == 2
        raise KeyError
    assert Owner.one == 1
