"""Training by the command line with sample weights, regimes, teachers and frozen parts."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_earlyExit
from experiment import classifier
from experiment.options import fill, parse
from models import create_model
from training.l2w import Weighting
from training.optim import Optimization, make_update

pytestmark = pytest.mark.usefixtures("costs_once", "no_pictures")
train = main_earlyExit.main
PLAIN = shlex.split("--mixup 0 --cutmix 0 --aa none --color_jitter 0 --reprob 0 --smoothing 0")


def read_json(path):
    return json.loads(path.read_text())


SHORT = [
    *PLAIN,
    *shlex.split("--batch_size 16 --warmup_epochs 0 --lr 0.01 --disable_eval true"),
]  # two batches an epoch
WEIGHTED = shlex.split("--l2w true --meta_net_hidden_size 8 --meta_lr 0.01 --l2w_tables 1 --epochs 2")


def stopped_before(epoch, monkeypatch, words):
    """Trains until an epoch, and then what is left in another process's state."""
    train_one_epoch = classifier.train_one_epoch

    def stopped(*args, **options):
        if options["epoch"].number == epoch:
            raise KeyboardInterrupt
        return train_one_epoch(*args, **options)

    monkeypatch.setattr(classifier, "train_one_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(words)
    monkeypatch.undo()
    torch.rand(7)
    train(words)


@pytest.fixture
def check_same(read_log, last_of):
    def check(out, other, *keys):
        """Two runs ended the same."""
        contents = [last_of(folder) for folder in (out, other)]
        for key in ("model", "optimizer", *keys):
            torch.testing.assert_close(contents[0][key], contents[1][key], rtol=0, atol=0)
        lines = [[{**line, "seconds": 0} for line in read_log(folder)] for folder in (out, other)]
        assert lines[0] == lines[1] and contents[0]["step"] == contents[1]["step"]

    return check


@pytest.fixture(scope="module")
def weighted(images, tmp_path_factory, on):
    """The folder of a run that learned sample weights; per epoch, what its two exits lost per image, and the
    rates."""
    out, seen, train_one_epoch = tmp_path_factory.mktemp("weighted"), [], classifier.train_one_epoch

    def watched(model, loader, objective, update, *rest, **options):
        rows, rates = [], []

        def noting(model, images, targets):
            done = 0
            for loss, exits in objective(model, images, targets):
                part = targets[done : done + len(exits[0])]
                losses = [F.cross_entropy(y.detach(), part, reduction="none").half() for y in exits]
                rows.extend(zip(part.tolist(), *(column.tolist() for column in losses), strict=True))
                rates.append(update.optimizer.param_groups[0]["lr"])
                done += len(part)
                yield loss, exits

        means = train_one_epoch(model, loader, noting, update, *rest, **options)
        seen.append((rows, rates))
        return means

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "train_one_epoch", watched)
        train(on(*SHORT, *WEIGHTED, "--output_dir", out, "--log_dir", out / "board"))
    return out, seen


def test_a_run_with_sample_weights_steps_twice_a_batch_at_one_rate(weighted, read_log, last_of):
    out, seen = weighted
    assert last_of(out)["step"] == 2 * 2 * 2 and last_of(out)["l2w"]["batch"] == 2 * 2
    rates = [rate for _, epoch in seen for rate in epoch]
    assert rates[::2] == rates[1::2] and rates[::2] == pytest.approx(
        [1e-6 + (0.01 - 1e-6) * share for share in (1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5)]
    )
    lines = read_log(out)
    assert all({"l2w/meta_loss", "l2w/negative_weights", "l2w/meta_lr"} <= line.keys() for line in lines)
    assert [line["l2w/meta_lr"] for line in lines] == pytest.approx([0.005, 0])  # of the next batch


@pytest.mark.parametrize("words", ["--warmup_steps 4", "--warmup_epochs 1 --epochs 2"])
@pytest.mark.parametrize("update_freq", [1, 2])
def test_warm_up_with_sample_weights_is_counted_in_optimizer_steps(words, update_freq):
    flags = f"--l2w true --epochs 2 --lr 0.3 --schedule constant --update_freq {update_freq} {words}"
    given = parse([Optimization, Weighting], flags.split()).values
    update = make_update(
        torch.nn.Linear(2, 2), fill(Optimization, given), steps=4, losses_per_batch=2
    )  # four steps an epoch
    rates = [update.lr(step) for step in range(5)]
    assert rates == pytest.approx([0, 0, 0.3, 0.3, 0.3] if update_freq == 1 else [0, 0.1, 0.2, 0.3, 0.3])


