"""A proxy on loopback that passes TCP connections on and counts the bytes that come back."""

import contextlib
import socket
import threading
from collections.abc import Iterator

_CHUNK_BYTES = 1 << 16


class CountingProxy:
    """Passes connections on to a port of this machine."""

    def __init__(self, port: int) -> None:
        self.num_bytes = 0  # that the server has sent so far
        self._target = ("127.0.0.1", port)
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                server = socket.create_connection(self._target)
                for source, target, counts in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pass_on, args=(source, target, counts), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                if counts:
                    with self._lock:
                        self.num_bytes += len(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def counting_proxy(port: int) -> Iterator[CountingProxy]:
    """Yield a proxy for a port while the block runs."""
    proxy = CountingProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
