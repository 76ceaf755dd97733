"""Import torch so that its idle threads sleep instead of spinning. Import this before torch.

OpenMP's threads spin while they wait for each other. The quantiser's operations are small, so
where a core is shared with another program (a virtual machine, a build beside us) most of the time
goes into spinning: on 2 busy cores a matrix took 54 s with spinning threads, 1.3 s with sleeping
ones. The variable is read when torch loads and taken back at once, so that programs which are
started later do not inherit it.
"""

from __future__ import annotations

import os
import sys

POLICY = "OMP_WAIT_POLICY"

if "torch" not in sys.modules and not {POLICY, "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ[POLICY] = "PASSIVE"
    try:
        import torch  # noqa: F401
    finally:
        del os.environ[POLICY]
