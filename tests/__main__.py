"""All tests but long ones, in two processes side by side: those on the cluster that tests share, and all others, which are shown
afterwards.

    python -m tests

Much of a test on a cluster is waiting for processes to start, in which another can run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile


def main() -> int:
    print("tests: those on the shared cluster, and beside them all others, which are shown afterwards", flush=True)
    run = [sys.executable, "-m", "pytest", "-m"]
    with tempfile.TemporaryFile() as output:
        others = subprocess.Popen([*run, "not shared and not long"], stdout=output, stderr=subprocess.STDOUT)
        shared = subprocess.Popen([*run, "shared and not long"])
        interrupted = False
        for process in (shared, others):
            try:
                process.wait()
            except KeyboardInterrupt:  # which both were told too: they say what failed until then
                interrupted = True
                process.wait()
        output.seek(0)
        sys.stdout.buffer.write(output.read())
    for name, process in (("the tests on the shared cluster", shared), ("all other tests", others)):
        if process.returncode < 0:
            print(f"tests: the process of {name} was ended by signal {-process.returncode}")
    return int(interrupted or bool(shared.returncode or others.returncode))


if __name__ == "__main__":
    sys.exit(main())
