import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from adaptive.flops import exit_costs
from models import create_model, list_models, tune
from models.dyn_perceiver import map_of, tokens_of

CORES = ("reg400m_perceiver_t32", "resnet18_perceiver_t128", "mobilenetV3_0x5_perceiver_t128")
OFF = ("with_x2z", "with_z2x", "with_dwc", "with_last_CA", "with_isc", "spatial_reduction")
SIDE = 36


@pytest.fixture(scope="module")
def small(settled):
    """`small(name, side, **options)`: a network in float64 and eval mode, with statistics of its own, and three
    images."""

    def make(name=CORES[0], side=SIDE, **options):
        torch.manual_seed(0)
        images = torch.randn(3, 3, side, side, dtype=torch.float64)
        net = create_model(name, num_classes=5, input_size=side, **options)
        return settled(net, images), images

    return make


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("off", [None, *OFF])
def test_every_option_trains_every_parameter_and_treats_rows_alone(name, off, small, rest):
    net, images = small(name, num_latents=16, SA_widening_factor=1, **({off: False} if off else {}))
    with torch.no_grad():
        whole, state = net(images), net.begin(images)
        assert [logits.shape for logits in whole] == [(3, 5)] * 4
        assert all(torch.equal(a, b) for a, b in zip(rest(net, 0, state), whole, strict=True))
        for alone, logits in zip(net(images[1:2]), whole, strict=True):
            assert_close(alone[0], logits[1], rtol=1e-10, atol=1e-10)
    for module in net.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # a branch left out for all three samples would get no gradient
    sum(F.cross_entropy(logits, torch.arange(3)) for logits in net.train()(images)).backward()
    assert [key for key, p in net.named_parameters() if p.grad is None] == []


@pytest.fixture(scope="module")
def whole():
    """A network with all of its parts, and the costs of its exits."""
    with torch.device("meta"):
        network = create_model(CORES[0])
    return network, exit_costs(network, (3, 64, 64))


@pytest.mark.parametrize(
    ("option", "gone"),
    [
        ("with_x2z", ("dwc2_x2z", "dwc4_x2z", "cross_att2_x2z", "cross_att4_x2z")),
        ("with_z2x", ("cross_att2_z2x", "cross_att4_z2x")),
        ("with_dwc", ("dwc1_x2z", "dwc2_x2z", "dwc4_x2z")),
        ("with_last_CA", ("last_cross_att_z2x",)),
        ("with_isc", ("isc3", "isc4")),
    ],
)
def test_options_leave_parts_out(option, gone, whole):
    whole, whole_costs = whole
    with torch.device("meta"):
        part = create_model(CORES[0], **{option: False})
    assert set(gone) <= {name for name, _ in whole.named_children()}
    assert not {name for name, _ in part.named_children()} & set(gone)
    assert hasattr(part, "cross_att1_x2z") and hasattr(part, "last_cross_att_z2x") == (
        option != "with_last_CA"
    )
    costs = exit_costs(part, (3, 64, 64))
    assert costs[-1] < whole_costs[-1]
    assert option != "with_last_CA" or costs[:3] == whole_costs[:3]


def test_options_without_a_reader_change_the_heads():
    with torch.device("meta"):
        net = create_model(CORES[0], num_classes=5, with_isc=False)
    assert net.classifier_att.in_features == 208 and net.classifier_merge[1].in_features == 440 + 208


