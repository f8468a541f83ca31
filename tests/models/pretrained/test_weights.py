"""What is in weight files: damaged or unfitting ones are one line that says where and how to mend it; values and identity."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx

from gigagan_jax.config import DEFAULT_RULES, MeshConfig
from gigagan_jax.models.layers.equalized import ScannedLayers, declare_parameter
from gigagan_jax.models.network import Network
from gigagan_jax.models.pretrained.hub import CONFIG, INDEX, SINGLE, read_json
from gigagan_jax.models.pretrained.transformer import Dense
from gigagan_jax.models.pretrained.weights import (
    Row,
    Weights,
    conv_to_hwio,
    load_params,
    require_type,
    transpose_linear,
)
from gigagan_jax.parallel import sharding

BLOCKS = 11  # with two digits: number 10 comes after 9, not after 1


# ---------------------------------------------------------------- a network and its files


class Net(nnx.Module):
    """Every kind of row: as stored, transposed, stacked, a convolution, a scalar."""

    def __init__(self, *, rngs):
        self.table = declare_parameter(rngs, (6, 8), ("vocab", "embed"))
        make = lambda: Dense(8, 12, axes=("embed", "mlp"), dtype=jnp.float32, rngs=rngs)
        self.blocks = ScannedLayers(make, BLOCKS, rngs=rngs)
        self.stem = declare_parameter(rngs, (3, 3, 2, 4), ("kernel", "kernel", "conv_in", "conv_out"))
        self.scale = declare_parameter(rngs, (), ())


ROWS = [
    Row("table", "net.table.weight"),
    Row("blocks/layer/weight", "net.layers.{}.fc.weight", transpose_linear),
    Row("blocks/layer/bias", "net.layers.{}.fc.bias"),
    Row("stem", "net.stem.weight", conv_to_hwio),
    Row("scale", "scale"),
]
MODULE = Network("net", lambda rngs: Net(rngs=rngs))


def tensors():
    rng = np.random.default_rng(0)
    shapes = {"net.table.weight": (6, 8), "net.stem.weight": (4, 2, 3, 3), "scale": ()}
    for i in range(BLOCKS):
        shapes |= {f"net.layers.{i}.fc.weight": (12, 8), f"net.layers.{i}.fc.bias": (12,)}
    return {key: np.asarray(rng.standard_normal(shape), np.float32) for key, shape in shapes.items()}


def params_of(stored):
    """What the parameters should be, from the tensors of a file."""
    blocks = [(stored[f"net.layers.{i}.fc.weight"].T, stored[f"net.layers.{i}.fc.bias"]) for i in range(BLOCKS)]
    weights, biases = (np.stack(x) for x in zip(*blocks, strict=True))
    return {
        "table": stored["net.table.weight"],
        "blocks": {"layer": {"weight": weights, "bias": biases}},
        "stem": np.moveaxis(stored["net.stem.weight"], (0, 1), (3, 2)),
        "scale": stored["scale"],
    }


def write(folder, stored, shards=0):
    """A folder as transformers writes it, in one file or with an index."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text("{}")
    if not shards:
        safetensors.numpy.save_file(stored, folder / SINGLE)
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    place = {key: names[i % shards] for i, key in enumerate(stored)}
    for name in names:
        safetensors.numpy.save_file({k: v for k, v in stored.items() if place[k] == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def read(folder, mesh, rows=ROWS, dtype_of=lambda spec: jnp.float32, **predicates):
    """(parameters, identity)"""
    where = MODULE.shardings(mesh, DEFAULT_RULES)
    return load_params(MODULE, rows, Weights(folder), shardings=where, dtype_of=dtype_of, **predicates)


def equal(params, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), expected)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "net", tensors())


@pytest.fixture
def shards(tmp_path):
    return write(tmp_path / "shards", tensors(), shards=3)


# ---------------------------------------------------------------- damaged files


def cuts(data):
    """Lengths at which a safetensors file may be cut: before, in and after its header, and in its values."""
    header = 8 + int.from_bytes(data[:8], "little")
    return [
        0,
        1,
        7,
        8,
        9,
        (8 + header) // 2,
        header - 1,
        header,
        (header + len(data)) // 2,
        len(data) - 4,
        len(data) - 1,
    ]


def test_a_file_that_is_cut_short(folder, shards, refused):
    for file in (folder / SINGLE, sorted(shards.glob("*.safetensors"))[1]):
        data = file.read_bytes()
        for size in cuts(data):
            file.write_bytes(data[:size])
            refused(lambda file=file: Weights(file.parent), file, "cut short", f"{size} bytes", "fetch it again")


