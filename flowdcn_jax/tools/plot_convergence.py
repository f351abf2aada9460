"""Draws how fast each ODE solver converges: python -m flowdcn_jax.tools.plot_convergence --out=PNG

Two velocity fields whose solutions are known, in float64: flowdcn_jax/samplers/known_solutions.py.
"""

from pathlib import Path

from flowdcn_jax import command, samplers
from flowdcn_jax.command import file_to_write
from flowdcn_jax.files import atomic_write
from flowdcn_jax.samplers.known_solutions import FIELDS, solver_error
from flowdcn_jax.samplers.neural_coefficients import NEURAL_COEFFICIENTS

_OUT = command.define_path("out", "PNG to write.", required=True)

NUM_STEPS = (4, 8, 16, 32, 64, 128, 256, 512)
SOLVERS = ("euler", "heun", "heun_cached", "adams2", "adams3", "adams4")


def plot_convergence(out: Path) -> None:
    """Writes a PNG with a panel for each field."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), dpi=120, layout="constrained")
    curves = {name: NUM_STEPS for name in SOLVERS} | {"neural": tuple(NEURAL_COEFFICIENTS)}
    widths = {"heun_cached": 4}  # it lies under adams2
    for axes, (title, field) in zip(panels, FIELDS.items(), strict=True):
        for name, all_num_steps in curves.items():
            counts = [samplers.num_evaluations(name, n) for n in all_num_steps]
            errors = [solver_error(field, name, n) for n in all_num_steps]
            width = widths.get(name, 1.2)
            axes.loglog(counts, errors, "o-", markersize=3, linewidth=width, label=name)
        axes.set(title=title, xlabel="evaluations of the velocity", ylabel="error at t=1")
        axes.grid(alpha=0.3)
    panels[0].legend()
    with atomic_write(out) as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)


def main() -> None:
    out = file_to_write(_OUT)
    plot_convergence(out)
    print(out)


if __name__ == "__main__":
    command.run(main)
