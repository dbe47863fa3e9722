import shlex

import pytest

from experiment.checks import check
from experiment.recipe import DEFAULTS, GROUPS, Recipe, read_command

ALL = list(GROUPS.values())


def read(*words):
    given = read_command(ALL, list(words))
    return Recipe.of(given.values, options=given.options)


def test_what_is_not_given_is_at_its_default():
    recipe = read("--model", "msdnet", "--lr", "0.5", "--exit_weights", "1", "2", "--nBlocks", "3")
    assert recipe.optimization.lr == 0.5 and recipe.objective.exit_weights == (1.0, 2.0)
    assert recipe.options == {"nBlocks": 3} and recipe.data.data_set == "DIGITS"
    assert recipe.flags() == DEFAULTS | {"model": "msdnet", "lr": 0.5, "exit_weights": [1.0, 2.0]}


def test_images_in_a_folder_are_imagenets_unless_a_data_set_is_named():
    assert Recipe.of({"data_path": "x"}).data.data_set == "IMNET"
    assert Recipe.of({"data_path": "x"}, {"data_set": "CIFAR10"}).data.data_set == "CIFAR10"


def test_a_recipe_is_the_command_that_repeats_it():
    words = (
        "--model msdnet --l2w true --mixup 0 --cutmix 0 --decay_epochs 3 5 --grFactor 1 2 --output_dir 'a b'"
    )
    recipe = read(*shlex.split(words))
    again = read(*shlex.split(recipe.command()))
    assert again == recipe and "--l2w true" in recipe.command() and "--lr" not in recipe.command()
    assert Recipe().command() == ""


def test_a_file_of_flags_gives_way_to_the_command_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: msdnet\nnBlocks: 3\ngrFactor: [1, 2]\nl2w: true\nlr: 0.5\ndecay-epochs: 3-5\n")
    recipe = read("--lr", "0.25", "--recipe", str(path))
    assert recipe.options == {"nBlocks": 3, "grFactor": [1, 2]}
    assert (recipe.network.model, recipe.weighting.l2w, recipe.optimization.lr) == ("msdnet", True, 0.25)
    assert recipe.optimization.decay_epochs == (3, 5)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nBlock: 3\nmodel: msdnet\n", "unknown flag --nBlock; did you mean --nBlocks"),
        ("lr: fast\n", "--lr: 'fast' is not of type float"),
        ("- 3\n", "recipe .* holds a list, expected flags as NAME: VALUE"),
        ("a: [\n", "recipe .* is not YAML: "),
        (None, "cannot read recipe .*: No such file or directory"),
    ],
)
def test_mistakes_in_a_file_of_flags_are_one_line(tmp_path, text, complaint):
    if text is not None:
        (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=complaint) as error:
        read("--recipe", str(tmp_path / "r.yaml"))
    assert "\n" not in str(error.value)


def test_a_recipe_without_a_network_is_not_trained():
    with pytest.raises(ValueError, match="name a network: --model NAME"):
        check(Recipe())
