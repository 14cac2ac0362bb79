"""python -m data_prep.docstrings OUTPUT: collects the demo corpus, see data_prep/demo/collect.py."""

import sys

from data_prep.demo.collect import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
