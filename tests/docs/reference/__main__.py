"""Writes the generated parts of the reference: `python -m tests.docs.reference`."""

from __future__ import annotations

from tests.docs.reference import pages, routes
from tests.openai.conftest import Server

server = Server(routes.SERVER, [{"id": "demo", "loader": "model_loaders.demo:load_model"}])
server.start()
try:
    answers = routes.examples(server.url)
finally:
    server.stop()
for place, text in pages.generated(answers):
    place.write(text)
