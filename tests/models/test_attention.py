"""Attention against torch: explicit distances, dot products, masks; and what the blocks must not depend on."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from gigagan_jax.config import AttentionConfig
from gigagan_jax.models.layers.attention import CrossAttention, FeedForward, SelfAttention, attend

CONFIG = AttentionConfig(heads=2, head_dim=8)
N, T, HEADS, D = 2, 6, 3, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def head_first(x):
    return torch.from_numpy(np.array(x, np.float64)).swapaxes(1, 2)


MASK = np.arange(T)[None] < np.array([[4], [T]])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mask_self", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_l2_parity_with_torch_cdist(masked, mask_self, tied):
    q, k, v = (normal(i, N, T, HEADS, D) for i in range(3))
    k = q if tied else k
    f = lambda: attend(q, k, v, kind="l2", mask=jnp.asarray(MASK) if masked else None, mask_self=mask_self)
    got = jax.jit(f)()
    tq, tk, tv = map(head_first, (q, k, v))
    logits = -(torch.cdist(tq, tk) ** 2) / math.sqrt(8 * D)
    if masked:
        logits.masked_fill_(~torch.from_numpy(MASK)[:, None, None], -torch.inf)
    if mask_self:
        logits.masked_fill_(torch.eye(T, dtype=torch.bool), -torch.inf)
    want = (torch.softmax(logits, -1) @ tv).swapaxes(1, 2)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_dot_parity_with_torch(masked):
    q, (k, v) = normal(0, N, 5, HEADS, D), (normal(i, N, T, HEADS, D) for i in (1, 2))
    got = jax.jit(lambda: attend(q, k, v, kind="dot", mask=jnp.asarray(MASK) if masked else None))()
    mask = torch.from_numpy(MASK)[:, None, None].expand(N, 1, 5, T) if masked else None
    want = functional.scaled_dot_product_attention(head_first(q), head_first(k), head_first(v), attn_mask=mask)
    np.testing.assert_allclose(got, want.swapaxes(1, 2), rtol=1e-4, atol=1e-5)


def test_l2_gradient_parity_with_torch_where_query_meets_itself_and_tokens_are_equal():
    x, v = normal(0, N, T, HEADS, D), normal(1, N, T, HEADS, D)
    x[0] = x[0, :1]  # every token of an image the same: all distances zero
    weigh = normal(2, N, T, HEADS, D)
    got = jax.jit(jax.grad(lambda x, v: (attend(x, x, v, kind="l2", mask=None) * weigh).sum(), argnums=(0, 1)))(x, v)
    tx, tv = (head_first(a).requires_grad_() for a in (x, v))
    squared = (tx[:, :, :, None] - tx[:, :, None]).square().sum(-1)
    (torch.softmax(-squared / math.sqrt(8 * D), -1) @ tv * head_first(weigh)).sum().backward()
    for a, b in zip(got, (tx, tv), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b.grad.swapaxes(1, 2), rtol=1e-3, atol=1e-5)


def test_bfloat16_values_keep_float32_logits():
    # Logits that differ by less than bfloat16 resolves at their size, so that rounding them would tie the two keys.
    q = np.full((1, 1, 1, 1), 100.0, np.float32)
    k = np.array([100.0, 100.5], np.float32).reshape(1, 2, 1, 1)
    v = np.array([0.0, 1.0], np.float32).reshape(1, 2, 1, 1)
    cast = lambda x: jnp.asarray(x, jnp.bfloat16)
    out = attend(cast(q), cast(k), cast(v), kind="l2", mask=None)
    assert out.dtype == jnp.bfloat16
    stored = np.asarray(cast(k).astype(jnp.float32)).ravel()
    logits = -((100.0 - stored) ** 2) / math.sqrt(8)
    want = np.exp(logits[1]) / np.exp(logits).sum()
    assert float(out[0, 0, 0, 0]) == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize("kind", ["l2", "dot"])
def test_logits_vary_by_about_one_at_the_start(build, kind):
    config = AttentionConfig(heads=4, head_dim=32, kind=kind)
    _, params = build(lambda rngs: SelfAttention(64, config, rngs=rngs))
    assert ("to_key" in params) == (kind == "dot"), "query and key are tied for l2 only"
    tokens = 48
    x = normal(0, 1, tokens, 64)
    x /= np.sqrt((x**2).mean(-1, keepdims=True))
    project = lambda name: (x @ np.asarray(params[name]["weight"]) / math.sqrt(64)).reshape(1, tokens, 4, 32)
    q = project("to_query")
    k = q if kind == "l2" else project("to_key")
    # With one-hot values, attention returns its weights: their logarithms are the logits but for a constant a row.
    v = np.broadcast_to(np.eye(tokens, dtype=np.float32)[None, :, None], (1, tokens, 4, tokens))
    logits = np.log(np.asarray(attend(q, k, jnp.asarray(v), kind=kind, mask=None)))[0].swapaxes(0, 1)
    off = ~np.eye(tokens, dtype=bool)
    spread = np.array([[row[o].std() for row, o in zip(head, off, strict=True)] for head in logits]).mean()
    assert 0.75 < spread < 1.25


@pytest.fixture(scope="module")
def with_w(build):
    """Self-attention with the token of w: (f(params, x, w), params, x, w)."""
    module, params = build(lambda rngs: SelfAttention(12, CONFIG, extra_features=5, rngs=rngs))
    params["out"]["bias"] = jnp.asarray(normal(9, 12))
    return jax.jit(lambda p, x, w: module.bind(p)(x, w)), params, normal(0, N, T, 12), normal(1, N, 5)


def test_self_attention_with_w_parity_with_torch(with_w):
    f, params, x, w = with_w
    p = jax.tree.map(lambda v: torch.from_numpy(np.array(v, np.float64)), params)
    tx, tw = (torch.from_numpy(v.astype(np.float64)) for v in (x, w))
    linear = lambda a, x: x @ a["weight"] / math.sqrt(x.shape[-1]) + a.get("bias", 0.0)
    h = tx * (tx.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * p["norm"]["rms"]["gain"]
    tokens = torch.cat([h, linear(p["to_extra"], tw)[:, None]], 1)
    heads = lambda y: y.reshape(N, -1, CONFIG.heads, CONFIG.head_dim).swapaxes(1, 2)
    key, value = heads(linear(p["to_query"], tokens)), heads(linear(p["to_value"], tokens))
    weights = torch.softmax(-(torch.cdist(key[:, :, :T], key) ** 2) / math.sqrt(8 * CONFIG.head_dim), -1)
    want = linear(p["out"], (weights @ value).swapaxes(1, 2).reshape(N, T, -1))
    np.testing.assert_allclose(f(params, x, w), want, rtol=1e-3, atol=1e-4)


def test_the_token_of_w_changes_the_result_of_its_own_image_only(with_w):
    f, params, x, w = with_w
    moved = w.copy()
    moved[0] *= -1
    a, b = np.asarray(f(params, x, w)), np.asarray(f(params, x, moved))
    assert np.abs(a[0] - b[0]).max() > 1e-3
    np.testing.assert_array_equal(a[1], b[1])


def test_self_attention_is_permutation_equivariant(with_w):
    f, params, x, w = with_w
    order = np.random.default_rng(3).permutation(T)
    np.testing.assert_allclose(f(params, x[:, order], w), np.asarray(f(params, x, w))[:, order], rtol=1e-4, atol=1e-5)


def test_mask_self_reaches_the_block(build):
    make = lambda mask_self: (
        lambda rngs: SelfAttention(12, AttentionConfig(heads=2, head_dim=8, mask_self=mask_self), rngs=rngs)
    )
    (free, params), (forbidden, _) = build(make(False)), build(make(True))
    x = normal(0, 1, 2, 12)
    f = jax.jit(lambda p, x: (free.bind(p)(x), forbidden.bind(p)(x)))
    a, b = f(params, x)
    assert np.abs(a - b).max() > 1e-3
    # Of two tokens each sees only the other: its own value cannot be in the result.
    linear = lambda name, y: y @ np.asarray(params[name]["weight"]) / math.sqrt(y.shape[-1])
    h = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(b, linear("out", linear("to_value", h[:, ::-1])), rtol=1e-4, atol=1e-5)


def test_the_extra_token_must_be_there_and_goes_with_no_mask(build):
    module, params = build(lambda rngs: SelfAttention(12, CONFIG, extra_features=5, rngs=rngs))
    x = jnp.zeros((1, T, 12))
    with pytest.raises(ValueError, match="extra token"):
        module.bind(params)(x)
    with pytest.raises(ValueError, match="extra token"):
        module.bind(params)(x, jnp.zeros((1, 5)), jnp.ones((1, T), bool))


def test_width_of_attention_is_heads_times_head_dim_times_the_multiplier(build):
    config = AttentionConfig(heads=2, head_dim=10, dim_multiplier=1.4)
    module, _ = build(lambda rngs: SelfAttention(12, config, rngs=rngs))
    assert module.specs["to_query"]["weight"].shape == (12, 28)
    cross, _ = build(lambda rngs: CrossAttention(12, 7, config, rngs=rngs))
    assert cross.specs["to_key"]["weight"].shape == (7, 28)


def test_cross_attention_parity_with_torch_and_blind_to_padding(build):
    module, params = build(lambda rngs: CrossAttention(12, 7, CONFIG, rngs=rngs))
    x, context = normal(0, N, 5, 12), normal(1, N, T, 7)
    f = jax.jit(lambda p, x, c, m: module.bind(p)(x, c, m))
    got = np.asarray(f(params, x, context, MASK))
    norm = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    linear = lambda name, y: y @ np.asarray(params[name]["weight"]) / math.sqrt(y.shape[-1])
    heads = lambda name, y: head_first(linear(name, norm(y)).reshape(N, -1, CONFIG.heads, CONFIG.head_dim))
    mask = torch.from_numpy(MASK)[:, None, None].expand(N, 1, 5, T)
    y = functional.scaled_dot_product_attention(
        heads("to_query", x), heads("to_key", context), heads("to_value", context), attn_mask=mask
    )
    want = linear("out", y.swapaxes(1, 2).reshape(N, 5, -1).numpy())
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    padding = context.copy()
    padding[~MASK] = 100 * normal(2, *padding[~MASK].shape)
    np.testing.assert_array_equal(f(params, x, padding, MASK), got)
    seen = context.copy()
    seen[:, 0] *= -1
    assert np.abs(np.asarray(f(params, x, seen, MASK)) - got).max() > 1e-3


def test_feed_forward_formula(build):
    module, params = build(lambda rngs: FeedForward(12, 2.5, "none", rngs=rngs))
    assert module.specs["up"]["weight"].shape == (12, 30)
    params["up"]["bias"], params["down"]["bias"] = jnp.asarray(normal(1, 30)), jnp.asarray(normal(2, 12))
    x = normal(0, 3, 12)
    linear = lambda a, y: y @ np.asarray(a["weight"]) / math.sqrt(y.shape[-1]) + np.asarray(a["bias"])
    h = linear(params["up"], x)
    want = linear(params["down"], np.maximum(h, 0.2 * h) * math.sqrt(2))
    np.testing.assert_allclose(module.bind(params)(x), want, rtol=1e-4, atol=1e-5)
