import gc
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

from datasets import Split, TrainLoader, ordered_loader
from engine import Epoch, evaluate, summarise, train_one_epoch
from loading.sources import ArrayImages
from models import MultiExitModel
from training.losses import Losses, joint_objective
from training.optim import Update
from utils import Compute, Runtime

CPU = Compute(torch.device("cpu"))
SIZES = (1, 7, 9)  # fewer than two processes, odd, and one more than a multiple of two batches


class Toy(MultiExitModel):
    """Two exits over two layers; no batch norm, so that batches may be split."""

    num_exits = 2

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(12, 8), nn.Linear(8, 8)])
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(2))

    def begin(self, images):
        return images.flatten(1)

    def trunk(self, k, state):
        features = self.body[k](state).tanh()
        return features, features

    def head(self, k, features):
        return self.heads[k](features)


def corner(image):
    """PIL image to its upper left 2 x 2 pixels, float64 [3, 2, 2] in -1..1."""
    return torch.from_numpy(np.asarray(image)[:2, :2] / 127.5 - 1).permute(2, 0, 1)


def broken_corner(image):
    """`corner`, but not a number for a black image."""
    pixels = corner(image)
    return pixels if pixels.max() > -1 else pixels * torch.nan


def dark_and_bright(count, transform=corner):
    """Even samples are dark and of class 0, odd ones bright and of class 1."""
    labels = np.arange(count) % 2
    pixels = np.random.RandomState(0).randint(1, 120, (count, 32, 32, 3)) + 130 * labels[:, None, None, None]
    return Split(ArrayImages(pixels.astype(np.uint8), labels, "toy"), None, transform)


def with_black(count, black):
    """`dark_and_bright` whose sample `black` makes every loss that sees it not a number."""
    split = dark_and_bright(count, broken_corner)
    split.base.images[black] = 0
    return split


def number_of(name):
    """The sample that `toy[n]` names."""
    return int(re.fullmatch(r"toy\[(\d+)\]", name)[1])


def loader_of(split, batch_size, compute=CPU, epoch=0):
    loader = TrainLoader(split, Runtime(batch_size=batch_size, num_workers=0), compute, seed=5)
    loader.start(epoch)
    return loader


def in_order(split, batch_size, compute=CPU):
    """Batches half as large again as in training."""
    return ordered_loader(split, Runtime(batch_size=batch_size, num_workers=0), compute)


def make_update(model, lr=0.5):
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    return Update(model, optimizer, lr=lambda step: lr, weight_decay=lambda step: 0.0)


def toy(seed=0):
    torch.manual_seed(seed)
    return Toy().double()


JOINT = joint_objective(Losses(exit_weights=[1.0, 0.5], smoothing=0.0))


# Training


def test_a_toy_learns_what_is_separable():
    model, split = toy(), dark_and_bright(40)
    loader, update = loader_of(split, 8), make_update(model)
    epochs = []
    for epoch in range(6):
        loader.start(epoch)
        epochs.append(train_one_epoch(model, loader, JOINT, update, CPU, epoch=Epoch(epoch)))
    assert update.step == 6 * 5
    assert epochs[-1]["loss"] < 0.1 * epochs[0]["loss"]
    assert epochs[-1]["acc1/exit0"] == epochs[-1]["acc1/exit1"] == 1.0
    tables = evaluate(model, in_order(split, 11), CPU)
    assert tables.correct.all() and not model.training


def scripted(model, images, targets):
    """The loss is the first pixel of the batch; exit 0 always says class 0 and exit 1 class 1.

    They give that class a probability of e / (e + 1)."""
    zeros = torch.tensor([[1.0, 0.0]]).expand(len(images), 2)
    yield images[0, 0, 0, 0], [zeros, 1 - zeros]


