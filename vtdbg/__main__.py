"""python -m vtdbg"""

import sys

from vtdbg.cli import main

sys.exit(main())
