"""A command ends at once, and nothing that was to be done at its end is left out."""

import shlex
import subprocess
import sys
from pathlib import Path

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


def ended(ending: str, shell: str = "") -> subprocess.CompletedProcess:
    """What came of the program; `shell`: what stands behind it on a shell's command line."""
    program = PROGRAM.replace("{ending}", ending)
    line = f"{shlex.join([sys.executable, '-c', program])} {shell}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True)


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


def test_a_file_that_was_never_closed_is_written_out(tmp_path: Path):
    log = tmp_path / "log.csv"
    done = ended(f"sys.kept = open({str(log)!r}, 'w'); sys.kept.write('a row'); return 3")
    assert (done.returncode, log.read_text()) == (3, "a row")


def test_work_goes_on_when_nobody_reads_what_it_tells(tmp_path: Path):
    gone = tmp_path / "gone"
    wait = f"__import__('os').path.exists({str(gone)!r}) or time.sleep(0.01)"
    tell = "print('told', file=sys.stderr, flush=True)"
    ending = f"any({wait} for _ in range(1000)); {tell}; {tell}; print('done'); return 3"
    done = ended(ending, f"2> >(exec 0<&-; touch {gone}; exec sleep 1)")
    assert done.returncode == 3, done.stderr
    assert "done" in done.stdout


def test_standard_output_may_be_closed():
    done = ended("print('to nobody'); return 3", ">&-")
    assert (done.returncode, done.stderr) == (3, "")
