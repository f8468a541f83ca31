"""Frozen networks in training: the contrastive loss against NumPy and on meshes, whole runs, resume, stored embeddings."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import laion
from gigagan_jax import sharding
from gigagan_jax.config import MeshConfig, from_dict
from gigagan_jax.data.sources.digits import DigitsSource
from gigagan_jax.errors import UserError
from gigagan_jax.models.pretrained.frozen import Frozen
from gigagan_jax.training import losses
from gigagan_jax.training.checkpoint import Checkpoints, same, with_shardings
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep, batch_shardings

ROOT = Path(__file__).parents[2]
# For child processes: one device, compiled fast.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
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
    frozen = Frozen(config)
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


class Towers:
    """The contrastive loss of images through the production towers, on any mesh."""

    def __init__(self, folder):
        self.config = config_of(folder, batch_size=16)
        self.frozen = Frozen(self.config)
        self.batch = batch_of(self.config)
        rng = np.random.default_rng(1)
        self.images = rng.uniform(-1, 1, self.batch["image"].shape).astype(np.float32)

    def on(self, shape):
        mesh = mesh_of(*shape)
        params, _ = self.frozen.load(mesh)
        rows = NamedSharding(mesh, PartitionSpec(("fsdp", "data")))

        def loss(images, params, tokens):
            with sharding.use(mesh, self.config.rules):
                text = self.frozen.encode(params, tokens)["clip_text"]
                embedding, scale = self.frozen.clip_image(params, images)
                everyone = sharding.constrain(text, None, None)
                return losses.clip_contrastive(sharding.constrain(embedding, "batch", None), text, everyone, scale)

        run = jax.jit(jax.value_and_grad(loss), in_shardings=(rows, self.frozen.shardings(mesh), rows))
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

    from gigagan_jax.models.pretrained import clip

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
    def on(self, shape, parts=1):
        self.values.micro_batches = parts
        config = from_dict(self.values)
        mesh = mesh_of(*shape)
        networks = Networks(config)
        step = TrainStep(networks)
        state = networks.init(mesh)
        params, _ = networks.frozen.load(mesh)

        def run(state, batch, key, frozen):
            with sharding.use(mesh, config.rules):
                batch = step.encode(batch, frozen)
                critics, said = step.d_gradients(state, batch, key, False, frozen)
                g, g_said = step.g_gradients(state, batch, key, frozen)
                return {"g": g, **critics}, said | g_said

        everywhere = NamedSharding(mesh, PartitionSpec())
        inputs = (networks.shardings(mesh), batch_shardings(config, mesh), everywhere, networks.frozen.shardings(mesh))
        compiled = jax.jit(run, in_shardings=inputs)
        return jax.device_get(compiled(state, self.batch, jax.random.key(3), params))


@pytest.fixture(scope="module")
def gradients(clip_folder):
    return Gradients(clip_folder)


@pytest.mark.parametrize("shape", [(4, 2, 1), (2, 2, 2)])
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
            limit = 5e-5 if "select" in jax.tree_util.keystr(path) else TOLERANCE
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
    frozen = Frozen(config)
    mesh = mesh_of(1, 1, 1)
    params, _ = frozen.load(mesh)
    batch = batch_of(config)
    text = frozen.encode(params, jnp.asarray(batch["tokens"]))["clip_text"]
    images = jnp.asarray(batch["image"] / np.float32(127.5) - 1)
    embedding, scale = frozen.clip_image(params, images)
    whole = losses.clip_contrastive(embedding, text, text, scale)
    parts = [losses.clip_contrastive(embedding[i::2], text[i::2], text, scale) for i in range(2)]
    alone = [losses.clip_contrastive(embedding[i::2], text[i::2], text[i::2], scale) for i in range(2)]
    assert float(sum(parts) / 2) == pytest.approx(float(whole), rel=1e-5)
    assert float(sum(alone) / 2) < 0.95 * float(whole)


# ---------------------------------------------------------------- whole runs, in processes of their own


def command(verb, *arguments, cwd=ROOT):
    environment = os.environ | {"XLA_FLAGS": QUICK, "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, *verb, *arguments]
    return subprocess.run(call, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


TRAIN = ("-m", "gigagan_jax.train")
SMALL = (
    "--config=configs/laion.py:tiny",
    "--config.resolution=8",
    "--config.generator.blocks=(1,1)",
    "--config.generator.bank=(1,2)",
    "--config.generator.attention_depth=(0,1)",
    "--config.discriminator.blocks=(1,1)",
    "--config.discriminator.attention_depth=(0,0)",
    "--config.dtype=float32",
    "--config.remat=false",
    "--config.batch_size=8",
    "--config.checkpoint_kimg=0.016",
    "--config.log_kimg=0.008",
    "--config.snapshot_kimg=1",
    "--config.snapshot.seeds=1",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images with captions: long, empty words, emoji, right to left, several a file, 10,000 characters."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    source = DigitsSource()
    odd = ["the seven " * 40, "😀🎉 zero", "رقم سبعة", "שבע", "x" * 10_000, "<|endoftext|> nine", "one\ntwo\nthree"]
    for i in range(24):
        Image.fromarray(source[i].image).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(odd[i] if i < len(odd) else source[i].captions[0], encoding="utf-8")
    return folder


def train(workdir, pictures, clip, total, *extra):
    where = (f"--workdir={workdir}", f"--config.data.path={pictures}", f"--config.text.path={clip}")
    return command(TRAIN, *SMALL, *where, f"--config.total_kimg={total}", *extra)


def state_of(workdir):
    config = Checkpoints(workdir)
    step = config.latest()
    networks = Networks(config.config(step))
    mesh = mesh_of(1, 1, 1)
    state, _ = config.restore(step, with_shardings(networks.abstract(), networks.shardings(mesh)))
    config.close()
    return jax.device_get(state)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pictures, clip_folder):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = train(workdir, pictures, clip_folder, 0.048)
    assert done.returncode == 0, done.stderr + done.stdout
    return workdir, done


def test_a_run_with_all_losses(whole):
    workdir, done = whole
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    for name in ("loss/clip", "loss/v", "loss/g_v", "loss/g", "loss/d", "grad_norm/v"):
        assert all(np.isfinite(m[name]) for m in lines), name
    assert (done.stdout + done.stderr).count("further cuts are not reported") == 1
    # No frozen weight in the checkpoint: heads and projections would be there under these names.
    kept = "".join(p.name for p in (workdir / "checkpoints").rglob("*"))
    assert "vision_model" not in kept
    assert state_of(workdir).v is not None


def test_resume_with_all_losses_is_bit_exact(whole, tmp_path, pictures, clip_folder):
    """Stopped after two of six steps; parameters, three optimizers and averages as in the uninterrupted run."""
    workdir = tmp_path / "cut"
    # The ramps depend on total_kimg, so the first part is the same run with its later checkpoints removed.
    shutil.copytree(whole[0], workdir)
    for later in ("4", "6"):
        shutil.rmtree(workdir / "checkpoints" / later)
    done = train(workdir, pictures, clip_folder, 0.048)
    assert done.returncode == 0, done.stderr
    assert "restoring checkpoint 2" in done.stdout + done.stderr
    a, b = state_of(whole[0]), state_of(workdir)
    assert int(a.step) == int(b.step) == 6
    assert same(a, b)


def test_samples_from_prompts(whole, tmp_path):
    """Ordinary, empty, emoji, right to left, longer than 77 tokens, 10,000 characters."""
    prompts = ["the digit 3", "", "😀🎉", "رقم سبعة", "many words " * 60, "y" * 10_000]
    flags = [f"--prompt={p}" for p in prompts]
    done = command(
        ("-m", "gigagan_jax.sample"), f"--workdir={whole[0]}", *flags, "--num=1", f"--out={tmp_path / 'out'}"
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == len(prompts)
    assert (done.stdout + done.stderr).count("further cuts are not reported") == 1


def test_resume_with_other_weights_is_refused(whole, tmp_path, pictures, make_clip):
    other = make_clip(tmp_path / "other", seed=5)
    done = train(whole[0], pictures, other, 0.064)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "other weights of the frozen network 'text'" in line
    done = command(
        ("-m", "gigagan_jax.sample"), f"--workdir={whole[0]}", "--prompt=x", "--num=1", f"--out={tmp_path}/x.png"
    )
    assert done.returncode == 0, done.stderr


def test_stored_embeddings_train_the_same(whole, tmp_path, pictures, clip_folder):
    """`prepare_data.py embed`, then the same run without a text encoder in the step: the same parameters to rounding."""
    out, where = tmp_path / "embeddings", (f"--config.data.path={pictures}", f"--config.text.path={clip_folder}")
    done = command(("tools/prepare_data.py", "embed"), *SMALL, *where, f"--out={out}")
    assert done.returncode == 0, done.stderr
    workdir = tmp_path / "stored"
    done = train(workdir, pictures, clip_folder, 0.048, f"--config.data.embeddings={out}")
    assert done.returncode == 0, done.stderr
    a, b = state_of(whole[0]), state_of(workdir)
    # Adam makes a sign of a rounding where a gradient is nearly zero: nearly all parameters agree closely, none is far.
    for x, y in zip(jax.tree.leaves(a.g.params), jax.tree.leaves(b.g.params), strict=True):
        assert np.abs(x - y).max() < 6 * 2 * 0.0025
        assert np.median(np.abs(x - y)) < 1e-5
    first = [json.loads((w / "metrics.jsonl").read_text().splitlines()[0]) for w in (whole[0], workdir)]
    assert first[0]["loss/clip"] == pytest.approx(first[1]["loss/clip"], rel=1e-5)
    # They are of one encoder and one data set.
    done = train(
        tmp_path / "x", pictures, clip_folder, 0.048, f"--config.data.embeddings={out}", "--config.text.length=20"
    )
    assert done.returncode == 2
    assert "does not fit this run (length: 48 there, 20 here)" in done.stderr
    (out / "index.json").unlink()
    done = train(tmp_path / "y", pictures, clip_folder, 0.048, f"--config.data.embeddings={out}")
    assert done.returncode == 2
    assert "unfinished?" in done.stderr


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", ["model.safetensors", "hf download openai/clip-vit-large-patch14", "text.encoder=bytes"]),
        ("truncated", ["model.safetensors", "damaged or cut short"]),
        ("other", ["another architecture"]),
        ("tokenizer", ["the tokenizer does not fit the weights"]),
        ("pickle", ["is a pickle", "save_pretrained"]),
    ],
)
def test_bad_weights_are_one_line(damage, words, tmp_path, pictures, clip_folder):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    path = str(folder)
    if damage == "missing":
        path = "openai/clip-vit-large-patch14"
    elif damage == "truncated":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif damage == "other":
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["num_hidden_layers"] = 4
        (folder / "config.json").write_text(json.dumps(config))
    elif damage == "tokenizer":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        extra = {"id": 516, "content": "<more>", "single_word": False, "lstrip": False, "rstrip": False}
        tokenizer["added_tokens"].append(extra | {"normalized": False, "special": True})
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    done = train(tmp_path / "run", pictures, path, 0.016)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line
    assert "Traceback" not in done.stderr + done.stdout


def test_missing_clip_for_one_role_names_what_does_without(clip_folder):
    with pytest.raises(UserError, match=r"config.clip.path is not set.*\(0,0\) switches it off"):
        config_of("", text__encoder="bytes", loss__clip=(0.2, 1.0), loss__vision_aided=0.0)
    with pytest.raises(UserError, match=r"config.vision_aided.path is not set.*0 switches it off"):
        config_of("", text__encoder="bytes", loss__clip=(0.0, 0.0), loss__vision_aided=1.0)
    with pytest.raises(UserError, match=r"text\.encoder=bytes needs none"):
        config_of("", text__encoder="clip")
    with pytest.raises(UserError, match=r"has 2 blocks"):
        Frozen(config_of(clip_folder, vision_aided__layers=(1, 3)))
    with pytest.raises(UserError, match="takes at most 77 tokens"):
        Networks(config_of(clip_folder, text__length=78))
