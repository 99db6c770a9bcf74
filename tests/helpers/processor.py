"""What the processor is: figures of learning are asserted by how it rounds."""

from __future__ import annotations

import torch

WIDE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
"""Whether torch computes with AVX-512, on which some expected figures were taken."""
