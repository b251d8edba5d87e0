"""How samples are dealt to ranks."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from train.data import EpochSampler

seeds = st.integers(0, 2**32)
epochs = st.integers(0, 50)


@given(st.integers(1, 200), st.integers(1, 10), st.sampled_from([1, 2, 4]), seeds, epochs, st.data())
def test_ranks_share_one_order_and_go_on_in_it(
    n: int, share: int, world: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    batch = share * world
    assume(n >= batch)
    alone = EpochSampler(n, batch, seed=seed)
    steps = (epoch * alone.steps, (epoch + 1) * alone.steps)
    ranks = [list(EpochSampler(n, batch, r, world, seed).between(*steps)) for r in range(world)]
    together = [[key for part in parts for key in part] for parts in zip(*ranks, strict=True)]
    assert together == list(alone.between(*steps))
    videos = [i for keys in together for _, i in keys]
    assert all(e == epoch for keys in together for e, _ in keys)
    assert len(videos) == len(set(videos)) == n - n % batch and set(videos) <= set(range(n))
    assert alone.dropped == n % batch and len(together) == alone.steps == len(alone) == n // batch
    # Resuming gives the remainder, through the ends of epochs.
    total = 3 * alone.steps
    whole, step = list(alone.between(0, total)), data.draw(st.integers(0, total))
    assert list(alone.between(step, total)) == whole[step:] and list(alone) == whole[: alone.steps]


def test_epochs_and_seeds_shuffle_anew() -> None:
    (first, second), (other,) = (list(EpochSampler(50, 50, seed=s).between(0, 2 - s)) for s in (0, 1))
    orders = [[i for _, i in batch] for batch in (first, second, other)]
    assert len({tuple(o) for o in orders}) == 3 and all(o != sorted(o) for o in orders)
