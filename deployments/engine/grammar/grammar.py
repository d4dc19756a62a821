"""Constraints on the text: JSON schemas, regular expressions, choices and Lark grammars, by llguidance.

llguidance 1.9.1 and xgrammar 0.2.8 were measured on a 128k vocabulary and one thread: compiling a schema of 3 fields
took 0.7 against 27 ms, one of 320 fields 11 against 154 ms; a mask took 0.06 against 0.03 ms, for a regular expression
0.09 against 1.7 ms. llguidance takes the token bytes of any tokenizer, limits its own work, and depends on nothing.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import llguidance
import numpy as np
import torch

from deployments.core.calls import Grammar, ThinkingBudget
from deployments.core.errors import BadRequest, ModelError, grammar_error
from deployments.core.events import FinishReason
from deployments.core.reasoning import ReasoningMarkers
from deployments.engine.base.failures import unloading
from deployments.engine.base.protocol import EngineRequest
from deployments.engine.grammar.after_reasoning import AfterReasoning, FreeMask
from deployments.engine.grammar.call_parts import closers_of, with_parts
from deployments.engine.grammar.grammar_ending import Closers, GrammarEnding, shortest_ending
from deployments.engine.grammar.grammar_tokens import GrammarTokens
from deployments.engine.grammar.regex import without_boundaries
from deployments.engine.text.vocabulary import Vocabulary

MAX_SOURCE = 1 << 17
COMPILE_SECONDS = 5.0
_CACHED = 64
# Unlimited white space between tokens lets a weak model fill its whole budget with it.
_JSON: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}


class CompiledGrammar:
    """A compiled grammar; every sequence that uses it gets its own `mask`.

    Attributes:
        free: it constrains nothing.
        ending: the fewest tokens found that make a complete text; None if none was found.
    """

    free = False

    def __init__(self, matcher: llguidance.LLMatcher, tokens: GrammarTokens, closers: Closers = ()) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._closers = closers
        self.ending = shortest_ending(matcher, tokens, None, closers)

    def mask(
        self,
        max_tokens: int,
        *,
        reasoning: ReasoningMarkers | None = None,
        opened: bool = False,
        budget: ThinkingBudget | None = None,
    ) -> GrammarMask | AfterReasoning | FreeMask:
        """The constraint on one sequence of at most `max_tokens` tokens.

        Args:
            reasoning: how the model marks its reasoning, after which the constraint begins.
            opened: the prompt has opened it.
            budget: how long it may be.
        """
        if reasoning is not None:
            return AfterReasoning(self, self._tokens, reasoning, opened=opened, max_tokens=max_tokens, budget=budget)
        if self.free:
            return FreeMask()
        return GrammarMask(self._matcher.deep_copy(), self._tokens, self._to_end(self.ending, max_tokens))

    def mask_of(self, request: EngineRequest) -> GrammarMask | AfterReasoning | FreeMask:
        """The constraint on the sequence of a request."""
        params, reasoning, opened = request.sampling, request.reasoning, request.reasoning_opened
        return self.mask(params.max_tokens or 1, reasoning=reasoning, opened=opened, budget=params.thinking)

    def _to_end(self, ending: list[int] | None, max_tokens: int) -> GrammarEnding:
        return GrammarEnding(ending, max_tokens, self._closers)

    def answer(self, max_tokens: int, begun: Sequence[int] = ()) -> GrammarMask | FreeMask | None:
        """The constraint on a text of at most `max_tokens` tokens after `begun`; None if it cannot begin so."""
        matcher, ending = self._matcher.deep_copy(), self.ending
        if begun:
            if matcher.try_consume_tokens(list(begun)) < len(begun):
                return None
            ending = shortest_ending(matcher, self._tokens, None, self._closers)
        return GrammarMask(matcher, self._tokens, self._to_end(ending, max_tokens))


class FreeGrammar(CompiledGrammar):
    """No constraint on the answer, so that a budget of the reasoning is all that there is."""

    free = True

    def __init__(self, tokens: GrammarTokens) -> None:
        self._tokens = tokens
        self.ending = None

    def answer(self, max_tokens: int, begun: Sequence[int] = ()) -> FreeMask:
        return FreeMask()


class GrammarMask:
    """The state of a sequence in its grammar; implements `TokenMask` of `sampling/state.py`."""

    def __init__(self, matcher: llguidance.LLMatcher, tokens: GrammarTokens, closing: GrammarEnding) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._closing = closing

    def mask(self, scores: torch.Tensor) -> None:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little", count=self._tokens.width).view(np.bool_))
        scores.masked_fill_(~allowed[: len(scores)].to(scores.device, non_blocking=True), float("-inf"))

    def accepts(self, token_id: int) -> bool:
        """Whether the token may come next."""
        return self._matcher.validate_tokens([token_id]) == 1

    def advance(self, token_id: int) -> int:
        token_id = self._closing.choose(self._matcher, self._tokens, token_id)
        self._matcher.consume_token(token_id)
        self._check()
        return token_id

    @property
    def ends(self) -> FinishReason | None:
        if not self._matcher.is_stopped():
            return None
        return "length" if self._closing.forced else "stop"

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BadRequest(f"The grammar cannot be followed any further: {grammar_error(self._matcher.get_error())}")


class GrammarCompiler:
    """Compiles grammars in its own threads and caches the last ones.

    Args:
        vocabulary: of the model.
        width: of the logits.
    """

    def __init__(self, vocabulary: Vocabulary, width: int) -> None:
        self._vocabulary = vocabulary
        self._width = width
        self._tokens: GrammarTokens | None = None
        self._lock = threading.Lock()
        # Building the tokens takes seconds; `compile` must not wait for it.
        self._tokens_lock = threading.Lock()
        self._cache: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="grammar")

    def compile(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """Compile without blocking.

        Returns:
            A future that is done within `COMPILE_SECONDS`. Its exception is BadRequest for a grammar that is invalid,
            cannot be satisfied, or takes too long.

        Raises:
            BadRequest: the source is larger than `MAX_SOURCE` bytes.
        """
        if len(grammar.source.encode()) > MAX_SOURCE:
            raise BadRequest(
                f"The {_noun(grammar)} has more than {MAX_SOURCE} bytes; send a smaller one.", param=grammar.param
            )
        outcome: Future[CompiledGrammar] = Future()
        with self._lock:
            known = self._cache.get(grammar)
            if known is not None:
                self._cache.move_to_end(grammar)
        if known is not None:
            outcome.set_result(known)
            return outcome
        clock = threading.Timer(COMPILE_SECONDS, _settle, (outcome, None, _too_long(grammar)))
        clock.daemon = True
        clock.start()
        try:
            self._threads.submit(self._compile, grammar, outcome, clock.cancel)
        except RuntimeError:
            clock.cancel()
            raise unloading() from None
        return outcome

    def close(self) -> None:
        """End the threads; compilations that have not started are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: Grammar, outcome: Future[CompiledGrammar], done: Callable[[], None]) -> None:
        if outcome.done():
            return
        try:
            tokens = self._known_tokens()
            compiled = self._compiled(grammar, tokens)
            with self._lock:
                self._cache[grammar] = compiled
                while len(self._cache) > _CACHED:
                    self._cache.popitem(last=False)
            _settle(outcome, compiled, None)
        except BadRequest as error:
            _settle(outcome, None, error)
        except Exception as error:
            _settle(outcome, None, ModelError(f"The grammar could not be compiled: {type(error).__name__}: {error}"))
        finally:
            done()

    def _compiled(self, grammar: Grammar, tokens: GrammarTokens) -> CompiledGrammar:
        if grammar.kind == "any":
            return FreeGrammar(tokens)
        closers = closers_of(grammar.source, tokens, self._vocabulary) if grammar.kind == "calls" else ()
        return CompiledGrammar(self._matcher(grammar), tokens, closers)

    def _matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        tokenizer = self._known_tokens().tokenizer
        if grammar.kind == "calls":
            source = with_parts(grammar.source, self._vocabulary.special_contents)
            grammar = replace(grammar, kind="lark", source=source)
        matcher = llguidance.LLMatcher(tokenizer, _as_llguidance(grammar), log_level=0)
        if matcher.is_error() and grammar.kind == "regex":
            again = llguidance.LLMatcher(tokenizer, _without_boundaries(grammar), log_level=0)
            matcher = matcher if again.is_error() else again
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise BadRequest(f"Invalid {_noun(grammar)}: {grammar_error(matcher.get_error())}", param=grammar.param)
        return matcher

    def _known_tokens(self) -> GrammarTokens:
        with self._tokens_lock:
            if self._tokens is None:
                self._tokens = GrammarTokens(self._vocabulary, self._width)
            return self._tokens


