"""Reading YAML in which no key is there twice: YAML's own readers take the last one and say nothing."""

from __future__ import annotations

from typing import Any

import yaml


class RepeatedKey(yaml.YAMLError):
    """A mapping has a key twice; the message names it and both lines."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> Any:
        # Before keys are merged (`<<`), which may be given again.
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = self.construct_object(key), key.start_mark.line + 1
            if name in lines:
                place = f"lines {lines[name]} and {line}" if line != lines[name] else f"line {line}, twice"
                raise RepeatedKey(f"the key {key.value!r} is at {place}; keep one of them.")
            lines[name] = line
        return node

    def construct_yaml_timestamp(self, node: Any) -> Any:
        try:
            return super().construct_yaml_timestamp(node)
        except ValueError as error:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(
                f"line {line}: {node.value!r} is not a date ({error}); quote it if it is a text."
            ) from error


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_timestamp)


def read_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, or a mapping in it has a key twice.
    """
    return yaml.load(text, Loader=_Loader)
