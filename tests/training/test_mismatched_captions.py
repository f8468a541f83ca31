"""Wrong captions: never an image's own, nor one that reads the same. The best-known public code silently matched them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import digits
from gigagan_jax.config import DEFAULT_RULES, MeshConfig, from_dict
from gigagan_jax.data.tokenizers import ByteTokenizer
from gigagan_jax.parallel import sharding
from gigagan_jax.training.batch import batch_shardings
from gigagan_jax.training.mismatched_captions import (
    all_wrong_captions,
    draw_mismatch,
    draw_wrong_captions,
    group_size,
    same_caption,
)
from gigagan_jax.training.objectives import GanObjective, LossReport
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep

tokenize = ByteTokenizer(24)
mismatch_all = jax.jit(jax.vmap(draw_mismatch))
# Many keys, one batch.
mismatch_keys = jax.jit(jax.vmap(draw_mismatch, (0, None, None)))


def same_by_hand(tokens, labels):
    """The definition, without hashes: bool [N, N]."""
    same = (tokens[:, None] == tokens[None]).all(-1)
    return same | ((labels[:, None] == labels[None]) & (labels >= 0)[:, None])


def random_batches(rng, cases, n):
    """`cases` batches of n examples, from one caption for all to all different, labels known, partly known or not."""
    tokens, labels = [], []
    for case in range(cases):
        wording = rng.integers(0, rng.integers(1, 2 * n + 1), n)
        tokens.append(tokenize([f"caption {k}" if k else "" for k in wording]))
        top = int(rng.integers(0, n + 1))
        labels.append(rng.integers(-1, top, n) if case % 3 else np.full(n, -1))
    return np.stack(tokens), np.stack(labels).astype(np.int32)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17])
def test_no_image_keeps_its_caption_nor_gets_an_equal_one(n):
    rng = np.random.default_rng(n)
    cases = 300
    tokens, labels = random_batches(rng, cases, n)
    index, valid = jax.device_get(mismatch_all(jax.random.split(jax.random.key(n), cases), tokens, labels))
    assert index.shape == valid.shape == (cases, n)
    assert ((index >= 0) & (index < n)).all()
    seen = {True: 0, False: 0}
    for case in range(cases):
        same = same_by_hand(tokens[case], labels[case])
        np.testing.assert_array_equal(valid[case], ~same.all(1))
        for i in np.flatnonzero(valid[case]):
            j = index[case, i]
            assert i != j
            assert (tokens[case, i] != tokens[case, j]).any()
            assert labels[case, i] < 0 or labels[case, i] != labels[case, j]
        for v in valid[case]:
            seen[bool(v)] += 1
    assert seen[False] > 0
    assert seen[True] > 0 or n == 1


def test_same_wish_by_captions_labels_or_both():
    tokens = tokenize(["a", "b", "a", "ab", "ba", ""])
    labels = np.array([-1, 7, -1, 7, -1, -1], np.int32)
    expected_tokens = np.eye(6, dtype=bool)
    expected_tokens[0, 2] = expected_tokens[2, 0] = True
    np.testing.assert_array_equal(same_caption(tokens, None), expected_tokens)
    expected_labels = np.zeros((6, 6), bool)
    expected_labels[np.ix_([1, 3], [1, 3])] = True
    np.testing.assert_array_equal(same_caption(None, labels), expected_labels)
    np.testing.assert_array_equal(same_caption(tokens, labels), expected_tokens | expected_labels)
    with pytest.raises(ValueError, match="nothing to mismatch"):
        same_caption(None, None)


def test_captions_that_differ_in_one_place_are_different():
    """A comparison by sums or by letters without their order would confuse these."""
    captions = ["ab cd", "cd ab", "ba cd", "ab cd ", " ab cd", "ab", "abab", "a" * 20, "a" * 21, ""]
    same = np.asarray(same_caption(tokenize(captions), None))
    np.testing.assert_array_equal(same, np.eye(len(captions), dtype=bool))


def test_a_label_of_zero_is_known():
    tokens = tokenize(["zero", "nought", "one"])
    index, valid = draw_mismatch(jax.random.key(0), tokens, np.array([0, 0, 1], np.int32))
    assert valid.all()
    assert index[:2].tolist() == [2, 2]


def test_negative_labels_forbid_nothing():
    tokens = tokenize(["one", "two"])
    index, valid = draw_mismatch(jax.random.key(0), tokens, np.array([-1, -1], np.int32))
    assert valid.all()
    assert index.tolist() == [1, 0]


def test_one_large_cycle_where_all_captions_differ():
    """A permutation uses each caption once; in one cycle no two images merely swap, except in a batch of two."""
    n = 16
    tokens = tokenize([f"caption {i}" for i in range(n)])
    keys = jax.random.split(jax.random.key(3), 50)
    index, valid = mismatch_keys(keys, tokens, np.full(n, -1))
    assert valid.all()
    for row in np.asarray(index):
        at, cycle = 0, []
        for _ in range(n):
            cycle.append(at)
            at = row[at]
        assert sorted(cycle) == list(range(n))
        assert at == 0


def test_drawn_anew_with_each_key():
    n = 16
    tokens = tokenize([f"caption {i}" for i in range(n)])
    keys = jax.random.split(jax.random.key(4), 200)
    index = np.asarray(mismatch_keys(keys, tokens, None)[0])
    assert len({tuple(row) for row in index}) == len(keys)
    np.testing.assert_array_equal(index, mismatch_keys(keys, tokens, None)[0])  # and the key decides
    for i in range(n):  # every other caption is met
        assert set(index[:, i]) == set(range(n)) - {i}


def test_a_clash_is_mended_by_any_caption_that_differs():
    """Six images share a caption: the cycle clashes often, and all that differ must be met about equally often."""
    tokens = tokenize(["same"] * 6 + ["x", "y", "z"])
    keys = jax.random.split(jax.random.key(5), 900)
    index = np.asarray(mismatch_keys(keys, tokens, None)[0])
    counts = np.bincount(index[:, 0], minlength=9)
    assert counts[:6].sum() == 0
    assert counts[6:].min() > 240  # 300 expected, standard deviation 14


@pytest.mark.parametrize("n", [2, 3, 8, 17])
def test_the_null_caption_is_never_a_wrong_one(n):
    """An image with the null caption still gets a caption, but for where all others are null or of its own class."""
    rng = np.random.default_rng(n)
    cases = 200
    tokens, labels = random_batches(rng, cases, n)
    rate = np.arange(cases)[:, None] / (cases - 1)
    tokens[rng.random((cases, n)) < rate] = tokenize.null_tokens()
    null = (tokens == tokenize.null_tokens()).all(-1)
    mismatch = jax.jit(jax.vmap(draw_mismatch))
    index, valid = jax.device_get(mismatch(jax.random.split(jax.random.key(n), cases), tokens, labels, null))
    assert null.any(1).sum() > null.all(1).sum() > 0
    for case in range(cases):
        allowed = ~same_by_hand(tokens[case], labels[case]) & ~null[case][None]
        np.testing.assert_array_equal(valid[case], allowed.any(1))
        rows = np.flatnonzero(valid[case])
        assert allowed[rows, index[case, rows]].all()
    assert (valid & null).any()


def test_a_batch_without_null_captions_has_the_draws_of_one_that_cannot_have_them():
    tokens = tokenize([f"caption {i // 2}" for i in range(16)])
    plain, masked = (
        draw_mismatch(jax.random.key(0), tokens, None),
        draw_mismatch(jax.random.key(0), tokens, None, np.zeros(16, bool)),
    )
    for a, b in zip(plain, masked, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(4, 2, 1), (2, 2, 2)])
def test_a_sharded_batch_gets_the_captions_it_gets_on_one_device(shape):
    rng = np.random.default_rng(1)
    tokens, labels = random_batches(rng, 1, 16)
    key = jax.random.key(9)
    plain = jax.device_get(jax.jit(draw_mismatch)(key, tokens[0], labels[0]))
    mesh = sharding.make_mesh(MeshConfig(*shape))
    rows = NamedSharding(mesh, sharding.partition_spec(("batch",), (16,), mesh, DEFAULT_RULES, "batch"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = jax.jit(draw_mismatch, in_shardings=(everywhere, rows, rows), out_shardings=rows)(
        key, tokens[0], labels[0]
    )
    for one, eight in zip(plain, jax.device_get(spread), strict=True):
        np.testing.assert_array_equal(one, eight)


# ---------------------------------------------------------------- within groups


@pytest.mark.parametrize(
    "n, most, size",
    [(16, 16, 16), (1024, 16, 16), (8, 16, 8), (24, 16, 12), (20, 16, 10), (34, 16, 34), (9, 0, 9), (1, 16, 1)],
)
def test_group_size(n, most, size):
    assert group_size(n, most) == size


def encoded(n):
    """[n, 2] what stands for captions: their place, exactly."""
    return jnp.stack([jnp.arange(n), -jnp.arange(n)], axis=1).astype(jnp.float32)


def test_wrong_captions_come_from_the_group_and_differ():
    n, size = 48, 16
    tokens = tokenize([f"caption {i // 2}" for i in range(n)])  # pairs read the same
    t, valid = jax.jit(draw_wrong_captions, static_argnums=4)(jax.random.key(0), encoded(n), tokens, None, size)
    place = np.asarray(t[:, 0]).astype(int)
    np.testing.assert_array_equal(t, encoded(n)[place])
    assert valid.all()
    np.testing.assert_array_equal(place // size, np.arange(n) // size)
    assert (place // 2 != np.arange(n) // 2).all()
    steps = [tuple(place[i : i + size] - i) for i in range(0, n, size)]
    assert len(set(steps)) == 3  # each group has a draw of its own


def test_a_group_of_one_caption_has_no_wrong_one_whatever_the_others_have():
    tokens = tokenize(["same"] * 16 + [f"caption {i}" for i in range(16)])
    _, valid = draw_wrong_captions(jax.random.key(0), encoded(32), tokens, None, 16)
    np.testing.assert_array_equal(valid, np.arange(32) >= 16)


def test_null_captions_of_a_group_are_no_wrong_ones():
    """A group of null captions but for one: it has no wrong caption, and is that of all others."""
    captions = [""] * 15 + ["a cat"] + [f"caption {i % 5}" if i % 5 else "" for i in range(16)]
    tokens = tokenize(captions)
    null = np.array([c == "" for c in captions])
    t, valid = draw_wrong_captions(jax.random.key(0), encoded(32), tokens, None, 16, null)
    place = np.asarray(t[:, 0]).astype(int)
    np.testing.assert_array_equal(valid, np.arange(32) != 15)
    assert set(place[:15]) == {15}
    assert not null[place[16:]].any()
    assert (place[16:] >= 16).all()


def test_contrastive_captions_are_all_others_of_the_group():
    # Two groups of four: two equal captions, a null one; and captions that all differ.
    words = ["a", "b", "a", "", "c", "d", "e", "f"]
    tokens, null = tokenize(words), np.array([word == "" for word in words])
    t = jnp.arange(8.0)[:, None]
    others, valid = all_wrong_captions(t, tokens, np.full(8, -1, np.int32), 4, null)
    assert (others.shape, valid.shape) == ((8, 3, 1), (8, 3))
    for i, word in enumerate(words):
        group = range(i // 4 * 4, i // 4 * 4 + 4)
        assert sorted(map(int, others[i, :, 0])) == [j for j in group if j != i]
        expected = [j for j in group if words[j] not in (word, "")]
        assert sorted(map(int, others[i, valid[i], 0])) == expected


def test_labels_mask_captions_only_where_the_config_says_so():
    """Captions that say more than their class are compared; wordings of one class are not."""
    tokens, labels = tokenize(["a red bird", "a blue bird", "a tree", "a red bird"]), np.array([3, 3, 5, 3], np.int32)
    batch = {"tokens": tokens, "label": labels, "image": np.zeros((4, 16, 16, 3), np.uint8)}
    own = jnp.arange(4.0)[:, None]
    for mask, expected in ((False, [[1, 2], [0, 2, 3], [0, 1, 3], [1, 2]]), (True, [[2], [2], [0, 1, 3], [2]])):
        config = digits.get_config()
        config.loss.mask_same_labels = mask
        wrong, valid = GanObjective(Networks(from_dict(config))).wrong_captions(own, batch, jax.random.key(0))
        for i, others in enumerate(expected):
            assert sorted(map(int, wrong[i, valid[i], 0])) == others, (mask, i)


def test_one_group_is_the_whole_batch():
    tokens = tokenize([f"caption {i}" for i in range(16)])
    index, _ = draw_mismatch(jax.random.key(1), tokens, None)
    t, _ = draw_wrong_captions(jax.random.key(1), encoded(16), tokens, None, 16)
    np.testing.assert_array_equal(t[:, 0], index)


def test_wrong_captions_of_a_sharded_batch_move_nothing_between_devices_on_a_mesh():
    n = 128
    mesh = sharding.make_mesh(MeshConfig(data=8))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    tokens = tokenize([f"caption {i}" for i in range(n)])
    run = jax.jit(
        lambda k, t, tokens: draw_wrong_captions(k, t, tokens, None, 16),
        in_shardings=(everywhere, rows, rows),
        out_shardings=rows,
    )
    compiled = run.lower(jax.random.key(0), encoded(n), tokens).compile()
    text = compiled.as_text()
    assert not [
        kind for kind in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if f" {kind}(" in text
    ]
    plain = draw_wrong_captions(jax.random.key(0), encoded(n), tokens, None, 16)
    for a, b in zip(compiled(jax.random.key(0), encoded(n), tokens), plain, strict=True):
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- as the step uses it


@pytest.fixture(scope="module")
def step_parts(tiny):
    """A config of the discriminator's size that matters here, its networks and parameters, and 16 images' ids."""
    config = dataclasses.replace(tiny, remat=False, text=dataclasses.replace(tiny.text, length=24))
    networks = Networks(config)
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    return config, networks, jax.device_get(networks.d.init(0, networks.d.shardings(mesh, config.rules)))


CAPTIONS = ["a cat", "a dog", "a cat", "", "a bird", "a cat", "", "a dog", "a cat", "a fish"] + ["a cat"] * 6
LABELS = [-1, 3, -1, -1, 3, -1, -1, -1, 5, -1, -1, -1, -1, -1, -1, -1]


@pytest.mark.parametrize(
    "micro_batches, shape, dropout",
    [(1, (1, 1, 1), 0.0), (2, (1, 1, 1), 0.1), (2, (4, 2, 1), 0.0), (4, (2, 2, 1), 0.1)],
)
def test_every_micro_batch_on_every_shard_is_mismatched(step_parts, micro_batches, shape, dropout):
    """Through TrainStep.gradients: `wrong` is another caption of the same micro-batch, not null where captions are dropped."""
    config, networks, params = step_parts
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, caption_dropout=dropout))
    networks = Networks(config)
    step = TrainStep(networks)
    step.config = dataclasses.replace(config, micro_batches=micro_batches)
    mesh = sharding.make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])
    n = config.batch_size
    r = config.resolution
    ids = np.arange(n)
    batch = {
        "image": np.broadcast_to(ids[:, None, None, None], (n, r, r, 3)).astype(np.uint8),
        "tokens": tokenize(CAPTIONS),
        "label": np.array(LABELS, np.int32),
    }

    def loss(params, batch, key):
        """No loss: notes what each image was given, at its own id."""
        disc = networks.d.bind(params)
        own = step.objective.own_captions(disc, batch)
        wrong, valid = step.objective.wrong_captions(own, batch, key)
        t = jnp.stack([own, wrong], axis=1)
        id_ = batch["image"][:, 0, 0, 0].astype(jnp.int32)
        part = jnp.full(len(id_), jax.random.uniform(key))
        note = lambda x: jnp.zeros((n, *x.shape[1:]), jnp.float32).at[id_].add(x.astype(jnp.float32))
        return 0.0 * t.sum(), LossReport({"t": note(t), "valid": note(valid), "part": note(part)}, {})

    def run(params, batch, key):
        with sharding.use_mesh(mesh, config.rules):
            return step.gradients(loss, params, batch, key)[1].metrics

    everywhere = NamedSharding(mesh, PartitionSpec())
    where = (networks.d.shardings(mesh, config.rules), batch_shardings(config, mesh), everywhere)
    notes = jax.jit(run, in_shardings=where, out_shardings=everywhere)(params, batch, jax.random.key(2))
    notes = {k: np.asarray(x) * micro_batches for k, x in notes.items()}  # each image is in one part: undo the mean
    own, wrong = notes["t"][:, 0], notes["t"][:, 1]
    _, part = np.unique(np.round(notes["part"], 5), return_inverse=True)
    assert np.bincount(part).tolist() == [n // micro_batches] * micro_batches

    forbidden = same_by_hand(batch["tokens"], batch["label"])
    if dropout:
        forbidden |= np.array([c == "" for c in CAPTIONS])
    close = np.abs(wrong[:, None] - own[None]).max(-1) < 1e-4 * np.abs(own).max()
    together = part[:, None] == part[None]
    np.testing.assert_array_equal(notes["valid"] > 0.5, (together & ~forbidden).any(1))
    for i in np.flatnonzero(notes["valid"] > 0.5):
        assert not close[i, i]
        assert not (close[i] & (batch["tokens"] == batch["tokens"][i]).all(1)).any()
        assert (close[i] & together[i] & ~forbidden[i]).any()
    assert (notes["valid"] > 0.5).any()


@pytest.fixture(scope="module")
def d_loss(step_parts):
    """Metrics of D's loss for given tokens of one batch of images, z and key."""
    config, networks, params = step_parts
    objective = GanObjective(networks)
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    g_params = jax.device_get(networks.g.init(0, networks.g.shardings(mesh, config.rules)))
    n, r = config.batch_size, config.resolution
    image = np.random.default_rng(0).integers(0, 256, (n, r, r, 3)).astype(np.uint8)

    def run(params, g_params, tokens):
        batch = {"image": image, "tokens": tokens, "label": jnp.full(n, -1)}
        return objective.d_loss({"d": params}, g_params, batch, jax.random.key(1))[1].metrics

    compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    return lambda tokens: jax.device_get(compiled(params, g_params, tokens))


def test_the_loss_depends_on_which_caption_belongs_to_which_image(d_loss):
    tokens = tokenize([f"caption number {i}" for i in range(16)])
    plain, again, moved = d_loss(tokens), d_loss(tokens), d_loss(np.roll(tokens, 1, axis=0))
    for name in ("loss/d", "loss/d_match", "logits/real", "logits/wrong"):
        assert plain[name] == again[name]
        assert abs(plain[name] - moved[name]) > 1e-6, name
    assert plain["logits/real"] != plain["logits/wrong"]


def test_without_a_second_caption_there_is_no_matching_loss(d_loss):
    metrics = d_loss(tokenize(["one and the same"] * 16))
    assert metrics["loss/d_match"] == 0
    assert metrics["loss/d"] == metrics["loss/d_gan"] > 0
    assert d_loss(tokenize(["one and the same"] * 15 + ["another"]))["loss/d_match"] > 0