def test_means_are_over_samples_not_batches():
    batches = [
        (torch.full((3, 3, 2, 2), 1.0), torch.tensor([0, 0, 1])),
        (torch.full((1, 3, 2, 2), 5.0), torch.tensor([1])),
        (torch.full((2, 3, 2, 2), 2.0), torch.tensor([0, 0])),
    ]
    losses, reports = [], []
    means = train_one_epoch(
        nn.Identity(), batches, scripted, lambda loss: losses.append(loss.item()), CPU, print_freq=2,
        on_print=reports.append,
    )  # fmt: skip
    assert losses == [1.0, 5.0, 2.0]
    (first, last), right, wrong = reports, math.log(1 + math.exp(-1)), math.log(1 + math.e)
    half = {"loss": 8 / 4, "acc1/exit0": 2 / 4, "acc1/exit1": 2 / 4}
    half |= dict.fromkeys(("loss/exit0", "loss/exit1"), (right + wrong) / 2)
    assert first.pop("images_per_s") > 0 and first == pytest.approx(half)
    assert means == pytest.approx(
        {
            "loss": 12 / 6,
            "loss/exit0": (4 * right + 2 * wrong) / 6,
            "loss/exit1": (2 * right + 4 * wrong) / 6,
            "acc1/exit0": 4 / 6,
            "acc1/exit1": 2 / 6,
        }
    )
    assert last.pop("images_per_s") > 0 and last == means


def test_soft_targets_have_no_accuracy():
    batches = [(torch.ones(2, 3, 2, 2), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))]
    means = train_one_epoch(nn.Identity(), batches, scripted, lambda loss: None, CPU)
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    soft = {"loss/exit0": 0.75 * right + 0.25 * wrong, "loss/exit1": 0.25 * right + 0.75 * wrong}
    assert means == pytest.approx({"loss": 1.0, **soft})


def test_an_objective_may_take_a_batch_in_parts():
    def two_steps(model, images, targets):
        yield from scripted(model, images[:1], targets[:1])
        yield from scripted(model, 3 * images[1:], targets[1:])

    # Exit 0 answers class 0, exit 1 another: right once each.
    batches = [(torch.full((n, 3, 2, 2), float(n)), torch.tensor([0] + (n - 1) * [1])) for n in (2, 3)]
    losses = []
    means = train_one_epoch(nn.Identity(), batches, two_steps, lambda loss: losses.append(loss.item()), CPU)
    assert losses == [2.0, 6.0, 3.0, 9.0]
    assert means["loss"] == (2 + 6 + 3 + 2 * 9) / 5
    assert (means["acc1/exit0"], means["acc1/exit1"]) == (2 / 5, 3 / 5)


def test_losses_of_exits_cost_one_forward_pass_and_no_gradient():
    split, calls = dark_and_bright(8), []
    model = toy()
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    update = make_update(model, lr=0.0)
    means = train_one_epoch(model, loader_of(split, 4), JOINT, update, CPU)
    assert calls == [True, True]
    tables = evaluate(model, in_order(split, 8), CPU)
    losses = [means[f"loss/exit{k}"] for k in range(2)]
    assert losses == pytest.approx(tables.loss.double().mean(1).tolist(), rel=1e-5)
    assert means["loss"] == pytest.approx(losses[0] + 0.5 * losses[1], rel=1e-5)


def test_the_second_loss_sees_the_first_update():
    model = toy()

    def twice(model, images, targets):
        for part in (slice(0, 4), slice(4, 8)):
            yield from JOINT(model, images[part], targets[part])

    split, losses = dark_and_bright(8), []
    update = make_update(model)
    train_one_epoch(
        model, loader_of(split, 8), twice, lambda loss: (losses.append(loss.item()), update(loss)), CPU
    )
    assert update.step == 2 and losses[1] < losses[0]


@pytest.mark.parametrize(("print_freq", "batches_run"), [(2, 4), (50, 6)])
def test_a_loss_that_is_not_finite_stops_at_the_next_report_and_names_its_images(print_freq, batches_run):
    names = loader_of(dark_and_bright(60), 10, epoch=3).names(2)
    loader = loader_of(with_black(60, number_of(names[4])), 10, epoch=3)
    model, updates = toy(), []
    update = make_update(model)
    with pytest.raises(ValueError) as error:
        train_one_epoch(
            model,
            loader,
            JOINT,
            lambda loss: (updates.append(loss), update(loss)),
            CPU,
            epoch=Epoch(3),
            print_freq=print_freq,
        )
    shown = f"{', '.join(names[:8])} and 2 more"
    assert str(error.value) == f"the loss is not finite at epoch 4, batch 2, process 0: {shown}"
    assert len(updates) == batches_run


