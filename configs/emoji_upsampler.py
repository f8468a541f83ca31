"""Emoji enlarged four times, with their captions: 32 to 128 px, on a laptop. Vectors, whose true pixels are known at any size.

    python -m gigagan_jax.train --config=configs/emoji_upsampler.py --workdir=DIR --config.data.path=data/emoji128/train

`tools/prepare_data.py emoji --concepts=all --size=128 --hold_out=concepts,glossy` makes the data (docs/emoji.md): a
tenth of the concepts and one of the seven drawing styles are left out.
"""

from ml_collections import ConfigDict

from configs import photos


def get_config(arg: str = "") -> ConfigDict:
    """`:none` has no captions; `:clean` no noise augmentation; `:tiny` is for tests."""
    c = photos.get_config("tiny" if arg == "tiny" else "")
    c.name = "emoji-upsampler" + (f"-{arg}" if arg else "")
    c.data.captions, c.data.crop, c.data.flip = "required", "center", False
    u, g, d = c.upsampler, c.generator, c.discriminator
    # Vectors are drawn, not filmed: nothing is to be repaired but what noise hides.
    u.downsample, u.degradation, u.noise = "area", 0.0, 0.3
    if arg != "none":
        c.condition = "text"
        c.text.encoder, c.text.length, c.text.buckets, c.text.width = "words", 24, 1024, 48
        for t in (g.text, d.text):
            t.width, t.depth, t.heads, t.mlp_ratio = 48, 1, 2, 2.0
        c.loss.match_d_form, c.loss.match_d, c.loss.match_g = "contrastive", 0.5, 0.0
        c.loss.mask_same_labels = True  # several wordings of one cell
        d.head = "projection"
    if arg == "clean":
        u.noise = 0.0
    if arg == "tiny":
        return c
    if arg not in ("", "none", "clean"):
        raise ValueError(f"configs/emoji_upsampler.py has no variant {arg!r}; known: none, clean, tiny")
    c.resolution, u.input_resolution, u.bottleneck = 128, 32, 8
    c.total_kimg, c.checkpoint_kimg, c.snapshot_kimg, c.log_kimg = 16.0, 2.0, 4.0, 0.2
    g.channel_base, g.channel_max = 1024, 64  # 64, 64, 32, 16, 8 at 8, 16, 32, 64, 128 px
    g.blocks, g.bank, g.attention_depth = (1, 1, 1, 1, 1), (1,) * 5, (1, 1, 0, 0, 0)
    d.blocks, d.attention_depth = (1,) * 6, (0,) * 6
    return c
