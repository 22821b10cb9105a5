import csv
import io

import pandas as pd
import pytest

from mto_analysis.figures.paper.tables import TABLE_NAMES, paper_table, printed
from mto_analysis.runtime.render import render


def test_paper_table__2_shows_computed_beside_printed_and_the_reference_needed():
    frame = paper_table("2").frame
    assert frame["printed RAUC"].tolist() == ["1.20", "1.23", "1.22", "1.20"]
    assert frame["recomputed"].tolist() == ["2.36", "2.09", "", "2.09"]
    assert frame["reference needed"].tolist() == ["56.35", "45.22", "", "16.70"]
    assert "63.8" in frame["note"][2]


def test_paper_table__1_has_the_windows_as_columns():
    frame = paper_table("1").frame
    assert frame.set_index("S1").loc["SimMIM", ["(100, 400)", "(200, 400)"]].tolist() == ["1.47", "1.44"]
    assert set(frame["recomputed"]) == {"not possible"}
    assert frame["note"].ne("").tolist() == [False, True, False, False]


def test_paper_table__supplementary_1_and_2_name_what_the_text_does_not():
    one, two = paper_table("supp1").frame, paper_table("supp2").frame
    assert one["recomputed"].tolist() == ["", "-3.4", "+0.9", "", "+0.3", "+1.2", "", "-0.7", "+0.4"]
    assert one["note"].ne("").sum() == 2
    assert two.loc[two["note"] != "", "recomputed"].tolist() == ["+0.3 / -0.1", "+0.6 / +0.0"]


def test_paper_table__settings_show_only_their_own():
    assert len(paper_table("supp3").frame) == 14
    assert "multi-step" in paper_table("supp3").frame.set_index("setting").loc["schedule", "note"]
    assert paper_table("supp6").frame.set_index("setting").loc["finetune_min_lr", "value"] == "1e-6"


@pytest.mark.parametrize("name", TABLE_NAMES)
@pytest.mark.parametrize("kind", ["text", "csv", "markdown", "latex"])
def test_paper_table__renders_in_every_form(name, kind):
    table = paper_table(name)
    text = render(table.frame, kind, title=table.title, notes=table.notes)
    assert {"recomputed", "note"} <= set(table.frame.columns)
    for cell in table.frame.iloc[0]:
        assert str(cell).replace("%", r"\%") in text or kind == "latex"
    if kind == "csv":
        rows = list(csv.reader(io.StringIO(text)))
        assert [len(row) for row in rows] == [len(table.frame.columns)] * (len(table.frame) + 1)


def test_paper_table__knows_other_spellings_and_refuses_unknown_ones():
    assert paper_table("table2").name == paper_table("Table 2").name == "2"
    assert paper_table("supplementary table 1").name == "supp1"
    with pytest.raises(ValueError, match="table must be one of 1, 2, 3"):
        paper_table("7")


def test_printed__keeps_cells_as_printed():
    assert printed("table1_rauc")["rauc"].tolist()[0] == "1.47"


def test_render__escapes_what_a_form_reserves():
    frame = pd.DataFrame({"a_b": ["50 % & more", "x|y"]})
    assert r"a\_b" in render(frame, "latex")
    assert r"50 \% \& more" in render(frame, "latex")
    assert r"x\|y" in render(frame, "markdown")
    with pytest.raises(ValueError, match="kind must be"):
        render(frame, "html")
