"""The null caption: how it is known, and what it is left out of. Wrong captions: test_mismatched_captions.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import digits, imagenet, laion, scale
from gigagan_jax.config import MeshConfig, from_dict
from gigagan_jax.data.tokenizers import ByteTokenizer
from gigagan_jax.models.pretrained.text_encoder import TextSpec, text_spec
from gigagan_jax.parallel import sharding
from gigagan_jax.training import losses
from gigagan_jax.training.batch import abstract_batch
from gigagan_jax.training.input_pipeline import make_tokenizers
from gigagan_jax.training.mismatched_captions import masks_null_captions
from gigagan_jax.training.objectives import GanObjective
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep, ema_decay
from tests.quick import OPTIONS


def config_of(folder="", **fields):
    """configs/laion.py:tiny at 8 px, with caption dropout; with a CLIP's folder its contrastive loss is on."""
    c = laion.get_config("tiny")
    c.text.path = str(folder)
    c.data.source, c.data.path, c.data.caption_dropout = "digits", "", 0.1
    c.resolution, c.remat = 8, False
    c.generator.blocks, c.generator.bank, c.generator.attention_depth = (1, 1), (1, 2), (0, 1)
    c.discriminator.blocks, c.discriminator.attention_depth = (1, 1), (1, 0)
    for name, value in ({"loss__vision_aided": 0.0} | fields).items():
        group, _, key = name.rpartition("__")
        setattr(c[group] if group else c, key, value)
    return from_dict(c)


# ---------------------------------------------------------------- which rows


CAPTIONS = ("a", "the cat", "the " * 100, "<|endoftext|> the", "0", "é", "the cat</s>")


def assert_only_null_rows_are_null(spec, tokenizer):
    rows = np.concatenate([tokenizer(CAPTIONS), tokenizer.null_tokens()[None], tokenizer([""])])
    found = np.asarray(spec.is_null(jnp.asarray(rows)))
    np.testing.assert_array_equal(found, (rows == tokenizer.null_tokens()).all(1))
    assert found.tolist() == [False] * len(CAPTIONS) + [True, True]


@pytest.mark.parametrize("length", [4, 24])
def test_null_rows_of_bytes(length):
    config = config_of(text__length=length)
    assert_only_null_rows_are_null(text_spec(config.text), make_tokenizers(config)[0])


@pytest.mark.parametrize("length", [3, 77])
def test_null_rows_of_a_clip(clip_folder, length):
    config = config_of(clip_folder, text__length=length)
    assert config.text.encoder == "clip"
    assert_only_null_rows_are_null(text_spec(config.text), make_tokenizers(config)[0])


def test_null_rows_of_a_t5(tmp_path):
    """No begin token; pieces with the blank before a word, as SentencePiece has them."""
    import tokenizers
    import transformers

    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁the", "▁cat", "a", "0"]
    model = tokenizers.models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": len(pieces)}
    t5 = transformers.T5Config(**sizes, eos_token_id=1, pad_token_id=0)
    transformers.T5EncoderModel(t5).save_pretrained(tmp_path)
    config = config_of(tmp_path, text__encoder="t5", loss__clip=(0.0, 0.0), text__length=6)
    spec, tokenizer = text_spec(config.text), make_tokenizers(config)[0]
    assert tokenizer.null_tokens().tolist() == [1, 0, 0, 0, 0, 0]
    assert_only_null_rows_are_null(spec, tokenizer)


def test_a_row_that_is_full_is_no_null_row():
    """An end token in the last place, none before it, or none at all."""
    spec = TextSpec("clip", 8, 4, 10, end_id=9)
    rows = jnp.array([[8, 1, 1, 9], [8, 1, 9, 9], [8, 9, 9, 9], [8, 1, 1, 1]])
    assert spec.is_null(rows).tolist() == [False, False, True, False]


# ---------------------------------------------------------------- whether there are any


