"""Settings of how a run is carried out: losses, optimizers, the mesh, what is kept, what is drawn.

Strings that name mesh axes join several with a comma; an empty string means "replicated".
"""

import dataclasses

# Logical axis -> mesh axes (docs/meshes.md). Parameters: conv_in, conv_out, embed, mlp, heads, style, vocab, bank, kernel,
# layers, rgb. Activations at block borders: batch, channels, height. `optimizer` is no dimension: by it moments and averages
# are cut further than their parameter.
DEFAULT_RULES = {
    # In this order: with "data,fsdp", or "fsdp,data,slice", on a mesh with tensor > 1 XLA's partitioner (jaxlib 0.10.2) permutes
    # the examples between devices in a backward product and does not bring them back; sharding.check_batch refuses them, and
    # tests/training/test_sharding_parity.py shows it.
    "batch": "fsdp,slice,data",
    "channels": "",
    "height": "",
    "conv_in": "fsdp",
    "conv_out": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "style": "fsdp",
    "vocab": "",
    "bank": "",
    "kernel": "",
    "layers": "",
    "rgb": "",
    "optimizer": "data",
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what the others leave. `--config.mesh.fsdp=8`."""

    data: int = -1  # copies of the model within a slice: the batch is split over it
    fsdp: int = 1  # parameters and batch are split over it
    tensor: int = 1  # output channels, heads and feed-forward are split over it
    slices: int = 1  # copies of all that, one a slice: between them only gradients cross the data-centre network
    shard_optimizer: bool = True  # cut moments and averages by rules.optimizer too, where parameters are copies


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints are kept; each of these rules keeps its own, besides the others'."""

    keep: int = 3  # newest
    keep_every_kimg: float = 0.0  # for ever: the first after each multiple of so many thousand images; 0 keeps none
    keep_best: int = 0  # so many with the best `best_metric`
    best_metric: str = ""  # a name of metrics.jsonl, as it stands at the step that is saved
    best_mode: str = "min"  # or "max"
    wait: bool = (
        False  # training waits for each save; otherwise a kill during one repeats the steps made meanwhile, too
    )
    timeout_seconds: int = 3600  # a save that takes longer has failed
    full_disk_seconds: float = 600.0  # training waits so long for space on a full disk before a save fails


@dataclasses.dataclass(frozen=True)
class SnapshotConfig:
    """The grid of fixed prompts and seeds that is drawn during training."""

    # one row each; names or numbers of classes for a class-conditional model; (): captions, or the first classes, of the data
    prompts: tuple[str, ...] = (
        "a photo of a cat",
        "a red house by the sea",
        "an oil painting of a ship",
        "a bowl of fruit",
    )
    preferred_classes: tuple[str, ...] = ()  # drawn without `prompts`, where the data has them all; else as many others
    seeds: int = 8  # columns: seeds 0, 1, ...
    truncations: tuple[float, ...] = (1.0, 0.7)  # towards the mean of the prompt; one grid each


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """What is done when a GAN goes wrong (docs/health.md). Non-finite values never reach the parameters, whatever is set here.

    Policies: "off" (not looked at), "warn", "rollback" (to the last good checkpoint); of `nonfinite` "warn", "skip", "rollback".
    """

    nonfinite: str = "rollback"  # after `max_skips` steps in a row; "skip": stop then; "warn": go on for ever
    saturation: str = "warn"  # D or V is sure of everything
    evasion: str = "warn"  # D's exits pay for each other in R1
    drift: str = "warn"  # gradients that grow without end
    penalty: str = "warn"  # R1 far above its usual size
    collapse: str = "warn"  # images that are too much alike
    levels: str = "warn"  # a level of the pyramid, or an exit of D, that does nothing
    updates: str = "warn"  # updates that vanish or explode
    memory: str = "warn"  # memory of the host that grows without end; "off" or "warn": a rollback frees none
    max_skips: int = 10  # steps in a row that may be left out
    max_rollbacks: int = 3  # in a run; after them it stops
    rollback_lr: float = 0.5  # factor of all learning rates with each rollback
    grace: int = 1000  # steps from the start in which only non-finite values are looked for
    window: int = 100  # steps of the running means that are judged
    patience: int = 500  # steps in a row that a mean must be beyond its limit
    max_gap: float = 0.98  # mean of sigmoid(D) on real images minus that on generated ones, 0 to 1
    max_penalty: float = 20.0  # R1 over the median of its last 32 values
    min_cosine: float = -0.5  # between the gradients of D's last exit and of the others, by the real images of a level
    max_drift: float = 10.0  # gradient norm of a network over the lowest level that it kept since the grace
    min_diversity: float = 0.2  # deviation over a batch of generated images, of that of real ones
    min_diversity_z: float = 0.05  # the same between two images of one caption
    min_level: float = 0.005  # share of a pyramid level in the sizes of what all levels add
    min_exit: float = 1e-3  # deviation of an exit's logits over images
    min_update: float = 0.01  # root mean square of an update at learning rate 1 (Adam's: about 1)
    max_update: float = 0.1  # change of a network's parameters in a step, of their norm


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses (sec. 3.3, A2)."""

    level_weights: tuple[float, ...] = ()  # high to low; () is (2, 1, 1, ...) / sum (A2)
    intermediate_gan: float = 0.01  # (A2) weight of every exit before the last, GAN loss
    intermediate_match: float = 0.05  # (A2) the same, matching-aware loss
    match_d: float = 1.0  # (A2)
    match_g: float = 1.0  # (A2)
    # "logistic": eq. 8, of one wrong caption; "contrastive": of all captions of the group, for discriminator.head="projection"
    match_d_form: str = "logistic"
    # (open) "min_max", "non_saturating", "cooperating" (training/losses.py: MATCH_G), "contrastive" or "off"
    match_g_form: str = "min_max"
    match_relativistic: bool = False  # a real image's wrong caption is compared with its own one
    pairing: str = "separate"  # "relativistic": D compares a generated image with a real one of its caption (R3GAN)
    centring: float = 0.0  # of (D(x) + D(G))^2 in D's loss; 0 is off
    mismatch_group: int = 16  # (open) neighbours in the batch among which wrong captions are drawn; 0: the whole batch
    pixel: float = 0.0  # of upsamplers: mean absolute difference to the real image, over all levels of the pyramid
    perceptual: float = 0.0  # (A2: 10; 100 without text) of upsamplers: LPIPS, see `config.perceptual`
    clip: tuple[float, float] = (0.0, 0.0)  # (A2: 0.2 to 1.0) contrastive loss, first and last; linear in images
    vision_aided: float = 0.0  # (open) of the vision-aided discriminator in G's loss; 0 is off
    vision_r1_gamma: float = (
        0.2048  # (open) R1 of that discriminator by its projected features, as lazy as D's; 0 is off
    )
    vision_smoothing: float = 0.0  # (open) one-sided label smoothing of its loss, 0 to 0.5
    r1_gamma: tuple[float, float] = (0.2048, 2.048)  # (A2) first and last; linear in images
    r1_interval: int = 16  # (A2) steps
    r1_levels: str = "all"  # (open) "all": gradient by the real image of every level; "full": of the output size only
    # (open) "signs": exits and levels by their weights in the loss, each exit with a random sign (training/penalties.py);
    # "sum": of their plain sum, which D evades
    r1_exits: str = "signs"
    r1_form: str = "gradient"  # "finite_differences": without a second derivative, for r1_interval=1
    r1_sigma: float = 0.01  # deviation of the noise of finite differences
    r2: bool = False  # the same penalty by generated images (R3GAN)
    ramp_kimg: float = 0.0  # thousands of images over which weights go from first to last; 0: the whole run
    mask_same_labels: bool = False  # captions of one class label say the same: none is a wrong one of another
    mask_null_captions: bool = True  # the null caption is no wrong one, nor part of the contrastive loss and the mean w


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of one network (A2)."""

    learning_rate: float = 0.0025  # (A2)
    beta1: float = 0.0  # (A2)
    beta2: float = 0.99  # (A2)
    epsilon: float = 1e-8  # (A2)
    weight_decay: float = 1e-5  # (A2)
    attention_weight_decay: float = 0.01  # (A2)
    warmup_kimg: float = 0.0  # linear
    decay_kimg: float = 0.0  # cosine to `final_ratio` over this many kimg before the end; 0 is constant
    final_ratio: float = 0.0  # share of the learning rate that is left at the end of `decay_kimg`


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """Moving average of G, as a half-life in thousands of images."""

    half_life_kimg: float = 7100.0  # (A2) beta 0.9999 at batch 1024
    rampup: float = 0.05  # half-life is at most this share of the images seen; 0 is off
