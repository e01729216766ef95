"""The entry point. It imports the command line inside, so that an early Ctrl-C ends as quietly as a late one."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line of this process."""
    try:
        from edgeprune.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # while starting, or a second time while cleaning up
        sys.stderr.write("edgeprune: error [interrupted]: interrupted\n")
        code = 130
    sys.exit(code)
