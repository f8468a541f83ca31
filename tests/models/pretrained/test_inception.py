"""Inception-v3 against a torch definition of its own, in both variants, through the production loader."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax.sharding import PartitionSpec
from safetensors.torch import save_file
from torch import nn

from gigagan_jax.config import DEFAULT_RULES, MeshConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.models.network import Network
from gigagan_jax.models.pretrained import inception
from gigagan_jax.parallel import sharding

VARIANTS = ("fid", "torchvision")


# ---------------------------------------------------------------- the network in torch, with torchvision's names


class ConvBn(nn.Module):
    def __init__(self, i, o, k, s=1, p=0):
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, s, p, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=0.001)

    def forward(self, x):
        return self.bn(self.conv(x)).relu_()


class Mixed(nn.Module):
    """Units by name; `units` rows are (name, in, out, kernel, stride, padding)."""

    def __init__(self, fid, *units):
        super().__init__()
        self.fid = fid
        for name, *sizes in units:
            self.add_module(name, ConvBn(*sizes))

    def chain(self, x, *names):
        for name in names:
            x = self._modules[name](x)
        return x

    def average(self, x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=not self.fid)


class Mixed5(Mixed):
    def __init__(self, fid, i, pool):
        super().__init__(
            fid,
            ("branch1x1", i, 64, 1),
            ("branch5x5_1", i, 48, 1),
            ("branch5x5_2", 48, 64, 5, 1, 2),
            ("branch3x3dbl_1", i, 64, 1),
            ("branch3x3dbl_2", 64, 96, 3, 1, 1),
            ("branch3x3dbl_3", 96, 96, 3, 1, 1),
            ("branch_pool", i, pool, 1),
        )

    def forward(self, x):
        y = self.chain(x, "branch1x1"), self.chain(x, "branch5x5_1", "branch5x5_2")
        z = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([*y, z, self.branch_pool(self.average(x))], 1)


class Mixed6a(Mixed):
    def __init__(self, fid):
        super().__init__(
            fid,
            ("branch3x3", 288, 384, 3, 2),
            ("branch3x3dbl_1", 288, 64, 1),
            ("branch3x3dbl_2", 64, 96, 3, 1, 1),
            ("branch3x3dbl_3", 96, 96, 3, 2),
        )

    def forward(self, x):
        y = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([self.branch3x3(x), y, F.max_pool2d(x, 3, 2)], 1)


class Mixed6(Mixed):
    def __init__(self, fid, c):
        row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        super().__init__(
            fid,
            ("branch1x1", 768, 192, 1),
            ("branch7x7_1", 768, c, 1),
            ("branch7x7_2", c, c, *row),
            ("branch7x7_3", c, 192, *column),
            ("branch7x7dbl_1", 768, c, 1),
            ("branch7x7dbl_2", c, c, *column),
            ("branch7x7dbl_3", c, c, *row),
            ("branch7x7dbl_4", c, c, *column),
            ("branch7x7dbl_5", c, 192, *row),
            ("branch_pool", 768, 192, 1),
        )

    def forward(self, x):
        y = self.chain(x, *(f"branch7x7_{k}" for k in (1, 2, 3)))
        z = self.chain(x, *(f"branch7x7dbl_{k}" for k in (1, 2, 3, 4, 5)))
        return torch.cat([self.branch1x1(x), y, z, self.branch_pool(self.average(x))], 1)


class Mixed7a(Mixed):
    def __init__(self, fid):
        super().__init__(
            fid,
            ("branch3x3_1", 768, 192, 1),
            ("branch3x3_2", 192, 320, 3, 2),
            ("branch7x7x3_1", 768, 192, 1),
            ("branch7x7x3_2", 192, 192, (1, 7), 1, (0, 3)),
            ("branch7x7x3_3", 192, 192, (7, 1), 1, (3, 0)),
            ("branch7x7x3_4", 192, 192, 3, 2),
        )

    def forward(self, x):
        y = self.chain(x, *(f"branch7x7x3_{k}" for k in (1, 2, 3, 4)))
        return torch.cat([self.chain(x, "branch3x3_1", "branch3x3_2"), y, F.max_pool2d(x, 3, 2)], 1)


class Mixed7(Mixed):
    def __init__(self, fid, i, last):
        row, column = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
        super().__init__(
            fid,
            ("branch1x1", i, 320, 1),
            ("branch3x3_1", i, 384, 1),
            ("branch3x3_2a", 384, 384, *row),
            ("branch3x3_2b", 384, 384, *column),
            ("branch3x3dbl_1", i, 448, 1),
            ("branch3x3dbl_2", 448, 384, 3, 1, 1),
            ("branch3x3dbl_3a", 384, 384, *row),
            ("branch3x3dbl_3b", 384, 384, *column),
            ("branch_pool", i, 192, 1),
        )
        self.largest = fid and last

    def forward(self, x):
        y = self.branch3x3_1(x)
        z = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2")
        pooled = F.max_pool2d(x, 3, 1, 1) if self.largest else self.average(x)
        parts = self.branch3x3_2a(y), self.branch3x3_2b(y), self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z)
        return torch.cat([self.branch1x1(x), *parts, self.branch_pool(pooled)], 1)


class TorchInception(nn.Module):
    def __init__(self, variant):
        super().__init__()
        self.fid = fid = variant == "fid"
        self.Conv2d_1a_3x3 = ConvBn(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvBn(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBn(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1 = ConvBn(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBn(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Mixed5(fid, 192, 32), Mixed5(fid, 256, 64), Mixed5(fid, 288, 64)
        self.Mixed_6a = Mixed6a(fid)
        self.Mixed_6b, self.Mixed_6c = Mixed6(fid, 128), Mixed6(fid, 160)
        self.Mixed_6d, self.Mixed_6e = Mixed6(fid, 160), Mixed6(fid, 192)
        if not fid:
            self.AuxLogits = Mixed(fid, ("conv0", 768, 128, 1), ("conv1", 128, 768, 5))
            self.AuxLogits.fc = nn.Linear(768, 1000)
        self.Mixed_7a = Mixed7a(fid)
        self.Mixed_7b, self.Mixed_7c = Mixed7(fid, 1280, False), Mixed7(fid, 2048, True)
        self.fc = nn.Linear(2048, 1008 if fid else 1000)

    def forward(self, x):
        if not self.fid:  # transform_input
            x = x * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) / 0.5
            x = x + (torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) - 0.5) / 0.5
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed_"):
                x = block(x)
        features = x.mean((2, 3))
        return features, self.fc(features)


def random_network(variant):
    network = TorchInception(variant).eval()
    g = torch.Generator().manual_seed(VARIANTS.index(variant))
    normal = lambda p, std: p.normal_(0, std, generator=g)
    with torch.no_grad():
        for m in network.modules():
            if isinstance(m, nn.Conv2d):
                normal(m.weight, (2 / m.weight[0].numel()) ** 0.5)
            elif isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5, generator=g)
                normal(m.bias, 0.1)
                normal(m.running_mean, 0.1)
                m.running_var.uniform_(0.5, 1.5, generator=g)
            elif isinstance(m, nn.Linear):
                normal(m.weight, m.in_features**-0.5)
                normal(m.bias, 0.1)
    return network


# ---------------------------------------------------------------- parity


@functools.cache
def module(variant):
    return Network(f"inception {variant}", lambda rngs: inception.Inception(variant, rngs=rngs))


@pytest.fixture(scope="module")
def load(read):
    """load(variant, folder) -> (Module, parameters)"""
    make = lambda variant: lambda rngs: inception.Inception(variant, rngs=rngs)
    return lambda variant, folder: read(make(variant), inception.inception_rows(), folder, ignore=inception.is_ignored)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """{variant: (network in torch, folder with its weights)}"""
    made = {}
    for variant in VARIANTS:
        folder = tmp_path_factory.mktemp(variant)
        network = random_network(variant)
        save_file(network.state_dict(), folder / "model.safetensors")
        made[variant] = network, folder
    return made


def images(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, 3, 1)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_with_torch(networks, load, error, variant):
    network, folder = networks[variant]
    net, params = load(variant, folder)
    x = images(2, 299, 299, 3)
    with torch.no_grad():
        pool3, logits = network(nchw(x))
    out = jax.jit(lambda p, x: net.bind(p)(x))(params, x)
    assert out.pool3.shape == (2, 2048)
    assert out.logits.shape == (2, {"fid": 1008, "torchvision": 1000}[variant])
    # The features differ between the images and few are off: an error would show.
    assert (pool3[0] - pool3[1]).abs().mean() > 0.01 * pool3.mean()
    assert (pool3 > 0).float().mean() > 0.8
    assert error(out.pool3, pool3) <= 1e-5
    assert error(out.logits, logits) <= 1e-5


def test_every_tensor_is_read_or_known(networks):
    for network, _ in networks.values():
        keys = {k for k in network.state_dict() if not inception.is_ignored(k)}
        assert keys == {row.key for row in inception.inception_rows()}
        assert len(keys) == 94 * 5 + 2


def test_size():
    aux = 768 * 128 + 2 * 128 + 25 * 128 * 768 + 2 * 768 + 768 * 1000 + 1000
    # torchvision states 27,161,264 parameters, with the auxiliary classifier and without the running statistics.
    learned = sum(
        int(np.prod(spec.shape))
        for path, spec in leaves(module("torchvision").specs)
        if not path.endswith(("mean", "variance"))
    )
    assert learned + aux == 27_161_264


def leaves(specs, path=""):
    if isinstance(specs, dict):
        return [leaf for k, v in specs.items() for leaf in leaves(v, f"{path}/{k}")]
    return [(path, specs)]


def test_weights_of_the_other_variant_are_an_error(networks, load):
    with pytest.raises(UserError, match=r"fc\.(weight|bias) has shape \(1000") as e:
        load("fid", networks["torchvision"][1])
    assert "\n" not in str(e.value)


def test_missing_and_strange_tensors_are_an_error(networks, load, tmp_path):
    tensors = dict(networks["fid"][0].state_dict())
    tensors["Mixed_8a.branch.conv.weight"] = tensors.pop("Mixed_7c.branch_pool.conv.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"Mixed_7c\.branch_pool\.conv\.weight.*missing.*Mixed_8a.*left over"):
        load("fid", tmp_path)


def test_unknown_variant_is_an_error():
    with pytest.raises(UserError, match="variant 'tf' is unknown; known: fid, torchvision"):
        inception.preprocess(jnp.zeros((1, 8, 8, 3)), "tf")
    with pytest.raises(UserError, match="variant 'tf' is unknown"):
        Network("inception", lambda rngs: inception.Inception("tf", rngs=rngs))


def test_another_size_is_an_error():
    net = module("fid")
    with pytest.raises(ValueError, match="299 px"):
        jax.eval_shape(lambda p, x: net.bind(p)(x), net.abstract(), jnp.zeros((1, 256, 256, 3)))


def test_sharding_leaves_it_whole_on_any_mesh():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    for s in jax.tree.leaves(module("fid").shardings(mesh, DEFAULT_RULES)):
        assert s.spec == PartitionSpec(*[None] * len(s.spec))


def test_bfloat16_convolutions_and_float32_outputs():
    net = Network("inception", lambda rngs: inception.Inception("fid", dtype=jnp.bfloat16, rngs=rngs))
    traced = jax.make_jaxpr(lambda p, x: net.bind(p)(x))(net.abstract(), jnp.zeros((1, 299, 299, 3)))
    convs = [e for e in traced.jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    assert len(convs) == 94
    assert {v.aval.dtype for e in convs for v in e.invars} == {jnp.dtype(jnp.bfloat16)}
    assert [v.dtype for v in traced.out_avals] == [jnp.float32] * 2


def test_float32_products_are_exact_where_the_default_is_not():
    """Features of a metric do not depend on the precision that training runs in."""
    with jax.default_matmul_precision("bfloat16"):
        net = module("fid")
        traced = jax.make_jaxpr(lambda p, x: net.bind(p)(x))(net.abstract(), jnp.zeros((1, 299, 299, 3)))
    products = [e for e in traced.jaxpr.eqns if e.primitive.name in ("conv_general_dilated", "dot_general")]
    assert len(products) == 95
    highest = jax.lax.Precision.HIGHEST
    assert {e.params["precision"] for e in products} <= {highest, (highest, highest)}


# ---------------------------------------------------------------- its input

SIZES = [(40, 64), (299, 512), (600, 333), (1024, 1024)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_preprocess_fid_parity_with_torch(error, size):
    x = images(1, *size, 3)
    ours = jax.jit(lambda x: inception.preprocess(x, "fid"))(x)
    theirs = F.interpolate(nchw(x), size=(299, 299), mode="bilinear", align_corners=False)
    assert error(np.moveaxis(np.asarray(ours), 3, 1), theirs) <= 1e-5


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_preprocess_torchvision_parity_with_torch(error, size):
    x = images(1, *size, 3)
    ours = jax.jit(lambda x: inception.preprocess(x, "torchvision"))(x)
    y = F.interpolate(nchw(x) * 0.5 + 0.5, size=(299, 299), mode="bilinear", align_corners=False, antialias=True)
    y = (y - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert error(np.moveaxis(np.asarray(ours), 3, 1), y) <= 1e-5


def tf1_resize(x, size):
    """TensorFlow 1's resize_bilinear, align_corners=False: sample by sample as its kernel defines it."""
    h, w, c = x.shape
    out = np.zeros((size, size, c))
    for i in range(size):
        y = np.float32(i) * (np.float32(h) / np.float32(size))
        top, bottom, dy = int(y), min(int(y) + 1, h - 1), float(y) - int(y)
        for j in range(size):
            z = np.float32(j) * (np.float32(w) / np.float32(size))
            left, right, dx = int(z), min(int(z) + 1, w - 1), float(z) - int(z)
            upper = x[top, left] + (x[top, right].astype(float) - x[top, left]) * dx
            lower = x[bottom, left] + (x[bottom, right].astype(float) - x[bottom, left]) * dx
            out[i, j] = upper + (lower - upper) * dy
    return out


