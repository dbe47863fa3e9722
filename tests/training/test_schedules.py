"""Learning rates, weight decay and micro-batches of a step."""

import pytest

from training.schedules import lr_at, micro_batches_at, weight_decay_at


def rates(count, **options):
    defaults = {"schedule": "cosine", "base": 1.0, "minimum": 0.2, "warmup_steps": 0, "total_steps": count}
    return [lr_at(step, **(defaults | options)) for step in range(count)]


def test_lr_warms_up_to_base_then_follows_the_cosine():
    # 3 warm-up steps with both ends, then i = 0 .. 3 of 4 quarter turns from 1 to 0.2
    expected = [0.0, 0.5, 1.0, 1.0, 0.6 + 0.4 * 2**-0.5, 0.6, 0.6 - 0.4 * 2**-0.5]
    assert rates(7, warmup_steps=3) == pytest.approx(expected)


def test_lr_after_the_last_step_stays_at_the_minimum():
    cosine = {"schedule": "cosine", "base": 1.0, "minimum": 0.2, "warmup_steps": 0, "total_steps": 4}
    assert lr_at(4, **cosine) == pytest.approx(0.2)
    assert lr_at(9, **cosine) == pytest.approx(0.2)


def test_lr_multistep_drops_at_each_milestone():
    options = {"schedule": "multistep", "milestones": (3, 5), "decay_rate": 0.1}
    assert rates(7, warmup_steps=2, **options) == pytest.approx([0, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_lr_constant_after_warmup():
    assert rates(4, schedule="constant", warmup_steps=2) == [0, 1, 1, 1]


def test_lr_linear_is_a_triangle_that_ends_at_the_minimum():
    assert rates(8, schedule="linear", warmup_steps=3) == pytest.approx([0, 0.5, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert lr_at(9, schedule="linear", base=1.0, minimum=0.2, warmup_steps=3, total_steps=8) == 0.2
    assert rates(1, schedule="linear") == [1.0]


@pytest.mark.parametrize("warmup", [1, 4, 99])
def test_lr_warmup_of_any_length_is_clipped_to_the_run(warmup):
    assert rates(4, warmup_steps=warmup)[0] == 0
    assert max(rates(4, warmup_steps=warmup)) == 1.0
    assert lr_at(1, schedule="cosine", base=1.0, minimum=0.2, warmup_steps=warmup, total_steps=1) > 0


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'stairs'.*cosine, multistep, linear, constant"):
        rates(1, schedule="stairs")


def test_weight_decay_is_constant_or_a_cosine_without_warmup():
    assert weight_decay_at(3, base=0.1, end=None, total_steps=4) == 0.1
    assert [weight_decay_at(i, base=0.1, end=0.5, total_steps=4) for i in (0, 2, 4)] == pytest.approx(
        [0.1, 0.3, 0.5]
    )


def test_only_the_last_step_of_an_epoch_has_the_rest():
    assert [micro_batches_at(4, 3, 2, step) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    assert [micro_batches_at(4, 3, 0, step) for step in range(6)] == [4] * 6
