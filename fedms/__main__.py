"""``python -m fedms``, which torchrun needs: the command line."""

import sys

from fedms.fl.cli import main

sys.exit(main())