@pytest.mark.parametrize("size", [(40, 64), (512, 333)], ids=str)
def test_preprocess_tf1_is_the_graph_of_2015(error, size):
    u = np.random.default_rng(1).integers(0, 256, (*size, 3))
    x = (u / 127.5 - 1).astype(np.float32)
    ours = inception.preprocess(jnp.asarray(x)[None], "fid", tf1=True)[0]
    assert error(ours, torch.from_numpy((tf1_resize(u.astype(np.float32), 299) - 128) / 128)) <= 1e-5


def test_preprocess_of_299_px_changes_the_range_alone():
    x = jnp.asarray(images(1, 299, 299, 3))
    np.testing.assert_array_equal(inception.preprocess(x, "fid"), x)
    u = (x + 1) * 127.5
    np.testing.assert_allclose(inception.preprocess(x, "fid", tf1=True), (u - 128) / 128, atol=1e-6)
    with pytest.raises(ValueError, match="tf1"):
        inception.preprocess(x, "torchvision", tf1=True)


def test_gradient_of_preprocess_agrees_with_torch(error):
    x, weight = images(1, 48, 400, 3), images(1, 299, 299, 3)[:, ::-1]
    ours = jax.grad(lambda x: jnp.sum(inception.preprocess(x, "fid") * weight))(jnp.asarray(x))
    t = nchw(x).requires_grad_()
    (F.interpolate(t, size=(299, 299), mode="bilinear", align_corners=False) * nchw(weight)).sum().backward()
    assert error(np.moveaxis(np.asarray(ours), 3, 1), t.grad) <= 1e-5
