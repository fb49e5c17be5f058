"""Unmodified vLLM and SGLang on this library, on GPUs: `make servers`, or `python -m servers` with `tests` on the path.

    __main__, runner    which scenarios there are, and running them, each in a process of its own with a time limit
    plan                the scenarios: a server start each, with what is measured on it
    scenario            the process of a scenario: starts the server, measures, writes a line as each measurement ends
    measures            what is measured: answers, milliseconds a step, traffic, sleep, a fault
    vllm_server, sglang_server   what both are asked, in their own words
    modes               as it is, FlashInfer's trtllm, ours: environment and arguments
    client              an asynchronous HTTP client of both
    faults              the plugin that does a worker harm at a given step
    prompts, models     what is asked of which models
    answers, counts     what a server answered; how many calls of ours it made for that
    compare, judge      what answers of two modes have in common; what is wrong with a scenario
    against_fp32        the process that compares all modes with the same model in fp32
    record              bench/results/servers_*.json

Nothing but `vllm_server`, `sglang_server` and `faults` imports a server, and those only inside functions. How to run
this: docs/servers.md.
"""
