"""`python -m moe_runtime` is the same program as `moe-runtime`."""

import sys

from moe_runtime.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
