"""The tables of docs/stock-models.md: families of models and features, out of the tests' own lists.

python tools/families.py             # prints them
python tools/families.py --write     # puts them into the page
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from tests.hf.families import FAMILIES, UNTURNED
from tests.hf.features import FEATURES
from tests.hf.test_families import HYBRIDS, REFUSED, TOWERS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/stock-models.md"
BEGIN, END = "<!-- begin: tools/families.py -->\n", "<!-- end: tools/families.py -->\n"


def versions() -> tuple[str, str]:
    """Of transformers: the oldest that is allowed, and the one that tests run on by default."""
    allowed = re.search(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pinned = re.search(r"^transformers==([\d.]+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert allowed is not None
    assert pinned is not None
    return allowed[1], pinned[1]


def lines() -> Iterator[str]:
    """The page's part, line by line."""
    oldest, pinned = versions()
    yield f"Tested with tiny random models on transformers {pinned}; {oldest} is the oldest release allowed."
    yield ""
    yield "| family | tested as | as the stock model under `full` | keys turned back |"
    yield "|---|---|---|---|"
    variants: dict[str, list[str]] = {}
    for name in FAMILIES:
        family, _, variant = name.partition(", ")
        variants.setdefault(family, []).append(variant or "plain")
    for family, each in variants.items():
        yield f"| {family} | {', '.join(each)} | yes | {'refused' if family in UNTURNED else 'yes'} |"
    for family in TOWERS:
        yield f"| {family} | text of a model of text and images | yes | not tested |"
    for family in HYBRIDS:
        yield f"| {family} | its attention layers; rows of equal length | yes | not tested |"
    yield f"| {', '.join(REFUSED)} | | refused by name | |"
    yield ""
    yield "| feature | test, in tests/hf |"
    yield "|---|---|"
    for feature, test in FEATURES.items():
        yield f"| {feature} | `{test}` |"


def page_with(part: str, page: str) -> str:
    """The page with its part between the marks made anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}{part}{END}{rest.split(END)[1]}"


def main() -> None:
    """Print the part, or put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put it into docs/stock-models.md")
    part = "\n".join(lines()) + "\n"
    if parser.parse_args().write:
        PAGE.write_text(page_with(part, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(part, end="")


if __name__ == "__main__":
    main()