def test_configs_have_no_null_captions_until_they_are_asked_for():
    for make in (laion, digits, imagenet, scale):
        config = from_dict(make.get_config())
        assert config.data.caption_dropout == 0, make.__name__
        assert not masks_null_captions(config), make.__name__
    assert masks_null_captions(config_of())
    assert masks_null_captions(config_of(data__caption_dropout=0.0, data__captions="optional"))
    assert not masks_null_captions(config_of(data__caption_dropout=0.0))
    # As runs of earlier code.
    assert not masks_null_captions(config_of(loss__mask_null_captions=False))
    classes = config_of(condition="class", num_classes=10, snapshot__prompts=("1",))
    assert not masks_null_captions(classes)
    batch = {"tokens": ByteTokenizer(48)(["", "a"])}
    assert GanObjective(Networks(config_of())).null_captions(batch).tolist() == [True, False]
    assert GanObjective(Networks(config_of(data__caption_dropout=0.0))).null_captions(batch) is None


# ---------------------------------------------------------------- the contrastive loss


def unit(rng, n):
    x = rng.standard_normal((n, 8)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def contrastive_by_hand(image, text, null, scale=100.0):
    """Equation 9 over the rows and captions that are not null, in float64."""
    image, text = image[~null].astype(np.float64), text[~null].astype(np.float64)
    if not len(image):
        return 0.0
    logits = scale * image @ text.T
    top = logits.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(logits - top).sum(1)) + top[:, 0] - np.diag(logits)))


def contrastive(image, text, null, rows=slice(None)):
    """The loss of a micro-batch that has `rows` of the batch."""
    weights, counted = losses.caption_weights(null), ~null
    return losses.clip_contrastive(image[rows], text[rows], text, jnp.float32(100.0), weights[rows], counted)


NULL_ROWS = {
    "none": [],
    "some": [0, 3, 4],
    "a_micro_batch_of_them": [0, 2, 4, 6],
    "all_but_one": [0, 1, 2, 3, 4, 6, 7],
    "all": range(8),
}


@pytest.mark.parametrize("name", NULL_ROWS)
def test_null_captions_are_no_part_of_the_contrastive_loss(name):
    rng = np.random.default_rng(0)
    image, text, null = unit(rng, 8), unit(rng, 8), np.zeros(8, bool)
    null[list(NULL_ROWS[name])] = True
    # As CLIP would: the null caption is one and the same.
    text[null] = text[0]
    expected = contrastive_by_hand(image, text, null)
    value, grad = jax.value_and_grad(contrastive)(image, text, jnp.asarray(null))
    assert float(value) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert np.isfinite(grad).all()
    assert not grad[null].any()
    if (~null).sum() > 1:
        assert (np.abs(grad[~null]).max(1) > 0).all()
    # In two micro-batches, however the null captions fall: each weighs by its rows that are left.
    parts = [contrastive(image, text, jnp.asarray(null), slice(i, None, 2)) for i in range(2)]
    assert float(sum(parts) / 2) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_without_null_captions_the_masked_loss_is_the_plain_one():
    rng = np.random.default_rng(1)
    image, text, scale_ = unit(rng, 6), unit(rng, 6), jnp.float32(100.0)
    plain = losses.clip_contrastive(image, text, text, scale_)
    np.testing.assert_allclose(contrastive(image, text, jnp.zeros(6, bool)), plain, rtol=1e-6)


def test_masked_contrastive_loss_sharding_parity():
    """One row a device: most devices have none that counts."""
    rng = np.random.default_rng(2)
    image, text, null = unit(rng, 8), unit(rng, 8), np.ones(8, bool)
    null[[1, 6]] = False
    mesh = sharding.make_mesh(MeshConfig(data=8))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    run = jax.jit(jax.value_and_grad(contrastive), in_shardings=rows, compiler_options=OPTIONS)
    value, grad = run(image, text, null)
    one, one_grad = jax.value_and_grad(contrastive)(image, text, jnp.asarray(null))
    assert float(value) == pytest.approx(float(one), rel=1e-6)
    np.testing.assert_allclose(grad, one_grad, rtol=0, atol=1e-6 * np.abs(one_grad).max())


@pytest.mark.parametrize("null", [[], [2], [0, 1, 2, 3]])
def test_weights_of_captions_make_a_mean_over_those_that_are_left(null):
    mask = np.isin(np.arange(4), null)
    x = np.random.default_rng(3).standard_normal((4, 3))
    weights = losses.caption_weights(jnp.asarray(mask))
    assert weights.shape == (4, 1)
    assert weights.dtype == jnp.float32
    expected = x[~mask].mean(0) if (~mask).any() else np.zeros(3)
    np.testing.assert_allclose((x * weights).mean(0), expected, rtol=1e-6)