def test_tables_of_sample_weights_are_of_every_training_image_once(weighted, last_of):
    out, seen = weighted
    assert {path.name for path in out.glob("*.npz")} == {"l2w-1.npz", "l2w-2.npz"}
    held_out = set(last_of(out)["calib_indices"])
    for epoch, (rows, _) in enumerate(seen, 1):
        tables = np.load(out / f"l2w-{epoch}.npz")
        assert tables["index"].tolist() == sorted(set(range(40)) - held_out)
        assert {name: tables[name].shape for name in ("weights", "losses", "confidence")} == dict.fromkeys(
            ("weights", "losses", "confidence"), (32, 2)
        )
        # The class of the image that a row is said to be of is the one that it was trained with.
        named = zip((tables["index"] // 20).tolist(), *tables["losses"].T.tolist(), strict=True)
        assert sorted(named) == sorted(rows)
        assert np.allclose(tables["weights"].sum(1), 2, atol=2e-3) and np.ptp(tables["weights"]) > 0.01


def test_a_last_partial_batch_is_cut_into_halves_too(on, tmp_path, last_of):
    words = shlex.split("--l2w true --meta_net_hidden_size 8 --l2w_tables 1 --epochs 1 --drop_last false")
    for batch_size, batches, rows in ((14, 3, 32), (15, 2, 30)):  # left over are 4 images, and 2
        out = tmp_path / str(batch_size)
        train(on(*SHORT, *words, "--batch_size", batch_size, "--output_dir", out))
        assert last_of(out)["step"] == 2 * batches and last_of(out)["l2w"]["batch"] == batches
        index = np.load(out / "l2w-1.npz")["index"]
        assert len(index) == len(set(index)) == rows


def test_sample_weights_are_on_the_board(weighted, read_log):
    board = EventAccumulator(str(weighted[0] / "board"), {"histograms": 0})
    board.Reload()
    names = {f"l2w/{table}/exit{k}" for table in ("weights", "losses", "confidence") for k in range(2)}
    assert set(board.Tags()["histograms"]) == names
    steps = [(event.step, event.histogram_value.num) for event in board.Histograms("l2w/weights/exit1")]
    assert steps == [(4, 32.0), (8, 32.0)]
    for line, step, k in zip(read_log(weighted[0]), (4, 8), (0, 1), strict=True):
        for name in ("meta_loss", "negative_weights", "meta_lr"):
            event = board.Scalars(f"l2w/{name}")[k]
            assert (event.step, event.value) == (step, pytest.approx(line[f"l2w/{name}"], abs=1e-8))


def test_a_resumed_run_with_sample_weights_equals_an_unbroken_one(
    weighted, tmp_path, monkeypatch, on, check_same
):
    stopped_before(1, monkeypatch, on(*SHORT, *WEIGHTED, "--output_dir", tmp_path))
    check_same(tmp_path, weighted[0], "l2w")
    for name in ("l2w-1.npz", "l2w-2.npz"):
        assert (tmp_path / name).read_bytes() == (weighted[0] / name).read_bytes()


def test_a_plain_run_may_go_on_with_sample_weights(trained, tmp_path, capsys, on, last_of):
    words = [*SHORT, *WEIGHTED, "--epochs", 3, "--output_dir", tmp_path, "--regime", "equilibrium"]
    train(on(*words, "--resume", trained / "checkpoint-last.pth"))
    assert re.search(
        r"^checkpoint \S+ holds no weight net: it starts anew$", capsys.readouterr().out, re.MULTILINE
    )
    content = last_of(tmp_path)
    # Two epochs of the stored run had other steps; rates are those of the third epoch all the same.
    assert (content["epoch"], content["step"], content["l2w"]["batch"]) == (2, 3 * 4, 3 * 2)


def test_disjoint_training_freezes_the_trunk_and_can_be_resumed(tmp_path, monkeypatch, on, check_same):
    words = on(*SHORT, *shlex.split("--regime disjoint --epochs 2 --opt sgd"), "--output_dir")
    train([*words, str(tmp_path / "whole")])
    first, last = (
        torch.load(tmp_path / "whole" / f"checkpoint-{name}.pth", weights_only=True)["model"]
        for name in (1, "last")
    )
    for name, value in first.items():
        assert torch.equal(value, last[name]) == (not name.startswith("classifier")), name
    stopped_before(1, monkeypatch, [*words, str(tmp_path / "parts")])
    check_same(tmp_path / "whole", tmp_path / "parts")


def test_published_weights_are_fine_tuned_under_new_heads_on_a_frozen_backbone(tmp_path, capsys, on, last_of):
    torch.manual_seed(0)
    size = {"input_ch": 4, "final_ch": 16}
    published = create_model("rexnetv1", num_classes=1000, **size).state_dict()
    torch.save(published, tmp_path / "rexnetv1_1.0.pth")
    network = "--model rexnet_ee_100 --input_ch 4 --final_ch 16 --head_width 8 --freeze_backbone true"
    flags = shlex.split(
        f"--finetune {tmp_path}/rexnetv1_1.0.pth --output_dir {tmp_path}/run --epochs 1 --weight_decay 0"
    )
    train([*network.split(), *on(network=[]), *flags, "--lr_scales", "output=0.5"])
    assert "initialised anew: output, exits" in capsys.readouterr().out
    after = last_of(tmp_path / "run")["model"]
    kept = [key for key in published if key.startswith("features")]
    assert kept and all(torch.equal(published[key], after[key]) for key in kept)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--freeze_backbone true --regime mixed", "--freeze_backbone true trains heads, jointly"),
        (
            "--lr_scales bloc_=0.1",
            "no parameter's name starts with 'bloc_'; they start with blocks, classifier",
        ),
        ("--lr_scales blocks", "learning rate scale 'blocks': give START=FACTOR"),
    ],
)
def test_what_cannot_be_frozen_or_scaled_is_said(words, message, on):
    with pytest.raises(ValueError, match=message):
        train(on(*shlex.split(words)))


