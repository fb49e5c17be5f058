"""Replay as servers do it: scripts of calls, and what runs them over the host transport and on GPUs. See README.md."""
