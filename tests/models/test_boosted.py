import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from models import create_model, list_models, model_options, spelled_out
from models.boosted import Boosted

OPTIONS = {"nBlocks": 3, "nChannels": 4, "growthRate": 4}


@pytest.fixture
def small(settled):
    """`small(**options)`: a boosted MSDNet of three exits, and images."""

    def make(**options):
        torch.manual_seed(0)
        images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
        return settled(create_model("boosted/msdnet", 7, **OPTIONS, **options), images), images

    return make


@pytest.mark.parametrize("reweight", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_every_exit_adds_to_the_share_of_the_answer_before_it(reweight, small, rest):
    network, images = small(reweight=reweight)
    f, answers = network.network(images), network(images)
    assert_close(answers, [f[0], f[1] + reweight * f[0], f[2] + reweight * (f[1] + reweight * f[0])])
    assert all(map(torch.equal, rest(network, 0, network.begin(images)), answers))


def test_an_exit_learns_what_the_answers_before_it_lack(small):
    network, images = small()
    targets = torch.arange(5)
    named = dict(network.network.named_parameters())
    asked = [p for p in named.values() if p.requires_grad]
    found = torch.autograd.grad(sum(F.cross_entropy(y, targets) for y in network(images)), asked)
    # The paper's form: E_0 = 0, each exit's loss is that of f + E, and E then is half of f + E.
    exits, ensemble, loss = network.network(images), 0.0, 0.0
    for logits in exits:
        loss = loss + F.cross_entropy(logits + ensemble, targets)
        ensemble = 0.5 * (logits.detach() + ensemble)
    assert_close(found, torch.autograd.grad(loss, asked))


def test_no_exit_teaches_the_heads_before_it(small):
    network, images = small()
    network(images)[2].sum().backward()
    assert [head.linear.weight.grad is None for head in network.network.classifier] == [True, True, False]
    assert network.network.blocks[0][1].layers[0].conv_normal.net[0].weight.grad is not None


@torch.no_grad()
def test_a_network_that_reads_its_answers_reads_the_boosted_ones(settled):
    torch.manual_seed(0)
    images = torch.randn(3, 3, 48, 48, dtype=torch.float64)
    inner = settled(create_model("reg400m_perceiver_t32", num_classes=5, input_size=48), images)
    network = create_model("boosted/reg400m_perceiver_t32", num_classes=5, input_size=48).double().eval()
    network.network.load_state_dict(inner.state_dict())
    answers = network(images)
    state, answer, expected = inner.begin(images), 0.0, []
    for k in range(4):
        features, state = inner.trunk(k, state)
        answer = inner.head(k, features) + 0.5 * answer
        state = inner.carry(k, state, answer)
        expected.append(answer)
    assert_close(answers, expected)


def test_options_are_the_networks_and_its_own():
    inner, options = model_options("msdnet"), model_options("boosted/msdnet")
    assert options.keys() == inner.keys() | {"reweight"} and options["reweight"].default == 0.5
    assert model_options("boosted/msdnet_cifar_even7")["nBlocks"].default == 7
    network = create_model("boosted/msdnet_cifar_even7", 10, nBlocks=2, reweight=0.25)
    assert isinstance(network, Boosted) and (network.num_exits, network.reweight) == (2, 0.25)
    assert network.network.classifier[0].linear.out_features == 10
    arch = spelled_out({"name": "boosted/msdnet", "options": {"nBlocks": 3}, "num_classes": 10})
    assert (arch["options"]["reweight"], arch["options"]["nBlocks"], arch["options"]["base"]) == (0.5, 3, 1)
    with torch.device("meta"):
        perceiver = create_model("boosted/reg400m_perceiver_t32")
    assert "latent" in perceiver.embeddings and not any(name.startswith("boosted") for name in list_models())


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "boosted/msdnet",
            {"nBlock": 3},
            TypeError,
            "boosted/msdnet has no option 'nBlock'; did you mean nBlocks",
        ),
        ("boosted/msdnet", {"reweigh": 1}, TypeError, "has no option 'reweigh'; did you mean reweight"),
        ("boosted/msdnet", {"options": {}}, TypeError, "has no option 'options'"),
        ("boosted/msdnet", {"reweight": 1.5}, ValueError, "reweight is 1.5; accepted: 0 to 1"),
        ("boosted/msdnet", {"nBlocks": 0}, ValueError, "nBlocks is 0"),
        ("boosted/msdnett", {}, ValueError, "unknown model 'msdnett'; did you mean msdnet"),
        ("boosted/", {}, ValueError, "unknown model ''"),
        ("boosted", {}, ValueError, "unknown model 'boosted'"),
    ],
)
def test_what_cannot_be_built_is_said(name, options, error, message):
    with pytest.raises(error, match=message):
        create_model(name, **options)
