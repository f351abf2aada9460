"""What the implementations share about derivatives."""

import jax


@jax.custom_jvp
def differentiable_no_more(arrays):
    """`arrays` as they are; differentiating what is computed from them is an error.

    The backward passes put their inputs through this, for what they do inside (kernels, bit
    patterns) would give no second derivative, or a wrong one.
    """
    return arrays


@differentiable_no_more.defjvp
def _raise(primals, tangents):
    raise NotImplementedError(
        "the deformable aggregation has no second derivatives: its gradient was differentiated, or"
        " put through jax.jvp or jax.hessian"
    )
