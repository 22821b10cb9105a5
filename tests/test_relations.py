"""Rank correlations of measures with accuracy: closed forms, joining, what may be concluded, and simulated data."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

from mto_analysis.errors import DataError, DataNotFoundError
from mto_analysis.figures.plots.relations import draw_relations
from mto_analysis.rauc.relations import (
    FEWEST_METHODS,
    _given,
    _mean_over_runs,
    holm,
    over_seeds,
    partial_rank_correlation,
    rank_correlation,
    read_measures,
    read_scores,
    relate,
)
from mto_analyze import app


def rng(seed=0):
    return np.random.default_rng(seed)


def tidy(checkpoints, values, measure="heterogeneity"):
    """Rows of a table of measures, of depths 0 and 1; the value is that of depth 1."""
    return pd.DataFrame(
        [
            {**dict(zip(("method", "seed", "epoch"), key, strict=True)), "stack": "encoder", "layer_depth": depth,
             "measure": measure, "value": value * depth + (1 - depth)}
            for key, value in zip(checkpoints, values, strict=True)
            for depth in (0, 1)
        ]
    )  # fmt: skip


def scored(checkpoints, scores):
    return pd.DataFrame(checkpoints, columns=["method", "seed", "epoch"]).assign(score=scores)


def methods(count):
    return [(f"m{number}", "", math.nan) for number in range(count)]


# ---- statistics


def test_rank_correlation__is_spearmans_with_exact_p_of_few():
    x, y = rng().normal(size=(2, 15))
    found = rank_correlation(x, y)
    assert (found.value, found.p) == pytest.approx(tuple(spearmanr(x, y)))
    assert found.low < found.value < found.high
    assert rank_correlation([1, 2, 2, 4, 9], [1, 1, 3, 4, 4]).value == pytest.approx(
        spearmanr([1, 2, 2, 4, 9], [1, 1, 3, 4, 4])[0]
    )
    few, order = np.arange(5.0), np.array([0, 2, 1, 4, 3])
    every = [abs(spearmanr(few, np.array(each))[0]) for each in itertools.permutations(range(5))]
    exact = rank_correlation(few, order)
    assert exact.p == pytest.approx(np.mean(np.array(every) >= exact.value - 1e-9))
    assert math.isnan(rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]).value)
    with pytest.raises(ValueError, match="finite"):
        rank_correlation([1, math.nan, 3], [1, 2, 3])


def test_partial_rank_correlation__agrees_with_the_formula_of_one_other():
    z = rng().normal(size=30)
    x, y = z + rng(1).normal(size=30), z + rng(2).normal(size=30)
    r = spearmanr(np.column_stack([x, y, z])).statistic
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / math.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    found = partial_rank_correlation(x, y, z[:, None])
    assert found.value == pytest.approx(expected)
    assert abs(found.value) < abs(r[0, 1])
    wider = rank_correlation(x, y)
    assert found.high - found.low > 0.9 * (wider.high - wider.low)
    assert math.isnan(partial_rank_correlation(x, y, rng(3).normal(size=(30, 29))).value)


def test_holm__is_the_sequential_correction():
    assert holm([0.001, 0.03, math.nan, 0.02]).tolist()[::3] == pytest.approx([0.003, 0.04])
    assert holm([0.5, 0.9]).tolist() == [1, 1]
    assert np.isnan(holm([math.nan])).all()


# ---- reading and joining


def write(path, table):
    table.to_csv(path, index=False)
    return str(path)


def test_reading__three_kinds_of_tables_and_labels_of_seeds(tmp_path):
    labels = ["MAE@0", "MAE@1", "SimMIM, seed 0, epoch 2"]
    rows = [
        {"model": label, "stack": "encoder", "layer_depth": depth, "measure": name, "value": 1.0 + depth, "head": head,
         "other_model": other, "other_layer_depth": pair}
        for label in labels
        for depth in (0, 1, 2)
        for name, head, other, pair in (
            ("heterogeneity", None, None, None), ("normalized_heterogeneity", None, None, None),
            ("attention_distance_masked", None, None, None), ("attention_distance_masked", 1, None, None),
            ("cka_visible", None, None, 2), ("cka_visible", None, None, 1), ("cka_masked", None, "MAE@1", 2),
        )
    ]  # fmt: skip
    found = read_measures([write(tmp_path / "measures.csv", pd.DataFrame(rows))])
    assert len(found) == 3 * 3 * 3
    atlas = pd.DataFrame([row for row in rows if row["other_model"] is None])
    atlas = atlas.rename(columns={"model": "checkpoint"}).drop(columns="other_model")
    assert read_measures([write(tmp_path / "atlas.csv", atlas)]).equals(found)
    assert set(found["measure"]) == {"heterogeneity", "attention_distance_masked", "cka_visible"}
    assert found.drop_duplicates(["method", "seed"])[["method", "seed"]].to_numpy().tolist() == [
        ["MAE", "0"], ["MAE", "1"], ["SimMIM", "0"],
    ]  # fmt: skip
    assert found.groupby("method")["epoch"].max().fillna(-1).to_dict() == {"MAE": -1, "SimMIM": 2}
    runs = pd.DataFrame(
        [("A", 0, 1.0, None, 0, 2.0), ("A", 0, 2.0, None, 0, 1.5)],
        columns=["method", "seed", "epoch", "stack", "layer_depth", "heterogeneity"],
    )
    path = write(tmp_path / "runs.csv", runs)
    assert read_measures([path])["value"].tolist() == [2.0, 1.5]
    with pytest.raises(DataError, match=r"^A, seed 0, epoch 1: .* twice; name the tables with NAME=FILE"):
        read_measures([path, path])
    once = write(tmp_path / "once.csv", runs.drop(columns=["seed", "epoch"])[:1])
    with pytest.raises(DataError, match=r"^A: "):
        read_measures([once, once])
    assert read_measures([f"x={path}", f"y={path}"])["method"].tolist()[::2] == ["x: A", "y: A"]
    scores = read_scores([write(tmp_path / "scores.csv", pd.DataFrame({"model": labels, "accuracy": [1, 2, 3]}))])
    assert scores["seed"].tolist() == ["0", "1", "0"]
    curve = pd.DataFrame({"method": "A", "seed": 0, "epoch": [1, 2], "score": [40.0, 50.0]})
    joined = relate(read_measures([path]), read_scores([write(tmp_path / "curves.csv", curve)])).checkpoints
    assert len(joined) == 2 * 3
    for wrong, words in (("model,x\nA,1\n", "no column score or accuracy"), ("stack,score\ne,1\n", "neither a column")):
        (tmp_path / "wrong.csv").write_text(wrong)
        with pytest.raises(DataError, match=words):
            read_scores([str(tmp_path / "wrong.csv")])
    with pytest.raises(DataError, match="neither measure and value nor heterogeneity"):
        read_measures([write(tmp_path / "none.csv", runs.drop(columns="heterogeneity"))])
    with pytest.raises(DataNotFoundError, match="no table at"):
        read_measures(["nothing.csv"])


def test_joining__says_what_is_left_out_and_averages_seeds():
    keys = [(f"m{number}", str(seed), math.nan) for number in range(12) for seed in range(3)]
    values = [number + [-0.5, 0, 0.5][seed] for number in range(12) for seed in range(3)]
    found = relate(tidy(keys, values), scored(methods(13), range(13)), layers=["last"])
    across = found.table[found.table["level"] == "across methods"].iloc[0]
    assert (across["rho"], across["number"], across["verdict"]) == (1, 12, "rises with accuracy")
    assert "averaged over theirs" in found.notes[0]
    assert found.notes[1].startswith("1 of 13 checkpoints have a score but no measures")
    row = found.seeds[(found.seeds["method"] == "m3") & (found.seeds["layer_depth"] == 1)].iloc[0]
    assert (row["value"], row["num_seeds"]) == (3, 3)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(
        (3 - 4.3027 * 0.5 / 3**0.5, 3 + 4.3027 * 0.5 / 3**0.5), rel=1e-4
    )
    assert len(over_seeds(tidy(methods(3), range(3)))) == 6
    with pytest.raises(DataError, match="no checkpoint has both"):
        relate(tidy([("a", "", math.nan)], [1]), scored([("b", "", math.nan)], [1]))
    with pytest.raises(ValueError, match="layers are first, last, mean or numbers"):
        relate(tidy(methods(3), range(3)), scored(methods(3), range(3)), layers=["middle"])
    with pytest.raises(ValueError, match="measures are heterogeneity; got cosine"):
        relate(tidy(methods(3), range(3)), scored(methods(3), range(3)), given=["cosine"])


def test_reading_scores__of_one_kind_and_unit_only(tmp_path):
    share = write(tmp_path / "share.csv", pd.DataFrame({"model": ["a", "b"], "score": [0.8, 0.7]}))
    percent = write(tmp_path / "percent.csv", pd.DataFrame({"model": ["c", "d"], "score": [60, 75]}))
    with pytest.raises(DataError, match=r"share\.csv has scores from 0 to 1 and .*percent\.csv has others"):
        read_scores([share, percent])
    curves = [
        write(tmp_path / f"{name}.csv", pd.DataFrame({"method": name, "epoch": [1, 2], name: [40.0, 50.0]}))
        for name in ("val_acc1", "test_acc1")
    ]
    with pytest.raises(DataError, match=r"scores of different kinds: .*val"):
        read_scores(curves)
    said: list[str] = []
    assert read_scores(curves[:1], say=said.append)["seed"].tolist() == ["", ""]  # not the file's name
    odd = write(tmp_path / "odd.csv", pd.DataFrame({"model": "a", "stack": "", "layer_depth": 0, "heterogeneity": 1.0,
                                                    "epoch": ["10", "last"]}))  # fmt: skip
    with pytest.raises(DataError, match="the epoch 'last' is no number"):
        read_measures([odd])
    numbered = pd.DataFrame({"checkpoint": [400, 500], "stack": "", "layer_depth": 0, "heterogeneity": [1.0, 2.0]})
    assert read_measures([write(tmp_path / "numbered.csv", numbered)])["method"].tolist() == ["400", "500"]


def test_reading__takes_names_and_numbers_as_they_are(tmp_path):
    names = ["None", "NA", "null", "a"]
    table = pd.DataFrame({"model": names, "stack": "", "layer_depth": 0, "heterogeneity": [1.0, 2.0, 3.0, 4.0]})
    assert read_measures([write(tmp_path / "h.csv", table)])["method"].tolist() == names
    scores = write(tmp_path / "s.csv", pd.DataFrame({"model": names, "seed": [0.0, 1.0, None, 2.0], "score": 50.0}))
    assert read_scores([scores])["seed"].tolist() == ["0", "1", "", "2"]
    with pytest.raises(DataError, match=r"line 3: score must be a number, got '67\.8%'"):
        read_scores([write(tmp_path / "odd.csv", table.assign(score=["52", "67.8%", "51", "NA"]))])
    said: list[str] = []
    mixed = write(tmp_path / "mixed.csv", table.assign(score=[52, 0.52, 51, None], seed=["0", "NA", "0", "0"]))
    assert read_scores([mixed], say=said.append)["seed"].tolist() == ["0", "", "0"]
    assert said == [f"{mixed}: scores below 1 (1) are beside others of up to 52: two units?"]
    with pytest.raises(DataError, match="line 3: model is empty"):
        read_scores([write(tmp_path / "odd.csv", pd.DataFrame({"model": ["a", None], "score": 50.0}))])


def test_relating__names_measures_that_are_left_out():
    whole = tidy(methods(12), rng().normal(size=12))
    half = tidy(methods(11), rng(1).normal(size=11), "cosine_visible")
    found = relate(pd.concat([whole, half]), scored(methods(12), range(12)), layers=["last"])
    assert set(found.table["measure"]) == {"heterogeneity"}
    assert found.notes == [
        "cosine_visible (last layer depth of encoder) is left out: not all checkpoints have it, such as m11"
    ]
    with pytest.raises(DataError, match=r"no measure is there for all checkpoints; .*heterogeneity"):
        relate(whole[whole["layer_depth"] == 1].iloc[1:].assign(value=math.nan), scored(methods(12), range(12)))


# ---- what may be said


def test_mean_over_runs__of_runs_that_all_agree_has_the_p_of_their_signs():
    assert [_mean_over_runs([1.0] * 6, 0.95).p, _mean_over_runs([1.0, 1.0 - 1e-16, 1.0], 0.95).p] == [2**-5, 2**-2]


def test_sentence__says_where_the_direction_turns_given_the_epoch():
    row = pd.Series(
        {"verdict": "falls with accuracy", "rho": -0.5, "low": -0.6, "high": -0.3, "number": 9, "given": ""}
    )
    assert _given(row, "epoch", "runs", "rises with accuracy").startswith("Given the epoch it falls with accuracy (rho")
    assert _given(row, "epoch", "runs", "falls with accuracy").startswith("Given the epoch it still does (rho")


def test_sentence__with_few_checkpoints_nothing_can_be_concluded():
    few = relate(tidy(methods(6), range(6)), scored(methods(6), range(6)), layers=["last"])
    assert few.sentence == "With 6 methods nothing can be concluded across methods (10 are needed)."
    assert few.table["p_holm"].isna().all()
    assert set(few.table["verdict"]) == {"nothing can be concluded"}


def test_sentence__h_adds_nothing_where_another_measure_says_it_all():
    count = 40
    truth = rng().normal(size=count)
    other, h = truth + 0.05 * rng(1).normal(size=count), truth + 0.5 * rng(2).normal(size=count)
    measures = pd.concat([tidy(methods(count), -h), tidy(methods(count), other, "cosine_visible")])
    found = relate(measures, scored(methods(count), truth), layers=["last"])
    assert found.sentence.startswith("Across methods H falls with accuracy (last layer depth: rho -0.8")
    assert "Given the other measures (cosine_visible) it adds nothing that is shown" in found.sentence
    assert "after Holm over 3 comparisons" in found.sentence
    few = relate(measures, scored(methods(10), truth[:10]), layers=["last"])
    assert "10 methods are too few to conclude anything" in few.sentence


def trending(seed, runs=12, epochs=8, drift=1.0):
    """Runs in which H and accuracy change with time and with nothing else."""
    random, time = rng(seed), np.arange(1, epochs + 1)
    keys = [("m", str(run), float(epoch)) for run in range(runs) for epoch in time]
    noise = random.normal(size=(2, runs, epochs))
    h, score = (drift * time * sign + noise[at] for at, sign in enumerate((-1, 1)))
    return tidy(keys, h.ravel()), scored(keys, score.ravel())


def test_within_runs__time_alone_is_told_from_a_relation():
    found = relate(*trending(0), layers=["last"])
    plain, timed = (found.table[found.table["level"] == level].iloc[0] for level in found.table["level"].unique()[1:])
    assert (plain["verdict"], timed["verdict"]) == ("falls with accuracy", "not shown")
    assert plain["number"] == 12 > timed["number"]  # where H only ever falls, nothing is left given the epoch
    assert "Given the epoch it adds nothing that is shown" in found.sentence


@pytest.mark.slow
def test_simulated__intervals_cover_and_the_null_is_seldom_rejected():
    rho, number = 0.5, 25
    truth = 6 / math.pi * math.asin(rho / 2)  # of two normal variables
    covered = []
    for seed in range(1500):
        x, noise = rng(seed).normal(size=(2, number))
        found = rank_correlation(x, rho * x + math.sqrt(1 - rho**2) * noise)
        covered.append(found.low < truth < found.high)
    assert 0.93 < np.mean(covered) < 0.98
    wrong, wrong_given, wrong_time = [], [], []
    for seed in range(150):
        count = FEWEST_METHODS + 4
        values = rng(seed).normal(size=(4, count))
        values[1] += values[3]  # an other measure that goes with accuracy is right; the rest is noise
        tables = [tidy(methods(count), values[at], name) for at, name in enumerate(("heterogeneity", "a", "b"))]
        table = relate(pd.concat(tables), scored(methods(count), values[3]), layers=["last"]).table
        told = table["verdict"].str.contains("accuracy")
        wrong.append(told[table["measure"] != "a"].any())
        wrong_given.append(told[table["given"] != ""].any())
        within = relate(*trending(seed, runs=8, epochs=6, drift=0.4), layers=["last"]).table
        wrong_time.append("accuracy" in within[within["level"].str.endswith("epoch")]["verdict"].iloc[0])
    assert max(map(np.mean, (wrong, wrong_given, wrong_time))) < 0.09  # 0.05, and two deviations of 150 samples


# ---- the command


def test_command__writes_tables_figure_and_one_sentence(tmp_path):
    count = 12
    table = tidy(methods(count), rng().normal(size=count)).rename(columns={"method": "model"})
    measures = write(tmp_path / "measures.csv", table.drop(columns=["seed", "epoch"]))
    scores = pd.DataFrame({"model": [name for name, *_ in methods(count)], "top1": range(count)})
    out = tmp_path / "out"
    given = ["relate", "--measures", measures, "--scores", write(tmp_path / "s.csv", scores), "--out", str(out)]
    failed = CliRunner().invoke(app, given)
    assert (failed.exit_code, "name one with --score-column" in failed.output) == (4, True)
    result = CliRunner().invoke(app, [*given, "--score-column", "top1", "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["sentence"].startswith("Across methods H")
    assert {row["layer"] for row in content["relations"]} == {"first", "last", "mean"}
    names = {"relations.csv", "checkpoints.csv", "seeds.csv", "relations.png", "relations.pdf"}
    assert {path.name for path in out.iterdir()} == names | {"run.json", "run.toml", "methods.md"}
    assert "95 % intervals and Holm's correction" in (out / "methods.md").read_text()
    assert pd.read_csv(out / "relations.csv")["number"].eq(count).all()
    with pytest.raises(DataError, match="nothing to draw"):
        draw_relations(pd.read_csv(out / "relations.csv").assign(rho=math.nan))
