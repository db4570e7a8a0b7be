#!/usr/bin/env python3
"""Looks at the crates that firn is built from: where they come from, under which licence, which of
them there are twice, which are too new for its Rust, and which a part of firn must do without.

cargo-deny does this and more. It takes minutes to compile, and its database of known faults is a
repository that CI cannot reach.
"""

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TARGET = "x86_64-unknown-linux-gnu"
CRATES_IO = "registry+https://github.com/rust-lang/crates.io-index"

LICENCES = {
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
}

# Crates of which there are several versions, until those who depend on the older one move.
TWICE = {
    "bitflags",
    "block-buffer",
    "cpufeatures",
    "crypto-common",
    "digest",
    "embedded-io",
    "getrandom",
    "hash32",
    "heapless",
    "miniz_oxide",
    "nix",
    "rand",
    "rand_core",
    "syn",
    "toml_datetime",
    "winnow",
}

# What parts of firn must do without, also by way of others. (virtiofsd brings clap.)
WITHOUT = {
    "firn-guest-agent": {"kvm-ioctls", "pyo3"},
    "firn-net-switch": {"kvm-ioctls", "pyo3", "smoltcp", "tokio"},
    "firn-gateway": {"kvm-ioctls", "pyo3"},
    "firn-vmm": {"anyhow", "firn-gateway", "firn-guest-agent", "pyo3", "smoltcp", "tokio"},
    "firn": {"anyhow", "pyo3"},
}

# By way of these they may have it all the same.
BRINGS = {"linux-crng-ioctl": {"anyhow"}}


def permits(expression: str) -> bool:
    """Whether an SPDX expression (or the older A/B) can be met by the licences allowed here."""
    tokens = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))

    def either() -> bool:
        met = both()
        while tokens[:1] == ["OR"]:
            tokens.pop(0)
            met |= both()
        return met

    def both() -> bool:
        met = one()
        while tokens[:1] == ["AND"]:
            tokens.pop(0)
            met &= one()
        return met

    def one() -> bool:
        token = tokens.pop(0)
        if token == "(":
            met = either()
            tokens.pop(0)
            return met
        if tokens[:1] == ["WITH"]:
            token = " ".join([token, tokens.pop(0), tokens.pop(0)])
        return token in LICENCES

    return bool(tokens) and either() and not tokens


def version(text: str) -> list[int]:
    """A version of Rust, to be compared with another one."""
    return [int(part) for part in text.split(".")]


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Everything that `start` depends on."""
    seen, todo = set(), [start]
    while todo:
        for package in graph[todo.pop()] - seen:
            seen.add(package)
            todo.append(package)
    return seen


def main() -> int:
    """Print what is wrong."""
    command = ["cargo", "metadata", "--format-version=1", "--locked", f"--filter-platform={TARGET}"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        print(listed.stderr, end="")
        return 1
    metadata = json.loads(listed.stdout)
    # Those that are built for the target; the others are only named in Cargo.lock.
    nodes: dict[str, Any] = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    packages = {
        package["id"]: package for package in metadata["packages"] if package["id"] in nodes
    }
    rust = version(next(p["rust_version"] for p in packages.values() if p["name"] == "firn"))
    wrong = []

    versions = defaultdict(set)
    for package in packages.values():
        name = package["name"]
        versions[name].add(package["version"])
        if package["source"] not in (CRATES_IO, None):
            wrong.append(f"{name} is not from crates.io but from {package['source']}")
        if not permits(package["license"] or ""):
            wrong.append(f"{name} has a licence that is not allowed: {package['license']}")
        if version(package["rust_version"] or "1") > rust:
            wrong.append(f"{name} needs Rust {package['rust_version']}, which is newer than ours")
    several = {name for name, found in versions.items() if len(found) > 1}
    wrong += [f"{name} is there in several versions" for name in sorted(several - TWICE)]
    wrong += [f"{name} is there once: take it out of TWICE" for name in sorted(TWICE - several)]

    graph = {
        package: {
            dependency["pkg"]
            for dependency in node["deps"]
            if any(kind["kind"] is None for kind in dependency["dep_kinds"])
            and packages[dependency["pkg"]]["name"]
            not in BRINGS.get(packages[package]["name"], set())
        }
        for package, node in nodes.items()
    }
    for key, package in packages.items():
        names = {packages[dependency]["name"] for dependency in reached(graph, key)}
        unwanted = names & WITHOUT.get(package["name"], set())
        wrong += [f"{package['name']} depends on {name}" for name in sorted(unwanted)]

    print("\n".join(wrong), end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
