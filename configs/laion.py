"""The paper's base text-to-image model: 64 px, 652.5M generator and 381.4M discriminator (Table A2, third column).

The sizes are the paper's. The discriminator's heads and the losses are those whose drawn shapes are right most often
(docs/ablations.md); `:paper` has the paper's.

    python -m gigagan_jax.train --config=configs/laion.py --workdir=DIR --config.data.path='gs://bucket/{00000..01234}.tar'

Data: tars as img2dataset writes them, a folder of images with captions, Parquet, ArrayRecord, or a TFDS data set.
Captions go through a frozen CLIP ViT-L/14, whose towers are those of the contrastive loss too; the vision-aided
discriminator stands on CLIP ViT-B/32. Both are read from the hub's cache (`hf download ID`) or a folder.

Hardware: the paper trained it on 96 to 128 A100 for 1,350k steps. Here it is planned for 64 TPU v5p chips at batch 1024
with `--config.mesh.fsdp=16`, and `:paper` for 256 v5e or v6e too, both without R1 (docs/planning.md: compile minutes, memory
and step time as the compiler estimates them, and what R1 and R2 ask of a v5e; docs/meshes.md: why 16).
"""

from ml_collections import ConfigDict

from gigagan_jax import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """Variants: `:paper` has the discriminator's heads and the losses of the paper; `:tiny` has every part of it at toy width,
    for tests and for a look at a CPU; `:bytes` and `:paper-bytes` need no CLIP; `:small` is the latter at 23M and 21M parameters
    in float32, to time a step on a CPU; `:unconditional` and `:unconditional-tiny` need neither captions nor a CLIP."""
    variants = ("paper", "tiny", "bytes", "paper-bytes", "small", "unconditional", "unconditional-tiny")
    if arg and arg not in variants:
        raise ValueError(f"configs/laion.py has no variant {arg!r}; known: {', '.join(variants)}")
    c = settings.default()  # the defaults are the paper's model
    c.name = "laion"
    c.text.encoder, c.text.path = "clip", "openai/clip-vit-large-patch14"
    c.loss.clip = (0.2, 1.0)
    c.vision_aided.path = "openai/clip-vit-base-patch32"
    c.loss.vision_aided = 1.0
    c.data.crop = "center"
    c.remat = False  # 16 images a v5p chip leave room for what the backward pass keeps: a quarter of the work less
    if arg in ("", "bytes"):
        follow_captions(c)
    if arg == "tiny":
        shrink(c)
    elif arg in ("bytes", "paper-bytes", "small"):
        c.name += f"-{arg}"
        c.text.encoder, c.text.path, c.vision_aided.path = "bytes", "", ""
        c.loss.clip, c.loss.vision_aided = (0.0, 0.0), 0.0
        if arg == "small":
            make_small(c)
        else:
            c.text.length = 256  # a byte is a token: 77 of them cut most captions of the web
    elif arg in ("unconditional", "unconditional-tiny"):
        c.name += "-unconditional"
        c.condition = "none"
        c.text.encoder, c.text.path, c.vision_aided.path = "bytes", "", ""
        c.loss.clip, c.loss.vision_aided, c.loss.match_d, c.loss.match_g = (0.0, 0.0), 0.0, 0.0, 0.0
        if arg == "unconditional-tiny":
            shrink(c)
    elif arg == "paper":
        c.name += "-paper"
    return c


def follow_captions(c: ConfigDict) -> None:
    """The head of D and the losses with which drawn shapes have the shape of their caption most often.

    docs/ablations.md: at 16 px, three seeds each. Nobody has compared them at this size.
    """
    c.discriminator.head = "projection"
    c.loss.match_d_form, c.loss.match_d = "contrastive", 0.5
    c.loss.match_g, c.loss.match_g_form = 0.0, "off"
    c.loss.pairing, c.loss.r2, c.loss.centring = "relativistic", True, 0.01


def make_small(c: ConfigDict) -> None:
    """One to three blocks a resolution, at most 384 channels."""
    c.dtype, c.batch_size = "float32", 2
    g, d = c.generator, c.discriminator
    g.blocks, d.blocks = (2, 1, 1, 1, 1), (1, 1, 2, 2, 3)
    g.bank, g.attention_depth, d.attention_depth = (2,) * 5, (0, 0, 1, 1, 0), (0, 1, 1, 0, 0)
    g.z_dim = g.w_dim = 512
    c.text.width = 256
    for net in (g, d):
        net.channel_base, net.channel_max = 3072, 384
        net.text.width, net.text.depth, net.text.heads = 256, 2, 4


def shrink(c: ConfigDict) -> None:
    """The same parts at toy width: 16 px, a few hundred thousand parameters.

    Without a download: captions go through the bytes encoder, and no loss needs a CLIP. `--config.text.path=FOLDER` of a CLIP
    switches all of that on.
    """
    c.name += "-tiny"
    c.remat = True
    c.dtype = "float32"  # CPUs emulate bfloat16, which takes half as long again to compile
    c.resolution = 16
    c.batch_size = 16
    c.total_kimg, c.checkpoint_kimg, c.snapshot_kimg, c.log_kimg = 1.6, 0.8, 0.8, 0.16
    c.text.length, c.text.width = 48, 32
    c.text.encoder, c.text.path, c.vision_aided.path = "auto", "", ""
    c.vision_aided.layers, c.vision_aided.projection, c.vision_aided.head_width = (1, 2), 16, 16
    c.vision_aided.text.width, c.vision_aided.text.heads = 32, 2
    g, d = c.generator, c.discriminator
    g.z_dim, g.w_dim = 16, 32
    g.channel_base, g.channel_max = 256, 32
    g.blocks, g.bank, g.attention_depth = (2, 2, 2), (1, 2, 4), (0, 2, 1)
    d.channel_base, d.channel_max = 256, 32
    d.blocks, d.attention_depth, d.head_width = (1, 2, 2), (0, 1, 0), 16
    for net in (g, d):
        net.text.width, net.text.depth, net.text.heads = 32, 2, 2
        net.attention.heads, net.attention.head_dim = 2, 16
    c.snapshot.seeds = 4
