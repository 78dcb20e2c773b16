"""Which families of language models Troupe trains and serves right: `python -m benchmarks.families`."""
