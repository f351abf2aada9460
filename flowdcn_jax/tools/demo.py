"""A page that draws with a trained model: python -m flowdcn_jax.tools.demo --workdir=DIR

--weights=NAME draws with published weights, as sample.py does. Prints an address to open in a
browser of this machine; --host=0.0.0.0 lets others see it. Needs Gradio: the extra demo. Ctrl-C
ends it.
"""

from absl import flags

from flowdcn_jax import command, weights_flags
from flowdcn_jax.sampling import ModelChoice

_MODEL = weights_flags.define_model()
_CHOICE = command.option_flags(ModelChoice)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; this machine's alone.")
_PORT = flags.DEFINE_integer("port", 7860, "Port to listen at.", 1, 65535)


def main() -> None:
    flag, folder_or_name = _MODEL()
    # Imported here so that usage errors come at once.
    from flowdcn_jax.demo import Page, interface
    from flowdcn_jax.environment import keep_compiled_programs
    from flowdcn_jax.sampling import load_trained

    keep_compiled_programs(None)
    choice = {name: value for name, value in _CHOICE().items() if value is not None}
    model = load_trained(folder_or_name, **choice)
    flags_of_model = {flag: folder_or_name} | choice
    page = Page(model, [f"--{name}={value}" for name, value in flags_of_model.items()])
    interface.serve(page, host=_HOST.value, port=_PORT.value)


if __name__ == "__main__":
    command.run(main)