@pytest.mark.parametrize("name", CORES)
def test_without_spatial_reduction_tokens_read_the_true_maps(name, small):
    net, images = small(name, side=44, spatial_reduction=False)
    keys = [
        getattr(net, f"cross_att{i}_x2z").cross_attn.attention.relative_position_bias for i in (1, 2, 3, 4)
    ]
    strides = {"reg": (2, 4, 8, 16), "res": (4, 4, 8, 16), "mob": (4, 8, 16, 32)}[name[:3]]
    assert [bias.shape[1] for bias in keys] == [(-(-44 // stride)) ** 2 for stride in strides]
    with pytest.raises(
        ValueError, match="images of 44 x 64; without spatial_reduction this network reads 44 x 44"
    ):
        net(F.pad(images, (0, 20)))


@torch.no_grad()
def test_without_spatial_reduction_is_with_it_where_maps_are_seven_wide(small):
    # At 112 pixels stage 4 of a RegNet reads 7 x 7: there pooling changes nothing, and nothing else differs.
    pooled, _ = small(side=112, with_x2z=True)
    whole = create_model(CORES[0], num_classes=5, input_size=112, spatial_reduction=False).double().eval()
    z, x = torch.randn(2, 4, 208).double(), torch.randn(2, 208, 7, 7).double()
    for part in ("dwc4_x2z", "cross_att4_x2z"):
        getattr(whole, part).load_state_dict(getattr(pooled, part).state_dict())
    assert_close(whole._read(4, z, x), pooled._read(4, z, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(32, 32), (75, 51), (224, 32)])
@torch.no_grad()
def test_with_spatial_reduction_any_size(shape, small):
    net, _ = small()
    assert [logits.shape for logits in net(torch.randn(2, 3, *shape).double())] == [(2, 5)] * 4


@torch.no_grad()
def test_tuned_for_training_on_a_cpu_it_computes_what_evaluation_does():
    """Without batch norm in training mode, which has statistics of its own: tokens that read a map of every
    size."""
    torch.manual_seed(0)
    net = create_model("reg400m_perceiver_t32", num_classes=5)
    for i, width in enumerate((32, 48, 104, 208), 1):
        for size in ((14, 28), (14, 15), (7, 7), (3, 5)):  # the first and third in one convolution
            x, z = torch.randn(2, width, *size), torch.randn(2, 4, width)
            tune(net.train(), "cpu")
            assert net.pools_at_once
            in_training = net._read(i, z, x)
            tune(net.eval(), "cpu")
            assert not net.pools_at_once
            assert_close(in_training, net._read(i, z, x), rtol=1e-4, atol=1e-5)


def test_tokens_and_maps():
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    tokens = tokens_of(x)
    assert tokens.shape == (2, 20, 3) and torch.equal(tokens[1, 7], x[1, :, 1, 2])
    assert torch.equal(map_of(tokens, like=x), x)
    fast = x.to(memory_format=torch.channels_last)
    assert tokens_of(fast).data_ptr() == fast.data_ptr() and tokens_of(fast).is_contiguous()


@torch.no_grad()
def test_memory_format_does_not_matter(small):
    net, images = small()
    again = net(images.to(memory_format=torch.channels_last))
    assert all(torch.equal(a, b) for a, b in zip(net(images), again, strict=True))


@torch.no_grad()
def test_a_step_runs_its_own_part_and_no_more(small):
    net, images = small()
    ran = set()
    for name, module in net.named_modules():
        if not any(module.children()):
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
    own, state = [], net.begin(images)
    for k in range(4):
        ran.clear()
        _, state = net.step(k, state)
        own.append({".".join(name.split(".")[: 2 if name.startswith("cnn_body") else 1]) for name in ran})
    assert {"cnn_body.block1", "cnn_body.block2", "self_att3", "early_classifier3"} <= own[0]
    assert own[1] >= {"cnn_body.block3", "self_att4", "isc3", "classifier_att"}
    assert own[2] == {"cnn_body.block4", "cnn_dropout", "classifier_cnn"}
    assert own[3] == {"last_cross_att_z2x", "isc4", "classifier_merge"}
    assert not own[0] & own[1] - {"token_mixer", "token_expander"}


def test_inter_stage_connections_pass_gradients_on(small):
    net, images = small()
    net.train()(images)[1].sum().backward()
    assert net.early_classifier3.weight.grad.any() and net.isc3[0].weight.grad.any()
    assert net.classifier_cnn.weight.grad is None


@pytest.mark.parametrize("name", CORES)
def test_unset_rates_are_the_published_ones(name):
    net = create_model(name)
    latent = [m.dropout for m in net.modules() if hasattr(m, "dropout")]
    assert len(latent) > 20 and not any(latent) and not net.self_att1[0].drop.p
    assert net.cnn_dropout.p == (0.2 if "resnet" in name else 0.0)
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in net.modules() if hasattr(m, "drop_path")]
    assert max(rates) == pytest.approx(0.2 if "resnet" in name else 0.0)
    if "mobilenet" in name:
        assert (net.classifier_cnn[2].p, net.classifier_merge[3].p) == (0.2, 0.2)
    else:
        assert isinstance(net.classifier_merge[-1], nn.Linear)


@pytest.mark.parametrize("name", CORES)
def test_given_rates_are_used(name):
    net = create_model(name, drop_path=0.3)
    assert (
        max(getattr(m.drop_path, "drop_prob", 0.0) for m in net.modules() if hasattr(m, "drop_path")) == 0.3
    )
    none = create_model(name, drop_path=0.0)
    assert not any(getattr(m, "drop_prob", 0.0) for m in none.modules())


def rates_of_dropout(net):
    """By name, those of the latent branch apart from the CNN's."""
    found = {name: getattr(m, "dropout", getattr(m, "p", None)) for name, m in net.named_modules()}
    latent = {name: rate for name, rate in found.items() if rate is not None and "_att" in name}
    return latent, {name: rate for name, rate in found.items() if rate is not None and "_att" not in name}


@pytest.mark.parametrize("name", CORES)
def test_dropout_is_that_of_the_latent_branch_as_published(name):
    """Its published default, 0, alters nothing where it is written out."""
    latent, cnn = rates_of_dropout(create_model(name))
    assert len(latent) > 40 and {*latent.values()} == {0.0} and cnn
    assert rates_of_dropout(create_model(name, dropout=0.0)) == (latent, cnn)
    changed, same = rates_of_dropout(create_model(name, dropout=0.1))
    assert changed.keys() == latent.keys() and {*changed.values()} == {0.1} and same == cnn


def test_the_merged_exit_reads_the_map_without_exit_2s_dropout(small):
    net, images = small("resnet18_perceiver_t128", with_last_CA=False, drop_path=0.0)
    for module in net.modules():  # leaves the dropout of exit 2 alone
        if module is not net.cnn_dropout:
            module.training = False
    net.cnn_dropout.train()
    state = net.begin(images)
    for k in range(2):
        _, state = net.step(k, state)
    features, state = net.trunk(2, state)
    assert not torch.equal(net.head(2, features), net.head(2, features))
    assert torch.equal(net.trunk(3, state)[0][:, :512], features)


def test_construction_has_no_side_effects(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = create_model(CORES[0])
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []
    assert all(not buffer.any() for name, buffer in net.named_buffers() if name.endswith(("mean", "tracked")))
    assert net.training and net.latent.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth_factor": (1, 1, 1)}, r"depth_factor is \[1, 1, 1\]; it takes four numbers"),
        ({"depth_factor": (1, 1, 0, 1)}, r"depth_factor is \[1, 1, 0, 1\]"),
        ({"num_SA_heads": (1, 2)}, r"num_SA_heads is \[1, 2\]"),
        (
            {"num_SA_heads": (1, 2, 4, 7)},
            r"num_SA_heads is \[1, 2, 4, 7\]; .* \[32, 48, 104, 208\] must be multiples",
        ),
        ({"SA_widening_factor": 0}, "SA_widening_factor is 0"),
        ({"num_latents": 7}, "num_latents is 7; it must be at least 8"),
        ({"num_latent_channels": 48}, "num_latent_channels is 48; this CNN accepts 32 only"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_model(CORES[0], **options)


def test_other_options_are_used():
    options = {"num_SA_heads": (2, 4, 8, 16), "SA_widening_factor": 1, "num_latent_channels": 32}
    with torch.device("meta"):
        net = create_model(CORES[0], depth_factor=(1, 2, 1, 1), num_latents=24, **options)
    assert [net.get_submodule(f"self_att{i}.0.self_attn.attention").heads for i in (1, 2, 3, 4)] == [
        2,
        4,
        8,
        16,
    ]
    assert [len(net.get_submodule(f"self_att{i}")) for i in (1, 2, 3, 4)] == [3, 6, 9, 3]
    assert net.self_att2[0].mlp.fc1.out_features == 48 and net.latent.shape == (24, 32)
    assert [mixer[1].out_features for mixer in net.token_mixer] == [12, 6, 3]


def test_the_names_are_those_published():
    published = ("reg", "resnet", "mobilenetV3")
    assert len([name for name in list_models("*_perceiver_t*") if name.startswith(published)]) == 56
    assert [len(list_models(f"{family}*_perceiver_t*")) for family in published] == [16, 22, 18]


def test_every_family_names_its_published_loss_weights():
    assert create_model("reg400m_perceiver_t32").loss_weights == (
        0.25,
        0.25,
        0.25,
        0.5,
    )  # early3, att, cnn, merge
    assert create_model("boosted/reg400m_perceiver_t32").loss_weights == (0.25, 0.25, 0.25, 0.5)
    assert create_model("msdnet").loss_weights == ()


@pytest.mark.parametrize("rate", [-0.3, 1.0])
def test_rates_of_stochastic_depth_are_checked(rate):
    with pytest.raises(ValueError, match=f"drop_path is {rate}"):
        create_model("resnet18_perceiver_t128", drop_path=rate)
