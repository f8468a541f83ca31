"""The optimizer against PyTorch's AdamW, who gets which weight decay, and the learning rate over images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from configs import imagenet
from gigagan_jax.config import OptimizerConfig, from_dict
from gigagan_jax.models.network import Spec, is_spec, path_name
from gigagan_jax.training.health import step_statistics
from gigagan_jax.training.optimizer import decay_rates, learning_rate, make_optimizer
from gigagan_jax.training.state import Net, Networks
from gigagan_jax.training.step import apply_update

SHAPES = {
    "conv": {"filters": (2, 3, 3, 4, 5), "bias": (5,)},
    "attention": [{"layer": {"to_query": {"weight": (2, 4, 6)}, "gain": (2, 4)}}],
    "linear": {"weight": (3, 4), "bias": (4,)},
}
AXES = {
    "conv": {"filters": ("bank", "kernel", "kernel", "conv_in", "conv_out"), "bias": ("conv_out",)},
    "attention": [{"layer": {"to_query": {"weight": ("layers", "embed", "heads")}, "gain": ("layers", "channels")}}],
    "linear": {"weight": ("style", None), "bias": (None,)},
}
is_tuple = lambda x: isinstance(x, tuple)
SPECS = jax.tree_util.tree_map_with_path(
    lambda path, axes: Spec((), axes, 0.0, 1.0, attention=path[0].key == "attention"), AXES, is_leaf=is_tuple
)
# Large enough decays that mistaking one for the other, or decaying a bias, shows within 20 steps.
CONFIG = OptimizerConfig(weight_decay=0.02, attention_weight_decay=0.3)


def test_defaults_are_the_papers():
    c = OptimizerConfig()
    assert (c.learning_rate, c.beta1, c.beta2, c.epsilon) == (0.0025, 0.0, 0.99, 1e-8)
    assert (c.weight_decay, c.attention_weight_decay) == (1e-5, 0.01)


@pytest.mark.parametrize("lazy_interval", [0, 16])
@pytest.mark.parametrize("beta1", [0.0, 0.5])
def test_twenty_steps_equal_adamw_of_torch(beta1, lazy_interval):
    config = dataclasses.replace(CONFIG, beta1=beta1)
    rng = np.random.default_rng(0)
    draw = lambda scale: jax.tree.map(lambda s: rng.normal(0, scale, s).astype(np.float32), SHAPES, is_leaf=is_tuple)
    params = draw(1.0)
    # From large to tiny gradients: below epsilon the place where it is added shows.
    grads = [draw(10.0 ** -(i % 10)) for i in range(20)]
    rate = 0.01

    tx = make_optimizer(config, SPECS, lazy_interval=lazy_interval)
    net = Net(params, tx.init(params))
    ok = jnp.asarray(True)
    update = jax.jit(lambda net, grads: apply_update(tx, net, grads, jnp.asarray(rate), ok)[0])

    leaves, tree = jax.tree.flatten(params)
    theirs = [torch.nn.Parameter(torch.tensor(x)) for x in leaves]
    decays = {"filters": 0.02, "to_query": 0.3, "linear/weight": 0.02}
    names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    decay = [sum(d for part, d in decays.items() if part in name) for name in names]
    assert sorted(decay) == [0, 0, 0, 0.02, 0.02, 0.3]
    power = lazy_interval / (lazy_interval + 1) if lazy_interval else 1.0
    adamw = torch.optim.AdamW(
        [{"params": [p], "weight_decay": d} for p, d in zip(theirs, decay, strict=True)],
        lr=rate,
        betas=(beta1**power if beta1 else 0.0, 0.99**power),
        eps=1e-8,
    )
    for grad in grads:
        net, norm = update(net, grad), np.sqrt(sum(step_statistics.squared_norms(grad)))
        for p, g in zip(theirs, jax.tree.leaves(grad), strict=True):
            p.grad = torch.tensor(g)
        adamw.step()
        expected = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grad)))
        np.testing.assert_allclose(norm, expected, rtol=1e-5)
    for name, ours, p in zip(names, tree.flatten_up_to(net.params), theirs, strict=True):
        np.testing.assert_allclose(ours, p.detach().numpy(), rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("beta1, moments", [(0.0, 1), (0.5, 2)])
def test_without_beta1_only_the_second_moment_is_stored(beta1, moments):
    params = jax.tree.map(np.zeros, SHAPES, is_leaf=is_tuple)
    tx = make_optimizer(dataclasses.replace(CONFIG, beta1=beta1), SPECS)
    stored = sum(x.size for x in jax.tree.leaves(tx.init(params)) if x.ndim)
    assert stored == moments * sum(x.size for x in jax.tree.leaves(params))


def test_moments_are_found_as_parameters_of_the_optimizer():
    """What `Networks.shardings` rests on: every array of the optimizer's state that follows a parameter."""
    params = jax.tree.map(np.zeros, SHAPES, is_leaf=is_tuple)
    tx = make_optimizer(CONFIG, SPECS)
    marked = optax.tree_map_params(tx, lambda *_: "moment", tx.init(params), transform_non_params=lambda _: "other")
    assert sorted(jax.tree.leaves(marked)) == ["moment"] * 6 + ["other"]


