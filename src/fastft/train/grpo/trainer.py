"""Reinforcement learning with rewards (GRPO and its kin): TRL's trainer with fastft's rollouts and log-probabilities.

Beside `config` the one file that subclasses TRL's GRPO classes. Nothing of TRL is replaced: methods are
overridden. Advantages, losses, clipping, KL and the correction for the engine's log-probabilities are TRL's.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor
from transformers import TrainerCallback

from fastft.errors import DataError, Problem, UsageError
from fastft.graph.compile import release_weights, wait_ahead
from fastft.graph.planned import PlannedLayers
from fastft.memory.plan import Plan
from fastft.noise import kept_back, quiet
from fastft.rewards import guard
from fastft.rewards.guarding import calls_of
from fastft.rollout import make_engine
from fastft.rollout.base import Engine, Sampling
from fastft.state import base_model, get_state
from fastft.train import checkpoint, handed, plots, settings
from fastft.train.base import Trained, built, load_named, take_recompute
from fastft.train.grpo import batching, checks, groups, measured, prompts, rollouts, scored, telling
from fastft.train.grpo import kept as kept_rollouts
from fastft.train.grpo.config import LEGACY, GRPOConfig
from fastft.train.grpo.phases import Phases
from fastft.train.logprobs import CompletionLogprobs, completion_logprobs
from fastft.train.telling import bars_aside

OWN = ("compile", "engine")


class GRPOTrainer(Trained, trl.GRPOTrainer):
    """A TRL GRPOTrainer that trains through fastft.

    `engine` samples the completions: "transformers", "vllm", "auto", or a `fastft.rollout.base.Engine`; left out it is
    the config's. It is awake while completions are sampled, and asleep while the model trains. `compile=True` compiles
    the model's layers (`fastft.compile`) unless that was done before; sampling stays eager. Rewards are guarded
    (`fastft.rewards.guard`): a failing row is missing, a hung reward is an error.

    Log-probabilities are made from hidden states, never from all logits. With an adapter, KL (`beta`) is measured
    against the model with the adapter switched off: there is no second model. The log-probabilities of the engine are
    compared with the trainer's at every step; beyond `GRPOConfig(max_logprob_difference=...)` in the mean over an
    update that is an error, before the optimizer steps. They correct the loss (TRL's `vllm_importance_sampling_*`) for
    every engine that does not sample from the trained model itself.

    It also takes what older scripts pass: `tokenizer`, `max_prompt_length`, `max_completion_length`,
    `num_generations`, `max_seq_length`, `beta`; each is moved into the config with one line.

    The log holds TRL's metrics, `rewards/NAME/failures` and `/missing` (rows, where there are any) and
    `logprob_difference/mean`, `/max` and `/kl`; metrics.jsonl also the seconds of each
    phase of a step (rollout, hand_over, logprobs, rewards, update). completions.jsonl keeps sample completions. The
    terminal shows one line of a step.

    Raises `UsageError` for unknown arguments and combinations that cannot work, `DataError` for prompts that cannot be
    used, `EngineError` when the engine fails, `RewardError` when a reward hangs or always fails, `SaveError`.
    """

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: Any = None,
        *positional: Any,
        engine: str | Engine | None = None,
        compile: bool = True,
        **kwargs: Any,
    ) -> None:
        kwargs = settings.by_name(trl.GRPOTrainer, positional, kwargs, skip=4)
        args, kwargs = settings.take_older_arguments(trl.GRPOTrainer, GRPOConfig, args, kwargs, LEGACY, OWN)
        if isinstance(model, str):
            model, kwargs = load_named("GRPOTrainer", model, args, kwargs)
        handed.refuse_in_trainer("GRPOTrainer", model, kwargs)
        args = copy.copy(settings.as_config(GRPOConfig, trl.GRPOTrainer, args))
        kwargs.setdefault("processing_class", get_state(model).tokenizer)
        checks.refuse(model, args, checks.listed(reward_funcs), kwargs, compile)
        functions = checks.guarded(reward_funcs, args)
        kwargs |= checks.datasets(kwargs)
        checks.refuse_columns(functions, kwargs)
        checkpoint.make_folder(Path(args.output_dir))
        self.check_evaluations(args, kwargs, measured.measured(args, checks.listed(reward_funcs), kwargs, engine))
        recompute = take_recompute(args, compile)
        # With an adapter and a beta TRL would copy the adapter; the reference here is the model without it.
        adapted = hasattr(model, "peft_config") or kwargs.get("peft_config") is not None
        beta, args.beta = args.beta, 0.0 if adapted else args.beta
        with built(model, kwargs.get("train_dataset"), kwargs.get("eval_dataset")):
            super().__init__(model, functions, args, **kwargs)
        self.beta = args.beta = beta
        self.reward_funcs = guard(self.reward_funcs, time_limit=args.reward_time_limit)  # environments bring their own
        self.phases, self._scored = Phases(), scored.Scored()
        self._settled_step, self._order, self._resumed_orders = 0, None, None
        self._batching, self._merged = batching.batching(args), 1  # as asked for; micro-batches that are one
        self._differences: list[rollouts.Difference] = []  # of the micro-batches of an update
        self._longest = self._fit_prompts()
        self._samples = rollouts.Samples(Path(args.output_dir), args.keep_completions)
        self.equip(
            model,
            "grpo",
            compile=compile,
            recompute=recompute,
            picture=("reward.png", plots.plot_rewards),
            measure=self._measure,
            told=batching.NAMES,
            line=telling.line,
        )
        self.add_callback(_Bookkeeping(self))
        self._handed_over: Any = None
        self.engine = self._start_engine(engine if engine is not None else self._configured_engine())
        self._corrects = args.vllm_importance_sampling_correction and self.engine.name != "transformers"
        checks.refuse_correction(args, self._corrects)

    # ---- prompts

    def _fit_prompts(self) -> int | None:
        """Leave out prompts that are too long, and return the tokens of the longest; None where that is not known.

        Raises `DataError` for prompts whose completions would not fit into the model, and for too few prompts.
        """
        if self.environment_factories is not None or not hasattr(self.train_dataset, "__len__"):
            return self.args.max_prompt_length
        self.train_dataset, longest = self._within_length(self.train_dataset, "train")
        self.eval_dataset, other = prompts.each_within_length(self.eval_dataset, self._within_length)
        longest = max(longest, other)
        config = base_model(self.model).config.get_text_config()
        room = get_state(self.model).max_length or getattr(config, "max_position_embeddings", None)
        problems: list[Problem | str] = []
        if room is not None and longest + self.max_completion_length > room:
            remedy = "Lower max_completion_length, set max_prompt_length, or load the model with a larger max_length."
            told = f"{longest} + {self.max_completion_length} tokens"
            problems.append(
                Problem("GRPOConfig longest prompt + max_completion_length", told, f"at most {room}", remedy)
            )
        need, there = self.args.generation_batch_size // self.num_generations, len(self.train_dataset)
        if there < need:
            remedy = f"Give {need} prompts or more, or make the batch smaller: with fewer no batch is whole."
            problems.append(Problem("train prompts", there, f"at least the {need} of one generation", remedy))
        if problems:
            raise DataError(*problems)
        if there % need:
            print(
                f"fastft: {there} prompts, {need} a generation: {there % need} are left over in each epoch, drawn anew."
            )
        return longest

    def _within_length(self, rows: Any, name: str) -> tuple[Any, int]:
        def sizes_of(texts: Any) -> list[int]:
            return [len(ids) for ids in self._tokenize_prompts(texts)[0]]

        return prompts.within_length(rows, name, self.args.max_prompt_length, sizes_of)

    def settle_batches(self, planned: PlannedLayers, where: torch.device) -> None:
        """Make micro-batches of an update one, as far as `groups.merged` says, and say so."""
        args, wanted = self.args, self.args.merge_micro_batches
        wanted = where.type == "cuda" if wanted is None else wanted
        if not wanted or self._longest is None or not groups.may_merge(args, self._entropy_bonus_enabled):
            return
        rows, length = args.per_device_train_batch_size, self._longest + self.max_completion_length

        def foreseen(count: int) -> Plan | None:
            return planned.foreseen(*self.head_use(count), (count, length), where)

        times = groups.merged(rows, args.gradient_accumulation_steps, length, foreseen)
        if args.world_size > 1:  # as many in every process: GPUs may have other room
            times = int(self.accelerator.gather(torch.tensor([times], device=self.accelerator.device)).min())
        if times == 1:
            return
        groups.merge(args, times)
        self._train_batch_size *= times
        self._merged = times
        print(
            f"fastft: {times} micro-batches of {rows} completions are computed as one of {rows * times}, with the same "
            "update; merge_micro_batches=False keeps them apart."
        )

    def largest_batch(self) -> tuple[int, int] | None:
        """Return (rows, length) of the largest micro-batch, None where that is not known before the run."""
        if self._longest is None:
            return None
        return self.args.per_device_train_batch_size, self._longest + self.max_completion_length

    def head_use(self, rows: int | None = None) -> tuple[str, int | None]:
        """Return that log-probabilities of completions are asked for: of `rows`, or of a micro-batch."""
        return "logprobs", (rows or self.args.per_device_train_batch_size) * self.max_completion_length

    # ---- rollouts

    def _configured_engine(self) -> str:
        """Return the config's engine; a model that was loaded to roll out without vLLM does so under `use_vllm` too."""
        attached = get_state(self.model).rollouts
        if self.args.engine != "vllm" or attached is None or attached.name == "vllm":
            return self.args.engine
        print(f"fastft: the model was loaded to roll out with {attached.name!r}, and is not given to vLLM here.")
        return attached.name

    def _start_engine(self, engine: str | Engine) -> Engine:
        options = dict(self.args.engine_options or {})
        if engine == "vllm":
            options = {**checks.vllm_options(self.args, self.largest_batch()), **options}
        wait_ahead(self.model)  # an engine captures CUDA graphs
        made = make_engine(engine, self.model, self._tokenizer, **options)
        made.sleep()
        return made

    def sampling(self) -> Sampling:
        """Return how completions are sampled."""
        return Sampling(
            max_new_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
            stop_ids=tuple(self.eos_token_ids),
        )

    def _generate(self, prompts: list) -> Any:
        """Sample all turns of all prompts, with the engine awake and the weights of this step handed over."""
        with self.phases("hand_over"):
            if self.engine.shares_memory:
                release_weights(self.model)
            self.engine.wake()
            if self._handed_over != (weights := rollouts.state_of(self.model, self.state.global_step)):
                self.engine.hand_over(self.model)
                self._handed_over = weights
        self._last_loaded_step = self.state.global_step  # TRL's own engine, which there is not, has nothing to load
        self.use_vllm = False
        try:
            made = super()._generate(prompts)
        finally:
            with self.phases("hand_over"):
                self.engine.sleep()
        self.use_vllm = self._corrects and made[4] is not None  # TRL corrects where this says so
        return made

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Return token ids and the engine's log-probabilities of one completion of every prompt."""
        if images is not None:
            raise UsageError("GRPOTrainer: prompts with images are not supported yet; leave out the images")
        with self.phases("rollout"), quiet():
            completions = rollouts.sample(self.engine, prompt_ids, self.sampling())
        return [list(completion.ids) for completion in completions], rollouts.logprobs_of(completions)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Return the next micro-batch; those of a new generation hold the completions of a prompt together."""
        waiting = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is waiting or groups.order_matters(self.args, self._entropy_bonus_enabled):
            return inputs
        update = groups.micro_batches_of_an_update(self.args)
        self._buffered_inputs = groups.put_together(self._buffered_inputs, update)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        told_here = kept_back(trl.GRPOTrainer.__module__, scored.is_of_unscored_rows)
        with bars_aside(self), self.phases("rewards"), told_here:
            made = super()._calculate_rewards(*args, **kwargs)
            own = made.chunk(self.args.world_size)[self.args.process_index]
            left = self._sum_processes(torch.tensor(scored.left_out(own, self.reward_funcs), device=made.device))
            self._scored.tell(int(left), len(made), self.is_world_process_zero() and self.model.training)
        self._count_failures()
        if self.model.training:
            self._scored.add(made)
            self.recorder.notes["rewards"] = self._scored.notes()
        return made

    def _count_failures(self) -> None:
        """Add up, until the next log, the rows that each reward failed for and those that it left without a reward."""
        calls = calls_of(self.reward_funcs)
        counts = torch.tensor([[call.failures, call.missing] for _, call in calls], dtype=torch.long)
        counts = self._sum_processes(counts.to(self.accelerator.device))
        metrics = self._metrics["train" if self.model.training else "eval"]
        for (name, _), (failures, missing) in zip(calls, counts.tolist(), strict=True):
            for kind, count in (("failures", failures), ("missing", missing)):
                key = f"rewards/{name}/{kind}"
                if count:
                    metrics[key] = [sum(metrics[key]) + count]  # one number, of which TRL takes the mean

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        made = super()._generate_and_score_completions(inputs)
        if self.model.training and self.is_world_process_zero():
            count = len(made["advantages"]) * self.args.world_size
            self._samples.add(self.state.global_step + 1, self._logs, count)
        return made

    # ---- the loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Return log-probabilities `[B, keep]` and entropies or None, from hidden states, in batches without gradients.

        Under gradients the whole micro-batch is one pass. There is no auxiliary loss of a mixture of experts.
        """
        if torch.is_grad_enabled():
            logprobs, entropies = self._logprobs(model, input_ids, attention_mask, logits_to_keep, compute_entropy)
            self._current = logprobs.detach()
            return logprobs, entropies, None
        size = batch_size or input_ids.shape[0]
        with self.phases("logprobs"):
            parts = [
                self._logprobs(model, ids, mask, logits_to_keep, compute_entropy)
                for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True)
            ]
        logprobs = torch.cat([part for part, _ in parts])
        self._current = logprobs
        return logprobs, torch.cat([part for _, part in parts]) if compute_entropy else None, None

    def _logprobs(self, model: Any, ids: Tensor, mask: Tensor, keep: int, entropy: bool) -> tuple[Tensor, Any]:
        with self.accelerator.autocast():
            made = completion_logprobs(
                model, ids, mask, keep, temperature=self.temperature, entropy=entropy,
                entropy_gradient=self._entropy_bonus_enabled,
            )  # fmt: skip
        if torch.is_grad_enabled():
            self._note_layout(made, ids.numel())
        return made.logprobs, made.entropies

    def _note_layout(self, made: CompletionLogprobs, padded: int) -> None:
        """Record how log-probabilities were made, and how many tokens this process's updates took, padded and not."""
        told = self.recorder.extra.setdefault("logprobs", {"tokens": {"computed": 0, "padded": 0}})
        told |= {"layout": made.layout, "why_not_shared": made.reason or None}
        told["tokens"]["computed"] += made.computed
        told["tokens"]["padded"] += padded

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return TRL's loss; the engine's log-probabilities are compared with the trainer's."""
        self.use_vllm = "importance_sampling_ratio" in inputs
        loss = super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        if self.model.training:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            labels = torch.where(mask.bool(), inputs["completion_ids"], -100)
            labels = torch.cat([torch.full_like(inputs["prompt_ids"], -100), labels], dim=1)
            self.tally.add({"input_ids": ids, "attention_mask": seen, "labels": labels})
        self._compare(inputs, mask)
        return loss

    def _compare(self, inputs: Mapping[str, Any], mask: Tensor) -> None:
        """Log how far the engine's log-probabilities are from the trainer's; of an update, note it for `_judge_update`.

        Without log-probabilities of their own for the sampled weights (TRL leaves them out where no update lies
        between), those of this pass are the trainer's. An evaluation learns nothing from them, and judges none.
        """
        if "sampling_per_token_logps" not in inputs:
            return
        sampling, mode = self.sampling(), "train" if self.model.training else "eval"
        truncated = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
        trainer = inputs.get("old_per_token_logps", self._current)
        found = rollouts.difference(trainer, inputs["sampling_per_token_logps"], mask, truncated)
        for name in ("mean", "max", "kl"):
            self._metrics[mode][f"logprob_difference/{name}"].append(getattr(found, name))
        if self.model.training:
            self._differences.append(found)

    def _judge_update(self) -> None:
        """Raise `EngineError` where the engine's log-probabilities are beyond the bound, before the optimizer steps.

        Over all micro-batches of an update, in all processes: which prompts share one says nothing of an engine.
        """
        noted, self._differences = self._differences, []
        if self.args.world_size > 1:
            found = rollouts.together(noted)
            row = torch.tensor([[found.mean, found.max, found.kl, found.tokens]], device=self.accelerator.device)
            noted = [rollouts.Difference(*row[:3], int(row[3])) for row in self.accelerator.gather(row).tolist()]
        bound = self.args.max_logprob_difference if self.sampling().repetition_penalty == 1.0 else None
        reasons = ["dropout is on while the model trains (lora_dropout)"] if checks.drops_out(self.model) else []
        rollouts.refuse_difference(rollouts.together(noted), bound, self.engine.name, reasons)

    # ---- the record

    def _measure(self, seconds: float) -> dict[str, Any]:
        taken = self.phases.take(seconds, "update")
        self.recorder.extra["phases"] = {name: round(total, 3) for name, total in self.phases.totals.items()}
        return {"phases": taken}

    def _begin_record(self) -> None:
        """Begin what a run records beside metrics.jsonl: names of engine and rewards, and the sample completions."""
        self._scored, self._handed_over = scored.Scored(begun=self.state.global_step), None
        told = {"engine": self.engine.name, "rewards": list(self.reward_func_names), "merged": self._merged}
        self.recorder.extra |= told
        self.recorder.notes["rewards"] = []
        if self.is_world_process_zero():
            self._samples.begin(self.recorder.kept_steps)

    # ---- checkpoints

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _settle(self) -> None:
        """Note that a step is whole: what a checkpoint says from now on is this."""
        self._settled_step = self._step

    def _begin_epoch(self) -> None:
        """Note the order of the prompts, or take up that of the checkpoint that is gone on with."""
        generator = self._order_generator()
        if generator is None:
            return
        if self._resumed_orders is not None:
            between = float(self.state.epoch or 0).is_integer()  # the epoch that was begun before it has ended
            generator.set_state(self._resumed_orders[1 if between else 0])
            self._resumed_orders = None
        self._order = generator.get_state()

    def _order_generator(self) -> torch.Generator | None:
        return getattr(getattr(self, "_sampler", None), "generator", None)

    def save_extra(self, folder: Path) -> None:
        """Keep what the next step needs: completions that are still to be learnt from, and the order of the prompts."""
        waiting = self._settled_step % (self.args.steps_per_generation * self.num_iterations) != 0
        kept = {
            "step": self._settled_step,
            "inputs": self._buffered_inputs if waiting else None,
            "batching": self._batching,
            "orders": None if self._order is None else (self._order, self._order_generator().get_state()),
        }
        path = kept_rollouts.file_of(folder, self.args.process_index)
        checkpoint.write_file(path, lambda temporary: torch.save(kept, temporary))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_orders = None
        self._step = self._settled_step = self.state.global_step * self.args.gradient_accumulation_steps
        self._buffered_inputs = None
        kept = None if checkpoint is None else kept_rollouts.of_process(Path(checkpoint), self.args.process_index)
        if kept is None:
            return
        self._resumed_orders, self._step = kept["orders"], kept["step"]
        if kept["inputs"] is not None:
            self._buffered_inputs = [self._on_device(batch) for batch in kept["inputs"]]
        else:  # a generation begins here, also if those of this run are of other lengths
            every = self.args.steps_per_generation * self.num_iterations
            self._step = -(-self._step // every) * every
        self._settled_step = self._step

    def resume_problems(self, folder: Path) -> list[Problem | str]:
        """Return damaged files, or the settings with which a checkpoint's waiting completions cannot be learnt from.

        The same in every process: one that stops alone would leave the others waiting.
        """
        if damaged := kept_rollouts.damages(folder):
            return damaged
        problems = super().resume_problems(folder)
        kept = kept_rollouts.of_process(folder, self.args.process_index)
        if kept is None:
            return problems
        now = self._batching | {"world_size": self.args.world_size}
        line = batching.told(kept, now, folder)
        if line is not None and self.is_world_process_zero():
            print(f"fastft: {line}")
        files = [kept_rollouts.file_of(folder, number) for number in range(self.args.world_size)]
        return [*problems, *batching.problems(kept, now, folder, [path for path in files if not path.is_file()])]

    def _on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        device = self.accelerator.device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


class _Bookkeeping(TrainerCallback):
    """Tells a GRPOTrainer where a run, an epoch and a step begin and end."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin the record."""
        self.trainer._begin_record()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Note the order of the prompts."""
        self.trainer._begin_epoch()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Forget what an update that was broken off has noted."""
        self.trainer._differences = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Hold the engine to account for the update."""
        self.trainer._judge_update()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note that the step is whole."""
        self.trainer._settle()
