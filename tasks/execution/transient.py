"""Which errors pass by themselves: a network that dropped, a server that was busy, memory that was short.

Everything else fails the same way when it is tried again: what the user gave, a full disk, an answer "not found".
Prefect is not imported: what it raises when it cannot be imported is asked about here, too.
"""

from __future__ import annotations

import errno
import ssl
from collections.abc import Iterator
from typing import Literal

from evaluation.inference.oom import class_names, short_of_memory
from pruning.errors import MemoryPart, memory_part

Passing = Literal["network", "memory"]

_BUSY = {408, 425, 429}
_NETWORK_ERRNOS = {
    *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.ETIMEDOUT),
}
# By name, since none of these libraries need be there, and importing one to ask would take seconds.
_NETWORK = {
    *("requests.ConnectionError", "requests.Timeout", "requests.ChunkedEncodingError"),
    *("httpx.TransportError", "httpx2.TransportError", "httpcore.NetworkError", "httpcore.TimeoutException"),
    *("urllib3.ProtocolError", "urllib3.TimeoutError", "urllib3.NewConnectionError", "http.IncompleteRead"),
    *("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError", "botocore.HTTPClientError", "socket.gaierror"),
    *("infra.Unreachable", "huggingface_hub.LocalEntryNotFoundError"),
}
# They look like the network's errors, or stand before them in a chain, and are the user's affair.
_SETTLED = {
    *("huggingface_hub.OfflineModeIsEnabled", "requests.SSLError", "requests.InvalidURL"),
    *("httpx.UnsupportedProtocol", "httpx2.UnsupportedProtocol", "datasets.DatasetNotFoundError"),
}


def passing(error: BaseException) -> Passing | None:
    """What will pass by itself, or None. What caused an error is looked at too: ours wrap those of the libraries."""
    causes = list(_chain(error))
    if any(short_of_memory(cause) for cause in causes):
        return "memory"
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):  # an answer decides, whatever it is wrapped in
            return "network" if status in _BUSY or status >= 500 else None
    if any(class_names(cause) & _SETTLED or isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return None
    return "network" if any(_of_network(cause) for cause in causes) else None


def short_part(error: BaseException) -> MemoryPart | None:
    """The part of a walk in which memory ran out, if that is known."""
    return next((part for cause in _chain(error) if (part := memory_part(cause))), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        hidden = following.__suppress_context__
        following = following.__cause__ or (None if hidden else following.__context__)


def _of_network(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError) or class_names(error) & _NETWORK:
        return True
    return isinstance(error, OSError) and error.errno in _NETWORK_ERRNOS
