"""Rewards: what a stream's responses are worth, in content, in time and in form.

Pure functions over `StreamOutcome`, composed from config; imports only `streams`, never ray
(the actor around it is `rewards.scorer`). Your own term:
`register` it, or point `reward.terms.<name>.target` at it.
"""

from rewards.brevity import ResponseCount, ThinkLength
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
