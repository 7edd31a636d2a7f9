import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lddyn import InputError
from lddyn.chapters.digits import run as digits
from lddyn.data import images
from lddyn.publish import notebooks

SHARED = Path(__file__).parents[3] / "shared" / "data" / "mnist"


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def mnist_dir(tmp_path):
    rng = np.random.default_rng(0)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", rng.integers(0, 256, (40, 28, 28), dtype=np.uint8))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(40, dtype=np.uint8) % 10)
    return tmp_path


def test_idx_files_are_read_in_order_and_scaled(mnist_dir):
    pictures, labels = images.load("mnist", mnist_dir)
    assert pictures.shape == (40, 1, 28, 28) and pictures.min() >= 0 and pictures.max() <= 1
    assert labels.tolist() == [i % 10 for i in range(40)]


def test_truncated_gzip_is_named(mnist_dir):
    path = mnist_dir / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"t10k-images.*not a complete gzip file"):
        images.load("mnist", mnist_dir)


def test_idx_with_fewer_bytes_than_announced_is_named(mnist_dir):
    path = mnist_dir / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-7]))
    with pytest.raises(InputError, match=r"truncated, 31353 bytes of data where 31360 are announced"):
        images.load("mnist", mnist_dir)


def test_file_that_is_not_idx_is_named(mnist_dir):
    (mnist_dir / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"PK\3\4"))
    with pytest.raises(InputError, match="not an IDX file"):
        images.load("mnist", mnist_dir)


def test_labels_without_images_are_not_half_a_data_set(mnist_dir):
    (mnist_dir / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(InputError, match="no complete pair of IDX files"):
        images.load("mnist", mnist_dir)


def test_empty_folder_without_network_is_one_line(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(images.urllib.request, "urlopen", no_network)
    with pytest.raises(InputError, match=r"the download failed \(no route to host\).*data='digits'"):
        images.load("mnist", tmp_path)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real MNIST test images")
def test_real_mnist_files_are_read():
    pictures, labels = images.load("mnist", SHARED)
    assert pictures.shape == (10000, 1, 28, 28)
    assert labels[:4].tolist() == [7, 2, 1, 0]


def test_digits_of_the_two_sets_do_not_overlap():
    everything = images.load()
    train, test = images.split(everything, 300, 300, seed=1)
    both = torch.cat([train.images, test.images]).flatten(1)
    whole = everything.images.flatten(1)
    repeated = len(whole) - len(torch.unique(whole, dim=0))
    assert len(torch.unique(both, dim=0)) >= len(both) - repeated


def test_too_many_images_asked_for_is_one_line():
    with pytest.raises(InputError, match=r"n_train \+ n_test = 3000, but there are 1797 images"):
        images.split(images.load(), 2000, 1000, seed=0)


def test_unknown_names_get_the_nearest_one():
    with pytest.raises(InputError, match="did you mean 'lenet'"):
        digits.network("lennet", 0)
    with pytest.raises(InputError, match="did you mean 'laptop'"):
        digits.settings("labtop", {})


def test_overrides_win_over_the_scale_and_none_leaves_it():
    chosen = digits.settings("laptop", {"seeds": 2, "epochs": 3, "lr": None, "a notebook's other names": 1})
    assert (chosen.seeds, chosen.epochs, chosen.lr) == (2, 3, digits.SCALES["laptop"]["lr"])
    runs = digits.grid(chosen)
    assert [(r.seed, r.epochs) for r in runs] == [(0, 3), (1, 3)]


def test_a_folder_that_is_not_read_does_not_make_another_run():
    of_scans, of_mnist = (
        digits.grid(digits.settings("smoke", {"data": data, "mnist_dir": "mine"}))[0] for data in ("digits", "mnist")
    )
    assert (of_scans.mnist_dir, of_mnist.mnist_dir) == ("", "mine")


def test_what_another_chapter_asks_for_is_what_the_notebook_runs():
    cell = notebooks.parameters(notebooks.notebook_path("01_mnist"))
    assert digits.settings("smoke", {p.name: p.default for p in cell.values()}) == digits.settings("smoke", {})


def test_same_seed_gives_the_same_numbers(tmp_path):
    given = {"n_train": 200, "n_test": 300, "epochs": 3, "evaluations": 3}
    small = digits.grid(digits.settings("smoke", given))[0]
    tables = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        (tmp_path / name).mkdir()
        tables.append(digits.train(tmp_path / name, replace(small, seed=seed)))
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])


def test_one_step_moves_only_what_the_step_moved():
    train, test = images.split(images.load(), 200, 300, seed=0)
    model = digits.network("mlp", 0)
    nats, probability = digits.one_step_changes(model, digits.parameters_of(model), train, test, eta=0.0)
    assert nats.abs().max() == 0 and probability.abs().max() == 0
    nats, probability = digits.one_step_changes(model, digits.parameters_of(model), train, test, eta=0.05)
    assert (nats.diagonal(dim1=0, dim2=1).diagonal() > 0).all(), "log p(u) must rise on other images of class u"
    assert probability.sum(-1).abs().max() < 1e-5, "probabilities keep summing to one"


def test_class_means_leave_out_an_image_with_itself():
    labels = torch.tensor([0, 0, 1, 1]).repeat_interleave(1)
    values = torch.eye(4) * 100 + 1
    assert digits.class_means(values, labels)[:2, :2].eq(1).all()
