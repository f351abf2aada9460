"""Puts other functions in the place of FlowDCN's deformable aggregation."""

import jax

from flowdcn_jax.models import flowdcn


def use_aggregate(monkeypatch, aggregate) -> None:
    """FlowDCN calls aggregate(values, offsets, weights, boundary=), in the dtype of its inputs."""

    def multiscale(
        values,
        directions,
        scales,
        weights,
        scale_prior,
        *,
        direction_prior,
        max_scale,
        boundary,
    ):
        radius = jax.nn.sigmoid(scales + scale_prior[:, None])[..., None] * max_scale
        offsets = (directions + direction_prior) * radius
        return aggregate(values, offsets, weights, boundary=boundary)

    monkeypatch.setattr(flowdcn, "multiscale_deformable_aggregate", multiscale)
