"""One thread, so that tests of exact equality and a shared machine both hold; Ctrl-C reaches the programs that tests
start, also where a shell started the tests in the background.
"""

import signal

import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # every child would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
