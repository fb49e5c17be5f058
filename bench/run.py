"""Measures mnnvl_ar and its peers on this machine: `python bench/run.py --help`, bench/README.md.

Under torchrun each process is a rank; otherwise this starts one process a GPU and watches over them (bench/launch.py).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import launch, options


def main() -> int:
    args = options.parser().parse_args()
    options.settle_multicast(allow=args.multicast)
    gpus = 0 if args.device == "cpu" else _gpus()
    args.device = args.device or ("cuda" if gpus else "cpu")
    if "RANK" not in os.environ:
        if args.device == "cpu":
            print("bench: on the host, where times mean little", flush=True)
        processes = args.processes or (gpus if args.device == "cuda" else max(args.tp or [2]))
        limit = time.monotonic() + args.seconds + 60
        return launch.run([str(Path(__file__)), *sys.argv[1:]], processes, deadline=limit)
    from bench.worker import work
    from mnnvl_ar.tuning import files

    files.FOLDER = args.tables or files.FOLDER
    return work(args)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    sys.exit(main())
