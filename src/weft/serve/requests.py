"""What a request may ask of a mixture: which model name, and the field `weft` of its body. No engine is known here.

{"model": "my-mixture:code"}                            one expert alone
{"model": "my-mixture:base"}                            the base model
{"model": "my-mixture", "weft": {"weights": {"code": 0.7, "law": 0.3}, "global_weight": 1.0}}
{"model": "my-mixture", "weft": {"top_k": 1, "shares": true}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from weft.errors import ConfigError
from weft.files.reading import is_number, is_whole, shown

FIELD = "weft"
SHARES = "weft_shares"  # for the engine alone: by which name a text's shares are kept
BASE = "base"
_FIELDS = ("weights", "top_k", "global_weight", "shares")
_LARGEST = 3.4e38  # of float32, in which scalings are computed


class RequestError(ConfigError):
    """A request that cannot be answered as it is.

    Attributes:
        status: of HTTP.
        field: of the request's body that is wrong; None where it is another part of the request.
    """

    def __init__(self, message: str, field: str | None, status: int = 400) -> None:
        super().__init__(message)
        self.field = field
        self.status = status

    def body(self) -> dict[str, Any]:
        """As OpenAI's servers put it."""
        kind = "NotFoundError" if self.status == 404 else "BadRequestError"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.status}}


@dataclass(frozen=True)
class Choice:
    """What one request asks of a mixture.

    Attributes:
        alone: an expert's name: that adapter alone, at its own weight; "" is the base model; None is the mixture.
        weights: constant weights of the experts in their order, in the gate's place; None lets the gate decide.
        top_k: how many experts the gate keeps for each token; None is the mixture's own number.
        global_weight: multiplies gate or weights; None is the mixture's own.
        shares: whether the answer tells each token's shares.
    """

    alone: str | None = None
    weights: tuple[float, ...] | None = None
    top_k: int | None = None
    global_weight: float | None = None
    shares: bool = False

    @property
    def decides(self) -> bool:
        """Whether it changes what the model computes."""
        return replace(self, shares=False) != Choice()

    def written(self) -> str:
        """As one line, the same for the same choice."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def read(line: str) -> Choice:
        """The choice that `written` gave."""
        values = json.loads(line)
        weights = values.pop("weights")
        return Choice(weights=None if weights is None else tuple(weights), **values)


@dataclass(frozen=True)
class Served:
    """What clients can choose from.

    Attributes:
        name: of the mixture.
        experts: their names, in order.

    Raises:
        ConfigError: an expert's name would stand for the base model.
    """

    name: str
    experts: tuple[str, ...]

    def __post_init__(self) -> None:
        if BASE in self.experts:
            raise ConfigError(
                f"expert {BASE!r} cannot be served: {self.name}:{BASE} is the base model. Name the expert otherwise"
            )

    def names(self) -> list[str]:
        """All model names: the mixture, each expert alone, the base."""
        return [self.name, *(f"{self.name}:{expert}" for expert in (*self.experts, BASE))]

    def about(self, *, scheme: str, engine: str, base: str, chat: bool) -> dict[str, Any]:
        """What /v1/weft tells.

        Args:
            scheme: how the gate gets what it reads.
            engine: what runs.
            base: the base model's name.
            chat: whether that has a chat template.
        """
        known = {"name": self.name, "experts": list(self.experts), "scheme": scheme, "engine": engine, "base": base}
        return {**known, "shares": True, "chat": chat}

    def choice(self, model: Any, options: Any = None) -> Choice:
        """What a request asks for.

        Args:
            model: its `model`; none is the mixture.
            options: its `weft`; none asks for nothing.

        Raises:
            RequestError: a name or a value is not allowed.
        """
        alone = self._alone(model)
        if options is None:
            return Choice(alone)
        if not isinstance(options, Mapping):
            raise RequestError(f"weft ({shown(options)}) must be an object with {_listed(_FIELDS)}", FIELD)
        unknown = [name for name in options if name not in _FIELDS]
        if unknown:
            raise RequestError(f"weft has {shown(unknown[0])}; it can have {_listed(_FIELDS)}", FIELD)
        given = {name: value for name, value in options.items() if value is not None}
        weights, top_k, global_weight = given.get("weights"), given.get("top_k"), given.get("global_weight")
        shares = given.get("shares", False)
        if not isinstance(shares, bool):
            raise RequestError(f"weft.shares ({shown(shares)}) must be true or false", f"{FIELD}.shares")
        if alone is not None and (given.keys() - {"shares"}):
            raise RequestError(
                f"weft.{next(iter(given.keys() - {'shares'}))} is for model {self.name!r}, where experts are mixed, "
                f"not for {model!r}",
                FIELD,
            )
        if weights is not None and top_k is not None:
            raise RequestError("weft.top_k is the gate's, whose place weft.weights takes: send one of them", FIELD)
        return Choice(
            alone,
            None if weights is None else self._weights(weights),
            None if top_k is None else self._top_k(top_k),
            None if global_weight is None else _number(global_weight, "global_weight"),
            shares,
        )

    def _alone(self, model: Any) -> str | None:
        if model is None or model in ("", self.name):
            return None
        if model in self.names():
            expert: str = model[len(self.name) + 1 :]
            return "" if expert == BASE else expert
        raise RequestError(
            f"The model {shown(model)} does not exist. There are: {_listed(self.names())}", "model", status=404
        )

    def _weights(self, weights: Any) -> tuple[float, ...]:
        if not isinstance(weights, Mapping):
            raise RequestError(
                f"weft.weights ({shown(weights)}) must be an object: a weight for each expert that takes part, of "
                f"{_listed(self.experts)}",
                f"{FIELD}.weights",
            )
        unknown = [name for name in weights if name not in self.experts]
        if unknown:
            raise RequestError(
                f"weft.weights has {shown(unknown[0])}; the experts are {_listed(self.experts)}", f"{FIELD}.weights"
            )
        return tuple(_number(weights.get(name, 0.0), f"weights.{name}") for name in self.experts)

    def _top_k(self, top_k: Any) -> int:
        if not is_whole(top_k) or not 1 <= top_k <= len(self.experts):
            raise RequestError(
                f"weft.top_k ({shown(top_k)}) must be a whole number from 1 to {len(self.experts)}, the number of "
                "experts",
                f"{FIELD}.top_k",
            )
        return int(top_k)


def refuse_beside_shares(**wrong: tuple[Any, str]) -> None:
    """Raise where shares would not be those of one text's new tokens.

    Args:
        **wrong: field -> (whether it stands in the way, what it must be).

    Raises:
        RequestError: one does.
    """
    for field, (stands_in_the_way, right) in wrong.items():
        if stands_in_the_way:
            raise RequestError(f"{field} must be {right} where weft.shares is true", field)


def cache_salt(choice: Choice, clients: str | None) -> str | None:
    """What keeps a request's keys and values apart from those of requests with another choice.

    An engine finds cached prefixes by their tokens and by a salt, and knows nothing of weights. A client's own salt
    goes through the same function, so that none can be made that meets another choice's.

    Args:
        choice: of the request.
        clients: the salt that the client sent, if any.
    """
    if not choice.decides and clients is None:
        return None
    return hashlib.sha256(json.dumps([replace(choice, shares=False).written(), clients]).encode()).hexdigest()


def _number(value: Any, name: str) -> float:
    if not is_number(value) or abs(value) > _LARGEST:
        raise RequestError(f"weft.{name} ({shown(value)}) must be a finite number", f"{FIELD}.{name}")
    return float(value)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
