"""Augmented images are crops of padded ones, and in training alone."""

import jax
import numpy as np
import pytest
from factories import assert_same_results, make_config, run_alone, tiny_config

import fedmoe_jax
from fedmoe_jax.options import UserError
from fedmoe_jax.tasks import list_augments
from fedmoe_jax.tasks.augment import SHIFT, crop_and_flip, reflect

pytestmark = pytest.mark.slow


def test_reflect_mirrors_at_both_edges_by_hand():
    place = np.arange(-4, 9)
    expected = np.pad(np.arange(5), 4, mode="reflect")
    assert reflect(place, 5).tolist() == expected.tolist()


@pytest.mark.parametrize("shape", [(4, 9), (9, 1)])
def test_images_that_are_smaller_than_a_shift_are_refused(shape, tmp_path):
    x, y = np.zeros((20, *shape, 1), np.float32), np.arange(20) % 4
    arrays = {"train_x": x, "train_y": y, "test_x": x, "test_y": y}
    np.savez(tmp_path / "small.npz", **arrays)
    fields = {"data.name": "arrays", "data.file": str(tmp_path / "small.npz")}
    fields |= {"num_clients": 2, "cohort_size": 2, "partition.min_size": 1}
    config = make_config(**fields, **{"client.augment": "crop_and_flip"})
    told = f"sides are 5 pixels at least, this data has {shape[0]}x{shape[1]}; .*: none"
    with pytest.raises(UserError, match=told):
        fedmoe_jax.run(config)


def list_crops(image):
    """Every crop of the padded image and of its mirror image."""
    height, width, _ = image.shape
    padded = np.pad(image, [(SHIFT, SHIFT)] * 2 + [(0, 0)], mode="reflect")
    for row in range(2 * SHIFT + 1):
        for column in range(2 * SHIFT + 1):
            crop = padded[row : row + height, column : column + width]
            yield crop
            yield crop[:, ::-1]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_every_image_becomes_one_of_its_crops_and_each_is_drawn(dtype):
    image = np.random.default_rng(0).integers(0, 256, (6, 16, 2)).astype(dtype)
    images = np.stack([image] * 3000)
    found = jax.jit(crop_and_flip)(images, jax.random.key(1))
    assert found.dtype == dtype and found.shape == images.shape
    crops = np.stack([crop.ravel() for crop in list_crops(image)])
    same = (np.asarray(found).reshape(3000, 1, -1) == crops).all(-1)
    assert same.any(1).all()
    assert same.any(0).all()  # each of 162 about 18 times
    assert np.abs(same[:, 1::2].any(1).mean() - 0.5) < 0.05


def test_augmented_clients_train_alike_on_devices_and_in_chunks():
    """Also where their images drift; and otherwise than without."""
    fields = {"client.augment": "crop_and_flip", "run.num_devices": 1}
    fields |= {"drift.images": "contrast", "drift.strength": 0.5, "drift.start": 1}
    of = lambda **changes: fedmoe_jax.run(tiny_config(**fields | changes)).rows
    one = of()["train_loss"]
    for changes in ({"run.client_chunk": 3}, {"run.num_devices": 2}):
        np.testing.assert_allclose(of(**changes)["train_loss"], one, rtol=1e-4)
    assert of(**{"client.augment": "none"})["train_loss"][-1] != one[-1]


def test_images_without_a_place_in_them_train_as_ever(tmp_path):
    """Uniform ones do not change, and no other draw moves."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (120, 1, 1, 1)).astype(np.uint8)
    x, y = np.broadcast_to(levels, (120, 8, 8, 1)), (levels[:, 0, 0, 0] // 64)
    arrays = {"train_x": x[:80], "train_y": y[:80], "test_x": x[80:], "test_y": y[80:]}
    np.savez(tmp_path / "flat.npz", **{k: v.copy() for k, v in arrays.items()})
    fields = {
        "data.name": "arrays",
        "data.file": str(tmp_path / "flat.npz"),
        "partition.kind": "iid",
        "num_clients": 4,
        "cohort_size": 3,
    }
    for name in list_augments():
        assert run_alone(
            make_config(**fields, **{"client.augment": name}), tmp_path / name
        )
    assert_same_results(*(tmp_path / name for name in list_augments()))


def test_text_is_not_augmented():
    fields = {"data.name": "markov", "model.kind": "transformer", "data.length": 8}
    config = make_config(**fields, **{"client.augment": "crop_and_flip"})
    with pytest.raises(UserError, match="client.augment='crop_and_flip' .*: none$"):
        fedmoe_jax.run(config)
