"""Your own pictures: text, class and unconditional models between 1M and 120M parameters, for one GPU or for two cores.

    python -m gigagan_jax.train --config=configs/own.py --workdir=runs/own --config.data.path=photos/

The variant is any of three words, joined by "-" (`configs/own.py:class-medium-128`):
- what pictures are drawn by: `text` (captions; a picture without one is drawn by none), `class` (one folder a class), or
  `unconditional`;
- the size: `mini` (1M, for CPUs), `small` (5M, 8 GB), `medium` (30M, 12 GB), `large` (120M, 24 GB of GPU memory);
- the side in pixels: `32`, `64`, `128` or `256`.
Without a variant: text, small, 64 px. docs/your_images.md says what to choose, and what is seen after how long.

Data: a folder of pictures, with or without captions, and what else docs/data.md names. Below 50,000 pictures the discriminator
sees them augmented.
"""

from ml_collections import ConfigDict

from gigagan_jax import config as settings

CONDITIONS = ("text", "class", "unconditional")
# Channels of the lowest resolutions, filters of a bank, layers of T, and features of a token.
SIZES = {"mini": (96, 1, 1, 48), "small": (136, 2, 1, 96), "medium": (296, 3, 2, 192), "large": (512, 4, 4, 512)}
# Images a step, by the side in pixels; of each size they fit its card.
BATCHES = {32: 64, 64: 64, 128: 32, 256: 16}


def get_config(arg: str = "") -> ConfigDict:
    """See the top; the size `tiny` is for tests: the same parts at 16 px, a few steps."""
    condition, size, resolution = "text", "small", 64
    for word in filter(None, arg.split("-")):
        if word in CONDITIONS:
            condition = word
        elif word in SIZES or word == "tiny":
            size = word
        elif word.isdecimal() and int(word) in BATCHES:
            resolution = int(word)
        else:
            words = ", ".join((*CONDITIONS, *SIZES, *map(str, BATCHES)))
            raise ValueError(f"configs/own.py has no variant {arg!r}; known: tiny, and words joined by '-': {words}")
    if size != "tiny":
        return own_config(condition, size, resolution)
    c = own_config(condition, "mini", 16)
    for_tests(c)
    return c


def own_config(condition: str, size: str, resolution: int) -> ConfigDict:
    """One step of the ladder; the arguments are the words of a variant."""
    channels, bank, depth, features = SIZES[size]
    levels = resolution.bit_length() - 2  # 4 px to the resolution
    on_cpu = size == "mini"
    c = settings.default()
    c.name = f"own-{condition}-{size}-{resolution}"
    c.condition = "none" if condition == "unconditional" else condition
    c.resolution = resolution
    c.batch_size = 16 if on_cpu else BATCHES.get(resolution, 64)
    c.dtype = "float32" if on_cpu else "bfloat16"
    c.remat = resolution >= 128
    c.total_kimg = 400.0 if on_cpu else 5000.0
    c.checkpoint_kimg = c.snapshot_kimg = 4.0 if on_cpu else 50.0
    c.log_kimg = 0.2 if on_cpu else 2.0
    c.data.captions = "optional"
    c.data.flip = True
    c.data.threads = 1 if on_cpu else 8
    # Words need no letters to be read first. --config.text.encoder=clip with text.path reads captions through a CLIP.
    c.text.encoder, c.text.width, c.text.buckets, c.text.length = "words", features, 2048, 64

    g, d = c.generator, c.discriminator
    g.z_dim, g.w_dim = 64, max(96, features)
    g.blocks = tuple(1 if r >= 64 or on_cpu else 2 for r in (4 << i for i in range(levels)))
    g.bank = tuple(bank if 8 <= 4 << i <= 64 else 1 for i in range(levels))
    d.blocks = g.blocks[::-1]
    # At 8 and 16 px, where attention costs little.
    g.attention_depth = tuple(int(i == 1 or (i == 2 and not on_cpu)) for i in range(levels))
    d.attention_depth = g.attention_depth[::-1] if not on_cpu else (0,) * levels
    g.residual_gain, g.attention_gain, g.rgb_gain = 0.4, 0.3, 0.3
    g.attention.mlp_ratio = 2.0
    d.minibatch_std = 4
    d.augment = ("auto",)
    for net in (g, d):
        # Full width up to 16 px (mini: 8 px), half of it at twice the side.
        net.channel_base, net.channel_max = channels * (8 if on_cpu else 16), channels
        net.attention.heads, net.attention.head_dim = (2, features // 2) if on_cpu else (4, max(16, channels // 8))
        net.text.width, net.text.depth, net.text.heads, net.text.mlp_ratio = features, depth, 2 if on_cpu else 4, 2.0

    c.loss.level_weights = tuple(0.5**i for i in range(levels))
    c.loss.pairing, c.loss.r2, c.loss.centring = "relativistic", True, 0.01
    # Gradients are by pixels: the same penalty at any size.
    gamma = 0.05 * (resolution / 32) ** 2
    c.loss.r1_gamma = (gamma, gamma)
    for o in (c.g_optimizer, c.d_optimizer):
        # Inverse to the width, as in configs/scale.py.
        o.learning_rate = 0.9 / channels / (1 if on_cpu else 2)
    c.ema.half_life_kimg, c.ema.rampup = (10.0 if on_cpu else 20.0), 0.1
    c.snapshot.prompts = ()  # captions, or classes, of the data
    set_condition(c)
    return c


def set_condition(c: ConfigDict) -> None:
    """What depends on what pictures are drawn by."""
    if c.condition == "text":
        c.discriminator.head = "projection"
        c.loss.match_d_form, c.loss.match_d, c.loss.match_g = "contrastive", 0.5, 0.0
        c.data.caption_dropout = 0.1
        return
    c.loss.match_d = c.loss.match_g = 0.0
    if c.condition == "class":
        # As many as the data has.
        c.num_classes = 0
        c.discriminator.head = "projection"


def for_tests(c: ConfigDict) -> None:
    """Shrinks a config to a few steps of toy width."""
    c.name = f"{c.name.removesuffix('-mini-16')}-tiny"
    c.total_kimg, c.log_kimg = 0.32, 0.016
    c.checkpoint_kimg = c.snapshot_kimg = 0.16
    g, d = c.generator, c.discriminator
    g.z_dim, g.w_dim, g.mapping_depth = 8, 16, 2
    c.text.width = 16
    for net in (g, d):
        net.channel_base, net.channel_max, net.text.width = 128, 16, 16
        net.attention.head_dim = 8
    c.snapshot.seeds = 2
