"""The embedded engine: a mixture behind OpenAI's endpoints, on transformers alone, for a laptop.

bodies.py       what a request asks for, read and checked
fields.py       the fields of a JSON body
stops.py        text that ends at a stop string, of which nothing is let out
following.py    what a request lets the model follow
generating.py   one text, token by token
engine.py       one thread that uses the model, and whose turn it is
answers.py      what clients get, as OpenAI's servers put it
metrics.py      what was done, for Prometheus
app.py          the routes
server.py       `weft serve` without vLLM
"""
