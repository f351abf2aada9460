"""The command `flowdcn NAME [flags]`, which is `python -m flowdcn_jax NAME [flags]` too.

NAME is a module of flowdcn_jax/tools: train, sample, cache_latents and so on.
"""

import importlib
import pkgutil
import sys

from flowdcn_jax import command, tools


def main() -> None:
    """Runs the command that the first argument names, on the other arguments."""
    names = sorted(module.name for module in pkgutil.iter_modules(tools.__path__))
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in names:
        print(f"usage: flowdcn NAME [flags]; flowdcn NAME --help\nNAME: {', '.join(names)}")
        sys.exit(0 if name in ("--help", "-h", "help") else command.BAD_INPUT)
    sys.argv[:2] = [f"flowdcn {name}"]
    command.run(importlib.import_module(f"{tools.__name__}.{name}").main)


if __name__ == "__main__":
    main()
