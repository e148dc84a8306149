"""Hold the installed packages against published advisories, where those can be reached.

    python .ci/audit.py [options of pip-audit]

Exit status 1 where a package has a known vulnerability. Where the advisory data cannot be reached
it says so and passes: a machine without a network can check all the rest. Accepted advisories
stand in `audit.toml` beside this file, each with its reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ACCEPTED = Path(__file__).with_name("audit.toml")
# pip-audit asks for one package after the other; so many of it side by side.
SIDE_BY_SIDE = 8
# Seconds: of one connection, of the first package, of all others. Together well under a minute.
CONNECTION_S, FIRST_S, REST_S = 5, 15, 30


class Unreachable(Exception):
    """The advisory data could not be asked; the message says why."""


def installed() -> list[str]:
    """Return the packages of this environment as "name==version", without builds' own marks."""
    found = {
        dist.metadata["Name"].lower(): dist.version.partition("+")[0]
        for dist in importlib.metadata.distributions()
        if dist.metadata["Name"]
    }
    found.pop("boxed", None)
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def ask(packages: Sequence[str], limit_s: float, options: Sequence[str]) -> list[dict[str, Any]]:
    """Return what pip-audit says of each package.

    Raises:
        Unreachable: It could not ask in time, or not at all.
    """
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "pins.txt"
        pins.write_text("\n".join(packages) + "\n", encoding="utf-8")
        words = [sys.executable, "-m", "pip_audit", "--requirement", str(pins)]
        words += ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
        words += ["--timeout", str(CONNECTION_S), *options]
        try:
            done = subprocess.run(  # noqa: S603 - our own interpreter
                words, capture_output=True, text=True, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise Unreachable(f"no answer within {limit_s:.0f} s") from None
    try:
        return json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Unreachable(lines[-1][:200] if lines else f"status {done.returncode}") from None


def audit(packages: Sequence[str], options: Sequence[str]) -> list[dict[str, Any]]:
    """Return what is known of every package; the first one is asked alone, as a probe.

    Raises:
        Unreachable: The advisory data could not be asked about a single package.
    """
    first = ask(packages[:1], FIRST_S, options)
    if "skip_reason" in first[0]:
        raise Unreachable(first[0]["skip_reason"])
    parts = [part for i in range(SIDE_BY_SIDE) if (part := packages[1 + i :: SIDE_BY_SIDE])]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return [*first, *(row for rows in pool.map(_or_skipped(options), parts) for row in rows)]


def _or_skipped(options: Sequence[str]) -> Any:
    def rows(part: Sequence[str]) -> list[dict[str, Any]]:
        try:
            return ask(part, REST_S, options)
        except Unreachable as error:
            return [{"name": pin.partition("==")[0], "skip_reason": str(error)} for pin in part]

    return rows


def main(options: Sequence[str]) -> int:
    """Audit and report; return the exit status."""
    accepted = tomllib.loads(ACCEPTED.read_text(encoding="utf-8"))
    packages = installed()
    try:
        # pip is in every environment and on every index.
        found = audit(sorted(packages, key=lambda pin: not pin.startswith("pip==")), options)
    except Unreachable as error:
        print(f"audit: skipped, the advisory data cannot be reached ({error})")
        return 0
    bad = 0
    for row in found:
        for hole in row.get("vulns", ()):
            names = {hole["id"], *hole.get("aliases", ())}
            reason = next((accepted[name] for name in names if name in accepted), None)
            mended = ", ".join(hole.get("fix_versions", ())) or "no version yet"
            print(
                f"audit: {row['name']} {row['version']}: {hole['id']}, mended in {mended}"
                + (f"; accepted: {reason}" if reason else "")
            )
            bad += reason is None
    left = sorted(row["name"] for row in found if "skip_reason" in row)
    print(
        f"audit: {len(found) - len(left)} packages, {bad} known vulnerabilities"
        + (f"; not known to the advisory data: {', '.join(left)}" if left else "")
    )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
