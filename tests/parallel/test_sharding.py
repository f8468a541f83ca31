"""Mesh, rules and specs: what is refused, and where every large parameter of the paper's model ends up."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import laion
from gigagan_jax.config import DEFAULT_RULES, MeshConfig, from_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.models.network import path_name
from gigagan_jax.parallel import sharding
from gigagan_jax.training.batch import abstract_batch, batch_shardings
from gigagan_jax.training.state import Networks

# Abstract meshes: no test machine has 64 devices.
FSDP = sharding.abstract_mesh(MeshConfig(data=1, fsdp=64, tensor=1), 64)
MIXED = sharding.abstract_mesh(MeshConfig(data=8, fsdp=4, tensor=2), 64)
DATA = sharding.abstract_mesh(MeshConfig(), 64)


def error_message(function, *args):
    with pytest.raises(UserError) as error:
        function(*args)
    # The verbs print errors in one line.
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- mesh


@pytest.mark.parametrize(
    "sizes, devices, shape",
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((1, -1, 1), 8, (1, 8, 1)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((2, 4, -1), 8, (2, 4, 1)),
        ((4, 2, 1), 8, (4, 2, 1)),
        ((-1, 1, 1), 1, (1, 1, 1)),
    ],
)
def test_mesh_shape_fills_in_what_is_left(sizes, devices, shape):
    assert sharding.mesh_shape(MeshConfig(*sizes), devices) == (1, *shape)
    assert sharding.mesh_shape(MeshConfig(*sizes, slices=3), 3 * devices) == (3, *shape)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((-1, -1, 1), "config.mesh (data=-1 x fsdp=-1 x tensor=1): only one axis may be -1"),
        ((-1, 3, 1), "config.mesh (data=-1 x fsdp=3 x tensor=1): 3 does not divide the 8 devices here"),
        ((-1, 16, 1), "16 does not divide the 8 devices here; --config.mesh.fsdp=1 fits any number of them"),
        ((4, 4, 1), "needs 16 devices, there are 8; set one axis to -1 to fill up"),
        ((2, 2, 1), "needs 4 devices, there are 8; set one axis to -1 to fill up"),
        ((-1, 2, 1, 3), "config.mesh (slices=3 x data=-1 x fsdp=2 x tensor=1): 6 does not divide the 8 devices here"),
        ((-1, 1, 1, 0), "every axis is a positive number, or -1"),
        ((0, 8, 1), "every axis is a positive number, or -1"),
        ((8, -2, 1), "every axis is a positive number, or -1"),
    ],
)
def test_mesh_that_does_not_fit(sizes, message):
    assert message in error_message(sharding.mesh_shape, MeshConfig(*sizes), 8)
    assert message in error_message(sharding.make_mesh, MeshConfig(*sizes))


def test_make_mesh_has_every_device_once():
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}
    few = sharding.make_mesh(MeshConfig(), jax.devices()[:3])
    assert dict(few.shape) == {"slice": 1, "data": 3, "fsdp": 1, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What make_mesh reads of a device, for slices that are not here."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "none"
    process_index: int = 0


def test_each_slice_is_whole():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, slices=2))
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 2, "tensor": 1}
    assert [{d.id for d in part.flat} for part in mesh.devices] == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    # Where the devices say which slice they are of, their order does not matter.
    mixed = [Chip(i, i % 2, platform="gpu") for i in range(8)]
    mesh = sharding.make_mesh(MeshConfig(slices=2), mixed)
    assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]


@pytest.mark.parametrize(
    "slices, chips",
    [
        (1, [Chip(i, i // 4) for i in range(8)]),  # nothing but the data-centre network between them
        (4, [Chip(i, i // 4) for i in range(8)]),
        (2, [Chip(i, i // 2, platform="gpu") for i in range(6)]),
        (2, [Chip(i, i // 3, platform="gpu") for i in range(8)]),
    ],
)
def test_a_slice_that_would_be_cut(slices, chips):
    message = error_message(sharding.make_mesh, MeshConfig(slices=slices), chips)
    found = len({c.slice_index for c in chips})
    assert message == (
        f"config.mesh.slices={slices}: the {len(chips)} devices are of {found} slices, and a part of the mesh would lie "
        f"across two; use --config.mesh.slices={found}"
    )


# ---------------------------------------------------------------- specs


def test_spec_follows_the_rules():
    names = ("kernel", "kernel", "conv_in", "conv_out")
    assert sharding.partition_spec(names, (3, 3, 64, 32), MIXED, DEFAULT_RULES, "w") == P(None, None, "fsdp", "tensor")
    assert sharding.partition_spec(names, (3, 3, 64, 32), FSDP, DEFAULT_RULES, "w") == P(None, None, "fsdp", None)
    assert sharding.partition_spec(("batch", None), (32, 5), MIXED, DEFAULT_RULES, "x") == P(("fsdp", "data"), None)
    assert sharding.partition_spec(("batch",), (64,), FSDP, DEFAULT_RULES, "x") == P("fsdp")
    assert sharding.partition_spec((), (), MIXED, DEFAULT_RULES, "step") == P()


@pytest.mark.parametrize(
    "names, shape, rules, message",
    [
        (
            ("conv_inn", "conv_out"),
            (8, 8),
            {},
            "g/w: logical axis 'conv_inn' has no rule; known: bank, batch, channels",
        ),
        (("embed", "conv_in"), (8, 8), {}, "g/w: mesh axis 'fsdp' would be used twice (embed, conv_in)"),
        (("embed", None), (64, 8), {"embed": "fsdp,fsdp"}, "g/w: mesh axis 'fsdp' would be used twice"),
        (("batch", "mlp"), (32, 8), {"mlp": "data"}, "g/w: mesh axis 'data' would be used twice (batch, mlp)"),
        (
            ("embed", "mlp"),
            (6, 8),
            {},
            "g/w (6, 8): dimension embed=6 does not divide over fsdp=4; use config.mesh.fsdp=2 and let another take the rest "
            "(config.mesh.data=-1), or change config.rules.embed",
        ),
        (("embed",), (7,), {}, "does not divide over fsdp=4; use a smaller mesh axis and let"),
        (("batch",), (48,), {}, "g/w (48,): dimension batch=48 does not divide over fsdpxdata=32"),
        (
            ("embed",),
            (8,),
            {"embed": "fsdb"},
            "config.rules.embed='fsdb': 'fsdb' is not a mesh axis (slice, data, fsdp, tensor)",
        ),
    ],
)
def test_spec_refuses_and_names_the_parameter(names, shape, rules, message):
    assert message in error_message(sharding.partition_spec, names, shape, MIXED, DEFAULT_RULES | rules, "g/w")


def test_spec_wants_a_name_for_every_dimension():
    with pytest.raises(ValueError, match="g/w: 1 axis names for shape"):
        sharding.partition_spec(("embed",), (8, 8), MIXED, DEFAULT_RULES, "g/w")


def test_a_network_that_does_not_fit_is_refused_by_the_name_of_its_parameter(tiny):
    networks = Networks(tiny)
    message = error_message(networks.g.shardings, FSDP, tiny.rules)
    assert message.startswith("generator/")
    assert "does not divide over fsdp=64" in message
    rules = {k: v for k, v in tiny.rules.items() if k != "style"}
    mesh = sharding.abstract_mesh(MeshConfig(1, 2, 1), 2)
    assert "style' has no rule" in error_message(networks.d.shardings, mesh, rules)
    assert error_message(networks.d.shardings, mesh, rules).startswith("discriminator/")


# ---------------------------------------------------------------- batch


def test_check_batch():
    assert sharding.batch_shards(MIXED, DEFAULT_RULES) == 32
    assert sharding.batch_shards(FSDP, DEFAULT_RULES) == 64
    sharding.check_batch(64, 2, MIXED, DEFAULT_RULES)
    message = error_message(sharding.check_batch, 64, 4, MIXED, DEFAULT_RULES)
    assert message == (
        "config.batch_size=64 in 4 micro-batches is 16 images at a time, which does not divide over 32 devices "
        "(fsdp,slice,data); use a multiple of 128"
    )
    assert "multiple of 64" in error_message(sharding.check_batch, 96, 1, FSDP, DEFAULT_RULES)
    slices = sharding.abstract_mesh(MeshConfig(fsdp=4, slices=2), 8)
    assert sharding.batch_shards(slices, DEFAULT_RULES) == 8
    message = error_message(sharding.check_batch, 8, 1, slices, DEFAULT_RULES | {"batch": "fsdp,data"})
    assert message == (
        "config.rules.batch='fsdp,data' leaves out the mesh axis 'slice': its 2 copies of the model would all see the same "
        "images; use 'fsdp,slice,data'"
    )
    four = sharding.abstract_mesh(MeshConfig(2, 2, 2, slices=2), 16)
    sharding.check_batch(8, 1, four, DEFAULT_RULES)
    message = error_message(sharding.check_batch, 8, 1, four, DEFAULT_RULES | {"batch": "fsdp,data,slice"})
    assert message == (
        "config.rules.batch='fsdp,data,slice': in this order XLA mixes up the examples of a batch between devices when "
        "tensor > 1; use 'fsdp,slice,data'"
    )
    sharding.check_batch(
        8, 1, slices, DEFAULT_RULES | {"batch": "slice,data,fsdp"}
    )  # without tensor any order is right


def test_batch_is_shared_among_data_and_fsdp():
    config = from_dict(laion.get_config())
    shards = batch_shardings(config, MIXED)
    assert shards.keys() == {"image", "tokens", "label"}
    for name, x in abstract_batch(config).items():
        assert shards[name].shard_shape(x.shape) == (32, *x.shape[1:])


# ---------------------------------------------------------------- constrain


def test_constrain_outside_a_mesh_is_the_identity():
    x = jnp.arange(6.0).reshape(2, 3)
    assert sharding.constrain(x, "batch", None) is x
    assert sharding.constrain(x, "no such axis", None) is x  # nothing is looked up


def test_constrain_inside_a_mesh_places_the_array():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    with sharding.use_mesh(mesh, DEFAULT_RULES):
        y = jax.jit(lambda x: sharding.constrain(x * 2, "batch", "mlp"))(x)
        with pytest.raises(UserError, match="logical axis 'bacth' has no rule"):
            sharding.constrain(jnp.asarray(x), "bacth", None)
        with pytest.raises(UserError, match="dimension batch=6 does not divide"):
            sharding.constrain(jnp.ones((6, 2)), "batch", None)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(("fsdp", "data"), "tensor")), 2)
    np.testing.assert_array_equal(y, 2 * x)
    assert sharding.constrain(x, "batch", None) is x  # the mesh is gone with the block


def test_use_gives_back_the_mesh_before_it_even_after_an_error():
    mesh = sharding.make_mesh(MeshConfig(data=-1))
    x = jnp.ones((8, 2))
    with sharding.use_mesh(mesh, DEFAULT_RULES):
        with pytest.raises(RuntimeError, match="inside"), sharding.use_mesh(mesh, {}):
            raise RuntimeError("inside")
        assert sharding.constrain(x, "batch", None).sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)
    assert sharding.constrain(x, "batch", None) is x


# ---------------------------------------------------------------- golden specs of the paper's model

# name: (shape, spec and shape on a device with fsdp=64, the same with data=8 x fsdp=4 x tensor=2)
GOLDEN = {
    "generator/constant": (
        (4, 4, 1600),
        (P(None, None, None), (4, 4, 1600)),
        (P(None, None, None), (4, 4, 1600)),
    ),
    "generator/mapping/first/weight": (
        (896, 1024),
        (P("fsdp", None), (14, 1024)),
        (P("fsdp", None), (224, 1024)),
    ),
    "generator/conditioner/encoder/embedding": (
        (259, 768),
        (P(None, "fsdp"), (259, 12)),
        (P(None, "fsdp"), (259, 192)),
    ),
    "generator/conditioner/transformer/blocks/layer/attention/out/weight": (
        (4, 768, 768),
        (P(None, None, "fsdp"), (4, 768, 12)),
        (P(None, "tensor", "fsdp"), (4, 384, 192)),
    ),
    "generator/levels/1/blocks/layer/conv0/filters": (
        (2, 1, 3, 3, 1600, 1600),
        (P(None, None, None, None, "fsdp", None), (2, 1, 3, 3, 25, 1600)),
        (P(None, None, None, None, "fsdp", "tensor"), (2, 1, 3, 3, 400, 800)),
    ),
    "generator/levels/4/entry/conv1/filters": (
        (8, 3, 3, 256, 256),
        (P(None, None, None, "fsdp", None), (8, 3, 3, 4, 256)),
        (P(None, None, None, "fsdp", "tensor"), (8, 3, 3, 64, 128)),
    ),
    "generator/levels/4/entry/conv1/bias": ((256,), (P(None), (256,)), (P("tensor"), (128,))),
    "generator/levels/2/attention/layer/attention/to_query/weight": (
        (2, 1024, 512),
        (P(None, "fsdp", None), (2, 16, 512)),
        (P(None, "fsdp", "tensor"), (2, 256, 256)),
    ),
    "generator/levels/2/attention/layer/self_mlp/down/weight": (
        (2, 4096, 1024),
        (P(None, None, "fsdp"), (2, 4096, 16)),
        (P(None, "tensor", "fsdp"), (2, 2048, 256)),
    ),
    "generator/levels/4/to_rgb/filters": (
        (1, 1, 1, 256, 3),
        (P(None, None, None, "fsdp", None), (1, 1, 1, 4, 3)),
        (P(None, None, None, "fsdp", None), (1, 1, 1, 64, 3)),
    ),
    "discriminator/levels/0/entry/weight": (
        (1, 1, 3, 512),
        (P(None, None, None, None), (1, 1, 3, 512)),
        (P(None, None, None, "tensor"), (1, 1, 3, 256)),
    ),
    "discriminator/levels/1/down/conv1/weight": (
        (3, 3, 1024, 1536),
        (P(None, None, "fsdp", None), (3, 3, 16, 1536)),
        (P(None, None, "fsdp", "tensor"), (3, 3, 256, 768)),
    ),
    "discriminator/levels/4/down/dense/weight": (
        (24576, 1536),
        (P("fsdp", None), (384, 1536)),
        (P("fsdp", "tensor"), (6144, 768)),
    ),
    "discriminator/levels/0/head/layers/0/filters": (
        (1, 1, 1, 1024, 256),
        (P(None, None, None, "fsdp", None), (1, 1, 1, 16, 256)),
        (P(None, None, None, "fsdp", "tensor"), (1, 1, 1, 256, 128)),
    ),
}


def named_leaves(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# Building the paper's networks takes seconds: one fixture serves all golden tests.
@pytest.fixture(scope="module")
def paper():
    """Networks of configs/laion.py:paper, their abstract state, and its shardings on both meshes."""
    networks = Networks(from_dict(laion.get_config("paper-bytes")))
    return networks, networks.abstract(), {mesh: networks.shardings(mesh) for mesh in (FSDP, MIXED)}


def named_parameters(state):
    """{"generator/...": leaf} of both networks."""
    nets = {"generator": state.g, "discriminator": state.d}
    return {f"{name}/{k}": v for name, net in nets.items() for k, v in named_leaves(net.params).items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_spec(paper, name):
    _, abstract, where = paper
    shape, *expected = GOLDEN[name]
    assert named_parameters(abstract)[name].shape == shape
    for mesh, (spec, local) in zip((FSDP, MIXED), expected, strict=True):
        found = named_parameters(where[mesh])[name]
        assert found.spec == spec
        assert found.shard_shape(shape) == local


@pytest.mark.parametrize("mesh, parts", [(FSDP, 64), (MIXED, 4)])
def test_no_large_parameter_is_replicated(paper, mesh, parts):
    """Every parameter of more than a million elements is cut by fsdp at least."""
    _, abstract, where = paper
    placed = named_parameters(where[mesh])
    large = {k: x for k, x in named_parameters(abstract).items() if math.prod(x.shape) > 1_000_000}
    # Guards against an empty selection, which would pass.
    assert len(large) > 100
    for name, x in large.items():
        assert math.prod(placed[name].shard_shape(x.shape)) <= math.prod(x.shape) / parts, name


@pytest.mark.parametrize("mesh, share", [(FSDP, 0.02), (MIXED, 0.2)])
def test_share_of_one_device(paper, mesh, share):
    """The whole state, small parts included: 1/64 and a quarter to an eighth."""
    _, abstract, where = paper
    arrays = jax.tree.leaves(abstract)
    whole = sum(math.prod(x.shape) for x in arrays)
    one = sum(math.prod(s.shard_shape(x.shape)) for x, s in zip(arrays, jax.tree.leaves(where[mesh]), strict=True))
    assert whole > 2.5e9
    assert one / whole < share


@pytest.mark.parametrize(
    "names, shape, mesh, expected",
    [
        # longest that divides by data, the last of equals
        (("kernel", "kernel", "conv_in", "conv_out"), (3, 3, 256, 256), DATA, P(None, None, None, "data")),
        (("kernel", "kernel", "conv_in", "conv_out"), (3, 3, 512, 256), DATA, P(None, None, "data", None)),
        (("vocab", "embed"), (259, 768), DATA, P(None, "data")),
        # what the parameter has stays; fsdp leaves the shorter half
        (("conv_in", "conv_out"), (512, 256), MIXED, P("fsdp", ("tensor", "data"))),
        (("conv_in", "conv_out"), (2048, 256), MIXED, P(("fsdp", "data"), "tensor")),
        (("layers", "embed", "heads"), (2, 1024, 512), FSDP, P(None, "fsdp", None)),  # there is no data axis
        # none divides; too small
        (("conv_in", "conv_out"), (1600, 900), sharding.abstract_mesh(MeshConfig(), 512), P(None, None)),
        (("conv_in", "conv_out"), (64, 64), DATA, P(None, None)),
    ],
)
def test_optimizer_spec(names, shape, mesh, expected):
    assert sharding.optimizer_spec(names, shape, mesh, DEFAULT_RULES, "w") == expected
    off = sharding.optimizer_spec(names, shape, mesh, DEFAULT_RULES | {"optimizer": ""}, "w")
    assert off == sharding.partition_spec(names, shape, mesh, DEFAULT_RULES, "w")


@pytest.mark.parametrize("beta1, cut", [(0.0, True), (0.5, True), (0.0, False)])
def test_moments_and_averages_are_placed_by_their_parameter(tiny, beta1, cut, monkeypatch):
    """As it, or cut further by data."""
    # The arrays of the tiny config are all below the real limit.
    monkeypatch.setattr(sharding, "MIN_ELEMENTS_TO_SHARD", 64)
    config = dataclasses.replace(
        tiny,
        mesh=MeshConfig(shard_optimizer=cut),
        **{o: dataclasses.replace(getattr(tiny, o), beta1=beta1) for o in ("g_optimizer", "d_optimizer")},
    )
    networks = Networks(config)
    mesh = sharding.abstract_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 8)
    where, abstract = networks.shardings(mesh), networks.abstract()
    assert jax.tree.structure(where) == jax.tree.structure(abstract)
    place = sharding.optimizer_spec if cut else sharding.partition_spec
    for module, net, like in ((networks.g, where.g, abstract.g), (networks.d, where.d, abstract.d)):
        expected = named_leaves(module.shardings(mesh, config.rules, place))
        differ = [k for k, s in named_leaves(net.params).items() if s.spec != expected[k].spec]
        assert len(differ) > 50 if cut else not differ
        moments = 0
        shapes = named_leaves(like.opt)
        for name, s in named_leaves(net.opt).items():
            # A moment's path ends with that of its parameter; the longest match is the parameter itself.
            of = [p for p in expected if name.endswith("/" + p)]
            if of:
                assert s.spec == expected[max(of, key=len)].spec, name
                moments += 1
            else:
                assert s.spec == P(), name
                assert shapes[name].shape == (), name
        # Adam without beta1 stores no first moment.
        assert moments == (2 if beta1 else 1) * len(expected)
    assert where.g_ema == networks.g.shardings(mesh, config.rules, place)
    for s in (where.step, where.images, where.w_avg):
        assert s.spec == P()


def test_the_state_is_born_where_it_belongs(tiny, monkeypatch):
    """And with the same values on any mesh."""
    monkeypatch.setattr(sharding, "MIN_ELEMENTS_TO_SHARD", 64)
    networks = Networks(tiny)
    states = {}
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = sharding.make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])
        state = networks.init(mesh)
        for x, s, a in zip(*map(jax.tree.leaves, (state, networks.shardings(mesh), networks.abstract())), strict=True):
            assert x.sharding.is_equivalent_to(s, x.ndim)
            assert (x.shape, x.dtype) == (a.shape, a.dtype)
        states[shape] = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, *states.values())
