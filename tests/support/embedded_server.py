"""The embedded engine with a tiny mixture in it, at a port of this machine."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time

import torch
import transformers
import uvicorn

import weft
from models import lora, quietly, save_adapter, tiny_llama, tiny_tokenizer
from weft.options import ServeOptions
from weft.serve.embedded.app import make_app
from weft.serve.embedded.server import load

NAMES = ("code", "law")
# transformers' continuous batching cannot be paused before 5.23: there one text is written at a time.
BATCHES = hasattr(getattr(transformers, "ContinuousBatchingManager", None), "pause")


def ascii_tokenizer():
    """The tiny tokenizer without parts of characters: every text that is written can be read again."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "Ġ", "Ċ", *map(chr, range(33, 127))])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = tiny_tokenizer().chat_template
    return fast


def make_mixture(folder, adapter=None, sizes=None, **options):
    """The folder of a mixture whose gate differs from token to token, on a base in the same folder."""
    tokenizer = ascii_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.4, **sizes or {})
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapters = {
        name: save_adapter(
            transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), adapter or lora(), folder / name, seed
        )
        for seed, name in enumerate(NAMES, start=1)
    }
    torch.manual_seed(3)
    mixture = quietly(weft.from_adapters, str(folder / "base"), adapters, **{"layerwise_scalings": True, **options})
    with torch.no_grad():
        for parameter in mixture.internal_xlora_classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    quietly(mixture.save_pretrained, folder / "mix")
    return folder / "mix"


class Served:
    """What tests ask of a running server.

    Attributes:
        model, tokenizer: another copy of what is served.
        engine: that answers.
        port: of this machine.
    """

    def __init__(self, folder, engine, port):
        self.model = weft.from_pretrained(str(folder))
        self.tokenizer = engine.tokenizer
        self.engine, self.port = engine, port

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def request(self, method, path, body=None, headers=()):
        """(status, the answer's bytes)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            data = body if body is None or isinstance(body, bytes) else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json", **dict(headers)})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def post(self, body, path="/v1/completions", status=200):
        """The JSON of an answer."""
        found, answer = self.request("POST", path, body)
        assert found == status, answer
        return json.loads(answer)

    def stream(self, body, path="/v1/completions"):
        """The JSON of all events of a stream."""
        status, answer = self.request("POST", path, {**body, "stream": True})
        assert status == 200, answer
        *events, last, rest = answer.decode().split("\n\n")
        assert (last, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def tokens(self, text):
        return torch.tensor([self.tokenizer(text)["input_ids"]])

    def greedy(self, text, number):
        """The new tokens of `generate`."""
        ids = self.tokens(text)
        return self.model.generate(ids, max_new_tokens=number, do_sample=False)[0, ids.shape[1] :].tolist()

    def decode(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@contextlib.contextmanager
def serving(folder, **options):
    """A server in a thread of this process."""
    options = ServeOptions(str(folder), **options)
    engine, reads, about = load(options)
    config = uvicorn.Config(make_app(engine, reads, about, options.api_key), port=0, log_level="warning", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    try:
        yield Served(folder, engine, server.servers[0].sockets[0].getsockname()[1])
    finally:
        engine.stop()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        assert not engine.alive
