"""Frozen networks in training: the contrastive loss against NumPy and on meshes, gradients of all losses, T5."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import laion
from gigagan_jax.config import MeshConfig, from_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.sources.digits import digit_captions
from gigagan_jax.models.pretrained import clip
from gigagan_jax.models.pretrained.frozen import FrozenNetworks
from gigagan_jax.parallel import sharding
from gigagan_jax.training import losses
from gigagan_jax.training.batch import abstract_batch, batch_shardings
from gigagan_jax.training.input_pipeline import make_pipeline
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep
from tests.quick import OPTIONS

TOLERANCE = 1e-5


def values_of(folder, **fields):
    """configs/laion.py:tiny on a CLIP of a folder, both CLIP losses on."""
    c = laion.get_config("tiny")
    c.text.path = str(folder)
    c.data.source, c.data.path = "digits", ""
    c.dtype = "float32"
    for name, value in fields.items():
        group, _, key = name.rpartition("__")
        setattr(c[group] if group else c, key, value)
    return c


def config_of(folder, **fields):
    return from_dict(values_of(folder, **fields))


def mesh_of(*shape):
    return sharding.make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])


def batch_of(config, seed=0):
    rng = np.random.default_rng(seed)
    n = config.batch_size
    tokens = rng.integers(0, 512, (n, config.text.length)).astype(np.int32)
    tokens[:, 0], tokens[np.arange(n), rng.integers(2, config.text.length, n)] = 514, 515
    image = rng.integers(0, 256, (n, config.resolution, config.resolution, 3)).astype(np.uint8)
    return {"image": image, "tokens": tokens, "label": np.full(n, -1, np.int32)}


def test_the_config_finds_the_clip(clip_folder):
    """One folder names the text encoder, the contrastive loss and the vision-aided discriminator; without it all are off."""
    config = config_of(clip_folder)
    assert config.text.encoder == "clip"
    assert config.loss.clip == (0.2, 1.0)
    frozen = FrozenNetworks(config)
    # Four roles, two towers: each exists once.
    assert frozen.users == {
        "text": "text",
        "clip_text": "text",
        "clip_image": "clip_image",
        "vision_aided": "clip_image",
    }
    assert set(frozen.towers) == {"text", "clip_image"}
    without = config_of("")
    assert (without.text.encoder, without.loss.clip, without.loss.vision_aided) == ("bytes", (0.0, 0.0), 0.0)


def test_contrastive_loss_is_the_formula():
    """Equation 9 in NumPy on the gathered batch, duplicates of a caption included."""
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    image, text = unit(rng.standard_normal((6, 8))), unit(rng.standard_normal((6, 8)))
    text[4] = text[1]
    logits = 100.0 * image @ text.T
    expected = -np.mean(
        [logits[i, i] - np.log(np.exp(logits[i] - logits[i].max()).sum()) - logits[i].max() for i in range(6)]
    )
    as32 = lambda x: jnp.asarray(x, jnp.float32)
    ours = losses.clip_contrastive(as32(image), as32(text), as32(text), as32(100.0))
    assert float(ours) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", clip.KNOWN)
@pytest.mark.parametrize("shape", [(1, 64, 1), (1, 16, 4)])
def test_sharding_leaves_no_large_frozen_weight_whole(name, shape):
    """Every published CLIP under a discriminator and a text encoder, cut over 64 devices; sizes known without its files."""
    values = laion.get_config()
    values.text.path = values.vision_aided.path = name
    values.vision_aided.backbone = "clip"
    frozen = FrozenNetworks(from_dict(values))
    where = frozen.shardings(sharding.abstract_mesh(MeshConfig(*shape), 64))
    for (path, x), s in zip(
        jax.tree_util.tree_leaves_with_path(frozen.abstract()), jax.tree.leaves(where), strict=True
    ):
        if math.prod(x.shape) > 1_000_000:
            assert any(s.spec), f"{path} {x.shape} is whole on every device"
            assert x.dtype == jnp.bfloat16


class Towers:
    """The contrastive loss of images through the production towers, on any mesh."""

    def __init__(self, folder):
        self.config = config_of(folder, batch_size=16)
        self.frozen = FrozenNetworks(self.config)
        self.batch = batch_of(self.config)
        rng = np.random.default_rng(1)
        self.images = rng.uniform(-1, 1, self.batch["image"].shape).astype(np.float32)

    def on(self, shape):
        mesh = mesh_of(*shape)
        params, _ = self.frozen.load(mesh)
        rows = NamedSharding(mesh, PartitionSpec(("fsdp", "data")))

        def loss(images, params, tokens):
            with sharding.use_mesh(mesh, self.config.rules):
                text = self.frozen.encode_captions(params, tokens)["clip_text"]
                embedding, scale = self.frozen.embed_images(params, images)
                everyone = sharding.constrain(text, None, None)
                return losses.clip_contrastive(sharding.constrain(embedding, "batch", None), text, everyone, scale)

        run = jax.jit(
            jax.value_and_grad(loss), in_shardings=(rows, self.frozen.shardings(mesh), rows), compiler_options=OPTIONS
        )
        return jax.device_get(run(self.images, params, self.batch["tokens"]))


@pytest.fixture(scope="module")
def towers(clip_folder):
    return Towers(clip_folder)


@pytest.fixture(scope="module")
def on_one(towers):
    return towers.on((1, 1, 1))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_contrastive_loss_sharding_parity(towers, on_one, shape):
    """Value, and gradient by the images, on 1 and on 8 devices: negatives are those of the global batch."""
    value, grad = towers.on(shape)
    assert float(value) == pytest.approx(float(on_one[0]), rel=TOLERANCE)
    assert np.abs(grad - on_one[1]).max() <= TOLERANCE * np.abs(on_one[1]).max()


def test_contrastive_loss_torch_parity(towers, on_one, clip_folder):
    """The whole way from pixels and tokens to the loss, and its gradient by the pixels, against transformers' CLIP."""
    import torch
    import transformers

    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    seen, back = jax.vjp(lambda x: clip.preprocess(x, 32), jnp.asarray(towers.images))
    pixels = torch.tensor(np.asarray(seen).transpose(0, 3, 1, 2)).requires_grad_()
    logits = model(input_ids=torch.tensor(towers.batch["tokens"]).long(), pixel_values=pixels).logits_per_image
    value = torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))
    value.backward()
    assert float(on_one[0]) == pytest.approx(value.item(), rel=TOLERANCE)
    (expected,) = back(jnp.asarray(pixels.grad.numpy().transpose(0, 2, 3, 1)))
    assert np.abs(np.asarray(expected) - on_one[1]).max() <= TOLERANCE * np.abs(on_one[1]).max()