# Evaluation


class Mirror(MultiExitModel):
    """Exit 0 answers (x, -x, 0 ...) for the first pixel x in -1..1 of an image, exit 1 (-2x, 2x, 0 ...); 7
    classes."""

    num_exits = 2

    def begin(self, images):
        return images[:, 0, 0, 0]

    def trunk(self, k, state):
        return state, state

    def head(self, k, features):
        x = (2 * features if k else features)[:, None]
        return torch.cat([-x, x, 0 * x] if k else [x, -x, 0 * x], 1)


def grey_levels(levels, labels):
    pixels = np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), 32, 32, 3))
    return Split(ArrayImages(pixels, labels, "grey"), None, corner)


def test_the_table_is_in_order_and_exact():
    levels, labels = [255, 0, 200, 100, 250, 30, 180], [0, 0, 1, 1, 1, 0, 2]
    loader = in_order(grey_levels(levels, labels), 2)
    tables = evaluate(Mirror(), loader, CPU)
    x = torch.tensor(levels) / 127.5 - 1
    for k, scaled in enumerate((x, -2 * x)):
        logits = torch.stack([scaled, -scaled, 0 * x], 1).double()
        torch.testing.assert_close(
            tables.confidence[k].double(), logits.softmax(1).amax(1), rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(
            tables.loss[k].double(), -logits.log_softmax(1)[range(7), labels], rtol=1e-5, atol=1e-6
        )
    # Exit 0 says class 0 for bright images and 1 for dark ones; exit 1 the reverse.
    assert tables.correct.tolist() == [[1, 0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1, 0]]
    assert tables.correct5.all()  # of three classes
    figures = summarise(tables)
    assert figures["acc1/exit0"] == pytest.approx(2 / 7) and figures["acc1/exit1"] == pytest.approx(4 / 7)
    assert figures["acc5/exit0"] == 1.0 and figures["loss/exit1"] == pytest.approx(
        tables.loss[1].mean().item()
    )
    assert len(figures) == 6


def test_the_confidence_asked_for_is_in_the_table():
    loader = in_order(grey_levels([255, 0], [0, 0]), 2)
    tables = evaluate(Mirror(), loader, CPU, reading="margin")
    top, second = torch.tensor([1.0, 0.0, -1.0]).softmax(0)[:2].tolist()
    assert tables.confidence[0].tolist() == pytest.approx([top - second] * 2)


class Spoilt(Mirror):
    """`Mirror` whose exit 1 gives `value` for class 1 where the image is black."""

    def __init__(self, value=torch.nan):
        super().__init__()
        self.value = value

    def head(self, k, features):
        logits = super().head(k, features)
        logits[:, 1] = torch.where((features == -1) & (k == 1), self.value, logits[:, 1])
        return logits


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_stop_and_name_network_exit_and_image(value):
    split, message = (
        grey_levels([9, 8, 7, 6, 0, 5], [0] * 6),
        "Spoilt gives the logit {} at exit 1 for grey[4]",
    )
    for images in (split, Subset(split, [2, 3, 1, 4, 5])):
        with pytest.raises(ValueError) as error:
            evaluate(Spoilt(value), in_order(images, 2), CPU, title="test_ema")
        assert str(error.value) == f"test_ema: {message.format(value)}"


def test_evaluation_keeps_no_tensor_of_a_batch():
    """Small tensors that outlive their batch leave holes that the next batch's logits do not fit into."""
    alive = []

    class Batches(list):
        def __iter__(self):
            for batch in super().__iter__():
                alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
                yield batch

    batches = Batches([(torch.rand(3, 3, 2, 2), torch.tensor([0, 1, 2]))] * 9)
    tables = evaluate(Mirror(), batches, CPU)
    assert len(tables) == 27 and len({*alive[2:]}) == 1
    for column in vars(tables).values():
        assert column.untyped_storage().nbytes() == column.numel() * column.element_size()


# Two processes


def train_three_steps(compute, batch_size):
    """Weights after an epoch of three global batches of eight, and its means."""
    network = toy(seed=compute.rank)  # the first process's weights count
    model = DistributedDataParallel(network) if compute.world_size > 1 else network
    loader = loader_of(dark_and_bright(25), batch_size, compute)
    means = train_one_epoch(model, loader, JOINT, make_update(model), compute)
    objective = JOINT(model, *(compute.put(t) for t in next(iter(loader))))
    next(objective)[0].backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {"steps": len(loader), "weights": network.state_dict(), "means": means, "gradients": gradients}


def tables_of_sizes(compute):
    tables = {}
    for size in SIZES:
        split = dark_and_bright(size)
        loader = in_order(split, 1, compute)
        table = evaluate(toy(), loader, compute)
        tables[size] = {name: getattr(table, name) for name in ("confidence", "correct", "correct5", "loss")}
    return tables


def message_of_bad_loss(compute, black):
    """What a process says when only the process that reads sample `black` meets a loss that is not a
    number."""
    network = toy()
    model, seen = DistributedDataParallel(network), []
    update = make_update(model)
    loader = loader_of(with_black(48, black), 4, compute)
    try:
        train_one_epoch(
            model, loader, JOINT, lambda loss: (seen.append(loss.isfinite().item()), update(loss)), compute,
            print_freq=3,
        )  # fmt: skip
    except ValueError as error:
        return {"message": str(error), "finite": seen}
    return {}


def message_of_bad_logits(compute):
    """What a process says when only process 1 meets logits that are not finite."""
    split = grey_levels([9, 8, 7, 0, 5], [0] * 5)
    try:
        evaluate(Spoilt(), in_order(split, 1, compute), compute)
    except ValueError as error:
        return str(error)
    return ""


def black_sample():
    """A sample that process 1 of 2 reads in its batch 1."""
    loader = loader_of(dark_and_bright(48), 4, Compute(torch.device("cpu"), rank=1, world_size=2))
    return number_of(loader.names(1)[2])


def worker(folder):
    """One of two processes: everything at once, because starting processes takes seconds."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    compute = Compute(torch.device("cpu"), rank=rank, world_size=2)
    results = {"trained": train_three_steps(compute, 4), "tables": tables_of_sizes(compute)}
    results["stopped"] = message_of_bad_loss(compute, black_sample())
    results["logits"] = message_of_bad_logits(compute)
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def both(in_processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    in_processes(2, worker, str(folder))
    return [SimpleNamespace(**torch.load(folder / f"{rank}.pt", weights_only=True)) for rank in range(2)]


def test_two_processes_learn_as_one_with_twice_the_batch(both):
    alone = train_three_steps(CPU, 8)  # its batches are the unions of the two processes' batches
    for process in both:
        assert process.trained["steps"] == alone["steps"] == 3
        for what in ("weights", "gradients"):
            torch.testing.assert_close(process.trained[what], alone[what], rtol=0, atol=1e-6)
        assert process.trained["means"] == pytest.approx(alone["means"], abs=1e-9)
    assert not torch.equal(alone["weights"]["body.0.weight"], toy().body[0].weight)


@pytest.mark.parametrize("size", SIZES)
def test_two_processes_make_the_table_of_one(both, size):
    alone = tables_of_sizes(CPU)[size]
    assert alone["correct"].shape == (2, size)
    for process in both:
        for name, column in alone.items():
            torch.testing.assert_close(process.tables[size][name], column, rtol=0, atol=1e-6)


def test_a_bad_loss_on_one_process_stops_both_with_the_same_message(both):
    loader = loader_of(dark_and_bright(48), 4, Compute(torch.device("cpu"), rank=1, world_size=2))
    names = ", ".join(loader.names(1))
    assert both[0].stopped["message"] == f"the loss is not finite at epoch 1, batch 1, process 1: {names}"
    assert both[1].stopped["message"] == both[0].stopped["message"]
    assert [process.stopped["finite"][:2] for process in both] == [[True, True], [True, False]]
    assert [len(process.stopped["finite"]) for process in both] == [3, 3]


def test_bad_logits_on_one_process_stop_both_with_the_same_message(both):
    said = "evaluate: Spoilt gives the logit nan at exit 1 for grey[3]"
    assert [process.logits for process in both] == [said, said]
