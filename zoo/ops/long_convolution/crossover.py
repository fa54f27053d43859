"""Up to how many taps tiles are faster than transforms, by dtype: what decides how a call without packing is served.

`benchmarks/notes/long_engine.py` prints both sides at several lengths; benchmarks/notes/long_convolution.md keeps them.
"""

from __future__ import annotations

import torch

# y and the gradient of x; measured on an H100 for bfloat16 at 1,024 and 2,048 taps, counted from 4,096 on
LONGEST = {torch.float32: 128, torch.bfloat16: 4096, torch.float16: 512}
# the gradient of the taps of a call whose y is made by tiles
GRADIENT_LONGEST = {torch.float32: 128, torch.bfloat16: 4096, torch.float16: 512}
# packed rows, whose other way is the fft path
PACKED_LONGEST = {torch.float32: 128, torch.bfloat16: 512, torch.float16: 512}
