"""What every trainer of fastft does beside its loss: compile, record, save, resume, and tell how a run failed.

One contract. A trainer is `class XTrainer(Trained, trl.XTrainer)` in a file of its own. Its constructor

1. takes `recompute = take_recompute(args, compile)`, which changes its copy of the user's `args`,
2. calls `self.check_evaluations(...)` before its data are tokenised,
3. calls TRL's constructor within `built(model)`,
4. calls `self.equip(...)` once its `train_dataset` stands,

and its loss adds every micro-batch to `self.tally`. `args` are a `fastft.train.settings.Settings`. What a trainer may
override besides is `settle_batches`, `largest_batch` and `head_use` (what the memory plan is made for), `end_training`
and `begin_evaluation` (to let go of what training alone needs), `save_extra` (files of its own in a checkpoint),
`resume_problems` (what of them it cannot go on with) and `logs_late` (a step's line can wait for the next to begin).
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fastft.data.bars import bars_if_large
from fastft.errors import EngineError, MetricError, Problem, RewardError, SaveError, UsageError
from fastft.graph.compile import release_weights
from fastft.graph.planned import PlannedLayers
from fastft.noise import between_libraries, quiet
from fastft.state import base_model, get_state, planned_of
from fastft.train import (
    batches,
    card,
    checkpoint,
    earlier,
    flops,
    hygiene,
    lineage,
    memory,
    optimizers,
    recomputing,
    telling,
)
from fastft.train import resume as resuming
from fastft.train.arguments import refuse_unevaluated
from fastft.train.best import BestWeights, EarlyStopping, Measured, refuse_missing, refuse_unmeasured
from fastft.train.compiling import CompileCallback
from fastft.train.finite import FiniteLosses
from fastft.train.interrupt import Interruption, Stopped
from fastft.train.last_step import LastStep
from fastft.train.late_log import LateLog
from fastft.train.metric_values import Checked
from fastft.train.overrides import has_own
from fastft.train.record import RecordCallback
from fastft.train.spent import Tally


@contextlib.contextmanager
def built(model: Any, *data: Any) -> Iterator[None]:
    """Hold a model while TRL's constructor runs: what that changes on it (its forward, its dtypes) is put back.

    `data` are those of the constructor, which says nothing of them where they are few.
    """
    held = hygiene.own_dtypes(model), hygiene.unpatched(model), hygiene.head_out_of_sight(model)
    with contextlib.ExitStack() as stack:
        for context in (quiet(), between_libraries(), bars_if_large(*data), *held):
            stack.enter_context(context)
        yield


def take_recompute(args: Any, compile: bool) -> bool:
    """Return whether layers are to be recomputed; with `compile` the plan does it, and `args` ask for it no more.

    Raises `UsageError` for a `compute` that only compiled layers have, and for a `compile` that is no switch.
    """
    if not isinstance(compile, bool):
        raise UsageError(Problem(f"{type(args).__name__} compile", compile, "True or False"))
    if args.compute not in (None, "exact") and not compile:
        remedy = "Leave compile=False out, or compute."
        raise UsageError(Problem(f"{type(args).__name__} compute", args.compute, "'exact' with compile=False", remedy))
    asked = recomputing.settle(args)
    recomputing.ask(args, asked and not compile)
    return asked


def load_named(trainer: str, name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load a model given by name, with its tokenizer unless another is given. Raises `UsageError`."""
    if kwargs.get("quantization_config") is not None or getattr(args, "model_init_kwargs", None):
        raise UsageError(
            f"{trainer}: load the model with fastft.load(...) to choose its quantisation and dtype, and pass it"
        )
    from fastft.model.load import load

    model, tokenizer = load(name)
    return model, {**kwargs, "processing_class": kwargs.get("processing_class") or tokenizer}


