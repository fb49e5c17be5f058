"""The bench on several hosts, by one command on each of them: `python -m bench.gb200`, README.md beside this file."""
