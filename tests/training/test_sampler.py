"""The order of videos is a function of the step."""

from v2l_fast.training.sampler import EpochOrder


def test_an_epoch_shows_every_video_once():
    order = EpochOrder(videos=10, batch_size=4, seed=1)
    seen = [i for step in range(5) for i in order.batch(step)]
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:])
    assert seen[:10] != seen[10:]


def test_batches_cross_epochs_at_full_size():
    batch = EpochOrder(videos=3, batch_size=8, seed=1).batch(0)
    assert len(batch) == 8
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


def test_any_step_can_be_asked_for():
    forward = EpochOrder(videos=7, batch_size=3, seed=5)
    batches = [forward.batch(step) for step in range(9)]
    again = EpochOrder(videos=7, batch_size=3, seed=5)
    assert [again.batch(step) for step in reversed(range(9))] == batches[::-1]
    assert EpochOrder(videos=7, batch_size=3, seed=6).batch(0) != batches[0]


def test_the_parts_of_processes_are_the_batch():
    order = EpochOrder(videos=20, batch_size=12, seed=0)
    for processes in (1, 2, 3, 5, 6, 7, 12):
        parts = [order.share(4, rank, processes) for rank in range(processes)]
        assert [i for part in parts for i in part] == order.batch(4)
        assert {len(part) for part in parts} == {12 // processes, -(-12 // processes)}
