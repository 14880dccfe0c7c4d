"""The table of docs/published.md against the models that the published settings build."""

import pytest

from benchmarks.parameters import ESTIMATES, composed, counted
from tests import mini

DOCS = (mini.CONF.parent / "docs" / "published.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(ESTIMATES))
def test_the_documented_parameters_are_those_of_the_configs(name):
    column = 1 + list(ESTIMATES).index(name)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCS.splitlines() if line.count("|") == 6]
    documented = {row[0]: row[column] for row in table if row[column]}
    counts = counted(composed(ESTIMATES[name][0]))
    assert documented.pop("million parameters") == name and documented.pop("---") == "---:"
    assert float(documented.pop("published estimate")) == ESTIMATES[name][1]
    assert documented.pop("all, frozen ones included") == f"{counts[-1]['total'] / 1e6:,.0f}"
    trained = {row["part"]: f"{row['trainable'] / 1e6:.1f}" for row in counts if row["trainable"]}
    assert documented.pop("trained") == trained.pop("total")
    assert documented == trained
