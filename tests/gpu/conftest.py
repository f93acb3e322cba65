"""What needs CUDA itself is not collected when this folder runs on the schedules."""

from __future__ import annotations

import sys
from pathlib import Path

from grid import ON_GPU

sys.path.insert(0, str(Path(__file__).parent))
NEEDS_CUDA = ("test_cuda.py", "test_fp8.py", "test_fp8_quantizer.py", "test_large.py",
              "test_memory.py", "test_plan.py")  # fmt: skip
collect_ignore = [] if ON_GPU else list(NEEDS_CUDA)
