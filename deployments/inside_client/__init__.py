"""For clients: captured states as tensors, and vectors for interventions. Needs numpy; torch if it is there.

from deployments.inside_client import load_capture, pack, upload
"""

from deployments.inside_client.capture import Capture, load_capture
from deployments.inside_client.vectors import pack, read_vectors, upload

__all__ = ["Capture", "load_capture", "pack", "read_vectors", "upload"]
