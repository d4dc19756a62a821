"""Variables of the chat template that a request sets: those that the template does not read have no effect."""

from __future__ import annotations

import re
from collections import defaultdict

from deployments.core.errors import UnsupportedParameter
from deployments.core.model_card import ModelCard
from deployments.openai.http.exchange import Exchange

_KWARGS = "chat_template_kwargs."


def check_variables(exchange: Exchange, card: ModelCard, template: str | None) -> None:
    """List the variables that the template does not mention among the ignored keys.

    Args:
        template: the source of the model's chat template; None if a function, which may read anything, writes the
            prompt.

    Raises:
        UnsupportedParameter: a field of another server, such as `enable_thinking`, means variables that the template
            does not mention.
    """
    if template is None:
        return
    fields = exchange.settled.fields
    given = {f"{_KWARGS}{name}": name for name in fields.get("chat_template_kwargs", ())}
    given |= {name: name for name in ("documents", "reasoning_effort") if name in fields}
    unread = {place: name for place, name in given.items() if not re.search(rf"\b{re.escape(name)}\b", template)}
    switches: dict[str, list[str]] = defaultdict(list)
    for place in given:
        if place.startswith(_KWARGS) and place in exchange.settled.sent:
            switches[exchange.settled.sent[place]].append(place)
    for key, places in switches.items():
        if all(place in unread for place in places):
            names = " or ".join(unread[place] for place in places)
            raise UnsupportedParameter(
                f"The chat template of model {card.id!r} has no variable {names}; leave {key!r} out.", param=key
            )
    meant = {place for places in switches.values() for place in places}
    exchange.ignore([place for place in unread if place not in meant])
