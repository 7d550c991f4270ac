"""Run a function in several processes that form one gloo group."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

# The server imports the heavy packages once; ranks are forked from it, while it has no threads yet.
_CONTEXT = multiprocessing.get_context("forkserver")
# DeepSpeed imports the last but one for every engine, and torch's compiler with it, which takes seconds.
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "deepspeed",
        "training.pretrain",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "torch.utils.tensorboard",
    ]
)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Return results of `function(*arguments)` by rank; it finds RANK and its like in the environment."""
    port, receivers, processes = free_port(), [], []
    for rank in range(ranks):
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_rank, args=(function, rank, ranks, port, sender, arguments))
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    results = []
    for receiver in receivers:
        try:
            results.append(receiver.recv() if receiver.poll(600) else ("failed", "no answer in 600 s"))
        except EOFError:
            results.append(("failed", "the rank died"))
    for process in processes:
        process.kill()
        process.join()
    failures = [text for status, text in results if status == "failed"]
    assert not failures, "\n".join(failures)
    return [value for _, value in results]


def _rank(
    function: Callable[..., Any], rank: int, ranks: int, port: int, sender: Any, arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    try:
        sender.send(("done", function(*arguments)))
    except BaseException:
        sender.send(("failed", traceback.format_exc()))
