"""The options of a request for a mixture: the model name, and the field `weft` of the body. For both engines.

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
from weft.files.reading import is_finite_in_float32, is_whole, shown

FIELD = "weft"
SHARES = "weft_shares"  # vLLM's extra argument with the key of a text's shares
BASE = "base"
_FIELDS = ("weights", "top_k", "global_weight", "shares")


class RequestError(ConfigError):
    """A request is not valid.

    Attributes:
        status: the HTTP status.
        field: the wrong field of the body; None if another part of the request is wrong.
    """

    def __init__(self, message: str, field: str | None, status: int = 400) -> None:
        super().__init__(message)
        self.field = field
        self.status = status

    def body(self) -> dict[str, Any]:
        """The body of the answer, in OpenAI's format."""
        kind = "NotFoundError" if self.status == 404 else "BadRequestError"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.status}}


@dataclass(frozen=True)
class Choice:
    """The options of one request for a mixture.

    Attributes:
        alone: the name of an expert: that adapter alone, without the global weight; "" for the base model; None for the
            mixture.
        weights: constant weights of the experts, in their order; None uses the gate.
        top_k: number of experts that the gate keeps for each token; None takes the mixture's option.
        global_weight: factor of all scalings or weights; None takes the mixture's option.
        shares: whether the answer has each token's shares.
    """

    alone: str | None = None
    weights: tuple[float, ...] | None = None
    top_k: int | None = None
    global_weight: float | None = None
    shares: bool = False

    @property
    def decides(self) -> bool:
        """Whether the options change the model's output."""
        return replace(self, shares=False) != Choice()

    def written(self) -> str:
        """The options as one line of JSON; equal options have equal lines."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def read(line: str) -> Choice:
        """The options from a line of `written`."""
        values = json.loads(line)
        weights = values.pop("weights")
        return Choice(weights=None if weights is None else tuple(weights), **values)


@dataclass(frozen=True)
class Served:
    """The model names that are served.

    Attributes:
        name: the name of the mixture.
        experts: the experts' names, in order.

    Raises:
        ConfigError: an expert is named "base", which means the base model.
    """

    name: str
    experts: tuple[str, ...]

    def __post_init__(self) -> None:
        if BASE in self.experts:
            raise ConfigError(
                f"expert {BASE!r} cannot be served: {self.name}:{BASE} is the base model. Name the expert otherwise"
            )

    def names(self) -> list[str]:
        """All model names: the mixture, each expert, the base model."""
        return [self.name, *(f"{self.name}:{expert}" for expert in (*self.experts, BASE))]

    def about(self, *, scheme: str, engine: str, base: str, chat: bool) -> dict[str, Any]:
        """The answer of /v1/weft.

        Args:
            scheme: the passes of the mixture (`scheme_of`).
            engine: name and version of the engine.
            base: the base model's name.
            chat: whether the base model has a chat template.
        """
        known = {"name": self.name, "experts": list(self.experts), "scheme": scheme, "engine": engine, "base": base}
        return {**known, "shares": True, "chat": chat}

    def choice(self, model: Any, options: Any = None) -> Choice:
        """Read and check the options of a request.

        Args:
            model: the field `model`; None for the mixture.
            options: the field `weft`; None for no options.

        Raises:
            RequestError: a name or a value is not valid.
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
            raise RequestError("weft.top_k and weft.weights exclude each other: weights replace the gate", FIELD)
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
    """Raise if a request for shares is not for the new tokens of a single text.

    Args:
        **wrong: field -> (whether its value is not allowed, the allowed value).

    Raises:
        RequestError: a value is not allowed.
    """
    for field, (stands_in_the_way, right) in wrong.items():
        if stands_in_the_way:
            raise RequestError(f"{field} must be {right} where weft.shares is true", field)


def cache_salt(choice: Choice, clients: str | None) -> str | None:
    """The salt that separates a request's cached keys and values from those of requests with other options.

    An engine finds cached prefixes by tokens and salt, not by the experts' weights. A client's own salt is hashed too,
    so that it cannot be equal to the salt of other options.

    Args:
        choice: the options of the request.
        clients: the salt in the request, or None.

    Returns:
        The salt; None if there are no options and no client's salt.
    """
    if not choice.decides and clients is None:
        return None
    return hashlib.sha256(json.dumps([replace(choice, shares=False).written(), clients]).encode()).hexdigest()


def _number(value: Any, name: str) -> float:
    if not is_finite_in_float32(value):
        raise RequestError(f"weft.{name} ({shown(value)}) must be a finite number", f"{FIELD}.{name}")
    return float(value)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
