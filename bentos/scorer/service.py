"""The scorer as a BentoML service, started by `fraudlab serve`. What it does is in `fraudlab.serving`; here it is wired up."""

import logging
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # before bentoml is imported

import bentoml

from fraudlab.core.settings import settings
from fraudlab.serving.access import Access
from fraudlab.serving.bento import check_start, open_rollout, tracer_provider, watch_workers
from fraudlab.serving.connection import guard_connections
from fraudlab.serving.observability import log_lines, trace_with
from fraudlab.serving.service import Door
from fraudlab.serving.service import Service as Scorer

HERE = Path(__file__).resolve().parent
logging.getLogger("fraudlab").setLevel(logging.INFO)
log_lines(settings().log_format)
guard_connections()
logging.getLogger("uvicorn.access").propagate = False  # else each request is told to a log that nobody reads
scorer = Scorer(partial(open_rollout, HERE), Access.from_settings())


class Outermost(bentoml.Service):
    def to_asgi(self, is_main: bool = True):
        trace_with(tracer_provider())
        return Door(super().to_asgi(is_main), scorer)


@bentoml.service(
    name="scorer",
    service_class=Outermost,
    workers=settings().workers,
    traffic={"timeout": 2},  # seconds; BentoML keeps a timer for each request that long
    http={"host": "127.0.0.1"},
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(scorer.mounted())
class Service:
    @bentoml.on_deployment
    def check():
        check_start(HERE)
        watch_workers()

    def __is_ready__(self) -> bool:
        return scorer.rollout is not None