class Gradients:
    """Gradients of G, D and V with all losses on, on any mesh and in any number of micro-batches."""

    def __init__(self, folder):
        fields = {"batch_size": 16, "remat": False, "resolution": 8}
        values = values_of(folder, **fields)
        values.generator.blocks, values.generator.bank, values.generator.attention_depth = (1, 1), (1, 2), (0, 1)
        values.discriminator.blocks, values.discriminator.attention_depth = (1, 1), (1, 0)
        values.vision_aided.augment = ()
        self.values = values
        self.batch = batch_of(from_dict(values))

    @functools.lru_cache  # noqa: B019  (lives as long as the module's fixture)
    def on(self, shape):
        config = from_dict(self.values)
        mesh = mesh_of(*shape)
        networks = Networks(config)
        step = TrainStep(networks)
        state = networks.init(mesh)
        params, _ = networks.frozen.load(mesh)

        def run(state, batch, key, frozen):
            with sharding.use_mesh(mesh, config.rules):
                batch = step.objective.encode_captions(batch, frozen)
                critics, report = step.d_gradients(state, batch, key, frozen)
                g, g_report = step.g_gradients(state, batch, key, frozen)
                return {"g": g, **critics}, report.metrics | g_report.metrics

        everywhere = NamedSharding(mesh, PartitionSpec())
        inputs = (networks.shardings(mesh), batch_shardings(config, mesh), everywhere, networks.frozen.shardings(mesh))
        compiled = jax.jit(run, in_shardings=inputs, compiler_options=OPTIONS)
        return jax.device_get(compiled(state, self.batch, jax.random.key(3), params))


