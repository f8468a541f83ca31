"""One step of training here and in torch_training.py, from one state, batch and random numbers: the parameters after it."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
import torch

from configs import shapes
from configs.digits import get_config
from gigagan_jax.config import from_dict
from gigagan_jax.data.tokenizers import make_tokenizer
from gigagan_jax.interop.checkpoint_arrays import state_networks
from gigagan_jax.interop.model_folder import torch_config
from gigagan_jax.interop.torch_table import to_torch
from gigagan_jax.interop.torch_training import Training
from gigagan_jax.models.pretrained.text_encoder import tokenizer_options
from gigagan_jax.parallel import sharding
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep
from tests.interop.test_torch_parity import changed, load
from tests.runs import ROOT

sys.path.append(str(ROOT / "tools"))  # as for a script there

from measure_torch_training import draws_of

FAST = {"xla_backend_optimization_level": 0}
CAPTIONS = ("a red circle", "a blue square", "the digit 3", "seven", "a red circle", "one ring", "two", "a star")


def paper():
    """Logistic losses, eq. 8 with modulated heads, G's matching loss, both moments."""
    config = from_dict(get_config("tiny"))
    return changed(
        config,
        batch_size=8,
        loss__pairing="separate",
        loss__r2=False,
        loss__match_g=0.5,
        loss__match_g_form="min_max",
        loss__clip=(0.0, 0.0),
        g_optimizer__beta1=0.5,
        discriminator__minibatch_std=0,
    )


def contrastive():
    """Relativistic with R1 and R2, contrastive matching of both."""
    config = from_dict(shapes.get_config("tiny"))
    return changed(config, batch_size=8, loss__match_g=0.3, loss__match_g_form="contrastive", generator__bank=(1, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("make", [paper, contrastive])
def test_a_step_with_r1_ends_in_the_same_parameters(make):
    config = make()
    networks = Networks(config)
    step = TrainStep(networks)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    tokens = make_tokenizer(config.text.encoder, config.text.length, **tokenizer_options(config.text))(CAPTIONS)
    r = config.resolution
    images = np.random.default_rng(0).integers(0, 256, (8, r, r, 3)).astype(np.uint8)
    batch = {"image": images, "tokens": tokens, "label": np.full(8, -1, np.int32)}
    key = jax.random.key(7)

    def run(state, *, with_r1):
        with sharding.use_mesh(mesh, config.rules):
            return step(state, batch, key, with_r1=with_r1)

    compiled = {r1: jax.jit(lambda s, r1=r1: run(s, with_r1=r1), compiler_options=FAST) for r1 in (True, False)}
    state = networks.init(mesh)
    theirs = Training(json.loads(json.dumps(torch_config(config))))
    load(theirs.generator, networks.g, config, state.g.params)
    load(theirs.average, networks.g, config, state.g_ema)
    load(theirs.discriminator, networks.d, config, state.d.params)
    pictures = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    # The second step has moments and no R1.
    for number in range(2):
        state, metrics = compiled[number == 0](state)
        found = theirs.step(pictures, torch.from_numpy(tokens).long(), draws=draws_of(config, key, number, tokens))
        for name in ("loss/d", "loss/g", "loss/d_match", "loss/g_match"):
            np.testing.assert_allclose(found[name], float(metrics[name]), rtol=1e-3, err_msg=f"{name} of step {number}")
    expected = {
        "generator": to_torch(networks.g, config, state.g.params),
        "average": to_torch(networks.g, config, state.g_ema),
        "discriminator": to_torch(networks.d, config, state.d.params),
    }
    for name, tensors in expected.items():
        own = dict(getattr(theirs, name).named_parameters())
        for tensor, x in tensors:
            change = np.abs(own[tensor].detach().numpy() - x).max()
            # By the size of an update: Adam's are of the size of the rate, whatever the gradient.
            assert change <= 1e-3 * max(np.abs(x).max(), 1e-3) + 0.02 * theirs.learning_rate("generator"), (
                f"{name} {tensor}"
            )
    np.testing.assert_allclose(theirs.generator.w_avg.numpy(), state.w_avg, rtol=1e-3, atol=1e-5)
    assert (theirs.steps, theirs.images) == (int(state.step), int(state.images))


def test_a_loss_that_is_not_here_is_named():
    config = dataclasses.replace(paper(), loss=dataclasses.replace(paper().loss, r1_form="finite_differences"))
    with pytest.raises(NotImplementedError, match=r"loss\.r1_form"):
        Training(json.loads(json.dumps(torch_config(config))))


def test_a_saved_run_is_loaded_as_it_was(tmp_path):
    config = contrastive()
    run = Training(json.loads(json.dumps(torch_config(config))))
    pictures = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    tokens = torch.from_numpy(make_tokenizer("words", 12, vocab_size=256**2)(CAPTIONS)).long()
    run.step(pictures, tokens)
    run.save(tmp_path / "run")
    again = Training.load(tmp_path / "run")
    assert (again.steps, again.images) == (1, 8)
    draws = draws_of(config, jax.random.key(0), 1, tokens.numpy())
    assert run.step(pictures, tokens, draws=draws) == again.step(pictures, tokens, draws=draws)
    assert set(state_networks(config)) == {"g", "d"}
