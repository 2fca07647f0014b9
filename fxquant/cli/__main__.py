"""python -m fxquant.cli"""

from __future__ import annotations

import sys

from fxquant.cli import main

sys.exit(main())