@pytest.fixture(scope="module")
def gradients(clip_folder):
    return Gradients(clip_folder)


@pytest.mark.parametrize("shape", [pytest.param((4, 2, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_gradients_with_all_losses_sharding_parity(gradients, shape):
    one, said = gradients.on((1, 1, 1))
    eight, _ = gradients.on(shape)
    assert {"loss/clip", "loss/v", "loss/g_v", "loss/d_match"} <= said.keys()
    for net in one:
        largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(one[net]))
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(one[net]), jax.tree.leaves(eight[net]), strict=True
        ):
            scale = max(float(np.abs(a).max()), 1e-3 * largest)
            # The gradient of V's last bias is a sum over real and generated images that all but cancels: 1.5e-5 on some CPUs.
            cancels = net == "v" and np.shape(a)[-1:] == (1,) and "bias" in jax.tree_util.keystr(path)
            limit = 5e-5 if cancels or "select" in jax.tree_util.keystr(path) else TOLERANCE
            assert np.abs(a - b).max() <= limit * scale, (net, path)


def test_vision_aided_learns_and_is_no_part_of_the_frozen_tower(gradients, clip_folder):
    grads, _ = gradients.on((1, 1, 1))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads["v"]["heads"]))
    networks = Networks(config_of(clip_folder))
    # Trained: heads, and what reads the caption. Frozen: the tower and the projections.
    assert set(networks.v.specs) == {"conditioner", "mix", "heads"}
    assert "projection" in networks.frozen.abstract()


def test_negatives_are_those_of_the_global_batch_in_micro_batches(clip_folder):
    """The contrastive loss in two micro-batches: the mean over the images of the same softmax."""
    config = config_of(clip_folder, batch_size=16)
    frozen = FrozenNetworks(config)
    mesh = mesh_of(1, 1, 1)
    params, _ = frozen.load(mesh)
    batch = batch_of(config)
    text = frozen.encode_captions(params, jnp.asarray(batch["tokens"]))["clip_text"]
    images = jnp.asarray(batch["image"] / np.float32(127.5) - 1)
    embedding, scale = frozen.embed_images(params, images)
    whole = losses.clip_contrastive(embedding, text, text, scale)
    parts = [losses.clip_contrastive(embedding[i::2], text[i::2], text, scale) for i in range(2)]
    alone = [losses.clip_contrastive(embedding[i::2], text[i::2], text[i::2], scale) for i in range(2)]
    assert float(sum(parts) / 2) == pytest.approx(float(whole), rel=1e-5)
    assert float(sum(alone) / 2) < 0.95 * float(whole)


def test_the_step_in_micro_batches_has_the_negatives_of_the_global_batch(clip_folder):
    """What the step calls loss/clip, rebuilt from each micro-batch's fakes and the captions of all."""
    values = values_of(clip_folder, batch_size=16, micro_batches=2, remat=False)
    values.loss.vision_aided = 0.0
    config = from_dict(values)
    networks = Networks(config)
    step, mesh = TrainStep(networks), mesh_of(1, 1, 1)
    state, (params, _) = networks.init(mesh), networks.frozen.load(mesh)
    batch, key = jax.tree.map(jnp.asarray, batch_of(config)), jax.random.key(7)

    def both(state, batch, frozen):
        batch = step.objective.encode_captions(batch, frozen)
        said = step.g_gradients(state, batch, key, frozen)[1].metrics["loss/clip"]
        rebuilt = []
        for i in range(2):
            part = {k: x[i::2] for k, x in batch.items()}
            key_z, _ = jax.random.split(jax.random.fold_in(key, i))
            embedding, scale = networks.frozen.embed_images(
                frozen, step.objective.generate(state.g.params, part, key_z)[0][-1]
            )
            rebuilt.append(losses.clip_contrastive(embedding, part["clip_text"], batch["clip_text"], scale))
        return said, sum(rebuilt) / 2

    said, rebuilt = jax.jit(both, compiler_options=OPTIONS)(state, batch, params)
    assert float(said) == pytest.approx(float(rebuilt), rel=1e-5)


