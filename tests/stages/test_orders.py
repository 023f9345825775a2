"""What processes tell each other round an iteration."""

from mlx_ppo.runtime.group import ALONE
from mlx_ppo.runtime.phases import Meter
from mlx_ppo.stages.orders import Spent, closing, held_up


def test_the_one_that_all_others_wait_for_is_found() -> None:
    def slow(*seconds: float) -> int | None:
        return held_up([Spent(1, one) for one in seconds])

    assert slow(1.0, 1.1) is None and slow(1.0, 10.0) == 1 and slow(10.0, 1.0, 1.2) == 0
    assert slow(1.0, 10.0, 9.0) is None  # two are slow: it is the first that is quick
    assert slow(0.001, 0.01) is None  # too short to tell


def test_an_iteration_is_closed_with_what_it_took() -> None:
    meter = Meter({}, clearing=False)
    meter.peaks, meter.seconds = {"rollout": 5, "update policy": 7}, {"rollout": 0.5, "update policy": 0.25}
    assert closing(ALONE, meter) == [Spent(7, 0.75)]
