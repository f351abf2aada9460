"""The project's packages and what they import, found in the files themselves.

    python -m tests.imports            # prints the picture
    python -m tests.imports --write    # puts it into CONTRIBUTING.md

A node is a package, or a module that lies in none: flowdcn_jax.runs, flowdcn_jax.files, train.
Imports inside functions count like the others.
"""

import ast
import graphlib
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOTS = ("flowdcn_jax", "pallas_kernels", "train.py", "sample.py", "evaluate.py")
BEGIN, END = "<!-- packages: python -m tests.imports --write -->", "<!-- packages end -->"
# The picture is of packages: these modules are below all of them, and would only add arrows.
LOWEST = (
    "command",
    "config_flag",
    "environment",
    "errors",
    "files",
    "images",
    "options",
    "precision",
    "version",
)


def modules() -> dict[str, Path]:
    """The project's modules, by dotted name."""
    files = [path for root in ROOTS for path in [*(ROOT / root).rglob("*.py"), ROOT / root]]
    found = {}
    for path in files:
        if path.suffix == ".py" and path.is_file():
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of `known` that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                names.add(below if below in known else node.module)
    return names & known.keys()


def top_level_names(path: Path) -> set[str]:
    """The packages that a file imports, the project's and others: jax of jax.numpy."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    named = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in plain | named}


def package_of(module: str) -> str:
    """The package that a module is of: flowdcn_jax.runs of flowdcn_jax.runs.state."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "flowdcn_jax" else 1])


def module_graph() -> dict[str, set[str]]:
    """Module -> the project's modules that it imports."""
    known = modules()
    return {module: imported(path, known) - {module} for module, path in known.items()}


def graph() -> dict[str, set[str]]:
    """Package -> the project's packages that it imports, without itself."""
    edges: dict[str, set[str]] = {}
    for module, targets in module_graph().items():
        node = package_of(module)
        edges.setdefault(node, set()).update({package_of(name) for name in targets} - {node})
    return edges


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """A circle in a graph, or None."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def picture() -> str:
    """The packages as a Mermaid graph, without arrows that follow from others."""
    edges = {
        node.removeprefix("flowdcn_jax."): {t.removeprefix("flowdcn_jax.") for t in targets}
        for node, targets in graph().items()
    }
    edges = {node: targets - set(LOWEST) for node, targets in edges.items() if node not in LOWEST}

    def reachable(node: str) -> set[str]:
        return {node}.union(*(reachable(target) for target in edges[node]))

    lines = ["```mermaid", "graph TD"]
    for node in sorted(edges):
        for target in sorted(edges[node]):
            if not any(target in reachable(other) for other in edges[node] - {target}):
                lines.append(f"    {node} --> {target}")
    return "\n".join([*lines, "```"])


def with_picture(text: str) -> str:
    """CONTRIBUTING.md with today's picture."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{picture()}\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        file = ROOT / "CONTRIBUTING.md"
        file.write_text(with_picture(file.read_text()))
    else:
        print(picture())
