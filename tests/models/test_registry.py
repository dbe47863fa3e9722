import pytest

from models import MultiExitModel, create_model, list_models, model_options, registry
from models.errors import UserError


def test_unknown_option_lists_close_ones():
    for kind in (TypeError, UserError):
        with pytest.raises(kind, match="model msdnet has no option 'growthrate'; did you mean growthRate"):
            create_model("msdnet", growthrate=4)


def test_registering_a_name_twice_is_our_mistake():
    with pytest.raises(AssertionError, match="msdnet is registered twice"):
        registry.register(MultiExitModel, "msdnet", "")


@pytest.mark.parametrize("name", ["msdnet_cifar_lin", "mobilenetv3_small_050", "nets/msdnet", ""])
def test_unknown_name_is_a_value_error(name):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; "):
        create_model(name)


def test_unknown_name_lists_close_ones():
    with pytest.raises(
        ValueError, match="unknown model 'msdnet_cifar_lin'; did you mean .*msdnet_cifar_lin5"
    ):
        create_model("msdnet_cifar_lin")


def test_list_models_takes_a_pattern():
    names = list_models()
    assert names == sorted(names) and "timm/" not in names
    assert list_models("msdnet_imagenet_step?") == [f"msdnet_imagenet_step{n}" for n in (4, 6, 7)]
    assert list_models("MSDNET*") == []
    assert "timm/mobilenetv3_small_050" in list_models("timm/mobilenetv3_small*")


def test_preset_options_are_the_classes_with_other_defaults():
    preset, bare = model_options("msdnet_cifar_even7"), model_options("msdnet")
    assert list(preset) == list(bare) and "num_classes" not in bare
    assert {key: preset[key].default for key in preset if preset[key].default != bare[key].default} == {
        "nBlocks": 7,
        "stepmode": "even",
        "step": 2,
        "base": 4,
    }
    assert create_model("msdnet_cifar_even7", nBlocks=2).num_exits == 2
