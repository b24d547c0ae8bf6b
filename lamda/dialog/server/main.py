"""`lamda serve`: answer HTTP requests with a trained model."""

from __future__ import annotations

import argparse
import gc
import ipaddress
import logging
import os
import socket
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from lamda import console
from lamda.config.errors import UserError, all_of
from lamda.dialog.options import add_options, calibrated, reply_options_of, toolset_of, usable_tools
from lamda.dialog.server.limits import Limits
from lamda.host_memory import limit_arenas

_SWITCH_SECONDS = 0.0005
"""Interpreter switch interval: the connection thread waits this long for the GIL after each system call."""

KEY_VARIABLE = "LAMDA_API_KEY"


def main(argv: list[str]) -> int:
    """As `lamda serve --help` says; raises UserError."""
    options = parser().parse_args(argv)
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise UserError(f"the server needs {', '.join(missing)}: pip install 'lamda-pytorch[serve]'")
    keys = read_keys(options.key_file)
    key = next(iter(keys.values()), None)
    all_of(lambda: check_exposure(options.host, key=key, is_meant=options.without_key), lambda: _limits(options))
    _serve(options, keys)
    return 0


def _serve(options: argparse.Namespace, keys: dict[str, str]) -> None:
    """Load the model and answer requests until a signal ends the server."""
    from lamda.dialog.server.app import App
    from lamda.dialog.server.connections import Server
    from lamda.dialog.server.guard import LOOPBACK
    from lamda.dialog.server.service import Service
    from lamda.inference.loading import load_run

    limit_arenas()
    reply_options, toolset = reply_options_of(options), toolset_of(options)
    listening = _listen(options.host, options.port)
    loaded = load_run(options.run, int8=options.int8)
    service = Service(
        loaded.model,
        loaded.tokenizer,
        name=options.name or options.run.resolve().name,
        sequence_length=loaded.config.data.sequence_length,
        is_tuned=loaded.config.data.packing == "whole",
        toolset=usable_tools(toolset, loaded.path, forced=options.force_tools),
        options=calibrated(reply_options, loaded, threshold=options.threshold),
        limits=_limits(options),
    )
    hosts = LOOPBACK | {options.host, *options.allow_host}
    app = App(service, hosts=hosts, keys=keys, chat_only=options.chat_only)
    console.outlive()
    sys.setswitchinterval(_SWITCH_SECONDS)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of responses to clients that have just left
    gc.collect()
    gc.freeze()  # a collection that walks through all loaded objects would stop every thread for 0.2 s
    gigabytes, kept = (n * service.token_bytes / 1e9 for n in (options.total_tokens, options.cached_tokens))
    print(f"{loaded.path.name} of {options.run} listens on {_address(options.host, listening.getsockname()[1])}")
    print(f"{options.total_tokens:,} tokens of all requests take up to {gigabytes:.1f} GB")
    print(f"{options.cached_tokens:,} tokens of earlier prompts take up to {kept:.1f} GB", flush=True)
    Server(app, grace=options.grace, report=partial(print, flush=True)).run(sockets=[listening])


def read_keys(files: list[Path]) -> dict[str, str]:
    """The API keys by name: those of the files, named as these are, or that of the environment, if any.

    Raises UserError if one cannot be read or used, and for equal names or keys.
    """
    if not files:
        key = read_key(None)
        return {} if key is None else {KEY_VARIABLE: key}
    keys = {file.name: key for file in files if (key := read_key(file)) is not None}
    if len({*keys.values()}) < len(files):
        raise UserError("--key-file: each must have a name and a key of its own, so that clients can be distinguished")
    return keys


