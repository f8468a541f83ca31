"""Settings of how a run is carried out: on which mesh, what is kept, what is drawn."""

import dataclasses

# Logical axis -> mesh axes. Parameters: conv_in, conv_out, embed, mlp, heads, style, vocab, bank, kernel, layers, rgb.
# Activations at block borders: batch, channels.
DEFAULT_RULES = {
    # In this order: with "data,fsdp" on a mesh of three axes XLA's partitioner (jaxlib 0.10.2) permutes the examples between
    # devices in a backward product and does not bring them back; tests/training/test_sharding_parity.py shows it.
    "batch": "fsdp,data",
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
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what the others leave. `--config.mesh.fsdp=8`."""

    data: int = -1  # copies of the model: the batch is split over it
    fsdp: int = 1  # parameters and batch are split over it
    tensor: int = 1  # output channels, heads and feed-forward are split over it


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
