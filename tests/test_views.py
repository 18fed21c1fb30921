import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from factor_transfer.data.frames import Frame
from factor_transfer.data.views import crop_and_flip, evenly, hashed, held_out, permutation, random_resized_crop
from factor_transfer.util.seeds import part_seed

MASK = 2**64 - 1


def splitmix64(seed, place):
    """Place `place` of the published sequence, in Python integers."""
    z = (seed + (place + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def plain_view(image, index, view, seed, padding, hflip):
    """One image (3, H, W), one loop per pixel row, as the docstring says it."""

    def uniform(which):
        return (splitmix64(part_seed(seed, "view", view, which), index) >> 11) / 2**53

    _, height, width = image.shape
    top, left = (int(uniform(which) * (2 * padding + 1)) - padding for which in ("top", "left"))
    shown = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y + top < height and 0 <= x + left < width:
                shown[:, y, x] = image[:, y + top, x + left]
    return shown.flip(2) if uniform("flip") < hflip else shown


def noise(n, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


def photo(width=150, height=120, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def test_hashed__is_the_published_sequence():
    # The first numbers of splitmix64 from seed 1234567, as its author's program prints them.
    assert hashed(1234567, np.arange(3)).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert hashed(2**63 - 1, np.array([0, 2**40])).tolist() == [splitmix64(2**63 - 1, n) for n in (0, 2**40)]
    assert hashed(0, np.zeros((0,), np.int64)).shape == (0,)


def test_permutation__is_a_pure_function_of_its_arguments():
    first = permutation(3, 1, 1000)
    torch.manual_seed(0)
    np.random.seed(0)
    assert np.array_equal(first, permutation(3, 1, 1000))
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert first.dtype == np.int64
    for other in (permutation(3, 2, 1000), permutation(4, 1, 1000), np.arange(1000)):
        assert (first != other).mean() > 0.9
    plain = sorted(range(5), key=lambda place: splitmix64(part_seed(3, "order", 1), place))
    assert permutation(3, 1, 5).tolist() == plain


def test_held_out__takes_the_share_of_each_class_and_never_all():
    labels = np.repeat([0, 1, 2, 3], [100, 50, 3, 1])
    chosen = held_out(labels, 0.1, seed=5)
    assert np.bincount(labels[chosen], minlength=4).tolist() == [10, 5, 1, 0]
    assert np.array_equal(chosen, held_out(labels, 0.1, seed=5))
    assert not np.array_equal(chosen, held_out(labels, 0.1, seed=6))
    assert not held_out(labels, 0.999, seed=5)[labels == 2].all()


@settings(max_examples=60, deadline=None)
@given(
    classes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_evenly__takes_as_many_of_each_class_up_to_rounding(classes, share, seed):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(classes)), classes))
    count = max(len(classes), round(share * len(labels)))
    chosen = evenly(labels, count, seed)
    assert chosen.sum() == count
    assert np.array_equal(chosen, evenly(labels, count, seed))
    taken = np.bincount(labels[chosen], minlength=len(classes))
    assert taken.min() >= 1
    # A class gave less than the largest share only where it has no more, or for rounding.
    assert all(got == there or got >= taken.max() - 1 for got, there in zip(taken, classes, strict=True))
    if count < len(labels):
        assert chosen[evenly(labels, count + 1, seed)].sum() == count, "a smaller share lies within a larger one"


def test_evenly__chooses_others_for_another_seed():
    labels = np.repeat(np.arange(10), 100)
    first, second = evenly(labels, 100, 0), evenly(labels, 100, 1)
    assert 0 <= (first & second).sum() <= 40


@settings(max_examples=40, deadline=None)
@given(
    index=st.lists(st.integers(0, 2**40), min_size=0, max_size=6),
    view=st.integers(0, 300),
    seed=st.integers(0, 2**40),
    padding=st.integers(0, 5),
    hflip=st.sampled_from([0.0, 0.5, 1.0]),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels_last=st.booleans(),
)
def test_crop_and_flip__equals_a_plain_reference(index, view, seed, padding, hflip, size, channels_last):
    pixels = torch.randint(0, 256, (len(index), 3, *size), dtype=torch.uint8)
    given_pixels = pixels.contiguous(memory_format=torch.channels_last) if channels_last else pixels
    got = crop_and_flip(given_pixels, np.array(index, np.int64), view, seed, padding, hflip)
    assert got.shape == pixels.shape
    assert got.dtype == torch.uint8
    for place, one in enumerate(index):
        assert torch.equal(got[place], plain_view(pixels[place], one, view, seed, padding, hflip))
    assert torch.equal(pixels, given_pixels), "the input was changed"


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(list(range(12))), size=st.integers(1, 12))
def test_crop_and_flip__has_the_same_bits_in_any_order_and_batch_size(order, size):
    pixels = noise(12)
    whole = crop_and_flip(pixels, np.arange(12), 3, 1, 2, 0.5)
    for start in range(0, 12, size):
        chunk = np.array(order[start : start + size])
        assert torch.equal(crop_and_flip(pixels[chunk], chunk, 3, 1, 2, 0.5), whole[chunk])


def test_crop_and_flip__flips_about_half_and_shifts_evenly():
    n = 20_000
    ramp = torch.zeros(n, 3, 5, 5, dtype=torch.uint8)
    ramp[:, :, 2, 1] = 1  # left of the centre
    flipped = crop_and_flip(ramp, np.arange(n), 0, 0, padding=0, hflip=0.5)[:, 0, 2, 3] == 1
    assert abs(float(flipped.float().mean()) - 0.5) < 4 * 0.5 / n**0.5
    quarter = crop_and_flip(ramp, np.arange(n), 0, 0, padding=0, hflip=0.25)[:, 0, 2, 3] == 1
    assert abs(float(quarter.float().mean()) - 0.25) < 4 * 0.5 / n**0.5
    dot = torch.zeros(n, 3, 5, 5, dtype=torch.uint8)
    dot[:, :, 2, 2] = 1
    shares = crop_and_flip(dot, np.arange(n), 0, 0, padding=2, hflip=0.5)[:, 0].float().mean(0)
    assert (shares - 1 / 25).abs().max() < 5 * (1 / 25 / n) ** 0.5


def test_crop_and_flip__views_seeds_and_samples_differ():
    pixels = noise(1, side=32).expand(64, 3, 32, 32)
    first = crop_and_flip(pixels, np.arange(64), 0, 0, 4, 0.5)
    others = [
        crop_and_flip(pixels, np.arange(64), 1, 0, 4, 0.5),
        crop_and_flip(pixels, np.arange(64), 0, 1, 4, 0.5),
        crop_and_flip(pixels, np.arange(64, 128), 0, 0, 4, 0.5),
    ]
    for other in others:
        same = (first == other).flatten(1).all(1).float().mean()
        assert same < 0.2
    assert len({tuple(image.flatten().tolist()) for image in first}) > 40


def test_crop_and_flip__gives_channels_last():
    got = crop_and_flip(noise(4), np.arange(4), 0, 0, 1, 0.5)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_random_resized_crop__is_replayable_and_leaves_torchs_generator_alone():
    def view(index, number, seed=0):
        return random_resized_crop(photo(), Frame.of(112), (0.35, 1.0), 0.5, 0.4, seed=seed, index=index, view=number)

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = view(5, 2)
    assert torch.equal(torch.rand(3), expected)
    assert first.shape == (3, 112, 112)
    assert first.dtype == torch.uint8
    assert torch.equal(first, view(5, 2))
    for other in (view(6, 2), view(5, 3), view(5, 2, seed=1)):
        assert not torch.equal(first, other)


def test_random_resized_crop__flips_and_jitters_as_told():
    def view(hflip, jitter, scale=(1.0, 1.0)):
        return random_resized_crop(photo(120, 120), Frame.of(120), scale, hflip, jitter, seed=0, index=1, view=0)

    assert torch.equal(view(1.0, 0).flip(2), view(0.0, 0))
    assert not torch.equal(view(0, 0.4), view(0, 0))
    assert not torch.equal(view(0, 0, (0.3, 0.5)), view(0, 0))
