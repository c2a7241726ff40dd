"""What a run needs to go on as if it had never been stopped, as plain values for a checkpoint.

    plan = make_plan(options, batches)                      # of a run that goes on: and its checkpoint
    state = TrainState(optimizer, scheduler, scaler, plan, order)
    state.load_state_dict(checkpoint)                       # as the run left it
    names = state.epoch_finished({"CIDEr": 0.5, "val_loss": 2.9})  # of files whose best epoch this is

It keeps the optimizer, the schedule and the position inside an epoch together; which they are, the
program decides. torch's schedulers hold their plan and their progress in one dict: only the progress
is taken from a checkpoint, because a resumed run may have another plan.
"""

import math

import experiment_utils
import model_selection

SCHEDULER_PROGRESS = (
    "last_epoch", "_step_count", "_last_lr", "base_lrs", "best", "num_bad_epochs", "cooldown_counter",
    "_schedule_phases",
)  # fmt: skip
EPOCH_START = {"captions": 0, "loss_sum": 0.0, "tokens": 0, "seconds": 0.0, "rate": 0.0}


class TrainState:
    """What a checkpoint must hold so that a resumed run is the run that was never stopped.

    plan: {"epochs": the last epoch, "reward_epochs": how many of the last ones are trained on the
        reward, "batches": those of an epoch, "steps": those of one_cycle, "schedule": its name or None}.
    order: what decides the order of an epoch's captions, a string.
    select_by: the rule of model_selection by which an epoch is the best.
    loop: `epoch`, `step`, `bests` (the model_selection.Best, or None, of each checkpoint file that
        holds one), `epochs_without_improvement`, and the position inside an epoch: EPOCH_START's
        captions seen, their loss in nats and tokens, seconds, rate it began at.
    """

    def __init__(self, optimizer, scheduler, scaler, plan, order, select_by="cider"):
        self.optimizer, self.scheduler, self.scaler = optimizer, scheduler, scaler
        self.plan, self.order, self.history, self.select_by = plan, order, [], select_by
        bests = dict.fromkeys(model_selection.rules_of_files(select_by))
        self.loop = {"epoch": 0, "step": 0, "bests": bests}
        self.loop |= EPOCH_START | {"epochs_without_improvement": 0}

    @property
    def best(self):
        """The model_selection.Best that best.pt holds, or None."""
        return self.loop["bests"][model_selection.chosen_file(self.select_by)]

    def state_dict(self):
        """Plain values and tensors: part of a checkpoint."""
        loop, best = self.loop, self.best
        return {
            "plan": self.plan,
            "epoch": loop["epoch"],
            "step": loop["step"],
            "best_score": best.score if best else None,
            "early_stopping": {
                "best_loss": best.loss if best else math.inf,
                "epochs_without_improvement": loop["epochs_without_improvement"],
            },
            "selection": model_selection.as_plain(loop["bests"], self.select_by),
            "data_position": {name: loop[name] for name in EPOCH_START} | {"order": self.order},
            "history": self.history,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler and self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_state": experiment_utils.random_state(),
        }

    def load_state_dict(self, state):
        """Take over what `state_dict` gave. The plan, and what options decide, stay this run's.

        Raises: ValueError inside an epoch whose captions come in another order now.
        """
        position = state["data_position"]
        self.loop |= {"epoch": state["epoch"], "step": state["step"]}
        self.loop |= {name: type(zero)(position[name]) for name, zero in EPOCH_START.items()}
        if self.loop["captions"] and position["order"] not in (self.order, None):
            raise ValueError(
                "--resume goes on inside an epoch, but --seed, --max_train_images or the data give "
                "its captions another order: give what the run was begun with, or resume from a "
                "model_epoch_N.pt"
            )
        self.history = [dict(row) for row in state["history"]]
        self._load_selection(state)
        planned = self.optimizer.state_dict()["param_groups"]  # as this run's options have them
        changes = self.plan["schedule"] not in (None, state["plan"]["schedule"])
        groups = planned if changes else state["optimizer"]["param_groups"]
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        for group, plan in zip(self.optimizer.param_groups, planned, strict=True):
            group["weight_decay"] = plan["weight_decay"]
        if self.scheduler and not changes:
            stored = state["scheduler"].items()
            progress = {name: value for name, value in stored if name in SCHEDULER_PROGRESS}
            self.scheduler.load_state_dict(progress)
            if self.plan["steps"] != state["plan"]["steps"]:
                stretch_one_cycle(self.scheduler, self.plan["steps"] / state["plan"]["steps"])
        if state["scaler"]:  # empty without float16
            self.scaler.load_state_dict(state["scaler"])
        experiment_utils.set_random_state(state["random_state"])

    def _load_selection(self, state):
        """The best epochs so far, by this run's rule: from the history where that is another one.

        A checkpoint that knows no `selection` had its best epoch by CIDEr.
        """
        record, select_by = state.get("selection", {}), self.select_by
        self.loop["bests"] = model_selection.from_plain(record, select_by, self.history)
        stale = state["early_stopping"]["epochs_without_improvement"]
        if select_by != model_selection.rule_of(state.get("config")):
            _, stale = model_selection.replay(select_by, self.history)
        self.loop["epochs_without_improvement"] = int(stale)

    @property
    def stage(self):
        """What the steps of this epoch are measured by: their "loss" on captions, or their "reward"."""
        return "reward" if self.loop["epoch"] >= last_on_captions(self.plan) else "loss"

    def begin_epoch(self, reward_rate):
        """Before an epoch's first step, or the next one of an epoch that goes on: the reward's rate is constant."""
        if self.stage == "reward":
            for group in self.optimizer.param_groups:
                group["lr"] = reward_rate
        if self.loop["captions"] == 0:
            self.loop["rate"] = self.optimizer.param_groups[0]["lr"]

    def step_finished(self):
        """After a batch: one_cycle's rate moves; past its plan it stays."""
        moves = self.plan["schedule"] == "one_cycle" and self.stage == "loss"
        scheduler = self.scheduler if moves else None
        if scheduler and scheduler.last_epoch + 1 < scheduler.total_steps:
            scheduler.step()

    def epoch_finished(self, row):
        """After validation: the other schedules' rate moves. Returns the checkpoint files whose best epoch this is.

        They are best_loss.pt and best_eval.pt, and best.pt with the one that --select_by names.
        Early stopping counts what that rule calls better; an equal score at a lower loss is not.
        """
        loop, schedule = self.loop, self.plan["schedule"] if self.stage == "loss" else None
        if schedule == "reduce_lr_on_plateau":
            self.scheduler.step(row["val_loss"])
        elif schedule not in (None, "one_cycle"):
            self.scheduler.step()
        loop |= EPOCH_START | {"epoch": loop["epoch"] + 1}
        improved = model_selection.improves(self.select_by, self.best, row)
        stale = loop["epochs_without_improvement"] + 1
        loop["epochs_without_improvement"] = 0 if improved else stale
        rules, bests = model_selection.rules_of_files(self.select_by), loop["bests"]
        loop["bests"] = {
            file: model_selection.choose(rule, bests[file], row) for file, rule in rules.items()
        }
        names = [file for file in rules if loop["bests"][file] is not bests[file]]
        is_best = model_selection.chosen_file(self.select_by) in names
        return [*names, model_selection.BEST] if is_best else names


