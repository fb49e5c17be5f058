"""`python -m mnnvl_ar <command>`."""

from __future__ import annotations

import argparse
import sys

from mnnvl_ar import demo, doctor


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mnnvl_ar", description="Bit-exact all-reduce for tensor-parallel inference.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = commands.add_parser(
        "demo", help="run a server's traffic and check every bit of it", description=demo.__doc__
    )
    demo.add_arguments(chosen)
    chosen.set_defaults(run=demo.run)
    chosen = commands.add_parser("doctor", help="what a group on this machine would get", description=doctor.__doc__)
    doctor.add_arguments(chosen)
    chosen.set_defaults(run=doctor.run)
    args = parser.parse_args(arguments)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
