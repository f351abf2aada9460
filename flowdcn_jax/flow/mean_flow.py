"""MeanFlow (arXiv 2505.13447): a network learns the mean velocity of a jump along the path.

u(x_t, t, r) is the mean over [t, r] of the velocity along the path through x_t, so that
x_r = x_t + (r - t) u, in one step from noise to data too. Differentiated along the path, with r
fixed, that definition becomes what a network can be trained to satisfy (section 4.1):

    u = v + (r - t) du/dt,    du/dt = the derivative of u(x, t, r) along (v, 1, 0)

with the right side held constant, so that gradients go through u alone. At r = t it is ordinary
flow matching. In MeanFlow v is the sample's velocity, data - noise. In improved MeanFlow (arXiv
2512.02012) the derivative is along the network's own velocity u(x, t, t), and v stays in the sum:
the same gradient as that of its loss, of u - (r - t) du/dt against v.

Which rows have r = t follows from their numbers, so that the derivative is computed for the others
alone: of every group of adjacent rows the first ones, a share that is the same on every device.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from flowdcn_jax.flow import path

TIME_DISTRIBUTIONS = ("logit_normal", "uniform")  # of t and of r
TANGENTS = ("sample", "network")
LARGEST_GROUP = 64  # rows


class MeanFlowDraws(NamedTuple):
    """One step's randomness, an entry a row of the global batch."""

    t: Array  # [B] float32 in (0,1)
    r: Array  # [B] float32 in [t,1)
    noise: Array  # [B,H,W,C] float32
    drop_label: Array  # [B] bool


class Group(NamedTuple):
    """Adjacent rows: the first `equal` of each `size` have r = t."""

    equal: int
    size: int


def find_group(equal_share: float) -> Group:
    """The smallest group with this share of rows of r = t, to the nearest of at most 64 rows."""
    return Group(*Fraction(equal_share).limit_denominator(LARGEST_GROUP).as_integer_ratio())


def guides(options: Any) -> bool:
    """Whether the target has guidance in it, so that samples need none."""
    return options.guidance_omega != 1 or options.guidance_kappa != 0


def forward_passes(options: Any) -> float:
    """What a step costs an image, in forward passes of the network.

    Three with the gradient; of rows with r > t one for the derivative, and one for its direction
    where that is the network's own; one or two for guidance.
    """
    group = find_group(options.equal_share)
    jumps = 1 - group.equal / group.size
    passes = 3 + jumps * (2 if options.tangent == "network" else 1)
    if guides(options):
        passes += 2 if options.guidance_kappa else 1
    return passes


def draw(key: Array, shape: tuple[int, ...], *, label_dropout: float, options: Any):
    """Draws two times, noise and dropped labels for data of `shape` [B,H,W,C].

    Noise is that of `loss.draw` with this key, and so are dropped labels unless training guides.
    Then they are all dropped on rows of r = t, where alone the velocity without a class is needed,
    as in the authors' code.

    Args:
        key: of this step.
        shape: of the data; B is a multiple of the group's size.
        label_dropout: probability of no class, over all rows.
        options: config.flow.mean_flow.
    """
    time_key, noise_key, dropout_key = jax.random.split(key, 3)
    group = find_group(options.equal_share)
    equal = jnp.arange(shape[0]) % group.size < group.equal
    t, r = _draw_times(time_key, shape[0], options)
    chance = label_dropout
    if guides(options):
        chance = jnp.where(equal, label_dropout * group.size / group.equal, 0)
    return MeanFlowDraws(
        t=t,
        r=jnp.where(equal, t, r),
        noise=jax.random.normal(noise_key, shape, jnp.float32),
        drop_label=jax.random.bernoulli(dropout_key, chance, shape[:1]),
    )


def _draw_times(key: Array, count: int, options: Any) -> tuple[Array, Array]:
    """t and r, [B] each, with t <= r."""

    def draw(key: Array, mean: float, std: float) -> Array:
        if options.time_distribution == "uniform":
            return path.uniform_times(key, (count,))
        return jax.nn.sigmoid(mean + std * jax.random.normal(key, (count,), jnp.float32))

    t_key, r_key = jax.random.split(key)
    t = draw(t_key, options.t_mean, options.t_std)
    r = draw(r_key, options.r_mean, options.r_std)
    if options.r_below_t == "clip":
        return t, jnp.maximum(t, r)
    return jnp.minimum(t, r), jnp.maximum(t, r)


