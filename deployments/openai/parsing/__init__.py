"""From a model's text to the parts of a message: reasoning, content and tool calls."""

from deployments.openai.parsing.format import AnswerFormat, answer_format

__all__ = ["AnswerFormat", "answer_format"]
