"""Settings of how a run is carried out: on which mesh, what is kept, what is drawn."""

import dataclasses

# Logical axis -> mesh axes (docs/meshes.md). Parameters: conv_in, conv_out, embed, mlp, heads, style, vocab, bank, kernel,
# layers, rgb. Activations at block borders: batch, channels. `optimizer` is no dimension: by it moments and averages are cut
# further than their parameter.
DEFAULT_RULES = {
    # In this order: with "data,fsdp", or "fsdp,data,slice", on a mesh with tensor > 1 XLA's partitioner (jaxlib 0.10.2) permutes
    # the examples between devices in a backward product and does not bring them back; sharding.check_batch refuses them, and
    # tests/training/test_sharding_parity.py shows it.
    "batch": "fsdp,slice,data",
    "channels": "",
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
    """Which checkpoints are kept."""

    keep: int = 3  # newest


@dataclasses.dataclass(frozen=True)
class SnapshotConfig:
    """The grid of fixed prompts and seeds that is drawn during training."""

    prompts: tuple[str, ...] = (  # one row each; class numbers for a class-conditional model
        "a photo of a cat",
        "a red house by the sea",
        "an oil painting of a ship",
        "a bowl of fruit",
    )
    seeds: int = 8  # columns: seeds 0, 1, ...
    truncations: tuple[float, ...] = (1.0, 0.7)  # one grid each
