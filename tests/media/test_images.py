"""Pictures whose files are partly broken."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from deployments.media.images import decode_image, open_images
from deployments.media.parts import MediaSource

RIGHTWARDS = 6


def with_broken_exif(tag: int, kind: int) -> bytes:
    """A JPEG that is to be turned, with a tag whose type is not the one of its value."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[tag] = RIGHTWARDS, 2
    Image.new("RGB", (8, 6), "red").save(file, "JPEG", exif=exif)
    data = bytearray(file.getvalue())
    place = data.find(tag.to_bytes(2, "big"), data.find(b"MM"))
    data[place + 2 : place + 4] = kind.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(("tag", "kind"), [(0x128, 2), (0x128, 4), (0x100, 5), (0x11A, 1), (0x213, 7)])
def test_a_picture_whose_exif_cannot_be_read_is_read_as_it_lies(tag: int, kind: int) -> None:
    uri = "data:image/jpeg;base64," + base64.b64encode(with_broken_exif(tag, kind)).decode()
    source = MediaSource(uri, "messages[0].content[0].image_url")
    [image] = open_images([source], max_pixels=1000)
    assert decode_image(image, source).size == (8, 6)
