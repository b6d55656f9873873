"""A command ends at once, and nothing that was to be done at its end is left out."""

import subprocess
import sys

PROGRAM = """
import atexit, logging, logging.handlers, sys, threading, time
from research.command import run_as_script

class Last:
    def __del__(self):
        print("taken down")

kept = Last()

def main():
    atexit.register(print, "at exit")
    target = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(logging.handlers.MemoryHandler(9, target=target))
    logging.getLogger().warning("a line that waits in a buffer")
    threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
    print("no newline", end="")
    {ending}

run_as_script(main)
"""


def ended(ending: str) -> subprocess.CompletedProcess:
    program = PROGRAM.replace("{ending}", ending)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_code_output_threads_and_exit_functions_are_all_there():
    done = ended("return 3")
    assert done.returncode == 3
    told = done.stdout
    assert told.startswith("no newline")
    assert [part in told for part in ("a thread", "at exit", "waits in a buffer")] == [True] * 3
    assert told.index("a thread") < told.index("at exit")
    assert "taken down" not in told


def test_a_traceback_ends_as_ever():
    done = ended("raise KeyError('a bug')")
    assert done.returncode == 1
    assert "KeyError: 'a bug'" in done.stderr
    assert "taken down" in done.stdout
