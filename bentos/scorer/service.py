"""The scorer as a BentoML service, started by `fraudlab serve`. What it does is in `fraudlab.serving`; here it is wired up."""

import logging
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # before bentoml is imported

import bentoml

from fraudlab.core.settings import settings
from fraudlab.serving.bento import check_start, open_scorer
from fraudlab.serving.http import Guard, KnownPaths, application

HERE = Path(__file__).resolve().parent
API_KEY = settings().api_key
logging.getLogger("fraudlab").setLevel(logging.INFO)
app = application(partial(open_scorer, HERE), secured=bool(API_KEY))


class Outermost(bentoml.Service):
    def to_asgi(self, is_main: bool = True):
        return KnownPaths(super().to_asgi(is_main))


@bentoml.service(
    name="scorer",
    service_class=Outermost,
    workers=1,
    traffic={"timeout": 2},  # seconds; BentoML keeps a timer for each request that long
    http={"host": "127.0.0.1"},
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(app)
class Service:
    @bentoml.on_deployment
    def check():
        check_start(HERE)

    def __is_ready__(self) -> bool:
        return app.state.scorer is not None


Service.add_asgi_middleware(Guard, api_key=API_KEY)
