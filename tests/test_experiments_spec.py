"""Experiment files: what they mean, what --set changes, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_cases import TINY, write_experiment

from mto_analysis.errors import DataNotFoundError, ExperimentError
from mto_analysis.experiments import ExperimentRuns, experiment_names, load_experiment
from mto_analysis.experiments.spec import Images
from mto_analysis.mto import MTOConfig


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def test_load_experiment__reads_what_the_file_says(tiny: Path) -> None:
    experiment = load_experiment(tiny)
    assert experiment.methods == ("MAE", "MAE + MTO")
    assert experiment.pairs == (("MAE", "MAE + MTO"),)
    assert experiment.seeds == (0, 1)
    assert experiment.variants[0].recipe.epochs == 2
    assert experiment.variants[0].recipe.model["dim"] == 32
    assert experiment.evaluation.protocol == "knn"
    assert experiment.evaluation.neighbours == 3
    assert experiment.choice is not None
    assert [each.mto for each in experiment.choice.candidates] == [
        MTOConfig(),
        MTOConfig(sparsity_weight=0.5, include_self=False),
    ]


def test_load_experiment__set_reaches_every_table_and_all_recipes(tiny: Path) -> None:
    options = {
        "seeds": "3,4,5",
        "epochs": "4",
        "model.depth": "1",
        "evaluation.points": "1",
        "choose.candidates.large.ranking_weight": "0.25",
        "precision": "bf16",
        "data.train": "other.parquet",
    }
    experiment = load_experiment(tiny, options)
    assert experiment.seeds == (3, 4, 5)
    assert experiment.variants[0].recipe.epochs == 4
    assert experiment.variants[0].recipe.model["depth"] == 1
    assert experiment.points == 1
    assert experiment.choice is not None
    assert experiment.choice.candidates[1].mto.ranking_weight == 0.25
    assert experiment.precision == "bf16"
    assert experiment.images.train == "other.parquet"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("seeds = [0, 1]", "", "lacks seeds"),
        ("seeds = [0, 1]", 'seeds = ["a"]', "seeds must be a whole number, got 'a'"),
        ("seeds = [0, 1]", "seeds = []", "seeds: an experiment needs at least one"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds: must differ"),
        ("seeds = [0, 1]", "seed = [0, 1]", "no setting is called 'seed'; known are summary"),
        ("log_every = 1", "log_evry = 1", "no setting is called 'log_evry'; known are summary"),
        ("log_every = 1", 'precision = "fp8"', "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ("log_every = 1", "windows = [[0.5, 0.2]]", "windows must rise, got (0.5, 0.2)"),
        ("log_every = 1", "windows = [[0.0, 2.0]]", "windows must lie in [0, 1], got 2.0"),
        ("log_every = 1", 'compare = [["MAE", "SimMIM"]]', "compare: no method is called 'SimMIM'; there are MAE, MAE"),
        ('mto = "chosen"', 'mto = "best"', "arms.MTO.mto.preset must be one of default, paper, got 'best'"),
        (
            'mto = "chosen"',
            "mto = { sparsity_wait = 1 }",
            "'arms.MTO.mto.sparsity_wait'; known are arms.MTO.mto.preset",
        ),
        (
            'mto = "chosen"',
            "mto = { sparsity_weight = -1 }",
            "arms.MTO.mto.sparsity_weight must be at least 0, got",
        ),
        ('mto = "chosen"', "", 'choose: no arm has mto = "chosen"'),
        ('name = "small"', 'name = "no MTO"', "choose.candidates: the baseline's name is taken"),
        ("seeds = [100]", "seeds = [1]", "choose.seeds: must be other seeds than the experiment's"),
        ("share = 0.5", "share = 0", "choose.share must lie in (0, 1], got 0.0"),
        ("share = 0.5", 'by = "best"', "choose.by must be one of final, mean, got 'best'"),
        ('protocol = "knn"', 'protocol = "guess"', "evaluation.protocol must be one of knn, linear, linear_cached"),
        ("neighbours = 3", "neighbors = 3", "no setting is called 'evaluation.neighbors'; known are evaluation.points"),
        ("points = 2", "points = 0", "evaluation.points must be at least 1, got 0"),
        ('recipe = "mae_cifar10"', 'recipe = "mea"', "recipes.MAE: no recipe is called 'mea'"),
        ("patch_size = 8", "patch = 8", "recipes.MAE: set: no setting is called 'patch'"),
        ("[[arms]]", "[arms]", "is not TOML"),
    ],
)
def test_load_experiment__errors_name_the_key(tiny: Path, before: str, after: str, words: str) -> None:
    assert before in TINY
    tiny.write_text(TINY.replace(before, after, 1))
    with pytest.raises(ExperimentError) as error:
        load_experiment(tiny)
    assert words in str(error.value)
    assert str(tiny) in str(error.value)
    assert "\n" not in str(error.value)


def test_load_experiment__at_most_six_candidates(tiny: Path) -> None:
    more = "".join(f'\n[[choose.candidates]]\nname = "more {number}"\n' for number in range(5))
    tiny.write_text(TINY + more)
    with pytest.raises(ExperimentError, match="at most 6"):
        load_experiment(tiny)


def test_load_experiment__unknown_names_list_those_that_ship() -> None:
    with pytest.raises(ExperimentError, match=r"no experiment is called 'none', .* known are .*mae_cifar10"):
        load_experiment("none")
    with pytest.raises(ExperimentError, match="no setting is called 'epoch'"):
        load_experiment("mae_cifar10", {"epoch": "3"})


@pytest.mark.parametrize("name", experiment_names())
def test_shipped_experiments__are_whole(name: str, tmp_path: Path) -> None:
    experiment = load_experiment(name)
    assert experiment.summary
    assert experiment.baseline is not None
    runs = ExperimentRuns(experiment, Images(), tmp_path)
    assert len(runs.main) == len(experiment.methods) * len(experiment.seeds)
    assert all(run.settings.evaluation.every >= 1 for run in runs.all if run.settings.evaluation)
    longer = load_experiment(name, {"epochs": "200"})
    assert all(variant.recipe.epochs == 200 for variant in longer.variants)


@pytest.mark.parametrize("name", ["mae_cifar10", "simmim_cifar10"])
def test_shipped_experiments__pair_five_seeds_and_choose_on_others(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.seeds == (0, 1, 2, 3, 4)
    assert experiment.choice is not None
    assert experiment.choice.seeds == (100, 101)
    assert len({str(each.mto) for each in experiment.choice.candidates}) == 6


def test_ablation__has_the_arms_of_table_3_and_one_without_any_loss() -> None:
    experiment = load_experiment("ablation_table3")
    weights = [
        tuple(bool(getattr(arm.mto, f"{name}_weight")) for name in ("sparsity", "embedding", "ranking"))
        for arm in experiment.arms
        if arm.mto is not None
    ]
    assert len(experiment.arms) == 8
    assert sorted(weights) == sorted(
        (a, b, c) for a in (False, True) for b in (False, True) for c in (False, True) if a or b or c
    )


def test_decoder_depth__varies_the_decoder_alone() -> None:
    experiment = load_experiment("decoder_depth")
    assert [variant.recipe.model["decoder_depth"] for variant in experiment.variants] == [1, 2, 4, 8, 12]
    rest = [{k: v for k, v in each.recipe.model.items() if k != "decoder_depth"} for each in experiment.variants]
    assert all(each == rest[0] for each in rest)


@pytest.mark.parametrize(
    ("short", "long", "added"),
    [("supp-fig1", "style_comparison", 0), ("supp-fig2", "decoder_depth", 0), ("table3", "ablation_table3", 1)],
)
def test_short_forms__beside_the_figures_ask_what_the_long_ones_ask(short: str, long: str, added: int) -> None:
    one = load_experiment(Path(__file__).parents[1] / f"figures/{short}.toml")
    other = load_experiment(long)
    assert [variant.label for variant in one.variants] == [variant.label for variant in other.variants]
    assert [variant.recipe.model for variant in one.variants] == [variant.recipe.model for variant in other.variants]
    count = len(other.arms)
    assert (one.arms[:count], len(one.arms)) == (other.arms, count + added)
    assert one.pairs[: len(other.pairs)] == other.pairs
    epochs = [[variant.recipe.epochs for variant in each.variants] for each in (one, other)]
    assert max(epochs[0]) < min(epochs[1])


def test_shortened__keeps_the_shape_of_the_schedule(tiny: Path) -> None:
    recipe = load_experiment(tiny, {"epochs": "20"}).variants[0].recipe
    short = recipe.shortened(0.5)
    assert (short.epochs, short.warmup_epochs) == (10, recipe.warmup_epochs / 2)


def test_images__that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"there are no images at .*train.parquet; give"):
        Images().resolved(tmp_path)
    write_experiment(tmp_path)
    found = Images().resolved(tmp_path)
    assert found.train == found.eval_train == str(tmp_path / "train.parquet")


def test_documentation__shows_a_file_that_loads(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs/experiments.md").read_text(encoding="utf-8")
    path = tmp_path / "shown.toml"
    path.write_text(text.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    experiment = load_experiment(path)
    assert experiment.methods == ("MAE", "MAE + MTO")
    assert all(f"`{name}`" in text for name in experiment_names())
