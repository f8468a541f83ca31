"""`condition="none"` on any config: what asks for captions or classes is switched off, in this one place.

Only what cannot work is changed: a stored config of an earlier run, which worked, stays what it is. Of the rest the networks
and losses take no notice without a condition: text encoder, cross-attention, matching-aware loss, class embedding.
"""

import dataclasses
from typing import Any


def without_condition(config: Any) -> Any:
    """The config with `condition="none"` made valid; any other config is returned as it is. A second call changes nothing.

    Off are the contrastive loss of CLIP, the contrastive form of the matching-aware loss, the projection head, evaluators that
    ask by captions, and the prompts of snapshots. The vision-aided discriminator stays: it needs no caption.
    """
    if config.condition != "none":
        return config
    d = config.discriminator
    if d.head == "projection":
        # Heads of 256 features on a small network would be most of its work.
        d = dataclasses.replace(d, head="modulated", head_width=min(d.head_width, d.channel_max))
    form = config.loss.match_g_form
    loss = dataclasses.replace(
        config.loss,
        clip=(0.0, 0.0),
        match_d_form="logistic",
        match_g_form="min_max" if form == "contrastive" else form,
    )
    # One prompt without text: a grid of seeds.
    snapshot = dataclasses.replace(config.snapshot, prompts=("",))
    # Of an upsampler they are refused, whatever its condition.
    evaluators = config.evaluators if config.is_upsampler else ()
    return dataclasses.replace(config, discriminator=d, loss=loss, snapshot=snapshot, evaluators=evaluators)


def switched_off(config: Any) -> list[str]:
    """What a config asks for and `condition="none"` does without, in words; empty for other conditions.

    Args:
      config: as it was before `without_condition`.
    """
    if config.condition != "none":
        return []
    loss, d = config.loss, config.discriminator
    matching = loss.match_d > 0 or loss.match_g > 0
    parts = {
        f"the text encoder ({config.text.encoder}) and cross-attention": matching or not config.text.is_trained,
        "the class embedding": config.num_classes > 0 or d.class_mapping_depth > 0,
        "the matching-aware loss": matching,
        "the contrastive loss of CLIP": config.uses_clip_loss,
        "the projection head (in its place: a head without a condition)": d.head == "projection",
        f"the evaluators {', '.join(config.evaluators)}": bool(config.evaluators),
    }
    return [name for name, is_asked in parts.items() if is_asked]
