"""The classifier of errors."""


def check_context_limit(text: str) -> bool:
    return "context length" in text