@pytest.fixture
def t5_folder(tmp_path, random_weights):
    """A tiny T5 encoder with a tokenizer of words, as transformers saves them."""
    import tokenizers
    import transformers

    words = ["<pad>", "</s>", "<unk>", *(w for c in digit_captions(0) + digit_captions(1) for w in c.split())]
    words = list(dict.fromkeys(words))
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": len(words)}
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", eos_token_id=1, pad_token_id=0)
    folder = tmp_path / "t5"
    random_weights(transformers.T5EncoderModel(config)).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def test_t5_with_a_contrastive_loss_that_has_tokens_of_its_own(t5_folder, clip_folder):
    config = config_of(t5_folder, clip__path=str(clip_folder))
    assert config.text.encoder == "t5"
    frozen = FrozenNetworks(config)
    mesh = mesh_of(1, 1, 1)
    params, identities = frozen.load(mesh)
    assert identities.keys() == {"text", "clip_text", "clip_image", "vision_aided"}
    with make_pipeline(config, None) as data:
        batch = next(data)
    said = frozen.encode_captions(params, jnp.asarray(batch["tokens"]), jnp.asarray(batch["clip_tokens"]))
    n = config.batch_size
    assert said["features"].shape == (n, config.text.length, 24)
    # The CLIP reads its own tokens: as a run whose text encoder is this CLIP.
    alone = FrozenNetworks(config_of(clip_folder))
    expected = alone.encode_captions(alone.load(mesh)[0], jnp.asarray(batch["clip_tokens"]))["clip_text"]
    np.testing.assert_allclose(said["clip_text"], expected, rtol=1e-4, atol=1e-5)
    # And the whole step goes through.
    networks = Networks(config)
    abstract = (networks.abstract(), abstract_batch(config), jax.eval_shape(lambda: jax.random.key(0)))
    step = TrainStep(networks)
    _, metrics = jax.eval_shape(lambda *a: step(*a, with_r1=True), *abstract, networks.frozen.abstract())
    assert {"loss/clip", "loss/g_v"} <= metrics.keys()


def test_missing_clip_for_one_role_names_what_does_without(clip_folder):
    with pytest.raises(UserError, match=r"config.clip.path is not set.*\(0,0\) switches it off"):
        config_of("", text__encoder="bytes", loss__clip=(0.2, 1.0), loss__vision_aided=0.0)
    with pytest.raises(UserError, match=r"config.vision_aided.path is not set.*0 switches it off"):
        config_of("", text__encoder="bytes", loss__clip=(0.0, 0.0), loss__vision_aided=1.0)
    with pytest.raises(UserError, match=r"vision_aided\.text\.depth=0.*use at least 1"):
        config_of("", text__encoder="bytes", loss__clip=(0.0, 0.0), vision_aided__path=str(clip_folder))
    with pytest.raises(UserError, match=r"text\.encoder=bytes and text\.encoder=words need none"):
        config_of("", text__encoder="clip")
    with pytest.raises(UserError, match=r"has 2 blocks"):
        FrozenNetworks(config_of(clip_folder, vision_aided__layers=(1, 3)))
    with pytest.raises(UserError, match="takes at most 77 tokens"):
        Networks(config_of(clip_folder, text__length=78))
