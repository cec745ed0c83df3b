"""``python -m regraft.demo [DIR]``."""

import sys

from regraft.demo.story import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
