"""Fills in the blocks of docs/ that say where their text comes from.

    python -m paper.pages

A block "```text python -m paper.reproduce ..." has what that command prints, one
"```text docs/results/FILE.json" the table of that benchmark. A test holds the pages to it.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m paper.pages, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
import json
import re
import shlex
from contextlib import redirect_stdout
from io import StringIO

from paper import reproduce
from paper.bench import report
from paper.runs.parallel import ROOT
from plumbing.cli import Parser, command

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("claims", "routing", "speed", "tables")]
BLOCK = re.compile(
    r"^(```text (docs/results/\S+|python -m paper\.reproduce [^\n]*)\n)(.*?)^```$", re.M | re.S
)


def printed(source: str) -> str:
    """What a command prints, or the table of a benchmark's file."""
    with redirect_stdout(StringIO()) as out:
        if source.startswith("docs/"):
            report.show(json.loads((ROOT / source).read_text()))
        else:
            reproduce.main(shlex.split(source)[3:])
    return out.getvalue().strip("\n") + "\n"


def filled(text: str) -> str:
    """A page with its blocks as they are now."""
    return BLOCK.sub(lambda block: f"{block[1]}{printed(block[2])}```", text)


def main() -> None:
    """Every page."""
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    command(main)
