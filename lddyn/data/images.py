"""Real digits: scikit-learn's scans, or MNIST's IDX files (section 2, appendix C.1)."""

import gzip
import hashlib
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from lddyn import InputError, unknown

CLASSES = 10

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}


# --- the images --------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    images: Tensor  # (n, 1, 28, 28), 0 to 1
    labels: Tensor  # (n,), 0 to 9


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes; raise `InputError` naming the file when it is damaged."""
    try:
        with gzip.open(path) as file:
            raw = file.read()
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: not a complete gzip file ({error})") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or not 1 <= raw[3] <= 3 or len(raw) < 4 + 4 * raw[3]:
        raise InputError(f"{path}: not an IDX file of unsigned bytes (header {raw[:4].hex() or 'missing'})")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int)
    start = 4 + 4 * raw[3]
    if len(raw) != start + shape.prod():
        raise InputError(f"{path}: truncated, {len(raw) - start} bytes of data where {shape.prod()} are announced")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def mnist_files(mnist_dir: str | Path) -> dict[str, Path]:
    """The IDX files in a folder (either or both of the two official pairs), downloaded first when the folder lacks all.

    Raises `InputError` when there are none and the network does not give them.
    """
    folder = Path(mnist_dir).expanduser()
    pairs = [[f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"] for part in ("train", "t10k")]
    if not any((folder / name).exists() for pair in pairs for name in pair):
        _download(folder)
    found = [pair for pair in pairs if all((folder / name).exists() for name in pair)]
    if not found:
        raise InputError(f"{folder}: no complete pair of IDX files (allowed: {' or '.join(map(' + '.join, pairs))})")
    return {name: folder / name for pair in found for name in pair}


def _download(folder: Path) -> None:
    for name, md5 in MNIST_MD5.items():
        try:
            with urllib.request.urlopen(MNIST_URL + name, timeout=20) as answer:
                content = answer.read()
            if hashlib.md5(content).hexdigest() != md5:
                raise OSError(f"{name} arrived damaged")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        except OSError as error:
            raise InputError(
                f"mnist_dir {str(folder)!r} holds no IDX files and the download failed ({error}); "
                "put the four .gz files there, or use data='digits'"
            ) from error


def inputs(data: str, mnist_dir: str) -> dict[str, Path]:
    """The files that a data set is read from; none for the digits that scikit-learn ships."""
    if data not in ("digits", "mnist"):
        raise unknown("data", data, ["digits", "mnist"])
    return mnist_files(mnist_dir) if data == "mnist" else {}


def load(data: str = "digits", mnist_dir: str = "") -> Digits:
    """Real digits: `digits`, scikit-learn's 1,797 scans of 8 x 8 pixels, enlarged to 20 x 20 in a frame of 28 x 28 as
    in MNIST; or `mnist`, the IDX files in `mnist_dir`."""
    files = inputs(data, mnist_dir)
    if data == "digits":
        from sklearn.datasets import load_digits

        scans = load_digits()
        small = torch.tensor(scans.images, dtype=torch.float32).unsqueeze(1) / 16  # (n, 1, 8, 8)
        large = interpolate(small, size=(20, 20), mode="bicubic", align_corners=False).clamp(0, 1)
        return Digits(pad(large, (4, 4, 4, 4)), torch.tensor(scans.target))
    arrays = [read_idx(path) for path in files.values()]
    images, labels = np.concatenate(arrays[::2]), np.concatenate(arrays[1::2])
    if len(images) != len(labels):
        raise InputError(f"{mnist_dir}: {len(images)} images but {len(labels)} labels")
    return Digits(torch.tensor(images).unsqueeze(1) / 255, torch.tensor(labels, dtype=torch.int64))


def split(digits: Digits, n_train: int, n_test: int, seed: int) -> tuple[Digits, Digits]:
    """Shuffle by seed and cut into a training and a test set; raise `InputError` when there are too few."""
    total = len(digits.labels)
    if n_train + n_test > total:
        raise InputError(f"n_train + n_test = {n_train + n_test}, but there are {total} images")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    parts = order[:n_train], order[n_train : n_train + n_test]
    return tuple(Digits(digits.images[part], digits.labels[part]) for part in parts)


# --- what is measured --------------------------------------------------------------------------------------


def of_each_class(digits: Digits, count: int) -> Tensor:
    """Indices of the first `count` examples of each class, (10, count); fewer where the rarest class has fewer."""
    count = min(count, int(digits.labels.bincount(minlength=CLASSES).min()))
    return torch.stack([(digits.labels == c).nonzero().flatten()[:count] for c in range(CLASSES)])
