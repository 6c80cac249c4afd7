"""Data sets by name, from folders and from arrays: the values that come out, and what is refused."""

import gzip
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from fewstep.data import count_classes, load_data


def test_digits_are_scikit_learns_split_once_and_for_all():
    data = load_data("digits")
    assert data.train.shape == (1497, 1, 8, 8)
    assert data.test.shape == (300, 1, 8, 8)
    everything = torch.cat([data.train, data.test]).flatten(1)
    raw = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, raw.tolist()))
    assert torch.equal(load_data("digits").test, data.test)


def write_idx(file, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    (gzip.open if file.suffix == ".gz" else open)(file, "wb").write(header + array.tobytes())


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_come_back_scaled_to_minus_one_to_one(ending, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 5, 6), dtype=np.uint8)
    y = np.arange(40, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{ending}", x)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{ending}", y)
    data = load_data("mnist", tmp_path)
    assert torch.allclose((data.train[:, 0] + 1) * 127.5, torch.tensor(x, dtype=torch.float32), atol=1e-4)
    assert torch.equal(data.test_labels, torch.tensor(y, dtype=torch.int64))
    file = tmp_path / f"train-images-idx3-ubyte{ending}"
    file.write_bytes(file.read_bytes()[: -200 if not ending else -20])
    with pytest.raises(ValueError, match=r"truncated|damaged"):
        load_data("mnist", tmp_path)


@pytest.mark.parametrize("form", ["npz", "pickle"])
def test_cifar10_in_both_forms_gives_the_same_images(form, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    y = np.arange(12) % 10
    for name in ("train", "test"):
        if form == "npz":
            np.savez(tmp_path / f"cifar10_{name}.npz", x=x, y=y)
        else:
            batch = {b"data": x.transpose(0, 3, 1, 2).reshape(12, -1), b"labels": y.tolist()}
            (tmp_path / {"train": "data_batch_1", "test": "test_batch"}[name]).write_bytes(pickle.dumps(batch))
    data = load_data("cifar10", tmp_path)
    assert torch.allclose((data.train.permute(0, 2, 3, 1) + 1) * 127.5, torch.tensor(x, dtype=torch.float32), atol=1e-4)
    assert data.train_labels.tolist() == y.tolist()


def test_a_pickle_that_builds_anything_but_arrays_is_refused(tmp_path):
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps({b"data": pytest.raises}))
    with pytest.raises(ValueError, match="refused to build"):
        load_data("cifar10", tmp_path)


def test_a_folder_of_images_is_cropped_and_resized_where_asked(tmp_path):
    for k in range(14):
        Image.new("RGB", (20 + k % 2, 10), (10 * k, 0, 255)).save(tmp_path / f"{k:02}.png")
    with pytest.raises(ValueError, match="--size"):
        load_data(str(tmp_path))
    data = load_data(str(tmp_path), size=8)
    everything = torch.cat([data.train, data.test])
    assert everything.shape == (14, 3, 8, 8)
    reds = sorted(float(v) for v in ((everything[:, 0, 4, 4] + 1) * 127.5))
    assert np.allclose(reds, [10 * k for k in range(14)], atol=1e-3)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        load_data(str(tmp_path), size=8)


def test_arrays_of_floats_stay_as_they_are_and_bytes_are_scaled(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", X=x, y=np.arange(30))
    data = load_data(str(tmp_path / "a.npz"))
    together, labels = torch.cat([data.train, data.test]), torch.cat([data.train_labels, data.test_labels])
    assert torch.equal(together, torch.from_numpy(x)[labels])
    np.save(tmp_path / "b.npy", np.full((30, 8, 8), 255, np.uint8))
    assert load_data(str(tmp_path / "b.npy")).train.shape == (25, 1, 8, 8)
    assert float(load_data(str(tmp_path / "b.npy")).train.min()) == 1.0
    np.savez(tmp_path / "c.npz", z=x)
    with pytest.raises(ValueError, match="under x, X, images or data"):
        load_data(str(tmp_path / "c.npz"))


def test_labels_are_whole_numbers_or_none_and_count_from_0(tmp_path):
    x = np.random.default_rng(0).normal(size=(36, 2))
    for y in (np.arange(36) % 3, (np.arange(36) % 3).astype(np.float32), (np.arange(36) % 3).astype(np.uint8)):
        np.savez(tmp_path / "a.npz", x=x, labels=y)
        data = load_data(str(tmp_path / "a.npz"))
        assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
        assert count_classes(data.train_labels) == 3
    for y in (np.array(["cat"] * 36), np.linspace(0, 1, 36), np.full(36, np.nan), np.eye(36)):
        np.savez(tmp_path / "a.npz", x=x, y=y)
        assert load_data(str(tmp_path / "a.npz")).train_labels is None
    assert count_classes(load_data("digits").train_labels) == 10
    for labels in ([1, 2, 3], [0, 2], [-1, 0, 1]):
        with pytest.raises(ValueError, match="renumber"):
            count_classes(torch.tensor(labels))


def test_resizing_a_constant_keeps_it_and_needs_images(tmp_path):
    np.save(tmp_path / "v.npy", np.zeros((30, 4)))
    with pytest.raises(ValueError, match="--size is for images"):
        load_data(str(tmp_path / "v.npy"), size=8)
    np.save(tmp_path / "i.npy", np.full((30, 1, 12, 12), 0.25))
    assert torch.allclose(load_data(str(tmp_path / "i.npy"), size=8).train, torch.tensor(0.25))


def test_real_mnist_where_it_is(shared_data):
    data = load_data("mnist", shared_data)
    assert data.train.shape == (60000, 1, 28, 28)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
