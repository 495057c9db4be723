"""Print what the client, and extras of it that are named, need of other packages: `python requirements.py gateway`."""

import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

_SELF = re.compile(r"defuse-ml\[(.*)\]")


def requirements(extras: Sequence[str], project: dict[str, dict[str, list[str]]]) -> Iterator[str]:
    """Yield the requirements of extras; one that names others of this project stands for theirs."""
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            if of_this := _SELF.fullmatch(requirement):
                yield from requirements(of_this[1].split(","), project)
            else:
                yield requirement


def main() -> None:
    """Print them one a line."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    found = dict.fromkeys([*project["dependencies"], *requirements(sys.argv[1:], project)])
    sys.stdout.write("".join(f"{requirement}\n" for requirement in found))


if __name__ == "__main__":
    main()
