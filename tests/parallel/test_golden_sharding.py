"""Golden specs of every config on 8, 64 and 512 devices, and that nothing large is replicated. `python -m tests.golden.make`
writes them anew."""

import math

import pytest

from configs import ablation, laion, scale
from gigagan_jax.config import MeshConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.parallel import sharding
from gigagan_jax.training.state import Networks
from tests.config.test_configs import FILES
from tests.config.test_configs import VARIANTS as TESTED
from tests.golden import make

# Elements; smaller arrays may be replicated.
LARGE = 1_000_000


@pytest.fixture(scope="module", params=make.VARIANTS, ids=lambda v: ":".join(filter(None, v)))
def variant(request):
    return request.param, Networks(make.load(*request.param))


def test_no_config_is_without_a_golden_file():
    # A new config must not pass without golden specs.
    assert {name for name, _ in make.VARIANTS} == set(FILES)
    assert set(TESTED) <= set(make.VARIANTS)
    assert {arg for name, arg in make.VARIANTS if name == "ablation"} == set(ablation.ROWS)
    assert {p.name for p in make.FOLDER.iterdir()} == {make.file(*v).name for v in make.VARIANTS}
    assert not set(scale.SIZES) - {arg for _, arg in make.VARIANTS}
    assert laion.get_config("bytes").name == "laion-bytes"


def test_golden(variant):
    name, networks = variant
    expected, found = make.file(*name).read_text().splitlines(), make.text(networks).splitlines()
    assert found == expected, "if it is meant: python -m tests.golden.make, and look at the difference"


def test_nothing_large_is_replicated_where_the_rules_cut_it(variant):
    """Of more than a million elements, frozen networks included: every array is cut by fsdp, its moments by data too."""
    _, networks = variant
    checked = 0
    for devices, meshes in make.MESHES.items():
        for sizes in meshes:
            mesh = sharding.abstract_mesh(MeshConfig(*sizes), devices)
            try:
                placed = [p for p in make.placed(networks, mesh) if math.prod(p.spec.shape) > LARGE]
            except UserError:
                continue  # refused: the golden file holds the error
            fsdp, data = mesh.shape["fsdp"], mesh.shape["data"]
            for p in placed:
                shape, size = p.spec.shape, math.prod(p.spec.shape)
                local = p.own.shard_shape(shape)
                assert math.prod(local) * fsdp <= size, (p.name, sizes)
                # Counts what the rules really shard.
                checked += fsdp > 1
                if p.moments is not None and any(n % data == 0 for n in local):
                    assert math.prod(p.moments.shard_shape(shape)) * fsdp * data <= size, (p.name, sizes)
                    checked += data > 1
    largest = max(math.prod(s.shape) for s in _specs(networks))
    # Tiny configs have no large array; in all others some must have been checked.
    assert (checked > 0) == (largest > LARGE)


def _specs(networks):
    mesh = sharding.abstract_mesh(MeshConfig(1, 1, 1), 1)
    return [p.spec for p in make.placed(networks, mesh)]


def test_the_papers_model_has_no_large_moment_that_does_not_divide():
    """On the meshes that docs/meshes.md recommends."""
    networks = Networks(make.load("laion", "bytes"))
    # 4096 devices are 64 by fsdp and 64 by data.
    for devices, sizes in ((8, (-1, 1, 1)), (64, (-1, 1, 1)), (512, (-1, 64, 1)), (4096, (-1, 64, 1))):
        mesh = sharding.abstract_mesh(MeshConfig(*sizes), devices)
        for p in make.placed(networks, mesh):
            if math.prod(p.spec.shape) > LARGE:
                cut = math.prod(p.spec.shape) // math.prod(p.moments.shard_shape(p.spec.shape))
                assert cut == devices, (p.name, devices)
