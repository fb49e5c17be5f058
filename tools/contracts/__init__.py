"""Facts of each supported release of FlashInfer, vLLM and SGLang that our front rests on, committed as JSON.

`python -m tools.contracts renew` reads them from the package index and names what moved.
"""
