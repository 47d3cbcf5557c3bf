"Shared by all tests: where outside data lies, one thread a process, no network."
import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background; some tests interrupt themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def root():
    "The folder of the project."
    return ROOT


@pytest.fixture(scope="session")
def data():
    "The folder of outside test data, SAE_LAB_DATA; a test that wants it is skipped where it is absent."
    folder = Path(os.environ.get("SAE_LAB_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set SAE_LAB_DATA")
    return folder
