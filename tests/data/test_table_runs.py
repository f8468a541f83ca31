"""Every row of Arrow files and of data sets of the hub comes once an epoch, on any number of hosts; bad rows are replaced."""

import collections
import json
import pickle
import warnings

import numpy as np
import pyarrow as pa
import pytest

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.sources.arrow import ArrowSource
from gigagan_jax.data.sources.hub import HubSource
from tests.arrow_files import make_table, save_dict, save_split, write_arrow
from tests.data.streams import all_hosts, open_stream
from tests.parquet_files import write_table


@pytest.fixture(scope="module", params=["arrow", "hub", "part of hub"])
def source(request, tmp_path_factory):
    """24 rows, in two files."""
    folder = tmp_path_factory.mktemp("rows")
    if request.param == "arrow":
        return ArrowSource(str(save_dict(folder, train=[range(10), range(10, 24)], test=[range(3)])))
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        # The package warns when it is imported.
        warnings.simplefilter("ignore")
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        datasets.disable_progress_bars()
        for name, rows in (("train-0", range(10)), ("train-1", range(10, 30)), ("test-0", range(4))):
            table = make_table(rows)
            write_table(folder / "clone" / f"{name}.parquet", {c: table.column(c) for c in table.column_names})
        split = "test+train[4:24]" if request.param == "part of hub" else "train[:24]"
        return HubSource(str(folder / "clone"), split=split)


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("then", [1, 2, 4])
def test_an_epoch_is_the_data_set_across_a_resume_on_other_hosts(source, first, then):
    stop = int(np.random.default_rng((first, then)).integers(1, 5))
    before, state = all_hosts(source, first, stop, batch_size=4)
    # As a worker process and the next start have it.
    again = pickle.loads(pickle.dumps(source))
    assert again.identity() == source.identity()
    rest, _ = all_hosts(again, then, (24 - 4 * stop) // 4, state, batch_size=4)
    assert collections.Counter(i for host in [*before, *rest] for i in host) == dict.fromkeys(range(24), 1)
    for shares in (before, rest):
        assert len({i for host in shares for i in host}) == sum(map(len, shares))


@pytest.mark.slow
def test_worker_processes_read_the_same(tmp_path):
    folder = save_split(tmp_path / "x", [range(8)], _indices_files=[{"filename": "i.arrow"}])
    write_arrow(folder / "i.arrow", pa.table({"indices": [7, 3, 1, 0]}))
    source = ArrowSource(str(folder))
    with open_stream(source, batch_size=2) as data:
        expected = [next(data) for _ in range(2)]
    with open_stream(source, batch_size=2, num_workers=1) as data:
        for batch in expected:
            np.testing.assert_array_equal(next(data)["image"], batch["image"])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_bad_rows_are_replaced_and_noted(tmp_path, hosts):
    table = make_table(range(24))
    images = table.column("image").to_pylist()
    images[5], images[9]["bytes"], images[9]["path"], images[20]["bytes"] = None, None, "gone.png", b"x"
    texts = ["" if i == 12 else t for i, t in enumerate(table.column("text").to_pylist())]
    table = table.set_column(0, "image", pa.array(images)).set_column(1, "text", pa.array(texts))
    source = ArrowSource(write_arrow(tmp_path / "a.arrow", table, batch=5))
    bad = {5: "image_missing", 9: "image_unreadable", 12: "caption_empty", 20: "image_undecodable"}
    seen = []
    for host in range(hosts):
        notes = tmp_path / f"{host}.jsonl"
        with open_stream(source, 4, hosts, host, max_bad_fraction=0.5, quarantine_path=notes) as data:
            seen += [int(i) for _ in range(6) for i in next(data)["index"]]
    # The next good row in the order of the files.
    good = {i: next(j % 24 for j in range(i, i + 24) if j % 24 not in bad) for i in range(24)}
    assert collections.Counter(seen) == collections.Counter(good.values())
    # A host without a bad row writes no file.
    lines = [json.loads(line) for file in tmp_path.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert {line["name"]: line["cause"] for line in lines} == {f"a.arrow:{i}": cause for i, cause in bad.items()}


def test_too_many_bad_rows_end_the_run_in_one_line(tmp_path):
    table = make_table(range(8)).set_column(0, "image", pa.array([b"x"] * 8))
    with (
        open_stream(ArrowSource(write_arrow(tmp_path / "a.arrow", table)), 4) as data,
        pytest.raises(UserError, match=r"all 8 are bad .8 image_undecodable.*a.arrow:") as refused,
    ):
        next(data)
    assert "\n" not in str(refused.value)