def test_mixed_training_goes_from_the_last_exit_to_all(tmp_path, on, read_log):
    words = shlex.split("--regime mixed --first_share 0.67 --epochs 3 --weight_decay 0 --save_ckpt_num 9")
    train(on(*SHORT, *words, "--output_dir", tmp_path))
    contents = [
        torch.load(tmp_path / f"checkpoint-{epoch}.pth", weights_only=True)["model"] for epoch in (1, 2, 3)
    ]
    for name, moves in (("classifier.0.linear.weight", False), ("classifier.1.linear.weight", True)):
        assert torch.equal(contents[0][name], contents[1][name]) != moves
        assert not torch.equal(contents[1][name], contents[2][name])
    assert (
        read_log(tmp_path)[2]["train/loss"] > 1.3 * read_log(tmp_path)[1]["train/loss"]
    )  # of two exits, and of one


def test_a_teacher_adds_to_the_loss_of_all_exits(trained, tmp_path, on, read_log, last_of):
    losses = []
    for name, teacher in (
        ("alone", []),
        ("taught", ["--kd_teacher", trained / "checkpoint-last.pth", "--T_kd", 2]),
    ):
        train(on(*SHORT, "--epochs", 1, "--batch_size", 32, "--output_dir", tmp_path / name, *teacher))
        losses.append(
            read_log(tmp_path / name)[0]["train/loss"]
        )  # of one step: the same answers, the same labels
    assert losses[1] > losses[0] + 1e-3
    assert last_of(tmp_path / "taught")["model"].keys() == last_of(trained)["model"].keys()


def test_a_boosted_network_is_trained_and_evaluated(tmp_path, on, read_log, evaluate_into, last_of):
    words = shlex.split("--model boosted/msdnet --reweight 0.7 --epochs 1 --disable_eval false")
    train(on(*SHORT, *words, "--output_dir", tmp_path))
    arch = last_of(tmp_path)["arch"]
    assert arch["name"] == "boosted/msdnet" and (arch["options"]["reweight"], arch["options"]["nBlocks"]) == (
        0.7,
        2,
    )
    evaluate_into(tmp_path / "out", tmp_path / "checkpoint-last.pth", "--row", 3)
    (line,) = read_log(tmp_path)
    exits, runtime = (read_json(tmp_path / "out" / f"{name}.json") for name in ("anytime", "runtime"))
    assert [row["acc1"] for row in exits] == pytest.approx([line[f"test/acc1/exit{k}"] for k in range(2)])
    assert [row["loss"] for row in exits] == pytest.approx(
        [line[f"test/loss/exit{k}"] for k in range(2)], abs=1e-6
    )
    assert runtime["points"][0]["mismatches"]["throughput"] <= 1


def test_a_weight_net_of_another_size_is_not_resumed(weighted, error_of, on):
    words = [*SHORT, *WEIGHTED, "--meta_net_input_type", "both", "--resume", weighted[0] / "checkpoint-1.pth"]
    line = error_of(train, *on(*words))
    assert re.match(
        r"l2w of checkpoint \S+ does not fit this run's: size mismatch for first_hidden_lay", line
    )
