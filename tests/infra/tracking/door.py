"""A way to a server that can be shut, as if the server had died, without the cost of starting it again."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Door:
    """A way to the server that can be shut: who comes finds nobody, and who is inside is thrown out."""

    def __init__(self, server: str) -> None:
        self._server = server.removeprefix("http://").split(":")
        self._inside: list[socket.socket] = []
        self._listening = self._opened(0)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def open(self) -> None:
        self._listening = self._opened(int(self.url.rpartition(":")[2]))

    def shut(self) -> None:
        for each in (self._listening, *self._inside):
            with suppress(OSError):  # it has gone already
                each.shutdown(socket.SHUT_RDWR)  # a thread that still receives from it would keep it open
            each.close()

    def _opened(self, port: int) -> socket.socket:
        listening = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._let_in, args=(listening,), daemon=True).start()
        return listening

    def _let_in(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                comer, _ = listening.accept()
                host = socket.create_connection((self._server[0], int(self._server[1])))
                self._inside += [comer, host]
                for one, other in ((comer, host), (host, comer)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass_on(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while some := one.recv(65536):
                other.sendall(some)
            other.shutdown(socket.SHUT_WR)
