"""Rewards: what a stream's responses are worth, in content, in time and in form.

Pure functions over `StreamOutcome`, composed from the configuration. To use a term of your own, `register` it or name it in
`reward.terms.<name>.target`.

Invariant: imports only `streams`, never ray (`rewards.scorer` is the class that becomes an actor).
"""

from rewards.brevity import ResponseCount, ThinkLength, ThinkOverlong
from rewards.compose import AnswerResult, Reward, RewardConfig, RewardResult
from rewards.correctness import Correctness, correct_answers
from rewards.format import Format, format_score
from rewards.outcome import AnswerMatch, StreamOutcome, match_answers, spare_responses
from rewards.registry import Term, get, register
from rewards.scripted import oracle_turns, silent_turns
from rewards.timing import Timing, timing_score
from streams.answers.judge import is_correct

__all__ = [
    "AnswerMatch",
    "AnswerResult",
    "Correctness",
    "Format",
    "ResponseCount",
    "Reward",
    "RewardConfig",
    "RewardResult",
    "StreamOutcome",
    "Term",
    "ThinkLength",
    "ThinkOverlong",
    "Timing",
    "correct_answers",
    "format_score",
    "get",
    "is_correct",
    "match_answers",
    "oracle_turns",
    "register",
    "silent_turns",
    "spare_responses",
    "timing_score",
]
