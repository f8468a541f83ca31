"""Streams of batches of one host, and of several simulated ones."""

from gigagan_jax.data import pipeline
from gigagan_jax.data.tokenizers import ByteTokenizer


def open_stream(source, batch_size=8, hosts=1, host=0, seed=0, **options):
    options = {"num_threads": 0, "crop": "random", "flip": True, "caption_dropout": 0.2} | options
    return pipeline.build_pipeline(
        source, resolution=8, batch_size=batch_size, seed=seed, tokenizer=ByteTokenizer(40), process_index=host,
        process_count=hosts, **options,
    )  # fmt: skip


def all_hosts(source, hosts, batches, state=None, accept=False, **options):
    """(indices that each host reads, state after `batches` global batches)"""
    seen, states = [], []
    for host in range(hosts):
        with open_stream(source, hosts=hosts, host=host, **options) as data:
            if state is not None:
                data.restore(state, accept_data=accept)
            seen.append([int(i) for _ in range(batches) for i in next(data)["index"]])
            states.append(data.state())
    # The position is global: every host's checkpoint would hold the same.
    positions = {s["examples_seen"] for s in states}
    assert len(positions) == 1
    return seen, states[0]
