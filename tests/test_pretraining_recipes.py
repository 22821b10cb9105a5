from __future__ import annotations

from dataclasses import fields

import pytest

from mto_analysis.errors import RecipeError
from mto_analysis.figures.paper.tables import printed
from mto_analysis.images.augmentation import method_augmentation
from mto_analysis.training import load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_bundled_recipe__says_where_each_value_comes_from(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    exempt = {"name", "method", "summary", "sources"}
    for field in fields(recipe):
        if field.name in exempt:
            continue
        value = getattr(recipe, field.name)
        if value != field.default:
            assert recipe.source_of(field.name) != "default", field.name


@pytest.mark.parametrize("name", recipe_names())
def test_bundled_recipe__normalizes_as_the_original(name):
    recipe = load_recipe(name)
    original = method_augmentation(recipe.method, recipe.image_size)
    assert (recipe.mean, recipe.std) == (original.mean, original.std)
    assert (recipe.mean == (0.5, 0.5, 0.5)) == (recipe.method == "bootmae")


@pytest.mark.parametrize("name", recipe_names())
def test_bundled_recipe__survives_being_written_and_read(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "mine.toml"
    path.write_text(recipe.to_toml())
    assert load_recipe(path) == recipe


def test_with_options__values_are_typed_and_their_source_changes():
    recipe = load_recipe("simmim_cifar10").with_options(
        {"epochs": "7", "model.depth": "4", "betas": "0.8, 0.9", "clip_grad": "none", "model.layer_scale": "1e-5"}
    )
    assert (recipe.epochs, recipe.model["depth"], recipe.betas, recipe.clip_grad) == (7, 4, (0.8, 0.9), None)
    assert recipe.model_config().layer_scale == 1e-5
    assert recipe.source_of("epochs") == recipe.source_of("model.depth") == "set for this run"
    assert recipe.source_of("weight_decay") == "supplementary Table 3"
    assert load_recipe("simmim_cifar10").epochs != 7


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"model.depth": "0"}, "the model must have at least one block"),
        ({"epoch": "3"}, "no setting is called 'epoch'; known are .*epochs.*model.depth"),
        ({"model.width": "3"}, "no setting is called 'model.width'"),
        ({"name": "mine"}, "no setting is called 'name'"),
        ({"epochs": "3.5"}, "epochs must be a whole number, got '3.5'"),
        ({"betas": "0.9"}, "betas must be 2 numbers, got"),
        ({"schedule": "linear"}, "schedule must be one of cosine, multistep, got 'linear'"),
        ({"epochs": "0"}, "epochs must be at least 1"),
        ({"temperature": "0.5"}, "no setting is called 'temperature'; known are"),
        ({"model.num_heads": "5"}, "num_heads must divide the width 128, got 5"),
        ({"mask_ratio": "1.5"}, "mask_ratio must lie between 0 and 1"),
        ({"schedule": "multistep"}, "a multistep schedule needs milestones"),
        (
            {"target": "features"},
            "target must be one of pixels, .*channels, got 'features'",
        ),
    ],
)
def test_with_options__errors_name_setting_and_rule(option, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("mae_cifar10").with_options(option)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("epochs = 20", "epoch = 20"), "no setting is called 'epoch'"),
        (("epochs = 20", ""), "lacks epochs"),
        (("epochs = 20", 'epochs = "20"'), "epochs must be a whole number"),
        (('method = "mae"', 'method = "dino"'), "method must be one of mae, simmim, bootmae, conmim, got 'dino'"),
        (("depth = 6", "dept = 6"), "no setting is called 'model.dept'"),
        (("[model]", "[model"), "is not TOML"),
        (('"schedule", ', '"scheduled", '), "sources name unknown fields scheduled"),
    ],
)
def test_load_recipe__a_wrong_file_is_refused_in_a_line(change, message, tmp_path):
    path = tmp_path / "mine.toml"
    text = load_recipe("mae_cifar10").to_toml()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_load_recipe__unknown_name_lists_those_there_are():
    with pytest.raises(RecipeError, match=r"no recipe is called 'vit', nor is it a file; known are .*mae_cifar10"):
        load_recipe("vit")


def test_augmentation__is_the_recipes():
    ours = load_recipe("simmim_vit_base").augmentation()
    assert (ours.image_size, ours.scale, ours.interpolation, ours.padding) == (224, (0.67, 1.0), "bilinear", None)
    assert ours.second_view is None
    assert load_recipe("conmim_vit_base").augmentation().second_view is not None
    assert load_recipe("mae_cifar10").augmentation().padding == 4


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("mae_vit_base", "MAE"),
        ("mae_vit_large", "MAE"),
        ("simmim_vit_base", "SimMIM"),
        ("bootmae_vit_base", "BootMAE"),
        ("conmim_vit_base", "ConMIM"),
    ],
)
def test_paper_recipe__is_that_of_the_supplementary_table(name, column):
    recipe, table = load_recipe(name), printed("supp_tables3to6_hyperparameters").set_index("setting")[column]
    rate = table["pretrain_peak_lr"] or table["pretrain_base_lr"]
    assert recipe.base_lr == float(rate)
    assert recipe.weight_decay == float(table["pretrain_weight_decay"])
    assert recipe.betas == tuple(float(each) for each in table["pretrain_betas"].split(","))
    assert recipe.batch_size == int(table["pretrain_batch_size"])
    assert recipe.schedule == table["schedule"]
    assert recipe.warmup_epochs == float(table["pretrain_warmup_epochs"])