_NOUNS = {
    "json_schema": "JSON schema",
    "json_object": "JSON schema",
    "regex": "regular expression",
    "choice": "list of choices",
    "lark": "Lark grammar",
    "calls": "schema of a tool",
    "any": "constraint",
}


def _as_llguidance(grammar: Grammar) -> str:
    """The grammar in llguidance's own form."""
    try:
        if grammar.kind == "json_object":
            return llguidance.LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON)
        if grammar.kind == "json_schema":
            return llguidance.LLMatcher.grammar_from_json_schema(grammar.source, overrides=_JSON)
        if grammar.kind == "regex":
            return llguidance.LLMatcher.grammar_from_regex(grammar.source)
        if grammar.kind == "choice":
            choices = json.loads(grammar.source)
            if not (isinstance(choices, list) and choices and all(isinstance(c, str) and c for c in choices)):
                raise BadRequest("The choices must be a list of at least one non-empty string.", param=grammar.param)
            return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(c) for c in choices))
        return llguidance.LLMatcher.grammar_from_lark(grammar.source)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"Invalid {_noun(grammar)}: {error}", param=grammar.param) from error


def _without_boundaries(grammar: Grammar) -> str:
    """A regular expression that llguidance has refused, as a grammar of its."""
    try:
        return llguidance.LLMatcher.grammar_from_lark(without_boundaries(grammar.source))
    except ValueError as error:
        raise BadRequest(f"Invalid {_noun(grammar)}: {error}.", param=grammar.param) from None


def _settle(outcome: Future[CompiledGrammar], compiled: CompiledGrammar | None, error: Exception | None) -> None:
    """Set the outcome if it has none yet."""
    if outcome.done():
        return
    try:
        if compiled is not None:
            outcome.set_result(compiled)
        else:
            outcome.set_exception(error)
    except Exception:
        if not outcome.done():
            raise


def _too_long(grammar: Grammar) -> BadRequest:
    return BadRequest(
        f"The {_noun(grammar)} takes more than {COMPILE_SECONDS:g} s to compile; send a simpler one.",
        param=grammar.param,
    )


def _noun(grammar: Grammar) -> str:
    return _NOUNS[grammar.kind]
