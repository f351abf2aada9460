"""config.flow: what training minimises, its keys and what they ask of one another."""

import dataclasses

from flowdcn_jax.errors import ConfigError
from flowdcn_jax.flow.mean_flow import find_group, guides
from flowdcn_jax.models import takes_second_time
from flowdcn_jax.options import FRACTION, POSITIVE, Range, at_least, name_in, one_of, option

SHARE = Range(lambda value: 0 <= value <= 1, lambda: "a number in [0, 1]")
LOGIT = Range(lambda value: -10 <= value <= 10, lambda: "a number in [-10, 10]")


@dataclasses.dataclass
class Flow:
    """config.flow"""

    objective: str = option(
        "velocity",
        "velocity: flow matching; mean_flow: the mean velocity of jumps, for few steps",
        name_in("flowdcn_jax.training.objective:OBJECTIVES"),
        fixed=True,
    )
    time_distribution: str = option(
        "uniform",
        "of t in training, of velocity",
        name_in("flowdcn_jax.flow.path:TIME_DISTRIBUTIONS"),
    )
    label_dropout: float = option(0.1, "probability of no class", FRACTION)


@dataclasses.dataclass
class MeanFlow:
    """config.flow.mean_flow: of the objective mean_flow; docs/few_steps.md has its formulas"""

    tangent: str = option(
        "sample",
        "along whose velocity the network is differentiated: the sample's, or as in improved "
        "MeanFlow the network's own",
        name_in("flowdcn_jax.flow.mean_flow:TANGENTS"),
    )
    equal_share: float = option(
        0.75, "rows with r = t, the first ones of each group, such as three of four", SHARE
    )
    time_distribution: str = option(
        "logit_normal",
        "of t and r in training",
        name_in("flowdcn_jax.flow.mean_flow:TIME_DISTRIBUTIONS"),
    )
    t_mean: float = option(0.4, "of the logit of t", LOGIT)
    t_std: float = option(1.0, "of the logit of t", POSITIVE)
    r_mean: float = option(0.4, "of the logit of r", LOGIT)
    r_std: float = option(1.0, "of the logit of r", POSITIVE)
    r_below_t: str = option(
        "swap", "where r is drawn below t: swap both, or clip r to t", one_of("swap", "clip")
    )
    weight_power: float = option(1.0, "p: a row's loss L weighs (L + c)^-p", at_least(0))
    weight_offset: float = option(0.01, "c, beside a sum over space and channels", POSITIVE)
    guidance_omega: float = option(
        1.0,
        "guidance in the target: weight of the sample's velocity; 1 with kappa 0: none",
        at_least(0),
    )
    guidance_kappa: float = option(
        0.0, "weight of the network's with a class; the scale is omega / (1 - kappa)", FRACTION
    )
    guidance_begin: float = option(0.0, "t from which on the target is guided", SHARE)
    guidance_end: float = option(1.0, "t up to which the target is guided", SHARE)
    derivative_dtype: str = option(
        "model",
        "in which the derivative is computed; model: model.dtype",
        one_of("model", "float32", "bfloat16"),
    )


def check_objective(config) -> None:
    """What the objective asks of the model, and MeanFlow of its batch and of sampling.

    Raises:
        ConfigError: the first value that does not fit.
    """
    of_mean_flow, options = config.flow.objective == "mean_flow", config.flow.mean_flow
    if takes_second_time(config.model) != of_mean_flow:
        because = f"{of_mean_flow}, since config.flow.objective is {config.flow.objective!r}"
        _fail(config, "model.second_time", because)
    if not of_mean_flow:
        return
    part = config.train.batch_size // config.train.accumulation_steps
    if part % find_group(options.equal_share).size:
        expected = f"a share of whole rows, a fraction whose denominator divides {part}"
        _fail(config, "flow.mean_flow.equal_share", f"{expected}, the rows of a micro-batch")
    if not guides(options):
        return
    if options.guidance_begin > options.guidance_end:
        expected = f"at most flow.mean_flow.guidance_end={options.guidance_end}"
        _fail(config, "flow.mean_flow.guidance_begin", expected)
    dropout, share = config.flow.label_dropout, options.equal_share
    if not 0 < dropout <= share:
        expected = f"above 0 and at most flow.mean_flow.equal_share={share}, for guidance in the "
        _fail(config, "flow.label_dropout", f"{expected}target needs rows of r = t without a class")
    for key in ("sampling.guidance", "evaluate.guidance"):
        if _lookup(config, key) not in (None, 1):
            _fail(config, key, "1, since the target of config.flow.mean_flow is guided already")


def _lookup(config, key: str):
    for part in key.split("."):
        config = config[part]
    return config


def _fail(config, key: str, expected: str) -> None:
    raise ConfigError(f"config.{key} is {_lookup(config, key)!r}; expected {expected}")
