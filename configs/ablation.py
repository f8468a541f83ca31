"""Rows of the paper's Table 1 on one model: what each part adds. `--config=configs/ablation.py:ROW`.

    python -m gigagan_jax.train --config=configs/ablation.py:attention --workdir=DIR --config.data.path=FOLDER

Rows, each with all before it: stylegan2, attention, matching, adaptive, deeper, clip, multiscale, vision. 64 px, batch 256,
100k steps. Captions go through a frozen CLIP ViT-L/14 in every row; up to `deeper`, `--config.text.encoder=bytes` needs none.
"""

from ml_collections import ConfigDict

from gigagan_jax import config as settings

ROWS = ("stylegan2", "attention", "matching", "adaptive", "deeper", "clip", "multiscale", "vision")


def get_config(arg: str = "vision") -> ConfigDict:
    """The row `arg`."""
    if arg not in ROWS:
        raise ValueError(f"configs/ablation.py has no row {arg!r}; known: {', '.join(ROWS)}")
    has = lambda row: ROWS.index(arg) >= ROWS.index(row)
    c = settings.default()
    c.name = f"ablation-{arg}"
    c.batch_size = 256
    c.total_kimg = 25_600.0
    c.data.source = "folder"
    g, d = c.generator, c.discriminator
    g.channel_base, g.channel_max = 16384, 512
    d.channel_base, d.channel_max = 16384, 512
    g.blocks, d.blocks = (1,) * 5, (1,) * 5
    g.bank = (1,) * 5
    if not has("attention"):
        g.attention_depth = d.attention_depth = (0,) * 5
    if not has("matching"):
        c.loss.match_d = c.loss.match_g = 0.0
    if has("adaptive"):
        g.bank = (1, 1, 2, 4, 8)
    if has("deeper"):
        g.blocks, d.blocks = (3, 3, 3, 2, 2), (1, 2, 2, 2, 2)
    c.text.encoder, c.text.path = "clip", "openai/clip-vit-large-patch14"
    if has("clip"):
        c.loss.clip = (0.2, 1.0)
    if has("vision"):
        c.vision_aided.path, c.loss.vision_aided = "openai/clip-vit-base-patch32", 1.0
    if not has("multiscale"):
        g.pyramid = d.multi_scale_input = d.multi_scale_output = False
    return c
