"""Writes sampling's options into docs/sampling.md: python -m flowdcn_jax.tools.option_tables

They stand between two comments there, as flowdcn_jax/sampling/settings.py declares them.
"""

from pathlib import Path

from absl import flags

from flowdcn_jax import command
from flowdcn_jax.errors import UserError
from flowdcn_jax.files import atomic_write
from flowdcn_jax.options import Option, options_of
from flowdcn_jax.sampling import ModelChoice, Output, Request, Settings

_PAGE = flags.DEFINE_string("page", "docs/sampling.md", "Markdown file to change.")

_BEGIN = "<!-- options: python -m flowdcn_jax.tools.option_tables -->\n"
_END = "<!-- end of options -->\n"


def with_tables(page: str) -> str:
    """A page in Markdown with today's tables between its two comments.

    Raises:
        UserError: it does not have them.
    """
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UserError(f"the page has no lines {_BEGIN.strip()} and {_END.strip()}")
    tables = "\n".join(map(_table, (Request, Settings, ModelChoice, Output)))
    return f"{before}{begin}\n{tables}\n{end}{after}"


def _table(cls: type) -> str:
    title = cls.__doc__.splitlines()[0].removesuffix(".")
    rows = "".join(map(_row, options_of(cls).values()))
    return f"| {title} | values | by default |\n| --- | --- | --- |\n{rows}"


def _row(option: Option) -> str:
    default = f"`{option.default}`" if option.unset is None else option.unset
    cells = f"`{option.name}`: {option.help} | {option.values} | {default}"
    return f"| {cells} |\n"


def main() -> None:
    path = Path(_PAGE.value)
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--page={path} cannot be read: {error}") from error
    with atomic_write(path) as file:
        file.write(with_tables(page).encode())
    print(path)


if __name__ == "__main__":
    command.run(main)
