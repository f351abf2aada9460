"""Moving averages: their names, the weights of their means, and means made of others."""

import jax
import numpy as np
import optax
import pytest

from flowdcn_jax import ema


@pytest.mark.parametrize(
    "names",
    [
        "power_0.05",
        ("ema",),
        ("power_0",),
        ("power_0.29",),
        ("power_1e-2",),
        ("power",),
        ("constant_1.0",),
        ("constant_-0.5",),
        ("linear_0.5",),
        ("power_0.1", "power_0.10"),
        (0.999,),
    ],
)
def test_names_that_stand_for_no_average_are_refused(names):
    with pytest.raises(ValueError, match="names such as .*power_0.05.*up to 0.2887"):
        ema.parse_names(names)


def test_names_tell_the_kind_and_the_value():
    names = ("power_0.05", "constant_0.999", "power_0.2886", "constant_0", "constant_.5")
    assert ema.parse_names(list(names)) == names
    assert ema.parse_name("power_0.05") == ("power", 0.05)
    assert ema.parse_name("constant_0.999") == ("constant", 0.999)


@pytest.mark.parametrize("width, published", [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_of_edm2(width, published):
    assert round(ema.exponent(width), 2) == published


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25, ema.MAX_WIDTH])
def test_the_width_is_the_profiles_standard_deviation(width):
    t = (np.arange(100_000) + 0.5) / 100_000
    profile = t ** ema.exponent(width)
    mean = np.average(t, weights=profile)
    assert np.sqrt(np.average((t - mean) ** 2, weights=profile)) == pytest.approx(width, rel=1e-4)


def weights_by_steps(name, count, warmup=0.0):
    """What the initial parameters and those after each step weigh after `count` steps: [count+1].

    Parameters that are the rows of an identity make their own weights.
    """
    average = ema.parse_name(name)

    @jax.jit
    def add(mean, row, step):
        return optax.incremental_update(row, mean, ema.share(average, step, warmup=warmup))

    rows = np.eye(count + 1, dtype=np.float32)
    mean = rows[0]
    for step in range(count):
        mean = add(mean, rows[step + 1], np.int32(step))
    return np.asarray(mean)


def profile(width, end, count):
    """What parameters after steps 1 ... count weigh in a power-function EMA of step `end`."""
    reached = np.minimum(np.arange(count + 1) / end, 1.0) ** (ema.exponent(width) + 1)
    return np.diff(reached)


@pytest.mark.parametrize("width", [0.05, 0.25])
def test_a_power_function_is_what_the_steps_add_up_to(width):
    found = weights_by_steps(f"power_{width}", 300)
    np.testing.assert_allclose(found[1:], profile(width, 300, 300), atol=1e-7, rtol=1e-4)
    assert found[0] == 0 and found.sum(dtype=float) == pytest.approx(1, abs=1e-5)


def test_a_constant_decay_forgets_the_initial_values_slowly_unless_it_is_warmed_up():
    found = weights_by_steps("constant_0.9", 20)
    expected = 0.1 * 0.9 ** np.arange(19, -1, -1)
    np.testing.assert_allclose(found, [0.9**20, *expected], rtol=1e-5)
    assert weights_by_steps("constant_0.9", 20, warmup=0.05)[0] == 0


def test_ten_thousand_steps_of_the_default_hold_37_percent_and_with_a_warm_up_nothing():
    average, steps = ema.Average("constant", 0.9999), np.arange(10_000)
    assert (1 - ema.share(average, 0, warmup=0.0)) ** 10_000 == pytest.approx(0.37, abs=0.01)
    shares = np.asarray(ema.share(average, steps, warmup=0.05))
    assert np.prod(1 - shares) == 0
    half_lives = np.log(0.5) / np.log1p(-shares[1:].astype(float))
    np.testing.assert_allclose(half_lives[10:], 0.05 * steps[11:], rtol=1e-4)
    late = ema.share(average, 1_000_000, warmup=0.05)
    assert float(late) == pytest.approx(1e-4, rel=1e-4)  # the decay itself, from 138,000 steps on


def test_late_steps_keep_their_digits():
    for step in (10**5, 10**6, 10**7):
        expected = -np.expm1((ema.exponent(0.05) + 1) * np.log1p(-1 / (step + 1)))
        found = ema.share(ema.parse_name("power_0.05"), np.int32(step), warmup=0.0)
        assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("width, error", [(0.03, 0.11), (0.07, 0.014), (0.15, 0.035)])
def test_a_profile_is_made_of_others_as_exactly_as_is_said(width, error):
    steps = [1000 * k // 8 for k in range(1, 9)]
    snapshots = [(w, step) for w in (0.05, 0.1) for step in steps]
    coefficients, said = ema.synthesis(width, 1000, snapshots)
    wanted = profile(width, 1000, 1000)
    made = sum(c * profile(*each, 1000) for c, each in zip(coefficients, snapshots, strict=True))
    found = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    assert found == pytest.approx(said, rel=0.02) and found < error
    assert coefficients.sum() == pytest.approx(1, abs=1e-12)


def test_a_profile_that_is_there_is_taken_as_it_is_among_hundreds():
    snapshots = [(w, step) for w in (0.05, 0.1) for step in range(4000, 400_001, 4000)]
    coefficients, error = ema.synthesis(0.1, 400_000, snapshots)
    assert error < 1e-6 and coefficients[-1] == pytest.approx(1, abs=1e-6)
    assert np.abs(ema.synthesis(0.15, 400_000, snapshots)[0]).max() < 2  # nothing is blown up
