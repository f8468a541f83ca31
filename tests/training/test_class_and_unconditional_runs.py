"""A whole run with classes of a folder by name, and one with neither captions nor classes: trained and sampled."""

import json
import types

import jax
import numpy as np
import pytest
from PIL import Image

from gigagan_jax.checkpoint.run_folder import RunFolder
from gigagan_jax.config import needs_prompts
from gigagan_jax.core.errors import UserError
from gigagan_jax.evaluation.hooks import make_hooks, snapshot_hook
from gigagan_jax.inference.text_to_image import TextToImage
from gigagan_jax.parallel import sharding
from gigagan_jax.training.loop import Run
from tests.runs import small

NAMES = ("ant", "Bee", "cat")


@pytest.fixture
def folder(tmp_path):
    """Eight pictures a class, without captions."""
    for name in NAMES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            image = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["class", "none"])
def test_train_and_sample(condition, folder, tmp_path):
    place = RunFolder.open(tmp_path / "run")
    fields = {"condition": condition, "data__source": "folder", "data__path": str(folder), "checkpoint_kimg": 0.032}
    # Less to compile.
    fields |= {"generator__attention_depth": (0, 0), "generator__bank": (1, 1)}
    # Captions of the config are no classes.
    fields |= {"snapshot__prompts": ()} if condition == "class" else {}
    one = sharding.make_mesh(small().mesh, jax.devices()[:1])
    run = Run(small(total_kimg=0.032, **fields), place, hooks=make_hooks, mesh=one)
    run.train()
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    order = [p.name for p in sorted(folder.iterdir())]
    assert stored["class_names"] == (order if condition == "class" else [])
    assert stored["snapshot"]["prompts"] == (order if condition == "class" else [""])
    assert len(list((tmp_path / "run" / "snapshots").glob("*.png"))) == 1

    model = TextToImage.from_workdir(place)
    if condition == "class":
        number = str(order.index("Bee"))
        np.testing.assert_array_equal(model("bee", seed=3), model(number, seed=3))
        assert (model("bee", seed=3) != model("cat", seed=3)).any()
        with pytest.raises(UserError, match="has no such class; its 3 classes are"):
            model("dog")
        # To go on takes the same classes.
        (folder / "cat").rename(folder / "dog")
        with pytest.raises(UserError, match=r"class . was 'cat' and is now 'dog'"):
            Run(small(total_kimg=0.064, **fields), place, mesh=one)
    else:
        assert model(["", ""], seed=3).shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    "fields, rows",
    [({"condition": "none", "snapshot__seeds": 3}, 3), ({"condition": "none", "snapshot__seeds": 12}, 8), ({}, 2)],
)
def test_a_grid_without_a_condition_is_one_of_seeds(fields, rows, tmp_path):
    config = small(**fields)
    asked = []

    def sampler(params, w_avg, prompts, seeds, truncation):
        asked.append((prompts, seeds))
        return np.zeros((len(prompts), 8, 8, 3), np.uint8)

    logged = []
    logger = types.SimpleNamespace(log_image=lambda name, step, image: logged.append(image.shape))
    snapshot_hook(config, sampler, RunFolder.open(tmp_path))(
        types.SimpleNamespace(g_ema=None, w_avg=None, step=0), 0.0, logger
    )
    prompts, seeds = asked[0]
    columns = config.snapshot.seeds
    assert len(prompts) == rows * columns
    if needs_prompts(config):
        assert seeds == [*range(columns)] * rows
    else:
        assert set(prompts) == {""}
        assert seeds == list(range(rows * columns))
    assert len(logged) == 1
