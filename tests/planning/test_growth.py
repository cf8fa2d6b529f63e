import pytest

from diffusion_jax.planning import growth, programs

CHIP = programs.Chip(flops=100e12, hbm=2**34, bandwidth=1e12, links=100e9, pod=64)


def test_a_step_on_other_numbers_of_devices():
    """64 images, compiled for 4 devices, of 1e9 parameters; one all-reduce of 4 GB."""
    per_device = {"flops": 16 * 1e12, "hbm_bytes": 40e9 + 16 * 1e9}
    sizes = growth.sizes(CHIP, per_device, 16, 4, 10**9, 64)
    assert [size.devices for size in sizes] == [1, 2, 4, 8, 16, 32, 64]
    one, _, four, *_, most = sizes
    assert one.seconds == one.compute == pytest.approx(0.64) and one.links == 0 and one.efficiency == 1
    assert four.compute == pytest.approx(0.16) and four.links == pytest.approx(2 * 4e9 * 3 / 4 / 100e9)
    assert four.efficiency == pytest.approx(0.64 / (4 * 0.22))
    assert most.images == 1 and most.compute == pytest.approx(
        0.041
    )  # the bytes: 40e9 of the parameters, 1e9 of an image
    assert growth.pays(sizes).devices == 8 and growth.pays(sizes, 0.99).devices == 1


def test_a_device_has_at_least_an_image_and_a_pod_ends():
    per_device = {"flops": 1e12, "hbm_bytes": 1e9}
    assert [size.devices for size in growth.sizes(CHIP, per_device, 3, 1, 1000, 64)] == [1, 2]
    assert [size.devices for size in growth.sizes(CHIP, per_device, 64, 1, 1000, 4)] == [1, 2, 4]


def test_a_program_that_moves_less_than_the_update_moves_nothing_for_an_image():
    few = growth.sizes(CHIP, {"flops": 1.0, "hbm_bytes": 10e9}, 8, 1, 10**9, 8)
    assert [size.compute for size in few] == pytest.approx([0.01] * 4)
