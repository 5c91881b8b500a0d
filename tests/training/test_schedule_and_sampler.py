"""The learning-rate schedule and the order of examples."""

from v2l_fast.training.sampler import EpochSampler
from v2l_fast.training.schedule import trapezoid


def test_trapezoid_rises_stays_and_falls():
    values = [trapezoid(step, 100, 10, 0.4) for step in range(101)]
    assert values[0] == 0.1 and values[9] == 1.0
    assert all(v == 1.0 for v in values[9:61])
    assert values[80] == 0.5 and values[100] == 0.0
    assert values[60:] == sorted(values[60:], reverse=True)


def test_an_epoch_shows_every_example_once():
    sampler = EpochSampler(examples=10, batch=4, seed=1)
    seen = [i for _ in range(5) for i in sampler.next()]
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:])
    assert seen[:10] != seen[10:]


def test_batches_cross_epochs_at_full_size():
    sampler = EpochSampler(examples=3, batch=8, seed=1)
    assert len(sampler.next()) == 8


def test_restored_sampler_continues():
    first = EpochSampler(examples=7, batch=3, seed=5)
    for _ in range(4):
        first.next()
    second = EpochSampler(examples=7, batch=3, seed=5)
    second.restore(first.state())
    assert [first.next() for _ in range(6)] == [second.next() for _ in range(6)]
