#!/usr/bin/env python3
"""Looks whether what the READMEs link to is there, and whether the first one is short."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Of the README at the top, which a newcomer reads whole.
MOST_LINES = 150


def main() -> int:
    """Print what is wrong."""
    listed = subprocess.run(
        ["git", "ls-files", "*README.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wrong = []
    for name in listed.stdout.split():
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path = (ROOT / name).parent / target.partition("#")[0]
            if "://" not in target and not path.exists():
                wrong.append(f"{name} links to {target}, which is not there")
    lines = len((ROOT / "README.md").read_text().splitlines())
    if lines > MOST_LINES:
        wrong.append(f"README.md has {lines} lines; allowed: {MOST_LINES}")
    print("\n".join(wrong), end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
