"""The service inside an application of your own, which keeps its routes, error handlers and
middleware.

    uvicorn --app-dir examples mount:app --port 8100 --workers 1

/hello is this application's; /api/v1/pow/… is the service, with /health, /ready and /metrics below
that path. One process must own a round: never start several workers. Keys and other settings come
from the environment (docs/configuration.md).
"""

import os

from fastapi import FastAPI

import assay
from assay.poc.net.deployment import Deployment
from assay.poc.service import ServiceSettings, attach
from assay.poc.service.service_controller import Controller


def load() -> Deployment:
    """Load the model, in a thread of the service, while the application answers already."""
    return Deployment.of(assay.load_model(os.environ.get("MODEL", "reference:qwen3")))


app = FastAPI(title="an application of one's own")


@app.get("/hello")
def hello() -> dict[str, str]:
    """Answer as before: keys and guards of the service are in its routes alone."""
    return {"hello": "world"}


attach(app, Controller(load, ServiceSettings()), operations=True, under="/api/v1/pow")
