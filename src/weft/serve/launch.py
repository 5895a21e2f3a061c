"""Runs `vllm serve`, also if vLLM's package has another name, such as the one for CPUs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser


def parsed(flags: Sequence[str] | None = None) -> Namespace:
    """The flags of `vllm serve`, parsed and checked by vLLM."""
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    validate_parsed_serve_args(args)
    return args


def takes(name: str) -> bool:
    """Whether `vllm serve` has a flag with this name or prefix. Of --flag.key, only --flag is compared."""
    name = name.partition(".")[0].replace("_", "-")
    return any(known.startswith(name) for known in make_arg_parser(FlexibleArgumentParser())._option_string_actions)


def main() -> None:
    """Run the server; with --headless only the engines, for an API server on another machine."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    cli_env_setup()
    args = parsed()
    configure_logging_from_args(args)
    ServeSubcommand.cmd(args)


if __name__ == "__main__":
    main()
