"""An exported network on many machines: replicas of the server's service under Ray Serve.

    ray start --head && ray start --address=HEAD:6379   # the second on every other machine
    DYNEXIT_FOLDER=/path/on/every/machine serve run deploy.ray_app:build replicas=4 precision=bf16

POST / as /classify in `deploy/server.py`. Every replica has queues, a thread of stages and a policy of its
own. Ray (`pip install "ray[serve]"`) shares requests out, and holds back what a replica has no room for.
"""

import os
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from deploy.decide import only
from deploy.runner import Runner
from deploy.server import classify, responded
from deploy.service import Limits, Service


@serve.deployment(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=Limits().queue)
class Classifier:
    """A replica: the runner, its scheduler, and what goes with them, in a process of its own."""

    def __init__(self, folder: str, **options: Any) -> None:
        limits = only(options, Limits.__annotations__)
        runner = Runner(folder, **only(options, options.keys() - limits))
        self.service = Service(runner, options.get("precision", "fp32"), Limits(**limits))

    async def __call__(self, request: Request) -> Response:
        """The answer to an image."""
        return await responded(self.service, classify(self.service, request))

    def check_health(self) -> None:
        """Ray starts a replica anew where this fails."""
        if not self.service.ready:
            raise RuntimeError("the stages have stopped")


def build(words: dict[str, str]) -> serve.Application:
    """The application, from the words NAME=VALUE of `serve run`."""
    folder = words.pop("folder", os.environ.get("DYNEXIT_FOLDER", ""))
    replicas = int(words.pop("replicas", 2))
    options = {name: int(value) if value.isdigit() else value for name, value in words.items()}
    options = {"threads": 1, "micro_batch": 16} | options
    return Classifier.options(num_replicas=replicas).bind(folder, **options)