def read_key(file: Path | None) -> str | None:
    """The API key from a file or the environment, if any. Raises UserError if it is empty or unreadable."""
    if file is None:
        key, place = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
    else:
        try:
            key, place = file.read_text("utf-8"), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--key-file {file}: cannot be read ({error})") from error
    if key is None:
        return None
    key = key.strip()
    if not key:
        raise UserError(f"{place}: the key is empty; write one, or remove the option")
    if not all("!" <= character <= "~" or character == " " for character in key):
        raise UserError(f"{place}: a header cannot carry this key: use one line of printable ASCII characters")
    return key


def check_exposure(host: str, *, key: str | None, is_meant: bool) -> None:
    """Raises UserError if other machines could reach the server without a key and `--without-key` is absent."""
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not is_local and key is None and not is_meant:
        raise UserError(
            f"--host {host} lets other machines in, and there is no key: give --key-file FILE or {KEY_VARIABLE}, "
            "or --without-key"
        )


def _listen(host: str, port: int) -> socket.socket:
    """Raises UserError if the address is not available."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, UnicodeError) as error:
        message = f"cannot listen on {_address(host, port)} ({error}): choose another --host or --port"
        raise UserError(message) from error


def _limits(options: argparse.Namespace) -> Limits:
    """The limits that the options set. Raises UserError if one is too low."""
    least = dict.fromkeys(("max_tokens", "requests", "seconds", "total_tokens", "connections"), 1)
    least |= {"key_requests": 1, "key_tokens": 1, "cached_tokens": 0, "grace": 0}
    given = {name: getattr(options, name) for name in least}
    if wrong := {name: value for name, value in given.items() if value is not None and not value >= least[name]}:
        lines = (f"--{name.replace('_', '-')} is {value}: give at least {least[name]}" for name, value in wrong.items())
        raise UserError("\n".join(lines))
    tokens, _ = given.pop("max_tokens"), given.pop("grace")
    return Limits(tokens=tokens, candidates=max(options.candidates, Limits.candidates), **given)


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def parser() -> argparse.ArgumentParser:
    """The options of `lamda serve`."""
    parser = argparse.ArgumentParser(prog="lamda serve", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, a checkpoint or an imported model")
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="default %(default)s: this machine alone")
    parser.add_argument("--port", type=int, default=8000, metavar="P", help="default %(default)s")
    parser.add_argument("--name", help="the model's name in requests; default: the run's folder")
    parser.add_argument(
        "--key-file", type=Path, action="append", default=[], metavar="FILE",
        help=f"requests must carry its content, or that of {KEY_VARIABLE}; may be repeated, one for each client",
    )  # fmt: skip
    parser.add_argument("--without-key", action="store_true", help="accept other machines without a key")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="another name by which clients call this server; may be repeated",
    )  # fmt: skip
    parser.add_argument("--chat-only", action="store_true", help="no /v1/completions, whose texts are not filtered")
    limits, add = Limits(), parser.add_argument
    add("--max-tokens", type=int, default=limits.tokens, metavar="N", help="per prompt and reply; default %(default)s")
    add("--requests", type=int, default=limits.requests, metavar="N", help="handled at a time; default %(default)s")
    add(
        "--total-tokens", type=int, default=limits.total_tokens, metavar="N",
        help="in the caches of all requests; default %(default)s",
    )  # fmt: skip
    add(
        "--cached-tokens", type=int, default=limits.cached_tokens, metavar="N",
        help="of earlier prompts whose keys and values are kept; default %(default)s",
    )  # fmt: skip
    add("--key-requests", type=int, metavar="N", help="the same as --requests for each key; default: no limit")
    add("--key-tokens", type=int, metavar="N", help="the same as --total-tokens for each key; default: no limit")
    add("--connections", type=int, default=limits.connections, metavar="N", help="open at a time; default %(default)s")
    add("--seconds", type=float, default=limits.seconds, metavar="S", help="time per request; default %(default)g")
    add(
        "--grace", type=float, default=10.0, metavar="S",
        help="time for active requests to finish when the server ends; default %(default)g",
    )  # fmt: skip
    add_options(parser)
    return parser
