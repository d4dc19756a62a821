"""From a model's text to the parts of a message: reasoning, content and tool calls."""