def make_plan(options, batches, checkpoint=None):
    """The plan of a new run, or of one that goes on. Raises: ValueError when nothing is left.

    batches: CaptionBatches, whose number decides how long one_cycle is.
    """
    schedule = options.schedule.scheduler_type if options.schedule.use_scheduler else None
    num_batches = batches.num_batches
    typed, asked = options.typed, (options.training.epochs, options.training.scst_epochs)
    if checkpoint is None:
        plan = {"epochs": sum(asked), "reward_epochs": asked[1], "batches": num_batches}
        return plan | {"steps": asked[0] * num_batches, "schedule": schedule}
    plan, epoch = {"reward_epochs": 0} | checkpoint["plan"], checkpoint["epoch"]
    seen = checkpoint["data_position"]["captions"]
    num_batches_before = plan["batches"] or num_batches
    plan |= planned_epochs(plan, epoch, seen > 0, typed, *asked)
    if schedule != plan["schedule"] and not {"use_scheduler", "scheduler_type"} & options.typed:
        raise ValueError(f"schedule {plan['schedule']} is not that of its configuration")
    if schedule == plan["schedule"] and "warmup_epochs" in options.typed:
        raise ValueError("--warmup_epochs belongs to a new plan: this one keeps its warm-up")
    if plan["epochs"] <= epoch:
        raise ValueError(
            f"{options.run.model_path}: its plan of {plan['epochs']} epochs is done: "
            f"give --{'scst_' if plan['reward_epochs'] else ''}epochs for more"
        )
    if schedule == plan["schedule"] == "one_cycle":
        plan["steps"] = round(plan["steps"] * num_batches / num_batches_before)
    elif schedule not in (None, plan["schedule"]):
        whole_epochs = last_on_captions(plan) - epoch - 1
        plan["steps"] = batches.num_left(seen) + whole_epochs * num_batches
    return plan | {"batches": num_batches, "schedule": schedule}


