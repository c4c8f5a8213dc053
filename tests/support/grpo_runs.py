"""Given rollouts for GRPOTrainer, rewards for them, and what a run has left behind."""

import copy
import json
from pathlib import Path

import torch

from fastft.errors import EngineError
from fastft.rollout.base import Completion, Engine
from fastft.train.grpo.config import GRPOConfig

PROMPTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(0, 24, 3)]


class GivenRollouts(Engine):
    """Completions that follow from a prompt and their place among its completions; no weights are used."""

    name = "given"

    def __init__(self, logprob=None, fail_at=None):
        self.logprob, self.fail_at, self.calls, self.log = logprob, fail_at, 0, []

    def hand_over(self, model):
        self.log.append("hand_over")

    def generate(self, prompts, sampling, count=1):
        self.log.append("generate")
        self.calls += 1
        if self.calls == self.fail_at:
            raise EngineError("engine 'given': killed")
        return [[self.completion(prompt, place, sampling) for place in range(count)] for prompt in prompts]

    def completion(self, prompt, place, sampling):
        generator = torch.Generator().manual_seed(1000 * sum(prompt) + place)
        size = int(torch.randint(2, sampling.max_new_tokens + 1, (1,), generator=generator))
        ids = torch.randint(7, 96, (size,), generator=generator).tolist()
        ids = [*ids[:-1], sampling.stop_ids[0]] if size < sampling.max_new_tokens else ids
        return Completion(tuple(ids), None if self.logprob is None else (self.logprob,) * size)

    def sleep(self):
        self.log.append("sleep")

    def wake(self):
        self.log.append("wake")

    def close(self):
        self.log.append("close")


class Second(GRPOConfig):
    """Arguments of the second of two processes."""

    world_size, process_index = 2, 1


def as_second(trainer):
    """Let a trainer take itself for the second of two processes, by its arguments."""
    trainer.args = copy.copy(trainer.args)
    trainer.args.__class__ = Second
    return trainer


def length_of(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def even(prompts, completions, completion_ids, **columns):
    return [sum(number % 2 == 0 for number in ids) / len(ids) for ids in completion_ids]


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def rows_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
