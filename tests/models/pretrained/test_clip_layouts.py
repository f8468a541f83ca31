"""One CLIP in the layouts that people have on their disks: the same parameters and tokens from each, or one line."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.laion import get_config
from gigagan_jax.config import MeshConfig, from_dict
from gigagan_jax.data.tokenizers import make_tokenizer
from gigagan_jax.models.pretrained import clip, hub
from gigagan_jax.models.pretrained.architectures import REQUIREMENTS
from gigagan_jax.models.pretrained.frozen import FrozenNetworks
from gigagan_jax.models.pretrained.hub import CONFIG, SINGLE
from gigagan_jax.models.pretrained.network_files import find_network, find_tokenizer
from gigagan_jax.models.pretrained.text_encoder import tokenizer_options
from gigagan_jax.parallel import sharding

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CAPTIONS = ["a cat", "The café, the tree"]


def config_of(path, losses=False, **text):
    config = get_config("tiny")
    config.dtype = "float32"
    config.text.update(path=str(path), **text)
    if not losses:
        config.loss.clip = (0.0, 0.0)
        config.loss.vision_aided = 0.0
    return from_dict(config)


def load(path, **options):
    """(parameters, tokens of captions, identity) of a CLIP."""
    config = config_of(path, **options)
    frozen = FrozenNetworks(config)
    params, identities = frozen.load(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    tokenizer = make_tokenizer(config.text.encoder, config.text.length, **tokenizer_options(config.text))
    return params, tokenizer(CAPTIONS), identities["text"]


def assert_same(a, b):
    assert jax.tree.structure(a[0]) == jax.tree.structure(b[0])
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])


@pytest.fixture(scope="module")
def tensors(clip_folder):
    return load_file(clip_folder / SINGLE)


@pytest.fixture(scope="module")
def text_tensors(tensors):
    return {k: v for k, v in tensors.items() if k.startswith("text_model.")}


@pytest.fixture(scope="module")
def sizes(clip_folder):
    return json.loads((clip_folder / CONFIG).read_text())


@pytest.fixture(scope="module")
def hub_layout(clip_folder):
    return load(clip_folder)


@pytest.fixture(scope="module")
def whole_clip(clip_folder):
    """With the vision tower."""
    return load(clip_folder, losses=True)


@pytest.fixture(scope="module")
def text_alone(text_tensors, sizes, clip_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write(folder, text_tensors, text_sizes(sizes), clip_folder)
    return load(folder)


def text_sizes(sizes):
    return sizes["text_config"] | {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}


def write(folder, tensors, config=None, tokenizer=None, name=SINGLE):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: np.array(v, order="C") for k, v in tensors.items()}, folder / name)
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(config))
    for file in TOKENIZER if tokenizer else ():
        shutil.copy(tokenizer / file, folder)
    return folder


@pytest.mark.parametrize("prefix", ["_orig_mod.", "clip.", "module.", "model.", "model._orig_mod."])
def test_a_prefix(prefix, tmp_path, tensors, sizes, clip_folder, hub_layout):
    renamed = {prefix + k: v for k, v in tensors.items()}
    # A larger model around the CLIP.
    renamed["unet.weight"] = np.ones(3, np.float32)
    ours = load(write(tmp_path, renamed, sizes, clip_folder))
    assert_same(ours, hub_layout)
    # Its identity is that of the same weights without the prefix.
    assert ours[2] == hub_layout[2]


def test_a_prefix_of_a_bare_text_tower(tmp_path, text_tensors, sizes, clip_folder, text_alone):
    for prefix in ("", "model."):
        bare = {prefix + k.removeprefix("text_model."): v for k, v in text_tensors.items()}
        assert_same(load(write(tmp_path, bare, text_sizes(sizes), clip_folder)), text_alone)


def test_two_clips_in_one_file(tmp_path, tensors, sizes, clip_folder, refused):
    twice = {prefix + k: v for k, v in tensors.items() for prefix in ("a.", "b.")}
    refused(lambda: load(write(tmp_path, twice, sizes, clip_folder)), "holds 2 CLIPs (a., b.)")
    # The names as they are come before a copy of them.
    both = tensors | {f"average.{k}": v for k, v in tensors.items()}
    refused(lambda: load(write(tmp_path, both, sizes, clip_folder)), "left over", "average.")


@pytest.mark.parametrize("name", [SINGLE, "model.fp16.safetensors"])
def test_a_pipeline_of_diffusers(name, tmp_path, text_tensors, sizes, clip_folder, text_alone):
    write(tmp_path / "text_encoder", text_tensors, text_sizes(sizes), name=name)
    (tmp_path / "tokenizer").mkdir()
    for file in TOKENIZER:
        shutil.copy(clip_folder / file, tmp_path / "tokenizer")
    (tmp_path / "model_index.json").write_text("{}")
    assert_same(load(tmp_path), text_alone)
    assert_same(load(tmp_path / "text_encoder"), text_alone)
    assert_same(load(tmp_path / "text_encoder" / name), text_alone)


def test_a_pipeline_with_two_encoders(tmp_path, text_tensors, sizes, clip_folder, refused):
    for name in ("text_encoder", "text_encoder_2"):
        write(tmp_path / name, text_tensors, text_sizes(sizes))
    t5 = {"model_type": "t5"}
    write(tmp_path / "text_encoder_3", {"shared.weight": np.ones((2, 2), np.float32)}, t5)
    need = REQUIREMENTS["text"]
    refused(lambda: find_network(str(tmp_path), need, "clip"), "text_encoder, text_encoder_2", "give one of them")
    assert find_network(str(tmp_path), need, "t5").folder.name == "text_encoder_3"
    refused(lambda: find_network(str(tmp_path), need, "dino"), "is a pipeline, and none of its")
    # Each has a tokenizer of its own.
    write(tmp_path / "tokenizer_2", {}, None, clip_folder)
    files = find_network(str(tmp_path / "text_encoder_2"), need, "clip")
    assert find_tokenizer(files, 100, "clip").name == "tokenizer_2"


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_weights_are_cast(kind, tmp_path, tensors, sizes, clip_folder):
    cast = lambda v: v.astype(getattr(ml_dtypes, kind)) if v.ndim == 2 else v
    rounded = {k: cast(v) for k, v in tensors.items()}
    ours = load(write(tmp_path / "f8", rounded, sizes, clip_folder))
    values = {k: v.astype(np.float32) for k, v in rounded.items()}
    assert_same(ours, load(write(tmp_path / "f32", values, sizes, clip_folder)))


def test_float8_weights_with_scales(tmp_path, tensors, sizes, clip_folder, refused):
    scaled = tensors | {"text_model.encoder.layers.0.mlp.fc1.scale_weight": np.ones((), np.float32)}
    refused(lambda: load(write(tmp_path, scaled, sizes, clip_folder)), "float8", "float16")


# ---------------------------------------------------------------- open_clip


def open_clip_names(tensors, text=""):
    """The tensors of a CLIP by the names of open_clip, as its own converter pairs them."""
    out = {"logit_scale": tensors["logit_scale"], f"{text}text_projection": tensors["text_projection.weight"].T}
    out["visual.proj"] = tensors["visual_projection.weight"].T
    for ours, theirs in (("text_model", text), ("vision_model", "visual.")):
        get = lambda name, ours=ours: tensors[f"{ours}.{name}"]
        out[f"{theirs}positional_embedding"] = get("embeddings.position_embedding.weight")
        for i in range(3 if ours == "text_model" else 2):
            old, new = f"encoder.layers.{i}.", f"{theirs}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                parts = [get(f"{old}self_attn.{q}_proj.{kind}") for q in "qkv"]
                out[f"{new}attn.in_proj_{kind}"] = np.concatenate(parts)
                out[f"{new}attn.out_proj.{kind}"] = get(f"{old}self_attn.out_proj.{kind}")
                out[f"{new}ln_1.{kind}"] = get(f"{old}layer_norm1.{kind}")
                out[f"{new}ln_2.{kind}"] = get(f"{old}layer_norm2.{kind}")
                out[f"{new}mlp.c_fc.{kind}"] = get(f"{old}mlp.fc1.{kind}")
                out[f"{new}mlp.c_proj.{kind}"] = get(f"{old}mlp.fc2.{kind}")
    out[f"{text}token_embedding.weight"] = tensors["text_model.embeddings.token_embedding.weight"]
    out["visual.class_embedding"] = tensors["vision_model.embeddings.class_embedding"]
    out["visual.conv1.weight"] = tensors["vision_model.embeddings.patch_embedding.weight"]
    for kind in ("weight", "bias"):
        out[f"{text}ln_final.{kind}"] = tensors[f"text_model.final_layer_norm.{kind}"]
        out[f"visual.ln_pre.{kind}"] = tensors[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = tensors[f"vision_model.post_layernorm.{kind}"]
    return out


def open_clip_config(sizes, **model):
    t, v = sizes["text_config"], sizes["vision_config"]
    text = {"width": 32, "heads": 2, "layers": 3, "mlp_ratio": 2.0, "vocab_size": t["vocab_size"], "context_length": 77}
    vision = {
        "width": 32,
        "head_width": 16,
        "layers": 2,
        "mlp_ratio": 2.0,
        "image_size": 32,
        "patch_size": v["patch_size"],
    }
    model = {"embed_dim": 24, "quick_gelu": True, "text_cfg": text, "vision_cfg": vision} | model
    return {"model_cfg": model, "preprocess_cfg": {"mean": clip.PIXEL_MEAN_STD[0], "std": clip.PIXEL_MEAN_STD[1]}}


@pytest.mark.parametrize("text", ["", "text."])
def test_open_clip(text, tmp_path, tensors, sizes, clip_folder, whole_clip):
    write(tmp_path, open_clip_names(tensors, text), None, clip_folder, hub.OPEN_CLIP_SINGLE)
    (tmp_path / hub.OPEN_CLIP_CONFIG).write_text(json.dumps(open_clip_config(sizes)))
    ours = load(tmp_path, losses=True)
    assert_same(ours, whole_clip)
    assert ours[2] == whole_clip[2]


def test_the_config_of_either_beside_the_weights_of_the_other(tmp_path, tensors, sizes, clip_folder, whole_clip):
    write(tmp_path / "a", tensors, None, clip_folder)
    (tmp_path / "a" / hub.OPEN_CLIP_CONFIG).write_text(json.dumps(open_clip_config(sizes)))
    write(tmp_path / "b", open_clip_names(tensors), sizes, clip_folder)
    for name in "ab":
        assert_same(load(tmp_path / name, losses=True), whole_clip)


@pytest.mark.parametrize(
    "part, fields",
    [
        ("vision_cfg", {"timm_model_name": "vit_base"}),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}),
        ("vision_cfg", {"attentional_pool": True}),
        ("text_cfg", {"hf_model_name": "xlm-roberta-base"}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"ls_init_value": 1e-5}),
    ],
)
def test_open_clips_that_are_other_networks(part, fields, tmp_path, sizes, refused, tensors):
    write(tmp_path, tensors)
    config = open_clip_config(sizes)
    config["model_cfg"][part] |= fields
    (tmp_path / hub.OPEN_CLIP_CONFIG).write_text(json.dumps(config))
    refused(lambda: FrozenNetworks(config_of(tmp_path)), next(iter(fields)), hub.OPEN_CLIP_CONFIG)


def test_open_clip_with_strange_pixels_or_tensors(tmp_path, sizes, refused, tensors, clip_folder):
    config = open_clip_config(sizes)
    config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    write(tmp_path, open_clip_names(tensors) | {"visual.head.weight": np.ones(2, np.float32)}, sizes, clip_folder)
    refused(lambda: load(tmp_path), "visual.head.weight", "open_clip")
    (tmp_path / CONFIG).unlink()
    (tmp_path / hub.OPEN_CLIP_CONFIG).write_text(json.dumps(config))
    refused(lambda: load(tmp_path), "preprocess_cfg.mean")


# ---------------------------------------------------------------- a single file, and the hub's cache


def test_a_single_file(tmp_path, text_tensors, sizes, clip_folder, text_alone, monkeypatch, caplog, refused):
    write(tmp_path, text_tensors, name="clip_l.safetensors")
    write(tmp_path, {"other.weight": np.ones(2, np.float32)}, name="t5xxl.safetensors")
    file = tmp_path / "clip_l.safetensors"
    # The number of heads is in no shape.
    refused(lambda: load(file), "no config.json beside it", "32 wide", "put the config.json")
    refused(lambda: load(tmp_path), "clip_l.safetensors, t5xxl.safetensors", "give the file")
    tiny = clip.ClipConfig(clip.TextConfig(32, 64, 3, 2, "quick_gelu"), None, 24)
    monkeypatch.setitem(clip.KNOWN, "test/tiny", tiny)
    refused(lambda: load(file), "holds no tokenizer", "tokenizer.json, or vocab.json and merges.txt")
    assert "quick_gelu" in caplog.text
    # In a folder of its name, since many networks share one folder; a tokenizer alone does not name its kind.
    (tmp_path / "clip_l").mkdir()
    shutil.copy(clip_folder / "tokenizer.json", tmp_path / "clip_l")
    assert_same(load(file), text_alone)
    (tmp_path / CONFIG).write_text(json.dumps(text_sizes(sizes)))
    assert_same(load(file), text_alone)


def test_the_sizes_of_a_whole_clip_without_a_config(tmp_path, tensors, clip_folder, whole_clip, monkeypatch, refused):
    tiny = clip.read_config(clip_folder)
    monkeypatch.setitem(clip.KNOWN, "test/tiny", tiny)
    write(tmp_path, tensors, None, clip_folder)
    assert_same(load(tmp_path, losses=True), whole_clip)
    write(tmp_path, {"unet.weight": np.ones(2, np.float32)})
    refused(lambda: load(tmp_path), "holds no CLIP")


def test_the_tokenizer_of_openai_in_the_cache_serves_every_clip_of_its_vocabulary(tmp_path, text_tensors, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "models--openai--clip-vit-base-patch32"
    (place / "snapshots" / "abc").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots" / "abc" / "tokenizer.json").touch()
    write(tmp_path, text_tensors, {})
    files = find_network(str(tmp_path), REQUIREMENTS["text"], "clip")
    assert find_tokenizer(files, 49408, "clip") == place / "snapshots" / "abc"
    assert find_tokenizer(files, 514, "clip") == tmp_path


def test_a_folder_of_the_hubs_cache(tmp_path, clip_folder, hub_layout, refused):
    place = tmp_path / "models--org--name"
    shutil.copytree(clip_folder, place / "snapshots" / "abc")
    assert_same(load(place), hub_layout)
    shutil.copytree(clip_folder, place / "snapshots" / "def")
    refused(lambda: load(place), "without a main", "abc, def")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("def\n")
    assert find_network(str(place), REQUIREMENTS["text"], "clip").folder.name == "def"


# ---------------------------------------------------------------- what is refused, or works as it is


def test_pointers_of_git_lfs(tmp_path, tensors, sizes, clip_folder, refused):
    for name in (SINGLE, CONFIG, "tokenizer.json"):
        folder = write(tmp_path / name, tensors, sizes, clip_folder)
        (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 17105\n")
        refused(lambda folder=folder: load(folder), folder / name, "pointer of Git LFS", "`git lfs pull`")


def test_a_siglip(tmp_path, tensors, sizes, clip_folder, refused):
    write(tmp_path, tensors, sizes | {"model_type": "siglip"}, clip_folder)
    refused(lambda: load(tmp_path), "SigLIP is no CLIP", "openai/clip-vit-large-patch14")


def test_added_tokens(tmp_path, tensors, sizes, clip_folder, refused):
    rows = sizes["text_config"]["vocab_size"]
    folder = write(tmp_path, tensors, sizes, clip_folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    token = {"id": rows, "content": "<sks>", "single_word": False, "lstrip": False, "rstrip": False}
    values["added_tokens"].append(token | {"normalized": True, "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(values))
    refused(lambda: load(folder), "1 added tokens (<sks>)", f"{rows} rows", "added_tokens.json")
    # Fine-tuned weights have a row for it.
    key = "text_model.embeddings.token_embedding.weight"
    more = tensors | {key: np.concatenate([tensors[key], tensors[key][:1]])}
    sizes = sizes | {"text_config": sizes["text_config"] | {"vocab_size": rows + 1}}
    params, _, _ = load(write(folder, more, sizes))
    assert params["text"]["token"].shape[0] == rows + 1
    assert clip.last_id(49409) == 49407


def test_248_positions(tmp_path, tensors, sizes, clip_folder, refused):
    key = "text_model.embeddings.position_embedding.weight"
    long = tensors | {key: np.resize(tensors[key], (248, 32))}
    sizes = sizes | {"text_config": sizes["text_config"] | {"max_position_embeddings": 248}}
    folder = write(tmp_path, long, sizes, clip_folder)
    assert load(folder, length=248)[1].shape == (2, 248)
    refused(lambda: load(folder, length=249), "takes at most 248 tokens")


def test_a_text_tower_alone_with_losses_that_look_at_images(tmp_path, text_tensors, sizes, clip_folder, refused):
    write(tmp_path, text_tensors, text_sizes(sizes), clip_folder)
    words = ("text tower alone", "--config.loss.clip=(0,0) --config.loss.vision_aided=0", "config.clip.path")
    refused(lambda: FrozenNetworks(config_of(tmp_path, losses=True)), *words)
    # Embedding captions ahead of training runs the text towers alone.
    refused(lambda: FrozenNetworks(config_of(tmp_path, losses=True), roles=("text", "clip_text")), *words)
