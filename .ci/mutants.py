"""Tell how many mutants `mutmut run` killed, and fail below the share that is asked for.

python .ci/mutants.py [85]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

STATS = Path("mutants/mutmut-cicd-stats.json")


def main(arguments: list[str]) -> int:
    """Print the figures; return the exit status."""
    asked = float(arguments[0]) if arguments else 85.0
    subprocess.run([sys.executable, "-m", "mutmut", "export-cicd-stats"], check=True)
    found = json.loads(STATS.read_text(encoding="utf-8"))
    # A mutant that never ends is noticed as one that fails.
    killed, total = found["killed"] + found["timeout"], found["total"]
    share = 100 * killed / max(1, total)
    print(f"mutants: {killed} of {total} killed, {share:.1f} % ({found['no_tests']} untested)")
    return int(share < asked)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
