"""The bench: mnnvl_ar beside its peers, cell by cell. Start with bench/README.md and bench/run.py."""
