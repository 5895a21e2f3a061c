"""Serving: a mixture in vLLM, as a plugin, or in the embedded engine.

    plugin.py       the plugin's entry point, which vLLM calls in each of its processes
    model.py        vLLM's class of the base model with a mixture in it
    passes.py       scaling pass and adapted pass in one call
    following.py    the gate, and the scalings that the layers use
    layers.py       the experts in vLLM's linear layers, also with tensor parallelism
    mixture.py      the saved folder as plain tensors, and checks of what can be served
    command.py      `weft serve`: checks, and the command line of vLLM's server
    launch.py       the process of that server
    requests.py     the options of a request
    choices.py      the options of the requests in a batch, as tensors
    front.py        converts requests for vLLM; answers.py converts vLLM's answers
    prometheus.py   numbers for /metrics
    page/           the page at `/`
    embedded/       the embedded engine, for use without vLLM

Code that runs in vLLM (all except command.py and embedded/) imports nothing from peft or from weft's model.
"""
