"""Tables that grow by whole rows, and boards."""

import json

import pytest
from pretraining_cases import Stopped, run, small_recipe, stop_after

from mto_analysis.errors import DataError, OutputError
from mto_analysis.rauc.logs import read_log
from mto_analysis.training import RunSettings
from mto_analysis.training.metrics import Averages, Table

COLUMNS = ["step", "loss", "score"]


def table_of(path, steps=3):
    table = Table(path, "step")
    for step in range(1, steps + 1):
        table.append({"step": step, "loss": 1 / step}, COLUMNS)
    return table


def test_table__keeps_every_digit(tmp_path):
    table_of(tmp_path / "m.csv")
    lines = (tmp_path / "m.csv").read_text().splitlines()
    assert lines[0] == "step,loss,score"
    assert lines[3] == f"3,{1 / 3!r},"


@pytest.mark.parametrize("tail", ["4,0.2", "4,0.2,", "4", "\0\0\0"])
def test_cut_back__drops_late_rows_and_a_cut_line(tmp_path, tail):
    table_of(tmp_path / "m.csv")
    with (tmp_path / "m.csv").open("a") as file:
        file.write(tail)
    again = Table(tmp_path / "m.csv", "step")
    again.cut_back(2)
    again.append({"step": 3, "loss": 0.5}, ["other"])
    assert (tmp_path / "m.csv").read_text() == "step,loss,score\n1,1.0,\n2,0.5,\n3,0.5,\n"


def test_cut_back__of_a_cut_header_begins_again(tmp_path):
    (tmp_path / "m.csv").write_text("step,lo")
    table = Table(tmp_path / "m.csv", "step")
    table.cut_back(5)
    table.append({"step": 1}, COLUMNS)
    assert (tmp_path / "m.csv").read_text() == "step,loss,score\n1,,\n"


def test_cut_back__refuses_another_table(tmp_path):
    (tmp_path / "m.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no column 'step'"):
        Table(tmp_path / "m.csv", "step").cut_back(1)


def test_append__says_where_it_failed(tmp_path):
    with pytest.raises(OutputError, match=r"m.csv cannot be written \(No such file"):
        Table(tmp_path / "gone" / "m.csv", "step").append({"step": 1}, COLUMNS)


def test_averages__go_on_from_their_state():
    one = Averages()
    for value in (0.1, 0.2, 0.4):
        one.add({"a": value, "b": -value})
    other = Averages()
    other.add({"a": 0.1, "b": -0.1})
    state = json.loads(json.dumps(other.state()))
    again = Averages()
    again.load(state)
    again.add({"a": 0.2, "b": -0.2})
    again.add({"a": 0.4, "b": -0.4})
    assert again.means() == one.means()


def test_tensorboard__gets_the_rows_and_goes_on(tmp_path):
    pytest.importorskip("tensorboard")
    settings = RunSettings(device="cpu", log_every=2, tensorboard=True)
    with pytest.raises(Stopped):
        run(tmp_path / "run", settings=settings, on_step=stop_after(6), evaluate=lambda model: 12.5)
    run(tmp_path / "run", settings=settings, resume=True, evaluate=lambda model: 12.5)
    log = read_log(tmp_path / "run" / "tensorboard", score_column="epoch/score")
    assert set(log.rows["score"]) == {12.5}
    assert sorted(set(log.rows["epoch"])) == [4, 8]


def test_wandb__offline_run_goes_on_under_its_name(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = RunSettings(device="cpu", log_every=2, wandb="masked-tokens")
    with pytest.raises(Stopped):
        run(tmp_path / "run", small_recipe(), settings, on_step=stop_after(6))
    identity = (tmp_path / "run" / "wandb-id.txt").read_text()
    run(tmp_path / "run", small_recipe(), settings, resume=True)
    assert (tmp_path / "run" / "wandb-id.txt").read_text() == identity
    assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity.strip()}"))