def change_course(state, options, checkpoint):
    """On resume: say what rule or schedule is new, or go on at another --learning_rate."""
    schedule, old, training = state.plan["schedule"], checkpoint["config"], options.training
    if training.select_by != model_selection.rule_of(old):
        epoch = state.best.epoch if state.best else "none, for they lack its scores"
        print(
            f"--select_by {training.select_by} is new to this run: its best epoch so far is {epoch}"
        )
    if schedule is not None and schedule != checkpoint["plan"]["schedule"]:
        print(f"--scheduler_type {schedule} is new to this run: its schedule starts now")
        return
    factors = [training.learning_rate / old["learning_rate"]] * len(state.optimizer.param_groups)
    if training.fine_tune_encoder:  # whose group is the last
        factors[-1] = training.encoder_learning_rate / old["encoder_learning_rate"]
    scale_rates(state, factors)


def last_on_captions(plan):
    """The last epoch of a plan that is trained on captions; those after it are trained on the reward."""
    return plan["epochs"] - plan["reward_epochs"]


def planned_epochs(plan, epoch, inside, typed, epochs, reward_epochs):
    """`epochs` and `reward_epochs` of the plan of a run that goes on.

    Args:
        plan: what it was.
        epoch, inside: whole epochs done, and whether the next one has begun: it ends as it began.
        typed: names of options that were typed.
        epochs, reward_epochs: --epochs and --scst_epochs, additional ones, for what was typed.
    Raises: ValueError when --epochs comes too late.
    """
    captions_until, more = last_on_captions(plan), reward_epochs if "scst_epochs" in typed else None
    if plan["reward_epochs"] and epoch >= captions_until:
        if late := typed & {"epochs", "learning_rate", "use_scheduler", "scheduler_type"}:
            raise ValueError(
                f"--{min(late)} is for epochs on captions, and these are done: "
                "give --scst_epochs for more on the reward"
            )
        until = plan["epochs"] if more is None else epoch + more
        return {"epochs": until, "reward_epochs": until - captions_until}
    if "epochs" in typed:
        captions_until = epoch + max(epochs, inside)
    more = plan["reward_epochs"] if more is None else more
    return {"epochs": captions_until + more, "reward_epochs": more}


def stretch_one_cycle(scheduler, factor):
    """Make every phase of a plan longer by a factor; the position in it stays where it was.

    That is what other batches need: as many captions as before now take more steps, or fewer.
    """
    for phase in scheduler._schedule_phases:
        phase["end_step"] = (phase["end_step"] + 1) * factor - 1
    scheduler.last_epoch = int(scheduler.last_epoch * factor)


def scale_rates(state, factors):
    """Multiply everything that the schedule computes each group's rate from."""
    for group, factor in zip(state.optimizer.param_groups, factors, strict=True):
        for name in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
            group[name] *= factor
    if hasattr(state.scheduler, "base_lrs"):
        pairs = zip(state.scheduler.base_lrs, factors, strict=True)
        state.scheduler.base_lrs = [rate * factor for rate, factor in pairs]
