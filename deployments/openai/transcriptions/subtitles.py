"""Segments as subtitles: SubRip and WebVTT (https://www.w3.org/TR/webvtt1/)."""

from __future__ import annotations

from deployments.core.transcript import Segment

VTT_HEAD = "WEBVTT\n\n"


def srt_block(number: int, segment: Segment) -> str:
    """A numbered block of SubRip."""
    return f"{number}\n{_span(segment, ',')}\n{_line(segment)}\n\n"


def vtt_block(segment: Segment) -> str:
    """A cue of WebVTT."""
    return f"{_span(segment, '.')}\n{_line(segment)}\n\n"


def _span(segment: Segment, point: str) -> str:
    return f"{_clock(segment.start, point)} --> {_clock(segment.end, point)}"


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"


def _line(segment: Segment) -> str:
    # An arrow would look like another pair of times, an empty line like the block's end.
    return " ".join(segment.text.split()).replace("-->", "->")