# ---------------------------------------------------------------- the step


def test_the_step_leaves_null_captions_out_of_w_and_of_the_contrastive_loss(clip_folder):
    """In two micro-batches of which one has no other: rebuilt from each part's w and images, in NumPy."""
    config = config_of(clip_folder, batch_size=8, micro_batches=2, discriminator__attention_depth=(0, 0))
    assert config.uses_clip_loss
    networks = Networks(config)
    step, mesh, key = TrainStep(networks), sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), jax.random.key(7)
    state, (params, _) = networks.init(mesh), networks.frozen.load(mesh)
    null = np.array([True, False, True, False, True, True, True, False])
    tokens = make_tokenizers(config)[0](["" if empty else f"the cat {i}" for i, empty in enumerate(null)])
    image = np.random.default_rng(0).integers(0, 256, abstract_batch(config)["image"].shape).astype(np.uint8)
    batch = {"image": image, "tokens": tokens, "label": np.full(8, -1, np.int32)}

    def both(state, batch, frozen):
        batch = step.objective.encode_captions(batch, frozen)
        report = step.g_gradients(state, batch, key, frozen)[1]

        def rebuild(i):
            part = {k: x.reshape(4, 2, *x.shape[1:])[:, i] for k, x in batch.items()}
            key_z, _ = jax.random.split(jax.random.fold_in(key, i))
            images, w = step.objective.generate(state.g.params, part, key_z)
            return w, *networks.frozen.embed_images(frozen, images[-1])

        return report.w, report.metrics["loss/clip"], jax.lax.map(rebuild, jnp.arange(2)), batch["clip_text"]

    run = jax.jit(both, compiler_options=OPTIONS)
    w, clip_loss, (w_rows, embedding, scales), text = jax.device_get(
        run(state, jax.tree.map(jnp.asarray, batch), params)
    )
    # Row k of the batch is row k // 2 of part k % 2.
    w_rows, embedding = (x.swapaxes(0, 1).reshape(8, -1) for x in (w_rows, embedding))
    np.testing.assert_allclose(w, w_rows[~null].mean(0), rtol=1e-4, atol=1e-6)
    assert np.abs(w - w_rows.mean(0)).max() > 1e-3 * np.abs(w).max()
    expected = contrastive_by_hand(embedding, text, null, float(scales[0]))
    assert float(clip_loss) == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def averages():
    """averages(step number, w_avg, w, null) -> w_avg of the next state, by TrainStep, for a G of one parameter."""
    config = config_of(ema__rampup=0.0, ema__half_life_kimg=0.016)
    step = TrainStep(Networks(config))
    params = {"a": jnp.ones(3)}
    state = dataclasses.replace(step.networks.abstract(), g_ema=params, images=jnp.uint32(64))

    def run(number, w_avg, w, null):
        now = state.replace(step=jnp.int32(number), w_avg=jnp.asarray(w_avg, jnp.float32))
        null = None if null is None else jnp.asarray(null)
        return np.asarray(step.averages(now, params, jnp.asarray(w, jnp.float32), null)[1])

    keep = float(ema_decay(config, jnp.uint32(64)))
    assert keep == pytest.approx(0.5)
    return run


def test_a_batch_of_null_captions_alone_leaves_the_average_of_w(averages):
    before, w = [2.0, -4.0], [4.0, 0.0]
    np.testing.assert_allclose(averages(9, before, w, [True, False]), [3.0, -2.0], rtol=1e-6)
    np.testing.assert_allclose(averages(9, before, w, None), [3.0, -2.0], rtol=1e-6)
    np.testing.assert_array_equal(averages(9, before, [0.0, 0.0], [True, True]), before)


def test_the_average_of_w_starts_with_the_first_batch_that_has_one(averages):
    start, w = [0.0, 0.0], [4.0, 1.0]
    np.testing.assert_array_equal(averages(0, start, w, [False, True]), w)
    np.testing.assert_array_equal(averages(0, start, [0.0, 0.0], [True, True]), start)
    # The first step had no mean: its zeros are no w to average with.
    np.testing.assert_array_equal(averages(1, start, w, [False, True]), w)
