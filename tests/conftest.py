"""One thread, so that tests of exact equality and a shared machine both hold; Ctrl-C reaches the programs that tests start, also where
a shell started the tests in the background; the helpers beside this file are importable.
"""

import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # every child would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
