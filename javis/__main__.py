"""``python -m javis`` is ``javis``."""

import sys

from javis.cli import main

if __name__ == "__main__":
    sys.exit(main())
