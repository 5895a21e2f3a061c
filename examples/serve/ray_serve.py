"""Serve a mixture with Ray Serve: several replicas of what `weft serve` runs, behind one address.

pip install "ray[serve]"          # into each machine's environment with vLLM and weft
ray start --head                  # on the first machine; on the others: ray start --address FIRST:6379
python examples/serve/ray_serve.py /shared/my-mixture --replicas 2 --gpus 1 --api-key secret --max-model-len 4096

Flags that are not below are vLLM's. Where no cluster runs, Ray starts one on this machine. For several GPUs a replica:
--gpus 4 --tensor-parallel-size 4 --distributed-executor-backend mp
"""

import argparse
import os
import signal
import threading
from contextlib import AsyncExitStack, suppress
from types import SimpleNamespace

import ray
from ray import serve

from weft.options import ServeOptions
from weft.serve.command import server_command


@serve.deployment(max_ongoing_requests=256, health_check_period_s=10)
@serve.ingress()
class Mixture:
    """One replica: vLLM's own application, with weft's front before it."""

    async def __init__(self, flags):
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # as `weft serve` does
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client

        from weft.serve.launch import parsed

        self.args = parsed(flags)
        self.open = AsyncExitStack()
        self.engine = await self.open.enter_async_context(build_async_engine_client(self.args))

    async def __serve_build_asgi_app__(self):
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self.engine.get_supported_tasks()
        app = build_app(self.args, tasks, self.engine.model_config)
        await init_app_state(self.engine, app.state, self.args, tasks)
        app.state.server = SimpleNamespace()  # vLLM tells it to stop when the engine is dead; here Ray does that
        return app

    async def check_health(self):
        """Ray starts a replica anew where this fails."""
        await self.engine.check_health()

    async def __del__(self):
        await self.open.aclose()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the mixture, at the same path on all machines")
    parser.add_argument("--name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    ours, of_vllm = parser.parse_known_args(argv)

    options = ServeOptions(ours.model, name=ours.name, host=ours.host, port=ours.port, api_key=ours.api_key)
    command, announcement = server_command(options, of_vllm)  # what cannot be served is refused here
    flags = command[command.index("--model") :]
    replicas = Mixture.options(num_replicas=ours.replicas, ray_actor_options={"num_gpus": ours.gpus})
    ray.init()
    serve.start(http_options={"host": ours.host, "port": ours.port})
    serve.run(replicas.bind(flags), name="weft")
    print(f"{ours.replicas} replicas: {announcement}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own would leave processes behind
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    serve.delete("weft")


if __name__ == "__main__":
    main()