# ---------------------------------------------------------------- who is attention


def named(tree, is_leaf=None):
    return {path_name(p): (p, x) for p, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


@pytest.fixture(scope="module")
def parameters(tiny):
    """{name: Spec} of all parameters of both networks, three configs."""
    every = dataclasses.replace(tiny, generator=dataclasses.replace(tiny.generator, attention_placement="every"))
    classes = from_dict(imagenet.get_config("tiny"))
    out = {}
    for title, config in (("text", tiny), ("every", every), ("class", classes)):
        networks = Networks(config)
        for net, module in (("g", networks.g), ("d", networks.d)):
            out |= {f"{title}/{net}/{k}": v for k, (_, v) in named(module.specs, is_spec).items()}
    return out


def test_all_of_an_attention_layer_is_attention(parameters):
    parts = ("to_query", "to_key", "to_value", "out", "self_mlp", "cross_mlp", "cross", "to_extra")
    found = dict.fromkeys(parts, 0)
    for name, spec in parameters.items():
        for part in found.keys() & set(name.split("/")):
            assert spec.attention, name
            found[part] += 1
    assert min(found.values()) > 0, found
    in_d = [k for k in parameters if k.startswith("class/d/levels") and "/feed_forward/" in k]
    assert in_d
    assert all(parameters[k].attention for k in in_d)
    in_t = [k for k in parameters if "/transformer/blocks/" in k and "/attention/" in k]
    assert {k.split("/")[0] for k in in_t} == {"text", "every"}
    assert all(parameters[k].attention for k in in_t)


def test_convolutions_and_what_surrounds_them_are_not(parameters):
    parts = (
        "filters",
        "skip",
        "select",
        "style",
        "mapping",
        "constant",
        "conv1",
        "encoder",
        "unconditional",
        "to_rgb",
        "dense",
    )
    found = dict.fromkeys(parts, 0)
    for name, spec in parameters.items():
        for part in found.keys() & set(name.split("/")):
            assert not spec.attention, name
            found[part] += 1
    assert min(found.values()) > 0, found


def test_decay_of_the_real_networks(parameters, tiny):
    """Biases and gains have none, stacked or not; attention has its own; all else the common one."""
    config = OptimizerConfig(weight_decay=1.0, attention_weight_decay=2.0)
    networks = Networks(tiny)
    for net, module in (("g", networks.g), ("d", networks.d)):
        specs = named(module.specs, is_spec)
        for name, (_, rate) in named(decay_rates(config, module.specs)).items():
            leaf = name.split("/")[-1]
            shape = named(module.abstract())[name][1].shape
            if leaf in ("bias", "gain"):
                assert rate == 0.0, name
                assert len(shape) <= 2
            else:
                assert leaf in ("weight", "filters", "constant", "embedding", "position", "mix"), name
                assert rate == (2.0 if specs[name][1].attention else 1.0), name
            assert f"text/{net}/{name}" in parameters


# ---------------------------------------------------------------- learning rate


def rate(config, images, total=100.0, **kw):
    return float(learning_rate(config, jnp.asarray(images, jnp.uint32), total, **kw))


def test_constant():
    for images in (0, 1, 50_000, 100_000, 4_000_000_000):
        assert rate(OptimizerConfig(), images) == pytest.approx(0.0025)


def test_warm_up_is_linear_in_images():
    config = OptimizerConfig(warmup_kimg=10.0)
    for images, share in ((0, 0.0), (2_500, 0.25), (5_000, 0.5), (10_000, 1.0), (90_000, 1.0)):
        assert rate(config, images) == pytest.approx(0.0025 * share)


def test_cosine_at_the_end():
    config = OptimizerConfig(decay_kimg=40.0, final_ratio=0.1)
    for images, cosine in (
        (0, 1.0),
        (60_000, 1.0),
        (70_000, 0.5 + 0.5**1.5),
        (80_000, 0.5),
        (100_000, 0.0),
        (120_000, 0.0),
    ):
        assert rate(config, images) == pytest.approx(0.0025 * (0.1 + 0.9 * cosine), rel=1e-5)
    assert rate(dataclasses.replace(config, final_ratio=0.0), 100_000) == 0


def test_warm_up_and_cosine_multiply():
    config = OptimizerConfig(warmup_kimg=100.0, decay_kimg=100.0)
    assert rate(config, 50_000) == pytest.approx(0.0025 * 0.5 * 0.5, rel=1e-5)


def test_lazy_regularisation_lowers_the_rate():
    """16 steps and one penalty count as 17 updates (StyleGAN2, appendix B)."""
    assert rate(OptimizerConfig(), 0, lazy_interval=16) == pytest.approx(0.0025 * 16 / 17)
    assert rate(OptimizerConfig(), 0, lazy_interval=1) == pytest.approx(0.00125)
