"""Serving: a mixture inside vLLM, as a plugin of it.

    plugin.py       what vLLM calls in each of its processes
    model.py        the base model's class, with a mixture in it
    passes.py       scaling pass and adapted pass in one call
    following.py    the gate, and what the layers follow
    layers.py       the experts around vLLM's linear layers, also where these are spread over processes
    mixture.py      the saved folder as plain tensors, and what cannot be served
    command.py      `weft serve`: what is checked, and vLLM's server with everything set
    launch.py       that server's process
    requests.py     what a request may ask for
    page/           the page at `/`
    embedded/       what serves where vLLM is not

The first six run inside vLLM and import nothing of peft or of weft's model.
"""
