import pytest
import torch

from models.bases import SingleExit, Wrapped


class Doubled(SingleExit):
    def extract(self, images):
        return 2 * images.mean((2, 3))

    def classify(self, features):
        return features + 1


def test_one_exit_in_two_halves():
    net, images = Doubled(), torch.randn(2, 3, 4, 4)
    (logits,) = net(images)
    assert torch.equal(logits, 2 * images.mean((2, 3)) + 1) and net.num_exits == 1
    logits, state = net.step(0, net.begin(images))
    assert state is None


class Louder(Wrapped):
    def head(self, k, features):
        return (k + 1) * super().head(k, features)


@torch.no_grad()
def test_a_network_around_another_changes_what_it_overrides(small):
    net, images = small("msdnet")
    louder = Louder(net)
    assert louder.num_exits == net.num_exits and louder.loss_weights == net.loss_weights
    assert not louder.reads_logits(0) and louder.training == net.training
    for k, (ours, theirs) in enumerate(zip(louder(images), net(images), strict=True)):
        assert torch.equal(ours, (k + 1) * theirs)


def test_stages_run_when_their_exit_is_asked_for(small):
    net, images = small("msdnet")
    ran = []
    for k, head in enumerate(net.classifier):
        head.register_forward_hook(lambda *_, k=k: ran.append(k))
    exits = net.each_exit(images)
    assert ran == [] and next(exits)[0] == 0 and ran == [0] and next(exits)[0] == 1 and ran == [0, 1]


@pytest.mark.parametrize("name", ["rexnet_ee_100", "timm_ee"])
def test_light_exits_have_the_names_of_files_written_so_far(name, small):
    net, _ = small(name)
    assert "exits.0.1.weight" in net.state_dict() and "exits.0.1.weight" in dict(net.named_parameters())
