"""Captions to conditions: what t_local leaves out, what padding may touch, and conditions that are not captions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigagan_jax.config import TextConfig, TransformerConfig
from gigagan_jax.data.tokenizers import ByteTokenizer, WordTokenizer
from gigagan_jax.models import conditioning
from gigagan_jax.models.conditioning import Conditioner, ConditionSettings, TextTransformer, TransformerBlock

LENGTH = 16
CAPTIONS = ("a cat", "", "ab", "a caption too long for the row it is to fit in")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def small(tiny):
    config = dataclasses.replace(tiny, remat=False, text=dataclasses.replace(tiny.text, length=LENGTH, width=24))
    return config


@pytest.fixture(scope="module")
def conditioner(small, build):
    """(f(params, tokens) -> Condition, params, tokens): T in front of a byte encoder, three captions cut or padded."""
    transformer = TransformerConfig(width=16, depth=2, heads=2, mlp_ratio=2.0)
    module, params = build(
        lambda rngs: Conditioner(ConditionSettings.from_config(small), transformer, dtype=jnp.float32, rngs=rngs)
    )
    return jax.jit(lambda p, tokens: module.bind(p)(tokens, None)), params, ByteTokenizer(LENGTH)(CAPTIONS)


def test_ids_are_the_tokenizers():
    assert ByteTokenizer.vocab_size == conditioning.BYTE_VOCABULARY
    assert (ByteTokenizer.pad_id, ByteTokenizer.eot_id) == (conditioning.PAD_ID, conditioning.END_ID)


def test_shapes_and_masks(conditioner):
    f, params, tokens = conditioner
    c = f(params, tokens)
    assert (c.global_.shape, c.local.shape, c.mask.shape) == ((4, 16), (4, LENGTH - 1, 16), (4, LENGTH - 1))
    # bos and bytes, without the end
    np.testing.assert_array_equal(c.mask.sum(1), [6, 1, 3, LENGTH - 1])
    np.testing.assert_array_equal(c.mask, np.sort(np.asarray(c.mask), axis=1)[:, ::-1], err_msg="what is seen is first")
    assert np.isfinite(c.local).all()
    assert np.isfinite(c.global_).all()


def test_residual_gain_scales_each_branch_of_t(build):
    gain = 0.7
    config = TransformerConfig(width=8, depth=1, heads=2, mlp_ratio=2.0, residual_gain=gain)
    module, params = build(lambda rngs: TransformerBlock(config, dtype=jnp.float32, rngs=rngs))
    x, mask = normal(0, 2, 5, 8), np.arange(5)[None] < np.array([[5], [3]])

    def branches(p):
        block = module.bind(p)
        y = x + gain * block.attention(x, mask=mask)
        return y, y + gain * block.feed_forward(y), block(x, mask)

    y, want, got = jax.jit(branches)(params)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.abs(y - x).max() > 0.1
    assert np.abs(want - y).max() > 0.1


def test_t_global_is_the_end_and_t_local_all_but_it(build):
    module, params = build(
        lambda rngs: TextTransformer(6, TransformerConfig(width=6, depth=0), remat=False, dtype=jnp.float32, rngs=rngs)
    )
    x, end = normal(0, 3, 5, 6), np.array([0, 2, 4], np.int32)
    mask = np.arange(5)[None] <= end[:, None]
    c = jax.jit(lambda p: module.bind(p)(x, mask, end))(params)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    for i, e in enumerate(end):
        np.testing.assert_allclose(c.global_[i], normed[i, e], rtol=1e-5)
        np.testing.assert_allclose(c.local[i], np.delete(normed[i], e, 0), rtol=1e-5)
        np.testing.assert_array_equal(c.mask[i], np.delete(mask[i], e))


def same_where_seen(a, b, what=slice(None)):
    np.testing.assert_allclose(a.global_[what], b.global_[what], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(a.mask[what], b.mask[what])
    seen = np.asarray(a.mask)[what]
    np.testing.assert_allclose(a.local[what][seen], b.local[what][seen], rtol=1e-5, atol=1e-6)


def test_padding_does_not_reach_what_is_seen(conditioner):
    f, params, tokens = conditioner
    other = jax.tree.map(lambda x: x, params)
    embedding = params["encoder"]["embedding"]
    other["encoder"]["embedding"] = embedding.at[conditioning.PAD_ID].set(50 * normal(3, embedding.shape[1]))
    same_where_seen(f(params, tokens), f(other, tokens))


def test_positions_after_the_end_do_not_reach_what_is_seen(conditioner):
    f, params, tokens = conditioner
    other = jax.tree.map(lambda x: x, params)
    position = params["encoder"]["position"]
    other["encoder"]["position"] = position.at[7:].set(50 * normal(3, *position[7:].shape))
    same_where_seen(f(params, tokens), f(other, tokens), slice(0, 3))  # "a cat" ends at 6; the last row is full


def test_a_longer_row_of_the_same_caption_means_the_same(conditioner, small, build):
    f, params, _ = conditioner
    tokenizer = ByteTokenizer(LENGTH - 5)
    short = tokenizer(["a cat", "", "fills it."])
    assert short[2, -1] == conditioning.END_ID
    longer = np.pad(short, ((0, 1), (0, 5)))  # a row of padding only keeps the batch, and the compiled f
    cut = dataclasses.replace(small, text=dataclasses.replace(small.text, length=LENGTH - 5))
    transformer = TransformerConfig(width=16, depth=2, heads=2, mlp_ratio=2.0)
    module, _ = build(
        lambda rngs: Conditioner(ConditionSettings.from_config(cut), transformer, dtype=jnp.float32, rngs=rngs)
    )
    encoder = params["encoder"] | {"position": params["encoder"]["position"][: LENGTH - 5]}
    a = jax.jit(lambda p: module.bind(p)(short, None))(params | {"encoder": encoder})
    b = f(params, longer)
    np.testing.assert_allclose(a.global_, b.global_[:3], rtol=1e-5, atol=1e-6)
    for i in range(3):
        seen = int(a.mask[i].sum())
        assert seen == int(b.mask[i].sum())
        np.testing.assert_allclose(a.local[i, :seen], b.local[i, :seen], rtol=1e-5, atol=1e-6)


def test_every_byte_and_its_place_matter(conditioner):
    f, params, _ = conditioner
    rows = ByteTokenizer(LENGTH)(["abcdef", "abcdeg", "bacdef", "abcdef"])
    t = np.asarray(f(params, rows).global_)
    np.testing.assert_array_equal(t[0], t[3])
    assert np.abs(t[0] - t[1]).max() > 1e-2
    assert np.abs(t[0] - t[2]).max() > 1e-2


def test_a_word_is_the_sum_of_its_rows_in_two_tables(build):
    text = TextConfig(encoder="words", length=4, width=8, buckets=16)
    module, params = build(lambda rngs: conditioning.TrainedEncoder(text, rngs=rngs))
    assert {name: x.shape for name, x in params.items() if "embedding" in name} == {
        "embedding": (16, 8),
        "quotient_embedding": (16, 8),
    }
    # Without the convolution over neighbours, what is left is embedding and position.
    params["mix"], params["bias"] = jnp.zeros((3, 8)), jnp.zeros(8)
    tokens = WordTokenizer(4, 16**2)(["red apple"])
    first, second = (np.asarray(params[name]) for name in ("embedding", "quotient_embedding"))
    # Ids of 256 are two digits of base 16.
    digits = [[int(digit, 16) for digit in f"{i:02x}"] for i in tokens[0]]
    expected = [
        (first[low] + second[high]) / np.sqrt(2) + params["position"][k] for k, (high, low) in enumerate(digits)
    ]
    np.testing.assert_allclose(module.bind(params)(tokens)[0], expected, rtol=1e-5, atol=1e-6)


def test_captions_do_not_see_one_another(conditioner):
    f, params, tokens = conditioner
    changed = tokens.copy()
    changed[0] = ByteTokenizer(LENGTH)(["a dog and"])[0]
    a, b = f(params, tokens), f(params, changed)
    assert np.abs(a.global_[0] - b.global_[0]).max() > 1e-2
    np.testing.assert_array_equal(a.global_[1:], b.global_[1:])
    np.testing.assert_array_equal(a.local[1:], b.local[1:])


def test_a_class_is_a_row_of_the_table(tiny, build):
    config = dataclasses.replace(tiny, condition="class", num_classes=7)
    module, params = build(
        lambda rngs: Conditioner(
            ConditionSettings.from_config(config), config.generator.text, dtype=jnp.float32, rngs=rngs
        )
    )
    labels = np.array([6, 0, 6], np.int32)
    c = module.bind(params)(None, labels)
    assert list(params) == ["embedding"]
    np.testing.assert_array_equal(c.global_, np.asarray(params["embedding"])[labels])
    assert c.local is None
    assert c.mask is None


def test_no_condition_has_neither_parameters_nor_parts(tiny, build):
    config = dataclasses.replace(tiny, condition="none")
    module, params = build(
        lambda rngs: Conditioner(
            ConditionSettings.from_config(config), config.generator.text, dtype=jnp.float32, rngs=rngs
        )
    )
    assert jax.tree.leaves(params) == []
    assert module.bind(params)(None, None) == (None, None, None)


def test_text_without_tokens_is_an_error(conditioner, small, build):
    module, params = build(
        lambda rngs: Conditioner(
            ConditionSettings.from_config(small), small.generator.text, dtype=jnp.float32, rngs=rngs
        )
    )
    with pytest.raises(ValueError, match="needs tokens"):
        module.bind(params)(None, jnp.zeros((1,), jnp.int32))
