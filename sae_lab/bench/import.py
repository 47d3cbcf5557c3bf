"What `import sae_lab` costs in a fresh process (hand-written)."
import statistics
import subprocess
import sys

from sae_lab.bench.frame import Row

CODE = "import time; t = time.perf_counter(); import sae_lab; print(time.perf_counter() - t)"


def rows(
    reps: int = 5,  # fresh processes after one warm-up
) -> list[Row]:  # one row, seconds
    "Time `import sae_lab` alone, the interpreter's own start left out."
    times = [float(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)
             for _ in range(reps + 1)]
    return [Row("import", statistics.median(times[1:]), "s")]