class Trained(LateLog):
    """The shared half of a trainer; stands before TRL's class among the bases (see the file's contract)."""

    _own: tuple[Path, ...] = ()  # checkpoints of this run, the newest last: the folder may hold another's
    _staging: Path | None = None
    _to_push: str | None = None
    _told_of_plan = ""  # what was said of a memory plan that cannot be met
    _optimizer_made: torch.optim.Optimizer | None = None  # as the config says

    def check_evaluations(self, args: Any, kwargs: Mapping[str, Any], measured: Measured | None) -> None:
        """Raise `UsageError` for evaluations without data, and for best weights by a metric that they do not give.

        What a subclass, `compute_metrics` or the `on_evaluate` of a callback adds is not known before; neither is all
        where `measured` is None.
        """
        data, own = kwargs.get("eval_dataset"), type(self).__module__.startswith("fastft.")
        refuse_unevaluated(args, data)
        added = kwargs.get("compute_metrics") is not None or has_own(kwargs.get("callbacks") or (), "on_evaluate")
        if measured is not None and own and not added:
            refuse_unmeasured(args, measured, data)

    def equip(
        self,
        model: Any,
        method: str,
        *,
        compile: bool,
        recompute: bool,
        line: telling.Line = telling.log_line,
        **recording: Any,
    ) -> None:
        """Compile the layers and hang up the callbacks.

        `model` is what the user gave, `method` the record's name, `line` what the terminal shows of a log; `recording`
        are arguments of `RecordCallback`.
        """
        if self.model is not model:  # TRL has wrapped it with the `peft_config` it was given
            base_model(self.model).__dict__.pop("forward", None)
        batches.refuse_none(self.args, self.train_dataset)
        if self.compute_metrics is not None:
            self.compute_metrics = Checked(self.compute_metrics)
        if compile:
            self._compile(recompute)
        self.tally = Tally(windows={window for window in flops.work_of(self.model).windows if window is not None})
        self.recorder = RecordCallback(
            self.args.output_dir,
            self.tally,
            method=method,
            dataset=self.train_dataset,
            reduce=self._sum_processes,
            **recording,
        )
        self.aside = earlier.PutsAside(self.accelerator)
        self.callback_handler.callbacks.insert(0, self.aside)  # before those of the user, which may write there
        self.compiling = CompileCallback(self.recorder.extra)
        self.add_callback(self.compiling)  # before the recorder, which writes what this one adds
        self.add_callback(BestWeights(self.callback_handler, self.recorder))  # before the recorder, as well
        self.add_callback(self.recorder)
        self.finite = FiniteLosses(self.args, lambda lines: self.recorder.notes.update(finite=lines))
        self.add_callback(self.finite)
        self.interruption = Interruption()
        self.add_callback(LastStep(lambda: self.interruption.asked))
        self.add_callback(self.interruption)  # behind the recorder: it ends the run when a step is saved
        if self.args.early_stopping_patience is not None:
            patience, threshold = self.args.early_stopping_patience, self.args.early_stopping_threshold
            self.add_callback(EarlyStopping(patience, threshold))
        telling.take_over(self, line)

    def _sum_processes(self, counts: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(counts, "sum") if self.args.world_size > 1 else counts

    # ---- compiling

    def settle_batches(self, planned: PlannedLayers, where: torch.device) -> None:
        """Choose the micro-batches, now that the memory plan can be asked; the layers are on `where`."""

    def largest_batch(self) -> tuple[int, int] | None:
        """Return (rows, length) of the largest micro-batch, None where that is not known before the run."""
        return None

    def head_use(self) -> tuple[str, int | None]:
        """Return what the loss asks of the model's head (of `fastft.memory.estimate.HEADS`), and the most tokens of a
        micro-batch that it asks it of, None for all.
        """
        return "loss", None

    def _compile(self, recompute: bool) -> None:
        """Compile the layers; with `recompute` so that least is kept, by transformers where nothing is compiled."""
        from fastft.graph.compile import compile as compile_layers

        state = get_state(self.model)
        if state.compiled is None:
            with quiet():
                plan = "min" if recompute else "auto"
                compile_layers(self.model, plan=plan, compute=self.args.compute or "exact")
            state = get_state(self.model)
        planned = state.compiled.planned
        if planned is not None:
            self.settle_batches(planned, next(state.compiled.layers[0].parameters()).device)
            self._plan_run()  # so that what cannot be met is said before anything else is made ready
        have = state.compiled.base_report.compute
        if self.args.compute not in (None, have) and state.compiled.layers:
            remedy = f"It was compiled before with compute={have!r}; say it there, fastft.compile(model, compute=...)."
            raise UsageError(Problem(f"{type(self.args).__name__} compute", self.args.compute, repr(have), remedy))
        if self.args.compute is None and have != "exact":
            print(f"fastft: the model was compiled before with compute={have!r}, which is not exact, and stays so.")
        self.args.compute = self.args.compute or have
        if not recompute:
            return
        if not state.compiled.layers:
            recomputing.ask(self.args, True)
            how = "transformers recomputes the layers, since none is compiled"
        elif state.compiled.settings.plan == "min":
            how = "the layers are compiled with the memory plan 'min'"
        else:
            plan = state.compiled.settings.plan
            how = f"no effect, since the model was compiled before with the plan {plan!r}; fastft.compile(model, 'min')"
        print(f"fastft: gradient_checkpointing=True: {how}.")

    def _tell_plan(self, text: str) -> None:
        """Say once, beside the bar, that a memory plan cannot be met; of larger batches the record tells at the end."""
        if not self._told_of_plan and self.is_world_process_zero():
            tqdm.write(f"fastft: {text}")
        self._told_of_plan = self._told_of_plan or text

    def _plan_run(self) -> None:
        """Have the memory plan made for this run, whatever ran on the model before, and tell what cannot be met."""
        planned = planned_of(self.model)
        if planned is not None:
            where = next(get_state(self.model).compiled.layers[0].parameters()).device
            with self._telling_of_plan():
                planned.begin(*self.head_use(), self.largest_batch(), where)

    def _telling_of_plan(self) -> contextlib.AbstractContextManager[None]:
        planned = planned_of(self.model)
        return contextlib.nullcontext() if planned is None else planned.told_to(self._tell_plan)

    # ---- training

    def create_optimizer(self, *args: Any) -> Any:
        """Make the optimizer; embeddings and LoRA's B matrices get rates of their own where the config asks."""
        if self.optimizer is not None:
            return super().create_optimizer(*args)
        config, given = self.args, self.optimizer_cls_and_kwargs
        if (config.embedding_learning_rate, config.loraplus_ratio) != (None, None):
            model = args[0] if args else self.model
            made = given or self.get_optimizer_cls_and_kwargs(config, model)
            self.optimizer_cls_and_kwargs = optimizers.with_groups(
                made, model, config, self.get_decay_parameter_names(model)
            )
        try:
            self._optimizer_made = super().create_optimizer(*args)
        finally:
            self.optimizer_cls_and_kwargs = given
        return self._optimizer_made

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Go forward and backward through a micro-batch; return its loss for the log, without waiting for it."""
        loss = super().training_step(*args, **kwargs)
        self.step_launched()
        return self.finite.filtered(loss, self.state.global_step, self._globalstep_last_logged)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the record says how the run ended, and the model has its own forward back."""
        kwargs |= dict(zip(("resume_from_checkpoint", "trial", "ignore_keys_for_eval"), args, strict=False))
        resume = kwargs.get("resume_from_checkpoint")
        begun = resuming.check(resume, self.args, self.model, self.recorder.method, self.resume_problems)
        self._own, self.recorder.begun = () if begun is None else (begun,), begun
        self.aside.expect(begun)
        self.recorder.extra[optimizers.GIVEN] = optimizers.is_given(self, self._optimizer_made)
        self._plan_run()
        kwargs["resume_from_checkpoint"] = None if begun is None else str(begun)
        try:
            with (
                quiet(),
                between_libraries(),
                hygiene.unpatched(self.model),
                hygiene.noise_ended(self),
                self._telling_of_plan(),
                self.interruption.watched(self.args.world_size == 1, lambda error: memory.let_go(error, self.model)),
            ):
                output = super().train(**kwargs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._stop()) from None
        except torch.OutOfMemoryError as error:
            self.end_training()
            memory.let_go(error, self.model)
            told = memory.out_of_memory(error, self.model, self._rescue())
            self._record_failure(told)
            raise told from error
        except (EngineError, MetricError, RewardError) as error:  # what a trainer depends on failed, not the trainer
            told = type(error)(*error.problems, self._rescue())
            self._record_failure(told)
            raise told from error.__cause__  # not from `error`: it says what `told` says
        except BaseException as error:
            if self.state.global_step and isinstance(error, Exception) and not isinstance(error, SaveError):
                error.add_note(self._rescue())
            self._record_failure(error)
            raise
        finally:
            self.finite.restore()
            telling.close(self)
            self.compiling.stop()
            self.end_training()
            release_weights(self.model)
        if self.is_world_process_zero():
            for note in (note for note in self.recorder.noted() if note != self._told_of_plan):
                print(f"fastft: {note}; {self.recorder.folder / lineage.RECORD} says so, too.")
        return output

    def end_training(self) -> None:
        """Let go of what only training needs, when a run has ended however it did."""

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        refuse_missing(self.args, metrics)
        return super()._determine_best_metric(metrics=metrics, trial=trial)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return what TRL's trainer does; the last rows are never left out."""
        with batches.all_kept(self.args):
            return super().get_eval_dataloader(*args, **kwargs)

    def begin_evaluation(self) -> None:
        """Make room for an evaluation, which may come in the middle of a run."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as TRL's trainer does."""
        self.recorder.spent.count()
        self.begin_evaluation()
        with between_libraries():
            return super().evaluate(*args, **kwargs)

    def _record_failure(self, error: BaseException) -> None:
        """Write the record of a run that failed, with what it came to as far as that can be measured."""
        if self.recorder.record and self.is_world_process_zero():
            with contextlib.suppress(SaveError):
                self._finish("failed", f"{type(error).__name__}: {error}")

    def _finish(self, status: str, error: str | None) -> None:
        """Write the end of the record of a run that was broken off, with the steps behind its last line.

        Where a device tells no more what it came to, that is said there.
        """
        try:
            if self.args.world_size == 1:  # else the others would be waited for, which may be somewhere else
                self.recorder.spent.count()
            self.recorder.finish(status, self.state, self.model, error)
        except SaveError:
            raise
        except Exception as other:
            more = f"what it came to could not be measured ({type(other).__name__}: {other})"
            self.recorder.write_record(status, f"{error}; {more}" if error else more)

    def _rescue(self) -> str:
        """Save what was trained up to the last whole step, unless it is saved already, and say where it is."""
        done = self.state.global_step
        if self.recorder.record.get("status") == "running" and done > self.recorder.ended:
            self.recorder.on_step_end(self.args, self.state, self.control)  # a callback before it has failed
        target, why = self._save_last_step()
        if target is not None:
            lacks = self._lacks(target)
            on = f"it cannot be gone on from: {lacks}" if lacks else f"resume={str(target)!r} goes on from it"
            on = f"fastft.load({str(target)!r}) loads it: no step was left" if done >= self.state.max_steps else on
            return f"Step {done}, the last whole one, is saved in {target}; {on}."
        return f"Step {done} {why}" if why else self._last_checkpoint()

    def _last_checkpoint(self) -> str:
        return f"The last checkpoint is {self._own[-1]}." if self._own else "No step had been completed."

    def _save_last_step(self) -> tuple[Path | None, str]:
        """Save what was trained up to the last whole step, unless it is saved already; return where, or why not."""
        done = self.state.global_step
        if not done or self.args.world_size > 1:
            return None, ""
        target = Path(self.args.output_dir) / f"checkpoint-{done}"
        if target in self._own:  # one of that name may be of an earlier run
            return target, ""
        best = self.state.best_model_checkpoint if self.interruption.over and self.args.load_best_model_at_end else None
        if best is not None:
            return None, f"is not saved: the weights are those of {best} by now."
        try:
            with quiet():
                self._save_checkpoint(self.model, None)
        except (SaveError, RuntimeError) as problem:
            return None, f"could not be saved: {problem}"
        return target, ""

    def _lacks(self, folder: Path) -> str:
        """Return what keeps a checkpoint from being gone on from, "" if nothing does."""
        found = resuming.damages(folder) if self.args.world_size == 1 else []
        if found and self.args.save_only_model:
            return "save_only_model=True leaves the state of the optimizer out"
        return found[0] if found else ""

    def _stop(self) -> Stopped:
        """Save the last whole step of an interrupted run if there is time for it, and say how far it came."""
        asked, folder, steps = self.interruption, Path(self.args.output_dir), self.state.global_step
        _, why = self._save_last_step() if asked.waits else (None, "it was to stop at once")
        last = self._own[-1] if self._own else None
        stopped = Stopped(
            steps=steps,
            planned=self.state.max_steps,
            checkpoint=last,
            whole=bool(steps) and last == folder / f"checkpoint-{steps}",
            why=why,
            failed=asked.failed,
            lacks="" if last is None else self._lacks(last),
            resume="resume=True" if last is None or last.parent == folder else f"resume={str(last)!r}",
        )
        if self.recorder.record.get("status") == "running" and self.is_world_process_zero():
            with contextlib.suppress(SaveError):
                self._finish("interrupted", asked.failed or None)
        if asked.waits and asked.begun:
            self._end_callbacks()
        return stopped

    def _end_callbacks(self) -> None:
        """Let callbacks close what they have opened, as at the end of a run that was not interrupted."""
        try:
            self.callback_handler.on_train_end(self.args, self.state, self.control)
        except Exception as error:
            print(f"fastft: a callback failed at the end of the interrupted run: {type(error).__name__}: {error}")

    # ---- saving

    def resume_problems(self, folder: Path) -> list[Problem | str]:
        """Return what of a checkpoint's own files this trainer cannot go on with. The same in every process."""
        if optimizers.is_given(self, self._optimizer_made):
            return []
        return [*optimizers.unlike(self.args, lineage.record_of(folder), folder)]

    def save_extra(self, folder: Path) -> None:
        """Write into a checkpoint what this trainer needs besides to go on with the same curve."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place and rename it when it is whole. Raises `SaveError`."""
        self.finite.restore()  # of a step that was broken off
        if self.interruption.asked:  # it may have come while an evaluation ran, behind the log
            self.log_last_line()
        folder = Path(super()._get_output_dir(trial))
        target = folder / f"checkpoint-{self.state.global_step}"
        last = [path for path in self._own if path != target]
        untouched = f"The last whole checkpoint is {last[-1]}." if last else "There is no earlier checkpoint."
        main, self._staging = self.is_world_process_zero(), checkpoint.staging_folder(target)
        record = self.recorder.at_checkpoint(self.state)
        try:
            with checkpoint.staged(target, untouched) if main else contextlib.nullcontext():
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, None)
                self.save_extra(self._staging / target.name)
                if main:
                    checkpoint.write_json(self._staging / target.name / lineage.RECORD, record)
                self.accelerator.wait_for_everyone()
                if main:
                    self._publish(target)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if main:
            checkpoint.rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self._own = (*(path for path in self._own if path != target), target)
        if self._to_push is not None:
            self._to_push = None
            super()._push_from_checkpoint(str(target))

    def _publish(self, target: Path) -> None:
        whole = self._staging / target.name
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == self._staging:
            self.state.best_model_checkpoint = str(target)
            self.state.save_to_json(str(whole / "trainer_state.json"))
        checkpoint.put_in_place(whole, target)
        self._staging.rmdir()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._to_push = checkpoint_folder

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and tokenizer; files in `output_dir` are replaced only when all are written."""
        if _internal_call or self.args.world_size > 1:
            super().save_model(output_dir, _internal_call=_internal_call)
            return
        target = Path(output_dir or self.args.output_dir)
        with checkpoint.staged(target / "model", f"What stood in {target} is untouched.") as folder:
            super().save_model(str(folder), _internal_call=True)
            (folder / "README.md").unlink(missing_ok=True)
            checkpoint.move_files(folder, target)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card from the run record."""
        if self.is_world_process_zero():
            text = card.model_card(checkpoint.plain(self.recorder.record))
            checkpoint.write_text(Path(self.args.output_dir) / "README.md", text)

    def _send_telemetry(self) -> None:
        """Send nothing."""
