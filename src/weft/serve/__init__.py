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
    choices.py      what each request of a batch has asked for, as tensors
    front.py        what turns it into vLLM's requests; answers.py: and vLLM's answers into what was asked for
    prometheus.py   numbers for /metrics
    page/           the page at `/`
    embedded/       what serves where vLLM is not

What runs inside vLLM imports nothing of peft or of weft's model: all but command.py and embedded/.
"""
