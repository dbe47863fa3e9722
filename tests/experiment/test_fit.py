import copy

import pytest
import torch
from torch import nn

from experiment.fit import check_arch, fit_to, load_weights
from models import create_model

WEIGHTS = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
ARCH = {"name": "msdnet", "options": {"nBlocks": 5, "growth": [1, 2]}, "num_classes": 10}


def test_same_architecture_passes():
    check_arch(ARCH, ARCH | {"options": dict(ARCH["options"])}, "x.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "ranet", "options": {"step": 2}}, "name is 'msdnet', wanted 'ranet'$"),
        ({"num_classes": 100}, "num_classes is 10, wanted 100$"),
        ({"options": {"nBlocks": 7, "growth": [1, 2]}}, "nBlocks is 5, wanted 7$"),
        ({"options": {"nBlocks": 5}}, r"growth is \[1, 2\], wanted None$"),
    ],
)
def test_another_architecture_is_named(change, message):
    with pytest.raises(ValueError, match=f"x.pth holds another architecture: {message}"):
        check_arch(ARCH, ARCH | change, "x.pth")


def network(classes=10, width=4):
    """Two heads; the second also reads the logits of the first."""
    return nn.ModuleDict(
        {
            "trunk": nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width)),
            "head0": nn.Linear(4, classes),
            "isc": nn.Linear(classes, 4),
            "head1": nn.Linear(8, classes),
        }
    )


def test_fitting_weights_load():
    source, target = network(), network()
    load_weights(target, source.state_dict(), "x.pth")
    assert torch.equal(target["head1"].weight, source["head1"].weight)


def test_weights_older_than_the_batch_counter_load():
    weights = {key: value for key, value in network().state_dict().items() if "num_batches" not in key}
    model = network()
    load_weights(model, weights, "x.pth")
    assert all(
        torch.equal(value, weights[key]) for key, value in model.state_dict().items() if key in weights
    )


def test_another_number_of_classes_is_said():
    with pytest.raises(ValueError, match="^x.pth has 100 classes, the model 10$"):
        load_weights(network(10), network(100).state_dict(), "x.pth")


def test_another_width_is_not_called_classes():
    with pytest.raises(
        ValueError, match=r"6 of another shape \(trunk.0.weight \[6, 3, 1, 1\] instead of \[4, 3,"
    ) as error:
        load_weights(network(), network(width=6).state_dict(), "x.pth")
    assert "\n" not in str(error.value)


def test_missing_and_unexpected_keys_are_counted():
    weights = network().state_dict()
    for key in ("head0.weight", "head0.bias", "isc.weight", "isc.bias"):
        weights["old." + key] = weights.pop(key)
    with pytest.raises(ValueError, match="^x.pth does not fit the model: ") as error:
        load_weights(network(), weights, "x.pth")
    assert "4 missing (head0.weight, head0.bias, isc.weight, ...); 4 unexpected (old.head0.weight" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def heads(classes, width=4):
    """A trunk, an exit, a connection of it to a second exit, and a learned array beside them."""
    model = nn.Module()
    model.token = nn.Parameter(torch.randn(width))
    model.trunk = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.head = nn.Linear(4, classes)
    model.isc = nn.Sequential(nn.Linear(classes, 4), nn.BatchNorm1d(4), nn.ReLU())
    model.last = nn.ModuleDict(
        {"norm": nn.LayerNorm(4), "classify": nn.Sequential(nn.Sequential(nn.Linear(4, classes)))}
    )
    return model


def trained_heads(classes, **options):
    """The same after its batch norms saw images."""
    model = heads(classes, **options)
    for norm in (model.trunk[1], model.isc[1]):
        norm.running_mean.fill_(3.0)
    return model


def test_fit_to_renews_heads_whole_and_takes_the_rest():
    source, model = trained_heads(100), heads(10)
    fit = fit_to(model, source.state_dict())
    assert fit.renewed == ["head", "isc", "last.classify"]
    assert len(fit.kept) == 1 + 7 + 2 and fit.unused == []
    initial = copy.deepcopy(model)
    load_weights(model, fit.weights, "x.pth")
    assert torch.equal(model.trunk[0].weight, source.trunk[0].weight) and torch.equal(
        model.token, source.token
    )
    assert torch.equal(model.head.weight, initial.head.weight)
    # The connection's batch norm fits by its shape, but its statistics are of another layer's output.
    assert model.isc[1].running_mean.eq(0).all() and model.trunk[1].running_mean.eq(3).all()


def test_fit_to_renews_a_tensor_beside_modules_alone():
    fit = fit_to(heads(10, width=6), heads(10).state_dict())
    assert fit.renewed == ["token"] and len(fit.kept) == len(fit.weights) - 1


def test_fit_to_renews_new_layers_and_lists_old_ones():
    weights = {key.replace("head.", "old."): value for key, value in heads(10).state_dict().items()}
    fit = fit_to(heads(10), weights)
    assert fit.renewed == ["head"] and fit.unused == ["old.weight", "old.bias"]
    # Only the modules next to a new one in a list keep their values: it is named as a whole.
    model = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.LayerNorm(3)}) for _ in range(2)])
    assert fit_to(model, model[:1].state_dict()).renewed == ["1"]


def test_fit_to_does_without_batch_counters():
    source, model = trained_heads(10), heads(10)
    weights = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    fit = fit_to(model, weights)
    assert fit.renewed == [] and len(fit.kept) == len(weights)
    load_weights(model, fit.weights, "x.pth")
    assert model.isc[1].running_mean.eq(3).all()


def test_fit_to_refuses_what_fits_nowhere():
    with pytest.raises(ValueError, match="none of the 2 given weights fits any of the model's 2"):
        fit_to(nn.Linear(3, 4), WEIGHTS)


@pytest.mark.parametrize(("backbone", "first"), [("mobilenetV3_0x5", []), ("resnet18", ["classifier_cnn"])])
def test_all_heads_and_connections_of_a_perceiver_are_renewed(backbone, first):
    with torch.device("meta"):
        source, model = (create_model(f"{backbone}_perceiver_t128", classes) for classes in (1000, 3))
    others = ["classifier_att", "isc4", "classifier_cnn", "classifier_merge"]
    fit = fit_to(model, source.state_dict())
    assert fit.renewed == [
        *first,
        "early_classifier3",
        "isc3",
        *(name for name in others if name not in first),
    ]
    assert len(fit.kept) == sum(not key.startswith(tuple(fit.renewed)) for key in model.state_dict())