@pytest.mark.parametrize(
    "content",
    [
        lambda data: bytes(len(data)),
        lambda data: data + b"\0",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: b"<!DOCTYPE html>\n<html>\n</html>\n",
    ],
    ids=["zeros", "longer", "header_of_any_length", "header_no_json", "web_page"],
)
def test_a_file_of_something_else(folder, content, refused):
    file = folder / SINGLE
    file.write_bytes(content(file.read_bytes()))
    refused(lambda: Weights(folder), file, "damaged", "fetch it again")


def test_a_shard_that_is_missing(shards, refused):
    file = sorted(shards.glob("*.safetensors"))[2]
    file.unlink()
    refused(lambda: Weights(shards), file, "is missing", "the index names it", "fetch it again")


@pytest.mark.parametrize(
    "values", [{}, {"metadata": {}}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": None}]
)
def test_an_index_that_names_no_shards(shards, values, refused):
    (shards / INDEX).write_text(json.dumps(values))
    refused(lambda: Weights(shards), shards / INDEX, "weight_map", "fetch it again")


UNREADABLE = {
    "empty": b"",
    "cut": b'{"weight_map": {"a": "mod',
    "no_text": b"\xff\xfe\x00",
    "web_page": b"<html>\n</html>",
    "list": b"[1]",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_json_that_cannot_be_read(shards, content, refused):
    (shards / INDEX).write_bytes(content)
    refused(lambda: Weights(shards), shards / INDEX, "fetch it again")
    refused(lambda: read_json(shards / INDEX), shards / INDEX, "fetch it again")


def test_json_that_is_not_there(tmp_path, refused):
    refused(lambda: read_json(tmp_path / CONFIG), tmp_path / CONFIG, "fetch it again")
    (tmp_path / CONFIG).mkdir()
    refused(lambda: read_json(tmp_path / CONFIG), tmp_path / CONFIG, "fetch it again")


def test_values_of_a_config_are_checked(tmp_path, refused):
    file = tmp_path / CONFIG
    values = {"width": 8, "rate": "fast", "flag": True, "nothing": None}
    assert require_type(values, "width", int, file) == 8
    for key, kind in (("rate", float), ("flag", int), ("nothing", str), ("absent", int)):
        refused(lambda key=key, kind=kind: require_type(values, key, kind, file), file, f"{key}=", kind.__name__)


# ---------------------------------------------------------------- tensors that do not fit


def test_tensors_that_are_missing(tmp_path, mesh, refused):
    stored = tensors()
    del stored["scale"]
    write(tmp_path / "one", stored)
    refused(lambda: read(tmp_path / "one", mesh), tmp_path / "one", "net", "1 (scale) missing", CONFIG)
    for i in range(BLOCKS):
        del stored[f"net.layers.{i}.fc.bias"]
    write(tmp_path / "more", stored)
    message = refused(lambda: read(tmp_path / "more", mesh), f"{BLOCKS + 1} (net.layers.0.fc.bias, ", ", ...) missing")
    assert "left over" not in message


def test_tensors_that_are_left_over(tmp_path, mesh, refused):
    stored = tensors()
    deeper = stored | {f"net.layers.{BLOCKS}.fc.bias": np.zeros(12, np.float32)}
    write(tmp_path / "deeper", deeper)
    message = refused(
        lambda: read(tmp_path / "deeper", mesh), tmp_path / "deeper", f"1 (net.layers.{BLOCKS}.fc.bias) left over"
    )
    assert "missing" not in message
    renamed = {k.replace("table", "embedding"): v for k, v in stored.items()}
    write(tmp_path / "renamed", renamed)
    refused(
        lambda: read(tmp_path / "renamed", mesh), "1 (net.table.weight) missing", "1 (net.embedding.weight) left over"
    )


def test_tensors_of_other_towers_and_buffers_are_no_matter(tmp_path, mesh):
    more = {"other.weight": np.zeros(3, np.float32), "net.position_ids": np.arange(5)}
    write(tmp_path / "net", tensors() | more)
    params, identity = read(
        tmp_path / "net",
        mesh,
        ours=lambda k: not k.startswith("other."),
        ignore=lambda k: k.endswith("position_ids"),
    )
    equal(params, params_of(tensors()))
    assert identity == read(write(tmp_path / "plain", tensors()), mesh)[1]


@pytest.mark.parametrize(
    "key, shape, expected",
    [
        ("net.table.weight", (7, 8), (6, 8)),
        ("net.layers.10.fc.weight", (8, 12), (8, 12)),
        ("net.layers.4.fc.bias", (12, 1), (12,)),
        ("net.stem.weight", (4, 2, 1, 1), (3, 3, 2, 4)),
        ("net.stem.weight", (4, 18), (3, 3, 2, 4)),
        ("scale", (1,), ()),
    ],
)
def test_a_tensor_of_another_shape(tmp_path, mesh, key, shape, expected, refused):
    write(tmp_path / "net", tensors() | {key: np.zeros(shape, np.float32)})
    refused(
        lambda: read(tmp_path / "net", mesh), tmp_path / "net", f"{key} has shape {shape}", expected, "net/", CONFIG
    )


def test_a_table_that_is_not_of_the_network_is_the_programs_fault(folder, mesh):
    for rows in (ROWS[1:], [*ROWS, Row("other", "other")]):
        with pytest.raises(ValueError, match="key table"):
            read(folder, mesh, rows=rows)


# ---------------------------------------------------------------- what is read


def test_values_from_one_file_and_from_shards(folder, shards, mesh):
    for place in (folder, shards):
        equal(read(place, mesh)[0], params_of(tensors()))
    # The whole file wins over shards beside it.
    changed = tensors() | {"scale": np.asarray(5, np.float32)}
    safetensors.numpy.save_file(changed, shards / SINGLE)
    assert float(read(shards, mesh)[0]["scale"]) == 5


def test_identity_is_of_names_and_values_only(folder, shards, tmp_path, mesh):
    identity = read(folder, mesh)[1]
    assert re.fullmatch("[0-9a-f]{64}", identity)
    assert read(shards, mesh)[1] == identity
    assert read(folder, mesh, dtype_of=lambda spec: jnp.bfloat16)[1] == identity
    backwards = dict(reversed(tensors().items()))
    assert read(write(tmp_path / "backwards", backwards), mesh)[1] == identity


def test_identity_changes_with_any_value(tmp_path, mesh):
    seen = {read(write(tmp_path / "same", tensors()), mesh)[1]}
    keys = ["net.table.weight", "net.layers.0.fc.weight", "net.layers.10.fc.bias", "net.stem.weight", "scale"]
    for i, key in enumerate(keys):
        stored = tensors()
        stored[key].flat[-1] = np.nextafter(stored[key].flat[-1], np.float32(9))
        seen.add(read(write(tmp_path / str(i), stored), mesh)[1])
    # And when two tensors change places, or are stored in another precision.
    stored = tensors()
    stored["net.layers.1.fc.bias"], stored["net.layers.2.fc.bias"] = (stored[f"net.layers.{i}.fc.bias"] for i in (2, 1))
    seen.add(read(write(tmp_path / "swapped", stored), mesh)[1])
    seen.add(read(write(tmp_path / "half", {k: v.astype(np.float16) for k, v in tensors().items()}), mesh)[1])
    assert len(seen) == 1 + len(keys) + 2


def test_half_precision_files(tmp_path, mesh):
    half = {k: v.astype(np.float16) for k, v in tensors().items()}
    params, _ = read(write(tmp_path / "float16", half), mesh)
    equal(params, params_of({k: v.astype(np.float32) for k, v in half.items()}))
    brain = {k: torch.tensor(v).to(torch.bfloat16) for k, v in tensors().items()}
    write(tmp_path / "bfloat16", {})
    safetensors.torch.save_file(brain, tmp_path / "bfloat16" / SINGLE)
    params, _ = read(tmp_path / "bfloat16", mesh)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    equal(params, params_of({k: v.float().numpy() for k, v in brain.items()}))
    kept, _ = read(tmp_path / "bfloat16", mesh, dtype_of=lambda spec: jnp.bfloat16)
    equal(kept, params_of({k: v.float().numpy().astype(ml_dtypes.bfloat16) for k, v in brain.items()}))


def test_dtype_and_sharding_are_as_asked(folder, mesh):
    eight = sharding.make_mesh(MeshConfig(2, 2, 2))
    dtype_of = lambda spec: "bfloat16" if len(spec.axes) > 1 else "float32"
    params, identity = read(folder, eight, dtype_of=dtype_of)
    assert identity == read(folder, mesh)[1]
    where = MODULE.shardings(eight, DEFAULT_RULES)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(f"{x.sharding} instead of {s}"), params, where)
    layer = params["blocks"]["layer"]
    parts = {"table": params["table"], "weight": layer["weight"], "bias": layer["bias"], "stem": params["stem"]}
    assert {k: (x.dtype.name, x.addressable_shards[0].data.shape) for k, x in parts.items()} == {
        "table": ("bfloat16", (6, 4)),
        "weight": ("bfloat16", (BLOCKS, 4, 6)),
        "bias": ("bfloat16", (BLOCKS, 6)),
        "stem": ("bfloat16", (3, 3, 1, 2)),
    }
    assert params["scale"].dtype == jnp.float32
    bfloat16 = lambda x: x.astype(ml_dtypes.bfloat16) if x.ndim else x
    equal(params, jax.tree.map(bfloat16, params_of(tensors())))