def mean_flow_loss(
    params,
    data: Array,
    label: Array,
    draws: MeanFlowDraws,
    *,
    network: Callable,
    derivative_network: Callable,
    null_class: int,
    options: Any,
) -> tuple[Array, dict[str, Array]]:
    """The mean over rows of L / (L + c)^p, with L = |u - target|^2 and the divisor held constant.

    |.|^2 is a sum over space and channels; p and c are options.weight_power and weight_offset.

    Args:
        params: what is differentiated.
        data: x at t=1, [B,H,W,C] float32.
        label: [B] integers.
        draws: see `draw`.
        network: (params, x [B,H,W,C], t [B], y [B], r [B]) -> mean velocity [B,H,W,C].
        derivative_network: the same function, of which `jax.jvp` is taken; if it is `network`
            itself, u comes from there too, once.
        null_class: the label that stands for "no class".
        options: config.flow.mean_flow.

    Returns:
        (the loss, {"velocity_loss": the mean squared difference of u and data - noise}), float32
        scalars. With p = 1 the loss hardly moves; the other does.
    """
    frozen = jax.lax.stop_gradient(params)
    y = jnp.where(draws.drop_label, null_class, label)
    x = path.interpolate(draws.noise, data, draws.t)
    target = velocity = path.target_velocity(draws.noise, data)
    if guides(options):
        target = _guided(network, frozen, x, draws, label, velocity, null_class, options)
    group, rows = find_group(options.equal_share), (x, draws.t, draws.r, y, velocity, target)
    losses, distances = [], []

    def add(u: Array, velocity: Array, target: Array) -> None:
        squares = _sum_of_squares(u - jax.lax.stop_gradient(target))
        weights = (jax.lax.stop_gradient(squares) + options.weight_offset) ** -options.weight_power
        losses.append(jnp.sum(weights * squares))
        distances.append(jnp.sum(_sum_of_squares(u - velocity)))

    if group.equal:
        x, t, r, y, velocity, target = _rows(rows, group, slice(group.equal))
        add(network(params, x, t, y, t), velocity, target)
    if group.equal < group.size:
        x, t, r, y, velocity, target = _rows(rows, group, slice(group.equal, None))
        along = network(frozen, x, t, y, t) if options.tangent == "network" else target
        at, direction, once = (x, t), (along, jnp.ones_like(t)), derivative_network is network

        def u_of(x, t, r=r, y=y):
            return derivative_network(params if once else frozen, x, t, y, r)

        u, slope = jax.jvp(u_of, at, direction)
        u = u if once else network(params, x, t, y, r)
        add(u, velocity, target + _per_row(r - t, x) * slope)
    loss, distance = sum(losses) / len(data), sum(distances) / data.size
    return loss, {"velocity_loss": jax.lax.stop_gradient(distance)}


def _guided(
    network: Callable,
    params,
    x: Array,
    draws: MeanFlowDraws,
    label: Array,
    velocity: Array,
    null_class: int,
    options: Any,
) -> Array:
    """omega v + (1 - omega - kappa) u(no class) + kappa u(class), both u at t alone (section 4.2).

    It is v outside of the interval, and where the label is dropped.
    """
    omega, kappa, t = options.guidance_omega, options.guidance_kappa, draws.t
    without = network(params, x, t, jnp.full_like(label, null_class), t)
    guided = omega * velocity + (1 - omega - kappa) * without
    if kappa:
        guided += kappa * network(params, x, t, label, t)
    inside = (options.guidance_begin <= t) & (t <= options.guidance_end) & ~draws.drop_label
    return jnp.where(_per_row(inside, x), guided, velocity)


def _rows(arrays: tuple[Array, ...], group: Group, part: slice) -> list[Array]:
    """`part` of each group of rows of [B,...]; each device's stay on it."""

    def take(x: Array) -> Array:
        return x.reshape(-1, group.size, *x.shape[1:])[:, part].reshape(-1, *x.shape[1:])

    return [take(x) for x in arrays]


def _per_row(numbers: Array, like: Array) -> Array:
    """[B] -> [B,1,...], with as many axes as `like`."""
    return numbers.reshape(numbers.shape + (1,) * (like.ndim - 1))


def _sum_of_squares(x: Array) -> Array:
    """[B,...] -> [B]."""
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))
