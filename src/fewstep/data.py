"""Named data sets and folders of images, as tensors.

Images come as float32 (n, c, h, w) in [-1, 1]; vectors as they are in the file. Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as File

import numpy as np
import torch
from torch import Tensor

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
UNREADABLE = (ValueError, OSError, EOFError, zipfile.BadZipFile)
HELD_OUT = 6  # one in six of a data set that has no test part of its own
SAMPLES = "samples.npz"  # of a folder of `fewstep sample`


@dataclass(frozen=True)
class Data:
    """train (n, *d) and test (m, *d), float32; labels (n,) and (m,), int64, or None."""

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.shape[1:])


def load_data(name: str, folder: str | File | None = None, size: int | None = None) -> Data:
    """digits, mnist, fashion-mnist or cifar10 by name, or the path of a folder of images or an .npy/.npz file.

    folder: where the named set's files lie (idx files, .gz or not; CIFAR-10 as npz parts with x and y, or the python
    version's pickles); default $FEWSTEP_DATA, then ./data. size: side to which images are resized (antialiased).
    Sets without a test part hold out every sixth sample. Raises ValueError for anything that cannot be read as samples,
    for values that are not finite, and for fewer than 12 samples.
    """
    if name in NAMED:
        train, test = NAMED[name](_folder_of(name, folder))
        labelled = (*train, *test)
    else:
        source = File(name)
        if not source.exists():
            raise ValueError(f"no data set {name!r}: give one of {', '.join(NAMED)}, a folder of images, or an .npy/.npz file")
        labelled = _split(*(_image_folder(source, size) if source.is_dir() else _array_file(source)))
    x, y, x_test, y_test = labelled
    data = Data(name, _resized(_floats(x), size), _resized(_floats(x_test), size), _labels(y), _labels(y_test))
    for part in (data.train, data.test):
        _require_finite(part, name, " of its part")
    if len(data.train) < 10 or len(data.test) < 2:
        raise ValueError(f"{name}: too few samples, {len(data.train)} + {len(data.test)}; at least 12 are needed")
    return data


def load_samples(name: str, size: int | None = None) -> Tensor:
    """Samples (n, *d), float32, in their order: of a folder of `fewstep sample`, a folder of images, or an .npz or .npy file.

    size: as for `load_data`. Raises ValueError for what cannot be read as samples, and for values that are not finite.
    """
    file = File(name)
    if file.is_dir() and (file / SAMPLES).exists():
        file = file / SAMPLES
    if not file.exists():
        raise ValueError(
            f"no samples {name!r}: give a folder of `fewstep sample`, a folder of images, or an .npz (key x) or .npy file"
        )
    found, _ = _image_folder(file, size) if file.is_dir() else _array_file(file)
    if found.ndim < 2 or not len(found):
        raise ValueError(f"{file}: samples are rows of numbers (n, ..), got shape {found.shape}")
    x = _resized(_floats(found), size)
    _require_finite(x, name)
    return x


def _require_finite(x: Tensor, name: str, where: str = "") -> None:
    bad = ~torch.isfinite(x.flatten(1)).all(1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"{name}: {int(bad.sum())} of {len(x)} samples hold NaN or infinity (the first in row {first}{where}); "
            "remove or repair them"
        )


def count_classes(labels: Tensor) -> int:
    """K of labels (n,), which must be 0 .. K-1, each on some sample; raises ValueError."""
    found = torch.unique(labels)
    if int(found[0]) != 0 or int(found[-1]) != len(found) - 1:
        raise ValueError(
            f"labels must be 0 .. K-1, each on some sample; got {len(found)} different ones from {int(found[0])} to "
            f"{int(found[-1])}: renumber them"
        )
    return len(found)


def _folder_of(name: str, folder: str | File | None) -> File:
    if name == "digits":  # comes with scikit-learn
        return File()
    root = File(folder or os.environ.get("FEWSTEP_DATA", "data"))
    places = [root / name]
    if name == "cifar10":
        places.append(root / "cifar-10-batches-py")
    if folder is not None:
        places.append(root)
    elif name == "fashion-mnist":
        places.append(File("/usr/share/datasets/fashion-mnist"))  # of Debian's package dataset-fashion-mnist
    for place in places:
        if any(any(place.glob(mark)) for mark in MARKS[name]):
            return place
    raise ValueError(
        f"{name}: no {' or '.join(MARKS[name])} in {', '.join(str(p) for p in places)}; give --data-folder, the folder that "
        "holds the files, or set FEWSTEP_DATA, the folder that holds that folder"
    )


def _digits(_: File):
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y, x_test, y_test = _split((digits.images[:, None] / 8 - 1).astype(np.float32), digits.target)
    return (x, y), (x_test, y_test)


def _read_idx(folder: File, pattern: str) -> np.ndarray:
    files = sorted(folder.glob(pattern))
    if not files:
        raise ValueError(f"{folder} lacks {pattern}")
    raw = files[0].read_bytes()
    try:
        raw = gzip.decompress(raw) if files[0].suffix == ".gz" else raw
    except (OSError, EOFError) as error:
        raise ValueError(f"{files[0]} is damaged: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{files[0]} is not an idx file of bytes")
    sides = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if len(values) != np.prod(sides):
        raise ValueError(f"{files[0]} is truncated: {len(values)} of {int(np.prod(sides))} bytes")
    return values.reshape(sides)


def _idx(folder: File):
    return tuple((_read_idx(folder, f"{p}*images*")[:, None], _read_idx(folder, f"{p}*labels*")) for p in ("train", "t10k"))


def _cifar10(folder: File):
    parts: dict[str, list] = {"train": [], "test": []}
    files = sorted(folder.glob("cifar10_*.npz")) or sorted([*folder.glob("data_batch_*"), folder / "test_batch"])
    for file in files:
        try:
            if file.suffix == ".npz":
                with np.load(file) as npz:
                    x, y = npz["x"].transpose(0, 3, 1, 2), npz["y"]
            else:
                with open(file, "rb") as stream:
                    batch = _PlainUnpickler(stream, encoding="bytes").load()
                x, y = batch[b"data"].reshape(-1, 3, 32, 32), np.array(batch[b"labels"])
        except (*UNREADABLE, pickle.UnpicklingError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} cannot be read as CIFAR-10: {error}") from error
        parts["test" if "test" in file.name else "train"].append((x, y))
    if not (parts["train"] and parts["test"]):
        raise ValueError(f"{folder}: CIFAR-10 needs its train and its test files")
    return tuple(tuple(np.concatenate(each) for each in zip(*parts[p], strict=True)) for p in ("train", "test"))


class _PlainUnpickler(pickle.Unpickler):
    """CIFAR-10's python files are pickles of dicts and arrays: nothing else may be built from one."""

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "_frombuffer", "ndarray", "dtype"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise ValueError(f"refused to build {module}.{name} from a CIFAR-10 file: only arrays are expected")


