"""The ODE solvers, each as a table: when to evaluate the velocity, and how to add it up.

Euler's, Heun's and the multistep methods all move by a weighted sum of the velocities so far,

    x[i+1] = x[i] + sum over j of weights[i, j] * v[i-j],    v[i] = velocity(x[i], times[i]),

one evaluation after the other. So one scan serves them all, and a network is compiled once
whatever the solver. x[i] is not always the solution at times[i]: Heun's predictions count too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from flowdcn_jax.samplers.kept import scan_states
from flowdcn_jax.samplers.neural_coefficients import NEURAL_COEFFICIENTS


class Scheme(NamedTuple):
    """A solver on one time grid; see the module's docstring."""

    times: np.ndarray  # [evaluations] float64, ascending
    weights: np.ndarray  # [evaluations, m] float64, of the newest velocity first
    ends: np.ndarray | None = None  # [evaluations] float64: of the jumps; None: velocities at times


def integrate(
    velocity_fn, x_init: Array, scheme: Scheme, *, keep: Sequence[int] | None = None
) -> Array:
    """x after every evaluation of `scheme`, as one scan.

    Args:
        velocity_fn: (x [B,...], t scalar) -> velocity [B,...]; of a scheme with ends (x, t, end).
        x_init: x at t=0, [B,...].
        scheme: the solver.
        keep: numbers of the grid's times, ascending: x at each is given, [len(keep),B,...].
    """
    dtype = x_init.dtype
    remembered = scheme.weights.shape[1] - 1

    def step(carry, row):
        x, past = carry
        *times, weights = row
        velocity = velocity_fn(x, *times).astype(dtype)
        x = x + weights[0] * velocity
        for j in range(remembered):
            x = x + weights[j + 1] * past[j]
        return (x, (velocity, *past)[:remembered]), x

    past = (jnp.zeros_like(x_init),) * remembered
    columns = (scheme.times, scheme.ends, scheme.weights)
    rows = [jnp.asarray(column, dtype) for column in columns if column is not None]
    states = None if keep is None else _solutions(scheme)[list(keep)]
    (x, _), kept = scan_states(step, (x_init, past), rows, x_init, states)
    return x if keep is None else kept


def _solutions(scheme: Scheme) -> np.ndarray:
    """After how many evaluations x is the solution at each time of the grid: [num_steps + 1].

    Of those that arrive at one time, the last: Heun's correction and not its prediction.
    """
    arrived = np.append(scheme.times[1:], 1.0)  # where the next evaluation is
    last = np.append(np.diff(arrived) > 0, True)
    return np.append(0, np.flatnonzero(last) + 1)


def euler(times: np.ndarray) -> Scheme:
    """Euler's method: the velocity at the start of each step."""
    return Scheme(times[:-1], np.diff(times)[:, None])


def mean_flow(times: np.ndarray) -> Scheme:
    """Each step jumps to its end, by the mean velocity up to there."""
    return euler(times)._replace(ends=times[1:])


def heun(times: np.ndarray) -> Scheme:
    """Heun's method: each step but the last, which is Euler's, averages the velocities at its ends.

    A step predicts x + d*v, evaluates v' there at the step's end, and arrives at x + d*(v + v')/2,
    which is the prediction + d/2*v' - d/2*v.
    """
    evaluations, weights = [], []
    for start, length in zip(times[:-2], np.diff(times)[:-1], strict=True):
        evaluations += [start, start + length]
        weights += [[length, 0.0], [length / 2, -length / 2]]
    evaluations.append(times[-2])
    weights.append([times[-1] - times[-2], 0.0])
    return Scheme(np.array(evaluations), np.array(weights))


def heun_cached(times: np.ndarray) -> Scheme:
    """Heun's method that starts each step from the last one's corrector velocity: the released one.

    One evaluation a step. In step i the prediction is x + d[i]*v, with v kept from the step before,
    and v' at the prediction corrects it to x + d[i]*(v + v')/2; the next prediction adds d[i+1]*v'.
    So predictions follow one another by (d[i]/2 + d[i+1])*v' - d[i]/2*v, and the last one, which is
    not corrected, is the result. With equal steps this is Adams-Bashforth of order 2.
    """
    lengths = np.diff(times)
    weights = np.zeros((len(lengths), 2))
    weights[:, 0] = lengths
    weights[1:, 0] += lengths[:-1] / 2
    weights[1:, 1] -= lengths[:-1] / 2
    return Scheme(times[:-1], weights)


def adams(times: np.ndarray, order: int) -> Scheme:
    """Adams-Bashforth: the integral of the polynomial through the newest `order` velocities.

    The first steps use as many velocities as there are. That leaves an error of second order, so
    orders 3 and 4 pay where the velocity hardly changes at first. On equal steps these are the
    textbook coefficients; on other grids they keep the order.
    """
    weights = np.zeros((len(times) - 1, order))
    for i in range(len(times) - 1):
        nodes = times[max(0, i + 1 - order) : i + 1][::-1] - times[i]
        length = times[i + 1] - times[i]
        powers = np.arange(len(nodes))
        moments = length ** (powers + 1) / (powers + 1)  # integrals of t^p over the step
        weights[i, : len(nodes)] = np.linalg.solve(nodes[None, :] ** powers[:, None], moments)
    return Scheme(times[:-1], weights)


def neural(times: np.ndarray) -> Scheme:
    """The searched solver on its own grid: sum c * past velocities + (1 - sum c) * the newest."""
    num_steps = len(times) - 1
    weights = np.zeros((num_steps, num_steps))
    for i, coefficients in enumerate(NEURAL_COEFFICIENTS[num_steps].coefficients):
        newest_first = [1 - sum(coefficients), *reversed(coefficients)]
        weights[i, : i + 1] = (times[i + 1] - times[i]) * np.array(newest_first)
    return Scheme(times[:-1], weights)


def neural_times(num_steps: int) -> np.ndarray:
    """The grid that belongs to the searched coefficients, [num_steps + 1] float64.

    The searched steps add up to nearly 1; the last one ends at 1.
    """
    steps = NEURAL_COEFFICIENTS[num_steps].time_deltas
    return np.concatenate([[0.0], np.cumsum(steps[:-1]), [1.0]])
