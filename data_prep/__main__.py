"""python -m data_prep CONFIG [key=value ...]: the same as `bertscale prep`."""

import sys

from bertscale.cli import main

if __name__ == "__main__":
    sys.exit(main(["prep", *sys.argv[1:]]))