NAMED: dict[str, Callable] = {"digits": _digits, "mnist": _idx, "fashion-mnist": _idx, "cifar10": _cifar10}
MARKS = {  # files that tell a set's folder
    "mnist": ("train*images*",),
    "fashion-mnist": ("train*images*",),
    "cifar10": ("cifar10_test.npz", "test_batch"),
}


def _image_folder(folder: File, size: int | None) -> tuple[np.ndarray, None]:
    from PIL import Image

    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGES)
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGES)})")
    images = []
    for file in files:
        try:
            image = Image.open(file).convert("RGB")
        except OSError as error:
            raise ValueError(f"{file} cannot be read as an image: {error}") from error
        if size is not None:  # the middle square, as large as it goes
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        images.append(np.asarray(image).transpose(2, 0, 1))
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ValueError(f"{folder} holds images of {len(shapes)} different sizes; give --size to crop and resize them")
    return np.stack(images), None


def _array_file(file: File) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        loaded = np.load(file, allow_pickle=False)
    except UNREADABLE as error:
        fault = f"{error}".partition(". If you trust")[0]  # numpy proposes pickle
        raise ValueError(f"{file} cannot be read as an .npy or .npz array: {fault}") from error
    if isinstance(loaded, np.ndarray):
        return loaded, None
    for key in ("x", "X", "images", "data"):
        if key in loaded:
            try:
                return loaded[key], next((loaded[k] for k in ("y", "labels") if k in loaded), None)
            except UNREADABLE as error:
                raise ValueError(f"{file} is damaged: {error}") from error
    raise ValueError(f"{file} holds {', '.join(loaded.files)}; the samples must be under x, X, images or data")


def _split(x: np.ndarray, y: np.ndarray | None):
    """Every sixth sample of a fixed shuffle is held out."""
    if x.ndim < 2:
        raise ValueError(f"samples must be an array of numbers (n, ...), got shape {x.shape}")
    if y is not None and len(y) != len(x):
        raise ValueError(f"{len(y)} labels for {len(x)} samples")
    order = np.random.default_rng(0).permutation(len(x))
    test, train = order[::HELD_OUT], np.delete(order, np.s_[::HELD_OUT])
    return x[train], None if y is None else y[train], x[test], None if y is None else y[test]


def _floats(x: np.ndarray) -> Tensor:
    if x.dtype.kind not in "fiub":
        raise ValueError(f"samples must be numbers, got {x.dtype}")
    if x.dtype == np.uint8:
        x = x.transpose(0, 3, 1, 2) if x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3) else x
        x = x[:, None] if x.ndim == 3 else x
        return torch.from_numpy(x / np.float32(127.5) - np.float32(1))
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def _labels(y: np.ndarray | None) -> Tensor | None:
    """None where they are no classes: names, one-hot rows, numbers that are not whole."""
    if y is None or y.dtype.kind not in "fiub" or y.ndim != 1 or not (y == np.floor(y)).all():
        return None
    return torch.from_numpy(y.astype(np.int64))


def _resized(x: Tensor, size: int | None) -> Tensor:
    if size is None or x.shape[-1] == x.shape[-2] == size:
        return x
    if x.ndim != 4:
        raise ValueError(f"--size is for images (n, c, h, w), the data has shape {tuple(x.shape)}")
    return torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
