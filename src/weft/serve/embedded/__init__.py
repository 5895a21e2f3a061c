"""The embedded engine: an OpenAI server for a mixture that needs only transformers, for small machines.

bodies.py       reads and checks the body of a request
fields.py       the fields of a JSON body
stops.py        stop strings
following.py    applies the options of a request to the model
generating.py   one text, token by token
tickets.py      the requests and their texts in the engine
batching.py     several texts in one call, with transformers' continuous batching
engine.py       the thread that runs the model, and the queue of texts
answers.py      the answers, in OpenAI's format
metrics.py      counters for Prometheus
app.py          the routes
server.py       `weft serve` without vLLM
"""
