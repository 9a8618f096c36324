"""Count the processor instructions of a step (forward and backward) of a loss, on one thread, with valgrind.

A count does not depend on what else runs on the machine. Two processes execute different numbers of steps. The
difference of their counts contains neither the start of Python nor the import of torch. PYTHONPATH selects the
installation of sgl_ops that is counted. Valgrind has to be installed; a count takes some minutes.

    python benchmarks/count_instructions.py
    python benchmarks/count_instructions.py --loss bag --pooling mean_logits --shape 64,527,64 --steps 2 12
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

#: For every process: the same hashes in each run, and one thread in every library.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def run_steps(options: argparse.Namespace, steps: int) -> None:
    import torch
    from measuring import draw, step

    import sgl_ops

    torch.set_num_threads(1)
    shape = tuple(map(int, options.shape.split(",")))
    logits, targets = draw(shape, shape[:2], options.positives)
    loss = {"sgl": sgl_ops.SGLLoss, "bag": sgl_ops.BagLoss}[options.loss](pooling=options.pooling)
    logits.requires_grad_()
    for _ in range(steps):
        step(loss, logits, targets)


def count(arguments: list[str], steps: int) -> int:
    """The instructions of a process that executes ``steps`` steps."""
    command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={os.devnull}", sys.executable]
    command += [str(Path(__file__).resolve()), *arguments, "--run", str(steps)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    found = re.search(r"I\s+refs:\s+([\d,]+)", done.stderr)
    if done.returncode != 0 or found is None:
        raise RuntimeError(f"valgrind failed with status {done.returncode}: {done.stderr}")
    return int(found[1].replace(",", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=("sgl", "bag"), default="sgl")
    parser.add_argument("--pooling", default="max")
    parser.add_argument("--shape", default="64,1,50", help="N,C,L")
    parser.add_argument("--positives", type=float, default=0.5, help="fraction of positive labels")
    parser.add_argument("--steps", type=int, nargs=2, default=(100, 1100), help="steps of the two processes")
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        return run_steps(options, options.run)
    few, many = options.steps
    if few >= many:
        parser.error(f"--steps: expected the smaller number first, got {few} {many}")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda steps: count(sys.argv[1:], steps), (few, many))
    per_step = (second - first) / (many - few)
    bags, classes, _ = map(int, options.shape.split(","))
    print(
        f"{options.loss}, {options.pooling}, ({options.shape}): {per_step:,.0f} instructions a step, "
        f"{per_step / (bags * classes):,.0f} for each (bag, class) pair"
    )


if __name__ == "__main__":
    main()
