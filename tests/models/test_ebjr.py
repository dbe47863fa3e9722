import pytest
import torch

from adaptive.confidence import CONFIDENCES
from adaptive.flops import exit_costs, single_costs
from adaptive.inference import run_adaptive, run_single
from models import create_model, tune
from models.ebjr import NO, ClassMap, Member, View, in_bytes, in_products

PAIR = (
    Member("cifar_resnet", {"depth": 8}),
    Member("msdnet", {"nBlocks": 2, "nChannels": 4, "growthRate": 4}),
)


def cascade(*networks, num_classes=5, **options):
    torch.manual_seed(0)
    return create_model("ebjr", num_classes, networks=networks or PAIR, **options).eval()


def test_a_network_is_a_bare_name_a_dict_or_a_member():
    given = {"name": "msdnet", "options": {"grFactor": [1, 2]}, "std": [0.2, 0.2, 0.2], "size": 28}
    member = Member.of(given)
    assert member == Member("msdnet", {"grFactor": [1, 2]}, std=[0.2, 0.2, 0.2], size=28)
    assert Member.of(member) is member and member.to_dict() == given
    assert Member("msdnet", {"grFactor": (1, 2)}, classes=(3, -1)).to_dict() == {
        "name": "msdnet",
        "options": {"grFactor": [1, 2]},
        "classes": [3, -1],
    }
    assert Member.of("resnet18") == Member("resnet18") and Member("resnet18").to_dict() == {
        "name": "resnet18"
    }


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"mean": (0.5, 0.5)}, "'cifar_resnet': mean and std are three numbers each"),
        ({"std": (0.5, 0.5, 0)}, "std above 0"),
        ({"crop": 1.5}, "crop above 0 and at most 1"),
        ({"size": 0}, "size is at least 1"),
    ],
)
def test_impossible_views_are_named(attributes, message):
    with pytest.raises(ValueError, match=message):
        create_model("ebjr", networks=["cifar_resnet", {"name": "cifar_resnet", **attributes}])


def test_the_language_of_the_command_line_is_not_read_here():
    with pytest.raises(ValueError, match="unknown model 'cifar_resnet:depth=8'; did you mean .*cifar_resnet"):
        create_model("ebjr", networks=["cifar_resnet:depth=8", "cifar_resnet"])


def test_a_cascade_has_two_networks_or_more():
    with pytest.raises(ValueError, match="networks is .*; a cascade has two or more"):
        create_model("ebjr", networks=["cifar_resnet"])


@torch.inference_mode()
def test_every_exit_is_that_of_its_network_on_its_own_view():
    other = PAIR[1]._replace(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.5))
    net = cascade(PAIR[0], other, mean=(0.1, 0.1, 0.1), std=(0.5, 0.5, 0.5))
    images = torch.rand(3, 3, 32, 32)
    stats = [torch.tensor(values).view(3, 1, 1) for values in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.5))]
    pixels = images * 0.5 + 0.1
    expected = [*net.networks[0](images), *net.networks[1]((pixels - stats[0]) / stats[1])]
    assert net.num_exits == 3
    for ours, theirs in zip(net(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for k in range(3):  # an exit alone spares the other networks
        torch.testing.assert_close(run_single(net, images, k), net(images)[k])


def test_an_exit_costs_what_ran_before_it_and_alone_only_its_own_network():
    net = cascade()
    student, teacher = (exit_costs(network, (3, 32, 32)) for network in net.networks)
    assert exit_costs(net, (3, 32, 32)) == student + [student[0] + cost for cost in teacher]
    assert single_costs(net, (3, 32, 32)) == student + single_costs(net.networks[1], (3, 32, 32))


@pytest.mark.parametrize("order", ["latency", "throughput"])
def test_the_teacher_sees_only_what_is_routed(order):
    net = cascade(PAIR[0], PAIR[0])
    seen = []
    net.networks[1].conv1.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    images = torch.rand(6, 3, 32, 32)
    with torch.inference_mode():
        sure = CONFIDENCES["energy_softmax"](net.networks[0](images)[0])
    limit = sure.sort().values[2]
    logits, exits = run_adaptive(net, images, torch.tensor([limit, -1e8]), "energy_softmax", order=order)
    assert sum(seen) == 2 and torch.equal(exits, (sure < limit).long())
    with torch.inference_mode():
        both = torch.stack([network(images)[0] for network in net.networks])
    torch.testing.assert_close(logits, both[exits, torch.arange(6)], rtol=1e-4, atol=1e-5)
    seen.clear()
    run_adaptive(net, images, torch.tensor([-1e8, -1e8]), "energy_softmax", order=order)
    assert seen == []  # nobody is routed, so the teacher is not called


@pytest.mark.parametrize("tuned", [False, True])
def test_a_view_resizes_cuts_and_normalises(tuned):
    view = View(Member("x", {}, (0.5,) * 3, (0.25,) * 3, 8, 0.5), (0.0,) * 3, (1.0,) * 3)
    if tuned:
        tune(view, "cpu")
    images = torch.zeros(2, 3, 32, 32)
    images[:, :, 8:24, 8:24] = 1.0  # what is cut out, 8 of 16 pixels
    assert view(images).shape == (2, 3, 8, 8)
    torch.testing.assert_close(view(images)[:, :, 2:6, 2:6], torch.full((2, 3, 4, 4), 2.0), atol=1e-4, rtol=0)
    assert view(images).min() >= -2 - 1e-6 and view(images).max() <= 2 + 1e-6  # no overshoot
    assert view.to(torch.bfloat16)(images.bfloat16()).dtype == torch.bfloat16


def test_kernels_for_resizing_differ_by_a_level_where_nothing_overshoots():
    torch.manual_seed(0)
    view = View(Member("x", size=20, crop=0.875), (0.0,) * 3, (1.0,) * 3)
    images = 0.4 + 0.2 * torch.rand(2, 3, 32, 48)
    anywhere = view(images)
    tune(view, "cpu")
    assert view(images).shape == (2, 3, 20, 20)
    torch.testing.assert_close(view(images), anywhere, rtol=0, atol=1.01 / 255)


@pytest.mark.parametrize("side", [16, 48])
def test_products_resize_as_the_kernel_for_bytes(side):
    levels = torch.randint(0, 256, (4, 3, 32, 40), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(in_products(levels, [side, 24]), in_bytes(levels, [side, 24]))


def test_a_specialised_network_answers_for_its_classes_or_not_at_all():
    answers = ClassMap((3, 1, -1), 5)(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]]))
    assert answers.tolist() == [[NO, 1.0, NO, 2.0, NO], [NO] * 5]
    for name, confidence in CONFIDENCES.items():
        sure, not_mine = confidence(answers)
        assert not_mine < sure, name


@pytest.mark.parametrize("classes", [(3, 3), (5,), (-1,)])
def test_bad_classes_are_named(classes):
    with pytest.raises(ValueError, match="accepted: different numbers below 5, or -1"):
        ClassMap(classes, 5)


def test_logits_that_are_read_cannot_be_renamed():
    network = Member("reg400m_perceiver_t32", {"with_isc": True}, classes=(1, 2))
    with pytest.raises(ValueError, match="reads its own logits"), torch.device("meta"):
        create_model("ebjr", 5, networks=[network, "cifar_resnet"])
