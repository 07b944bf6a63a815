"""Writes pages of the API, from its docstrings, to the folder given: `make docs`."""

import re
import sys
from pathlib import Path

from jinja2 import pass_context
from jinja2.runtime import Context

import gptj_q8
from gptj_q8.cli.load import quieten

# Of a package pdoc takes what its __all__ names, modules too.
MODULES = (
    "gptj_q8",
    "gptj_q8.backends.reference",
    "gptj_q8.checkpoint",
    "gptj_q8.generate",
    "gptj_q8.hivemind",
    "gptj_q8.lora",
    "gptj_q8.memory",
    "gptj_q8.models",
    "gptj_q8.nn",
    "gptj_q8.train.run",
    "gptj_q8.train.settings",
    "gptj_q8.train.texts",
    "gptj_q8.tune",
)
# "name: what it is", also of several names or with a callback's arguments, as docstrings here list
# parameters: at the beginning of a line, or after another such sentence.
_NAMES = r"[a-z_]\w*(?:\([\w, ]*\))?(?:, [a-z_]\w*)*"
_ITEM = re.compile(rf"^({_NAMES}): ", re.MULTILINE)
_NEXT = re.compile(rf"(?<=[.;]) (?={_NAMES}: )")


def listed(docstring: str) -> str:
    """The docstring with its parameters as a list of Markdown's, which would run them together."""
    paragraphs = docstring.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if item := _ITEM.search(paragraph):
            before, items = paragraph[: item.start()], paragraph[item.start() :]
            items = _ITEM.sub(r"- `\1`: ", _NEXT.sub("\n", items))
            paragraphs[i] = f"{before}\n{items}" if before else items
    return "\n\n".join(paragraphs)


def write(folder: Path) -> None:
    """Writes the pages. Raises what importing a module raises."""
    import pdoc

    for name in gptj_q8.__all__:  # pdoc sees what has been imported
        getattr(gptj_q8, name)
    filters = pdoc.render.env.filters
    markdown = filters["to_markdown"]

    @pass_context
    def to_markdown(context: Context, docstring: str) -> str:
        return markdown(context, listed(docstring))

    filters["to_markdown"] = to_markdown
    try:
        pdoc.pdoc(*MODULES, output_directory=folder)
    finally:
        filters["to_markdown"] = markdown


if __name__ == "__main__":
    quieten()
    write(Path(sys.argv[1]))
