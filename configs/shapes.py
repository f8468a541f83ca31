"""Drawn shapes from captions: a run whose pictures are judged attribute by attribute, 32 px, on a laptop.

    python -m gigagan_jax.train --config=configs/shapes.py --workdir=runs/shapes

One object a picture, with shape, color, size and material in its caption. It ends by judging 640 pictures; 160 of them
are of pairs of shape and color that no training picture has.
`:16` is for tables of settings; `:scenes` has up to three objects at 64 px; `:64` is the same for one GPU.
"""

from ml_collections import ConfigDict

from gigagan_jax import config as settings

# Learning rate times channels: the rate is inverse to the width, as in configs/scale.py.
_RATE = 0.9


def small_model(resolution: int, *, channels: int, channel_base: int, w_dim: int, text: int, kimg: float) -> ConfigDict:
    """A text model of one block a resolution for two cores; configs/emoji.py is another.

    Args:
      resolution: in pixels.
      channels: of the lowest resolutions.
      channel_base: channels times pixels of a side above them.
      w_dim: of w.
      text: features of a token.
      kimg: length of the run.
    """
    c = settings.default()
    c.resolution = resolution
    levels = resolution.bit_length() - 2  # 4 px to the resolution
    c.batch_size = 16
    c.total_kimg = kimg
    c.checkpoint_kimg = c.snapshot_kimg = 20.0
    c.log_kimg = 1.0
    c.dtype = "float32"
    c.remat = False
    c.data.threads = 1
    # Captions of a few dozen words in all: a table of words needs no letters to be read first.
    c.text.encoder, c.text.width, c.text.buckets = "words", text, 256

    g = c.generator
    g.z_dim, g.w_dim = 32, w_dim
    # A bank of two at 16 px: on a CPU it costs twice the convolution, in both directions.
    g.blocks, g.bank = (1,) * levels, (1, 1, 2, *((1,) * (levels - 3)))
    # Attention at 8 px.
    g.attention_depth = (0, 1, *((0,) * (levels - 2)))
    g.residual_gain, g.attention_gain, g.rgb_gain = 0.4, 0.3, 0.3
    g.attention.mlp_ratio = 2.0
    d = c.discriminator
    d.blocks, d.attention_depth = (1,) * levels, (0,) * levels
    d.head, d.minibatch_std = "projection", 4
    for net in (g, d):
        net.channel_base, net.channel_max = channel_base, channels
        net.attention.heads, net.attention.head_dim = 2, text // 2
        net.text.width, net.text.depth, net.text.heads, net.text.mlp_ratio = text, 1, 2, 2.0

    c.loss.level_weights = tuple(0.5**i for i in range(levels))
    c.loss.match_d_form, c.loss.match_d, c.loss.match_g = "contrastive", 0.5, 0.0
    # Wordings of one meaning differ. Drawn shapes of one shape and color are not compared by size and material then.
    c.loss.mask_same_labels = True
    c.loss.pairing, c.loss.r2, c.loss.centring = "relativistic", True, 0.01
    c.loss.r1_gamma, c.loss.r1_levels = (0.02, 0.02), "all"
    for o in (c.g_optimizer, c.d_optimizer):
        o.learning_rate, o.decay_kimg, o.final_ratio = _RATE / channels, kimg / 2, 0.05
    c.ema.half_life_kimg, c.ema.rampup = 10.0, 0.1
    return c


def for_one_gpu(c: ConfigDict, *, text: int, depth: int, kimg: float) -> None:
    """Grows a small model for one GPU: 256 channels, four filters a bank, bfloat16."""
    c.batch_size, c.dtype, c.total_kimg = 64, "bfloat16", kimg
    g, d = c.generator, c.discriminator
    g.w_dim, g.bank = 256, (4,) * len(g.blocks)
    c.text.width = text
    for net in (g, d):
        net.channel_base, net.channel_max = 4096, 256
        net.text.width, net.text.depth, net.text.heads = text, depth, 4
    for o in (c.g_optimizer, c.d_optimizer):
        o.learning_rate, o.decay_kimg = _RATE / 256, kimg / 2
    c.ema.half_life_kimg = 50.0


def for_tests(c: ConfigDict) -> None:
    """Shrinks a small model to a few steps of toy width."""
    c.total_kimg, c.log_kimg = 0.32, 0.016
    c.checkpoint_kimg = c.snapshot_kimg = 0.16
    c.evaluators = ()
    g, d = c.generator, c.discriminator
    g.z_dim, g.w_dim, g.mapping_depth = 8, 16, 2
    c.text.width = 16
    for net in (g, d):
        net.channel_base, net.channel_max, net.text.width = 128, 16, 16
    c.snapshot.seeds, c.snapshot.prompts = 2, c.snapshot.prompts[:2]


def get_config(arg: str = "") -> ConfigDict:
    """`:16`, `:scenes`, `:64`; `:tiny` is for tests: the same parts at 16 px, a few steps."""
    if arg not in ("", "16", "scenes", "64", "tiny"):
        raise ValueError(f"configs/shapes.py has no variant {arg!r}; known: 16, scenes, 64, tiny")
    scenes = arg in ("scenes", "64")
    resolution = 16 if arg in ("16", "tiny") else 64 if scenes else 32
    if resolution == 16:
        c = small_model(resolution, channels=48, channel_base=256, w_dim=48, text=32, kimg=60.0)
    else:
        c = small_model(resolution, channels=64, channel_base=512, w_dim=64, text=32, kimg=220.0)
    c.name = "shapes" + (f"-{arg}" if arg else "")
    c.evaluators = ("shapes",)
    c.data.source = "shapes"
    c.data.shapes.side = resolution
    c.text.length = 12
    c.snapshot.prompts = (
        "a large red circle",
        "a small blue square",
        "a large striped green triangle",
        "a large shiny yellow star",
        "a small shiny purple cross",
        "a large striped pink ring",
        # Never seen in training.
        "a large purple circle",
        "a large shiny blue star",
    )
    if scenes:
        c.data.shapes.max_objects = 3
        c.text.length = 24
        # At 16 px too: there are relations to follow.
        c.generator.attention_depth = (0, 1, 1, 0, 0)
        c.snapshot.prompts = (
            "a large red circle left of a small blue square",
            "a small shiny green star above a large yellow ring",
            "three small striped orange triangles",
            "two large shiny pink crosses",
        )
    if arg == "64":
        for_one_gpu(c, text=128, depth=2, kimg=3000.0)
    elif arg == "tiny":
        for_tests(c)
        c.data.shapes.examples = 1000
    return c
