import numpy as np
import pytest
from conftest import Examples, assert_same

from diffusion_jax.data import order, pipeline

IMAGES = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 1), np.uint8)
NUMBERED = Examples(IMAGES, 100 + np.arange(20))


def batches(**options):
    return pipeline.batches(NUMBERED, **{"seed": 0, "batch_size": 8} | options)


def numbers(batch):
    return batch["image"][:, 0, 0, 0]


def test_each_epoch_holds_every_image_once_in_its_own_order():
    dataset = batches(batch_size=4)
    epochs = [[int(x) for step in range(5 * epoch, 5 * epoch + 5) for x in numbers(dataset[step])] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(20))


def test_labels_stay_with_their_images():
    np.testing.assert_array_equal(batches()[3]["label"], 100 + numbers(batches()[3]))
    assert pipeline.batches(Examples(IMAGES), seed=0, batch_size=8)[0].keys() == {"image"}


def test_batches_depend_on_the_seed():
    assert not np.array_equal(numbers(batches(seed=1)[0]), numbers(batches()[0]))
    assert_same(batches()[3], batches()[3])


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_processes(processes):
    for step in (0, 3, 1000):
        shares = [batches(process_index=p, process_count=processes)[step] for p in range(processes)]
        whole = {name: np.stack([share[name] for share in shares], axis=1) for name in ("image", "label")}
        assert_same({name: array.reshape(8, *array.shape[2:]) for name, array in whole.items()}, batches()[step])


def test_batches_follow_the_order():
    for step in (0, 4, 1000):
        expected = order.shuffled(8 * step + np.arange(8), 20, seed=0)
        np.testing.assert_array_equal(numbers(batches()[step]), expected)


def test_iterate_starts_anywhere():
    iterator = pipeline.iterate(batches(), 1001)
    for step in range(1001, 1010):
        assert_same(next(iterator), batches()[step])


def test_each_process_reads_its_share_alone():
    reads = []

    class Spy(Examples):
        def examples(self, indices):
            reads.append(len(indices))
            return super().examples(indices)

    pipeline.batches(Spy(IMAGES), seed=0, batch_size=8, process_index=1, process_count=4)[3]
    assert reads == [2]
