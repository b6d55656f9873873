"""Lightning's counts of epochs, batches and steps, put right where it resumes a training wrongly.

It goes on exactly from the end of an epoch, as long as `max_steps` is not given.  Found by running
it (2.6.6) and comparing with an unbroken run:

A checkpoint saved at the start of a batch: the batch counts twice in the count of the whole
training, which `val_check_interval` goes by where `check_val_every_n_epoch` is null, so every later
validation comes a batch early; and its step counts twice, so what is logged at each step stands one
too far.

A checkpoint saved at the end of an epoch, with `max_steps`: the epoch ends once more, without a
batch, and counts twice.  With `max_epochs` beside it the training ends an epoch too early.
"""

from typing import Any

from lightning.pytorch import Trainer


def mend_loaded(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Change a checkpoint's counts for what Lightning makes of them: in `on_load_checkpoint`."""
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is None:
        return
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    total = epochs["total"]
    is_over = total["ready"] == total["started"] == total["processed"] > 0
    if is_over and trainer.max_steps != -1:
        begin_next_epoch(epochs, batches)
    current = batches["current"]
    ends_step = batches["is_last_batch"] or (
        current["ready"] % trainer.accumulate_grad_batches == 0
    )
    if current["ready"] > current["started"] and ends_step:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def begin_next_epoch(epochs: dict[str, Any], batches: dict[str, Any]) -> None:
    """From the end of an epoch to the place before the first batch of the next."""
    for count in (epochs["total"], epochs["current"]):
        count["completed"] = count["processed"]
        count["ready"] += 1
    batches["current"] = dict.fromkeys(batches["current"], 0) | {"ready": 1}
    batches["total"]["ready"] += 1
    batches["is_last_batch"] = False


def mend_batches(trainer: Trainer) -> None:
    """Count no batch that was not begun: in `on_train_start`."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    total.ready = total.started


def mend_epochs(trainer: Trainer) -> None:
    """Count the epoch that begins: in `on_train_epoch_start`."""
    current: Any = trainer.fit_loop.epoch_progress.current
    current.ready = current.started + 1
