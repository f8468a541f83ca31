"""Emoji from captions: 64 concepts in seven drawing styles, 32 px, on a laptop. Real pictures; a tenth of the cells held out.

    python -m gigagan_jax.train --config=configs/emoji.py --workdir=runs/emoji --config.data.path=data/emoji/train

`tools/prepare_data.py emoji` makes the data from npm packages (docs/emoji.md). It ends by judging four pictures of each cell: a
concept in a style. `:all` has every concept that the seven sets share, at 64 px, for one GPU.
"""

from ml_collections import ConfigDict

from configs import shapes


def get_config(arg: str = "") -> ConfigDict:
    """`:all`; `:tiny` is for tests: the same parts, a few steps."""
    if arg not in ("", "all", "tiny"):
        raise ValueError(f"configs/emoji.py has no variant {arg!r}; known: all, tiny")
    resolution = 64 if arg == "all" else 32
    c = shapes.small_model(resolution, channels=96, channel_base=768, w_dim=96, text=48, kimg=200.0)
    c.name = "emoji" + (f"-{arg}" if arg else "")
    c.evaluators = ("emoji",)
    c.data.source = "tar"
    c.text.length = 24
    c.loss.r1_gamma = (0.05, 0.05)
    c.snapshot.prompts = (
        "a violin, flat style",
        "a penguin, twitter style",
        "a rainbow, openmoji style",
        "an octopus, noto style",
        "a red apple, glossy style",
        "a rocket, emojione style",
    )
    if arg == "all":
        shapes.for_one_gpu(c, text=192, depth=3, kimg=6000.0)
        c.generator.attention_depth = (0, 1, 1, 0, 0)
    elif arg == "tiny":
        shapes.for_tests(c)
    return c
