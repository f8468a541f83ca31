"""Parameters of the networks: how many, how drawn, and that neither mesh nor order changes a value."""

import importlib
import itertools
import math

import jax
import numpy as np
import pytest

from gigagan_jax.config import DEFAULT_RULES, Config, MeshConfig, from_dict
from gigagan_jax.models.build import build_discriminator, build_generator
from gigagan_jax.models.network import is_spec, path_name
from gigagan_jax.parallel import sharding

NETWORKS = {"generator": build_generator, "discriminator": build_discriminator}


def network(name, config):
    return NETWORKS[name](config)


def config_of(name, arg=""):
    return from_dict(importlib.import_module(f"configs.{name}").get_config(*([arg] if arg else [])))


@pytest.fixture(scope="module")
def paper():
    return {name: network(name, Config()) for name in NETWORKS}


@pytest.mark.parametrize("name, millions", [("generator", 652.5), ("discriminator", 381.4)])
def test_size_of_the_papers_text_to_image_model(paper, name, millions):
    assert paper[name].count() / 1e6 == pytest.approx(millions, rel=0.015)


@pytest.mark.parametrize("name, millions", [("generator", 209.5), ("discriminator", 76.7)])
def test_size_of_the_papers_imagenet_model(name, millions):
    assert network(name, config_of("imagenet")).count() / 1e6 == pytest.approx(millions, rel=0.015)


def leaves(module):
    return [(path_name(p), s) for p, s in jax.tree_util.tree_leaves_with_path(module.specs, is_leaf=is_spec)]


def on(module, config, devices, seed=0, rules=DEFAULT_RULES):
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    return module.init(seed, module.shardings(mesh, rules))


@pytest.fixture(scope="module")
def networks(tiny):
    return {name: network(name, tiny) for name in NETWORKS}


@pytest.mark.parametrize("name", NETWORKS)
def test_values_have_the_declared_mean_and_deviation(networks, name):
    module = networks[name]
    values = on(module, MeshConfig(), 1)
    flat = {path_name(p): np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(values)}
    drawn = 0
    for path, spec in leaves(module):
        value = flat[path]
        assert (value.shape, value.dtype) == (spec.shape, np.float32), path
        if not spec.std:
            np.testing.assert_array_equal(value, np.float32(spec.mean), err_msg=path)
            continue
        drawn += 1
        error = spec.std / math.sqrt(value.size)
        assert abs(value.mean() - spec.mean) < 5 * error, path
        assert abs(value.std() - spec.std) < 5 * error, path
    assert drawn > 20
    assert module.count() == sum(v.size for v in flat.values())


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_values_do_not_depend_on_the_mesh(networks, name, mesh):
    module = networks[name]
    whole, sharded = on(module, MeshConfig(), 1), on(module, mesh, 8)
    jax.tree.map(np.testing.assert_array_equal, whole, sharded)
    parts = 0
    for value in jax.tree.leaves(sharded):
        assert len(value.sharding.device_set) == 8
        parts += value.addressable_shards[0].data.size
    assert parts < 0.4 * module.count(), "most parameters are cut over the mesh"


def test_seed_name_and_network_choose_the_values(networks):
    g = networks["generator"]
    a, b, again = (jax.tree.map(np.asarray, on(g, MeshConfig(), 1, seed)) for seed in (0, 1, 0))
    jax.tree.map(np.testing.assert_array_equal, a, again)
    for (path, spec), x, y in zip(leaves(g), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x == y).all() == (not spec.std), path

    by_shape: dict[tuple[int, ...], list] = {}
    for name, module in networks.items():
        values = jax.tree.leaves(on(module, MeshConfig(), 1))
        for (path, spec), value in zip(leaves(module), values, strict=True):
            if spec.std:
                by_shape.setdefault(spec.shape, []).append((f"{name}/{path}", np.asarray(value) / spec.std))
    compared = 0
    for same in by_shape.values():
        for (p, x), (q, y) in itertools.combinations(same, 2):
            compared += 1
            assert not np.isclose(x, y).all(), f"{p} and {q} are drawn alike"
    assert compared > 50


@pytest.mark.parametrize(
    "config, arg",
    [("laion", "tiny"), ("imagenet", "tiny"), ("imagenet", ""), ("digits", ""), ("ablation", "stylegan2")],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_dimension_has_an_axis_with_a_rule_or_none(name, config, arg):
    module = network(name, config_of(config, arg))
    for path, spec in leaves(module):
        assert len(spec.axes) == len(spec.shape), path
        assert set(spec.axes) - {None} <= set(DEFAULT_RULES), path


@pytest.mark.parametrize("name", NETWORKS)
def test_sharding_of_the_papers_model_leaves_no_large_parameter_whole(paper, name):
    mesh = sharding.abstract_mesh(MeshConfig(data=1, fsdp=64), 64)
    where = paper[name].shardings(mesh, DEFAULT_RULES)
    for (path, spec), s in zip(leaves(paper[name]), jax.tree.leaves(where), strict=True):
        if math.prod(spec.shape) > 300_000:
            assert any(s.spec), f"{path} {spec.shape} is whole on every device"
