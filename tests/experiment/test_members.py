import pytest
import torch

from experiment.members import parse_member, split_weights, upgraded
from models import create_model
from models.ebjr import Member


def test_a_network_is_read_from_text_and_written_again():
    text = "msdnet:nBlocks=2,grFactor=1/2/4,lazy=false,mean=0.5/0.4/0.3,std=0.2/0.2/0.2,size=28,crop=0.875,classes=3/-1"
    member = parse_member(text)
    options = {"nBlocks": 2, "grFactor": (1, 2, 4), "lazy": False}
    assert member == Member("msdnet", options, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 28, 0.875, (3, -1))
    assert parse_member("resnet18") == Member("resnet18")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cifar_resnt", "unknown model 'cifar_resnt'; did you mean .*cifar_resnet"),
        ("cifar_resnet:dept=8", "'cifar_resnet:dept=8': unknown option 'dept=8'; did you mean depth"),
        ("cifar_resnet:depth=eight", "depth=eight is not of type int"),
        ("msdnet:lazy=maybe", "lazy=maybe is not of type bool"),
        ("cifar_resnet:mean=0.5/0.5", "mean and std are three numbers each"),
        ("cifar_resnet:std=0.5/0.5/0", "std above 0"),
        ("cifar_resnet:crop=1.5", "crop above 0 and at most 1"),
        ("cifar_resnet:weights=x.pth", "weights are for eval_dynamic.py --model ebjr, which loads them"),
    ],
)
def test_bad_words_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_member(text)


def test_the_file_of_weights_is_split_off():
    assert split_weights("cifar_resnet:depth=8,weights=a/b.pth,size=24") == (
        "cifar_resnet",
        "depth=8,size=24",
        "a/b.pth",
    )
    assert split_weights("weights=a.pth,size=24") == ("", "size=24", "a.pth")
    for text in ("cifar_resnet:depth=8", "cifar_resnet:weights=a,weights=b"):
        with pytest.raises(ValueError, match="name its file of weights, as in NAME:weights=FILE"):
            split_weights(text)


def test_a_cascade_of_an_older_file_names_its_networks_in_words():
    words = ["cifar_resnet:depth=8,size=16,mean=0.5/0.5/0.5", "cifar_densenet:depth=10,growthRate=4"]
    old = {"name": "ebjr", "options": {"networks": words, "std": [1.0, 1.0, 1.0]}, "num_classes": 5}
    arch = upgraded(old)
    assert arch == {
        "name": "ebjr",
        "options": {
            "networks": [
                {"name": "cifar_resnet", "options": {"depth": 8}, "size": 16, "mean": [0.5, 0.5, 0.5]},
                {"name": "cifar_densenet", "options": {"depth": 10, "growthRate": 4}},
            ],
            "std": [1.0, 1.0, 1.0],
        },
        "num_classes": 5,
    }
    assert old["options"]["networks"] == words and upgraded(arch) == arch
    with torch.device("meta"):
        network = create_model(arch["name"], arch["num_classes"], **arch["options"])
    assert network.views[0].size == 16 and len(network.networks) == 2


def test_other_architectures_and_bare_names_stay_as_they_are():
    for options in ({"nBlocks": 2}, {"networks": ["cifar_resnet", "resnet18"]}):
        arch = {"name": "x", "options": options, "num_classes": 5}
        assert upgraded(arch) == arch
