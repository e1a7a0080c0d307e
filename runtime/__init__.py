"""The thin runtime: configuration, weights, KV cache, scheduler, sampler, engine, command line."""
