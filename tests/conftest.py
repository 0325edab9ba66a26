"""One thread, so that tests of exact equality and a shared machine both hold; the helpers beside this file are importable."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
