"""LPIPS against torch: a VGG-16 of random weights, and the linear heads that the lpips package ships."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec
from safetensors.torch import save_file
from torch import nn

from gigagan_jax.config import DEFAULT_RULES, MeshConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.models.network import Network
from gigagan_jax.models.pretrained import vgg
from gigagan_jax.parallel import sharding

WIDTHS = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
TAPS = (3, 8, 15, 22, 29)  # places of relu1_2, 2_2, 3_3, 4_3, 5_3
SHAPE = (2, 40, 51, 3)

MAKE = {
    "lpips": lambda rngs: vgg.Lpips(rngs=rngs),
    "vgg": lambda rngs: vgg.Vgg(rngs=rngs),
    "heads": lambda rngs: vgg.LpipsHeads(rngs=rngs),
}
LPIPS, VGG = (Network(name, MAKE[name]) for name in ("lpips", "vgg"))


def torch_features():
    """torchvision's vgg16().features with random weights that keep the signal's size."""
    g = torch.Generator().manual_seed(0)
    layers, channels = [], 3
    for width in WIDTHS:
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layer = nn.Conv2d(channels, width, 3, padding=1)
        with torch.no_grad():
            layer.weight.normal_(0, (2 / (9 * channels)) ** 0.5, generator=g)
            layer.bias.normal_(0, 0.1, generator=g)
        layers += [layer, nn.ReLU()]
        channels = width
    return nn.Sequential(*layers).requires_grad_(False)


def released_heads():
    """The five linear weights of lpips 0.1, [1, C, 1, 1] each."""
    stored = json.loads((Path(__file__).parent / "lpips_vgg_v01.json").read_text(encoding="utf-8"))
    return [torch.tensor(w, dtype=torch.float32).view(1, -1, 1, 1) for w in stored["lin"]]


def torch_taps(features, x):
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (x - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
    taps = []
    for i, layer in enumerate(features):
        x = layer(x)
        if i in TAPS:
            taps.append(x)
    return taps


def torch_lpips(features, heads, a, b):
    """The distance as lpips 0.1.4 defines it."""
    total = 0
    for x, y, w in zip(torch_taps(features, a), torch_taps(features, b), heads, strict=True):
        x, y = (t / (t.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for t in (x, y))
        total = total + nn.functional.conv2d((x - y) ** 2, w).mean((2, 3))
    return total[:, 0]


@pytest.fixture(scope="module")
def reference():
    return torch_features(), released_heads()


@pytest.fixture(scope="module")
def folders(reference, tmp_path_factory):
    """{"vgg", "heads", "both": folder with its weights}"""
    features, heads = reference
    made = {name: tmp_path_factory.mktemp(name) for name in ("vgg", "heads", "both")}
    convs = {f"features.{k}": v for k, v in features.state_dict().items()} | {"classifier.6.bias": torch.zeros(1000)}
    linear = {f"lin{k}.model.1.weight": w for k, w in enumerate(heads)}
    for name, tensors in {"vgg": convs, "heads": linear, "both": convs | linear}.items():
        save_file(tensors, made[name] / "model.safetensors")
    return made


@pytest.fixture(scope="module")
def params(folders, read):
    """Of Lpips, from two files."""
    _, convs = read(MAKE["vgg"], vgg.vgg_rows(), folders["vgg"], ignore=vgg.is_ignored)
    _, heads = read(MAKE["heads"], vgg.head_rows(), folders["heads"])
    return {"vgg": convs, "heads": heads}


@pytest.fixture(scope="module")
def pair():
    g = np.random.default_rng(0)
    # Unlike each other: the difference of features that are almost equal is mostly rounding.
    return tuple(g.uniform(-x, x, SHAPE).astype(np.float32) for x in (1.0, 0.1))


@jax.jit
def distance_and_gradient(params, a, b):
    """([N], gradient of the first [N, H, W, 3])"""
    total = lambda a: (lambda d: (d.sum(), d))(LPIPS.bind(params)(a, b))
    gradient, value = jax.grad(total, has_aux=True)(a)
    return value, gradient


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, 3, 1)))


def test_parity_with_torch(reference, params, pair, error):
    a, b = pair
    t = nchw(a).requires_grad_()
    theirs = torch_lpips(*reference, t, nchw(b))
    theirs.sum().backward()
    value, gradient = distance_and_gradient(params, a, b)
    assert value.shape == (2,)
    assert theirs.min() > 0.01
    assert error(value, theirs.detach()) <= 1e-5
    assert error(np.moveaxis(np.asarray(gradient), 3, 1), t.grad) <= 1e-5


def test_parity_of_each_tap_with_torch(reference, params, pair, error):
    theirs = torch_taps(reference[0], nchw(pair[0]))
    ours = jax.jit(lambda p, x: VGG.bind(p)((x - vgg.SHIFT) / vgg.SCALE))(params["vgg"], pair[0])
    assert [x.shape[1:] for x in ours] == [(40, 51, 64), (20, 25, 128), (10, 12, 256), (5, 6, 512), (2, 3, 512)]
    for x, y in zip(ours, theirs, strict=True):
        assert error(np.moveaxis(np.asarray(x), 3, 1), y) <= 1e-5


def test_equal_images_are_at_distance_zero_with_a_finite_gradient(params, pair):
    value, gradient = distance_and_gradient(params, pair[0], pair[0])
    # The compiler may fuse what is before the two equal images differently: equal to the last bit on some processors only.
    np.testing.assert_allclose(value, 0, atol=1e-10)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_unit_vectors_have_a_finite_gradient_at_zero():
    x = np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]], np.float32)
    value, back = jax.vjp(vgg.normalize_channels, x)
    np.testing.assert_allclose(value, [[0, 0, 0], [0.6, 0, 0.8]], rtol=1e-6)
    (gradient,) = back(np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]], np.float32))
    # (g - (g.u) u) / |x|
    np.testing.assert_allclose(gradient, [[0, 0, 0], [0.128, 0.2, -0.096]], atol=1e-6)


def test_a_tap_with_all_channels_off_adds_nothing(reference, params, pair, error):
    a, b = pair
    convs = params["vgg"]["convs"]
    last = max(convs, key=int)
    off = convs | {last: convs[last] | {"bias": jnp.full(512, -1e4)}}
    value, gradient = distance_and_gradient(params | {"vgg": {"convs": off}}, a, b)

    features, heads = reference
    t = nchw(a).requires_grad_()
    taps = zip(torch_taps(features, t), torch_taps(features, nchw(b)), heads, strict=True)
    unit = lambda x: x / x.norm(dim=1, keepdim=True)
    four = sum(((unit(x) - unit(y)) ** 2 * w).sum(1).mean((1, 2)) for x, y, w in list(taps)[:4])
    four.sum().backward()
    assert error(value, four.detach()) <= 1e-5
    assert error(np.moveaxis(np.asarray(gradient), 3, 1), t.grad) <= 1e-5


def test_one_file_gives_the_same_parameters(folders, read, params):
    _, both = read(MAKE["lpips"], vgg.lpips_rows(), folders["both"], ignore=vgg.is_ignored)
    assert jax.tree.structure(both) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, both, params)


def test_bfloat16_is_near(params, pair):
    net = Network("lpips", lambda rngs: vgg.Lpips(dtype=jnp.bfloat16, rngs=rngs))
    a, b = (x[:, :16, :16] for x in pair)
    near = jax.jit(lambda p, a, b: net.bind(p)(a, b))(params, a, b)
    exact = jax.jit(lambda p, a, b: LPIPS.bind(p)(a, b))(params, a, b)
    assert near.dtype == jnp.float32
    np.testing.assert_allclose(near, exact, rtol=0.05)
    assert np.abs(near - exact).max() > 1e-5 * exact.max()  # it did compute in bfloat16


def test_released_heads_are_five_weights_that_are_not_negative():
    heads = released_heads()
    assert [h.numel() for h in heads] == [64, 128, 256, 512, 512]
    assert all(h.min() >= 0 and h.max() > 0 for h in heads)


def test_missing_and_strange_tensors_are_an_error(folders, read, tmp_path):
    with pytest.raises(UserError, match=r"lin0\.model\.1\.weight.*missing.*features.*left over"):
        read(MAKE["heads"], vgg.head_rows(), folders["vgg"])
    save_file(
        {"features.0.weight": torch.zeros(64, 3, 3, 3), "head.fc.bias": torch.zeros(1)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"tensors 25 \(features\.0\.bias.*\) missing; is it") as e:
        read(MAKE["vgg"], vgg.vgg_rows(), tmp_path, ignore=vgg.is_ignored)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "a, b", [((1, 15, 32, 3), (1, 15, 32, 3)), ((1, 32, 32, 3), (2, 32, 32, 3)), ((1, 32, 32, 1), (1, 32, 32, 1))]
)
def test_shapes_that_do_not_fit_are_an_error(a, b):
    with pytest.raises(ValueError, match="two batches of one shape, 16 px or more"):
        jax.eval_shape(lambda p, a, b: LPIPS.bind(p)(a, b), LPIPS.abstract(), jnp.zeros(a), jnp.zeros(b))


def test_sharding_cuts_the_widest_convolutions_only():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    for abstract, s in zip(
        jax.tree.leaves(LPIPS.abstract()), jax.tree.leaves(LPIPS.shardings(mesh, DEFAULT_RULES)), strict=True
    ):
        is_wide = len(abstract.shape) == 4 and abstract.shape[-1] == 512
        assert s.spec == PartitionSpec(*[None] * (len(s.spec) - 1), "fsdp" if is_wide else None)
