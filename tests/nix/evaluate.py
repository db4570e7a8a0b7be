#!/usr/bin/env python3
"""Evaluates the tests of nix/.

What comes of fixtures.nix is compared with golden/, or with --write made that: for each node there
is a file with its machine file, or with the list of the sentences that say why there is none.
All checks of modules.nix have to be true.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"


def evaluate(name: str) -> dict[str, Any]:
    """Evaluate a file here."""
    # Nothing is built, so there is no need of a store.
    environment = {"NIX_REMOTE": "dummy://", "NIX_PATH": f"nixpkgs={HERE}/nixpkgs.nix"}
    done = subprocess.run(
        ["nix-instantiate", "--eval", "--strict", "--json", HERE / name],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{name} cannot be evaluated")
    return dict(json.loads(done.stdout))


def fixtures() -> dict[str, str]:
    """Give what each golden file has to be."""
    wanted = {}
    for name, node in evaluate("fixtures.nix").items():
        outcome = node.get("spec") or node["unsupported"]
        if not outcome:
            sys.exit(f"{name}: is supported")
        text = json.dumps(outcome, indent=2) + "\n"
        # Else the build's sandbox would not have it.
        named = sorted(set(re.findall(r"/nix/store/[0-9a-z]{32}-[\w.-]+", text)))
        if named != node.get("references", []):
            sys.exit(f"{name}: names {named}, and refers to {node['references']}")
        wanted[f"{name}.json"] = text
    return wanted


def main() -> int:
    """Compare and check, or write."""
    wanted = fixtures()
    found = {file.name: file.read_text() for file in GOLDEN.glob("*.json")}
    if sys.argv[1:] == ["--write"]:
        for name in found.keys() - wanted.keys():
            (GOLDEN / name).unlink()
        for name, text in wanted.items():
            (GOLDEN / name).write_text(text)
        return 0
    names = sorted(found.keys() | wanted)
    passed = {f"golden/{name} is as before": found.get(name) == wanted.get(name) for name in names}
    passed |= evaluate("modules.nix")
    failed = [name for name, good in passed.items() if good is not True]
    for name in failed:
        print(f"not so: {name}")
    print(f"{len(passed) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
