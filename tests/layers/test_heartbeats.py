"""What a rank says of the others when they are the reason for its end."""

import torch.distributed as dist

from llama.layers.heartbeats import ENDED, Heartbeats

RAISES = "def all_reduce():\n    raise RuntimeError('connection closed')"


def test_a_failed_collective_is_found_behind_the_error_that_it_caused():
    """As the engine's thread raises it, and then the main one."""
    names: dict = {}
    exec(compile(RAISES, "/site-packages/torch/distributed/distributed_c10d.py", "exec"), names)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    store.set("sign of life of rank 1", f"there {ENDED}")
    heartbeats = Heartbeats(store, "here", rank=0, world=2, timeout=20)
    try:
        try:
            names["all_reduce"]()
        except RuntimeError as error:
            cause = error
        found = RuntimeError("the engine has failed")
        found.__cause__ = cause
        said = heartbeats.explain(found)
        assert said and said.startswith("error: rank 1 on host there has ended; rank 0 on host ")
        assert said.endswith(" waited for all_reduce")
        assert heartbeats.explain(RuntimeError("its own")) is None
    finally:
        heartbeats.stop()
