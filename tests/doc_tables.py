"""Writes today's options into the pages of docs/ that list them: python -m tests.doc_tables

They stand between two comments there: in docs/sampling.md and docs/evaluation.md those that the
packages of these names declare, in docs/config.md those of flowdcn_jax/config.py and of the
networks in flowdcn_jax/models. docs/weights.md gets the table of names.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from flowdcn_jax import config, models
from flowdcn_jax.evaluation import DrawnRequest, FeatureChoice, ImageChoice
from flowdcn_jax.named_weights import TABLE, NamedWeights
from flowdcn_jax.options import Option, options_of
from flowdcn_jax.sampling import ModelChoice, Output, Request, Settings

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- options: python -m tests.doc_tables -->\n"
END = "<!-- end of options -->\n"

PAGES = {
    "docs/sampling.md": (Request, Settings, ModelChoice, Output),
    "docs/evaluation.md": (FeatureChoice, ImageChoice, DrawnRequest),
    "docs/config.md": (
        *config.SECTIONS.values(),
        *(model.options for model in models.MODELS.values()),
    ),
    "docs/weights.md": (TABLE,),
}


def with_tables(page: str, classes: Iterable[type | Mapping]) -> str:
    """A page in Markdown with today's tables between its two comments."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"the page has no lines {BEGIN.strip()} and {END.strip()}"
    tables = "\n".join(map(table, classes))
    return f"{before}{begin}\n{tables}\n{end}{after}"


def table(kind: type | Mapping) -> str:
    """A dataclass's options, or names of weights, a row each."""
    if isinstance(kind, Mapping):
        rows = "".join(row_of_name(name, weights) for name, weights in kind.items())
        return f"| name | what | size | licence | files |\n| --- | --- | --- | --- | --- |\n{rows}"
    title = kind.__doc__.splitlines()[0].removesuffix(".")
    rows = "".join(map(row, options_of(kind).values()))
    return f"| {title} | values | by default |\n| --- | --- | --- |\n{rows}"


def row(option: Option) -> str:
    default = f"`{option.default}`" if option.unset is None else option.unset
    return f"| `{option.name}`: {option.help} | {option.expected} | {default} |\n"


def row_of_name(name: str, weights: NamedWeights) -> str:
    files = " and ".join(f"`{file.name}`" for file in weights.files)
    source = weights.files[0].source
    licence = weights.licence or "see there"
    place = f"{files} of [{source.split('//')[1].split('/')[0]}]({source})"
    if weights.files[0].repo:
        place = f"{files} of [{weights.files[0].repo}]({source})"
    return f"| `{name}` | {weights.what} | {weights.size} | {licence} | {place} |\n"


if __name__ == "__main__":
    for name, classes in PAGES.items():
        file = ROOT / name
        file.write_text(with_tables(file.read_text(), classes))
        print(name)
