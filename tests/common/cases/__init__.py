"""What is checked, as functions that every rank runs: real ranks on the host and on GPUs, and virtual ranks, alike."""
